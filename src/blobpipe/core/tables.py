"""Read and write CSV tables: one reader and one check for the tables of all commands."""

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
from blobpipe.core.detector import DEFAULT, MJD_RANGE, Detector
from blobpipe.errors import TableError

if TYPE_CHECKING:
    import pandas as pd

# Fewest frames per job, and most jobs; the results do not depend on them
BATCH = 64
MAX_BATCHES = 48

FRAME_COLUMNS = ("frame", "mjd")
BLOB_COLUMNS = ("blob", "x_px", "y_px", "radius_px", "depth_frac")
BLOB_SHAPES = ("disc", "diamond", "ring")

# Lowest and highest radius (px) and depth (fraction of the light) that a blob can have, both included
RADIUS_RANGE_PX = (0.1, 100.0)
DEPTH_RANGE_FRAC = (1e-9, 1.0)

# Columns of text, in which NA or 007 is a value as any other
TEXT_COLUMNS = (
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
    "reviewer",
    "at",
    "model",
    "params_hash",
    "model_sha256",
    "params_sha256",
    "stack_sha256",
)

# Names of columns that hold numbers alone
NUMBER_COLUMN = re.compile(r"(.*_)?(px|px2|frac|sigma|mjd|snr|score|probability)")

# Largest table (bytes): four times that of 10,000 images
MAX_TABLE_BYTES = 2**28


def read_table(path: str | Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read a CSV table that has at least these columns.

    Columns of `TEXT_COLUMNS` stay text, with empty strings for gaps; gaps in other columns are NaN.

    Returns
    -------
    DataFrame
        Columns whose names end in a unit (``x_px``, ``depth_frac``, ``mjd``, ...) hold numbers or gaps; ``frame`` and
        ``first_frame`` hold names (`files.require_name`) or empty strings.

    Raises
    ------
    TableError
        If the file is missing or not a CSV table, if a column is missing or repeated, if a row has more or fewer fields
        than the header, or if a value is not what its column holds.
    """
    path = Path(path)
    return parse_table(path, read_table_bytes(path, columns), columns)


def parse_table(path: Path, content: bytes, columns: Sequence[str]) -> pd.DataFrame:
    """Read a table as `read_table` does, from its bytes; errors name ``path``."""
    import pandas as pd

    # Check the layout first: pandas shifts or drops fields of irregular rows without a word
    rows = table_rows(path, content)
    header, _ = next(rows)
    missing = [column for column in columns if column not in header]
    if missing:
        found = " ".join(", ".join(header).split())
        found = f"{found[:200]}..." if len(found) > 200 else found
        raise TableError(
            f"{path}: column {missing[0]} is missing; found {found}; expected {', '.join(columns)}; add it"
        )
    n_rows = sum(1 for _ in rows)

    # Only the empty field is a gap, and in text not even that
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
    # pandas skips lines of blanks alone
    if len(table) != n_rows:
        raise _no_table(path, f"{n_rows} rows, of which {len(table)} hold something")

    # Check the values that have a meaning by their columns' names
    for name in map(str, list(table)):
        if NUMBER_COLUMN.fullmatch(name):
            table[name] = _numbers(path, table, name)
    for name in {"frame", "first_frame"} & set(table):
        for frame in set(table[name]) - {""}:
            files.require_name(frame, f"{path}: {name}")
    return table


def read_table_bytes(path: Path, columns: Sequence[str]) -> bytes:
    """Read all bytes of a table's file.

    Raises
    ------
    TableError
        If the file is missing, not regular, cannot be read, or is larger than `MAX_TABLE_BYTES`.
    """
    try:
        if path.exists() and not path.is_file():
            raise _no_table(path, "not a file: a folder, a pipe or a device")
        size = path.stat().st_size
        if size > MAX_TABLE_BYTES:
            raise _no_table(path, f"{size} bytes, at most {MAX_TABLE_BYTES} expected")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise TableError(
            f"{path}: not found, expected a table with the columns {', '.join(columns)}"
        ) from error
    except (OSError, ValueError) as error:
        # The ValueError is that of a file name with a NUL
        reason = getattr(error, "strerror", None) or str(error)
        raise _no_table(path, reason) from error


def table_rows(path: Path, content: bytes) -> Iterator[tuple[list[str], str]]:
    """Yield the rows of a CSV table, its header first.

    Yields
    ------
    list of str
        Fields of the row.
    str
        The row as written, with its line end and the blank lines behind it; without a byte-order mark.

    Raises
    ------
    TableError
        If the table is an image, is not UTF-8, contains a byte 0, or an unclosed quote, repeats a column, or has a row with more or
        fewer fields than its header.
    """
    if content.startswith((b"SIMPLE  =", b"\x1f\x8b")):
        raise _no_table(path, "a FITS image, or a compressed file; name the table")
    if b"\0" in content:
        line = content.count(b"\n", 0, content.index(b"\0")) + 1
        raise _no_table(path, f"line {line}: a byte 0: is it UTF-16? save it as UTF-8")
    # The lines that the CSV reader has consumed
    written: list[str] = []
    lines = io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", newline="")
    rows = csv.reader(_recorded(lines, written), strict=True)
    try:
        yield from _checked_rows(rows, written)
    except UnicodeDecodeError as error:
        raise _no_table(
            path, f"byte {error.object[error.start]:#x} is not UTF-8; save it as UTF-8"
        ) from error
    except (ValueError, csv.Error) as error:
        raise _no_table(path, f"line {max(rows.line_num, 1)}: {error}") from error


def _checked_rows(rows: Iterable[list[str]], written: list[str]) -> Iterator[tuple[list[str], str]]:
    """Yield each row with the lines that were consumed while it was read, and the blank ones behind it.

    Parameters
    ----------
    rows : iterable of list of str
        Fields of each row; blank lines have none.
    written : list of str
        Lines that have been consumed; those of a row are removed once it has been yielded.
    """
    header: list[str] = []
    row: list[str] = []
    n_lines = 0
    for fields in rows:
        # A row is complete when the next one begins
        if fields and row:
            yield row, "".join(written[:n_lines])
            del written[:n_lines]
        row = fields or row
        n_lines = len(written)
        if not header:
            _check_header(fields)
            header = fields
        if len(row) != len(header):
            raise ValueError(f"{len(row)} fields, {len(header)} in the header")
    if not header:
        raise ValueError("no header: the file is empty")
    yield row, "".join(written)


def _recorded(lines: Iterable[str], written: list[str]) -> Iterator[str]:
    """Yield lines, and append each to ``written``."""
    for line in lines:
        written.append(line)
        yield line


def _check_header(header: list[str]) -> None:
    """Refuse repeated columns, and separators other than commas."""
    repeated = [name for name in header if name and header.count(name) > 1]
    if repeated:
        raise ValueError(f"two columns are called {repeated[0][:40]!r}; rename or remove one")
    for other, mark in (("semicolons", ";"), ("tabs", "\t")):
        if len(header) == 1 and mark in header[0]:
            raise ValueError(
                f"{other} between its fields, commas expected, and points in its numbers"
            )


def _no_table(path: Path, reason: str) -> TableError:
    """Return the error of a file that is not a CSV table."""
    return TableError(f"{path}: cannot be read as CSV ({reason})")


def _numbers(path: Path, table: pd.DataFrame, column: str) -> pd.Series[Any]:
    """Return a column as numbers; refuse values that are neither numbers nor gaps."""
    import pandas as pd

    found = table[column]
    if found.dtype.kind in "iuf":
        return found
    # A column of True and False is no column of numbers, although pandas can convert it
    if found.dtype.kind == "b":
        _require(path, table, column, ~found.notna(), "a number")
    numbers = pd.to_numeric(found, errors="coerce").astype(float)
    _require(path, table, column, numbers.notna() | found.isna(), "a number")
    return numbers


def csv_text(table: pd.DataFrame, *, header: bool = True, newline: str = "\n") -> str:
    """Return a table as CSV with nine significant digits; the same bytes on every machine.

    Carriage returns in text become line feeds.
    """
    text = str(
        table.to_csv(index=False, header=header, float_format="%.9g", lineterminator=newline)
    )
    # Python's csv does not quote a lone carriage return, which would end the row
    if "\r" in text.replace(newline, ""):
        return csv_text(table.replace("\r\n?", "\n", regex=True), header=header, newline=newline)
    return text


def write_table(path: str | Path, table: pd.DataFrame) -> None:
    """Write a table as CSV with nine significant digits; the same bytes on every machine."""
    with files.atomic(path) as temporary:
        temporary.write_text(csv_text(table), encoding="utf-8", newline="")


def write_exact(path: str | Path, table: pd.DataFrame) -> None:
    """Write a table as CSV with all digits, so that `read_exact` gives the same bits again."""
    with files.atomic(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")


def read_exact(path: str | Path, like: pd.DataFrame) -> pd.DataFrame:
    """Read a table of `write_exact`.

    Parameters
    ----------
    path : path
    like : DataFrame
        A table of the same columns and types.

    Raises
    ------
    TableError
        As `read_table`, or if a value is not of its column's type.
    """
    import pandas as pd

    path = Path(path)
    columns = list(map(str, like))
    content = read_table_bytes(path, columns)
    try:
        # Python's own conversion of text to a number gives back the bits that were written
        text = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False, na_values=[])
        table = {name: text[name] for name in columns}
        for name in columns:
            kind = like[name].dtype.kind
            if kind in "iuf":
                read = float if kind == "f" else int
                table[name] = pd.Series([read(value or "nan") for value in text[name]])
        return pd.DataFrame(table).astype({name: like[name].dtype for name in columns})
    except (ValueError, KeyError) as error:
        raise _no_table(path, " ".join(str(error).split())[:120]) from error


def number_or_none(value: float) -> float | None:
    """Round to six decimals; None for NaN, which JSON cannot hold."""
    return round(float(value), 6) if np.isfinite(value) else None


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write a JSON file, keys in the order given.

    Raises
    ------
    ValueError
        If a number is not finite.
    """
    with files.atomic(path) as temporary:
        text = json.dumps(content, indent=2, allow_nan=False)
        temporary.write_text(f"{text}\n", encoding="utf-8")


def read_frame_list(raw_dir: str | Path) -> pd.DataFrame:
    """Read ``frames.csv`` of a folder of images: one row per image, in the order of the file.

    Raises
    ------
    TableError
        As `read_image_list`, or if there is no row, or a frame has no image.
    """
    folder = Path(raw_dir)
    path = folder / "frames.csv"
    table = read_image_list(path)
    if table.empty:
        raise TableError(
            f"{path}: found no row below its header, expected one for each image; list the images"
        )
    for frame in table["frame"]:
        images = [folder / f"{frame}{suffix}" for suffix in fits_images.SUFFIXES]
        if not any(image.is_file() for image in images):
            raise TableError(
                f"{path}: frame {frame} has no image {images[0].name} beside it; add it or drop the row"
            )
    return table


def read_image_list(path: str | Path) -> pd.DataFrame:
    """Read a table of images with their names and dates, wherever the images are.

    Raises
    ------
    TableError
        If a column is missing, a frame is listed twice or has an impossible name, a date is no MJD, or the dates do not
        increase.
    """
    path = Path(path)
    table = read_table(path, FRAME_COLUMNS)
    for frame in table["frame"]:
        files.require_name(frame, f"{path}: frame")
    require_once(path, table, "frame")
    _refuse_shared_files(path, table["frame"])

    # Dates are MJD, and increase
    low, high = MJD_RANGE
    in_range = table["mjd"].between(low, high)
    _require(path, table, "mjd", np.isfinite(table["mjd"]), "a number")
    _require(path, table, "mjd", in_range, f"a modified Julian date, {low:g} to {high:g}")
    if not table["mjd"].is_monotonic_increasing:
        raise TableError(
            f"{path}: the column mjd does not increase; sort the rows by date, since each image is compared with "
            "those before it"
        )
    return table


def _refuse_shared_files(path: Path, names: pd.Series[str]) -> None:
    """Refuse names whose files would be that of the median stack, or those of each other where case does not count."""
    folded = names.str.casefold()
    if (folded == fits_images.STACK).any():
        raise TableError(
            f"{path}: frame {fits_images.STACK} would overwrite the median stack {fits_images.STACK}.fits.fz; rename the image"
        )
    if folded.duplicated().any():
        again = names[folded.duplicated()].iloc[0]
        raise TableError(
            f"{path}: frame {again} differs from another in upper and lower case alone, which is one file on some disks; "
            "rename one image"
        )


def blob_ranges(detector: Detector = DEFAULT) -> dict[str, tuple[float, float]]:
    """Return the lowest and highest value that a blob of a detector can have, both included, by column."""
    return {
        "x_px": (-0.5, detector.width_px - 0.5),
        "y_px": (-0.5, detector.height_px - 0.5),
        "radius_px": RADIUS_RANGE_PX,
        "depth_frac": DEPTH_RANGE_FRAC,
    }


def read_known(
    path: str | Path, columns: Sequence[str] = BLOB_COLUMNS, detector: Detector = DEFAULT
) -> pd.DataFrame:
    """Read known blobs: a table with these columns, whose values are those of possible blobs.

    Raises
    ------
    TableError
        As `read_table` and `require_blobs`, or if a blob has no name or is listed twice.
    """
    path = Path(path)
    table = require_blobs(path, read_table(path, columns), columns, detector)
    if "blob" in table:
        _require(path, table, "blob", table["blob"] != "", "a name")
        require_once(path, table, "blob")
    return table


def require_blobs(
    path: str | Path,
    table: pd.DataFrame,
    columns: Sequence[str],
    detector: Detector = DEFAULT,
) -> pd.DataFrame:
    """Refuse positions off the detector, and sizes and depths that no blob has (`blob_ranges`).

    Parameters
    ----------
    path : path
        File of the table, for messages.
    table : DataFrame
        Its index counts the rows below the header.
    columns : sequence of str
        Columns to check; those without a range are skipped.
    detector : Detector, optional

    Returns
    -------
    DataFrame
        The table with numbers in these columns.

    Raises
    ------
    TableError
        If a value is a word, a gap, infinite, or out of its range.
    """
    path = Path(path)
    table = table.copy()
    ranges = blob_ranges(detector)
    for column in columns:
        if column not in ranges:
            continue
        table[column] = _numbers(path, table, column)
        low, high = ranges[column]
        in_range = table[column].between(low, high)
        _require(path, table, column, np.isfinite(table[column]), "a number")
        _require(path, table, column, in_range, f"{low:g} to {high:g}")
    return table


def read_blobs(raw_dir: str | Path, detector: Detector = DEFAULT) -> pd.DataFrame:
    """Read ``blobs.csv`` of a folder of images, the catalogue; empty if there is no such file.

    Returns
    -------
    DataFrame
        blob, x_px, y_px, radius_px, depth_frac, shape (``disc`` if not given) and first_frame (empty for a blob older
        than the first image).

    Raises
    ------
    TableError
        As `read_known`, or if a shape is not one of `BLOB_SHAPES`, or a first frame is not in ``frames.csv``.
    """
    import pandas as pd

    path = Path(raw_dir) / "blobs.csv"
    if not path.exists():
        return pd.DataFrame({column: [] for column in (*BLOB_COLUMNS, "shape", "first_frame")})
    table = read_known(path, detector=detector)

    # Optional columns
    for column, default in (("shape", "disc"), ("first_frame", "")):
        if column not in table:
            table[column] = default

    # Shapes that can be drawn, and first frames that are there
    is_shape = table["shape"].isin(BLOB_SHAPES)
    _require(path, table, "shape", is_shape, f"one of {', '.join(BLOB_SHAPES)}")
    frames = set(read_frame_list(raw_dir)["frame"])
    unknown = sorted(set(table["first_frame"]) - {""} - frames)
    if unknown:
        raise TableError(
            f"{path}: first_frame {unknown[0]} is not a frame of frames.csv; correct it or add the frame"
        )
    return table


def require_once(path: Path, table: pd.DataFrame, column: str) -> None:
    """Refuse repeated values in a column of names.

    Raises
    ------
    TableError
        If there are any.
    """
    repeated = table[column][table[column].duplicated()]
    if len(repeated):
        found = " ".join(repeated.iloc[0].split())[: files.MAX_NAME_BYTES]
        raise TableError(f"{path}: {column} {found} is listed twice; remove one row")


def _require(
    path: Path, table: pd.DataFrame, column: str, good: pd.Series[bool], expected: str
) -> None:
    """Refuse the first row, by its number in the file, that is not good."""
    if not good.all():
        row = table.index[~good][0]
        found = np.asarray(table[column], dtype=object)[~good][0]
        if isinstance(found, str) and len(found) > 40:
            found = f"{found[:40]}..."
        raise TableError(
            f"{path}: row {row + 2}: {column} is {found!r}, expected {expected}; correct it"
        )


def read_stage(folder: str | Path, batch: int | None = None) -> pd.DataFrame:
    """Read the per-frame tables of a stage, of one batch or of all, as one table, in the order of the frames.

    Raises
    ------
    TableError
        If the stage has made none, or a frame is listed twice.
    """
    import pandas as pd

    tables = [read_table(path, ("frame", "status")) for path in stage_tables(folder, batch)]
    table = pd.concat(tables, ignore_index=True)
    require_once(Path(folder) / "frames-*.csv", table, "frame")
    return table


def image_table(
    raw_dir: str | Path,
    difference_dir: str | Path,
    scale_dir: str | Path,
    batch: int | None = None,
) -> pd.DataFrame:
    """Return all images in order of date, with the fate of each up to the scale stage.

    Parameters
    ----------
    raw_dir, difference_dir, scale_dir : path
        Folders of the images and of the two stages.
    batch : int, optional
        Only this batch of the stages has been made, or counts: all other images are as rejected.

    Returns
    -------
    DataFrame
        frame, mjd, status (``ok``, ``stack`` or ``rejected``), reason, shift_x_px, shift_y_px, noise_frac, n_stack.
    """
    listed = read_frame_list(raw_dir)[["frame", "mjd"]]
    subtracted = read_stage(difference_dir, batch).drop(columns=["mjd"], errors="ignore")
    table = listed.merge(subtracted, on="frame", how="left", validate="one_to_one")
    fates = read_stage(scale_dir, batch)[["frame", "status", "reason"]]
    scaled = listed[["frame"]].merge(fates, on="frame", how="left")

    # Images with a difference that clip or scale rejected; clip's rejects are not in the table of scale
    lost = (table["status"] == "ok") & (scaled["status"] != "ok")
    later_reason = scaled["reason"].fillna("rejected by the stage clip or scale, see their tables")
    status = table["status"].mask(lost, "rejected")
    reason = table["reason"].mask(lost, later_reason)
    table["status"] = status.fillna("rejected")
    table["reason"] = reason.fillna("not in the difference stage")
    return table


def batch_tables(folder: str | Path, name: str, stage_dir: str | Path) -> list[Path]:
    """Return the paths of the tables ``{name}-NNN.csv`` of a folder, one for each batch of an image stage.

    Raises
    ------
    TableError
        If one is missing.
    """
    paths = [
        Path(folder) / table.name.replace("frames", name, 1) for table in stage_tables(stage_dir)
    ]
    for path in paths:
        if not path.is_file():
            raise TableError(
                f"{path}: not found, expected a table of each batch of images; run the stage "
                f"'{path.parents[1].name}' without --gather"
            )
    return paths


def stage_tables(folder: str | Path, batch: int | None = None) -> list[Path]:
    """Return the paths of the tables ``frames-NNN.csv`` of an image stage, of one batch or of all.

    Raises
    ------
    TableError
        If the stage has made none.
    """
    pattern = "frames-*.csv" if batch is None else f"frames-{batch:03d}.csv"
    paths = sorted(Path(folder).glob(pattern))
    if not paths:
        raise TableError(
            f"{folder}: no table frames-*.csv found; run the stage '{Path(folder).name}' first"
        )
    return paths


def batches(n_frames: int) -> list[slice]:
    """Return the rows of each batch: consecutive runs of at most `batch_size` rows."""
    size = batch_size(n_frames)
    starts = range(0, n_frames, size)
    return [slice(start, min(start + size, n_frames)) for start in starts]


def batch_size(n_frames: int) -> int:
    """Return the number of rows in a batch: `BATCH`, doubled until there are at most `MAX_BATCHES` batches.

    So a longer list hardly ever moves the rows of a batch that has been made.
    """
    size = BATCH
    while n_frames > MAX_BATCHES * size:
        size *= 2
    return size
