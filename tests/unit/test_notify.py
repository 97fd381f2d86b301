"""Notices: what is due, told once; and an outbox that empties in the end, whatever servers do and whoever is killed."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from blobpipe import health, notify, store
from blobpipe.params import Health, Notices

MAIL = Notices(mail_to=("team@example.org",), mail_from="blobs@example.org", smtp_host="localhost")
BOTH = MAIL.model_copy(update={"webhook": True})
RUN = {
    "started": "2024-05-01T00:00:00.000Z",
    "version": "0.1.0",
    "model": "model.safetensors",
    "model_sha256": "abcdef012345" + "a" * 52,
    "params_sha256": "b" * 64,
    "catalogue_sha256": "",
    "threshold": 0.9,
}


@pytest.fixture
def log(tmp_path: Path) -> sqlite3.Connection:
    connection = store.connect(tmp_path / "log.sqlite", make=True)
    with store.writing(connection):
        store.insert(connection, "runs", RUN)
    return connection


def add_image(log: sqlite3.Connection, **more: object) -> int:
    number = log.execute("SELECT count(*) FROM images").fetchone()[0] + 1
    row = {"run": 1, "sha256": f"{number:064}", "name": f"id{number:03}_blob", "kind": "image", "outcome": "searched"}
    return store.insert(log, "images", row | {"logged": "2024-05-07T10:00:00.000Z", "mjd": 60000.0 + number} | more)


def add_candidate(log: sqlite3.Connection, image: int, status: str = "new") -> int:
    return store.insert(log, "candidates", {"image": image, "status": status, "x_px": 512.25, "y_px": 300.0})


def add_sighting(log: sqlite3.Connection, image: int, candidate: int | None, **more: object) -> int:
    row = {"image": image, "candidate": candidate, "status": "new", "x_px": 512.4, "y_px": 300.1, "snr": 14.2}
    row |= {"radius_px": 5.31, "radius_err_px": 0.21, "depth_frac": 0.0231, "depth_err_frac": 0.0012}
    number = store.insert(log, "detections", row | {"score": 0.99, "probability": 0.987} | more)
    for kind in ("difference", "stack", "map"):
        picture = {"image": image, "detection": number, "kind": kind, "type": "image/png", "bytes": kind.encode()}
        store.insert(log, "pictures", picture)
    return number


def told(log: sqlite3.Connection) -> list[tuple[str, str]]:
    return [(row["key"], row["channel"]) for row in log.execute("SELECT * FROM notices ORDER BY id")]


def keys(log: sqlite3.Connection) -> list[str]:
    return [key for key, _ in told(log)]


# --- what is due -----------------------------------------------------------------------------------------------------


def test_a_new_candidate_is_told_once_on_each_channel(log: sqlite3.Connection) -> None:
    with store.writing(log):
        image = add_image(log)
        add_sighting(log, image, add_candidate(log, image))
        for _ in range(2):
            notify.queue(log, image, BOTH)
    assert told(log) == [("candidate-1-new", "mail"), ("candidate-1-new", "webhook")]
    row = log.execute("SELECT * FROM notices").fetchone()
    assert row["subject"] == "blobpipe: new blob at x 512, y 300, depth 2.31 %, S/N 14.20"
    for line in (
        "place: x = 512.2, y = 300.0 px (0-based)",
        "radius: 5.31 +- 0.21 px",
        "depth: 2.31 +- 0.12 % of the light",
        "probability of a blob: 0.987",
        "first image: id001_blob, MJD 60001.000",
        "model: abcdef012345",
    ):
        assert line in row["text"].splitlines()


def test_a_second_look_confirms_and_is_told_once(log: sqlite3.Connection) -> None:
    with store.writing(log):
        first = add_image(log)
        add_sighting(log, first, candidate := add_candidate(log, first))
        notify.queue(log, first, MAIL)
        for _ in range(3):
            image = add_image(log)
            add_sighting(log, image, candidate)
            log.execute("UPDATE candidates SET status = 'confirmed'")
            notify.queue(log, image, MAIL)
    assert keys(log) == ["candidate-1-new", "candidate-1-confirmed"]
    assert "images that show it: 2" in log.execute("SELECT text FROM notices WHERE id = 2").fetchone()["text"]


def test_what_was_rejected_or_is_known_is_not_told(log: sqlite3.Connection) -> None:
    with store.writing(log):
        first, second = add_image(log), add_image(log)
        add_sighting(log, first, candidate := add_candidate(log, first, "confirmed"))
        add_sighting(log, second, candidate)
        add_sighting(log, second, None, status="dip")
        review = {"candidate": candidate, "reviewer": "me", "at": store.now()}
        store.insert(log, "reviews", review | {"decision": "confirmed"})
        store.insert(log, "reviews", review | {"decision": "rejected"})
        notify.queue(log, second, MAIL)
        assert keys(log) == []
        store.insert(log, "reviews", review | {"decision": "unsure"})
        notify.queue(log, second, MAIL)
    assert keys(log) == ["candidate-1-confirmed"]


def test_by_default_nothing_is_told(log: sqlite3.Connection) -> None:
    with store.writing(log):
        image = add_image(log)
        add_sighting(log, image, add_candidate(log, image))
        notify.queue(log, image, Notices())
    assert keys(log) == []
    assert notify.send(log, Notices()) == 0


def test_a_reading_that_crosses_its_limit_is_told_once(log: sqlite3.Connection) -> None:
    params = Health(window=3, noise_frac=0.013)
    with store.writing(log):
        for noise in (0.01, 0.01, 0.01, 0.02, 0.02, 0.02):
            image = add_image(log, noise_frac=noise)
            health.crossed(log, image, params)
            notify.queue(log, image, MAIL)
    assert keys(log) == ["health-noise_frac-5"]
    assert "0.02, limit 0.013; faint blobs" in log.execute("SELECT text FROM notices").fetchone()["text"]
