"""Measure the noise of an image, and compare it with that of the images of its stack."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from blobpipe.core import fits_images
from blobpipe.core.arrays import Image
from blobpipe.errors import FrameError

# Largest ratio between the noise of an image and the usual one; half or twice the light changes the noise by 1.4
NOISE_FACTOR = 4.0

# Largest ratio between the noise of an image and that of its stack; it is 4.4 for 30 images without a common pattern
STACK_NOISE = 6.0


def clean_noise(image: Image) -> float:
    """Return the robust standard deviation (1.4826 MAD) of an image away from its edges.

    Every second row and column is taken; pixels without a value are left out.

    Parameters
    ----------
    image : ndarray, shape (ny, nx), float32
        At least 16 pixels on each side.
    """
    ny, nx = image.shape
    margin_y = ny // 16
    margin_x = nx // 16
    core = image[margin_y:-margin_y:2, margin_x:-margin_x:2]
    values = core[np.isfinite(core)]
    if not values.size:
        return np.nan
    deviations = np.abs(values - fits_images.median(values))
    return float(1.4826 * fits_images.median(deviations))


def image_noise(image: Image) -> float:
    """Estimate the noise of a difference image: the one estimate of every search.

    Parameters
    ----------
    image : ndarray, shape (ny, nx), float32
        Some pixels finite.

    Returns
    -------
    float
        `clean_noise`; of all pixels if there is none away from the edges.
    """
    noise = clean_noise(image)
    return noise if noise > 0 else fits_images.median_and_noise(image)[1]


class Range(NamedTuple):
    """Lowest and highest noise that an image may have (fraction of the light)."""

    low: float
    high: float


def noise_near(usual: float) -> Range:
    """Return the range around a usual noise (fraction of the light)."""
    return Range(usual / NOISE_FACTOR, usual * NOISE_FACTOR)


def noise_for_stack(stack: Image, rms: Image | None) -> Range:
    """Return the range of noise of images that are compared with a stack.

    Parameters
    ----------
    stack : ndarray, shape (ny, nx), float32
        A median stack (fraction of the light).
    rms : ndarray, shape (ny // 2, nx // 2), float32, or None
        RMS map of its images, from `stack.rms_map`; the range is narrower with it.

    Notes
    -----
    Source: this project. The noise of an image is the pattern that it shares with the stack, and what varies from image
    to image.
    """
    shared = fits_images.median_and_noise(stack)[1]
    varying = 0.0 if rms is None else noise_of_rms_map(rms)
    if not varying:
        return Range(shared / NOISE_FACTOR, shared * NOISE_FACTOR * STACK_NOISE)
    return noise_near(float(np.hypot(shared, varying)))


def noise_of_rms_map(rms: Image) -> float:
    """Return the noise of a stack's images without what they share (fraction of the light); 0 if the map is empty."""
    cells = rms[::2, ::2]
    # Cells without a value are 0
    cells = cells[cells > 0]
    return float(fits_images.median(cells)) if cells.size else 0.0


def require_noise_of_rms_map(difference: Image, rms: Image | None, path: str | Path) -> None:
    """Refuse a difference image whose noise is not that of the images of its stack.

    Parameters
    ----------
    difference : ndarray, shape (ny, nx), float32
    rms : ndarray, shape (ny // 2, nx // 2), float32, or None
        RMS map of the stack's images; without it nothing is refused.
    path : path
        File of the image, for the message.

    Raises
    ------
    FrameError
        If the noise is out of range.
    """
    usual = 0.0 if rms is None else noise_of_rms_map(rms)
    if usual:
        noise = fits_images.median_and_noise(difference)[1]
        require_noise(noise, noise_near(usual), path)


def require_noise(noise: float, expected: Range, path: str | Path) -> None:
    """Refuse an image whose noise shows that it is scaled, or in other units than the images of the stack.

    Parameters
    ----------
    noise : float
        Noise of the image, from `fits_images.median_and_noise`.
    expected : Range
    path : path
        File of the image, for the message.

    Raises
    ------
    FrameError
        If the noise is out of range.
    """
    if not expected.low <= noise <= expected.high:
        raise FrameError(
            f"{path}: noise {noise:.3g}, expected {expected.low:.3g} to {expected.high:.3g} as in the images of the "
            "stack: in other units, or scaled; make it again as a fraction of the light"
        )
