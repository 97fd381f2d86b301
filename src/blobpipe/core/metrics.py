"""Statistics of a classifier's answers, on plain arrays: rates, curves, areas, intervals.

Most functions take ``weights`` of shape (b, n), how often each subframe counts in each of ``b`` resamplings, and
give arrays of shape (b,): one code for a number and for its bootstrap interval.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pandas as pd

from blobpipe.core.arrays import FloatArray

Measures = dict[str, FloatArray]

N_BINS = 10  # of the reliability table
BLOCK = 64  # resamplings at a time: bounds the memory
INTERVAL_PERCENT = (2.5, 97.5)
FPR_POINT = 0.01
KEYS = (
    "tpr",
    "tnr",
    "fpr",
    "fnr",
    "roc_auc",
    "average_precision",
    "tpr_at_fpr_0.01",
    "brier",
    "pointing_hit_rate",
)


def share(part: FloatArray, whole: FloatArray) -> FloatArray:
    """A part over the whole; NaN, silently, where the whole is empty."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.divide(part, whole))


def cumulative(
    labels: npt.NDArray[np.int64], scores: FloatArray, weights: FloatArray | None = None
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Weight of true and of false positives at every threshold, from the highest down.

    Parameters
    ----------
    labels : ndarray, shape (n,)
        0 or 1.
    scores : ndarray, shape (n,)
        A subframe is positive if its score is at least the threshold.
    weights : ndarray, shape (b, n), optional
        How often each subframe counts, for each of ``b`` resamplings; once each if not given.

    Returns
    -------
    true, false : ndarray, shape (b, k + 1)
        The first column is 0: a threshold above every score.
    thresholds : ndarray, shape (k + 1,)
        The distinct scores, falling, after a number just above the highest.
    """
    weights = np.ones((1, len(labels))) if weights is None else weights
    order = np.argsort(-scores, kind="stable")
    last = (
        np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
        if len(scores)
        else np.zeros(0, np.int64)
    )
    ordered = weights[:, order]
    start = np.zeros((len(weights), 1))
    true = np.hstack([start, np.cumsum(ordered * labels[order], axis=1)[:, last]])
    false = np.hstack([start, np.cumsum(ordered * (1 - labels[order]), axis=1)[:, last]])
    above = np.nextafter(scores.max(initial=0.0), np.inf)
    return true, false, np.append(above, scores[order][last])


def roc_curve(
    labels: npt.NDArray[np.int64], scores: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """False-positive rate, true-positive rate and threshold, from (0, 0) to (1, 1); NaN for a class without members."""
    true, false, thresholds = cumulative(labels, scores)
    return share(false[0], false[0, -1]), share(true[0], true[0, -1]), thresholds


def precision_recall_curve(
    labels: npt.NDArray[np.int64], scores: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Recall, precision and threshold, from the highest score down; precision is 1 where nothing is positive."""
    true, false, thresholds = cumulative(labels, scores)
    recall, precision = _recall_precision(true, false)
    return recall[0], precision[0], thresholds


def roc_auc(
    labels: npt.NDArray[np.int64], scores: FloatArray, weights: FloatArray | None = None
) -> FloatArray:
    """Area under the ROC curve for each resampling, shape (b,): the chance that a blob outscores a background."""
    true, false, _ = cumulative(labels, scores, weights)
    return _area(true, false)


def average_precision(
    labels: npt.NDArray[np.int64], scores: FloatArray, weights: FloatArray | None = None
) -> FloatArray:
    """Precision averaged over recall, without interpolation, for each resampling, shape (b,)."""
    true, false, _ = cumulative(labels, scores, weights)
    return _average_precision(true, false)


def tpr_at_fpr(true: FloatArray, false: FloatArray, fpr: float) -> FloatArray:
    """Highest true-positive rate at a threshold whose false-positive rate is at most ``fpr``, shape (b,).

    Parameters
    ----------
    true, false : ndarray, shape (b, k + 1)
        From `cumulative`.
    """
    allowed = false <= fpr * false[:, -1:]
    return share(np.where(allowed, true, 0).max(axis=1), true[:, -1])


def threshold_at_fpr(labels: npt.NDArray[np.int64], scores: FloatArray, fpr: float) -> float:
    """Lowest threshold whose false-positive rate is at most ``fpr``: that of `tpr_at_fpr`."""
    _, false, thresholds = cumulative(labels, scores)
    return float(thresholds[false[0] <= fpr * false[0, -1]].min())


def brier(
    labels: npt.NDArray[np.int64], probability: FloatArray, weights: FloatArray
) -> FloatArray:
    """Mean squared difference of probability and label, shape (b,): 0 is perfect, 0.25 is always saying one half."""
    return share(weights @ (probability - labels) ** 2, weights.sum(axis=1))


def _area(true: FloatArray, false: FloatArray) -> FloatArray:
    area = np.sum(np.diff(false, axis=1) * (true[:, 1:] + true[:, :-1]) / 2, axis=1)
    return share(area, true[:, -1] * false[:, -1])


def _recall_precision(true: FloatArray, false: FloatArray) -> tuple[FloatArray, FloatArray]:
    total = true + false
    precision = np.divide(true, total, out=np.ones_like(true), where=total > 0)
    return share(true, true[:, -1:]), precision


def _average_precision(true: FloatArray, false: FloatArray) -> FloatArray:
    recall, precision = _recall_precision(true, false)
    return np.asarray(np.sum(np.diff(recall, axis=1) * precision[:, 1:], axis=1))


def measures(
    labels: npt.NDArray[np.int64],
    probability: FloatArray,
    hit: npt.NDArray[np.bool_],
    weights: FloatArray,
    *,
    threshold: float,
) -> Measures:
    """Every number that ``metrics.json`` gives for a classifier, for each resampling.

    Parameters
    ----------
    labels, probability : ndarray, shape (n,)
    hit : ndarray of bool, shape (n,)
        Whether the classifier points at a true blob; only true positives count.
    weights : ndarray, shape (b, n)
        How often each subframe counts in each resampling.
    threshold : float
        Probability from which a subframe is positive.

    Returns
    -------
    dict of ndarray, shape (b,)
        NaN where a class is empty.
    """
    positive = probability >= threshold
    true, false, _ = cumulative(labels, probability, weights)
    tpr = share(weights @ (positive & (labels == 1)), true[:, -1])
    fpr = share(weights @ (positive & (labels == 0)), false[:, -1])
    pointing = share(
        weights @ (hit & positive & (labels == 1)), weights @ (positive & (labels == 1))
    )
    values = (tpr, 1 - fpr, fpr, 1 - tpr, _area(true, false), _average_precision(true, false))
    others = (tpr_at_fpr(true, false, FPR_POINT), brier(labels, probability, weights), pointing)
    return dict(zip(KEYS, (*values, *others), strict=True))


def bootstrap(
    measure: Callable[[FloatArray], Measures], n: int, n_bootstrap: int, rng: np.random.Generator
) -> dict[str, tuple[float, float]]:
    """95 % intervals of numbers over ``n`` subframes, by drawing the subframes with replacement.

    Subframes of one image share its background, so these intervals are a little too narrow for new images.

    Parameters
    ----------
    measure : callable
        From weights, shape (b, n), to arrays of shape (b,), such as `measures`.
    n_bootstrap : int
        Number of resamplings.

    Returns
    -------
    dict of (low, high)
        NaN where no resampling has a value.
    """
    blocks = [
        measure(
            rng.multinomial(n, np.full(n, 1 / n), size=min(BLOCK, n_bootstrap - done)).astype(
                np.float64
            )
        )
        for done in range(0, n_bootstrap, BLOCK)
    ]
    values = {key: np.concatenate([block[key] for block in blocks]) for key in blocks[0]}
    return {key: _percentiles(value[np.isfinite(value)]) for key, value in values.items()}


def _percentiles(values: FloatArray) -> tuple[float, float]:
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.percentile(values, INTERVAL_PERCENT)
    return float(low), float(high)


def wilson_interval(successes: FloatArray, trials: FloatArray) -> tuple[FloatArray, FloatArray]:
    """95 % interval of a share, right for few trials and for shares of 0 and 1; (0, 1) without trials.

    Notes
    -----
    Source: Wilson 1927.
    """
    z = 1.959964
    n = np.maximum(np.asarray(trials, float), 1e-9)
    share = np.asarray(successes, float) / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)


def share_by_bin(
    values: FloatArray, success: npt.NDArray[np.bool_], edges: tuple[float, ...]
) -> pd.DataFrame:
    """Share of successes in bins of some value, with its Wilson interval; values outside all bins do not count.

    Returns
    -------
    DataFrame
        low, high (of the bin; an open end is empty), n, successes, share (empty without members), share_low, share_high.
    """
    index = np.searchsorted(edges, values, side="right") - 1
    inside = (index >= 0) & (index < len(edges) - 1)
    n, successes = (
        np.bincount(index[kept], minlength=len(edges) - 1) for kept in (inside, inside & success)
    )
    low, high = wilson_interval(successes, n)
    ends = [np.where(np.isfinite(end), end, np.nan) for end in (edges[:-1], edges[1:])]
    columns = (*ends, n, successes, share(successes, n), low, high)
    names = ("low", "high", "n", "successes", "share", "share_low", "share_high")
    return pd.DataFrame(dict(zip(names, columns, strict=True)))


def reliability(
    labels: npt.NDArray[np.int64], probability: FloatArray, n_bins: int = N_BINS
) -> pd.DataFrame:
    """How often a blob is there where the classifier says a probability.

    Returns
    -------
    DataFrame
        probability_low, probability_high, n, mean_probability, blob_frac, blob_frac_low, blob_frac_high
        (Wilson); empty cells for a bin without subframes.
    """
    edges = tuple(np.linspace(0, 1, n_bins + 1))
    inside = np.minimum(probability, np.nextafter(1.0, 0.0))
    table = share_by_bin(inside, labels == 1, edges)
    bins = np.minimum(np.searchsorted(edges, inside, side="right") - 1, n_bins - 1)
    mean = share(np.bincount(bins, probability, n_bins), table["n"].to_numpy())
    return pd.DataFrame(
        {
            "probability_low": table["low"],
            "probability_high": table["high"],
            "n": table["n"],
            "mean_probability": mean,
            "blob_frac": table["share"],
            "blob_frac_low": table["share_low"],
            "blob_frac_high": table["share_high"],
        }
    )
