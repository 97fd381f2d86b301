"""Clutter: many kinds, reproducible, and nothing in it that is like a blob."""

from __future__ import annotations

import numpy as np
import pytest

from blobpipe.simulation import clutter


def test_a_piece_depends_on_its_number_alone() -> None:
    many = clutter.draw_pieces(3, 6)
    assert many.shape == (6, 256, 256)
    assert many.dtype == np.int16
    np.testing.assert_array_equal(clutter.draw_pieces(3, 4), many[:4])
    assert not np.array_equal(clutter.draw_pieces(4, 1)[0], many[0])


@pytest.mark.parametrize("kind", clutter.KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_leaves_something_and_stays_inside(kind: object) -> None:
    touched = []
    for seed in range(8):
        image = np.zeros((256, 256), np.float32)
        kind(image, np.random.default_rng(seed))  # type: ignore[operator]
        assert image.dtype == np.float32
        touched.append(np.count_nonzero(image))
    assert np.median(touched) > 0
    assert max(touched) <= image.size


def test_all_kinds_occur_and_some_pixels_have_no_value() -> None:
    pieces = clutter.draw_pieces(1, 24)
    assert all(np.count_nonzero(piece) for piece in pieces)
    assert 0 < (pieces == clutter.NO_VALUE).mean() < 0.1
    values = pieces[pieces != clutter.NO_VALUE] / clutter.STEP
    assert values.min() < -20
    assert values.max() > 20


def test_bad_pixels_as_large_as_a_blob_are_not_of_its_sign() -> None:
    """A clipped cluster of that size and sign is a small strong blob to any network."""
    for seed in range(30):
        image = np.zeros((256, 256), np.float32)
        clutter._clusters(image, np.random.default_rng(seed))
        lit = np.nan_to_num(image) > 1.5
        blocks = sum(lit[dy : dy + 252, dx : dx + 252] for dy in range(5) for dx in range(5))
        assert blocks.max() <= 18  # of a 5 x 5 block; two small clusters may touch
