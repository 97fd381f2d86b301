"""The law of the blobs' radii: found where there is one, and not taken from what shows none."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from blobpipe.detection.size_law import SizeLaw, choose_size_law, fit_size_law

SHAPE = (1024, 1024)
WFC3_IR = SizeLaw(9.2, -0.0033, -0.0035, scatter=0.17)
OTHER = SizeLaw(3.0, 4e-3, 1e-3, 0.15)


def catalogue(n: int, law: SizeLaw = OTHER, seed: int = 1) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(0, 1024, (2, n))
    radius = law.radius(x, y) * np.exp(rng.normal(0, law.scatter, n))
    return pd.DataFrame({"x_px": x, "y_px": y, "radius_px": radius})


@pytest.mark.parametrize("outliers", [0, 20])
def test_a_catalogue_gives_its_own_law(outliers: int) -> None:
    blobs = catalogue(150)
    blobs.loc[blobs.index < outliers, "radius_px"] = 20.0
    law = fit_size_law(blobs, SHAPE)
    assert law is not None
    x, y = np.random.default_rng(2).uniform(0, 1024, (2, 500))
    np.testing.assert_allclose(law.radius(x, y), OTHER.radius(x, y), rtol=0.12)
    assert law.scatter == pytest.approx(0.15, rel=0.35)


def test_without_enough_blobs_the_law_is_the_instruments_on_a_full_frame() -> None:
    assert choose_size_law(catalogue(20), SHAPE) == WFC3_IR
    assert choose_size_law(None, SHAPE) == WFC3_IR
    assert choose_size_law(None, (1014, 1014)) == WFC3_IR
    assert choose_size_law(None, (256, 256)) is None


def test_radii_of_flagged_discs_and_radii_without_a_law_give_none() -> None:
    flagged = catalogue(100).assign(radius_px=7.5)
    assert fit_size_law(flagged, SHAPE) is None
    rng = np.random.default_rng(3)
    scattered = catalogue(100).assign(radius_px=np.exp(rng.uniform(0, 3, 100)))
    assert fit_size_law(scattered, SHAPE) is None


def test_blobs_on_one_line_and_radii_that_would_turn_negative_give_none() -> None:
    line = catalogue(100).assign(y_px=500.0)
    assert fit_size_law(line, SHAPE) is None
    steep = catalogue(200, SizeLaw(9.0, -8e-3, -8e-3, 0.1))
    near = steep[steep["x_px"] + steep["y_px"] < 900]
    assert fit_size_law(near, SHAPE) is None


def test_missing_and_impossible_radii_do_not_count() -> None:
    blobs = catalogue(150)
    odd = pd.DataFrame({"x_px": 10.0, "y_px": 10.0, "radius_px": [np.nan, np.inf, 0.0, -3.0]})
    assert fit_size_law(pd.concat([blobs, odd]), SHAPE) == fit_size_law(blobs, SHAPE)


def test_the_instruments_law_is_that_of_its_blobs() -> None:
    assert WFC3_IR.radius(np.array([0.0, 1000.0]), np.array([0.0, 1000.0])) == pytest.approx(
        [9.2, 2.4]
    )


def test_an_unusual_size_speaks_against_a_blob_as_far_as_it_is_known() -> None:
    ratio = np.array([1.0, 0.8, 0.55, 0.55, 0.55, np.nan, 0.0, 0.5])
    error = np.array([0.03, 0.03, 0.03, 0.2, 0.5, 0.1, 0.1, np.nan])
    usual, near, known, vague, unknown, none, zero, failed = WFC3_IR.log_odds(ratio, error)
    assert usual == near == none == failed == 0
    assert known < vague < unknown == 0
    assert zero < -100
    # Normal density of the logarithm over a flat one from a fifth to three times
    sigma = np.hypot(0.17, 0.03)
    density = np.exp(-((np.log(0.55) / sigma) ** 2) / 2) / np.sqrt(2 * np.pi) / sigma
    assert known == pytest.approx(np.log(density * np.log(15)))


def test_sizes_are_not_judged_by_less_than_what_real_blobs_scatter() -> None:
    ratio, error = np.array([0.7, 1.5]), np.full(2, 0.05)
    strict = WFC3_IR._replace(scatter=0.06).log_odds(ratio, error)
    np.testing.assert_array_equal(strict, WFC3_IR.log_odds(ratio, error))
    wide = WFC3_IR._replace(scatter=0.3).log_odds(np.array([0.4]), np.array([0.05]))
    assert wide[0] > WFC3_IR.log_odds(np.array([0.4]), np.array([0.05]))[0]
