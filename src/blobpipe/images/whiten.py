"""Measure how the noise of difference images is correlated and how it varies, and whiten images by it.

Noise model
-----------
A difference image is ``n_i = s_i w_i``: white noise that a filter has correlated, of the power spectrum
P(k), times the local standard deviation s_i, both relative to their usual level. Whitening divides by
s and, in Fourier space, by the square root of P. What is left is white, so that a network trained on
white noise, a matched filter and a least-squares fit are right again.

Spectrum
--------
One image has one sample of the power at each frequency, so P is smoothed: over neighbours along one
axis (read-out noise makes narrow lines across the other), over squares, over rings of one spatial
frequency (residual illumination), or not at all. Of these, the one is taken that best predicts the
power at each frequency from the others in the window (Whittle's likelihood, leave-one-out), where each
frequency counts by the power that a blob has there; then again, on what it leaves. White noise is best
predicted by a constant, so it stays exactly as it is. Source: ours; P. Whittle, J. R. Statist. Soc. B
15, 125 (1953).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import bottleneck
import numpy as np
import scipy.fft
from scipy import ndimage

from blobpipe.core import fits_images
from blobpipe.core.arrays import FloatArray, Image, Int64Array, Mask
from blobpipe.images.noise import image_noise

# Values beyond are set to this before the spectrum is measured, and means over a square (px) beyond are
# left out with their surroundings: bad pixels, blobs and streaks are no noise
MAX_SIGMA = 4.0
MAX_MEAN_SIGMA = 5.0
SQUARE_PX = 8

# Neighbours over which the power is smoothed, along the two axes of frequency (count)
WINDOWS = ((65, 1), (1, 65), (17, 17))

# Ratio of the radii of a ring of frequencies, and the radius of the first one (cycles per image)
RING_RATIO = 1.3
FIRST_RING = 1.5

# Steps of smoothing at most, and the least that one must gain in log-likelihood per frequency (nat)
MAX_STEPS = 3
MIN_GAIN = 3e-3

# Radius of the disc whose power weights the frequencies (px), and the highest spatial frequency that
# takes part in the choice (cycles per pixel); beyond it such a disc has next to no power
TYPICAL_RADIUS_PX = 5.0
BAND = 0.12

# A change of the power is kept where it is this often its own standard deviation; all are, or those
SIGNIFICANT = (0.0, 2.5)

# Lowest power relative to the white level: an image without any power there gives none
MIN_POWER = 0.05

# Step between the pixels whose median is the level of an image (px)
LEVEL_STEP = 4

# Side of the cells in which the local noise is measured (px), and the relative change from which it
# is allowed for; it is measured to 4 %
CELL_PX = 64
MIN_VARIATION = 0.2


@dataclass(frozen=True)
class NoiseModel:
    """Noise of difference images, relative to white noise that is the same everywhere.

    Attributes
    ----------
    power : ndarray, shape (ny, nx // 2 + 1), float32, or None
        Power spectrum in the order of `numpy.fft.rfft2`, relative to its median; None if white.
    scale : ndarray, shape (ny, nx), float32, or None
        Local standard deviation relative to its median; None if it is the same everywhere.
    """

    power: Image | None = None
    scale: Image | None = None

    @property
    def is_white(self) -> bool:
        """Return whether whitening changes nothing."""
        return self.power is None and self.scale is None

    def whiten(self, image: Image) -> Image:
        """Return an image whose noise is white and the same everywhere.

        Parameters
        ----------
        image : ndarray, shape (ny, nx), float32
            In any unit; NaN where there is no value.

        Returns
        -------
        ndarray, shape (ny, nx), float32
            In the same unit, NaN where the image has no value; the image itself if the noise is white.
        """
        if self.is_white:
            return image
        whitened = image if self.scale is None else image / self.scale
        if self.power is None:
            return np.asarray(whitened)
        missing = ~np.isfinite(whitened)
        level = _level(whitened)
        filled = np.where(missing, np.float32(0), whitened - level)
        waves = scipy.fft.rfft2(filled) * self._gain
        whitened = scipy.fft.irfft2(waves, s=image.shape) + level
        whitened[missing] = np.nan
        return np.asarray(whitened, np.float32)

    @cached_property
    def _gain(self) -> Image:
        """Return the factor of each frequency, shape (ny, nx // 2 + 1), float32."""
        assert self.power is not None
        return np.asarray(1 / np.sqrt(self.power), np.float32)

    def gain_at(self, y_frequency: FloatArray, x_frequency: FloatArray) -> Image | None:
        """Return by what whitening multiplies waves; None if it is 1 throughout.

        Parameters
        ----------
        y_frequency, x_frequency : ndarray, shape (m,) and (n,)
            Frequencies (cycles per pixel) from -0.5 to 0.5, and from 0 to 0.5.

        Returns
        -------
        ndarray, shape (m, n), float32
            That of the nearest measured frequency.
        """
        if self.power is None:
            return None
        ny, n_columns = self._gain.shape
        nx = 2 * (n_columns - 1)
        row = np.rint(y_frequency * ny).astype(int) % ny
        column = np.minimum(np.rint(x_frequency * nx).astype(int), n_columns - 1)
        return np.asarray(self._gain[row[:, None], column])

    def transfer(self, period_px: int, n_waves: int) -> FloatArray | None:
        """Return by what whitening multiplies the cosines of which a small feature consists.

        Parameters
        ----------
        period_px : int
            Period of the lowest cosine (px), longer than the feature.
        n_waves : int
            Number of cosines along each axis, from the constant on.

        Returns
        -------
        ndarray, shape (n_waves, n_waves), float64
            Factor of cosines along y and x: the mean over the frequencies that a window of this
            period cannot tell apart. None if it is 1 throughout.
        """
        if self.power is None:
            return None
        asked = (period_px, n_waves)
        if asked not in self._transfers:
            self._transfers[asked] = self._transfer(*asked)
        return self._transfers[asked]

    @cached_property
    def _transfers(self) -> dict[tuple[int, int], FloatArray]:
        """Return what `transfer` has been asked before; the model of a stack serves many images."""
        return {}

    def _transfer(self, period_px: int, n_waves: int) -> FloatArray:
        """Return what `transfer` does, for noise that is not white."""
        ny, n_columns = self._gain.shape
        nx = 2 * (n_columns - 1)
        row = np.rint(np.abs(np.fft.fftfreq(ny)) * period_px).astype(int)
        column = np.rint(np.arange(n_columns) / nx * period_px).astype(int)

        # Mean gain around each cosine; cosines above the highest frequency stay as they are
        shape = (period_px, period_px)
        cell = np.ravel_multi_index((row[:, None], column[None]), shape)
        total = np.bincount(cell.ravel(), self._gain.ravel(), period_px**2).reshape(shape)
        number = np.bincount(cell.ravel(), minlength=period_px**2).reshape(shape)
        mean = np.where(number > 0, total / np.maximum(number, 1), 1.0)
        return np.asarray(mean[:n_waves, :n_waves])

    def scale_at(self, x: FloatArray, y: FloatArray) -> FloatArray:
        """Return the local scale at positions (px), shape (n,); 1 where it is not known."""
        if self.scale is None:
            return np.ones(len(x))
        ny, nx = self.scale.shape
        column = np.clip(np.rint(np.nan_to_num(x)), 0, nx - 1).astype(int)
        row = np.clip(np.rint(np.nan_to_num(y)), 0, ny - 1).astype(int)
        return np.asarray(self.scale[row, column], np.float64)


WHITE = NoiseModel()


def measure_noise_model(images: Sequence[Image] | Image) -> NoiseModel:
    """Measure the noise model of one difference image, or of several alike.

    Parameters
    ----------
    images : sequence of ndarray, shape (ny, nx), float32
        Differences, or what images of a stack differ from it by; NaN where there is no value. They
        may show blobs, bad pixels and streaks.

    Returns
    -------
    NoiseModel
        `WHITE` if the noise is.
    """
    images = np.asarray(images)
    images = images[None] if images.ndim == 2 else images
    scale = _local_scale(images)
    flat = images if scale is None else images / scale
    powers = [_sample_power(image) for image in flat]
    return NoiseModel(_smooth_power(np.mean(powers, axis=0), images.shape[2]), scale)


def noise_model_planes(noise_model: NoiseModel | None) -> dict[str, Image]:
    """Return a noise model as planes of a FITS file, for `read_noise_model`."""
    if noise_model is None:
        return {}
    if noise_model.power is None:
        planes = {"LOGPOWER": np.zeros((1, 1), np.float32)}
    else:
        planes = {"LOGPOWER": np.log(noise_model.power)}
    if noise_model.scale is not None:
        planes["NOISESCALE"] = noise_model.scale
    return planes


def read_noise_model(path: str | Path) -> NoiseModel | None:
    """Read the noise model of a template's file; None if the file has none."""
    log_power = fits_images.find_plane(path, "LOGPOWER")
    if log_power is None:
        return None
    power = np.exp(log_power) if log_power.size > 1 else None
    return NoiseModel(power, fits_images.find_plane(path, "NOISESCALE"))


def _local_scale(images: Image) -> Image | None:
    """Return the local standard deviation relative to its median; None if it varies too little."""
    _, ny, nx = images.shape
    rows = max(ny // CELL_PX, 1)
    columns = max(nx // CELL_PX, 1)

    # Robust standard deviation in each cell, of every second row and column
    ny_cell = ny // rows
    nx_cell = nx // columns
    part = images[:, : rows * ny_cell, : columns * nx_cell]
    part = part.reshape(len(images), rows, ny_cell, columns, nx_cell)[:, :, ::2, :, ::2]
    pixels = np.moveaxis(part, (1, 3), (0, 1)).reshape(rows, columns, -1)
    deviation = np.abs(pixels - bottleneck.nanmedian(pixels, axis=2)[:, :, None])
    cells = 1.4826 * bottleneck.nanmedian(deviation, axis=2)
    usual = bottleneck.nanmedian(cells)
    if not usual > 0:
        return None
    relative = np.nan_to_num(cells / usual, nan=1.0)

    # The median of neighbours, so that no single structure is taken for noise
    smooth = ndimage.median_filter(relative, 3, mode="nearest")
    if smooth.max() < 1 + MIN_VARIATION and smooth.min() > 1 - MIN_VARIATION:
        return None
    y = (np.arange(ny) + 0.5) / ny_cell - 0.5
    x = (np.arange(nx) + 0.5) / nx_cell - 0.5
    grid = np.meshgrid(y, x, indexing="ij")
    scale = ndimage.map_coordinates(smooth, grid, order=1, mode="nearest")
    return np.asarray(np.maximum(scale, 0.1), np.float32)


def _level(image: Image) -> np.float32:
    """Return the median of every fourth row and column; of all pixels if these have no value."""
    level = bottleneck.nanmedian(image[::LEVEL_STEP, ::LEVEL_STEP])
    return np.float32(level if np.isfinite(level) else bottleneck.nanmedian(image))


def _sample_power(image: Image) -> Image:
    """Return the power of an image at each frequency, relative to its mean."""
    limit = np.float32(MAX_SIGMA * image_noise(image))
    inside = np.clip(np.nan_to_num(image - _level(image)), -limit, limit)

    # What stands out of the noise at the scale of blobs, whatever that is here, and what is near it
    inside[_stands_out(inside)] = 0
    waves = scipy.fft.rfft2(inside)
    power = waves.real**2 + waves.imag**2
    power[0, 0] = power[0, 1]
    mean = power.mean()
    return np.asarray(power / (mean if mean > 0 else 1.0), np.float32)


def _stands_out(image: Image) -> Mask:
    """Return which pixels lie in squares, or beside squares, whose mean is no noise; shape (ny, nx)."""
    ny, nx = (side // SQUARE_PX for side in image.shape)
    if not ny or not nx:
        return np.zeros(image.shape, bool)
    whole = image[: ny * SQUARE_PX, : nx * SQUARE_PX]
    mean = whole.reshape(ny, SQUARE_PX, nx, SQUARE_PX).mean(axis=(1, 3))
    bright = np.abs(mean) > MAX_MEAN_SIGMA * image_noise(mean)
    if not bright.any():
        return np.zeros(image.shape, bool)
    near = ndimage.binary_dilation(bright, np.ones((3, 3)))

    # Pixels beyond the last whole square belong to it
    row = np.minimum(np.arange(image.shape[0]) // SQUARE_PX, ny - 1)
    column = np.minimum(np.arange(image.shape[1]) // SQUARE_PX, nx - 1)
    return np.asarray(near[row[:, None], column])


def _smooth_power(sample: Image, nx: int) -> Image | None:
    """Return the smoothed power relative to its median; None if it is the same at all frequencies.

    Parameters
    ----------
    sample : ndarray, shape (ny, nx // 2 + 1), float32
        Power at each frequency.
    nx : int
        Width of the image (px).
    """
    frequency = _frequency(sample.shape, nx)
    side = max(len(sample), nx)

    smoothings: list[_Window | _Rings] = [*map(_Window, WINDOWS), _Rings(side)]

    # The choice is made on the lowest frequencies, as far as a blob has power, and a margin of a window
    low = _Low(
        *(round(BAND * n) + max(max(window) for window in WINDOWS) for n in (len(sample), nx))
    )
    sample_low = low.cut(sample)
    frequency_low = low.cut(frequency)
    weight = np.where(frequency_low <= BAND, _disc_power(frequency_low), 0.0)
    weight /= weight.sum()

    # Smooth what the steps before have left, as long as others predict each frequency better by it
    power: Image = np.ones_like(sample)
    predicted: Image = np.ones_like(sample_low)  # from all frequencies but the own
    cost = float((weight * sample_low).sum())
    for _ in range(MAX_STEPS):
        rest_low = sample_low / predicted
        best: tuple[float, Image, _Window | _Rings, float] | None = None
        for smoothing in smoothings:
            mean, n = smoothing.mean(rest_low, frequency_low)
            others = np.asarray((n * mean - rest_low) / np.maximum(n - 1, 1), np.float32)
            for significant in SIGNIFICANT:
                new: Image = np.multiply(predicted, _kept(others, n, significant))
                new_cost = float((weight * (np.log(new) + sample_low / new)).sum())
                if new_cost < (best[0] if best else cost - MIN_GAIN):
                    best = (new_cost, new, smoothing, significant)
        if best is None:
            break
        cost, predicted, smoothing, significant = best
        mean, n = smoothing.mean(np.divide(sample, power, dtype=np.float32), frequency)
        power *= _kept(mean, n, significant)
    if bool((power == 1).all()):
        return None
    relative = power / np.float32(bottleneck.median(power))
    return np.asarray(np.maximum(relative, MIN_POWER), np.float32)


class _Low(NamedTuple):
    """The lowest frequencies of a spectrum, so many along y in both directions, and along x."""

    ny: int
    nx: int

    def cut(self, spectrum: Image) -> Image:
        """Return the part of a spectrum at these frequencies, in the same order."""
        if 2 * self.ny >= len(spectrum):
            return spectrum[:, : self.nx]
        return np.concatenate([spectrum[: self.ny, : self.nx], spectrum[-self.ny :, : self.nx]])


@lru_cache(maxsize=4)
def _frequency(shape: tuple[int, ...], nx: int) -> Image:
    """Return the spatial frequency of each value of a spectrum (cycles per pixel)."""
    along_y = np.fft.fftfreq(shape[0])
    along_x = np.arange(shape[1]) / nx
    return np.asarray(np.hypot(along_y[:, None], along_x), np.float32)


def _disc_power(frequency: Image) -> FloatArray:
    """Return the power of a disc of the typical radius at each spatial frequency, relative to the lowest."""
    from scipy.special import j1

    phase = 2 * np.pi * TYPICAL_RADIUS_PX * np.maximum(frequency.astype(np.float64), 1e-6)
    return np.asarray(np.square(2 * j1(phase) / phase))


class _Window(NamedTuple):
    """Smoothing over a window around each frequency, of so many along the two axes."""

    shape: tuple[int, int]

    def mean(self, power: Image, frequency: Image) -> tuple[Image, Int64Array]:
        """Return the mean power in the window around each frequency, and of how many it is."""
        # The first axis of a spectrum goes around, the second turns back at both ends
        for axis, (n, mode) in enumerate(zip(self.shape, ("wrap", "mirror"), strict=True)):
            if n > 1:
                power = ndimage.uniform_filter1d(power, n, axis, mode=mode)
        return power, np.full((1, 1), self.shape[0] * self.shape[1])


class _Rings(NamedTuple):
    """Smoothing over rings of one spatial frequency, of an image with this longer side (px)."""

    side: int

    def mean(self, power: Image, frequency: Image) -> tuple[Image, Int64Array]:
        """Return the mean power in the ring of each frequency, and of how many it is."""
        cycles = np.maximum(frequency * self.side / FIRST_RING, 1)
        ring = np.asarray(np.log(cycles) / np.log(RING_RATIO), np.int64)
        number = np.bincount(ring.ravel())
        mean = np.bincount(ring.ravel(), power.ravel()) / np.maximum(number, 1)
        return np.asarray(mean[ring], np.float32), number[ring]


def _kept(mean: Image, n: Int64Array, significant: float) -> Image:
    """Return the means of so many that differ from 1 by a number of standard deviations, else 1."""
    mean = np.maximum(mean, np.float32(1e-3))
    if not significant:
        return mean
    is_kept = np.abs(np.log(mean)) > significant / np.sqrt(n)
    return np.where(is_kept, mean, np.float32(1))
