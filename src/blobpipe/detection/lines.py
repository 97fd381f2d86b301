"""Does a candidate lie on a line? Streaks, trails and rims go on beyond it; a blob does not."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import bottleneck
import numpy as np

from blobpipe.core.arrays import FloatArray, Image, Int64Array
from blobpipe.core.cutouts import cut_square

# Directions in which a line is looked for (count)
N_DIRECTIONS = 16

# Half the width of a line, distance of its first pixel from a candidate's edge, and length of each of
# its parts (px)
HALF_WIDTH_PX = 2.5
MARGIN_PX = 3.0
PART_PX = 8.0

# Parts on either side of a candidate (count). A line has light in each of three parts on one side, or
# of two on both; a neighbour, or a bright pixel, has it in one or two
N_PARTS = 3
N_ON_BOTH = 2

# Pixels with a value below which nothing is known of a part (count)
FEWEST = 12

# Half the side of the square that holds the parts of the largest candidates (px)
HALF_PX = 44
SIDE_PX = 2 * HALF_PX + 1


class _Pixels(NamedTuple):
    """Pixels of the square that lie on a line through its centre, of all directions.

    Attributes
    ----------
    place : ndarray, shape (n,), int64
        Number of the pixel in the flattened square.
    distance_px : ndarray, shape (n,), float64
        From the centre.
    arm : ndarray, shape (n,), int64
        Twice the direction, plus the side.
    """

    place: Int64Array
    distance_px: FloatArray
    arm: Int64Array


@cache
def _pixels() -> _Pixels:
    """Return the pixels of the lines of all directions."""
    y, x = np.mgrid[-HALF_PX : HALF_PX + 1, -HALF_PX : HALF_PX + 1].reshape(2, -1)
    angle = np.pi * np.arange(N_DIRECTIONS)[:, None] / N_DIRECTIONS
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    direction, place = np.nonzero(np.abs(across) <= HALF_WIDTH_PX)
    along = along[direction, place]
    return _Pixels(place, np.abs(along), 2 * direction + (along < 0))


def line_snr(
    whitened: Image, x_px: FloatArray, y_px: FloatArray, radius_px: FloatArray, noise: float
) -> FloatArray:
    """Measure how clearly a line of the same sign goes on beyond each candidate.

    Parameters
    ----------
    whitened : ndarray, shape (ny, nx), float32
        Difference with white noise (fraction of the light), NaN where there is no value.
    x_px, y_px, radius_px : ndarray, shape (n,)
        Place and size of each candidate (px).
    noise : float
        Standard deviation of a pixel (fraction of the light).

    Returns
    -------
    ndarray, shape (n,), float64
        Signal-to-noise ratio of the clearest line, of which every part is as bright as the faintest;
        0 if there is none. Noise alone gives about 1.
    """
    places = zip(x_px, y_px, radius_px, strict=True)
    return np.array([_line_snr(whitened, x, y, radius, noise) for x, y, radius in places])


def _line_snr(whitened: Image, x: float, y: float, radius: float, noise: float) -> float:
    """Measure it for one candidate."""
    if not (np.isfinite([x, y, radius]).all() and noise > 0):
        return 0.0
    pixels = _pixels()
    corner = (round(x) - HALF_PX, round(y) - HALF_PX)
    values = cut_square(whitened, *corner, SIDE_PX).ravel()
    values = (values - bottleneck.nanmedian(values))[pixels.place]

    # in which part of which arm each pixel is
    part = np.floor((pixels.distance_px - radius - MARGIN_PX) / PART_PX).astype(np.int64)
    is_known = np.isfinite(values) & (part >= 0) & (part < N_PARTS)
    number = (N_PARTS * pixels.arm + part)[is_known]

    # signal-to-noise ratio of each part
    n_numbers = 2 * N_DIRECTIONS * N_PARTS
    total = np.bincount(number, values[is_known], n_numbers)
    n = np.bincount(number, minlength=n_numbers)
    snr = np.where(n >= FEWEST, total / (noise * np.sqrt(np.maximum(n, 1))), 0.0)
    arms = snr.reshape(N_DIRECTIONS, 2, N_PARTS)

    # the faintest part of each line
    on_one_side = np.sqrt(N_PARTS) * arms.min(axis=2).max()
    on_both = np.sqrt(2 * N_ON_BOTH) * arms[:, :, :N_ON_BOTH].min(axis=(1, 2)).max()
    return max(0.0, float(on_one_side), float(on_both))
