"""Dates, numbers and links as pages show them."""

from __future__ import annotations

import sqlite3

import pytest
from tests.unit import synthetic_log

from blobpipe.review import formats, queries

MINUS = "\N{MINUS SIGN}"


def test_dates_are_days_or_moments() -> None:
    assert formats.day(56197.99) == "2012-09-27"
    assert formats.moment(56197.5) == "2012-09-27 12:00"
    assert formats.day(None) == formats.moment(None) == "no date"


@pytest.mark.parametrize(
    ("value", "error", "digits", "factor", "text"),
    [
        (1.234, None, 2, 1.0, "1.23"),
        (1.234, 0.1, 1, 1.0, "1.2 ± 0.1"),
        (-0.5, 0.25, 2, 100.0, f"{MINUS}50.00 ± 25.00"),
        (-0.001, None, 2, 1.0, "0.00"),
        (None, 0.1, 2, 1.0, "\N{EN DASH}"),
    ],
)
def test_numbers_have_an_error_and_no_sign_of_zero(
    value: float | None, error: float | None, digits: int, factor: float, text: str
) -> None:
    assert formats.measured(value, error, digits, factor) == text


def test_fractions_are_shown_as_percentages() -> None:
    assert formats.percent(0.0231, 0.0012) == "2.31 ± 0.12 %"
    assert formats.percent(None) == "\N{EN DASH}"


def test_one_file_embeds_pictures_until_they_are_too_many(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    log = synthetic_log.make_log(tmp_path_factory.mktemp("log") / "log.sqlite", 60)
    number = _first_picture(log)
    size = len(queries.picture(log, number).content)
    file = formats.Offline(log, frozenset({("image", 1)}), bytes_left=2 * size - 1)
    assert file.picture(number).startswith("data:image/")
    assert file.picture(number) == ""
    assert (file.left_out, file.bytes_left) == (1, size - 1)
    assert (file.link("image", 1), file.link("image", 2)) == ("#image-1", "")


def _first_picture(log: sqlite3.Connection) -> int:
    return int(log.execute("SELECT min(id) FROM pictures").fetchone()[0])
