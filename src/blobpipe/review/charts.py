"""Compute small graphs for pages: from plain numbers to ticks, lines and marks, which a template draws as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import bottleneck as bn
import numpy as np
import numpy.typing as npt

from blobpipe.core.detector import MJD_ZERO

Values = npt.NDArray[np.float64]

WIDTH = 440  # size of a graph in its own units, which the page scales
HEIGHT = 200
LEFT = 52  # positions of the axes in these units, y downwards
RIGHT = 432
TOP = 10
BOTTOM = 174
MOST = 240  # points of a line; with more images, each point stands for several
EPOCH = MJD_ZERO.replace(tzinfo=UTC)
DATE_CLASSES = 5  # colours of the map

STEPS = (1, 2, 5, 10)  # round distances between ticks, times a power of ten
MONTHS = (1, 2, 3, 6, 12, 24, 60, 120, 240)  # distances between ticks of dates
DAYS_OF_MONTH = 30.4  # mean length of a month (d)
# share of a step by which a tick may lie off the axis through rounding
SLACK = 1e-9


class Sample(NamedTuple):
    """Hold a value and its time.

    Attributes
    ----------
    mjd : float
    value, low, high : float
        Value, and the ends of its error bar.
    kind : str
        CSS class of its mark.
    text : str
        Tooltip of its mark.
    """

    mjd: float
    value: float
    low: float
    high: float
    kind: str = ""
    text: str = ""


class Tick(NamedTuple):
    """Place a label on an axis."""

    at: float
    label: str


class Dot(NamedTuple):
    """Place a mark with its error bar from ``top`` to ``bottom``."""

    x: float
    y: float
    top: float
    bottom: float
    kind: str
    text: str


class Graph(NamedTuple):
    """Hold what is drawn: ticks, SVG path data of a line and a band, and marks."""

    x_ticks: list[Tick]
    y_ticks: list[Tick]
    line: str = ""
    band: str = ""
    dots: Sequence[Dot] = ()


class Scale(NamedTuple):
    """Map the range of a quantity (low to high) onto the range of an axis (start to end)."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the position of a value, to a tenth of a unit."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


# --------------------------------------------------------------------------------------------------------- graphs


def scatter(
    samples: Sequence[Sample],
    *,
    from_zero: bool = False,
    line: Sequence[tuple[float, float]] = (),
) -> Graph | None:
    """Draw each sample as a mark with its error bar; return None for no samples.

    Parameters
    ----------
    samples : sequence of Sample
    from_zero : bool
        Begin the axis at 0 if all samples lie above.
    line : sequence of (float, float)
        Dates (MJD) and values of a line through them, such as a fitted step.
    """
    if not samples:
        return None
    x, y = _scales(samples, from_zero)
    dots = [Dot(x(s.mjd), y(s.value), y(s.high), y(s.low), s.kind, s.text) for s in samples]
    drawn = _path(x, y, line) if line else ""
    return Graph(date_ticks(x), value_ticks(y), drawn, dots=dots)


def trend(mjd: Values, values: Values, *, from_zero: bool = False) -> Graph | None:
    """Draw a few values as marks, and many as a line of medians within a band from lowest to highest.

    Parameters
    ----------
    mjd : ndarray, shape (n,)
        In order.
    values : ndarray, shape (n,)
        All finite.
    """
    if len(mjd) <= MOST:
        samples = []
        for at, value in zip(mjd, values, strict=True):
            text = f"{date(at):%Y-%m-%d}: {value:.4g}"
            samples.append(Sample(at, value, value, value, text=text))
        return scatter(samples, from_zero=from_zero)

    groups = thinned(mjd, values)
    x, y = _scales(groups, from_zero)
    middle = [(group.mjd, group.value) for group in groups]
    # the band runs along the highest values and back along the lowest
    upper = [(group.mjd, group.high) for group in groups]
    lower = [(group.mjd, group.low) for group in reversed(groups)]
    line = _path(x, y, middle)
    band = _path(x, y, upper + lower) + "Z"
    return Graph(date_ticks(x), value_ticks(y), line, band)


def _path(x: Scale, y: Scale, points: Sequence[tuple[float, float]]) -> str:
    """Return SVG path data of a line through points."""
    return "M" + "L".join(f"{x(at)} {y(value)}" for at, value in points)


def count(dates: Sequence[float], low: float, high: float) -> Graph | None:
    """Draw how many dates there were up to each, as steps between two dates (MJD); None for no dates."""
    if not dates:
        return None
    n_dates = len(dates)
    ends = [Sample(low, 0, 0, 0), Sample(high, n_dates, n_dates, n_dates)]
    x, y = _scales(ends, from_zero=True)
    start = f"M{x(low)} {y(0)}"
    steps = "".join(f"H{x(mjd)}V{y(n)}" for n, mjd in enumerate(sorted(dates), 1))
    return Graph(date_ticks(x), value_ticks(y, whole=True), f"{start}{steps}H{x(high)}")


def thinned(mjd: Values, values: Values) -> list[Sample]:
    """Summarise values in at most `MOST` groups of neighbours: median, lowest and highest value of each.

    All groups have the same size but the last, which may be smaller.
    """
    size = math.ceil(len(mjd) / MOST)
    n_groups = math.ceil(len(mjd) / size)

    # the last group is filled with NaN, which the statistics leave out
    padded = np.full((2, n_groups * size), np.nan)
    padded[:, : len(mjd)] = mjd, values
    dates, groups = padded.reshape(2, n_groups, size)

    columns = [
        bn.nanmedian(dates, axis=1),
        bn.nanmedian(groups, axis=1),
        bn.nanmin(groups, axis=1),
        bn.nanmax(groups, axis=1),
    ]
    return [
        Sample(middle, value, low, high)
        for middle, value, low, high in np.array(columns).T.tolist()
    ]


# ---------------------------------------------------------------------------------------------------------- scales


def _scales(samples: Sequence[Sample], from_zero: bool) -> tuple[Scale, Scale]:
    """Return the scales of dates and values, with a margin around the samples."""
    first = min(s.mjd for s in samples)
    last = max(s.mjd for s in samples)
    low = min(s.low for s in samples)
    high = max(s.high for s in samples)

    # a single date or value needs a margin, too
    beside = 0.03 * (last - first) or 0.5
    above = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    top = high + above
    # a mark at zero is not cut by the axis
    low = min(low, 0.0) - 0.04 * (top - min(low, 0.0)) if from_zero else low - above
    x = Scale(first - beside, last + beside, LEFT, RIGHT)
    y = Scale(low, top, BOTTOM, TOP)
    return x, y


def value_ticks(scale: Scale, most: int = 5, *, whole: bool = False) -> list[Tick]:
    """Place ticks at round numbers, or at ``whole`` ones alone, along an axis, about ``most`` of them."""
    # the smallest round step that is not below the even division of the axis
    rough = (scale.high - scale.low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in STEPS if factor * power >= rough * (1 - SLACK))
    step = max(step, 1.0) if whole else step

    digits = max(0, -math.floor(math.log10(step) + SLACK))
    first = math.ceil(scale.low / step - SLACK)
    last = math.floor(scale.high / step + SLACK)
    ticks = []
    for n in range(first, last + 1):
        value = step * n
        # adding 0 takes the sign from a zero
        label = f"{value + 0.0:.{digits}f}".replace("-", "\N{MINUS SIGN}")
        ticks.append(Tick(scale(value), label))
    return ticks


def date_ticks(scale: Scale, most: int = 5) -> list[Tick]:
    """Place ticks at days, or at first days of months or years, along an axis of MJD."""
    days = scale.high - scale.low
    if days < most * 28:
        step = max(1, math.ceil(days / most))
        whole_days = range(math.ceil(scale.low), math.floor(scale.high) + 1, step)
        return [Tick(scale(day), f"{date(day):%Y-%m-%d}") for day in whole_days]

    # the smallest number of months that gives few enough ticks
    months = next((n for n in MONTHS if days / (DAYS_OF_MONTH * n) <= most), MONTHS[-1])
    form = "%Y" if months >= 12 else "%Y-%m"
    first_days = _first_days(scale.low, scale.high, months)
    return [Tick(scale(mjd), f"{date(mjd):{form}}") for mjd in first_days]


def _first_days(low: float, high: float, months: int) -> list[float]:
    """Return the MJD of the first day of every so many months between two dates."""
    # months counted from year 0, so that a step of 12 begins with a January
    start = 12 * date(low).year // months * months
    end = 12 * date(high).year + date(high).month
    first_days = []
    for n in range(start, end, months):
        first_day = datetime(n // 12, n % 12 + 1, 1, tzinfo=UTC)
        first_days.append((first_day - EPOCH) / timedelta(days=1))
    return [mjd for mjd in first_days if low <= mjd <= high]


# ----------------------------------------------------------------------------------------------------------- dates


def date(mjd: float) -> datetime:
    """Return the date and time of an MJD, in UTC."""
    return EPOCH + timedelta(days=mjd)


def date_class(mjd: float, low: float, high: float) -> int:
    """Return which of the colours of the map a date has: 0 is the earliest."""
    if high <= low:
        return DATE_CLASSES - 1
    number = int(DATE_CLASSES * (mjd - low) / (high - low))
    return min(DATE_CLASSES - 1, number)
