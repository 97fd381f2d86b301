"""The log of the daily routine: one SQLite file, whose tables stand in ``store.sql``.

Any number of processes may read while one writes. What belongs together is written in one transaction: a process that
is killed leaves all of an image, or nothing.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blobpipe.core import files, tables
from blobpipe.errors import LogError

if TYPE_CHECKING:
    import pandas as pd

PATIENCE_S = 30.0  # for another process to finish writing
TABLES = (
    *("runs", "images", "files", "subframes", "candidates", "detections"),
    *("reviews", "notices", "health", "candidate_list"),
)
FORMATS = ("csv", "ecsv", "json")
REASONS = {  # of SQLite's refusals, by its primary result code: what is wrong, and what to do
    sqlite3.SQLITE_BUSY: "another program keeps it to itself; end that program, then run again",
    sqlite3.SQLITE_FULL: "no space left on the disk; free some space, then run again",
    sqlite3.SQLITE_IOERR: "the disk could not be read or written; look at it, then run again",
    sqlite3.SQLITE_READONLY: "it may not be written; change its permissions and those of its folder",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened; see who may read and write there, and the space that is left",
    sqlite3.SQLITE_PERM: "it may not be read; change its permissions",
    sqlite3.SQLITE_CORRUPT: "it is damaged; put the last copy of it back",
}


class Log(sqlite3.Connection):
    """A connection that knows which file it has opened: SQLite would go on writing into one that has lost its name."""

    path: Path
    file: os.stat_result | None  # None: it is in memory

    def insist_on_file(self) -> None:
        """Refuse to go on if the log's name leads to another file by now, or to none.

        Raises
        ------
        LogError
            If it was moved, deleted or replaced, its folder too, or its disk taken away.
        """
        if self.file is None:
            return
        try:
            same = os.path.samestat(self.path.stat(), self.file)
        except OSError:
            same = False
        if not same:
            raise LogError(
                f"{self.path}: moved, deleted or replaced while it was in use, expected the log that was opened; put it "
                "back with its -wal file, or start again"
            )


def connect(path: str | Path, *, make: bool = False) -> Log:
    """Open a log, and bring its schema to this version's.

    Parameters
    ----------
    path : path
        The SQLite file.
    make : bool
        Make it, and its folder, if it is not there.

    Returns
    -------
    Log
        Rows are read by name. Nothing is written outside of `writing`.

    Raises
    ------
    LogError
        If it is missing, is no such file, or was written by a later version.
    """
    path = Path(path)
    if not (make or path.exists()):
        raise LogError(
            f"{path}: not found, expected the log of 'blobpipe quicklook'; run it first or name its --log"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        connection = sqlite3.connect(
            path, timeout=PATIENCE_S, isolation_level=None, check_same_thread=False, factory=Log
        )
        connection.row_factory = sqlite3.Row
        # tables first: another process may make the log between the two questions
        if (
            connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()
            and _version(connection) == 0
        ):
            raise LogError(
                f"{path}: another program's database, expected the log of 'blobpipe quicklook'; name another --log"
            )
        connection.execute("PRAGMA journal_mode = WAL")
        # what was acknowledged outlives a power cut
        connection.execute("PRAGMA synchronous = FULL")
        connection.path = path.absolute()
        connection.file = path.stat() if path.exists() else None
        # else a table that is made anew would take its rows' with it
        connection.execute("PRAGMA foreign_keys = OFF")
        _migrate(connection, path)
        connection.execute("PRAGMA foreign_keys = ON")
    except sqlite3.Error as error:
        raise LogError(f"{path}: {reason(error)}") from error
    return connection


def reason(error: BaseException) -> str:
    """Say what SQLite has refused, and what to do."""
    # the primary one, without its details
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code not in REASONS:
        return f"{error}; expected the log of 'blobpipe quicklook'; name another --log"
    return f"{error}: {REASONS[code]}"


def versions() -> list[str]:
    """The SQL that leads from each version of the schema to the next, from an empty file on."""
    text = Path(__file__).with_name("store.sql").read_text(encoding="utf-8")
    return re.split(r"^-- version \d+$", text, flags=re.MULTILINE)[1:]


def _migrate(connection: Log, path: Path) -> None:
    steps = versions()
    if _version(connection) == len(steps):
        return
    with writing(connection):  # two processes may have come this far
        found = _version(connection)
        if found > len(steps):
            raise LogError(
                f"{path}: found version {found} of the log, expected at most {len(steps)}; use the blobpipe that wrote it"
            )
        for step in steps[found:]:
            for statement in _statements(step):
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {len(steps)}")


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _statements(script: str) -> Iterator[str]:
    """The statements of a script one by one: ``executescript`` would end the transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


@contextmanager
def writing(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """A transaction: all of it is kept, or, on an error, nothing.

    Raises
    ------
    LogError
        If the log is locked for too long, or cannot be written, or its file has lost its name (`Log.insist_on_file`).
    """
    try:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            if isinstance(connection, Log):
                connection.insist_on_file()
            connection.execute("COMMIT")
        except BaseException:
            # after a full disk or an I/O error SQLite may have done it itself, or be unable to
            if connection.in_transaction:
                with suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
            raise
    except sqlite3.DatabaseError as error:
        if type(error) not in (sqlite3.OperationalError, sqlite3.DatabaseError):
            raise  # a row that does not fit
        raise LogError(f"{_path(connection)}: {reason(error)}") from error


def _path(connection: sqlite3.Connection) -> str:
    with suppress(sqlite3.Error):
        return str(connection.execute("PRAGMA database_list").fetchone()["file"])
    return "the log"


def insert(connection: sqlite3.Connection, table: str, row: Mapping[str, Any]) -> int:
    """Add a row; its id. NaN is kept as NULL."""
    marks = ", ".join("?" * len(row))
    cursor = connection.execute(
        f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", _values(row)
    )
    return int(cursor.lastrowid or 0)


def update(connection: sqlite3.Connection, table: str, number: int, row: Mapping[str, Any]) -> None:
    """Change columns of the row of an id. NaN is kept as NULL."""
    changes = ", ".join(f"{name} = ?" for name in row)
    connection.execute(f"UPDATE {table} SET {changes} WHERE id = ?", [*_values(row), number])


def _values(row: Mapping[str, Any]) -> list[Any]:
    return [
        None if isinstance(value, float) and value != value else value for value in row.values()
    ]


def now(later_s: float = 0.0) -> str:
    """The time, or one so many seconds later, as the log writes it: ISO 8601, UTC, to the millisecond."""
    return (
        (datetime.now(UTC) + timedelta(seconds=later_s))
        .isoformat(timespec="milliseconds")
        .replace("+00:00", "Z")
    )


def table(connection: sqlite3.Connection, name: str) -> pd.DataFrame:
    """A table of the log; pictures are left out.

    Raises
    ------
    LogError
        If there is no such table.
    """
    import pandas as pd

    if name not in TABLES:
        raise LogError(f"no table {name} in the log, expected one of {', '.join(TABLES)}")
    try:
        # a view may be read in any order: every table and view begins with what tells its rows apart
        found = pd.read_sql_query(f"SELECT * FROM {name} ORDER BY 1, 2, 3", connection)
    except pd.errors.DatabaseError as error:
        raise LogError(f"{_path(connection)}: {reason(error.__cause__ or error)}") from error
    return found.drop(columns="saliency", errors="ignore")


def export_tables(connection: sqlite3.Connection, name: str, path: str | Path) -> None:
    """Write a table of the log as CSV, ECSV or JSON, after the suffix of ``path``.

    Raises
    ------
    LogError
        If there is no such table or format.
    """
    path = Path(path)
    match path.suffix.removeprefix("."):
        case "csv":
            tables.write_table(path, table(connection, name))
        case "ecsv":
            _write_ecsv(path, table(connection, name))
        case "json":
            rows = table(connection, name)
            with files.atomic(path) as temporary:
                rows.to_json(temporary, orient="records", indent=2, double_precision=12)
        case _:
            raise LogError(
                f"{path}: found the suffix {path.suffix!r}, expected one of .{', .'.join(FORMATS)}"
            )


def _write_ecsv(path: Path, rows: pd.DataFrame) -> None:
    from astropy.table import Table

    with files.atomic(path) as temporary:
        Table.from_pandas(rows).write(temporary, format="ascii.ecsv", overwrite=True)
