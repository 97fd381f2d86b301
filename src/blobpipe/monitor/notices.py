"""Notices of what the daily routine found: an outbox in the log, and its emptying.

A notice is written into the outbox in the transaction that logs what it tells of, and sent afterwards: neither a kill
nor a dead server loses one. One process sends at a time, oldest first. What a server has accepted is committed at once;
a kill in the moment between sends the notice again, under the same Message-ID or Idempotency-Key.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, date, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

from blobpipe.errors import NoticeError
from blobpipe.monitor import delivery, health, logbook
from blobpipe.monitor.delivery import DeliveryError, Letter
from blobpipe.params import Notices

log = logging.getLogger(__name__)

PICTURES = ("difference", "map")


def channels(params: Notices) -> list[str]:
    """Where notices go."""
    return ["mail"] * bool(params.mail_to) + ["webhook"] * params.webhook


def queue(connection: sqlite3.Connection, image_id: int, params: Notices) -> None:
    """Write the notices that an image makes due into the outbox, each for every channel, and never twice.

    They are: each candidate that it is the first to show, each that it is the second to show (unless the latest review
    rejected it), each reading of `health` that crossed its limit with it, and the digest of the day or week that ended before
    it. To be called within the transaction that logs the image, after `health.crossed`.

    Parameters
    ----------
    image_id : int
        The image's row in ``images``.
    """
    image = connection.execute("SELECT * FROM images WHERE id = ?", (image_id,)).fetchone()
    queue_digest(connection, params, image["logged"])
    for candidate in _candidates_to_tell(connection, image_id):
        _put(connection, params, **_about_candidate(candidate, image))
    for row in connection.execute(
        "SELECT * FROM health WHERE image = ? AND since = image ORDER BY what", (image_id,)
    ):
        _put(connection, params, **_about_health(row, image))


def queue_digest(connection: sqlite3.Connection, params: Notices, now: str) -> None:
    """Write the digest of the latest day or week, over before ``now``, on which images were logged; never twice."""
    if params.digest == "none":
        return
    today = datetime.fromisoformat(now).astimezone(UTC).date()
    last = connection.execute(
        "SELECT max(logged) FROM images WHERE logged < ?",
        (_first_day(today, params.digest).isoformat(),),
    ).fetchone()[0]
    if last is not None:
        first = _first_day(date.fromisoformat(last[:10]), params.digest)
        _put(connection, params, **_digest(connection, first, params.digest))


def _put(connection: sqlite3.Connection, params: Notices, **notice: Any) -> None:
    for channel in channels(params):
        row = {**notice, "channel": channel, "created": logbook.now()}
        marks = ", ".join("?" * len(row))
        connection.execute(
            f"INSERT INTO notices ({', '.join(row)}) VALUES ({marks}) ON CONFLICT (key, channel) DO NOTHING",
            list(row.values()),
        )


def _candidates_to_tell(connection: sqlite3.Connection, image: int) -> list[sqlite3.Row]:
    """Candidates seen on an image for the first time, or for the second; older ones have been told."""
    return connection.execute(
        "SELECT l.* FROM candidate_list l JOIN detections d ON d.candidate = l.id AND d.image = ? "
        "WHERE l.decision != 'rejected' "
        "AND (l.status = 'new' AND l.sightings = 1 OR l.status = 'seen_again' AND l.sightings = 2) ORDER BY l.id",
        (image,),
    ).fetchall()


def _about_candidate(candidate: sqlite3.Row, image: sqlite3.Row) -> dict[str, Any]:
    place = f"x {candidate['x_px']:.0f}, y {candidate['y_px']:.0f}"
    depth = _number(candidate["depth_frac"], None, "%", 100)
    lines = [
        f"Candidate {candidate['id']}, {candidate['status'].replace('_', ' ')} with the image {_one_line(image['name'])}",
        "",
        f"place: x = {candidate['x_px']:.1f}, y = {candidate['y_px']:.1f} px (0-based)",
        f"radius: {_number(candidate['radius_px'], candidate['radius_err_px'], 'px')}",
        f"depth: {_number(candidate['depth_frac'], candidate['depth_err_frac'], '% of the light', 100)}",
        f"S/N: {_number(candidate['snr'])}",
        f"probability of a blob: {candidate['probability']:.3f}",
        f"first image: {_one_line(candidate['first_frame'])}, MJD {candidate['first_mjd'] or 0:.3f}",
        f"images that show it: {candidate['sightings']}",
        f"model: {candidate['model_sha256'][:12]}",
    ]
    title = {"new": "new blob", "seen_again": "blob seen again"}[candidate["status"]]
    return {
        "key": f"candidate-{candidate['id']}-{candidate['status']}",
        "image": image["id"],
        "candidate": candidate["id"],
        "subject": f"blobpipe: {title} at {place}, depth {depth}, S/N {_number(candidate['snr'])}",
        "text": "\n".join(lines),
    }


def _number(
    value: float | None, error: float | None = None, unit: str = "", factor: float = 1.0
) -> str:
    if value is None:
        return "not measured"
    plus_minus = "" if error is None else f" +- {factor * error:.2f}"
    return f"{factor * value:.2f}{plus_minus} {unit}".rstrip()


def _about_health(row: sqlite3.Row, image: sqlite3.Row) -> dict[str, Any]:
    name = _one_line(image["name"])
    return {
        "key": f"health-{row['what']}-{image['id']}",
        "image": image["id"],
        "subject": f"blobpipe: {health.MONITORS[row['what']].label} beyond its limit",
        "text": f"{health.line(row)}\n\nCrossed with the image {name}. It is told once, until it has come back.",
    }


def _first_day(day: date, digest: str) -> date:
    return day if digest == "daily" else day - timedelta(days=day.weekday())


def _digest(connection: sqlite3.Connection, first: date, digest: str) -> dict[str, Any]:
    end = first + timedelta(days=1 if digest == "daily" else 7)
    span = (first.isoformat(), end.isoformat())
    images = connection.execute(
        "SELECT * FROM images WHERE logged >= ? AND logged < ? ORDER BY id", span
    ).fetchall()
    found = connection.execute(
        "SELECT d.status, count(*) FROM detections d JOIN images i ON i.id = d.image "
        "WHERE i.logged >= ? AND i.logged < ? GROUP BY d.status ORDER BY d.status",
        span,
    ).fetchall()
    rejected = [
        image
        for image in images
        if image["outcome"] == "rejected" and image["superseded_by"] is None
    ]
    period = first.isoformat() if digest == "daily" else f"{first} to {end - timedelta(days=1)}"
    lines = [
        f"images: {len(images)}, searched {sum(image['outcome'] == 'searched' for image in images)}",
        *(
            f"rejected: {_one_line(image['name'])}: {_one_line(image['reason'])}"
            for image in rejected
        ),
        "detections: " + (", ".join(f"{count} {status}" for status, count in found) or "none"),
        *(
            f"health: {line}"
            for line in health.standing(connection) or ["all readings within their limits"]
        ),
    ]
    return {
        # a week begins on a day
        "key": f"digest-{first}" if digest == "daily" else f"digest-week-{first}",
        "subject": f"blobpipe: digest of {period}, {len(images)} images, {len(rejected)} rejected",
        "text": "\n".join(lines),
    }


def _one_line(text: str) -> str:
    return " ".join(text.split())


def send(
    connection: sqlite3.Connection, params: Notices, environ: Mapping[str, str] = os.environ
) -> int:
    """Send what is due, oldest first, unless another process does so; how many notices were accepted.

    A failure is no error: the notice waits for first_wait_s, then for twice that, and so on, and those of its channel
    wait behind it. A notice that its server refuses for good, or that has failed ``attempts`` times, is given up.

    Parameters
    ----------
    environ : mapping
        BLOBPIPE_SMTP_USER and BLOBPIPE_SMTP_PASSWORD, if the mail server wants a login; BLOBPIPE_WEBHOOK_URL.
    """
    due = [channel for channel in channels(params) if _next_due(connection, channel)]
    if not due:
        return 0
    with _sole_sender(connection) as alone:
        return (
            sum(_send_channel(connection, channel, params, environ) for channel in due)
            if alone
            else 0
        )


def send_test(params: Notices, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Send a test notice on every channel, past the outbox; the channels that accepted it.

    Raises
    ------
    NoticeError
        If there is no channel, or one does not accept it.
    """
    if not channels(params):
        raise NoticeError(
            "no channel for notices: set mail_to, or webhook: true, in the section notices of params.yaml"
        )
    now = logbook.now()
    letter = Letter(
        _digested(now), "blobpipe: test", "A test: notices of new blobs will come like this.", now
    )
    for channel in channels(params):
        with ExitStack() as afterwards:
            try:
                delivery.BY[channel](letter, params, environ, afterwards)
            except DeliveryError as failure:
                raise NoticeError(
                    f"{channel}: the test notice was not accepted: {failure}"
                ) from None
    return channels(params)


def waiting(connection: sqlite3.Connection) -> list[sqlite3.Row]:
    """What is in the outbox and has not been given up, oldest first."""
    return connection.execute(
        "SELECT * FROM notices WHERE state = 'waiting' ORDER BY id"
    ).fetchall()


def again(connection: sqlite3.Connection) -> int:
    """Put what was given up back into the outbox, at its old place; how many notices."""
    with logbook.writing(connection):
        return connection.execute(
            "UPDATE notices SET state = 'waiting', attempts = 0, next_attempt = NULL WHERE state = 'given_up'"
        ).rowcount


@cache
def _warn_once(line: str) -> None:
    """Log a warning that would otherwise be repeated with each image."""
    log.warning("blobpipe: %s", line)


@contextmanager
def _sole_sender(connection: sqlite3.Connection) -> Iterator[bool]:
    """Whether no other process sends from this log; the system frees the lock of one that is killed."""
    path = Path(connection.execute("PRAGMA database_list").fetchone()["file"]).with_suffix(
        ".sending"
    )
    with ExitStack() as until_sent:
        try:
            fcntl.flock(until_sent.enter_context(path.open("w")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except BlockingIOError:
            alone = False
        except OSError as error:
            _warn_once(f"{path}: {error.strerror}; notices wait")
            alone = False
        yield alone


def _next_due(connection: sqlite3.Connection, channel: str) -> sqlite3.Row | None:
    """The oldest that waits, if its time has come: none overtakes another."""
    row: sqlite3.Row | None = connection.execute(
        "SELECT * FROM notices WHERE channel = ? AND state = 'waiting' ORDER BY id LIMIT 1",
        (channel,),
    ).fetchone()
    return row if row and (row["next_attempt"] or "") <= logbook.now() else None


def _send_channel(
    connection: sqlite3.Connection, channel: str, params: Notices, environ: Mapping[str, str]
) -> int:
    sent = 0
    while notice := _next_due(connection, channel):
        letter = _letter(connection, notice, params)
        with ExitStack() as afterwards:
            try:
                remark = delivery.BY[channel](letter, params, environ, afterwards)
            except NoticeError as error:
                log.warning("blobpipe: %s; notices wait", error)
                break
            except DeliveryError as failure:
                _keep_failure(connection, notice, failure, params)
            except Exception as error:  # a fault of ours: it must not end the search, and its words could hold a secret
                _keep_failure(connection, notice, DeliveryError(type(error).__name__), params)
            else:
                # before anything else, a farewell to the server included
                _keep_success(connection, notice, remark)
                sent += 1
    return sent


def _letter(connection: sqlite3.Connection, notice: sqlite3.Row, params: Notices) -> Letter:
    identity = connection.execute("SELECT id FROM identity").fetchone()["id"]
    page = f"candidate/{notice['candidate']}" if notice["candidate"] else f"image/{notice['image']}"
    return Letter(
        id=_digested(f"{identity} {notice['key']}"),
        subject=notice["subject"],
        text=notice["text"],
        created=notice["created"],
        link=f"{params.page_url.rstrip('/')}/{page}"
        if params.page_url and notice["image"]
        else params.page_url,
        pictures=_pictures(connection, notice),
        attempt=notice["attempts"] + 1,
    )


def _digested(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _pictures(connection: sqlite3.Connection, notice: sqlite3.Row) -> tuple[tuple[str, bytes], ...]:
    """File names and bytes of the latest pictures of a candidate, up to the notice's image."""
    rows = connection.execute(
        "SELECT kind, type, bytes FROM pictures WHERE detection = (SELECT p.detection FROM pictures p "
        "JOIN detections d ON d.id = p.detection WHERE d.candidate = ? AND d.image <= ? ORDER BY d.id DESC LIMIT 1) "
        "ORDER BY id",
        (notice["candidate"], notice["image"]),
    ).fetchall()
    return tuple(
        (
            f"candidate-{notice['candidate']}-{row['kind']}.{row['type'].removeprefix('image/')}",
            row["bytes"],
        )
        for row in rows
        if row["kind"] in PICTURES
    )


def _keep_success(connection: sqlite3.Connection, notice: sqlite3.Row, remark: str) -> None:
    with logbook.writing(connection):
        connection.execute(
            "UPDATE notices SET state = 'sent', sent = ?, attempts = attempts + 1, error = ? WHERE id = ?",
            (logbook.now(), remark, notice["id"]),
        )


def _keep_failure(
    connection: sqlite3.Connection, notice: sqlite3.Row, failure: DeliveryError, params: Notices
) -> None:
    attempts = notice["attempts"] + 1
    state = "given_up" if failure.lasting or attempts >= params.attempts else "waiting"
    wait_s = min(
        max(params.first_wait_s * 2.0 ** min(attempts - 1, 64), failure.wait_s),
        params.longest_wait_s,
    )
    with logbook.writing(connection):
        connection.execute(
            "UPDATE notices SET state = ?, attempts = ?, next_attempt = ?, error = ? WHERE id = ?",
            (state, attempts, logbook.now(wait_s), str(failure), notice["id"]),
        )
    fate = "given up" if state == "given_up" else f"next attempt in {wait_s:.0f} s"
    log.warning(
        "blobpipe: notice %s by %s: %s (%s)", notice["key"], notice["channel"], failure, fate
    )
