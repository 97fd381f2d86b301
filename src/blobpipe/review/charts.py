"""Small graphs for pages: plain numbers in, the places of ticks, lines and marks out, which a template draws as SVG."""

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

# of a graph; the page scales it
WIDTH = 440
HEIGHT = 200
# where its axes lie
LEFT = 52
RIGHT = 432
TOP = 10
BOTTOM = 174
MOST = 240  # points of a line; of more images, each point stands for several
EPOCH = MJD_ZERO.replace(tzinfo=UTC)
DATE_CLASSES = 5  # colours of a map

STEPS = (1, 2, 5, 10)
MONTHS = (1, 2, 3, 6, 12, 24, 60, 120, 240)


class Sample(NamedTuple):
    """A value and its time.

    Attributes
    ----------
    mjd : float
    value, low, high : float
        The value, and the ends of its error bar.
    kind : str
        Class of its mark.
    text : str
        What the mark says when it is pointed at.
    """

    mjd: float
    value: float
    low: float
    high: float
    kind: str = ""
    text: str = ""


class Tick(NamedTuple):
    """A place on an axis, and what is written there."""

    at: float
    label: str


class Dot(NamedTuple):
    """A mark with its error bar from ``top`` to ``bottom``."""

    x: float
    y: float
    top: float
    bottom: float
    kind: str
    text: str


class Graph(NamedTuple):
    """What is drawn: SVG path data, ticks and marks."""

    x_ticks: list[Tick]
    y_ticks: list[Tick]
    line: str = ""
    band: str = ""
    dots: Sequence[Dot] = ()


class Scale(NamedTuple):
    """From the range of a quantity to the range of an axis."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The place of a value, to a tenth of a unit."""
        return round(
            self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1
        )


def scatter(samples: Sequence[Sample], *, from_zero: bool = False) -> Graph | None:
    """Each sample as a mark with its error bar; none for no samples."""
    if not samples:
        return None
    x, y = _scales(samples, from_zero)
    dots = [Dot(x(s.mjd), y(s.value), y(s.high), y(s.low), s.kind, s.text) for s in samples]
    return Graph(date_ticks(x), value_ticks(y), dots=dots)


def trend(mjd: Values, values: Values, *, from_zero: bool = False) -> Graph | None:
    """Marks as long as there are few; else a line of medians within a band from lowest to highest.

    Parameters
    ----------
    mjd : ndarray, shape (n,)
        In order.
    values : ndarray, shape (n,)
        All finite.
    """
    if len(mjd) <= MOST:
        said = [f"{date(at):%Y-%m-%d}: {value:.4g}" for at, value in zip(mjd, values, strict=True)]
        samples = [
            Sample(at, v, v, v, text=text) for at, v, text in zip(mjd, values, said, strict=True)
        ]
        return scatter(samples, from_zero=from_zero)
    groups = thinned(mjd, values)
    x, y = _scales(groups, from_zero)
    line = "M" + "L".join(f"{x(s.mjd)} {y(s.value)}" for s in groups)
    around = [(s.mjd, s.high) for s in groups] + [(s.mjd, s.low) for s in reversed(groups)]
    band = "M" + "L".join(f"{x(at)} {y(value)}" for at, value in around) + "Z"
    return Graph(date_ticks(x), value_ticks(y), line, band)


def count(dates: Sequence[float], low: float, high: float) -> Graph | None:
    """How many there were up to each date, as steps between two dates (MJD)."""
    if not dates:
        return None
    ends = [Sample(low, 0, 0, 0), Sample(high, len(dates), len(dates), len(dates))]
    x, y = _scales(ends, from_zero=True)
    line = (
        f"M{x(low)} {y(0)}"
        + "".join(f"H{x(mjd)}V{y(n)}" for n, mjd in enumerate(sorted(dates), 1))
        + f"H{x(high)}"
    )
    return Graph(date_ticks(x), value_ticks(y), line)


def thinned(mjd: Values, values: Values) -> list[Sample]:
    """At most `MOST` groups of neighbours, the last one perhaps smaller: their median, lowest and highest value."""
    size = math.ceil(len(mjd) / MOST)
    groups = np.full((2, math.ceil(len(mjd) / size) * size), np.nan)
    groups[:, : len(mjd)] = mjd, values
    at, of = groups.reshape(2, -1, size)
    columns = [
        bn.nanmedian(at, axis=1),
        bn.nanmedian(of, axis=1),
        bn.nanmin(of, axis=1),
        bn.nanmax(of, axis=1),
    ]
    return [
        Sample(middle, value, low, high)
        for middle, value, low, high in np.array(columns).T.tolist()
    ]


def _scales(samples: Sequence[Sample], from_zero: bool) -> tuple[Scale, Scale]:
    first = min(s.mjd for s in samples)
    last = max(s.mjd for s in samples)
    low = min(s.low for s in samples)
    high = max(s.high for s in samples)
    beside = 0.03 * (last - first) or 0.5
    above = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    low = min(low, 0.0) if from_zero else low - above
    return Scale(first - beside, last + beside, LEFT, RIGHT), Scale(low, high + above, BOTTOM, TOP)


def value_ticks(scale: Scale, most: int = 5) -> list[Tick]:
    """Round numbers along an axis."""
    rough = (scale.high - scale.low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in STEPS if factor * power >= rough * (1 - 1e-9))
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    first = math.ceil(scale.low / step - 1e-9)
    values = [step * n for n in range(first, math.floor(scale.high / step + 1e-9) + 1)]
    return [
        Tick(scale(value), f"{value + 0.0:.{digits}f}".replace("-", "\N{MINUS SIGN}"))
        for value in values
    ]


def date_ticks(scale: Scale, most: int = 5) -> list[Tick]:
    """First days of years or months, or days, along an axis of MJD."""
    days = scale.high - scale.low
    if days < most * 28:
        step = max(1, math.ceil(days / most))
        first = math.ceil(scale.low)
        return [
            Tick(scale(day), f"{date(day):%Y-%m-%d}")
            for day in range(first, math.floor(scale.high) + 1, step)
        ]
    months = next((n for n in MONTHS if days / (30.4 * n) <= most), MONTHS[-1])
    form = "%Y" if months >= 12 else "%Y-%m"
    return [
        Tick(scale(mjd), f"{date(mjd):{form}}") for mjd in _firsts(scale.low, scale.high, months)
    ]


def _firsts(low: float, high: float, months: int) -> list[float]:
    """MJD of the first day of every so manieth month."""
    start = date(low)
    end = date(high)
    numbers = range(12 * start.year // months * months, 12 * end.year + end.month, months)
    firsts = [
        (datetime(n // 12, n % 12 + 1, 1, tzinfo=UTC) - EPOCH) / timedelta(days=1) for n in numbers
    ]
    return [mjd for mjd in firsts if low <= mjd <= high]


def date(mjd: float) -> datetime:
    """Of an MJD, in UTC."""
    return EPOCH + timedelta(days=mjd)


def date_class(mjd: float, low: float, high: float) -> int:
    """Which of the colours of a map a date has: 0 is the earliest."""
    return (
        min(DATE_CLASSES - 1, int(DATE_CLASSES * (mjd - low) / (high - low)))
        if high > low
        else DATE_CLASSES - 1
    )
