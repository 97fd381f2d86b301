"""What the network is measured against: a matched filter, and a probe that must find nothing.

Plain arrays in, plain arrays out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import scipy.fft
from scipy.optimize import minimize
from scipy.special import expit

from blobpipe.core import statistics, threads

FloatArray = npt.NDArray[Any]
T = TypeVar("T")

BATCH = 4  # subframes worked on together: what is made of them stays in the cache
THREADS = 2  # batches at a time; their number changes no bit
GAP_PX = 2.0  # between the top-hat and its background ring, so that a soft edge does not count as background
SPREAD_STEP = 4  # every 4th pixel, per axis, is enough for the spread of a map that varies over 3 px and more
FOLDS = 5
RIDGE = 1e-3  # keeps the weights finite where one number separates the classes


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


def matched_filter(subframes: npt.NDArray[np.float32], radii_px: tuple[float, ...]) -> Match:
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
    parts = _in_batches(lambda batch: _match(batch, radii_px), subframes)
    return Match(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _in_batches(work: Callable[[npt.NDArray[np.float32]], T], subframes: npt.NDArray[np.float32]) -> list[T]:
    """What ``work`` gives for each batch; there is at least one, if need be an empty one."""
    starts = range(0, max(1, len(subframes)), BATCH)
    return list(threads.pool("baselines", THREADS).map(lambda start: work(subframes[start : start + BATCH]), starts))


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
    """Robust standard deviation of each map; tiny instead of zero."""
    part = responses[:, ::SPREAD_STEP, ::SPREAD_STEP]
    values = part.reshape(len(part), part.shape[1] * part.shape[2])
    middle = _median(values)[:, None]
    return np.asarray(np.maximum(1.4826 * _median(np.abs(values - middle)), 1e-6))


def _median(values: FloatArray) -> FloatArray:
    """Of each row, none of them NaN. NumPy's own takes twice as long: it sorts less, but not with vectors."""
    ordered, n = np.sort(values, axis=1), values.shape[1]
    return np.asarray((ordered[:, (n - 1) // 2] + ordered[:, n // 2]) / 2)


def _reach(radius: float) -> int:
    return int(np.ceil(2 * radius + GAP_PX)) + 1


@lru_cache(maxsize=32)
def _filter(radius: float, ny: int, nx: int, size: int) -> tuple[FloatArray, FloatArray]:
    """Transform of a top-hat less its ring, and one over the noise it gives at each pixel."""
    distance = np.hypot(*(np.minimum(axis, size - axis) for axis in np.ogrid[:size, :size]))
    hat = np.clip(radius + 0.5 - distance, 0, 1)
    ring = (distance > radius + GAP_PX) & (distance <= 2 * radius + GAP_PX)
    kernel = hat / hat.sum() - ring / ring.sum()
    inside = np.zeros((size, size))
    inside[:ny, :nx] = 1
    variance = scipy.fft.irfft2(scipy.fft.rfft2(inside) * scipy.fft.rfft2(kernel**2), (size, size))[:ny, :nx]
    return scipy.fft.rfft2(kernel.astype(np.float32)), (1 / np.sqrt(variance)).astype(np.float32)


def leakage_features(subframes: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Numbers that a subframe's label must not be readable from: mean, spread, and the level of its borders.

    Medians, relative to the subframe's own, stand for the borders, because two true signs of blobs must not count as
    leaks: a blob that the edge cuts lifts a few border pixels; and where the mean is zero, the light of blobs
    lowers the background all over the subframe (by some 0.01 sigma, in real images no less).

    Parameters
    ----------
    subframes : ndarray, shape (n, ny, nx), float32

    Returns
    -------
    ndarray, shape (n, 6), float64
        Mean, standard deviation, and the medians of the lowest and the highest row, the first and the last column.

    Notes
    -----
    Source: ours. In the original code mean and spread alone separated the classes.
    """
    return np.concatenate(_in_batches(_leakage_features, subframes))


def _leakage_features(subframes: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    pixels = subframes.reshape(len(subframes), subframes.shape[1] * subframes.shape[2])
    borders = [subframes[:, 0], subframes[:, -1], subframes[:, :, 0], subframes[:, :, -1]]
    levels = np.stack([_median(border) for border in borders], axis=1).astype(np.float64)
    mean, spread = pixels.mean(axis=1, dtype=np.float64), pixels.std(axis=1, dtype=np.float64)
    return np.column_stack([mean, spread, levels - _median(pixels[:, ::7])[:, None]])


def leakage_auc(features: FloatArray, labels: npt.NDArray[np.int64]) -> float:
    """How well a logistic regression on a few plain numbers tells the classes apart on data it was not fitted to.

    Parameters
    ----------
    features : ndarray, shape (n, k)
    labels : ndarray, shape (n,)
        0 or 1.

    Returns
    -------
    float
        Area under the ROC curve, the mean over five folds: 0.5 +- 0.03 for thousands of subframes if
        nothing leaks; NaN where a fold lacks a class.

    Notes
    -----
    Source: ours.
    """
    spread = features.std(axis=0)
    scaled = (features - features.mean(axis=0)) / np.where(
        spread > 1e-5, spread, np.inf
    )  # rounding errors are no feature
    fold = np.arange(len(labels)) % FOLDS
    areas = []
    for held_out in (fold == i for i in range(FOLDS)):
        weights = fit_logistic(scaled[~held_out], labels[~held_out])
        areas.append(statistics.roc_auc(labels[held_out], logistic(scaled[held_out], weights))[0])
    return float(np.mean(areas))


def fit_logistic(features: FloatArray, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Fit a logistic regression, slightly ridged.

    Parameters
    ----------
    features : ndarray, shape (n, k)
        Of order one.
    labels : ndarray, shape (n,)
        0 or 1.

    Returns
    -------
    ndarray, shape (k + 1,), float64
        Intercept and weights, for `logistic`.
    """
    design = np.column_stack([np.ones(len(features)), features])
    sign = 1.0 - 2.0 * labels

    def loss(weights: FloatArray) -> tuple[float, FloatArray]:
        margin = sign * (design @ weights)
        value = np.logaddexp(0, margin).mean() + RIDGE * weights[1:] @ weights[1:] / 2
        slope = design.T @ (sign * expit(margin)) / len(design)
        slope[1:] += RIDGE * weights[1:]
        return float(value), slope

    return np.asarray(minimize(loss, np.zeros(design.shape[1]), jac=True, method="L-BFGS-B").x)


def logistic(features: FloatArray, weights: FloatArray) -> npt.NDArray[np.float64]:
    """Probability of label 1 by a logistic regression that `fit_logistic` has fitted, shape (n,)."""
    return np.asarray(expit(weights[0] + features @ weights[1:]))
