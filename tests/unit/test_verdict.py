"""The joint score of network and measurement."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from blobpipe import verdict


def drawn(n: int, seed: int = 1) -> tuple[pd.DataFrame, np.ndarray]:
    """Candidates whose kind shows in all three numbers, in none for certain."""
    rng = np.random.default_rng(seed)
    is_blob = rng.random(n) < 0.4
    score = 1 / (1 + np.exp(-rng.normal(np.where(is_blob, 1.5, -1.5), 1.5)))
    snr = np.exp(rng.normal(np.where(is_blob, 2.5, 1.7), 0.5))
    misfit = np.exp(rng.normal(np.where(is_blob, 0.0, 0.4), 0.25))
    return pd.DataFrame({"x_px": np.arange(float(n)), "score": score, "snr": snr, "misfit": misfit}), is_blob


def area(score: np.ndarray, is_blob: np.ndarray) -> float:
    return float((score[is_blob][:, None] > score[~is_blob]).mean())


def test_together_they_know_more_than_the_network_alone() -> None:
    weights = verdict.fit(*drawn(2000))
    found, is_blob = drawn(1000, seed=2)
    joint = verdict.score(found, weights)["score"].to_numpy()
    assert area(joint, is_blob) > area(found["score"].to_numpy(), is_blob) + 0.04
    for low, high in (
        (0.0, 0.2),
        (0.4, 0.6),
        (0.8, 1.0),
    ):  # a probability, at the rate of the candidates it was fitted to
        there = (joint >= low) & (joint < high)
        assert is_blob[there].mean() == pytest.approx(joint[there].mean(), abs=0.08)


def test_a_good_fit_speaks_for_a_blob_and_a_bad_one_against() -> None:
    weights = verdict.fit(*drawn(2000))
    alike = pd.DataFrame({"score": 0.5, "snr": 9.0, "misfit": [0.9, 1.3, 2.0, 3.0]})
    assert (np.diff(verdict.score(alike, weights)["score"]) < 0).all()


def test_without_weights_the_score_is_the_networks() -> None:
    found, is_blob = drawn(30)
    assert verdict.fit(found[:25], is_blob[:25]) == ()
    assert verdict.fit(found, np.zeros(30, bool)) == ()
    pd.testing.assert_frame_equal(verdict.score(found, ()), found.drop(columns="misfit"))


def test_what_is_unknown_or_beyond_all_bounds_has_a_score() -> None:
    weights = verdict.fit(*drawn(2000))
    odd = pd.DataFrame(
        {"score": [0.0, 1.0, 0.5, 0.5], "snr": [np.nan, np.inf, 0.0, 9.0], "misfit": [0.0, np.inf, 1, np.nan]}
    )
    scores = verdict.score(odd, weights)["score"]
    assert scores.between(0, 1).all()
    assert len(verdict.score(odd[:0], weights)) == 0


def test_the_weights_do_not_depend_on_the_order_of_columns_and_survive_a_file() -> None:
    found, is_blob = drawn(500)
    weights = verdict.fit(found, is_blob)
    assert weights == verdict.fit(found[["misfit", "snr", "x_px", "score"]], is_blob)
    assert len(weights) == 10
    assert all(weight == round(weight, 5) for weight in weights)
