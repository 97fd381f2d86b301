"""Scale a clipped image to zero mean and unit standard deviation (stage ``scale``, ISR 3.2)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numba as nb
import numpy as np

from blobpipe.core.arrays import Image
from blobpipe.errors import FrameError
from blobpipe.images.clip import each_frame
from blobpipe.params import Scale

log = logging.getLogger(__name__)


DEFAULTS = Scale()


@dataclass(frozen=True)
class Scaling:
    """Moments by which an image was scaled, and its range after that.

    Attributes
    ----------
    mean_frac, sigma_frac : float
        Sigma-clipped mean and standard deviation of the image (fraction of the light).
    low_sigma, high_sigma : float
        Lowest and highest pixel of the scaled image (sigma).
    """

    mean_frac: float
    sigma_frac: float
    low_sigma: float
    high_sigma: float


def scale_image(data: Image, params: Scale = DEFAULTS) -> tuple[Image, Scaling]:
    """Subtract the sigma-clipped mean of an image, and divide by its sigma-clipped standard deviation.

    Parameters
    ----------
    data : ndarray, shape (ny, nx), float32
        A clipped image, all finite.
    params : Scale

    Returns
    -------
    ndarray, shape (ny, nx), float32
        Scaled image (sigma).
    Scaling

    Raises
    ------
    FrameError
        If the image is constant.

    Notes
    -----
    Source: ISR 3.2.
    """
    mean, sigma = _clipped_moments(data, params)
    if not sigma > 0:
        raise FrameError(f"standard deviation {sigma:.6g}, expected noise; reject it")
    scaled = np.subtract(data, np.float32(mean), dtype=np.float32)
    scaled /= np.float32(sigma)
    return scaled, Scaling(mean, sigma, float(scaled.min()), float(scaled.max()))


def _clipped_moments(data: Image, params: Scale) -> tuple[float, float]:
    """Return the mean and standard deviation of the pixels that iterated sigma-clipping leaves."""
    low = -np.inf
    high = np.inf
    n, mean, sigma = _moments_within(data, low, high, float(data[0, 0]))
    for _ in range(params.iterations):
        low = max(low, mean - params.clip_sigma * sigma)
        high = min(high, mean + params.clip_sigma * sigma)
        n_left, new_mean, new_sigma = _moments_within(data, low, high, mean)
        if n_left in (0, n):
            break
        n = n_left
        mean = new_mean
        sigma = new_sigma
    return mean, sigma


@nb.njit(cache=True, nogil=True)
def _moments_within(image, low, high, about):  # type: ignore[no-untyped-def]
    """Return the number, mean and standard deviation of the pixels from ``low`` to ``high``.

    Differences from ``about``, a number near the mean, are summed, which keeps their rounding small. Each column has a sum
    of its own: a processor adds vectors of columns, and yet in the same order on every machine.
    """
    ny, nx = image.shape
    number = np.zeros(nx, np.int64)
    total = np.zeros(nx)
    squares = np.zeros(nx)
    for y in range(ny):
        for x in range(nx):
            value = np.float64(image[y, x])
            inside = (low <= value) & (value <= high)
            difference = value - about if inside else 0.0
            number[x] += inside
            total[x] += difference
            squares[x] += difference * difference
    n = number.sum()
    mean = total.sum() / max(n, 1)
    return n, about + mean, np.sqrt(max(squares.sum() / max(n, 1) - mean * mean, 0.0))


def scale(in_dir: str | Path, out_dir: str | Path, params: Scale, batch: int | None = None) -> None:
    """Scale every clipped image of a folder into another (stage ``scale``).

    Parameters
    ----------
    in_dir : path
        ``{frame}.fits.fz`` and ``frames-NNN.csv`` of the clip stage.
    out_dir : path
        ``{frame}.fits.fz`` (HDU SCALED, sigma), and ``frames-NNN.csv`` for each batch, with the attributes of `Scaling`.
        A bad image is listed as rejected, with the reason.
    params : Scale
    batch : int, optional
        Only this batch.
    """
    each_frame(in_dir, out_dir, batch, "SCALED", lambda data: scale_image(data, params), Scaling)
