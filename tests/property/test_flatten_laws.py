"""What holds for any exposure, whatever its unit, flags and level."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from blobpipe.core.detector import DEFAULT
from blobpipe.images.flatten import light_loss

SHAPE = (330, 312)  # five boxes, the last one smaller, and four
FEW = settings(max_examples=12)
# the highest bit is the sign of FITS's 16-bit integers
FLAGS = [1 << bit for bit in range(15)] + [-32768]


def exposure(seed: int, level: float = 1000.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    slope = np.linspace(0.9, 1.1, SHAPE[1])
    return (level * slope * rng.normal(1, 0.01, SHAPE)).astype(np.float32)


def flags(seed: int, flag: int) -> np.ndarray:
    return np.where(np.random.default_rng(seed).random(SHAPE) < 0.03, flag, 0).astype(np.int32)


@FEW
@given(st.integers(0, 99), st.floats(1e-3, 1e4))
def test_gain_changes_nothing(seed: int, gain: float) -> None:
    """But for rounding to single precision: up to 3.2e-6 of the light, at seed 24 and a gain of 8282."""
    science = exposure(seed)
    dq = flags(seed, 4)
    np.testing.assert_allclose(
        light_loss(science * np.float32(gain), dq), light_loss(science, dq), atol=6e-6
    )


@FEW
@given(st.floats(2.0**-10, 2.0**20, width=32), st.integers(0, 99))
def test_a_constant_exposure_lacks_nothing(level: float, seed: int) -> None:
    dq = flags(seed, 16)
    loss = light_loss(np.full(SHAPE, level, np.float32), dq)
    np.testing.assert_allclose(loss[dq == 0], 0, atol=1e-6)


@FEW
@given(st.integers(0, 99), st.sampled_from(FLAGS))
def test_flagged_pixels_have_no_value_but_those_of_blobs(seed: int, flag: int) -> None:
    dq = flags(seed, flag)
    kept = flag in (64, 512, 2048)
    np.testing.assert_array_equal(np.isnan(light_loss(exposure(seed), dq)), (dq != 0) & (not kept))
    assert bool(flag & DEFAULT.exposure.bad_dq) != kept


@FEW
@given(
    st.integers(0, 99), st.floats(-(2.0**99), 2.0**99, width=32) | st.just(np.nan) | st.just(np.inf)
)
def test_what_a_bad_pixel_says_does_not_matter(seed: int, value: float) -> None:
    science = exposure(seed)
    dq = flags(seed, 32)
    spoilt = np.where(dq != 0, np.float32(value), science)
    np.testing.assert_array_equal(light_loss(spoilt, dq), light_loss(science, dq))
