"""Write dates, numbers, percentages, links and pictures the way a page shows them."""

from __future__ import annotations

import base64
import math
import sqlite3
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from blobpipe.review import charts, queries

OFFLINE_BYTES = 6_000_000  # bytes of pictures in a single file, which makes a mail of 8 MB
NO_VALUE = "\N{EN DASH}"

# ---------------------------------------------------------------------------------------------- dates and numbers


def day(mjd: float | None) -> str:
    """Write the day of an MJD as YYYY-MM-DD."""
    return "no date" if mjd is None else _iso_day(math.floor(mjd))


@cache
def _iso_day(mjd: int) -> str:
    """Write a whole MJD as YYYY-MM-DD; a page shows the same days many times."""
    return f"{charts.date(mjd):%Y-%m-%d}"


def moment(mjd: float | None) -> str:
    """Write an MJD as day and time, to the minute."""
    return "no date" if mjd is None else f"{charts.date(mjd):%Y-%m-%d %H:%M}"


def measured(
    value: float | None, error: float | None = None, digits: int = 2, factor: float = 1.0
) -> str:
    """Write a value with its standard error, both times a factor; a dash for no value."""
    if value is None:
        return NO_VALUE
    # adding 0 takes the sign from a rounded zero
    text = f"{round(factor * value, digits) + 0.0:.{digits}f}"
    if error is not None:
        text = f"{text} ± {factor * error:.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def percent(value: float | None, error: float | None = None, digits: int = 2) -> str:
    """Write a fraction with its standard error as a percentage; a dash for no value."""
    text = measured(value, error, digits, 100.0)
    return text if value is None else f"{text} %"


# ---------------------------------------------------------------------------------------------- links and pictures


class Medium(Protocol):
    """Say where the links and pictures of a page lead to."""

    def link(self, kind: str, number: int) -> str:
        """Return the address of the page of a candidate or an image; empty if there is none."""

    def picture(self, number: int) -> str:
        """Return the address of a picture; empty if it has been left out."""

    def subframe(self, image: int, row: int, col: int) -> str:
        """Return the address of the map of a subframe; empty if it has been left out."""


class Online:
    """Link to pages and pictures of the server."""

    def link(self, kind: str, number: int) -> str:
        """Return a path of the server."""
        return f"/{kind}/{number}"

    def picture(self, number: int) -> str:
        """Return a path of the server."""
        return f"/picture/{number}"

    def subframe(self, image: int, row: int, col: int) -> str:
        """Return a path of the server."""
        return f"/subframe/{image}/{row}/{col}"


@dataclass
class Offline:
    """Link within one file, and embed its pictures as long as ``bytes_left`` suffice.

    Attributes
    ----------
    connection : sqlite3.Connection
        The log.
    anchors : frozenset of (kind, number)
        Candidates and images that the file shows.
    bytes_left : int
        Bytes of pictures that may still be embedded.
    left_out : int
        Number of pictures that were left out.
    """

    connection: sqlite3.Connection
    anchors: frozenset[tuple[str, int]]
    bytes_left: int = OFFLINE_BYTES
    left_out: int = 0

    def link(self, kind: str, number: int) -> str:
        """Return the anchor of a candidate or an image in the file."""
        return f"#{kind}-{number}" if (kind, number) in self.anchors else ""

    def picture(self, number: int) -> str:
        """Return the picture itself as an address."""
        return self._embedded(queries.picture(self.connection, number))

    def subframe(self, image: int, row: int, col: int) -> str:
        """Return the map of a subframe itself as an address."""
        return self._embedded(queries.subframe(self.connection, image, row, col))

    def _embedded(self, picture: queries.Picture) -> str:
        if len(picture.content) > self.bytes_left:
            self.left_out += 1
            return ""
        self.bytes_left -= len(picture.content)
        return f"data:{picture.type};base64,{base64.b64encode(picture.content).decode()}"
