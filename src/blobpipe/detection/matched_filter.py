"""Matched filters for blobs: on a whole image, and on subframes, which the networks are compared with.

A whole image has been whitened, so its noise is white and a blob on it is whitened, too: the filter is
a top-hat that has gone through the same whitening. It says which faint peaks of the network are worth a
look; what it alone sees is structure and noise, from which the joint score learns; and its responses
tell the noise on the scale of blobs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import bottleneck
import numba as nb
import numpy as np
import numpy.typing as npt
import scipy.fft
from numpy.lib.stride_tricks import sliding_window_view
from scipy.ndimage import uniform_filter1d

from blobpipe.core import threads
from blobpipe.core.arrays import FloatArray, Image
from blobpipe.noise.whiten import WHITE, NoiseModel

T = TypeVar("T")

BATCH = 4  # subframes worked on together: what is made of them stays in the cache
THREADS = 2  # batches at a time; their number changes no bit
# between the top-hat and its background ring, so that a soft edge does not count as background
GAP_PX = 2.0
# every 4th pixel, per axis, is enough for the spread of a map that varies over 3 px and more
SPREAD_STEP = 4

# Side of the cells to which a whole image is summed (px): less than the radius of any blob
CELL_PX = 2

# Radii of the top-hats on a whole image (px): with the cells and the background, 5 to 17 % of the S/N
# of blobs of any radius is lost
IMAGE_RADII_PX = (2.5, 3.5, 5.0, 7.0, 9.5)

# Sigma of the Gaussian around a place from which its background is taken (px)
BACKGROUND_PX = 20.0

# Values beyond count as this (sigma): a hot pixel is no blob, and a blob has many pixels
LARGEST_SIGMA = 4.0

# Side of the square around a place whose highest response it is (cells): 17 px
PEAK_CELLS = 9

# Of the top-hats, the one whose responses tell the noise of each row and column; over how many cells
# that is averaged; and the excess over the usual noise from which it is allowed for: five times its error
NOISE_RADIUS_PX = 5.0
NOISE_CELLS = 3
NOISIER = 1.25


class Match(NamedTuple):
    """The strongest response of the filter bank on each subframe, each an array of shape (n,).

    Attributes
    ----------
    snr : float64
        Signal-to-noise ratio.
    x, y : int64
        Where (px, 0-based).
    radius : float64
        Of the top-hat (px).
    """

    snr: npt.NDArray[np.float64]
    x: npt.NDArray[np.int64]
    y: npt.NDArray[np.int64]
    radius: npt.NDArray[np.float64]


@dataclass(frozen=True)
class FilteredImage:
    """Response of an image to top-hats of several radii, the highest at each place.

    Attributes
    ----------
    snr : ndarray, shape (ny // 2, nx // 2), float32
        Signal-to-noise ratio, in cells of 2 x 2 pixels.
    row_noise, column_noise : ndarray, shape (ny // 2,) and (nx // 2,)
        Noise of the responses on each row and column of cells, relative to the usual one.
    """

    snr: Image
    row_noise: FloatArray
    column_noise: FloatArray

    def places(self, at_least: float) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return x, y (px) and S/N of the responses from ``at_least`` on that are the highest around, in falling order."""
        rows, columns = np.nonzero(self.snr >= at_least)
        if len(rows) == 0:
            return np.zeros(0), np.zeros(0), np.zeros(0)
        padded = np.pad(self.snr, PEAK_CELLS // 2)
        around = sliding_window_view(padded, (PEAK_CELLS, PEAK_CELLS))[rows, columns]
        is_peak = self.snr[rows, columns] == around.max(axis=(1, 2), initial=0)
        rows = rows[is_peak]
        columns = columns[is_peak]
        snr = self.snr[rows, columns]
        order = np.argsort(-snr, kind="stable")
        middle = (CELL_PX - 1) / 2
        return columns[order] * CELL_PX + middle, rows[order] * CELL_PX + middle, snr[order]

    def noise_at(self, x: FloatArray, y: FloatArray) -> FloatArray:
        """Return the noise on the scale of blobs at positions (px), relative to the usual one; 1 unless it is `NOISIER`.

        Where two outputs of a detector meet, they are read towards each other, and their correlated noise is
        mirrored: a blob-sized mean there holds the same noise twice.
        """
        noise = np.ones(len(x))
        for strip, place in ((self.row_noise, y), (self.column_noise, x)):
            cell = np.clip(np.nan_to_num(place) // CELL_PX, 0, len(strip) - 1).astype(int)
            noise = np.maximum(noise, strip[cell])
        return np.where(noise >= NOISIER, noise, 1.0)


def filter_image(
    whitened: Image, noise_frac: float, noise_model: NoiseModel = WHITE
) -> FilteredImage:
    """Search a whole image with top-hats, less the background around each.

    Parameters
    ----------
    whitened : ndarray, shape (ny, nx), float32
        Whitened difference (fraction of the light); NaN where there is no value.
    noise_frac : float
        Its noise (fraction of the light).
    noise_model : NoiseModel, optional
        That by which it was whitened.

    Returns
    -------
    FilteredImage
        Each radius divided by the robust spread of its own responses, so that what is left of structure or of
        correlated noise does not count as signal.

    Notes
    -----
    Source: ours.
    """
    ny, nx = (side // CELL_PX for side in whitened.shape)
    cells = _cells(whitened, noise_frac) if noise_frac > 0 else np.zeros((ny, nx), np.float32)
    if not cells.any():
        return FilteredImage(cells, np.ones(ny), np.ones(nx))

    # Room for the filter beyond the borders, so that it does not reach around the image
    reach = _reach(max(IMAGE_RADII_PX)) // CELL_PX
    size = (scipy.fft.next_fast_len(ny + reach), scipy.fft.next_fast_len(nx + reach, real=True))
    waves = scipy.fft.rfft2(cells, size)
    gain = noise_model.gain_at(
        np.fft.fftfreq(size[0], CELL_PX), np.arange(size[1] // 2 + 1) / (size[1] * CELL_PX)
    )
    if gain is not None:
        waves = waves * gain

    highest = np.full((ny, nx), -np.inf, np.float32)
    for radius in IMAGE_RADII_PX:
        response = _filtered(waves, _image_filter(radius, size), size, (ny, nx))
        sizes = np.abs(response)
        spread = 1.4826 * bottleneck.median(sizes[::SPREAD_STEP, ::SPREAD_STEP].ravel())
        np.maximum(highest, response / max(spread, 1e-6), out=highest)
        if radius == NOISE_RADIUS_PX:
            strips = [
                1.4826 * bottleneck.median(np.ascontiguousarray(part), axis=1) / max(spread, 1e-6)
                for part in (sizes[:, ::SPREAD_STEP], sizes[::SPREAD_STEP].T)
            ]
    return FilteredImage(highest, *(uniform_filter1d(strip, NOISE_CELLS) for strip in strips))


def _filtered(
    waves: npt.NDArray[Any], gain: npt.NDArray[Any], size: tuple[int, int], part: tuple[int, int]
) -> Image:
    """Return the part of ``irfft2(waves * gain, size)`` that is asked for, to the same bits, with less memory.

    Parameters
    ----------
    waves, gain : ndarray, shape (..., size[0], size[1] // 2 + 1), complex64 or float32
    size, part : (int, int)
        Rows and columns of the whole, and of the lower left part that is returned.
    """
    ny, nx = part
    rows = scipy.fft.ifft(waves * gain, axis=-2, norm="forward", overwrite_x=True)[..., :ny, :]
    sums = scipy.fft.irfft(rows, size[1], norm="forward")[..., :nx]
    return np.asarray(sums * np.float32(1 / (size[0] * size[1])))


def _cells(whitened: Image, noise_frac: float) -> Image:
    """Sum an image to cells of 2 x 2 pixels, in units of their noise; 0 where there is no value."""
    level = bottleneck.nanmedian(whitened[::SPREAD_STEP, ::SPREAD_STEP])
    cells = np.empty([side // CELL_PX for side in whitened.shape], np.float32)
    pixels = np.ascontiguousarray(whitened, np.float32)
    _sum_cells(cells, pixels, np.float32(level), np.float32(1 / (CELL_PX * noise_frac)))
    return cells


@nb.njit(cache=True, nogil=True)
def _sum_cells(cells, whitened, level, gain):  # type: ignore[no-untyped-def]
    """Write the sum of each 2 x 2 pixels, in units of its noise; pixels are limited, and 0 without a value."""
    limit = np.float32(LARGEST_SIGMA / CELL_PX)
    sigma = np.empty((CELL_PX, cells.shape[1] * CELL_PX), np.float32)
    for y in range(len(cells)):
        # Whole rows let the compiler use vector instructions
        for row in range(CELL_PX):
            pixels = whitened[CELL_PX * y + row]
            to = sigma[row]
            for x in range(len(to)):
                value = min(max((pixels[x] - level) * gain, -limit), limit)
                to[x] = value if value == value else np.float32(0)
        to = cells[y]
        for x in range(len(to)):
            left = sigma[0, CELL_PX * x] + sigma[1, CELL_PX * x]
            to[x] = left + (sigma[0, CELL_PX * x + 1] + sigma[1, CELL_PX * x + 1])


@lru_cache(maxsize=32)
def _image_filter(radius: float, size: tuple[int, int]) -> Image:
    """Return the transform of a top-hat on cells, less a Gaussian, for images of this size."""
    y, x = (
        np.minimum(axis, side - axis)
        for axis, side in zip(np.ogrid[: size[0], : size[1]], size, strict=True)
    )
    distance = np.hypot(y, x) * CELL_PX
    hat = np.clip((radius - distance) / CELL_PX + 0.5, 0, 1)
    around = np.exp(-((distance / BACKGROUND_PX) ** 2) / 2)
    kernel = hat / hat.sum() - around / around.sum()
    # Symmetric, so its transform is real
    return np.asarray(scipy.fft.rfft2(kernel.astype(np.float32)).real)


def filter_subframes(subframes: npt.NDArray[np.float32], radii_px: tuple[float, ...]) -> Match:
    """Search subframes with top-hats of several radii, less the mean of a ring around each.

    A response is divided by the noise it would have in white noise, which near the edges is that of the
    part of the filter on the subframe (so that cut blobs lose no more than their pixels), and then by the
    robust spread of all responses of this radius on this subframe, so that stripes do not count as signal.

    Parameters
    ----------
    subframes : ndarray, shape (n, ny, nx), float32
        Standardised: background zero.
    radii_px : tuple of float
        Of the top-hats (px).

    Returns
    -------
    Match

    Notes
    -----
    Source: ours; the radii are those of real blobs.
    """
    parts = in_batches(lambda batch: _match(batch, radii_px), subframes)
    return Match(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def in_batches(
    work: Callable[[npt.NDArray[np.float32]], T], subframes: npt.NDArray[np.float32]
) -> list[T]:
    """Apply ``work`` to batches of subframes; at least once, if need be to none."""
    starts = range(0, max(1, len(subframes)), BATCH)
    return list(
        threads.pool("baselines", THREADS).map(
            lambda start: work(subframes[start : start + BATCH]), starts
        )
    )


def _match(subframes: npt.NDArray[np.float32], radii_px: tuple[float, ...]) -> Match:
    n, ny, nx = subframes.shape
    best = Match(np.full(n, -np.inf), np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros(n))
    size = scipy.fft.next_fast_len(max(ny, nx) + _reach(max(radii_px)), real=True)
    spectrum = scipy.fft.rfft2(subframes, (size, size))
    for radius in radii_px:
        filter_spectrum, gain = _filter(radius, ny, nx, size)
        response = _filtered(spectrum, filter_spectrum, (size, size), (ny, nx))
        response *= gain
        flat = response.reshape(n, ny * nx)
        peak = flat.argmax(axis=1)
        snr = flat[np.arange(n), peak] / _spread(response)
        better = snr > best.snr
        for column, value in zip(best, (snr, peak % nx, peak // nx, radius), strict=True):
            np.copyto(column, value, where=better, casting="same_kind")
    return best


def _spread(responses: FloatArray) -> FloatArray:
    """Return the robust standard deviation of each map, at least 1e-6."""
    part = responses[:, ::SPREAD_STEP, ::SPREAD_STEP]
    values = part.reshape(len(part), part.shape[1] * part.shape[2])
    middle = row_median(values)[:, None]
    return np.asarray(np.maximum(1.4826 * row_median(np.abs(values - middle)), 1e-6))


def row_median(values: FloatArray) -> FloatArray:
    """Return the median of each row, none of them NaN, in half the time of ``np.median``."""
    ordered = np.sort(values, axis=1)
    n = values.shape[1]
    return np.asarray((ordered[:, (n - 1) // 2] + ordered[:, n // 2]) / 2)


def _reach(radius: float) -> int:
    return int(np.ceil(2 * radius + GAP_PX)) + 1


@lru_cache(maxsize=32)
def _filter(radius: float, ny: int, nx: int, size: int) -> tuple[FloatArray, FloatArray]:
    """Return the transform of a top-hat less its ring, and one over its noise at each pixel."""
    distance = np.hypot(*(np.minimum(axis, size - axis) for axis in np.ogrid[:size, :size]))
    hat = np.clip(radius + 0.5 - distance, 0, 1)
    ring = (distance > radius + GAP_PX) & (distance <= 2 * radius + GAP_PX)
    kernel = hat / hat.sum() - ring / ring.sum()
    inside = np.zeros((size, size))
    inside[:ny, :nx] = 1
    variance = scipy.fft.irfft2(scipy.fft.rfft2(inside) * scipy.fft.rfft2(kernel**2), (size, size))[
        :ny, :nx
    ]
    return scipy.fft.rfft2(kernel.astype(np.float32)), (1 / np.sqrt(variance)).astype(np.float32)
