"""Shapes of blobs: a particle on the CSM mirror, seen through the defocused pupil of the telescope.

A blob is the pupil's footprint on the mirror convolved with the particle, blurred a little, and averaged
over pixels. All four have closed Fourier transforms, so a profile is exact at any sub-pixel position.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from blobpipe.core.arrays import FloatArray

Shape = Literal["disc", "diamond", "ring"]
SHAPES: tuple[Shape, ...] = ("disc", "diamond", "ring")

OBSTRUCTION = 0.33  # of the telescope's pupil: secondary mirror over primary, by diameter
BLUR_PX = 0.55  # Gaussian sigma of diffraction and jitter at the blob's edge
OVERSAMPLING = 3  # fine pixels per pixel, per axis: the edges have no power beyond


def blob_profile(
    shape: Shape, radius_px: float, x_offset: float = 0.0, y_offset: float = 0.0, size: int = 41
) -> npt.NDArray[np.float32]:
    """The light loss of a blob over its depth, on a square of pixels.

    Parameters
    ----------
    shape : {"disc", "diamond", "ring"}
        disc: a particle of about the pupil's size; diamond: the same behind an astigmatic focus; ring: a particle
        so small that the pupil's obstruction shows, with a bright spot in the centre.
    radius_px : float
        Radius of the top-hat that detects it best (px), 0.5 to about ``size / 3.5``.
    x_offset, y_offset : float
        Position of the blob's centre relative to that of the middle pixel (px).
    size : int
        Side of the square (px), odd.

    Returns
    -------
    ndarray, shape (size, size), float32
        The highest point of the profile is 1, between pixels where it falls so.

    Notes
    -----
    Source: ours, after the shapes in real median stacks; the sizes of WFC3 blobs follow
    ``radius_px = 9.2 - 3.3 x / 1000 - 3.5 y / 1000``.
    """
    spectrum, peak = _spectrum(shape, float(radius_px), size)
    fx, fy = _frequencies(size)
    middle = size // 2
    ramp = np.exp(-2j * np.pi * fy * (y_offset + middle)) * np.exp(
        -2j * np.pi * fx * (x_offset + middle)
    )
    return (_fine_image(spectrum * ramp, size)[::OVERSAMPLING, ::OVERSAMPLING] / peak).astype(
        np.float32
    )


def typical_radius(x_px: FloatArray, y_px: FloatArray) -> FloatArray:
    """Best top-hat radius (px) of blobs at a place: the mirror is tilted, and so is its focus.

    Notes
    -----
    Source: 71 blobs measured on a real median stack.
    """
    return 9.2 - 3.3e-3 * x_px - 3.5e-3 * y_px


def matched_snr(signal: FloatArray, noise: float) -> float:
    """Signal-to-noise ratio of the matched filter for a known signal in white noise.

    Parameters
    ----------
    signal : ndarray
        Profile times depth, in any unit.
    noise : float
        Noise per pixel, in the same unit.
    """
    return float(np.sqrt(np.sum(np.square(signal, dtype=np.float64))) / noise)


@lru_cache(maxsize=512)
def _spectrum(shape: Shape, radius_px: float, size: int) -> tuple[FloatArray, float]:
    """Transform of the profile, and its highest point."""
    fx, fy = _frequencies(size)
    optics = np.exp(-2 * (np.pi * BLUR_PX) ** 2 * (fx**2 + fy**2)) * np.sinc(fx) * np.sinc(fy)
    spectrum = _footprint(shape, radius_px, fx, fy) * optics
    spectrum.setflags(write=False)
    return spectrum, float(_fine_image(spectrum, size).max())


def _footprint(shape: Shape, radius: float, fx: FloatArray, fy: FloatArray) -> FloatArray:
    """Pupil times particle, each of volume 1; their sizes make ``radius`` the best top-hat's."""
    f = np.hypot(fx, fy)
    match shape:
        case "disc":
            return _annulus(f, 0.84 * radius, OBSTRUCTION) * _disc(f, 0.54 * radius)
        case "diamond":
            half = 1.21 * radius
            return np.sinc(half * (fx + fy)) * np.sinc(half * (fx - fy)) * _disc(f, 0.3 * radius)
        case "ring":
            centre = 0.2 * _disc(f, 0.85 * radius) + 0.05 * _disc(f, 0.25 * radius)
            return 0.75 * _annulus(f, 0.95 * radius, 0.52) * _disc(f, 0.21 * radius) + centre


def _disc(f: FloatArray, radius: float) -> FloatArray:
    from scipy.special import j1

    u = np.maximum(2 * np.pi * radius * f, 1e-9)
    return np.asarray(2 * j1(u) / u)


def _annulus(f: FloatArray, radius: float, hole: float) -> FloatArray:
    return (_disc(f, radius) - hole**2 * _disc(f, hole * radius)) / (1 - hole**2)


@lru_cache(maxsize=8)
def _frequencies(size: int) -> tuple[FloatArray, FloatArray]:
    fine = size * OVERSAMPLING
    return np.fft.rfftfreq(fine, 1 / OVERSAMPLING)[None, :], np.fft.fftfreq(fine, 1 / OVERSAMPLING)[
        :, None
    ]


def _fine_image(spectrum: FloatArray, size: int) -> FloatArray:
    from scipy.fft import irfft2

    return np.asarray(irfft2(spectrum, s=(size * OVERSAMPLING, size * OVERSAMPLING)))
