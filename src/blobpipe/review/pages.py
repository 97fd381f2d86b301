"""Make every page of the log as HTML.

The same templates make the pages of the server (`blobpipe.review.server`) and the single file that is mailed and
archived; they differ in where links and pictures lead to (`formats.Medium`).
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import bottleneck as bn
import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from blobpipe import __version__
from blobpipe.core import files
from blobpipe.errors import LogError
from blobpipe.monitor import logbook
from blobpipe.review import charts, formats, queries
from blobpipe.review.queries import Choice, Row, Show, Values

KINDS = {
    "difference": "Difference",
    "stack": "Median stack",
    "map": "Network's map",
    "surface": "Surface",
}
PERSISTENCE = {"new": "not yet seen again", "seen_again": "seen again", "faded": "not seen again"}

CARDS = 10  # candidates on a page of the review
LINES = 50  # rows on a page of a table
LATEST = 8  # images listed on the first page
MARK_PX = (9.0, 30.0)  # radius on the map of the faintest mark, and of one of depth FULL_FRAC
FULL_FRAC = 0.15  # depth (fraction of the light) from which marks grow no more
DAYS = 92  # length (d) of the timeline up to which its table has a row for each day, not month


@dataclass(frozen=True)
class Reader:
    """Describe who looks at a page.

    Attributes
    ----------
    form_token : str
        Token of the forms; empty for those who may only read.
    name : str
        Name of the reviewer, if known.
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
class Card:
    """Hold everything about one candidate.

    Attributes
    ----------
    row : dict
        Row of ``candidate_list``.
    pictures : list of dict
        id and kind of its pictures.
    sightings : list of dict
        By date.
    reviews : list of dict
        The latest first.
    history : Graph or None
        Depth by date, on each image with the fitted step; or of the sightings and of other detections near them.
    landing : str
        When it landed and how it was found, in words; empty if not known.
    """

    row: Row
    pictures: list[Row]
    sightings: list[Row]
    reviews: list[Row]
    history: charts.Graph | None
    landing: str


class Mark(NamedTuple):
    """Place a candidate on a picture of the detector, in pixels to the right and down from its upper left corner."""

    id: int
    x: float
    y: float
    radius: float
    kind: str
    text: str


# ---------------------------------------------------------------------------------------------------------- pages


def today(connection: sqlite3.Connection, reader: Reader) -> str:
    """Show the newest image by date of exposure with its candidates, and the images logged last."""
    newest = queries.newest_image(connection)
    return _render(
        "today.html",
        reader,
        image=None if newest is None else _image(connection, newest),
        detector=logbook.detector_of(connection),
        latest=queries.latest_images(connection, LATEST),
        counts=queries.decision_counts(connection),
    )


def queue(
    connection: sqlite3.Connection, reader: Reader, *, show: Show = "all", page: int = 1
) -> str:
    """Show candidates to decide on: the undecided first, then the unsure, the newest of each first."""
    counts = queries.decision_counts(connection)
    listed = queries.part(page, CARDS, counts[show])
    rows = queries.review_queue(connection, show, listed)
    cards = [_card(connection, row) for row in rows]
    return _render(
        "queue.html",
        reader,
        cards=cards,
        show=show,
        shows=queries.SHOWS,
        counts=counts,
        listed=listed,
    )


def candidate(connection: sqlite3.Connection, reader: Reader, number: int) -> str:
    """Show one candidate: pictures, numbers, history, reviews.

    Raises
    ------
    LogError
        If there is none of this number.
    """
    card = _card(connection, queries.candidate(connection, number))
    before, after = queries.candidates_beside(connection, number)
    return _render("candidate.html", reader, card=card, before=before, after=after)


def image(connection: sqlite3.Connection, reader: Reader, number: int) -> str:
    """Show one image: picture, numbers, model and settings, detections, 16 subframes.

    Raises
    ------
    LogError
        If there is none of this number.
    """
    row = _image(connection, number)
    neighbours = queries.images_beside(connection, number)
    detector = logbook.detector_of(connection)
    return _render("image.html", reader, image=row, neighbours=neighbours, detector=detector)


def images(connection: sqlite3.Connection, reader: Reader, choice: Choice, page: int = 1) -> str:
    """List the chosen images, the newest first.

    Raises
    ------
    LogError
        If a day is not written as YYYY-MM-DD.
    """
    rows, listed = queries.images(connection, choice, page, LINES)
    return _render(
        "images.html", reader, images=rows, listed=listed, choice=choice, outcomes=queries.OUTCOMES
    )


def blob_map(connection: sqlite3.Connection, reader: Reader, page: int = 1) -> str:
    """Show all candidates on the detector by date and depth, and as a table."""
    rows = queries.candidates(connection)
    listed = queries.part(page, LINES, len(rows))
    lines = rows[listed.offset : listed.offset + listed.size]
    detector = logbook.detector_of(connection)
    return _render(
        "map.html",
        reader,
        marks=_map_marks(rows, detector.height_px),
        dates=_legend(rows),
        rows=lines,
        listed=listed,
        detector=detector,
    )


def timeline(connection: sqlite3.Connection, reader: Reader) -> str:
    """Show number of blobs, false alarms, noise, shift and signal by date, and as a table."""
    return _render("timeline.html", reader, **_timeline(connection))


def message(reader: Reader, title: str, text: str) -> str:
    """Show one sentence, such as what was wrong with a request."""
    return _render("message.html", reader, title=title, text=text)


def asset(name: Literal["style.css", "review.js"]) -> str:
    """Return the style sheet or the script."""
    return Path(__file__).with_name("templates").joinpath(name).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- one file


def write(connection: sqlite3.Connection, path: str | Path, day: str | None = None) -> str:
    """Write one HTML file about a day, or about everything, that needs nothing beside it.

    Pictures are embedded up to `formats.OFFLINE_BYTES`, the newest first; the others are named as left out.

    Parameters
    ----------
    day : str, optional
        ``YYYY-MM-DD``: show the images exposed on that day, and those without a date that were logged on it, with
        their candidates. Without it, show all candidates that have not been rejected, and the rejected images.

    Returns
    -------
    str
        What the file shows, for a message.

    Raises
    ------
    LogError
        If no image is of that day, or the log holds none.
    """
    content, summary = _of_day(connection, day) if day else _of_everything(connection)
    with files.atomic(path) as temporary:
        temporary.write_text(content, encoding="utf-8")
    return summary


def newest_day(connection: sqlite3.Connection) -> str:
    """Return the day of the newest exposure (ISO).

    Raises
    ------
    LogError
        If no image of the log has a date.
    """
    mjd = queries.newest_mjd(connection)
    if mjd is None:
        raise LogError(
            "no image in the log has a date; expected at least one, name a day with --date or say --all"
        )
    return formats.day(mjd)


def _of_day(connection: sqlite3.Connection, day: str) -> tuple[str, str]:
    """Return the file about a day and what it shows."""
    numbers = queries.images_of_day(connection, day)
    if not numbers:
        raise LogError(
            f"no image of {day} in the log, expected the day of an exposure; name another day or say --all"
        )
    shown = [_image(connection, number) for number in numbers]

    # every candidate that one of the images shows
    seen = {found["candidate"] for row in shown for found in row["detections"]}
    candidates = sorted(number for number in seen if number is not None)
    cards = [_card(connection, queries.candidate(connection, number)) for number in candidates]

    anchors = {("image", number) for number in numbers}
    anchors |= {("candidate", number) for number in candidates}
    content = _file(
        connection, anchors, title=f"Images of {day}", images=shown, cards=cards, bad=[]
    )
    return content, f"the images exposed on {day}: {len(shown)}, candidates: {len(cards)}"


def _of_everything(connection: sqlite3.Connection) -> tuple[str, str]:
    """Return the file about everything in the log and what it shows."""
    # the map shows rejected candidates, too, but they get no card
    rows = queries.candidates(connection)
    cards = [_card(connection, row) for row in rows if row["decision"] != "rejected"]
    n_images, _ = queries.image_counts(connection)
    if not n_images:
        raise LogError("no image in the log; run 'blobpipe quicklook' first")
    content = _file(
        connection,
        {("candidate", card.row["id"]) for card in cards},
        title="Everything in the log",
        images=[],
        cards=cards,
        bad=queries.rejected_images(connection),
        marks=_map_marks(rows, logbook.detector_of(connection).height_px),
        dates=_legend(rows),
        **_timeline(connection),
    )
    return content, f"everything: images {n_images}, candidates {len(rows)}"


def _file(connection: sqlite3.Connection, anchors: set[tuple[str, int]], **content: Any) -> str:
    """Return a page that holds everything it needs."""
    _, last_logged = queries.image_counts(connection)
    return _render(
        "file.html",
        Reader(),
        to=formats.Offline(connection, frozenset(anchors)),
        style=Markup(asset("style.css")),
        as_of=last_logged,
        counts=queries.decision_counts(connection),
        detector=logbook.detector_of(connection),
        **content,
    )


# ------------------------------------------------------------------------------------------- candidates and images


def _card(connection: sqlite3.Connection, row: Row) -> Card:
    """Collect everything about a candidate."""
    number = row["id"]
    # the history shows what else was detected there: a flickering pixel betrays itself
    sightings = queries.sightings(connection, number)
    others = queries.other_detections(connection, row)
    samples = [_sample(detection, "sighting") for detection in sightings]
    samples += [_sample(detection, "other") for detection in others]
    # where depths have been measured on all images, they replace those of the detections
    if depths := queries.depths(connection, number):
        samples = [_depth_sample(depth) for depth in depths]
    history = [sample for sample in samples if sample is not None]
    return Card(
        row=row,
        pictures=queries.candidate_pictures(connection, number),
        sightings=sightings,
        reviews=queries.reviews(connection, number),
        history=charts.scatter(history, from_zero=True, line=_step(row, history)),
        landing=_landing(row),
    )


def _landing(row: Row) -> str:
    """Say when a candidate landed and how it was found, as far as that is known."""
    parts = []
    if row["n_images"] > 1:
        parts.append(f"found in the mean of {row['n_images']} images")
    if row["history"] == "landed":
        between = " and ".join(formats.day(row[name]) for name in ("after_mjd", "before_mjd"))
        parts.append(f"landed between {between} (90 %)")
    elif row["history"]:
        parts.append(f"by its depths: {row['history'].replace('_', ' ')}")
    return "; ".join(parts)


def _step(row: Row, history: list[charts.Sample]) -> list[tuple[float, float]]:
    """Return the fitted step of a landing, as dates and depths (%); empty without one."""
    if row["history"] != "landed" or row["first_mjd"] is None or not history:
        return []
    dates = [sample.mjd for sample in history]
    before = 100 * row["level_frac"]
    since = before + 100 * row["step_frac"]
    first = row["first_mjd"]
    return [(min(dates), before), (first, before), (first, since), (max(dates), since)]


def _depth_sample(depth: Row) -> charts.Sample:
    """Return the depth of a candidate (%) on an image, hollow where the image alone does not show it."""
    value = depth["depth_frac"]
    error = depth["depth_err_frac"]
    return charts.Sample(
        mjd=depth["mjd"],
        value=100 * value,
        low=100 * (value - error),
        high=100 * (value + error),
        kind="sighting" if depth["seen"] else "other",
        text=f"{depth['name']}, {formats.day(depth['mjd'])}: {formats.percent(value, error)}",
    )


def _sample(detection: Row, kind: str) -> charts.Sample | None:
    """Return the depth of a detection (%) at its date; None without depth or date."""
    depth = detection["depth_frac"]
    mjd = detection["mjd"]
    if depth is None or mjd is None:
        return None
    error = detection["depth_err_frac"] or 0.0
    depth_text = formats.percent(depth, error)
    day = formats.day(mjd)
    return charts.Sample(
        mjd=mjd,
        value=100 * depth,
        low=100 * (depth - error),
        high=100 * (depth + error),
        kind=kind,
        text=f"{detection['name']}, {day}: {detection['status']}, {depth_text}",
    )


def _image(connection: sqlite3.Connection, number: int) -> Row:
    """Return the row of an image with its run, picture, detections, subframes and marks."""
    row = queries.image(connection, number)
    row["marks"] = []
    for found in row["detections"]:
        candidate = found["candidate"]
        if candidate is None:
            continue
        # a circle wide of the blob, so that the blob can be seen
        radius = 2.0 * (found["radius_px"] or 8.0) + 8.0
        x, y = _picture_position(found, logbook.detector_of(connection).height_px)
        decision = found["decision"] or "undecided"
        text = f"candidate {candidate}: probability {found['probability']:.3f}"
        row["marks"].append(Mark(candidate, x, y, round(radius, 1), decision, text))
    return row


def _picture_position(row: Row, height_px: int) -> tuple[float, float]:
    """Return a position on a picture, counted from its upper left corner, half a pixel from a pixel's centre."""
    return round(row["x_px"] + 0.5, 1), round(height_px - 0.5 - row["y_px"], 1)


# ------------------------------------------------------------------------------------------------------------ map


def _map_marks(rows: Iterable[Row], height_px: int) -> list[Mark]:
    """Return the marks of all candidates that have a date, the oldest first."""
    dated = [row for row in rows if row["first_mjd"] is not None]
    low, high = _date_range(dated)
    return [
        _map_mark(row, charts.date_class(row["first_mjd"], low, high), height_px)
        for row in reversed(dated)
    ]


def _map_mark(row: Row, date_class: int, height_px: int) -> Mark:
    """Return the mark of a candidate on the map: its area grows with the depth."""
    smallest, largest = MARK_PX
    strength = min(1.0, max(0.0, row["depth_frac"] or 0.0) / FULL_FRAC)
    radius = smallest + (largest - smallest) * math.sqrt(strength)
    x, y = _picture_position(row, height_px)
    decision = row["decision"] or "undecided"
    day = formats.day(row["first_mjd"])
    depth = formats.percent(row["depth_frac"], row["depth_err_frac"])
    text = f"candidate {row['id']}, {decision}, since {day}, depth {depth}"
    return Mark(row["id"], x, y, round(radius, 1), f"{decision} d{date_class}", text)


def _date_range(rows: Sequence[Row]) -> tuple[float, float]:
    """Return the first and the last date of candidates (MJD), zeros if none has a date."""
    dates = [row["first_mjd"] for row in rows if row["first_mjd"] is not None]
    return (min(dates), max(dates)) if dates else (0.0, 0.0)


def _legend(rows: Sequence[Row]) -> list[str]:
    """Return the day from which each colour of the map is used."""
    low, high = _date_range(rows)
    if high <= low:
        return []
    n = charts.DATE_CLASSES
    starts = [low + k * (high - low) / n for k in range(n)]
    return [formats.day(start) for start in starts]


# ------------------------------------------------------------------------------------------------------- timeline


class Line(NamedTuple):
    """Hold a graph of the timeline, its name with the unit, and a summary in words."""

    name: str
    summary: str
    graph: charts.Graph | None


class Series(NamedTuple):
    """Describe a quantity by date: its name with the unit, its column, the factor to that unit, its digits."""

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
    """Return the graphs of the timeline, the rows of its table, and the number of images."""
    table = queries.dated_images(connection)
    found = queries.first_sightings(connection)
    confirmed = [row["first_mjd"] for row in found if row["decision"] == "confirmed"]
    rejected = [row["first_mjd"] for row in found if row["decision"] == "rejected"]

    # counts run from the first image to the last
    mjd = table["mjd"]
    ends = (float(mjd[0]), float(mjd[-1])) if len(mjd) else (0.0, 0.0)
    lines = [
        Line(
            "Confirmed blobs (count)",
            f"{len(confirmed)} in all",
            charts.count(confirmed, *ends),
        ),
        Line(
            "False alarms (count of rejected)",
            f"{len(rejected)} in all",
            charts.count(rejected, *ends),
        ),
        *(_trend(series, mjd, table[series.column]) for series in SERIES),
    ]
    return {"lines": lines, "periods": _periods(table, found), "n_images": len(mjd)}


def _trend(series: Series, mjd: Values, values: Values) -> Line:
    """Return the graph of a quantity, missing values left out."""
    is_finite = np.isfinite(values)
    mjd = mjd[is_finite]
    values = series.factor * values[is_finite]
    if not len(values):
        return Line(series.name, "no values", None)
    median = f"{bn.median(values):.{series.digits}f}"
    newest = f"{values[-1]:.{series.digits}f}"
    graph = charts.trend(mjd, values, from_zero=series.column == "shift_px")
    return Line(series.name, f"median {median}, newest {newest}", graph)


def _periods(table: dict[str, Values], found: Sequence[Row]) -> list[Row]:
    """Return the timeline by month or, if it is short, by day; the newest first."""
    mjd = table["mjd"]
    unit = "M" if len(mjd) and mjd[-1] - mjd[0] > DAYS else "D"

    # images are in order of date, so each period is a slice
    names, starts = np.unique(_periods_of(mjd, unit), return_index=True)
    ends = np.append(starts, len(mjd))[1:]

    # a candidate has no period if its only image was superseded by one of another day
    decisions: dict[str, list[str]] = {str(name): [] for name in names}
    first_mjd = np.array([row["first_mjd"] for row in found], np.float64)
    for name, row in zip(_periods_of(first_mjd, unit), found, strict=True):
        if str(name) in decisions:
            decisions[str(name)].append(row["decision"])

    periods = []
    for (name, decided), start, end in zip(decisions.items(), starts, ends, strict=True):
        period: Row = {
            "name": name,
            "images": int(end - start),
            "bad": int(table["bad"][start:end].sum()),
            "candidates": len(decided),
            "confirmed": decided.count("confirmed"),
            "rejected": decided.count("rejected"),
        }
        for series in SERIES:
            median = float(bn.nanmedian(table[series.column][start:end]))
            # a dash is shown for no value
            period[series.column] = None if math.isnan(median) else median
        periods.append(period)
    return periods[::-1]


def _periods_of(mjd: Values, unit: str) -> npt.NDArray[np.datetime64]:
    """Return the day (unit D) or month (unit M) of dates."""
    days = np.datetime64("1858-11-17") + np.floor(mjd).astype("timedelta64[D]")
    return days.astype(f"datetime64[{unit}]")


# ------------------------------------------------------------------------------------------------------ templates


# a name that a page does not define is an error, and what people typed is escaped
ENVIRONMENT = Environment(
    loader=PackageLoader("blobpipe.review"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters |= {
    "day": formats.day,
    "moment": formats.moment,
    "measured": formats.measured,
    "percent": formats.percent,
}
ENVIRONMENT.globals |= {
    "kinds": KINDS,
    "persistence": PERSISTENCE,
    "graph": charts,
    "version": __version__,
}


def _render(
    template: str, reader: Reader, *, to: formats.Medium | None = None, **content: Any
) -> str:
    """Fill in a template; without a medium, its links lead to pages of the server."""
    medium = to or formats.Online()
    return ENVIRONMENT.get_template(template).render(reader=reader, to=medium, **content)
