"""Render recipes: the one place where training, validation and contact sheets get their subframes.

A recipe is a row of a table: which frame, which window, which stamps at which positions, which dip, which noise, which
rotation and flip. The same recipe gives the same bytes, wherever it is rendered, on any number of cores. The noise comes from
a counter-based generator, so that no pixel depends on another.
"""

from __future__ import annotations

from typing import NamedTuple

import numba as nb
import numpy as np
import numpy.typing as npt

from blobpipe.core.arrays import Float32Array, Int16Array, Int32Array, Int64Array
from blobpipe.core.random_streams import GOLDEN_GAMMA, compiled_mix
from blobpipe.images import tiles
from blobpipe.simulation import clutter
from blobpipe.simulation.recipes import STEP, Recipes, Scene, Subframes

# Pixels in a row that are turned together (px): a line of the cache
BLOCK = 16

# Quantiles of the normal distribution from which noise is drawn; the nearest cache holds them beside the image
N_QUANTILES = 4096


def _normal_quantiles() -> Float32Array:
    """Return the quantiles of the normal distribution at evenly spaced probabilities, with a variance of 1."""
    from scipy.special import ndtri

    probability = (np.arange(N_QUANTILES) + 0.5) / N_QUANTILES
    quantiles = ndtri(probability)
    return np.asarray(quantiles / quantiles.std(), dtype=np.float32)


NORMAL_QUANTILES = _normal_quantiles()
LAST_QUANTILE = np.uint64(N_QUANTILES - 1)

_mix = compiled_mix()


class _Recipes(NamedTuple):
    """The arrays that the kernels read: those of a `Scene`, and those of `Recipes` for one augmented copy."""

    backgrounds: Int16Array
    limits: Float32Array
    sigma_frac: Float32Array
    pattern: Float32Array
    stamps: Float32Array
    frame: Int32Array
    window: Int32Array
    dip: Float32Array
    first_blob: Int64Array
    blob: Int32Array
    factor: Float32Array
    noise_seed: npt.NDArray[np.uint64]
    turn: Int32Array


def _arrays(scene: Scene, recipes: Recipes, copy: int, factor: Float32Array) -> _Recipes:
    """Collect the arrays of one augmented copy, taken modulo their number."""
    copy %= len(recipes.noise_seed)
    return _Recipes(
        scene.backgrounds,
        scene.limits,
        scene.sigma_frac,
        scene.pattern,
        scene.stamps,
        recipes.frame,
        recipes.window,
        recipes.dip,
        recipes.first_blob,
        recipes.blob,
        factor,
        recipes.noise_seed[copy],
        recipes.turn[copy],
    )


def render_subframes(
    scene: Scene,
    recipes: Recipes,
    rows: Int64Array,
    *,
    copy: int = 0,
    noise_sigma: float = 0.0,
    out: Subframes | None = None,
) -> Subframes:
    """Render some rows of a table of recipes.

    Parameters
    ----------
    scene : Scene
    recipes : Recipes
    rows : ndarray, shape (n,), int
        Which rows, in any order.
    copy : int
        Which of the augmented copies; taken modulo their number.
    noise_sigma : float
        Standard deviation of the added noise (sigma).
    out : ndarray, shape (n, 256, 256), float32, optional
        Where to write.

    Returns
    -------
    ndarray, shape (n, 256, 256), float32
        Each with mean 0 and standard deviation 1, whatever its label.

    Notes
    -----
    Source: ISR 3.3, 3.4. This project's are the dips, that blobs are added before clipping, as a real one would have been,
    and that both classes are standardised alike.
    """
    if out is None:
        out = np.empty((len(rows), tiles.SIDE, tiles.SIDE), np.float32)
    arrays = _arrays(scene, recipes, copy, recipes.factor)
    _render(out, rows, arrays, np.float32(noise_sigma), NORMAL_QUANTILES)
    return out


def render_varied(
    scene: Scene,
    recipes: Recipes,
    rows: Int64Array,
    *,
    copy: int,
    strength: Float32Array,
    noise_sigma: Float32Array,
    piece: Int64Array,
    pieces: Int16Array,
    corner: Int64Array | None = None,
    side: int = tiles.SIDE,
) -> Subframes:
    """Render some rows with weaker or stronger blobs and with clutter, in sigma of the frame, not standardised.

    Parameters
    ----------
    scene, recipes, rows, copy
        As in `render_subframes`.
    strength : ndarray, shape (blobs of all recipes,), float32
        Factor by which the amplitude of each blob is multiplied.
    noise_sigma : ndarray, shape (n,), float32
        Standard deviation of the added noise (sigma).
    piece : ndarray, shape (n,), int
        Index of the piece of clutter over each subframe; -1 for none.
    pieces : ndarray, shape (m, 256, 256), int16
        From `clutter.draw_pieces`.
    corner : ndarray, shape (n, 2), int, optional
        x, y of the first pixel of the part of each subframe that is rendered, after its turns (px, multiples of 4).
    side : int
        Side of that part (px), a multiple of 16.

    Returns
    -------
    ndarray, shape (n, side, side), float32
        Clipped at the limits of its frame; 0 where a pixel has no value.
    """
    out = np.empty((len(rows), side, side), np.float32)
    if corner is None:
        corner = np.zeros((len(rows), 2), np.int64)
    arrays = _arrays(scene, recipes, copy, recipes.factor * strength)
    _vary(out, rows, arrays, noise_sigma, piece, pieces, corner, NORMAL_QUANTILES)
    return out


def turned(
    x_px: Float32Array, y_px: Float32Array, turn: Int32Array
) -> tuple[Float32Array, Float32Array]:
    """Return the positions of pixels of subframes after their quarter turns and flips.

    Parameters
    ----------
    x_px, y_px : ndarray, shape (n,)
        Positions before (px).
    turn : ndarray, shape (n, 2), int32
        Quarter turns and flip of each subframe.
    """
    last = tiles.SIDE - 1
    quarters = turn[:, 0]
    is_flipped = turn[:, 1] != 0
    x = np.choose(quarters, [x_px, y_px, last - x_px, last - y_px])
    y = np.choose(quarters, [y_px, last - x_px, last - y_px, x_px])
    return np.where(is_flipped, last - x, x), y


def standardise(subframes: Subframes) -> Subframes:
    """Scale each subframe to mean 0 and standard deviation 1, in place; a constant one becomes 0.

    Parameters
    ----------
    subframes : ndarray, shape (n, ny, nx), float32
        Overwritten.

    Returns
    -------
    ndarray, shape (n, ny, nx), float32
        ``subframes``.
    """
    _standardise_all(subframes)
    return subframes


@nb.njit(parallel=True, cache=True)
def _render(out, rows, recipes, noise_sigma, quantiles):  # type: ignore[no-untyped-def]
    """Render whole subframes, and standardise them."""
    for k in nb.prange(len(rows)):
        row = rows[k]
        image = np.empty((tiles.SIDE, tiles.SIDE), np.float32)
        _draw_sky(image, recipes, row, 0, 0)
        _limit(image, recipes, row)
        if noise_sigma > 0:
            _add_noise(image, 0, 0, recipes.noise_seed[row], noise_sigma, quantiles)
        _standardise(image)
        _turn(image, out[k], recipes.turn[row, 0], recipes.turn[row, 1])


@nb.njit(parallel=True, cache=True)
def _vary(out, rows, recipes, noise_sigma, piece, pieces, corner, quantiles):  # type: ignore[no-untyped-def]
    """Render parts of subframes, with clutter."""
    for k in nb.prange(len(rows)):
        row = rows[k]
        side = out.shape[1]
        image = np.empty((side, side), np.float32)
        quarters = recipes.turn[row, 0]
        flip = recipes.turn[row, 1]
        left, top = _unturned(corner[k, 0], corner[k, 1], side, quarters, flip)
        _draw_sky(image, recipes, row, left, top)
        _add_noise(image, left, top, recipes.noise_seed[row], noise_sigma[k], quantiles)
        if piece[k] >= 0:
            _add_clutter(image, pieces[piece[k], top : top + side, left : left + side])
        _limit(image, recipes, row)
        if piece[k] >= 0:
            _remove_values(image, pieces[piece[k], top : top + side, left : left + side])
        _turn(image, out[k], quarters, flip)


@nb.njit(cache=True)
def _draw_sky(image, recipes, row, left, top):  # type: ignore[no-untyped-def]
    """Draw background, dip and blobs of a recipe; the image is the part of the subframe from ``left``, ``top`` on."""
    i = recipes.frame[row]
    x0 = recipes.window[row, 0] + left
    y0 = recipes.window[row, 1] + top
    _background(image, recipes.backgrounds[i], x0, y0)
    dx = recipes.dip[row, 0]
    dy = recipes.dip[row, 1]
    if dx != 0 or dy != 0:
        _add_dip(image, recipes.pattern, x0, y0, dx, dy, np.float32(1) / recipes.sigma_frac[i])
    for b in range(recipes.first_blob[row], recipes.first_blob[row + 1]):
        stamp = recipes.stamps[recipes.blob[b, 0]]
        cx = recipes.blob[b, 1] - left
        cy = recipes.blob[b, 2] - top
        _add_stamp(image, stamp, cx, cy, recipes.factor[b])


@nb.njit(cache=True)
def _unturned(x, y, side, quarters, flip):  # type: ignore[no-untyped-def]
    """Return the first pixel (x, y), before the turns, of a square with this first pixel and side after them."""
    far = tiles.SIDE - side
    if flip:
        x = far - x
    if quarters == 0:
        return x, y
    if quarters == 1:
        return far - y, x
    if quarters == 2:
        return far - x, far - y
    return y, far - x


@nb.njit(cache=True)
def _add_clutter(image, piece):  # type: ignore[no-untyped-def]
    """Add a piece of clutter; pixels without a value are removed later."""
    step = np.float32(1 / clutter.STEP)
    for y in range(image.shape[0]):
        to = image[y]
        row = piece[y]
        for x in range(len(to)):
            to[x] += row[x] * step


@nb.njit(cache=True)
def _remove_values(image, piece):  # type: ignore[no-untyped-def]
    """Set pixels to 0 where the clutter has no value."""
    for y in range(image.shape[0]):
        to = image[y]
        row = piece[y]
        for x in range(len(to)):
            if row[x] == clutter.NO_VALUE:
                to[x] = 0


@nb.njit(cache=True)
def _background(image, frame, x0, y0):  # type: ignore[no-untyped-def]
    """Copy the window of a frame, in sigma."""
    step = np.float32(1 / STEP)
    side = len(image)
    for y in range(side):
        # Whole rows, whose indices cannot be negative, let the compiler use vector instructions
        to = image[y]
        row = frame[y0 + y, x0 : x0 + side]
        for x in range(side):
            to[x] = row[x] * step


@nb.njit(cache=True)
def _add_dip(image, pattern, x0, y0, dx, dy, per_frac):  # type: ignore[no-untyped-def]
    """Add the pattern, moved by bilinear interpolation and zero outside of the frame, minus the pattern itself."""
    ny, nx = pattern.shape
    side = len(image)
    left = int(np.floor(x0 - dx))
    top = int(np.floor(y0 - dy))
    fx = np.float32(x0 - dx - left)
    fy = np.float32(y0 - dy - top)
    # The columns that lie inside
    first = max(0, -left)
    last = min(side, nx - 1 - left)
    for y in range(side):
        to = image[y]
        here = pattern[y0 + y, x0 : x0 + side]
        moved = np.zeros(side, np.float32)
        if 0 <= top + y < ny - 1 and first < last:
            there = moved[first:last]
            below = pattern[top + y, left + first : left + last + 1]
            above = pattern[top + y + 1, left + first :]
            for x in range(last - first):
                low = below[x] * (1 - fx) + below[x + 1] * fx
                high = above[x] * (1 - fx) + above[x + 1] * fx
                there[x] = np.float32(low * (1 - fy) + high * fy)
        for x in range(side):
            to[x] += (moved[x] - here[x]) * per_frac


@nb.njit(cache=True)
def _add_stamp(image, stamp, cx, cy, factor):  # type: ignore[no-untyped-def]
    """Add a stamp with its middle at ``cx``, ``cy``, as far as it lies on the image."""
    half = stamp.shape[0] // 2
    side = len(image)
    for y in range(max(0, cy - half), min(side, cy + half + 1)):
        for x in range(max(0, cx - half), min(side, cx + half + 1)):
            image[y, x] += factor * stamp[y - cy + half, x - cx + half]


@nb.njit(cache=True)
def _limit(image, recipes, row):  # type: ignore[no-untyped-def]
    """Clip an image at the limits of its frame."""
    i = recipes.frame[row]
    low = recipes.limits[i, 0]
    high = recipes.limits[i, 1]
    flat = image.ravel()
    for i in range(flat.size):
        flat[i] = min(max(flat[i], low), high)


@nb.njit(cache=True)
def _add_noise(image, left, top, seed, sigma, quantiles):  # type: ignore[no-untyped-def]
    """Add four normal deviates from each 64-bit word of SplitMix64, by a table of the normal quantiles.

    A word belongs to a position on the subframe, of which the image is the part from ``left``, ``top`` on.
    """
    for y in range(len(image)):
        row = image[y]
        first = ((top + y) * tiles.SIDE + left) // 4 + 1
        for i in range(len(row) // 4):
            word = _mix(seed + np.uint64(first + i) * np.uint64(GOLDEN_GAMMA))
            row[4 * i] += sigma * quantiles[word & LAST_QUANTILE]
            row[4 * i + 1] += sigma * quantiles[(word >> np.uint64(16)) & LAST_QUANTILE]
            row[4 * i + 2] += sigma * quantiles[(word >> np.uint64(32)) & LAST_QUANTILE]
            row[4 * i + 3] += sigma * quantiles[(word >> np.uint64(48)) & LAST_QUANTILE]


@nb.njit(cache=True)
def _moments(image):  # type: ignore[no-untyped-def]
    """Return the mean and standard deviation; the sums of a column are in float32, those of the image in float64.

    Differences from a pixel are summed, which keeps their rounding small. Each column has a sum of its own: a processor
    adds vectors of columns, and yet in the same order on every machine.
    """
    about = image[0, 0]
    total = np.zeros(image.shape[1], np.float32)
    squares = np.zeros(image.shape[1], np.float32)
    for y in range(image.shape[0]):
        row = image[y]
        for x in range(len(row)):
            difference = row[x] - about
            total[x] += difference
            squares[x] += difference * difference
    mean = _sum(total) / image.size
    return about + mean, max(_sum(squares) / image.size - mean * mean, 0.0) ** 0.5


@nb.njit(cache=True)
def _sum(values):  # type: ignore[no-untyped-def]
    """Return the sum of an array in float64."""
    total = 0.0
    for value in values:
        total += value
    return total


@nb.njit(cache=True)
def _standardise(image):  # type: ignore[no-untyped-def]
    """Scale an image to mean 0 and standard deviation 1, in place."""
    mean, sigma = _moments(image)
    gain = np.float32(1 / sigma) if sigma > 1e-6 else np.float32(0)
    offset = np.float32(-mean * gain)
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            image[y, x] = image[y, x] * gain + offset


@nb.njit(parallel=True, cache=True)
def _standardise_all(subframes):  # type: ignore[no-untyped-def]
    """Standardise each subframe, in place."""
    for k in nb.prange(len(subframes)):
        _standardise(subframes[k])


@nb.njit(cache=True)
def _turn(image, out, quarters, flip):  # type: ignore[no-untyped-def]
    """Write ``np.rot90(image, quarters)`` to ``out``, then exchange left and right if ``flip``."""
    side = len(image)
    last = side - 1
    if quarters % 2 == 0:
        for y in range(side):
            row = image[last - y if quarters else y]
            to = out[y]
            if (flip != 0) == (quarters != 0):
                for x in range(side):
                    to[x] = row[x]
            else:
                for x in range(side):
                    to[x] = row[np.uint32(last - x)]
        return
    # Columns become rows, block by block, so that the cache holds what is read
    for top in range(0, side, BLOCK):
        for left in range(0, side, BLOCK):
            for y in range(top, top + BLOCK):
                to = out[y]
                column = np.uint32(last - y if quarters == 1 else y)
                for x in range(left, left + BLOCK):
                    row = np.uint32(last - x if (flip != 0) == (quarters == 1) else x)
                    to[x] = image[row, column]
