"""Set the operating point at a budget of false alarms, from pixels that are held out."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import minimize

from blobpipe.core import fits_images, tables
from blobpipe.core.arrays import FloatArray
from blobpipe.detection.detectors import MatchedFilter, ReportDetector
from blobpipe.detection.operating_point import CANDIDATE, OperatingPoint, logit
from blobpipe.errors import TableError
from blobpipe.images import tiles
from blobpipe.params import Detect
from blobpipe.simulation import held_out

# Highest false peaks from which the tail of their scores is extrapolated; it is exponential, as that
# of log-odds is.
TAIL = 25

# Least part of the budget that a threshold is set for (fraction), where too few images promise more
LEAST_OF_BUDGET = 0.25


# Name of the tables of batches of `score_held_out`, and such a table without rows
BASELINES = "baselines"
NO_SCORES = pd.DataFrame(
    {
        "frame": pd.Series([], dtype=str),
        "subframe": pd.Series([], dtype=np.int64),
        "report": pd.Series([], dtype=np.float64),
        "matched_filter": pd.Series([], dtype=np.float64),
    }
)


def set_operating_point(
    candidates: pd.DataFrame,
    true: FloatArray,
    images: pd.DataFrame,
    blobs: pd.DataFrame,
    folders: tuple[str | Path, str | Path, str | Path],
    params: Detect,
    simulated: FloatArray | None = None,
    n_simulated: int = 0,
) -> OperatingPoint:
    """Set threshold and calibration from held-out images and from injected blobs.

    Parameters
    ----------
    candidates : DataFrame
        Of all images, with their joint score.
    true : ndarray
        Scores of injected blobs.
    folders : (path, path, path)
        Of the stages difference, scale and cutout.
    simulated : ndarray, optional
        Scores of the false peaks on simulated images without a new blob, which count as held out, too.
    n_simulated : int, optional
        Number of these images.

    Raises
    ------
    TableError
        If nothing is held out.
    """
    width = fits_images.read_plane(Path(folders[0]) / "reference.fits.fz", "PATTERN").shape[1]
    aside = held_out.find_held_out(candidates, images, blobs, folders[2], width)
    n_frames = aside.frames + n_simulated
    if n_frames == 0:
        raise TableError(
            f"{folders[2]}: no image is held out, expected some without a new blob; add images"
        )
    is_false = aside.rows & (candidates["status"] == "new")
    false = candidates[is_false]["score"].to_numpy()
    if simulated is not None:
        false = np.concatenate([false, simulated])
    expected = params.false_alarms_per_100_frames / 100 * n_frames
    allowed = allowed_alarms(expected, params.confidence)
    slope, offset = calibrate(true, false, n_frames, params.new_blobs_per_100_frames / 100)
    return OperatingPoint(
        round(tail_threshold(false, allowed), 5), round(slope, 5), round(offset, 5), n_frames
    )


def allowed_alarms(budget: float, confidence: float) -> float:
    """Return how many false alarms may be counted so that the expected number is within the budget.

    Parameters
    ----------
    budget : float
        Largest expected number (count).
    confidence : float
        One-sided (0 to 1).

    Returns
    -------
    float
        Count, from `LEAST_OF_BUDGET` times the budget to the budget. The lower end is reached where
        so few images cannot tell: for a confidence of 0.9 below a budget of about 3.

    Notes
    -----
    Source: the exact upper limit of a Poisson mean (Garwood 1936) after k events, the gamma quantile of
    shape k + 1, here for any real k.
    """
    from scipy.optimize import brentq
    from scipy.stats import gamma

    least = LEAST_OF_BUDGET * budget

    def beyond(k: float) -> float:
        return float(gamma.ppf(confidence, k + 1)) - budget

    if beyond(least) >= 0:
        return least
    if beyond(budget) <= 0:
        return budget
    return float(brentq(beyond, least, budget))


def tail_threshold(scores: FloatArray, allowed: float) -> float:
    """Return the score above which ``allowed`` false peaks are expected.

    Parameters
    ----------
    scores : ndarray
        Of the false peaks of all held-out frames.
    allowed : float
        How many may lie above (count); may be a fraction.
    """
    highest = np.sort(logit(scores))[::-1][:TAIL]
    if len(highest) <= max(allowed, 1):
        return CANDIDATE
    start = highest[-1]
    excess = highest[:-1] - highest[-1]
    level = start + excess.mean() * math.log(len(highest) / allowed)
    return float(max(CANDIDATE, 1 / (1 + math.exp(-level))))


def calibrate(
    true: FloatArray, false: FloatArray, n_frames: float, per_frame: float
) -> tuple[float, float]:
    """Fit slope and offset of the logistic calibration, at the real rate of new blobs.

    Parameters
    ----------
    true, false : ndarray
        Scores of blobs, and of false peaks on ``n_frames`` frames.
    per_frame : float
        New blobs to a frame.

    Returns
    -------
    (float, float)
        Slope and offset of the log-odds; (1, 0), which takes the score for the probability, if no score
        counts.
    """
    true = true[true > 0]
    x = logit(np.concatenate([true, false]))
    blob = np.repeat([1.0, 0.0], [len(true), len(false)])
    weight = np.repeat([per_frame / max(len(true), 1), 1 / n_frames], [len(true), len(false)])

    if not weight.any():
        return 1.0, 0.0

    def loss(at: FloatArray) -> float:
        z = at[0] * x + at[1]
        # a little is held back, so that classes that do not overlap leave the slope finite
        cost = (weight * (np.logaddexp(0, z) - blob * z)).sum() / weight.sum()
        return float(cost + 1e-4 * at[0] ** 2)

    slope, offset = minimize(loss, np.array([1.0, 0.0]), method="BFGS").x
    return float(slope), float(offset)


def score_held_out(
    report: ReportDetector,
    matched_filter: MatchedFilter,
    images: pd.DataFrame,
    blobs: pd.DataFrame,
    folders: tuple[str | Path, str | Path, str | Path],
    *,
    threads: int,
) -> pd.DataFrame:
    """Ask both baselines about the pixels on which the dense network's threshold rests (`held_out`).

    Only about those that make whole subframes.

    Parameters
    ----------
    report, matched_filter
        Their own thresholds are not used.
    images : DataFrame
        Usable rows of `tables.image_table`.
    folders : (path, path, path)
        Of the stages difference, scale and cutout.

    Returns
    -------
    DataFrame
        A row per held-out subframe: ``frame``, ``subframe`` (index in `tiles.origins`), ``report`` (log-odds),
        ``matched_filter`` (S/N).
    """
    difference_dir, scale_dir, cutout_dir = folders
    pattern = fits_images.read_plane(Path(difference_dir) / "reference.fits.fz", "PATTERN")
    origins = tiles.origins(pattern.shape)
    names = images["frame"].to_numpy()
    places = pd.DataFrame(
        {"frame": names.repeat(len(origins)), "x_px": np.tile(origins[:, 2], len(names))}
    )
    found = held_out.find_held_out(places, images, blobs, cutout_dir, pattern.shape[1])
    aside = found.rows.reshape(len(names), len(origins))

    def scores(i: np.int64) -> pd.DataFrame:
        path = fits_images.find_image(scale_dir, names[i])
        scaled = fits_images.read_pixels(path)
        return pd.DataFrame(
            {
                "frame": names[i],
                "subframe": np.flatnonzero(aside[i]),
                "report": report.answer(scaled, aside[i]),
                "matched_filter": matched_filter.answer(scaled, aside[i]),
            }
        )

    with ThreadPoolExecutor(threads) as pool:
        done = list(pool.map(scores, np.flatnonzero(aside.any(axis=1))))
    return pd.concat([NO_SCORES, *done], ignore_index=True)


def read_scores(folder: str | Path, scale_dir: str | Path) -> pd.DataFrame:
    """Read what `score_held_out` has found in each batch of images."""
    paths = tables.batch_tables(folder, BASELINES, scale_dir)
    return pd.concat([tables.read_exact(path, NO_SCORES) for path in paths], ignore_index=True)


def baseline_thresholds(
    scores: pd.DataFrame, n_subframes: int, *, per_100_frames: float
) -> dict[str, float]:
    """Set the thresholds of the two baselines at the same budget of false alarms.

    Parameters
    ----------
    scores : DataFrame
        From `score_held_out`.
    n_subframes : int
        Subframes of an image (count).
    per_100_frames : float
        Accepted false alarms on 100 frames (count).

    Returns
    -------
    dict of float
        ``report`` (log-odds) and ``matched_filter`` (S/N).

    Raises
    ------
    TableError
        If nothing is held out.
    """
    if scores.empty:
        raise TableError(
            "images: no subframe is held out, expected some without a new blob; add images"
        )
    allowed = per_100_frames / 100 * len(scores) / n_subframes
    return {
        name: tail_level(scores[name].to_numpy(), allowed) for name in ("report", "matched_filter")
    }


def tail_level(values: FloatArray, allowed: float) -> float:
    """Return the value that ``allowed`` of the subframes without a blob exceed.

    Parameters
    ----------
    values : ndarray, shape (n,)
        With an exponential tail, as log-odds have.
    allowed : float
        Count; may be a fraction.
    """
    highest = np.sort(values)[::-1][:TAIL]
    if allowed >= 1:
        return float(np.interp(allowed, np.arange(1, len(highest) + 1), highest))
    return float(highest[-1] + (highest[:-1] - highest[-1]).mean() * np.log(len(highest) / allowed))
