"""Recipes into pixels: the one place where training, validation and contact sheets get their subframes.

A recipe is a row of a table: which frame, which window, which stamps where, which dip, which noise,
which rotation and flip. Rendering it again, anywhere, on any number of cores, gives the same bytes.
The noise comes from a counter-based generator, so that no pixel waits for another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba as nb
import numpy as np
import numpy.typing as npt

from blobpipe.images import tiles
from blobpipe.simulation import clutter
from blobpipe.simulation.recipes import STEP, Recipes, Scene, Subframes

if TYPE_CHECKING:
    pass
BLOCK = 16  # pixels in a row that are turned together: what a line of the cache holds
# of the normal distribution: noise is one of them, the nearest cache holds all beside the image
N_QUANTILES = 4096


def render_subframes(
    scene: Scene,
    recipes: Recipes,
    rows: npt.NDArray[np.int64],
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
        Mean 0 and standard deviation 1 each, whatever their label.

    Notes
    -----
    Source: ISR 3.3, 3.4. Ours: blobs are added and then clipped as a real one would have been; dips;
    both classes are standardised alike.
    """
    if out is None:
        out = np.empty((len(rows), tiles.SIDE, tiles.SIDE), np.float32)
    copy %= len(recipes.noise_seed)
    _render(
        out,
        rows,
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
        recipes.factor,
        recipes.noise_seed[copy],
        recipes.turn[copy],
        np.float32(noise_sigma),
        NORMAL_QUANTILES,
    )
    return out


def render_varied(
    scene: Scene,
    recipes: Recipes,
    rows: npt.NDArray[np.int64],
    *,
    copy: int,
    strength: npt.NDArray[np.float32],
    noise_sigma: npt.NDArray[np.float32],
    piece: npt.NDArray[np.int64],
    pieces: npt.NDArray[np.int16],
    corner: npt.NDArray[np.int64] | None = None,
    side: int = tiles.SIDE,
) -> Subframes:
    """Render some rows with weaker or stronger blobs and with clutter, in sigma of the frame: not standardised.

    Parameters
    ----------
    scene, recipes, rows, copy
        As in `render`.
    strength : ndarray, shape (blobs of all recipes,), float32
        By which each blob's amplitude is multiplied.
    noise_sigma : ndarray, shape (n,), float32
        Standard deviation of the added noise (sigma).
    piece : ndarray, shape (n,), int
        Which piece of clutter lies over each subframe; -1: none.
    pieces : ndarray, shape (m, 256, 256), int16
        From `clutter.draw_pieces`.
    corner : ndarray, shape (n, 2), int, optional
        x, y of the first pixel of the part that is wanted of each subframe, after its turns (px, multiples of 4).
    side : int
        Of that part (px, a multiple of 16).

    Returns
    -------
    ndarray, shape (n, side, side), float32
        Limited as clipping limits a frame; 0 where a pixel has no value.
    """
    out = np.empty((len(rows), side, side), np.float32)
    copy %= len(recipes.noise_seed)
    _vary(
        out,
        rows,
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
        recipes.factor * strength,
        recipes.noise_seed[copy],
        recipes.turn[copy],
        noise_sigma,
        piece,
        pieces,
        np.zeros((len(rows), 2), np.int64) if corner is None else corner,
        NORMAL_QUANTILES,
    )
    return out


def turned(
    x_px: npt.NDArray[np.float32], y_px: npt.NDArray[np.float32], turn: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Where pixels of a subframe lie after its quarter turns and flip (n, 2)."""
    last = tiles.SIDE - 1
    quarters = turn[:, 0]
    x = np.choose(quarters, [x_px, y_px, last - x_px, last - y_px])
    y = np.choose(quarters, [y_px, last - x_px, last - y_px, x_px])
    return np.where(turn[:, 1] != 0, last - x, x), y


def standardise(subframes: Subframes) -> Subframes:
    """Mean 0 and standard deviation 1 for each subframe, in place; a constant one becomes 0.

    Parameters
    ----------
    subframes : ndarray, shape (n, ny, nx), float32
    """
    _standardise_all(subframes)
    return subframes


def _normal_quantiles() -> npt.NDArray[np.float32]:
    from scipy.special import ndtri

    quantiles = ndtri((np.arange(N_QUANTILES) + 0.5) / N_QUANTILES)
    return np.asarray(quantiles / quantiles.std(), dtype=np.float32)


NORMAL_QUANTILES = _normal_quantiles()
LAST_QUANTILE = np.uint64(N_QUANTILES - 1)


@nb.njit(parallel=True, cache=True)
def _render(  # type: ignore[no-untyped-def]
    out, rows, backgrounds, limits, sigma_frac, pattern, stamps, frame, window, dip, first_blob, blob, factor, seeds,
    turns, noise_sigma, quantiles,
):  # fmt: skip
    for k in nb.prange(len(rows)):
        row = rows[k]
        image = np.empty((tiles.SIDE, tiles.SIDE), np.float32)
        i = frame[row]
        x0 = window[row, 0]
        y0 = window[row, 1]
        _background(image, backgrounds[i], x0, y0)
        if dip[row, 0] != 0 or dip[row, 1] != 0:
            _add_dip(
                image, pattern, x0, y0, dip[row, 0], dip[row, 1], np.float32(1) / sigma_frac[i]
            )
        for b in range(first_blob[row], first_blob[row + 1]):
            _add_stamp(image, stamps[blob[b, 0]], blob[b, 1], blob[b, 2], factor[b])
        _limit(image, limits[i, 0], limits[i, 1])
        if noise_sigma > 0:
            _add_noise(image, 0, 0, seeds[row], noise_sigma, quantiles)
        _standardise(image)
        _turn(image, out[k], turns[row, 0], turns[row, 1])


@nb.njit(parallel=True, cache=True)
def _vary(  # type: ignore[no-untyped-def]
    out, rows, backgrounds, limits, sigma_frac, pattern, stamps, frame, window, dip, first_blob, blob, factor, seeds,
    turns, noise_sigma, piece, pieces, corner, quantiles,
):  # fmt: skip
    for k in nb.prange(len(rows)):
        row = rows[k]
        side = out.shape[1]
        image = np.empty((side, side), np.float32)
        left, top = _unturned(corner[k, 0], corner[k, 1], side, turns[row, 0], turns[row, 1])
        i = frame[row]
        x0 = window[row, 0] + left
        y0 = window[row, 1] + top
        _background(image, backgrounds[i], x0, y0)
        if dip[row, 0] != 0 or dip[row, 1] != 0:
            _add_dip(
                image, pattern, x0, y0, dip[row, 0], dip[row, 1], np.float32(1) / sigma_frac[i]
            )
        for b in range(first_blob[row], first_blob[row + 1]):
            _add_stamp(image, stamps[blob[b, 0]], blob[b, 1] - left, blob[b, 2] - top, factor[b])
        _add_noise(image, left, top, seeds[row], noise_sigma[k], quantiles)
        if piece[k] >= 0:
            _add_clutter(image, pieces[piece[k], top : top + side, left : left + side])
        _limit(image, limits[i, 0], limits[i, 1])
        if piece[k] >= 0:
            _remove_values(image, pieces[piece[k], top : top + side, left : left + side])
        _turn(image, out[k], turns[row, 0], turns[row, 1])


@nb.njit(cache=True)
def _unturned(x, y, side, quarters, flip):  # type: ignore[no-untyped-def]
    """First pixel (x, y), before the turns, of what is a square with this first pixel and side after them."""
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
    step = np.float32(1 / clutter.STEP)
    for y in range(image.shape[0]):
        to = image[y]
        row = piece[y]
        for x in range(len(to)):
            to[x] += row[x] * step


@nb.njit(cache=True)
def _remove_values(image, piece):  # type: ignore[no-untyped-def]
    for y in range(image.shape[0]):
        to = image[y]
        row = piece[y]
        for x in range(len(to)):
            if row[x] == clutter.NO_VALUE:
                to[x] = 0


@nb.njit(cache=True)
def _background(image, frame, x0, y0):  # type: ignore[no-untyped-def]
    step = np.float32(1 / STEP)
    side = len(image)
    for y in range(side):
        # whole rows: indices that cannot wrap around make vectors
        to = image[y]
        row = frame[y0 + y, x0 : x0 + side]
        for x in range(side):
            to[x] = row[x] * step


@nb.njit(cache=True)
def _add_dip(image, pattern, x0, y0, dx, dy, per_frac):  # type: ignore[no-untyped-def]
    """The pattern moved, by bilinear interpolation and zero outside, less the pattern itself."""
    (ny, nx) = pattern.shape
    side = len(image)
    left = int(np.floor(x0 - dx))
    top = int(np.floor(y0 - dy))
    fx = np.float32(x0 - dx - left)
    fy = np.float32(y0 - dy - top)
    # of the columns that lie inside
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
    half = stamp.shape[0] // 2
    side = len(image)
    for y in range(max(0, cy - half), min(side, cy + half + 1)):
        for x in range(max(0, cx - half), min(side, cx + half + 1)):
            image[y, x] += factor * stamp[y - cy + half, x - cx + half]


@nb.njit(cache=True)
def _limit(image, low, high):  # type: ignore[no-untyped-def]
    flat = image.ravel()
    for i in range(flat.size):
        flat[i] = min(max(flat[i], low), high)


@nb.njit(cache=True)
def _add_noise(image, left, top, seed, sigma, quantiles):  # type: ignore[no-untyped-def]
    """Four normal deviates from each 64-bit word of SplitMix64, by a table of the normal quantiles.

    A word belongs to a place on the subframe, of which the image is the part from ``left``, ``top`` on.
    """
    for y in range(len(image)):
        row = image[y]
        first = ((top + y) * tiles.SIDE + left) // 4 + 1
        for i in range(len(row) // 4):
            word = seed + np.uint64(first + i) * np.uint64(0x9E3779B97F4A7C15)
            word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            word ^= word >> np.uint64(31)
            row[4 * i] += sigma * quantiles[word & LAST_QUANTILE]
            row[4 * i + 1] += sigma * quantiles[(word >> np.uint64(16)) & LAST_QUANTILE]
            row[4 * i + 2] += sigma * quantiles[(word >> np.uint64(32)) & LAST_QUANTILE]
            row[4 * i + 3] += sigma * quantiles[(word >> np.uint64(48)) & LAST_QUANTILE]


@nb.njit(cache=True, fastmath={"reassoc", "contract"})
def _moments(image):  # type: ignore[no-untyped-def]
    total = np.float64(0)
    squares = np.float64(0)
    for y in range(image.shape[0]):
        row_total = np.float32(0)
        row_squares = np.float32(0)
        for x in range(image.shape[1]):
            row_total += image[y, x]
            row_squares += image[y, x] * image[y, x]
        total += np.float64(row_total)
        squares += np.float64(row_squares)
    mean = total / image.size
    return mean, max(squares / image.size - mean * mean, 0.0) ** 0.5


@nb.njit(cache=True)
def _standardise(image):  # type: ignore[no-untyped-def]
    mean, sigma = _moments(image)
    gain = np.float32(1 / sigma) if sigma > 1e-6 else np.float32(0)
    offset = np.float32(-mean * gain)
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            image[y, x] = image[y, x] * gain + offset


@nb.njit(parallel=True, cache=True)
def _standardise_all(subframes):  # type: ignore[no-untyped-def]
    for k in nb.prange(len(subframes)):
        _standardise(subframes[k])


@nb.njit(cache=True)
def _turn(image, out, quarters, flip):  # type: ignore[no-untyped-def]
    """``np.rot90(image, quarters)``, then left and right exchanged if ``flip``."""
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
    # columns become rows: block by block, so that the cache holds what is read
    for top in range(0, side, BLOCK):
        for left in range(0, side, BLOCK):
            for y in range(top, top + BLOCK):
                to = out[y]
                column = np.uint32(last - y if quarters == 1 else y)
                for x in range(left, left + BLOCK):
                    row = np.uint32(last - x if (flip != 0) == (quarters == 1) else x)
                    to[x] = image[row, column]
