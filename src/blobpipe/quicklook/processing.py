"""From a new file to the log: each image is searched once and written in one transaction.

A fault of one image rejects that image alone.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from pathlib import Path
from typing import Any

from tqdm import tqdm

from blobpipe.core import files
from blobpipe.errors import FrameError, printable
from blobpipe.monitor import health, logbook, notices, thumbnails
from blobpipe.monitor.inbox import Inbox, Stamp, path_of, path_text
from blobpipe.quicklook import running_stack
from blobpipe.quicklook.arrivals import (
    Arrival,
    is_unchanged,
    locked_for,
    new_files,
    read_arrival,
    was_never_searched,
)
from blobpipe.quicklook.findings import log_findings
from blobpipe.quicklook.options import Run
from blobpipe.quicklook.search import (
    WAITS,
    ImageResult,
    describe_internal,
    is_internal,
    search,
)
from blobpipe.quicklook.versions import supersede

log = logging.getLogger(__name__)


def process(inbox: Inbox, run: Run) -> int:
    """Log the new images of the folder; return their number."""
    connection = run.connection
    connection.require_file()
    arrivals = _arrivals(inbox, run)
    if len(arrivals) > 1:
        log.info("%d new files in %s", len(arrivals), inbox.folder)
    size = run.params.difference.stack_size
    passed_over = logbook.count_passed_over(connection, size)
    logged = 0
    waiting: list[str] = []
    bar = tqdm(arrivals, "quicklook", unit="image", disable=None if arrivals else True)
    for number, arrival in enumerate(bar, 1):
        with locked_for(arrival, connection, last=True):
            image = _log_arrival(arrival, inbox, run)
            if image is not None:
                inbox.know(arrival.file)
                logged += 1

        # Images that only make the first stack share a line, before that of the next
        is_waiting = image is not None and image["outcome"] == "stack" and WAITS in image["reason"]
        if image is not None and is_waiting:
            waiting.append(image["name"])
        if not is_waiting or len(waiting) == size:
            _say_waiting(waiting)
            waiting = []
        if image is not None and not is_waiting:
            place = f"[{number}/{len(arrivals)}] " if len(arrivals) > 1 else ""
            said = logbook.describe_image(connection, image["id"])
            log.info("%s%s: %s", place, image["name"], said)
        notices.send(connection, run.params.notices)
    _say_waiting(waiting)

    # Those of earlier runs have been told of
    more = logbook.count_passed_over(connection, size)
    if more > passed_over:
        say_passed_over(more)
    return logged


def say_passed_over(number: int) -> None:
    """Say how many images wait for a stack that could be made: what landed in them is in the next stacks, and never told."""
    log.info(
        "%s kept for stacks alone, although enough images precede by now: to search all such, run once with --again",
        logbook.counted(number, "image"),
    )


def _arrivals(inbox: Inbox, run: Run) -> list[Arrival]:
    """Return the new files that are complete, in order of date."""
    arrivals = []
    for file in new_files(inbox, run.connection, run.options.again):
        if not inbox.unsettled_s(file):
            arrival = read_arrival(file, inbox, run.connection, run.instrument)
            if arrival is not None:
                arrivals.append(arrival)
    return sorted(arrivals, key=lambda arrival: (arrival.mjd, arrival.path.name))


def _say_waiting(names: list[str]) -> None:
    """Say in one line which images wait for the first stack."""
    if not names:
        return
    named = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
    log.info("%s kept for the first stack: %s", logbook.counted(len(names), "image"), named)


def _log_arrival(arrival: Arrival, inbox: Inbox, run: Run) -> sqlite3.Row | None:
    """Search a file and log it; return its row of ``images``, or None if it was no new image."""
    connection = run.connection
    image = connection.execute(
        "SELECT id, outcome FROM images WHERE sha256 = ?", (arrival.sha256,)
    ).fetchone()

    # Known bytes: another process was faster, the file has another name, or its times have changed
    again = run.options.again and image is not None and was_never_searched(connection, image["id"])
    if image is not None and not again:
        _log_known(arrival, image["id"], connection)
        return None

    # A failure that may pass, of the disk or the memory, must not reject the image
    result = None
    failure = ""
    try:
        result = search(arrival, run)
    except (FrameError, MemoryError) as error:
        failure = str(error) or "not enough memory"
    if not is_unchanged(arrival):
        log.info(
            "%s: moved or changed meanwhile; it will be read next time",
            printable(str(arrival.path)),
        )
        return None
    if result is None:
        inbox.leave(arrival.file, failure)
        return None

    # Searched once more, it may still lack a stack: then the log stays as it is
    if image is not None and result.row["outcome"] == image["outcome"] == "stack":
        _log_known(arrival, image["id"], connection)
        inbox.know(arrival.file)
        return None

    # A bug in what follows from the search rejects the image, so that the run can continue
    try:
        _keep_pixels(arrival.sha256, result, run)
        _log_result(arrival, result, run)
    except Exception as error:
        if not is_internal(error):
            raise
        reason = describe_internal(error)
        result = ImageResult(result.row | {"outcome": "rejected", "reason": reason})
        _log_result(arrival, result, run)
    for why in result.rejected.values():
        log.info("rejected from now on: %s", why)
    running_stack.prune(connection, run.cache, run.params.difference.stack_size)
    _prune_pixels(connection, run.options.log_path)

    logged: sqlite3.Row = connection.execute(
        "SELECT id, name, outcome, reason FROM images WHERE sha256 = ?", (arrival.sha256,)
    ).fetchone()
    return logged


def _log_known(arrival: Arrival, image: int, connection: logbook.Log) -> None:
    """Note where a file lies whose bytes the log has."""
    with logbook.writing(connection):
        outcome = _duplicate_or_renamed(connection, arrival, image)
        _log_file(connection, arrival, image, outcome)


def _log_result(arrival: Arrival, result: ImageResult, run: Run) -> None:
    """Write everything that follows from an image, in one transaction."""
    connection = run.connection
    row = result.row
    changed = connection.execute(
        "SELECT 1 FROM files WHERE path = ?", (path_text(arrival.path),)
    ).fetchone()
    with logbook.writing(connection):
        # The first image that is searched sets the size of all
        if row["outcome"] == "searched" and running_stack.size_of(connection) is None:
            running_stack.reject_other_sizes(connection, (row["ny_px"], row["nx_px"]))

        image = _log_image(connection, row)
        _log_file(connection, arrival, image, "changed" if changed else "logged")
        supersede(connection, image)
        log_findings(image, result, run)
        blobs = result.deep.health if result.deep is not None else None
        health.log_readings(connection, image, run.params.health, blobs)
        notices.queue(connection, image, run.params.notices)


def _keep_pixels(sha256: str, result: ImageResult, run: Run) -> None:
    """Write the difference and the network's map beside the log, where the pages read them."""
    if result.pictures is None:
        return
    drawn = result.pictures
    step = thumbnails.step_of(drawn.noise_frac)
    for plane, image, step_of_plane in (
        ("difference", drawn.difference, step),
        ("map", drawn.response, thumbnails.MAP_STEP),
    ):
        path = thumbnails.pixels_path(run.options.log_path, sha256, plane)
        with files.atomic(path) as temporary:
            temporary.write_bytes(thumbnails.pack(image, step_of_plane))


def _prune_pixels(connection: sqlite3.Connection, log_path: Path) -> None:
    """Remove the pixels of all images but the newest, so that what is kept depends on the log alone."""
    newest = connection.execute(
        "SELECT sha256 FROM images WHERE outcome = 'searched' ORDER BY mjd DESC, id DESC LIMIT ?",
        (thumbnails.KEPT,),
    )
    kept = {row["sha256"] for row in newest}
    folder = thumbnails.pixels_folder(log_path)
    for path in running_stack.own_files(connection, folder, ".difference", ".map"):
        # the temporary files of a killed run have other stems
        if path.stem not in kept:
            path.unlink(missing_ok=True)


def _log_image(connection: sqlite3.Connection, row: dict[str, Any]) -> int:
    """Add an image, or replace what was logged of the same bytes without a search; return its id."""
    earlier = connection.execute(
        "SELECT id FROM images WHERE sha256 = ?", (row["sha256"],)
    ).fetchone()
    if earlier is None:
        return logbook.insert(connection, "images", row)
    # Its health readings are computed again
    connection.execute("DELETE FROM health WHERE image = ?", (earlier["id"],))
    logbook.update(connection, "images", earlier["id"], row)
    return int(earlier["id"])


def _log_file(connection: sqlite3.Connection, arrival: Arrival, image: int, outcome: str) -> None:
    """Add a file, or update the stamp of one that is listed with the same bytes."""
    row = {
        "path": path_text(arrival.path),
        "sha256": arrival.sha256,
        **arrival.stamp._asdict(),
        "seen": logbook.now(),
        "outcome": outcome,
        "image": image,
    }
    columns = ", ".join(row)
    marks = ", ".join("?" * len(row))
    stamp = ", ".join(f"{name} = excluded.{name}" for name in Stamp._fields)
    connection.execute(
        f"INSERT INTO files ({columns}) VALUES ({marks}) "
        f"ON CONFLICT (path, sha256) DO UPDATE SET {stamp}",
        list(row.values()),
    )


def _duplicate_or_renamed(connection: sqlite3.Connection, arrival: Arrival, image: int) -> str:
    """Return ``duplicate`` if the same bytes are still there under another name, else ``renamed``."""
    path = path_text(arrival.path)
    earlier = connection.execute(
        "SELECT path FROM files WHERE image = ? AND path != ?", (image, path)
    )
    exists = any(os.access(path_of(row["path"]), os.F_OK) for row in earlier)
    return "duplicate" if exists else "renamed"
