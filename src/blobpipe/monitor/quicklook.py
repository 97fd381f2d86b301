"""Search, log and announce every new image of a folder, each exactly once (ISR 6).

All that an image leads to is one transaction of the log, and the same inputs lead to the same rows: whatever moment a
run ends at, the next one goes on as if nothing had happened. Several runs may share a log; one at a time works.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import numpy.typing as npt
import pandas as pd
from tqdm import tqdm

from blobpipe import __version__
from blobpipe.core import files, fits_images, tables
from blobpipe.core.arrays import Image
from blobpipe.core.dates import (
    EXPOSURE_CARDS,
    SAME_EXPOSURE_D,
    Exposure,
    exposure_mjd,
    is_older_version,
    is_same_exposure,
)
from blobpipe.detection.detectors import DenseDetector, load_dense_detector
from blobpipe.detection.fit import DETECTION_COLUMNS
from blobpipe.detection.match import NEAR_PX, pair
from blobpipe.detection.search import find_blobs, subframe_scores
from blobpipe.errors import (
    BlobpipeError,
    FrameError,
    LogError,
    ModelError,
    internal_fault,
    printable,
)
from blobpipe.images import tiles
from blobpipe.images.clip import clip_image
from blobpipe.images.difference import KEPT_CARDS as DIFFERENCE_CARDS
from blobpipe.images.difference import subtract
from blobpipe.images.noise import image_noise, require_noise, require_noise_of_rms_map
from blobpipe.images.register import NO_SHIFT, Shift
from blobpipe.images.scale import scale_image
from blobpipe.images.template import Template, make_template
from blobpipe.monitor import health, logbook, notices, running_stack, thumbnails
from blobpipe.monitor.inbox import File, Inbox, Stamp, path_of, path_text
from blobpipe.networks import dense, kernels, model_file
from blobpipe.params import Params

log = logging.getLogger(__name__)

KEPT_CARDS = (*dict.fromkeys((*DIFFERENCE_CARDS, "EXPTIME", "PROPOSID", "BUNIT", *EXPOSURE_CARDS)),)
# photon level of the airglow (electrons per pixel), where the image's maker wrote it
LEVEL_CARD = "LEVEL_E"
PLACE_COLUMNS = ("x_px", "y_px", "radius_px")
PAUSE_S = 1.0  # between two looks at a watched folder at most
REHEARSAL_S = 120.0  # in which a process of its own must have read a file
# astropy's own, and seeking where damaged sizes lead
NO_FAULT_OF_THE_MEDIUM = (None, errno.EINVAL, errno.EOVERFLOW)
# somebody's wish, not what a file does to its reader
NO_FAULT = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Routine:
    """The settings and files with which all images of a run are searched."""

    log_path: Path
    model: Path
    params: Params
    catalogue: Path | None = None
    reference: Path | None = None
    difference: bool = False
    again: bool = False  # search rejected images once more

    @property
    def cache(self) -> Path:
        """Folder of the images that the next stack takes."""
        return self.log_path.with_name("stack")


class Tools(NamedTuple):
    """The open log, and model and catalogue of a run, read."""

    connection: logbook.Log
    run: int
    detector: DenseDetector
    known: pd.DataFrame | None


class Blobs(NamedTuple):
    """Blobs that are known before an image is searched.

    Attributes
    ----------
    known : DataFrame
        x_px, y_px, radius_px of the catalogue's, and of those that the log has found since.
    landed : DataFrame
        The same of what the log has found, ``first``: date (MJD) of the image that showed it first; in order of date.
    """

    known: pd.DataFrame
    landed: pd.DataFrame


class Arrival(NamedTuple):
    """A file that the log does not know as it is now."""

    path: Path
    sha256: str
    stamp: Stamp
    # of the exposure, for the order of the search; what cannot be read comes last
    mjd: float = np.inf
    shape: tuple[int, ...] = ()  # none: it could not be read
    fatal: str = ""  # what became of a process of its own that read it, if it did not live

    @property
    def file(self) -> File:
        """As it lies in the folder."""
        return File(self.path, self.stamp)


@dataclass(frozen=True)
class Searched:
    """An image after the search.

    Attributes
    ----------
    row : dict
        Columns of ``images``.
    table : DataFrame
        Candidates above `operating_point.CANDIDATE`, judged, with their probability; none for an image that was not searched.
    subframes : list of dict
        Columns of ``subframes``.
    overview : bytes
        Picture of the whole image; empty if it was not searched.
    draw : callable
        Pictures of one row of ``table``, by kind.
    corrections : dict of bytes
        By SHA-256, of images that a stack has taken for the first time, this one among them (`running_stack.correction`).
    rejected : dict of str
        By SHA-256, why images of the log cannot be in a stack after all.
    """

    row: dict[str, Any]
    table: pd.DataFrame
    subframes: list[dict[str, Any]]
    overview: bytes
    draw: Callable[[dict[str, Any]], dict[str, bytes]]
    corrections: dict[str, bytes] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)


def quicklook(folder: Path, routine: Routine) -> int:
    """Process every image of a folder that the log does not have yet, in order of date.

    Parameters
    ----------
    folder : path
        Blob images, or ready differences; other files are left alone.
    routine : Routine

    Returns
    -------
    int
        Images logged.

    Raises
    ------
    FrameError, ModelError, TableError, LogError
        If the folder, the model, the catalogue or the log cannot be used. A bad image is logged as rejected instead.
    """
    _insist_on_folder(folder)
    inbox = Inbox(folder, routine.params.quicklook.settle_s)
    inbox.look()  # files unchanged once the model is loaded wait less
    with _tools(routine, inbox) as tools:
        new = _unknown(inbox, tools.connection, routine.again)
        time.sleep(max((inbox.unsettled_s(file) for file in new), default=0.0))
        logged = _process(inbox, tools, routine)
        for file in _unknown(inbox, tools.connection):
            if inbox.unsettled_s(file):
                log.info(
                    "%s: still being written; left for the next look", printable(str(file.path))
                )
        notices.send(tools.connection, routine.params.notices)
        return logged


def watch(folder: Path, routine: Routine) -> None:
    """Process images as they appear, until interrupted.

    The folder is also looked through every second, so that an event that never came (as on network drives) costs a
    moment and not an image.

    Raises
    ------
    LogError
        If the log is moved, deleted or replaced meanwhile.
    """
    _insist_on_folder(folder)
    pause_s = min(PAUSE_S, max(routine.params.quicklook.settle_s, 0.05))
    inbox = Inbox(folder, routine.params.quicklook.settle_s)
    with _tools(routine, inbox) as tools:
        log.info("watching %s; Ctrl-C ends it", folder)
        for _ in _ticks(folder, pause_s):
            _process(inbox, tools, routine)
            notices.send(tools.connection, routine.params.notices)


def _ticks(folder: Path, pause_s: float) -> Iterator[None]:
    """Wait until something happens in a folder, but not for long, again and again."""
    from watchfiles import watch as changes

    while True:
        try:
            for _ in changes(
                folder,
                rust_timeout=int(1000 * pause_s),
                yield_on_timeout=True,
                debounce=50,
                recursive=False,
            ):
                yield
        except (
            RuntimeError,
            OSError,
            UnicodeError,
        ):  # a name that is no UTF-8, or too many watches: we look anyway
            time.sleep(pause_s)
            yield


def _insist_on_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FrameError(
            f"{folder}: not found, expected a folder of images; make it or correct the name"
        )


@contextmanager
def _tools(routine: Routine, inbox: Inbox) -> Iterator[Tools]:
    """Open what the options name, then the log: a slip must not leave a trace there."""
    if model_file.kind_of_model(routine.model) != "dense":
        raise ModelError(
            f"{routine.model}: the report's network, expected the dense one, which measures; name its file"
        )
    detector = load_dense_detector(routine.model)
    known = None
    if routine.catalogue is not None:
        known = tables.read_known(routine.catalogue, PLACE_COLUMNS)
    reference = None if routine.reference is None else running_stack.read_stack(routine.reference)
    kernels.set_threads(routine.params.detect.threads)
    connection = logbook.connect(routine.log_path, make=True)
    try:
        if reference is not None:
            _insist_on_size(reference, connection, inbox, routine.reference)
        log.info("model: %s", model_file.described(routine.model))
        with logbook.writing(connection):
            run = logbook.insert(connection, "runs", _run_row(routine, detector))
        with _lock(connection):  # what a run that was killed has left in the cache
            running_stack.prune(connection, routine.cache, routine.params.difference.stack_size)
        yield Tools(connection, run, detector, known)
        with logbook.writing(connection):
            connection.execute("UPDATE runs SET ended = ? WHERE id = ?", (logbook.now(), run))
    except LogError:
        # a log that was moved without its -wal file is whole at its new place
        with suppress(sqlite3.Error):
            connection.execute("PRAGMA wal_checkpoint")
        raise
    finally:
        connection.close()


def _insist_on_size(
    reference: running_stack.Stack, connection: logbook.Log, inbox: Inbox, path: Path | None
) -> None:
    """Refuse a stack that fits neither the images of the log nor, before the first of them, one that lies there."""
    size = running_stack.size_of(connection)
    lying = [] if size else [_read(file, inbox, connection) for file in _unknown(inbox, connection)]
    found = (
        [size]
        if size
        else [arrival.shape for arrival in lying if arrival is not None and arrival.shape]
    )
    if found and reference.data.shape not in found:
        (stack_ny, stack_nx) = reference.data.shape
        (ny, nx) = found[0]
        raise FrameError(
            f"{path}: found {stack_nx}x{stack_ny} pixels, expected {nx}x{ny} as the images; name their stack"
        )


def _run_row(routine: Routine, detector: DenseDetector) -> dict[str, Any]:
    return {
        "started": logbook.now(),
        "version": __version__,
        "model": str(routine.model),
        "model_sha256": files.sha256(routine.model),
        "params_sha256": hashlib.sha256(routine.params.model_dump_json().encode()).hexdigest(),
        "catalogue_sha256": files.sha256(routine.catalogue) if routine.catalogue else "",
        "threshold": detector.threshold,
    }


def _process(inbox: Inbox, tools: Tools, routine: Routine) -> int:
    """Log what is new in the folder; return how many images that were."""
    tools.connection.require_file()
    whole = [
        file
        for file in _unknown(inbox, tools.connection, routine.again)
        if not inbox.unsettled_s(file)
    ]
    arrivals = [
        arrival for file in whole if (arrival := _read(file, inbox, tools.connection)) is not None
    ]
    dated = sorted(arrivals, key=lambda arrival: (arrival.mjd, arrival.path.name))
    logged = 0
    for arrival in tqdm(dated, "quicklook", unit="image", disable=None if dated else True):
        with _one_at_a_time(arrival, tools.connection, last=True):
            if _log_arrival(arrival, inbox, tools, routine):
                inbox.know(arrival.file)
                logged += 1
        notices.send(tools.connection, routine.params.notices)
    return logged


def _unknown(inbox: Inbox, connection: logbook.Log, again: bool = False) -> list[File]:
    """List the files of the folder that the log does not know as they are now."""
    unknown = []
    for file in inbox.look():
        row = connection.execute(
            "SELECT outcome FROM images WHERE id = (SELECT image FROM files WHERE path = ? AND size_bytes = ? "
            "AND modified_ns = ? AND changed_ns = ? AND inode = ?)",
            (path_text(file.path), *file.stamp),
        ).fetchone()
        if row and not (again and row["outcome"] == "rejected"):
            inbox.know(file)
        else:
            unknown.append(file)
    return unknown


def _read(file: File, inbox: Inbox, connection: logbook.Log) -> Arrival | None:
    """Read a file's hash, date and size; None if it is still being written or cannot be read."""
    try:
        sha256 = files.sha256(file.path)
        after = Stamp.of(file.path.stat())
    except FileNotFoundError:
        return None
    except OSError as error:
        inbox.leave(file, f"{error.strerror}; make it readable or move it elsewhere")
        return None
    if after != file.stamp:
        log.info("%s: still being written; left for the next look", printable(str(file.path)))
        return None
    arrival = Arrival(file.path, sha256, file.stamp)
    with _one_at_a_time(arrival, connection, last=False) as suspect:
        return _dated(arrival, suspect)


def _dated(arrival: Arrival, suspect: bool) -> Arrival:
    """Add date and size; a file at which a process ended is first read by another process."""
    fatal = _rehearsed(arrival.path) if suspect else ""
    if fatal:
        return arrival._replace(fatal=fatal)
    with suppress(Exception):  # whatever is wrong will be said when it is searched
        frame = fits_images.read_frame(arrival.path)
        arrival = arrival._replace(shape=frame.data.shape)
        arrival = arrival._replace(mjd=exposure_mjd(frame, arrival.path))
    return arrival


def _rehearsed(path: Path) -> str:
    """Have another process read a suspect file; return what became of it, empty if it lives."""
    read = "import sys; from blobpipe.images import check; check.describe(sys.argv[1])"
    try:
        ended = subprocess.run(
            (sys.executable, "-c", read, path), capture_output=True, timeout=REHEARSAL_S
        )
    except subprocess.TimeoutExpired:
        return f"takes longer than {REHEARSAL_S:.0f} s"
    if ended.returncode >= 0 or -ended.returncode in NO_FAULT:
        return ""
    return f"ends the process that reads it ({signal.Signals(-ended.returncode).name})"


@contextmanager
def _lock(connection: logbook.Log) -> Iterator[TextIO]:
    """Wait until no other process works on an image of this log; the system frees the lock of one that is killed."""
    connection.require_file()  # its folder may be gone
    with open(connection.path.with_suffix(".lock"), "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


@contextmanager
def _one_at_a_time(arrival: Arrival, connection: logbook.Log, *, last: bool) -> Iterator[bool]:
    """Wait for other processes; yield whether one has ended while it was at this image.

    The file that is locked holds the hashes of the images that were begun and did not come to the last step. The system
    keeps what a process that is killed has written there.
    """
    with _lock(connection) as lock:
        lock.seek(0)
        unfinished = set(lock.read().split())
        lock.write(f"{arrival.sha256}\n")
        lock.flush()
        yield arrival.sha256 in unfinished
        lock.truncate(0)
        left = unfinished - {arrival.sha256} if last else unfinished
        lock.writelines(f"{sha256}\n" for sha256 in sorted(left))


def _log_arrival(arrival: Arrival, inbox: Inbox, tools: Tools, routine: Routine) -> bool:
    """Bring a file into the log; return whether it was a new image."""
    connection = tools.connection
    image = connection.execute(
        "SELECT id, outcome FROM images WHERE sha256 = ?", (arrival.sha256,)
    ).fetchone()
    again = routine.again and image is not None and image["outcome"] == "rejected"
    # another process, another name, or the time of the file has changed
    if image is not None and not again:
        with logbook.writing(connection):
            _log_file(connection, arrival, image["id"], _known_as(connection, arrival, image["id"]))
        return False
    try:
        searched = search(arrival, tools, routine)
    except (
        FrameError,
        MemoryError,
    ) as error:  # no fault of the image, but of where it lies, or of the moment
        searched = None
        passing = str(error) or "not enough memory"
    if not _as_it_was(arrival):
        log.info(
            "%s: moved or changed meanwhile; left for the next look", printable(str(arrival.path))
        )
        return False
    if searched is None:
        inbox.leave(arrival.file, passing)
        return False
    try:
        _log_searched(arrival, searched, tools, routine)
    except Exception as error:
        if not _is_internal(error):
            raise
        searched = _not_searched(
            searched.row | {"outcome": "rejected", "reason": _internal_fault(error)}
        )
        _log_searched(arrival, searched, tools, routine)
    running_stack.prune(connection, routine.cache, routine.params.difference.stack_size)
    row = searched.row
    log.info(
        "%s: %s%s", row["name"], row["outcome"], f" ({row['reason']})" if row["reason"] else ""
    )
    return True


def _log_searched(arrival: Arrival, searched: Searched, tools: Tools, routine: Routine) -> None:
    """Write all that an image leads to, in one transaction."""
    connection = tools.connection
    changed = connection.execute(
        "SELECT 1 FROM files WHERE path = ?", (path_text(arrival.path),)
    ).fetchone()
    with logbook.writing(connection):
        if searched.row["outcome"] == "searched" and running_stack.size_of(connection) is None:
            running_stack.reject_other_sizes(
                connection, (searched.row["ny_px"], searched.row["nx_px"])
            )
        number = _log_image(connection, searched.row)
        _log_file(connection, arrival, number, "changed" if changed else "logged")
        _supersede(connection, number)
        _log_findings(connection, number, searched, tools, routine.params)
        health.log_readings(connection, number, routine.params.health)
        notices.queue(connection, number, routine.params.notices)


def _log_image(connection: sqlite3.Connection, row: dict[str, Any]) -> int:
    """Add an image, or replace its rejection by what came of it now; return its id."""
    rejected = connection.execute(
        "SELECT id FROM images WHERE sha256 = ?", (row["sha256"],)
    ).fetchone()
    if rejected is None:
        return logbook.insert(connection, "images", row)
    connection.execute("DELETE FROM health WHERE image = ?", (rejected["id"],))  # read anew
    logbook.update(connection, "images", rejected["id"], row)
    return int(rejected["id"])


def _is_internal(error: Exception) -> bool:
    """Return whether an error is a bug of this program, not of disk, log or machine."""
    outer = (BlobpipeError, OSError, MemoryError, sqlite3.OperationalError)
    # the latter: a damaged log
    return not isinstance(error, outer) and type(error) is not sqlite3.DatabaseError


def _internal_fault(error: Exception) -> str:
    log.debug("internal fault", exc_info=error)
    return internal_fault(error)


def _as_it_was(arrival: Arrival) -> bool:
    """Return whether a file is still what was hashed."""
    try:
        return Stamp.of(arrival.path.stat()) == arrival.stamp
    except OSError:
        return False


def _known_as(connection: sqlite3.Connection, arrival: Arrival, image: int) -> str:
    """Return whether the bytes are there under another name too, or have been moved."""
    path = path_text(arrival.path)
    earlier = connection.execute(
        "SELECT path FROM files WHERE image = ? AND path != ?", (image, path)
    )
    return (
        "duplicate"
        if any(os.access(path_of(row["path"]), os.F_OK) for row in earlier)
        else "renamed"
    )


def _log_file(connection: sqlite3.Connection, arrival: Arrival, image: int, outcome: str) -> None:
    row = {"path": path_text(arrival.path), "sha256": arrival.sha256, **arrival.stamp._asdict()}
    row |= {"seen": logbook.now(), "outcome": outcome, "image": image}
    connection.execute(
        f"INSERT INTO files ({', '.join(row)}) VALUES ({', '.join('?' * len(row))}) ON CONFLICT (path, sha256) DO UPDATE "
        f"SET {', '.join(f'{name} = excluded.{name}' for name in Stamp._fields)}",
        list(row.values()),
    )


def search(arrival: Arrival, tools: Tools, routine: Routine) -> Searched:
    """Search an image; nothing is written but the cache of the stack."""
    row: dict[str, Any] = {
        "run": tools.run,
        "sha256": arrival.sha256,
        "name": fits_images.frame_name(arrival.path),
        "kind": "difference" if routine.difference else "image",
        "logged": logbook.now(),
        "outcome": "rejected",
        "reason": "",
    }
    if arrival.fatal:
        return _not_searched(row | {"reason": f"{arrival.fatal}; fetch or write the file again"})
    try:
        frame = fits_images.usable_image(arrival.path)
        row["ny_px"], row["nx_px"] = frame.data.shape
        row["header"] = json.dumps(_cards(frame))
        row["mjd"] = mjd = exposure_mjd(frame, arrival.path)
        row["late"] = _is_late(tools.connection, mjd)
        if (newer := _newer_version(tools.connection, row)) is not None:
            return _not_searched(row | newer)
        row["signal_e"] = _level_e(frame)
        if routine.difference:
            template = Template(rms=fits_images.find_plane(arrival.path, "SCATTER"))
            require_noise_of_rms_map(frame.data, template.rms, arrival.path)
            blobs = _blobs(tools, mjd)
            about = (blobs, tools.detector, routine.params)
            return _search(row, frame.data, template, NO_SHIFT, *about)
        return _subtract_and_search(row, frame.data, tools, routine)
    except BlobpipeError as error:
        if _is_passing(error):
            raise
        return _not_searched(row | {"reason": str(error)})
    except Exception as error:
        if not _is_internal(error):
            raise
        return _not_searched(row | {"reason": _internal_fault(error)})


def _cards(frame: fits_images.Frame) -> dict[str, Any]:
    """Return the header cards that are kept and that JSON can hold."""
    found = {card: _value(frame, card) for card in KEPT_CARDS}
    return {card: value for card, value in found.items() if value is not None}


def _level_e(frame: fits_images.Frame) -> float | None:
    level = _value(frame, LEVEL_CARD)
    return float(level) if isinstance(level, int | float) and not isinstance(level, bool) else None


def _value(frame: fits_images.Frame, card: str) -> Any:
    """Return a card as text, truth or finite number; None for anything else."""
    try:
        value = frame.header.get(card)
        finite = isinstance(value, str) or (isinstance(value, int | float) and math.isfinite(value))
    except Exception:  # damaged cards make astropy raise nearly anything
        return None
    return value if finite else None


def _is_passing(error: BlobpipeError) -> bool:
    """Return whether a file could not be read for a reason that is not in its bytes."""
    cause = error.__cause__
    return isinstance(cause, MemoryError) or (
        isinstance(cause, OSError) and cause.errno not in NO_FAULT_OF_THE_MEDIUM
    )


def _versions(connection: sqlite3.Connection, row: Mapping[str, Any]) -> list[sqlite3.Row]:
    """List the images of the same exposure that count, in the order in which they were logged."""
    near = connection.execute(
        "SELECT id, name, mjd, header, kind, outcome FROM images "
        "WHERE outcome != 'rejected' AND superseded_by IS NULL AND sha256 != ? AND mjd BETWEEN ? AND ? ORDER BY id",
        (row["sha256"], row["mjd"] - SAME_EXPOSURE_D, row["mjd"] + SAME_EXPOSURE_D),
    ).fetchall()
    return [other for other in near if is_same_exposure(_exposure(row), _exposure(other))]


def _exposure(row: Mapping[str, Any] | sqlite3.Row) -> Exposure:
    return Exposure(row["name"], row["mjd"], json.loads(row["header"]))


def _newer_version(connection: sqlite3.Connection, row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the columns of an image whose exposure has a newer version in the log; else None.

    An image is newer than a difference: stacks take it.
    """
    for other in _versions(connection, row):
        is_image = [each["kind"] == "image" for each in (other, row)]
        if is_image[0] > is_image[1] or (
            is_image[0] == is_image[1] and is_older_version(_exposure(row), _exposure(other))
        ):
            reason = f"an older version of the exposure that the log has as image {other['id']}, {other['name']}"
            return {"reason": reason, "superseded_by": other["id"]}
    return None


def _supersede(connection: sqlite3.Connection, image: int) -> None:
    """Replace older versions of an exposure, before the findings of the newer are logged.

    One that could not be searched, for want of a stack, does not replace one that was: it is superseded itself.
    """
    row = connection.execute("SELECT * FROM images WHERE id = ?", (image,)).fetchone()
    if row["outcome"] == "rejected":
        return
    for other in _versions(connection, row):
        replaces = row["outcome"] == "searched" or other["outcome"] == "stack"
        pair = (image, other["id"]) if replaces else (other["id"], image)
        connection.execute("UPDATE images SET superseded_by = ? WHERE id = ?", pair)


def _is_late(connection: sqlite3.Connection, mjd: float) -> int:
    found = connection.execute(
        "SELECT 1 FROM images WHERE outcome != 'rejected' AND superseded_by IS NULL AND mjd > ? LIMIT 1",
        (mjd,),
    )
    return int(found.fetchone() is not None)


def _not_searched(row: dict[str, Any]) -> Searched:
    return Searched(row, pd.DataFrame(), [], b"", lambda _: {})


def _subtract_and_search(
    row: dict[str, Any], image: Image, tools: Tools, routine: Routine
) -> Searched:
    params = routine.params.difference
    blobs = _blobs(tools, row["mjd"])
    reason = f"fewer than {params.stack_size} usable images of its size before it: it waits for the first stack"
    running_stack.require_size(tools.connection, image.shape)
    try:
        stack = running_stack.stack_before(
            tools.connection,
            routine.cache,
            row["mjd"],
            params,
            routine.reference,
            blobs.landed,
            shape=image.shape,
        )
    except FrameError as error:  # no fault of this image
        stack = None
        reason = str(error)
    if stack is None:
        return _not_searched(row | {"outcome": "stack", "reason": reason})
    template = make_template(stack.data, stack.scatter, blobs.known)
    expected = template.expected_noise()
    assert expected is not None
    require_noise(fits_images.median_and_noise(image)[1], expected, row["name"])
    data, shift = subtract(image, template, params)
    corrections = dict(stack.corrections)
    if stack.n_images:
        packed = running_stack.correction(image, data, stack.data, shift)
        corrections[row["sha256"]] = packed
        running_stack.keep(routine.cache, row["sha256"], image, packed)
    row |= {"n_stack": stack.n_images, "stack_sha256": stack.sha256}
    searched = _search(row, data, template, shift, blobs, tools.detector, routine.params)
    return replace(searched, corrections=corrections, rejected=stack.rejected)


def _search(
    row: dict[str, Any],
    data: Image,
    template: Template,
    shift: Shift,
    blobs: Blobs,
    detector: DenseDetector,
    params: Params,
) -> Searched:
    """Search a difference image."""
    clipped, clipping = clip_image(data, params.clip)
    scaled, _ = scale_image(clipped, params.scale)
    noise = image_noise(data)
    response = detector.respond(scaled)
    candidates = find_blobs(
        data,
        template,
        detector,
        catalogue=blobs.known,
        shift_px=shift,
        noise_frac=noise,
        recent_px=blobs.landed[["x_px", "y_px"]].to_numpy(float),
        peaks=detector.peaks(response),
        vetting=params.vetting,
    )
    row |= {
        "outcome": "searched",
        "shift_x_px": shift.x_px,
        "shift_y_px": shift.y_px,
        "noise_frac": noise,
        "clipped_frac": clipping.clipped_frac,
    }

    def draw(at: dict[str, Any]) -> dict[str, bytes]:
        x = at["x_px"]
        y = at["y_px"]
        drawn = {
            "difference": thumbnails.cutout(data, x, y, noise),
            "map": thumbnails.probability(response, x, y, dense.STRIDE),
        }
        if template.stack is not None:
            stack_noise = fits_images.median_and_noise(template.stack)[1]
            drawn["stack"] = thumbnails.cutout(template.stack, x, y, stack_noise)
        return drawn | {"surface": thumbnails.surface(data, x, y)}

    subframes = _subframes(response, candidates, detector, data.shape)
    return Searched(row, candidates, subframes, thumbnails.overview(scaled), draw)


def _blobs(tools: Tools, mjd: float) -> Blobs:
    """Read which blobs are known before a date; faded candidates do not count."""
    found = tools.connection.execute(
        "SELECT x_px, y_px, radius_px, first_mjd, decision = 'confirmed' OR status = 'seen_again' FROM candidate_list "
        "WHERE radius_px IS NOT NULL AND (decision = 'confirmed' OR decision != 'rejected' AND status != 'faded') "
        "ORDER BY first_mjd, id"
    ).fetchall()
    rows = pd.DataFrame(
        [tuple(row) for row in found], columns=[*PLACE_COLUMNS, "first", "known"], dtype=float
    )
    known = [rows.loc[rows["known"] == 1, list(PLACE_COLUMNS)]]
    if tools.known is not None:
        known.insert(0, tools.known[list(PLACE_COLUMNS)])
    return Blobs(pd.concat(known, ignore_index=True), rows[rows["first"] < mjd])


def _subframes(
    response: Image, candidates: pd.DataFrame, detector: DenseDetector, shape: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Make rows of the table ``subframes``, with a picture of the network's map."""
    scores = subframe_scores(candidates, shape)
    probability = detector.probability(scores)
    side = tiles.SIDE // dense.STRIDE
    rows = []
    for k, (row, col, _, _) in enumerate(tiles.origins(shape).tolist()):
        part = response[row * side : (row + 1) * side, col * side : (col + 1) * side]
        rows.append(
            {
                "row": row,
                "col": col,
                "probability": float(probability[k]),
                "positive": int(scores[k] >= detector.threshold),
                "saliency": thumbnails.subframe_map(part),
            }
        )
    return rows


def _log_findings(
    connection: sqlite3.Connection, image: int, searched: Searched, tools: Tools, params: Params
) -> None:
    for row in searched.subframes:
        logbook.insert(connection, "subframes", {"image": image, **row})
    for sha256, packed in searched.corrections.items():
        connection.execute(
            "INSERT INTO corrections (image, bytes) SELECT id, ? FROM images WHERE sha256 = ?",
            (packed, sha256),
        )
    for sha256, reason in searched.rejected.items():
        connection.execute(
            "UPDATE images SET outcome = 'rejected', reason = ? WHERE sha256 = ?", (reason, sha256)
        )
    if searched.overview:
        whole = {
            "image": image,
            "kind": "difference",
            "type": "image/jpeg",
            "bytes": searched.overview,
        }
        logbook.insert(connection, "pictures", whole)
    if searched.row["outcome"] == "searched":
        for number, row in _log_detections(connection, image, searched, tools.detector, params):
            for kind, png in searched.draw(row).items():
                picture = {
                    "image": image,
                    "detection": number,
                    "kind": kind,
                    "type": "image/png",
                    "bytes": png,
                }
                logbook.insert(connection, "pictures", picture)


def _log_detections(
    connection: sqlite3.Connection,
    image: int,
    searched: Searched,
    detector: DenseDetector,
    params: Params,
) -> list[tuple[int, dict[str, Any]]]:
    """Log detections and fainter sightings of candidates; return those to be drawn."""
    columns = (*DETECTION_COLUMNS, "probability")
    shift = np.array([searched.row["shift_x_px"], searched.row["shift_y_px"]])
    pending = {
        row["id"] for row in connection.execute("SELECT id FROM candidates WHERE status = 'new'")
    }
    drawn = []
    seen = set()
    for row, candidate in _with_candidates(
        connection, searched.table, shift, params.quicklook.match_px
    ):
        above = row["score"] >= detector.threshold
        fresh = candidate is None and above and row["status"] == "new"
        if fresh:
            place = {"x_px": row["x_px"] - shift[0], "y_px": row["y_px"] - shift[1]}
            candidate = logbook.insert(
                connection, "candidates", {"image": image, "status": "new", **place}
            )
        if candidate is not None:
            seen.add(candidate)
        if candidate is not None or above:
            waiting = fresh or candidate in pending
            detection = {
                "image": image,
                "candidate": candidate,
                **{name: row[name] for name in columns},
            }
            number = logbook.insert(connection, "detections", detection)
            drawn += [(number, row)] if waiting else []
    _update_candidates(connection, image, seen, params.quicklook.fade_after)
    return drawn


def _with_candidates(
    connection: sqlite3.Connection,
    table: pd.DataFrame,
    shift: npt.NDArray[np.float64],
    match_px: float,
) -> Iterator[tuple[dict[str, Any], int | None]]:
    """Pair the rows of a search with the log's candidates; bad pixels have none.

    What the stack has not learnt yet of a known blob may be measured off its centre: it is matched in a second round.
    """
    places = connection.execute(
        "SELECT id, status, x_px, y_px FROM candidates ORDER BY id"
    ).fetchall()
    rows = [dict(row) for _, row in table.iterrows()]
    candidate: dict[int, int] = {}
    for of, status, within_px in (
        (("new", "known", "dip"), "", match_px),
        (("known",), "seen_again", NEAR_PX),
    ):
        open_rows = [k for k, row in enumerate(rows) if row["status"] in of and k not in candidate]
        taken = set(candidate.values())
        free = [
            place
            for place in places
            if place["id"] not in taken and status in ("", place["status"])
        ]
        found = (
            np.array([[rows[k]["x_px"], rows[k]["y_px"]] for k in open_rows]).reshape(-1, 2) - shift
        )
        there = np.array([[place["x_px"], place["y_px"]] for place in free]).reshape(-1, 2)
        candidate |= {open_rows[i]: int(free[j]["id"]) for i, j in pair(found, there, within_px)}
    for k, row in enumerate(rows):
        yield row, candidate.get(k)


def _update_candidates(
    connection: sqlite3.Connection, image: int, seen: set[int], fade_after: int
) -> None:
    """Mark candidates that are seen again; fade those that later images do not show.

    Where the image replaces older versions of its exposure, what these have shown or missed is counted anew.
    """
    mjd = connection.execute("SELECT mjd FROM images WHERE id = ?", (image,)).fetchone()["mjd"]
    replaced = [
        row["id"]
        for row in connection.execute("SELECT id FROM images WHERE superseded_by = ?", (image,))
    ]
    rows = connection.execute(
        "SELECT c.id, c.status, c.missed, c.image, i.mjd, i.superseded_by FROM candidates c JOIN images i ON i.id = c.image"
    ).fetchall()
    shown = {
        row["candidate"]
        for older in replaced
        for row in connection.execute("SELECT candidate FROM detections WHERE image = ?", (older,))
    }
    for row in rows:
        of_old = row["superseded_by"] is not None and row["id"] in seen
        if (
            of_old
            or row["id"] in shown
            or (replaced and row["status"] == "new" and row["image"] != image)
        ):
            _count_anew(connection, row["id"], fade_after)
        elif row["id"] in seen and row["image"] != image:
            earliest = image if mjd < row["mjd"] else row["image"]
            connection.execute(
                "UPDATE candidates SET status = 'seen_again', image = ? WHERE id = ?",
                (earliest, row["id"]),
            )
        elif row["id"] not in seen and row["status"] == "new" and mjd > row["mjd"]:
            status = "faded" if row["missed"] + 1 >= fade_after else "new"
            connection.execute(
                "UPDATE candidates SET missed = missed + 1, status = ? WHERE id = ?",
                (status, row["id"]),
            )


def _count_anew(connection: sqlite3.Connection, candidate: int, fade_after: int) -> None:
    """Set the status of a candidate from the versions that count."""
    sightings = connection.execute(
        "SELECT DISTINCT i.id, i.mjd FROM detections d JOIN images i ON i.id = d.image "
        "WHERE d.candidate = ? AND i.superseded_by IS NULL ORDER BY i.mjd, i.id",
        (candidate,),
    ).fetchall()
    if not sightings:  # it keeps the one of a superseded version, for those who look back
        connection.execute("UPDATE candidates SET status = 'faded' WHERE id = ?", (candidate,))
        return
    connection.execute(
        "UPDATE detections SET candidate = NULL WHERE candidate = ? "
        "AND image IN (SELECT id FROM images WHERE superseded_by IS NOT NULL)",
        (candidate,),
    )
    image, mjd = sightings[0]
    if len(sightings) > 1:
        connection.execute(
            "UPDATE candidates SET status = 'seen_again', image = ? WHERE id = ?",
            (image, candidate),
        )
        return
    [missed] = connection.execute(
        "SELECT count(*) FROM images WHERE outcome = 'searched' AND superseded_by IS NULL AND mjd > ? AND id > ?",
        (mjd, _first_version(connection, image)),
    ).fetchone()
    status = "faded" if missed >= fade_after else "new"
    connection.execute(
        "UPDATE candidates SET status = ?, image = ?, missed = ? WHERE id = ?",
        (status, image, min(missed, fade_after), candidate),
    )


def _first_version(connection: sqlite3.Connection, image: int) -> int:
    """Return the image by which the log came to know an exposure."""
    query = "SELECT min(id) AS id FROM images WHERE superseded_by = ? AND id < ?"
    while (older := connection.execute(query, (image, image)).fetchone()["id"]) is not None:
        image = older
    return image
