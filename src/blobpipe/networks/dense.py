"""Training of the dense network on blobs among clutter, and the maps and peaks that it gives of whole images."""

from __future__ import annotations

import copy
import functools
import math
import shutil
from collections.abc import Callable, Iterator
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
from tqdm import tqdm

from blobpipe import __version__
from blobpipe.core import tables
from blobpipe.core.arrays import FloatArray
from blobpipe.core.random_streams import stream
from blobpipe.images import tiles
from blobpipe.networks import dense_network, kernels, loop, model_file
from blobpipe.networks.dense_network import DenseNetwork
from blobpipe.params import Dense
from blobpipe.simulation import augment, clutter, cutout, render, render_gpu, stamps
from blobpipe.simulation.recipes import Recipes, Scene

STRIDE = DenseNetwork.STRIDE
MIDDLE_PX = (STRIDE - 1) / 2  # from the first pixel of a cell to its middle
LOSS_LABEL = "cross entropy of 100 cells (nat)"
# Cells within 5 px of a blob centre are positive; cells between 5 and 9 px, as far as a blob reaches, are ignored.
CORE_PX = 5.0
AROUND_PX = 9.0
WEIGHT_DECAY = 1e-4  # of AdamW, per step and learning rate
WARM_UP_FRAC = 0.1  # of all steps: the learning rate rises
WARM_UP_START = (
    1e-3  # fraction of all steps that the warm-up is ahead by, so that the first step moves
)
LOOK_PX = 64  # side of the square in which a place is looked at again: a blob and its surroundings
MONITOR_BATCH = 16  # validation subframes of 256 x 256 pixels that a thread takes at a time

# largest image that is searched in one piece (pixels), and rows of a band of larger ones (px)
MAX_WHOLE_PX = 2048 * 2048
BAND_PX = 4 * tiles.SIDE


def train_dense(
    difference_dir: str | Path,
    scale_dir: str | Path,
    cutout_dir: str | Path,
    augment_dir: str | Path,
    out_dir: str | Path,
    params: Dense,
) -> None:
    """Train the dense network and write it, its history and its metrics (stage ``dense``).

    It is trained on the recipes of the report's network, varied anew in every epoch: blobs of all sizes are equally
    frequent and are weakened down to the noise, clutter covers some of the subframes, and a crop of each is shown,
    with a blob on it if the subframe has one. Pixels stay in sigma of the image, since a whole image is searched.

    Parameters
    ----------
    difference_dir, scale_dir, cutout_dir, augment_dir : path
        Folders that the earlier stages have written.
    out_dir : path
        ``model.safetensors``, ``history.csv``, ``metrics.json``, ``history.png``.
    params : Dense
    """
    out_dir = Path(out_dir)
    kernels.set_threads(params.threads)

    # training subframes are rendered batch by batch, those to monitor once
    folders = (difference_dir, scale_dir, cutout_dir)
    scene, recipes = cutout.open_split(*folders, "train", augment.read_augmentation(augment_dir))
    table = tables.read_table(Path(cutout_dir) / "stamps.csv", cutout.STAMP_COLUMNS)
    scene, stamp_pairs = with_ragged(scene, evenly_sized(table), params.seed)
    validation_split = cutout.open_split(*folders, "validation", n=params.n_monitor)
    validation = render_validation(*validation_split, params.min_snr)

    # a checkpoint is continued only if all of this is the same
    identity = {
        "params": model_file.recorded(params),
        "data_sha256": loop.data_hash(scale_dir, cutout_dir, augment_dir),
        "version": __version__,
    }
    state = new_state(params, identity, out_dir / "checkpoint" / "checkpoint.safetensors")
    loop.resume(state, lambda _: new_optimiser(state.network, params))

    # the loop; DenseTraining holds what is done in each epoch and with each batch
    training = DenseTraining(state, scene, recipes, stamp_pairs, validation, params)
    loop.run_epochs(state, params.epochs, training.batches, training.update, training.monitor)

    loop.write_results(out_dir, state, LOSS_LABEL, "dense")
    shutil.rmtree(out_dir / "checkpoint", ignore_errors=True)


class Targets(NamedTuple):
    """Truth and weight (0 or 1) of each cell, both of shape (n, ny / 4, nx / 4), float32."""

    core: FloatArray
    weight: FloatArray


class Validation(NamedTuple):
    """Subframes to monitor, shape (n, 256, 256), float32 (sigma), their labels (1 with blobs), and their targets."""

    subframes: FloatArray
    labels: npt.NDArray[np.int64]
    targets: Targets


def render_validation(scene: Scene, recipes: Recipes, min_snr: float) -> Validation:
    """Render the subframes to monitor, without variation, noise or clutter.

    Parameters
    ----------
    scene, recipes
    min_snr : float
        Cells on blobs of a lower signal-to-noise ratio are ignored.
    """
    rows = np.arange(len(recipes))
    strength = np.ones(len(recipes.blob), np.float32)
    subframes = render.render_varied(
        scene,
        recipes,
        rows,
        copy=0,
        strength=strength,
        noise_sigma=np.zeros(len(rows), np.float32),
        piece=np.full(len(rows), -1),
        pieces=np.zeros((1, tiles.SIDE, tiles.SIDE), np.int16),
    )
    wanted = targets(recipes, rows, 0, strength * norms(scene, recipes), min_snr)
    return Validation(subframes, recipes.label, wanted)


def new_state(
    params: Dense, identity: dict[str, Any], checkpoint: Path
) -> loop.State[DenseNetwork]:
    """Return the state before the first epoch: a new network on its device, and its optimiser."""
    device = kernels.choose_device(params.device)
    network = dense_network.new_dense_network(params.seed, params.network).to(device)
    return loop.State(network, new_optimiser(network, params), identity, checkpoint)


def new_optimiser(network: DenseNetwork, params: Dense) -> torch.optim.Optimizer:
    """Return AdamW without any moments yet."""
    weights = network.parameters()
    return torch.optim.AdamW(weights, params.rate, weight_decay=WEIGHT_DECAY, fused=True)


def learning_rate(params: Dense, epoch: float) -> float:
    """Return the learning rate of a step: linear warm-up in the first tenth, then a cosine to zero.

    Parameters
    ----------
    params : Dense
    epoch : float
        Epochs done before the step, with a fraction.
    """
    done_frac = epoch / params.epochs
    warm_up = min(1.0, (done_frac + WARM_UP_START) / WARM_UP_FRAC)
    after_frac = max(0.0, done_frac - WARM_UP_FRAC)
    decay = 0.5 + 0.5 * math.cos(math.pi * after_frac / (1 - WARM_UP_FRAC))
    return params.rate * warm_up * decay


class Batch(NamedTuple):
    """A batch that is ready for its update.

    Parameters
    ----------
    rows : ndarray, shape (n,), int64
        Numbers of its subframes.
    subframes : Tensor, shape (n, 1, crop_px, crop_px), float32
        Crops, on the network's device (sigma).
    targets : Targets
    epoch : float
        Epochs done before it, with a fraction.
    """

    rows: loop.Rows
    subframes: Tensor
    targets: Targets
    epoch: float


class DenseTraining:
    """Batches, update and monitoring of the dense network, for `loop.run_epochs`.

    Parameters
    ----------
    state : State
    scene, recipes
        Of the training subframes.
    stamp_pairs : ndarray, shape (2, n), int32
        From `with_ragged`.
    validation : Validation
    params : Dense
    """

    def __init__(
        self,
        state: loop.State[DenseNetwork],
        scene: Scene,
        recipes: Recipes,
        stamp_pairs: npt.NDArray[np.int32],
        validation: Validation,
        params: Dense,
    ) -> None:
        self.state = state
        self.scene = scene
        self.recipes = recipes
        self.stamp_pairs = stamp_pairs
        self.validation = validation
        self.params = params
        self.clutter_pieces = clutter.draw_pieces(params.seed, params.n_clutter)

        # each thread differentiates a part of the batch on a network of its own, which has the same weights
        twins = [_twin(state.network) for _ in range(params.threads - 1)]
        self.networks = [state.network, *twins]
        pool = ThreadPoolExecutor(params.threads, "dense", torch.set_num_threads, (1,))
        self.on_gpu = state.device.type == "cuda"
        self.map: Callable[..., Iterator[Any]] = map if self.on_gpu else pool.map
        if self.on_gpu:
            self.renderer = render_gpu.Renderer(scene, recipes, state.device, self.clutter_pieces)

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Begin an epoch and yield its batches; each is rendered while the one before is trained on."""
        params = self.params
        batches = loop.shuffled_batches(len(self.recipes), params.batch_size, params.seed, epoch)
        bar = tqdm(batches, f"epoch {epoch + 1}/{params.epochs}", unit="batch", disable=None)

        # everything random about this epoch is drawn at once
        variation = draw_variation(params, self.scene, self.recipes, self.stamp_pairs, epoch)
        if self.on_gpu:
            self.renderer.place(variation.recipes)
            strength = render_gpu.by_row(variation.recipes, variation.strength)

        prepare = functools.partial(self._prepare, variation, epoch)
        prepared = loop.prepare_ahead(prepare, batches)
        for step, (rows, (crops, wanted)) in enumerate(zip(bar, prepared, strict=True)):
            if self.on_gpu:
                crops = self._render_on_gpu(variation, strength[rows], epoch, rows)
            yield Batch(rows, crops, wanted, epoch + step / len(batches))

    def _prepare(
        self, variation: Variation, epoch: int, rows: loop.Rows
    ) -> tuple[Tensor | None, Targets]:
        """Return the crops of these rows (None on a GPU, which renders them later) and their targets."""
        # where the crops and the blobs on them are
        corner = variation.corner[rows]
        side = self.params.crop_px
        wanted = targets(
            variation.recipes,
            rows,
            epoch,
            variation.snr,
            self.params.min_snr,
            corner=corner,
            side=side,
        )
        if self.on_gpu:
            return None, wanted

        # the crops themselves
        crops = render.render_varied(
            self.scene,
            variation.recipes,
            rows,
            copy=epoch,
            strength=variation.strength,
            noise_sigma=variation.noise_sigma[rows],
            piece=variation.piece[rows],
            pieces=self.clutter_pieces,
            corner=corner,
            side=side,
        )
        return torch.from_numpy(crops[:, None]), wanted

    def _render_on_gpu(
        self, variation: Variation, strength: FloatArray, epoch: int, rows: loop.Rows
    ) -> Tensor:
        """Render whole subframes on the GPU and crop them; ``strength`` is that of the blobs by row."""
        device = self.state.device
        turn = torch.tensor(epoch % self.renderer.copies, device=device)
        arrays = (rows, strength, variation.noise_sigma[rows], variation.piece[rows])
        there, *varied = (torch.from_numpy(array).to(device) for array in arrays)
        subframes = self.renderer.vary(there, turn, *varied)
        side = self.params.crop_px
        corners_of_rows = zip(subframes, variation.corner[rows], strict=True)
        return torch.stack(
            [each[:, y : y + side, x : x + side] for each, (x, y) in corners_of_rows]
        )

    def update(self, batch: Batch) -> Tensor:
        """Take one step of AdamW; return the loss of the batch, as `cell_loss` gives it, shape ().

        The batch is divided among the threads, since convolutions of small images use several threads badly. Batch
        normalisation is that of each part.
        """
        rate = learning_rate(self.params, batch.epoch)
        loop.set_learning_rate(self.state.optimiser, rate)

        # loss and gradients of each part of the batch
        device = batch.subframes.device
        core, weight = (torch.from_numpy(array).to(device) for array in batch.targets)
        wholes = (batch.subframes, core, weight)
        divided = zip(*(whole.tensor_split(self.params.threads) for whole in wholes), strict=True)
        parts = [part for part in divided if len(part[0])]
        differentiate = functools.partial(self._differentiate, len(batch.subframes))
        losses, *gradients = zip(*self.map(differentiate, self.networks, parts), strict=True)

        # add them in the order of the parts, and step
        for parameter, of_parts in zip(self.state.network.parameters(), gradients, strict=True):
            parameter.grad = torch.stack(of_parts).sum(0)
        self.state.optimiser.step()
        return torch.stack(losses).sum()

    def _differentiate(
        self, n: int, network: DenseNetwork, part: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the share of a part of a batch of ``n`` in the loss, and its gradient by each parameter."""
        subframes, core, weight = part
        images = subframes.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.on_gpu):
            logits = network(images)
        loss = cell_loss(logits.float(), core, weight, self.params.focus)
        loss = loss * (len(images) / n)
        return loss.detach(), *torch.autograd.grad(loss, list(self.state.network.parameters()))

    def monitor(self) -> tuple[float, float]:
        """Return loss and accuracy (0 to 1) on the validation subframes; the highest cell decides the class of a subframe."""
        n = len(self.validation.labels)
        measure = functools.partial(self._measure, dense_network.folded(self.state.network))
        losses, hits = zip(*self.map(measure, range(0, n, MONITOR_BATCH)), strict=True)
        return sum(losses) / n, sum(hits) / n

    def _measure(self, network: DenseNetwork, start: int) -> tuple[float, int]:
        """Return the summed loss of the subframes from ``start`` on, and how many are classified correctly."""
        part = slice(start, start + MONITOR_BATCH)
        has_blob = self.validation.labels[part] == 1
        core, weight = (torch.from_numpy(array[part]) for array in self.validation.targets)
        with torch.inference_mode():
            images = torch.as_tensor(
                self.validation.subframes[part, None], device=self.state.device
            )
            logits = network(images.contiguous(memory_format=torch.channels_last)).float().cpu()
        hits = (logits.amax((1, 2)) >= 0).numpy() == has_blob
        loss = cell_loss(logits, core, weight, self.params.focus).item()
        return loss * len(logits), int(hits.sum())


def _twin(network: DenseNetwork) -> DenseNetwork:
    """Copy a network so that it shares the weights, but has its own running means and variances."""
    twin = copy.deepcopy(network)
    for mine, theirs in zip(twin.modules(), network.modules(), strict=True):
        mine._parameters.update(theirs._parameters)
    return twin.train()


class Variation(NamedTuple):
    """Everything that is drawn anew in an epoch.

    Parameters
    ----------
    recipes : Recipes
        With other stamps for their blobs.
    strength : ndarray, shape (blobs of all recipes,), float32
        Factor on each blob's amplitude.
    snr : ndarray, shape (blobs of all recipes,), float32
        Signal-to-noise ratio of each blob, weakened as it is.
    noise_sigma : ndarray, shape (n,), float32
        Standard deviation of the noise added to each subframe (sigma).
    piece : ndarray, shape (n,), int64
        Piece of clutter over each subframe; -1: none.
    corner : ndarray, shape (n, 2), int64
        x, y of the first pixel of each crop (px).
    """

    recipes: Recipes
    strength: FloatArray
    snr: FloatArray
    noise_sigma: FloatArray
    piece: npt.NDArray[np.int64]
    corner: npt.NDArray[np.int64]


def draw_variation(
    params: Dense,
    scene: Scene,
    recipes: Recipes,
    stamp_pairs: npt.NDArray[np.int32],
    epoch: int,
) -> Variation:
    """Draw clutter, strengths, noise, stamps and crops of an epoch; they depend on seed and epoch alone.

    Parameters
    ----------
    params : Dense
    scene, recipes
        Of the training subframes.
    stamp_pairs : ndarray, shape (2, n), int32
        Stamps to draw from, smooth ones and their ragged versions, from `with_ragged`.
    epoch : int
    """
    # the order of the draws is part of the result
    rng = stream(params.seed, "dense", epoch)
    n = len(recipes)
    n_blobs = len(recipes.blob)

    # of each subframe and of each blob
    has_clutter = rng.random(n) < params.clutter_frac
    piece = np.where(has_clutter, rng.integers(0, params.n_clutter, n), -1)
    low, high = map(math.log, params.strength)
    strength = np.exp(rng.uniform(low, high, n_blobs)).astype(np.float32)
    noise_sigma = rng.uniform(0, params.noise_sigma, n).astype(np.float32)

    # another stamp for each blob, smooth (0) or ragged (1)
    is_ragged = (rng.random(n_blobs) < params.ragged_frac).astype(np.int64)
    drawn = rng.integers(0, stamp_pairs.shape[1], n_blobs)
    blob = np.column_stack([stamp_pairs[is_ragged, drawn], recipes.blob[:, 1:]])
    recipes = replace(recipes, blob=blob)

    corner = corners(rng, recipes, epoch, params.crop_px)
    snr = strength * norms(scene, recipes)
    return Variation(recipes, strength, snr, noise_sigma, piece, corner)


def evenly_sized(table: pd.DataFrame) -> npt.NDArray[np.int32]:
    """Repeat training stamps so that all sizes are equally frequent: small ones are few, and most like bad pixels.

    Parameters
    ----------
    table : DataFrame
        ``stamps.csv``.

    Returns
    -------
    ndarray, shape (4 * number of training stamps,), int32
        Numbers of stamps, evenly in the logarithm of the radius.
    """
    usable = table[table["split"] == "train"].sort_values("radius_px", kind="stable")
    stamp = usable["stamp"].to_numpy(np.int32)
    log_radius = np.log(usable["radius_px"].to_numpy(float))

    # the nearest stamp to each of many sizes
    wanted = np.linspace(log_radius[0], log_radius[-1], 4 * len(stamp))
    place = np.interp(wanted, log_radius, np.arange(len(stamp)))
    numbers: npt.NDArray[np.int32] = stamp[np.rint(place).astype(int)]
    return numbers


def with_ragged(
    scene: Scene, numbers: npt.NDArray[np.int32], seed: int
) -> tuple[Scene, npt.NDArray[np.int32]]:
    """Add a ragged version of some stamps to a scene.

    Parameters
    ----------
    scene : Scene
    numbers : ndarray, shape (n,), int32
        Stamps of the scene.
    seed : int

    Returns
    -------
    scene : Scene
        With ``n`` more stamps.
    stamp_pairs : ndarray, shape (2, n), int32
        ``numbers``, and the numbers of their ragged versions.
    """
    rng = stream(seed, "dense", "ragged")
    ragged = stamps.ragged_stamps(rng, scene.stamps[numbers])
    added = len(scene.stamps) + np.arange(len(numbers), dtype=np.int32)
    scene = replace(scene, stamps=np.concatenate([scene.stamps, ragged]))
    return scene, np.stack([numbers, added])


def corners(
    rng: np.random.Generator, recipes: Recipes, copy: int, side: int
) -> npt.NDArray[np.int64]:
    """Draw the crop of each subframe, so that one of its blobs is somewhere on it if it has any.

    Parameters
    ----------
    rng : Generator
    recipes : Recipes
    copy : int
        Augmented copy, which says how subframes are turned.
    side : int
        Side of the crop (px).

    Returns
    -------
    ndarray, shape (number of subframes, 2), int64
        x, y of the first pixel of each crop (px), multiples of 4.
    """
    n = len(recipes)
    n_blobs = np.diff(recipes.first_blob)
    last = (tiles.SIDE - side) // STRIDE
    low = np.zeros((n, 2), np.int64)
    high = np.full((n, 2), last)

    # choose one blob of each subframe that has any, and see where it is in the turned subframe
    with_blobs = np.flatnonzero(n_blobs)
    chosen = recipes.first_blob[with_blobs] + rng.integers(0, n_blobs[with_blobs])
    turn = recipes.turn[copy % len(recipes.turn), with_blobs]
    x = recipes.blob[chosen, 1]
    y = recipes.blob[chosen, 2]
    centre = np.stack(render.turned(x, y, turn), axis=1)

    # corners, in cells, whose crop holds its centre
    low[with_blobs] = np.maximum(0, -((side - 1 - centre) // STRIDE))
    high[with_blobs] = np.minimum(last, centre // STRIDE)
    corner: npt.NDArray[np.int64] = STRIDE * rng.integers(low, high + 1)
    return corner


def norms(scene: Scene, recipes: Recipes) -> FloatArray:
    """Compute the matched-filter signal-to-noise ratio of each blob as its recipe has it, shape (blobs,), float32."""
    of_stamp = np.sqrt(np.square(scene.stamps, dtype=np.float64).sum((1, 2)))
    stamp = recipes.blob[:, 0]
    snr: FloatArray = (recipes.factor * of_stamp[stamp]).astype(np.float32)
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
    """Mark the cells of rendered subframes that are on a blob, and those that the loss ignores.

    Cells within 5 px of the centre of a clear blob are positive. Other cells within 9 px of any blob are ignored.

    Parameters
    ----------
    recipes : Recipes
    rows : ndarray, shape (n,), int64
        Subframes.
    copy : int
        Augmented copy, which says how subframes are turned.
    snr : ndarray, shape (blobs of all recipes,)
        Signal-to-noise ratio of each blob as rendered.
    min_snr : float
        Blobs below are not clear: cells on them are ignored.
    corner, side
        Crop of each subframe, as in `render.render_varied`.
    """
    cells = side // STRIDE
    turn = recipes.turn[copy % len(recipes.turn)]
    # where the middle of each cell is, in pixels
    middle = np.arange(cells, dtype=np.float32) * STRIDE + np.float32(MIDDLE_PX)
    left_top = np.zeros((len(rows), 2), np.int64) if corner is None else corner

    # distance of each cell from the nearest blob, and from the nearest clear one (px)
    from_any = np.full((len(rows), cells, cells), np.inf, np.float32)
    from_clear = from_any.copy()
    for i, row in enumerate(rows):
        blobs = np.arange(recipes.first_blob[row], recipes.first_blob[row + 1])
        if len(blobs) == 0:
            continue
        same_turn = turn[np.full(len(blobs), row)]
        x, y = render.turned(recipes.blob[blobs, 1], recipes.blob[blobs, 2], same_turn)
        x_on_crop = (x - left_top[i, 0]).astype(np.float32)[:, None, None]
        y_on_crop = (y - left_top[i, 1]).astype(np.float32)[:, None, None]
        distance = np.hypot(middle - x_on_crop, middle[:, None] - y_on_crop)
        from_any[i] = distance.min(0)
        from_clear[i] = distance[snr[blobs] >= min_snr].min(0, initial=np.inf)

    core = from_clear <= CORE_PX
    counts = core | (from_any > AROUND_PX)
    return Targets(core.astype(np.float32), counts.astype(np.float32))


def cell_loss(logits: Tensor, core: Tensor, weight: Tensor, focus: float) -> Tensor:
    """Compute the mean cross entropy of 100 cells (nat).

    Parameters
    ----------
    logits, core, weight : Tensor, shape (n, ny, nx), float32
        Answers, truth and weight of each cell; ``core`` and ``weight`` are 0 or 1.
    focus : float
        Exponent of the focal loss: the larger, the less weight have cells that are already right; 0: equal weights.

    Returns
    -------
    Tensor, shape (), float32
        100 times the sum over the cells of weight 1, divided by the number of all cells.
    """
    loss = F.binary_cross_entropy_with_logits(logits, core, weight, reduction="none")
    if focus > 0:
        of_truth = torch.sigmoid(torch.where(core > 0, logits, -logits))
        loss = loss * (1 - of_truth) ** focus
    return 100 * loss.mean()


def probability_map(network: DenseNetwork, scaled: FloatArray) -> FloatArray:
    """Compute the probability of a blob's core in each cell of 4 x 4 pixels of an image, or of several.

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
    if scaled.ndim == 3 or scaled.size <= MAX_WHOLE_PX:
        return _map_whole(network, scaled)

    # bands with as much around them as a cell can see
    reach = network.reach_px
    bands = []
    for top in range(0, len(scaled), BAND_PX):
        low = max(top - reach, 0)
        cells = _map_whole(network, scaled[low : top + BAND_PX + reach])
        first = (top - low) // STRIDE
        bands.append(cells[first : first + BAND_PX // STRIDE])
    return np.concatenate(bands)


def _map_whole(network: DenseNetwork, scaled: FloatArray) -> FloatArray:
    """Compute the map of an image, or of several, in one piece."""
    ny, nx = scaled.shape[-2:]
    device = next(network.parameters()).device

    # zeros at the right and top, up to a size that the network takes
    padding = (0, -nx % network.MULTIPLE, 0, -ny % network.MULTIPLE)
    with torch.inference_mode():
        images = torch.from_numpy(scaled.reshape(-1, 1, ny, nx))
        images = F.pad(images, padding).to(device)
        logits = network(images.contiguous(memory_format=torch.channels_last))
        cells = torch.sigmoid(logits.float())

    # without the cells that hold padding alone
    n_rows = math.ceil(ny / STRIDE)
    n_columns = math.ceil(nx / STRIDE)
    found: FloatArray = cells[:, :n_rows, :n_columns].cpu().numpy()
    return found if scaled.ndim > 2 else found[0]


def look_again(
    network: DenseNetwork, scaled: FloatArray, x_px: FloatArray, y_px: FloatArray
) -> FloatArray:
    """Compute the probability of a blob's core at some places, turned and flipped in all eight ways.

    A blob looks the same in all of them, noise does not, and what one look makes of it averages out.

    Parameters
    ----------
    network : DenseNetwork
        In evaluation mode.
    scaled : ndarray, shape (ny, nx), float32
        Clipped and scaled (sigma).
    x_px, y_px : ndarray, shape (n,)
        Places on it (px).

    Returns
    -------
    ndarray, shape (n,), float64
        Logistic function of the mean of the eight logits, each the highest of the 4 x 4 cells around the place.
    """
    if len(x_px) == 0:
        return np.zeros(0)
    padded = np.pad(scaled, LOOK_PX // 2)
    rows, columns = (
        np.clip(np.rint(places).astype(int), 0, side - 1)
        for places, side in zip((y_px, x_px), scaled.shape, strict=True)
    )
    squares = np.stack(
        [
            padded[row : row + LOOK_PX, column : column + LOOK_PX]
            for row, column in zip(rows, columns, strict=True)
        ]
    )

    # turned and flipped, the place is at the centre of all of them
    turned = [np.rot90(squares, quarters, (1, 2)) for quarters in range(4)]
    views = np.concatenate([*turned, *(view[:, :, ::-1] for view in turned)])
    device = next(network.parameters()).device
    with torch.inference_mode():
        images = torch.from_numpy(np.ascontiguousarray(views))[:, None].to(device)
        logits = network(images.contiguous(memory_format=torch.channels_last))
    middle = LOOK_PX // STRIDE // 2
    core = slice(middle - 2, middle + 2)
    highest = logits[:, core, core].float().amax((1, 2)).cpu().numpy().astype(np.float64)
    mean = highest.reshape(8, len(x_px)).mean(axis=0)
    probability: FloatArray = 1 / (1 + np.exp(-mean))
    return probability


class Peaks(NamedTuple):
    """Positions of the maxima of a map (px, 0-based pixel centres) and their heights (0 to 1), each of shape (n,)."""

    x_px: npt.NDArray[np.float64]
    y_px: npt.NDArray[np.float64]
    score: npt.NDArray[np.float64]


def peaks(cells: FloatArray, at_least: float) -> Peaks:
    """Find the maxima of a map, each the highest of the 5 x 5 cells (20 x 20 px) around it, the highest first.

    Parameters
    ----------
    cells : ndarray, shape (ny, nx)
        Probability of each cell of 4 x 4 pixels.
    at_least : float
        Lower maxima are left out.

    Returns
    -------
    Peaks
        Each at the centre of gravity of the 3 x 3 cells around it.
    """
    highest = ndimage.maximum_filter(cells, 5, mode="constant")
    is_peak = (cells == highest) & (cells >= at_least)
    rows, columns = np.nonzero(is_peak)
    height = cells[rows, columns]
    order = np.argsort(-height, kind="stable")
    rows = rows[order]
    columns = columns[order]
    height = height[order]

    # each of the nine cells around a peak, and its share of their sum
    row_offset, column_offset = np.mgrid[-1:2, -1:2].reshape(2, 9)
    padded = np.pad(cells.astype(np.float64), 1)
    around_rows = rows[:, None] + 1 + row_offset
    around_columns = columns[:, None] + 1 + column_offset
    around = padded[around_rows, around_columns]
    share = around / around.sum(1, keepdims=True)

    # from cells to pixels
    x_px = (columns + share @ column_offset) * STRIDE + MIDDLE_PX
    y_px = (rows + share @ row_offset) * STRIDE + MIDDLE_PX
    return Peaks(x_px, y_px, height.astype(np.float64))
