"""What a person sees of the log: every page as HTML, made from what stands in the tables and from nothing else.

The same templates make the pages of the server (`blobpipe.review.server`) and the one file that is mailed and archived: they
differ in where links and pictures lead to.
"""

from __future__ import annotations

import base64
import math
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import bottleneck as bn
import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from blobpipe import __version__
from blobpipe.core import files
from blobpipe.core.dates import date_range, is_date
from blobpipe.core.detector import MJD_ZERO, SIDE_PX
from blobpipe.errors import LogError
from blobpipe.review import charts

Row = dict[str, Any]
Values = npt.NDArray[np.float64]
Show = Literal["all", "undecided", "unsure", "confirmed", "rejected"]

SHOWS: tuple[Show, ...] = ("all", "undecided", "unsure", "confirmed", "rejected")
DECISIONS = ("confirmed", "rejected", "unsure")
OUTCOMES = ("searched", "stack", "rejected")
KINDS = {
    "difference": "Difference",
    "stack": "Median stack",
    "map": "Network's map",
    "surface": "Surface",
}
PERSISTENCE = {"new": "not yet seen again", "seen_again": "seen again", "faded": "not seen again"}

NEAR_PX = 8.0  # what else was seen so near a candidate is part of its history
# candidates, and rows of a table, on a page
CARDS = 10
LINES = 50
LATEST = 8  # images named on the first page
# radii of the faintest mark of the map, and of one that takes so much light
MARK_PX = (9.0, 30.0)
FULL_FRAC = 0.15
DAYS = 92  # a timeline longer than this is told by month
OFFLINE_BYTES = 6_000_000  # of pictures in a single file: a mail of 8 MB


class Medium(Protocol):
    """Where the links and pictures of a page lead to."""

    def link(self, kind: str, number: int) -> str:
        """Address of the page of a candidate or an image; empty if there is none."""

    def picture(self, number: int) -> str:
        """Address of a picture; empty if it has been left out."""

    def subframe(self, image: int, row: int, col: int) -> str:
        """Address of the map of a subframe; empty if it has been left out."""


class Online:
    """Pages of the server."""

    def link(self, kind: str, number: int) -> str:
        """A path of the server."""
        return f"/{kind}/{number}"

    def picture(self, number: int) -> str:
        """A path of the server."""
        return f"/picture/{number}"

    def subframe(self, image: int, row: int, col: int) -> str:
        """A path of the server."""
        return f"/subframe/{image}/{row}/{col}"


@dataclass
class Offline:
    """One file that holds everything it shows, as long as ``bytes_left`` of pictures suffice."""

    connection: sqlite3.Connection
    anchors: frozenset[tuple[str, int]]
    bytes_left: int = OFFLINE_BYTES
    left_out: int = 0

    def link(self, kind: str, number: int) -> str:
        """A place on the same page."""
        return f"#{kind}-{number}" if (kind, number) in self.anchors else ""

    def picture(self, number: int) -> str:
        """The picture itself."""
        return self._embedded(picture(self.connection, number))

    def subframe(self, image: int, row: int, col: int) -> str:
        """The picture itself."""
        return self._embedded(subframe(self.connection, image, row, col))

    def _embedded(self, found: Picture) -> str:
        if len(found.content) > self.bytes_left:
            self.left_out += 1
            return ""
        self.bytes_left -= len(found.content)
        return f"data:{found.type};base64,{base64.b64encode(found.content).decode()}"


class Picture(NamedTuple):
    """The bytes of a picture and their media type."""

    content: bytes
    type: str


@dataclass(frozen=True)
class Reader:
    """Who looks at a page.

    Attributes
    ----------
    form_token : str
        Goes with what is written; empty for those who may only read.
    name : str
        Of the reviewer, if known.
    said : str
        What has just been done.
    said_of : int
        Number of the candidate it was done to.
    """

    form_token: str = ""
    name: str = ""
    said: str = ""
    said_of: int = 0


@dataclass(frozen=True)
class Choice:
    """Which images are listed: part of the name, first and last day of the exposure (ISO), outcome."""

    name: str = ""
    first: str = ""
    last: str = ""
    outcome: str = ""


@dataclass(frozen=True)
class Part:
    """One page of a list, from 1 on."""

    number: int
    size: int
    total: int

    @property
    def pages(self) -> int:
        """How many there are; at least one."""
        return max(1, math.ceil(self.total / self.size))

    @property
    def offset(self) -> int:
        """Rows before it."""
        return (self.number - 1) * self.size


def part(number: int, size: int, total: int) -> Part:
    """A page of a list; the nearest that exists."""
    return Part(min(max(number, 1), max(1, math.ceil(total / size))), size, total)


@dataclass(frozen=True)
class Card:
    """Everything about one candidate.

    Attributes
    ----------
    row : dict
        Of ``candidate_list``.
    pictures : list of dict
        id and kind, of its sighting with the highest S/N that has pictures.
    sightings : list of dict
        By date.
    reviews : list of dict
        The latest first.
    history : Graph or None
        Depth by date, of the sightings and of what else was seen there.
    """

    row: Row
    pictures: list[Row]
    sightings: list[Row]
    reviews: list[Row]
    history: charts.Graph | None


class Mark(NamedTuple):
    """A candidate on a picture of the detector: places in its pixels, downwards from the upper edge."""

    id: int
    x: float
    y: float
    radius: float
    kind: str
    text: str


# --------------------------------------------------------------------------------------------------------- pages


def today(connection: sqlite3.Connection, reader: Reader) -> str:
    """The newest image by date of exposure, its candidates marked, and what was logged lately."""
    newest = connection.execute(
        "SELECT id FROM images WHERE superseded_by IS NULL ORDER BY mjd BETWEEN ? AND ? DESC, mjd DESC, id DESC LIMIT 1",
        date_range(),
    ).fetchone()
    shown = _image(connection, newest["id"]) if newest else None
    latest = _rows(connection, "SELECT * FROM images ORDER BY id DESC LIMIT ?", LATEST)
    return _render(
        "today.html", reader, image=shown, latest=latest, counts=_decision_counts(connection)
    )


def queue(
    connection: sqlite3.Connection, reader: Reader, *, show: Show = "all", page: int = 1
) -> str:
    """Candidates to decide on: the undecided first, then the unsure, the newest of each first."""
    counts = _decision_counts(connection)
    listed = part(page, CARDS, counts[show])
    rows = _rows(
        connection,
        f"""SELECT * FROM candidate_list {_where(show)}
        ORDER BY CASE decision WHEN '' THEN 0 WHEN 'unsure' THEN 1 ELSE 2 END, status = 'faded', first_mjd DESC, id DESC
        LIMIT ? OFFSET ?""",
        listed.size,
        listed.offset,
    )
    cards = [_card(connection, row) for row in rows]
    return _render(
        "queue.html", reader, cards=cards, show=show, shows=SHOWS, counts=counts, listed=listed
    )


def candidate(connection: sqlite3.Connection, reader: Reader, number: int) -> str:
    """One candidate: pictures, numbers, history, reviews.

    Raises
    ------
    LogError
        If there is no such candidate.
    """
    card = _card(
        connection,
        _one(connection, "candidate", "SELECT * FROM candidate_list WHERE id = ?", number),
    )
    before = connection.execute(
        "SELECT max(id) FROM candidates WHERE id < ?", (number,)
    ).fetchone()[0]
    after = connection.execute("SELECT min(id) FROM candidates WHERE id > ?", (number,)).fetchone()[
        0
    ]
    return _render("candidate.html", reader, card=card, before=before, after=after)


def image(connection: sqlite3.Connection, reader: Reader, number: int) -> str:
    """One image: picture, numbers, what it was judged with, detections, 16 subframes.

    Raises
    ------
    LogError
        If there is no such image.
    """
    return _render(
        "image.html",
        reader,
        image=_image(connection, number),
        neighbours=_neighbours(connection, number),
    )


def images(connection: sqlite3.Connection, reader: Reader, choice: Choice, page: int = 1) -> str:
    """A list of images, the newest first."""
    where, values = _chosen(choice)
    total = connection.execute(f"SELECT count(*) FROM images i {where}", values).fetchone()[0]
    listed = part(page, LINES, total)
    rows = _rows(
        connection,
        f"""SELECT i.*, (SELECT max(probability) FROM subframes s WHERE s.image = i.id) AS probability,
        (SELECT count(*) FROM detections d WHERE d.image = i.id AND d.candidate IS NOT NULL) AS candidates
        FROM images i {where} ORDER BY i.mjd DESC, i.id DESC LIMIT ? OFFSET ?""",
        *values,
        listed.size,
        listed.offset,
    )
    return _render(
        "images.html", reader, images=rows, listed=listed, choice=choice, outcomes=OUTCOMES
    )


def blob_map(connection: sqlite3.Connection, reader: Reader, page: int = 1) -> str:
    """All candidates on the detector, by date and strength; the same as a table."""
    rows = _rows(connection, "SELECT * FROM candidate_list ORDER BY first_mjd DESC, id DESC")
    listed = part(page, LINES, len(rows))
    lines = rows[listed.offset : listed.offset + listed.size]
    return _render(
        "map.html", reader, marks=_map_marks(rows), dates=_legend(rows), rows=lines, listed=listed
    )


def timeline(connection: sqlite3.Connection, reader: Reader) -> str:
    """Number of blobs, noise, shift, false alarms, signal by date; the same as a table."""
    return _render("timeline.html", reader, **_timeline(connection))


def message(reader: Reader, title: str, text: str) -> str:
    """A page that says one thing, such as what was wrong with a request."""
    return _render("message.html", reader, title=title, text=text)


def write(connection: sqlite3.Connection, path: str | Path, day: str | None = None) -> str:
    """Write one HTML file about a day, or about everything, that needs nothing beside it.

    Parameters
    ----------
    day : str, optional
        ``YYYY-MM-DD``: images exposed on that day, and those without a date that were logged on it, with the
        candidates that they show. Without it, all candidates that have not been rejected, and the images that were.

    Returns
    -------
    str
        What it shows, for a message.

    Raises
    ------
    LogError
        If no image is of that day, or the log holds none.

    Notes
    -----
    Pictures are embedded up to `OFFLINE_BYTES` of them, the newest first; those beyond are named as left out.
    """
    content, told = _of_day(connection, day) if day else _of_everything(connection)
    with files.atomic(path) as temporary:
        temporary.write_text(content, encoding="utf-8")
    return told


def newest_day(connection: sqlite3.Connection) -> str:
    """Day of the newest exposure, ISO.

    Raises
    ------
    LogError
        If no image of the log has a date.
    """
    mjd = connection.execute(
        "SELECT max(mjd) FROM images WHERE mjd BETWEEN ? AND ?", date_range()
    ).fetchone()[0]
    if mjd is None:
        raise LogError(
            "no image in the log has a date; expected at least one, name a day with --date or say --all"
        )
    return _day(mjd)


def picture(connection: sqlite3.Connection, number: int) -> Picture:
    """A picture by its number.

    Raises
    ------
    LogError
        If there is none.
    """
    row = _one(connection, "picture", "SELECT bytes, type FROM pictures WHERE id = ?", number)
    return Picture(row["bytes"], row["type"])


def subframe(connection: sqlite3.Connection, image: int, row: int, col: int) -> Picture:
    """The map of a subframe.

    Raises
    ------
    LogError
        If there is none.
    """
    query = "SELECT saliency FROM subframes WHERE image = ? AND row = ? AND col = ?"
    return Picture(
        _one(connection, "subframe of image", query, image, row, col)["saliency"], "image/png"
    )


def asset(name: Literal["style.css", "review.js"]) -> str:
    """The style sheet or the script."""
    return Path(__file__).with_name("templates").joinpath(name).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- queries


def _rows(connection: sqlite3.Connection, query: str, *values: object) -> list[Row]:
    return [_dated(row) for row in connection.execute(query, values)]


def _one(connection: sqlite3.Connection, what: str, query: str, *values: int) -> Row:
    row = connection.execute(query, values).fetchone()
    if row is None:
        raise LogError(f"no {what} {values[0]} in the log")
    return _dated(row)


def _dated(row: sqlite3.Row) -> Row:
    """A row without a date that is none: earlier versions logged what the header said, Unix seconds too."""
    return {
        name: None if name.endswith("mjd") and not is_date(value) else value
        for name, value in dict(row).items()
    }


def _decision_counts(connection: sqlite3.Connection) -> dict[str, int]:
    counts: dict[str, int] = dict.fromkeys(SHOWS, 0)
    for row in connection.execute(
        "SELECT decision, count(*) AS n FROM candidate_list GROUP BY decision"
    ):
        counts[row["decision"] or "undecided"] = row["n"]
    return counts | {"all": sum(counts.values())}


def _where(show: Show) -> str:
    return "" if show == "all" else f"WHERE decision = '{'' if show == 'undecided' else show}'"


def _card(connection: sqlite3.Connection, row: Row) -> Card:
    sightings = _rows(
        connection,
        """SELECT d.*, i.name, i.mjd FROM detections d JOIN images i ON i.id = d.image
        WHERE d.candidate = ? ORDER BY i.mjd, d.id""",
        row["id"],
    )
    others = _rows(
        connection,
        """SELECT d.*, i.name, i.mjd FROM detections d JOIN images i ON i.id = d.image
        WHERE d.x_px BETWEEN ? AND ? AND d.y_px BETWEEN ? AND ? AND d.candidate IS NOT ? AND i.superseded_by IS NULL ORDER BY i.mjd, d.id""",
        *(
            row["x_px"] - NEAR_PX,
            row["x_px"] + NEAR_PX,
            row["y_px"] - NEAR_PX,
            row["y_px"] + NEAR_PX,
            row["id"],
        ),
    )
    reviews = _rows(
        connection, "SELECT * FROM reviews WHERE candidate = ? ORDER BY id DESC", row["id"]
    )
    samples = [_sample(d, "sighting") for d in sightings] + [_sample(d, "other") for d in others]
    history = charts.scatter([s for s in samples if s is not None], from_zero=True)
    return Card(row, _pictures_of(connection, row["id"]), sightings, reviews, history)


def _sample(detection: Row, kind: str) -> charts.Sample | None:
    depth = detection["depth_frac"]
    mjd = detection["mjd"]
    if depth is None or mjd is None:
        return None
    error = detection["depth_err_frac"] or 0.0
    text = f"{detection['name']}, {_day(mjd)}: {detection['status']}, {_percent(depth, error)}"
    return charts.Sample(mjd, 100 * depth, 100 * (depth - error), 100 * (depth + error), kind, text)


def _pictures_of(connection: sqlite3.Connection, number: int) -> list[Row]:
    """Those of the best sighting that has any, in the order of `KINDS`."""
    best = connection.execute(
        """SELECT d.id FROM detections d WHERE d.candidate = ?
        AND EXISTS (SELECT 1 FROM pictures p WHERE p.detection = d.id) ORDER BY d.snr DESC, d.id LIMIT 1""",
        (number,),
    ).fetchone()
    found = (
        _rows(connection, "SELECT id, kind FROM pictures WHERE detection = ?", best["id"])
        if best
        else []
    )
    return sorted(found, key=lambda row: list(KINDS).index(row["kind"]))


def _image(connection: sqlite3.Connection, number: int) -> Row:
    """The row of an image with its run, picture, detections, marks and subframes."""
    row = _one(connection, "image", "SELECT * FROM images WHERE id = ?", number)
    run = _one(connection, "run", "SELECT * FROM runs WHERE id = ?", row["run"])
    found = connection.execute(
        "SELECT id FROM pictures WHERE image = ? AND detection IS NULL AND kind = 'difference'",
        (number,),
    ).fetchone()
    detections = _rows(
        connection,
        """SELECT d.*, coalesce((SELECT r.decision FROM reviews r WHERE r.candidate = d.candidate ORDER BY r.id DESC
        LIMIT 1), '') AS decision FROM detections d WHERE d.image = ? ORDER BY d.probability DESC, d.id""",
        number,
    )
    subframes = _rows(
        connection,
        "SELECT row, col, probability, positive FROM subframes WHERE image = ? ORDER BY row DESC, col",
        number,
    )
    marks = [_mark(d) for d in detections if d["candidate"] is not None]
    of_run = {"run": run, "picture": found["id"] if found else None}
    return row | of_run | {"detections": detections, "marks": marks, "subframes": subframes}


def _mark(detection: Row) -> Mark:
    """Around a sighting on the picture of its image."""
    number = detection["candidate"]
    radius = 2.0 * (detection["radius_px"] or 8.0) + 8.0
    x, y = _downwards(detection)
    text = f"candidate {number}: probability {detection['probability']:.3f}"
    return Mark(number, x, y, round(radius, 1), detection["decision"] or "undecided", text)


def _downwards(row: Row) -> tuple[float, float]:
    """Places as pictures have them: from the upper left corner of the first pixel."""
    return round(row["x_px"] + 0.5, 1), round(SIDE_PX - 0.5 - row["y_px"], 1)


def _neighbours(connection: sqlite3.Connection, number: int) -> dict[str, int | None]:
    row = _one(connection, "image", "SELECT mjd FROM images WHERE id = ?", number)
    queries = {
        "before": "SELECT id FROM images WHERE mjd < ? AND superseded_by IS NULL ORDER BY mjd DESC LIMIT 1",
        "after": "SELECT id FROM images WHERE mjd > ? AND superseded_by IS NULL ORDER BY mjd LIMIT 1",
    }
    found = {
        name: connection.execute(query, (row["mjd"],)).fetchone() for name, query in queries.items()
    }
    return {name: row["id"] if row else None for name, row in found.items()}


def _chosen(choice: Choice) -> tuple[str, list[object]]:
    """The condition of a query, and its values."""
    wanted: list[tuple[str, object]] = []
    if choice.name:
        wanted.append(("instr(lower(i.name), lower(?))", choice.name))
    if choice.first:
        wanted.append(("i.mjd >= ?", mjd_of(choice.first)))
    if choice.last:
        wanted.append(("i.mjd < ?", mjd_of(choice.last) + 1))
    if choice.outcome:
        wanted.append(("i.outcome = ?", choice.outcome))
    where = "WHERE " + " AND ".join(condition for condition, _ in wanted) if wanted else ""
    return where, [value for _, value in wanted]


def mjd_of(day: str) -> float:
    """Of the beginning of a day.

    Raises
    ------
    LogError
        If it is not written as YYYY-MM-DD.
    """
    try:
        return (datetime.strptime(day, "%Y-%m-%d").replace(tzinfo=UTC) - charts.EPOCH).days
    except ValueError as error:
        raise LogError(f"found the date {day!r}, expected YYYY-MM-DD, as in 2021-08-31") from error


# ----------------------------------------------------------------------------------------------------------- map


def _map_marks(rows: Iterable[Row]) -> list[Mark]:
    rows = [row for row in rows if row["first_mjd"] is not None]
    low, high = _date_range(rows)
    return [
        _map_mark(row, charts.date_class(row["first_mjd"], low, high)) for row in reversed(rows)
    ]


def _map_mark(row: Row, date_class: int) -> Mark:
    smallest, largest = MARK_PX
    strength = min(1.0, max(0.0, row["depth_frac"] or 0.0) / FULL_FRAC)
    x, y = _downwards(row)
    decision = row["decision"] or "undecided"
    depth = _percent(row["depth_frac"], row["depth_err_frac"])
    text = f"candidate {row['id']}, {decision}, since {_day(row['first_mjd'])}, depth {depth}"
    radius = round(smallest + (largest - smallest) * math.sqrt(strength), 1)
    return Mark(row["id"], x, y, radius, f"{decision} d{date_class}", text)


def _date_range(rows: Sequence[Row]) -> tuple[float, float]:
    dates = [row["first_mjd"] for row in rows if row["first_mjd"] is not None]
    return (min(dates), max(dates)) if dates else (0.0, 0.0)


def _legend(rows: Sequence[Row]) -> list[str]:
    """From which day on each colour is used."""
    low, high = _date_range(rows)
    n = charts.DATE_CLASSES
    return [_day(low + k * (high - low) / n) for k in range(n)] if high > low else []


# ------------------------------------------------------------------------------------------------------ timeline


class Line(NamedTuple):
    """A graph of the timeline, its name with the unit, and what it shows in words."""

    name: str
    summary: str
    graph: charts.Graph | None


class Series(NamedTuple):
    """A quantity by date; its name with the unit, factor to that unit, digits."""

    name: str
    column: str
    factor: float
    digits: int


SERIES = (
    Series("Noise (% of the light)", "noise_frac", 100.0, 3),
    Series("Shift (px)", "shift_px", 1.0, 2),
    Series("Signal (1000 electrons)", "signal_e", 1e-3, 1),
)


def _timeline(connection: sqlite3.Connection) -> dict[str, Any]:
    table = _dated_images(connection)
    query = "SELECT first_mjd, decision FROM candidate_list WHERE first_mjd BETWEEN ? AND ?"
    found = _rows(connection, query, *date_range())
    mjd = table["mjd"]
    ends = (float(mjd[0]), float(mjd[-1])) if len(mjd) else (0.0, 0.0)
    confirmed, rejected = (
        [c["first_mjd"] for c in found if c["decision"] == name] for name in DECISIONS[:2]
    )
    lines = [
        Line("Confirmed blobs (count)", f"{len(confirmed)} in all", charts.count(confirmed, *ends)),
        Line(
            "False alarms (count of rejected)",
            f"{len(rejected)} in all",
            charts.count(rejected, *ends),
        ),
        *(_trend(series, mjd, table[series.column]) for series in SERIES),
    ]
    return {"lines": lines, "periods": _periods(table, found), "n_images": len(mjd)}


def _dated_images(connection: sqlite3.Connection) -> dict[str, Values]:
    """Columns of the images that have a date, by date; NaN where there is no value."""
    rows = connection.execute(
        """SELECT mjd, outcome = 'rejected', noise_frac, signal_e, shift_x_px, shift_y_px FROM images
        WHERE mjd BETWEEN ? AND ? AND superseded_by IS NULL ORDER BY mjd""",
        date_range(),
    )
    mjd, bad, noise, signal, x, y = (
        np.array([tuple(row) for row in rows], np.float64).reshape(-1, 6).T
    )
    return {
        "mjd": mjd,
        "bad": bad,
        "noise_frac": noise,
        "signal_e": signal,
        "shift_px": np.hypot(x, y),
    }


def _trend(series: Series, mjd: Values, values: Values) -> Line:
    there = np.isfinite(values)
    mjd = mjd[there]
    values = series.factor * values[there]
    if not len(values):
        return Line(series.name, "no values", None)
    summary = f"median {bn.median(values):.{series.digits}f}, newest {values[-1]:.{series.digits}f}"
    return Line(
        series.name, summary, charts.trend(mjd, values, from_zero=series.column == "shift_px")
    )


def _periods(table: dict[str, Values], found: Sequence[Row]) -> list[Row]:
    """The timeline by month or, if it is short, by day; the newest first."""
    mjd = table["mjd"]
    unit = "M" if len(mjd) and mjd[-1] - mjd[0] > DAYS else "D"
    names, starts = np.unique(_calendar(mjd, unit), return_index=True)
    decisions: dict[str, list[str]] = {str(name): [] for name in names}
    for name, row in zip(
        _calendar(np.array([c["first_mjd"] for c in found], np.float64), unit), found, strict=True
    ):
        if str(name) in decisions:  # else its only image has been superseded by one of another day
            decisions[str(name)].append(row["decision"])
    ends = np.append(starts, len(mjd))[1:]
    periods = [
        _period(name, {column: values[start:end] for column, values in table.items()}, decided)
        for (name, decided), start, end in zip(decisions.items(), starts, ends, strict=True)
    ]
    return periods[::-1]


def _calendar(mjd: Values, unit: str) -> npt.NDArray[np.datetime64]:
    return (np.datetime64(MJD_ZERO.date()) + np.floor(mjd).astype("timedelta64[D]")).astype(
        f"datetime64[{unit}]"
    )


def _period(name: str, table: dict[str, Values], decisions: Sequence[str]) -> Row:
    medians = {series.column: bn.nanmedian(table[series.column]) for series in SERIES}
    return {
        "name": name,
        "images": len(table["mjd"]),
        "bad": int(table["bad"].sum()),
        "candidates": len(decisions),
        "confirmed": decisions.count("confirmed"),
        "rejected": decisions.count("rejected"),
        **{column: float(value) if value == value else None for column, value in medians.items()},
    }


# ------------------------------------------------------------------------------------------------------ one file


def _of_day(connection: sqlite3.Connection, day: str) -> tuple[str, str]:
    start = mjd_of(day)
    shown = _rows(
        connection,
        """SELECT id FROM images WHERE superseded_by IS NULL
        AND (mjd >= ? AND mjd < ? OR (mjd IS NULL AND substr(logged, 1, 10) = ?)) ORDER BY mjd DESC, id DESC""",
        *(start, start + 1, day),
    )
    if not shown:
        raise LogError(
            f"no image of {day} in the log, expected the day of an exposure; name another day or say --all"
        )
    found = [_image(connection, row["id"]) for row in shown]
    numbers = sorted(
        {d["candidate"] for row in found for d in row["detections"] if d["candidate"] is not None}
    )
    cards = [
        _card(
            connection,
            _one(connection, "candidate", "SELECT * FROM candidate_list WHERE id = ?", number),
        )
        for number in numbers
    ]
    anchors = {("image", row["id"]) for row in found} | {
        ("candidate", number) for number in numbers
    }
    content = _file(
        connection, anchors, title=f"Images of {day}", images=found, cards=cards, bad=[]
    )
    return content, f"the images exposed on {day}: {len(found)}, candidates: {len(cards)}"


def _of_everything(connection: sqlite3.Connection) -> tuple[str, str]:
    rows = _rows(connection, "SELECT * FROM candidate_list ORDER BY first_mjd DESC, id DESC")
    cards = [_card(connection, row) for row in rows if row["decision"] != "rejected"]
    bad = _rows(
        connection,
        "SELECT * FROM images WHERE outcome = 'rejected' AND superseded_by IS NULL ORDER BY id DESC",
    )
    n = connection.execute("SELECT count(*) FROM images").fetchone()[0]
    if not n:
        raise LogError("no image in the log; run 'blobpipe quicklook' first")
    everything = {"marks": _map_marks(rows), "dates": _legend(rows), **_timeline(connection)}
    anchors = {("candidate", card.row["id"]) for card in cards}
    content = _file(
        connection,
        anchors,
        title="Everything in the log",
        images=[],
        cards=cards,
        bad=bad,
        **everything,
    )
    return content, f"everything: images {n}, candidates {len(rows)}"


def _file(connection: sqlite3.Connection, anchors: set[tuple[str, int]], **content: Any) -> str:
    to = Offline(connection, frozenset(anchors))
    as_of = connection.execute("SELECT max(logged) FROM images").fetchone()[0]
    style = Markup(asset("style.css"))
    counts = _decision_counts(connection)
    return _render("file.html", Reader(), to=to, style=style, as_of=as_of, counts=counts, **content)


# --------------------------------------------------------------------------------------------------------- words


def _day(mjd: float | None) -> str:
    return "no date" if mjd is None else _iso(math.floor(mjd))


@cache
def _iso(day: int) -> str:
    return f"{charts.date(day):%Y-%m-%d}"


def _moment(mjd: float | None) -> str:
    return "no date" if mjd is None else f"{charts.date(mjd):%Y-%m-%d %H:%M}"


def _measured(
    value: float | None, error: float | None = None, digits: int = 2, factor: float = 1.0
) -> str:
    """A number with its error, or a dash."""
    if value is None:
        return "\N{EN DASH}"
    text = f"{round(factor * value, digits) + 0.0:.{digits}f}"  # without the sign of a zero
    text = text if error is None else f"{text} ± {factor * error:.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def _percent(value: float | None, error: float | None = None, digits: int = 2) -> str:
    return _measured(value, error, digits, 100.0) + ("" if value is None else " %")


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("blobpipe.review"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "day": _day,
        "moment": _moment,
        "measured": _measured,
        "percent": _percent,
    }
    environment.globals |= {
        "kinds": KINDS,
        "persistence": PERSISTENCE,
        "graph": charts,
        "side": SIDE_PX,
        "version": __version__,
    }
    return environment


ENVIRONMENT = _environment()


def _render(template: str, reader: Reader, *, to: Medium | None = None, **content: Any) -> str:
    return ENVIRONMENT.get_template(template).render(reader=reader, to=to or Online(), **content)
