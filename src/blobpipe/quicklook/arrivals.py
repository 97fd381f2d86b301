"""Files that have arrived in a folder: which are new, whether they can be read, and whose turn each is."""

from __future__ import annotations

import fcntl
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np

from blobpipe.core import files, fits_images
from blobpipe.core.dates import exposure_mjd
from blobpipe.core.detector import Detector
from blobpipe.errors import printable
from blobpipe.monitor import logbook
from blobpipe.monitor.inbox import File, Inbox, Stamp, path_text

log = logging.getLogger(__name__)

# Time limit for the separate process that reads a suspect file (s)
TRIAL_S = 120.0

# Signals by which a user ends a process; they say nothing about the file it was reading
USER_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


class Arrival(NamedTuple):
    """A file that the log does not have in its present state.

    Attributes
    ----------
    path : path
    sha256 : str
    stamp : Stamp
    mjd : float
        Date of the exposure, for the order of the search; infinite, so last, if it cannot be read.
    shape : tuple of int
        Shape of the image; empty if it cannot be read.
    fatal : str
        How a separate process that read the file has ended; empty if it survived or none was needed.
    """

    path: Path
    sha256: str
    stamp: Stamp
    mjd: float = np.inf
    shape: tuple[int, ...] = ()
    fatal: str = ""

    @property
    def file(self) -> File:
        """Return the file with its stamp."""
        return File(self.path, self.stamp)


def new_files(inbox: Inbox, connection: logbook.Log, again: bool = False) -> list[File]:
    """List the files of the folder that the log does not have in their present state."""
    new = []
    for file in inbox.look():
        row = connection.execute(
            "SELECT image FROM files WHERE path = ? AND size_bytes = ? AND modified_ns = ? AND changed_ns = ? "
            "AND inode = ?",
            (path_text(file.path), *file.stamp),
        ).fetchone()
        if row and not (again and was_never_searched(connection, row["image"])):
            inbox.know(file)
        else:
            new.append(file)
    return new


def was_never_searched(connection: logbook.Log, image: int) -> bool:
    """Return whether an image that counts was rejected, or kept for stacks alone, without a search.

    One that a later stack has rejected keeps what its search has found.
    """
    row = connection.execute(
        "SELECT 1 FROM images WHERE id = ? AND outcome != 'searched' AND superseded_by IS NULL "
        "AND NOT EXISTS (SELECT 1 FROM subframes WHERE image = images.id)",
        (image,),
    ).fetchone()
    return row is not None


def read_arrival(
    file: File, inbox: Inbox, connection: logbook.Log, instrument: Detector
) -> Arrival | None:
    """Read the hash, date and size of a file; None if it is still being written or cannot be read."""
    try:
        sha256 = files.sha256(file.path)
        after = Stamp.of(file.path.stat())
    except FileNotFoundError:
        return None
    except OSError as error:
        inbox.leave(file, f"{error.strerror}; make it readable or move it elsewhere")
        return None
    if after != file.stamp:
        log.info("%s: still being written; it will be read next time", printable(str(file.path)))
        return None
    arrival = Arrival(file.path, sha256, file.stamp)
    with locked_for(arrival, connection, last=False) as suspect:
        return _with_date_and_shape(arrival, suspect, instrument)


def _with_date_and_shape(arrival: Arrival, suspect: bool, instrument: Detector) -> Arrival:
    """Add date and shape; a file at which an earlier process ended is first read by a separate process."""
    fatal = _fatal_to_read(arrival.path) if suspect else ""
    if fatal:
        return arrival._replace(fatal=fatal)
    # Whatever is wrong with the file is reported when it is searched
    with suppress(Exception):
        frame = fits_images.read_frame(arrival.path, instrument)
        arrival = arrival._replace(shape=frame.data.shape)
        arrival = arrival._replace(mjd=exposure_mjd(frame, arrival.path, instrument))
    return arrival


def _fatal_to_read(path: Path) -> str:
    """Say how a separate process ends that reads a suspect file; empty if it survives."""
    script = "import sys; from blobpipe.images import check; check.describe(sys.argv[1])"
    try:
        ended = subprocess.run(
            (sys.executable, "-c", script, path), capture_output=True, timeout=TRIAL_S
        )
    except subprocess.TimeoutExpired:
        return f"takes longer than {TRIAL_S:.0f} s"
    # A negative status is the signal that ended the process
    if ended.returncode >= 0 or -ended.returncode in USER_SIGNALS:
        return ""
    return f"crashes the process that reads it ({signal.Signals(-ended.returncode).name})"


def is_unchanged(arrival: Arrival) -> bool:
    """Return whether a file is still what was hashed."""
    try:
        return Stamp.of(arrival.path.stat()) == arrival.stamp
    except OSError:
        return False


@contextmanager
def locked(connection: logbook.Log) -> Iterator[TextIO]:
    """Wait until no other process works on an image of this log; the system frees the lock of a killed one."""
    # The folder of the log may have been removed
    connection.require_file()
    with open(connection.path.with_suffix(".lock"), "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


@contextmanager
def locked_for(arrival: Arrival, connection: logbook.Log, *, last: bool) -> Iterator[bool]:
    """Take the lock for work on one image; yield whether an earlier process has ended during such work.

    The locked file lists the hashes of the images whose work was begun and not finished; a process that is killed
    leaves its image there.

    Parameters
    ----------
    last : bool
        This is the last step of the work: take the image off the list.
    """
    with locked(connection) as lock:
        lock.seek(0)
        unfinished = set(lock.read().split())
        lock.write(f"{arrival.sha256}\n")
        lock.flush()
        yield arrival.sha256 in unfinished
        lock.truncate(0)
        left = unfinished - {arrival.sha256} if last else unfinished
        lock.writelines(f"{sha256}\n" for sha256 in sorted(left))
