"""The joint score of network and measurement."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from blobpipe.detection.score import features, fit_weights, score_candidates


def drawn(n: int, seed: int = 1) -> tuple[pd.DataFrame, np.ndarray]:
    """Candidates whose kind shows in all three numbers, in none for certain."""
    rng = np.random.default_rng(seed)
    is_blob = rng.random(n) < 0.4
    score = 1 / (1 + np.exp(-rng.normal(np.where(is_blob, 1.5, -1.5), 1.5)))
    snr = np.exp(rng.normal(np.where(is_blob, 2.5, 1.7), 0.5))
    misfit = np.exp(rng.normal(np.where(is_blob, 0.0, 0.4), 0.25))
    return pd.DataFrame(
        {"x_px": np.arange(float(n)), "score": score, "snr": snr, "misfit": misfit}
    ), is_blob


def area(score: np.ndarray, is_blob: np.ndarray) -> float:
    return float((score[is_blob][:, None] > score[~is_blob]).mean())


def test_together_they_know_more_than_the_network_alone() -> None:
    weights = fit_weights(*drawn(2000))
    found, is_blob = drawn(1000, seed=2)
    joint = score_candidates(found, weights)["score"].to_numpy()
    assert area(joint, is_blob) > area(found["score"].to_numpy(), is_blob) + 0.04
    for low, high in (
        (0.0, 0.2),
        (0.4, 0.6),
        (0.8, 1.0),
    ):  # a probability, at the rate of the candidates it was fitted to
        there = (joint >= low) & (joint < high)
        assert is_blob[there].mean() == pytest.approx(joint[there].mean(), abs=0.08)


def test_weights_have_five_decimals() -> None:
    weights = np.array(fit_weights(*drawn(2000)))
    assert (weights == np.round(weights, 5)).all()
    assert (weights != np.round(weights, 4)).any()


def test_a_good_fit_speaks_for_a_blob_and_a_bad_one_against() -> None:
    weights = fit_weights(*drawn(2000))
    alike = pd.DataFrame({"score": 0.5, "snr": 9.0, "misfit": [0.9, 1.3, 2.0, 3.0]})
    assert (np.diff(score_candidates(alike, weights)["score"]) < 0).all()


def test_without_weights_the_score_is_the_networks() -> None:
    found, is_blob = drawn(30)
    assert fit_weights(found[:25], is_blob[:25]) == ()
    assert fit_weights(found, np.zeros(30, bool)) == ()
    pd.testing.assert_frame_equal(score_candidates(found, ()), found)


def test_what_is_unknown_or_beyond_all_bounds_has_a_score() -> None:
    weights = fit_weights(*drawn(2000))
    odd = pd.DataFrame(
        {
            "score": [0.0, 1.0, 0.5, 0.5],
            "snr": [np.nan, np.inf, 0.0, 9.0],
            "misfit": [0.0, np.inf, 1, np.nan],
        }
    )
    scores = score_candidates(odd, weights)["score"]
    assert scores.between(0, 1).all()
    assert len(score_candidates(odd[:0], weights)) == 0


def test_the_weights_do_not_depend_on_the_order_of_columns_and_survive_a_file() -> None:
    found, is_blob = drawn(500)
    weights = fit_weights(found, is_blob)
    assert weights == fit_weights(found[["misfit", "snr", "x_px", "score"]], is_blob)
    assert len(weights) == 10
    assert all(weight == round(weight, 5) for weight in weights)


def test_features_are_logarithms_of_order_one_and_their_products() -> None:
    found = pd.DataFrame({"score": [0.9, 0.1], "snr": [np.e**3, np.e**2], "misfit": [1.0, np.e]})
    a = np.log(9) / 4
    b = -np.log(9) / 4
    expected = [[a, 1, 0, a * a, a, 0, 1, 0, 0], [b, 0, 3, b * b, 0, 3 * b, 0, 0, 9]]
    np.testing.assert_allclose(features(found), expected, atol=1e-12)


def test_beyond_the_bounds_nothing_more_is_learnt_and_what_is_unknown_is_least_like_a_blob() -> (
    None
):
    rows = [
        (1e-6, 3.0, 0.5),
        (1e-9, 2.0, 0.1),
        (1 - 1e-6, 40.0, 5.0),
        (1.0, 99.0, 9.0),
        (0.5, np.nan, np.nan),
    ]
    found = pd.DataFrame([*rows, (0.5, 3.0, 5.0)], columns=["score", "snr", "misfit"])
    seen = features(found)
    np.testing.assert_allclose(seen[[0, 2, 4]], seen[[1, 3, 5]])
    inside = pd.DataFrame({"score": [2e-6, 1 - 2e-6], "snr": [3.1, 39.0], "misfit": [0.51, 4.9]})
    assert (features(inside)[:, :3] != seen[[0, 2], :3]).all()


@pytest.mark.parametrize(
    ("blobs", "others", "enough"), [(20, 20, True), (19, 40, False), (40, 19, False)]
)
def test_twenty_of_each_kind_make_a_fit(blobs: int, others: int, enough: bool) -> None:
    found, _ = drawn(blobs + others)
    weights = fit_weights(found, np.arange(blobs + others) < blobs)
    assert len(weights) == (10 if enough else 0)


def test_the_score_is_the_logistic_function_of_the_weighted_features() -> None:
    found = pd.DataFrame({"x_px": 1.0, "score": [0.9], "snr": [np.e**2], "misfit": [1.0]})
    joint = [
        score_candidates(found, weights)["score"][0]
        for weights in ((0, 4.0, *np.zeros(8)), (1.0, *np.zeros(9)))
    ]
    assert joint == pytest.approx([0.9, np.e / (1 + np.e)])
