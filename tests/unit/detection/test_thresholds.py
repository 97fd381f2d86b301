"""Calibration from held-out scores: what few scores or none give."""

from __future__ import annotations

import numpy as np
import pytest

from blobpipe.detection.operating_point import OperatingPoint
from blobpipe.detection.thresholds import calibrate

NONE = np.zeros(0)


@pytest.mark.parametrize("true", [NONE, np.zeros(3)])
def test_without_scores_the_score_is_the_probability(true: np.ndarray) -> None:
    """Scores of 0 are of blobs that nothing was found of: they count as none."""
    slope, offset = calibrate(true, NONE, 10, 0.1)
    point = OperatingPoint(0.5, slope, offset, 10)
    scores = np.array([0.1, 0.5, 0.9])
    assert point.probability(scores) == pytest.approx(scores)


def test_blobs_above_false_peaks_give_a_rising_probability() -> None:
    scores = np.random.default_rng(1)
    true, false = scores.uniform(0.4, 1, 200), scores.uniform(0, 0.6, 200)
    slope, offset = calibrate(true, false, 100, 0.5)
    point = OperatingPoint(0.5, slope, offset, 100)
    low, high = point.probability(np.array([0.2, 0.9]))
    assert low < 0.1
    assert high > 0.9
