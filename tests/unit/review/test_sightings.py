"""What ginga's plug-in shows of an image, and how it writes decisions."""

from __future__ import annotations

import ast
import importlib.metadata
import sqlite3
from pathlib import Path

import pytest
from tests.unit import synthetic_log

from blobpipe.errors import LogError
from blobpipe.monitor import logbook
from blobpipe.review import sightings


@pytest.fixture
def log(tmp_path: Path) -> sqlite3.Connection:
    """60 images, with candidates, dips and reviews."""
    return synthetic_log.make_log(tmp_path / "log.sqlite", 60)


def newest(log: sqlite3.Connection) -> str:
    """Return the name of the newest image, which shows an undecided candidate."""
    row = log.execute(
        "SELECT name FROM images WHERE outcome = 'searched' ORDER BY mjd DESC LIMIT 1"
    )
    return str(row.fetchone()["name"])


def test_candidates_come_before_what_is_none(log: sqlite3.Connection) -> None:
    detections = logbook.table(log, "detections")
    images = logbook.table(log, "images").set_index("id")
    for image, rows in detections.groupby("image"):
        found = sightings.of_log(log, images.loc[image, "name"])
        assert len(found) == len(rows)
        assert {one.detection for one in found} == set(rows["id"])
        numbers = [one.candidate is None for one in found]
        assert numbers == sorted(numbers)
        known = [one.snr for one in found if one.candidate is not None]
        assert known == sorted(known, reverse=True)


def test_a_decision_is_a_review_and_replaces_the_status(log: sqlite3.Connection) -> None:
    [one] = [each for each in sightings.of_log(log, newest(log)) if each.candidate is not None]
    assert one.candidate is not None
    assert one.decision == ""
    assert one.verdict == one.status
    sightings.decide(log, one.candidate, "confirmed", "  A.\n Reviewer ")
    [now] = [each for each in sightings.of_log(log, newest(log)) if each.candidate is not None]
    assert (now.decision, now.verdict, now.status) == ("confirmed", "confirmed", one.status)
    review = logbook.table(log, "reviews").iloc[-1]
    assert (review["candidate"], review["reviewer"]) == (one.candidate, "A. Reviewer")
    sightings.decide(log, one.candidate, "rejected", "B")
    assert logbook.table(log, "candidate_list").set_index("id").loc[one.candidate, "decision"] == (
        "rejected"
    )


def test_what_cannot_be_shown_or_decided_is_one_line(log: sqlite3.Connection) -> None:
    before = len(logbook.table(log, "reviews"))
    with pytest.raises(LogError, match="nowhere: no searched image of this name in the log"):
        sightings.of_log(log, "nowhere")
    with pytest.raises(LogError, match="found no name, expected the reviewer's"):
        sightings.decide(log, 1, "confirmed", " \n")
    with pytest.raises(LogError, match="no candidate 999 in the log"):
        sightings.decide(log, 999, "confirmed", "A")
    assert len(logbook.table(log, "reviews")) == before


def test_pictures_are_those_of_the_detection(log: sqlite3.Connection) -> None:
    [row] = log.execute(
        "SELECT detection, count(*) AS n FROM pictures WHERE detection IS NOT NULL "
        "GROUP BY detection ORDER BY detection LIMIT 1"
    ).fetchall()
    found = sightings.pictures(log, row["detection"])
    assert len(found) == row["n"]
    assert all(content.startswith(b"\x89PNG") for content in found.values())
    assert sightings.pictures(log, 10**6) == {}


def test_ginga_finds_the_plug_in() -> None:
    spec = sightings.ginga_plugin()
    assert spec.ptype == "local"
    tree = ast.parse(Path(spec.path).read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    [plugin] = [node for node in classes if node.name == spec.klass]
    methods = {node.name for node in plugin.body if isinstance(node, ast.FunctionDef)}
    assert {"build_gui", "start", "stop", "redo", "close"} <= methods
    points = importlib.metadata.distribution("blobpipe").entry_points.select(
        group="ginga.rv.plugins"
    )
    # An installation that is older than the plug-in has no entry point yet
    assert {point.value for point in points} <= {"blobpipe.review.sightings:ginga_plugin"}
