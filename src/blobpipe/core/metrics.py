"""Statistics of a classifier on plain arrays: rates, curves, areas, intervals.

Most functions take ``weights`` of shape (b, n), which count each subframe in each of ``b`` bootstrap resamplings, and
return arrays of shape (b,). So one function serves for a number and for its bootstrap interval.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from blobpipe.core.arrays import FloatArray, Int64Array, Mask

Measures = dict[str, FloatArray]

# Bins of the reliability table
N_BINS = 10

# Resamplings computed at a time, which bounds the memory
BLOCK = 64

# Ends of a 95 % interval (percentiles), and the same as a quantile of the normal distribution
INTERVAL_PERCENT = (2.5, 97.5)
INTERVAL_SIGMA = 1.959964

# False-positive rate at which the true-positive rate is reported
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
    """Return a part over the whole; NaN, without a warning, where the whole is zero."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.divide(part, whole))


def cumulative(
    labels: Int64Array, scores: FloatArray, weights: FloatArray | None = None
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the weight of true and of false positives at every threshold, from the highest down.

    Parameters
    ----------
    labels : ndarray, shape (n,)
        0 or 1.
    scores : ndarray, shape (n,)
        A subframe is positive if its score is at least the threshold.
    weights : ndarray, shape (b, n), optional
        Count of each subframe in each of ``b`` resamplings; one if not given.

    Returns
    -------
    true, false : ndarray, shape (b, k + 1)
        The first column is 0: a threshold above every score.
    thresholds : ndarray, shape (k + 1,)
        A number just above the highest score, then the distinct scores, falling.
    """
    if weights is None:
        weights = np.ones((1, len(labels)))
    order = np.argsort(-scores, kind="stable")
    falling = scores[order]
    labels = labels[order]
    weights = weights[:, order]

    # Equal scores share a threshold: only the last of each run is one
    is_last = np.append(np.diff(falling) != 0, True)
    last = np.flatnonzero(is_last) if len(scores) else np.zeros(0, np.int64)

    start = np.zeros((len(weights), 1))
    n_true = np.cumsum(weights * labels, axis=1)
    n_false = np.cumsum(weights * (1 - labels), axis=1)
    true = np.hstack([start, n_true[:, last]])
    false = np.hstack([start, n_false[:, last]])
    above_all = np.nextafter(scores.max(initial=0.0), np.inf)
    thresholds = np.append(above_all, falling[last])
    return true, false, thresholds


def roc_curve(labels: Int64Array, scores: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return false-positive rates, true-positive rates and thresholds, from (0, 0) to (1, 1).

    The rate of a class without members is NaN. Arrays are those of `cumulative`, of shape (k + 1,).
    """
    true, false, thresholds = cumulative(labels, scores)
    fpr = share(false[0], false[0, -1])
    tpr = share(true[0], true[0, -1])
    return fpr, tpr, thresholds


def precision_recall_curve(
    labels: Int64Array, scores: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return recall, precision and thresholds, from the highest score down, each of shape (k + 1,).

    Precision is 1 where nothing is positive.
    """
    true, false, thresholds = cumulative(labels, scores)
    recall, precision = _recall_precision(true, false)
    return recall[0], precision[0], thresholds


def roc_auc(
    labels: Int64Array, scores: FloatArray, weights: FloatArray | None = None
) -> FloatArray:
    """Return the area under the ROC curve for each resampling, shape (b,).

    It is the probability that a subframe with blobs has a higher score than one without.
    """
    true, false, _ = cumulative(labels, scores, weights)
    return _roc_area(true, false)


def average_precision(
    labels: Int64Array, scores: FloatArray, weights: FloatArray | None = None
) -> FloatArray:
    """Return precision averaged over recall, without interpolation, for each resampling, shape (b,)."""
    true, false, _ = cumulative(labels, scores, weights)
    return _average_precision(true, false)


def tpr_at_fpr(true: FloatArray, false: FloatArray, fpr: float) -> FloatArray:
    """Return the highest true-positive rate with a false-positive rate of at most ``fpr``, shape (b,).

    Parameters
    ----------
    true, false : ndarray, shape (b, k + 1)
        From `cumulative`.
    """
    allowed = false <= fpr * false[:, -1:]
    highest = np.where(allowed, true, 0).max(axis=1)
    return share(highest, true[:, -1])


def threshold_at_fpr(labels: Int64Array, scores: FloatArray, fpr: float) -> float:
    """Return the lowest threshold with a false-positive rate of at most ``fpr``, that of `tpr_at_fpr`."""
    _, false, thresholds = cumulative(labels, scores)
    allowed = false[0] <= fpr * false[0, -1]
    return float(thresholds[allowed].min())


def brier(labels: Int64Array, probability: FloatArray, weights: FloatArray) -> FloatArray:
    """Return the Brier score, the mean squared difference of probability and label, shape (b,).

    It is 0 for a perfect classifier, and 0.25 for one that always says one half.
    """
    squares = (probability - labels) ** 2
    return share(weights @ squares, weights.sum(axis=1))


def _roc_area(true: FloatArray, false: FloatArray) -> FloatArray:
    """Return the area under the ROC curve by the trapezoidal rule, from `cumulative`."""
    widths = np.diff(false, axis=1)
    trapezia = widths * (true[:, 1:] + true[:, :-1]) / 2
    return share(np.sum(trapezia, axis=1), true[:, -1] * false[:, -1])


def _recall_precision(true: FloatArray, false: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return recall and precision, both of shape (b, k + 1), from `cumulative`."""
    positive = true + false
    precision = np.divide(true, positive, out=np.ones_like(true), where=positive > 0)
    recall = share(true, true[:, -1:])
    return recall, precision


def _average_precision(true: FloatArray, false: FloatArray) -> FloatArray:
    """Return precision averaged over recall, shape (b,), from `cumulative`."""
    recall, precision = _recall_precision(true, false)
    steps = np.diff(recall, axis=1)
    return np.asarray(np.sum(steps * precision[:, 1:], axis=1))


def measures(
    labels: Int64Array,
    probability: FloatArray,
    hit: Mask,
    weights: FloatArray,
    *,
    threshold: float,
) -> Measures:
    """Compute every number that ``metrics.json`` gives for a classifier, for each resampling.

    Parameters
    ----------
    labels, probability : ndarray, shape (n,)
        1 with blobs, 0 without; and the probability of 1.
    hit : ndarray of bool, shape (n,)
        True where the saliency map peaks on a true blob; only true positives count.
    weights : ndarray, shape (b, n)
        Count of each subframe in each resampling.
    threshold : float
        Probability from which a subframe is positive.

    Returns
    -------
    dict of ndarray, shape (b,)
        By `KEYS`; NaN where a class is empty.
    """
    true, false, _ = cumulative(labels, probability, weights)
    positive = probability >= threshold
    true_positive = positive & (labels == 1)
    false_positive = positive & (labels == 0)

    # The number of either class in each resampling is that at the lowest threshold
    n_true_positive = weights @ true_positive
    tpr = share(n_true_positive, true[:, -1])
    fpr = share(weights @ false_positive, false[:, -1])
    values = {
        "tpr": tpr,
        "tnr": 1 - fpr,
        "fpr": fpr,
        "fnr": 1 - tpr,
        "roc_auc": _roc_area(true, false),
        "average_precision": _average_precision(true, false),
        "tpr_at_fpr_0.01": tpr_at_fpr(true, false, FPR_POINT),
        "brier": brier(labels, probability, weights),
        "pointing_hit_rate": share(weights @ (hit & true_positive), n_true_positive),
    }
    assert tuple(values) == KEYS
    return values


def bootstrap(
    measure: Callable[[FloatArray], Measures], n: int, n_bootstrap: int, rng: np.random.Generator
) -> dict[str, tuple[float, float]]:
    """Compute 95 % bootstrap intervals of numbers over ``n`` subframes, drawn with replacement.

    Subframes of one image share its background, so these intervals are a little too narrow for new images.

    Parameters
    ----------
    measure : callable
        Function of weights, shape (b, n), that returns arrays of shape (b,), such as `measures`.
    n : int
        Number of subframes.
    n_bootstrap : int
        Number of resamplings.
    rng : Generator

    Returns
    -------
    dict of (low, high)
        NaN where no resampling has a value.
    """
    # A resampling is a multinomial draw of the count of each subframe
    evenly = np.full(n, 1 / n)
    blocks = []
    for done in range(0, n_bootstrap, BLOCK):
        n_resamplings = min(BLOCK, n_bootstrap - done)
        weights = rng.multinomial(n, evenly, size=n_resamplings)
        blocks.append(measure(weights.astype(np.float64)))

    intervals = {}
    for key in blocks[0]:
        values = np.concatenate([block[key] for block in blocks])
        values = values[np.isfinite(values)]
        if len(values):
            low, high = np.percentile(values, INTERVAL_PERCENT)
            intervals[key] = float(low), float(high)
        else:
            intervals[key] = float("nan"), float("nan")
    return intervals


def wilson_interval(successes: FloatArray, trials: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the 95 % interval of a share (0 to 1); (0, 1) without trials.

    It is valid for few trials, and for shares of 0 and 1.

    Parameters
    ----------
    successes, trials : ndarray
        Counts, of the same shape.

    Notes
    -----
    Source: Wilson 1927.
    """
    z = INTERVAL_SIGMA
    n = np.maximum(np.asarray(trials, float), 1e-9)
    observed = np.asarray(successes, float) / n
    middle = (observed + z**2 / (2 * n)) / (1 + z**2 / n)
    variance = observed * (1 - observed) / n + z**2 / (4 * n**2)
    half = z / (1 + z**2 / n) * np.sqrt(variance)
    return np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)


def share_by_bin(values: FloatArray, success: Mask, edges: tuple[float, ...]) -> pd.DataFrame:
    """Compute the share of successes in bins of some value, with its Wilson interval.

    Parameters
    ----------
    values : ndarray, shape (n,)
        Values outside all bins do not count.
    success : ndarray, shape (n,), bool
    edges : tuple of float
        Edges of the bins, rising; a bin includes its lower edge.

    Returns
    -------
    DataFrame
        low, high (of the bin; an open end is empty), n, successes, share (empty without members), share_low, share_high.
    """
    n_bins = len(edges) - 1
    index = np.searchsorted(edges, values, side="right") - 1
    inside = (index >= 0) & (index < n_bins)
    n = np.bincount(index[inside], minlength=n_bins)
    successes = np.bincount(index[inside & success], minlength=n_bins)
    share_low, share_high = wilson_interval(successes, n)
    # Open ends are infinite
    ends = np.where(np.isfinite(edges), edges, np.nan)
    return pd.DataFrame(
        {
            "low": ends[:-1],
            "high": ends[1:],
            "n": n,
            "successes": successes,
            "share": share(successes, n),
            "share_low": share_low,
            "share_high": share_high,
        }
    )


def reliability(labels: Int64Array, probability: FloatArray, n_bins: int = N_BINS) -> pd.DataFrame:
    """Compare the predicted probability of a blob with the share of subframes that have one, by bins.

    Parameters
    ----------
    labels : ndarray, shape (n,)
        1 with blobs, 0 without.
    probability : ndarray, shape (n,)
        Predicted probability of 1.
    n_bins : int
        Number of bins of equal width.

    Returns
    -------
    DataFrame
        probability_low, probability_high, n, mean_probability, blob_frac, blob_frac_low, blob_frac_high
        (Wilson); empty cells for a bin without subframes.
    """
    edges = tuple(np.linspace(0, 1, n_bins + 1))
    # A probability of 1 belongs to the last bin
    inside = np.minimum(probability, np.nextafter(1.0, 0.0))
    table = share_by_bin(inside, labels == 1, edges)
    bins = np.searchsorted(edges, inside, side="right") - 1
    bins = np.minimum(bins, n_bins - 1)
    total = np.bincount(bins, probability, n_bins)
    mean = share(total, table["n"].to_numpy())
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
