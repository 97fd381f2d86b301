"""Noise that the outputs of a detector share: found where it is, subtracted, and nothing else with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from blobpipe.core import fits_images
from blobpipe.core.arrays import Image
from blobpipe.core.blob_shapes import SHAPES, Shape, blob_profile
from blobpipe.core.cutouts import cut_square
from blobpipe.detection.fit import fit_blobs
from blobpipe.noise.level import image_noise
from blobpipe.noise.outputs import LAYOUTS, Layout, OutputNoise, measure_output_noise
from blobpipe.noise.spectrum import noise_alone, sample_power, smooth_power
from blobpipe.noise.whiten import (
    BORDER_ERROR,
    WHITE,
    NoiseModel,
    measure_noise_model,
    noise_model_planes,
    read_noise_model,
)
from blobpipe.simulation.inject import add_blob

SIDE = 512
SIGMA = 0.01
STRIPES = Layout(1, 4, True)


def measure_noise(images: list[Image]) -> OutputNoise | None:
    measured = measure_output_noise([noise_alone(image) for image in images])
    return measured and measured[0]


def pink(shape: tuple[int, int], rng: np.random.Generator) -> Image:
    """1/f noise in the order of reading, row after row, without its slow part."""
    n = shape[0] * shape[1]
    frequency = np.fft.rfftfreq(n)
    frequency[0] = frequency[1]
    slow = np.fft.irfft(np.fft.rfft(rng.normal(size=n)) / np.sqrt(frequency), n)
    fast = slow.reshape(shape) - gaussian_filter(slow.reshape(shape), 20)
    return np.asarray(fast / fast.std(), np.float32)


def shared(
    layout: Layout = STRIPES,
    *,
    amount: float = 1.0,
    seed: int = 1,
    shape: tuple[int, int] = (SIDE, SIDE),
) -> Image:
    """White noise, and noise of so many times its standard deviation that is the same in all parts."""
    rng = np.random.default_rng([seed, 3])
    part = (shape[0] // layout.rows, shape[1] // layout.columns)
    common = pink(part if layout.columns > 1 else part[::-1], rng)
    common = common if layout.columns > 1 else common.T
    parts = np.repeat(common[None], layout.n_outputs, axis=0)
    noise = rng.normal(0, 1, shape) + amount * layout.join(parts)
    return np.asarray(SIGMA * noise, np.float32)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_parts_make_the_image_again(layout: Layout) -> None:
    image = np.arange(64 * 96, dtype=np.float32).reshape(64, 96)
    parts = layout.divide(image)
    assert parts.shape == (layout.n_outputs, 64 // layout.rows, 96 // layout.columns)
    np.testing.assert_array_equal(layout.join(parts), image)


def test_neighbours_are_read_towards_each_other() -> None:
    image = np.tile(np.arange(8, dtype=np.float32), (4, 1))
    first, second = Layout(1, 2, True).divide(image)
    np.testing.assert_array_equal(first[0], [0, 1, 2, 3])
    np.testing.assert_array_equal(second[0], [7, 6, 5, 4])
    assert Layout(1, 4, True).fits((256, 256))
    assert not Layout(1, 8, True).fits((256, 256))
    assert not Layout(1, 3, True).fits((256, 256))


@pytest.mark.parametrize("layout", [each for each in LAYOUTS if each.n_outputs in (4, 32)], ids=str)
def test_how_the_outputs_lie_is_found(layout: Layout) -> None:
    side = 64 * layout.n_outputs  # as wide as those of Euclid's detectors
    found = measure_noise([shared(layout, shape=(max(SIDE, side), max(SIDE, side)))])
    assert found is not None
    assert found.layout == layout


def test_images_without_their_reference_pixels_have_the_same_outputs() -> None:
    image = shared(shape=(1024, 1024))[5:-5, 5:-5]
    found = measure_noise([image])
    assert found is not None
    assert found.layout == STRIPES
    rest = found.whiten(image, None)
    assert rest.shape == image.shape
    assert image_noise(rest) < 0.8 * image_noise(image)


def test_what_is_shared_is_gone_and_the_rest_is_there() -> None:
    """The best estimate from three others leaves a third of the noise of one output more."""
    common = shared(amount=1.0) - shared(amount=0.0)
    own = shared(amount=0.0)
    found = measure_noise([own + common])
    assert found is not None
    rest = found.whiten(own + common, None)
    left = rest - own
    inner = gaussian_filter(left, 3)[10:-10, 10:-10]
    before = gaussian_filter(common, 3)[10:-10, 10:-10]
    assert inner.std() < 0.3 * before.std()
    assert np.corrcoef(rest.ravel(), own.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("seed", range(3))
def test_outputs_that_share_nothing_are_left_alone(seed: int) -> None:
    """Also where the noise goes on along rows through all of them, or there are illumination and blobs."""
    rng = np.random.default_rng(seed)
    white = rng.normal(0, 1, (SIDE, SIDE))
    slow = gaussian_filter(rng.normal(0, 1, (SIDE, SIDE)), 20)
    blobs = np.zeros((SIDE, SIDE))
    for x in (60, 188, 316, 444):
        blobs[180:221, x - 20 : x + 21] += blob_profile("disc", 6.0, size=41)
    for image in (
        white,
        white + pink((SIDE, SIDE), rng),
        white + 2 * slow / slow.std(),
        white + 10 * blobs,
        blobs,
    ):
        assert measure_noise([(SIGMA * image).astype(np.float32)]) is None


def test_a_strong_source_leaves_no_trace_in_the_other_outputs() -> None:
    image = shared()
    with_source = image.copy()
    with_source[180:221, 44:85] -= 1.0 * blob_profile("disc", 6.0, size=41)
    found = measure_noise([image])
    assert found is not None
    change = found.whiten(with_source, None) - found.whiten(image, None)
    profile = blob_profile("disc", 6.0, size=41)
    for x in (64, 191, 320, 447):  # where the others are read at the same moment
        there = change[180:221, x - 20 : x + 21]
        amplitude = (there * profile).sum() / np.square(profile).sum()
        assert amplitude == pytest.approx(-1.0 if x == 64 else 0.0, abs=0.02)


@pytest.mark.parametrize("depth", [0.02, 0.04, 0.1])
def test_a_blob_that_only_whitening_makes_stand_out_leaves_no_trace_either(depth: float) -> None:
    image = shared(amount=3.0)
    blob = depth * blob_profile("disc", 6.0, size=41)
    alone = image.copy()
    image[180:221, 44:85] += blob
    model = measure_noise_model(image)
    assert model.outputs is not None
    change = model.outputs.whiten(image, None) - model.outputs.whiten(alone, None)
    for x in (191, 320, 447):
        there = change[180:221, x - 20 : x + 21]
        assert abs((there * blob).sum()) < 0.2 * np.square(blob).sum(), x


def test_blobs_are_no_part_of_the_noise_that_is_measured() -> None:
    image = shared(amount=3.0)
    with_blobs = image.copy()
    for x, y in ((40, 60), (200, 180), (300, 300), (470, 420)):
        with_blobs[y - 20 : y + 21, x - 20 : x + 21] += 0.05 * blob_profile("disc", 6.0, size=41)
    model, with_them = measure_noise_model(image), measure_noise_model(with_blobs)
    assert model.outputs is not None
    assert with_them.outputs is not None
    assert model.power is not None
    assert with_them.power is not None
    low = model.frequency(image.shape) < 0.1
    ratio = np.log(with_them.power / model.power)[low]
    assert abs(ratio.mean()) < 0.2


def test_errors_are_larger_where_outputs_meet() -> None:
    model = measure_noise_model(shared(amount=2.0))
    assert model.outputs is not None
    x = np.array([64.0, 120.0, 136.0, 200.0, 256.0, np.nan])
    is_at_border = model.outputs.is_at_border(x, np.full(6, 200.0))
    np.testing.assert_array_equal(is_at_border, [False, True, True, False, True, True])
    np.testing.assert_array_equal(
        model.error_at(x, np.full(6, 200.0)), np.where(is_at_border, BORDER_ERROR, 1)
    )
    np.testing.assert_array_equal(WHITE.error_at(x, x), np.ones(6))


def test_a_blob_stands_out_farther_without_what_is_shared() -> None:
    """In the same unit: the S/N of the fitted blob, whose depth is not changed by it."""
    snrs: dict[bool, list[float]] = {True: [], False: []}
    depths = []
    for seed in range(12):
        image = shared(amount=2.0, seed=seed)
        x = 40 + 36 * seed
        image[180:221, x - 20 : x + 21] += 0.04 * blob_profile("disc", 5.0, size=41)
        model = measure_noise_model(image)
        assert model.outputs is not None
        place = (np.array([float(x)]), np.array([200.0]), np.array([1.0]))
        for is_told in (True, False):
            used = model if is_told else spectrum_alone(image)
            whitened = used.whiten(image)
            fit = fit_blobs(whitened, *place, image_noise(whitened), used).iloc[0]
            snrs[is_told].append(fit["snr"])
            if is_told:
                depths.append(fit["depth_frac"])
    assert np.mean(snrs[True]) > 1.1 * np.mean(snrs[False])
    assert np.mean(depths) == pytest.approx(0.04, rel=0.05)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("x_px", [240.5, 250.2, 256.0, 261.7, 276.4])
def test_a_blob_where_outputs_meet_has_its_depth(x_px: float, shape: Shape) -> None:
    """Both outputs whiten their own part of it: the fit knows, so that nothing of the depth is lost."""
    frequency = np.hypot(np.arange(SIDE)[:, None] / (2 * SIDE), np.arange(128) / 256)
    power = np.asarray(1 + 4 * np.exp(-np.square(frequency / 0.03)), np.float32)
    model = NoiseModel(power, outputs=OutputNoise(STRIPES, np.zeros_like(power)))
    image = np.zeros((SIDE, SIDE), np.float32)
    add_blob(image, shape=shape, x_px=x_px, y_px=200.3, radius_px=5.5, depth_frac=0.2)
    place = (np.array([x_px + 0.6]), np.array([199.8]), np.array([1.0]))
    fit = fit_blobs(model.whiten(image), *place, SIGMA, model).iloc[0]
    assert fit["depth_frac"] * (1 + 3 / fit["snr"] ** 2) == pytest.approx(0.2, rel=0.01)
    assert fit["x_px"] == pytest.approx(x_px, abs=0.03)
    assert fit["y_px"] == pytest.approx(200.3, abs=0.03)
    assert fit["radius_px"] == pytest.approx(5.5, rel=0.01)


@pytest.mark.parametrize(("x", "y"), [(240, 200), (250, -10), (-7, 500), (128 - 16, 128 - 16)])
@pytest.mark.parametrize("border", [0, 5])
def test_a_square_is_whitened_as_on_the_image(x: int, y: int, border: int) -> None:
    """Also beyond the end of the image, and where the image comes without its reference pixels."""
    shape = (1024 - 2 * border,) * 2
    rng = np.random.default_rng(3)
    power = np.asarray(rng.uniform(0.5, 2.0, (1024, 256)), np.float32)
    model = NoiseModel(power, outputs=OutputNoise(STRIPES, np.zeros_like(power)))
    assert model.outputs is not None
    assert model.gain is not None
    square = np.asarray(rng.normal(0, 1, (33, 33)), np.float32)
    image = np.zeros(shape, np.float32)
    image[max(y, 0) : y + 33, max(x, 0) : x + 33] = square[max(-y, 0) :, max(-x, 0) :]
    alone = model.outputs.whiten_square(square, x, y, shape, model.gain)
    expected = cut_square(model.whiten(image), x, y, 33)
    np.testing.assert_allclose(alone, expected, atol=1e-4)


def spectrum_alone(image: Image) -> NoiseModel:
    """The noise model of before: whitened by the power spectrum of the whole image."""
    return NoiseModel(smooth_power(sample_power(noise_alone(image)), image.shape[1]))


def test_values_are_missing_where_they_were() -> None:
    image = shared()
    image[:5] = image[100, 50] = np.nan
    model = measure_noise_model(image)
    assert model.outputs is not None
    whitened = model.whiten(image)
    np.testing.assert_array_equal(np.isnan(whitened), np.isnan(image))
    assert whitened.dtype == np.float32


def test_a_model_survives_a_file(tmp_path: Path) -> None:
    model = measure_noise_model(np.stack([shared(seed=seed) for seed in range(3)]))
    assert model.outputs is not None
    assert model.power is not None
    planes = {"STACK": shared(seed=4)} | noise_model_planes(model)
    fits_images.write_images(tmp_path / "a.fits.fz", planes, sigma=SIGMA)
    read = read_noise_model(tmp_path / "a.fits.fz")
    assert read is not None
    assert read.outputs is not None
    assert read.outputs.layout == model.outputs.layout
    image = shared(seed=5)
    np.testing.assert_allclose(read.whiten(image), model.whiten(image), atol=0.02 * SIGMA)


@pytest.mark.parametrize("middle", [30, 64, 98])
def test_a_small_feature_is_whitened_by_the_gain_of_its_waves(middle: int) -> None:
    """As on the whole image: what the fit takes for a whitened blob is one, with its mirror image beyond the border."""
    model = measure_noise_model(np.stack([shared(seed=seed) for seed in range(3)]))
    assert model.outputs is not None
    image = np.zeros((SIDE, SIDE), np.float32)
    profile = blob_profile("disc", 5.0, size=49)
    x = 128 + middle  # in the second of four outputs
    image[200:249, x - 24 : x + 25] = profile
    on_image = model.whiten(image)[200:249, x - 24 : x + 25]
    transfer = model.transfer(49, 25, (float(x), 224.0))
    assert transfer is not None
    spectrum = np.fft.fft2(profile)
    order = np.minimum(np.arange(49), 49 - np.arange(49))
    whitened = np.fft.ifft2(spectrum * transfer[order[:, None], order]).real
    inner = np.s_[12:37, 12:37]
    assert np.abs(whitened - on_image)[inner].max() < 0.01 * profile.max()


@pytest.mark.parametrize("amount", [0.0, 0.5])
def test_noise_that_is_higher_where_outputs_meet_is_divided_by_it(amount: float) -> None:
    """On the scale of blobs; depths stay in the unit of the image, the S/N is that of the noise there."""
    rng = np.random.default_rng(6)
    images = []
    for seed in range(4):
        coarse = gaussian_filter(rng.normal(0, 1, (SIDE, SIDE)), 4)
        coarse[:, :246] = coarse[:, 266:] = 0
        images.append(
            shared(amount=2.0, seed=seed) + amount * SIGMA * coarse / coarse[:, 256].std()
        )
    model = measure_noise_model(np.asarray(images, np.float32))
    assert model.outputs is not None
    if not amount:
        assert model.coarse is None
        return
    assert model.coarse is not None
    assert (model.coarse[:, 252:260] > 1.15).all()
    assert (model.coarse[:, 20:230] == 1).mean() > 0.9
    places = np.array([256.0, 100.0]), np.array([200.0, 200.0])
    np.testing.assert_allclose(model.coarse_at(*places), [model.coarse[200, 256], 1])
    whitened = model.whiten(images[0])
    np.testing.assert_allclose(model.even(whitened) * model.coarse, whitened, rtol=1e-5)
