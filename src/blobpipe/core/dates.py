"""When an image was taken, and whether two files are versions of one exposure."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from blobpipe.core import fits_images, tables
from blobpipe.errors import BlobpipeError, FrameError

if TYPE_CHECKING:
    pass
# in order: the first that is a date counts
MJD_CARDS = ("EXPSTART", "MJD-OBS", "MJD-BEG", "MJD-AVG")
DATE_CARDS = ("DATE-OBS", "DATE-BEG", "DATE-AVG")  # ISO 8601 in UTC, with or without the time
ISO_DATE = re.compile(r"(\d{4}-\d\d-\d\d)(?:(?:T| +)([\d:.]+))? *Z?")
ISO_TIME = re.compile(r"(\d\d):(\d\d)(?::(\d\d(?:\.\d*)?))? *Z?")
FIRST_MJD = 54960.0  # 2009-05-09, two days before the launch that brought the instrument
UNIX_MJD = 40587.0  # 1970-01-01

# between the dates of two versions: of one ROOTNAME, of one date
SAME_EXPOSURE_D = 1.0
SAME_START_D = 1.0 / 86_400
EXPOSURE_CARDS = (
    *MJD_CARDS,
    *DATE_CARDS,
    "TIME-OBS",
    "ROOTNAME",
    "FILTER",
    "TARGNAME",
    "DATE",
    "CAL_VER",
)


class Exposure(NamedTuple):
    """What tells exposures and their versions apart: file name without its suffix, date, `EXPOSURE_CARDS` as far as there."""

    name: str
    mjd: float
    cards: Mapping[str, Any]


def exposure_mjd(frame: fits_images.Frame, path: str | Path) -> float:
    """Date of an exposure (MJD), its start where the header tells it.

    The first of `MJD_CARDS` and `DATE_CARDS` that is a date within the instrument's life is taken; an empty card is none.

    Raises
    ------
    FrameError
        If the header has no such card.
    """
    found = []
    for card in (*MJD_CARDS, *DATE_CARDS):
        text = str(frame.header.get(card, "")).strip()
        if not text:
            continue
        clock = str(frame.header.get("TIME-OBS", "")).strip() if card == "DATE-OBS" else ""
        mjd = _number(text) if card in MJD_CARDS else _mjd_of(text, clock)
        if mjd is not None and is_date(mjd):
            return mjd
        found.append(f"{card} {text[:30]!r}")
    names = ", ".join(MJD_CARDS[:2])
    if not found:
        raise FrameError(
            f"{path}: no date of the exposure, expected {names} (MJD) or DATE-OBS in its header; add one"
        )
    raise FrameError(
        f"{path}: no date of the exposure, found {', '.join(found)}, expected {names} (MJD) or DATE-OBS, from MJD "
        f"{FIRST_MJD:.0f} (2009-05-09) to tomorrow; correct its header"
    )


def is_date(mjd: float | None) -> bool:
    """Whether an image can be of this date."""
    first, last = date_range()
    return mjd is not None and first <= mjd <= last


def date_range() -> tuple[float, float]:
    """First and last date that an image can be of (MJD): from before the instrument was brought to orbit to tomorrow."""
    return FIRST_MJD, UNIX_MJD + time.time() / 86400 + 1


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _mjd_of(text: str, clock: str) -> float | None:
    """MJD of a date as the standard writes it, with its time or beside it; None if it is none."""
    match = ISO_DATE.fullmatch(text)
    if match is None:
        return None
    day, with_time = match.groups()
    at = ISO_TIME.fullmatch(with_time or clock or "00:00:00")
    if at is None:
        return None
    hours, minutes, seconds = (float(part or 0) for part in at.groups())
    try:
        days = date.fromisoformat(day).toordinal() - date(1858, 11, 17).toordinal()
    except ValueError:
        return None
    if hours >= 24 or minutes >= 60 or seconds >= 61:  # a leap second is the 61st
        return None
    return days + (3600 * hours + 60 * minutes + seconds) / 86400


def exposure_of(frame: fits_images.Frame, path: str | Path) -> Exposure:
    """What tells an image's exposure from others; the date is NaN, and like no other, if the header has none."""
    try:
        mjd = exposure_mjd(frame, path)
    except FrameError:
        mjd = float("nan")
    return Exposure(
        frame.name,
        mjd,
        {card: frame.header[card] for card in EXPOSURE_CARDS if card in frame.header},
    )


def is_same_exposure(one: Exposure, other: Exposure) -> bool:
    """Whether two images are versions of one exposure, such as before and after a new calibration.

    They are if they have the same ROOTNAME and the same date to a day; where one has no ROOTNAME, if they began in the same
    second (and neither filter nor target differ). Of a date without a time, the names of the files must be the same, too.

    Notes
    -----
    Source: ours. A ROOTNAME names one exposure of HST; the date guards against images that share a header.
    """
    apart_d = abs(one.mjd - other.mjd)
    names = [_text(each, "ROOTNAME").lower() for each in (one, other)]
    if all(names):
        return names[0] == names[1] and apart_d < SAME_EXPOSURE_D
    for card in ("FILTER", "TARGNAME"):
        if len({_text(one, card), _text(other, card)} - {""}) > 1:
            return False
    return apart_d <= SAME_START_D and (
        (_has_time(one) and _has_time(other)) or one.name == other.name
    )


def is_older_version(one: Exposure, other: Exposure) -> bool:
    """Whether one version of an exposure was made before another: by DATE (of the file), else by CAL_VER (of its calibration).

    False if the headers do not say: then the later arrival is the newer version.
    """
    made = [
        text if ISO_DATE.match(text) else "" for text in (_text(one, "DATE"), _text(other, "DATE"))
    ]
    if all(made) and made[0] != made[1]:
        return made[0] < made[1]
    calibrated = [_version(_text(each, "CAL_VER")) for each in (one, other)]
    return all(map(bool, calibrated)) and calibrated[0] < calibrated[1]


def _text(exposure: Exposure, card: str) -> str:
    return str(exposure.cards.get(card, "")).strip()


def _has_time(exposure: Exposure) -> bool:
    """Whether the date tells more than the day."""
    return any(_text(exposure, card) for card in (*MJD_CARDS, "TIME-OBS")) or any(
        ":" in _text(exposure, card) for card in DATE_CARDS
    )


def _version(text: str) -> list[int]:
    """Numbers of a version such as 3.5.2(28-Oct-2020)."""
    return [int(number) for number in re.findall(r"\d+", text.partition("(")[0])]


MJD_0 = datetime(1858, 11, 17)


# ---------------------------------------------------------------------------------------------------------- dates


def to_mjd(text: str, where: str, *, whole_day: bool = False) -> float:
    """MJD of a number or of an ISO date, with or without time; of a day without, its end if ``whole_day``.

    Raises
    ------
    BlobpipeError
        If it is neither, with ``where`` it stood.
    """
    with contextlib.suppress(ValueError):
        low, high = tables.MJD_RANGE
        if low <= float(text) < high:  # beyond, it is a date without its dashes
            return float(text)
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo:
            moment = moment.astimezone(UTC).replace(tzinfo=None)
    except (ValueError, OverflowError) as error:
        raise BlobpipeError(
            f"{where}: found {text[:40]!r}, expected a date such as 2012-09-27, or an MJD"
        ) from error
    mjd = (moment - MJD_0) / timedelta(days=1)
    return (
        float(np.nextafter(mjd + 1, mjd)) if whole_day and len(text) <= len("2012-09-27") else mjd
    )


def format_mjd(mjd: float, form: str = "%Y-%m-%d") -> str:
    return (MJD_0 + timedelta(days=mjd)).strftime(form) if np.isfinite(mjd) else ""
