"""Windows around positions on an image."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from blobpipe.core.arrays import FloatArray, Image, Int16Array, Mask


def cut_square(image: Image | Mask | Int16Array, x: int, y: int, side: int) -> Image:
    """Return a square of an image as float32, NaN where it lies off the image.

    Parameters
    ----------
    image : ndarray, shape (ny, nx)
    x, y : int
        First pixel of the square (px); may lie off the image.
    side : int
        Side of the square (px).
    """
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
    """Return the distance (px) of each pixel of a square, shape (side, side), from a position in it."""
    pixels = np.arange(side)
    dx = pixels - x
    dy = pixels - y
    return np.asarray(np.hypot(dx, dy[:, None]))


def window_around(
    shape: tuple[int, ...], x: float, y: float, reach: float
) -> tuple[tuple[slice, slice], npt.NDArray[Any]]:
    """Return the square around a position, as far as it lies on the image, and the distances in it.

    Parameters
    ----------
    shape : (ny, nx)
        Shape of the image.
    x, y : float
        Position (px); may lie off the image.
    reach : float
        Half the side of the square (px).

    Returns
    -------
    (slice, slice)
        Rows and columns of the square; empty where it lies off the image.
    ndarray, shape of the square
        Distance of each pixel from the position (px).
    """
    rows = _slice_around(y, reach, shape[0])
    columns = _slice_around(x, reach, shape[1])
    dy = np.arange(rows.start, rows.stop) - y
    dx = np.arange(columns.start, columns.stop) - x
    distance = np.hypot(dy[:, None], dx)
    return (rows, columns), distance


def _slice_around(position: float, reach: float, length: int) -> slice:
    """Return the pixels along an axis of ``length`` pixels within ``reach`` of a position."""
    first = max(0, int(position - reach))
    end = max(0, min(length, int(position + reach) + 2))
    return slice(first, end)
