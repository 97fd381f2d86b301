"""Set and read the operating point: the score from which a candidate is a detection, and the probability of each score."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import minimize

from blobpipe.core import fits_images
from blobpipe.core.arrays import FloatArray
from blobpipe.detection import held_out
from blobpipe.detection.score import N_WEIGHTS
from blobpipe.detection.search import (
    CANDIDATE,
    Answers,
    Baselines,
    ask,
    subframes_of,
)
from blobpipe.errors import ModelError, TableError
from blobpipe.images import tiles
from blobpipe.networks import dense_network, model_file
from blobpipe.params import Detect

TAIL = 25  # of the highest false peaks; their tail is exponential, as that of logits is
# of the calibration and the joint score; those of a trained model are below 10
LARGEST_WEIGHT = 1e3
POINT_BOUNDS = {
    "threshold": (CANDIDATE, 1.0),
    "slope": (-40.0, 40.0),
    "offset": (-40.0, 40.0),
    "frames": (0.0, 1e6),
}


class OperatingPoint(NamedTuple):
    """What a score is, where detections begin, and what it means.

    Attributes
    ----------
    threshold : float
        Score from which a candidate is a detection.
    slope, offset : float
        Probability of a new blob: logistic function of ``slope * logit(score) + offset``.
    frames : float
        Held-out frames, and parts of frames, on which this rests (count).
    weights : tuple of float
        Of the joint score of network and measurement, from `score.fit_weights`; none: the score is the network's.
    """

    threshold: float
    slope: float
    offset: float
    frames: float
    weights: tuple[float, ...] = ()

    def probability(self, score: FloatArray) -> FloatArray:
        """Probability that a candidate of this score is a new blob, at the prior rate of the settings."""
        return np.asarray(1 / (1 + np.exp(-self.slope * logit(score) - self.offset)))


def set_operating_point(
    candidates: pd.DataFrame,
    true: FloatArray,
    images: pd.DataFrame,
    blobs: pd.DataFrame,
    folders: tuple[str | Path, str | Path, str | Path],
    params: Detect,
) -> OperatingPoint:
    """Threshold and calibration from held-out frames without a new blob, and from the scores of superimposed blobs.

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
    """Score above which ``allowed`` of false peaks are expected, from the exponential tail of their logits.

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
    """Slope and offset of the logistic calibration, at the real rate of new blobs.

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
    others: Baselines,
    images: pd.DataFrame,
    blobs: pd.DataFrame,
    folders: tuple[str | Path, str | Path, str | Path],
    *,
    per_100_frames: float,
    threads: int,
) -> dict[str, float]:
    """Log-odds of the report's network, and S/N of the matched filter, from which they give so many false alarms.

    On the pixels on which the dense network's threshold rests (`held_out`), as far as they make whole subframes.

    Parameters
    ----------
    folders : (path, path, path)
        Of the stages difference, scale and cutout.
    per_100_frames : float
        Accepted false alarms on 100 frames (count).

    Raises
    ------
    TableError
        If nothing is held out.
    """
    difference_dir, scale_dir, cutout_dir = folders
    pattern = fits_images.read_plane(Path(difference_dir) / "reference.fits.fz", "PATTERN")
    origins = tiles.tile(pattern)[1]
    names = images["frame"].to_numpy()
    rows = pd.DataFrame(
        {"frame": names.repeat(len(origins)), "x_px": np.tile(origins[:, 2], len(names))}
    )
    aside = held_out.find_held_out(rows, images, blobs, cutout_dir, pattern.shape[1]).rows.reshape(
        len(names), len(origins)
    )
    if not aside.any():
        raise TableError(
            f"{cutout_dir}: no subframe is held out, expected some without a new blob; add images"
        )

    def one(i: np.int64) -> Answers:
        subframes, origins = subframes_of(
            fits_images.read_frame(fits_images.find_image(scale_dir, names[i])).data
        )
        return ask(others, subframes[aside[i]], origins[aside[i]])

    with ThreadPoolExecutor(threads) as pool:
        answers = list(pool.map(one, np.flatnonzero(aside.any(axis=1))))
    allowed = per_100_frames / 100 * aside.sum() / len(origins)
    return {
        "report": tail_level(
            logit(np.concatenate([answer.probability for answer in answers])), allowed
        ),
        "matched_filter": tail_level(
            np.concatenate([answer.match.snr for answer in answers]), allowed
        ),
    }


def tail_level(values: FloatArray, allowed: float) -> float:
    """Value that ``allowed`` of the subframes without a blob exceed: interpolated, or beyond the highest, extrapolated.

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


def load_operating_point(path: str | Path) -> tuple[dense_network.DenseNetwork, OperatingPoint]:
    """A dense model of this stage, ready for use (`dense_network.folded`).

    Raises
    ------
    ModelError
        As `model_file.load_dense`; or if its operating point is none.
    """
    network, about = model_file.load_dense(path)
    found = about.get(
        "operating_point", {"threshold": 0.5, "slope": 1.0, "offset": 0.0, "frames": 0.0}
    )
    if fault := _fault(found):
        raise ModelError(
            f"{path}: the operating point is none ({fault}); run the stage detect again or restore it"
        )
    point = OperatingPoint(**{**found, "weights": tuple(found.get("weights", ()))})
    return dense_network.folded(network), point


def _fault(point: Any) -> str:
    """What keeps the metadata of a model from being an operating point; empty if nothing does."""
    needed = [name for name in OperatingPoint._fields if name not in OperatingPoint._field_defaults]
    if not isinstance(point, dict) or not set(needed) <= set(point) <= set(OperatingPoint._fields):
        return f"found {str(point)[:60]}, expected {', '.join(OperatingPoint._fields)}"
    weights = point.get("weights", [])
    if not isinstance(weights, list) or len(weights) not in (0, N_WEIGHTS):
        return f"weights: found {str(weights)[:60]}, expected a list of {N_WEIGHTS} numbers, or an empty one"
    numbers = {
        **{name: point[name] for name in needed},
        **{f"weights[{i}]": w for i, w in enumerate(weights)},
    }
    for name, value in numbers.items():
        low, high = POINT_BOUNDS.get(name, (-LARGEST_WEIGHT, LARGEST_WEIGHT))
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
        ):
            return f"{name}: found {str(value)[:40]!r}, expected a number from {low:g} to {high:g}"
    return ""


def logit(score: FloatArray) -> FloatArray:
    """Log-odds; scores of 0 and 1 are taken for the nearest numbers that have some."""
    inside = np.clip(np.asarray(score, dtype=np.float64), 1e-7, 1 - 1e-7)
    return np.asarray(np.log(inside / (1 - inside)))
