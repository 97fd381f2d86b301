"""The loop closes: blobs that people have confirmed become known blobs, and cases of the next regression test."""

from __future__ import annotations

import io
import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from blobpipe import frames, store
from blobpipe.errors import TableError

log = logging.getLogger(__name__)

COLUMNS = (
    *("blob", "x_px", "y_px", "radius_px", "depth_frac", "shape", "first_frame", "first_mjd"),
    *("depth_err_frac", "snr", "status", "reviewer", "model_sha256", "params_sha256"),
)
SAME_PX = 3.0  # two blobs do not lie so near each other


def update(connection: sqlite3.Connection, path: Path) -> list[str]:
    """Add the candidates whose latest review says ``confirmed`` to a catalogue of known blobs.

    Parameters
    ----------
    connection : sqlite3.Connection
        The log.
    path : path
        Table with the columns of ``blobs.csv``; made if it is not there. Its rows are kept byte for byte (with a comma
        at their end for each column that is new to the table), and the added ones follow them by date. A candidate that
        lies on one of its blobs is not added again; one whose radius and depth could not be measured is left out,
        with a warning.

    Returns
    -------
    list of str
        Names of the blobs that were added.

    Raises
    ------
    TableError
        If the table lacks a column, or the list of images beside it lacks the first image of a blob: the pipeline
        would refuse the catalogue. Then nothing is written.

    Notes
    -----
    Source: ours.
    """
    known = frames.read_table(path, frames.BLOB_COLUMNS) if path.exists() else pd.DataFrame(columns=list(COLUMNS))
    new = _without_known(_measured(_confirmed(connection)), known)
    new["blob"] = _names(list(known["blob"]), len(new))
    _insist_on_images(path, new)
    if not path.exists():
        frames.write_table(path, new[list(COLUMNS)])
    elif len(new):
        added = [name for name in COLUMNS if name not in known]
        _append(path, added, new.reindex(columns=[*known.columns, *added]))
    return list(new["blob"])


def _confirmed(connection: sqlite3.Connection) -> pd.DataFrame:
    rows = store.table(connection, "candidate_list").query("decision == 'confirmed'")
    reviews = store.table(connection, "reviews").drop_duplicates("candidate", keep="last").set_index("candidate")
    # the fit knows three shapes and averages over them: which one it is stays open; that a person has confirmed it
    # stands above what the search made of it
    rows = rows.assign(shape="disc", status="confirmed", reviewer=rows["id"].map(reviews["reviewer"]))
    return rows.reset_index(drop=True)


def _measured(rows: pd.DataFrame) -> pd.DataFrame:
    good = (rows["radius_px"].astype(float) > 0) & rows["depth_frac"].astype(float).between(0, 1, inclusive="right")
    for number in rows["id"][~good]:
        log.warning("candidate %d: confirmed, but without a radius and a depth; add its row by hand", number)
    return rows[good].reset_index(drop=True)


def _without_known(rows: pd.DataFrame, known: pd.DataFrame) -> pd.DataFrame:
    """In order of date, those that lie neither on a known blob nor on one before them."""
    rows = rows.sort_values(["first_mjd", "id"], ignore_index=True)
    taken = [*known[["x_px", "y_px"]].to_numpy(float)]
    kept = []
    for i, place in enumerate(rows[["x_px", "y_px"]].to_numpy(float)):
        if all(np.hypot(*(place - other)) > SAME_PX for other in taken):
            kept.append(i)
            taken.append(place)
    return rows.iloc[kept].reset_index(drop=True)


def _names(taken: list[Any], n: int) -> list[str]:
    """The next numbers of the catalogue's own, such as b0113 after b0112."""
    numbers = [int(name[1:]) for name in map(str, taken) if name[:1].isalpha() and name[1:].isdigit()]
    start = max(numbers, default=0) + 1
    return [f"b{number:04d}" for number in range(start, start + n)]


def _insist_on_images(path: Path, blobs: pd.DataFrame) -> None:
    images = path.with_name("frames.csv")
    if not images.exists():
        return
    listed = set(frames.read_table(images, frames.FRAME_COLUMNS)["frame"])
    for row in blobs[~blobs["first_frame"].isin(listed)].itertuples():
        raise TableError(
            f"{images}: found no row for {row.first_frame}, the first image of candidate {row.id}; put the image beside "
            "it, and list it with --frames"
        )


def list_images(connection: sqlite3.Connection, path: Path) -> list[str]:
    """Add the images of the log that lie beside a list of images (``frames.csv``) to it, in order of date.

    Differences and rejected images are left out, and what is listed already stays as it is, byte for byte. The list is
    made if it is not there.

    Returns
    -------
    list of str
        Names of the images that were added.

    Raises
    ------
    TableError
        If the table lacks the columns frame and mjd.
    """
    header = ",".join(frames.FRAME_COLUMNS)
    known = frames.read_table(path, frames.FRAME_COLUMNS) if path.exists() else None
    columns = list(frames.FRAME_COLUMNS) if known is None else list(known.columns)
    lines = [header] if known is None else list(_records(path))
    new = _images_beside(connection, path, set() if known is None else set(known["frame"]))
    if new.empty:
        return []
    dates = [] if known is None else list(known["mjd"].astype(float))
    rows = [*zip(dates, lines[1:], strict=True), *zip(new["mjd"], _lines(new.reindex(columns=columns)), strict=True)]
    rows.sort(key=lambda row: row[0])
    _write_lines(path, [lines[0], *(line for _, line in rows)])
    return list(new["frame"])


def _images_beside(connection: sqlite3.Connection, path: Path, listed: set[str]) -> pd.DataFrame:
    found = connection.execute(
        "SELECT f.path, i.mjd FROM files f JOIN images i ON i.id = f.image "
        "WHERE i.kind = 'image' AND i.outcome != 'rejected' AND f.outcome != 'duplicate' ORDER BY f.id"
    ).fetchall()
    here = path.resolve().parent
    files = [(Path(row["path"]), row["mjd"]) for row in found if Path(row["path"]).parent == here]
    rows = [(frames.frame_name(file), mjd) for file, mjd in files if file.exists()]
    table = pd.DataFrame(rows, columns=list(frames.FRAME_COLUMNS)).drop_duplicates("frame", keep="last")
    return table[~table["frame"].isin(listed)].sort_values(["mjd", "frame"], ignore_index=True)


def reviews(connection: sqlite3.Connection, path: Path) -> int:
    """Write all reviews as CSV in the order in which they were made, for version control; how many.

    Raises
    ------
    TableError
        If there are none.
    """
    table = store.table(connection, "reviews")
    if table.empty:
        raise TableError(f"{path}: no review in the log; review candidates first ('blobpipe serve')")
    frames.write_table(path, table)
    return len(table)


def _append(path: Path, columns: list[str], rows: pd.DataFrame) -> None:
    """Add columns, and rows that have all, to a CSV table; the text that is there stays."""
    header, *lines = _records(path)
    commas = "," * len(columns)
    _write_lines(path, [",".join([header, *columns]), *(line + commas for line in lines), *_lines(rows)])


def _records(path: Path) -> Iterator[str]:
    """The rows of a CSV file as they are written, the header first; a quoted field may hold a line's end."""
    record = ""
    for line in path.read_text(encoding="utf-8").split("\n"):
        record += line
        if record.count('"') % 2:
            record += "\n"
        elif record:
            yield record
            record = ""


def _lines(rows: pd.DataFrame) -> list[str]:
    text = io.StringIO()
    rows.to_csv(text, index=False, header=False, float_format="%.9g", lineterminator="\n")
    return text.getvalue().split("\n")[:-1]


def _write_lines(path: Path, lines: list[str]) -> None:
    with frames.atomic(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
