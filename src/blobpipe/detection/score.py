"""Combine the network's log-odds with S/N, misfit, size and surroundings of the fit, by logistic regression."""

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

    def loss(weights: FloatArray) -> tuple[float, FloatArray]:
        margin = sign * (design @ weights)
        value = np.logaddexp(0, margin).mean() + RIDGE * weights[1:] @ weights[1:] / 2
        slope = design.T @ (sign * expit(margin)) / len(design)
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
N_MEASURED = 6  # network, S/N, misfit, relative and absolute size, line
ORDER = 3  # of the polynomial
# of the joint score: one for each product of up to three measured numbers, and a constant
N_WEIGHTS = math.comb(N_MEASURED + ORDER, ORDER)
FEWEST = 20  # blobs, and as many other candidates, make a fit
# S/N below which a candidate counts as noise or bad pixels, whatever the network says, and how fast the
# log-odds fall with the logarithm of what is missing. Clusters of a few bad pixels excite the network,
# and the fit leaves them out as outliers: an S/N of 3 to 4.5 remains. Found on simulated images.
LOWEST_SNR = 5.0
STEEPNESS = 100.0


def features(found: pd.DataFrame) -> FloatArray:
    """Return what a candidate's score is made of: six numbers and their products of up to three.

    Parameters
    ----------
    found : DataFrame
        ``score`` (of the network), ``snr`` and ``misfit``; an unknown one counts as if it were
        least like a blob's. ``radius_ratio``, of the radius to the expected one; an unknown one
        counts as 1. ``radius_px``: where blobs are small, clusters of bad pixels are as large, so
        that a ratio alone says less there. ``line_snr`` of `lines.line_snr`.

    Returns
    -------
    ndarray, shape (n, N_WEIGHTS - 1), float64
        Log-odds of the score, logarithms of S/N, misfit, ratio, radius and the line's S/N; then all
        products of two and of three.
    """
    score = np.clip(found["score"].to_numpy(float), SURE, 1 - SURE)
    snr = np.clip(np.nan_to_num(found["snr"].to_numpy(float), nan=SNRS[0]), *SNRS)
    misfit = np.clip(np.nan_to_num(found["misfit"].to_numpy(float), nan=MISFITS[1]), *MISFITS)
    ratio = np.clip(np.nan_to_num(found["radius_ratio"].to_numpy(float), nan=1.0), *RATIOS)
    radius = np.clip(np.nan_to_num(found["radius_px"].to_numpy(float), nan=RADII_PX[0]), *RADII_PX)
    line = np.clip(found["line_snr"].to_numpy(float), *LINES)
    measured = [
        np.log(score / (1 - score)) / 4,
        np.log(snr) - 2,
        3 * np.log(misfit),
        2 * np.log(ratio),
        2 * np.log(radius / USUAL_RADIUS_PX),
        np.log(line),
    ]
    terms = [
        np.prod(factors, axis=0)
        for order in range(1, ORDER + 1)
        for factors in combinations_with_replacement(measured, order)
    ]
    return np.column_stack(terms)


def fit_weights(found: pd.DataFrame, is_blob: npt.NDArray[np.bool_]) -> tuple[float, ...]:
    """Fit the weights of the joint score to candidates that are known to be blobs or not.

    Parameters
    ----------
    found : DataFrame
        As for `features`.
    is_blob : ndarray, shape (n,), bool

    Returns
    -------
    tuple of float
        `N_WEIGHTS` weights of a logistic regression, for `score`; none, if there are too few candidates of either kind.
    """
    if min(np.count_nonzero(is_blob), np.count_nonzero(~is_blob)) < FEWEST:
        return ()
    weights = fit_logistic(features(found), is_blob.astype(np.int64))
    return tuple(float(weight) for weight in np.round(weights, 5))


def score_candidates(found: pd.DataFrame, weights: tuple[float, ...]) -> pd.DataFrame:
    """Replace the network's score by the joint score, 0 to 1; without weights, keep it.

    Parameters
    ----------
    found : DataFrame
        As for `features`.
    weights : tuple of float
        From `fit_weights`.
    """
    if not weights:
        return found.assign(score=found["score"])
    log_odds = weights[0] + features(found) @ np.array(weights[1:])
    snr = np.clip(np.nan_to_num(found["snr"].to_numpy(float), nan=SNRS[0]), *SNRS)
    log_odds -= STEEPNESS * np.maximum(0.0, np.log(LOWEST_SNR / snr))
    return found.assign(score=expit(_unsaturated(log_odds)))


def _unsaturated(log_odds: FloatArray) -> FloatArray:
    """Return log-odds that grow ever more slowly beyond `CERTAIN`, so that no score is rounded to 0 or 1."""
    beyond = np.maximum(np.abs(log_odds) - CERTAIN, 0.0)
    return np.asarray(
        np.sign(log_odds) * (np.minimum(np.abs(log_odds), CERTAIN) + np.log1p(beyond))
    )
