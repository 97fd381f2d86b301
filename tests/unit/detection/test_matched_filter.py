"""Matched filter and leakage probe: the one finds what is there, the other nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from blobpipe.core import metrics
from blobpipe.detection import matched_filter
from blobpipe.detection.score import fit_logistic, logistic
from blobpipe.noise.whiten import WHITE, NoiseModel
from blobpipe.simulation import render
from blobpipe.validation import leakage

RADII = (3.0, 4.0, 5.0, 6.0, 7.0, 8.0)


def _noise(n: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 256, 256)).astype(np.float32)


def _disc(x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.ogrid[:256, :256]
    return np.clip(radius + 0.5 - np.hypot(columns - x, rows - y), 0, 1).astype(np.float32)


# --- whole images -----------------------------------------------------------------------------------------------------


def _image(seed: int = 1, shape: tuple[int, int] = (301, 340)) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.01, shape).astype(np.float32)


def _disc_on(image: np.ndarray, x: float, y: float, radius: float, snr: float) -> np.ndarray:
    rows, columns = np.ogrid[: image.shape[0], : image.shape[1]]
    disc = np.clip(radius + 0.5 - np.hypot(columns - x, rows - y), 0, 1)
    return (image + 0.01 * snr * disc / np.linalg.norm(disc)).astype(np.float32)


@pytest.mark.parametrize("radius", [2.4, 3.0, 4.2, 6.0, 8.2, 10.0])
def test_a_disc_of_any_size_keeps_its_snr(radius: float) -> None:
    found = []
    for seed in range(12):
        image = _disc_on(_image(seed), 120.3, 200.7, radius, 10.0)
        filtered = matched_filter.filter_image(image, 0.01)
        x, y, _ = filtered.places(5.5)
        assert np.hypot(x[0] - 120.3, y[0] - 200.7) < 6
        found.append(filtered.snr.max())
    # The background and the cells cost some, the highest of many places gains some
    assert np.median(found) == pytest.approx(10, rel=0.18)


def test_places_are_the_highest_of_their_surroundings_in_order() -> None:
    image = _disc_on(_disc_on(_image(), 60, 80, 5, 20), 200, 90, 5, 30)
    x, y, snr = matched_filter.filter_image(image, 0.01).places(6.0)
    assert len(x) == 2
    np.testing.assert_allclose(snr, [30, 20], rtol=0.2)
    np.testing.assert_allclose(np.hypot(x - [200, 60], y - [90, 80]), 0, atol=2)


def test_what_is_cut_by_a_border_is_found_there_and_nowhere_else() -> None:
    image = _disc_on(_image(), 0, 150, 6, 40)
    x, y, _ = matched_filter.filter_image(image, 0.01).places(7.0)
    assert np.hypot(x - 0, y - 150).max() < 6


def test_pixels_without_a_value_and_hot_pixels_are_no_signal() -> None:
    image = _image()
    image[40:80, 100:180] = np.nan
    image[200, 200] = 50.0
    assert matched_filter.filter_image(image, 0.01).snr.max() < 5.5


@pytest.mark.parametrize("shape", [(0, 0), (1, 1), (2, 2), (1, 64), (5, 7)])
def test_small_and_empty_images_have_a_response(shape: tuple[int, int]) -> None:
    for image in (np.full(shape, np.nan, np.float32), np.zeros(shape, np.float32)):
        for noise in (0.01, 0.0, np.nan):
            filtered = matched_filter.filter_image(image, noise)
            assert filtered.snr.shape == (shape[0] // 2, shape[1] // 2)
            assert len(filtered.places(1.0)[0]) == 0
            assert len(filtered.noise_at(np.zeros(0), np.zeros(0))) == 0


def test_in_whitened_noise_the_filter_is_whitened_too() -> None:
    """Against a filter that is not: the image is striped, so that a blob on it has dark flanks."""
    power = np.ones((300, 171), np.float32)
    power[:, :20] = 30.0
    model = NoiseModel(power)
    gained = []
    for seed in range(8):
        white = _image(seed, (300, 340))
        blob = _disc_on(np.zeros_like(white), 170, 150, 7, 25)
        whitened = white + model.whiten(blob)
        ours, other = (
            matched_filter.filter_image(whitened, 0.01, noise_model).snr[70:80, 80:90].max()
            for noise_model in (model, WHITE)
        )
        gained.append(ours / other)
    assert np.median(gained) > 1.1


def test_strips_where_the_noise_is_twice_the_same_are_noisier() -> None:
    """As where two outputs meet that are read towards each other: their correlated noise is mirrored."""
    rng = np.random.default_rng(4)
    half = gaussian_filter(rng.normal(0, 1, (2400, 250)), (0, 12))
    image = np.concatenate([half, half[:, ::-1]], axis=1).astype(np.float32)
    image = 0.01 * image / image.std() + _image(5, image.shape) / 3
    filtered = matched_filter.filter_image(image, 0.0105)
    x = np.array([249.0, 100.0, 400.0, np.nan])
    noise = filtered.noise_at(x, np.full(4, 500.0))
    assert 1.25 < noise[0] < 1.6
    assert noise[1:].tolist() == [1, 1, 1]
    turned = matched_filter.filter_image(np.ascontiguousarray(image.T), 0.0105)
    np.testing.assert_allclose(turned.noise_at(np.full(4, 500.0), x), noise, rtol=1e-3)


# --- matched filter --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [3.0, 5.0, 8.0])
def test_a_disc_is_found_where_it_is_at_its_size_and_strength(radius: float) -> None:
    depth = 18 / np.sqrt((_disc(128, 128, radius) ** 2).sum())
    match = matched_filter.filter_subframes(_noise(8) + depth * _disc(90, 171, radius), RADII)
    assert np.hypot(match.x - 90, match.y - 171).max() <= 2
    assert abs(np.median(match.radius) - radius) <= 1
    assert np.median(match.snr) == pytest.approx(18, rel=0.2)  # the ring costs some


def test_blank_noise_gives_the_usual_maximum() -> None:
    assert 3.5 < np.median(matched_filter.filter_subframes(_noise(8), RADII).snr) < 5.5


@pytest.mark.parametrize(("x", "y"), [(1, 128), (128, 254), (0, 0), (255, 255)])
def test_a_blob_cut_by_the_edge_is_found(x: int, y: int) -> None:
    match = matched_filter.filter_subframes(_noise(4) + 2 * _disc(x, y, 6), RADII)
    assert np.hypot(match.x - x, match.y - y).max() <= 5
    assert match.snr.min() > 7


@settings(max_examples=10, deadline=None)
@given(st.floats(0.1, 10), st.integers(0, 3), st.integers(0, 9))
def test_scale_and_rotation_change_nothing(scale: float, turns: int, seed: int) -> None:
    image = _noise(1, seed) + 1.5 * _disc(60, 100, 5)
    before, after = (
        matched_filter.filter_subframes(i.astype(np.float32), (4.0, 6.0))
        for i in (image, scale * image)
    )
    assert after.snr == pytest.approx(before.snr, rel=1e-3)
    turned = matched_filter.filter_subframes(np.rot90(image, turns, (1, 2)).copy(), (4.0, 6.0))
    assert turned.snr == pytest.approx(before.snr, rel=0.05)  # the spread is of every 4th pixel
    y, x = np.argwhere(np.rot90(_disc(60, 100, 0.5), turns) == 1)[0]
    assert np.hypot(turned.x[0] - x, turned.y[0] - y) <= 3


def test_one_at_a_time_or_together(monkeypatch: pytest.MonkeyPatch) -> None:
    images = _noise(5) + _disc(60, 100, 5)
    together = matched_filter.filter_subframes(images, RADII)
    monkeypatch.setattr(matched_filter, "BATCH", 2)
    monkeypatch.setattr(matched_filter, "THREADS", 1)
    for before, after in zip(together, matched_filter.filter_subframes(images, RADII), strict=True):
        np.testing.assert_array_equal(before, after)


def test_constant_subframes_and_none_at_all() -> None:
    match = matched_filter.filter_subframes(np.zeros((2, 256, 256), np.float32), RADII)
    assert np.abs(match.snr).max() < 1e-3
    assert len(matched_filter.filter_subframes(np.zeros((0, 256, 256), np.float32), RADII).snr) == 0


# --- leakage probe ---------------------------------------------------------------------------------------------------


def _labelled(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 2, n)
    pixels = np.random.default_rng(6).normal(size=(n, 64, 64)).astype(np.float32)
    return pixels, labels


def test_standardised_subframes_do_not_leak() -> None:
    pixels, labels = _labelled(3000)
    features = leakage.leakage_features(render.standardise(pixels))
    assert leakage.leakage_auc(features, labels) == pytest.approx(0.5, abs=0.03)


def test_blobs_well_inside_are_no_leak() -> None:
    pixels, labels = _labelled(3000)
    pixels[labels == 1, 25:29, 20:24] += 1.5
    features = leakage.leakage_features(render.standardise(pixels))
    assert leakage.leakage_auc(features, labels) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    "fault", ["only one class standardised", "offset", "bright border", "spread"]
)
def test_a_leak_is_seen(fault: str) -> None:
    pixels, labels = _labelled(1000)
    match fault:
        case "only one class standardised":
            pixels = 1.05 * pixels + 0.01
            pixels[labels == 1] = render.standardise(pixels[labels == 1])
        case "offset":
            pixels[labels == 1] += 0.05
        case "bright border":
            pixels[labels == 1, 0] += 0.5
        case "spread":
            pixels[labels == 1] *= 1.05
    assert leakage.leakage_auc(leakage.leakage_features(pixels), labels) > 0.7


def test_logistic_regression_recovers_known_weights() -> None:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(20_000, 2))
    truth = np.array([0.3, 1.0, -0.5])
    labels = (rng.random(len(features)) < logistic(features, truth)).astype(np.int64)
    np.testing.assert_allclose(fit_logistic(features, labels), truth, atol=0.06)


def test_separable_classes_have_finite_weights() -> None:
    features = np.linspace(-1, 1, 100)[:, None]
    labels = (features[:, 0] > 0).astype(np.int64)
    weights = fit_logistic(features, labels)
    assert np.isfinite(weights).all()
    assert metrics.roc_auc(labels, logistic(features, weights))[0] == 1
