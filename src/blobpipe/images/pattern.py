"""The pattern of the known blobs, as a median stack shows it."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numba as nb
import numpy as np
import numpy.typing as npt

from blobpipe.core.arrays import Image
from blobpipe.core.cutouts import window_around
from blobpipe.images.noise import (
    clean_noise,
)

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)
SMOOTHING_PX = 1.1  # of the pattern: loses little of a blob's edge, most of the pixels' own pattern
FILL_PX = 6  # around a bad pixel from which it is filled: four standard deviations
MOSTLY = 0.85  # of a blob's pixels are good
# x, y, reach (px): the Death Star and the wagon wheel's hub
NO_BLOBS = ((362.0, 59.0, 28.0), (968.0, 50.0, 28.0))
DEEPEST_FRAC = 0.35  # a blob takes up to 30 % of the light


def blob_pattern(stack: Image, blobs: pd.DataFrame | None = None) -> Image:
    """The known blobs alone, as a median stack shows them: smoothed, without bad pixels, 0 elsewhere.

    Parameters
    ----------
    stack : ndarray, shape (ny, nx), float32
        A median stack (fraction of the light).
    blobs : DataFrame, optional
        Catalogue with the columns x_px, y_px, radius_px. What stands out of the stack counts as a blob in any case.

    Returns
    -------
    ndarray, shape (ny, nx), float32
        Blobs that the detector's border cuts go on beyond it.

    Notes
    -----
    Source: ours. Smoothing twice, the second time what the first one lost, keeps a blob's edge.
    """
    noise = clean_noise(stack)
    filled, good = _without_bad_pixels(np.nan_to_num(_continued(stack)), noise)
    pattern = smooth_gaussian(filled, SMOOTHING_PX, twice=True)
    near = _standing_out(pattern, filled - pattern, good, noise)
    if blobs is not None:
        np.maximum(near, _near_blobs(stack.shape, blobs), out=near)
    return pattern * near


def _continued(stack: Image) -> Image:
    """Rows and columns without values mirror those inside: a shift moves some of what the border hides into view."""
    lines = [np.flatnonzero(np.isfinite(stack).any(axis=axis)) for axis in (1, 0)]
    if not lines[0].size:
        return stack
    inner = stack[tuple(slice(line[0], line[-1] + 1) for line in lines)]
    beyond = [
        (line[0], length - 1 - line[-1]) for line, length in zip(lines, stack.shape, strict=True)
    ]
    return np.pad(inner, beyond, mode="symmetric")


def _without_bad_pixels(stack: Image, noise: float) -> tuple[Image, npt.NDArray[np.bool_]]:
    """Fill each pixel that no blob explains from around it; where none was to be filled."""
    sides = np.stack([np.roll(stack, step, axis) for axis in (0, 1) for step in (-1, 1)])
    usual = (sides.sum(axis=0) - sides.max(axis=0) - sides.min(axis=0)) / 2
    alike = np.abs(stack - usual) < 4 * noise + 0.3 * np.abs(usual)
    good = alike & (stack > -4 * noise) & (stack < DEEPEST_FRAC)
    filled = _filled(stack, good)
    sharp = smooth_gaussian(filled, SMOOTHING_PX, twice=True)
    rough = smooth_gaussian(np.square(filled - sharp), 1.0) > np.square(
        2 * noise + 0.1 * np.abs(sharp)
    )
    good &= ~rough  # a cluster of bad pixels has harder edges than any blob
    return _filled(stack, good), good


def _filled(stack: Image, good: npt.NDArray[np.bool_]) -> Image:
    """Pixels that are not good have the mean of the good ones around, or less where these are few."""
    weights = np.exp(-np.square(np.arange(-FILL_PX, FILL_PX + 1) / 1.5) / 2).astype(np.float32)
    filled = np.where(good, stack, 0).astype(np.float32)
    padded = np.pad(filled, FILL_PX)
    share = np.pad(good.astype(np.float32), FILL_PX)
    _fill(padded, share, good, filled, weights / weights.sum())
    return filled


@nb.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _fill(values, share, good, filled, weights):  # type: ignore[no-untyped-def]
    n = len(weights)
    for y in range(good.shape[0]):
        for x in range(good.shape[1]):
            if not good[y, x]:
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
    """1 on each blob of the catalogue, falling to 0 within two pixels of its outer edge."""
    near = np.zeros(shape, np.float32)
    for x, y, radius in blobs[["x_px", "y_px", "radius_px"]].itertuples(index=False):
        window, distance = window_around(shape, x, y, 1.55 * radius + 3)
        np.maximum(
            near[window], np.clip((1.55 * radius + 2.5 - distance) / 2, 0, 1), out=near[window]
        )
    return near


def _standing_out(pattern: Image, rest: Image, good: npt.NDArray[np.bool_], noise: float) -> Image:
    """1 on compact positive patches that are smooth like a blob, falling to 0 around them."""
    from scipy import ndimage

    smoothed = smooth_gaussian(pattern, 1.5)
    for x, y, reach in NO_BLOBS:
        window, distance = window_around(smoothed.shape, x, y, reach)
        smoothed[window][distance < reach] = 0
    sigma = clean_noise(smoothed)
    labels, n = ndimage.label(smoothed > 2 * sigma)
    keep = np.zeros(n + 1, np.bool_)
    windows = ndimage.find_objects(labels)
    for label in np.unique(labels[smoothed > 5 * sigma]):
        window = windows[label - 1]
        patch = labels[window] == label
        likely = _compact(patch) and good[window][patch].mean() > MOSTLY
        keep[label] = likely and _blob_like(pattern[window][patch], rest[window][patch], noise)
    return soften(keep[labels], 1.0)


def _compact(patch: npt.NDArray[np.bool_]) -> bool:
    """Neither a few pixels, nor much longer than wide, nor large: such are no blobs."""
    short, long = sorted(patch.shape)
    return bool(patch.sum() >= 16 and long < 2.5 * short and long < 45)


def _blob_like(values: Image, rest: Image, noise: float) -> bool:
    """No deeper than any blob, and what smoothing takes away is noise: a cluster of bad pixels has hard edges."""
    return bool(values.max() < DEEPEST_FRAC and np.std(rest) < 1.3 * noise + 0.03 * values.max())


def soften(region: npt.NDArray[np.bool_], width: float) -> Image:
    """1 on a region and just around it, falling to 0 within three times ``width``."""
    return np.asarray(np.clip(4 * smooth_gaussian(region, width) - 0.05, 0, 1))


def smooth_gaussian(image: npt.NDArray[Any], sigma: float, *, twice: bool = False) -> Image:
    """Convolve with a Gaussian, and what that loses again if ``twice``; the image is taken as periodic."""
    from scipy.fft import irfft2, rfft2

    transfer = gaussian_transfer(image.shape[-2:], sigma, twice)
    return np.asarray(irfft2(rfft2(image.astype(np.float32)) * transfer, s=image.shape[-2:]))


@lru_cache(maxsize=32)
def gaussian_transfer(shape: tuple[int, int], sigma: float, twice: bool) -> Image:
    fx, fy = frequencies(shape)
    transfer = np.exp(-2 * (np.pi * sigma) ** 2 * (fx**2 + fy**2))
    return np.asarray(2 * transfer - transfer**2 if twice else transfer)


def frequencies(shape: tuple[int, ...]) -> tuple[Image, Image]:
    """Cycles per pixel along x and y of an image's `rfft2`."""
    fx = np.fft.rfftfreq(shape[1])[None, :]
    fy = np.fft.fftfreq(shape[0])[:, None]
    return fx.astype(np.float32), fy.astype(np.float32)
