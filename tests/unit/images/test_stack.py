"""Median stacks and RMS maps: exact medians, and blobs that land within a stack."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from blobpipe.core.blob_shapes import blob_profile
from blobpipe.images.register import Shift
from blobpipe.images.stack import landed_within, rms_map, running_median, with_recent_blobs


def test_running_median_is_the_median_of_each_run(images: np.ndarray) -> None:
    crop = images[:, :70, 300:340]
    medians = running_median(crop, 5)
    assert medians.dtype == np.float32
    assert medians.shape == (14, 70, 40)
    expected = np.stack([np.median(crop[i : i + 5], axis=0) for i in range(14)])
    np.testing.assert_allclose(medians, expected, rtol=1e-6)


def test_running_median_leaves_missing_values_out() -> None:
    images = np.arange(12, dtype=np.float32).reshape(4, 1, 3)
    images[1, 0, 0] = np.nan
    images[:, 0, 2] = np.nan
    np.testing.assert_array_equal(
        running_median(images, 3)[:, 0], [[3, 4, np.nan], [7.5, 7, np.nan]]
    )


def test_rms_map_is_the_noise_and_shows_what_flickers() -> None:
    images = np.random.default_rng(5).normal(0, 0.01, (30, 101, 100)).astype(np.float32)
    images[4, 40:44, 60:64] += 0.1
    images[-3:, 80:84, 20:24] += 0.2
    images[:, 10, 10] = np.nan
    found = rms_map(images, np.median(images, axis=0))
    assert found.shape == (50, 50)
    assert np.median(found) == pytest.approx(0.01, rel=0.03)
    np.testing.assert_allclose(found[20:22, 30:32], np.hypot(0.01, 0.1 / np.sqrt(27)), rtol=0.2)
    assert found[40:42, 10:12].max() < 0.015, "the newest do not count"
    assert found[5, 5] == 0
    assert np.isfinite(found).all()
    assert not rms_map(images[:3], images[0]).any()


def test_rms_map_leaves_missing_values_out() -> None:
    """A pixel that is flagged on some images is known from the others."""
    images = np.random.default_rng(5).normal(0, 0.01, (30, 64, 64)).astype(np.float32)
    flagged = images.copy()
    flagged[np.random.default_rng(6).random(images.shape) < 0.1] = np.nan
    stack = np.median(images, axis=0)
    found = rms_map(flagged, stack)
    assert (found > 0).all()
    assert np.corrcoef(found.ravel(), rms_map(images, stack).ravel())[0, 1] > 0.8
    rest = np.square(flagged[:27, 20:22, 40:42] - stack[20:22, 40:42])
    assert found[10, 20] == pytest.approx(np.sqrt(np.nanmean(rest, axis=0).mean()), rel=1e-5)


def test_recent_blob_is_taken_from_the_images_since_it_landed() -> None:
    images = np.zeros((5, 64, 64), np.float32)
    images[3:, 20:41, 20:41] = 0.1
    blob = pd.DataFrame({"x_px": [30.0], "y_px": [30.0], "radius_px": [5.0], "first": [13]})
    rows = [8, 9, 11, 13, 14]
    recent = landed_within(blob, rows, images[0].shape)
    stack = with_recent_blobs(np.median(images, axis=0), images, recent)
    assert stack[30, 30] == np.float32(0.1)
    assert stack[30, 30 + 12] == 0
    assert landed_within(blob.assign(first=8), rows, images[0].shape) == []


def test_a_blob_that_landed_within_the_stack_has_not_flickered() -> None:
    rng = np.random.default_rng(1)
    images = rng.normal(0, 0.01, (30, 64, 64)).astype(np.float32)
    images[20:, 12:53, 12:53] += 0.1 * blob_profile("disc", 5.0)
    blob = pd.DataFrame({"x_px": [32.0], "y_px": [32.0], "radius_px": [5.0], "first": [20]})
    recent = landed_within(blob, list(range(30)), images[0].shape)
    stack = with_recent_blobs(np.median(images, axis=0), images, recent)
    blind = rms_map(images, stack)
    aware = rms_map(images, stack, recent)
    middle = slice(14, 18)
    assert blind[middle, middle].mean() > 0.05
    assert aware[middle, middle].mean() == pytest.approx(0.01, rel=0.2)
    np.testing.assert_array_equal(blind[:6], aware[:6])


def test_recent_blob_of_a_shifted_image_is_moved_back() -> None:
    """Else it would leave a dip in the next image."""
    images = np.zeros((4, 64, 64), np.float32)
    images[3, 12:53, 12:53] = 0.1 * blob_profile("disc", 5.0, 2.0, -1.5)
    blob = pd.DataFrame({"x_px": [32.0], "y_px": [32.0], "radius_px": [5.0], "first": [3]})
    shifts = [Shift(0.0, 0.0)] * 3 + [Shift(2.0, -1.5)]
    recent = landed_within(blob, [0, 1, 2, 3], images[0].shape)
    stack = with_recent_blobs(np.median(images, axis=0), images, recent, shifts)
    np.testing.assert_allclose(stack[12:53, 12:53], 0.1 * blob_profile("disc", 5.0), atol=0.01)


def test_what_landed_within_a_stack_is_known_by_the_rows_of_its_images() -> None:
    """After the first of them, for that is how all of them show it, and up to the last."""
    blobs = pd.DataFrame(
        {"x_px": 30.0, "y_px": 40.0, "radius_px": 4.0, "first": [-1, 8, 9, 10, 13, 14, 15]}
    )
    recent = landed_within(blobs, [8, 9, 11, 13, 14], (64, 48))
    assert [blob.start for blob in recent] == [1, 2, 3, 4]
    for blob in recent:
        rows, columns = np.mgrid[blob.window]
        np.testing.assert_allclose(blob.distance, np.hypot(columns - 30, rows - 40))
        assert (blob.inside == (blob.distance < 1.55 * 4 + 2.5)).all()
        # what a shift of 6 px may touch
        assert (blob.window[0].start, blob.window[1].stop) == (27, 44)
