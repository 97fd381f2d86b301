"""The autoencoder: it learns to reconstruct what it is shown, and what it was never shown stands out."""

from __future__ import annotations

import numpy as np
import pytest

from blobpipe.params import Explore
from blobpipe.validation import autoencoder

SIDE = 64
SETTINGS = Explore(epochs=40, batch_size=10, rate=5e-3)


def waves(n: int, seed: int) -> np.ndarray:
    """Standardised images of one slanted wave each, of any phase."""
    rng = np.random.default_rng(seed)
    x = np.arange(SIDE)
    phase = rng.uniform(0, 2 * np.pi, (n, 1, 1))
    images = np.sqrt(2) * np.sin(2 * np.pi * (x + x[:, None]) / SIDE + phase)
    return images.astype(np.float32)


@pytest.fixture(scope="module")
def network() -> autoencoder.Autoencoder:
    return autoencoder.train(waves(60, 1), SETTINGS)


def test_it_learns_to_reconstruct(network: autoencoder.Autoencoder) -> None:
    others = waves(20, 2)
    before = autoencoder.train(waves(60, 1), SETTINGS.model_copy(update={"epochs": 0}))
    errors = [
        float(np.square(others - autoencoder.reconstruct(one, others)).mean())
        for one in (before, network)
    ]
    assert errors[0] > 0.8  # of a variance of 1
    assert errors[1] < 0.1


def test_what_it_never_saw_stands_out(network: autoencoder.Autoencoder) -> None:
    clean = waves(20, 3)
    odd = waves(20, 3)
    odd[:, 20:28, 40:48] += 3
    peaks = [
        autoencoder.error_maps(images, autoencoder.reconstruct(network, images), 3.0).max((1, 2))
        for images in (clean, odd)
    ]
    assert peaks[1].min() > peaks[0].max()


def test_the_seed_alone_decides() -> None:
    images = waves(20, 1)
    few = SETTINGS.model_copy(update={"epochs": 2})
    one, two, other = (
        autoencoder.reconstruct(autoencoder.train(images, settings), images).tobytes()
        for settings in (few, few, few.model_copy(update={"seed": 2}))
    )
    assert one == two
    assert one != other


def test_an_error_map_keeps_a_flat_error_and_spreads_a_point() -> None:
    images = np.zeros((2, SIDE, SIDE), np.float32)
    images[0] = 2
    images[1, 30, 40] = 10
    flat, point = autoencoder.error_maps(images, 0.0, 2.0)
    np.testing.assert_allclose(flat, 4, rtol=1e-5)
    assert np.unravel_index(point.argmax(), point.shape) == (30, 40)
    assert point.sum() == pytest.approx(100, rel=1e-4)
    assert point.max() == pytest.approx(100 / (2 * np.pi * 2.0**2), rel=0.02)
