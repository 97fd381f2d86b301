"""CSV tables, in and out: one reader and one check for the tables of all commands."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from blobpipe.core import files, fits_images
from blobpipe.errors import TableError

if TYPE_CHECKING:
    import pandas as pd

BATCH = 64  # frames to a job: how work is shared out, never what comes out

FRAME_COLUMNS = ("frame", "mjd")
BLOB_COLUMNS = ("blob", "x_px", "y_px", "radius_px", "depth_frac")
BLOB_SHAPES = ("disc", "diamond", "ring")
SIZE_PX = 1024  # side of the detector
BLOB_RANGES = {  # of a blob that can be; from the least to the largest that is taken
    "x_px": (-0.5, SIZE_PX - 0.5),
    "y_px": (-0.5, SIZE_PX - 0.5),
    "radius_px": (0.1, 100.0),
    "depth_frac": (1e-9, 1.0),
}
MJD_RANGE = (0.0, 100_000.0)  # 1858 to 2132; a Julian date or a time in seconds lies beyond
TEXT_COLUMNS = (
    *(
        "frame",
        "blob",
        "first_frame",
        "first_date",
        "status",
        "reason",
        "shape",
        "label_name",
        "sha256",
        "decision",
    ),
    *("reviewer", "at", "model", "params_hash", "model_sha256", "params_sha256", "stack_sha256"),
)
# words are none of their values
NUMBER_COLUMN = re.compile(r"(.*_)?(px|px2|frac|sigma|mjd|snr|score|probability)")
MAX_TABLE_BYTES = 2**28  # four times the largest table of 10,000 images


def read_table(path: str | Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read a CSV table and insist on its columns; ``frame``, ``blob`` and the like stay text, other gaps are NaN.

    Returns
    -------
    DataFrame
        Columns whose names say that they hold numbers (``x_px``, ``depth_frac``, ``mjd``, ...) do, or gaps; ``frame``
        and ``first_frame`` hold names (`require_name`) or nothing.

    Raises
    ------
    TableError
        If the file is missing, is no CSV table, lacks a column or has one twice, if one of its rows has more or fewer
        fields than its header, or if a value is not what its column holds.
    """
    path = Path(path)
    return parse_table(path, read_table_bytes(path, columns), columns)


def parse_table(path: Path, content: bytes, columns: Sequence[str]) -> pd.DataFrame:
    """The same from the bytes of a table; errors name ``path``."""
    import pandas as pd

    header, n_rows = _header_and_rows(path, content, columns)
    gaps = {name: [""] for name in header if name not in TEXT_COLUMNS}
    try:
        table = pd.read_csv(
            io.BytesIO(content),
            encoding="utf-8-sig",
            dtype=dict.fromkeys(TEXT_COLUMNS, str),
            keep_default_na=False,
            na_values=gaps,
            index_col=False,
            low_memory=False,
        )
    except (ValueError, OverflowError) as error:
        raise _no_table(path, " ".join(str(error).split())[:120]) from error
    if len(table) != n_rows:  # a line of blanks alone
        raise _no_table(path, f"{n_rows} rows, of which {len(table)} hold something")
    for name in [name for name in map(str, table) if NUMBER_COLUMN.fullmatch(name)]:
        table[name] = _numbers(path, table, name)
    for name in {"frame", "first_frame"} & set(table):
        for frame in set(table[name]) - {""}:
            files.require_name(frame, f"{path}: {name}")
    return table


def read_table_bytes(path: Path, columns: Sequence[str]) -> bytes:
    """All of a table's file.

    Raises
    ------
    TableError
        If it is missing, is no regular file, cannot be read, or is larger than any table.
    """
    try:
        if path.exists() and not path.is_file():
            raise _no_table(path, "not a file: a folder, a pipe or a device")
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise _no_table(
                path, f"{path.stat().st_size} bytes, at most {MAX_TABLE_BYTES} expected"
            )
        return path.read_bytes()
    except FileNotFoundError as error:
        raise TableError(
            f"{path}: not found, expected a table with the columns {', '.join(columns)}"
        ) from error
    except (OSError, ValueError) as error:  # a name with a NUL is a ValueError
        raise _no_table(path, getattr(error, "strerror", None) or str(error)) from error


def table_rows(path: Path, content: bytes) -> Iterator[tuple[list[str], str]]:
    """The rows of a CSV table, its header first: their fields, and each as it is written, with the end of its line.

    Blank lines belong to the row before them. A mark of the byte order at the beginning is left out.

    Raises
    ------
    TableError
        If the table is not UTF-8, has bytes 0, a quote that does not end, a column twice, or a row with more or fewer
        fields than its header.
    """
    if b"\0" in content:
        line = content.count(b"\n", 0, content.index(b"\0")) + 1
        raise _no_table(path, f"line {line}: a byte 0: is it UTF-16? save it as UTF-8")
    written: list[str] = []
    lines = io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", newline="")
    rows = csv.reader(_noting(lines, written), strict=True)
    try:
        yield from _checked_rows(rows, written)
    except UnicodeDecodeError as error:
        raise _no_table(
            path, f"byte {error.object[error.start]:#x} is not UTF-8; save it as UTF-8"
        ) from error
    except (ValueError, csv.Error) as error:
        raise _no_table(path, f"line {max(rows.line_num, 1)}: {error}") from error


def _checked_rows(rows: Iterable[list[str]], written: list[str]) -> Iterator[tuple[list[str], str]]:
    """Each row with the lines that were written down while it was read, and the blank ones after it."""
    header: list[str] = []
    row: list[str] = []
    n_lines = 0
    for fields in rows:
        if fields and row:
            yield row, "".join(written[:n_lines])
            del written[:n_lines]
        row = fields or row
        n_lines = len(written)
        header = header or _checked_header(fields)
        if len(row) != len(header):
            raise ValueError(f"{len(row)} fields, {len(header)} in the header")
    if not header:
        raise ValueError("no header: the file is empty")
    yield row, "".join(written)


def _noting(lines: Iterable[str], written: list[str]) -> Iterator[str]:
    """Lines as they are asked for, noted down."""
    for line in lines:
        written.append(line)
        yield line


def _checked_header(header: list[str]) -> list[str]:
    twice = [name for name in header if name and header.count(name) > 1]
    if twice:
        raise ValueError(f"two columns are called {twice[0][:40]!r}; rename or remove one")
    for other, mark in (("semicolons", ";"), ("tabs", "\t")):
        if len(header) == 1 and mark in header[0]:
            raise ValueError(
                f"{other} between its fields, commas expected, and points in its numbers"
            )
    return header


def _header_and_rows(path: Path, content: bytes, columns: Sequence[str]) -> tuple[list[str], int]:
    """The header of a table, which has all columns, and how many rows follow it."""
    rows = table_rows(path, content)
    header, _ = next(rows)
    missing = [column for column in columns if column not in header]
    if missing:
        found = " ".join(", ".join(header).split())
        found = f"{found[:200]}..." if len(found) > 200 else found
        raise TableError(
            f"{path}: column {missing[0]} is missing; found {found}; expected {', '.join(columns)}; add it"
        )
    return header, sum(1 for _ in rows)


def _no_table(path: Path, reason: str) -> TableError:
    return TableError(f"{path}: cannot be read as CSV ({reason})")


def _numbers(path: Path, table: pd.DataFrame, column: str) -> pd.Series[Any]:
    """A column as numbers; whatever is neither a number nor a gap is refused."""
    import pandas as pd

    found = table[column]
    if found.dtype.kind in "iuf":
        return found
    if found.dtype.kind == "b":
        _require(path, table, column, ~found.notna(), "a number")
    numbers = pd.to_numeric(found, errors="coerce").astype(float)
    _require(path, table, column, numbers.notna() | found.isna(), "a number")
    return numbers


def csv_text(table: pd.DataFrame, *, header: bool = True, newline: str = "\n") -> str:
    """A table as CSV: nine significant digits, the same bytes everywhere."""
    text = str(
        table.to_csv(index=False, header=header, float_format="%.9g", lineterminator=newline)
    )
    # Python's csv leaves one alone unquoted, and it would end the row
    if "\r" in text.replace(newline, ""):
        return csv_text(table.replace("\r\n?", "\n", regex=True), header=header, newline=newline)
    return text


def write_table(path: str | Path, table: pd.DataFrame) -> None:
    """Write a CSV table: nine significant digits, the same bytes everywhere."""
    with files.atomic(path) as temporary:
        temporary.write_text(csv_text(table), encoding="utf-8", newline="")


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write a JSON file, keys in the order given."""
    with files.atomic(path) as temporary:
        temporary.write_text(
            json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8"
        )


def read_frame_list(raw_dir: str | Path) -> pd.DataFrame:
    """``frames.csv`` of a folder of images: one row per image, in the order of the file.

    Raises
    ------
    TableError
        As `read_image_list`, or if there is no row, or a frame has no image.
    """
    path = Path(raw_dir) / "frames.csv"
    table = read_image_list(path)
    if table.empty:
        raise TableError(
            f"{path}: found no row below its header, expected one for each image; list the images"
        )
    for frame in table["frame"]:
        if not any(
            (Path(raw_dir) / f"{frame}{suffix}").is_file() for suffix in fits_images.SUFFIXES
        ):
            raise TableError(
                f"{path}: frame {frame} has no image {frame}{fits_images.SUFFIXES[0]} beside it; add it or drop the row"
            )
    return table


def read_image_list(path: str | Path) -> pd.DataFrame:
    """A table of images with their names and dates, wherever the images are.

    Raises
    ------
    TableError
        If a column is missing, a frame stands twice or has a name that none can have, a date is no MJD, or the dates do
        not increase.
    """
    path = Path(path)
    table = read_table(path, FRAME_COLUMNS)
    for frame in table["frame"]:
        files.require_name(frame, f"{path}: frame")
    require_once(path, table, "frame")
    _refuse_one_file(path, table["frame"])
    low, high = MJD_RANGE
    _require(path, table, "mjd", np.isfinite(table["mjd"]), "a number")
    _require(
        path,
        table,
        "mjd",
        table["mjd"].between(low, high),
        f"a modified Julian date, {low:g} to {high:g}",
    )
    if not table["mjd"].is_monotonic_increasing:
        raise TableError(
            f"{path}: the column mjd does not increase; sort the rows by date, the stack is of preceding images"
        )
    return table


def _refuse_one_file(path: Path, names: pd.Series[str]) -> None:
    """Refuse names whose files would be one: those of the median stack, or of each other where case is not told apart."""
    folded = names.str.casefold()
    if (folded == fits_images.STACK).any():
        raise TableError(
            f"{path}: frame {fits_images.STACK} would overwrite the median stack {fits_images.STACK}.fits.fz; rename the image"
        )
    if folded.duplicated().any():
        again = names[folded.duplicated()].iloc[0]
        raise TableError(
            f"{path}: frame {again} is there in other letters, one file on some disks; rename one image"
        )


def read_known(path: str | Path, columns: Sequence[str] = BLOB_COLUMNS) -> pd.DataFrame:
    """Read known blobs: a table whose values of these columns blobs can have.

    Raises
    ------
    TableError
        As `read_table` and `require_blobs`, or if a blob stands twice.
    """
    path = Path(path)
    table = require_blobs(path, read_table(path, columns), columns)
    if "blob" in table:
        _require(path, table, "blob", table["blob"] != "", "a name")
        require_once(path, table, "blob")
    return table


def require_blobs(path: str | Path, table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Refuse places off the detector, and sizes and depths that no blob has (`BLOB_RANGES`).

    Parameters
    ----------
    path : path
        What errors name.
    table : DataFrame
        Its index counts the rows below the header.
    columns : sequence of str
        Those of them that have a range are looked at.

    Returns
    -------
    DataFrame
        The same with numbers in these columns.

    Raises
    ------
    TableError
        If a value is a word, a gap, infinite, or out of its range.
    """
    table = table.copy()
    for column in filter(BLOB_RANGES.__contains__, columns):
        table[column] = _numbers(Path(path), table, column)
        low, high = BLOB_RANGES[column]
        _require(Path(path), table, column, np.isfinite(table[column]), "a number")
        _require(
            Path(path), table, column, table[column].between(low, high), f"{low:g} to {high:g}"
        )
    return table


def read_blobs(raw_dir: str | Path) -> pd.DataFrame:
    """``blobs.csv`` of a folder of images: the catalogue; empty if there is no such file.

    Columns blob, x_px, y_px, radius_px, depth_frac, shape (``disc`` if not given) and first_frame (empty
    for a blob older than the first image).

    Raises
    ------
    TableError
        As `read_known`, or if a shape cannot be drawn, or a first frame is not in ``frames.csv``.
    """
    import pandas as pd

    path = Path(raw_dir) / "blobs.csv"
    if not path.exists():
        return pd.DataFrame({column: [] for column in (*BLOB_COLUMNS, "shape", "first_frame")})
    table = read_known(path)
    for column, default in (("shape", "disc"), ("first_frame", "")):
        if column not in table:
            table[column] = default
    _require(
        path, table, "shape", table["shape"].isin(BLOB_SHAPES), f"one of {', '.join(BLOB_SHAPES)}"
    )
    unknown = sorted(set(table["first_frame"]) - {""} - set(read_frame_list(raw_dir)["frame"]))
    if unknown:
        raise TableError(
            f"{path}: first_frame {unknown[0]} is not a frame of frames.csv; correct it or add the frame"
        )
    return table


def require_once(path: Path, table: pd.DataFrame, column: str) -> None:
    repeated = table[column][table[column].duplicated()]
    if len(repeated):
        found = " ".join(repeated.iloc[0].split())[: files.MAX_NAME_BYTES]
        raise TableError(f"{path}: {column} {found} stands twice, expected once; remove a row")


def _require(
    path: Path, table: pd.DataFrame, column: str, good: pd.Series[bool], expected: str
) -> None:
    if not good.all():
        row = table.index[~good][0]
        found = np.asarray(table[column], dtype=object)[~good][0]
        found = f"{found[:40]}..." if isinstance(found, str) and len(found) > 40 else found
        raise TableError(
            f"{path}: row {row + 2}: {column} is {found!r}, expected {expected}; correct it"
        )


def read_stage(folder: str | Path) -> pd.DataFrame:
    """The per-frame tables of all batches of a stage, as one, in the order of the frames.

    Raises
    ------
    TableError
        If the stage has made none, or a frame stands in them twice.
    """
    import pandas as pd

    paths = stage_tables(folder)
    table = pd.concat([read_table(path, ("frame", "status")) for path in paths], ignore_index=True)
    require_once(Path(folder) / "frames-*.csv", table, "frame")
    return table


def image_table(
    raw_dir: str | Path, difference_dir: str | Path, scale_dir: str | Path
) -> pd.DataFrame:
    """All images in order of date, and whether they came through to the scale stage.

    Returns
    -------
    DataFrame
        frame, mjd, status (``ok`` or why not), reason, shift_x_px, shift_y_px, noise_frac, n_stack.
    """
    listed = read_frame_list(raw_dir)[["frame", "mjd"]]
    subtracted = read_stage(difference_dir).drop(columns=["mjd"], errors="ignore")
    table = listed.merge(subtracted, on="frame", how="left", validate="one_to_one")
    scaled = listed[["frame"]].merge(
        read_stage(scale_dir)[["frame", "status", "reason"]], on="frame", how="left"
    )
    lost = (table["status"] == "ok") & (scaled["status"] != "ok")
    table["status"] = table["status"].mask(lost, "rejected").fillna("rejected")
    unusual = "rejected by the stage clip or scale, see their tables"
    table["reason"] = (
        table["reason"]
        .mask(lost, scaled["reason"].fillna(unusual))
        .fillna("not in the difference stage")
    )
    return table


def stage_tables(folder: str | Path, batch: int | None = None) -> list[Path]:
    """The tables ``frames-NNN.csv`` of an image stage, of one batch or of all.

    Raises
    ------
    TableError
        If the stage has made none.
    """
    paths = sorted(
        Path(folder).glob("frames-*.csv" if batch is None else f"frames-{batch:03d}.csv")
    )
    if not paths:
        raise TableError(
            f"{folder}: no table frames-*.csv found; run the stage '{Path(folder).name}' first"
        )
    return paths


def batches(n_frames: int) -> list[slice]:
    """Consecutive runs of at most `BATCH` rows."""
    return [slice(start, min(start + BATCH, n_frames)) for start in range(0, n_frames, BATCH)]
