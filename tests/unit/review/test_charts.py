"""Small graphs: their ticks are round numbers and first days, and thinning loses no extreme."""

from __future__ import annotations

from datetime import datetime

import numpy as np
import pytest

from blobpipe.review import charts


def labels(low: float, high: float) -> list[str]:
    return [tick.label for tick in charts.value_ticks(charts.Scale(low, high, 0, 100))]


def test_ticks_are_round_numbers_within_the_range() -> None:
    assert labels(0, 10) == ["0", "2", "4", "6", "8", "10"]
    assert labels(0.0093, 0.0112) == ["0.0095", "0.0100", "0.0105", "0.0110"]
    assert labels(-2.2, 2.2) == ["\N{MINUS SIGN}2", "\N{MINUS SIGN}1", "0", "1", "2"]
    assert labels(11_000, 31_000) == ["15000", "20000", "25000", "30000"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        ("2009-06-18", "2021-03-01", ["2010", "2015", "2020"]),
        ("2020-01-10", "2020-12-20", ["2020-04", "2020-07", "2020-10"]),
        (
            "2020-02-27",
            "2020-03-02",
            ["2020-02-27", "2020-02-28", "2020-02-29", "2020-03-01", "2020-03-02"],
        ),
    ],
)
def test_dates_are_first_days(low: str, high: str, expected: list[str]) -> None:
    first, last = (
        (datetime.fromisoformat(f"{day}T00:00+00:00") - charts.EPOCH).days for day in (low, high)
    )
    assert [tick.label for tick in charts.date_ticks(charts.Scale(first, last, 0, 100))] == expected


def test_thinning_keeps_order_extremes_and_the_last_images() -> None:
    rng = np.random.default_rng(1)
    mjd = np.sort(rng.uniform(5e4, 6e4, 9_999))
    values = rng.standard_normal(9_999)
    groups = charts.thinned(mjd, values)
    assert len(groups) <= charts.MOST
    assert [group.mjd for group in groups] == sorted(group.mjd for group in groups)
    assert min(group.low for group in groups) == values.min()
    assert max(group.high for group in groups) == values.max()
    last = values[len(values) // 42 * 42 :] if len(values) % 42 else values[-42:]
    assert groups[-1].value == np.median(last)


def test_few_values_are_drawn_one_by_one() -> None:
    few = np.arange(charts.MOST, dtype=float)
    many = np.arange(charts.MOST + 1, dtype=float)
    drawn = charts.trend(few, few)
    thinned = charts.trend(many, many)
    assert drawn is not None
    assert thinned is not None
    assert (len(drawn.dots), drawn.line) == (charts.MOST, "")
    assert not thinned.dots
    assert thinned.line.startswith("M")
    assert charts.trend(few[:0], few[:0]) is None


def test_marks_lie_within_the_axes_and_upwards() -> None:
    samples = [charts.Sample(55_000 + k, k, k - 1, k + 1) for k in range(5)]
    drawn = charts.scatter(samples)
    assert drawn is not None
    x = [dot.x for dot in drawn.dots]
    y = [dot.y for dot in drawn.dots]
    assert x == sorted(x)
    assert y == sorted(y, reverse=True)
    assert all(charts.LEFT <= at <= charts.RIGHT for at in x)
    assert all(charts.TOP <= dot.top <= dot.y <= dot.bottom <= charts.BOTTOM for dot in drawn.dots)


def test_one_value_makes_a_graph() -> None:
    assert charts.scatter([charts.Sample(55_000, 0, 0, 0)]) is not None
    assert charts.trend(np.array([55_000.0]), np.array([0.01])) is not None
    assert charts.count([55_000.0], 55_000, 55_000) is not None


def test_a_count_steps_up_at_each_date() -> None:
    drawn = charts.count([2.0, 1.0, 5.0], 0, 10)
    assert drawn is not None
    assert drawn.line.count("V") == 3
    assert charts.count([], 0, 10) is None
    assert [tick.label for tick in drawn.y_ticks] == ["0", "1", "2", "3"]
    one = charts.count([2.0], 0, 10)
    assert one is not None
    assert [tick.label for tick in one.y_ticks] == ["0", "1"]


def test_a_mark_at_zero_is_above_the_axis() -> None:
    drawn = charts.scatter([charts.Sample(at, at, at, at) for at in (0.0, 1.0)], from_zero=True)
    assert drawn is not None
    assert charts.BOTTOM - drawn.dots[0].y >= 5
    assert drawn.y_ticks[0].label == "0.0"


def test_an_axis_of_zeros_has_no_ticks_below_zero() -> None:
    drawn = charts.scatter([charts.Sample(at, 0, 0, 0) for at in (0.0, 1.0)], from_zero=True)
    assert drawn is not None
    assert drawn.y_ticks[0].label == "0.0"
    assert charts.BOTTOM - drawn.dots[0].y >= 5


def test_dates_have_colours_from_the_first_to_the_last() -> None:
    classes = [charts.date_class(mjd, 0, 100) for mjd in (0, 19, 20, 55, 99, 100)]
    assert classes == [0, 0, 1, 2, 4, 4]
    assert charts.date_class(7, 7, 7) == charts.DATE_CLASSES - 1
