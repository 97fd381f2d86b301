"""The noise of an image, and whether it is that of the images it is compared with."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from blobpipe.core import fits_images
from blobpipe.core.arrays import Image
from blobpipe.errors import FrameError

if TYPE_CHECKING:
    pass

log = logging.getLogger(__name__)
# an image's noise is within this factor of the usual one: half or twice the light changes it by
# 1.4; ours
NOISE_FACTOR = 4.0
# an image's noise is at most so many times that of its stack: 4.4 times for 30 without a common
# pattern
STACK_NOISE = 6.0


def clean_noise(image: Image) -> float:
    """Robust standard deviation of a quarter of the pixels away from the edges (1.4826 times the MAD)."""
    import bottleneck

    ny, nx = image.shape
    core = image[ny // 16 : -(ny // 16) : 2, nx // 16 : -(nx // 16) : 2]
    return float(1.4826 * bottleneck.nanmedian(np.abs(core - bottleneck.nanmedian(core))))


class Range(NamedTuple):
    """Lowest and highest noise that an image may have (fraction of the light)."""

    low: float
    high: float


def noise_near(usual: float) -> Range:
    """The range around a usual noise."""
    return Range(usual / NOISE_FACTOR, usual * NOISE_FACTOR)


def noise_for_stack(stack: Image, scatter: Image | None) -> Range:
    """The noise that an image may have from which a stack is subtracted.

    Parameters
    ----------
    stack : ndarray, shape (ny, nx), float32
        A median stack (fraction of the light).
    scatter : ndarray, shape (ny // 2, nx // 2), float32, or None
        Of its images, from `scatter`; with it the range is narrower.

    Notes
    -----
    Source: ours. The images share the stack's pattern, and each has what varies from image to image.
    """
    shared = fits_images.median_and_noise(stack)[1]
    varying = 0.0 if scatter is None else noise_of_rms_map(scatter)
    if not varying:
        return Range(shared / NOISE_FACTOR, shared * NOISE_FACTOR * STACK_NOISE)
    return noise_near(float(np.hypot(shared, varying)))


def noise_of_rms_map(scatter: Image) -> float:
    """Noise of a stack's images without what they share (fraction of the light); 0 where nothing is known of it."""
    cells = scatter[::2, ::2]
    cells = cells[cells > 0]
    return float(fits_images.median(cells)) if cells.size else 0.0


def require_noise_of_rms_map(difference: Image, scatter: Image | None, path: str | Path) -> None:
    """Refuse a difference image whose noise is not that of the images of its stack, if the stack's scatter is known."""
    if scatter is not None and (usual := noise_of_rms_map(scatter)):
        require_noise(fits_images.median_and_noise(difference)[1], noise_near(usual), path)


def require_noise(noise: float, expected: Range, path: str | Path) -> None:
    """Refuse an image that is in other units than those it is compared with, or scaled.

    Parameters
    ----------
    noise : float
        Of the image, from `fits_images.median_and_noise`.
    expected : Range
    path : path
        Of the image, for the message.

    Raises
    ------
    FrameError
        If its noise is out of range.
    """
    if not expected.low <= noise <= expected.high:
        raise FrameError(
            f"{path}: noise {noise:.3g}, expected {expected.low:.3g} to {expected.high:.3g} as the images of the stack "
            "have: in other units, or scaled; make it again as a fraction of the light"
        )
