"""Search, log and announce every new image of a folder, each exactly once (ISR 6).

Everything that follows from an image is written in one transaction of the log, and the same inputs give the same rows:
whenever a run is stopped, the next one continues where it ended. Several runs may share a log; they take turns.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from blobpipe import __version__
from blobpipe.core import files, tables
from blobpipe.core.detector import Detector
from blobpipe.detection.detectors import DenseDetector, load_dense_detector
from blobpipe.detection.promise import OTHER_BAD_PIXELS, PromisedPoint, apply_promised_point
from blobpipe.errors import FrameError, LogError, ModelError, TableError, printable
from blobpipe.images.bad_pixels import BadPixels, read_bad_pixels
from blobpipe.images.listing import LIKE_AN_IMAGE
from blobpipe.monitor import logbook, notices
from blobpipe.monitor.inbox import Inbox, path_text
from blobpipe.networks import kernels, model_file
from blobpipe.quicklook import running_stack
from blobpipe.quicklook.arrivals import locked, new_files, read_arrival
from blobpipe.quicklook.folder import require_folder
from blobpipe.quicklook.options import PLACE_COLUMNS, Options, Run
from blobpipe.quicklook.processing import process, say_passed_over

log = logging.getLogger(__name__)

# Longest pause between two looks at a watched folder (s)
PAUSE_S = 1.0


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
    require_folder(folder)
    frames = None if options.batch is None else _frames_of_batch(folder, options.batch)
    inbox = Inbox(folder, options.params.quicklook.settle_s, frames)
    # Looking before the model is loaded starts the clock by which files count as complete
    inbox.look()
    with _open_run(options, inbox) as run:
        # Wait until the files that are there now are complete
        new = new_files(inbox, run.connection, options.again)
        time.sleep(max((inbox.unsettled_s(file) for file in new), default=0.0))
        logged = process(inbox, run)

        for file in new_files(inbox, run.connection):
            if inbox.unsettled_s(file):
                log.info(
                    "%s: still being written; it will be read next time", printable(str(file.path))
                )
        notices.send(run.connection, options.params.notices)
        _say_what_was_done(folder, run, logged)
        return logged


def _frames_of_batch(folder: Path, batch: int) -> set[str]:
    """Return the names of the images in a batch of the folder's list."""
    table = tables.read_frame_list(folder)
    batches = tables.batches(len(table))
    if batch not in range(len(batches)):
        raise TableError(
            f"{folder}/frames.csv: found no batch {batch}, expected 0 to {len(batches) - 1} for its {len(table)} images; "
            "choose one of these"
        )
    return set(table["frame"].iloc[batches[batch]])


def _say_what_was_done(folder: Path, run: Run, logged: int) -> None:
    """Say how many images were logged and what they showed, or why there were none."""
    if logged:
        log.info("%s", logbook.describe_run(run.connection, run.number))
        undecided = run.connection.execute(
            "SELECT count(*) FROM candidate_list WHERE decision = ''"
        ).fetchone()[0]
        if undecided:
            candidates = logbook.counted(undecided, "candidate")
            log.info("%s to decide on: blobpipe serve --log %s", candidates, run.options.log_path)
        return
    known = run.connection.execute("SELECT count(*) FROM images").fetchone()[0]
    if any(LIKE_AN_IMAGE.search(path.name) for path in folder.iterdir()):
        log.info("%s: no image was logged; %d are in the log", folder, known)
        return
    inside = sorted({path.parent for path in folder.glob("*/*") if LIKE_AN_IMAGE.search(path.name)})
    advice = (
        f"{inside[0]} has some: name that folder" if inside else "name the folder of your images"
    )
    log.info("%s: no FITS image in it, expected some; %s", folder, advice)


def watch(folder: Path, options: Options) -> None:
    """Process images as they appear, until interrupted.

    The folder is also searched every second, since network drives do not report all events.

    Raises
    ------
    LogError
        If the log is moved, deleted or replaced meanwhile.
    """
    require_folder(folder)
    settle_s = options.params.quicklook.settle_s
    pause_s = min(PAUSE_S, max(settle_s, 0.05))
    inbox = Inbox(folder, settle_s)
    with _open_run(options, inbox) as run:
        log.info("watching %s; Ctrl-C ends it", folder)
        for _ in _events(folder, pause_s):
            process(inbox, run)
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
    stack_folder = logbook.folder_beside(options.log_path, "stack")
    cache = running_stack.Cache(stack_folder, bad_pixels, options.instrument)
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
        _say_what_new_settings_pass_over(connection, number, options)

        # A run that was killed may have left files in the cache
        with locked(connection):
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


def _say_what_new_settings_pass_over(
    connection: logbook.Log, number: int, options: Options
) -> None:
    """Say how many images a smaller stack than that of the last run could have been made for."""
    settings = connection.execute(
        "SELECT params_sha256 FROM runs WHERE id <= ? ORDER BY id DESC LIMIT 2", (number,)
    ).fetchall()
    if options.again or len({row["params_sha256"] for row in settings}) < 2:
        return
    passed_over = logbook.count_passed_over(connection, options.params.difference.stack_size)
    if passed_over:
        say_passed_over(passed_over)


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
            read_arrival(file, inbox, connection, instrument)
            for file in new_files(inbox, connection)
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
