"""Dates of exposures, and whether two files are versions of one exposure."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from blobpipe.core import fits_images
from blobpipe.core.detector import DEFAULT, MJD_RANGE, MJD_ZERO, UNIX_MJD, Detector
from blobpipe.errors import BlobpipeError, FrameError

# Cards that can hold the start or the middle of an exposure, in order of preference: MJD, and ISO 8601 in UTC
MJD_CARDS = ("EXPSTART", "MJD-OBS", "MJD-BEG", "MJD-AVG")
DATE_CARDS = ("DATE-OBS", "DATE-BEG", "DATE-AVG")

ISO_DATE = re.compile(r"(\d{4}-\d\d-\d\d)(?:(?:T| +)([\d:.]+))? *Z?")
ISO_TIME = re.compile(r"(\d\d):(\d\d)(?::(\d\d(?:\.\d*)?))? *Z?")

SECONDS_PER_DAY = 86_400

# Largest difference between the dates of two versions of an exposure (days): with the same ROOTNAME, and without one
SAME_EXPOSURE_D = 1.0
SAME_START_D = 1.0 / SECONDS_PER_DAY

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
    """Identity of an exposure, and of its version.

    Attributes
    ----------
    name : str
        File name without its suffix.
    mjd : float
        Date (MJD); NaN if the header has none.
    cards : mapping
        Those of `EXPOSURE_CARDS` that the header has.
    """

    name: str
    mjd: float
    cards: Mapping[str, Any]


def exposure_mjd(frame: fits_images.Frame, path: str | Path, detector: Detector = DEFAULT) -> float:
    """Return the date of an exposure (MJD), its start where the header gives it.

    The first of `MJD_CARDS` and `DATE_CARDS` that holds a date within the life of the instrument is taken; empty cards
    are ignored.

    Raises
    ------
    FrameError
        If the header has no such card.
    """
    rejected = []
    for card in (*MJD_CARDS, *DATE_CARDS):
        text = str(frame.header.get(card, "")).strip()
        if not text:
            continue
        if card in MJD_CARDS:
            mjd = _parse_float(text)
        else:
            # DATE-OBS may hold the day alone; its time is then in a card of its own
            clock = frame.header.get("TIME-OBS", "") if card == "DATE-OBS" else ""
            mjd = _parse_iso_date(text, str(clock).strip())
        if mjd is not None and is_date(mjd, detector):
            return mjd
        rejected.append(f"{card} {text[:30]!r}")
    expected = f"expected {', '.join(MJD_CARDS[:2])} (MJD) or DATE-OBS"
    if not rejected:
        raise FrameError(f"{path}: no date of the exposure, {expected} in its header; add one")
    raise FrameError(
        f"{path}: no date of the exposure, found {', '.join(rejected)}, {expected}, from MJD {detector.first_mjd:.0f} "
        f"({format_mjd(detector.first_mjd)}) to tomorrow ({format_mjd(date_range(detector)[1])[:10]}); correct its header, "
        "or this machine's clock"
    )


def is_date(mjd: float | None, detector: Detector = DEFAULT) -> bool:
    """Say if an image can have this date (MJD)."""
    first, last = date_range(detector)
    return mjd is not None and first <= mjd <= last


def date_range(detector: Detector = DEFAULT) -> tuple[float, float]:
    """Return the first and last date that an image can have (MJD): from the detector's first to tomorrow."""
    now_mjd = UNIX_MJD + time.time() / SECONDS_PER_DAY
    return detector.first_mjd, now_mjd + 1


def _parse_float(text: str) -> float | None:
    """Return a number, or None if the text is none."""
    try:
        return float(text)
    except ValueError:
        return None


def _parse_iso_date(text: str, clock: str) -> float | None:
    """Return the MJD of a date in ISO 8601, or None if it is none.

    Parameters
    ----------
    text : str
        Date, with or without the time of the day.
    clock : str
        Time of the day from another card, taken if ``text`` has none; midnight if empty.
    """
    match = ISO_DATE.fullmatch(text)
    if match is None:
        return None
    day, with_time = match.groups()
    time_of_day = ISO_TIME.fullmatch(with_time or clock or "00:00:00")
    if time_of_day is None:
        return None
    hours, minutes, seconds = (float(part or 0) for part in time_of_day.groups())
    # A leap second is the 61st of its minute
    if hours >= 24 or minutes >= 60 or seconds >= 61:
        return None
    try:
        days = date.fromisoformat(day).toordinal() - MJD_ZERO.toordinal()
    except ValueError:
        return None
    return days + (3600 * hours + 60 * minutes + seconds) / SECONDS_PER_DAY


def exposure_of(
    frame: fits_images.Frame, path: str | Path, detector: Detector = DEFAULT
) -> Exposure:
    """Return what tells an image's exposure from others.

    Its date is NaN, which equals no other date, if the header has none.
    """
    try:
        mjd = exposure_mjd(frame, path, detector)
    except FrameError:
        mjd = float("nan")
    cards = {card: frame.header[card] for card in EXPOSURE_CARDS if card in frame.header}
    return Exposure(frame.name, mjd, cards)


def is_same_exposure(one: Exposure, other: Exposure) -> bool:
    """Say if two images are versions of one exposure, such as before and after a new calibration.

    They are if they have the same ROOTNAME and dates within a day. If one has no ROOTNAME, they are if they began in
    the same second, and neither filter nor target differ; where a date has no time, the file names must agree too.

    Notes
    -----
    Source: this project. A ROOTNAME names one exposure of HST; the date guards against images that share a header.
    """
    apart_d = abs(one.mjd - other.mjd)
    rootname = _text(one, "ROOTNAME").lower()
    other_rootname = _text(other, "ROOTNAME").lower()
    if rootname and other_rootname:
        return rootname == other_rootname and apart_d < SAME_EXPOSURE_D
    # Without a ROOTNAME, exposures of another filter or target may begin in the same second
    for card in ("FILTER", "TARGNAME"):
        known = {_text(one, card), _text(other, card)} - {""}
        if len(known) > 1:
            return False
    certain = (_has_time(one) and _has_time(other)) or one.name == other.name
    return apart_d <= SAME_START_D and certain


def is_older_version(one: Exposure, other: Exposure) -> bool:
    """Say if one version of an exposure was made before another.

    The versions are compared by DATE (of the file), else by CAL_VER (of the calibration software). If the headers do
    not tell, the answer is False: the later arrival counts as the newer version.
    """
    written = [_text(each, "DATE") for each in (one, other)]
    have_dates = all(ISO_DATE.match(text) for text in written)
    if have_dates and written[0] != written[1]:
        return written[0] < written[1]
    calibrated = [_version_numbers(_text(each, "CAL_VER")) for each in (one, other)]
    return all(map(bool, calibrated)) and calibrated[0] < calibrated[1]


def _text(exposure: Exposure, card: str) -> str:
    """Return a card as text, empty if it is missing."""
    return str(exposure.cards.get(card, "")).strip()


def _has_time(exposure: Exposure) -> bool:
    """Say if the date of an exposure holds more than the day."""
    if any(_text(exposure, card) for card in (*MJD_CARDS, "TIME-OBS")):
        return True
    return any(":" in _text(exposure, card) for card in DATE_CARDS)


def _version_numbers(text: str) -> list[int]:
    """Return the numbers of a version such as 3.5.2(28-Oct-2020)."""
    version = text.partition("(")[0]
    return [int(number) for number in re.findall(r"\d+", version)]


def to_mjd(text: str, where: str, *, whole_day: bool = False) -> float:
    """Return the MJD of a number or of an ISO date, with or without time.

    Parameters
    ----------
    text : str
        An MJD, or a date such as 2012-09-27 or 2012-09-27T06:00.
    where : str
        Where it was found; the message begins with it.
    whole_day : bool
        Take the end of the day for a date without time, instead of its beginning.

    Raises
    ------
    BlobpipeError
        If the text is neither.
    """
    with contextlib.suppress(ValueError):
        low, high = MJD_RANGE
        number = float(text)
        # Numbers beyond the range are dates without their dashes
        if low <= number < high:
            return number
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo:
            moment = moment.astimezone(UTC).replace(tzinfo=None)
    except (ValueError, OverflowError) as error:
        raise BlobpipeError(
            f"{where}: found {text[:40]!r}, expected a date such as 2012-09-27, or an MJD"
        ) from error
    mjd = (moment - MJD_ZERO) / timedelta(days=1)
    has_time = len(text) > len("2012-09-27")
    if whole_day and not has_time:
        return float(np.nextafter(mjd + 1, mjd))
    return mjd


def format_mjd(mjd: float, form: str = "%Y-%m-%d") -> str:
    """Return a date (MJD) as text; empty if it is not finite."""
    if not np.isfinite(mjd):
        return ""
    return (MJD_ZERO + timedelta(days=mjd)).strftime(form)
