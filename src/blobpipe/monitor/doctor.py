"""Is everything there that the daily routine needs? One line for each thing, and what to do about it."""

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
from blobpipe.detection.detectors import load_dense_detector
from blobpipe.errors import BlobpipeError
from blobpipe.monitor import delivery, health, logbook, notices
from blobpipe.networks import model_file
from blobpipe.params import Notices, Params, Regression, load_params
from blobpipe.validation import gate

# the cache of 60 images is 0.13 GB, the log of 100 images 0.04 GB
LEAST_GB = 0.5
LITTLE_GB = 5.0
EXTRA = re.compile(r"extra == ['\"]([\w-]+)['\"]")
NAME = re.compile(r"[\w.-]+")


class Check(NamedTuple):
    """One thing: ``ok``, ``warn`` or ``fail``; its name; what was found, and what to do."""

    state: Literal["ok", "warn", "fail"]
    what: str
    found: str


@dataclass(frozen=True)
class Setup:
    """What the daily routine is run with; None for what is not named.

    Attributes
    ----------
    judged : path, optional
        Metrics of the regression test that the model must have passed: those of the pipeline's own, which nobody named.
    """

    params: Path | None
    model: Path
    catalogue: Path | None = None
    log: Path | None = None
    judged: Path | None = None


def examine(
    setup: Setup, environ: Mapping[str, str], *, send_test: bool = False
) -> Iterator[Check]:
    """Check the installation, settings, model, catalogue, log, outbox, readings, disk, mail and webhook.

    Nothing is changed, and no server is spoken to unless ``send_test``.

    Parameters
    ----------
    environ : mapping
        Where the login and the webhook's address are looked for.
    send_test : bool
        Send a test notice on every channel.

    Yields
    ------
    Check
        One by one, as they are done. A fault of one does not keep the others from being looked at.
    """
    yield from _installation()
    params = Params()
    try:
        params = load_params(setup.params) if setup.params else params
        yield Check("ok", "settings", str(setup.params or "none named: the defaults"))
    except BlobpipeError as error:
        yield Check("fail", "settings", str(error))
    yield from _guarded("model", lambda: _model(setup, params.regression))
    yield from _guarded("catalogue", lambda: _catalogue(setup.catalogue))
    yield from _guarded("log", lambda: _log(setup.log, params.notices))
    yield from _guarded("disk", lambda: _disk(setup.log))
    yield from _guarded("mail", lambda: _mail(params.notices, environ))
    yield from _guarded("webhook", lambda: _webhook(params.notices, environ))
    if send_test:
        yield from _guarded("test notice", lambda: _test(params.notices, environ))


def _guarded(what: str, check: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    try:
        yield from check()
    except (BlobpipeError, OSError) as error:
        yield Check("fail", what, " ".join(str(error).split()))


def _installation() -> Iterator[Check]:
    try:
        wanted = importlib.metadata.requires("blobpipe") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check(
            "warn",
            "installation",
            "blobpipe is not installed but run from its sources; pip install -e .",
        )
        return
    yield Check("ok", "installation", f"blobpipe {__version__}, Python {platform.python_version()}")
    missing: dict[str, list[str]] = {}
    for requirement in wanted:
        extra = EXTRA.search(requirement)
        # a requirement begins with a name
        if not _installed(NAME.match(requirement)[0]):  # type: ignore[index]
            missing.setdefault(extra[1] if extra else "", []).append(NAME.match(requirement)[0])  # type: ignore[index]
    if "" in missing:
        yield Check(
            "fail", "packages", f"missing: {', '.join(missing.pop(''))}; install blobpipe again"
        )
    missing.pop("dev", None)  # for those who change blobpipe: it holds the others
    for extra_name, names in missing.items():
        yield Check(
            "ok",
            "packages",
            f"without [{extra_name}] ({', '.join(names)}): pip install 'blobpipe[{extra_name}]'",
        )


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _model(setup: Setup, params: Regression) -> Iterator[Check]:
    path = setup.model
    if model_file.kind_of_model(path) != "dense":
        yield Check(
            "fail",
            "model",
            f"{path}: the report's network, expected the dense one, which measures; name its file",
        )
        return
    if setup.judged is not None:
        gate.require_passed(path, setup.judged, params)
    point = load_dense_detector(path).point
    found = f"{model_file.described(path)}, threshold {point.threshold:.4f}"
    if point.frames:
        yield Check("ok", "model", f"{found}, set on {point.frames:.0f} held-out images")
    else:
        yield Check(
            "warn",
            "model",
            f"{found}, which nobody has set: run the stage detect, and name its model",
        )


def _catalogue(path: Path | None) -> Iterator[Check]:
    if path is None:
        yield Check("ok", "catalogue", "none named: known blobs are told by the stack alone")
        return
    table = tables.read_known(path, ("x_px", "y_px", "radius_px"))
    yield Check("ok", "catalogue", f"{path}, {len(table)} blobs")


def _log(path: Path | None, params: Notices) -> Iterator[Check]:
    if path is None or not path.exists():
        where = "none named" if path is None else f"{path}: not there yet"
        yield Check("warn", "log", f"{where}; 'blobpipe quicklook' makes it, --log names it")
        return
    try:
        with closing(
            sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True, isolation_level=None)
        ) as log:
            log.row_factory = sqlite3.Row
            yield from _database(log, path)
            if log.execute("PRAGMA user_version").fetchone()[0] == len(logbook.versions()):
                yield from _outbox(log, params)
                yield from _readings(log)
    except sqlite3.OperationalError as error:
        yield Check(
            "fail",
            "log",
            f"{path}: {error}; let no other program hold it, and see who may write there",
        )
    except sqlite3.DatabaseError as error:
        yield Check(
            "fail", "log", f"{path}: {error}; put the last copy of it back, or name another --log"
        )


def _database(connection: sqlite3.Connection, path: Path) -> Iterator[Check]:
    [version], [mode] = (
        connection.execute(f"PRAGMA {name}").fetchone() for name in ("user_version", "journal_mode")
    )
    damage = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
    strays = connection.execute("PRAGMA foreign_key_check").fetchall()
    connection.execute("BEGIN IMMEDIATE")  # fails where it cannot be written
    connection.execute("ROLLBACK")
    if damage != "ok" or strays:
        damage = (
            damage if damage != "ok" else f"{len(strays)} rows refer to rows that are not there"
        )
        yield Check("fail", "log", f"{path}: damaged ({damage}); put the last copy of it back")
    elif version > len(logbook.versions()):
        yield Check(
            "fail",
            "log",
            f"{path}: version {version}, later than this blobpipe's {len(logbook.versions())}; update it",
        )
    elif version < len(logbook.versions()):
        yield Check(
            "warn",
            "log",
            f"{path}: version {version}; the next run brings it to {len(logbook.versions())}",
        )
    elif mode != "wal":
        yield Check(
            "warn",
            "log",
            f"{path}: journal mode {mode}, not wal: is it on a network drive? move it to a local one",
        )
    else:
        yield Check("ok", "log", f"{path}: whole, version {version}, wal, writable")


def _outbox(connection: sqlite3.Connection, params: Notices) -> Iterator[Check]:
    rows = connection.execute(
        "SELECT channel, state, count(*) AS n, max(attempts) AS attempts, max(error) AS error FROM notices "
        "WHERE state != 'sent' GROUP BY channel, state ORDER BY channel, state"
    ).fetchall()
    for row in rows:
        what = f"{row['n']} by {row['channel']}"
        if row["state"] == "given_up":
            yield Check(
                "fail",
                "outbox",
                f"GIVEN UP: {what} ({row['error']}); mend it, then blobpipe notify --again",
            )
        elif row["channel"] not in notices.channels(params):
            yield Check(
                "warn", "outbox", f"waiting: {what}, which the settings do not use; set it up again"
            )
        elif row["attempts"]:
            yield Check(
                "warn",
                "outbox",
                f"waiting: {what}, after {row['attempts']} attempts ({row['error']})",
            )
        else:
            yield Check("ok", "outbox", f"waiting: {what}")
    last = connection.execute(
        "SELECT error FROM notices WHERE state = 'sent' ORDER BY id DESC LIMIT 1"
    ).fetchone()
    if last and last["error"]:
        yield Check("warn", "outbox", f"the last notice was {last['error']}; correct mail_to")
    if not rows:
        yield Check("ok", "outbox", "nothing waits")


def _readings(connection: sqlite3.Connection) -> Iterator[Check]:
    lines = health.standing(connection)
    yield from (Check("warn", "readings", line) for line in lines)
    if not lines:
        yield Check("ok", "readings", "all within their limits")


def _disk(log: Path | None) -> Iterator[Check]:
    folder = (log or Path("log")).resolve().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 1e9
    state: Literal["ok", "warn", "fail"] = (
        "ok" if free > LITTLE_GB else "warn" if free > LEAST_GB else "fail"
    )
    yield Check(
        state, "disk", f"{free:.1f} GB free in {folder}" + ("" if state == "ok" else "; make room")
    )


def _mail(params: Notices, environ: Mapping[str, str]) -> Iterator[Check]:
    if not params.mail_to:
        yield Check("ok", "mail", "not set up: notices.mail_to is empty")
        return
    login = delivery.smtp_login(environ)
    way = f"to {', '.join(params.mail_to)} by {params.smtp_host}:{params.smtp_port}, {params.security}"
    if params.security == "none" and (login or params.smtp_host not in delivery.LOOPBACK):
        yield Check(
            "warn",
            "mail",
            f"{way}: not encrypted, and the login is not used; set security to starttls or tls",
        )
    else:
        yield Check(
            "ok", "mail", f"{way}, {'with' if login else 'without'} a login; --send-test tries it"
        )


def _webhook(params: Notices, environ: Mapping[str, str]) -> Iterator[Check]:
    if params.webhook:
        delivery.webhook_url(environ)
    yield Check(
        "ok",
        "webhook",
        "set up; --send-test tries it"
        if params.webhook
        else "not set up: notices.webhook is false",
    )


def _test(params: Notices, environ: Mapping[str, str]) -> Iterator[Check]:
    yield Check("ok", "test notice", f"accepted by {', '.join(notices.send_test(params, environ))}")
