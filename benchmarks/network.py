"""The network: a step of training, inference, the share of what the machine could do, and the report's whole recipe."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import material
from benchmarks.material import BATCH, NOISE_SIGMA, Size
from benchmarks.measure import ROOT, Part, in_gib, interleave
from blobpipe.cli.run import keep_memory
from blobpipe.images import tiles
from blobpipe.networks import fused, kernels, loop, report_network, train
from blobpipe.params import Train

THREADS = 2
N_MEMORY = 400  # subframes that plain PyTorch is fed with, again and again
# ISR 3.3, 5
REPORT_SUBFRAMES = 16_000
REPORT_EPOCHS = 200
REPORT_HOURS = 4.0
SUBFRAMES_PER_S = "subframes/s"


def plain_network() -> nn.Sequential:
    """The report's network as anyone would write it in PyTorch."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 5, padding=2), nn.ReLU(), nn.MaxPool2d(4), nn.Dropout(0.15)),
        *(nn.Conv2d(8, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(4), nn.Dropout(0.30)),
        *(nn.Flatten(), nn.Linear(4096, 128), nn.ReLU(), nn.Linear(128, 2)),
    )


def train_speed(size: Size) -> Part:
    """Steps of training: plain PyTorch from memory, and ours with and without rendering."""
    x, y = map(torch.from_numpy, material.pixels(size, min(N_MEMORY, size.n_train)))
    best = x.contiguous(memory_format=torch.channels_last)
    rates = interleave(
        {
            "plain": _plain_steps(plain_network(), x, y, size.n_plain),
            "channels_last": _plain_steps(_channels_last(), best, y, size.n_plain),
            "bfloat16": _plain_steps(_channels_last(), best, y, size.n_plain, autocast=True),
            "fused": _fused_steps(x, y, size.n_train // BATCH),
            "ours": _ours(size),
        },
        least=size.least,
        most=size.most,
    )
    part = Part(f"Training the report's network, batches of {BATCH}, {THREADS} threads")
    part.add("plain_rate", "plain PyTorch, float32, from memory", SUBFRAMES_PER_S, rates["plain"])
    part.add(
        "channels_last_rate", "the same, channels last", SUBFRAMES_PER_S, rates["channels_last"]
    )
    part.add(
        "bfloat16_rate",
        "the same, channels last, bfloat16 autocast",
        SUBFRAMES_PER_S,
        rates["bfloat16"],
    )
    part.add("fused_rate", "fused kernels, float32, from memory", SUBFRAMES_PER_S, rates["fused"])
    part.add("ours_rate", "blobpipe, float32, rendering included", SUBFRAMES_PER_S, rates["ours"])
    part.add_ratio(
        "ours_over_plain", "blobpipe / plain PyTorch", rates["ours"], rates["plain"], at_least=12
    )
    layouts = np.maximum(rates["channels_last"], rates["bfloat16"])
    part.add_ratio(
        "ours_over_layouts",
        "blobpipe / best of layout and autocast",
        rates["ours"],
        layouts,
        at_least=4,
    )
    part.add_ratio(
        "fused_over_plain", "fused kernels / plain PyTorch", rates["fused"], rates["plain"]
    )
    part.add_share("rendering_share", "with / without rendering", rates["ours"], rates["fused"])
    return part


def _channels_last() -> nn.Module:
    return plain_network().to(memory_format=torch.channels_last)


def _plain_steps(
    network: nn.Module, x: Tensor, y: Tensor, n_batches: int, *, autocast: bool = False
) -> Callable[[], float]:
    optimiser = torch.optim.Adam(network.parameters())
    batches = _batches(x, y)

    def work() -> float:
        torch.set_num_threads(THREADS)
        for images, labels in itertools.islice(batches, n_batches):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(network(images), labels)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
        return n_batches * BATCH

    return work


def _fused_steps(x: Tensor, y: Tensor, n_batches: int) -> Callable[[], float]:
    network = report_network.new_network(1, "fused")
    optimiser = torch.optim.Adam(network.parameters(), fused=True)
    batches = _batches(x, y)

    def work() -> float:
        kernels.set_threads(THREADS)
        for step, (images, labels) in enumerate(itertools.islice(batches, n_batches)):
            loss = F.cross_entropy(network(images, step), labels)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
        return n_batches * BATCH

    return work


def _batches(x: Tensor, y: Tensor) -> Any:
    return itertools.cycle(list(zip(x.split(BATCH), y.split(BATCH), strict=True)))


def _ours(size: Size) -> Callable[[], float]:
    """Epochs as the stage ``train`` does them, with next to nothing to monitor."""
    made = material.make_recipes(size)
    params = Train(batch_size=BATCH, epochs=REPORT_EPOCHS, adam_epochs=REPORT_EPOCHS, device="cpu")
    training = _training(params, made, material.pixels(size, 1))

    def work() -> float:
        kernels.set_threads(THREADS)
        _epoch(training)
        return len(made.recipes)

    return work


def _training(params: Train, made: material.Made, monitor: Any) -> train.ReportTraining:
    images, labels = monitor
    state = train.new_state(params, {}, Path("checkpoint"))
    validation = train.Validation(images[:, 0], labels)
    return train.ReportTraining(state, made.scene, made.recipes, validation, params, NOISE_SIGMA)


def _epoch(training: train.ReportTraining) -> None:
    with contextlib.redirect_stderr(io.StringIO()):  # its own progress bar
        loop.run_epoch(training.state, training.batches, training.update, training.monitor)


def infer(size: Size) -> Part:
    """Probabilities of subframes in memory."""
    images, _ = material.pixels(size, size.n_fused_infer)
    some = torch.from_numpy(images[: size.n_plain_infer])
    rates = interleave(
        {
            "plain": _plain_inference(plain_network().eval(), some),
            "channels_last": _plain_inference(
                _channels_last().eval(), some.to(memory_format=torch.channels_last)
            ),
            "ours": _fused_inference(images[:, 0]),
        },
        least=size.least,
        most=size.most,
    )
    part = Part(f"Inference, {THREADS} threads, float32")
    part.add("plain_rate", "plain PyTorch", SUBFRAMES_PER_S, rates["plain"])
    part.add(
        "channels_last_rate", "the same, channels last", SUBFRAMES_PER_S, rates["channels_last"]
    )
    part.add("ours_rate", "blobpipe", SUBFRAMES_PER_S, rates["ours"])
    part.add_ratio(
        "ours_over_plain", "blobpipe / plain PyTorch", rates["ours"], rates["plain"], at_least=10
    )
    return part


def _plain_inference(network: nn.Module, images: Tensor) -> Callable[[], float]:
    def work() -> float:
        torch.set_num_threads(THREADS)
        with torch.inference_mode():
            for batch in images.split(BATCH):
                torch.softmax(network(batch), 1)
        return len(images)

    return work


def _fused_inference(images: Any) -> Callable[[], float]:
    network = report_network.new_network(1, "fused")

    def work() -> float:
        kernels.set_threads(THREADS)
        report_network.predict(network, images)
        return len(images)

    return work


# ----------------------------------------------------------------------------------------------------- operations


def operations() -> dict[str, dict[str, int]]:
    """Multiply-adds of one subframe: forward as defined and as done, backward everywhere and where a window's maximum was.

    The first convolution needs no gradient of its input. Columns of four results of five taps take 8 products for 20.
    """
    network = report_network.ReportNetwork()
    side = tiles.SIDE
    counts = {}
    for name, conv in (("conv1", network.blocks[0]), ("conv2", network.blocks[1])):
        forward = conv.weight.numel() * side**2
        backward = 1 if name == "conv1" else 2
        counts[name] = {
            "forward_as_defined": forward,
            "forward": forward * 8 // 20,
            "backward_everywhere": backward * forward,
            "backward": backward * forward // 16,
        }
        side //= 4
    dense = network.layers[0].weight.numel() + network.layers[1].weight.numel()
    counts["dense"] = {
        "forward_as_defined": dense,
        "forward": dense,
        "backward_everywhere": 2 * dense,
        "backward": 2 * dense,
    }
    counts["together"] = {
        key: sum(count[key] for count in counts.values()) for key in counts["dense"]
    }
    return counts


def roofline(size: Size) -> Part:
    """What the machine could do, measured on the spot, and the share of it that the network reaches."""
    counts = operations()
    works = _layers(size)
    n_bytes = _least_bytes()
    gflops = {name: 2e-9 * counts[name.split("_")[0]][name.split("_")[1]] for name in works}
    works = {"peak": _matrix_product(size.n_matrix), "bandwidth": _copy(size.copied_mib), **works}
    x, y = map(torch.from_numpy, material.pixels(size, min(N_MEMORY, size.n_train)))
    works |= {"step": _fused_steps(x, y, size.n_train // BATCH), "step with rendering": _ours(size)}
    rates = interleave(works, least=size.least, most=size.most)
    part = Part(f"What the machine allows, {THREADS} threads, float32")
    part.add("peak", "matrix product (sgemm)", "GFLOP/s", rates["peak"])
    part.add("bandwidth", "copying in memory, read and written", "GB/s", rates["bandwidth"])
    for name, of_one in gflops.items():
        allowed = np.minimum(rates["peak"], rates["bandwidth"] * of_one / (1e-9 * n_bytes[name]))
        what = (
            name.replace("_", " ")
            .replace("conv", "convolution block ")
            .replace("dense", "dense layers,")
        )
        what = what.replace("1 ", "1, ").replace("2 ", "2, ")
        part.add(f"{name}_rate", what, "GFLOP/s", of_one * rates[name])
        part.add_share(
            f"{name}_share", f"{what}: share of what is allowed", of_one * rates[name], allowed
        )
    of_step = 2e-9 * (counts["together"]["forward"] + counts["together"]["backward"])
    for name in ("step", "step with rendering"):
        share = f"{name.replace('step', 'training step')}: share of the peak"
        part.add_share(
            f"{name.replace(' ', '_')}_share", share, of_step * rates[name], rates["peak"]
        )
    part.remarks.append(
        "Operations are those that are done: forward, two products of five; backward, only where a window had its maximum. "
        "What columns are transformed and compared with is not counted. Bytes are those that have to be moved at least once "
        "between memory and a layer."
    )
    return part


def _matrix_product(n: int) -> Callable[[], float]:
    a = torch.randn(n, n)
    b = torch.randn(n, n)
    out = torch.empty(n, n)

    def work() -> float:
        torch.set_num_threads(THREADS)
        torch.mm(a, b, out=out)
        return 2e-9 * n**3

    return work


def _copy(mib: int) -> Callable[[], float]:
    source = torch.ones(mib * 2**18)
    target = torch.empty_like(source)

    def work() -> float:
        torch.set_num_threads(THREADS)
        target.copy_(source)
        return 2e-9 * source.nbytes

    return work


def _layers(size: Size) -> dict[str, Callable[[], float]]:
    """Each layer forward and backward on a batch; subframes done."""
    network = report_network.new_network(1, "fused")
    x = torch.from_numpy(material.pixels(size, BATCH)[0])
    middle = fused.conv_relu_pool(x, network.blocks[0].weight, network.blocks[0].bias).detach()
    last = (
        fused.conv_relu_pool(middle, network.blocks[1].weight, network.blocks[1].bias)
        .detach()
        .flatten(1)
    )
    repeats = max(1, size.n_train // BATCH // 4)

    def block(conv: nn.Conv2d, dropout: float) -> Callable[[Tensor], Tensor]:
        return lambda images: fused.conv_relu_pool(
            images, conv.weight, conv.bias, dropout=dropout, seed=1
        )

    def dense(features: Tensor) -> Tensor:
        return network.layers[1](F.relu(network.layers[0](features)))

    layers = {
        "conv1": (block(network.blocks[0], 0.15), x, list(network.blocks[0].parameters())),
        "conv2": (
            block(network.blocks[1], 0.30),
            middle.requires_grad_(),
            [middle, *network.blocks[1].parameters()],
        ),
        "dense": (
            dense,
            last.requires_grad_(),
            [last, *network.layers[0].parameters(), *network.layers[1].parameters()],
        ),
    }
    works: dict[str, Callable[[], float]] = {}
    for name, (layer, inputs, wanted) in layers.items():
        works[f"{name}_forward"] = _forward(layer, inputs, repeats)
        works[f"{name}_backward"] = _backward(layer, inputs, wanted, repeats)
    return works


def _forward(
    layer: Callable[[Tensor], Tensor], inputs: Tensor, repeats: int
) -> Callable[[], float]:
    def work() -> float:
        kernels.set_threads(THREADS)
        with torch.inference_mode():
            for _ in range(repeats):
                layer(inputs)
        return repeats * len(inputs)

    return work


def _backward(
    layer: Callable[[Tensor], Tensor], inputs: Tensor, wanted: list[Tensor], repeats: int
) -> Callable[[], float]:
    outputs = layer(inputs)
    gradient = torch.randn_like(outputs)

    def work() -> float:
        kernels.set_threads(THREADS)
        for _ in range(repeats):
            torch.autograd.grad(outputs, wanted, gradient, retain_graph=True)
        return repeats * len(inputs)

    return work


def _least_bytes() -> dict[str, float]:
    """Per subframe, each array once: images and results as float32, winners as bytes, dense weights once a batch."""
    image = tiles.SIDE**2
    middle = 8 * 64**2
    last = 16 * 16**2
    weights = report_network.ReportNetwork().dense1.weight.numel() / BATCH
    return {
        "conv1_forward": 4 * image + 5 * middle,
        "conv1_backward": 4 * image + 5 * middle,
        "conv2_forward": 4 * middle + 5 * last,
        "conv2_backward": 8 * middle + 5 * last,
        "dense_forward": 4 * (last + weights),
        "dense_backward": 4 * (2 * last + 2 * weights),
    }


# --------------------------------------------------------------------------------------------- the report's recipe


def recipe(size: Size) -> Part:
    """How long the report's 200 epochs would take, from a few at a tenth of its subframes; and what is enough."""
    made = material.make_recipes(size)
    keep_memory()  # as the command does
    params = Train(
        batch_size=BATCH, epochs=REPORT_EPOCHS, adam_epochs=size.epochs // 2, device="cpu"
    )
    monitor = material.pixels(size, params.n_monitor * size.n_train // REPORT_SUBFRAMES)
    kernels.set_threads(THREADS)
    part = Part(f"The report's recipe: {REPORT_SUBFRAMES} subframes, {REPORT_EPOCHS} epochs")
    _epoch(_training(params, made, monitor))  # compiles
    rendered = _epochs(_training(params, made, monitor), size.epochs)
    part.add("rendered_minutes", "projected, rendered anew in every epoch", "minutes", rendered)
    kept = _training(params.model_copy(update={"keep_rendered": True}), made, monitor)
    first = _epochs(kept, len(made.recipes.turn))  # in which each copy is rendered
    later = _epochs(kept, size.epochs)
    minutes = (first.sum() + (REPORT_EPOCHS - len(first)) * later) / REPORT_EPOCHS
    part.add(
        "ours_minutes",
        "projected, each copy rendered once and kept",
        "minutes",
        minutes,
        at_most=40,
    )
    part.remarks.append(
        f"Measured: {size.epochs} epochs of {size.n_train} subframes, and those in which copies are rendered."
    )
    part.remarks.append(f"What is kept of all {REPORT_SUBFRAMES} takes {_kept_gib(made):.1f} GiB.")
    part.remarks.append("The report took about four hours on a CPU of 2021.")
    _add_quality(part, rendered)
    return part


def _epochs(training: train.ReportTraining, n: int) -> Any:
    """Minutes that the recipe would take at the rate of each of the next ``n`` epochs."""
    minutes = []
    for _ in range(n):
        before = training.state.seconds
        _epoch(training)
        seconds_each = (training.state.seconds - before) / len(training.recipes)
        minutes.append(seconds_each / 60 * REPORT_EPOCHS * REPORT_SUBFRAMES)
    return np.array(minutes)


def _kept_gib(made: material.Made) -> float:
    return len(made.recipes.turn) * REPORT_SUBFRAMES * tiles.SIDE**2 * 2 / 2**30


def _add_quality(part: Part, minutes: Any) -> None:
    """Rates of the last run of the pipeline, if there was one here, and how long its training takes alone at the rate of now."""
    try:
        trained, found = (
            json.loads((ROOT / "results" / stage / "metrics.json").read_text(encoding="utf-8"))
            for stage in ("train", "evaluate")
        )
    except (OSError, ValueError):
        part.remarks.append(
            "The pipeline has not been run here: how soon the report's quality is reached is unknown."
        )
        return
    n = trained["epochs"]
    part.add(
        "quality_s",
        f"training as the pipeline's last run did: {n} epochs",
        "s",
        n * 60 * minutes / REPORT_EPOCHS,
    )
    part.add("quality_tpr", "its true-positive rate", "", found["tpr"], at_least=0.94)
    part.add("quality_tnr", "its true-negative rate", "", found["tnr"], at_least=0.88)


def gpu(size: Size) -> Part:
    """Training on a CUDA device: the rate, and the report's recipe, measured, compilation included, for up to two minutes."""
    part = Part("Training on a GPU")
    if not torch.cuda.is_available():
        part.remarks.append("no CUDA device")
        return part
    made = material.make_recipes(replace(size, n_train=REPORT_SUBFRAMES))
    params = Train(batch_size=BATCH, epochs=REPORT_EPOCHS, adam_epochs=5, device="cuda")
    training = _training(params, made, material.pixels(size, 100))
    state = training.state
    while state.epoch < REPORT_EPOCHS and state.seconds < 120:
        _epoch(training)
    rate = state.n_seen / state.seconds
    part.add("ours_rate", f"blobpipe on {torch.cuda.get_device_name()}", SUBFRAMES_PER_S, rate)
    whole = state.n_seen >= REPORT_SUBFRAMES * REPORT_EPOCHS
    what = "the report's recipe, " + (
        "measured" if whole else f"projected from {state.n_seen} subframes"
    )
    part.add("ours_s", what, "s", REPORT_SUBFRAMES * REPORT_EPOCHS / rate, at_most=60)
    part.add(
        "memory", "memory on the device, at most", "GiB", in_gib(torch.cuda.max_memory_allocated())
    )
    return part
