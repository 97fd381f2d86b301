"""The log: its schema, its versions, and what a transaction keeps."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from astropy.table import Table
from tests.unit import synthetic_log

from blobpipe import cli
from blobpipe.errors import LogError
from blobpipe.monitor import logbook, thumbnails

RUN = {
    "started": "2024-05-01T00:00:00.000Z",
    "version": "0.1.0",
    "model": "model.safetensors",
    "model_sha256": "a" * 64,
    "params_sha256": "b" * 64,
    "catalogue_sha256": "",
    "threshold": 0.957583261,
}


@pytest.fixture
def log(tmp_path: Path) -> sqlite3.Connection:
    connection = logbook.connect(tmp_path / "log.sqlite", make=True)
    with logbook.writing(connection):
        logbook.insert(connection, "runs", RUN)
    return connection


def image(**more: object) -> dict[str, object]:
    row = {
        "run": 1,
        "sha256": "c" * 64,
        "name": "f1",
        "kind": "image",
        "logged": RUN["started"],
        "outcome": "stack",
    }
    return row | more


def test_a_log_is_made_once_and_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.sqlite"
    logbook.connect(path, make=True).close()
    connection = logbook.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone()[0] == len(logbook.versions())
    assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert connection.execute("PRAGMA foreign_keys").fetchone()[0] == 1


def test_a_log_of_version_1_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.sqlite"
    first = logbook.versions()[:1]
    with monkeypatch.context() as patch:
        patch.setattr(logbook, "versions", lambda: first)
        old = logbook.connect(path, make=True)
        with logbook.writing(old):
            logbook.insert(old, "runs", RUN)
            for number in range(2):
                logbook.insert(old, "images", image(sha256=f"{number:064x}", outcome="searched"))
            logbook.insert(
                old, "candidates", {"image": 1, "status": "new", "x_px": 1.0, "y_px": 2.0}
            )
            row = {
                "candidate": 1,
                "status": "new",
                "x_px": 1.0,
                "y_px": 2.0,
                "snr": 9.0,
                "score": 0.9,
                "probability": 0.8,
            }
            logbook.insert(old, "detections", {"image": 1, **row})
        old.close()
    log = logbook.connect(path)
    assert [tuple(row) for row in log.execute("SELECT id, outcome, superseded_by FROM images")] == [
        (1, "searched", None),
        (2, "searched", None),
    ]
    # stacks register these images again
    assert log.execute("SELECT count(*) FROM corrections").fetchone()[0] == 0
    assert log.execute("SELECT sightings, snr FROM candidate_list").fetchone()[:] == (1, 9.0)
    assert log.execute("PRAGMA foreign_key_check").fetchall() == []


def test_an_older_log_is_brought_to_this_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log.sqlite"
    with logbook.writing(logbook.connect(path, make=True)) as connection:
        logbook.insert(connection, "runs", RUN)
    steps = [
        *logbook.versions(),
        "ALTER TABLE runs ADD COLUMN host TEXT NOT NULL DEFAULT 'here';\nCREATE TABLE extra (a);",
    ]
    monkeypatch.setattr(logbook, "versions", lambda: steps)
    newer = logbook.connect(path)
    assert [row["host"] for row in newer.execute("SELECT host FROM runs")] == ["here"]
    monkeypatch.undo()
    with pytest.raises(
        LogError, match=rf"log.sqlite: found version {len(steps)} of the log, expected at most"
    ):
        logbook.connect(path)


def test_a_log_of_version_1_gets_the_new_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log.sqlite"
    first = logbook.versions()[:1]
    steps = logbook.versions()
    monkeypatch.setattr(logbook, "versions", lambda: first)
    with contextlib.closing(logbook.connect(path, make=True)) as old, logbook.writing(old):
        logbook.insert(old, "runs", RUN)
        logbook.insert(old, "images", image())
        row = {
            "path": "/in/f1.fits",
            "sha256": "c" * 64,
            "size_bytes": 5,
            "modified_ns": 7,
            "seen": RUN["started"],
        }
        logbook.insert(old, "files", row | {"outcome": "logged", "image": 1})
    monkeypatch.setattr(logbook, "versions", lambda: steps)
    log = logbook.connect(path)
    assert log.execute("PRAGMA user_version").fetchone()[0] == len(steps) > 1
    found = dict(log.execute("SELECT * FROM files").fetchone())
    assert {name: found[name] for name in row} == row
    assert (found["changed_ns"], found["inode"]) == (None, None)
    found = dict(log.execute("SELECT * FROM images").fetchone())
    assert {name: found[name] for name in image()} == image()
    assert (found["nx_px"], found["ny_px"]) == (None, None)


@pytest.mark.parametrize("fate", ["moved", "deleted", "replaced", "folder moved"])
def test_nothing_is_written_into_a_log_that_has_lost_its_name(tmp_path: Path, fate: str) -> None:
    path = tmp_path / "out" / "log.sqlite"
    log = logbook.connect(path, make=True)
    with logbook.writing(log):
        logbook.insert(log, "runs", RUN)
    match fate:
        case "moved":
            path.rename(tmp_path / "elsewhere.sqlite")
        case "deleted":
            path.unlink()
        case "replaced":
            shutil.copy(path, tmp_path / "copy")
            (tmp_path / "copy").replace(path)
        case _:
            path.parent.rename(tmp_path / "elsewhere")
    with (
        pytest.raises(
            LogError, match=r"log.sqlite: moved, deleted or replaced while it was in use"
        ),
        logbook.writing(log),
    ):
        logbook.insert(log, "runs", RUN)
    assert log.execute("SELECT count(*) FROM runs").fetchone()[0] == 1


def test_a_log_of_version_1_keeps_its_rows_and_says_seen_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log.sqlite"
    first = logbook.versions()[:1]
    latest = logbook.versions()
    monkeypatch.setattr(logbook, "versions", lambda: first)
    old = logbook.connect(path, make=True)
    with logbook.writing(old):
        logbook.insert(old, "runs", RUN)
        logbook.insert(old, "images", image(mjd=60000.0))
        for number, status in ((3, "new"), (5, "confirmed"), (8, "faded")):
            place = {"x_px": 10.25 * number, "y_px": 7.0}
            logbook.insert(
                old,
                "candidates",
                {"id": number, "image": 1, "status": status, "missed": number} | place,
            )
            seen = {
                "image": 1,
                "candidate": number,
                "status": "new",
                "snr": 9.0,
                "score": 0.9,
                "probability": 0.8,
            }
            logbook.insert(old, "detections", seen | place)
            told = {
                "key": f"candidate-{number}-{status}",
                "channel": "mail",
                "image": 1,
                "candidate": number,
            }
            told |= {
                "subject": f"blobpipe: {status} blob at x 1",
                "text": f"Candidate, {status} with the image f1",
            }
            logbook.insert(old, "notices", told | {"created": RUN["started"]})
        logbook.insert(
            old,
            "reviews",
            {"candidate": 5, "decision": "unsure", "reviewer": "Ada", "at": RUN["started"]},
        )
    # Version 1 has none of these
    names = [name for name in logbook.TABLES if name not in ("peaks", "depths", "nearly_found")]
    before = {name: [tuple(row) for row in old.execute(f"SELECT * FROM {name}")] for name in names}
    columns = {
        name: ", ".join(row[1] for row in old.execute(f"PRAGMA table_info({name})"))
        for name in names
    }
    old.close()
    monkeypatch.setattr(logbook, "versions", lambda: latest)
    log = logbook.connect(path)
    assert log.execute("PRAGMA foreign_key_check").fetchall() == []
    assert log.execute("PRAGMA foreign_keys").fetchone()[0] == 1
    for name in ("runs", "images", "detections", "reviews"):
        assert [tuple(row) for row in log.execute(f"SELECT {columns[name]} FROM {name}")] == before[
            name
        ], name
    for name in ("candidates", "candidate_list"):
        rows = [
            tuple("seen_again" if value == "confirmed" else value for value in row)
            for row in before[name]
        ]
        found = [tuple(row) for row in log.execute(f"SELECT {columns[name]} FROM {name}")]
        assert sorted(found) == sorted(rows), name
    told = log.execute("SELECT key, subject, text FROM notices WHERE candidate = 5").fetchone()
    assert tuple(told) == (
        *("candidate-5-seen_again", "blobpipe: blob seen again at x 1"),
        "Candidate, seen again with the image f1",
    )
    with pytest.raises(sqlite3.IntegrityError, match="CHECK"), logbook.writing(log):
        log.execute("UPDATE candidates SET status = 'confirmed'")
    with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"), logbook.writing(log):
        log.execute("DELETE FROM candidates")


def test_the_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "theirs.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as theirs:
        theirs.execute("CREATE TABLE stars (name TEXT)")
    with pytest.raises(LogError, match="another program's database"):
        logbook.connect(path, make=True)
    with contextlib.closing(sqlite3.connect(path)) as theirs:
        assert [name for (name,) in theirs.execute("SELECT name FROM sqlite_master")] == ["stars"]


def test_a_migration_that_fails_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log.sqlite"
    before = len(logbook.versions())
    logbook.connect(path, make=True).close()
    monkeypatch.setattr(
        logbook,
        "versions",
        lambda: [""] * before + ["CREATE TABLE extra (a);\nCREATE TABLE runs (a);"],
    )
    with pytest.raises(LogError, match="runs already exists"):
        logbook.connect(path)
    monkeypatch.undo()
    assert (
        not logbook.connect(path)
        .execute("SELECT name FROM sqlite_master WHERE name = 'extra'")
        .fetchall()
    )


def test_what_fails_within_a_transaction_leaves_nothing(log: sqlite3.Connection) -> None:
    def twice() -> None:
        with logbook.writing(log):
            logbook.insert(log, "images", image())
            logbook.insert(log, "images", image())  # the same bytes once more

    with pytest.raises(sqlite3.IntegrityError):
        twice()
    assert log.execute("SELECT count(*) FROM images").fetchone()[0] == 0


# --- a disk and other programs that do not play along ----------------------------------------------------------------


def fill(log: sqlite3.Connection) -> None:
    with logbook.writing(log):
        for number in range(50):
            logbook.insert(log, "images", image(sha256=str(number), header="x" * 10_000))


@contextlib.contextmanager
def no_more_pages(log: sqlite3.Connection) -> Iterator[None]:
    """SQLite takes the disk for full."""
    log.execute(f"PRAGMA max_page_count = {log.execute('PRAGMA page_count').fetchone()[0]}")
    yield
    log.execute("PRAGMA max_page_count = 1000000")


@contextlib.contextmanager
def no_larger_files(_: sqlite3.Connection) -> Iterator[None]:
    """The kernel fails each write beyond 100,000 bytes of a file, as a disk that gives up."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (no_more_pages, "no space left on the disk; free some space"),
        (no_larger_files, "the disk could not be"),
    ],
)
def test_what_cannot_be_written_is_told_by_its_first_reason_and_leaves_nothing(
    log: sqlite3.Connection, trouble: type, words: str
) -> None:
    with trouble(log), pytest.raises(LogError) as caught:
        fill(log)
    assert "log.sqlite: " in str(caught.value)
    assert words in str(caught.value)
    assert "rollback" not in str(caught.value)
    assert not log.in_transaction
    assert log.execute("SELECT count(*) FROM images").fetchone()[0] == 0
    fill(log)
    assert log.execute("SELECT count(*) FROM images").fetchone()[0] == 50


def test_a_transaction_that_sqlite_has_ended_itself_keeps_its_error(
    log: sqlite3.Connection,
) -> None:
    def fail() -> None:
        with logbook.writing(log):
            log.execute("ROLLBACK")  # as SQLite does after some errors
            raise sqlite3.OperationalError("disk I/O error")

    with pytest.raises(LogError, match="disk I/O error"):
        fail()
    fill(log)


def test_a_log_that_stays_locked_is_one_line(
    log: sqlite3.Connection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "log.sqlite"
    monkeypatch.setattr(logbook, "PATIENCE_S", 0.1)
    log.execute("PRAGMA busy_timeout = 100")
    other = logbook.connect(path)
    with (
        logbook.writing(other),
        pytest.raises(LogError, match=r"log\.sqlite: database is locked: another program keeps it"),
    ):
        fill(log)
    log.close()
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    fill(other)  # and keeps it
    with pytest.raises(
        LogError, match=r"log\.sqlite: database is locked: another program keeps it"
    ):
        logbook.connect(path)
    assert cli.main(["log", "images", "--log", str(path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_damaged_log_is_one_line(
    log: sqlite3.Connection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.sqlite"
    fill(log)
    log.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    log.close()
    content = bytearray(path.read_bytes())
    content[4096 * 6 :] = b"\xff" * len(content[4096 * 6 :])
    path.write_bytes(content)
    assert cli.main(["log", "images", "--log", str(path)]) == 1
    err = capsys.readouterr().err
    assert (
        f"{path}: database disk image is malformed: it is damaged; restore its latest copy" in err
    )
    assert err.count("\n") == 1
    assert (
        cli.main(
            ["catalogue", "update", "--log", str(path), "--catalogue", str(tmp_path / "blobs.csv")]
        )
        == 1
    )
    assert capsys.readouterr().err.count("\n") == 1


def test_rows_refer_to_rows_that_are_there(log: sqlite3.Connection) -> None:
    with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"), logbook.writing(log):
        logbook.insert(log, "images", image(run=99))
    with pytest.raises(sqlite3.IntegrityError, match="CHECK"), logbook.writing(log):
        logbook.insert(log, "images", image(outcome="lost"))


def test_nan_is_kept_as_null(log: sqlite3.Connection) -> None:
    with logbook.writing(log):
        logbook.insert(log, "images", image(noise_frac=float("nan"), mjd=60000.25))
    assert tuple(log.execute("SELECT noise_frac, mjd FROM images").fetchone()) == (None, 60000.25)


@pytest.mark.parametrize("suffix", logbook.FORMATS)
def test_an_exported_table_reads_back(log: sqlite3.Connection, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"runs.{suffix}"
    logbook.export_tables(log, "runs", path)
    match suffix:
        case "csv":
            row = pd.read_csv(path, keep_default_na=False).iloc[0].to_dict()
        case "ecsv":
            # astropy takes an empty text for a missing one
            row = dict(Table.read(path).filled("")[0])
        case _:
            row = json.loads(path.read_text())[0]
    assert {name: row[name] for name in RUN} == RUN


def test_what_is_not_there_is_named(log: sqlite3.Connection, tmp_path: Path) -> None:
    with pytest.raises(LogError, match="no table secrets in the log, expected one of runs"):
        logbook.table(log, "secrets")
    with pytest.raises(LogError, match=r"runs.txt: found the suffix '.txt', expected one of .csv"):
        logbook.export_tables(log, "runs", tmp_path / "runs.txt")
    with pytest.raises(
        LogError, match=r"none.sqlite: not found, expected the log of 'blobpipe quicklook'"
    ):
        logbook.connect(tmp_path / "none.sqlite")
    (tmp_path / "empty.sqlite").touch()
    with pytest.raises(LogError, match=r"empty.sqlite: empty, expected the log of 'blobpipe quick"):
        logbook.connect(tmp_path / "empty.sqlite")
    logbook.connect(tmp_path / "empty.sqlite", make=True).close()
    (tmp_path / "text.sqlite").write_text(
        "no database at all, but long enough to be looked at as one\n" * 20
    )
    with pytest.raises(LogError, match=r"text.sqlite: file is not a database"):
        logbook.connect(tmp_path / "text.sqlite")


# ------------------------------------------------------------------------------------------------ words


def detection(**more: object) -> dict[str, object]:
    row = {
        "image": 2,
        "status": "new",
        "x_px": 543.42,
        "y_px": 82.38,
        "depth_frac": 0.0192,
        "snr": 18.04,
        "score": 0.99,
        "probability": 0.9,
    }
    return row | more


def test_an_image_is_described_by_what_it_showed(log: sqlite3.Connection) -> None:
    with logbook.writing(log):
        for number, outcome in enumerate(("stack", "searched", "rejected"), 1):
            row = image(
                sha256=str(number), name=f"f{number}", outcome=outcome, mjd=60000.0 + number
            )
            logbook.insert(log, "images", row | ({"reason": "too dark"} if number == 3 else {}))
    assert logbook.describe_image(log, 1) == "for the stack alone: too few images before it"
    assert logbook.describe_image(log, 2) == "nothing new"
    assert logbook.describe_image(log, 3) == "rejected: too dark"

    with logbook.writing(log):
        for first in (1, 2, 2):
            place = {"image": first, "status": "new", "x_px": 1.0, "y_px": 2.0}
            logbook.insert(log, "candidates", place)
        logbook.insert(log, "detections", detection(image=1, candidate=1))
        # its depths tell that candidate 2 landed before: it is new to the reader all the same
        logbook.update(log, "candidates", 2, {"image": 1, "status": "seen_again"})
        logbook.insert(log, "detections", detection(candidate=3, score=0.8, x_px=10.0))
        logbook.insert(log, "detections", detection(candidate=2))
        logbook.insert(log, "detections", detection(candidate=1))
        for status in ("known", "bad_pixels", "known", "dip"):
            logbook.insert(log, "detections", detection(status=status, candidate=None))
    assert logbook.describe_image(log, 2) == (
        "2 new: #2 at (543.4, 82.4), S/N 18.0, depth 1.9 %; #3 at (10.0, 82.4), S/N 18.0, depth 1.9 %; "
        "1 seen again: #1; 2 known; 1 on dips; 1 on bad pixels"
    )
    with logbook.writing(log):
        review = {
            "candidate": 1,
            "decision": "rejected",
            "reviewer": "R",
            "at": logbook.now(),
        }
        logbook.insert(log, "reviews", review)
    assert "; 1 seen again: #1 (rejected); " in logbook.describe_image(log, 2)
    assert logbook.describe_run(log, 1) == (
        "3 images: 1 searched, 1 for the stack alone, 1 rejected; 3 new, 1 seen again"
    )
    assert logbook.describe_run(log, 2).startswith("0 images")


def test_the_image_whose_depths_tell_that_a_candidate_stays_says_so(
    log: sqlite3.Connection,
) -> None:
    with logbook.writing(log):
        for number in (1, 2):
            logbook.insert(log, "images", image(sha256=str(number), outcome="searched"))
        for _ in range(3):
            place = {"image": 1, "status": "seen_again", "x_px": 1.0, "y_px": 2.0}
            logbook.insert(log, "candidates", place)
        logbook.insert(log, "detections", detection(status="known", candidate=None))
        logbook.update(log, "candidates", 2, {"stays_image": 2})
    assert logbook.describe_image(log, 1) == "nothing new"
    assert logbook.describe_image(log, 2) == "nothing new; 1 stays: #2; 1 known"
    assert logbook.describe_run(log, 1).endswith("0 new, 0 seen again, 1 stays")
    with logbook.writing(log):
        logbook.update(log, "candidates", 3, {"stays_image": 2})
    assert logbook.describe_image(log, 2) == "nothing new; 2 stay: #2, #3; 1 known"
    assert logbook.describe_run(log, 1).endswith("0 new, 0 seen again, 2 stay")


def test_a_log_of_version_8_keeps_its_candidates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log.sqlite"
    steps = logbook.versions()
    with monkeypatch.context() as patch:
        patch.setattr(logbook, "versions", lambda: steps[:8])
        with contextlib.closing(synthetic_log.make_log(path, 60)) as old:
            before = [dict(row) for row in old.execute("SELECT * FROM candidates")]
            listed = [tuple(row) for row in old.execute("SELECT * FROM candidate_list")]
    log = logbook.connect(path)
    assert len(before) > 1
    expected = [row | {"stays_image": None} for row in before]
    assert [dict(row) for row in log.execute("SELECT * FROM candidates")] == expected
    assert [tuple(row) for row in log.execute("SELECT * FROM candidate_list")] == listed
    with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"), logbook.writing(log):
        logbook.update(log, "candidates", 1, {"stays_image": 999})


# ------------------------------------------------------------------------------------------------------ on a terminal


def test_a_table_fits_the_terminal_with_the_digits_of_its_errors() -> None:
    rows = pd.DataFrame(
        {
            "id": [1, 22],
            "x_px": [543.41234, 8.0],
            "radius_px": [8.14159, float("nan")],
            "radius_err_px": [0.4211, float("nan")],
            "depth_frac": [0.0192345, 0.5],
            "depth_err_frac": [0.0011, float("nan")],
            "sha256": ["a" * 64, "b" * 64],
            "reason": ["as round as one " * 20, None],
        }
    )
    text = logbook.printed(rows, "x")
    first, below, second, *reasons, third, _, _ = text.splitlines()
    assert first.split() == ["id", "x_px", "radius_px", "depth_frac"]
    assert below == "    reason"
    assert " ".join(map(str.strip, reasons)) == ("as round as one " * 20).strip()
    assert second.split(maxsplit=3)[:2] == ["1", "543.4"]
    assert "8.14 ± 0.42" in second
    assert "0.0192 ± 0.0011" in second
    assert third.split() == ["22", "8.0", "-", "0.5000"]
    assert text.splitlines()[-1].startswith("not shown: sha256 (--wide")
    assert max(map(len, text.splitlines())) <= logbook.WIDTH
    wide = logbook.printed(rows, "x", wide=True)
    assert "a" * 64 in wide
    assert "not shown" not in wide
    assert ("as round as one " * 20).strip() in wide


def test_positions_that_are_not_those_on_an_image_are_labelled() -> None:
    rows = pd.DataFrame({"id": [1], "x_px": [8.0], "sha256": ["a"]})
    *_, note, left_out = logbook.printed(rows, "candidate_list").splitlines()
    assert note.startswith("x_px, y_px: usual place, the shift of the image taken off")
    assert left_out.startswith("not shown: sha256")
    assert "usual place" not in logbook.printed(rows, "detections")


def test_a_zero_has_no_sign() -> None:
    columns = {"shift_x_px": [-0.04, -0.05], "x_px": [-0.001, -2.0], "x_err_px": [0.5, 0.5]}
    rows = pd.DataFrame(columns | {"other": [-0.0, -0.25]})
    lines = [line.split() for line in logbook.printed(rows, "x").splitlines()]
    assert lines[1] == ["0.0", "0.00", "±", "0.50", "0"]
    assert lines[2] == ["-0.1", "-2.00", "±", "0.50", "-0.25"]


@pytest.mark.parametrize("table", logbook.TABLES)
def test_every_table_fits_and_says_what_it_leaves_out(
    table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.sqlite"
    synthetic_log.make_log(path, 120).close()
    assert cli.main(["log", table, "--log", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= logbook.WIDTH
    with contextlib.closing(logbook.connect(path)) as connection:
        columns = set(logbook.table(connection, table).columns)
    if len(lines) > 1:
        rest = lines[lines.index("") :] if "" in lines else []
        named = set(re.findall(r"\w+", " ".join([*lines[:2], *rest])))
        assert {name for name in columns if "_err_" not in name} <= named


def test_what_became_of_images_and_files_is_read_at_a_glance(
    log: sqlite3.Connection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.sqlite"
    waits = "fewer than 30 usable images before it; kept for stacks"
    folder = f"/home/quicklook/{'long/' * 20}inbox"
    with logbook.writing(log):
        row = image(outcome="stack", reason=waits, noise_frac=0.01, shift_x_px=1.0, shift_y_px=2.0)
        logbook.insert(log, "images", row)
        stamp = {"size_bytes": 1, "modified_ns": 10**18, "changed_ns": 10**18, "inode": 7}
        file = {"path": f"{folder}/idbb0a01q.fits", "sha256": "a", "seen": logbook.now()}
        logbook.insert(log, "files", file | stamp | {"outcome": "logged", "image": 1})

    assert cli.main(["log", "images", "--log", str(path)]) == 0
    head, _, values, reason, *_ = capsys.readouterr().out.splitlines()
    columns = ["id", "name", "outcome", "mjd", "noise_frac", "shift_x_px", "shift_y_px", "n_stack"]
    assert head.split()[:9] == [*columns, "late"]
    assert values.split()[2] == "stack"
    assert reason.strip() == waits

    assert cli.main(["log", "files", "--log", str(path)]) == 0
    head, values, _, *rest = capsys.readouterr().out.splitlines()
    assert head.split()[:5] == ["id", "path", "outcome", "image", "seen"]
    assert re.fullmatch(r"\.\.\.\S+/inbox/idbb0a01q\.fits", values.split()[1])
    assert " ".join(rest).startswith("not shown: ")
    assert "sha256, modified_ns, changed_ns (--wide" in " ".join(rest)


def test_a_table_without_rows_says_how_many_images_there_are(
    log: sqlite3.Connection,
) -> None:
    assert logbook.describe_empty(log, "images") == "no images yet: 0 images logged, 0 searched"
    with logbook.writing(log):
        logbook.insert(log, "images", image(outcome="searched"))
    expected = "no candidates yet: 1 image logged, 1 searched"
    assert logbook.describe_empty(log, "candidate_list") == expected


def test_logs_of_one_folder_keep_their_files_apart(tmp_path: Path) -> None:
    """They may search the same images in different ways: with another catalogue, threshold or stack."""
    names = ("log.sqlite", "night.sqlite", "night.db")
    kept = [logbook.folder_beside(tmp_path / name, "stack").name for name in names]
    assert kept == ["stack", "night.sqlite-stack", "night.db-stack"]
    pixels = {thumbnails.pixels_path(tmp_path / name, "0" * 64, "map") for name in names}
    assert len(pixels) == 3
