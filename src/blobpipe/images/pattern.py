"""Extract the pattern of the known blobs from a median stack."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numba as nb
import numpy as np
import numpy.typing as npt

from blobpipe.core.arrays import Image, Mask
from blobpipe.core.cutouts import window_around
from blobpipe.noise.level import clean_noise

if TYPE_CHECKING:
    import pandas as pd

# Gaussian sigma by which the pattern is smoothed (px): it loses little of the edge of a blob, and most of the pixels' own
# pattern
SMOOTHING_PX = 1.1

# Distance up to which the neighbours of a bad pixel fill it (px), and the Gaussian sigma of their weights (px)
FILL_PX = 6
FILL_SIGMA_PX = 1.5

# Smallest fraction of good pixels in a blob
MOSTLY = 0.85

# Circles that contain no blobs (x, y, radius; px): the Death Star, and the hub of the wagon wheel
NO_BLOBS = ((362.0, 59.0, 28.0), (968.0, 50.0, 28.0))

# Largest depth of a blob (fraction of the light); real blobs take up to 30 %
DEEPEST_FRAC = 0.35


def blob_pattern(stack: Image, blobs: pd.DataFrame | None = None) -> Image:
    """Return the known blobs as a median stack shows them: smoothed, without bad pixels, 0 elsewhere.

    Parameters
    ----------
    stack : ndarray, shape (ny, nx), float32
        A median stack (fraction of the light).
    blobs : DataFrame, optional
        Catalogue with the columns x_px, y_px, radius_px. Compact structures of the stack count as blobs in any case.

    Returns
    -------
    ndarray, shape (ny, nx), float32
        Fraction of the light. Blobs that the border of the detector cuts are continued beyond it.

    Notes
    -----
    Source: this project. Smoothing twice, the second time what the first one lost, keeps the edge of a blob.
    """
    noise = clean_noise(stack)
    filled, good = _without_bad_pixels(_continued(stack), noise)
    pattern = smooth_gaussian(filled, SMOOTHING_PX, twice=True)
    near = _compact_structures(pattern, filled - pattern, good, noise)
    if blobs is not None:
        np.maximum(near, _near_blobs(stack.shape, blobs), out=near)
    return pattern * near


def _continued(stack: Image) -> Image:
    """Fill rows and columns without values by mirroring those inside.

    A shift of the pattern moves some of what the border hides into view.
    """
    finite = np.isfinite(stack)
    rows = np.flatnonzero(finite.any(axis=1))
    columns = np.flatnonzero(finite.any(axis=0))
    if not rows.size:
        return stack
    inner = stack[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    ny, nx = stack.shape
    above_below = (rows[0], ny - 1 - rows[-1])
    left_right = (columns[0], nx - 1 - columns[-1])
    return np.pad(inner, [above_below, left_right], mode="symmetric")


def _without_bad_pixels(stack: Image, noise: float) -> tuple[Image, Mask]:
    """Fill pixels without a value, and those that no blob explains, from their neighbours.

    Return the image, and a mask of the other pixels.
    """
    has_value = np.isfinite(stack)
    stack = np.where(has_value, stack, np.float32(0))
    good: Mask = _like_neighbours(stack, np.float32(4 * noise))
    good &= has_value

    # Clusters of bad pixels have harder edges than any blob, so that smoothing changes them
    filled = _filled(stack, good)
    smooth = smooth_gaussian(filled, SMOOTHING_PX, twice=True)
    residual = smooth_gaussian(np.square(filled - smooth), 1.0)
    limit = 2 * noise + 0.1 * np.abs(smooth)
    good &= ~(residual > np.square(limit))
    return _filled(stack, good), good


@nb.njit(cache=True, nogil=True)
def _like_neighbours(stack, four_sigma):  # type: ignore[no-untyped-def]
    """Return where a pixel can be that of a blob, and is like the middle two of its four neighbours.

    ``four_sigma`` is a float32; the image is taken as periodic.
    """
    ny, nx = stack.shape
    good = np.empty((ny, nx), np.bool_)
    for y in range(ny):
        for x in range(nx):
            above = stack[y + 1 if y + 1 < ny else 0, x]
            below = stack[y - 1, x]
            right = stack[y, x + 1 if x + 1 < nx else 0]
            left = stack[y, x - 1]
            highest = max(above, below, right, left)
            lowest = min(above, below, right, left)
            usual = (above + below + right + left - highest - lowest) / np.float32(2)
            value = stack[y, x]
            alike = abs(value - usual) < four_sigma + np.float32(0.3) * abs(usual)
            good[y, x] = alike and -four_sigma < value < np.float32(DEEPEST_FRAC)
    return good


def _filled(stack: Image, good: Mask) -> Image:
    """Replace pixels that are not good by the weighted mean of the good ones around them.

    The mean falls to 0 where hardly any neighbour is good.
    """
    steps = np.arange(-FILL_PX, FILL_PX + 1) / FILL_SIGMA_PX
    weights = np.exp(-np.square(steps) / 2).astype(np.float32)
    filled = np.where(good, stack, 0).astype(np.float32)
    padded = np.pad(filled, FILL_PX)
    share = np.pad(good.astype(np.float32), FILL_PX)
    _fill(padded, share, good, filled, weights / weights.sum())
    return filled


@nb.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _fill(values, share, good, filled, weights):  # type: ignore[no-untyped-def]
    """Overwrite pixels that are not good, in place.

    ``values`` (0 where not good) and ``share`` (1 where good) are padded by `FILL_PX`.
    """
    n = len(weights)
    for y in range(good.shape[0]):
        for x in range(good.shape[1]):
            if not good[y, x]:
                # Separable weights: along each row, then over the rows
                total = np.float32(0)
                counted = np.float32(0)
                for j in range(n):
                    row = values[y + j, x : x + n]
                    row_good = share[y + j, x : x + n]
                    row_total = np.float32(0)
                    row_counted = np.float32(0)
                    for i in range(n):
                        row_total += weights[i] * row[i]
                        row_counted += weights[i] * row_good[i]
                    total += weights[j] * row_total
                    counted += weights[j] * row_counted
                filled[y, x] = total / max(counted, np.float32(0.02))


def _near_blobs(shape: tuple[int, ...], blobs: pd.DataFrame) -> Image:
    """Return 1 on each blob of the catalogue, falling to 0 within two pixels of its outer edge."""
    near = np.zeros(shape, np.float32)
    for x, y, radius in blobs[["x_px", "y_px", "radius_px"]].itertuples(index=False):
        window, distance = window_around(shape, x, y, 1.55 * radius + 3)
        soft = np.clip((1.55 * radius + 2.5 - distance) / 2, 0, 1)
        np.maximum(near[window], soft, out=near[window])
    return near


def _compact_structures(pattern: Image, rest: Image, good: Mask, noise: float) -> Image:
    """Return 1 on compact positive patches that are smooth like a blob, falling to 0 around them.

    Parameters
    ----------
    pattern, rest : ndarray, shape (ny, nx), float32
        Smoothed stack, and what smoothing has taken away.
    good : ndarray, shape (ny, nx), bool
        Pixels that have not been filled.
    noise : float
        Noise of the stack.
    """
    from scipy import ndimage

    # Structures that are no blobs, whatever they look like
    smoothed = smooth_gaussian(pattern, 1.5)
    for x, y, reach in NO_BLOBS:
        window, distance = window_around(smoothed.shape, x, y, reach)
        smoothed[window][distance < reach] = 0
    # Patches of pixels above 2 sigma with a peak above 5 sigma
    sigma = clean_noise(smoothed)
    labels, n = ndimage.label(smoothed > 2 * sigma)
    windows = ndimage.find_objects(labels)
    is_blob = np.zeros(n + 1, np.bool_)
    for label in np.unique(labels[smoothed > 5 * sigma]):
        window = windows[label - 1]
        patch = labels[window] == label
        likely = _compact(patch) and good[window][patch].mean() > MOSTLY
        is_blob[label] = likely and _blob_like(pattern[window][patch], rest[window][patch], noise)
    return soften(is_blob[labels], 1.0)


def _compact(patch: Mask) -> bool:
    """Say if a patch is neither small (16 px), nor large (45 px long), nor much longer than wide."""
    short, long = sorted(patch.shape)
    return bool(patch.sum() >= 16 and long < 2.5 * short and long < 45)


def _blob_like(values: Image, rest: Image, noise: float) -> bool:
    """Say if a patch is no deeper than any blob, and if smoothing takes away no more than noise.

    Parameters
    ----------
    values, rest : ndarray, shape (n,)
        Pixels of the smoothed patch, and what smoothing has taken away.
    noise : float
    """
    deepest = values.max()
    return bool(deepest < DEEPEST_FRAC and np.std(rest) < 1.3 * noise + 0.03 * deepest)


def soften(region: Mask, width: float) -> Image:
    """Return 1 on a region and just around it, falling to 0 within three times ``width`` (px)."""
    smooth = smooth_gaussian(region, width)
    return np.asarray(np.clip(4 * smooth - 0.05, 0, 1))


def smooth_gaussian(image: npt.NDArray[Any], sigma: float, *, twice: bool = False) -> Image:
    """Convolve an image with a Gaussian.

    Parameters
    ----------
    image : ndarray, shape (..., ny, nx)
        Taken as periodic.
    sigma : float
        Standard deviation of the Gaussian (px).
    twice : bool
        Add the smoothed residual: what is lost is then of the second order.

    Returns
    -------
    ndarray, shape (..., ny, nx), float32
    """
    from scipy.fft import irfft2, rfft2

    shape = image.shape[-2:]
    spectrum = rfft2(image.astype(np.float32))
    transfer = gaussian_transfer(shape, sigma, twice)
    return np.asarray(irfft2(spectrum * transfer, s=shape))


@lru_cache(maxsize=32)
def gaussian_transfer(shape: tuple[int, int], sigma: float, twice: bool) -> Image:
    """Return the transfer function of `smooth_gaussian` for an image's `rfft2`, shape (ny, nx // 2 + 1)."""
    fx, fy = frequencies(shape)
    transfer = np.exp(-2 * (np.pi * sigma) ** 2 * (fx**2 + fy**2))
    return np.asarray(2 * transfer - transfer**2 if twice else transfer)


def frequencies(shape: tuple[int, ...]) -> tuple[Image, Image]:
    """Return the frequencies along x and y (cycles per pixel) of an image's `rfft2`, float32."""
    fx = np.fft.rfftfreq(shape[1])[None, :]
    fy = np.fft.fftfreq(shape[0])[:, None]
    return fx.astype(np.float32), fy.astype(np.float32)
