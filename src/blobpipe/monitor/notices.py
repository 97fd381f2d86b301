"""Queue notices of what the daily routine found in an outbox in the log, and send them.

A notice is written to the outbox in the transaction that logs its subject, and is sent afterwards: neither a killed
process nor a dead server loses one. One process sends at a time, oldest first. A notice that a server has accepted is
marked as sent at once; a process that is killed between the two sends it again, under the same Message-ID or
Idempotency-Key.
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

from blobpipe.core.dates import format_mjd
from blobpipe.errors import NoticeError
from blobpipe.monitor import delivery, health, logbook
from blobpipe.monitor.delivery import DeliveryError, Letter
from blobpipe.params import Notices

log = logging.getLogger(__name__)

PICTURES = ("difference", "map")  # kinds of pictures that a letter carries
MOST_DOUBLINGS = 64  # exponent of the waiting time beyond which a float would overflow


def channels(params: Notices) -> list[str]:
    """Return the channels that the settings use."""
    return ["mail"] * bool(params.mail_to) + ["webhook"] * params.webhook


# ------------------------------------------------------------------------------------------------- what is queued


def queue(connection: sqlite3.Connection, image_id: int, params: Notices) -> None:
    """Write the notices that an image makes due to the outbox, once for every channel.

    Due are: each candidate that the image is the first or the second to show, or whose depths told with it that it stays
    (unless the latest review rejected it), each reading of `health` that crossed its limit with the image, and the
    digest of the last day or week before it. Call it within the transaction that logs the image, after `health.log_readings`.

    Parameters
    ----------
    image_id : int
        Row of the image in ``images``.
    """
    image = connection.execute("SELECT * FROM images WHERE id = ?", (image_id,)).fetchone()
    queue_digest(connection, params, image["logged"])

    # candidates that were seen more often have been announced
    candidates = connection.execute(
        "SELECT l.*, c.stays_image, "
        "(SELECT count(*) FROM depths s JOIN images i ON i.id = s.image WHERE s.candidate = l.id "
        "AND i.outcome != 'rejected' AND i.superseded_by IS NULL) AS n_depths, "
        # one whose depths tell that it landed before is new to people all the same
        "CASE WHEN d.id IS NOT NULL AND l.sightings = 1 THEN 'new' ELSE 'seen_again' END AS told "
        "FROM candidate_list l JOIN candidates c ON c.id = l.id "
        "LEFT JOIN detections d ON d.candidate = l.id AND d.image = ? WHERE l.decision != 'rejected' "
        "AND (d.id IS NOT NULL AND (l.sightings = 1 "
        # what the latest images show together is announced once
        "OR l.status = 'seen_again' AND l.sightings = 2 AND l.n_images = 1) OR c.stays_image = ?) ORDER BY l.id",
        (image_id, image_id),
    ).fetchall()
    for candidate in candidates:
        _put(connection, params, **_candidate_notice(candidate, image))

    crossings = connection.execute(
        "SELECT * FROM health WHERE image = ? AND since = image ORDER BY what", (image_id,)
    ).fetchall()
    for row in crossings:
        _put(connection, params, **_health_notice(row, image))


def queue_digest(connection: sqlite3.Connection, params: Notices, now: str) -> None:
    """Write the digest of the latest complete day or week on which images were logged, once.

    Parameters
    ----------
    now : str
        The day or week of this time (ISO 8601) is not complete yet.
    """
    if params.digest == "none":
        return

    # the last image that was logged before the current day or week
    today = datetime.fromisoformat(now).astimezone(UTC).date()
    begun = _first_day(today, params.digest).isoformat()
    query = "SELECT max(logged) FROM images WHERE logged < ?"
    last = connection.execute(query, (begun,)).fetchone()[0]
    if last is None:
        return

    first = _first_day(date.fromisoformat(last[:10]), params.digest)
    _put(connection, params, **_digest_notice(connection, first, params.digest))


def _put(connection: sqlite3.Connection, params: Notices, **notice: Any) -> None:
    """Write a notice to the outbox for every channel, unless it is there already."""
    for channel in channels(params):
        row = {**notice, "channel": channel, "created": logbook.now()}
        columns = ", ".join(row)
        marks = ", ".join("?" * len(row))
        connection.execute(
            f"INSERT INTO notices ({columns}) VALUES ({marks}) ON CONFLICT (key, channel) DO NOTHING",
            list(row.values()),
        )


def _candidate_notice(candidate: sqlite3.Row, image: sqlite3.Row) -> dict[str, Any]:
    """Return the columns of a notice about a candidate that an image shows."""
    # what was measured, in words
    status = candidate["told"]
    title = "new blob" if status == "new" else "blob seen again"
    depth = _number(candidate["depth_frac"], None, "%", 100)
    depth_of_light = _number(
        candidate["depth_frac"], candidate["depth_err_frac"], "% of the light", 100
    )
    radius = _number(candidate["radius_px"], candidate["radius_err_px"], "px")
    snr = _number(candidate["snr"])
    stays = [
        f"its depths on {candidate['n_depths']} images together show that it landed and stayed; it has no second sighting"
    ]
    lines = [
        f"Candidate {candidate['id']}, {status.replace('_', ' ')} with the image {_one_line(image['name'])}",
        "",
        f"usual place: x = {candidate['x_px']:.1f}, y = {candidate['y_px']:.1f} px (0-based, the image's shift taken off)",
        f"radius: {radius}",
        f"depth: {depth_of_light}",
        f"S/N: {snr}",
        f"probability of a blob: {candidate['probability']:.3f}",
        f"first image: {_one_line(candidate['first_frame'])}, MJD {candidate['first_mjd'] or 0:.3f}",
        f"images that show it: {candidate['sightings']}",
        *(stays if candidate["stays_image"] == image["id"] else []),
        *_landing_lines(candidate),
        f"model: {candidate['model_sha256'][:12]}",
    ]
    # the subject says where and how strong, so that a mailbox can be scanned by eye
    place = f"x {candidate['x_px']:.0f}, y {candidate['y_px']:.0f}"
    return {
        "key": f"candidate-{candidate['id']}-{status}",
        "image": image["id"],
        "candidate": candidate["id"],
        "subject": f"blobpipe: {title} at {place}, depth {depth}, S/N {snr}",
        "text": "\n".join(lines),
    }


def _landing_lines(candidate: sqlite3.Row) -> list[str]:
    """Say in how many images together a candidate was found, and when it landed, as far as that is known."""
    lines = []
    if candidate["n_images"] > 1:
        lines.append(f"found in the mean of the latest {candidate['n_images']} images")
    if candidate["history"] == "landed":
        after, before = (format_mjd(candidate[name]) for name in ("after_mjd", "before_mjd"))
        step = _number(candidate["step_frac"], candidate["step_err_frac"], "% of the light", 100)
        lines.append(f"landed between {after} and {before} (90 %), step {step}")
    return lines


def _number(
    value: float | None, error: float | None = None, unit: str = "", factor: float = 1.0
) -> str:
    """Write a measured value with its standard error, both times a factor, and its unit."""
    if value is None:
        return "not measured"
    plus_minus = "" if error is None else f" +- {factor * error:.2f}"
    return f"{factor * value:.2f}{plus_minus} {unit}".rstrip()


def _health_notice(row: sqlite3.Row, image: sqlite3.Row) -> dict[str, Any]:
    """Return the columns of a notice about a reading that crossed its limit."""
    label = health.MONITORS[row["what"]].label
    crossed_with = f"Crossed with image {_one_line(image['name'])}."
    return {
        "key": f"health-{row['what']}-{image['id']}",
        "image": image["id"],
        "subject": f"blobpipe: {label} beyond its limit",
        "text": f"{health.describe(row)}\n\n{crossed_with} No further notice is sent until it has returned within its limit.",
    }


def _first_day(day: date, digest: str) -> date:
    """Return the first day of the period of a digest: the day itself, or the Monday of its week."""
    return day if digest == "daily" else day - timedelta(days=day.weekday())


def _digest_notice(connection: sqlite3.Connection, first: date, digest: str) -> dict[str, Any]:
    """Return the columns of the digest of the day or week that begins on ``first``."""
    # what was logged in the period
    end = first + timedelta(days=1 if digest == "daily" else 7)
    span = (first.isoformat(), end.isoformat())
    images = connection.execute(
        "SELECT * FROM images WHERE logged >= ? AND logged < ? ORDER BY id", span
    ).fetchall()
    found = dict(
        connection.execute(
            f"SELECT {logbook.STATUS_TOLD} AS told, count(*) FROM detections d JOIN images i ON i.id = d.image "
            "WHERE i.logged >= ? AND i.logged < ? GROUP BY told",
            span,
        )
    )

    n_searched = sum(image["outcome"] == "searched" for image in images)
    # an older version of an exposure is not reported as rejected
    rejected = [
        image
        for image in images
        if image["outcome"] == "rejected" and image["superseded_by"] is None
    ]

    # one line for each fact
    counts = ", ".join(
        f"{found[status]} {word}"
        for status, word in logbook.STATUS_WORDS.items()
        if status in found
    )
    readings = health.current_warnings(connection) or ["all readings within their limits"]
    lines = [
        f"images: {len(images)}, searched {n_searched}",
        *(
            f"rejected: {_one_line(image['name'])}: {_one_line(image['reason'])}"
            for image in rejected
        ),
        f"detections: {counts or 'none'}",
        *_nearly_found(connection, span),
        *(f"health: {reading}" for reading in readings),
    ]

    # the key of a week differs from that of the day on which it begins
    key = f"digest-{first}" if digest == "daily" else f"digest-week-{first}"
    last = end - timedelta(days=1)
    period = first.isoformat() if digest == "daily" else f"{first} to {last}"
    return {
        "key": key,
        "subject": f"blobpipe: digest of {period}, {len(images)} images, {len(rejected)} rejected",
        "text": "\n".join(lines),
    }


def _nearly_found(connection: sqlite3.Connection, span: tuple[str, str]) -> list[str]:
    """Return a line for each place that the newest image of a time shows just below the threshold, with those before."""
    rows = connection.execute(
        "SELECT x_px, y_px, n_images, snr FROM nearly_found WHERE image = (SELECT id FROM images "
        "WHERE logged >= ? AND logged < ? AND outcome = 'searched' AND superseded_by IS NULL ORDER BY mjd DESC, id DESC LIMIT 1) "
        "ORDER BY snr DESC",
        span,
    ).fetchall()
    return [
        f"nearly found: x {row['x_px']:.1f}, y {row['y_px']:.1f} px, S/N {row['snr']:.1f} in the mean of the latest "
        f"{row['n_images']} images"
        for row in rows
    ]


def _one_line(text: str) -> str:
    """Replace every run of white space, line ends included, by one blank."""
    return " ".join(text.split())


# ------------------------------------------------------------------------------------------------------- sending


def send(
    connection: sqlite3.Connection, params: Notices, environ: Mapping[str, str] = os.environ
) -> int:
    """Send the notices that are due, oldest first, and return how many were accepted.

    Nothing is sent while another process does so. A failure is no error: the notice waits for ``first_wait_s``, then
    for twice that, and so on, and later notices of its channel wait behind it. A notice that its server refuses for
    good, or that has failed ``attempts`` times, is given up.

    Parameters
    ----------
    environ : mapping
        BLOBPIPE_SMTP_USER and BLOBPIPE_SMTP_PASSWORD, if the mail server wants a login; BLOBPIPE_WEBHOOK_URL.
    """
    due = [channel for channel in channels(params) if _next_due(connection, channel, params)]
    if not due:
        return 0
    with _sole_sender(connection) as alone:
        if not alone:
            return 0
        return sum(_send_channel(connection, channel, params, environ) for channel in due)


def send_test(params: Notices, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Send a test notice on every channel without the outbox, and return the channels.

    Raises
    ------
    NoticeError
        If there is no channel, or one does not accept the notice.
    """
    if not channels(params):
        raise NoticeError(
            "no channel for notices: set mail_to, or webhook: true, in the section notices of params.yaml"
        )
    now = logbook.now()
    letter = Letter(
        id=_digested(now),
        subject="blobpipe: test",
        text="A test: notices of new blobs will look like this.",
        created=now,
    )
    for channel in channels(params):
        with ExitStack() as afterwards:
            try:
                delivery.BY[channel](letter, params, environ, afterwards)
            except DeliveryError as failure:
                # no chain of errors: it could hold a secret
                raise NoticeError(
                    f"{channel}: the test notice was not accepted: {failure}"
                ) from None
    return channels(params)


def waiting(connection: sqlite3.Connection) -> list[sqlite3.Row]:
    """Return the notices that are still to be sent, oldest first."""
    query = "SELECT * FROM notices WHERE state = 'waiting' ORDER BY id"
    return connection.execute(query).fetchall()


def again(connection: sqlite3.Connection) -> int:
    """Put the notices that were given up back into the outbox, at their old place, and return how many."""
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
    """Yield whether no other process sends from this log, and keep others from it meanwhile.

    The system frees the lock of a process that is killed.
    """
    database = connection.execute("PRAGMA database_list").fetchone()["file"]
    path = Path(database).with_suffix(".sending")
    with ExitStack() as until_sent:
        try:
            lock = until_sent.enter_context(path.open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except BlockingIOError:
            alone = False
        except OSError as error:
            _warn_once(f"{path}: {error.strerror}; notices wait")
            alone = False
        yield alone


def _next_due(connection: sqlite3.Connection, channel: str, params: Notices) -> sqlite3.Row | None:
    """Return the oldest waiting notice of a channel if its time has come: none overtakes another."""
    row: sqlite3.Row | None = connection.execute(
        "SELECT * FROM notices WHERE channel = ? AND state = 'waiting' ORDER BY id LIMIT 1",
        (channel,),
    ).fetchone()
    if row is None:
        return None

    # a time beyond the longest wait is of a clock that was wrong
    waits = logbook.now() < (row["next_attempt"] or "") <= logbook.now(params.longest_wait_s)
    return None if waits else row


def _send_channel(
    connection: sqlite3.Connection, channel: str, params: Notices, environ: Mapping[str, str]
) -> int:
    """Send what is due on one channel and return how many notices were accepted."""
    sent = 0
    while notice := _next_due(connection, channel, params):
        letter = _letter(connection, notice, params)
        with ExitStack() as afterwards:
            try:
                remark = delivery.BY[channel](letter, params, environ, afterwards)
            except NoticeError as error:
                # the settings are at fault: every other notice would fail as well
                log.warning("blobpipe: %s; notices wait", error)
                break
            except DeliveryError as failure:
                _keep_failure(connection, notice, failure, params)
            except Exception as error:
                # a bug must not end the search; only its type is kept, as its words could hold a secret
                _keep_failure(connection, notice, DeliveryError(type(error).__name__), params)
            else:
                # committed before anything else happens, such as saying goodbye to the server
                with logbook.writing(connection):
                    connection.execute(
                        "UPDATE notices SET state = 'sent', sent = ?, attempts = attempts + 1, error = ? WHERE id = ?",
                        (logbook.now(), remark, notice["id"]),
                    )
                sent += 1
    return sent


def _letter(connection: sqlite3.Connection, notice: sqlite3.Row, params: Notices) -> Letter:
    """Make the letter of a notice: its text, a link to its page, and the pictures of its candidate."""
    # the page of the candidate or the image, if the notice has one and the server's address is known
    link = params.page_url
    if params.page_url and notice["image"]:
        page = f"image/{notice['image']}"
        if notice["candidate"]:
            page = f"candidate/{notice['candidate']}"
        link = f"{params.page_url.rstrip('/')}/{page}"

    # the same at every attempt and different for every log
    identity = connection.execute("SELECT id FROM identity").fetchone()["id"]
    return Letter(
        id=_digested(f"{identity} {notice['key']}"),
        subject=notice["subject"],
        text=notice["text"],
        created=notice["created"],
        link=link,
        pictures=_pictures(connection, notice),
        attempt=notice["attempts"] + 1,
    )


def _digested(text: str) -> str:
    """Return 32 hexadecimal digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _pictures(connection: sqlite3.Connection, notice: sqlite3.Row) -> tuple[tuple[str, bytes], ...]:
    """Return file names and bytes of the latest pictures of a candidate, up to the notice's image."""
    rows = connection.execute(
        "SELECT kind, type, bytes FROM pictures WHERE detection = (SELECT p.detection FROM pictures p "
        "JOIN detections d ON d.id = p.detection WHERE d.candidate = ? AND d.image <= ? ORDER BY d.id DESC LIMIT 1) "
        "ORDER BY id",
        (notice["candidate"], notice["image"]),
    ).fetchall()
    pictures = []
    for row in rows:
        if row["kind"] in PICTURES:
            suffix = row["type"].removeprefix("image/")
            name = f"candidate-{notice['candidate']}-{row['kind']}.{suffix}"
            pictures.append((name, row["bytes"]))
    return tuple(pictures)


def _keep_failure(
    connection: sqlite3.Connection, notice: sqlite3.Row, failure: DeliveryError, params: Notices
) -> None:
    """Note a failed attempt: when the next one is due, or that the notice is given up."""
    attempts = notice["attempts"] + 1
    given_up = failure.lasting or attempts >= params.attempts
    state = "given_up" if given_up else "waiting"

    # twice as long after each failure, or as long as the server asks
    doublings = min(attempts - 1, MOST_DOUBLINGS)
    wait_s = max(params.first_wait_s * 2.0**doublings, failure.wait_s)
    wait_s = min(wait_s, params.longest_wait_s)

    with logbook.writing(connection):
        connection.execute(
            "UPDATE notices SET state = ?, attempts = ?, next_attempt = ?, error = ? WHERE id = ?",
            (state, attempts, logbook.now(wait_s), str(failure), notice["id"]),
        )
    outcome = "given up" if given_up else f"next attempt in {wait_s:.0f} s"
    log.warning(
        "blobpipe: notice %s by %s: %s (%s)", notice["key"], notice["channel"], failure, outcome
    )
