"""What the log keeps of a search: subframes, peaks, detections, depths and pictures."""

from __future__ import annotations

import sqlite3
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from blobpipe.detection.fit import DETECTION_COLUMNS
from blobpipe.detection.match import pair
from blobpipe.detection.operating_point import CANDIDATE
from blobpipe.history.depths import measure_histories
from blobpipe.monitor import logbook
from blobpipe.quicklook.candidates import (
    date_candidate,
    match_candidates,
    nearest_candidates,
    update_candidates,
)
from blobpipe.quicklook.options import Run
from blobpipe.quicklook.search import DeepResult, ImageResult

# What the log keeps of what is nearly found
NEARLY_COLUMNS = ("x_px", "y_px", "radius_px", "n_images", "snr", "score")


def log_findings(image: int, result: ImageResult, run: Run) -> None:
    """Log subframes, peaks, corrections of the stack, detections and pictures of an image."""
    connection = run.connection
    for row in result.subframes:
        logbook.insert(connection, "subframes", {"image": image, **row})
    if result.row["outcome"] == "searched":
        _log_peaks(image, result, connection)

    # What was learnt of the images of the stack
    for sha256, packed in result.corrections.items():
        # An image that was only kept for stacks has one already when it is searched
        connection.execute(
            "INSERT OR REPLACE INTO corrections (image, bytes) SELECT id, ? FROM images WHERE sha256 = ?",
            (packed, sha256),
        )
    for sha256, reason in result.rejected.items():
        connection.execute(
            "UPDATE images SET outcome = 'rejected', reason = ? WHERE sha256 = ?", (reason, sha256)
        )

    if result.overview:
        picture = {"image": image, "kind": "difference", "type": "image/jpeg"}
        logbook.insert(connection, "pictures", picture | {"bytes": result.overview})
    if result.pictures is None:
        return
    for detection, row in _log_detections(image, result, run):
        for kind, png in result.pictures.draw(row).items():
            picture = {"image": image, "detection": detection, "kind": kind, "type": "image/png"}
            logbook.insert(connection, "pictures", picture | {"bytes": png})
    if result.deep is not None:
        _log_deep(image, result.deep, run)


def _log_peaks(image: int, result: ImageResult, connection: sqlite3.Connection) -> None:
    """Log what the search takes for new, also below the threshold: a threshold can rest on it later."""
    found = result.candidates
    peaks = found[(found["status"] == "new") & (found["score"] >= CANDIDATE)]
    for x, y, score in peaks[["x_px", "y_px", "score"]].to_numpy(float).tolist():
        place = {"x_px": x - result.row["shift_x_px"], "y_px": y - result.row["shift_y_px"]}
        logbook.insert(connection, "peaks", {"image": image, **place, "score": score})
    logbook.update(connection, "images", image, {"n_peaks": len(peaks)})


def _log_detections(image: int, result: ImageResult, run: Run) -> list[tuple[int, dict[str, Any]]]:
    """Log detections and fainter sightings of candidates; return the id and the row of those to be drawn."""
    connection = run.connection
    params = run.params.quicklook
    columns = (*DETECTION_COLUMNS, "probability")
    shift = np.array([result.row["shift_x_px"], result.row["shift_y_px"]])
    new = connection.execute("SELECT id FROM candidates WHERE status = 'new'")
    waiting = {row["id"] for row in new}
    drawn = []
    seen = set()
    for row, candidate in match_candidates(connection, result.candidates, shift, params.match_px):
        is_detection = row["score"] >= run.detector.threshold

        # A new detection that fits no candidate becomes one
        is_new_candidate = candidate is None and is_detection and row["status"] == "new"
        if is_new_candidate:
            place = {"x_px": row["x_px"] - shift[0], "y_px": row["y_px"] - shift[1]}
            candidate = logbook.insert(
                connection, "candidates", {"image": image, "status": "new", **place}
            )

        if candidate is not None:
            seen.add(candidate)
        if candidate is not None or is_detection:
            detection = {"image": image, "candidate": candidate}
            measured = {name: row[name] for name in columns}
            number = logbook.insert(connection, "detections", detection | measured)
            # Candidates that wait for a second sighting are drawn each time
            if is_new_candidate or candidate in waiting:
                drawn.append((number, row))
    update_candidates(connection, image, seen, params.fade_after)
    return drawn


def _log_deep(image: int, found: DeepResult, run: Run) -> None:
    """Log what the latest images show together, the depths of all candidates, and when each landed."""
    connection = run.connection
    _log_deep_blobs(image, found.found, connection, run.params.quicklook.match_px)
    for row in found.nearly.to_dict("records"):
        nearly = {name: row[name] for name in NEARLY_COLUMNS}
        logbook.insert(connection, "nearly_found", {"image": image, **nearly})

    # Depths of all candidates on this image; of new ones on those before, too
    live = pd.read_sql_query(
        "SELECT l.id, l.x_px, l.y_px, l.radius_px, l.status FROM candidate_list l "
        "WHERE l.radius_px IS NOT NULL AND l.decision != 'rejected' AND l.status != 'faded' ORDER BY l.id",
        connection,
    )
    now = measure_histories([found.settled], live)
    for k, candidate in enumerate(live["id"].tolist()):
        _log_depths(connection, [image], candidate, now.depth_frac[:, k], now.error_frac[:, k])
    marks = ", ".join("?" * len(found.images))
    ids = dict(
        connection.execute(f"SELECT sha256, id FROM images WHERE sha256 IN ({marks})", found.images)
    )
    numbers = [ids[sha256] for sha256 in found.images]
    pairs = pair(
        live[["x_px", "y_px"]].to_numpy(float),
        found.places[["x_px", "y_px"]].to_numpy(float),
        run.params.quicklook.match_px,
    )
    for i, k in pairs.tolist():
        candidate = int(live["id"].iloc[i])
        _log_depths(
            connection,
            numbers,
            candidate,
            found.depths.depth_frac[:, k],
            found.depths.error_frac[:, k],
        )

    # A landing is dated as long as the latest images show what was there before it
    marks = ", ".join("?" * len(numbers))
    recent = connection.execute(
        f"SELECT candidate FROM detections WHERE candidate IS NOT NULL GROUP BY candidate HAVING min(image) IN ({marks})",
        numbers,
    ).fetchall()
    dated = {row["candidate"] for row in recent}
    for candidate in live["id"].tolist():
        if candidate in dated:
            date_candidate(connection, candidate, image, run.params.quicklook.fade_after)


def _log_deep_blobs(
    image: int, found: pd.DataFrame, connection: sqlite3.Connection, match_px: float
) -> None:
    """Log the new blobs that the latest images show together.

    What people have rejected is no news, unless this clearly is something else; what the image shows alone has its
    sighting. A candidate that had faded, or that could not be measured, is there after all.
    """
    unknown = pd.read_sql_query(
        "SELECT id, x_px, y_px, decision = 'rejected' AS rejected, "
        "EXISTS (SELECT 1 FROM detections WHERE candidate = candidate_list.id AND image = ?) AS shown "
        "FROM candidate_list WHERE rejected OR status = 'faded' OR radius_px IS NULL OR shown ORDER BY id",
        connection,
        params=(image,),
    )
    places = ["x_px", "y_px"]
    rows = found.to_dict("records")
    earlier = nearest_candidates(
        connection, rows, found[places].to_numpy(float), unknown.to_dict("records"), match_px
    )
    is_told = unknown[["rejected", "shown"]].any(axis=1)
    told = set(unknown.loc[is_told, "id"])
    columns = (*DETECTION_COLUMNS, "probability", "n_images")
    for k, row in enumerate(rows):
        candidate = earlier.get(k)
        if candidate in told:
            continue
        if candidate is None:
            place = {name: row[name] for name in places}
            candidate = logbook.insert(
                connection, "candidates", {"image": image, "status": "seen_again", **place}
            )
        else:
            logbook.update(connection, "candidates", candidate, {"status": "seen_again"})
        measured = {name: row[name] for name in columns}
        logbook.insert(
            connection, "detections", {"image": image, "candidate": candidate, **measured}
        )


def _log_depths(
    connection: sqlite3.Connection,
    images: list[int],
    candidate: int,
    depth: npt.NDArray[Any],
    error: npt.NDArray[Any],
) -> None:
    """Log the depth of a candidate on some images, unless it is there or has none."""
    rows = [
        (image, candidate, float(depth[i]), float(error[i]))
        for i, image in enumerate(images)
        if np.isfinite(depth[i])
    ]
    connection.executemany("INSERT OR IGNORE INTO depths VALUES (?, ?, ?, ?)", rows)
