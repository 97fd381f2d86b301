"""Images and subframes: each against the way the original code did it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from benchmarks import material
from benchmarks.material import BATCH, NOISE_SIGMA, Size
from benchmarks.measure import Part, interleave
from benchmarks.network import SUBFRAMES_PER_S, THREADS
from blobpipe.images import tiles
from blobpipe.images.clip import clip_image, zscale_limits
from blobpipe.images.stack import running_median
from blobpipe.networks import kernels
from blobpipe.params import Clip, Params
from blobpipe.simulation import render
from blobpipe.simulation.recipes import STEP

LOOP_ROWS = 128  # of an image that the loop over pixels clips; the rest would take as long each
CLIPPED = 8  # images in one timing of ours
MEDIAN_ROWS = 64  # of each image of a stack; the rest would take as long each
STACK_SIZE = Params().difference.stack_size


def rendering(size: Size) -> Part:
    """Recipes into pixels."""
    made = material.make_recipes(size)
    rates = interleave(
        {"one": _one_by_one(made, size.n_one_by_one), "ours": _batches(made)},
        least=size.least,
        most=size.most,
    )
    part = Part(f"Rendering subframes from recipes, {THREADS} threads")
    part.add("one_rate", "one at a time, NumPy", SUBFRAMES_PER_S, rates["one"])
    part.add("ours_rate", "blobpipe", SUBFRAMES_PER_S, rates["ours"], at_least=6000)
    part.add_ratio(
        "ours_over_one", "blobpipe / one at a time", rates["ours"], rates["one"], at_least=10
    )
    part.remarks.append(
        "One at a time runs on one core, as the original does, and leaves out the dips, which ours adds to a tenth of "
        "the subframes."
    )
    return part


def _batches(made: material.Made) -> Callable[[], float]:
    """As training asks for them, into the same memory again and again."""
    out = np.empty((BATCH, tiles.SIDE, tiles.SIDE), np.float32)
    n = len(made.recipes) // BATCH * BATCH

    def work() -> float:
        kernels.set_threads(THREADS)
        for rows in np.split(
            np.random.default_rng(1).permutation(len(made.recipes))[:n], n // BATCH
        ):
            render.render_subframes(
                made.scene, made.recipes, rows, noise_sigma=NOISE_SIGMA, out=out
            )
        return n

    return work


def _one_by_one(made: material.Made, n: int) -> Callable[[], float]:
    backgrounds = [image.astype(np.float32) / STEP for image in made.scene.backgrounds[:8]]

    def work() -> float:
        for row in range(n):
            one_subframe(made, backgrounds, row)
        return n

    return work


def one_subframe(
    made: material.Made,
    backgrounds: list[npt.NDArray[np.float32]],
    row: int,
    noise_sigma: float = NOISE_SIGMA,
) -> npt.NDArray[np.float32]:
    """Render a recipe, less its dip, in plain NumPy, one step after the other, as the original code works."""
    scene = made.scene
    recipes = made.recipes
    frame = recipes.frame[row] % len(backgrounds)
    (x0, y0) = recipes.window[row]
    side = tiles.SIDE
    subframe = backgrounds[frame][y0 : y0 + side, x0 : x0 + side].copy()
    for blob in range(*recipes.first_blob[row : row + 2]):
        _add_stamp(subframe, scene.stamps, recipes.blob[blob], recipes.factor[blob])
    subframe = np.clip(subframe, *scene.limits[recipes.frame[row]])
    if noise_sigma:
        subframe = subframe + np.random.normal(0, noise_sigma, subframe.shape)  # noqa: NPY002
    quarters, flip = recipes.turn[0, row]
    subframe = np.rot90(subframe, quarters)
    if flip:
        subframe = np.fliplr(subframe)
    return ((subframe - subframe.mean()) / subframe.std()).astype(np.float32)


def _add_stamp(
    subframe: npt.NDArray[np.float32],
    stamps: npt.NDArray[np.float32],
    blob: npt.NDArray[np.int32],
    factor: np.float32,
) -> None:
    number, x, y = blob
    half = stamps.shape[1] // 2
    side = len(subframe)
    rows = slice(max(0, y - half), min(side, y + half + 1))
    columns = slice(max(0, x - half), min(side, x + half + 1))
    inside = stamps[number][
        rows.start - y + half : rows.stop - y + half,
        columns.start - x + half : columns.stop - x + half,
    ]
    subframe[rows, columns] += factor * inside


def clipping(size: Size) -> Part:
    """A difference image within its limits."""
    [image, *_], _ = material.differences(size.n_differences)
    params = Params().clip

    def ours() -> float:
        for _ in range(CLIPPED):
            clip_image(image, params)
        return CLIPPED * image.size

    def loop() -> float:
        clip_by_loop(image[:LOOP_ROWS], params)
        return LOOP_ROWS * image.shape[1]

    rates = interleave({"loop": loop, "ours": ours}, least=size.least, most=size.most)
    part = Part("Clipping an image, zscale limits included")
    part.add("loop_rate", "loop over pixels", "megapixels/s", 1e-6 * rates["loop"])
    part.add("ours_rate", "blobpipe", "megapixels/s", 1e-6 * rates["ours"])
    part.add_ratio("ours_over_loop", "blobpipe / loop over pixels", rates["ours"], rates["loop"])
    part.remarks.append(f"The loop clips {LOOP_ROWS} rows of {len(image)}.")
    return part


def clip_by_loop(image: npt.NDArray[np.float32], params: Clip) -> npt.NDArray[np.float32]:
    """`clip.clip_image` pixel by pixel, as the original code works; the border is clipped like the rest."""
    clipped = np.where(np.isfinite(image), image, np.nanmedian(image))
    low, high = (params.factor * limit for limit in zscale_limits(clipped, params.zscale_points))
    for y in range(clipped.shape[0]):
        for x in range(clipped.shape[1]):
            if clipped[y, x] < low:
                clipped[y, x] = low
            elif clipped[y, x] > high:
                clipped[y, x] = high
    return clipped


def median(size: Size) -> Part:
    """The medians of all runs of 30 images."""
    images = (
        np.random.default_rng(1)
        .normal(0, 0.01, (size.n_median, MEDIAN_ROWS, 1024))
        .astype(np.float32)
    )
    n = len(images) - STACK_SIZE + 1

    def ours() -> float:
        running_median(images, STACK_SIZE)
        return n

    def recomputed() -> float:
        for first in range(n):
            np.median(images[first : first + STACK_SIZE], axis=0)
        return n

    rates = interleave({"recomputed": recomputed, "ours": ours}, least=size.least, most=size.most)
    part = Part(f"Running median of {STACK_SIZE} images, {len(images)} in all")
    whole = MEDIAN_ROWS / 1024
    part.add("recomputed_rate", "each from nothing, NumPy", "images/s", whole * rates["recomputed"])
    part.add("ours_rate", "blobpipe", "images/s", whole * rates["ours"])
    part.add_ratio(
        "ours_over_recomputed", "blobpipe / each from nothing", rates["ours"], rates["recomputed"]
    )
    part.remarks.append(f"Timed on {MEDIAN_ROWS} rows of each image.")
    return part
