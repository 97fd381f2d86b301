"""Measure the power spectrum of the noise of images that show blobs and structure, too.

One image has one sample of the power at each frequency, so the samples are smoothed: over neighbours along one
axis (read-out noise makes narrow lines across the other), over squares, over rings of one spatial
frequency (residual illumination), or not at all. Of these, the one is taken that best predicts the
power at each frequency from the others in the window (Whittle's likelihood, leave-one-out), where each
frequency counts by the power that a blob has there; then again, on what it leaves. White noise is best
predicted by a constant, so it stays exactly as it is. Source: ours; P. Whittle, J. R. Statist. Soc. B
15, 125 (1953).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import bottleneck
import numpy as np
import scipy.fft
from scipy import ndimage

from blobpipe.core.arrays import FloatArray, Image, Int64Array, Mask
from blobpipe.noise.level import image_noise

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


def level_of(image: Image) -> np.float32:
    """Return the median of every fourth row and column; of all pixels if these have no value."""
    level = bottleneck.nanmedian(image[::LEVEL_STEP, ::LEVEL_STEP])
    return np.float32(level if np.isfinite(level) else bottleneck.nanmedian(image))


def noise_alone(image: Image, whitened: Image | None = None) -> Image:
    """Return an image less its level, without what stands out of its noise: bad pixels, blobs and streaks.

    Parameters
    ----------
    image : ndarray, shape (ny, nx), float32
        NaN where there is no value.
    whitened : ndarray, shape (ny, nx), float32, optional
        The same with white noise, of which more stands out: that is left out, too.

    Returns
    -------
    ndarray, shape (ny, nx), float32
        In the same unit; 0 where nothing is known of the noise, all values within `MAX_SIGMA` of it.
    """
    inside = _clipped(image)
    # What stands out of the noise at the scale of blobs, whatever that is here, and what is near it
    stands_out = _stands_out(inside)
    if whitened is not None:
        stands_out |= _stands_out(_clipped(whitened))
    inside[stands_out] = 0
    return inside


def _clipped(image: Image) -> Image:
    """Return an image less its level, within `MAX_SIGMA` of it; 0 where it has no value."""
    limit = np.float32(MAX_SIGMA * image_noise(image))
    inside = image - level_of(image)
    np.clip(inside, -limit, limit, out=inside)
    inside[np.isnan(inside)] = 0
    return inside


def sample_power(alone: Image) -> Image:
    """Return the power of an image from `noise_alone` at each frequency, relative to its mean, in the order of `rfft2`."""
    waves = scipy.fft.rfft2(alone)
    power = waves.real**2 + waves.imag**2
    power[0, 0] = power[0, 1]
    mean = power.mean()
    return np.asarray(power / (mean if mean > 0 else 1.0), np.float32)


def disc_snr(power: Image | np.float32, frequency: Image) -> float:
    """Return the signal-to-noise ratio of a disc of typical size that is searched for by a matched filter.

    Parameters
    ----------
    power : ndarray, or one number
        Power of the noise at each frequency.
    frequency : ndarray
        Spatial frequencies (cycles per pixel).

    Returns
    -------
    float
        In a unit of its own.
    """
    return float(np.sqrt((disc_power(frequency) / power).mean()))


def _stands_out(image: Image) -> Mask:
    """Return which pixels lie in squares, or beside squares, whose mean is no noise; shape (ny, nx)."""
    ny, nx = (side // SQUARE_PX for side in image.shape)
    if not ny or not nx:
        return np.zeros(image.shape, bool)
    whole = image[: ny * SQUARE_PX, : nx * SQUARE_PX]
    columns = whole.reshape(ny, SQUARE_PX, nx * SQUARE_PX).mean(axis=1)
    mean = columns.reshape(ny, nx, SQUARE_PX).mean(axis=2)
    bright = np.abs(mean) > MAX_MEAN_SIGMA * image_noise(mean)
    if not bright.any():
        return np.zeros(image.shape, bool)
    near = ndimage.binary_dilation(bright, np.ones((3, 3)))

    # Pixels beyond the last whole square belong to it
    inside = near.repeat(SQUARE_PX, axis=0).repeat(SQUARE_PX, axis=1)
    beyond = [(0, side % SQUARE_PX) for side in image.shape]
    return np.asarray(np.pad(inside, beyond, mode="edge"))


def smooth_power(sample: Image, nx: int) -> Image | None:
    """Return the smoothed power relative to its median; None if it is the same at all frequencies.

    Parameters
    ----------
    sample : ndarray, shape (ny, nx // 2 + 1), float32
        Power at each frequency.
    nx : int
        Width of the image (px).
    """
    frequency = frequencies(sample.shape, nx)
    side = max(len(sample), nx)

    smoothings: list[_Window | _Rings] = [*map(_Window, WINDOWS), _Rings(side)]

    # The choice is made on the lowest frequencies, as far as a blob has power, and a margin of a window
    low = _Low(
        *(round(BAND * n) + max(max(window) for window in WINDOWS) for n in (len(sample), nx))
    )
    sample_low = low.cut(sample)
    frequency_low = low.cut(frequency)
    weight = np.where(frequency_low <= BAND, disc_power(frequency_low), 0.0)
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
def frequencies(shape: tuple[int, ...], nx: int) -> Image:
    """Return the spatial frequency of each value of a spectrum (cycles per pixel)."""
    along_y = np.fft.fftfreq(shape[0])
    along_x = np.arange(shape[1]) / nx
    return np.asarray(np.hypot(along_y[:, None], along_x), np.float32)


def disc_power(frequency: Image) -> FloatArray:
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
