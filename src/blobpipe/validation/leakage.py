"""Is the label of a subframe readable from numbers that know nothing of blobs? It must not be."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from blobpipe.core import metrics
from blobpipe.core.arrays import FloatArray
from blobpipe.detection import matched_filter
from blobpipe.detection.score import fit_logistic, logistic

FOLDS = 5


def leakage_features(subframes: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return numbers from which a subframe's label must not be readable.

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
    In the original code mean and spread alone separated the classes.
    """
    return np.concatenate(matched_filter.in_batches(_leakage_features, subframes))


def _leakage_features(subframes: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    pixels = subframes.reshape(len(subframes), subframes.shape[1] * subframes.shape[2])
    borders = [subframes[:, 0], subframes[:, -1], subframes[:, :, 0], subframes[:, :, -1]]
    levels = np.stack([matched_filter.row_median(border) for border in borders], axis=1).astype(
        np.float64
    )
    mean = pixels.mean(axis=1, dtype=np.float64)
    spread = pixels.std(axis=1, dtype=np.float64)
    return np.column_stack(
        [mean, spread, levels - matched_filter.row_median(pixels[:, ::7])[:, None]]
    )


def leakage_auc(features: FloatArray, labels: npt.NDArray[np.int64]) -> float:
    """Measure how well plain numbers tell the classes apart, by cross-validated regression.

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
    """
    spread = features.std(axis=0)
    scaled = (features - features.mean(axis=0)) / np.where(
        spread > 1e-5, spread, np.inf
    )  # rounding errors are no feature
    fold = np.arange(len(labels)) % FOLDS
    areas = []
    for held_out in (fold == i for i in range(FOLDS)):
        weights = fit_logistic(scaled[~held_out], labels[~held_out])
        areas.append(metrics.roc_auc(labels[held_out], logistic(scaled[held_out], weights))[0])
    return float(np.mean(areas))
