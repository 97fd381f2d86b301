"""Detections of two images or of one: which are the same blob."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from tests.unit.detection.blobs import blob, measured, noise

from blobpipe.detection.match import mark_seen_again, pair, without_repeats


def table(*rows: tuple[float, float, str]) -> pd.DataFrame:
    x, y, status = zip(*rows, strict=True)
    return pd.DataFrame(
        {"x_px": x, "y_px": y, "status": np.array(status, object)}, index=range(7, 7 + len(rows))
    )


def test_a_new_blob_on_a_later_image_is_seen_again() -> None:
    previous = table(
        (10, 10, "new"), (50, 50, "new"), (90, 90, "dip"), (70, 70, "new"), (30, 30, "known")
    )
    current = table(
        (52, 50, "known"),
        (90, 90, "new"),
        (70, 70, "bad_pixels"),
        (30, 30, "new"),
        (13.1, 10, "new"),
    )
    done = mark_seen_again(previous, current)
    assert list(done["status"]) == ["new", "seen_again", "dip", "new", "known"]
    assert list(previous["status"]) == ["new", "new", "dip", "new", "known"]
    assert mark_seen_again(previous, current, 3.2)["status"].iloc[0] == "seen_again"


def test_marking_twice_changes_nothing() -> None:
    previous = table((10, 10, "new"), (50, 50, "new"))
    current = table((11, 10, "new"), (80, 50, "new"))
    once = mark_seen_again(previous, current)
    pd.testing.assert_frame_equal(mark_seen_again(once, current), once)


def test_pairs_are_one_to_one_and_within_the_tolerance() -> None:
    rng = np.random.default_rng(3)
    detections = rng.uniform(0, 40, (30, 2))
    blobs = rng.uniform(0, 40, (25, 2))
    pairs = pair(detections, blobs, 5.0)
    assert len(set(pairs[:, 0])) == len(set(pairs[:, 1])) == len(pairs)
    assert np.hypot(*(detections[pairs[:, 0]] - blobs[pairs[:, 1]]).T).max() <= 5
    back = pair(blobs, detections, 5.0)
    assert {(i, j) for i, j in pairs} == {(j, i) for i, j in back}


def test_as_many_pairs_as_there_can_be() -> None:
    """The nearest pair alone would leave the other two without partners."""
    assert pair([(0, 0), (4, 0)], [(3, 0), (7, 0)], 3.5).tolist() == [[0, 0], [1, 1]]


def test_pairs_of_nothing_and_of_no_place() -> None:
    assert pair(np.zeros((0, 2)), [(1, 1)], 3).shape == (0, 2)
    assert pair([(1, 1)], np.zeros((0, 2)), 3).shape == (0, 2)
    assert pair([(np.nan, 1), (1, 1)], [(1, 1)], 3).tolist() == [[1, 0]]


def test_two_peaks_on_one_blob_are_one_detection() -> None:
    image = noise() + blob(60.0, 80.0, 9.0, 0.08) + blob(110.0, 80.0, 5.0, 0.08)
    table = measured(image, (57.0, 80.0), (110.0, 81.0), (64.0, 79.0))
    once = without_repeats(table)
    assert once["score"].tolist() == [1.0, 0.75]
    assert once.index.tolist() == [0, 1]
    assert once.columns.equals(table.columns)
    assert len(without_repeats(table[:0])) == 0


@pytest.mark.parametrize(("apart", "kept"), [(3.0, 1), (3.1, 2)])
def test_detections_within_three_pixels_are_one(apart: float, kept: int) -> None:
    table = pd.DataFrame({"x_px": [50.0, 50.0 + apart], "y_px": [20.0, 20.0], "score": [0.9, 0.8]})
    assert without_repeats(table)["score"].tolist() == [0.9, 0.8][:kept]
    assert len(without_repeats(table, 4.0)) == 1
