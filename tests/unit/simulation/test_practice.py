"""What the joint score learns from: blobs of the usual size, clusters and clutter."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from blobpipe.core.detector import DEFAULT
from blobpipe.simulation import clutter, practice
from blobpipe.simulation.inject import HALF_PX
from blobpipe.simulation.practice import draw_practice

SHAPE = (1024, 768)
PIECES = np.zeros((1, 256, 256), np.int16)


@pytest.fixture
def without_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(practice, "CLUSTER_SNR", (1e-6, 2e-6))


@pytest.mark.usefixtures("without_clusters")
def test_blobs_are_as_strong_as_they_are_said_to_be_and_where() -> None:
    signal, blobs = draw_practice(1, "frame", 0, SHAPE, 0.01, PIECES)
    assert len(blobs) > 10
    for blob in blobs.itertuples():
        row = round(blob.y_px)
        column = round(blob.x_px)
        near = signal[row - 20 : row + 21, column - 20 : column + 21]
        assert 3.9 < np.sqrt((near**2).sum()) / 0.01 < 60  # of two in one window too
        y, x = np.unravel_index(near.argmax(), near.shape)
        assert math.hypot(x - 20, y - 20) <= 1.6 * blob.radius_px


def test_blobs_share_their_square_with_clusters_and_nothing() -> None:
    blobs = pd.concat([draw_practice(1, f"frame{k}", 0, SHAPE, 0.01, PIECES)[1] for k in range(20)])
    expected = 20 * 12 * (1 - practice.CLUTTER_FRAC) * 9 * practice.BLOB_FRAC
    assert len(blobs) == pytest.approx(expected, rel=0.2)


def test_most_blobs_have_the_size_of_their_place() -> None:
    ratios = []
    for k in range(40):
        blobs = draw_practice(1, f"frame{k}", 0, SHAPE, 0.01, PIECES)[1]
        usual = DEFAULT.typical_radius(blobs["x_px"].to_numpy(), blobs["y_px"].to_numpy())
        ratios += (blobs["radius_px"] / usual).tolist()
    spread = np.log(ratios)
    assert np.median(spread) == pytest.approx(0, abs=0.05)
    assert 1.4826 * np.median(np.abs(spread)) == pytest.approx(practice.LAW_SCATTER, rel=0.2)


def test_a_square_without_blobs_shows_a_piece_of_clutter_in_units_of_the_noise() -> None:
    pieces = PIECES.copy()
    pieces[0, 10, 20] = 3 * clutter.STEP
    pieces[0, 11, 20] = clutter.NO_VALUE
    signal, blobs = draw_practice(1, "frame", 0, SHAPE, 0.01, pieces)
    with_blobs = set((blobs["x_px"] // 256 + 3 * (blobs["y_px"] // 256)).astype(int))
    others = set(range(12)) - with_blobs
    assert others
    for k in others:
        square = signal[256 * (k // 3) :, 256 * (k % 3) :][:256, :256]
        assert square[10, 20] == pytest.approx(0.03)
        assert square.sum() == pytest.approx(0.03)


def test_clusters_keep_apart_from_blobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(practice, "SNR", (1e-6, 2e-6))
    signal, blobs = draw_practice(2, "frame", 0, SHAPE, 0.01, PIECES)
    strong = np.argwhere(signal > 0.5 * signal.max())
    assert len(strong) > 0
    for y, x in strong:
        apart = np.hypot(blobs["x_px"] - x, blobs["y_px"] - y)
        assert apart.min() > 2 * HALF_PX - 8


def test_clusters_are_smaller_than_blobs_at_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(practice, "SNR", (1e-6, 2e-6))
    monkeypatch.setattr(practice, "CLUTTER_FRAC", 0.0)
    signal = draw_practice(3, "frame", 0, (1024, 1024), 0.01, PIECES)[0]
    corner = signal[768:, 768:]
    for y, x in np.argwhere(corner == ndimage.maximum_filter(corner, 41)):
        if corner[y, x] > 0.01:
            part = corner[max(y - 12, 0) : y + 13, max(x - 12, 0) : x + 13]
            area = (part > 0.5 * corner[y, x]).sum()
            usual = DEFAULT.typical_radius(np.array(768.0 + x), np.array(768.0 + y))
            assert np.sqrt(area / np.pi) < usual


def test_frame_and_seed_alone_decide() -> None:
    once, blobs = draw_practice(1, "frame", 0, SHAPE, 0.01, PIECES)
    again, same = draw_practice(1, "frame", 0, SHAPE, 0.01, PIECES)
    np.testing.assert_array_equal(once, again)
    assert blobs.equals(same)
    assert (once != draw_practice(2, "frame", 0, SHAPE, 0.01, PIECES)[0]).any()
    assert (once != draw_practice(1, "other", 0, SHAPE, 0.01, PIECES)[0]).any()
    assert draw_practice(1, "frame", 0, (1024, 100), 0.01, PIECES)[1].empty


def test_blobs_alone_are_drawn_with_nothing_else() -> None:
    signal, blobs = practice.draw_blobs(np.random.default_rng(3), SHAPE, 0.01)
    assert len(blobs) == pytest.approx(12 * 9 * practice.ALONE_FRAC, rel=0.5)
    rows, columns = np.nonzero(signal > 0.3 * signal.max())
    offset = np.hypot(
        columns[:, None] - blobs["x_px"].to_numpy(), rows[:, None] - blobs["y_px"].to_numpy()
    )
    assert (offset.min(axis=1) < 1.6 * blobs["radius_px"].max()).all()
