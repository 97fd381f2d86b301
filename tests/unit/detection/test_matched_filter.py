"""Matched filter and leakage probe: the one finds what is there, the other nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blobpipe.core import metrics
from blobpipe.detection import matched_filter
from blobpipe.detection.score import fit_logistic, logistic
from blobpipe.simulation import render
from blobpipe.validation import leakage

RADII = (3.0, 4.0, 5.0, 6.0, 7.0, 8.0)


def _noise(n: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 256, 256)).astype(np.float32)


def _disc(x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.ogrid[:256, :256]
    return np.clip(radius + 0.5 - np.hypot(columns - x, rows - y), 0, 1).astype(np.float32)


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
