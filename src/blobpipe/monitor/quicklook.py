"""Search, log and announce every new image of a folder, each exactly once (ISR 6).

Everything that follows from an image is written in one transaction of the log, and the same inputs give the same rows:
whenever a run is stopped, the next one continues where it ended. Several runs may share a log; they take turns.
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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
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
from blobpipe.core.detector import Detector, read_detector
from blobpipe.detection.detectors import DenseDetector, load_dense_detector
from blobpipe.detection.fit import DETECTION_COLUMNS
from blobpipe.detection.match import NEAR_PX, near_blobs, pair
from blobpipe.detection.operating_point import CANDIDATE
from blobpipe.detection.promise import OTHER_BAD_PIXELS, PromisedPoint, apply_promised_point
from blobpipe.detection.search import observe, subframe_scores
from blobpipe.errors import (
    BlobpipeError,
    FrameError,
    LogError,
    ModelError,
    internal_fault,
    printable,
)
from blobpipe.history import deep
from blobpipe.history.deep import DeepDifference, SettledImage
from blobpipe.history.depths import Depths, measure_histories
from blobpipe.history.landing import date_history
from blobpipe.history.watch import N_IMAGES, BlobHealth, measure_changes, summarise_changes
from blobpipe.images import tiles
from blobpipe.images.bad_pixels import BadPixels, read_bad_pixels
from blobpipe.images.clip import clip_image
from blobpipe.images.difference import KEPT_CARDS as DIFFERENCE_CARDS
from blobpipe.images.difference import subtract
from blobpipe.images.flatten import read_blob_image
from blobpipe.images.noise import require_noise, require_noise_of_rms_map
from blobpipe.images.register import NO_SHIFT, Shift
from blobpipe.images.scale import scale_image
from blobpipe.images.template import Template, make_template
from blobpipe.monitor import health, logbook, notices, running_stack, thumbnails
from blobpipe.monitor.inbox import File, Inbox, Stamp, path_of, path_text
from blobpipe.networks import dense, kernels, model_file
from blobpipe.params import Params

log = logging.getLogger(__name__)

# Cards of an image that the log keeps
KEPT_CARDS = (*dict.fromkeys((*DIFFERENCE_CARDS, "EXPTIME", "PROPOSID", "BUNIT", *EXPOSURE_CARDS)),)

# Card of the photon level of the airglow (electrons per pixel); only simulated images have it
LEVEL_CARD = "LEVEL_E"

# Columns of a table of known blobs
PLACE_COLUMNS = ("x_px", "y_px", "radius_px")

# Longest pause between two looks at a watched folder (s)
PAUSE_S = 1.0

# Time limit for the separate process that reads a suspect file (s)
TRIAL_S = 120.0

# Errors of reading that come from the bytes of a file, not from its disk: those of astropy, which
# have no number, and those of seeking where damaged sizes lead
ERRORS_OF_CONTENT = (None, errno.EINVAL, errno.EOVERFLOW)

# Signals by which a user ends a process; they say nothing about the file it was reading
USER_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Options:
    """Settings and files of a run.

    Attributes
    ----------
    log_path : path
    model : path
        Dense network.
    params : Params
    catalogue : path, optional
        Known blobs: a table with x_px, y_px, radius_px.
    reference : path, optional
        Median stack to subtract as long as the log has too few images.
    difference : bool
        The images are difference images already.
    again : bool
        Search rejected images once more.
    bad_pixels : tuple of path
        Files of bad pixels, besides those of the settings.
    operating_point : path, optional
        From `blobpipe calibrate`; its threshold replaces the model's. By default the file of the settings, if any.
    """

    log_path: Path
    model: Path
    params: Params
    catalogue: Path | None = None
    reference: Path | None = None
    difference: bool = False
    again: bool = False
    bad_pixels: tuple[Path, ...] = ()
    operating_point: Path | None = None

    @cached_property
    def instrument(self) -> Detector:
        """Return the detector of the settings."""
        return read_detector(self.params.detector)

    @property
    def point_path(self) -> Path | None:
        """Return the file of the operating point: the option's, else that of the settings."""
        named = self.params.quicklook.operating_point
        return self.operating_point or (Path(named) if named else None)


@dataclass(frozen=True)
class Run:
    """A run of quicklook: its options, and what has been opened and read for it.

    Attributes
    ----------
    options : Options
    connection : logbook.Log
        The open log.
    number : int
        Row of the run in the table ``runs``.
    detector : DenseDetector
    catalogue : DataFrame or None
        Known blobs.
    cache : running_stack.Cache
        Images that the next stack takes, beside the log.
    """

    options: Options
    connection: logbook.Log
    number: int
    detector: DenseDetector
    catalogue: pd.DataFrame | None
    cache: running_stack.Cache

    @property
    def params(self) -> Params:
        """Return the settings."""
        return self.options.params

    @property
    def instrument(self) -> Detector:
        """Return the detector whose images are searched."""
        return self.options.instrument

    @property
    def bad_pixels(self) -> BadPixels:
        """Return the pixels that have no value."""
        return self.cache.bad_pixels


class KnownBlobs(NamedTuple):
    """Blobs that are known before an image is searched.

    Attributes
    ----------
    known : DataFrame
        x_px, y_px, radius_px of the blobs of the catalogue, and of those that the log has found since.
    landed : DataFrame
        The same columns for the blobs that the log has found, with ``first``, the date (MJD) of the first image that
        shows each; in order of date.
    """

    known: pd.DataFrame
    landed: pd.DataFrame


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


@dataclass(frozen=True)
class Pictures:
    """Draw the detections of an image.

    Attributes
    ----------
    difference : ndarray, shape (ny, nx), float32
    noise_frac : float
        Noise of the difference.
    response : ndarray, float32
        The network's probability map.
    stack : ndarray, shape (ny, nx), float32, or None
        What was subtracted.
    """

    difference: Image
    noise_frac: float
    response: Image
    stack: Image | None

    def draw(self, row: Mapping[str, Any]) -> dict[str, bytes]:
        """Draw the surroundings of a detection; return the pictures by kind, PNG."""
        x = row["x_px"]
        y = row["y_px"]
        drawn = {
            "difference": thumbnails.cutout(self.difference, x, y, self.noise_frac),
            "map": thumbnails.probability(self.response, x, y, dense.STRIDE),
        }
        if self.stack is not None:
            stack_noise = fits_images.median_and_noise(self.stack)[1]
            drawn["stack"] = thumbnails.cutout(self.stack, x, y, stack_noise)
        drawn["surface"] = thumbnails.surface(self.difference, x, y)
        return drawn


@dataclass(frozen=True)
class DeepResult:
    """What the latest images show together, this one among them.

    Attributes
    ----------
    found : DataFrame
        New blobs that have landed and stayed: columns of `deep.find_deep_blobs`, at their usual place.
    images : list of str
        SHA-256 of the latest images, in order of date.
    places : DataFrame
        x_px, y_px, radius_px of what is new on this image, alone or together (usual places).
    depths : Depths
        Of these places on these images, shape (images, places).
    settled : SettledImage
        This image.
    health : BlobHealth or None
        How the known blobs have changed; None if none is watched.
    """

    found: pd.DataFrame
    images: list[str]
    places: pd.DataFrame
    depths: Depths
    settled: SettledImage
    health: BlobHealth | None


@dataclass(frozen=True)
class ImageResult:
    """Everything that the log keeps of an image; an image that was not searched has a row only.

    Attributes
    ----------
    row : dict
        Columns of ``images``.
    candidates : DataFrame
        Vetted candidates, with their probability.
    subframes : list of dict
        Columns of ``subframes``.
    overview : bytes
        Picture of the whole image, JPEG.
    pictures : Pictures or None
    corrections : dict of bytes
        By SHA-256, corrections of the images that a stack has taken for the first time, this one among them
        (`running_stack.correction`).
    rejected : dict of str
        By SHA-256, why images of the log turned out to be unusable for a stack.
    """

    row: dict[str, Any]
    candidates: pd.DataFrame = field(default_factory=pd.DataFrame)
    subframes: list[dict[str, Any]] = field(default_factory=list)
    overview: bytes = b""
    pictures: Pictures | None = None
    corrections: dict[str, bytes] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    deep: DeepResult | None = None


# ----------------------------------------------------------------------------------------------------------- runs


def quicklook(folder: Path, options: Options) -> int:
    """Process every image of a folder that the log does not have yet, in order of date.

    Parameters
    ----------
    folder : path
        Blob images, or difference images; other files are left alone.
    options : Options

    Returns
    -------
    int
        Number of images logged.

    Raises
    ------
    FrameError, ModelError, TableError, LogError
        If the folder, the model, the catalogue, a file of bad pixels or the log cannot be used. A bad image is logged
        as rejected instead.
    """
    _require_folder(folder)
    inbox = Inbox(folder, options.params.quicklook.settle_s)
    # Looking before the model is loaded starts the clock by which files count as complete
    inbox.look()
    with _open_run(options, inbox) as run:
        # Wait until the files that are there now are complete
        new = _new_files(inbox, run.connection, options.again)
        time.sleep(max((inbox.unsettled_s(file) for file in new), default=0.0))
        logged = _process(inbox, run)

        for file in _new_files(inbox, run.connection):
            if inbox.unsettled_s(file):
                log.info(
                    "%s: still being written; it will be read next time", printable(str(file.path))
                )
        notices.send(run.connection, options.params.notices)
        _say_what_was_done(folder, run, logged)
        return logged


def _say_what_was_done(folder: Path, run: Run, logged: int) -> None:
    """Say how many images were logged and what they showed, or why there were none."""
    if logged:
        log.info("%s", logbook.describe_run(run.connection, run.number))
        log.info("review them: blobpipe serve --log %s", run.options.log_path)
        return
    known = run.connection.execute("SELECT count(*) FROM images").fetchone()[0]
    if any(folder.glob("*.fit*")):
        log.info("%s: no image was logged; %d are in the log", folder, known)
        return
    inside = sorted({path.parent for path in folder.glob("*/*.fit*")})
    advice = f"; {inside[0]} has some: name that folder" if inside else ""
    log.info("%s: no FITS image in it, expected some%s", folder, advice)


def watch(folder: Path, options: Options) -> None:
    """Process images as they appear, until interrupted.

    The folder is also searched every second, since network drives do not report all events.

    Raises
    ------
    LogError
        If the log is moved, deleted or replaced meanwhile.
    """
    _require_folder(folder)
    settle_s = options.params.quicklook.settle_s
    pause_s = min(PAUSE_S, max(settle_s, 0.05))
    inbox = Inbox(folder, settle_s)
    with _open_run(options, inbox) as run:
        log.info("watching %s; Ctrl-C ends it", folder)
        for _ in _events(folder, pause_s):
            _process(inbox, run)
            notices.send(run.connection, options.params.notices)


def _events(folder: Path, pause_s: float) -> Iterator[None]:
    """Yield whenever something happens in a folder, and at least once per pause."""
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
        except (RuntimeError, OSError, UnicodeError):
            # A name that is not UTF-8, or too many watches on this machine
            time.sleep(pause_s)
            yield


def _require_folder(folder: Path) -> None:
    """Refuse what is not a folder."""
    if folder.is_file():
        raise FrameError(
            f"{folder}: a file, expected a folder of images; name its folder ({folder.parent}), or search this one "
            "image with 'blobpipe scan'"
        )
    if not folder.is_dir():
        raise FrameError(
            f"{folder}: not found, expected a folder of images; make it or correct the name"
        )


@contextmanager
def _open_run(options: Options, inbox: Inbox) -> Iterator[Run]:
    """Read all files that the options name, then open the log: an error in one leaves no trace in the log."""
    if model_file.kind_of_model(options.model) != "dense":
        raise ModelError(
            f"{options.model}: the report's network, expected the dense one, which measures; name its file"
        )
    detector = load_dense_detector(options.model)
    point = None
    if options.point_path is not None:
        detector, point = apply_promised_point(detector, options.model, options.point_path)
    catalogue = None
    if options.catalogue is not None:
        catalogue = tables.read_known(options.catalogue, PLACE_COLUMNS, options.instrument)
    bad_pixels = read_bad_pixels(options.params.bad_pixels, options.bad_pixels, options.instrument)
    cache = running_stack.Cache(options.log_path.with_name("stack"), bad_pixels, options.instrument)
    reference = None
    if options.reference is not None:
        reference = running_stack.read_stack(options.reference, bad_pixels, options.instrument)
    kernels.set_threads(options.params.detect.threads)

    connection = logbook.connect(options.log_path, make=True)
    try:
        _require_detector(connection, options)
        if reference is not None:
            shape = reference.data.shape
            _require_size_of_images(
                shape, connection, inbox, f"{options.reference}", "stack", options.instrument
            )
        if bad_pixels.mask is not None:
            shape = bad_pixels.mask.shape
            names = ", ".join(str(file.path) for file in bad_pixels.files)
            _require_size_of_images(
                shape, connection, inbox, names, "mask of bad pixels", options.instrument
            )
        log.info("model: %s", model_file.described(options.model))
        if point is not None:
            log.info("operating point: %s, %s", options.point_path, point.describe())
            if point.bad_pixels_sha256 != " ".join(file.sha256 for file in bad_pixels.files):
                log.warning("blobpipe: %s: %s", options.point_path, OTHER_BAD_PIXELS)
        with logbook.writing(connection):
            row = _run_row(options, detector, bad_pixels, point)
            number = logbook.insert(connection, "runs", row)

        # A run that was killed may have left files in the cache
        with _lock(connection):
            running_stack.prune(connection, cache, options.params.difference.stack_size)

        yield Run(options, connection, number, detector, catalogue, cache)
        with logbook.writing(connection):
            connection.execute("UPDATE runs SET ended = ? WHERE id = ?", (logbook.now(), number))
    except LogError:
        # A log that was moved without its -wal file becomes complete at its new place
        with suppress(sqlite3.Error):
            connection.execute("PRAGMA wal_checkpoint")
        raise
    finally:
        connection.close()


def _require_detector(connection: logbook.Log, options: Options) -> None:
    """Refuse images of another detector than that of the log."""
    if connection.execute("SELECT 1 FROM images LIMIT 1").fetchone() is None:
        return
    logged = logbook.detector_of(connection)
    if (logged.title, logged.shape) != (options.instrument.title, options.instrument.shape):
        raise LogError(
            f"{options.log_path}: found images of {logged.title}, expected {options.instrument.title}; give it another "
            "--log, or name the log's --detector"
        )


def _require_size_of_images(
    shape: tuple[int, ...],
    connection: logbook.Log,
    inbox: Inbox,
    path: str,
    what: str,
    instrument: Detector,
) -> None:
    """Refuse a file that fits neither the images of the log nor, before the first of them, one in the folder."""
    size = running_stack.size_of(connection)
    found: list[tuple[int, ...]] = []
    if size:
        found = [size]
    else:
        arrivals = [
            _read_arrival(file, inbox, connection, instrument)
            for file in _new_files(inbox, connection)
        ]
        found = [arrival.shape for arrival in arrivals if arrival is not None and arrival.shape]
    if found and shape not in found:
        (own_ny, own_nx) = shape
        (ny, nx) = found[0]
        raise FrameError(
            f"{path}: found {own_nx}x{own_ny} pixels, expected {nx}x{ny} as the images; name their {what}"
        )


def _run_row(
    options: Options, detector: DenseDetector, bad_pixels: BadPixels, point: PromisedPoint | None
) -> dict[str, Any]:
    """Return the row of ``runs`` for a run that begins now."""
    params = options.params.model_dump_json()
    return {
        "started": logbook.now(),
        "version": __version__,
        "model": str(options.model),
        "model_sha256": files.sha256(options.model),
        "detector": options.instrument.model_dump_json(),
        "params_sha256": hashlib.sha256(params.encode()).hexdigest(),
        "catalogue": path_text(options.catalogue.absolute()) if options.catalogue else "",
        "catalogue_sha256": files.sha256(options.catalogue) if options.catalogue else "",
        "threshold": detector.threshold,
        "bad_pixels": json.dumps(bad_pixels.as_rows()),
        "operating_point_sha256": files.sha256(options.point_path) if options.point_path else "",
        "false_alarms_per_100": point.false_alarms_per_100_images if point else None,
    }


# ------------------------------------------------------------------------------------------------------- arrivals


def _process(inbox: Inbox, run: Run) -> int:
    """Log the new images of the folder; return their number."""
    connection = run.connection
    connection.require_file()

    # Files that are complete, in order of date
    arrivals = []
    for file in _new_files(inbox, connection, run.options.again):
        if not inbox.unsettled_s(file):
            arrival = _read_arrival(file, inbox, connection, run.instrument)
            if arrival is not None:
                arrivals.append(arrival)
    arrivals.sort(key=lambda arrival: (arrival.mjd, arrival.path.name))

    logged = 0
    for arrival in tqdm(arrivals, "quicklook", unit="image", disable=None if arrivals else True):
        with _lock_for(arrival, connection, last=True):
            if _log_arrival(arrival, inbox, run):
                inbox.know(arrival.file)
                logged += 1
        notices.send(connection, run.params.notices)
    return logged


def _new_files(inbox: Inbox, connection: logbook.Log, again: bool = False) -> list[File]:
    """List the files of the folder that the log does not have in their present state."""
    new = []
    for file in inbox.look():
        row = connection.execute(
            "SELECT outcome FROM images WHERE id = (SELECT image FROM files WHERE path = ? AND size_bytes = ? "
            "AND modified_ns = ? AND changed_ns = ? AND inode = ?)",
            (path_text(file.path), *file.stamp),
        ).fetchone()
        if row and not (again and row["outcome"] == "rejected"):
            inbox.know(file)
        else:
            new.append(file)
    return new


def _read_arrival(
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
    with _lock_for(arrival, connection, last=False) as suspect:
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


@contextmanager
def _lock(connection: logbook.Log) -> Iterator[TextIO]:
    """Wait until no other process works on an image of this log; the system frees the lock of a killed one."""
    # The folder of the log may have been removed
    connection.require_file()
    with open(connection.path.with_suffix(".lock"), "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


@contextmanager
def _lock_for(arrival: Arrival, connection: logbook.Log, *, last: bool) -> Iterator[bool]:
    """Take the lock for work on one image; yield whether an earlier process has ended during such work.

    The locked file lists the hashes of the images whose work was begun and not finished; a process that is killed
    leaves its image there.

    Parameters
    ----------
    last : bool
        This is the last step of the work: take the image off the list.
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


def _log_arrival(arrival: Arrival, inbox: Inbox, run: Run) -> bool:
    """Search a file and log it; return whether it was a new image."""
    connection = run.connection
    image = connection.execute(
        "SELECT id, outcome FROM images WHERE sha256 = ?", (arrival.sha256,)
    ).fetchone()

    # Known bytes: another process was faster, the file has another name, or its times have changed
    again = run.options.again and image is not None and image["outcome"] == "rejected"
    if image is not None and not again:
        with logbook.writing(connection):
            outcome = _duplicate_or_renamed(connection, arrival, image["id"])
            _log_file(connection, arrival, image["id"], outcome)
        return False

    # A failure that may pass, of the disk or the memory, must not reject the image
    result = None
    failure = ""
    try:
        result = search(arrival, run)
    except (FrameError, MemoryError) as error:
        failure = str(error) or "not enough memory"
    if not _is_unchanged(arrival):
        log.info(
            "%s: moved or changed meanwhile; it will be read next time",
            printable(str(arrival.path)),
        )
        return False
    if result is None:
        inbox.leave(arrival.file, failure)
        return False

    # A bug in what follows from the search rejects the image, so that the run can continue
    try:
        _keep_pixels(arrival.sha256, result, run)
        _log_result(arrival, result, run)
    except Exception as error:
        if not _is_internal(error):
            raise
        reason = _internal_fault(error)
        result = ImageResult(result.row | {"outcome": "rejected", "reason": reason})
        _log_result(arrival, result, run)
    running_stack.prune(connection, run.cache, run.params.difference.stack_size)
    _prune_pixels(connection, run.options.log_path)

    image = connection.execute(
        "SELECT id FROM images WHERE sha256 = ?", (arrival.sha256,)
    ).fetchone()
    log.info("%s: %s", result.row["name"], logbook.describe_image(connection, image["id"]))
    return True


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
        _supersede(connection, image)
        _log_findings(image, result, run)
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
    for path in running_stack.own_files(folder, ".difference", ".map"):
        # the temporary files of a killed run have other stems
        if path.stem not in kept:
            path.unlink(missing_ok=True)


def _log_image(connection: sqlite3.Connection, row: dict[str, Any]) -> int:
    """Add an image, or replace the rejection of the same bytes; return its id."""
    rejected = connection.execute(
        "SELECT id FROM images WHERE sha256 = ?", (row["sha256"],)
    ).fetchone()
    if rejected is None:
        return logbook.insert(connection, "images", row)
    # Its health readings are computed again
    connection.execute("DELETE FROM health WHERE image = ?", (rejected["id"],))
    logbook.update(connection, "images", rejected["id"], row)
    return int(rejected["id"])


def _is_internal(error: Exception) -> bool:
    """Return whether an error is a bug of this program, not a fault of disk, log or machine."""
    outside = (BlobpipeError, OSError, MemoryError, sqlite3.OperationalError)
    # SQLite reports a damaged log by the base class itself
    return not isinstance(error, outside) and type(error) is not sqlite3.DatabaseError


def _internal_fault(error: Exception) -> str:
    """Describe a bug for the log, its traceback for --debug."""
    log.debug("internal fault", exc_info=error)
    return internal_fault(error)


def _is_unchanged(arrival: Arrival) -> bool:
    """Return whether a file is still what was hashed."""
    try:
        return Stamp.of(arrival.path.stat()) == arrival.stamp
    except OSError:
        return False


def _duplicate_or_renamed(connection: sqlite3.Connection, arrival: Arrival, image: int) -> str:
    """Return ``duplicate`` if the same bytes are still there under another name, else ``renamed``."""
    path = path_text(arrival.path)
    earlier = connection.execute(
        "SELECT path FROM files WHERE image = ? AND path != ?", (image, path)
    )
    exists = any(os.access(path_of(row["path"]), os.F_OK) for row in earlier)
    return "duplicate" if exists else "renamed"


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


# --------------------------------------------------------------------------------------------------------- search


def search(arrival: Arrival, run: Run) -> ImageResult:
    """Search an image; only the cache of the stack is written.

    Raises
    ------
    FrameError
        If the file cannot be read for a reason that does not lie in its bytes; any other fault rejects the image.
    """
    row: dict[str, Any] = {
        "run": run.number,
        "sha256": arrival.sha256,
        "name": fits_images.frame_name(arrival.path),
        "kind": "difference" if run.options.difference else "image",
        "logged": logbook.now(),
        "outcome": "rejected",
        "reason": "",
    }
    if arrival.fatal:
        return ImageResult(row | {"reason": f"{arrival.fatal}; fetch or write the file again"})
    try:
        return _search_usable(arrival.path, row, run)
    except BlobpipeError as error:
        if _is_temporary(error):
            raise
        return ImageResult(row | {"outcome": "rejected", "reason": str(error)})
    except Exception as error:
        if not _is_internal(error):
            raise
        return ImageResult(row | {"outcome": "rejected", "reason": _internal_fault(error)})


def _search_usable(path: Path, row: dict[str, Any], run: Run) -> ImageResult:
    """Read and search an image; what its header tells is added to its row in place."""
    frame = read_blob_image(path, run.bad_pixels, run.instrument)
    fits_images.require_usable(frame, path)
    row["ny_px"], row["nx_px"] = frame.data.shape
    row["header"] = json.dumps(_kept_cards(frame))
    row["mjd"] = exposure_mjd(frame, path, run.instrument)
    row["late"] = _is_late(run.connection, row["mjd"])
    newer = _newer_version(run.connection, row)
    if newer is not None:
        return ImageResult(row | newer)
    row["signal_e"] = _photon_level_e(frame)

    if run.options.difference:
        template = Template(rms=run.bad_pixels.blank_cells(fits_images.find_plane(path, "SCATTER")))
        require_noise_of_rms_map(frame.data, template.rms, path)
        blobs = _known_blobs(run, row["mjd"])
        return _search_difference(row, frame.data, template, NO_SHIFT, blobs, run)
    return _subtract_and_search(row, frame.data, run)


def _kept_cards(frame: fits_images.Frame) -> dict[str, Any]:
    """Return the header cards that the log keeps and that JSON can hold."""
    found = {card: _card_value(frame, card) for card in KEPT_CARDS}
    return {card: value for card, value in found.items() if value is not None}


def _photon_level_e(frame: fits_images.Frame) -> float | None:
    """Return the photon level that the header gives (electrons per pixel), or None."""
    level = _card_value(frame, LEVEL_CARD)
    is_number = isinstance(level, int | float) and not isinstance(level, bool)
    return float(level) if is_number else None


def _card_value(frame: fits_images.Frame, card: str) -> Any:
    """Return a card as text, truth value or finite number; None for anything else."""
    try:
        value = frame.header.get(card)
        is_usable = isinstance(value, str) or (
            isinstance(value, int | float) and math.isfinite(value)
        )
    except Exception:  # damaged cards make astropy raise nearly anything
        return None
    return value if is_usable else None


def _is_temporary(error: BlobpipeError) -> bool:
    """Return whether a file could not be read for a reason that does not lie in its bytes."""
    cause = error.__cause__
    if isinstance(cause, OSError):
        return cause.errno not in ERRORS_OF_CONTENT
    return isinstance(cause, MemoryError)


def _is_late(connection: sqlite3.Connection, mjd: float) -> int:
    """Return 1 if the log has a usable image of a later date, else 0."""
    later = connection.execute(
        "SELECT 1 FROM images WHERE outcome != 'rejected' AND superseded_by IS NULL AND mjd > ? LIMIT 1",
        (mjd,),
    ).fetchone()
    return int(later is not None)


def _subtract_and_search(row: dict[str, Any], image: Image, run: Run) -> ImageResult:
    """Subtract the stack of the images before it, and search the difference."""
    params = run.params.difference
    blobs = _known_blobs(run, row["mjd"])
    running_stack.require_size(run.connection, image.shape)

    # Without a stack the image waits: the next stacks take it
    reason = f"fewer than {params.stack_size} usable images of its size before it: it waits for the first stack"
    try:
        stack = running_stack.stack_before(
            run.connection,
            run.cache,
            row["mjd"],
            params,
            run.options.reference,
            blobs.landed,
            shape=image.shape,
        )
    except FrameError as error:  # an image of the stack is missing; this one is sound
        stack = None
        reason = str(error)
    if stack is None:
        return ImageResult(row | {"outcome": "stack", "reason": reason})

    # Subtract it, unless the noise shows that the image is in other units
    template = make_template(stack.data, stack.rms, blobs.known)
    expected = template.expected_noise()
    assert expected is not None
    require_noise(fits_images.median_and_noise(image)[1], expected, row["name"])
    difference, shift = subtract(image, template, params, run.instrument)

    # The stacks to come take the image with its blobs at their usual position
    corrections = dict(stack.corrections)
    if stack.n_images:
        assert template.pattern is not None
        packed = running_stack.correction(template.pattern, shift)
        corrections[row["sha256"]] = packed
        running_stack.keep(run.cache, row["sha256"], image, packed)

    row |= {"n_stack": stack.n_images, "stack_sha256": stack.sha256}
    result = _search_difference(row, difference, template, shift, blobs, run)
    result = replace(result, corrections=corrections, rejected=stack.rejected)
    if not stack.n_images:
        return result
    return replace(result, deep=_search_latest(result, difference, template, shift, blobs, run))


def _search_latest(
    result: ImageResult,
    difference: Image,
    template: Template,
    shift: Shift,
    blobs: KnownBlobs,
    run: Run,
) -> DeepResult:
    """Search the latest images together, up to the one that has just been searched alone."""
    row = result.row
    assert template.stack is not None
    candidates = result.candidates
    detected = candidates[candidates["score"] >= run.detector.threshold]
    clear = detected[detected["status"].isin(["new", "known"])]
    alone = detected[detected["status"] == "new"]
    settled = deep.settle(difference, template.stack, shift, clear=clear)
    latest, members = running_stack.latest_before(
        run.connection, run.cache, row["mjd"], template.stack
    )
    running_stack.keep_settled(run.cache, row["sha256"], settled)
    latest.add(settled)

    # What the image shows alone, and blobs that have landed, are no news
    alone = alone.assign(x_px=alone["x_px"] - shift.x_px, y_px=alone["y_px"] - shift.y_px)
    places = [*PLACE_COLUMNS]
    known = pd.concat([blobs.known[places], blobs.landed[places], alone[places]])
    differences = latest.differences()
    found = deep.find_deep_blobs(
        differences,
        replace(template, rms=latest.rms()),
        run.detector,
        deep.thresholds(run.detector.threshold, run.params.deep),
        catalogue=known,
        vetting=run.params.vetting,
        instrument=run.instrument,
    )
    found = found[found["status"] == "new"].reset_index(drop=True)

    # Of the rest count those that have landed and stayed
    new = pd.concat([found[places], alone[places]], ignore_index=True)
    depths = measure_histories(latest.images, new)
    mjd = np.array([*(member.mjd for member in members), row["mjd"]])
    persistent = [
        _is_persistent(mjd, depths.depth_frac[:, k], depths.error_frac[:, k])
        for k in range(len(found))
    ]
    return DeepResult(
        found[np.array(persistent, bool)],
        [*(member.sha256 for member in members), row["sha256"]],
        new,
        depths,
        settled,
        _watch_blobs(differences, blobs, members[0].mjd if members else row["mjd"], run),
    )


def _watch_blobs(
    differences: list[DeepDifference], blobs: KnownBlobs, since_mjd: float, run: Run
) -> BlobHealth | None:
    """Measure how the blobs of the catalogue have changed, those left out that have landed since a date."""
    latest = [each for each in differences if each.n_images == N_IMAGES]
    if run.catalogue is None or not latest:
        return None
    landed = blobs.landed[blobs.landed["first"] >= since_mjd]
    is_new = near_blobs(run.catalogue, landed).any(axis=1)
    return summarise_changes(measure_changes(latest[0], run.catalogue[np.logical_not(is_new)]))


def _is_persistent(
    mjd: npt.NDArray[np.float64], depth: npt.NDArray[Any], error: npt.NDArray[Any]
) -> bool:
    """Return whether a history is that of a blob that has landed and stayed."""
    landing = date_history(mjd, depth, error)
    return landing is not None and landing.is_persistent


def _search_difference(
    row: dict[str, Any],
    difference: Image,
    template: Template,
    shift: Shift,
    blobs: KnownBlobs,
    run: Run,
) -> ImageResult:
    """Search a difference image."""
    detector = run.detector
    observation = observe(
        difference,
        template,
        catalogue=blobs.known,
        shift_px=shift,
        recent_px=blobs.landed[["x_px", "y_px"]].to_numpy(float),
        instrument=run.instrument,
    )
    noise = observation.noise_frac

    # The network sees the difference whitened, clipped and scaled; the fit sees it whitened
    clipped, clipping = clip_image(observation.whitened, run.params.clip)
    scaled, _ = scale_image(clipped, run.params.scale)
    response = detector.respond(scaled)
    peaks = detector.peaks(response, scaled)
    candidates = observation.find_blobs(detector, peaks=peaks, vetting=run.params.vetting)
    row |= {
        "outcome": "searched",
        "shift_x_px": shift.x_px,
        "shift_y_px": shift.y_px,
        "noise_frac": noise,
        "clipped_frac": clipping.clipped_frac,
    }
    return ImageResult(
        row,
        candidates,
        _subframe_rows(response, candidates, detector, difference.shape),
        thumbnails.overview(scaled),
        Pictures(difference, noise, response, template.stack),
    )


def _known_blobs(run: Run, mjd: float) -> KnownBlobs:
    """Read which blobs are known before a date; faded candidates do not count."""
    found = run.connection.execute(
        "SELECT x_px, y_px, radius_px, first_mjd, decision = 'confirmed' OR status = 'seen_again' FROM candidate_list "
        "WHERE radius_px IS NOT NULL AND (decision = 'confirmed' OR decision != 'rejected' AND status != 'faded') "
        "ORDER BY first_mjd, id"
    ).fetchall()
    columns = [*PLACE_COLUMNS, "first", "known"]
    rows = pd.DataFrame([tuple(row) for row in found], columns=columns, dtype=float)

    # A candidate that one image alone has shown is recent, but not known
    known = [rows.loc[rows["known"] == 1, list(PLACE_COLUMNS)]]
    if run.catalogue is not None:
        known.insert(0, run.catalogue[list(PLACE_COLUMNS)])
    return KnownBlobs(pd.concat(known, ignore_index=True), rows[rows["first"] < mjd])


def _subframe_rows(
    response: Image, candidates: pd.DataFrame, detector: DenseDetector, shape: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Make the rows of ``subframes``, each with a picture of the network's map."""
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


# ------------------------------------------------------------------------------------------- versions of exposures


def _versions(connection: sqlite3.Connection, row: Mapping[str, Any]) -> list[sqlite3.Row]:
    """List the images of the same exposure that count, in the order in which they were logged."""
    near = connection.execute(
        "SELECT id, name, mjd, header, kind, outcome FROM images "
        "WHERE outcome != 'rejected' AND superseded_by IS NULL AND sha256 != ? AND mjd BETWEEN ? AND ? ORDER BY id",
        (row["sha256"], row["mjd"] - SAME_EXPOSURE_D, row["mjd"] + SAME_EXPOSURE_D),
    ).fetchall()
    exposure = _exposure(row)
    return [other for other in near if is_same_exposure(exposure, _exposure(other))]


def _exposure(row: Mapping[str, Any] | sqlite3.Row) -> Exposure:
    """Return the exposure of a row of ``images``."""
    return Exposure(row["name"], row["mjd"], json.loads(row["header"]))


def _newer_version(connection: sqlite3.Connection, row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return columns that name the newer version of an image in the log; None if there is none.

    An image counts as newer than a difference, since stacks take it.
    """
    for other in _versions(connection, row):
        if other["kind"] == row["kind"]:
            is_newer = is_older_version(_exposure(row), _exposure(other))
        else:
            is_newer = other["kind"] == "image"
        if is_newer:
            reason = f"an older version of the exposure that the log has as image {other['id']}, {other['name']}"
            return {"reason": reason, "superseded_by": other["id"]}
    return None


def _supersede(connection: sqlite3.Connection, image: int) -> None:
    """Replace older versions of an exposure, before the findings of the newer are logged.

    A version that could not be searched, for want of a stack, does not replace one that was: it is superseded itself.
    """
    row = connection.execute("SELECT * FROM images WHERE id = ?", (image,)).fetchone()
    if row["outcome"] == "rejected":
        return
    for other in _versions(connection, row):
        replaces = row["outcome"] == "searched" or other["outcome"] == "stack"
        newer, older = (image, other["id"]) if replaces else (other["id"], image)
        connection.execute("UPDATE images SET superseded_by = ? WHERE id = ?", (newer, older))


# ----------------------------------------------------------------------------------------- findings and candidates


def _log_findings(image: int, result: ImageResult, run: Run) -> None:
    """Log subframes, peaks, corrections of the stack, detections and pictures of an image."""
    connection = run.connection
    for row in result.subframes:
        logbook.insert(connection, "subframes", {"image": image, **row})
    if result.row["outcome"] == "searched":
        _log_peaks(image, result, connection)

    # What was learnt of the images of the stack
    for sha256, packed in result.corrections.items():
        connection.execute(
            "INSERT INTO corrections (image, bytes) SELECT id, ? FROM images WHERE sha256 = ?",
            (packed, sha256),
        )
    for sha256, reason in result.rejected.items():
        connection.execute(
            "UPDATE images SET outcome = 'rejected', reason = ? WHERE sha256 = ?", (reason, sha256)
        )

    if result.overview:
        picture = {"image": image, "kind": "difference", "type": "image/jpeg"}
        logbook.insert(connection, "pictures", picture | {"bytes": result.overview})
    if result.pictures is None:
        return
    for detection, row in _log_detections(image, result, run):
        for kind, png in result.pictures.draw(row).items():
            picture = {"image": image, "detection": detection, "kind": kind, "type": "image/png"}
            logbook.insert(connection, "pictures", picture | {"bytes": png})
    if result.deep is not None:
        _log_deep(image, result.deep, run)


def _log_deep(image: int, found: DeepResult, run: Run) -> None:
    """Log what the latest images show together, the depths of all candidates, and when each landed."""
    connection = run.connection
    _log_deep_blobs(image, found.found, connection, run.params.quicklook.match_px)

    # Depths of all candidates on this image; of new ones on those before, too
    live = pd.read_sql_query(
        "SELECT l.id, l.x_px, l.y_px, l.radius_px, l.status FROM candidate_list l "
        "WHERE l.radius_px IS NOT NULL AND l.decision != 'rejected' AND l.status != 'faded' ORDER BY l.id",
        connection,
    )
    now = measure_histories([found.settled], live)
    for k, candidate in enumerate(live["id"].tolist()):
        _log_depths(connection, [image], candidate, now.depth_frac[:, k], now.error_frac[:, k])
    marks = ", ".join("?" * len(found.images))
    ids = dict(
        connection.execute(f"SELECT sha256, id FROM images WHERE sha256 IN ({marks})", found.images)
    )
    numbers = [ids[sha256] for sha256 in found.images]
    pairs = pair(
        live[["x_px", "y_px"]].to_numpy(float),
        found.places[["x_px", "y_px"]].to_numpy(float),
        run.params.quicklook.match_px,
    )
    for i, k in pairs.tolist():
        candidate = int(live["id"].iloc[i])
        _log_depths(
            connection,
            numbers,
            candidate,
            found.depths.depth_frac[:, k],
            found.depths.error_frac[:, k],
        )

    # A landing is dated as long as the latest images show what was there before it
    marks = ", ".join("?" * len(numbers))
    recent = connection.execute(
        f"SELECT candidate FROM detections WHERE candidate IS NOT NULL GROUP BY candidate HAVING min(image) IN ({marks})",
        numbers,
    ).fetchall()
    dated = {row["candidate"] for row in recent}
    for candidate in live["id"].tolist():
        if candidate in dated:
            _date_candidate(connection, candidate)


def _log_deep_blobs(
    image: int, found: pd.DataFrame, connection: sqlite3.Connection, match_px: float
) -> None:
    """Log the new blobs that the latest images show together.

    What people have rejected is no news; a candidate that had faded, or that could not be measured, is there after all.
    """
    unknown = pd.read_sql_query(
        "SELECT id, x_px, y_px, decision FROM candidate_list "
        "WHERE decision = 'rejected' OR status = 'faded' OR radius_px IS NULL ORDER BY id",
        connection,
    )
    places = ["x_px", "y_px"]
    matched = pair(found[places].to_numpy(float), unknown[places].to_numpy(float), match_px)
    earlier = dict(matched.tolist())
    columns = (*DETECTION_COLUMNS, "probability", "n_images")
    for k, row in enumerate(found.to_dict("records")):
        if k not in earlier:
            place = {name: row[name] for name in places}
            candidate = logbook.insert(
                connection, "candidates", {"image": image, "status": "seen_again", **place}
            )
        elif unknown["decision"].iloc[earlier[k]] == "rejected":
            continue
        else:
            candidate = int(unknown["id"].iloc[earlier[k]])
            logbook.update(connection, "candidates", candidate, {"status": "seen_again"})
        measured = {name: row[name] for name in columns}
        logbook.insert(
            connection, "detections", {"image": image, "candidate": candidate, **measured}
        )


def _log_depths(
    connection: sqlite3.Connection,
    images: list[int],
    candidate: int,
    depth: npt.NDArray[Any],
    error: npt.NDArray[Any],
) -> None:
    """Log the depth of a candidate on some images, unless it is there or has none."""
    rows = [
        (image, candidate, float(depth[i]), float(error[i]))
        for i, image in enumerate(images)
        if np.isfinite(depth[i])
    ]
    connection.executemany("INSERT OR IGNORE INTO depths VALUES (?, ?, ?, ?)", rows)


def _date_candidate(connection: sqlite3.Connection, candidate: int) -> None:
    """Date the landing of a candidate from its depths; one that has landed and stayed is seen again."""
    rows = connection.execute(
        "SELECT i.id, i.mjd, d.depth_frac, d.depth_err_frac FROM depths d JOIN images i ON i.id = d.image "
        "WHERE d.candidate = ? AND i.outcome != 'rejected' AND i.superseded_by IS NULL ORDER BY i.mjd, i.id",
        (candidate,),
    ).fetchall()
    images, mjd, depth, error = np.array([tuple(row) for row in rows]).reshape(-1, 4).T
    landing = date_history(mjd, depth, error)
    if landing is None:
        return
    columns: dict[str, Any] = {
        "history": landing.verdict,
        "after_mjd": landing.after_mjd,
        "before_mjd": landing.before_mjd,
        "level_frac": landing.level_frac,
        "step_frac": landing.depth_frac,
        "step_err_frac": landing.depth_err_frac,
    }
    if landing.is_persistent:
        columns |= {"status": "seen_again", "image": int(images[landing.first])}
    logbook.update(connection, "candidates", candidate, columns)


def _log_peaks(image: int, result: ImageResult, connection: sqlite3.Connection) -> None:
    """Log what the search takes for new, also below the threshold: a threshold can rest on it later."""
    found = result.candidates
    peaks = found[(found["status"] == "new") & (found["score"] >= CANDIDATE)]
    for x, y, score in peaks[["x_px", "y_px", "score"]].to_numpy(float).tolist():
        place = {"x_px": x - result.row["shift_x_px"], "y_px": y - result.row["shift_y_px"]}
        logbook.insert(connection, "peaks", {"image": image, **place, "score": score})
    logbook.update(connection, "images", image, {"n_peaks": len(peaks)})


def _log_detections(image: int, result: ImageResult, run: Run) -> list[tuple[int, dict[str, Any]]]:
    """Log detections and fainter sightings of candidates; return the id and the row of those to be drawn."""
    connection = run.connection
    params = run.params.quicklook
    columns = (*DETECTION_COLUMNS, "probability")
    shift = np.array([result.row["shift_x_px"], result.row["shift_y_px"]])
    new = connection.execute("SELECT id FROM candidates WHERE status = 'new'")
    waiting = {row["id"] for row in new}
    drawn = []
    seen = set()
    for row, candidate in _match_candidates(connection, result.candidates, shift, params.match_px):
        is_detection = row["score"] >= run.detector.threshold

        # A new detection that fits no candidate becomes one
        is_new_candidate = candidate is None and is_detection and row["status"] == "new"
        if is_new_candidate:
            place = {"x_px": row["x_px"] - shift[0], "y_px": row["y_px"] - shift[1]}
            candidate = logbook.insert(
                connection, "candidates", {"image": image, "status": "new", **place}
            )

        if candidate is not None:
            seen.add(candidate)
        if candidate is not None or is_detection:
            detection = {"image": image, "candidate": candidate}
            measured = {name: row[name] for name in columns}
            number = logbook.insert(connection, "detections", detection | measured)
            # Candidates that wait for a second sighting are drawn each time
            if is_new_candidate or candidate in waiting:
                drawn.append((number, row))
    _update_candidates(connection, image, seen, params.fade_after)
    return drawn


def _match_candidates(
    connection: sqlite3.Connection,
    found: pd.DataFrame,
    shift: npt.NDArray[np.float64],
    match_px: float,
) -> Iterator[tuple[dict[str, Any], int | None]]:
    """Yield each row of a search with the candidate of the log that it shows, or None.

    Bad pixels show none. As long as the stack has not fully taken up a known blob, it may be measured off its centre:
    a second round matches known blobs with candidates seen again within a larger distance.
    """
    logged = connection.execute(
        "SELECT id, status, x_px, y_px FROM candidates ORDER BY id"
    ).fetchall()
    rows = [dict(row) for _, row in found.iterrows()]
    matched: dict[int, int] = {}
    for row_statuses, candidate_status, within_px in (
        (("new", "known", "dip"), "", match_px),
        (("known",), "seen_again", NEAR_PX),
    ):
        # Rows and candidates that are not matched yet
        open_rows = [
            k for k, row in enumerate(rows) if row["status"] in row_statuses and k not in matched
        ]
        taken = set(matched.values())
        free = [
            candidate
            for candidate in logged
            if candidate["id"] not in taken and candidate_status in ("", candidate["status"])
        ]

        # Candidates are kept at their usual place, the shift of the mirror taken off
        row_places = np.array([[rows[k]["x_px"], rows[k]["y_px"]] for k in open_rows])
        candidate_places = np.array([[each["x_px"], each["y_px"]] for each in free])
        pairs = pair(row_places.reshape(-1, 2) - shift, candidate_places.reshape(-1, 2), within_px)
        matched |= {open_rows[i]: int(free[j]["id"]) for i, j in pairs}
    for k, row in enumerate(rows):
        yield row, matched.get(k)


def _update_candidates(
    connection: sqlite3.Connection, image: int, seen: set[int], fade_after: int
) -> None:
    """Mark candidates that are seen again; fade those that later images do not show.

    If the image replaces older versions of its exposure, what those showed or missed is counted again.
    """
    mjd = connection.execute("SELECT mjd FROM images WHERE id = ?", (image,)).fetchone()["mjd"]

    # Candidates that the replaced versions showed
    replaced = connection.execute(
        "SELECT id FROM images WHERE superseded_by = ?", (image,)
    ).fetchall()
    shown_by_older = {
        row["candidate"]
        for older in replaced
        for row in connection.execute(
            "SELECT candidate FROM detections WHERE image = ?", (older["id"],)
        )
    }

    candidates = connection.execute(
        "SELECT c.id, c.status, c.missed, c.image, i.mjd, i.superseded_by FROM candidates c JOIN images i ON i.id = c.image"
    ).fetchall()
    for row in candidates:
        candidate = row["id"]
        is_seen = candidate in seen
        is_new = row["status"] == "new"
        is_first = row["image"] == image
        rests_on_older = row["superseded_by"] is not None and is_seen
        may_be_missed_twice = bool(replaced) and is_new and not is_first
        if rests_on_older or candidate in shown_by_older or may_be_missed_twice:
            _recount(connection, candidate, fade_after)
        elif is_seen and not is_first:
            # A late image may become the first that shows it
            first = image if mjd < row["mjd"] else row["image"]
            connection.execute(
                "UPDATE candidates SET status = 'seen_again', image = ? WHERE id = ?",
                (first, candidate),
            )
        elif not is_seen and is_new and mjd > row["mjd"]:
            status = "faded" if row["missed"] + 1 >= fade_after else "new"
            connection.execute(
                "UPDATE candidates SET missed = missed + 1, status = ? WHERE id = ?",
                (status, candidate),
            )


def _recount(connection: sqlite3.Connection, candidate: int, fade_after: int) -> None:
    """Set the status of a candidate from the versions of exposures that count."""
    sightings = connection.execute(
        "SELECT DISTINCT i.id, i.mjd FROM detections d JOIN images i ON i.id = d.image "
        "WHERE d.candidate = ? AND i.superseded_by IS NULL ORDER BY i.mjd, i.id",
        (candidate,),
    ).fetchall()

    # What several images have shown together does not rest on a version of one of them
    deep_ones = connection.execute(
        "SELECT 1 FROM detections WHERE candidate = ? AND n_images > 1 LIMIT 1", (candidate,)
    )
    is_deep = deep_ones.fetchone() is not None

    # Only superseded versions show it: it keeps their sightings, for the record
    if not sightings:
        if not is_deep:
            connection.execute("UPDATE candidates SET status = 'faded' WHERE id = ?", (candidate,))
        return

    connection.execute(
        "UPDATE detections SET candidate = NULL WHERE candidate = ? AND n_images = 1 "
        "AND image IN (SELECT id FROM images WHERE superseded_by IS NOT NULL)",
        (candidate,),
    )
    if is_deep:
        return
    image, mjd = sightings[0]
    if len(sightings) > 1:
        connection.execute(
            "UPDATE candidates SET status = 'seen_again', image = ? WHERE id = ?",
            (image, candidate),
        )
        return

    # One sighting: later images that were logged since have missed it
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
    """Return the image by which the log first had an exposure."""
    query = "SELECT min(id) AS id FROM images WHERE superseded_by = ? AND id < ?"
    while (older := connection.execute(query, (image, image)).fetchone()["id"]) is not None:
        image = older
    return image
