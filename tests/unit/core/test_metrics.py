"""Statistics: each number against its definition, and the laws it keeps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from blobpipe.core import metrics


@st.composite
def answers(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Labels with both classes, and scores with ties."""
    n = draw(st.integers(2, 40))
    labels = np.array([0, 1, *draw(st.lists(st.integers(0, 1), min_size=n - 2, max_size=n - 2))])
    scores = draw(arrays.arrays(np.float64, n, elements=st.integers(0, 8).map(lambda k: k / 8)))
    return labels, scores


@given(answers())
def test_area_is_the_chance_that_a_blob_outscores_a_background(
    case: tuple[np.ndarray, np.ndarray],
) -> None:
    labels, scores = case
    difference = scores[labels == 1][:, None] - scores[labels == 0]
    chance = np.mean((difference > 0) + 0.5 * (difference == 0))
    np.testing.assert_allclose(metrics.roc_auc(labels, scores), chance)
    fpr, tpr, _ = metrics.roc_curve(labels, scores)
    np.testing.assert_allclose(np.trapezoid(tpr, fpr), chance)


@given(answers())
def test_curves_do_not_depend_on_the_scale_of_the_scores(
    case: tuple[np.ndarray, np.ndarray],
) -> None:
    labels, scores = case
    for curve in (metrics.roc_curve, metrics.precision_recall_curve):
        for before, after in zip(
            curve(labels, scores)[:2], curve(labels, np.exp(3 * scores) - 7)[:2], strict=True
        ):
            np.testing.assert_array_equal(before, after)


@given(answers(), st.randoms(use_true_random=False))
def test_order_of_subframes_does_not_matter(
    case: tuple[np.ndarray, np.ndarray], random: object
) -> None:
    labels, scores = case
    order = np.random.default_rng(random.getrandbits(32)).permutation(len(labels))  # type: ignore[attr-defined]
    for measure in (metrics.roc_auc, metrics.average_precision):
        np.testing.assert_allclose(measure(labels, scores), measure(labels[order], scores[order]))


@given(answers())
def test_exchanging_the_classes_mirrors_the_area(case: tuple[np.ndarray, np.ndarray]) -> None:
    labels, scores = case
    np.testing.assert_allclose(
        metrics.roc_auc(labels, scores) + metrics.roc_auc(1 - labels, scores), 1
    )


@given(answers())
def test_curve_ends_and_rises(case: tuple[np.ndarray, np.ndarray]) -> None:
    fpr, tpr, threshold = metrics.roc_curve(*case)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert (np.diff(fpr) >= 0).all()
    assert (np.diff(tpr) >= 0).all()
    assert (np.diff(threshold) < 0).all()


@given(answers())
def test_points_of_the_curve_are_the_rates_at_the_thresholds(
    case: tuple[np.ndarray, np.ndarray],
) -> None:
    labels, scores = case
    for fpr, tpr, threshold in zip(*metrics.roc_curve(labels, scores), strict=True):
        positive = scores >= threshold
        assert fpr == pytest.approx(positive[labels == 0].mean())
        assert tpr == pytest.approx(positive[labels == 1].mean())


@given(answers())
def test_average_precision_of_a_perfect_ranking_is_one_and_of_any_at_least_its_floor(
    case: tuple[np.ndarray, np.ndarray],
) -> None:
    labels, scores = case
    assert metrics.average_precision(labels, labels + 0.1 * scores)[0] == pytest.approx(1)
    found = metrics.average_precision(labels, scores)[0]
    n = len(labels)
    k = labels.sum()
    # all backgrounds ranked above all blobs
    worst = np.mean([i / (n - k + i) for i in range(1, k + 1)])
    assert worst - 1e-9 <= found <= 1


def test_average_precision_of_one_score_for_all_is_the_share_of_blobs() -> None:
    assert metrics.average_precision(np.array([1, 0, 0, 1, 0]), np.full(5, 0.3))[
        0
    ] == pytest.approx(0.4)


@given(answers(), st.data())
def test_weights_count_like_repeated_subframes(
    case: tuple[np.ndarray, np.ndarray], data: st.DataObject
) -> None:
    labels, scores = case
    times = data.draw(arrays.arrays(np.int64, len(labels), elements=st.integers(1, 4)))
    hit = scores > 0.4
    weighted = metrics.measures(labels, scores, hit, times[None].astype(float), threshold=0.5)
    repeated = (np.repeat(values, times) for values in (labels, scores, hit))
    plain = metrics.measures(*repeated, np.ones((1, times.sum())), threshold=0.5)
    for key in metrics.KEYS:
        np.testing.assert_allclose(weighted[key], plain[key], err_msg=key)


def test_rates_by_hand() -> None:
    labels = np.array([1, 1, 1, 1, 0, 0, 0, 0])
    probability = np.array([0.9, 0.8, 0.5, 0.4, 0.6, 0.3, 0.2, 0.1])
    hit = np.array([1, 1, 0, 1, 1, 0, 0, 0], bool)
    found = metrics.measures(labels, probability, hit, np.ones((1, 8)), threshold=0.5)
    expected = {
        "tpr": 0.75,
        "tnr": 0.75,
        "fpr": 0.25,
        "fnr": 0.25,
        "roc_auc": 14 / 16,
        "tpr_at_fpr_0.01": 0.5,
    }
    for key, value in expected.items():
        assert found[key][0] == pytest.approx(value), key
    assert found["pointing_hit_rate"][0] == pytest.approx(2 / 3)
    assert found["brier"][0] == pytest.approx(np.mean((probability - labels) ** 2))
    assert found["average_precision"][0] == pytest.approx((1 + 1 + 3 / 4 + 4 / 5) / 4)


def test_a_class_without_members_gives_no_number_and_no_warning() -> None:
    found = metrics.measures(
        np.zeros(3, int),
        np.array([0.1, 0.2, 0.9]),
        np.zeros(3, bool),
        np.ones((1, 3)),
        threshold=0.5,
    )
    assert found["fpr"][0] == pytest.approx(1 / 3)
    for key in ("tpr", "roc_auc", "average_precision", "pointing_hit_rate"):
        assert np.isnan(found[key][0]), key


def test_bootstrap_covers_the_true_rate_and_is_repeatable() -> None:
    def mean(values: np.ndarray) -> metrics.Measures:
        return metrics.bootstrap(
            lambda weights: {"mean": weights @ values / weights.sum(axis=1)},
            len(values),
            300,
            np.random.default_rng(2),
        )

    rng = np.random.default_rng(1)
    intervals = [mean(rng.random(200))["mean"] for _ in range(100)]
    assert 88 <= sum(low <= 0.5 <= high for low, high in intervals) <= 100
    values = rng.random(50)
    assert mean(values) == mean(values)
    low, high = mean(rng.random(400))["mean"]
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(1 / 12 / 400), rel=0.2)


def test_wilson_interval_against_the_published_example() -> None:
    low, high = metrics.wilson_interval(np.array([81, 0, 5, 0]), np.array([263, 10, 5, 0]))
    # Newcombe 1998, method 3
    np.testing.assert_allclose([low[0], high[0]], [0.2553, 0.3662], atol=1e-4)
    assert low[1] == pytest.approx(0)
    assert 0 < high[1] < 0.3
    assert high[2] == pytest.approx(1)
    assert (low[3], high[3]) == pytest.approx((0, 1))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50), st.data())
def test_every_subframe_is_in_one_bin_of_the_reliability_table(
    values: list[float], data: st.DataObject
) -> None:
    probability = np.array(values)
    labels = data.draw(arrays.arrays(np.int64, len(values), elements=st.integers(0, 1)))
    table = metrics.reliability(labels, probability)
    assert table["n"].sum() == len(values)
    full = table[table["n"] > 0]
    assert (full["blob_frac"] * full["n"]).sum() == pytest.approx(labels.sum())
    assert (full["mean_probability"] * full["n"]).sum() == pytest.approx(probability.sum())
    assert (full["mean_probability"] >= full["probability_low"] - 1e-9).all()
    assert (full["mean_probability"] <= full["probability_high"] + 1e-9).all()
    assert (full["blob_frac_low"] <= full["blob_frac"] + 1e-9).all()
    assert (full["blob_frac"] <= full["blob_frac_high"] + 1e-9).all()


def test_bins_with_open_ends() -> None:
    table = metrics.share_by_bin(
        np.array([0.0, 4.9, 5.0, 99.0]), np.array([1, 0, 1, 1], bool), (0.0, 5.0, 7.0, np.inf)
    )
    assert list(table["n"]) == [2, 1, 1]
    assert list(table["share"]) == [0.5, 1, 1]
    assert np.isnan(table["high"].iloc[-1])
