"""The joint score of network, S/N, misfit and size."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from blobpipe.detection.score import (
    LOWEST_SNR,
    N_NOISE,
    N_STRUCTURE,
    N_WEIGHTS,
    fit_weights,
    noise_features,
    score_candidates,
    structure_features,
)


def drawn(n: int, seed: int = 1) -> tuple[pd.DataFrame, np.ndarray]:
    """Candidates whose kind shows in all six numbers, in none for certain."""
    rng = np.random.default_rng(seed)
    is_blob = rng.random(n) < 0.4
    score = 1 / (1 + np.exp(-rng.normal(np.where(is_blob, 1.5, -1.5), 1.5)))
    snr = np.exp(rng.normal(np.where(is_blob, 2.5, 1.7), 0.5))
    misfit = np.exp(rng.normal(np.where(is_blob, 0.0, 0.4), 0.25))
    ratio = np.exp(rng.normal(np.where(is_blob, 0.0, -0.5), 0.4))
    radius = np.exp(rng.normal(np.where(is_blob, 1.5, 0.7), 0.4))
    line = np.exp(rng.normal(np.where(is_blob, 0.0, 0.5), 0.5))
    found = {"score": score, "snr": snr, "misfit": misfit, "radius_ratio": ratio}
    found = {"x_px": np.arange(float(n)), **found, "radius_px": radius, "line_snr": line}
    columns = {"size_log_odds": 0.0, "is_blob": is_blob.astype(int)}
    return pd.DataFrame(found).assign(**columns), is_blob


def drawn_noise(n: int = 300, seed: int = 1, n_blobs: int | None = None) -> pd.DataFrame:
    """Candidates on images of noise and blobs, alike in all but the S/N."""
    found, is_blob = drawn(3 * n + 200, seed + 10)
    alike = found[is_blob]
    rng = np.random.default_rng(seed)
    noise = alike[:n].assign(snr=4.5 + rng.exponential(0.3, n), is_blob=0)
    blobs = alike.assign(snr=rng.uniform(4.5, 11.9, len(alike)))[:n_blobs]
    return pd.concat([noise, blobs], ignore_index=True)


def fitted(n: int) -> tuple[float, ...]:
    return fit_weights(drawn(n)[0], drawn_noise())


def alike(**columns: object) -> pd.DataFrame:
    """Candidates that differ in the given columns only."""
    usual = {"score": 0.5, "snr": 9.0, "misfit": 1.0, "radius_ratio": 1.0, "radius_px": 4.0}
    return pd.DataFrame({**usual, "line_snr": 1.0, "size_log_odds": 0.0, **columns})


def scores(found: pd.DataFrame, weights: tuple[float, ...]) -> np.ndarray:
    return score_candidates(found, weights)["score"].to_numpy()


def area(score: np.ndarray, is_blob: np.ndarray) -> float:
    return float((score[is_blob][:, None] > score[~is_blob]).mean())


def test_together_they_know_more_than_the_network_alone() -> None:
    weights = fitted(2000)
    found, is_blob = drawn(1000, seed=2)
    strong = found["snr"].to_numpy() >= LOWEST_SNR
    found, is_blob = found[strong], is_blob[strong]
    joint = scores(found, weights)
    assert area(joint, is_blob) > area(found["score"].to_numpy(), is_blob) + 0.04


def test_the_score_is_a_probability_at_even_odds_where_nothing_is_noise() -> None:
    """However many of the examples are blobs."""
    weights = np.array(fitted(4000))
    weights[N_STRUCTURE:] = [1e3, *np.zeros(N_NOISE - 1)]
    found, is_blob = drawn(4000, seed=2)
    clear = (found["snr"] >= LOWEST_SNR).to_numpy()
    found, is_blob = found[clear], is_blob[clear]
    joint = scores(found, tuple(weights))
    odds = is_blob.mean() / (1 - is_blob.mean())
    usual = odds * joint / (odds * joint + 1 - joint)
    for low, high in ((0.0, 0.3), (0.3, 0.7), (0.7, 1.0)):
        there = (usual >= low) & (usual < high)
        assert is_blob[there].mean() == pytest.approx(usual[there].mean(), abs=0.1)


def test_weights_have_five_decimals() -> None:
    weights = np.array(fitted(2000))
    assert (weights == np.round(weights, 5)).all()
    assert (weights != np.round(weights, 4)).any()


def test_a_good_fit_speaks_for_a_blob_and_a_bad_one_against() -> None:
    assert (np.diff(scores(alike(misfit=[0.9, 1.3, 2.0, 3.0]), fitted(2000))) < 0).all()


def test_a_signal_no_stronger_than_noise_is_no_blob_whatever_the_network_says() -> None:
    snrs = [9.0, 7.0, 6.0, 5.0, 4.0, np.nan]
    score = scores(alike(score=0.99, snr=snrs), fitted(2000))
    assert (np.diff(score[:5]) < 0).all()
    assert score[0] > 0.5
    assert (score[3:] < 0.5).all()


def test_half_of_the_expected_radius_speaks_against_a_blob_and_an_unknown_one_not() -> None:
    score = scores(alike(radius_ratio=[1.0, np.nan, 0.7, 0.5, 0.35]), fitted(4000))
    assert score[0] == score[1]
    assert (np.diff(score[1:]) < 0).all()


def test_what_the_law_of_sizes_says_counts_as_it_is() -> None:
    weights = (3.0, *np.zeros(N_STRUCTURE - 1), 1e3, *np.zeros(N_NOISE - 1))
    score = scores(alike(size_log_odds=[0.0, -2.0, -5.0]), weights)
    np.testing.assert_allclose(np.log(score / (1 - score)), [3, 1, -2])


def test_a_line_beyond_it_speaks_against_a_blob() -> None:
    assert (np.diff(scores(alike(line_snr=[1.0, 2.0, 4.0]), fitted(2000))) < 0).all()


def test_without_weights_the_score_is_the_networks() -> None:
    found, _ = drawn(60)
    assert fit_weights(found[:25], drawn_noise()) == ()
    assert fit_weights(found.assign(is_blob=0), drawn_noise()) == ()
    pd.testing.assert_frame_equal(score_candidates(found, ()), found)


def test_what_is_unknown_or_beyond_all_bounds_has_a_score() -> None:
    weights = fitted(2000)
    odd = alike(
        score=[0.0, 1.0, 0.5, 0.5],
        snr=[np.nan, np.inf, 0.0, 9.0],
        misfit=[0.0, np.inf, 1, np.nan],
        radius_ratio=[0.0, np.inf, 1, np.nan],
        radius_px=[0.0, np.inf, np.nan, 4],
        line_snr=[0.0, np.inf, 1, 2],
        size_log_odds=[-1e9, 0.0, -1.0, 0.0],
    )
    found = scores(odd, weights)
    assert ((found >= 0) & (found <= 1)).all()
    assert len(score_candidates(odd[:0], weights)) == 0


def test_the_weights_do_not_depend_on_the_order_of_columns_and_survive_a_file() -> None:
    found, _ = drawn(500)
    weights = fit_weights(found, drawn_noise())
    columns = ["line_snr", "misfit", "radius_px", "snr", "is_blob", "radius_ratio", "score"]
    assert weights == fit_weights(found[columns], drawn_noise())
    assert len(weights) == N_WEIGHTS == 84 + 3
    assert all(weight == round(weight, 5) for weight in weights)


def test_features_are_logarithms_of_order_one_and_their_products() -> None:
    found = pd.DataFrame(
        {
            "score": [0.9, 0.1],
            "snr": [np.e**3, np.e**2],
            "misfit": [1.0, np.e],
            "radius_ratio": [np.exp(-0.5), np.nan],
            "radius_px": [4 * np.exp(0.5), 4.0],
            "line_snr": [0.0, np.e],
        }
    )
    a = np.log(9) / 4
    first = [a, 1, 0, -1, 1, 0]
    second = [-a, 0, 3, 0, 0, 1]
    found_features = structure_features(found)
    np.testing.assert_allclose(found_features[:, :6], [first, second], atol=1e-12)

    # all products of two, then of three, each in this order
    pairs = [x * y for k, x in enumerate(first) for y in first[k:]]
    np.testing.assert_allclose(found_features[0, 6:27], pairs, atol=1e-12)
    a, snr, misfit, _, _, line = found_features[:, :6].T
    np.testing.assert_allclose(found_features[:, 27], a**3)
    np.testing.assert_allclose(found_features[:, -1], line**3)
    np.testing.assert_allclose(found_features[:, 34], a * snr * misfit)
    assert found_features.shape[1] == N_STRUCTURE - 1

    # Those of noise are the first, and the square of the S/N, up to ten
    of_noise = noise_features(found)
    np.testing.assert_array_equal(of_noise[:, 0], found_features[:, 0])
    np.testing.assert_allclose(of_noise[:, 1], [(100 - 30) / 20, (np.e**4 - 30) / 20])
    assert of_noise.shape[1] == N_NOISE - 1


def test_beyond_the_bounds_nothing_more_is_learnt() -> None:
    columns = ["score", "snr", "misfit", "radius_ratio", "radius_px", "line_snr"]
    at_bounds = pd.DataFrame(
        [(1e-6, 3, 0.5, 0.2, 1.2, 1), (1 - 1e-6, 40, 5, 3, 12, 20)], columns=columns
    )
    beyond = pd.DataFrame([(1e-9, 2, 0.1, 0.1, 0.5, 0), (1.0, 99, 9, 9, 30, 99)], columns=columns)
    inside = pd.DataFrame(
        [(2e-6, 3.1, 0.51, 0.21, 1.3, 1.1), (1 - 2e-6, 39, 4.9, 2.9, 11, 19)], columns=columns
    )
    np.testing.assert_allclose(structure_features(beyond), structure_features(at_bounds))
    assert (structure_features(inside)[:, :6] != structure_features(at_bounds)[:, :6]).all()


def test_an_unknown_fit_is_least_like_a_blobs() -> None:
    columns = ["score", "snr", "misfit", "radius_ratio", "radius_px", "line_snr"]
    unknown = pd.DataFrame([(0.5, np.nan, np.nan, 1.0, np.nan, 1.0)], columns=columns)
    least = pd.DataFrame([(0.5, 3.0, 5.0, 1.0, 1.2, 1.0)], columns=columns)
    np.testing.assert_allclose(structure_features(unknown), structure_features(least))


@pytest.mark.parametrize(
    ("blobs", "structure", "noise", "faint", "enough"),
    [
        (20, 20, 20, 20, True),
        (19, 40, 40, 40, False),
        (40, 19, 40, 40, False),
        (40, 40, 19, 40, False),
        (40, 40, 40, 19, False),
    ],
)
def test_twenty_of_each_kind_make_a_fit(
    blobs: int, structure: int, noise: int, faint: int, enough: bool
) -> None:
    is_blob = np.arange(blobs + structure) < blobs
    found = drawn(blobs + structure)[0].assign(snr=8.0, is_blob=is_blob.astype(int))
    weights = fit_weights(found, drawn_noise(noise, n_blobs=faint))
    assert len(weights) == (N_WEIGHTS if enough else 0)


def test_the_score_says_that_a_candidate_is_neither_noise_nor_structure() -> None:
    rest = np.zeros(N_STRUCTURE - 2)
    no_noise = (50.0, *np.zeros(N_NOISE - 1))
    no_structure = (50.0, *np.zeros(N_STRUCTURE - 1))
    found = alike(score=[0.9], snr=[np.e**2])
    assert scores(found, (0.0, 4.0, *rest, *no_noise))[0] == pytest.approx(0.9)
    assert scores(found, (1.0, 0.0, *rest, *no_noise))[0] == pytest.approx(np.e / (1 + np.e))
    noise = (2.0, *np.zeros(N_NOISE - 1))
    assert scores(found, (*no_structure, *noise))[0] == pytest.approx(1 / (1 + np.exp(-2)))
    both = scores(found, (1.0, 0.0, *rest, *noise))[0]
    assert both == pytest.approx(1 / (1 + np.exp(-1) + np.exp(-2)))


def test_strong_evidence_keeps_its_order_and_no_score_is_certain() -> None:
    found = alike(score=[0.9, 1 - 1e-4, 1 - 1e-6, 0.1, 1e-6], snr=np.e**2)
    no_noise = (1e3, *np.zeros(N_NOISE - 1))
    score = scores(found, (0.0, 400.0, *np.zeros(N_STRUCTURE - 2), *no_noise))
    assert ((score > 0) & (score < 1)).all()
    assert (score[:3] > 0.999).all()
    assert (np.diff(score[:3]) > 0).all()
    assert score[4] < score[3] < 0.001


def test_a_small_one_is_judged_by_its_radius_beside_the_ratio() -> None:
    """Where blobs are small, a usual ratio is no sure sign: clusters are as small."""
    rng = np.random.default_rng(5)
    found, _ = drawn(3000)
    found["radius_ratio"] = np.exp(rng.normal(0, 0.2, len(found)))
    weights = fit_weights(found, drawn_noise())
    assert (np.diff(scores(alike(radius_px=[2.0, 3.0, 4.5]), weights)) > 0).all()


FIT = """
import numpy as np
from blobpipe.detection.score import fit_logistic
rng = np.random.default_rng(1)
features = rng.normal(size=(9000, 83))
labels = (rng.random(9000) < 0.4).astype(int)
print(fit_logistic(features, labels).tobytes().hex())
"""


def test_weights_do_not_depend_on_the_number_of_cores() -> None:
    """The sums of a matrix product do: Snakemake gives a process one core, a shell all."""
    weights = {
        subprocess.run(
            [sys.executable, "-c", FIT],
            env={**os.environ, "OPENBLAS_NUM_THREADS": n_cores, "MKL_NUM_THREADS": n_cores},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for n_cores in ("1", "2")
    }
    assert len(weights) == 1
