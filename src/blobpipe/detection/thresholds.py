"""Set the operating point at a budget of false alarms, from pixels that are held out."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import minimize

from blobpipe.core import fits_images
from blobpipe.core.arrays import FloatArray
from blobpipe.detection import held_out
from blobpipe.detection.detectors import MatchedFilter, ReportDetector
from blobpipe.detection.operating_point import CANDIDATE, OperatingPoint, logit
from blobpipe.errors import TableError
from blobpipe.images import tiles
from blobpipe.params import Detect

# Highest false peaks from which the tail of their scores is extrapolated; it is exponential, as that
# of log-odds is.
TAIL = 25


def set_operating_point(
    candidates: pd.DataFrame,
    true: FloatArray,
    images: pd.DataFrame,
    blobs: pd.DataFrame,
    folders: tuple[str | Path, str | Path, str | Path],
    params: Detect,
) -> OperatingPoint:
    """Set threshold and calibration from held-out images and from injected blobs.

    Raises
    ------
    TableError
        If nothing is held out.
    """
    width = fits_images.read_plane(Path(folders[0]) / "reference.fits.fz", "PATTERN").shape[1]
    aside = held_out.find_held_out(candidates, images, blobs, folders[2], width)
    n_frames = aside.frames
    if n_frames == 0:
        raise TableError(
            f"{folders[2]}: no image is held out, expected some without a new blob; add images"
        )
    false = candidates[aside.rows & (candidates["status"] == "new")]["score"].to_numpy()
    allowed = params.false_alarms_per_100_frames / 100 * n_frames
    slope, offset = calibrate(true, false, n_frames, params.new_blobs_per_100_frames / 100)
    return OperatingPoint(
        round(tail_threshold(false, allowed), 5), round(slope, 5), round(offset, 5), n_frames
    )


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
    """
    true = true[true > 0]
    x = logit(np.concatenate([true, false]))
    blob = np.repeat([1.0, 0.0], [len(true), len(false)])
    weight = np.repeat([per_frame / max(len(true), 1), 1 / n_frames], [len(true), len(false)])

    def loss(at: FloatArray) -> float:
        z = at[0] * x + at[1]
        # a little is held back, so that classes that do not overlap leave the slope finite
        return float(weight @ (np.logaddexp(0, z) - blob * z) / weight.sum() + 1e-4 * at[0] ** 2)

    slope, offset = minimize(loss, np.array([1.0, 0.0]), method="BFGS").x
    return float(slope), float(offset)


def baseline_thresholds(
    report: ReportDetector,
    matched_filter: MatchedFilter,
    images: pd.DataFrame,
    blobs: pd.DataFrame,
    folders: tuple[str | Path, str | Path, str | Path],
    *,
    per_100_frames: float,
    threads: int,
) -> dict[str, float]:
    """Set the thresholds of the two baselines at the same budget of false alarms.

    They rest on the pixels on which the dense network's threshold rests (`held_out`), as far as
    these make whole subframes.

    Parameters
    ----------
    report, matched_filter
        Their own thresholds are not used.
    folders : (path, path, path)
        Of the stages difference, scale and cutout.
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
    difference_dir, scale_dir, cutout_dir = folders
    pattern = fits_images.read_plane(Path(difference_dir) / "reference.fits.fz", "PATTERN")
    origins = tiles.origins(pattern.shape)
    names = images["frame"].to_numpy()
    places = pd.DataFrame(
        {"frame": names.repeat(len(origins)), "x_px": np.tile(origins[:, 2], len(names))}
    )
    found = held_out.find_held_out(places, images, blobs, cutout_dir, pattern.shape[1])
    aside = found.rows.reshape(len(names), len(origins))
    if not aside.any():
        raise TableError(
            f"{cutout_dir}: no subframe is held out, expected some without a new blob; add images"
        )

    def scores(i: np.int64) -> list[FloatArray]:
        path = fits_images.find_image(scale_dir, names[i])
        scaled = fits_images.read_frame(path).data
        return [each.answer(scaled, aside[i]) for each in (report, matched_filter)]

    with ThreadPoolExecutor(threads) as pool:
        answers = list(pool.map(scores, np.flatnonzero(aside.any(axis=1))))
    allowed = per_100_frames / 100 * aside.sum() / len(origins)
    return {
        name: tail_level(np.concatenate([answer[k] for answer in answers]), allowed)
        for k, name in enumerate(("report", "matched_filter"))
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
