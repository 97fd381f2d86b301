"""Shapes of blobs: as wide, as high and where they are asked to be."""

from __future__ import annotations

import numpy as np
import pytest

from blobpipe.core.blob_shapes import SHAPES, Shape, blob_profile, matched_snr
from blobpipe.core.detector import DEFAULT

SIZE = 61


def radial_distance(size: int = SIZE) -> np.ndarray:
    pixels = np.arange(size) - size // 2
    return np.hypot(pixels[:, None], pixels[None, :])


def best_top_hat(profile: np.ndarray) -> float:
    """Radius of the top-hat with the highest signal-to-noise ratio."""
    radii = np.arange(1.0, 16.0, 0.25)
    inside = radial_distance()[None] <= radii[:, None, None]
    snr = (profile[None] * inside).sum(axis=(1, 2)) / np.sqrt(inside.sum(axis=(1, 2)))
    return float(radii[snr.argmax()])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [3.0, 5.0, 8.0])
def test_radius_is_that_of_the_best_top_hat(shape: Shape, radius: float) -> None:
    assert best_top_hat(blob_profile(shape, radius, size=SIZE)) == pytest.approx(radius, abs=0.6)


@pytest.mark.parametrize("shape", SHAPES)
def test_array_is_float32_square_and_nothing_at_its_edge(shape: Shape) -> None:
    profile = blob_profile(shape, 8.0, 0.4, -0.3, 41)
    assert profile.dtype == np.float32
    assert profile.shape == (41, 41)
    assert np.abs(profile[[0, -1]]).max() < 1e-4


def test_disc_is_round_and_diamond_is_pointed() -> None:
    disc = blob_profile("disc", 7.0)
    diamond = blob_profile("diamond", 7.0)
    # 8 px and 8.5 px from the centre
    right = (20, 28)
    diagonal = (26, 26)
    assert disc[right] == pytest.approx(disc[diagonal], abs=0.15)
    assert diamond[right] > diamond[diagonal] + 0.2


def test_ring_has_a_bright_rim_around_a_fainter_band_around_a_bright_centre() -> None:
    ring = blob_profile("ring", 8.0)[20, 20:]
    assert ring[:2].min() > 0.5
    assert ring[2:4].min() < 0.45
    assert ring[5:9].max() > 0.9


def test_a_whole_pixel_moves_the_array() -> None:
    still = blob_profile("disc", 5.0, 0.2, 0.1)
    moved = blob_profile("disc", 5.0, 1.2, -0.9)
    np.testing.assert_allclose(np.roll(still, (-1, 1), axis=(0, 1)), moved, atol=1e-6)


def test_same_call_gives_the_same_bytes() -> None:
    assert (
        blob_profile("ring", 6.1, 0.3, 0.4).tobytes()
        == blob_profile("ring", 6.1, 0.3, 0.4).tobytes()
    )


def test_blobs_are_larger_lower_left() -> None:
    assert DEFAULT.typical_radius(np.array(0.0), np.array(0.0)) == pytest.approx(9.2)
    assert DEFAULT.typical_radius(np.array(1000.0), np.array(1000.0)) == pytest.approx(2.4)


def test_matched_snr_of_a_flat_patch() -> None:
    """25 pixels of 2 % in noise of 1 %: twice the root of 25."""
    assert matched_snr(np.full((5, 5), 0.02), 0.01) == pytest.approx(10.0)
