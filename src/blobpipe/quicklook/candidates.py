"""Candidates of the log: which one a detection shows, when each landed, was seen again or faded."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from blobpipe.detection.match import NEAR_PX
from blobpipe.history.landing import date_history
from blobpipe.history.watch import CHANGED_SIGMA
from blobpipe.monitor import logbook
from blobpipe.quicklook.versions import first_version

# Depth over that of a sighting that people have rejected, from which a detection is of something else; ours: what
# flickers reaches the threshold on the days on which it is seen, so that its depths are within a small factor
DEEPER = 3.0

# The same of the radius, larger or smaller: of the expected radius, the smallest of 71 blobs on real images has 0.59, and
# the largest cluster of bad pixels 0.41 (`detection.size_law`)
OTHER_RADIUS = 1.4

# What a detection is compared by with what was rejected
MEASURED = ("depth_frac", "depth_err_frac", "radius_px", "radius_err_px")


def match_candidates(
    connection: sqlite3.Connection,
    found: pd.DataFrame,
    shift: npt.NDArray[np.float64],
    match_px: float,
) -> Iterator[tuple[dict[str, Any], int | None]]:
    """Yield each row of a search with the candidate of the log that it shows, or None.

    A candidate has one sighting on an image, the nearest. Bad pixels show none. As long as the stack has not fully taken
    up a known blob, it may be measured off its centre: a second round matches known blobs with candidates seen again
    within a larger distance. Candidates that people have rejected come last, and have no sighting that clearly is of
    something else.
    """
    logged = connection.execute(
        "SELECT id, status, x_px, y_px, coalesce((SELECT decision FROM reviews WHERE candidate = candidates.id "
        "ORDER BY reviews.id DESC LIMIT 1), '') = 'rejected' AS rejected FROM candidates ORDER BY id"
    ).fetchall()
    rows = [dict(row) for _, row in found.iterrows()]
    # Candidates are kept at their usual place, the shift of the mirror taken off
    places = found[["x_px", "y_px"]].to_numpy(float) - shift
    matched: dict[int, int] = {}
    for row_statuses, candidate_statuses, rejected, within_px in (
        (("new", "known", "dip"), ("new", "seen_again", "faded"), False, match_px),
        (("known",), ("seen_again",), False, NEAR_PX),
        (("new", "known", "dip"), ("new", "seen_again", "faded"), True, match_px),
    ):
        # Rows and candidates that are not matched yet
        open_rows = [
            k for k, row in enumerate(rows) if row["status"] in row_statuses and k not in matched
        ]
        taken = set(matched.values())
        free = [
            candidate
            for candidate in logged
            if candidate["id"] not in taken
            and candidate["status"] in candidate_statuses
            and candidate["rejected"] == rejected
        ]
        open_ones = [rows[k] for k in open_rows]
        pairs = nearest_candidates(connection, open_ones, places[open_rows], free, within_px)
        matched |= {open_rows[i]: candidate for i, candidate in pairs.items()}
    for k, row in enumerate(rows):
        yield row, matched.get(k)


def nearest_candidates(
    connection: sqlite3.Connection,
    rows: Sequence[Mapping[Any, Any]],
    places: npt.NDArray[np.float64],
    candidates: Sequence[Mapping[Any, Any] | sqlite3.Row],
    within_px: float,
) -> dict[int, int]:
    """Return by the index of a row the number of the candidate that it shows: one to one, the nearest first.

    Parameters
    ----------
    connection : sqlite3.Connection
    rows : sequence of mapping
        What was measured.
    places : ndarray, shape (number of rows, 2)
        Their usual places (px).
    candidates : sequence of mapping
        id, x_px, y_px and rejected of each. A rejected one is not shown by what is clearly something else.
    within_px : float
    """
    others = np.array([[each["x_px"], each["y_px"]] for each in candidates], float)
    offset = places.reshape(-1, 1, 2) - others.reshape(1, -1, 2)
    distance = np.hypot(offset[..., 0], offset[..., 1])
    near = distance <= within_px
    order = np.argsort(distance[near], kind="stable")
    shown: dict[int, int] = {}
    for i, j in np.argwhere(near)[order].tolist():
        candidate = int(candidates[j]["id"])
        if i in shown or candidate in shown.values():
            continue
        if not (candidates[j]["rejected"] and is_something_else(connection, candidate, rows[i])):
            shown[i] = candidate
    return shown


def is_something_else(
    connection: sqlite3.Connection, candidate: int, row: Mapping[Any, Any]
) -> bool:
    """Return whether a detection clearly is not what the sightings of a candidate show.

    It is not if it is several times deeper than each of them, or has another radius, by their errors.
    """
    sightings = connection.execute(
        f"SELECT {', '.join(MEASURED)} FROM detections WHERE candidate = ?", (candidate,)
    ).fetchall()
    seen = np.array([tuple(each) for each in sightings], float).reshape(-1, len(MEASURED))
    depth, depth_err, radius, radius_err = (float(row[name]) for name in MEASURED)
    seen_depth, seen_depth_err, seen_radius, seen_radius_err = seen.T

    # Places that were not measured compare as equal
    is_deeper = (depth > DEEPER * seen_depth) & (
        depth - seen_depth > CHANGED_SIGMA * np.hypot(depth_err, seen_depth_err)
    )
    smaller = np.minimum(radius, seen_radius)
    larger = np.maximum(radius, seen_radius)
    is_other_size = (larger > OTHER_RADIUS * smaller) & (
        larger - smaller > CHANGED_SIGMA * np.hypot(radius_err, seen_radius_err)
    )
    return bool((is_deeper | is_other_size).all())


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
