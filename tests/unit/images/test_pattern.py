"""The pattern of the known blobs: what is a blob of the stack, and what is not."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from blobpipe.core.blob_shapes import blob_profile
from blobpipe.images.pattern import (
    SMOOTHING_PX,
    _blob_like,
    _compact,
    _continued,
    _filled,
    blob_pattern,
    smooth_gaussian,
    soften,
)
from blobpipe.params import Campaign
from blobpipe.simulation import campaign


def test_pattern_is_the_known_blobs_and_nothing_else(
    reference: tuple[np.ndarray, np.ndarray], known: pd.DataFrame, campaign_params: Campaign
) -> None:
    _, pattern = reference
    truth = campaign.blob_layer(
        [b for b in campaign.population(campaign_params) if b.first < 0], 0, 0
    )
    assert (pattern == 0).mean() > 0.95
    assert np.corrcoef(pattern[20:-20, 20:-20].ravel(), truth[20:-20, 20:-20].ravel())[0, 1] > 0.98
    assert np.abs(pattern[truth == 0]).max() < 0.2 * pattern.max()


def test_pattern_is_found_without_a_catalogue(
    reference: tuple[np.ndarray, np.ndarray], known: pd.DataFrame
) -> None:
    found = blob_pattern(reference[0])
    strong = known.query(
        "depth_frac > 0.03 and x_px > 20 and x_px < 1000 and y_px > 20 and y_px < 1000"
    )
    at = found[strong["y_px"].round().astype(int), strong["x_px"].round().astype(int)]
    assert np.mean(at > 0.5 * strong["depth_frac"]) > 0.9


def test_pixels_of_a_blob_without_a_value_are_filled_from_the_others() -> None:
    stack = stack_with()
    whole = blob_pattern(stack)
    missing = stack.copy()
    missing[58:61, 62] = np.nan
    missing[55, 58] = np.nan
    found = blob_pattern(missing)
    assert np.isfinite(found).all()
    assert np.abs(found - whole).max() < 0.15 * whole.max()


def stack_with(
    *structures: tuple[slice, slice, float], shape: tuple[int, int] = (256, 512)
) -> np.ndarray:
    """Noise, a blob at 60, 60 that is one in any case, and structures with the soft edges of blobs."""
    image = np.zeros(shape, np.float32)
    for rows, columns, level in structures:
        image[rows, columns] = level
    image = smooth_gaussian(image, 1.2)
    image[40:81, 40:81] += 0.1 * blob_profile("disc", 6.0)
    return image + np.random.default_rng(8).normal(0, 0.003, shape).astype(np.float32)


@pytest.mark.parametrize(
    ("structure", "is_blob"),
    [
        ((slice(150, 160), slice(200, 212), 0.1), True),
        ((slice(150, 154), slice(200, 260), 0.1), False),  # a streak
        ((slice(150, 210), slice(200, 260), 0.1), False),  # larger than any blob
        ((slice(150, 160), slice(200, 212), 0.5), False),  # deeper than any blob
        ((slice(150, 160), slice(200, 212), -0.1), False),  # bright
        ((slice(54, 64), slice(357, 367), 0.1), False),  # the Death Star
    ],
)
def test_of_the_stack_compact_dark_patches_are_blobs(
    structure: tuple[slice, slice, float], is_blob: bool
) -> None:
    pattern = blob_pattern(stack_with(structure))
    inside = pattern[structure[:2]]
    assert inside.mean() > 0.08 if is_blob else np.abs(inside).max() < 0.01
    assert pattern[60, 60] > 0.08


@pytest.mark.parametrize("side", [2, 4, 6])
def test_clusters_of_bad_pixels_with_hard_edges_are_no_blobs(side: int) -> None:
    stack = stack_with()
    stack[150 : 150 + side, 200 : 200 + side] += np.random.default_rng(3).uniform(
        0.05, 0.2, (side, side)
    )
    assert np.abs(blob_pattern(stack)[140:170, 190:220]).max() < 0.01


def test_a_blob_of_the_catalogue_is_in_the_pattern_however_faint_up_to_its_outer_edge() -> None:
    stack = stack_with()
    faint = pd.DataFrame({"x_px": [300.0], "y_px": [150.0], "radius_px": [6.0]})
    found = blob_pattern(stack, faint) - blob_pattern(stack)
    rows, columns = np.mgrid[:256, :512]
    distance = np.hypot(columns - 300, rows - 150)
    assert (found[distance >= 1.55 * 6 + 2.5] == 0).all()
    assert (found[distance < 1.55 * 6 + 2.4] != 0).mean() > 0.99
    smooth = smooth_gaussian(stack, SMOOTHING_PX, twice=True)
    np.testing.assert_allclose(found[distance < 1.55 * 6], smooth[distance < 1.55 * 6], atol=0.003)


def test_the_pattern_goes_on_beyond_the_border_as_a_mirror_image() -> None:
    stack = np.full((12, 10), np.nan, np.float32)
    stack[2:-1, 3:] = np.random.default_rng(1).normal(0, 1, (9, 7))
    continued = _continued(stack)
    np.testing.assert_array_equal(continued[2:-1, 3:], stack[2:-1, 3:])
    np.testing.assert_array_equal(continued[:2], continued[2:4][::-1])
    np.testing.assert_array_equal(continued[-1], continued[-2])
    np.testing.assert_array_equal(continued[:, :3], continued[:, 3:6][:, ::-1])


def test_bad_pixels_are_filled_from_around_and_the_rest_is_left_alone() -> None:
    image = np.full((40, 40), 0.07, np.float32)
    image[:, 20:] = 0.01
    good = np.ones(image.shape, bool)
    good[10, 5] = good[0, 0] = good[39, 30] = False
    damaged = np.where(good, image, 9.0).astype(np.float32)
    np.testing.assert_allclose(_filled(damaged, good), image, atol=1e-6)
    nothing = _filled(damaged, np.zeros_like(good))
    assert not nothing.any()


def test_smoothing_is_a_gaussian_and_twice_what_the_first_time_lost() -> None:
    image = np.zeros((64, 80), np.float32)
    pixels = np.arange(-20, 21)
    image[30, 41] = 1
    once = smooth_gaussian(image, 1.7)
    along = np.exp(-((pixels / 1.7) ** 2) / 2) / (1.7 * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(once[10:51, 21:62], np.outer(along, along), atol=1e-5)
    twice = smooth_gaussian(image, 1.7, twice=True)
    np.testing.assert_allclose(twice, once + smooth_gaussian(image - once, 1.7), atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "compact"),
    [
        ((4, 4), True),
        ((3, 5), False),
        ((4, 9), True),
        ((4, 10), False),
        ((44, 44), True),
        ((45, 40), False),
    ],
)
def test_compact_is_neither_a_few_pixels_nor_long_nor_large(
    shape: tuple[int, int], compact: bool
) -> None:
    assert _compact(np.ones(shape, bool)) == compact
    assert _compact(np.ones(shape[::-1], bool)) == compact


def test_a_soft_region_is_whole_and_ends_within_three_widths() -> None:
    rows, columns = np.mgrid[:80, :80]
    distance = np.hypot(columns - 40, rows - 40)
    soft = soften(distance <= 10, 3.0)
    assert (soft[distance <= 10] == 1).all()
    assert (soft[distance > 19.5] == 0).all()
    assert ((soft > 0) & (soft < 1)).any()


def test_a_blob_is_not_deeper_than_any_and_leaves_noise() -> None:
    rest = np.random.default_rng(1).normal(0, 1, 400)
    rest *= 0.01 / rest.std()
    for depth, scale, likely in (
        (0.34, 1.0, True),
        (0.36, 1.0, False),
        (0.1, 1.55, True),
        (0.1, 1.65, False),
    ):
        values = np.linspace(0, depth, 400)
        assert _blob_like(values, scale * rest, 0.01) == likely, (depth, scale)
