"""Score a candidate: how much more likely it is a blob than noise, and than structure.

Two logistic regressions answer one question each, at even odds. One tells blobs from noise, by the S/N and
by what the network says: it learns from images of nothing but noise and blobs, white as all noise is when it
is searched. One tells blobs from streaks, clusters of bad pixels and the like, by all that is measured;
to that, the size adds what the law of sizes says. A blob must be neither:

    score = 1 / (1 + exp(-noise) + exp(-(structure + size)))

with all three as log-odds. Source: ours.
"""

from __future__ import annotations

import math
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import expit

from blobpipe.core.arrays import FloatArray

if TYPE_CHECKING:
    import pandas as pd

RIDGE = 3e-4  # penalty that keeps the weights finite where one number separates the classes


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

    # Sums of `einsum`, unlike those of the matrix product, do not depend on the number of cores
    def loss(weights: FloatArray) -> tuple[float, FloatArray]:
        margin = sign * np.einsum("nk,k->n", design, weights)
        value = np.logaddexp(0, margin).mean() + RIDGE * weights[1:] @ weights[1:] / 2
        slope = np.einsum("nk,n->k", design, sign * expit(margin)) / len(design)
        slope[1:] += RIDGE * weights[1:]
        return float(value), slope

    return np.asarray(minimize(loss, np.zeros(design.shape[1]), jac=True, method="L-BFGS-B").x)


def logistic(features: FloatArray, weights: FloatArray) -> npt.NDArray[np.float64]:
    """Return the probability of label 1 by a regression from `fit_logistic`, shape (n,)."""
    return np.asarray(expit(weights[0] + features @ weights[1:]))


CERTAIN = 7.0  # log-odds of 1 in 1000, beyond which only the order of scores matters
SURE = 1e-6  # scores nearer to 0 or 1 are taken for this near
# beyond these nothing more is learnt from either
SNRS = (3.0, 40.0)
MISFITS = (0.5, 5.0)
# ratios of a radius to the expected one, beyond which nothing more is learnt
RATIOS = (0.2, 3.0)
# S/N of a line beyond a candidate, below and beyond which nothing more is learnt
LINES = (1.0, 20.0)
# radii (px) below and beyond which nothing more is learnt, and the usual one
RADII_PX = (1.2, 12.0)
USUAL_RADIUS_PX = 4.0

# S/N below which noise outnumbers structure, which is learnt from what is above
LOWEST_SNR = 4.0

# S/N of the blobs from which noise is told, at most; and that beyond which a candidate is no more noise than
# at it. The logarithm of the density of noise falls with the square of the S/N.
NOISE_SNR = 12.0
NO_NOISE_SNR = 10.0
SNR_SQUARED = (30.0, 20.0)  # usual square of a faint blob's, and its scale

N_NUMBERS = 6  # network, S/N, misfit, relative and absolute size, line
ORDER = 3  # of the polynomial of these that tells structure

# one for each product of up to so many numbers, and a constant
N_STRUCTURE = math.comb(N_NUMBERS + ORDER, ORDER)
N_NOISE = 3
N_WEIGHTS = N_STRUCTURE + N_NOISE
FEWEST = 20  # blobs, as much structure and as much noise make a fit


def structure_features(found: pd.DataFrame) -> FloatArray:
    """Return what tells a blob from structure: six numbers and their products of two and of three.

    Parameters
    ----------
    found : DataFrame
        ``score`` (of the network), ``snr`` and ``misfit``; an unknown one counts as if it were
        least like a blob's. ``radius_ratio``, of the radius to the expected one; an unknown one
        counts as 1. ``radius_px``: where blobs are small, clusters of bad pixels are as large, so
        that a ratio alone says less there. ``line_snr`` of `lines.line_snr`.

    Returns
    -------
    ndarray, shape (n, N_STRUCTURE - 1), float64
        Log-odds of the score, logarithms of S/N, misfit, ratio, radius and the line's S/N; then all
        products of two and of three.
    """
    numbers = _numbers(found).T
    terms = [
        np.prod(factors, axis=0)
        for order in range(1, ORDER + 1)
        for factors in combinations_with_replacement(numbers, order)
    ]
    return np.column_stack(terms)


def noise_features(found: pd.DataFrame) -> FloatArray:
    """Return what tells a blob from noise: the log-odds of the network's score, and the square of the S/N.

    Misfit, sizes and lines are left to the other question: noise has none of its own, and what real images
    have of them would count for a blob.

    Parameters
    ----------
    found : DataFrame
        ``score`` and ``snr`` as for `structure_features`.

    Returns
    -------
    ndarray, shape (n, N_NOISE - 1), float64
    """
    usual, scale = SNR_SQUARED
    snr = np.minimum(_snr(found), NO_NOISE_SNR)
    return np.column_stack([_log_odds(found) / 4, (snr**2 - usual) / scale])


def _numbers(found: pd.DataFrame) -> FloatArray:
    misfit = np.clip(np.nan_to_num(found["misfit"].to_numpy(float), nan=MISFITS[1]), *MISFITS)
    ratio = np.clip(np.nan_to_num(found["radius_ratio"].to_numpy(float), nan=1.0), *RATIOS)
    radius = np.clip(np.nan_to_num(found["radius_px"].to_numpy(float), nan=RADII_PX[0]), *RADII_PX)
    line = np.clip(found["line_snr"].to_numpy(float), *LINES)
    return np.column_stack(
        [
            _log_odds(found) / 4,
            np.log(_snr(found)) - 2,
            3 * np.log(misfit),
            2 * np.log(ratio),
            2 * np.log(radius / USUAL_RADIUS_PX),
            np.log(line),
        ]
    )


def _log_odds(found: pd.DataFrame) -> FloatArray:
    score = np.clip(found["score"].to_numpy(float), SURE, 1 - SURE)
    return np.asarray(np.log(score / (1 - score)))


def _snr(found: pd.DataFrame) -> FloatArray:
    snr = np.nan_to_num(found["snr"].to_numpy(float), nan=SNRS[0])
    return np.asarray(np.clip(snr, *SNRS))


def fit_weights(found: pd.DataFrame, on_noise: pd.DataFrame) -> tuple[float, ...]:
    """Fit the weights of the joint score to candidates that are known to be blobs or not.

    Parameters
    ----------
    found : DataFrame
        Blobs and structure, as for `structure_features`, with ``is_blob`` (0 or 1).
    on_noise : DataFrame
        Blobs and noise, candidates on images of nothing else, as for `noise_features`, with ``is_blob``.

    Returns
    -------
    tuple of float
        `N_WEIGHTS` weights for `score_candidates`; none, if there are too few blobs, or too little
        structure or noise.
    """
    clear = found[found["snr"] >= LOWEST_SNR]
    faint = on_noise[(on_noise["snr"] < NOISE_SNR) | (on_noise["is_blob"] == 0)]
    labels = [part["is_blob"].to_numpy(bool) for part in (clear, faint)]
    if min(count for is_blob in labels for count in (is_blob.sum(), (~is_blob).sum())) < FEWEST:
        return ()
    structure = _fit_at_even_odds(structure_features(clear), labels[0])
    of_noise = _fit_at_even_odds(noise_features(faint), labels[1])
    return tuple(float(weight) for weight in np.round([*structure, *of_noise], 5))


def _fit_at_even_odds(features: FloatArray, is_blob: npt.NDArray[np.bool_]) -> FloatArray:
    """Fit a regression, and take from its intercept how many of the examples are blobs."""
    weights = fit_logistic(features, is_blob.astype(np.int64))
    weights[0] -= math.log(np.count_nonzero(is_blob) / np.count_nonzero(~is_blob))
    return weights


def score_candidates(found: pd.DataFrame, weights: tuple[float, ...]) -> pd.DataFrame:
    """Replace the network's score by the joint score, 0 to 1; without weights, keep it.

    Parameters
    ----------
    found : DataFrame
        As for `structure_features`, with ``size_log_odds`` of `size_law.SizeLaw.log_odds`.
    weights : tuple of float
        From `fit_weights`.
    """
    if not weights:
        return found.assign(score=found["score"])
    at, by = np.split(np.array(weights), [N_STRUCTURE])
    structure = at[0] + structure_features(found) @ at[1:] + found["size_log_odds"].to_numpy(float)
    noise = by[0] + noise_features(found) @ by[1:]
    log_odds = -np.logaddexp(-noise, -structure)
    return found.assign(score=expit(_unsaturated(log_odds)))


def _unsaturated(log_odds: FloatArray) -> FloatArray:
    """Return log-odds that grow ever more slowly beyond `CERTAIN`, so that no score is rounded to 0 or 1."""
    beyond = np.maximum(np.abs(log_odds) - CERTAIN, 0.0)
    return np.asarray(
        np.sign(log_odds) * (np.minimum(np.abs(log_odds), CERTAIN) + np.log1p(beyond))
    )
