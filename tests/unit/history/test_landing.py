"""When a blob landed, by a history of depths, and what a history says if none did."""

from __future__ import annotations

import numpy as np
import pytest

from blobpipe.history.landing import COVERAGE, Landing, date_landing

N = 60
ERROR = 1e-3


class Place:
    """A place on the detector: dates, errors and a level, and what is seen there."""

    def __init__(self, seed: int, n: int = N) -> None:
        self.rng = np.random.default_rng(seed)
        self.mjd = 55_000 + np.cumsum(self.rng.gamma(2.0, 10.0, n))
        self.error = ERROR * self.rng.uniform(0.8, 1.2, n)
        self.depth = 3e-4 + self.rng.normal(0, self.error)

    def add(self, change: np.ndarray, snr: float) -> Place:
        self.depth = self.depth + snr * ERROR * change
        return self

    def land(self, first: int, snr: float, end: int | None = None) -> Place:
        index = np.arange(len(self.mjd))
        return self.add((index >= first) & (index < (end or len(self.mjd))), snr)

    def dated(self) -> Landing:
        return date_landing(self.mjd, self.depth, self.error)


@pytest.mark.parametrize(("snr", "most_off"), [(5.0, 0), (2.5, 2)])
def test_landings_are_dated_and_their_intervals_hold_them_as_often_as_they_say(
    snr: float, most_off: int
) -> None:
    rng = np.random.default_rng(7)
    off = []
    held = []
    for seed in range(120):
        place = Place(seed)
        first = int(rng.integers(20, 50))
        landed = rng.uniform(place.mjd[first - 1], place.mjd[first])
        found = place.land(first, snr).dated()
        off.append(abs(found.first - first))
        held.append(found.after_mjd <= landed <= found.before_mjd)
    assert np.median(off) <= most_off
    assert COVERAGE - 0.08 <= np.mean(held) <= COVERAGE + 0.08


def test_a_step_is_measured_with_its_error() -> None:
    heights = []
    for seed in range(60):
        found = Place(seed).land(30, 5.0).dated()
        heights.append((found.depth_frac - 5 * ERROR) / found.depth_err_frac)
    assert abs(np.mean(heights)) < 0.5
    assert 0.7 < np.std(heights) < 1.3


def test_noise_alone_is_hardly_ever_a_landing() -> None:
    verdicts = [Place(seed).dated().verdict for seed in range(100)]
    assert verdicts.count("nothing") >= 95
    assert verdicts.count("landed") <= 2


def test_what_comes_and_goes_has_not_landed() -> None:
    found = [Place(seed).land(20, 5.0, end=32).dated() for seed in range(20)]
    assert [each.verdict for each in found] == ["came_and_went"] * 20
    assert not any(each.is_persistent for each in found)


def test_what_drifts_has_not_landed() -> None:
    verdicts = [Place(seed).add(np.linspace(0, 1, N), 6.0).dated().verdict for seed in range(20)]
    assert verdicts.count("drift") >= 18


def test_what_flickers_has_not_landed() -> None:
    found = []
    for seed in range(30):
        place = Place(seed)
        odd = place.rng.random(N) < 0.15
        found.append(place.add(odd * place.rng.normal(0, 1, N), 20.0).dated())
    assert not any(each.is_persistent for each in found)


def test_a_streak_over_one_image_changes_nothing() -> None:
    streak = (np.arange(N) == 40).astype(float)
    assert Place(3).add(streak, 12.0).dated().verdict == "nothing"
    found = Place(3).land(25, 5.0).add(streak, -12.0).dated()
    assert (found.verdict, found.first) == ("landed", 25)


def test_one_image_is_not_persistent_and_two_are() -> None:
    assert not Place(2).land(N - 1, 12.0).dated().is_persistent
    assert Place(2).land(N - 2, 12.0).dated().is_persistent


def test_a_landing_in_a_gap_is_known_to_no_better_than_the_gap() -> None:
    place = Place(4)
    place.mjd[30:] += 200.0
    found = place.land(30, 8.0).dated()
    assert found.first == 30
    assert 0.85 * 200 < found.before_mjd - found.after_mjd < 1.1 * 200


def test_more_noise_than_the_errors_say_makes_no_landing() -> None:
    found = []
    for seed in range(40):
        place = Place(seed)
        place.error = place.error / 1.4
        found.append(place.dated())
    assert sum(each.is_persistent for each in found) <= 1


def test_too_short_a_history_is_refused() -> None:
    with pytest.raises(ValueError, match="3 images, expected at least 4"):
        date_landing(np.arange(3.0), np.zeros(3), np.ones(3))


def test_images_of_one_date_show_no_drift() -> None:
    depth = np.array([0.0, 0.001, -0.001, 0.0005, 0.0])
    found = date_landing(np.full(5, 56_000.0), depth, np.full(5, 0.001))
    assert found.verdict == "nothing"
    assert found.after_mjd == found.before_mjd == 56_000.0
