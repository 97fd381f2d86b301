"""Whole images as subframes: nothing is lost, and everything is where it should be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blobpipe.images.tiles import tile


@settings(max_examples=15, deadline=None)
@given(st.integers(100, 700), st.integers(100, 700))
def test_cut_then_stitch_is_the_identity(ny: int, nx: int) -> None:
    image = np.random.default_rng(ny * nx).normal(size=(ny, nx)).astype(np.float32)
    subframes, origins = tile(image)
    stitched = np.zeros((origins[:, 3].max() + 256, origins[:, 2].max() + 256), np.float32)
    for subframe, (row, col, x0, y0) in zip(subframes, origins, strict=True):
        assert (x0, y0) == (256 * col, 256 * row)
        stitched[y0 : y0 + 256, x0 : x0 + 256] = subframe
    np.testing.assert_array_equal(stitched[:ny, :nx], image)


def test_a_detector_gives_sixteen_the_bottom_row_first() -> None:
    image = np.zeros((1024, 1024), np.float32)
    image[10, 700] = 1
    subframes, origins = tile(image)
    assert subframes.shape == (16, 256, 256)
    assert subframes.flags.c_contiguous
    assert origins[2].tolist() == [0, 2, 512, 0]
    assert subframes[2, 10, 700 - 512] == 1
    assert subframes.sum() == 1


@pytest.mark.parametrize("shape", [(256, 256), (1024, 1024), (300, 500)])
def test_subframes_are_a_copy(shape: tuple[int, int]) -> None:
    image = np.ones(shape, np.float32)
    tile(image)[0][:] = 7
    assert (image == 1).all()


def test_what_lies_beyond_the_image_has_its_spread() -> None:
    image = np.random.default_rng(1).normal(size=(400, 300)).astype(np.float32)
    assert tile(image)[0].std(axis=(1, 2)) == pytest.approx(1, abs=0.02)
