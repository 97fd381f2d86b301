"""Check that the daily routine has everything it needs, one line for each item, with what to do about it."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from blobpipe import __version__
from blobpipe.core import tables
from blobpipe.core.detector import DEFAULT, Detector, read_detector
from blobpipe.detection.detectors import load_dense_detector
from blobpipe.detection.promise import apply_promised_point
from blobpipe.errors import BlobpipeError
from blobpipe.images.bad_pixels import read_bad_pixels
from blobpipe.monitor import delivery, health, logbook, notices
from blobpipe.networks import model_file
from blobpipe.params import BadPixels, Notices, Params, Regression, load_params
from blobpipe.validation import gate

State = Literal["ok", "warn", "fail"]

# free disk space (GB) below which a check fails, and below which it warns: the cache of 60 images
# takes 0.13 GB, the log of 100 images 0.04 GB
LEAST_GB = 0.5
LITTLE_GB = 5.0
# extras for those who develop blobpipe
FOR_DEVELOPERS = ("bench", "cluster", "dev", "docs", "mutants")
EXTRA = re.compile(r"extra == ['\"]([\w-]+)['\"]")  # marker of an optional requirement
NAME = re.compile(r"[\w.-]+")  # name at the beginning of a requirement


class Check(NamedTuple):
    """Report on one item: its state, its name, and what was found and what to do."""

    state: State
    what: str
    found: str


@dataclass(frozen=True)
class Setup:
    """Name the files that the daily routine is run with; None for those that are not named.

    Attributes
    ----------
    params : path or None
    model : path
    catalogue, log : path, optional
    gate_metrics : path, optional
        Metrics of the regression test that the model must have passed; for the pipeline's own model only.
    bad_pixels : tuple of path
        Files of bad pixels, besides those of the settings.
    operating_point : path, optional
        From `blobpipe calibrate`; by default that of the settings, if any.
    detector : str, optional
        Name or path of the detector; by default that of the settings.
    """

    params: Path | None
    model: Path
    catalogue: Path | None = None
    log: Path | None = None
    gate_metrics: Path | None = None
    bad_pixels: tuple[Path, ...] = ()
    operating_point: Path | None = None
    detector: str | None = None


def examine(
    setup: Setup, environ: Mapping[str, str], *, send_test: bool = False
) -> Iterator[Check]:
    """Check installation, settings, detector, model, operating point, catalogue, bad pixels, log, outbox, readings, disk, mail and webhook.

    Nothing is changed, and no server is contacted unless ``send_test``.

    Parameters
    ----------
    environ : mapping
        Environment that holds the login and the webhook's address.
    send_test : bool
        Send a test notice on every channel.

    Yields
    ------
    Check
        One by one, as they are done. A failed check does not end the others.
    """
    yield from _installation()

    # with settings that cannot be read, the rest is checked against the defaults
    params = Params()
    try:
        params = load_params(setup.params) if setup.params else params
        yield Check("ok", "settings", str(setup.params or "none named: the defaults"))
    except BlobpipeError as error:
        yield Check("fail", "settings", str(error))

    detector = DEFAULT
    try:
        detector = read_detector(setup.detector or params.detector)
        yield Check("ok", "detector", detector.title)
    except BlobpipeError as error:
        yield Check("fail", "detector", str(error))

    yield from _guarded("model", lambda: _model(setup, params.regression))
    named = params.quicklook.operating_point
    point = setup.operating_point or (Path(named) if named else None)
    yield from _guarded("operating point", lambda: _operating_point(setup.model, point))
    yield from _guarded("catalogue", lambda: _catalogue(setup.catalogue, detector))
    yield from _guarded(
        "bad pixels", lambda: _bad_pixels(params.bad_pixels, setup.bad_pixels, detector)
    )
    yield from _guarded("log", lambda: _log(setup.log, params))
    yield from _guarded("disk", lambda: _disk(setup.log))
    yield from _guarded("mail", lambda: _mail(params.notices, environ))
    yield from _guarded("webhook", lambda: _webhook(params.notices, environ))
    if send_test:
        yield from _guarded("test notice", lambda: _test_notice(params.notices, environ))


def _guarded(what: str, check: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """Run a check, and report an error that it raises as its failure."""
    try:
        yield from check()
    except (BlobpipeError, OSError) as error:
        yield Check("fail", what, " ".join(str(error).split()))


# ---------------------------------------------------------------------- installation, model, catalogue


def _installation() -> Iterator[Check]:
    """Report the version, the packages that are missing, and the extras that are not installed."""
    try:
        requirements = importlib.metadata.requires("blobpipe") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check(
            "warn",
            "installation",
            "blobpipe is not installed but run from its sources; pip install -e .",
        )
        return
    yield Check("ok", "installation", f"blobpipe {__version__}, Python {platform.python_version()}")

    # by extra; "" for the packages that blobpipe always needs
    missing: dict[str, list[str]] = {}
    for requirement in requirements:
        found = NAME.match(requirement)
        if found is None or _installed(found[0]):
            continue
        extra = EXTRA.search(requirement)
        missing.setdefault(extra[1] if extra else "", []).append(found[0])

    if "" in missing:
        names = ", ".join(missing.pop(""))
        yield Check("fail", "packages", f"missing: {names}; install blobpipe again")
    for extra_name, packages in missing.items():
        if extra_name in FOR_DEVELOPERS:
            continue
        names = ", ".join(packages)
        advice = f"pip install 'blobpipe[{extra_name}]'"
        yield Check("ok", "packages", f"without the optional [{extra_name}] ({names}): {advice}")


def _installed(name: str) -> bool:
    """Tell whether a package is installed."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _model(setup: Setup, params: Regression) -> Iterator[Check]:
    """Check that the model is a dense network, has passed the gate, and has an operating point."""
    path = setup.model
    if model_file.kind_of_model(path) != "dense":
        yield Check(
            "fail",
            "model",
            f"{path}: the report's network, expected the dense one, which measures blobs; name its file",
        )
        return

    # raises for a model that has not passed
    if setup.gate_metrics is not None:
        gate.require_passed(path, setup.gate_metrics, params)

    # a model that no stage has tuned has a default threshold
    point = load_dense_detector(path).point
    found = f"{model_file.described(path)}, score threshold {point.threshold:.4f}"
    if point.frames:
        yield Check("ok", "model", f"{found}, set on {point.frames:.0f} held-out images")
    else:
        advice = "run the stage detect, and name its model"
        yield Check("warn", "model", f"{found}, the default, not set by any test: {advice}")


def _operating_point(model: Path, path: Path | None) -> Iterator[Check]:
    """Check that the operating point that was set on the team's own images is of this model, and keeps its budget."""
    if path is None:
        return
    point = apply_promised_point(load_dense_detector(model), model, path)[1]
    found = f"{path}, {point.describe()}"
    if point.shortfall():
        yield Check("warn", "operating point", f"{found}; {point.shortfall()}")
    else:
        yield Check("ok", "operating point", found)


def _catalogue(path: Path | None, detector: Detector) -> Iterator[Check]:
    """Check that the catalogue of known blobs can be read."""
    if path is None:
        yield Check("ok", "catalogue", "none named: only the stack shows which blobs are known")
        return
    table = tables.read_known(path, ("x_px", "y_px", "radius_px"), detector)
    yield Check("ok", "catalogue", f"{path}, {logbook.counted(len(table), 'blob')}")


def _bad_pixels(
    settings: BadPixels, paths: tuple[Path, ...], detector: Detector
) -> Iterator[Check]:
    """Check that the files of bad pixels can be read."""
    found = read_bad_pixels(settings, paths, detector)
    for file in found.files:
        yield Check("ok", "bad pixels", f"{file.path}, {logbook.counted(file.n_px, 'pixel')}")
    if not found.files:
        yield Check("ok", "bad pixels", "none named: all pixels count as good")


# ------------------------------------------------------------------------------------------------------------ log


def _log(path: Path | None, params: Params) -> Iterator[Check]:
    """Check that the log can be read and written, then its images, outbox and readings."""
    if path is None or not path.exists():
        where = "none named" if path is None else f"{path}: does not exist yet"
        yield Check("ok", "log", f"{where}; 'blobpipe quicklook' makes it, --log names it")
        return
    try:
        # not by `logbook.connect`, which would make or migrate it
        address = f"{path.resolve().as_uri()}?mode=rw"
        with closing(sqlite3.connect(address, uri=True, isolation_level=None)) as log:
            log.row_factory = sqlite3.Row
            yield from _database(log, path)
            # the tables of another version may differ
            version = log.execute("PRAGMA user_version").fetchone()[0]
            if version == len(logbook.versions()):
                yield from _unsearched(log, params.difference.stack_size)
                yield from _outbox(log, params.notices)
                yield from _readings(log)
    except sqlite3.OperationalError as error:
        advice = "close other programs that use it, and check its permissions"
        yield Check("fail", "log", f"{path}: {error}; {advice}")
    except sqlite3.DatabaseError as error:
        advice = "restore its latest copy, or name another --log"
        yield Check("fail", "log", f"{path}: {error}; {advice}")


def _database(connection: sqlite3.Connection, path: Path) -> Iterator[Check]:
    """Check the log's file: damage, version, journal mode, permission to write."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
    damage = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
    dangling = connection.execute("PRAGMA foreign_key_check").fetchall()

    # fails where the log cannot be written
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("ROLLBACK")

    if damage == "ok" and dangling:
        damage = f"{len(dangling)} rows refer to rows that do not exist"
    current = len(logbook.versions())
    if damage != "ok":
        yield Check("fail", "log", f"{path}: damaged ({damage}); restore its latest copy")
    elif version > current:
        found = f"{path}: version {version}, later than this blobpipe's {current}; update blobpipe"
        yield Check("fail", "log", found)
    elif version < current:
        found = f"{path}: version {version}; the next run brings it to {current}"
        yield Check("warn", "log", found)
    elif mode != "wal":
        found = f"{path}: journal mode {mode}, not wal: is it on a network drive? move it to a local disk"
        yield Check("warn", "log", found)
    else:
        yield Check("ok", "log", f"{path}: whole, version {version}, wal, writable")


def _unsearched(connection: sqlite3.Connection, stack_size: int) -> Iterator[Check]:
    """Report images that lacked a stack and could be searched by now."""
    number = logbook.count_passed_over(connection, stack_size)
    if number:
        found = (
            f"{logbook.counted(number, 'image')} kept for stacks alone, although enough images precede by now; "
            "run 'blobpipe quicklook' once with --again"
        )
        yield Check("warn", "images", found)


def _outbox(connection: sqlite3.Connection, params: Notices) -> Iterator[Check]:
    """Report the notices that wait or were given up, and recipients that were refused."""
    rows = connection.execute(
        "SELECT channel, state, count(*) AS n, max(attempts) AS attempts, max(error) AS error FROM notices "
        "WHERE state != 'sent' GROUP BY channel, state ORDER BY channel, state"
    ).fetchall()
    for row in rows:
        what = f"{row['n']} by {row['channel']}"
        if row["state"] == "given_up":
            advice = "correct the cause, then run 'blobpipe notify --again'"
            yield Check("fail", "outbox", f"GIVEN UP: {what} ({row['error']}); {advice}")
        elif row["channel"] not in notices.channels(params):
            found = f"waiting: {what}, which the settings do not use; set it up again"
            yield Check("warn", "outbox", found)
        elif row["attempts"]:
            found = f"waiting: {what}, after {row['attempts']} attempts ({row['error']})"
            yield Check("warn", "outbox", found)
        else:
            yield Check("ok", "outbox", f"waiting: {what}")

    # a mail server may accept a letter for some of its recipients
    last = connection.execute(
        "SELECT error FROM notices WHERE state = 'sent' ORDER BY id DESC LIMIT 1"
    ).fetchone()
    if last and last["error"]:
        yield Check("warn", "outbox", f"the last notice was {last['error']}; correct mail_to")
    if not rows:
        yield Check("ok", "outbox", "nothing waits")


def _readings(connection: sqlite3.Connection) -> Iterator[Check]:
    """Report the readings of the drift monitors that are beyond their limits."""
    lines = health.current_warnings(connection)
    for line in lines:
        yield Check("warn", "readings", line)
    if not lines:
        yield Check("ok", "readings", "all within their limits")


# ----------------------------------------------------------------------------------------- disk, mail, webhook


def _disk(log: Path | None) -> Iterator[Check]:
    """Check the free space where the log lies or will be made."""
    folder = (log or Path("log")).resolve().parent
    while not folder.exists():
        folder = folder.parent
    free_gb = shutil.disk_usage(folder).free / 1e9
    found = f"{free_gb:.1f} GB free in {folder}"
    if free_gb > LITTLE_GB:
        yield Check("ok", "disk", found)
        return
    state: State = "warn" if free_gb > LEAST_GB else "fail"
    yield Check(state, "disk", f"{found}; make room")


def _mail(params: Notices, environ: Mapping[str, str]) -> Iterator[Check]:
    """Check that letters reach the mail server encrypted, if mail is set up."""
    if not params.mail_to:
        yield Check("ok", "mail", "not set up: notices.mail_to is empty")
        return
    login = delivery.smtp_login(environ)
    recipients = ", ".join(params.mail_to)
    route = f"to {recipients} by {params.smtp_host}:{params.smtp_port}, {params.security}"

    # without encryption, only letters without a login that stay on this machine are safe
    is_local = params.smtp_host in delivery.LOOPBACK
    if params.security == "none" and (login or not is_local):
        advice = "set security to starttls or tls"
        found = f"{route}: not encrypted, and the login is not used; {advice}"
        yield Check("warn", "mail", found)
        return
    with_or_without = "with" if login else "without"
    yield Check("ok", "mail", f"{route}, {with_or_without} a login; --send-test tries it")


def _webhook(params: Notices, environ: Mapping[str, str]) -> Iterator[Check]:
    """Check that the webhook's address is set and safe, if a webhook is used."""
    if not params.webhook:
        yield Check("ok", "webhook", "not set up: notices.webhook is false")
        return
    delivery.webhook_url(environ)
    yield Check("ok", "webhook", "set up; --send-test tries it")


def _test_notice(params: Notices, environ: Mapping[str, str]) -> Iterator[Check]:
    """Send a test notice on every channel."""
    accepted = ", ".join(notices.send_test(params, environ))
    yield Check("ok", "test notice", f"accepted by {accepted}")
