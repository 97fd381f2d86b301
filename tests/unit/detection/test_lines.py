"""Lines beyond a candidate: streaks and trails are told from blobs, neighbours and noise."""

from __future__ import annotations

import numpy as np
import pytest

from blobpipe.detection.lines import line_snr

from .blobs import NOISE

CENTRE = (100.0, 110.0)


def image(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, NOISE, (220, 200)).astype(np.float32)


def measured(pixels: np.ndarray, x: float = CENTRE[0], y: float = CENTRE[1]) -> float:
    return float(line_snr(pixels, np.array([x]), np.array([y]), np.array([4.0]), NOISE)[0])


def line(angle_deg: float, low_px: float, high_px: float, depth: float = 1.0) -> np.ndarray:
    """A line of 4 px through the centre, between two distances along it, in units of the noise."""
    y, x = np.mgrid[:220, :200] - np.reshape(CENTRE[::-1], (2, 1, 1))
    angle = np.radians(angle_deg)
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    return depth * NOISE * ((np.abs(across) <= 2) & (along >= low_px) & (along <= high_px))


def test_noise_has_a_line_of_about_one() -> None:
    found = [measured(image(seed)) for seed in range(60)]
    assert 0.5 < np.median(found) < 1.5
    assert np.quantile(found, 0.95) < 3


@pytest.mark.parametrize("angle", [0, 17, 45, 90, 133])
def test_a_streak_is_a_line_whatever_its_angle(angle: float) -> None:
    assert measured(image() + line(angle, -60, 60)) > 3


@pytest.mark.parametrize("angle", [0, 60, 180, 250])
def test_a_streak_that_ends_here_is_one_too(angle: float) -> None:
    assert measured(image() + line(angle, 0, 60)) > 3


def test_a_streak_at_the_edge_of_the_detector_is_one() -> None:
    pixels = image() + line(0, -90, 120)
    assert measured(pixels, x=197.0) > 3


@pytest.mark.parametrize("depth", [2.0, 10.0])
def test_blobs_and_bad_pixels_nearby_are_no_line(depth: float) -> None:
    y, x = np.mgrid[:220, :200]
    nearby = np.hypot(x - CENTRE[0] - 18, y - CENTRE[1]) <= 5
    assert measured(image() + depth * NOISE * nearby) < 3
    pixels = image()
    pixels[110, 112] += 1000 * NOISE
    assert measured(pixels) < 3


def test_a_dark_line_is_none() -> None:
    assert measured(image() - line(0, -60, 60)) < 3


def test_pixels_without_a_value_do_not_count() -> None:
    streak = image() + line(0, -60, 60)
    holes = streak.copy()
    holes[np.random.default_rng(2).random(holes.shape) < 0.2] = np.nan
    assert measured(holes) == pytest.approx(measured(streak), rel=0.4)
    assert measured(np.full((220, 200), np.nan, np.float32)) == 0


def test_it_does_not_depend_on_the_level_and_scales_with_the_noise() -> None:
    streak = image() + line(0, -60, 60)
    assert measured(streak + 7 * NOISE) == pytest.approx(measured(streak), rel=1e-3)
    one = line_snr(streak, *(np.array([v]) for v in (*CENTRE, 4.0)), 2 * NOISE)
    assert one[0] == pytest.approx(measured(streak) / 2, rel=1e-5)


def test_no_candidate_has_no_line_and_an_unknown_place_none() -> None:
    nothing = np.zeros(0)
    assert line_snr(image(), nothing, nothing, nothing, NOISE).shape == (0,)
    assert measured(image(), x=np.nan) == 0
    assert measured(image() + line(0, -60, 60), x=-500.0) == 0
