"""Laws of clip and scale."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from blobpipe.images.clip import clip_image, zscale_limits
from blobpipe.images.scale import scale_image
from blobpipe.params import Clip, Scale


def image(seed: int, outliers: float, offset: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    data = rng.normal(offset, 0.01, (260, 270)).astype(np.float32)
    data[rng.random(data.shape) < outliers] += np.float32(0.3)
    return data


images = st.builds(
    image, st.integers(0, 50), st.sampled_from([0.0, 0.001, 0.05, 0.3]), st.floats(-0.05, 0.05)
)


@settings(max_examples=25)
@given(images, st.floats(0.1, 3))
def test_a_clipped_image_lies_within_its_limits_and_clipping_there_again_changes_nothing(
    data: np.ndarray, factor: float
) -> None:
    zscale = np.array(zscale_limits(data))
    # limits around zero: a factor below 1 would turn them away from the image
    assume(zscale[0] <= 0 <= zscale[1])
    clipped, done = clip_image(data, Clip(factor=factor, border_px=0))
    again = np.clip(clipped, np.float32(done.low_frac), np.float32(done.high_frac))
    np.testing.assert_array_equal(again, clipped)
    inside = (data > done.low_frac) & (data < done.high_frac)
    np.testing.assert_array_equal(clipped[inside], data[inside])


@settings(max_examples=25)
@given(st.integers(0, 50), st.sampled_from([0.02, 0.05, 0.1]), st.sampled_from([1.0, 1.5]))
def test_clipping_is_idempotent(seed: int, outliers: float, factor: float) -> None:
    """At the whole of zscale's limits; the report's half of them is taken once, of the unclipped image."""
    clipped, _ = clip_image(image(seed, outliers), Clip(factor=factor))
    again, _ = clip_image(clipped, Clip(factor=factor))
    # the line that zscale puts through its sample moves a little
    np.testing.assert_allclose(again, clipped, rtol=0.1)


@settings(max_examples=25)
@given(images)
def test_gaps_do_not_shift_the_limits(data: np.ndarray) -> None:
    holes = data.copy()
    holes[np.random.default_rng(0).random(data.shape) < 0.05] = np.nan
    clipped, done = clip_image(holes, Clip())
    assert np.isfinite(clipped).all()
    _, whole = clip_image(data, Clip())
    spread = whole.high_frac - whole.low_frac
    assert abs(done.low_frac - whole.low_frac) < 0.25 * spread
    assert abs(done.high_frac - whole.high_frac) < 0.25 * spread


@settings(max_examples=40)
@given(images, st.integers(0, 6), st.floats(1.5, 6))
def test_a_scaled_image_has_mean_0_and_standard_deviation_1(
    data: np.ndarray, iterations: int, clip: float
) -> None:
    """Of the pixels that sigma clipping keeps: scaling again finds nothing left to do."""
    params = Scale(iterations=iterations, clip_sigma=clip)
    scaled, _ = scale_image(data, params)
    again, done = scale_image(scaled, params)
    assert abs(done.mean_frac) < 2e-3
    assert abs(done.sigma_frac - 1) < 2e-3
    np.testing.assert_allclose(again, scaled, atol=5e-3, rtol=5e-3)


@settings(max_examples=25)
@given(images, st.floats(0.1, 10), st.floats(-1, 1))
def test_scaling_undoes_any_gain_and_offset(data: np.ndarray, gain: float, offset: float) -> None:
    one, _ = scale_image(data, Scale())
    other, _ = scale_image(data * np.float32(gain) + np.float32(offset), Scale())
    np.testing.assert_allclose(one, other, atol=0.01, rtol=0.01)
