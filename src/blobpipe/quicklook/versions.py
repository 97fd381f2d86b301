"""Versions of an exposure, of which the newest counts."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from typing import Any

from blobpipe.core.dates import SAME_EXPOSURE_D, Exposure, is_older_version, is_same_exposure


def newer_version(connection: sqlite3.Connection, row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return columns that name the newer version of an image in the log; None if there is none.

    An image counts as newer than a difference, since stacks take it.
    """
    for other in _versions(connection, row):
        if other["kind"] == row["kind"]:
            is_newer = is_older_version(_exposure(row), _exposure(other))
        else:
            is_newer = other["kind"] == "image"
        if is_newer:
            reason = f"an older version of the exposure that the log has as image {other['id']}, {other['name']}"
            return {"reason": reason, "superseded_by": other["id"]}
    return None


def supersede(connection: sqlite3.Connection, image: int) -> None:
    """Replace older versions of an exposure, before the findings of the newer are logged.

    A version that could not be searched, for want of a stack, does not replace one that was: it is superseded itself.
    """
    row = connection.execute("SELECT * FROM images WHERE id = ?", (image,)).fetchone()
    if row["outcome"] == "rejected":
        return
    for other in _versions(connection, row):
        replaces = row["outcome"] == "searched" or other["outcome"] == "stack"
        newer, older = (image, other["id"]) if replaces else (other["id"], image)
        connection.execute("UPDATE images SET superseded_by = ? WHERE id = ?", (newer, older))


def earliest_mjd(connection: sqlite3.Connection, row: Mapping[str, Any]) -> float:
    """Return the date of an image, or of an older version of its exposure that is dated a little earlier (MJD).

    What comes before it is no version of the exposure: an image is not to be part of the stack that is subtracted from it.
    """
    return min([float(row["mjd"]), *(float(other["mjd"]) for other in _versions(connection, row))])


def first_version(connection: sqlite3.Connection, image: int) -> int:
    """Return the image by which the log first had an exposure."""
    query = "SELECT min(id) AS id FROM images WHERE superseded_by = ? AND id < ?"
    while (older := connection.execute(query, (image, image)).fetchone()["id"]) is not None:
        image = older
    return image


def _versions(connection: sqlite3.Connection, row: Mapping[str, Any]) -> list[sqlite3.Row]:
    """List the images of the same exposure that count, in the order in which they were logged."""
    near = connection.execute(
        "SELECT id, name, mjd, header, kind, outcome FROM images "
        "WHERE outcome != 'rejected' AND superseded_by IS NULL AND sha256 != ? AND mjd BETWEEN ? AND ? ORDER BY id",
        (row["sha256"], row["mjd"] - SAME_EXPOSURE_D, row["mjd"] + SAME_EXPOSURE_D),
    ).fetchall()
    exposure = _exposure(row)
    return [other for other in near if is_same_exposure(exposure, _exposure(other))]


def _exposure(row: Mapping[str, Any] | sqlite3.Row) -> Exposure:
    """Return the exposure of a row of ``images``."""
    return Exposure(row["name"], row["mjd"], json.loads(row["header"]))
