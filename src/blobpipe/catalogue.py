"""The loop closes: blobs that people have confirmed become known blobs, and cases of the next regression test."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pandas as pd

from blobpipe import frames, measure, store
from blobpipe.errors import TableError

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
        Table with the columns of ``blobs.csv``; made if it is not there. Rows and columns that are there stay as they
        are, a candidate that lies on one of its blobs is not added again, and the order does not hang on the reviews'.

    Returns
    -------
    list of str
        Names of the blobs that were added.

    Raises
    ------
    TableError
        If the table lacks a column.

    Notes
    -----
    Source: ours.
    """
    known = _read(path)
    new = _without_known(_confirmed(connection), known)
    new["blob"] = _names(list(known["blob"]), len(new))
    if len(new) or not path.exists():
        frames.write_table(path, pd.concat([known, new[list(COLUMNS)]]) if len(known) else new[list(COLUMNS)])
    return list(new["blob"])


def _read(path: Path) -> pd.DataFrame:
    if not path.exists():
        return pd.DataFrame(columns=list(COLUMNS))
    return frames.read_table(path, frames.BLOB_COLUMNS)


def _confirmed(connection: sqlite3.Connection) -> pd.DataFrame:
    rows = store.table(connection, "candidate_list").query("decision == 'confirmed'")
    reviews = store.table(connection, "reviews").drop_duplicates("candidate", keep="last").set_index("candidate")
    # the fit knows three shapes and averages over them: which one it is stays open
    return rows.assign(shape="disc", reviewer=rows["id"].map(reviews["reviewer"])).reset_index(drop=True)


def _without_known(rows: pd.DataFrame, known: pd.DataFrame) -> pd.DataFrame:
    pairs = measure.match(rows[["x_px", "y_px"]].to_numpy(float), known[["x_px", "y_px"]].to_numpy(float), SAME_PX)
    return rows.drop(index=list(pairs[:, 0])).sort_values(["first_mjd", "id"]).reset_index(drop=True)


def _names(taken: list[Any], n: int) -> list[str]:
    """The next numbers of the catalogue's own, such as b0113 after b0112."""
    numbers = [int(name[1:]) for name in map(str, taken) if name[:1].isalpha() and name[1:].isdigit()]
    start = max(numbers, default=0) + 1
    return [f"b{number:04d}" for number in range(start, start + n)]


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
