"""Detections: places, sizes and depths with honest errors, and what is no new blob."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from tests.unit.detection.blobs import NOISE, SIDE, blob, depth_of, measured, noise

from blobpipe.core.blob_shapes import SHAPES, Shape, blob_profile
from blobpipe.core.cutouts import distance_from
from blobpipe.detection.fit import (
    ANYWHERE,
    CUT_HALF,
    CUT_SIDE,
    DETECTION_COLUMNS,
    Cut,
    Model,
    Usual,
    _averaged,
    _cut,
    _limits,
    _model,
    _normal,
    _reduced_chi2,
    _solve,
    _starts,
    _table,
    _unfitted,
    _without_outliers,
    fit_blobs,
)
from blobpipe.detection.match import mark_seen_again
from blobpipe.detection.size_law import SizeLaw
from blobpipe.noise.whiten import WHITE


def population(shape: Shape, snr: float, n: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """True x, y, radius, depth of blobs of the detector's sizes, and the table of what is measured of them."""
    rng = np.random.default_rng(len(shape))
    truth = []
    found = []
    for _ in range(n):
        x, y = rng.uniform(30, 34, 2)
        radius = float(np.clip(rng.normal(5.7, 1.4), 2.5, 10))
        depth = depth_of(snr, radius, shape)
        image = rng.normal(0, NOISE, (64, 64)).astype(np.float32) + blob(
            x, y, radius, depth, shape, 64
        )
        truth.append((x, y, radius, depth))
        found.append(measured(image, (x + rng.uniform(-3, 3), y + rng.uniform(-3, 3))))
    return np.array(truth), pd.concat(found, ignore_index=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("snr", "bias", "place_px"), [(7, 0.10, 0.9), (10, 0.07, 0.7), (20, 0.03, 0.35)]
)
def test_depth_place_and_radius_with_honest_errors(
    shape: Shape, snr: float, bias: float, place_px: float
) -> None:
    """The standard error of the mean depth is 2 % at S/N 7; the best that any unbiased fit can do there is 0.6 px."""
    (x, y, radius, depth) = (part := population(shape, snr))[0].T
    table = part[1]
    assert abs(np.mean(table["depth_frac"] / depth) - 1) < bias
    assert 0.8 < np.std((table["depth_frac"] - depth) / table["depth_err_frac"]) < 1.3
    assert np.median(np.hypot(table["x_px"] - x, table["y_px"] - y)) < place_px
    for name, true in (("x", x), ("y", y), ("radius", radius)):
        within = np.mean(np.abs(table[f"{name}_px"] - true) < table[f"{name}_err_px"])
        assert 0.7 < within / 0.683 < 1.3, name
    assert np.median(table["radius_px"] / radius) == pytest.approx(1, abs=0.1)
    assert np.median(table["snr"]) == pytest.approx(snr, rel=0.07)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_noise_the_truth_comes_out(shape: Shape) -> None:
    image = blob(70.3, 80.6, 6.3, 0.1, shape)
    [row] = fit_blobs(image, [72], [79], [0.9], 0.0005).to_dict("records")
    assert row["x_px"] == pytest.approx(70.3, abs=0.01)
    assert row["y_px"] == pytest.approx(80.6, abs=0.01)
    assert row["radius_px"] == pytest.approx(6.3, rel=0.005)
    assert row["depth_frac"] == pytest.approx(0.1, rel=0.005)
    assert row["loss_frac_px2"] == pytest.approx(image.sum(), rel=0.01)
    assert (row["score"], row["status"]) == (0.9, "")


@pytest.mark.parametrize(("x", "y"), [(75, 80), (80, 80), (83, 86)])
def test_a_hot_pixel_does_not_pull_the_fit(x: int, y: int) -> None:
    image = noise() + blob(80, 80, 5.5, 0.06)
    hot = image.copy()
    hot[y, x] += 0.9
    before, after = (measured(i, (81, 79)).iloc[0] for i in (image, hot))
    assert np.hypot(after["x_px"] - before["x_px"], after["y_px"] - before["y_px"]) < 0.15
    assert after["depth_frac"] == pytest.approx(before["depth_frac"], rel=0.05)


@pytest.mark.parametrize("border", [0, 5])
def test_a_blob_that_the_edge_cuts(border: int) -> None:
    image = noise() + blob(border + 2.0, 80, 6, 0.1)
    if border:
        image[:border] = image[-border:] = np.nan
        image[:, :border] = image[:, -border:] = np.nan
    [row] = measured(image, (border + 4, 81)).to_dict("records")
    assert row["x_px"] == pytest.approx(border + 2, abs=1.5)
    assert row["y_px"] == pytest.approx(80, abs=0.6)
    assert abs(row["depth_frac"] - 0.1) < 3 * row["depth_err_frac"]


def test_a_neighbour_does_not_count() -> None:
    alone, pair = (noise() + blob(70, 80, 6, 0.06) + other for other in (0, blob(92, 80, 6, 0.2)))
    before = measured(alone, (70, 80)).iloc[0]
    after = measured(pair, (70, 80), (92, 80)).iloc[0]
    assert after["depth_frac"] == pytest.approx(before["depth_frac"], rel=0.15)
    assert after["x_px"] == pytest.approx(before["x_px"], abs=0.5)


@pytest.mark.parametrize("snr", [8, 20, 60])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_blob_is_fitted_down_to_the_noise_and_a_cluster_is_not(shape: Shape, snr: float) -> None:
    misfits = [
        measured(noise(seed) + blob(80.3, 90.1, 4.5, depth_of(snr, 4.5, shape), shape), (80, 90))[
            "misfit"
        ][0]
        for seed in range(9)
    ]
    assert 0.8 < np.median(misfits) < 1.2
    assert max(misfits) < 1.6
    ragged = np.where(np.random.default_rng(3).random((7, 7)) < 0.6, 0.1, 0.0).astype(np.float32)
    cluster = noise()
    cluster[87:94, 77:84] += ragged
    assert measured(cluster, (80, 90))["misfit"][0] > 2


def test_a_fit_does_not_depend_on_the_company() -> None:
    places = [(x, y) for x in range(24, 150, 36) for y in range(24, 150, 36)]
    image = noise() + sum(blob(x, y, 3 + k % 4, 0.02 + 0.01 * k) for k, (x, y) in enumerate(places))
    together = measured(image, *places)
    # they share pixels
    near = [place for place in places if np.hypot(*np.subtract(place, places[5])) < 3 * CUT_HALF]
    few = measured(image, *near)
    assert len(few) < len(together)
    columns = list(DETECTION_COLUMNS[:10])
    of_few = few[columns].to_numpy()[near.index(places[5])]
    of_all = together[columns].to_numpy()[5]
    np.testing.assert_array_equal(of_few, of_all)


def test_noise_is_estimated_if_not_given() -> None:
    image = noise() + blob(80, 80, 5, 0.06)
    given, estimated = (fit_blobs(image, [80], [80], [1], sigma) for sigma in (NOISE, None))
    assert estimated["snr"][0] == pytest.approx(given["snr"][0], rel=0.05)


def test_what_cannot_be_fitted_has_no_errors() -> None:
    """No pixels, no noise to compare with, a peak off the image, or a hole instead of a blob."""
    empty = np.full((64, 64), np.nan, np.float32)
    assert measured(empty, (30, 30)).iloc[0, 2:10].isna().all()
    assert fit_blobs(empty, [30], [30], [1]).iloc[0, 2:10].isna().all()
    assert fit_blobs(np.zeros((64, 64), np.float32), [30], [30], [1]).iloc[0, 2:10].isna().all()
    assert measured(noise(), (-100, 500)).iloc[0, 2:10].isna().all()
    assert measured(noise(), (np.nan, 30)).iloc[0, 2:10].isna().all()
    hole = measured(noise() - blob(80, 80, 12, 0.3), (80, 80)).iloc[0]
    assert np.isfinite(hole[["x_px", "y_px", "radius_px", "depth_frac", "snr"]].astype(float)).all()


def test_no_peaks_give_a_table_without_rows() -> None:
    table = measured(noise())
    assert tuple(table.columns) == (*DETECTION_COLUMNS, "misfit")
    assert [str(kind) for kind in table.dtypes[:11]] == ["float64"] * 11
    assert table.dtypes.equals(measured(noise(), (80, 80)).dtypes)
    assert len(mark_seen_again(table, table)) == 0


PLACE = (14.3, 18.8, 5.1, 7.0, 0.4)  # x, y, radius, depth, background on a cut-out


def modelled(
    shape: int, parameters: tuple[float, ...], values: np.ndarray, good: np.ndarray
) -> tuple[float, ...]:
    """Chi square, residual and slopes of `fit._model`."""
    residual = np.empty_like(values)
    slopes = np.empty((5, len(values)), np.float32)
    chi2 = _model(values, good, _table(), shape, np.array(parameters), ANYWHERE, residual, slopes)
    return chi2, residual, slopes


def a_cut(seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Values of a cut-out, 0 where it is not good, and where it is."""
    rng = np.random.default_rng(seed)
    good = (rng.random(CUT_SIDE**2) < 0.95).astype(np.float32)
    return good * rng.normal(0, 1, good.shape).astype(np.float32), good


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_the_model_is_the_profile_at_its_depth_above_the_background(shape: int) -> None:
    values, good = a_cut()
    chi2, residual, _ = modelled(shape, PLACE, values, good)
    x, y, radius, depth, background = PLACE
    profile = blob_profile(SHAPES[shape], radius, x - CUT_HALF, y - CUT_HALF, CUT_SIDE)
    expected = values - good * (depth * profile.ravel() + background)
    np.testing.assert_allclose(residual, expected, atol=0.006 * depth)
    prior = ((radius - 5.7) / 2.5) ** 2 - 2 * np.log((0.35, 0.45, 0.2)[shape])
    assert chi2 == pytest.approx(np.square(residual, dtype=float).sum() + prior, rel=1e-5)


@pytest.mark.parametrize("radius", [0.7, 0.95, 1.2, 6.7, 12.45, 12.7])
def test_the_model_is_the_profile_for_every_radius_of_the_table(radius: float) -> None:
    """At its ends, between and on its nodes: without noise, what is left is nothing."""
    profile = blob_profile("disc", radius, 0.4, -0.3, 49)[8:-8, 8:-8].ravel()
    chi2, residual, _ = modelled(0, (16.4, 15.7, radius, 1.0, 0.0), profile, np.ones_like(profile))
    assert np.abs(residual).max() < 0.01
    assert chi2 - ((radius - 5.7) / 2.5) ** 2 + 2 * np.log(0.35) < 0.01


def test_a_fit_stays_within_eight_pixels_of_its_start_and_the_table_of_radii() -> None:
    low, high = _limits(np.array([10.0, 12.0, 5.0, 3.0, 0.5]))
    assert low.tolist() == [2, 4, 0.7, -np.inf, -np.inf]
    assert high.tolist() == [18, 20, 12.7, np.inf, np.inf]


def test_a_fit_that_failed_leaves_the_disc_that_it_started_from() -> None:
    good = a_cut()[1]
    cut = Cut(0, 0, good, good > 0)
    x, y, x_err, y_err, radius, radius_err, depth, depth_err, loss, snr = _unfitted(
        cut, np.array(PLACE), _table()
    )
    assert (x, y, radius, depth) == PLACE[:4]
    assert np.isnan([x_err, y_err, radius_err, depth_err]).all()
    profile = blob_profile("disc", PLACE[2], PLACE[0] - 16, PLACE[1] - 16, 33)
    assert loss == pytest.approx(PLACE[3] * profile.sum(), rel=0.01)
    assert snr == pytest.approx(PLACE[3] * np.linalg.norm(profile.ravel() * good), rel=0.01)


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_the_slopes_are_the_derivatives_of_the_model(shape: int) -> None:
    values, good = a_cut()
    slopes = modelled(shape, PLACE, values, good)[2]
    for i, step in enumerate((0.05, 0.05, 0.05, 0.5, 0.5)):
        below, above = (
            modelled(
                shape, tuple(p + sign * step * (k == i) for k, p in enumerate(PLACE)), values, good
            )[1]
            for sign in (-1, 1)
        )
        np.testing.assert_allclose(slopes[i], (below - above) / (2 * step), atol=0.02)


def test_normal_equations_are_those_of_least_squares_with_the_prior_of_the_radius() -> None:
    values, good = a_cut()
    _, residual, slopes = modelled(1, PLACE, values, good)
    normal, right = _normal(np.array(PLACE), Usual(6.5, 1.5), residual, slopes)
    prior = np.diag([0, 0, 1 / 1.5**2, 0, 0])
    np.testing.assert_allclose(
        normal, slopes.astype(float) @ slopes.T + prior, rtol=1e-4, atol=1e-2
    )
    expected = slopes.astype(float) @ residual - [0, 0, (PLACE[2] - 6.5) / 1.5**2, 0, 0]
    np.testing.assert_allclose(right, expected, rtol=1e-4, atol=1e-2)
    assert (normal == normal.T).all()
    solution = right.copy()
    _solve(normal.copy(), solution)
    np.testing.assert_allclose(normal @ solution, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("radius", [2.7, 5.2, 7.2])
def test_the_fit_starts_from_the_disc_that_is_there(radius: float) -> None:
    good = a_cut()[1]
    profile = blob_profile("disc", radius, -1.0, 2.0, CUT_SIDE).ravel()
    cut = Cut(0, 0, (good * (6.0 * profile + 0.5)).astype(np.float32), good > 0)
    assert _starts(cut, 17.0, 14.0, _table(), ANYWHERE)[0] == pytest.approx(
        (15.0, 18.0, radius, 6.0, 0.5), abs=0.03
    )


def test_the_fit_starts_near_its_peak() -> None:
    """From the fainter of two blobs, the other is too far; a peak beside it leads to it."""
    image = blob(80, 80, 4, 0.05) + blob(80, 88, 4, 0.1)
    cut = _cut(image, np.array([[79.0, 79.0, 1.0]]), 0, NOISE)
    y = _starts(cut, 79.0, 79.0, _table(), ANYWHERE)[0][1]
    assert 72 <= y + cut.y <= 86
    x, y = _starts(cut, 80.0, 86.0, _table(), ANYWHERE)[0][:2]
    assert (x + cut.x, y + cut.y) == pytest.approx((80, 88), abs=1)


@pytest.mark.parametrize("height", [1e5, 1e9, 1e12])
def test_a_patch_of_any_height_can_be_fitted(height: float) -> None:
    image = noise()
    image[44:56, 44:56] += height
    assert np.isfinite(measured(image, (49, 49))["depth_frac"][0])


def test_a_large_faint_blob_is_not_measured_as_a_spot_of_its_noise() -> None:
    """Of 100 rings, 18 were given less than two thirds of their radius when fits started at the highest place."""
    rng = np.random.default_rng(1)
    faint = blob(80, 80, 8, depth_of(6, 8, "ring"), "ring")
    radii = [
        measured(noise(seed) + faint, tuple(80 + rng.uniform(-4, 4, 2)))["radius_px"][0]
        for seed in range(100)
    ]
    assert np.mean(np.array(radii) < 5.3) < 0.1


def test_the_law_of_sizes_says_where_to_look_and_not_what_is_found() -> None:
    """Faint blobs that are as large as usual are measured better by it, a clear one of half the radius no worse."""
    radius = 3.5
    law = SizeLaw(radius, 0.0, 0.0, 0.17)
    errors = []
    for seed in range(40):
        faint = noise(seed) + blob(80, 80, radius, depth_of(5.5, radius, "disc"))
        fits = [fit_blobs(faint, [80], [80], [1], NOISE, WHITE, each) for each in (None, law)]
        errors.append([fit["radius_px"][0] - radius for fit in fits])
    without, with_law = np.sqrt(np.square(errors).mean(axis=0))
    assert with_law < 0.9 * without
    clear = noise() + blob(80, 80, 3.5, depth_of(40, 3.5, "disc"))
    twice = SizeLaw(2 * radius, 0.0, 0.0, 0.17)
    own = fit_blobs(clear, [80], [80], [1], NOISE, WHITE, twice)["radius_px"][0]
    assert own == pytest.approx(radius, abs=0.2)


def test_a_cut_out_holds_the_good_pixels_nearest_to_its_peak_in_units_of_the_noise() -> None:
    image = noise()
    image[70, 75], image[71, 80] = np.nan, 9.0
    peaks = np.array([[78.4, 69.6, 1.0], [90.0, 70.0, 0.9], [78.0, 90.0, 0.8]])
    cut = _cut(image, peaks, 0, NOISE)
    assert (cut.x, cut.y) == (78 - 16, 70 - 16)
    values, good = (part.reshape(33, 33) for part in (cut.values, cut.good))
    rows, columns = np.mgrid[cut.y : cut.y + 33, cut.x : cut.x + 33]
    own = np.hypot(columns - 78.4, rows - 69.6)
    other = np.hypot(columns - 78, rows - 90)
    expected = own <= other  # the one 12 px away is on the same blob
    expected[70 - cut.y, 75 - cut.x] = expected[71 - cut.y, 80 - cut.x] = False
    assert (good != expected).sum() <= 1  # an outlier of the noise at most
    np.testing.assert_allclose(
        values[good], image[cut.y : cut.y + 33, cut.x : cut.x + 33][good] / NOISE, rtol=1e-5
    )
    assert not values[~good].any()


def test_beyond_the_edge_a_cut_out_is_not_good() -> None:
    cut = _cut(noise(), np.array([[3.0, SIDE - 2.0, 1.0]]), 0, NOISE)
    good = cut.good.reshape(33, 33)
    assert not good[:, :13].any()
    assert not good[18:].any()
    assert good[:18, 13:].mean() > 0.99


def test_outliers_are_single_pixels_and_small_clusters_and_not_the_tops_of_blobs() -> None:
    values = (noise(3, 33) + blob(16, 16, 2.4, 0.15, side=33)) / np.float32(NOISE)
    good = _without_outliers(values)
    assert good.mean() > 0.99
    values[5, 5] = values[5, 6] = values[32, 0] = 9.0
    values[20, 28], values[8, 28] = -9.0, np.nan
    again = _without_outliers(values)
    changed = {(int(y), int(x)) for y, x in np.argwhere(good & ~again)}
    assert changed == {(5, 5), (5, 6), (32, 0), (20, 28), (8, 28)}


@pytest.mark.parametrize(("level", "limit"), [(0.0, 5.0), (6.0, 8.0), (-6.0, 8.0)])
def test_an_outlier_is_five_sigma_and_half_of_the_level_around_it_off(
    level: float, limit: float
) -> None:
    values = np.full((33, 33), level, np.float32)
    for place, off in (((10, 10), limit - 0.1), ((10, 22), 0.1 - limit), ((22, 10), limit + 0.1)):
        values[place] += off
    expected = np.ones((33, 33), bool)
    expected[22, 10] = False
    assert (_without_outliers(values) == expected).all()


def test_too_few_pixels_are_not_fitted() -> None:
    image = noise() + blob(80, 80, 5, 0.1)
    for n, fitted in ((59, False), (60, True)):
        few = np.full_like(image, np.nan)
        places = [(y, x) for y in range(76, 84) for x in range(76, 84)][:n]
        for place in places:
            few[place] = image[place]
        assert (
            np.isfinite(measured(few, (80, 80)).loc[0, ["snr", "depth_frac"]].astype(float)).all()
            == fitted
        )


def test_errors_of_depth_and_place_follow_the_signal() -> None:
    """That of the depth does not depend on it; those of the place go with the inverse S/N, and more where that is low."""
    image = noise()
    strong, faint = (
        measured(image + blob(80, 80, 5, depth), (80, 80)).iloc[0] for depth in (0.2, 0.03)
    )
    assert faint["depth_err_frac"] == pytest.approx(strong["depth_err_frac"], rel=0.5)
    for name in ("x_err_px", "y_err_px"):
        fisher = faint[name] / np.sqrt(1 + 40 / faint["snr"] ** 2)
        assert fisher / strong[name] == pytest.approx(strong["snr"] / faint["snr"], rel=0.25), name


def test_the_misfit_is_the_mean_square_in_the_footprint_less_what_another_shape_may_leave() -> None:
    """15 % of the depth is allowed, squared; a pixel farther than 1.5 px outside does not count."""
    good = np.ones(CUT_SIDE**2, bool)
    distance = distance_from(16, 16, CUT_SIDE).ravel()
    cut = Cut(0, 0, np.zeros(good.shape, np.float32), good)
    parameters = np.array([[16, 16, 4.0, 20.0, 0], [3, 3, 2.0, 1.0, 0]])
    for level, expected in ((1.0, 1.0), (3.0, 1.0), (4.0, 16 - 9.0)):
        residual = np.stack(
            [np.where(distance <= 5.4, level, 50.0), np.zeros_like(distance)]
        ).astype(np.float32)
        model = Model(parameters, residual, np.zeros((2, 5, len(good))), np.array([1.0, 2.0]))
        assert _reduced_chi2(cut, model) == pytest.approx(expected)
    nowhere = Cut(0, 0, cut.values, np.zeros_like(good))
    assert np.isnan(_reduced_chi2(nowhere, model))


def test_shapes_are_averaged_by_the_likelihood_that_their_misfit_leaves_them() -> None:
    """exp(-chi2 / 2), with chi2 in units of the best one per degree of freedom: half a depth of 10, half of 30."""
    cut = _cut(noise(), np.array([[80.0, 80.0, 1.0]]), 0, NOISE)
    free = cut.good.sum() - 5
    slopes = np.random.default_rng(1).normal(0, 100, (2, 5, len(cut.values))).astype(np.float32)
    parameters = np.array([[16, 16, 5.0, 1000.0, 0], [16, 16, 5.0, 3000.0, 0]])
    residual = np.zeros((2, len(cut.values)), np.float32)
    for misfit, more, share in (
        (1.0, 2 * np.log(3), 0.25),
        (4.0, 8 * np.log(3), 0.25),
        (0.5, 2 * np.log(3), 0.25),
    ):
        model = Model(parameters, residual, slopes, misfit * free + np.array([0.0, more]))
        depth = _averaged(cut, model, np.array([True, True]), ANYWHERE)[6]
        assert depth == pytest.approx(1000 + 2000 * share, rel=1e-3)
