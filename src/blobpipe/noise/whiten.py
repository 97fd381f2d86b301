"""Measure how the noise of difference images is correlated and how it varies, and whiten images by it.

Noise model
-----------
A difference image is ``n_i = s_i w_i``: white noise that a filter has correlated, of the power spectrum
P(k), times the local standard deviation s_i, both relative to their usual level. Whitening divides by
s and, in Fourier space, by the square root of P. What is left is white, so that a network trained on
white noise, a matched filter and a least-squares fit are right again.

Read-out noise that the outputs of a detector share is subtracted before (`noise.outputs`), and what
whitening leaves is higher where outputs meet, on the scale of blobs: S/N and errors follow it, and the
network sees an image that has been divided by it. Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import bottleneck
import numpy as np
import scipy.fft
from scipy import ndimage

from blobpipe.core import fits_images
from blobpipe.core.arrays import FloatArray, Image
from blobpipe.noise.level import image_noise
from blobpipe.noise.outputs import Layout, OutputNoise, measure_output_noise
from blobpipe.noise.spectrum import (
    disc_snr,
    level_of,
    noise_alone,
    sample_power,
    smooth_power,
)

# Side of the cells in which the local noise is measured (px), and the relative change from which it
# is allowed for; it is measured to 4 %
CELL_PX = 64
MIN_VARIATION = 0.2

# Ratio of signal-to-noise ratios from which noise that outputs share is subtracted
LEAST_GAIN = 1.02

# Factor of the errors of fits where outputs meet: of 5,430 injected blobs, (depth - truth) / error was 1.07 rms without
# it, and (x - truth) / error 1.08
BORDER_ERROR = 1.1

# Excess of the noise of a row or column, on the scale of blobs, from which it is allowed for: four times its error
# on one image; the side of the square whose means tell it, as large as a blob of usual size (px); over how many
# pixels it is averaged; and what larger means count as (sigma): a blob of S/N 5 changes its own row by 4 %
NOISIER = 1.15
COARSE_PX = 12
STRIP_PX = 7
MAX_COARSE_SIGMA = 3.0


@dataclass(frozen=True)
class NoiseModel:
    """Noise of difference images, relative to white noise that is the same everywhere.

    Attributes
    ----------
    power : ndarray, shape (ny, nx // 2 + 1), float32, or None
        Power spectrum in the order of `numpy.fft.rfft2`, relative to its median; None if white. Where outputs
        share noise, that of the rest of one output, in the order of `scipy.fft.dctn`.
    scale : ndarray, shape (ny, nx), float32, or None
        Local standard deviation relative to its median; None if it is the same everywhere.
    outputs : OutputNoise or None
        What the outputs of the detector share; None if they share none.
    coarse : ndarray, shape (ny, nx), float32, or None
        Standard deviation of what whitening leaves, on the scale of blobs, relative to its median; None if it
        is the same everywhere.
    """

    power: Image | None = None
    scale: Image | None = None
    outputs: OutputNoise | None = None
    coarse: Image | None = None

    @property
    def is_white(self) -> bool:
        """Return whether whitening changes nothing."""
        parts = (self.power, self.scale, self.outputs, self.coarse)
        return all(part is None for part in parts)

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
        if self.outputs is not None:
            whitened = self.outputs.whiten(whitened, self.gain)
        elif self.gain is not None:
            missing = ~np.isfinite(whitened)
            level = level_of(whitened)
            filled = np.where(missing, np.float32(0), whitened - level)
            waves = scipy.fft.rfft2(filled) * self.gain
            whitened = scipy.fft.irfft2(waves, s=image.shape) + level
            whitened[missing] = np.nan
        return np.asarray(whitened, np.float32)

    def noise_of(self, flat: Image) -> Image:
        """Return an image less its level, without what stands out of it or of the whitened image.

        Parameters
        ----------
        flat : ndarray, shape (ny, nx), float32
            An image that has been divided by the local scale; NaN where there is no value.

        Returns
        -------
        ndarray, shape (ny, nx), float32
            As `spectrum.noise_alone`; where outputs share noise, as `OutputNoise.noise_of`.
        """
        if self.outputs is not None:
            return self.outputs.noise_of(flat, self.gain)
        return noise_alone(flat, replace(self, scale=None).whiten(flat))

    def even(self, whitened: Image) -> Image:
        """Return a whitened image with the same noise everywhere on the scale of blobs, for a network."""
        return whitened if self.coarse is None else np.asarray(whitened / self.coarse, np.float32)

    @cached_property
    def gain(self) -> Image | None:
        """Return the factor of each frequency in the order of the power, float32; None if it is 1 throughout."""
        return None if self.power is None else np.asarray(1 / np.sqrt(self.power), np.float32)

    def _axes(self, shape: tuple[int, ...]) -> tuple[FloatArray, FloatArray]:
        """Return the frequencies of the power along y and x, in its order, for images of a shape (cycles per pixel)."""
        if self.outputs is not None:
            return self.outputs.frequencies()
        ny, nx = shape
        return np.fft.fftfreq(ny), np.arange(nx // 2 + 1) / nx

    def frequency(self, shape: tuple[int, ...]) -> Image:
        """Return the spatial frequency of each value of the power, for images of a shape (cycles per pixel)."""
        y, x = self._axes(shape)
        return np.asarray(np.hypot(y[:, None], x), np.float32)

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
        if self.gain is None:
            return None
        ny, n_columns = self.gain.shape
        if self.outputs is None:
            row = np.rint(y_frequency * ny).astype(int) % ny
            column = np.rint(x_frequency * 2 * (n_columns - 1)).astype(int)
        else:
            row = np.minimum(np.rint(np.abs(y_frequency) * 2 * ny).astype(int), ny - 1)
            column = np.rint(x_frequency * 2 * n_columns).astype(int)
        return np.asarray(self.gain[row[:, None], np.minimum(column, n_columns - 1)])

    def transfer(
        self, period_px: int, n_waves: int, place: tuple[float, float] = (0.0, 0.0)
    ) -> FloatArray | None:
        """Return by what whitening multiplies the cosines of which a small feature consists.

        Parameters
        ----------
        period_px : int
            Period of the lowest cosine (px), longer than the feature.
        n_waves : int
            Number of cosines along each axis, from the constant on.
        place : (float, float)
            Where the feature is (x, y; px), which matters where outputs share noise.

        Returns
        -------
        ndarray, shape (n_waves, n_waves), float64
            Factor of cosines along y and x: the cosines of the answer of `whiten` to one pixel, within the period.
            Where outputs share noise, `OutputNoise.transfer`. None if it is 1 throughout.
        """
        if self.gain is None:
            return None
        if self.outputs is not None:
            return self.outputs.transfer(self.gain, period_px, n_waves, place)
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
        assert self.gain is not None
        ny, n_columns = self.gain.shape
        answer = scipy.fft.irfft2(self.gain, (ny, 2 * (n_columns - 1)))

        # The cosines of the answer to one pixel, as far as it reaches in this period
        reach = period_px // 2
        distance = np.arange(-reach, reach + 1)
        near = answer[distance % ny][:, distance % answer.shape[1]]
        cosines = np.cos(2 * np.pi / period_px * np.outer(np.arange(n_waves), distance))
        return np.asarray(cosines @ near @ cosines.T)

    def scale_at(self, x: FloatArray, y: FloatArray) -> FloatArray:
        """Return the local scale at positions (px), shape (n,); 1 where it is not known."""
        return _at(self.scale, x, y)

    def coarse_at(self, x: FloatArray, y: FloatArray) -> FloatArray:
        """Return the noise on the scale of blobs at positions (px), relative to the usual one, shape (n,)."""
        return _at(self.coarse, x, y)

    def error_at(self, x: FloatArray, y: FloatArray) -> FloatArray:
        """Return by what a fit's errors are larger at positions (px) than the noise alone makes them, shape (n,)."""
        if self.outputs is None:
            return np.ones(len(x))
        return np.where(self.outputs.is_at_border(x, y), BORDER_ERROR, 1.0)


def _at(scale: Image | None, x: FloatArray, y: FloatArray) -> FloatArray:
    """Return the values of the nearest pixels; 1 if there is no image."""
    if scale is None:
        return np.ones(len(x))
    ny, nx = scale.shape
    column = np.clip(np.rint(np.nan_to_num(x)), 0, nx - 1).astype(int)
    row = np.clip(np.rint(np.nan_to_num(y)), 0, ny - 1).astype(int)
    return np.asarray(scale[row, column], np.float64)


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
    model = _spectral_model([noise_alone(image) for image in flat], scale)
    if model.power is not None:
        # Blobs that stand out of whitened noise alone were taken for noise, and would be whitened away in part
        clear = [model.noise_of(image) for image in flat]
        model = _spectral_model(clear, scale)
    if model.outputs is not None:
        coarse = _coarse_scale([model.whiten(image) for image in images])
        model = replace(model, coarse=coarse)
    return model


def _spectral_model(alone: Sequence[Image], scale: Image | None) -> NoiseModel:
    """Return the model of noise from `spectrum.noise_alone` of images that were divided by a local scale."""
    shape = alone[0].shape
    sample = np.mean([sample_power(image) for image in alone], axis=0)
    model = NoiseModel(smooth_power(sample, shape[1]), scale)

    # What outputs share is worth the work, and the noise of the others, where blobs stand out farther without it
    measured = measure_output_noise(alone)
    if measured is not None:
        outputs, power = measured
        variance = float(np.mean([np.square(image).mean() for image in alone]))
        smooth = np.float32(1) if model.power is None else model.power
        level = variance * float((sample / smooth).mean())
        before = disc_snr(level * smooth, model.frequency(shape))
        without = NoiseModel(power / np.median(power), scale, outputs)
        if disc_snr(power, without.frequency(shape)) > LEAST_GAIN * before:
            return without
    return model


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
    if noise_model.outputs is not None:
        planes["OUTPUTS"] = np.array([noise_model.outputs.layout], np.float32)
        planes["SHARED"] = noise_model.outputs.shared
    if noise_model.coarse is not None:
        planes["COARSE"] = noise_model.coarse
    return planes


def read_noise_model(path: str | Path) -> NoiseModel | None:
    """Read the noise model of a template's file; None if the file has none."""
    log_power = fits_images.find_plane(path, "LOGPOWER")
    if log_power is None:
        return None
    power = np.exp(log_power) if log_power.size > 1 else None
    scale, layout, shared, coarse = (
        fits_images.find_plane(path, name) for name in ("NOISESCALE", "OUTPUTS", "SHARED", "COARSE")
    )
    outputs = None
    if layout is not None and shared is not None:
        rows, columns, is_mirrored = np.rint(layout.ravel()).astype(int).tolist()
        outputs = OutputNoise(Layout(rows, columns, bool(is_mirrored)), shared)
    return NoiseModel(power, scale, outputs, coarse)


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


def _coarse_scale(whitened: Sequence[Image]) -> Image | None:
    """Return the noise of each place on the scale of blobs, relative to its median; None if it is even.

    It is that of the row or of the column, whichever is higher: outputs meet along these.
    """
    power = 0.0
    for image in whitened:
        means = ndimage.uniform_filter(noise_alone(image), COARSE_PX, mode="constant")
        limit = MAX_COARSE_SIGMA * image_noise(means)
        power = power + np.square(np.clip(means, -limit, limit))
    row, column = (np.sqrt(np.mean(power, axis=axis)) for axis in (1, 0))
    row, column = (
        ndimage.uniform_filter1d(
            strip / max(float(np.median(strip)), 1e-9), STRIP_PX, mode="nearest"
        )
        for strip in (row, column)
    )
    coarse = np.maximum(row[:, None], column)
    if coarse.max() < NOISIER:
        return None
    return np.asarray(np.where(coarse >= NOISIER, coarse, 1.0), np.float32)
