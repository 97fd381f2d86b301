"""The loop closes: blobs that people have confirmed become known blobs, and cases of the next regression test."""

from __future__ import annotations

import codecs
import logging
import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from blobpipe.core import files, fits_images, tables
from blobpipe.errors import TableError
from blobpipe.monitor import logbook
from blobpipe.monitor.inbox import path_of

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
        lies on one of its blobs is not added again; one that the catalogue could not hold (`tables.BLOB_RANGES`) is left
        out, with a warning.

    Returns
    -------
    list of str
        Names of the blobs that were added.

    Raises
    ------
    TableError
        If the table cannot be read (`tables.read_known`), or the list of images beside it lacks the first image of a
        blob: the pipeline would refuse the catalogue. Then nothing is written.

    Notes
    -----
    Source: ours.
    """
    there = _is_there(path)
    known = tables.read_known(path) if there else pd.DataFrame(columns=list(COLUMNS))
    new = _without_known(_measured(_confirmed(connection)), known)
    new["blob"] = _names(list(known["blob"]), len(new))
    _insist_on_images(path, new)
    if not there:
        tables.write_table(path, new[list(COLUMNS)])
    elif len(new):
        _append(path, new, COLUMNS)
    return list(new["blob"])


def _confirmed(connection: sqlite3.Connection) -> pd.DataFrame:
    rows = logbook.table(connection, "candidate_list").query("decision == 'confirmed'")
    reviews = (
        logbook.table(connection, "reviews")
        .drop_duplicates("candidate", keep="last")
        .set_index("candidate")
    )
    # the fit knows three shapes and averages over them: which one it is stays open; that a person has confirmed it
    # stands above what the search made of it
    rows = rows.assign(
        shape="disc", status="confirmed", reviewer=rows["id"].map(reviews["reviewer"])
    )
    return rows.reset_index(drop=True)


def _measured(rows: pd.DataFrame) -> pd.DataFrame:
    ranges = tables.BLOB_RANGES.items()
    good = pd.DataFrame(
        {column: rows[column].astype(float).between(*limits) for column, limits in ranges}
    )
    good["first_frame"] = rows["first_frame"].map(files.is_name).astype(bool)
    for number, measured in zip(rows["id"], good.to_numpy(), strict=True):
        if not measured.all():
            wrong = " and ".join(good.columns[~measured])
            log.warning(
                "candidate %d: confirmed, but not with the %s of a blob; add its row by hand",
                number,
                wrong,
            )
    return rows[good.all(axis=1)].reset_index(drop=True)


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
    numbers = [int(name[1:]) for name in taken if re.fullmatch(r"[A-Za-z][0-9]{1,9}", name)]
    start = max(numbers, default=0) + 1
    return [f"b{number:04d}" for number in range(start, start + n)]


def _insist_on_images(path: Path, blobs: pd.DataFrame) -> None:
    images = path.with_name("frames.csv")
    if not images.exists():
        return
    listed = set(tables.read_image_list(images)["frame"])
    for row in blobs[~blobs["first_frame"].isin(listed)].itertuples():
        raise TableError(
            f"{images}: found no row for {row.first_frame}, the first image of candidate {row.id}; put the image beside "
            "it, and list it with --frames"
        )


def list_images(connection: sqlite3.Connection, path: Path) -> list[str]:
    """Add the images of the log that lie beside a list of images (``frames.csv``) to it, in order of date.

    Differences, rejected and superseded images are left out, and what is listed already stays as it is, byte for byte. The list is
    made if it is not there.

    Returns
    -------
    list of str
        Names of the images that were added.

    Raises
    ------
    TableError
        As `tables.read_image_list`.
    """
    if not _is_there(path):
        new = _images_beside(connection, path, set())
        if len(new):
            tables.write_table(path, new)
        return list(new["frame"])
    known = tables.read_image_list(path)
    new = _images_beside(connection, path, set(known["frame"]))
    header, rows, newline = _written(path)
    lines = _lines(new.reindex(columns=header), newline)
    # behind those of the same date: the order in which the log met them
    places = np.searchsorted(known["mjd"], new["mjd"], side="right")
    for place, line in zip(places[::-1], lines[::-1], strict=True):
        rows.insert(1 + place, line)
    if len(new):
        _write(path, rows, newline)
    return list(new["frame"])


def _images_beside(connection: sqlite3.Connection, path: Path, listed: set[str]) -> pd.DataFrame:
    found = connection.execute(
        "SELECT f.path, i.mjd FROM files f JOIN images i ON i.id = f.image "
        "WHERE i.kind = 'image' AND i.outcome != 'rejected' AND i.superseded_by IS NULL AND f.outcome != 'duplicate' ORDER BY f.id"
    ).fetchall()
    here = path.resolve().parent
    paths = [(path_of(row["path"]), row["mjd"]) for row in found]
    beside = [(file, mjd) for file, mjd in paths if file.parent == here]
    rows = [(fits_images.frame_name(file), mjd) for file, mjd in beside if file.exists()]
    for name, _ in rows:
        if not files.is_name(name):
            log.warning("%s: not listed, for no frame can be called %r; rename it", path, name)
    rows = [row for row in rows if files.is_name(row[0])]
    table = pd.DataFrame(rows, columns=list(tables.FRAME_COLUMNS)).drop_duplicates(
        "frame", keep="last"
    )
    return table[~table["frame"].isin(listed)].sort_values(["mjd", "frame"], ignore_index=True)


def reviews(connection: sqlite3.Connection, path: Path) -> int:
    """Write all reviews as CSV in the order in which they were made, for version control; how many.

    What is in the file already stays, byte for byte.

    Raises
    ------
    TableError
        If there are none, or the file holds something else than the first of them.
    """
    table = logbook.table(connection, "reviews")
    if table.empty:
        raise TableError(
            f"{path}: no review in the log; review candidates first ('blobpipe serve')"
        )
    if not _is_there(path):
        tables.write_table(path, table)
        return len(table)
    tables.read_table(path, list(map(str, table)))
    here = _values(tables.read_table_bytes(path, ()))
    ours = _values(tables.csv_text(table).encode())
    if here != ours[: len(here)]:
        row = next((i for i, fields in enumerate(here) if fields not in ours[i : i + 1]), 0)
        raise TableError(
            f"{path}: row {row + 1} is not of this log's reviews; name another file, or another --log"
        )
    if len(ours) > len(here):
        _append(path, table.iloc[len(here) - 1 :], tuple(map(str, table)))
    return len(table)


def _values(content: bytes) -> list[list[str]]:
    """The fields of a table; git may have changed how lines within them end."""
    return [
        [field.replace("\r\n", "\n") for field in fields]
        for fields, _ in tables.table_rows(Path(), content)
    ]


def _is_there(path: Path) -> bool:
    """Whether a table is to be kept; a link to what is gone (DVC's cache) is no reason to begin a new one."""
    return path.exists() or path.is_symlink()


def _append(path: Path, new: pd.DataFrame, columns: Sequence[str]) -> None:
    """Add rows to a CSV table, and those of their columns that it has not; the text that is there stays."""
    header, rows, newline = _written(path)
    added = [name for name in columns if name not in header]
    texts = [",".join(["", *added]), *["," * len(added)] * (len(rows) - 1)]
    rows = [_before_newline(row, text) for row, text in zip(rows, texts, strict=True)]
    _write(path, [*rows, *_lines(new.reindex(columns=[*header, *added]), newline)], newline)


def _written(path: Path) -> tuple[list[str], list[str], str]:
    """The header of a CSV table, its rows as they are written (the header first), and how its lines end."""
    rows = list(tables.table_rows(path, tables.read_table_bytes(path, ())))
    header, text = rows[0]
    ending = re.search(r"\r\n|\r|\n", text.lstrip("\r\n"))
    return header, [text for _, text in rows], ending.group() if ending else "\n"


def _before_newline(row: str, text: str) -> str:
    """Add text to the end of a row; blank lines may follow it."""
    bare = row.rstrip("\r\n")
    return bare + text + row[len(bare) :]


def _lines(rows: pd.DataFrame, newline: str) -> list[str]:
    return [
        tables.csv_text(rows.iloc[[i]], header=False, newline=newline) for i in range(len(rows))
    ]


def _write(path: Path, rows: list[str], newline: str) -> None:
    """Put a table back with a mark of the byte order if it had one."""
    rows[:-1] = [row if row.endswith(("\n", "\r")) else row + newline for row in rows[:-1]]
    mark = codecs.BOM_UTF8 if path.read_bytes().startswith(codecs.BOM_UTF8) else b""
    with files.atomic(path) as temporary:
        temporary.write_bytes(mark + "".join(rows).encode())
