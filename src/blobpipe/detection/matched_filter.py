"""A matched filter for blobs on subframes, which the networks are compared with."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import scipy.fft

from blobpipe.core import threads
from blobpipe.core.arrays import FloatArray

T = TypeVar("T")

BATCH = 4  # subframes worked on together: what is made of them stays in the cache
THREADS = 2  # batches at a time; their number changes no bit
# between the top-hat and its background ring, so that a soft edge does not count as background
GAP_PX = 2.0
# every 4th pixel, per axis, is enough for the spread of a map that varies over 3 px and more
SPREAD_STEP = 4


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
        response = scipy.fft.irfft2(spectrum * filter_spectrum, (size, size))[:, :ny, :nx] * gain
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
