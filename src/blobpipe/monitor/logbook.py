"""Read and write the log of the daily routine: one SQLite file, whose tables are defined in ``store.sql``.

Any number of processes may read while one writes. Rows that belong together are written in one transaction: a process
that is killed leaves all rows of an image, or none.
"""

from __future__ import annotations

import math
import os
import re
import sqlite3
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blobpipe.core import files, tables
from blobpipe.core.detector import DEFAULT, Detector
from blobpipe.errors import LogError

if TYPE_CHECKING:
    import pandas as pd

USUAL_NAME = "log.sqlite"  # of a log, as in `cli.paths.LOG`
PATIENCE_S = 30.0  # longest wait (s) for another process to finish writing
TABLES = (
    *("runs", "images", "files", "subframes", "peaks", "candidates", "detections", "depths"),
    *("nearly_found", "reviews", "notices", "health", "candidate_list"),
)
FORMATS = ("csv", "ecsv", "json")
# Words for the statuses of detections, in the order in which they are told
STATUS_WORDS = {
    "new": "new",
    "seen_again": "seen again",
    "known": "known",
    "dip": "on dips",
    "bad_pixels": "on bad pixels",
}
# Status of a detection d as people are told: what an image of an earlier date shows too is not new but seen again
STATUS_TOLD = (
    "CASE WHEN d.status = 'new' AND EXISTS ("
    "SELECT 1 FROM detections e JOIN images earlier ON earlier.id = e.image JOIN images own ON own.id = d.image "
    "WHERE e.candidate = d.candidate AND earlier.mjd < own.mjd) THEN 'seen_again' ELSE d.status END"
)
# what is wrong and what to do, by SQLite's primary result code
REASONS = {
    sqlite3.SQLITE_BUSY: "another program keeps it locked; end that program, then run again",
    sqlite3.SQLITE_FULL: "no space left on the disk; free some space, then run again",
    sqlite3.SQLITE_IOERR: "the disk could not be read or written; check the disk, then run again",
    sqlite3.SQLITE_READONLY: "it is read-only; change its permissions and those of its folder",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened; check the permissions of its folder and the free space",
    sqlite3.SQLITE_PERM: "it may not be read; change its permissions",
    sqlite3.SQLITE_CORRUPT: "it is damaged; restore its latest copy",
}


class Log(sqlite3.Connection):
    """Connect to a log and remember which file was opened.

    SQLite would go on writing into a file that has been moved, deleted or replaced.
    """

    path: Path
    file: os.stat_result | None  # None for a log in memory

    def require_file(self) -> None:
        """Refuse to go on if the log's path no longer leads to the file that was opened.

        Raises
        ------
        LogError
            If the file was moved, deleted or replaced, with or without its folder, or its disk was removed.
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
        Make the file and its folder if they do not exist.

    Returns
    -------
    Log
        Rows are read by column name. Write within `writing` only.

    Raises
    ------
    LogError
        If the file is missing or empty, is not such a log, or was written by a later version.
    """
    path = Path(path)
    if not make and not (path.exists() and path.stat().st_size):
        found = "empty" if path.exists() else "not found"
        raise LogError(
            f"{path}: {found}, expected the log of 'blobpipe quicklook'; run it first or name its --log"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        connection = sqlite3.connect(
            path, timeout=PATIENCE_S, isolation_level=None, check_same_thread=False, factory=Log
        )
        connection.row_factory = sqlite3.Row
        _require_own(connection, path)
        connection.execute("PRAGMA journal_mode = WAL")
        # a committed transaction survives a power cut
        connection.execute("PRAGMA synchronous = FULL")
        connection.path = path.absolute()
        connection.file = path.stat() if path.exists() else None
        # a migration may drop and rebuild a table that rows of others refer to
        connection.execute("PRAGMA foreign_keys = OFF")
        _migrate(connection, path)
        connection.execute("PRAGMA foreign_keys = ON")
    except sqlite3.Error as error:
        raise LogError(f"{path}: {reason(error)}") from error
    return connection


def folder_beside(path: Path, name: str) -> Path:
    """Return a folder of files that belong to a log.

    Another log of the same folder may search the same images in another way: each has folders of its own. Those of
    ``log.sqlite``, the usual name, are called as they were before.
    """
    return path.with_name(name if path.name == USUAL_NAME else f"{path.name}-{name}")


def _require_own(connection: sqlite3.Connection, path: Path) -> None:
    """Refuse the database of another program: it has tables, but no version of ours."""
    # tables first: another process may make the log between the two queries
    has_tables = connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()
    if has_tables and _version(connection) == 0:
        raise LogError(
            f"{path}: another program's database, expected the log of 'blobpipe quicklook'; name another --log"
        )


def reason(error: BaseException) -> str:
    """Say what SQLite has refused, and what to do."""
    # the lowest byte is the primary code, without its details
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code not in REASONS:
        return f"{error}; expected the log of 'blobpipe quicklook'; name another --log"
    return f"{error}: {REASONS[code]}"


# --------------------------------------------------------------------------------------------------------- schema


def detector_of(connection: sqlite3.Connection) -> Detector:
    """Return the detector whose images a log holds, as its latest run recorded it; the default for an empty log."""
    row = connection.execute("SELECT detector FROM runs ORDER BY id DESC LIMIT 1").fetchone()
    if row is None or not row["detector"]:
        return DEFAULT
    return _read_detector(row["detector"])


@lru_cache(maxsize=8)
def _read_detector(text: str) -> Detector:
    """Read a detector as a run recorded it."""
    return Detector.model_validate_json(text)


def versions() -> list[str]:
    """Return the SQL that leads from each version of the schema to the next, starting with an empty file."""
    text = Path(__file__).with_name("store.sql").read_text(encoding="utf-8")
    return re.split(r"^-- version \d+$", text, flags=re.MULTILINE)[1:]


def _migrate(connection: Log, path: Path) -> None:
    """Bring the schema of a log to this version's, in one transaction."""
    steps = versions()
    if _version(connection) == len(steps):
        return
    with writing(connection):
        # asked again under the lock: another process may have migrated it meanwhile
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
    """Return the version of a log's schema; 0 for an empty file."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _statements(script: str) -> Iterator[str]:
    """Split a script into its statements; ``executescript`` would end the transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


# ----------------------------------------------------------------------------------------------------------- rows


@contextmanager
def writing(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """Run a transaction: all of it is kept or, on an error, nothing.

    Raises
    ------
    LogError
        If the log stays locked too long, cannot be written, or is no longer at its path (`Log.require_file`).
    """
    try:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            if isinstance(connection, Log):
                connection.require_file()
            connection.execute("COMMIT")
        except BaseException:
            # after a full disk or an I/O error SQLite may have rolled back itself, or be unable to
            if connection.in_transaction:
                with suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
            raise
    except sqlite3.DatabaseError as error:
        # other subclasses mean a row that does not fit the schema, which is a bug and no state of the log
        if type(error) not in (sqlite3.OperationalError, sqlite3.DatabaseError):
            raise
        raise LogError(f"{_path(connection)}: {reason(error)}") from error


def _path(connection: sqlite3.Connection) -> str:
    """Return the file of a connection for a message."""
    with suppress(sqlite3.Error):
        return str(connection.execute("PRAGMA database_list").fetchone()["file"])
    return "the log"


def insert(connection: sqlite3.Connection, table: str, row: Mapping[str, Any]) -> int:
    """Add a row and return its id; NaN becomes NULL."""
    columns = ", ".join(row)
    marks = ", ".join("?" * len(row))
    statement = f"INSERT INTO {table} ({columns}) VALUES ({marks})"
    cursor = connection.execute(statement, _values(row))
    return int(cursor.lastrowid or 0)


def update(connection: sqlite3.Connection, table: str, number: int, row: Mapping[str, Any]) -> None:
    """Change columns of the row with an id; NaN becomes NULL."""
    changes = ", ".join(f"{name} = ?" for name in row)
    connection.execute(f"UPDATE {table} SET {changes} WHERE id = ?", [*_values(row), number])


def _values(row: Mapping[str, Any]) -> list[Any]:
    """Return the values of a row, None in place of NaN."""
    # NaN is the one value that differs from itself
    return [
        None if isinstance(value, float) and value != value else value for value in row.values()
    ]


def now(later_s: float = 0.0) -> str:
    """Return the time in ``later_s`` seconds as the log writes it: ISO 8601, UTC, to the millisecond."""
    moment = datetime.now(UTC) + timedelta(seconds=later_s)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


# --------------------------------------------------------------------------------------------------------- tables


def table(connection: sqlite3.Connection, name: str) -> pd.DataFrame:
    """Read a table of the log, without its pictures.

    Raises
    ------
    LogError
        If there is no such table, or the log cannot be read.
    """
    import pandas as pd

    if name not in TABLES:
        raise LogError(f"no table {name} in the log, expected one of {', '.join(TABLES)}")
    try:
        # a view has no order of its own; the first columns of each table identify its rows
        found = pd.read_sql_query(f"SELECT * FROM {name} ORDER BY 1, 2, 3", connection)
    except pd.errors.DatabaseError as error:
        raise LogError(f"{_path(connection)}: {reason(error.__cause__ or error)}") from error
    return found.drop(columns="saliency", errors="ignore")


# Columns that are read first; those that do not fit are named
FIRST_COLUMNS = {
    "images": (
        *("id", "name", "outcome", "reason", "mjd", "noise_frac"),
        *("shift_x_px", "shift_y_px", "n_stack", "late"),
    ),
    "files": ("id", "path", "outcome", "image", "seen"),
    "candidate_list": (
        *("id", "decision", "status", "x_px", "y_px", "snr", "probability", "depth_frac"),
        *("first_frame", "radius_px", "sightings", "reviewer", "first_mjd"),
    ),
}
LAST_COLUMNS = ("run", "kind", "header")
# Tables whose positions are not those on one image
AT_USUAL_PLACE = ("peaks", "candidates", "nearly_found", "candidate_list")
USUAL_PLACE = "x_px, y_px: usual place, the shift of the image taken off (messages of quicklook: on the image)"
PROBABILITY = "probability: that it is a new blob, given how rarely they land; the threshold is one of the score"
SENTENCE = "reason"  # column whose texts stand below their rows
PATHS = ("path", "model", "catalogue")  # columns whose texts are shortened from the left
FOR_COMPARING = ("sha256", "_ns")  # ends of the names of columns that only --wide shows
WIDTH = 100  # characters of a line that is printed
LONGEST_TEXT = 24  # characters of a text within it
LONGEST = {"path": 48}  # the same, of other columns


def printed(rows: pd.DataFrame, name: str, *, wide: bool = False) -> str:
    """Write a table for a terminal: values with as many digits as their errors say, in lines of `WIDTH` characters.

    Parameters
    ----------
    rows : DataFrame
        From `table`.
    name : str
        Its name.
    wide : bool
        Write all columns, whole texts and whole checksums, a row to a line, however long the lines become.
    """
    # An error stands beside its value
    columns = [column for column in _in_order(rows, name) if "_err_" not in column]
    below = SENTENCE if SENTENCE in columns and not wide else ""
    hidden = [column for column in columns if column.endswith(FOR_COMPARING) and not wide]
    cells = {
        column: [column, *_cells(rows, column, wide)]
        for column in columns
        if column not in (below, *hidden)
    }
    shown: list[str] = []
    left_out: list[str] = []
    widths = {column: max(map(len, texts)) for column, texts in cells.items()}
    room = WIDTH
    for column in cells:
        if not wide and widths[column] > room and shown:
            left_out.append(column)
            continue
        shown.append(column)
        room -= widths[column] + 2
    sentences = [below, *(rows[below].fillna("") if below else [""] * len(rows))]
    lines: list[str] = []
    for k in range(len(rows) + 1):
        values = [cells[column][k].ljust(widths[column]) for column in shown]
        lines += ["  ".join(values).rstrip(), *_below(sentences[k])]
    notes = [USUAL_PLACE] if name in AT_USUAL_PLACE and not wide else []
    if "probability" in shown and not wide:
        notes.append(PROBABILITY)
    if left_out or hidden:
        names = ", ".join(left_out + hidden)
        notes.append(f"not shown: {names} (--wide shows all, --out FILE writes them)")
    if notes:
        lines.append("")
    for note in notes:
        lines += textwrap.wrap(note, WIDTH)
    return "\n".join(lines)


def _in_order(rows: pd.DataFrame, name: str) -> list[str]:
    """Return the columns of a table in the order in which they are read."""
    first = [column for column in FIRST_COLUMNS.get(name, ()) if column in rows]
    last = [column for column in LAST_COLUMNS if column in rows and first]
    between = [str(column) for column in rows if column not in (*first, *last)]
    return [*first, *between, *last]


def _below(text: str) -> list[str]:
    """Return the lines of a text that stands below its row."""
    indent = " " * 4
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)


def _cells(rows: pd.DataFrame, column: str, wide: bool) -> list[str]:
    """Write the values of a column, with their errors where there are some."""
    stem, _, unit = column.rpartition("_")
    error = f"{stem}_err_{unit}"
    errors = rows[error] if error in rows else [None] * len(rows)
    return [_cell(column, value, of, wide) for value, of in zip(rows[column], errors, strict=True)]


def _cell(column: str, value: Any, error: Any, wide: bool) -> str:
    """Write a value: two digits of its error, or the digits that its kind usually has; no zero has a sign."""
    if value is None or value != value:
        return "-"
    if not isinstance(value, float):
        text = " ".join(str(value).split())
        longest = LONGEST.get(column, LONGEST_TEXT)
        if wide or len(text) <= longest:
            return text
        if column in PATHS:
            return f"...{text[3 - longest :]}"
        return f"{text[: longest - 3]}..."
    if error is not None and error == error and error > 0:
        digits = max(0, 1 - math.floor(math.log10(error)))
        return f"{value:z.{digits}f} ± {error:.{digits}f}"
    usual = {"px": 1, "mjd": 2, "snr": 1, "probability": 3, "score": 3, "frac": 4, "e": 0}
    digits_of_kind = usual.get(column.rpartition("_")[2])
    return f"{value:z.4g}" if digits_of_kind is None else f"{value:z.{digits_of_kind}f}"


def describe_empty(connection: sqlite3.Connection, name: str) -> str:
    """Say in one line that a table has no rows, and how many images the log has."""
    what = {
        "candidate_list": "no candidates",
        "health": "no health readings",
        "nearly_found": "nothing nearly found",
    }.get(name, f"no {name}")
    logged, searched = connection.execute(
        "SELECT count(*), count(*) FILTER (WHERE outcome = 'searched') FROM images"
    ).fetchone()
    return f"{what} yet: {counted(logged, 'image')} logged, {searched} searched"


def counted(number: int, what: str) -> str:
    """Write a number of things, in the plural unless it is one."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def count_passed_over(connection: sqlite3.Connection, size: int) -> int:
    """Count the images that were kept for stacks alone although enough images precede them by now.

    Those before them came later, or a file was missing.

    Parameters
    ----------
    size : int
        Number of images in a stack.
    """
    usable = "kind = 'image' AND outcome != 'rejected' AND superseded_by IS NULL"
    [count] = connection.execute(
        f"SELECT count(*) FROM images WHERE {usable} AND outcome = 'stack' "
        f"AND mjd > (SELECT mjd FROM images WHERE {usable} ORDER BY mjd LIMIT 1 OFFSET ?)",
        (size - 1,),
    ).fetchone()
    return int(count)


def describe_image(connection: sqlite3.Connection, image: int) -> str:
    """Say in one line what an image showed: its new blobs, then how many other detections of each kind.

    A new candidate that the depths on several images together show to have landed and stayed *stays*.
    """
    row = connection.execute("SELECT outcome, reason FROM images WHERE id = ?", (image,)).fetchone()
    if row["outcome"] == "stack":
        return f"for the stack alone: {row['reason'] or 'too few images before it'}"
    if row["outcome"] == "rejected":
        return f"rejected: {row['reason']}"
    found = connection.execute(
        f"SELECT {STATUS_TOLD} AS status, x_px, y_px, snr, depth_frac, candidate FROM detections d "
        "WHERE image = ? ORDER BY score DESC, id",
        (image,),
    ).fetchall()
    new = [each for each in found if each["status"] == "new"]
    again = [each for each in found if each["status"] == "seen_again"]

    # Each new one by its number, under which it can be looked up and reviewed
    places = "; ".join(_describe_detection(each) for each in new)
    said = [f"{len(new)} new: {places}" if new else "nothing new"]
    if again:
        numbers = ", ".join(_name_seen_again(connection, each["candidate"]) for each in again)
        said.append(f"{len(again)} seen again: {numbers}")
    staying = connection.execute(
        "SELECT id FROM candidates WHERE stays_image = ? ORDER BY id", (image,)
    ).fetchall()
    if staying:
        numbers = ", ".join(f"#{each['id']}" for each in staying)
        said.append(f"{_describe_staying(len(staying))}: {numbers}")
    for status in ("known", "dip", "bad_pixels"):
        number = sum(each["status"] == status for each in found)
        if number:
            said.append(f"{number} {STATUS_WORDS[status]}")
    return "; ".join(said)


def _name_seen_again(connection: sqlite3.Connection, candidate: int) -> str:
    """Name a candidate; one that people have rejected may be a blob that landed where the false alarm was."""
    row = connection.execute(
        "SELECT decision FROM candidate_list WHERE id = ?", (candidate,)
    ).fetchone()
    is_rejected = row is not None and row["decision"] == "rejected"
    return f"#{candidate} (rejected)" if is_rejected else f"#{candidate}"


def _describe_staying(number: int) -> str:
    """Say how many candidates stay."""
    return f"{number} stay{'s' if number == 1 else ''}"


def _describe_detection(row: sqlite3.Row) -> str:
    """Say number, place, S/N and depth of a new blob, as far as they are known."""
    said = f"#{row['candidate']} at ({row['x_px']:.1f}, {row['y_px']:.1f})"
    if row["snr"] is not None:
        said += f", S/N {row['snr']:.1f}"
    if row["depth_frac"] is not None:
        said += f", depth {100 * row['depth_frac']:.1f} %"
    return said


def describe_run(connection: sqlite3.Connection, run: int) -> str:
    """Say in one line what a run did: how many images, and what they showed."""
    outcomes = {
        row["outcome"]: row["n"]
        for row in connection.execute(
            "SELECT outcome, count(*) AS n FROM images WHERE run = ? GROUP BY outcome", (run,)
        )
    }
    new, again = connection.execute(
        "SELECT count(*) FILTER (WHERE status = 'new'), count(*) FILTER (WHERE status = 'seen_again') "
        f"FROM (SELECT {STATUS_TOLD} AS status FROM detections d JOIN images i ON i.id = d.image WHERE i.run = ?)",
        (run,),
    ).fetchone()
    [n_staying] = connection.execute(
        "SELECT count(*) FROM candidates c JOIN images i ON i.id = c.stays_image WHERE i.run = ?",
        (run,),
    ).fetchone()
    stay = f", {_describe_staying(n_staying)}" if n_staying else ""
    n_images = sum(outcomes.values())
    return (
        f"{counted(n_images, 'image')}: {outcomes.get('searched', 0)} searched, "
        f"{outcomes.get('stack', 0)} for the stack alone, {outcomes.get('rejected', 0)} rejected; "
        f"{new} new, {again} seen again{stay}"
    )


def export_tables(connection: sqlite3.Connection, name: str, path: str | Path) -> None:
    """Write a table of the log as CSV, ECSV or JSON, according to the suffix of ``path``.

    Raises
    ------
    LogError
        If there is no such table or format.
    """
    # every format is written to a temporary file first
    path = Path(path)
    match path.suffix.removeprefix("."):
        case "csv":
            tables.write_table(path, table(connection, name))
        case "ecsv":
            from astropy.table import Table

            rows = table(connection, name)
            with files.atomic(path) as temporary:
                Table.from_pandas(rows).write(temporary, format="ascii.ecsv", overwrite=True)
        case "json":
            rows = table(connection, name)
            with files.atomic(path) as temporary:
                rows.to_json(temporary, orient="records", indent=2, double_precision=12)
        case _:
            raise LogError(
                f"{path}: found the suffix {path.suffix!r}, expected one of .{', .'.join(FORMATS)}; name another file"
            )
