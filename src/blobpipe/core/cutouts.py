"""Cut windows out of images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from blobpipe.core.arrays import FloatArray, Image, Mask

if TYPE_CHECKING:
    pass

if TYPE_CHECKING:
    pass


def cut_square(image: Image | Mask, x: int, y: int, side: int) -> Image:
    """A square whose first pixel is at x, y; NaN off the image."""
    ny, nx = image.shape
    window = np.full((side, side), np.nan, np.float32)
    top = max(y, 0)
    left = max(x, 0)
    bottom = min(y + side, ny)
    right = min(x + side, nx)
    if top < bottom and left < right:
        window[top - y : bottom - y, left - x : right - x] = image[top:bottom, left:right]
    return window


def distance_from(x: float, y: float, side: int) -> FloatArray:
    """Of each pixel of a square from a place in it."""
    pixels = np.arange(side)
    return np.asarray(np.hypot(pixels - x, (pixels - y)[:, None]))


def window_around(
    shape: tuple[int, ...], x: float, y: float, reach: float
) -> tuple[tuple[slice, slice], npt.NDArray[Any]]:
    """The square around a place, as far as it is on the image, and each pixel's distance from the place."""
    rows = slice(max(0, int(y - reach)), max(0, min(shape[0], int(y + reach) + 2)))
    columns = slice(max(0, int(x - reach)), max(0, min(shape[1], int(x + reach) + 2)))
    distance = np.hypot(
        np.arange(rows.start, rows.stop)[:, None] - y, np.arange(columns.start, columns.stop) - x
    )
    return (rows, columns), distance
