"""What holds for detections wherever they lie."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blobpipe.core.blob_shapes import SHAPES, Shape, blob_profile
from blobpipe.detection.fit import fit_blobs
from blobpipe.detection.match import pair

places = st.floats(26.0, 38.0)
points = st.lists(st.tuples(st.floats(0, 50), st.floats(0, 50)), max_size=8)


def _measured(image: np.ndarray, x: float, y: float) -> np.ndarray:
    return (
        fit_blobs(image, np.array([x]), np.array([y]), np.ones(1), 0.001)
        .iloc[0, :10]
        .to_numpy(float)
    )


def _image(shape: Shape, x: float, y: float, radius: float, depth: float) -> np.ndarray:
    image = np.random.default_rng(1).normal(0, 1e-4, (64, 64)).astype(np.float32)
    image[12:53, 12:53] += depth * blob_profile(shape, radius, x - 32, y - 32)
    return image


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SHAPES), places, places, st.floats(2.5, 7.0), st.floats(0.03, 0.3))
def test_a_blob_is_measured_where_it_was_put(
    shape: Shape, x: float, y: float, radius: float, depth: float
) -> None:
    found = _measured(_image(shape, x, y, radius, depth), round(x) + 2, round(y) - 2)
    assert found[[0, 1]] == pytest.approx((x, y), abs=0.05)
    assert found[4] == pytest.approx(radius, rel=0.03)
    assert found[6] == pytest.approx(depth, rel=0.03)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(SHAPES), places, places, st.floats(3.0, 7.0))
def test_mirroring_mirrors_the_measurement(shape: Shape, x: float, y: float, radius: float) -> None:
    image = _image(shape, x, y, radius, 0.05)
    there = _measured(image, round(x), round(y))
    mirrored = _measured(image[:, ::-1].copy(), 63 - round(x), round(y))
    assert mirrored[0] == pytest.approx(63 - there[0], abs=0.01)
    assert mirrored[1:] == pytest.approx(there[1:], rel=0.01, abs=0.01)


@given(points, points, st.floats(0.1, 20))
def test_pairs_are_one_to_one_and_near(
    a: list[tuple[float, float]], b: list[tuple[float, float]], reach: float
) -> None:
    pairs = pair(np.array(a), np.array(b), reach)
    assert len(set(pairs[:, 0])) == len(set(pairs[:, 1])) == len(pairs)
    assert all(np.hypot(a[i][0] - b[j][0], a[i][1] - b[j][1]) <= reach for i, j in pairs)
    free_a, free_b = (set(range(len(c))) - set(pairs[:, k]) for k, c in enumerate((a, b)))
    assert not any(
        np.hypot(a[i][0] - b[j][0], a[i][1] - b[j][1]) <= reach for i in free_a for j in free_b
    )
