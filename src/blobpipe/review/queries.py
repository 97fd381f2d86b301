"""Read from the log what the pages show, as plain rows."""

from __future__ import annotations

import json
import math
import sqlite3
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from blobpipe.core.dates import date_range
from blobpipe.errors import LogError
from blobpipe.monitor import logbook
from blobpipe.review import charts

Row = dict[str, Any]
Values = npt.NDArray[np.float64]
Show = Literal["all", "undecided", "unsure", "confirmed", "rejected"]

SHOWS: tuple[Show, ...] = ("all", "undecided", "unsure", "confirmed", "rejected")
DECISIONS = ("confirmed", "rejected", "unsure")
OUTCOMES = ("searched", "stack", "rejected")
PICTURE_KINDS = ("difference", "stack", "map", "surface")  # in the order in which they are shown

NEAR_PX = (
    8.0  # distance (px) along x and y within which other detections are of a candidate's history
)


class Picture(NamedTuple):
    """Hold the bytes of a picture and their media type."""

    content: bytes
    type: str


# By the names that addresses use: what a table is sorted by; the first of each is the usual order
CANDIDATE_SORTS = {
    "first": "first_mjd",
    "candidate": "id",
    "x": "x_px",
    "y": "y_px",
    "radius": "radius_px",
    "depth": "depth_frac",
    "snr": "snr",
    "probability": "probability",
    "sightings": "sightings",
    "persistence": "status",
    "decision": "decision",
    "by": "reviewer",
}
HIGHEST = "(SELECT max(probability) FROM subframes s WHERE s.image = i.id)"
N_CANDIDATES = (
    "(SELECT count(*) FROM detections d WHERE d.image = i.id AND d.candidate IS NOT NULL)"
)
IMAGE_SORTS = {
    "exposed": "i.mjd",
    "image": "i.name",
    "outcome": "i.outcome",
    "noise": "i.noise_frac",
    "shift": "i.shift_x_px * i.shift_x_px + i.shift_y_px * i.shift_y_px",
    "candidates": N_CANDIDATES,
    "probability": HIGHEST,
}
ORDERS = {"date": "first_mjd", "probability": "probability", "snr": "snr"}  # of the queue


@dataclass(frozen=True)
class Choice:
    """Choose images by a part of the name, first and last day of the exposure (ISO), and outcome.

    ``sort`` is one of `IMAGE_SORTS`, with a minus for the highest first.
    """

    name: str = ""
    first: str = ""
    last: str = ""
    outcome: str = ""
    sort: str = "-exposed"


@dataclass(frozen=True)
class CandidateChoice:
    """Choose candidates by decision, persistence, least S/N, and days of the first exposure (ISO).

    ``sort`` is one of `CANDIDATE_SORTS`, with a minus for the highest first.
    """

    decision: str = ""
    status: str = ""
    snr: str = ""
    first: str = ""
    last: str = ""
    sort: str = "-first"


def order_by(sort: str, columns: dict[str, str], tie: str) -> str:
    """Return the ORDER BY of a sort that an address names, or of the usual one if there is no such column."""
    name = sort.removeprefix("-")
    if name not in columns:
        name = next(iter(columns))
        sort = f"-{name}"
    direction = "DESC" if sort.startswith("-") else "ASC"
    # what has no value comes last either way
    return f"ORDER BY {columns[name]} {direction} NULLS LAST, {tie} {direction}"


@dataclass(frozen=True)
class Part:
    """Describe one page of a list, counted from 1."""

    number: int
    size: int
    total: int

    @property
    def pages(self) -> int:
        """Number of pages, at least one."""
        return max(1, math.ceil(self.total / self.size))

    @property
    def offset(self) -> int:
        """Number of rows before this page."""
        return (self.number - 1) * self.size


def part(number: int, size: int, total: int) -> Part:
    """Return a page of a list, or the nearest that exists."""
    last = max(1, math.ceil(total / size))
    return Part(min(max(number, 1), last), size, total)


# ----------------------------------------------------------------------------------------------------------- rows


def _rows(connection: sqlite3.Connection, query: str, *values: object) -> list[Row]:
    """Return all rows of a query."""
    possible = date_range(logbook.detector_of(connection))
    return [_checked_dates(row, possible) for row in connection.execute(query, values)]


def _one(connection: sqlite3.Connection, what: str, query: str, *values: int) -> Row:
    """Return the only row of a query.

    Raises
    ------
    LogError
        If there is none.
    """
    row = connection.execute(query, values).fetchone()
    if row is None:
        raise LogError(f"no {what} {values[0]} in the log")
    return _checked_dates(row, date_range(logbook.detector_of(connection)))


def _checked_dates(row: sqlite3.Row, possible: tuple[float, float]) -> Row:
    """Replace dates that cannot be true by None: earlier versions logged what the header said, Unix seconds too.

    Parameters
    ----------
    row : Row
    possible : (float, float)
        First and last date that an image of the log's detector can have (MJD).
    """
    first, last = possible
    return {
        name: None
        if name.endswith("mjd") and value is not None and not first <= value <= last
        else value
        for name, value in dict(row).items()
    }


def mjd_of(day: str) -> float:
    """Return the MJD of the beginning of a day.

    Raises
    ------
    LogError
        If the day is not written as YYYY-MM-DD.
    """
    try:
        moment = datetime.strptime(day, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError as error:
        raise LogError(f"found the date {day!r}, expected YYYY-MM-DD, as in 2021-08-31") from error
    return (moment - charts.EPOCH).days


# ----------------------------------------------------------------------------------------------------- candidates


def decision_counts(connection: sqlite3.Connection) -> dict[str, int]:
    """Count the candidates by decision, for each of `SHOWS`."""
    counts: dict[str, int] = dict.fromkeys(SHOWS, 0)
    query = "SELECT decision, count(*) AS n FROM candidate_list GROUP BY decision"
    for row in connection.execute(query):
        counts[row["decision"] or "undecided"] = row["n"]
    return counts | {"all": sum(counts.values())}


def candidates(connection: sqlite3.Connection, choice: CandidateChoice | None = None) -> list[Row]:
    """Return the chosen candidates, or all, in the order of the choice: by default the newest first.

    Raises
    ------
    LogError
        If a day is not written as YYYY-MM-DD, or the S/N is no number.
    """
    choice = choice or CandidateChoice()
    conditions: list[str] = []
    values: list[object] = []
    if choice.decision:
        conditions.append("decision = ?")
        values.append("" if choice.decision == "undecided" else choice.decision)
    if choice.status:
        conditions.append("status = ?")
        values.append(choice.status)
    if choice.snr:
        conditions.append("snr >= ?")
        values.append(_number_of(choice.snr))
    _add_days(choice.first, choice.last, "first_mjd", conditions, values)
    where = "WHERE " + " AND ".join(conditions) if conditions else ""
    order = order_by(choice.sort, CANDIDATE_SORTS, "id")
    return _rows(connection, f"SELECT * FROM candidate_list {where} {order}", *values)


def _number_of(text: str) -> float:
    """Read a number that was typed."""
    try:
        return float(text)
    except ValueError as error:
        raise LogError(f"found {text!r}, expected a number, as in 7.5") from error


def _add_days(
    first: str, last: str, column: str, conditions: list[str], values: list[object]
) -> None:
    """Add the conditions of a first and a last day, if they are given; the whole of the last day counts."""
    if first:
        conditions.append(f"{column} >= ?")
        values.append(mjd_of(first))
    if last:
        conditions.append(f"{column} < ?")
        values.append(mjd_of(last) + 1)


def review_queue(
    connection: sqlite3.Connection, show: Show, listed: Part, order: str = "date"
) -> list[Row]:
    """Return a page of the candidates to decide on: the undecided, the unsure, then the others.

    Parameters
    ----------
    order : str
        One of `ORDERS`: within each of these, the newest, the most probable, or those of the highest S/N come first.
    """
    decision = "" if show == "undecided" else show
    where = "" if show == "all" else f"WHERE decision = '{decision}'"
    return _rows(
        connection,
        f"""SELECT * FROM candidate_list {where}
        ORDER BY CASE decision WHEN '' THEN 0 WHEN 'unsure' THEN 1 ELSE 2 END, status = 'faded',
        {ORDERS[order]} DESC, id DESC LIMIT ? OFFSET ?""",
        listed.size,
        listed.offset,
    )


def candidate(connection: sqlite3.Connection, number: int) -> Row:
    """Return a candidate.

    Raises
    ------
    LogError
        If there is none of this number.
    """
    return _one(connection, "candidate", "SELECT * FROM candidate_list WHERE id = ?", number)


def candidates_beside(connection: sqlite3.Connection, number: int) -> tuple[int | None, int | None]:
    """Return the numbers of the candidates before and after one."""
    [before] = connection.execute(
        "SELECT max(id) FROM candidates WHERE id < ?", (number,)
    ).fetchone()
    [after] = connection.execute(
        "SELECT min(id) FROM candidates WHERE id > ?", (number,)
    ).fetchone()
    return before, after


def sightings(connection: sqlite3.Connection, number: int) -> list[Row]:
    """Return the detections of a candidate with name and date of their image, by date."""
    return _rows(
        connection,
        f"""SELECT d.*, {logbook.STATUS_TOLD} AS told, i.name, i.mjd FROM detections d JOIN images i ON i.id = d.image
        WHERE d.candidate = ? ORDER BY i.mjd, d.id""",
        number,
    )


def depths(connection: sqlite3.Connection, number: int) -> list[Row]:
    """Return the depth of a candidate on each image, its place and shape fixed, by date."""
    return _rows(
        connection,
        """SELECT d.*, i.name, i.mjd, i.id AS image, EXISTS (SELECT 1 FROM detections s
            WHERE s.candidate = d.candidate AND s.image = d.image) AS seen
        FROM depths d JOIN images i ON i.id = d.image
        WHERE d.candidate = ? AND i.superseded_by IS NULL ORDER BY i.mjd, i.id""",
        number,
    )


def other_detections(connection: sqlite3.Connection, row: Row) -> list[Row]:
    """Return the detections near a candidate that are not its own, by date."""
    x = row["x_px"]
    y = row["y_px"]
    return _rows(
        connection,
        """SELECT d.*, i.name, i.mjd FROM detections d JOIN images i ON i.id = d.image
        WHERE d.x_px BETWEEN ? AND ? AND d.y_px BETWEEN ? AND ? AND d.candidate IS NOT ? AND i.superseded_by IS NULL
        ORDER BY i.mjd, d.id""",
        x - NEAR_PX,
        x + NEAR_PX,
        y - NEAR_PX,
        y + NEAR_PX,
        row["id"],
    )


def reviews(connection: sqlite3.Connection, number: int) -> list[Row]:
    """Return the reviews of a candidate, the latest first."""
    query = "SELECT * FROM reviews WHERE candidate = ? ORDER BY id DESC"
    return _rows(connection, query, number)


def candidate_pictures(connection: sqlite3.Connection, number: int) -> list[Row]:
    """Return id and kind of the pictures of the sighting with the highest S/N that has any, as `PICTURE_KINDS`."""
    best = connection.execute(
        """SELECT d.id FROM detections d WHERE d.candidate = ?
        AND EXISTS (SELECT 1 FROM pictures p WHERE p.detection = d.id) ORDER BY d.snr DESC, d.id LIMIT 1""",
        (number,),
    ).fetchone()
    if best is None:
        return []
    found = _rows(connection, "SELECT id, kind FROM pictures WHERE detection = ?", best["id"])
    return sorted(found, key=lambda row: PICTURE_KINDS.index(row["kind"]))


# --------------------------------------------------------------------------------------------------------- images


def image(connection: sqlite3.Connection, number: int) -> Row:
    """Return the row of an image with its run, picture (id or None), detections and subframes.

    Raises
    ------
    LogError
        If there is no image of this number.
    """
    row = _one(connection, "image", "SELECT * FROM images WHERE id = ?", number)
    # the run tells model and settings
    row["run"] = _one(connection, "run", "SELECT * FROM runs WHERE id = ?", row["run"])
    row["run"]["bad_pixels"] = json.loads(row["run"]["bad_pixels"])

    # the picture of the whole image belongs to no detection
    found = connection.execute(
        "SELECT id FROM pictures WHERE image = ? AND detection IS NULL AND kind = 'difference'",
        (number,),
    ).fetchone()
    row["picture"] = found["id"] if found else None

    # a detection has the latest decision on its candidate
    row["detections"] = _rows(
        connection,
        f"""SELECT d.*, {logbook.STATUS_TOLD} AS told, coalesce(r.decision, '') AS decision,
        coalesce(r.reviewer, '') AS reviewer, r.at AS reviewed, c.added_by FROM detections d LEFT JOIN candidates c ON c.id = d.candidate
        LEFT JOIN reviews r ON r.id = (SELECT max(id) FROM reviews WHERE candidate = d.candidate)
        WHERE d.image = ? ORDER BY d.probability DESC, d.id""",
        number,
    )

    # in the order of the picture: the upper row first
    row["subframes"] = _rows(
        connection,
        "SELECT row, col, probability, positive FROM subframes WHERE image = ? ORDER BY row DESC, col",
        number,
    )
    return row


def image_row(connection: sqlite3.Connection, number: int) -> Row:
    """Return the row of an image alone.

    Raises
    ------
    LogError
        If there is no image of this number.
    """
    return _one(connection, "image", "SELECT * FROM images WHERE id = ?", number)


def known_blobs(connection: sqlite3.Connection, image: Row) -> list[Row]:
    """Return the candidates that were known when an image was taken and that it shows none of, at their usual place."""
    return _rows(
        connection,
        """SELECT id, x_px, y_px, radius_px, depth_frac, decision FROM candidate_list
        WHERE (decision = 'confirmed' OR status = 'seen_again' AND decision != 'rejected') AND first_mjd <= ?
        AND id NOT IN (SELECT candidate FROM detections WHERE image = ? AND candidate IS NOT NULL) ORDER BY id""",
        image["mjd"],
        image["id"],
    )


def reviews_of_form(connection: sqlite3.Connection, first: int, last: int) -> list[Row]:
    """Return the reviews that one form has made, by their numbers, each with the decision before it and who made that."""
    return _rows(
        connection,
        "SELECT r.id, r.candidate, r.decision, r.reviewer, p.decision AS decision_before, p.reviewer AS reviewer_before "
        "FROM reviews r LEFT JOIN reviews p ON p.id = "
        "(SELECT max(id) FROM reviews WHERE candidate = r.candidate AND id < r.id) "
        "WHERE r.id BETWEEN ? AND ? ORDER BY r.id LIMIT 100",
        first,
        last,
    )


def newest_image(connection: sqlite3.Connection) -> int | None:
    """Return the id of the newest image by date of exposure; one without a date only if there is no other."""
    row = connection.execute(
        "SELECT id FROM images WHERE superseded_by IS NULL ORDER BY mjd BETWEEN ? AND ? DESC, mjd DESC, id DESC LIMIT 1",
        date_range(logbook.detector_of(connection)),
    ).fetchone()
    return row["id"] if row else None


def newest_mjd(connection: sqlite3.Connection) -> float | None:
    """Return the date of the newest exposure; None if no image has a date."""
    query = "SELECT max(mjd) FROM images WHERE mjd BETWEEN ? AND ?"
    [mjd] = connection.execute(query, date_range(logbook.detector_of(connection))).fetchone()
    return None if mjd is None else float(mjd)


def latest_images(connection: sqlite3.Connection, most: int) -> list[Row]:
    """Return the images that were logged last, the latest first."""
    return _rows(connection, "SELECT * FROM images ORDER BY id DESC LIMIT ?", most)


def rejected_images(connection: sqlite3.Connection) -> list[Row]:
    """Return the images that could not be used, the latest first."""
    return _rows(
        connection,
        "SELECT * FROM images WHERE outcome = 'rejected' AND superseded_by IS NULL ORDER BY id DESC",
    )


def image_counts(connection: sqlite3.Connection) -> tuple[int, str | None]:
    """Return the number of images of the log, and the time at which the last one was logged (ISO 8601)."""
    [number, logged] = connection.execute("SELECT count(*), max(logged) FROM images").fetchone()
    return number, logged


def searched_before(connection: sqlite3.Connection, mjd: float | None) -> Row | None:
    """Return the last searched image before a date; None if there is none."""
    found = _rows(
        connection,
        """SELECT * FROM images WHERE mjd < ? AND outcome = 'searched' AND superseded_by IS NULL
        ORDER BY mjd DESC LIMIT 1""",
        mjd,
    )
    return found[0] if found else None


def image_size(connection: sqlite3.Connection) -> tuple[int, int]:
    """Return the shape (ny, nx) of the images of a log; the detector's for a log that noted none."""
    row = connection.execute(
        "SELECT ny_px, nx_px FROM images WHERE ny_px IS NOT NULL ORDER BY outcome = 'searched' DESC, id DESC LIMIT 1"
    ).fetchone()
    shape = logbook.detector_of(connection).shape
    return shape if row is None else (row["ny_px"], row["nx_px"])


def images_beside(connection: sqlite3.Connection, number: int) -> dict[str, int | None]:
    """Return the ids of the images before and after one by date, as ``before`` and ``after``."""
    row = _one(connection, "image", "SELECT mjd FROM images WHERE id = ?", number)
    before = connection.execute(
        "SELECT id FROM images WHERE mjd < ? AND superseded_by IS NULL ORDER BY mjd DESC LIMIT 1",
        (row["mjd"],),
    ).fetchone()
    after = connection.execute(
        "SELECT id FROM images WHERE mjd > ? AND superseded_by IS NULL ORDER BY mjd LIMIT 1",
        (row["mjd"],),
    ).fetchone()
    return {
        "before": before["id"] if before else None,
        "after": after["id"] if after else None,
    }


def images(
    connection: sqlite3.Connection, choice: Choice, page: int, size: int
) -> tuple[list[Row], Part]:
    """Return a page of the chosen images, by default the newest first, with their candidates and highest probability.

    Raises
    ------
    LogError
        If a day is not written as YYYY-MM-DD.
    """
    # the condition of each field that is filled in
    conditions: list[str] = []
    values: list[object] = []
    if choice.name:
        conditions.append("instr(lower(i.name), lower(?))")
        values.append(choice.name)
    _add_days(choice.first, choice.last, "i.mjd", conditions, values)
    if choice.outcome:
        conditions.append("i.outcome = ?")
        values.append(choice.outcome)
    where = "WHERE " + " AND ".join(conditions) if conditions else ""

    # the total tells how many pages there are
    [total] = connection.execute(f"SELECT count(*) FROM images i {where}", values).fetchone()
    listed = part(page, size, total)
    order = order_by(choice.sort, IMAGE_SORTS, "i.id")
    rows = _rows(
        connection,
        # what is counted for each image is counted for those of the page only
        f"""SELECT i.*, {HIGHEST} AS probability, {N_CANDIDATES} AS candidates
        FROM (SELECT i.id AS chosen FROM images i {where} {order} LIMIT ? OFFSET ?)
        JOIN images i ON i.id = chosen {order}""",
        *values,
        listed.size,
        listed.offset,
    )
    return rows, listed


def images_of_day(connection: sqlite3.Connection, day: str) -> list[int]:
    """Return the ids of the images exposed on a day, and of those without a date that were logged on it.

    Raises
    ------
    LogError
        If the day is not written as YYYY-MM-DD.
    """
    start = mjd_of(day)
    rows = connection.execute(
        """SELECT id FROM images WHERE superseded_by IS NULL
        AND (mjd >= ? AND mjd < ? OR (mjd IS NULL AND substr(logged, 1, 10) = ?)) ORDER BY mjd DESC, id DESC""",
        (start, start + 1, day),
    )
    return [row["id"] for row in rows]


# ------------------------------------------------------------------------------------------------------- timeline


def dated_images(connection: sqlite3.Connection) -> dict[str, Values]:
    """Return columns of the images that have a date, by date; NaN where there is no value.

    Returns
    -------
    dict of ndarray, shape (n,)
        mjd, bad (1 for a rejected image), noise_frac, signal_e, shift_px.
    """
    rows = connection.execute(
        """SELECT mjd, outcome = 'rejected', noise_frac, signal_e, shift_x_px, shift_y_px FROM images
        WHERE mjd BETWEEN ? AND ? AND superseded_by IS NULL ORDER BY mjd""",
        date_range(logbook.detector_of(connection)),
    )
    table = np.array([tuple(row) for row in rows], np.float64).reshape(-1, 6)
    mjd, bad, noise, signal, shift_x, shift_y = table.T
    return {
        "mjd": mjd,
        "bad": bad,
        "noise_frac": noise,
        "signal_e": signal,
        "shift_px": np.hypot(shift_x, shift_y),
    }


def rejected_shares(connection: sqlite3.Connection) -> tuple[Values, Values]:
    """Return dates (MJD) and the share of rejected images among the latest, as the health readings have it, by date.

    Images without a date have none of their own, but count in those that follow. Late images are left out, as the
    share is of the images in the order of the log.
    """
    rows = connection.execute(
        """SELECT i.mjd, h.value FROM health h JOIN images i ON i.id = h.image WHERE h.what = 'rejected_frac'
        AND i.late = 0 AND i.superseded_by IS NULL AND i.mjd BETWEEN ? AND ? ORDER BY i.mjd, i.id""",
        date_range(logbook.detector_of(connection)),
    )
    mjd, share = np.array([tuple(row) for row in rows], np.float64).reshape(-1, 2).T
    return mjd, share


def first_sightings(connection: sqlite3.Connection) -> list[Row]:
    """Return date of the first image (``first_mjd``) and decision of each candidate that has a date."""
    query = "SELECT first_mjd, decision FROM candidate_list WHERE first_mjd BETWEEN ? AND ?"
    return _rows(connection, query, *date_range(logbook.detector_of(connection)))


# ------------------------------------------------------------------------------------------------------- pictures


def picture(connection: sqlite3.Connection, number: int) -> Picture:
    """Return a picture.

    Raises
    ------
    LogError
        If there is none of this number.
    """
    row = _one(connection, "picture", "SELECT bytes, type FROM pictures WHERE id = ?", number)
    return Picture(row["bytes"], row["type"])


def subframe(connection: sqlite3.Connection, image: int, row: int, col: int) -> Picture:
    """Return the network's map of a subframe.

    Raises
    ------
    LogError
        If there is no such subframe.
    """
    query = "SELECT saliency FROM subframes WHERE image = ? AND row = ? AND col = ?"
    found = _one(connection, "subframe of image", query, image, row, col)
    return Picture(found["saliency"], "image/png")
