"""What holds for a blob of any shape, size and place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blobpipe.core.blob_shapes import SHAPES, Shape, blob_profile, matched_snr

shapes = st.sampled_from(SHAPES)
radii = st.floats(2.5, 10.0)
offsets = st.floats(-0.5, 0.5)


@given(shapes, radii, offsets, offsets)
def test_peak_is_one(shape: Shape, radius: float, x: float, y: float) -> None:
    assert 0.94 < blob_profile(shape, radius, x, y).max() < 1.003


@given(shapes, radii, offsets, offsets)
def test_light_is_only_lost(shape: Shape, radius: float, x: float, y: float) -> None:
    assert blob_profile(shape, radius, x, y).min() > -1e-4


@given(shapes, radii, offsets, offsets)
def test_centroid_is_where_it_is_asked_for(shape: Shape, radius: float, x: float, y: float) -> None:
    profile = blob_profile(shape, radius, x, y).astype(float)
    pixels = np.arange(41) - 20
    assert (profile.sum(axis=0) @ pixels) / profile.sum() == pytest.approx(x, abs=2e-3)
    assert (profile.sum(axis=1) @ pixels) / profile.sum() == pytest.approx(y, abs=2e-3)


@given(shapes, radii, offsets, offsets)
def test_lost_light_does_not_depend_on_the_place_within_a_pixel(
    shape: Shape, radius: float, x: float, y: float
) -> None:
    there = blob_profile(shape, radius, x, y)
    centred = blob_profile(shape, radius)
    assert there.sum() == pytest.approx(centred.sum(), rel=1e-3)


@given(shapes, radii)
def test_lost_light_grows_with_the_area(shape: Shape, radius: float) -> None:
    assert 0.6 < blob_profile(shape, radius).sum() / (np.pi * radius**2) < 1.15


@given(shapes, radii, offsets, offsets)
def test_mirror_images_are_blobs_too(shape: Shape, radius: float, x: float, y: float) -> None:
    profile = blob_profile(shape, radius, x, y)
    np.testing.assert_allclose(profile[:, ::-1], blob_profile(shape, radius, -x, y), atol=1e-5)
    np.testing.assert_allclose(profile.T, blob_profile(shape, radius, y, x), atol=1e-5)


@given(shapes, radii, st.floats(0.001, 0.3), st.floats(0.001, 0.1))
def test_snr_is_proportional_to_depth_over_noise(
    shape: Shape, radius: float, depth: float, noise: float
) -> None:
    profile = blob_profile(shape, radius)
    assert matched_snr(depth * profile, noise) == pytest.approx(
        depth / noise * matched_snr(profile, 1.0), rel=1e-5
    )
