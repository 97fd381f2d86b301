"""Notices: what is due, told once; and an outbox that empties in the end, whatever servers do and whoever is killed."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from tests.servers import SECRET, Hook, HookServer, Mailbox, MailServer, certificate, server_context

from blobpipe.errors import NoticeError
from blobpipe.monitor import delivery, health, logbook, notices
from blobpipe.params import Health, Notices, Params, to_yaml

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
    connection = logbook.connect(tmp_path / "log.sqlite", make=True)
    with logbook.writing(connection):
        logbook.insert(connection, "runs", RUN)
    return connection


def add_image(log: sqlite3.Connection, **more: object) -> int:
    number = log.execute("SELECT count(*) FROM images").fetchone()[0] + 1
    row = {
        "run": 1,
        "sha256": f"{number:064}",
        "name": f"id{number:03}_blob",
        "kind": "image",
        "outcome": "searched",
    }
    return logbook.insert(
        log, "images", row | {"logged": "2024-05-07T10:00:00.000Z", "mjd": 60000.0 + number} | more
    )


def add_candidate(log: sqlite3.Connection, image: int, status: str = "new") -> int:
    return logbook.insert(
        log, "candidates", {"image": image, "status": status, "x_px": 512.25, "y_px": 300.0}
    )


def add_sighting(log: sqlite3.Connection, image: int, candidate: int | None, **more: object) -> int:
    row = {
        "image": image,
        "candidate": candidate,
        "status": "new",
        "x_px": 512.4,
        "y_px": 300.1,
        "snr": 14.2,
    }
    row |= {
        "radius_px": 5.31,
        "radius_err_px": 0.21,
        "depth_frac": 0.0231,
        "depth_err_frac": 0.0012,
    }
    number = logbook.insert(log, "detections", row | {"score": 0.99, "probability": 0.987} | more)
    for kind in ("difference", "stack", "map"):
        picture = {
            "image": image,
            "detection": number,
            "kind": kind,
            "type": "image/png",
            "bytes": kind.encode(),
        }
        logbook.insert(log, "pictures", picture)
    return number


def told(log: sqlite3.Connection) -> list[tuple[str, str]]:
    return [
        (row["key"], row["channel"]) for row in log.execute("SELECT * FROM notices ORDER BY id")
    ]


def keys(log: sqlite3.Connection) -> list[str]:
    return [key for key, _ in told(log)]


# --- what is due -----------------------------------------------------------------------------------------------------


def test_a_new_candidate_is_told_once_on_each_channel(log: sqlite3.Connection) -> None:
    with logbook.writing(log):
        image = add_image(log)
        add_sighting(log, image, add_candidate(log, image))
        for _ in range(2):
            notices.queue(log, image, BOTH)
    assert told(log) == [("candidate-1-new", "mail"), ("candidate-1-new", "webhook")]
    row = log.execute("SELECT * FROM notices").fetchone()
    assert row["subject"] == "blobpipe: new blob at x 512, y 300, depth 2.31 %, S/N 14.20"
    for line in (
        "usual place: x = 512.2, y = 300.0 px (0-based, the image's shift taken off)",
        "radius: 5.31 +- 0.21 px",
        "depth: 2.31 +- 0.12 % of the light",
        "probability of a blob: 0.987",
        "first image: id001_blob, MJD 60001.000",
        "model: abcdef012345",
    ):
        assert line in row["text"].splitlines()


def test_a_second_look_is_told_once(log: sqlite3.Connection) -> None:
    with logbook.writing(log):
        first = add_image(log)
        add_sighting(log, first, candidate := add_candidate(log, first))
        notices.queue(log, first, MAIL)
        for _ in range(3):
            image = add_image(log)
            add_sighting(log, image, candidate)
            log.execute("UPDATE candidates SET status = 'seen_again'")
            notices.queue(log, image, MAIL)
    assert keys(log) == ["candidate-1-new", "candidate-1-seen_again"]
    second = log.execute("SELECT subject, text FROM notices WHERE id = 2").fetchone()
    assert "images that show it: 2" in second["text"]
    assert "seen again with the image" in second["text"]
    assert second["subject"].startswith("blobpipe: blob seen again at")
    assert "its depths" not in second["text"]
    assert "confirm" not in second["subject"] + second["text"]  # only people do


def add_depths(log: sqlite3.Connection, candidate: int) -> int:
    """Four images with depths of a candidate, of which the last tells that it stays."""
    for _ in range(4):
        image = add_image(log)
        measured = {"depth_frac": 0.01, "depth_err_frac": 0.001}
        logbook.insert(log, "depths", {"image": image, "candidate": candidate, **measured})
    row = {"status": "seen_again", "stays_image": image}
    logbook.update(log, "candidates", candidate, row)
    return image


def test_what_stays_by_its_depths_is_told_once_and_how_it_is_known(
    log: sqlite3.Connection,
) -> None:
    with logbook.writing(log):
        first = add_image(log)
        add_sighting(log, first, candidate := add_candidate(log, first))
        notices.queue(log, first, MAIL)
        for image in (add_depths(log, candidate), add_image(log)):
            notices.queue(log, image, MAIL)
        # a second sighting later is no news
        image = add_image(log)
        add_sighting(log, image, candidate)
        notices.queue(log, image, MAIL)
    assert keys(log) == ["candidate-1-new", "candidate-1-seen_again"]
    row = log.execute("SELECT subject, text, image FROM notices WHERE id = 2").fetchone()
    assert row["subject"].startswith("blobpipe: blob seen again at x 512, y 300")
    lines = row["text"].splitlines()
    assert lines[0] == "Candidate 1, seen again with the image id005_blob"
    assert "images that show it: 1" in lines
    how = (
        "its depths on 4 images together show that it landed and stayed; it has no second sighting"
    )
    assert how in lines


def test_the_image_that_shows_a_blob_first_and_dates_it_before_causes_one_notice(
    log: sqlite3.Connection,
) -> None:
    with logbook.writing(log):
        candidate = add_candidate(log, add_image(log))
        image = add_depths(log, candidate)
        add_sighting(log, image, candidate)
        notices.queue(log, image, MAIL)
    assert keys(log) == ["candidate-1-new"]
    text = log.execute("SELECT text FROM notices").fetchone()["text"]
    assert "its depths on 4 images together show that it landed and stayed" in text


def test_what_stays_but_was_rejected_is_not_told(log: sqlite3.Connection) -> None:
    with logbook.writing(log):
        first = add_image(log)
        add_sighting(log, first, candidate := add_candidate(log, first))
        review = {"candidate": candidate, "decision": "rejected", "reviewer": "Ada", "at": ""}
        logbook.insert(log, "reviews", review)
        notices.queue(log, add_depths(log, candidate), MAIL)
    assert keys(log) == []


def test_a_blob_that_had_landed_before_it_was_found_is_told_as_new(
    log: sqlite3.Connection,
) -> None:
    """Its depths on the images before can say that it has stayed, with the first sighting."""
    with logbook.writing(log):
        landed = add_image(log)
        first = add_image(log)
        second = add_image(log)
        add_sighting(log, first, candidate := add_candidate(log, landed, "seen_again"))
        notices.queue(log, first, MAIL)
        assert keys(log) == ["candidate-1-new"]
        add_sighting(log, second, candidate)
        notices.queue(log, second, MAIL)
    assert keys(log) == ["candidate-1-new", "candidate-1-seen_again"]
    notice = log.execute("SELECT subject, text FROM notices WHERE id = 1").fetchone()
    assert notice["subject"].startswith("blobpipe: new blob at")
    assert "Candidate 1, new with the image" in notice["text"]


def test_what_was_rejected_or_is_known_is_not_told(log: sqlite3.Connection) -> None:
    with logbook.writing(log):
        first = add_image(log)
        second = add_image(log)
        add_sighting(log, first, candidate := add_candidate(log, first, "seen_again"))
        add_sighting(log, second, candidate)
        add_sighting(log, second, None, status="dip")
        review = {"candidate": candidate, "reviewer": "me", "at": logbook.now()}
        logbook.insert(log, "reviews", review | {"decision": "confirmed"})
        logbook.insert(log, "reviews", review | {"decision": "rejected"})
        notices.queue(log, second, MAIL)
        assert keys(log) == []
        logbook.insert(log, "reviews", review | {"decision": "unsure"})
        notices.queue(log, second, MAIL)
    assert keys(log) == ["candidate-1-seen_again"]


def test_by_default_nothing_is_told(log: sqlite3.Connection) -> None:
    with logbook.writing(log):
        image = add_image(log)
        add_sighting(log, image, add_candidate(log, image))
        notices.queue(log, image, Notices())
    assert keys(log) == []
    assert notices.send(log, Notices()) == 0


def test_a_reading_that_crosses_its_limit_is_told_once(log: sqlite3.Connection) -> None:
    params = Health(window=3, noise_frac=0.013)
    with logbook.writing(log):
        for noise in (0.01, 0.01, 0.01, 0.02, 0.02, 0.02):
            image = add_image(log, noise_frac=noise)
            health.log_readings(log, image, params)
            notices.queue(log, image, MAIL)
    assert keys(log) == ["health-noise_frac-5"]
    assert (
        "0.02, limit 0.013; faint blobs"
        in log.execute("SELECT text FROM notices").fetchone()["text"]
    )


def test_a_digest_of_each_day_that_had_images(log: sqlite3.Connection) -> None:
    params = MAIL.model_copy(update={"digest": "daily"})
    with logbook.writing(log):
        for logged in (
            "2024-05-06T10",
            "2024-05-06T22",
            "2024-05-08T01",
            "2024-05-08T02",
            "2024-05-09T00",
        ):
            bad = (
                {"outcome": "rejected", "reason": "no finite\npixels"}
                if logged == "2024-05-06T22"
                else {}
            )
            image = add_image(log, logged=f"{logged}:00:00.000Z", **bad)
            add_sighting(log, image, None, status="dip")
            notices.queue(log, image, params)
    assert keys(log) == ["digest-2024-05-06", "digest-2024-05-08"]
    row = log.execute("SELECT * FROM notices").fetchone()
    assert row["subject"] == "blobpipe: digest of 2024-05-06, 2 images, 1 rejected"
    assert row["text"].splitlines() == [
        "images: 2, searched 1",
        "rejected: id002_blob: no finite pixels",
        "detections: 2 on dips",
        "health: all readings within their limits",
    ]


def test_a_digest_lists_what_the_newest_image_nearly_shows(log: sqlite3.Connection) -> None:
    near = {"radius_px": 5.0, "score": 0.8}
    with logbook.writing(log):
        for k, hour in enumerate((10, 22)):
            image = add_image(log, logged=f"2024-05-06T{hour}:00:00.000Z")
            for n_images in (8, 16):
                row = {"image": image, "x_px": 100.0 + k, "y_px": 50.0, "n_images": n_images}
                logbook.insert(log, "nearly_found", near | row | {"snr": 4.0 + n_images / 16})
        notices.queue_digest(
            log, MAIL.model_copy(update={"digest": "daily"}), "2024-05-07T00:00:00.000Z"
        )
    lines = log.execute("SELECT text FROM notices").fetchone()["text"].splitlines()
    assert [line for line in lines if line.startswith("nearly")] == [
        "nearly found: x 101.0, y 50.0 px, S/N 5.0 in the mean of the latest 16 images",
        "nearly found: x 101.0, y 50.0 px, S/N 4.5 in the mean of the latest 8 images",
    ]


def test_a_digest_of_a_week_comes_when_it_is_over(log: sqlite3.Connection) -> None:
    params = MAIL.model_copy(update={"digest": "weekly"})
    with logbook.writing(log):
        add_image(log, logged="2024-05-08T10:00:00.000Z")  # a Wednesday
        notices.queue_digest(log, params, "2024-05-12T23:59:59.999Z")
        assert keys(log) == []
        for _ in range(2):
            notices.queue_digest(log, params, "2024-05-13T00:00:00.000Z")
    assert keys(log) == ["digest-week-2024-05-06"]
    assert (
        "2024-05-06 to 2024-05-12"
        in log.execute("SELECT subject FROM notices").fetchone()["subject"]
    )


def test_the_digests_of_a_day_and_of_the_week_that_begins_with_it_are_two(
    log: sqlite3.Connection,
) -> None:
    with logbook.writing(log):
        add_image(log, logged="2024-05-06T10:00:00.000Z")  # a Monday
        for digest in ("daily", "weekly", "daily", "weekly"):
            notices.queue_digest(
                log, MAIL.model_copy(update={"digest": digest}), "2024-05-13T00:00:00.000Z"
            )
    assert keys(log) == ["digest-2024-05-06", "digest-week-2024-05-06"]


def test_a_week_that_an_older_version_told_is_not_told_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = logbook.versions()[:1]
    with monkeypatch.context() as older:
        older.setattr(logbook, "versions", lambda: first)
        log = logbook.connect(tmp_path / "old.sqlite", make=True)
        with logbook.writing(log):
            logbook.insert(log, "runs", RUN)
            add_image(log, logged="2024-05-06T10:00:00.000Z")
            for number, subject in enumerate(
                ("digest of 2024-05-06 to 2024-05-12", "digest of 2024-05-07")
            ):
                notice = {"key": f"digest-2024-05-0{6 + number}", "channel": "mail", "text": "t"}
                logbook.insert(
                    log,
                    "notices",
                    notice | {"subject": f"blobpipe: {subject}, 1 images", "created": "2024"},
                )
        log.close()
    log = logbook.connect(tmp_path / "old.sqlite")
    with logbook.writing(log):
        notices.queue_digest(
            log, MAIL.model_copy(update={"digest": "weekly"}), "2024-05-13T00:00:00.000Z"
        )
    assert keys(log) == ["digest-week-2024-05-06", "digest-2024-05-07"]


# --- the outbox ------------------------------------------------------------------------------------------------------


class Clock:
    """The log's clock, put forward by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead_s = 0.0
        real = logbook.now
        monkeypatch.setattr(logbook, "now", lambda later_s=0.0: real(later_s + self.ahead_s))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def box() -> Mailbox:
    return Mailbox()


@pytest.fixture
def hook() -> Hook:
    return Hook()


@pytest.fixture
def post_office(box: Mailbox, hook: Hook) -> Iterator[tuple[Notices, dict[str, str]]]:
    """Settings and environment for a mail server and a webhook that run."""
    with MailServer(box) as mail, HookServer(hook) as web:
        more = {
            "smtp_port": mail.port,
            "security": "none",
            "timeout_s": 3.0,
            "page_url": "http://127.0.0.1:8000/",
        }
        yield BOTH.model_copy(update=more), {delivery.WEBHOOK: web.url}


PostOffice = tuple[Notices, dict[str, str]]


def queue_candidates(log: sqlite3.Connection, count: int = 1, params: Notices = BOTH) -> None:
    for _ in range(count):
        with logbook.writing(log):
            image = add_image(log)
            add_sighting(log, image, add_candidate(log, image))
            notices.queue(log, image, params)


def states(log: sqlite3.Connection, channel: str) -> list[str]:
    return [
        row["state"]
        for row in log.execute(
            "SELECT state FROM notices WHERE channel = ? ORDER BY id", (channel,)
        )
    ]


def waits_s(log: sqlite3.Connection, channel: str) -> float:
    """How long the first notice of a channel still waits."""
    row = log.execute(
        "SELECT next_attempt FROM notices WHERE channel = ? ORDER BY id", (channel,)
    ).fetchone()
    return (
        datetime.fromisoformat(row["next_attempt"]) - datetime.fromisoformat(logbook.now())
    ).total_seconds()


def ids(box: Mailbox) -> list[str]:
    return [letter["Message-ID"] for letter in box.tried]


def test_what_is_queued_is_sent_once_with_pictures_and_numbers(
    log: sqlite3.Connection, post_office: PostOffice, box: Mailbox, hook: Hook
) -> None:
    params, environ = post_office
    queue_candidates(log, 2)
    assert notices.send(log, params, environ) == 4
    assert notices.send(log, params, environ) == 0
    assert [letter["Subject"] for letter in box.taken] == [
        letter["text"].splitlines()[0] for letter in hook.taken
    ]
    first = box.taken[0]
    body = first.get_body(("plain",))
    assert body is not None
    for line in (
        "depth: 2.31 +- 0.12 % of the light",
        "S/N: 14.20",
        "http://127.0.0.1:8000/candidate/1",
    ):
        assert line in body.get_content().splitlines()
        assert line in hook.taken[0]["text"].splitlines()
    pictures = {part.get_filename(): part.get_content() for part in first.iter_attachments()}
    assert pictures == {"candidate-1-difference.png": b"difference", "candidate-1-map.png": b"map"}
    assert len(set(ids(box))) == 2
    assert [f"<{letter['id']}@example.org>" for letter in hook.taken] == ids(box)
    row = log.execute("SELECT * FROM notices").fetchone()
    assert (row["state"], row["attempts"], row["error"]) == ("sent", 1, "")


def test_another_log_has_other_ids(tmp_path: Path, post_office: PostOffice, box: Mailbox) -> None:
    params, environ = post_office
    for name in ("one", "two"):
        log = logbook.connect(tmp_path / name / "log.sqlite", make=True)
        with logbook.writing(log):
            logbook.insert(log, "runs", RUN)
        queue_candidates(log)
        notices.send(log, params, environ)
    assert len(set(ids(box))) == 2


def test_a_failure_is_tried_again_after_longer_and_longer_waits_under_one_id(
    log: sqlite3.Connection, post_office: PostOffice, box: Mailbox, hook: Hook, clock: Clock
) -> None:
    params, environ = post_office
    params = params.model_copy(update={"first_wait_s": 10.0, "longest_wait_s": 25.0})
    box.answers, hook.answers = ["451 busy", "close", "421 bye"], [500, "close", 404]
    queue_candidates(log)
    for wait_s in (10, 20, 25):
        assert notices.send(log, params, environ) == 0
        for channel in ("mail", "webhook"):
            assert wait_s - 2 < waits_s(log, channel) <= wait_s
        clock.ahead_s += wait_s - 3
        assert notices.send(log, params, environ) == 0  # not yet
        clock.ahead_s += 4
    assert notices.send(log, params, environ) == 2
    assert len(box.tried) == len(hook.tried) == 4
    assert len(set(ids(box))) == len({letter["id"] for letter in hook.tried}) == 1
    assert len(box.taken) == len(hook.taken) == 1
    assert [row["attempts"] for row in log.execute("SELECT attempts FROM notices")] == [4, 4]


def test_a_clock_that_was_ahead_for_a_while_holds_no_notice_back(
    log: sqlite3.Connection, post_office: PostOffice, hook: Hook, clock: Clock
) -> None:
    params, environ = post_office
    hook.answers = [500]
    queue_candidates(log)
    clock.ahead_s = 300 * 86_400.0
    assert notices.send(log, params, environ) == 1  # the mail; the webhook is to be tried again
    clock.ahead_s = 0.0
    assert notices.send(log, params, environ) == 1
    assert states(log, "webhook") == ["sent"]


def test_what_a_server_asks_for_is_waited_for(
    log: sqlite3.Connection, post_office: PostOffice, hook: Hook
) -> None:
    params, environ = post_office
    hook.answers = [(429, {"Retry-After": "300"})]
    queue_candidates(log)
    assert notices.send(log, params, environ) == 1
    assert 290 < waits_s(log, "webhook") <= 300
    assert (
        "429 Too Many Requests"
        in log.execute("SELECT error FROM notices WHERE id = 2").fetchone()["error"]
    )


def test_a_lasting_refusal_is_given_up_and_the_next_goes_out(
    log: sqlite3.Connection, post_office: PostOffice, box: Mailbox, hook: Hook
) -> None:
    params, environ = post_office
    box.answers, hook.answers = ["554 looks like spam"], [413]
    queue_candidates(log, 2)
    assert notices.send(log, params, environ) == 2
    assert states(log, "mail") == states(log, "webhook") == ["given_up", "sent"]
    assert notices.waiting(log) == []
    assert notices.again(log) == 2
    assert notices.send(log, params, environ) == 2
    assert (len(set(ids(box))), len(box.tried), len(box.taken)) == (2, 3, 2)


def test_it_is_given_up_after_so_many_attempts(
    log: sqlite3.Connection, post_office: PostOffice, box: Mailbox, clock: Clock
) -> None:
    params, environ = post_office
    params = params.model_copy(update={"attempts": 3, "webhook": False})
    box.answers = ["451 busy"] * 9
    queue_candidates(log, params=params)
    for state in ("waiting", "waiting", "given_up", "given_up"):
        notices.send(log, params, environ)
        clock.ahead_s += 10_000
        assert states(log, "mail") == [state]
    assert len(box.tried) == 3


def test_a_dead_channel_does_not_hold_up_the_other_and_none_overtakes(
    log: sqlite3.Connection, post_office: PostOffice, box: Mailbox, hook: Hook, clock: Clock
) -> None:
    params, environ = post_office
    hook.answers = [500]
    queue_candidates(log, 3)
    assert notices.send(log, params, environ) == 3
    assert (states(log, "mail"), states(log, "webhook")) == (["sent"] * 3, ["waiting"] * 3)
    assert len(hook.tried) == 1  # the others wait behind it
    clock.ahead_s += 61
    assert notices.send(log, params, environ) == 3
    assert [letter["blocks"][1]["text"]["text"].split()[1] for letter in hook.taken] == [
        "1,",
        "2,",
        "3,",
    ]


def test_a_refused_recipient_is_in_the_log(
    log: sqlite3.Connection, post_office: PostOffice, box: Mailbox
) -> None:
    params, environ = post_office
    params = params.model_copy(update={"mail_to": ("team@example.org", "gone@example.org")})
    box.refused = {"gone@example.org": ["550 no such user"]}
    queue_candidates(log)
    notices.send(log, params, environ)
    row = log.execute("SELECT state, error FROM notices").fetchone()
    assert tuple(row) == ("sent", "refused for gone@example.org: 550 no such user")


def test_a_setting_that_is_missing_costs_no_attempt(
    log: sqlite3.Connection, post_office: PostOffice, hook: Hook, caplog: pytest.LogCaptureFixture
) -> None:
    params, environ = post_office
    queue_candidates(log)
    assert notices.send(log, params, {}) == 1  # the mail
    assert tuple(log.execute("SELECT state, attempts FROM notices WHERE id = 2").fetchone()) == (
        "waiting",
        0,
    )
    assert (
        "BLOBPIPE_WEBHOOK_URL is not set; set it where blobpipe is started; notices wait"
        in caplog.text
    )
    assert notices.send(log, params, environ) == 1


def test_what_was_accepted_is_committed_before_the_farewell(
    log: sqlite3.Connection, tmp_path: Path, post_office: PostOffice, box: Mailbox
) -> None:
    params, environ = post_office
    params = params.model_copy(update={"timeout_s": 1.5})
    seen = []

    def look() -> None:
        seen.append(states(logbook.connect(tmp_path / "log.sqlite"), "mail"))
        time.sleep(2.0)  # longer than anybody has patience

    box.on_quit = look
    queue_candidates(log)
    assert notices.send(log, params, environ) == 2
    assert seen == [["sent"]]


def test_a_server_that_takes_it_without_a_word_gets_it_again_under_the_same_id(
    log: sqlite3.Connection, post_office: PostOffice, box: Mailbox, hook: Hook, clock: Clock
) -> None:
    params, environ = post_office
    box.answers, hook.answers = ["deaf"], ["deaf"]
    queue_candidates(log)
    assert notices.send(log, params, environ) == 0
    clock.ahead_s += 61
    assert notices.send(log, params, environ) == 2
    assert (len(box.taken), len(set(ids(box)))) == (2, 1)
    assert (len(hook.taken), len({letter["id"] for letter in hook.taken})) == (2, 1)


def test_none_is_lost_none_comes_twice_and_none_overtakes_whatever_servers_do(
    log: sqlite3.Connection, post_office: PostOffice, box: Mailbox, hook: Hook, clock: Clock
) -> None:
    params, environ = post_office
    params = params.model_copy(
        update={"first_wait_s": 1.0, "longest_wait_s": 5.0, "timeout_s": 0.2, "attempts": 1000}
    )
    rng = np.random.default_rng(5)
    box.answers = list(rng.choice(["250 taken", "451 busy", "421 bye", "close", "535 login"], 25))
    hook.answers = [int(code) for code in rng.choice([200, 429, 500, 404, 302], 25)]
    box.answers[3], hook.answers[3] = "hang", "hang"
    queue_candidates(log, 12)
    for _ in range(100):
        notices.send(log, params, environ)
        clock.ahead_s += 5
        if not notices.waiting(log):
            break
    assert states(log, "mail") == states(log, "webhook") == ["sent"] * 12
    assert len(box.tried) > 20
    assert [letter["Subject"] for letter in box.taken] == [
        letter["text"].splitlines()[0] for letter in hook.taken
    ]
    order = [letter["blocks"][1]["text"]["text"].split(",")[0] for letter in hook.taken]
    assert order == [f"Candidate {number}" for number in range(1, 13)]
    assert len({letter["Message-ID"] for letter in box.taken}) == 12


def test_secrets_are_neither_in_the_log_nor_in_what_is_said(
    log: sqlite3.Connection,
    tmp_path: Path,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("mail.log").setLevel(logging.CRITICAL)  # the server's own
    paths = certificate(tmp_path / "tls", "localhost")
    monkeypatch.setenv("SSL_CERT_FILE", str(paths[0]))
    user = "r0b0t-user"
    password = "pa55-w0rd"
    words = f"{password} of {user} is bad"
    box = Mailbox(
        login=(user, "other"), login_answer=f"535 {words}", answers=[f"451 {words}", f"554 {words}"]
    )
    hook = Hook(
        answers=[500, (302, {"Location": f"http://127.0.0.1:9/{SECRET}"}), "close", 410, 400]
    )
    queue_candidates(log)
    with MailServer(box, tls_context=server_context(paths)) as mail, HookServer(hook) as web:
        more = {"smtp_port": mail.port, "timeout_s": 2.0}
        params = BOTH.model_copy(update=more)
        environ = {delivery.WEBHOOK: web.url, delivery.USER: user, delivery.PASSWORD: password}
        for attempt in range(6):
            box.login = (user, password) if attempt else box.login
            notices.send(log, params, environ)
            clock.ahead_s += 10_000
        assert len(hook.tried) == 5
        assert len(box.tried) == 2
        hook.answers = [500]
        with pytest.raises(NoticeError) as caught:
            notices.send_test(params.model_copy(update={"mail_to": ()}), environ)
    assert states(log, "mail") == states(log, "webhook") == ["given_up"]
    log.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    said = caplog.text + str(caught.value) + "".join(log.iterdump())
    on_disk = b"".join(path.read_bytes() for path in tmp_path.glob("log*"))
    assert "refused the login (535)" in caplog.text
    for secret in (SECRET, password, user):
        assert secret not in said
        assert secret.encode() not in on_disk


@pytest.mark.parametrize(
    "fault", [RuntimeError, UnicodeError, ValueError, KeyError, MemoryError, OSError]
)
def test_whatever_goes_wrong_with_a_notice_is_that_notices_failure(
    log: sqlite3.Connection,
    post_office: PostOffice,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: type[Exception],
) -> None:
    def broken(*_: object) -> str:
        raise fault(f"something with {SECRET}")

    params, environ = post_office
    monkeypatch.setitem(delivery.BY, "mail", broken)
    queue_candidates(log)
    assert notices.send(log, params, environ) == 1  # the webhook's
    row = log.execute(
        "SELECT state, attempts, error FROM notices WHERE channel = 'mail'"
    ).fetchone()
    assert tuple(row) == ("waiting", 1, fault.__name__)
    assert waits_s(log, "mail") > 50
    assert SECRET not in caplog.text


def test_a_login_that_is_not_utf_8_costs_no_attempt_and_ends_nothing(
    log: sqlite3.Connection, post_office: PostOffice, caplog: pytest.LogCaptureFixture
) -> None:
    params, environ = post_office
    queue_candidates(log)
    wrong = {
        delivery.USER: "robot",
        delivery.PASSWORD: b"s\xfcss".decode("utf-8", "surrogateescape"),
    }
    assert notices.send(log, params, environ | wrong) == 1
    assert states(log, "mail") == ["waiting"]
    assert "BLOBPIPE_SMTP_PASSWORD: found bytes that are not UTF-8" in caplog.text


def test_a_lock_that_cannot_be_had_leaves_notices_waiting(
    log: sqlite3.Connection,
    post_office: PostOffice,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    params, environ = post_office
    (tmp_path / "log.sending").mkdir()
    queue_candidates(log)
    assert notices.send(log, params, environ) == 0
    assert "log.sending: Is a directory; notices wait" in caplog.text
    (tmp_path / "log.sending").rmdir()
    assert notices.send(log, params, environ) == 2


def test_a_test_notice_goes_past_the_outbox(
    post_office: PostOffice, box: Mailbox, hook: Hook
) -> None:
    params, environ = post_office
    assert notices.send_test(params, environ) == ["mail", "webhook"]
    assert box.taken[0]["Subject"] == hook.taken[0]["text"].splitlines()[0] == "blobpipe: test"
    box.answers = ["550 no"]
    with pytest.raises(
        NoticeError, match="mail: the test notice was not accepted: localhost answered 550 no"
    ):
        notices.send_test(params, environ)
    with pytest.raises(NoticeError, match="no channel for notices: set mail_to"):
        notices.send_test(Notices())


# --- several processes, and killed ones ------------------------------------------------------------------------------


@pytest.fixture
def sender(
    tmp_path: Path, post_office: PostOffice
) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts ``blobpipe notify`` on the log."""
    params, environ = post_office
    (tmp_path / "params.yaml").write_text(to_yaml(Params().model_copy(update={"notices": params})))
    started = []

    def start() -> subprocess.Popen[str]:
        command = (sys.executable, "-m", "blobpipe", "notify", "--log", "log.sqlite")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(
            command, cwd=tmp_path, env={**os.environ, **environ}, text=True, **pipes
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_two_processes_that_send_at_once_send_each_notice_once(
    log: sqlite3.Connection, sender: Callable[[], subprocess.Popen[str]], box: Mailbox, hook: Hook
) -> None:
    box.on_letter = lambda: time.sleep(0.1)
    queue_candidates(log, 10)
    both = [sender(), sender()]
    assert [process.wait(300) for process in both] == [0, 0]
    assert states(log, "mail") == states(log, "webhook") == ["sent"] * 10
    assert len(box.tried) == len(set(ids(box))) == 10
    assert len(hook.tried) == len({letter["id"] for letter in hook.tried}) == 10


@pytest.mark.parametrize("accepted", [False, True])
def test_a_sender_that_is_killed_while_the_server_reads_sends_again_under_the_same_id(
    log: sqlite3.Connection,
    sender: Callable[[], subprocess.Popen[str]],
    box: Mailbox,
    accepted: bool,
) -> None:
    read = threading.Event()
    dead = threading.Event()
    box.answers = ["250 taken" if accepted else "451 not now"]

    def hold() -> None:
        read.set()
        dead.wait(300)

    box.on_letter = hold
    queue_candidates(log)
    first = sender()
    assert read.wait(300)
    os.kill(first.pid, signal.SIGKILL)
    first.wait(300)
    assert states(log, "mail") == ["waiting"]
    dead.set()
    assert sender().wait(300) == 0
    assert states(log, "mail") == states(log, "webhook") == ["sent"]
    assert (len(box.tried), len(set(ids(box)))) == (2, 1)
    assert len(box.taken) == 1 + accepted  # the server knows by the id that it has had it
