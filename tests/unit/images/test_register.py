"""Shifts of the mirror are measured to a tenth of a pixel, whatever else is on the image."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from blobpipe.core.blob_shapes import blob_profile
from blobpipe.images.pattern import blob_pattern
from blobpipe.images.register import (
    Shift,
    _binned,
    measure_shift,
    move_pattern,
    usual_place_is_zero,
)

NOISE = 0.0101


@pytest.mark.parametrize("catalogue", ["whole", "none"])
def test_shift_is_measured(
    shifted: dict[Shift, np.ndarray],
    reference: tuple[np.ndarray, np.ndarray],
    known: pd.DataFrame,
    catalogue: str,
) -> None:
    stack, _ = reference
    pattern = blob_pattern(stack, known if catalogue == "whole" else None)
    errors = [
        np.subtract(measure_shift(image, stack, pattern), shift) for shift, image in shifted.items()
    ]
    assert (np.sqrt(np.mean(np.square(errors), axis=0)) < 0.1).all()
    assert np.abs(errors).max() < 0.15


def test_streaks_and_flashing_pixels_do_not_pull_the_shift(
    shifted: dict[Shift, np.ndarray], reference: tuple[np.ndarray, np.ndarray]
) -> None:
    stack, pattern = reference
    rng = np.random.default_rng(2)
    for shift, image in list(shifted.items())[:3]:
        dirty = image.copy()
        for row in rng.integers(50, 950, 8):
            dirty[row : row + 3, 100:400] -= 0.05
        dirty.flat[rng.choice(dirty.size, 20_000)] += 1.0
        found = measure_shift(dirty, stack, pattern)
        assert tuple(found) == pytest.approx(tuple(shift), abs=0.15)


def test_a_burst_next_to_a_known_blob_does_not_pull_the_shift() -> None:
    """Whatever is brighter than the deepest known blob and the noise counts as this bright."""
    rng = np.random.default_rng(2)
    pattern = np.zeros((192, 192), np.float32)
    for x, y, radius in OLD:
        window = pattern[round(y) - 20 : round(y) + 21, round(x) - 20 : round(x) + 21]
        window += 0.1 * blob_profile("disc", radius, x - round(x), y - round(y), 41)
    image = move_pattern(pattern, Shift(1.3, -0.6)) + rng.normal(0, 5e-3, pattern.shape).astype(
        np.float32
    )
    x, y, radius = OLD[0]
    image[round(y) - 2 : round(y) + 3, round(x + radius) : round(x + radius) + 5] += 500
    found = measure_shift(image, pattern, pattern)
    assert tuple(found) == pytest.approx((1.3, -0.6), abs=0.1)


def test_no_pattern_gives_no_shift(reference: tuple[np.ndarray, np.ndarray]) -> None:
    stack, pattern = reference
    image = stack + NOISE * np.random.default_rng(3).standard_normal(stack.shape, np.float32)
    assert measure_shift(image, stack, np.zeros_like(pattern)) == (0.0, 0.0)
    assert measure_shift(image, stack, 1e-4 * pattern) == (0.0, 0.0)


OLD = [
    (40.2, 60.7, 6.0),
    (150.4, 40.3, 5.0),
    (100.0, 100.0, 7.0),
    (30.8, 150.1, 4.5),
    (160.6, 150.9, 6.5),
]


def test_a_shift_is_exact_without_noise() -> None:
    rng = np.random.default_rng(2)
    pattern = np.zeros((192, 192), np.float32)
    for x, y, radius in OLD:
        window = pattern[round(y) - 20 : round(y) + 21, round(x) - 20 : round(x) + 21]
        window += 0.1 * blob_profile("disc", radius, x - round(x), y - round(y), 41)
    # of the detector: does not move
    stack = pattern + rng.normal(0, 0.01, pattern.shape).astype(np.float32)
    for shift in (
        Shift(0.04, 0.0),
        Shift(0.73, -0.31),
        Shift(-2.46, 1.87),
        Shift(0.0, 3.5),
        Shift(5.2, -4.9),
    ):
        noise = rng.normal(0, 1e-4, pattern.shape).astype(np.float32)
        image = stack - pattern + move_pattern(pattern, shift) + noise
        assert tuple(measure_shift(image, stack, pattern)) == pytest.approx(tuple(shift), abs=0.03)


def test_a_shift_beyond_any_of_the_mirror_is_a_mistake(caplog: pytest.LogCaptureFixture) -> None:
    pattern = np.zeros((192, 192), np.float32)
    pattern[76:117, 76:117] = 0.1 * blob_profile("disc", 6.0)
    noise = np.random.default_rng(2).normal(0, 1e-3, pattern.shape).astype(np.float32)
    image = np.roll(pattern, 7, axis=1) + noise
    assert measure_shift(image, pattern, pattern) == (0.0, 0.0)
    assert (
        "a shift of 7.0" in caplog.text
        or "a shift of 6.9" in caplog.text
        or "a shift of 7.1" in caplog.text
    )


def test_the_usual_place_is_where_most_of_the_first_images_have_the_blobs() -> None:
    shifts = [Shift(0.5, -1.0), Shift(0.5, -1.0), Shift(3.0, 1.0), Shift(2.5, 4.0)]
    assert usual_place_is_zero(shifts, 3) == [(0.0, 0.0), (0.0, 0.0), (2.5, 2.0), (2.0, 5.0)]


def test_sums_of_two_by_two_pixels_leave_an_odd_row_and_column_out() -> None:
    assert _binned(np.arange(15.0).reshape(3, 5)).tolist() == [[12, 20]]
