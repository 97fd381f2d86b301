"""Make every page of the log as HTML.

The same templates make the pages of the server (`blobpipe.review.server`) and the single file that is mailed and
archived; they differ in where links and pictures lead to (`formats.Medium`).
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlencode

import bottleneck as bn
import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from blobpipe import __version__
from blobpipe.core import files
from blobpipe.core.detector import DEFAULT, Detector
from blobpipe.errors import BlobpipeError, LogError, printable
from blobpipe.monitor import logbook
from blobpipe.monitor.inbox import path_of
from blobpipe.review import charts, formats, planes, queries
from blobpipe.review.queries import CandidateChoice, Choice, Row, Show, Values

KINDS = {
    "difference": "Difference",
    "stack": "Median stack",
    "map": "Network's map",
    "surface": "Surface",
}
PLANES = {
    "difference": "Difference",
    "template": "Template",
    "image": "Image",
    "map": "Network's map",
}
PERSISTENCE = {"new": "not yet seen again", "seen_again": "seen again", "faded": "not seen again"}

CARDS = 10  # candidates on a page of the review
LINES = 50  # rows on a page of a table
LATEST = 8  # images listed on the first page
MARK_PX = (9.0, 30.0)  # radius on the map of the faintest mark, and of one of depth FULL_FRAC
FULL_FRAC = 0.15  # depth (fraction of the light) from which marks grow no more
ORDER_NAMES = {"date": "date", "probability": "probability", "snr": "S/N"}  # of the queue
KNOWN_MARGIN_PX = 3.0  # from the edge of a known blob to its circle
SAME_PX = 5.0  # distance (px) within which a blob of the catalogue is one that is marked already
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
        Number of the candidate it was done to; 0 for several.
    done : str
        First and last number of the reviews that did it, as in ``12-15``; they can be undone.
    log : str
        Which log the page shows, so that its forms are written to no other.
    """

    form_token: str = ""
    name: str = ""
    said: str = ""
    said_of: int = 0
    done: str = ""
    log: str = ""


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
    has_depths : bool
        Whether the history is of depths with place and shape fixed (`history.depths`), not of the sightings.
    """

    row: Row
    pictures: list[Row]
    sightings: list[Row]
    reviews: list[Row]
    history: charts.Graph | None
    landing: str
    has_depths: bool


class Mark(NamedTuple):
    """Place a candidate on a picture of the detector, in pixels to the right and down from its upper left corner."""

    id: int
    x: float
    y: float
    radius: float
    kind: str
    text: str
    label: str


# ---------------------------------------------------------------------------------------------------------- pages


def today(connection: sqlite3.Connection, reader: Reader) -> str:
    """Show the newest image by date of exposure with its candidates, and the images logged last."""
    newest = queries.newest_image(connection)
    return _render(
        "today.html",
        reader,
        image=None if newest is None else _live_image(connection, newest),
        latest=queries.latest_images(connection, LATEST),
        counts=queries.decision_counts(connection),
    )


def queue(
    connection: sqlite3.Connection,
    reader: Reader,
    *,
    show: Show | None = None,
    order: str = "date",
    page: int = 1,
) -> str:
    """Show candidates to decide on: the undecided first, then the unsure, each by one of `queries.ORDERS`.

    Without ``show``, those that wait for a decision, or all if none does.
    """
    counts = queries.decision_counts(connection)
    show = show or ("undecided" if counts["undecided"] else "all")
    listed = queries.part(page, CARDS, counts[show])
    rows = queries.review_queue(connection, show, listed, order)
    cards = [_card(connection, row) for row in rows]
    return _render(
        "queue.html",
        reader,
        cards=cards,
        show=show,
        shows=queries.SHOWS,
        order=order,
        orders=ORDER_NAMES,
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
    row = _live_image(connection, number)
    neighbours = queries.images_beside(connection, number)
    detector = logbook.detector_of(connection)
    return _render("image.html", reader, image=row, neighbours=neighbours, detector=detector)


def images(connection: sqlite3.Connection, reader: Reader, choice: Choice, page: int = 1) -> str:
    """List the chosen images, by default the newest first.

    Raises
    ------
    LogError
        If a day is not written as YYYY-MM-DD.
    """
    rows, listed = queries.images(connection, choice, page, LINES)
    return _render(
        "images.html",
        reader,
        images=rows,
        listed=listed,
        choice=choice,
        address=_address("/images", choice),
        outcomes=queries.OUTCOMES,
    )


def blob_map(
    connection: sqlite3.Connection,
    reader: Reader,
    choice: CandidateChoice | None = None,
    page: int = 1,
) -> str:
    """Show the chosen candidates on the detector by date and depth, and as a table.

    Raises
    ------
    LogError
        If a day is not written as YYYY-MM-DD, or the S/N is no number.
    """
    choice = choice or CandidateChoice()
    rows = queries.candidates(connection, choice)
    listed = queries.part(page, LINES, len(rows))
    lines = rows[listed.offset : listed.offset + listed.size]
    return _render(
        "map.html",
        reader,
        rows=lines,
        listed=listed,
        choice=choice,
        address=_address("/map", choice),
        decisions=queries.SHOWS[1:],
        **_map(connection, rows),
    )


def _address(path: str, choice: Choice | CandidateChoice) -> str:
    """Return the address of a table with its choice, but for the sort and the page, which follow."""
    chosen = {name: value for name, value in asdict(choice).items() if value and name != "sort"}
    return f"{path}?{urlencode(chosen)}{'&' if chosen else ''}"


def said(connection: sqlite3.Connection, first: int, last: int) -> tuple[str, int]:
    """Say what a form has done by the numbers of its reviews, and of which candidate (0: several); ("", 0) for nothing."""
    rows = queries.reviews_of_form(connection, first, last)
    if not rows:
        return "", 0
    decisions = {row["decision"] or "undecided again" for row in rows}
    decision = decisions.pop() if len(decisions) == 1 else "as they were before"
    numbers = [row["candidate"] for row in rows]
    other = _decided_otherwise(rows)
    if len(numbers) == 1:
        return f"Candidate {numbers[0]}: {decision}.{other}", numbers[0]
    return f"{len(numbers)} candidates ({', '.join(map(str, numbers))}): {decision}.{other}", 0


def _decided_otherwise(rows: list[queries.Row]) -> str:
    """Say what other people had decided before: this page may be older than their decision."""
    said = [
        f"{row['reviewer_before']} had decided on candidate {row['candidate']}: {row['decision_before']}."
        for row in rows
        if row["decision_before"]
        and row["decision_before"] != row["decision"]
        and row["reviewer_before"] != row["reviewer"]
    ]
    more = f" So had others on {len(said) - 3} more." if len(said) > 3 else ""
    return "".join(f" {sentence}" for sentence in said[:3]) + more


def timeline(connection: sqlite3.Connection, reader: Reader) -> str:
    """Show number of blobs, false alarms, noise, shift, signal and rejected images by date, and as a table."""
    return _render("timeline.html", reader, **_timeline(connection))


def message(reader: Reader, title: str, text: str) -> str:
    """Show one sentence, such as what was wrong with a request."""
    return _render("message.html", reader, title=title, text=text)


def asset(name: Literal["style.css", "review.js", "viewer.js"]) -> str:
    """Return the style sheet or a script."""
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
            "no image in the log has a date; expected at least one, name a day with --date or give --all"
        )
    return formats.day(mjd)


def _of_day(connection: sqlite3.Connection, day: str) -> tuple[str, str]:
    """Return the file about a day and what it shows."""
    numbers = queries.images_of_day(connection, day)
    if not numbers:
        raise LogError(
            f"no image of {day} in the log, expected the day of an exposure; name another day or give --all"
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
    newest = queries.newest_mjd(connection)
    is_newest = newest is not None and formats.day(newest) == day
    of_day = f"{day} (the newest day in the log)" if is_newest else day
    images = logbook.counted(len(shown), "image")
    return content, f"{images} of {of_day}, {logbook.counted(len(cards), 'candidate')}"


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
        **_map(connection, rows),
        **_timeline(connection),
    )
    images = logbook.counted(n_images, "image")
    return content, f"everything: {images}, {logbook.counted(len(rows), 'candidate')}"


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
    depths = queries.depths(connection, number)
    if depths:
        samples = [_depth_sample(depth) for depth in depths]
    history = [sample for sample in samples if sample is not None]
    return Card(
        row=row,
        pictures=queries.candidate_pictures(connection, number),
        sightings=sightings,
        reviews=queries.reviews(connection, number),
        history=charts.scatter(history, from_zero=True, line=_step(row, history)),
        landing=_landing(row),
        has_depths=bool(depths),
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
    detector = logbook.detector_of(connection)
    row["nx"] = row["nx_px"] or detector.width_px
    row["ny"] = row["ny_px"] or detector.height_px
    row["view"] = None
    row["marks"] = []
    for found in row["detections"]:
        candidate = found["candidate"]
        if candidate is None:
            continue
        decision = found["decision"] or "undecided"
        text = f"candidate {candidate}: probability {found['probability']:.3f}"
        row["marks"].append(_mark(row, found, candidate, decision, text, str(candidate)))
    row["marks"] += _known_marks(connection, row)
    return row


def _mark(image: Row, place: Row, number: int, kind: str, text: str, label: str) -> Mark:
    """Return a circle around a blob: wide of a candidate, so that it can be seen, and close to a known blob."""
    radius = place["radius_px"] or planes.USUAL_RADIUS_PX
    radius = radius + KNOWN_MARGIN_PX if kind == "known" else 2.0 * radius + 8.0
    x, y = _picture_position(place, image["ny"])
    return Mark(number, x, y, round(radius, 1), kind, text, label)


def _known_marks(connection: sqlite3.Connection, row: Row) -> list[Mark]:
    """Return the marks of blobs that were known when an image was taken: of the log, and of its catalogue."""
    if row["mjd"] is None or row["outcome"] != "searched":
        return []
    shift = {"x_px": row["shift_x_px"] or 0.0, "y_px": row["shift_y_px"] or 0.0}

    def shifted(blob: Row) -> Row:
        return blob | {name: blob[name] + shift[name] for name in shift}

    marks = []
    logged = [shifted(blob) for blob in queries.known_blobs(connection, row)]
    for blob in logged:
        text = f"candidate {blob['id']}, known before"
        marks.append(_mark(row, blob, blob["id"], "known", text, str(blob["id"])))

    # What the log has found and put into the catalogue has its number already
    numbered = [*logged, *(found for found in row["detections"] if found["candidate"])]
    detector = logbook.detector_of(connection)
    for blob in map(shifted, _catalogue(row["run"]["catalogue"], detector)):
        is_named = any(
            math.hypot(blob["x_px"] - other["x_px"], blob["y_px"] - other["y_px"]) < SAME_PX
            for other in numbered
        )
        if not is_named:
            text = f"{blob['blob']}, known from the catalogue"
            marks.append(_mark(row, blob, 0, "known", text, blob["blob"]))
    return marks


def _catalogue(path: str, detector: Detector) -> list[Row]:
    """Return name, place and radius of the blobs of a catalogue as it is now; none if it cannot be read."""
    if not path:
        return []
    try:
        return _catalogue_rows(path, path_of(path).stat().st_mtime_ns, detector)
    except (OSError, BlobpipeError):
        return []


@lru_cache(maxsize=4)
def _catalogue_rows(path: str, modified_ns: int, detector: Detector) -> list[Row]:
    """Read a catalogue once for each state of its file."""
    from blobpipe.core import tables

    columns = ["x_px", "y_px", "radius_px"]
    table = tables.read_known(path_of(path), columns, detector)
    names = table["blob"].astype(str) if "blob" in table else [""] * len(table)
    places = table[columns].to_numpy(float).tolist()
    return [
        {"blob": printable(name), **dict(zip(columns, place, strict=True))}
        for name, place in zip(names, places, strict=True)
    ]


def _live_image(connection: sqlite3.Connection, number: int) -> Row:
    """Return an image as `_image` does, with what a script needs to show its pixels, and its file."""
    row = _image(connection, number)
    own = planes.available(connection, row)
    path = planes.image_path(connection, number)
    row["path"] = "" if path is None else printable(str(path))
    row["last_path"] = planes.last_path(connection, number)
    if not (own or row["picture"]):
        return row
    before = queries.searched_before(connection, row["mjd"])
    row["view"] = {
        "nx": row["nx"],
        "ny": row["ny"],
        "flt": planes.flt_shift((row["ny"], row["nx"]), logbook.detector_of(connection)),
        "name": row["name"],
        "order": own,
        "planes": {
            plane: {"address": f"/pixels/{number}/{plane}", "name": PLANES[plane], "key": key}
            for plane, key in planes.PLANES.items()
            if plane in own
        },
        "before": None,
    }
    if before is not None and before["id"] != number:
        shared = [plane for plane in planes.available(connection, before) if plane in own]
        row["view"]["before"] = {
            "name": before["name"],
            "planes": {plane: f"/pixels/{before['id']}/{plane}" for plane in shared},
        }
    return row


def regions(connection: sqlite3.Connection, number: int, *, flt: bool) -> str:
    """Write the detections and known blobs of an image as DS9 regions.

    Raises
    ------
    LogError
        If there is no image of this number, or ``flt`` is asked for of an image of another detector.
    """
    row = _image(connection, number)
    size = f"{row['nx']}x{row['ny']}"
    detector = logbook.detector_of(connection)
    if flt and (row["ny"], row["nx"]) != detector.shape:
        raise LogError(f"image {number} has {size} pixels, expected {detector.sizes}")
    marked = []
    for found in row["detections"]:
        name = found["candidate"] or ""
        marked.append(found | {"blob": name, "status": found["decision"] or found["status"]})
    for mark in row["marks"]:
        if mark.kind == "known":
            place = {"x_px": mark.x - 0.5, "y_px": row["ny"] - 0.5 - mark.y}
            radius = {"radius_px": mark.radius - KNOWN_MARGIN_PX, "depth_frac": None}
            marked.append({**place, **radius, "blob": mark.label, "status": "known"})
    return planes.regions(marked, detector, flt=flt)


def _picture_position(row: Row, ny: int) -> tuple[float, float]:
    """Return a position on a picture, counted from its upper left corner, half a pixel from a pixel's centre."""
    return round(row["x_px"] + 0.5, 1), round(ny - 0.5 - row["y_px"], 1)


# ------------------------------------------------------------------------------------------------------------ map


def _map(connection: sqlite3.Connection, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the map of candidates: its size, ticks, marks and legend."""
    ny, nx = queries.image_size(connection)
    # drawn as large as the default detector, whatever its size
    scale = max(DEFAULT.shape) / max(ny, nx)
    ends = {"x": nx, "y": ny}
    return {
        "field": {name: round(scale * end, 1) for name, end in ends.items()},
        "ticks": {
            name: [(round(scale * k * end / 4, 1), k * end // 4) for k in range(5)]
            for name, end in ends.items()
        },
        "marks": _map_marks(rows, ny, scale),
        "dates": _legend(rows),
    }


def _map_marks(rows: Iterable[Row], ny: int, scale: float) -> list[Mark]:
    """Return the marks of all candidates that have a date, the oldest first."""
    dated = [row for row in rows if row["first_mjd"] is not None]
    dated.sort(key=lambda row: (row["first_mjd"], row["id"]))
    low, high = _date_range(dated)
    return [
        _map_mark(row, charts.date_class(row["first_mjd"], low, high), ny, scale) for row in dated
    ]


def _map_mark(row: Row, date_class: int, ny: int, scale: float) -> Mark:
    """Return the mark of a candidate on the map: its area grows with the depth."""
    smallest, largest = MARK_PX
    strength = min(1.0, max(0.0, row["depth_frac"] or 0.0) / FULL_FRAC)
    radius = smallest + (largest - smallest) * math.sqrt(strength)
    x, y = (round(scale * value, 1) for value in _picture_position(row, ny))
    decision = row["decision"] or "undecided"
    day = formats.day(row["first_mjd"])
    depth = formats.percent(row["depth_frac"], row["depth_err_frac"])
    text = f"candidate {row['id']}, {decision}, since {day}, depth {depth}"
    kind = f"{decision} d{date_class}"
    return Mark(row["id"], x, y, round(radius, 1), kind, text, str(row["id"]))


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
REJECTED = Series("Rejected images (% of the latest)", "rejected_frac", 100.0, 0)


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
        _trend(REJECTED, *queries.rejected_shares(connection)),
    ]
    return {"lines": lines, "periods": _periods(table, found), "n_images": len(mjd)}


def _trend(series: Series, mjd: Values, values: Values) -> Line:
    """Return the graph of a quantity, missing values left out."""
    is_finite = np.isfinite(values)
    mjd = mjd[is_finite]
    values = series.factor * values[is_finite]
    if not len(values):
        return Line(series.name, "", None)
    median = f"{bn.median(values):.{series.digits}f}"
    newest = f"{values[-1]:.{series.digits}f}"
    graph = charts.trend(mjd, values, from_zero=series.column in ("shift_px", "rejected_frac"))
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


def load_templates() -> None:
    """Compile all templates now, so that the first reader does not wait for them."""
    for name in ENVIRONMENT.list_templates(extensions=["html"]):
        ENVIRONMENT.get_template(name)


def _render(
    template: str, reader: Reader, *, to: formats.Medium | None = None, **content: Any
) -> str:
    """Fill in a template; without a medium, its links lead to pages of the server."""
    medium = to or formats.Online()
    return ENVIRONMENT.get_template(template).render(reader=reader, to=medium, **content)
