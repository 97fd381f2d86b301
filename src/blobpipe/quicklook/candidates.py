"""Candidates of the log: which one a detection shows, when each landed, was seen again or faded."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from blobpipe.detection.match import NEAR_PX, pair
from blobpipe.history.landing import date_history
from blobpipe.monitor import logbook
from blobpipe.quicklook.versions import first_version


def match_candidates(
    connection: sqlite3.Connection,
    found: pd.DataFrame,
    shift: npt.NDArray[np.float64],
    match_px: float,
) -> Iterator[tuple[dict[str, Any], int | None]]:
    """Yield each row of a search with the candidate of the log that it shows, or None.

    Bad pixels show none. As long as the stack has not fully taken up a known blob, it may be measured off its centre:
    a second round matches known blobs with candidates seen again within a larger distance.
    """
    logged = connection.execute(
        "SELECT id, status, x_px, y_px FROM candidates ORDER BY id"
    ).fetchall()
    rows = [dict(row) for _, row in found.iterrows()]
    matched: dict[int, int] = {}
    for row_statuses, candidate_status, within_px in (
        (("new", "known", "dip"), "", match_px),
        (("known",), "seen_again", NEAR_PX),
    ):
        # Rows and candidates that are not matched yet
        open_rows = [
            k for k, row in enumerate(rows) if row["status"] in row_statuses and k not in matched
        ]
        taken = set(matched.values())
        free = [
            candidate
            for candidate in logged
            if candidate["id"] not in taken and candidate_status in ("", candidate["status"])
        ]

        # Candidates are kept at their usual place, the shift of the mirror taken off
        row_places = np.array([[rows[k]["x_px"], rows[k]["y_px"]] for k in open_rows])
        candidate_places = np.array([[each["x_px"], each["y_px"]] for each in free])
        pairs = pair(row_places.reshape(-1, 2) - shift, candidate_places.reshape(-1, 2), within_px)
        matched |= {open_rows[i]: int(free[j]["id"]) for i, j in pairs}
    for k, row in enumerate(rows):
        yield row, matched.get(k)


def update_candidates(
    connection: sqlite3.Connection, image: int, seen: set[int], fade_after: int
) -> None:
    """Mark candidates that are seen again; fade those that later images do not show.

    If the image replaces older versions of its exposure, what those showed or missed is counted again.
    """
    mjd = connection.execute("SELECT mjd FROM images WHERE id = ?", (image,)).fetchone()["mjd"]

    # Candidates that the replaced versions showed
    replaced = connection.execute(
        "SELECT id FROM images WHERE superseded_by = ?", (image,)
    ).fetchall()
    shown_by_older = {
        row["candidate"]
        for older in replaced
        for row in connection.execute(
            "SELECT candidate FROM detections WHERE image = ?", (older["id"],)
        )
    }

    candidates = connection.execute(
        "SELECT c.id, c.status, c.missed, c.image, i.mjd, i.superseded_by FROM candidates c JOIN images i ON i.id = c.image"
    ).fetchall()
    for row in candidates:
        candidate = row["id"]
        is_seen = candidate in seen
        is_new = row["status"] == "new"
        is_first = row["image"] == image
        rests_on_older = row["superseded_by"] is not None and is_seen
        may_be_missed_twice = bool(replaced) and is_new and not is_first
        if rests_on_older or candidate in shown_by_older or may_be_missed_twice:
            _recount(connection, candidate, fade_after)
        elif is_seen and not is_first:
            # A late image may become the first that shows it
            first = image if mjd < row["mjd"] else row["image"]
            connection.execute(
                "UPDATE candidates SET status = 'seen_again', image = ? WHERE id = ?",
                (first, candidate),
            )
        elif not is_seen and is_new and mjd > row["mjd"]:
            status = "faded" if row["missed"] + 1 >= fade_after else "new"
            connection.execute(
                "UPDATE candidates SET missed = missed + 1, status = ? WHERE id = ?",
                (status, candidate),
            )


def _recount(connection: sqlite3.Connection, candidate: int, fade_after: int) -> None:
    """Set the status of a candidate from the versions of exposures that count."""
    sightings = connection.execute(
        "SELECT DISTINCT i.id, i.mjd FROM detections d JOIN images i ON i.id = d.image "
        "WHERE d.candidate = ? AND i.superseded_by IS NULL ORDER BY i.mjd, i.id",
        (candidate,),
    ).fetchall()

    # What several images have shown together does not rest on a version of one of them
    deep_ones = connection.execute(
        "SELECT 1 FROM detections WHERE candidate = ? AND n_images > 1 LIMIT 1", (candidate,)
    )
    is_deep = deep_ones.fetchone() is not None

    # Only superseded versions show it: it keeps their sightings, for the record
    if not sightings:
        if not is_deep:
            connection.execute("UPDATE candidates SET status = 'faded' WHERE id = ?", (candidate,))
        return

    connection.execute(
        "UPDATE detections SET candidate = NULL WHERE candidate = ? AND n_images = 1 "
        "AND image IN (SELECT id FROM images WHERE superseded_by IS NOT NULL)",
        (candidate,),
    )
    if is_deep:
        return
    image, mjd = sightings[0]
    if len(sightings) > 1:
        connection.execute(
            "UPDATE candidates SET status = 'seen_again', image = ? WHERE id = ?",
            (image, candidate),
        )
        return

    # One sighting: later images that were logged since have missed it
    [missed] = connection.execute(
        "SELECT count(*) FROM images WHERE outcome = 'searched' AND superseded_by IS NULL AND mjd > ? AND id > ?",
        (mjd, first_version(connection, image)),
    ).fetchone()
    status = "faded" if missed >= fade_after else "new"
    connection.execute(
        "UPDATE candidates SET status = ?, image = ?, missed = ? WHERE id = ?",
        (status, image, min(missed, fade_after), candidate),
    )


def date_candidate(
    connection: sqlite3.Connection, candidate: int, image: int, fade_after: int
) -> None:
    """Date the landing of a candidate from its depths; one that has landed and stayed is seen again.

    If it was new until then, the log keeps that the depths with this image told so. If with more images they show
    that there is nothing, its status rests on its sightings alone, as before.
    """
    rows = connection.execute(
        "SELECT i.id, i.mjd, d.depth_frac, d.depth_err_frac FROM depths d JOIN images i ON i.id = d.image "
        "WHERE d.candidate = ? AND i.outcome != 'rejected' AND i.superseded_by IS NULL ORDER BY i.mjd, i.id",
        (candidate,),
    ).fetchall()
    images, mjd, depth, error = np.array([tuple(row) for row in rows]).reshape(-1, 4).T
    landing = date_history(mjd, depth, error)
    if landing is None:
        return
    columns: dict[str, Any] = {
        "history": landing.verdict,
        "after_mjd": landing.after_mjd,
        "before_mjd": landing.before_mjd,
        "level_frac": landing.level_frac,
        "step_frac": landing.depth_frac,
        "step_err_frac": landing.depth_err_frac,
    }
    if landing.is_persistent:
        columns |= {"status": "seen_again", "image": int(images[landing.first])}
        [told] = connection.execute(
            "SELECT status != 'new' OR stays_image IS NOT NULL FROM candidates WHERE id = ?",
            (candidate,),
        ).fetchone()
        if not told:
            columns["stays_image"] = image
    logbook.update(connection, "candidates", candidate, columns)
    query = "SELECT status FROM candidates WHERE id = ?"
    [status] = connection.execute(query, (candidate,)).fetchone()
    if landing.verdict == "nothing" and status == "seen_again":
        _recount(connection, candidate, fade_after)
