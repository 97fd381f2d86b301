"""Thresholds on a team's own images: the promise is kept, it never loosens with more images, and its file is checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import poisson

from blobpipe.core import files
from blobpipe.detection.detectors import load_dense_detector
from blobpipe.detection.operating_point import CANDIDATE
from blobpipe.detection.promise import (
    PromisedPoint,
    apply_promised_point,
    images_needed,
    measure_dispersion,
    most_alarms,
    promise_threshold,
    read_promised_point,
    upper_limit,
    write_promised_point,
)
from blobpipe.errors import BlobpipeError, ModelError, ParamsError, TableError

POINT = PromisedPoint(
    threshold=0.93,
    false_alarms_per_100_images=11.52,
    budget_per_100_images=5.0,
    confidence=0.9,
    n_images=20,
    n_alarms=0,
    dispersion=1.0,
    model_sha256="a" * 64,
    bad_pixels_sha256="",
    subtracted="running stack",
    first_date="2012-07-01",
    last_date="2012-07-25",
    version="0.1.0",
)

N_REPEATS = 2000

# Mean number of false peaks per image; few enough for a quick test
PER_IMAGE = 3.0

# Exponent by which most scores are low, as those of false peaks are
STEEP = 0.2

Draw = Callable[[np.random.Generator], np.ndarray]


def independent(rng: np.random.Generator) -> np.ndarray:
    """False peaks of an image, independent of each other."""
    return rng.random(rng.poisson(PER_IMAGE)) ** STEEP


def in_groups(size: int) -> Draw:
    """False peaks that come in groups of about the same score."""

    def draw(rng: np.random.Generator) -> np.ndarray:
        scores = np.repeat(rng.random(rng.poisson(PER_IMAGE / size)), size) ** STEEP
        return np.clip(scores + 1e-9 * rng.random(len(scores)), 0, 1 - 1e-9)

    return draw


def of_nights(rng: np.random.Generator) -> np.ndarray:
    """False peaks whose number follows the noise of the night."""
    return rng.random(rng.poisson(PER_IMAGE * rng.gamma(0.5, 2.0))) ** STEEP


def above(threshold: float) -> float:
    """True expected number of false peaks of an image above a threshold."""
    return PER_IMAGE * (1 - threshold ** (1 / STEEP))


# --- the promise is kept ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draw", "n_images", "confidence"),
    [
        (independent, 20, 0.9),
        (independent, 60, 0.8),
        (independent, 150, 0.9),
        (in_groups(3), 40, 0.9),
        (in_groups(3), 100, 0.8),
        (of_nights, 60, 0.9),
    ],
    ids=["20", "60", "150", "groups 40", "groups 100", "nights"],
)
def test_the_promise_is_kept_in_the_stated_share_of_repetitions(
    draw: Draw, n_images: int, confidence: float
) -> None:
    rng = np.random.default_rng([n_images, 17])
    kept = 0
    for _ in range(N_REPEATS):
        scores = [draw(rng) for _ in range(n_images)]
        promise = promise_threshold(scores, 0.05, confidence)
        kept += above(promise.threshold) <= promise.per_image
    # Two standard errors of the share itself
    allowed = 2 * math.sqrt(confidence * (1 - confidence) / N_REPEATS)
    assert kept / N_REPEATS >= confidence - allowed


def test_without_groups_little_is_given_away() -> None:
    rng = np.random.default_rng(5)
    dispersions = [measure_dispersion([independent(rng) for _ in range(60)]) for _ in range(300)]
    assert np.mean(np.array(dispersions) == 1) > 0.9
    grouped = in_groups(3)
    dispersions = [measure_dispersion([grouped(rng) for _ in range(100)]) for _ in range(100)]
    assert 2.5 < np.median(dispersions) < 5


# --- the limit -------------------------------------------------------------------------------------------------------


def test_limits_of_the_literature() -> None:
    # Gehrels 1986, table 1: upper limits at 0.95 after 0, 1 and 10 events
    for k, limit in ((0, 2.996), (1, 4.744), (10, 16.96)):
        assert upper_limit(k, 1, 0.95) == pytest.approx(limit, abs=0.005)
        assert poisson.cdf(k, upper_limit(k, 1, 0.95)) == pytest.approx(0.05)
    assert upper_limit(6, 10, 0.9, 3.0) == pytest.approx(3 * upper_limit(2, 10, 0.9))


@pytest.mark.parametrize(("budget", "confidence", "n"), [(0.05, 0.9, 47), (0.02, 0.9, 116)])
def test_so_many_images_are_needed(budget: float, confidence: float, n: int) -> None:
    assert images_needed(budget, confidence) == n
    assert most_alarms(budget, n, confidence) == 0
    assert most_alarms(budget, n - 1, confidence) == -1


# --- the threshold ---------------------------------------------------------------------------------------------------


def one_each(scores: Sequence[float], n_images: int) -> list[np.ndarray]:
    """One false peak on each of the first images, none on the others."""
    return [np.array([scores[i]]) if i < len(scores) else np.zeros(0) for i in range(n_images)]


def test_it_lies_just_above_the_first_peak_that_is_too_many() -> None:
    scores = one_each([0.5, 0.9, 0.7, 0.8], 100)
    # 100 images allow one alarm: the limit is 3.89 after one, 5.32 after two
    promise = promise_threshold(scores, 0.05, 0.9)
    assert promise.threshold == pytest.approx(0.800001, abs=1e-9)
    assert promise == (promise.threshold, pytest.approx(0.0389, abs=1e-4), 1, 1.0)


def test_too_few_images_exclude_all_false_peaks_and_say_what_is_promised() -> None:
    promise = promise_threshold(one_each([0.5, 0.9], 20), 0.05, 0.9)
    assert promise.threshold == pytest.approx(0.900001, abs=1e-9)
    assert promise.per_image == pytest.approx(0.1151, abs=1e-4)
    assert POINT.shortfall() == (
        "20 images promise at most 11.52 false alarms per 100 with confidence 0.9; 47 are needed for 5"
    )
    assert replace(POINT, false_alarms_per_100_images=4.9).shortfall() == ""


def test_no_false_peak_lies_at_the_threshold_itself() -> None:
    for score in np.round(np.random.default_rng(3).uniform(0.05, 0.999999, 2000), 6):
        threshold = promise_threshold([np.array([score])], 0.05, 0.9).threshold
        assert score < threshold <= score + 2.1e-6


def test_where_hardly_anything_is_seen_every_candidate_is_a_detection() -> None:
    assert promise_threshold(one_each([0.9], 100), 0.05, 0.9).threshold == CANDIDATE
    # Peaks that are no candidates count for nothing
    assert promise_threshold(one_each([0.9, 0.04], 100), 0.05, 0.9).threshold == CANDIDATE


def test_no_images_and_perfect_false_peaks_are_refused() -> None:
    with pytest.raises(TableError, match="found no quiet image"):
        promise_threshold([], 0.05, 0.9)
    with pytest.raises(TableError, match="false peaks of the score 1"):
        promise_threshold([np.ones(1)] * 5, 0.05, 0.9)
    assert promise_threshold([np.full(1, 1 - 1e-9)] * 5, 0.05, 0.9).threshold == 1.0


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_point_is_read_as_it_was_written_and_its_bytes_are_its_own(tmp_path: Path) -> None:
    masked = replace(POINT, bad_pixels_sha256=f"{'b' * 64} {'c' * 64}", first_date="", last_date="")
    for point in (POINT, masked, replace(POINT, subtracted="d" * 64)):
        write_promised_point(tmp_path / "a.yaml", point)
        write_promised_point(tmp_path / "b.yaml", point)
        assert read_promised_point(tmp_path / "a.yaml") == point
        assert (tmp_path / "a.yaml").read_bytes() == (tmp_path / "b.yaml").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.yaml", "b.yaml"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "threshold: 0.93",
            "threshold: 1.5",
            "threshold: found '1.5', expected a number from 0.05 to 1",
        ),
        ("threshold: 0.93", "threshold: .nan", "threshold: found 'nan'"),
        ("threshold: 0.93", "threshold: true", "threshold: found 'True'"),
        (
            "confidence: 0.9",
            "confidence: 1.0",
            "confidence: found '1.0', expected a number from 0.5",
        ),
        ("n_images: 20", "n_images: 0", "n_images: found '0', expected a count from 1"),
        ("n_alarms: 0\n", "", "n_alarms is missing"),
        ("n_alarms: 0\n", "n_alarms: 0\nmore: 1\n", "found 'more', expected the keys"),
        ("a" * 64, "a" * 63, "model_sha256: found"),
        ("running stack", "a guess", "subtracted: found 'a guess'"),
        ("2012-07-01", "July", "first_date: found 'July'"),
        ("threshold: 0.93", "threshold: [", "cannot be read as YAML"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = tmp_path / "point.yaml"
    write_promised_point(path, POINT)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ParamsError) as refused:
        read_promised_point(path)
    assert message in str(refused.value)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", ["", "- 1\n", "text"])
def test_a_file_that_is_no_point_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "point.yaml").write_text(content)
    with pytest.raises(ParamsError, match="found no operating point"):
        read_promised_point(tmp_path / "point.yaml")
    with pytest.raises(BlobpipeError, match=r"absent\.yaml"):
        read_promised_point(tmp_path / "absent.yaml")


def test_it_replaces_the_threshold_of_its_own_model_alone(
    tmp_path: Path, dense_model: Path
) -> None:
    path = tmp_path / "point.yaml"
    detector = load_dense_detector(dense_model)
    write_promised_point(path, replace(POINT, model_sha256=files.sha256(dense_model)))
    changed, point = apply_promised_point(detector, dense_model, path)
    assert changed.threshold == point.threshold == 0.93
    assert changed.point == detector.point._replace(threshold=0.93)
    write_promised_point(path, POINT)
    with pytest.raises(
        ModelError, match=r"the operating point of the model aaaaaaaaaaaa, expected"
    ):
        apply_promised_point(detector, dense_model, path)
