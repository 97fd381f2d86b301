"""Training of the report's network (ISR 4, 5): one file, read from top to bottom."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from blobpipe import __version__
from blobpipe.core import files, plotting, tables
from blobpipe.core.random_streams import stream
from blobpipe.images import tiles
from blobpipe.networks import model_file, report_network
from blobpipe.params import Train
from blobpipe.simulation import augment, cutout, render, render_gpu
from blobpipe.simulation.recipes import Recipes, Scene

log = logging.getLogger(__name__)

HISTORY = ("epoch", "train_loss", "val_loss", "val_accuracy", "rate")
RISING_FROM = 0.01  # of the rate of Adam: where it begins


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
    """Train the network and write it, its history and its metrics (stage ``train``).

    After every epoch a checkpoint is written; a run that was cut off goes on from there and ends with the
    same bytes as one that was not. The last epoch's weights are kept: choosing an epoch by the validation
    loss would make the evaluation on the same subframes too good.

    Parameters
    ----------
    difference_dir, scale_dir, cutout_dir, augment_dir : path
        What the stages before have made.
    out_dir : path
        ``model.safetensors`` (its header tells settings, data hash and version), ``history.csv``, ``metrics.json``,
        ``history.png``.
    params : Train
    noise_sigma : float
        Of the augmentation (sigma).

    Notes
    -----
    Source: ISR sections 4 and 5; cosine schedule of SGD, checkpoints: ours.
    """
    out_dir = Path(out_dir)
    report_network.set_threads(params.threads)
    folders = (difference_dir, scale_dir, cutout_dir)
    data = cutout.open_split(*folders, "train", augment.read_augmentation(augment_dir))
    monitor, labels = _monitor_set(*cutout.open_split(*folders, "validation", n=params.n_monitor))
    identity = {
        "params": params.model_dump(),
        "noise_sigma": noise_sigma,
        "data_sha256": data_hash(scale_dir, cutout_dir, augment_dir),
        "version": __version__,
    }
    run = Run(params, noise_sigma, identity, out_dir / "checkpoint" / "checkpoint.safetensors")
    run.resume()
    watched = torch.from_numpy(monitor).to(run.device)
    while run.epoch < params.epochs:
        run.train_epoch(*data, watched, labels)
        run.save()
    write_results(out_dir, run)
    shutil.rmtree(out_dir / "checkpoint", ignore_errors=True)


class Way(NamedTuple):
    """How a batch is worked on: what can be done with its rows beforehand, and the update with that and a seed, to the loss."""

    prepare: Callable[[npt.NDArray[np.int64]], Any]
    update: Callable[[Any, int], Tensor]


class Run:
    """A training run between two epochs: network, optimiser, history, and time spent."""

    LOSS = "cross entropy (nat)"

    def __init__(
        self, params: Train, noise_sigma: float, identity: dict[str, Any], checkpoint: Path
    ) -> None:
        self.params, self.noise_sigma, self.identity, self.checkpoint = (
            params,
            noise_sigma,
            identity,
            checkpoint,
        )
        self.device = choose_device(params.device)
        self.network = self._new_network().to(self.device)
        self.epoch, self.seconds, self.n_seen = 0, 0.0, 0
        self.history: list[dict[str, float]] = []
        self.kept: dict[int, npt.NDArray[np.float16]] = {}  # by copy
        self.renderer: render_gpu.Renderer | None = None
        self.recorded: render_gpu.Recorded | None = None
        self.optimiser = self._new_optimiser()

    def train_epoch(
        self,
        scene: Scene,
        recipes: Recipes,
        monitor: npt.NDArray[np.float32] | Tensor,
        labels: npt.NDArray[np.int64],
    ) -> None:
        """One pass through all training subframes, then the loss on the monitored ones."""
        started = time.perf_counter()
        params = self.params
        self._begin_epoch()
        order = stream(params.seed, "train", self.epoch).permutation(len(recipes))
        batches = np.array_split(order, math.ceil(len(order) / params.batch_size))
        seeds = stream(params.seed, "dropout", self.epoch).integers(0, 2**31, len(batches))
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.network.train()
        steps = tqdm(batches, f"epoch {self.epoch + 1}/{params.epochs}", unit="batch", disable=None)
        way = (
            self._resident(scene, recipes)
            if self.device.type == "cuda"
            else self._streamed(scene, recipes)
        )
        for step, (rows, prepared) in enumerate(
            zip(steps, _ahead(way.prepare, batches), strict=True)
        ):
            self._set_rate(self.epoch + step / len(batches))
            total += way.update(prepared, int(seeds[step])).double() * len(rows)
        train_loss = total.item() / len(recipes)
        self.seconds += time.perf_counter() - started
        self.n_seen += len(recipes)
        self._record(train_loss, monitor, labels)

    def _streamed(self, scene: Scene, recipes: Recipes) -> Way:
        """Updates from subframes that are rendered on the CPU, or were, in an earlier epoch."""

        def rendered(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
            return render.render_subframes(
                scene, recipes, rows, copy=self.epoch, noise_sigma=self.noise_sigma
            )

        copy = self.epoch % len(recipes.noise_seed)
        if self.params.keep_rendered and copy not in self.kept:
            self.kept[copy] = np.empty((len(recipes), tiles.SIDE, tiles.SIDE), np.float16)
            for rows in np.array_split(
                np.arange(len(recipes)), math.ceil(len(recipes) / self.params.batch_size)
            ):
                self.kept[copy][rows] = rendered(rows)

        def prepare(rows: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
            pixels = self.kept[copy][rows] if self.params.keep_rendered else rendered(rows)
            return torch.from_numpy(pixels[:, None]).float(), torch.from_numpy(recipes.label[rows])

        def update(prepared: tuple[Tensor, Tensor], seed: int) -> Tensor:
            return self._update(*prepared, seed)

        return Way(prepare, update)

    def _resident(self, scene: Scene, recipes: Recipes) -> Way:
        """Updates from subframes that are rendered on the GPU; all of them but the first are one recorded graph."""
        renderer = self.renderer = self.renderer or render_gpu.Renderer(scene, recipes, self.device)

        def work(rows: Tensor, copy: Tensor, seed: Tensor) -> Tensor:
            return self._update(
                renderer.render(rows, copy, self.noise_sigma), renderer.label[rows], seed
            )

        recorded = self.recorded = self.recorded or render_gpu.Recorded(work)
        return Way(
            torch.as_tensor,
            lambda rows, seed: recorded(
                rows, *map(torch.as_tensor, (self.epoch % renderer.copies, seed))
            ),
        )

    def _update(self, subframes: Tensor, labels: Tensor, seed: int | Tensor) -> Tensor:
        loss = F.cross_entropy(self.network(subframes, seed), labels)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        return loss.detach()

    def _record(
        self,
        train_loss: float,
        monitor: npt.NDArray[np.float32] | Tensor,
        labels: npt.NDArray[np.int64],
    ) -> None:
        probability = np.clip(report_network.predict(self.network, monitor), 1e-12, 1 - 1e-12)
        val_loss = float(-np.mean(np.log(np.where(labels == 1, probability, 1 - probability))))
        accuracy = float(np.mean((probability >= 0.5) == (labels == 1)))
        self._note(train_loss, val_loss, accuracy)

    def _note(self, train_loss: float, val_loss: float, accuracy: float) -> None:
        rate = float(self.optimiser.param_groups[0]["lr"])
        self.epoch += 1
        row = dict(zip(HISTORY, (self.epoch, train_loss, val_loss, accuracy, rate), strict=True))
        self.history.append(row)
        log.info(
            "epoch %d: train loss %.4f, validation loss %.4f, accuracy %.4f",
            *list(row.values())[:4],
        )

    def _new_network(self) -> report_network.ReportNetwork:
        kernels = report_network.choose_kernels(self.params.kernels, self.device.type)
        return report_network.new_network(self.params.seed, kernels)

    def _begin_epoch(self) -> None:
        if self.epoch == self.params.adam_epochs:
            self.optimiser = self._new_optimiser()

    def _new_optimiser(self) -> torch.optim.Optimizer:
        params = self.params
        weights = self.network.parameters()
        self.recorded = None
        on_gpu = self.device.type == "cuda"
        adam_rate, sgd_rate = (
            torch.tensor(x, device=self.device) if on_gpu else x
            for x in (params.adam_rate, params.sgd_rate)
        )
        if self.epoch < params.adam_epochs:
            return torch.optim.Adam(weights, lr=adam_rate, fused=True, capturable=on_gpu)
        return torch.optim.SGD(weights, lr=sgd_rate, momentum=params.momentum, fused=True)

    def _set_rate(self, epoch: float) -> None:
        """Adam's rises through the first epoch, or its first steps, which are full ones, may switch off whole layers."""
        params = self.params
        if self.epoch < params.adam_epochs:
            rate = params.adam_rate * min(1.0, epoch + RISING_FROM)
        else:
            done = (epoch - params.adam_epochs) / (params.epochs - params.adam_epochs)
            rate = params.sgd_rate * (0.5 + 0.5 * math.cos(math.pi * done))
        for group in self.optimiser.param_groups:
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(rate)  # where the recorded updates look for it
            else:
                group["lr"] = rate

    def save(self) -> None:
        """Write the whole state as one file, so that it is either there or not."""
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        for i, state in self.optimiser.state_dict()["state"].items():
            tensors |= {
                f"optimiser.{i}.{key}": value
                for key, value in state.items()
                if torch.is_tensor(value)
            }
        about = {
            **self.identity,
            "git_revision": git_revision(),
            "epoch": self.epoch,
            "seconds": self.seconds,
            "n_seen": self.n_seen,
            "history": self.history,
        }
        with files.atomic(self.checkpoint) as temporary:
            kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            temporary.write_bytes(save(kept, {"blobpipe": json.dumps(about)}))
        with files.atomic(self.checkpoint.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(about, indent=2) + "\n")

    def resume(self) -> None:
        """Go on from the checkpoint if it is of the same run; start anew otherwise."""
        try:
            with safe_open(self.checkpoint, "pt") as file:
                about = json.loads(file.metadata()["blobpipe"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError):
            return
        if {key: about.get(key) for key in self.identity} != json.loads(json.dumps(self.identity)):
            log.warning("%s is of another run: starting anew", self.checkpoint)
            return
        log.info("going on after epoch %d of %s", about["epoch"], self.checkpoint)
        self.history, self.seconds, self.n_seen = (
            about["history"],
            about["seconds"],
            about["n_seen"],
        )
        self._restore(tensors, about["epoch"])

    def _restore(self, tensors: dict[str, torch.Tensor], epoch: int) -> None:
        prefix = "network."
        self.network.load_state_dict(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        )
        self.epoch = epoch - 1  # the optimiser that made the checkpoint is that of its last epoch
        self.optimiser = self._new_optimiser()
        self.epoch = epoch
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimiser."):
                _, i, key = name.split(".")
                state.setdefault(int(i), {})[key] = tensor
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})


def _ahead(work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """``work(item)`` of each item, begun in a thread while what came before is used."""
    with ThreadPoolExecutor(1, "ahead", numba.set_num_threads, (numba.get_num_threads(),)) as pool:
        waiting = [pool.submit(work, item) for item in items[:1]]
        for item in items[1:]:
            waiting.append(pool.submit(work, item))
            yield waiting.pop(0).result()
        yield from (last.result() for last in waiting)


def choose_device(device: str) -> torch.device:
    """``auto`` is CUDA where there is one."""
    return torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    )


def _monitor_set(
    scene: Scene, recipes: Recipes
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    return render.render_subframes(scene, recipes, np.arange(len(recipes))), recipes.label


def data_hash(*folders: str | Path) -> str:
    """Checksum of all tables and stamps in some folders."""
    digest = hashlib.sha256()
    paths = sorted(
        path
        for folder in folders
        for path in (*Path(folder).glob("*.csv"), *Path(folder).glob("*.fits"))
    )
    for path in paths:
        if not path.name.startswith("."):  # what a killed run left half-written
            digest.update(files.sha256(path).encode())
    return digest.hexdigest()


def git_revision() -> str:
    """The commit of the working folder, or an empty string outside a repository."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def write_results(out_dir: Path, run: Run) -> None:
    """Write history, metrics and model of a run that is over."""
    history = pd.DataFrame(run.history, columns=list(HISTORY))
    best = history.iloc[int(np.argmin(history["val_loss"]))]
    metrics = {
        "epochs": run.params.epochs,
        "best_epoch": int(best["epoch"]),
        "val_loss": round(float(history["val_loss"].iloc[-1]), 6),
        "samples_per_s": round(run.n_seen / run.seconds, 1),
        "seconds": round(run.seconds, 1),
    }
    plotting.history(out_dir / "history.png", history, run.LOSS)
    tables.write_table(out_dir / "history.csv", history)
    tables.write_json(out_dir / "metrics.json", metrics)
    model_file.save_model(out_dir / "model.safetensors", run.network, run.identity)
