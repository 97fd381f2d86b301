"""Pixels packed for the browser: what comes back, and what is beyond the range."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from blobpipe.monitor import thumbnails

IMAGES = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    elements=st.floats(width=32, allow_nan=True, allow_infinity=True),
)


@given(IMAGES, st.floats(1e-9, 1e6))
def test_packed_pixels_come_back_within_half_a_step(image: np.ndarray, noise: float) -> None:
    step = thumbnails.step_of(noise)
    found, found_step = thumbnails.unpack(thumbnails.pack(image, step))
    assert found_step == step
    assert found.shape == image.shape
    is_finite = np.isfinite(image)
    assert np.array_equal(np.isfinite(found), is_finite)
    # beyond the range of 16 bits, the end of it
    limits = (
        step * (thumbnails.MISSING + 1 - thumbnails.SHIFT),
        step * (2**15 - 1 - thumbnails.SHIFT),
    )
    expected = np.clip(image[is_finite], *limits)
    assert np.abs(found[is_finite] - expected).max(initial=0.0) <= 0.51 * step + 1e-6 * step * 2**15


@given(st.floats(1e-9, 1e6))
def test_a_step_is_a_power_of_two_well_below_the_noise(noise: float) -> None:
    step = thumbnails.step_of(noise)
    assert math.frexp(step)[0] == 0.5
    assert thumbnails.STEPS <= noise / step < 2 * thumbnails.STEPS


@pytest.mark.parametrize("noise", [0.0, -1.0, math.nan])
def test_without_noise_there_is_a_step_all_the_same(noise: float) -> None:
    assert thumbnails.step_of(noise) > 0


def test_white_noise_takes_less_than_a_byte_and_an_eighth_of_a_pixel() -> None:
    noise = np.random.default_rng(1).normal(0, 0.0101, (512, 512)).astype(np.float32)
    assert len(thumbnails.pack(noise, thumbnails.step_of(0.0101))) < 1.125 * noise.size


@pytest.mark.parametrize("content", [b"", b"x", zlib.compress(b"x"), zlib.compress(b"\0" * 40)])
def test_other_bytes_are_no_pixels(content: bytes) -> None:
    with pytest.raises(ValueError, match="found other bytes, expected packed pixels"):
        thumbnails.unpack(content)
