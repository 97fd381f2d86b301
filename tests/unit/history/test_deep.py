"""Differences of the latest images together."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from tests.unit.detection.blobs import blob

from blobpipe.detection.detectors import DenseDetector, load_dense_detector
from blobpipe.history import deep
from blobpipe.history.deep import DEPTHS, KEPT, Latest, means_within, settle
from blobpipe.history.depths import measure_histories
from blobpipe.history.landing import date_history
from blobpipe.images.register import NO_SHIFT, Shift
from blobpipe.images.template import Template
from blobpipe.networks import model_file
from blobpipe.noise.level import clean_noise
from blobpipe.noise.whiten import WHITE
from blobpipe.params import Deep

NOISE = 0.0076
SIDE = 128
WIDE = 320


def images(n: int, seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(0, NOISE, (SIDE, SIDE)).astype(np.float32) for _ in range(n)]


def latest_of(differences: list[np.ndarray], stack: np.ndarray | None = None) -> Latest:
    stack = np.zeros((SIDE, SIDE), np.float32) if stack is None else stack
    latest = Latest()
    for difference in differences:
        latest.add(settle(difference, stack))
    return latest


def test_the_noise_falls_as_that_of_means() -> None:
    stack = np.random.default_rng(2).normal(0, 0.05, (SIDE, SIDE)).astype(np.float32)
    found = latest_of(images(KEPT), stack).differences()
    assert [each.n_images for each in found] == list(DEPTHS)
    for each in found:
        expected = NOISE * np.sqrt(1 / each.n_images + 1 / deep.BASELINE)
        assert clean_noise(each.difference) == pytest.approx(expected, rel=0.05)


def test_a_faint_blob_keeps_its_depth_in_the_depth_that_holds_it() -> None:
    faint = blob(64, 64, 5.0, 0.004, side=SIDE)
    before = images(KEPT - 8)
    after = [image + faint for image in images(8, seed=2)]
    found = {each.n_images: each.difference for each in latest_of(before + after).differences()}
    core = faint > 0.003
    for n, share in ((4, 1.0), (8, 1.0), (16, 0.5), (32, 0.25)):
        error = NOISE * np.sqrt((1 / n + 1 / 30) / core.sum())
        # what landed within the baseline is subtracted with it
        lost = 4 / 30 if n == 4 else 0.0
        expected = (share - lost) * faint[core].mean()
        assert found[n][core].mean() == pytest.approx(expected, abs=4 * error)


def test_a_streak_on_one_image_is_lost_in_the_noise() -> None:
    streaked = images(KEPT)
    streaked[-3][60:63] += 0.05
    clean = latest_of(images(KEPT)).differences()[2].difference
    found = latest_of(streaked).differences()[2].difference
    assert (found - clean)[60:63].mean() < 0.25 * 0.05 / 4


def test_blobs_that_the_mirror_has_moved_come_together() -> None:
    rng = np.random.default_rng(3)
    stack = np.zeros((SIDE, SIDE), np.float32)
    latest = Latest()
    for image in images(KEPT - 8):
        latest.add(settle(image, stack))
    for image in images(8, seed=4):
        x, y = rng.uniform(-3, 3, 2)
        latest.add(settle(image + blob(64 + x, 64 + y, 4.0, 0.006, side=SIDE), stack, Shift(x, y)))
    found = latest.differences()[2].difference
    assert found[62:67, 62:67].mean() == pytest.approx(0.006, rel=0.2)


def test_a_clear_blob_keeps_its_depth() -> None:
    image = images(1)[0] + blob(64, 64, 5.0, 0.2, side=SIDE)
    stack = np.zeros((SIDE, SIDE), np.float32)
    clear = pd.DataFrame({"x_px": [64.0], "y_px": [64.0], "radius_px": [5.0]})
    limited, whole = (settle(image, stack, clear=each).values[64, 64] for each in (None, clear))
    assert limited * deep.STEP_FRAC < 0.05
    assert whole * deep.STEP_FRAC > 0.17


def test_a_noisy_day_weighs_less() -> None:
    noisy = images(KEPT)
    noisy[-1] = noisy[-1] * 5
    found = latest_of(noisy).differences()[1].difference
    assert clean_noise(found) < 1.2 * NOISE * np.sqrt(1 / 3 + 1 / 30)


def test_missing_pixels_are_left_out_and_stay_missing_where_no_image_has_them() -> None:
    holed = images(KEPT)
    for image in holed:
        image[5] = np.nan
    holed[-1][70] = np.nan
    for each in latest_of(holed).differences():
        assert np.isnan(each.difference[5]).all()
        assert np.isfinite(each.difference[70]).all()


def test_the_same_images_give_the_same_sums_whatever_came_before() -> None:
    given = images(KEPT + 5)
    one = latest_of(given)
    other = latest_of(given[5:])
    for each, same in zip(one.differences(), other.differences(), strict=True):
        assert (each.difference == same.difference).all()


def test_few_images_make_the_shallow_depths_only() -> None:
    assert latest_of(images(10)).differences() == []
    found = latest_of(images(deep.FEWEST + 4)).differences()
    assert [each.n_images for each in found] == [2, 4]


def test_without_deep_differences_nothing_is_found(detector: DenseDetector) -> None:
    found = deep.find_deep_blobs([], Template(), detector, {})
    assert found[["x_px", "y_px", "radius_px", "status", "n_images"]].empty


def test_means_are_those_of_numpy() -> None:
    rng = np.random.default_rng(5)
    values = [rng.integers(-500, 500, (70, 30)).astype(np.int16) for _ in range(9)]
    values[4][3, 7] = deep.MISSING
    for image in values[2:5]:
        image[66, 29] = deep.MISSING
    weights = rng.uniform(0.5, 2, 9).astype(np.float32)
    spans = [(2, 5), (5, 9), (0, 9), (2, 9)]
    there = np.array(values) != deep.MISSING
    weighted = np.where(there, np.array(values), 0) * weights[:, None, None]
    shares = there * weights[:, None, None]
    for found, (first, end) in zip(means_within(values, weights, spans), spans, strict=True):
        with np.errstate(invalid="ignore"):
            expected = weighted[first:end].sum(0) / shares[first:end].sum(0)
        np.testing.assert_allclose(found, expected * deep.STEP_FRAC, rtol=1e-4, atol=1e-5)


def test_variances_are_those_of_numpy_and_zero_where_a_value_is_missing() -> None:
    rng = np.random.default_rng(6)
    values = [(20_000 + rng.integers(-500, 500, (70, 30))).astype(np.int16) for _ in range(9)]
    values[4][3, 7] = values[0][66, 2] = deep.MISSING
    expected = np.array(values, np.float64).var(axis=0)
    expected[3, 7] = expected[66, 2] = 0
    np.testing.assert_allclose(deep.variances(values), expected, rtol=1e-6)


def test_flickering_pixels_stand_out_of_the_rms_map() -> None:
    flickering = images(KEPT)
    for k in range(0, KEPT, 3):
        flickering[k][40:44, 40:44] += 0.1
    rms = latest_of(flickering).rms()
    assert rms[20:22, 20:22].mean() > 1.3 * np.median(rms)


# Part of the image alone is looked at


def test_the_network_looks_at_places_as_at_the_whole_image(detector: DenseDetector) -> None:
    scaled = np.random.default_rng(7).normal(0, 1, (330, 410)).astype(np.float32)
    x, y = np.array([201.0, 404.0, 3.0]), np.array([130.0, 325.0, 250.0])
    for place in zip(x, y, strict=True):
        scaled += blob(*place, 5.0, 2.0, side=420)[:330, :410]
    whole = detector.respond(scaled)
    found = deep.respond_at(detector, scaled, x, y)
    assert found.shape == whole.shape == (83, 103)
    row, column = np.indices(found.shape) * 4 + 1.5
    distance = np.hypot(row - y[:, None, None], column - x[:, None, None])
    assert (found[distance.min(axis=0) > 45] == 0).all()
    for near in distance < 12:
        assert whole[near].max() > 0.9
        assert found[near].max() == pytest.approx(whole[near].max(), abs=0.05)


def test_where_there_is_much_to_look_at_the_network_sees_the_whole_image(
    detector: DenseDetector,
) -> None:
    scaled = np.random.default_rng(8).normal(0, 1, (128, 144)).astype(np.float32)
    x, y = np.array([20.0, 70.0, 120.0]), np.array([20.0, 60.0, 110.0])
    assert (deep.respond_at(detector, scaled, x, y) == detector.respond(scaled)).all()
    assert not deep.respond_at(detector, scaled, x[:0], y[:0]).any()


# What must not become a persistent false alarm: each on the images of a sequence, searched together


@pytest.fixture(scope="module")
def detector() -> DenseDetector:
    return load_dense_detector(model_file.PACKAGED)


def wide(n: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(0, NOISE, (WIDE, WIDE)).astype(np.float32) for _ in range(n)]


def persistent(
    differences: list[np.ndarray],
    detector: DenseDetector,
    *,
    shifts: list[Shift] | None = None,
    mjd: np.ndarray | None = None,
    known: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Settle and search differences; return the new blobs that have landed and stayed, with their dates."""
    stack = np.zeros((WIDE, WIDE), np.float32)
    latest = Latest()
    for image, shift in zip(differences, shifts or [NO_SHIFT] * KEPT, strict=True):
        latest.add(settle(image, stack, shift))
    point = deep.thresholds(detector.threshold, Deep())
    template = Template(rms=latest.rms(), noise_model=WHITE)
    found = deep.find_deep_blobs(latest.differences(), template, detector, point, catalogue=known)
    found = found[(found["status"] == "new") & found["is_detection"]]
    depths = measure_histories(latest.images, found)
    dates = np.arange(float(KEPT)) if mjd is None else mjd
    landings = [
        date_history(dates, depths.depth_frac[:, k], depths.error_frac[:, k])
        for k in range(len(found))
    ]
    stays = [landing is not None and landing.is_persistent for landing in landings]
    firsts = [landing.first if landing is not None else -1 for landing in landings]
    return found.assign(first=firsts)[stays]


def test_what_lies_just_below_the_thresholds_is_told_apart(detector: DenseDetector) -> None:
    differences = wide(KEPT, 11)
    for difference in differences[-16:]:
        difference += blob(150, 170, 6.0, 0.0035, side=WIDE)
    latest = Latest()
    for image in differences:
        latest.add(settle(image, np.zeros((WIDE, WIDE), np.float32)))
    template = Template(rms=latest.rms(), noise_model=WHITE)
    found = deep.search_depths(latest.differences(), template, detector)
    best = found[found["status"] == "new"].nlargest(1, "score")

    def search(above: float) -> pd.DataFrame:
        level = deep.logit(best["score"].to_numpy()).item() + above
        point = dict.fromkeys(DEPTHS, 1 / (1 + np.exp(-level)))
        return deep.find_deep_blobs(latest.differences(), template, detector, point)

    for above, expected in ((-0.01, [True]), (0.01, [False]), (0.9, [False]), (1.01, [])):
        searched = search(above)
        near = np.hypot(searched["x_px"] - 150, searched["y_px"] - 170) < 4
        assert searched[near]["is_detection"].tolist() == expected, above


def test_a_faint_blob_is_found_and_dated(detector: DenseDetector) -> None:
    differences = wide(KEPT, 11)
    for difference in differences[-16:]:
        difference += blob(150, 170, 6.0, 0.0035, side=WIDE)
    found = persistent(differences, detector)
    assert len(found) == 1
    assert np.hypot(found["x_px"] - 150, found["y_px"] - 170).item() < 2
    assert abs(found["first"].item() - (KEPT - 16)) <= 3


def test_streaks_are_no_blobs(detector: DenseDetector) -> None:
    differences = wide(KEPT, 12)
    rng = np.random.default_rng(12)
    for difference in differences:
        y, x = rng.integers(20, WIDE - 40, 2)
        difference[y : y + 3, x : x + 150] += 0.03
        difference[y + 13 : y + 16, x : x + 150] += 0.03
    assert persistent(differences, detector).empty


def test_flickering_clusters_are_no_blobs(detector: DenseDetector) -> None:
    differences = wide(KEPT, 13)
    rng = np.random.default_rng(13)
    places = rng.integers(20, WIDE - 20, (40, 2))
    for difference in differences:
        for y, x in places[rng.random(len(places)) < 0.06]:
            difference[y : y + 4, x : x + 4] += np.float32(rng.normal(0, 0.12))
    assert persistent(differences, detector).empty


def test_shifted_images_find_a_blob_once_and_no_other(detector: DenseDetector) -> None:
    differences = wide(KEPT, 14)
    rng = np.random.default_rng(14)
    shifts = [Shift(*rng.uniform(-3, 3, 2)) for _ in range(KEPT)]
    for difference, shift in zip(differences[-16:], shifts[-16:], strict=True):
        difference += blob(150 + shift.x_px, 170 + shift.y_px, 5.0, 0.005, side=WIDE)
    found = persistent(differences, detector, shifts=shifts)
    assert len(found) == 1
    assert np.hypot(found["x_px"] - 150, found["y_px"] - 170).item() < 2


def test_a_bad_day_makes_no_blob_and_hides_none(detector: DenseDetector) -> None:
    differences = wide(KEPT, 15)
    for difference in differences[-16:]:
        difference += blob(150, 170, 6.0, 0.004, side=WIDE)
    y, x = np.mgrid[:WIDE, :WIDE].astype(np.float32)
    differences[-5] = 3 * differences[-5] + 0.02 * np.sin(x / 15) * np.sin(y / 15)
    found = persistent(differences, detector)
    assert len(found) == 1
    assert np.hypot(found["x_px"] - 150, found["y_px"] - 170).item() < 2


def test_a_month_without_images_changes_nothing_but_the_dates(detector: DenseDetector) -> None:
    differences = wide(KEPT, 16)
    for difference in differences[-10:]:
        difference += blob(150, 170, 6.0, 0.006, side=WIDE)
    mjd = np.arange(float(KEPT))
    mjd[-10:] += 30
    found = persistent(differences, detector, mjd=mjd)
    assert found["first"].tolist() == [KEPT - 10]


def test_a_blob_that_lands_on_another_is_found(detector: DenseDetector) -> None:
    differences = wide(KEPT, 17)
    for difference in differences[-16:]:
        difference += blob(156, 170, 5.0, 0.006, side=WIDE)
    known = pd.DataFrame({"x_px": [150.0], "y_px": [170.0], "radius_px": [7.0]})
    found = persistent(differences, detector, known=known)
    assert len(found) == 1
    assert np.hypot(found["x_px"] - 156, found["y_px"] - 170).item() < 2


def test_noise_alone_makes_no_blob(detector: DenseDetector) -> None:
    assert sum(len(persistent(wide(KEPT, seed), detector)) for seed in (18, 19)) == 0
