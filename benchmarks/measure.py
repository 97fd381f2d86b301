"""Timing, interleaved and repeated, and what comes of it: medians with quartiles, and ratios."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# repetitions
LEAST = 5
MOST = 9
SECONDS = 45.0  # after which there are no more than the least
REST_S = 0.02  # threads that wait in a loop for more work have gone to sleep by then

# units of ratios
TIMES = "times"
SHARE = "of 1"

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Figure:
    """What was measured: median and quartiles of ``n`` repetitions, and what they should reach."""

    what: str
    unit: str
    median: float
    low: float
    high: float
    n: int
    at_least: float | None = None
    at_most: float | None = None

    @property
    def reached(self) -> bool | None:
        """None without a target."""
        if self.at_least is None and self.at_most is None:
            return None
        return (self.at_least or 0) <= self.median <= (self.at_most or np.inf)


@dataclass
class Part:
    """One of the benchmarks: its figures by name, and remarks for the reader."""

    title: str
    figures: dict[str, Figure] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    seconds: float = 0.0
    others_frac: float | None = None  # of the cores' time that other programs took meanwhile

    def add(self, name: str, what: str, unit: str, values: Any, **target: float) -> None:
        """Summarise repetitions as the figure ``name``."""
        values = np.atleast_1d(np.asarray(values, float))
        low, median, high = (
            float(f"{number:.4g}") for number in np.percentile(values, (25, 50, 75))
        )
        self.figures[name] = Figure(what, unit, median, low, high, len(values), **target)

    def add_ratio(self, name: str, what: str, over: Values, under: Values, **target: float) -> None:
        """How many times one thing is the other, repetition by repetition."""
        self.add(name, what, TIMES, over / under, **target)

    def add_share(self, name: str, what: str, over: Values, under: Values) -> None:
        """The share that one thing is of another, repetition by repetition."""
        self.add(name, what, SHARE, over / under)


def interleave(
    works: Mapping[str, Callable[[], float]],
    *,
    least: int = LEAST,
    most: int = MOST,
    seconds: float = SECONDS,
) -> dict[str, Values]:
    """Do all works in turn, again and again; each says how many things it did.

    The first turn is not counted. Every other turn goes backwards, so that what changes in time favours none.

    Returns
    -------
    dict of ndarray, shape (repetitions,)
        Things per second.
    """
    for work in works.values():
        work()
    rates: dict[str, list[float]] = {name: [] for name in works}
    started = time.perf_counter()
    for turn in range(most):
        if turn >= least and time.perf_counter() - started > seconds:
            break
        for name in list(works)[:: -1 if turn % 2 else 1]:
            rates[name].append(rate(works[name]))
    return {name: np.array(values) for name, values in rates.items()}


def rate(work: Callable[[], float]) -> float:
    """Things per second."""
    time.sleep(REST_S)
    started = time.perf_counter()
    n = work()
    return n / (time.perf_counter() - started)


class Watch:
    """Seconds since it was made, and the share of the cores' time that other programs took."""

    def __init__(self) -> None:
        self.started, self.own, self.all = time.perf_counter(), _own_seconds(), _busy_seconds()

    def stop(self, part: Part) -> None:
        """Note both in a part."""
        seconds = time.perf_counter() - self.started
        part.seconds = round(seconds, 1)
        if self.all is not None and (busy := _busy_seconds()) is not None:
            others = (busy - self.all) - (_own_seconds() - self.own)
            part.others_frac = round(max(0.0, others / (seconds * (os.cpu_count() or 1))), 3)


def _own_seconds() -> float:
    return sum(os.times()[:4])


def _busy_seconds() -> float | None:
    """Of all cores since the start of the machine, as Linux counts; what a host takes away counts too."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def progress(text: str) -> None:
    """One line that the next one overwrites; nothing where nobody watches."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def in_gib(n_bytes: float) -> float:
    """Bytes as GiB."""
    return n_bytes / 2**30


ROOT = Path(__file__).resolve().parents[1]
