"""Rows that the pages read from the log."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from tests.unit import synthetic_log

from blobpipe.errors import LogError
from blobpipe.monitor import logbook
from blobpipe.review import queries


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> sqlite3.Connection:
    """60 images; only for reading."""
    connection = synthetic_log.make_log(tmp_path_factory.mktemp("log") / "log.sqlite", 60)
    connection.execute("PRAGMA query_only = ON")
    return connection


def test_lists_have_parts() -> None:
    assert [queries.part(n, 50, 101).number for n in (-1, 0, 1, 3, 4)] == [1, 1, 1, 3, 3]
    assert (queries.part(3, 50, 101).pages, queries.part(3, 50, 101).offset) == (3, 100)
    assert (queries.part(1, 50, 0).pages, queries.part(9, 50, 0).offset) == (1, 0)


@pytest.mark.parametrize(
    ("day", "mjd"), [("1858-11-17", 0), ("2012-09-27", 56197), ("2020-02-29", 58908)]
)
def test_a_day_begins_at_a_whole_mjd(day: str, mjd: float) -> None:
    assert queries.mjd_of(day) == mjd


def test_candidates_are_counted_by_decision(log: sqlite3.Connection) -> None:
    counts = queries.decision_counts(log)
    assert set(counts) == set(queries.SHOWS)
    assert counts["all"] == sum(counts.values()) - counts["all"]
    assert counts["all"] == len(queries.candidates(log))


def test_the_review_queue_holds_what_was_asked_for(log: sqlite3.Connection) -> None:
    counts = queries.decision_counts(log)
    for show in queries.SHOWS:
        listed = queries.part(1, 1000, counts[show])
        rows = queries.review_queue(log, show, listed)
        assert len(rows) == counts[show]
        if show != "all":
            assert {row["decision"] or "undecided" for row in rows} <= {show}


def test_images_beside_one_are_its_neighbours_by_date(log: sqlite3.Connection) -> None:
    assert queries.images_beside(log, 30) == {"before": 29, "after": 31}
    assert queries.images_beside(log, 1)["before"] is None
    assert queries.images_beside(log, 60)["after"] is None


def test_an_empty_log_has_no_newest_image(tmp_path: Path) -> None:
    log = logbook.connect(tmp_path / "log.sqlite", make=True)
    assert queries.newest_image(log) is None
    assert queries.newest_mjd(log) is None
    assert queries.image_counts(log) == (0, None)
    assert len(queries.dated_images(log)["mjd"]) == 0


def test_pictures_are_those_of_the_log(log: sqlite3.Connection) -> None:
    row = log.execute("SELECT id, bytes, type FROM pictures LIMIT 1").fetchone()
    assert queries.picture(log, row["id"]) == (row["bytes"], row["type"])
    with pytest.raises(LogError, match="no subframe of image 99999 in the log"):
        queries.subframe(log, 99999, 0, 0)
