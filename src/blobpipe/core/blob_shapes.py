"""Shapes of blobs: a particle on the CSM mirror, seen through the defocused pupil of the telescope.

A blob is the footprint of the pupil on the mirror, convolved with the particle, slightly blurred, and averaged over
pixels. All four have closed Fourier transforms, so a profile is exact at any sub-pixel position.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np

from blobpipe.core.arrays import Float32Array, FloatArray

Shape = Literal["disc", "diamond", "ring"]
SHAPES: tuple[Shape, ...] = ("disc", "diamond", "ring")

# Central obstruction of the telescope's pupil: diameter of the secondary mirror over that of the primary
OBSTRUCTION = 0.33

# Gaussian sigma of diffraction and jitter at the edge of a blob (px); measured on real median stacks
BLUR_PX = 0.55

# Fine pixels per pixel along each axis; the blurred edges have no power at higher frequencies
OVERSAMPLING = 3


def blob_profile(
    shape: Shape, radius_px: float, x_offset: float = 0.0, y_offset: float = 0.0, size: int = 41
) -> Float32Array:
    """Return the light loss of a blob, divided by its depth, on a square of pixels.

    Parameters
    ----------
    shape : {"disc", "diamond", "ring"}
        disc: a particle of about the size of the pupil; diamond: the same behind an astigmatic focus; ring: a
        particle so small that the obstruction of the pupil shows, with a bright spot in the centre.
    radius_px : float
        Radius of the top-hat that detects the blob best (px), 0.5 to about ``size / 3.5``.
    x_offset, y_offset : float
        Position of the blob's centre relative to that of the middle pixel (px).
    size : int
        Side of the square (px), odd.

    Returns
    -------
    ndarray, shape (size, size), float32
        The maximum of the profile is 1; it may lie between pixels.

    Notes
    -----
    Source: this project, after the shapes in real median stacks.
    """
    spectrum, peak = _spectrum(shape, float(radius_px), size)
    fx, fy = _frequencies(size)
    # A phase ramp moves the profile from the corner to the middle of the square, and by the offset
    middle = size // 2
    ramp_y = np.exp(-2j * np.pi * fy * (y_offset + middle))
    ramp_x = np.exp(-2j * np.pi * fx * (x_offset + middle))
    ramp = ramp_y * ramp_x
    profile = _coarse_image(spectrum * ramp, size) / peak
    return profile.astype(np.float32)


def matched_snr(signal: FloatArray, noise: float) -> float:
    """Return the signal-to-noise ratio of the matched filter for a known signal in white noise.

    Parameters
    ----------
    signal : ndarray
        Profile times depth, in any unit.
    noise : float
        Noise per pixel, in the same unit.
    """
    energy = np.sum(np.square(signal, dtype=np.float64))
    return float(np.sqrt(energy) / noise)


@lru_cache(maxsize=512)
def _spectrum(shape: Shape, radius_px: float, size: int) -> tuple[FloatArray, float]:
    """Return the Fourier transform of a profile, and the maximum of the profile."""
    fx, fy = _frequencies(size)
    blur = np.exp(-2 * (np.pi * BLUR_PX) ** 2 * (fx**2 + fy**2))
    optics = blur * np.sinc(fx) * np.sinc(fy)
    spectrum = _footprint(shape, radius_px, fx, fy) * optics
    spectrum.setflags(write=False)
    peak = _fine_image(spectrum, size).max()
    return spectrum, float(peak)


def _footprint(shape: Shape, radius: float, fx: FloatArray, fy: FloatArray) -> FloatArray:
    """Return the transform of pupil times particle, each of volume 1.

    The factors make ``radius`` the radius of the best top-hat.
    """
    f = np.hypot(fx, fy)
    match shape:
        case "disc":
            pupil = _annulus(f, 0.84 * radius, OBSTRUCTION)
            return pupil * _disc(f, 0.54 * radius)
        case "diamond":
            half = 1.21 * radius
            pupil = np.sinc(half * (fx + fy)) * np.sinc(half * (fx - fy))
            return np.asarray(pupil * _disc(f, 0.3 * radius))
        case "ring":
            centre = 0.2 * _disc(f, 0.85 * radius) + 0.05 * _disc(f, 0.25 * radius)
            pupil = 0.75 * _annulus(f, 0.95 * radius, 0.52)
            return pupil * _disc(f, 0.21 * radius) + centre


def _disc(f: FloatArray, radius: float) -> FloatArray:
    """Return the transform of a disc of volume 1 at the frequencies ``f`` (cycles per pixel)."""
    from scipy.special import j1

    u = np.maximum(2 * np.pi * radius * f, 1e-9)
    return np.asarray(2 * j1(u) / u)


def _annulus(f: FloatArray, radius: float, hole: float) -> FloatArray:
    """Return the transform of an annulus of volume 1 whose hole has the radius ``hole * radius``."""
    return (_disc(f, radius) - hole**2 * _disc(f, hole * radius)) / (1 - hole**2)


@lru_cache(maxsize=8)
def _frequencies(size: int) -> tuple[FloatArray, FloatArray]:
    """Return the frequencies along x and y (cycles per pixel) of the transform of a fine image."""
    n_fine = size * OVERSAMPLING
    fx = np.fft.rfftfreq(n_fine, 1 / OVERSAMPLING)
    fy = np.fft.fftfreq(n_fine, 1 / OVERSAMPLING)
    return fx[None, :], fy[:, None]


def _fine_image(spectrum: FloatArray, size: int) -> FloatArray:
    """Return the oversampled image of a transform."""
    from scipy.fft import irfft2

    n_fine = size * OVERSAMPLING
    return np.asarray(irfft2(spectrum, s=(n_fine, n_fine)))


def _coarse_image(spectrum: FloatArray, size: int) -> FloatArray:
    """Return every third row and column of the fine image; the other rows are left out halfway."""
    from scipy.fft import ifft, irfft

    n_fine = size * OVERSAMPLING
    rows = ifft(spectrum, axis=0, norm="forward")[::OVERSAMPLING]
    fine = irfft(rows, n_fine, axis=1, norm="forward")
    return np.asarray(fine[:, ::OVERSAMPLING] * (1 / n_fine**2))
