"""Add reviewed blobs to the catalogue, where they become known blobs and cases of the next regression test."""

from __future__ import annotations

import codecs
import logging
import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from blobpipe.core import files, fits_images, tables
from blobpipe.core.arrays import Image
from blobpipe.core.detector import Detector
from blobpipe.errors import TableError
from blobpipe.monitor import logbook
from blobpipe.monitor.inbox import path_of

log = logging.getLogger(__name__)

COLUMNS = (
    *("blob", "x_px", "y_px", "radius_px", "depth_frac", "shape", "first_frame", "first_mjd"),
    *("depth_err_frac", "snr", "status", "reviewer", "model_sha256", "params_sha256"),
)
SAME_PX = 3.0  # distance (px) up to which two positions are of the same blob


class Text(NamedTuple):
    """Hold a CSV table as it is written.

    Attributes
    ----------
    header : list of str
        Names of the columns.
    rows : list of str
        Lines with their ends, the header first.
    newline : str
        The end of a line.
    """

    header: list[str]
    rows: list[str]
    newline: str


# ---------------------------------------------------------------------------------------------------------- blobs


def update(connection: sqlite3.Connection, path: Path) -> list[str]:
    """Add the candidates whose latest review says ``confirmed`` to a catalogue of known blobs.

    Parameters
    ----------
    connection : sqlite3.Connection
        The log.
    path : path
        Table with the columns of ``blobs.csv``, made if it does not exist. Its rows are kept byte for byte (with a
        comma at their end for each column that is new to the table); the new rows follow them by date. A candidate on
        one of its blobs is not added again. One whose values a catalogue cannot hold (`tables.blob_ranges`) is left
        out, with a warning.

    Returns
    -------
    list of str
        Names of the blobs that were added.

    Raises
    ------
    TableError
        If the table cannot be read (`tables.read_known`), or the list of images beside it lacks the first image of a
        blob, so that the pipeline would refuse the catalogue. Then nothing is written.
    """
    detector = logbook.detector_of(connection)

    # what is confirmed, can be written, and lies on no blob that is there
    exists = _exists(path)
    known = (
        tables.read_known(path, detector=detector)
        if exists
        else pd.DataFrame(columns=list(COLUMNS))
    )
    new = _new_blobs(connection, known, detector)
    new["blob"] = _names(list(known["blob"]), len(new))
    _require_images(path, new)
    _warn_of_withdrawn(connection, known, path)

    # checked to the end: the table is written now, or extended
    if not exists:
        tables.write_table(path, new[list(COLUMNS)])
    elif len(new):
        _append(path, new, COLUMNS)
    return list(new["blob"])


def _new_blobs(
    connection: sqlite3.Connection, known: pd.DataFrame, detector: Detector
) -> pd.DataFrame:
    """Return the confirmed candidates that lie on no known blob and can be written to a catalogue, by date."""
    candidates = logbook.table(connection, "candidate_list")
    rows = candidates.query("decision == 'confirmed'")

    # the latest review of each candidate
    reviews = logbook.table(connection, "reviews").drop_duplicates("candidate", keep="last")
    reviewers = reviews.set_index("candidate")["reviewer"]

    # the fit averages over three shapes, so the shape of a blob is not known; and what a person has
    # decided replaces the status that the search gave it
    rows = rows.assign(shape="disc", status="confirmed", reviewer=rows["id"].map(reviewers))

    # a catalogue cannot hold every value that the log can
    good = pd.DataFrame(
        {
            column: rows[column].astype(float).between(*limits)
            for column, limits in tables.blob_ranges(detector).items()
        }
    )
    good["first_frame"] = rows["first_frame"].map(files.is_name).astype(bool)
    for number, is_good in zip(rows["id"], good.to_numpy(), strict=True):
        if not is_good.all():
            log.warning(
                "candidate %d: confirmed, but its %s cannot be that of a blob; add its row by hand",
                number,
                " and ".join(good.columns[~is_good]),
            )
    rows = rows[good.all(axis=1)].sort_values(["first_mjd", "id"], ignore_index=True)

    # one blob for each position, known ones first
    taken = [*known[["x_px", "y_px"]].to_numpy(float)]
    kept = []
    for i, position in enumerate(rows[["x_px", "y_px"]].to_numpy(float)):
        distances = [np.hypot(*(position - other)) for other in taken]
        if all(distance > SAME_PX for distance in distances):
            kept.append(i)
            taken.append(position)
    return rows.iloc[kept].reset_index(drop=True)


def _warn_of_withdrawn(connection: sqlite3.Connection, known: pd.DataFrame, path: Path) -> None:
    """Warn of rows of a catalogue whose candidate was confirmed once and no longer is.

    They are people's to delete: until then what lies there is known, and exported.
    """
    candidates = logbook.table(connection, "candidate_list").set_index("id")
    reviews = logbook.table(connection, "reviews").query("decision == 'confirmed'")
    once = candidates.loc[candidates.index.isin(reviews["candidate"])]
    confirmed = once.query("decision == 'confirmed'")
    for number, row in once.drop(confirmed.index).iterrows():
        # another candidate may stand for the blob
        if _within(row, confirmed).any():
            continue
        for blob in known.loc[_within(row, known), "blob"]:
            decision = row["decision"] or "undecided again"
            log.warning(
                "%s: candidate %d is %s, but its blob %s is still listed; delete its row if it is no blob",
                path,
                number,
                decision,
                blob,
            )


def _within(place: pd.Series[Any], blobs: pd.DataFrame) -> pd.Series[bool]:
    """Return which blobs lie on a place."""
    x = blobs["x_px"].astype(float) - place["x_px"]
    y = blobs["y_px"].astype(float) - place["y_px"]
    near: pd.Series[bool] = np.hypot(x, y) <= SAME_PX
    return near


def _names(taken: list[Any], n: int) -> list[str]:
    """Continue the numbering of a catalogue, for example with b0113 after b0112."""
    numbers = [int(name[1:]) for name in taken if re.fullmatch(r"[A-Za-z][0-9]{1,9}", name)]
    start = max(numbers, default=0) + 1
    return [f"b{number:04d}" for number in range(start, start + n)]


def _require_images(path: Path, blobs: pd.DataFrame) -> None:
    """Refuse blobs whose first image is not in the list of images beside a catalogue, if there is one."""
    images = path.with_name("frames.csv")
    if not images.exists():
        return
    listed = set(tables.read_image_list(images)["frame"])
    for row in blobs[~blobs["first_frame"].isin(listed)].itertuples():
        raise TableError(
            f"{images}: found no row for {row.first_frame}, the first image of candidate {row.id}; put the image beside "
            "it, and list it with --frames"
        )


def measure_blob(difference: Image, x: float, y: float, noise_frac: float) -> dict[str, float]:
    """Fit a blob that a person has seen on a difference image (`fit.fit_blobs`).

    Returns
    -------
    dict
        The measured columns of ``detections``; NaN where the fit has failed.
    """
    from blobpipe.detection.fit import fit_blobs

    score = np.ones(1)  # not asked for
    found = fit_blobs(difference, np.array([x]), np.array([y]), score, noise_frac).iloc[0]
    return {
        str(name): float(value)
        for name, value in found.items()
        if name not in ("score", "status", "misfit")
    }


# ------------------------------------------------------------------------------------------------ images, reviews


def list_images(connection: sqlite3.Connection, path: Path) -> list[str]:
    """Add the images of the log that lie beside a list of images (``frames.csv``) to it, in order of date.

    Differences and rejected or superseded images are left out. Rows of the list stay as they are, byte for byte. The
    list is made if it does not exist.

    Returns
    -------
    list of str
        Names of the images that were added.

    Raises
    ------
    TableError
        If the list cannot be read (`tables.read_image_list`).
    """
    # a new list
    if not _exists(path):
        new = _images_beside(connection, path, set())
        if len(new):
            tables.write_table(path, new)
        return list(new["frame"])

    known = tables.read_image_list(path)
    new = _images_beside(connection, path, set(known["frame"]))
    text = _read_text(path)
    lines = _lines(new.reindex(columns=text.header), text.newline)

    # after rows of the same date, as the log met them in that order; from the end, so that the
    # places of earlier rows stay valid
    places = np.searchsorted(known["mjd"], new["mjd"], side="right")
    for place, line in zip(places[::-1], lines[::-1], strict=True):
        text.rows.insert(1 + place, line)
    if len(new):
        _write(path, text.rows, text.newline)
    return list(new["frame"])


def _images_beside(connection: sqlite3.Connection, path: Path, listed: set[str]) -> pd.DataFrame:
    """Return name and date of the log's images that lie in the folder of a list and are not listed."""
    found = connection.execute(
        "SELECT f.path, i.mjd FROM files f JOIN images i ON i.id = f.image "
        "WHERE i.kind = 'image' AND i.outcome != 'rejected' AND i.superseded_by IS NULL AND f.outcome != 'duplicate' "
        "ORDER BY f.id"
    ).fetchall()
    here = path.resolve().parent
    rows = []
    for row in found:
        file = path_of(row["path"])
        # the log remembers files that have been moved or deleted since
        if file.parent != here or not file.exists():
            continue
        name = fits_images.frame_name(file)
        if files.is_name(name):
            rows.append((name, row["mjd"]))
        else:
            log.warning(
                "%s: %r is not listed, as a frame cannot have such a name; rename the image",
                path,
                name,
            )

    table = pd.DataFrame(rows, columns=list(tables.FRAME_COLUMNS))
    table = table.drop_duplicates("frame", keep="last")
    new = table[~table["frame"].isin(listed)]
    return new.sort_values(["mjd", "frame"], ignore_index=True)


def write_reviews(connection: sqlite3.Connection, path: Path) -> int:
    """Write all reviews as CSV in the order in which they were made, for version control, and return their number.

    What the file holds already stays, byte for byte.

    Raises
    ------
    TableError
        If there are no reviews, or the file does not begin with the first of them.
    """
    table = logbook.table(connection, "reviews")
    columns = tuple(map(str, table))
    if table.empty:
        raise TableError(
            f"{path}: no review in the log; review candidates first ('blobpipe serve')"
        )
    if not _exists(path):
        tables.write_table(path, table)
        return len(table)

    # the file must hold the first reviews of this log, and no others
    tables.read_table(path, columns)
    written = _fields(tables.read_table_bytes(path, ()))
    expected = _fields(tables.csv_text(table).encode())
    for i, fields in enumerate(written):
        if i >= len(expected) or fields != expected[i]:
            raise TableError(
                f"{path}: row {i + 1} is not a review of this log; name another file, or another --log"
            )

    if len(expected) > len(written):
        # one of the rows that are written is the header
        new = table.iloc[len(written) - 1 :]
        _append(path, new, columns)
    return len(table)


def _fields(content: bytes) -> list[list[str]]:
    """Return the fields of a table, with the line ends within them as they were before git changed them."""
    return [
        [field.replace("\r\n", "\n") for field in fields]
        for fields, _ in tables.table_rows(Path(), content)
    ]


# ------------------------------------------------------------------------------------------------- text of tables


def _exists(path: Path) -> bool:
    """Tell whether a table is to be kept; a link to a missing file (DVC's cache) is one to keep, too."""
    return path.exists() or path.is_symlink()


def _append(path: Path, new: pd.DataFrame, columns: Sequence[str]) -> None:
    """Add rows to a CSV table, and those of their columns that it lacks; the text that is there stays."""
    text = _read_text(path)
    added = [name for name in columns if name not in text.header]

    # the header gets the new names, every row as many empty fields; blank lines may follow a row
    endings = [",".join(["", *added]), *["," * len(added)] * (len(text.rows) - 1)]
    rows = []
    for row, ending in zip(text.rows, endings, strict=True):
        bare = row.rstrip("\r\n")
        rows.append(bare + ending + row[len(bare) :])

    lines = _lines(new.reindex(columns=[*text.header, *added]), text.newline)
    _write(path, [*rows, *lines], text.newline)


def _read_text(path: Path) -> Text:
    """Read a CSV table as it is written."""
    rows = list(tables.table_rows(path, tables.read_table_bytes(path, ())))
    header, first_line = rows[0]
    ending = re.search(r"\r\n|\r|\n", first_line.lstrip("\r\n"))
    newline = ending.group() if ending else "\n"
    return Text(header, [line for _, line in rows], newline)


def _lines(rows: pd.DataFrame, newline: str) -> list[str]:
    """Write each row of a table as a line of CSV."""
    return [
        tables.csv_text(rows.iloc[[i]], header=False, newline=newline) for i in range(len(rows))
    ]


def _write(path: Path, rows: list[str], newline: str) -> None:
    """Write the lines of a table, with a byte-order mark if the file had one."""
    # the last line of the old file may lack its end
    rows[:-1] = [row if row.endswith(("\n", "\r")) else row + newline for row in rows[:-1]]
    mark = codecs.BOM_UTF8 if path.read_bytes().startswith(codecs.BOM_UTF8) else b""
    with files.atomic(path) as temporary:
        temporary.write_bytes(mark + "".join(rows).encode())
