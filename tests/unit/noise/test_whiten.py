"""The measured noise model: white noise stays as it is, correlated and uneven noise becomes white."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from blobpipe.core import fits_images
from blobpipe.core.arrays import Image
from blobpipe.core.blob_shapes import blob_profile
from blobpipe.noise import spectrum, whiten
from blobpipe.noise.whiten import (
    WHITE,
    NoiseModel,
    measure_noise_model,
    noise_model_planes,
    read_noise_model,
)

SIDE = 512
SIGMA = 0.01


def white(seed: int = 1, shape: tuple[int, int] = (SIDE, SIDE)) -> Image:
    return np.random.default_rng(seed).normal(0, SIGMA, shape).astype(np.float32)


def read_out(seed: int = 1) -> Image:
    """White noise and, of the same strength, noise along rows: 1/f in the order of reading."""
    rng = np.random.default_rng([seed, 2])
    frequency = np.fft.rfftfreq(SIDE * SIDE)
    frequency[0] = frequency[1]
    waves = np.fft.rfft(rng.normal(size=SIDE * SIDE)) / np.sqrt(frequency)
    slow = np.fft.irfft(waves, SIDE * SIDE).reshape(SIDE, SIDE)
    return (white(seed) + SIGMA * slow / slow.std()).astype(np.float32)


def radial_power(image: Image) -> np.ndarray:
    """Power in rings of spatial frequency, relative to the highest."""
    power = np.square(np.abs(np.fft.rfft2(np.nan_to_num(image))))
    radius = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE))
    edges = [0.004, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5]
    rings = [power[(radius >= low) & (radius < high)].mean() for low, high in pairwise(edges)]
    return np.array(rings) / rings[-1]


@pytest.mark.parametrize("seed", range(5))
def test_white_noise_stays_as_it_is(seed: int) -> None:
    image = white(seed)
    model = measure_noise_model(image)
    assert model.is_white
    assert model.whiten(image) is image
    assert model.transfer(49, 28) is None


def test_bad_pixels_blobs_streaks_and_missing_values_are_no_noise() -> None:
    image = white()
    rng = np.random.default_rng(4)
    y, x = rng.integers(0, SIDE, (2, 4000))
    image[y[:2000], x[:2000]] = 3.0
    image[y[2000:], x[2000:]] = np.nan
    image[100:141, 200:241] += 0.05 * blob_profile("disc", 6.0, size=41)
    image[300:303, 100:300] -= 0.06
    assert measure_noise_model(image).is_white


@pytest.mark.parametrize("transposed", [False, True])
def test_read_out_noise_becomes_white(transposed: bool) -> None:
    image = read_out().T if transposed else read_out()
    before = radial_power(image)
    after = radial_power(measure_noise_model(image).whiten(image))
    assert before[0] > 3
    np.testing.assert_allclose(after[1:], 1, atol=0.25)
    assert after[0] < 2


def test_smooth_illumination_becomes_white() -> None:
    rng = np.random.default_rng(3)
    slow = gaussian_filter(rng.normal(size=(SIDE, SIDE)), 20, mode="wrap")
    image = (white() + 0.3 * SIGMA * slow / slow.std()).astype(np.float32)
    before = radial_power(image)
    after = radial_power(measure_noise_model(image).whiten(image))
    assert before[0] > 5
    np.testing.assert_allclose(after, 1, atol=0.35)


def test_a_blob_stands_out_farther_where_noise_was_correlated() -> None:
    """The S/N of a filter for the whitened blob is three quarters of the optimum's or more."""
    model = measure_noise_model(read_out())
    blob = np.zeros((SIDE, SIDE), np.float32)
    blob[200:249, 200:249] = blob_profile("disc", 5.0, size=49)
    truth = np.mean([np.square(np.abs(np.fft.rfft2(read_out(k)))) for k in range(10, 40)], axis=0)
    power = np.square(np.abs(np.fft.rfft2(blob)))

    def snr(assumed: np.ndarray | float) -> float:
        signal = (power / assumed).sum()
        return float(signal / np.sqrt((power * truth / np.square(assumed)).sum()))

    assert model.power is not None
    assert snr(model.power) > 0.93 * snr(truth)
    assert snr(1.0) < 0.8 * snr(truth)


def test_uneven_noise_becomes_even() -> None:
    image = white()
    image[:, SIDE // 2 :] *= 1.8
    model = measure_noise_model(image)
    whitened = model.whiten(image)
    ratio = whitened[:, 300:].std() / whitened[:, :200].std()
    assert ratio == pytest.approx(1, abs=0.1)
    x = np.array([10.0, 500.0, np.nan])
    low, high, _ = model.scale_at(x, x)
    assert high / low == pytest.approx(1.8, rel=0.1)


def test_values_are_missing_where_they_were() -> None:
    image = read_out()
    image[:5] = image[100, 50] = np.nan
    whitened = measure_noise_model(image).whiten(image)
    np.testing.assert_array_equal(np.isnan(whitened), np.isnan(image))
    assert whitened.dtype == np.float32


@pytest.mark.parametrize("n_strong", [2, 8, 16])
def test_a_whitened_blob_is_the_sum_of_its_whitened_waves(n_strong: int) -> None:
    """Exactly, but for a constant, however narrow the lines of the spectrum are."""
    power = np.ones((SIDE, SIDE // 2 + 1), np.float32)
    power[:, :n_strong] = 20
    model = NoiseModel(power)
    transfer = model.transfer(49, 25)
    assert transfer is not None
    assert transfer.shape == (25, 25)
    image = np.zeros((SIDE, SIDE), np.float32)
    profile = blob_profile("disc", 5.0, size=49)
    image[200:249, 200:249] = profile
    on_image = model.whiten(image)[200:249, 200:249]

    # Factors of all waves of the window, of either sign along y and x
    spectrum = np.fft.fft2(profile)
    order = np.minimum(np.arange(49), 49 - np.arange(49))
    whitened = np.fft.ifft2(spectrum * transfer[order[:, None], order]).real
    difference = (whitened - on_image)[12:37, 12:37]
    assert np.abs(difference - difference.mean()).max() < 1e-5


@pytest.mark.parametrize("depth", [0.02, 0.03])
def test_blobs_that_only_whitening_makes_stand_out_are_no_noise(depth: float) -> None:
    """On rows of noise; they were taken for 0.25 and 0.32 of the power at their frequencies."""
    changes = []
    for seed in range(5):
        along_y = np.random.default_rng([seed, 3]).normal(0, SIGMA, (SIDE, 1))
        image = (white(seed) + along_y).astype(np.float32)
        with_blobs = image.copy()
        for x in (60, 250, 440):
            for y in (60, 250, 440):
                with_blobs[y - 20 : y + 21, x - 20 : x + 21] += depth * blob_profile(
                    "disc", 5.0, size=41
                )
        model, with_them = measure_noise_model(image), measure_noise_model(with_blobs)
        assert model.power is not None
        assert with_them.power is not None
        frequency = model.frequency(image.shape)
        of_blobs = (frequency > 0.01) & (frequency < 0.06)
        changes.append(np.log(with_them.power / model.power)[of_blobs].mean())
    assert np.mean(changes) < 0.2


def test_several_images_are_measured_together() -> None:
    images = np.stack([read_out(k) for k in range(4)])
    one = measure_noise_model(images[0]).power
    four = measure_noise_model(images).power
    truth = np.mean([np.square(np.abs(np.fft.rfft2(read_out(k)))) for k in range(10, 40)], axis=0)
    truth /= np.median(truth)
    assert one is not None
    assert four is not None

    def error(power: np.ndarray) -> float:
        return float(np.abs(np.log(power[:, 1:] / truth[:, 1:])).mean())

    assert error(four) < error(one)


@pytest.mark.parametrize("kind", ["white", "correlated", "uneven"])
def test_a_model_survives_a_file(kind: str, tmp_path: Path) -> None:
    image = read_out() if kind == "correlated" else white()
    if kind == "uneven":
        image[:200] *= 3
    model = measure_noise_model(image)
    planes = {"STACK": white(2)} | noise_model_planes(model)
    fits_images.write_images(tmp_path / "a.fits.fz", planes, sigma=SIGMA)
    read = read_noise_model(tmp_path / "a.fits.fz")
    assert read is not None
    assert read.is_white == model.is_white == (kind == "white")
    np.testing.assert_allclose(read.whiten(image), model.whiten(image), atol=1e-3 * SIGMA)


def test_a_file_without_a_model_has_none(tmp_path: Path) -> None:
    fits_images.write_images(tmp_path / "a.fits.fz", {"STACK": white()}, sigma=SIGMA)
    assert read_noise_model(tmp_path / "a.fits.fz") is None
    assert noise_model_planes(None) == {}


@pytest.mark.parametrize("shape", [(64, 64), (100, 37), (17, 300)])
def test_any_shape_and_an_image_without_noise(shape: tuple[int, int]) -> None:
    assert measure_noise_model(white(shape=shape)).whiten(white(shape=shape)).shape == shape
    nothing = np.zeros(shape, np.float32)
    assert np.isfinite(measure_noise_model(nothing).whiten(nothing)).all()
    assert NoiseModel() == WHITE


@pytest.mark.parametrize("shape", [(7, 7), (16, 5), (33, 41)])
def test_a_tiny_image_has_a_noise_model(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(1).normal(0, 0.01, shape).astype(np.float32)
    assert whiten.measure_noise_model(image).whiten(image).shape == shape


def test_what_stands_out_is_left_out_up_to_the_edge() -> None:
    """Also in the last rows and columns, which make no whole square."""
    image = np.random.default_rng(2).normal(0, 0.01, (254, 254)).astype(np.float32)
    image[250:, 250:] += 0.5
    image[240:248, 240:248] += 0.5
    found = spectrum._stands_out(image)
    assert found[250:, 250:].all()
    assert found.mean() < 0.02
