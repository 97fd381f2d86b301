"""Training of the report's network (ISR 4, 5): the stage, its batches, its update and its monitoring."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from blobpipe import __version__
from blobpipe.core.random_streams import stream
from blobpipe.images import tiles
from blobpipe.networks import kernels, loop, model_file, report_network
from blobpipe.networks.report_network import ReportNetwork
from blobpipe.params import Train
from blobpipe.simulation import augment, cutout, render, render_gpu
from blobpipe.simulation.recipes import Recipes, Scene

LOSS_LABEL = "cross entropy (nat)"
WARM_UP_START = 0.01  # learning rate at the first step, as a fraction of Adam's
MIN_PROBABILITY = 1e-12  # bounds the validation loss of a subframe to 27.6 nat


def train(
    difference_dir: str | Path,
    scale_dir: str | Path,
    cutout_dir: str | Path,
    augment_dir: str | Path,
    out_dir: str | Path,
    params: Train,
    *,
    noise_sigma: float,
) -> None:
    """Train the report's network and write it, its history and its metrics (stage ``train``).

    A checkpoint is written after every epoch; a run that was cut off continues from it and ends with the same bytes
    as one that was not. The weights of the last epoch are kept: choosing an epoch by its validation loss would make
    the evaluation on the same subframes too good.

    Parameters
    ----------
    difference_dir, scale_dir, cutout_dir, augment_dir : path
        Folders that the earlier stages have written.
    out_dir : path
        ``model.safetensors`` (its header holds settings, data hash and version), ``history.csv``, ``metrics.json``,
        ``history.png``.
    params : Train
    noise_sigma : float
        Standard deviation of the noise that is added to training subframes (sigma).

    Notes
    -----
    Source: ISR sections 4 and 5; the cosine schedule of SGD and the checkpoints are ours.
    """
    out_dir = Path(out_dir)
    kernels.set_threads(params.threads)

    # training subframes are rendered batch by batch, those to monitor once, without noise
    folders = (difference_dir, scale_dir, cutout_dir)
    scene, recipes = cutout.open_split(*folders, "train", augment.read_augmentation(augment_dir))
    validation = render_validation(*cutout.open_split(*folders, "validation", n=params.n_monitor))

    # a checkpoint is continued only if all of this is the same
    identity = {
        "params": model_file.recorded(params),
        "noise_sigma": noise_sigma,
        "data_sha256": loop.data_hash(scale_dir, cutout_dir, augment_dir),
        "version": __version__,
    }
    state = new_state(params, identity, out_dir / "checkpoint" / "checkpoint.safetensors")
    loop.resume(state, functools.partial(new_optimiser, state.network, params))

    # the loop; ReportTraining holds what is done in each epoch and with each batch
    training = ReportTraining(state, scene, recipes, validation, params, noise_sigma)
    loop.run_epochs(state, params.epochs, training.batches, training.update, training.monitor)

    loop.write_results(out_dir, state, LOSS_LABEL, "report")
    shutil.rmtree(out_dir / "checkpoint", ignore_errors=True)


class Validation(NamedTuple):
    """Standardised subframes to monitor, shape (n, 256, 256), float32, and their labels, shape (n,): 1 with blobs."""

    subframes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]


def render_validation(scene: Scene, recipes: Recipes) -> Validation:
    """Render the subframes to monitor, without noise, turns or flips."""
    return Validation(
        render.render_subframes(scene, recipes, np.arange(len(recipes))), recipes.label
    )


def new_state(
    params: Train, identity: dict[str, Any], checkpoint: Path
) -> loop.State[ReportNetwork]:
    """Return the state before the first epoch: a new network on its device, and its optimiser."""
    device = kernels.choose_device(params.device)
    chosen = kernels.choose_kernels(params.kernels, device.type, params.network)
    network = report_network.new_network(params.seed, chosen, params.network).to(device)
    return loop.State(network, new_optimiser(network, params, 0), identity, checkpoint)


def new_optimiser(network: ReportNetwork, params: Train, epoch: int) -> torch.optim.Optimizer:
    """Return the optimiser that an epoch (0 for the first one) is trained with: Adam at first, then SGD."""
    weights = network.parameters()
    device = next(network.parameters()).device
    on_gpu = device.type == "cuda"
    is_adam = epoch < params.adam_epochs
    rate: float | Tensor = params.adam_rate if is_adam else params.sgd_rate
    if on_gpu:
        rate = torch.tensor(rate, device=device)  # a recorded CUDA graph reads it
    if is_adam:
        return torch.optim.Adam(weights, lr=rate, fused=True, capturable=on_gpu)
    return torch.optim.SGD(weights, lr=rate, momentum=params.momentum, fused=True)


def learning_rate(params: Train, epoch: float) -> float:
    """Return the learning rate of a step: linear warm-up, constant for Adam, then a cosine to zero for SGD.

    Parameters
    ----------
    params : Train
    epoch : float
        Epochs done before the step, with a fraction.

    Notes
    -----
    Without warm-up the first steps of Adam, which have full length, may switch off whole layers.
    """
    if epoch < params.adam_epochs:
        warm_up = min(1.0, epoch + WARM_UP_START)
        return params.adam_rate * warm_up
    done_frac = (epoch - params.adam_epochs) / (params.epochs - params.adam_epochs)
    return params.sgd_rate * (0.5 + 0.5 * math.cos(math.pi * done_frac))


class Batch(NamedTuple):
    """A batch that is ready for its update.

    Parameters
    ----------
    rows : ndarray, shape (n,), int64
        Numbers of its subframes.
    inputs : (Tensor, Tensor)
        On the CPU subframes, shape (n, 1, 256, 256), float32, and labels, shape (n,); on a GPU, which renders in the
        update, ``rows`` and the number of the augmented copy, shape ().
    dropout_seed : int
    epoch : float
        Epochs done before it, with a fraction.
    """

    rows: loop.Rows
    inputs: tuple[Tensor, Tensor]
    dropout_seed: int
    epoch: float


class ReportTraining:
    """Batches, update and monitoring of the report's network, for `loop.run_epochs`.

    Parameters
    ----------
    state : State
    scene, recipes
        Of the training subframes.
    validation : Validation
    params : Train
    noise_sigma : float
        Standard deviation of the noise added to each training subframe (sigma).
    """

    def __init__(
        self,
        state: loop.State[ReportNetwork],
        scene: Scene,
        recipes: Recipes,
        validation: Validation,
        params: Train,
        noise_sigma: float,
    ) -> None:
        self.state = state
        self.scene = scene
        self.recipes = recipes
        self.params = params
        self.noise_sigma = noise_sigma

        # validation subframes, on the device
        self.monitored = torch.from_numpy(validation.subframes).to(state.device)
        self.has_blob = validation.labels == 1

        # subframes are rendered ahead of the update on the CPU, and within it on a GPU
        self.n_copies = len(recipes.noise_seed)
        self.kept_copies: dict[int, npt.NDArray[np.float16]] = {}  # for `keep_rendered`, by number
        self.on_gpu = state.device.type == "cuda"
        if self.on_gpu:
            self.renderer = render_gpu.Renderer(scene, recipes, state.device)
            self.recorded = render_gpu.Recorded(self._render_and_step)

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Begin an epoch and yield its batches; each is rendered while the one before is trained on."""
        params = self.params

        # SGD takes over from Adam; a recorded CUDA graph holds the optimiser that it was recorded with
        if epoch == params.adam_epochs:
            self.state.optimiser = new_optimiser(self.state.network, params, epoch)
            if self.on_gpu:
                self.recorded = render_gpu.Recorded(self._render_and_step)

        # the order of the subframes and the dropout depend on the seed and the epoch alone
        batches = loop.shuffled_batches(len(self.recipes), params.batch_size, params.seed, epoch)
        dropout_seeds = stream(params.seed, "dropout", epoch).integers(0, 2**31, len(batches))
        bar = tqdm(batches, f"epoch {epoch + 1}/{params.epochs}", unit="batch", disable=None)

        if params.keep_rendered and not self.on_gpu:
            self._keep_copy(epoch)
        prepared = loop.prepare_ahead(functools.partial(self._prepare, epoch), batches)
        for step, (rows, inputs) in enumerate(zip(bar, prepared, strict=True)):
            yield Batch(rows, inputs, int(dropout_seeds[step]), epoch + step / len(batches))

    def _prepare(self, epoch: int, rows: loop.Rows) -> tuple[Tensor, Tensor]:
        """Return the inputs of a batch of these rows."""
        copy = epoch % self.n_copies
        if self.on_gpu:
            return torch.as_tensor(rows), torch.as_tensor(copy)
        pixels: npt.NDArray[Any]
        if self.params.keep_rendered:
            pixels = self.kept_copies[copy][rows]
        else:
            pixels = self._render(epoch, rows)
        subframes = torch.from_numpy(pixels[:, None]).float()
        labels = torch.from_numpy(self.recipes.label[rows])
        return subframes, labels

    def _render(self, epoch: int, rows: loop.Rows) -> npt.NDArray[np.float32]:
        """Render subframes as this epoch shows them, shape (n, 256, 256)."""
        return render.render_subframes(
            self.scene, self.recipes, rows, copy=epoch, noise_sigma=self.noise_sigma
        )

    def _keep_copy(self, epoch: int) -> None:
        """Render all subframes of an epoch's augmented copy, unless an earlier epoch has shown it."""
        n = len(self.recipes)
        copy = epoch % self.n_copies
        if copy not in self.kept_copies:
            kept = np.empty((n, tiles.SIDE, tiles.SIDE), np.float16)
            for rows in np.array_split(np.arange(n), math.ceil(n / self.params.batch_size)):
                kept[rows] = self._render(epoch, rows)
            self.kept_copies[copy] = kept

    def update(self, batch: Batch) -> Tensor:
        """Take one step of the optimiser; return the mean cross entropy of the batch (nat), shape ()."""
        rate = learning_rate(self.params, batch.epoch)
        loop.set_learning_rate(self.state.optimiser, rate)
        if self.on_gpu:
            return self.recorded(*batch.inputs, torch.as_tensor(batch.dropout_seed))
        subframes, labels = batch.inputs
        return self._step(subframes, labels, batch.dropout_seed)

    def _render_and_step(self, rows: Tensor, copy: Tensor, dropout_seed: Tensor) -> Tensor:
        """Render a batch on the GPU and take one step; after the first calls one recorded graph is replayed."""
        subframes = self.renderer.render(rows, copy, self.noise_sigma)
        return self._step(subframes, self.renderer.label[rows], dropout_seed)

    def _step(self, subframes: Tensor, labels: Tensor, dropout_seed: int | Tensor) -> Tensor:
        """Compute loss and gradient, and step; return the loss."""
        logits = self.state.network(subframes, dropout_seed)
        loss = F.cross_entropy(logits, labels)
        self.state.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.state.optimiser.step()
        return loss.detach()

    def monitor(self) -> tuple[float, float]:
        """Return mean cross entropy (nat) and accuracy (0 to 1) on the validation subframes."""
        probability = report_network.predict(self.state.network, self.monitored)
        probability = np.clip(probability, MIN_PROBABILITY, 1 - MIN_PROBABILITY)
        of_truth = np.where(self.has_blob, probability, 1 - probability)
        loss = float(-np.mean(np.log(of_truth)))
        accuracy = float(np.mean((probability >= 0.5) == self.has_blob))
        return loss, accuracy
