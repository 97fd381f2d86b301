"""The dense network: its training on blobs among clutter, and what it finds in whole frames."""

from __future__ import annotations

import copy
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from blobpipe import __version__
from blobpipe.core import tables
from blobpipe.core.arrays import FloatArray
from blobpipe.core.random_streams import stream
from blobpipe.images import tiles
from blobpipe.networks import dense_network, report_network, train
from blobpipe.params import Dense
from blobpipe.simulation import augment, clutter, cutout, render, render_gpu, stamps
from blobpipe.simulation.recipes import Recipes, Scene

CORE_PX = 5.0  # cells whose middle is as near to a blob's centre are to be found
AROUND_PX = 9.0  # cells up to here may say what they like: a blob reaches as far
STRIDE = dense_network.DenseNetwork.STRIDE


def train_dense(
    difference_dir: str | Path,
    scale_dir: str | Path,
    cutout_dir: str | Path,
    augment_dir: str | Path,
    out_dir: str | Path,
    params: Dense,
) -> None:
    """Train the dense network and write it, its history and its metrics (stage ``dense``).

    It learns from the recipes that the report's network learns from, with differences drawn anew in every epoch: blobs of
    every size come equally often and are weakened down to the noise, clutter lies over a part of the subframes, and a part of
    each is shown, with a blob on it if there is one. Pixels stay in sigma of the frame, since a frame is searched as a whole.

    Parameters
    ----------
    difference_dir, scale_dir, cutout_dir, augment_dir : path
        What the stages before have made.
    out_dir : path
        ``model.safetensors``, ``history.csv``, ``metrics.json``, ``history.png``.
    params : Dense

    Notes
    -----
    Source: ours.
    """
    out_dir = Path(out_dir)
    report_network.set_threads(params.threads)
    folders = (difference_dir, scale_dir, cutout_dir)
    scene, recipes = cutout.open_split(*folders, "train", augment.read_augmentation(augment_dir))
    identity = {
        "params": params.model_dump(),
        "data_sha256": train.data_hash(scale_dir, cutout_dir, augment_dir),
        "version": __version__,
    }
    sizes = evenly_sized(tables.read_table(Path(cutout_dir) / "stamps.csv", cutout.STAMP_COLUMNS))
    scene, choice = with_ragged(scene, sizes, params.seed)
    run = DenseRun(params, identity, out_dir / "checkpoint" / "checkpoint.safetensors", choice)
    run.watch(*cutout.open_split(*folders, "validation", n=params.n_monitor))
    run.resume()
    while run.epoch < params.epochs:
        run.train_epoch(scene, recipes, run.watched.pixels, run.watched.labels)
        run.save()
    train.write_results(out_dir, run)
    shutil.rmtree(out_dir / "checkpoint", ignore_errors=True)


class Targets(NamedTuple):
    """What is wanted of each cell, and whether it counts: both of shape (n, ny, nx), float32."""

    core: FloatArray
    weight: FloatArray


class Watched(NamedTuple):
    """Subframes without noise or clutter on which an epoch's progress is measured."""

    pixels: FloatArray
    labels: npt.NDArray[np.int64]
    targets: Targets


class DenseRun(train.Run):
    """A training run of the dense network between two epochs."""

    LOSS = "cross entropy of 100 cells (nat)"
    params: Dense  # type: ignore[assignment]
    network: dense_network.DenseNetwork  # type: ignore[assignment]

    def __init__(
        self,
        params: Dense,
        identity: dict[str, Any],
        checkpoint: Path,
        choice: npt.NDArray[np.int32],
    ) -> None:
        super().__init__(params, 0.0, identity, checkpoint)  # type: ignore[arg-type]
        # of stamps, shape (2, n): smooth ones, and what ragged ones are made of them
        self.choice = choice
        self.pieces = clutter.draw_pieces(params.seed, params.n_clutter)
        self.copies = [self.network, *(_twin(self.network) for _ in range(params.threads - 1))]
        self.pool = ThreadPoolExecutor(params.threads, "dense", torch.set_num_threads, (1,))

    def watch(self, scene: Scene, recipes: Recipes) -> None:
        """Measure progress on these, as they are."""
        rows = np.arange(len(recipes))
        strength = np.ones(len(recipes.blob), np.float32)
        noise_sigma = np.zeros(len(rows), np.float32)
        piece = np.full(len(rows), -1)
        pixels = render.render_varied(
            scene,
            recipes,
            rows,
            copy=0,
            strength=strength,
            noise_sigma=noise_sigma,
            piece=piece,
            pieces=self.pieces,
        )
        wanted = targets(recipes, rows, 0, strength * norms(scene, recipes), self.params.min_snr)
        self.watched = Watched(pixels, recipes.label, wanted)

    def _new_network(self) -> dense_network.DenseNetwork:  # type: ignore[override]
        return dense_network.new_dense_network(self.params.seed)

    def _begin_epoch(self) -> None:
        pass

    def _new_optimiser(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.network.parameters(), self.params.rate, weight_decay=1e-4, fused=True
        )

    def _set_rate(self, epoch: float) -> None:
        """Rising for a tenth of the time, then falling to zero along a cosine."""
        done = epoch / self.params.epochs
        rising = min(1.0, (done + 1e-3) / 0.1)
        falling = 0.5 + 0.5 * math.cos(math.pi * max(0.0, done - 0.1) / 0.9)
        for group in self.optimiser.param_groups:
            group["lr"] = self.params.rate * rising * falling

    def _streamed(self, scene: Scene, recipes: Recipes) -> train.Way:
        draw, recipes, signal = self._draw(scene, recipes)

        def prepare(rows: npt.NDArray[np.int64]) -> tuple[Tensor, Targets]:
            shown = render.render_varied(
                scene,
                recipes,
                rows,
                copy=self.epoch,
                strength=draw.strength,
                noise_sigma=draw.noise_sigma[rows],
                piece=draw.piece[rows],
                pieces=self.pieces,
                corner=draw.corner[rows],
                side=self.params.crop_px,
            )
            return torch.from_numpy(shown[:, None]), self._targets(
                recipes, rows, signal, draw.corner
            )

        return train.Way(prepare, lambda prepared, _: self._update_dense(*prepared))

    def _resident(self, scene: Scene, recipes: Recipes) -> train.Way:
        renderer = self.renderer = self.renderer or render_gpu.Renderer(
            scene, recipes, self.device, self.pieces
        )
        draw, recipes, signal = self._draw(scene, recipes)
        renderer.place(recipes)
        strength = render_gpu.by_row(recipes, draw.strength)
        turn = torch.tensor(self.epoch % renderer.copies, device=self.device)

        def prepare(rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], Targets]:
            return rows, self._targets(recipes, rows, signal, draw.corner)

        def update(prepared: tuple[npt.NDArray[np.int64], Targets], _: int) -> Tensor:
            rows, wanted = prepared
            values = (rows, strength[rows], draw.noise_sigma[rows], draw.piece[rows])
            there, *varied = (torch.from_numpy(value).to(self.device) for value in values)
            pixels = renderer.vary(there, turn, *varied)
            side = self.params.crop_px
            corner = zip(pixels, draw.corner[rows], strict=True)
            return self._update_dense(
                torch.stack([each[:, y : y + side, x : x + side] for each, (x, y) in corner]),
                wanted,
            )

        return train.Way(prepare, update)

    def _targets(
        self,
        recipes: Recipes,
        rows: npt.NDArray[np.int64],
        snr: FloatArray,
        corner: npt.NDArray[np.int64],
    ) -> Targets:
        params = self.params
        return targets(
            recipes, rows, self.epoch, snr, params.min_snr, corner=corner[rows], side=params.crop_px
        )

    def _draw(self, scene: Scene, recipes: Recipes) -> tuple[Drawn, Recipes, FloatArray]:
        """What is different in every epoch; the recipes with other stamps; and the S/N of their blobs as they are drawn."""
        params, rng = self.params, stream(self.params.seed, "dense", self.epoch)
        n = len(recipes)
        n_blobs = len(recipes.blob)
        low, high = map(math.log, params.strength)
        piece = np.where(
            rng.random(n) < params.clutter_frac, rng.integers(0, params.n_clutter, n), -1
        )
        strength = np.exp(rng.uniform(low, high, n_blobs)).astype(np.float32)
        noise = rng.uniform(0, params.noise_sigma, n).astype(np.float32)
        is_ragged = (rng.random(n_blobs) < params.ragged_frac).astype(np.int64)
        stamp = self.choice[is_ragged, rng.integers(0, self.choice.shape[1], n_blobs)]
        recipes = replace(recipes, blob=np.column_stack([stamp, recipes.blob[:, 1:]]))
        corner = corners(rng, recipes, self.epoch, params.crop_px)
        return Drawn(strength, noise, piece, corner), recipes, strength * norms(scene, recipes)

    def _update_dense(self, shown: Tensor, wanted: Targets) -> Tensor:
        """Each thread takes a part of the batch on its own: convolutions of small images share badly."""
        core, weight = (torch.from_numpy(array).to(shown.device) for array in wanted)
        parts = [
            torch.from_numpy(part)
            for part in np.array_split(np.arange(len(shown)), self.params.threads)
            if len(part)
        ]

        def differentiate(network: dense_network.DenseNetwork, part: Tensor) -> tuple[Tensor, ...]:
            images = shown[part].contiguous(memory_format=torch.channels_last)
            with torch.autocast(
                shown.device.type, torch.bfloat16, enabled=shown.device.type == "cuda"
            ):
                logits = network(images)
            loss = cell_loss(logits.float(), core[part], weight[part], self.params.focus) * (
                len(part) / len(shown)
            )
            return loss.detach(), *torch.autograd.grad(loss, list(self.network.parameters()))

        run = self.pool.map if shown.device.type == "cpu" else map
        losses, *gradients = zip(*run(differentiate, self.copies, parts), strict=True)
        for weights, slopes in zip(self.network.parameters(), gradients, strict=True):
            weights.grad = torch.stack(slopes).sum(0)
        self.optimiser.step()
        return torch.stack(losses).sum()

    def _record(
        self, train_loss: float, monitor: FloatArray | Tensor, labels: npt.NDArray[np.int64]
    ) -> None:
        searcher = dense_network.folded(self.network)
        core, weight = map(torch.from_numpy, self.watched.targets)

        def watch(start: int) -> tuple[float, int]:
            part = slice(start, start + 16)
            with torch.inference_mode():
                images = torch.as_tensor(monitor[part, None], device=self.device)
                logits = (
                    searcher(images.contiguous(memory_format=torch.channels_last)).float().cpu()
                )
            hits = (logits.amax((1, 2)) >= 0).numpy() == (labels[part] == 1)
            return cell_loss(logits, core[part], weight[part], self.params.focus).item() * len(
                logits
            ), int(hits.sum())

        run = self.pool.map if self.device.type == "cpu" else map
        losses, hits = zip(*run(watch, range(0, len(labels), 16)), strict=True)
        self._note(train_loss, sum(losses) / len(labels), sum(hits) / len(labels))


def _twin(network: dense_network.DenseNetwork) -> dense_network.DenseNetwork:
    """A network of the same weights, not of equal ones, that keeps its own count of what it has seen."""
    twin = copy.deepcopy(network)
    for theirs, ours in zip(twin.modules(), network.modules(), strict=True):
        theirs._parameters.update(ours._parameters)
    return twin.train()


class Drawn(NamedTuple):
    """Strength by blob; noise (sigma), piece of clutter (-1: none) and corner of the crop (x, y, px) by subframe."""

    strength: FloatArray
    noise_sigma: FloatArray
    piece: npt.NDArray[np.int64]
    corner: npt.NDArray[np.int64]


def evenly_sized(table: pd.DataFrame) -> npt.NDArray[np.int32]:
    """Training stamps, repeated so that all sizes come equally often: small blobs are few, and most like bad pixels.

    Parameters
    ----------
    table : DataFrame
        ``stamps.csv``.

    Returns
    -------
    ndarray of int32
        Their numbers, evenly in the logarithm of the radius.
    """
    usable = table[table["split"] == "train"].sort_values("radius_px", kind="stable")
    size = np.log(usable["radius_px"].to_numpy(float))
    place = np.interp(np.linspace(size[0], size[-1], 4 * len(size)), size, np.arange(len(size)))
    numbers: npt.NDArray[np.int32] = usable["stamp"].to_numpy(np.int32)[np.rint(place).astype(int)]
    return numbers


def with_ragged(
    scene: Scene, numbers: npt.NDArray[np.int32], seed: int
) -> tuple[Scene, npt.NDArray[np.int32]]:
    """A scene with a ragged stamp more for each of some numbers, and both numbers of each, shape (2, n)."""
    ragged = stamps.ragged_stamps(stream(seed, "dense", "ragged"), scene.stamps[numbers])
    more = len(scene.stamps) + np.arange(len(numbers), dtype=np.int32)
    return replace(scene, stamps=np.concatenate([scene.stamps, ragged])), np.stack([numbers, more])


def corners(
    rng: np.random.Generator, recipes: Recipes, copy: int, side: int
) -> npt.NDArray[np.int64]:
    """Corners (x, y; px) of squares to show of each subframe, with one of its blobs somewhere on them if it has any."""
    n = len(recipes)
    last = (tiles.SIDE - side) // STRIDE
    low = np.zeros((n, 2), np.int64)
    high = np.full((n, 2), last)
    count = np.diff(recipes.first_blob)
    some = np.flatnonzero(count)
    blob = recipes.blob[recipes.first_blob[some] + rng.integers(0, count[some])]
    at = np.stack(
        render.turned(blob[:, 1], blob[:, 2], recipes.turn[copy % len(recipes.turn), some]), axis=1
    )
    low[some], high[some] = (
        np.maximum(0, -((side - 1 - at) // STRIDE)),
        np.minimum(last, at // STRIDE),
    )
    corner: npt.NDArray[np.int64] = STRIDE * rng.integers(low, high + 1)
    return corner


def norms(scene: Scene, recipes: Recipes) -> FloatArray:
    """Matched-filter signal-to-noise ratio of each blob as its recipe has it."""
    of_stamp = np.sqrt(np.square(scene.stamps, dtype=np.float64).sum((1, 2)))
    snr: FloatArray = (recipes.factor * of_stamp[recipes.blob[:, 0]]).astype(np.float32)
    return snr


def targets(
    recipes: Recipes,
    rows: npt.NDArray[np.int64],
    copy: int,
    snr: FloatArray,
    min_snr: float,
    *,
    corner: npt.NDArray[np.int64] | None = None,
    side: int = tiles.SIDE,
) -> Targets:
    """Which cells of rendered subframes are a blob's core, and which count.

    Parameters
    ----------
    rows, copy
        Which subframes, turned how.
    snr : ndarray, shape (blobs of all recipes,)
        Signal-to-noise ratio of each blob as rendered.
    min_snr : float
        Cells on blobs below count neither way.
    corner, side
        Which part of each, as in `render.render_varied`.
    """
    cells = side // STRIDE
    first = recipes.first_blob
    turn = recipes.turn[copy % len(recipes.turn)]
    # any blob, and any that is clear
    nearest = np.full((2, len(rows), cells, cells), np.inf, np.float32)
    middle = np.arange(cells, dtype=np.float32) * STRIDE + np.float32((STRIDE - 1) / 2)
    left_top = np.zeros((len(rows), 2), np.int64) if corner is None else corner
    for i, row in enumerate(rows):
        blobs = np.arange(first[row], first[row + 1])
        if len(blobs):
            at = render.turned(
                recipes.blob[blobs, 1], recipes.blob[blobs, 2], turn[np.full(len(blobs), row)]
            )
            x, y = (
                np.subtract(*each).astype(np.float32)[:, None, None]
                for each in zip(at, left_top[i], strict=True)
            )
            distance = np.hypot(middle - x, middle[:, None] - y)
            nearest[0, i] = distance.min(0)
            nearest[1, i] = distance[snr[blobs] >= min_snr].min(0, initial=np.inf)
    core = nearest[1] <= CORE_PX
    return Targets(core.astype(np.float32), (core | (nearest[0] > AROUND_PX)).astype(np.float32))


def cell_loss(logits: Tensor, core: Tensor, weight: Tensor, focus: float) -> Tensor:
    """Mean cross entropy of the cells that count, those already decided rightly at less weight (focal loss)."""
    loss = F.binary_cross_entropy_with_logits(logits, core, weight, reduction="none")
    if focus > 0:
        right = torch.sigmoid(torch.where(core > 0, logits, -logits))
        loss = loss * (1 - right) ** focus
    return 100 * loss.mean()


def probability_map(network: dense_network.DenseNetwork, scaled: FloatArray) -> FloatArray:
    """Probability of a blob's core in each cell of 4 x 4 pixels of a frame, or of several.

    Parameters
    ----------
    network : DenseNetwork
        In evaluation mode.
    scaled : ndarray, shape (ny, nx) or (n, ny, nx), float32
        Clipped and scaled, of any size (sigma). Small images are faster together.

    Returns
    -------
    ndarray, shape (ceil(ny / 4), ceil(nx / 4)), or n of them, float32
        As the network gives it: neither calibrated nor corrected for how rare new blobs are.
    """
    ny, nx = scaled.shape[-2:]
    padding = (0, -nx % network.MULTIPLE, 0, -ny % network.MULTIPLE)
    device = next(network.parameters()).device
    with torch.inference_mode():
        images = F.pad(torch.from_numpy(scaled.reshape(-1, 1, ny, nx)), padding).to(device)
        cells = torch.sigmoid(network(images.contiguous(memory_format=torch.channels_last)).float())
    found: FloatArray = cells[:, : -(-ny // STRIDE), : -(-nx // STRIDE)].cpu().numpy()
    return found if scaled.ndim > 2 else found[0]


class Peaks(NamedTuple):
    """Where a map has its maxima (px, the first pixel's middle is 0), and how high they are (0 to 1)."""

    x_px: npt.NDArray[np.float64]
    y_px: npt.NDArray[np.float64]
    score: npt.NDArray[np.float64]


def peaks(cells: FloatArray, at_least: float) -> Peaks:
    """Maxima of a map within 10 px, each at the centre of gravity of the cells around it; the highest first."""
    highest = ndimage.maximum_filter(cells, 5, mode="constant")
    rows, columns = np.nonzero((cells == highest) & (cells >= at_least))
    order = np.argsort(-cells[rows, columns], kind="stable")
    rows = rows[order]
    columns = columns[order]
    offsets = np.mgrid[-1:2, -1:2].reshape(2, -1)
    padded = np.pad(cells.astype(np.float64), 1)
    around = padded[rows[:, None] + 1 + offsets[0], columns[:, None] + 1 + offsets[1]]
    share = around / around.sum(1, keepdims=True)
    y, x = (start + share @ offset for start, offset in ((rows, offsets[0]), (columns, offsets[1])))
    middle = (STRIDE - 1) / 2
    return Peaks(x * STRIDE + middle, y * STRIDE + middle, cells[rows, columns].astype(np.float64))
