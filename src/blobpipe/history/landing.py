"""Date a landing: the change point of a history of depths.

Models
------
A history is a depth y_j with an error e_j on each image j. Five models of it are compared:

    nothing         y = c
    landed          y = c before image k, c + d from it on, d > 0
    came_and_went   y = c + d from image k to image l, c before and after
    drift           y = c + s t
    flicker         y = c, on a share of the images spread much more widely than the errors

Each measurement is normal about its model; one in fifty is `WILD_SIGMA` times as uncertain, since a streak
may cross the place. c, d and s are fitted by iterated weights. The lowest Bayesian information criterion
(-2 ln L + p ln n for p parameters) decides.

Landing date
------------
A blob lands at any time alike, so that image k is the first to show it with the prior probability of the
gap before it. The posterior probability of k is the prior times the likelihood, integrated over c and d, to the
power `TRUST`: place and shape are not quite those of the blob, and noise is not quite white. Within a gap each
time is equally probable; the interval of 90 % leaves 5 % on either side.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from scipy.ndimage import median_filter
from scipy.special import log_ndtr, logsumexp

from blobpipe.core.arrays import FloatArray

Verdict = Literal["nothing", "landed", "came_and_went", "drift", "flicker"]

# Share of measurements that something else disturbs, and how many times as uncertain they are
WILD_SHARE = 0.02
WILD_SIGMA = 10.0

# Rounds of iterated weights; three change nothing more
ROUNDS = 4

# Errors may be too small by up to this factor: noise is not quite white. What varies more flickers.
LARGEST_FACTOR = 1.5

# Shares and widths (in errors) of flicker that are tried
FLICKER_SHARES = (0.05, 0.1, 0.2, 0.4, 0.8)
FLICKER_SIGMA = (3.0, 6.0, 12.0, 25.0, 50.0)

# Fewest images that make a history, and fewest since a landing that make it persistent
FEWEST = 4
PERSISTENT = 2

# Probability that the interval of a landing holds it
COVERAGE = 0.9

# Power of the likelihood; with 1, intervals held 0.85 and 0.88 of the landings of two simulated campaigns
TRUST = 0.8


class Landing(NamedTuple):
    """What a history of depths says.

    Attributes
    ----------
    verdict : {"nothing", "landed", "came_and_went", "drift", "flicker"}
        The model that explains it best.
    first : int
        Index of the image that most probably is the first to show the blob, if it has landed.
    after_mjd, before_mjd : float
        Interval of 90 % of its landing (MJD).
    depth_frac, depth_err_frac : float
        Height of the step (fraction of the light).
    level_frac : float
        Depth before it.
    n_since : int
        Number of images since.
    log_odds : float
        By how much "landed" is better than the best other model, in natural logarithms.
    """

    verdict: Verdict
    first: int
    after_mjd: float
    before_mjd: float
    depth_frac: float
    depth_err_frac: float
    level_frac: float
    n_since: int
    log_odds: float

    @property
    def snr(self) -> float:
        """Return the height of the step over its error."""
        return self.depth_frac / self.depth_err_frac

    @property
    def is_persistent(self) -> bool:
        """Return whether a blob has landed and stayed, as no fluctuation does."""
        return self.verdict == "landed" and self.n_since >= PERSISTENT


def date_landing(mjd: FloatArray, depth_frac: FloatArray, error_frac: FloatArray) -> Landing:
    """Find when a blob landed, if one did.

    Parameters
    ----------
    mjd : ndarray, shape (n,)
        Dates, increasing (MJD).
    depth_frac, error_frac : ndarray, shape (n,)
        Depth at one place on each image, and its standard error (fraction of the light).

    Returns
    -------
    Landing

    Raises
    ------
    ValueError
        If there are fewer than `FEWEST` images.

    Notes
    -----
    Source: ours.
    """
    mjd = np.asarray(mjd, np.float64)
    y = np.asarray(depth_frac, np.float64)
    n = len(y)
    if n < FEWEST:
        raise ValueError(f"found a history of {n} images, expected at least {FEWEST}")
    error = np.asarray(error_frac, np.float64) * _error_factor(y, np.asarray(error_frac))

    # All steps at once: a row for each image that may be the first
    index = np.arange(n)
    firsts = index[1:]
    since = index >= firsts[:, None]
    steps = _fit(y, error, _design(since))
    # integrated over level and height, the height positive
    height_err = np.sqrt(steps.covariance[:, 1, 1])
    log_volume = 0.5 * np.linalg.slogdet(steps.covariance)[1]
    evidence = steps.log_likelihood + log_volume + log_ndtr(steps.parameters[:, 1] / height_err)
    log_posterior = np.log(np.diff(mjd).clip(1e-9)) + TRUST * evidence
    posterior = np.exp(log_posterior - logsumexp(log_posterior))
    best = int(posterior.argmax())

    # Compare with what else it may be; parameters include the images at which something changes
    first = int(firsts[best])
    rising = steps.parameters[:, 1] > 0
    landed = float(np.where(rising, steps.log_likelihood, -np.inf).max())
    criteria: dict[Verdict, float] = {
        "nothing": _criterion(_likelihood(y, error, np.ones((1, n, 1))), 1, n),
        "landed": _criterion(landed, 3, n),
        "came_and_went": _criterion(_came_and_went(y, error), 4, n),
        "drift": _criterion(_drift(mjd, y, error), 2, n),
        "flicker": _criterion(_flicker(y, error), 3, n),
    }
    verdict = min(criteria, key=lambda name: criteria[name])
    others = min(value for name, value in criteria.items() if name != "landed")
    after, before = _interval(mjd, posterior)
    return Landing(
        verdict=verdict,
        first=first,
        after_mjd=after,
        before_mjd=before,
        depth_frac=float(steps.parameters[best, 1]),
        depth_err_frac=float(height_err[best]),
        level_frac=float(steps.parameters[best, 0]),
        n_since=n - first,
        log_odds=(others - criteria["landed"]) / 2,
    )


def date_history(mjd: FloatArray, depth_frac: FloatArray, error_frac: FloatArray) -> Landing | None:
    """Date a landing as `date_landing`, from the images on which there is a depth.

    Returns
    -------
    Landing or None
        ``first`` counts all images; None if there are too few depths.
    """
    measured = np.flatnonzero(np.isfinite(depth_frac))
    if len(measured) < FEWEST:
        return None
    found = date_landing(mjd[measured], depth_frac[measured], error_frac[measured])
    return found._replace(first=int(measured[found.first]))


class _Fit(NamedTuple):
    """Linear models fitted to one history: parameters (m, p), covariance (m, p, p), log-likelihood (m,)."""

    parameters: FloatArray
    covariance: FloatArray
    log_likelihood: FloatArray


def _design(signal: FloatArray) -> FloatArray:
    """Return the designs, shape (m, n, 2), of a level and signals of shape (m, n)."""
    return np.stack([np.ones(signal.shape), signal.astype(np.float64)], axis=-1)


def _ramp(mjd: FloatArray) -> FloatArray:
    """Return dates from -1/2 to 1/2."""
    return np.asarray((mjd - mjd.mean()) / np.ptp(mjd))


def _fit(y: FloatArray, error: FloatArray, designs: FloatArray) -> _Fit:
    """Fit linear models, shape (m, n, p), by iterated weights."""
    weight = np.broadcast_to(error**-2, designs.shape[:2])
    for _ in range(ROUNDS):
        normal = np.einsum("mni,mn,mnj->mij", designs, weight, designs)
        covariance = np.linalg.inv(normal)
        right = np.einsum("mni,mn,n->mi", designs, weight, y)
        parameters = np.einsum("mij,mj->mi", covariance, right)
        rest = (y - np.einsum("mni,mi->mn", designs, parameters)) / error
        log_likelihood, tame = _mixture(rest, WILD_SHARE, WILD_SIGMA)
        weight = (tame + (1 - tame) / WILD_SIGMA**2) / error**2
    return _Fit(parameters, covariance, (log_likelihood - np.log(error)).sum(axis=1))


def _mixture(rest: FloatArray, share: float, width: float) -> tuple[FloatArray, FloatArray]:
    """Return the log-likelihood of residuals (in errors), and the probability that each is no wild one."""
    constant = -0.5 * np.log(2 * np.pi)
    tame = np.log(1 - share) + constant - rest**2 / 2
    wild = np.log(share / width) + constant - rest**2 / (2 * width**2)
    both = np.logaddexp(tame, wild)
    return both, np.exp(tame - both)


def _likelihood(y: FloatArray, error: FloatArray, designs: FloatArray) -> float:
    """Return the highest log-likelihood of some models."""
    return float(_fit(y, error, designs).log_likelihood.max())


def _drift(mjd: FloatArray, y: FloatArray, error: FloatArray) -> float:
    """Return the log-likelihood of a depth that changes evenly; without a span of time there is no such change."""
    if not np.ptp(mjd):
        return -np.inf
    return _likelihood(y, error, _design(_ramp(mjd)[None]))


def _came_and_went(y: FloatArray, error: FloatArray) -> float:
    """Return the log-likelihood of a blob that only some successive images show."""
    n = len(y)
    weight = error**-2

    # By least squares the gain of each span follows from sums; a median of three leaves out single images
    calm = median_filter(y, 3, mode="nearest")
    rest = weight * (calm - np.average(calm, weights=weight))
    sums = np.concatenate([[0.0], np.cumsum(rest)])
    shares = np.concatenate([[0.0], np.cumsum(weight)]) / weight.sum()
    inside = sums - sums[:, None]
    share = shares - shares[:, None]
    start, end = np.ogrid[: n + 1, : n + 1]
    possible = (start > 0) & (end - start >= PERSISTENT) & (end < n) & (inside > 0)
    if not possible.any():
        return -np.inf
    gain = np.where(possible, inside**2 / np.maximum(share * (1 - share), 1e-9), -np.inf)
    first, last = np.unravel_index(gain.argmax(), gain.shape)
    index = np.arange(n)
    span = (index >= first) & (index < last)
    return _likelihood(y, error, _design(span[None]))


def _flicker(y: FloatArray, error: FloatArray) -> float:
    """Return the highest log-likelihood of a level about which some images are spread widely."""
    level = float(np.median(y))
    rest = (y - level) / error
    tried = [
        _mixture(rest, share, width)[0].sum() for share in FLICKER_SHARES for width in FLICKER_SIGMA
    ]
    return float(max(tried) - np.log(error).sum())


def _criterion(log_likelihood: float, n_parameters: int, n: int) -> float:
    """Return the Bayesian information criterion."""
    return float(-2 * log_likelihood + n_parameters * np.log(n))


def _error_factor(y: FloatArray, error: FloatArray) -> float:
    """Return by what errors are too small, from neighbours, which a step leaves alike."""
    change = np.abs(np.diff(y)) / np.hypot(error[1:], error[:-1])
    return float(np.clip(1.4826 * np.median(change), 1.0, LARGEST_FACTOR))


def _interval(mjd: FloatArray, posterior: FloatArray) -> tuple[float, float]:
    """Return the interval of a landing (MJD), from the probability of each gap between images."""
    below = np.concatenate([[0.0], np.cumsum(posterior)])
    tail = (1 - COVERAGE) / 2
    after, before = np.interp([tail, 1 - tail], below, mjd)
    return float(after), float(before)
