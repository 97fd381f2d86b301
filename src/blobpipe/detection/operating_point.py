"""The operating point of a detector: where detections begin, and the probability of each score."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from blobpipe.core.arrays import FloatArray
from blobpipe.detection.score import N_WEIGHTS

CANDIDATE = 0.05  # lowest score of a peak that is looked at; about twenty of an image are above

# Bounds of what a model file may say; the numbers of a trained model lie far inside them.
LARGEST_WEIGHT = 1e3
POINT_BOUNDS = {
    "threshold": (CANDIDATE, 1.0),
    "slope": (-40.0, 40.0),
    "offset": (-40.0, 40.0),
    "frames": (0.0, 1e6),
}


class OperatingPoint(NamedTuple):
    """Where detections begin, and what a score means.

    Attributes
    ----------
    threshold : float
        Score from which a candidate is a detection.
    slope, offset : float
        Probability of a new blob: logistic function of ``slope * logit(score) + offset``.
    frames : float
        Held-out frames, and parts of frames, on which this rests (count).
    weights : tuple of float
        Of the joint score, from `score.fit_weights`; none: the score is the network's.
    """

    threshold: float
    slope: float
    offset: float
    frames: float
    weights: tuple[float, ...] = ()

    def probability(self, score: FloatArray) -> FloatArray:
        """Turn scores into probabilities of a new blob, at the prior rate of the settings."""
        return np.asarray(1 / (1 + np.exp(-self.slope * logit(score) - self.offset)))


def logit(score: FloatArray) -> FloatArray:
    """Return the log-odds of scores, which are kept 1e-7 away from 0 and 1."""
    inside = np.clip(np.asarray(score, dtype=np.float64), 1e-7, 1 - 1e-7)
    return np.asarray(np.log(inside / (1 - inside)))


# What a dense network without an operating point gets: its score is the network's own.
UNSET = OperatingPoint(threshold=0.5, slope=1.0, offset=0.0, frames=0.0)


def read_operating_point(metadata: dict[str, Any]) -> OperatingPoint:
    """Read the operating point from a model's metadata; `UNSET` if it holds none.

    Raises
    ------
    ValueError
        If it is none; the message says what is wrong.
    """
    if "operating_point" not in metadata:
        return UNSET
    found = metadata["operating_point"]
    if fault := _fault(found):
        raise ValueError(fault)
    return OperatingPoint(**{**found, "weights": tuple(found.get("weights", ()))})


def _fault(point: Any) -> str:
    """Return what is wrong with the operating point of a model; empty if nothing is."""
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
