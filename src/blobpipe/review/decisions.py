"""Write what people decide to the log: reviews, their withdrawal, and blobs that the search has missed.

Nothing is ever changed: a review that is undone is followed by one that restores what was decided before it.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Sequence
from typing import Any

from blobpipe.core.arrays import Image
from blobpipe.errors import LogError
from blobpipe.monitor import logbook, thumbnails
from blobpipe.review import planes
from blobpipe.review.queries import Row

MOST = 100  # candidates that one form may decide on
SAME_PX = 5.0  # distance (px) within which a missed blob is a candidate that is there


class ConflictError(LogError):
    """What was asked for does not fit what is in the log by now."""


def review(
    connection: sqlite3.Connection,
    candidates: Sequence[int],
    decision: str,
    reviewer: str,
    reason: str,
) -> tuple[int, int]:
    """Write the same decision on several candidates; return the first and the last number of the reviews.

    Raises
    ------
    LogError
        If the log has no such candidate. Then nothing may be kept.
    """
    numbers = []
    for candidate in candidates:
        query = "SELECT 1 FROM candidates WHERE id = ?"
        if connection.execute(query, (candidate,)).fetchone() is None:
            raise LogError(f"no candidate {candidate} in the log")
        row = {"candidate": candidate, "decision": decision, "reviewer": reviewer}
        row |= {"reason": reason, "at": logbook.now()}
        numbers.append(logbook.insert(connection, "reviews", row))
    return numbers[0], numbers[-1]


def undo(connection: sqlite3.Connection, first: int, last: int, reviewer: str) -> tuple[int, int]:
    """Restore what was decided before some reviews; return the first and the last number of the new reviews.

    Raises
    ------
    ConflictError
        If one of them is not the latest of its candidate. Then nothing may be kept.
    LogError
        If the log has none of them.
    """
    rows = connection.execute(
        "SELECT id, candidate FROM reviews WHERE id BETWEEN ? AND ? ORDER BY id LIMIT ?",
        (first, last, MOST),
    ).fetchall()
    if not rows:
        raise LogError("no such review in the log")
    numbers = []
    for row in rows:
        latest, before = _latest_two(connection, row["candidate"])
        if latest["id"] != row["id"]:
            raise ConflictError(
                f"candidate {row['candidate']} has been decided on again since; look at it again"
            )
        restored = {"candidate": row["candidate"], "decision": before, "reviewer": reviewer}
        restored |= {"reason": "undone", "at": logbook.now()}
        numbers.append(logbook.insert(connection, "reviews", restored))
    return numbers[0], numbers[-1]


def _latest_two(connection: sqlite3.Connection, candidate: int) -> tuple[sqlite3.Row, str]:
    """Return the latest review of a candidate, and the decision before it (empty: undecided)."""
    rows = connection.execute(
        "SELECT id, decision FROM reviews WHERE candidate = ? ORDER BY id DESC LIMIT 2",
        (candidate,),
    ).fetchall()
    return rows[0], rows[1]["decision"] if len(rows) > 1 else ""


def add_missed(
    connection: sqlite3.Connection, image: Row, x: float, y: float, reviewer: str, reason: str
) -> tuple[int, int]:
    """Add a blob that the search has missed on an image, confirmed by who saw it.

    It is measured as the search measures; its score is what the network saw there. Later images that show it are its
    sightings, and it is known to the searches to come.

    Parameters
    ----------
    image : dict
        Row of ``images`` of a searched image.
    x, y : float
        Where it was seen on the image (px).

    Returns
    -------
    tuple of int
        The number of its review, twice, as for `review`.

    Raises
    ------
    ConflictError
        If it does not lie on the image, or the log has a candidate there. Then nothing may be kept.
    LogError
        If the pixels of the image are not kept.
    """
    values, _ = planes.difference(connection, image)
    ny, nx = values.shape
    if not (-0.5 <= x < nx - 0.5 and -0.5 <= y < ny - 0.5):
        raise ConflictError(
            f"found x {x:g}, y {y:g}, expected a place on the image of {nx}x{ny} pixels"
        )
    detection = _measure(values, x, y, image["noise_frac"])
    cells, _ = thumbnails.unpack(planes.packed(connection, image, "map"))
    seen = _cell_at(cells, x, y, values.shape)

    # Candidates are kept at their usual place: the shift of the mirror is taken off
    place = {
        "x_px": detection["x_px"] - image["shift_x_px"],
        "y_px": detection["y_px"] - image["shift_y_px"],
    }
    _require_none_near(connection, **place)
    candidate = logbook.insert(
        connection,
        "candidates",
        {"image": image["id"], "status": "new", "added_by": reviewer, **place},
    )
    row = {"image": image["id"], "candidate": candidate, "status": "new"}
    row |= {"score": seen, "probability": seen, **detection}
    number = logbook.insert(connection, "detections", row)
    pictures = {
        "difference": thumbnails.cutout(values, x, y, image["noise_frac"]),
        "map": thumbnails.probability(cells, x, y, round(nx / cells.shape[1])),
    }
    for kind, png in pictures.items():
        picture = {"image": image["id"], "detection": number, "kind": kind, "type": "image/png"}
        logbook.insert(connection, "pictures", picture | {"bytes": png})
    return review(connection, [candidate], "confirmed", reviewer, reason or "missed by the search")


def _measure(values: Image, x: float, y: float, noise: float) -> dict[str, Any]:
    """Fit a blob near a place of a difference; where the fit fails, keep the place alone."""
    from blobpipe.monitor.catalogue import measure_blob

    found = measure_blob(values, x, y, noise)
    is_there = math.hypot(found["x_px"] - x, found["y_px"] - y) <= SAME_PX
    return found if is_there else {"x_px": x, "y_px": y}


def _cell_at(cells: Image, x: float, y: float, shape: tuple[int, ...]) -> float:
    """Return the network's probability at a place (0 to 1)."""
    stride = round(shape[1] / cells.shape[1])
    row = min(int((y + 0.5) // stride), cells.shape[0] - 1)
    column = min(int((x + 0.5) // stride), cells.shape[1] - 1)
    value = float(cells[row, column])
    return 0.0 if math.isnan(value) else min(max(value, 0.0), 1.0)


def _require_none_near(connection: sqlite3.Connection, x_px: float, y_px: float) -> None:
    """Refuse the place of a candidate that the log has already."""
    near = connection.execute(
        "SELECT id FROM candidates WHERE (x_px - ?) * (x_px - ?) + (y_px - ?) * (y_px - ?) <= ? LIMIT 1",
        (x_px, x_px, y_px, y_px, SAME_PX**2),
    ).fetchone()
    if near is not None:
        raise ConflictError(
            f"candidate {near['id']} is already at this position; decide on that one"
        )
