"""Draw clutter, random structures that are no blobs, to lay over training subframes.

The campaign has its own streaks, clusters and rims, always at the same places or of one kind. Clutter is of every kind, size
and strength within wide ranges, so that what is learnt holds for images that nobody has simulated.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from blobpipe.core.arrays import Image, Int16Array
from blobpipe.core.blob_shapes import SHAPES, blob_profile
from blobpipe.core.random_streams import log_uniform, stream
from blobpipe.images.tiles import SIDE

# Steps per sigma of the stored int16, their largest value (sigma), and what stands for a pixel without a value; it
# becomes the median, as in clipping
STEP = 256
MAX_SIGMA = 120.0
NO_VALUE = -32768

# Distance from a line beyond which less than a step is left of it, in its Gaussian sigma
FAR = 7.0

# Half the side of the window of a cluster (px), and side of that of a crescent (px)
CLUSTER_PX = 9
CRESCENT_PX = 49

# Width of the edge of a detector that has no values (px); that of most is 4 or 5
BORDER_PX = 5


def draw_pieces(seed: int, n: int) -> Int16Array:
    """Draw pieces of clutter.

    Parameters
    ----------
    seed : int
    n : int
        Number of pieces.

    Returns
    -------
    ndarray, shape (n, 256, 256), int16
        In steps of 1/256 sigma of the scaled image; `NO_VALUE` where a pixel has no value. Each has one to four kinds of
        structure, each kind once to a few times.

    Notes
    -----
    Source: this project, after the structures in real difference images.
    """
    pieces = np.zeros((n, SIDE, SIDE), np.int16)
    for i in range(n):
        rng = stream(seed, "clutter", i)
        image = np.zeros((SIDE, SIDE), np.float32)
        n_kinds = rng.integers(1, 5)
        for kind in rng.choice(len(KINDS), n_kinds, replace=False):
            KINDS[kind](image, rng)
        limited = np.clip(np.nan_to_num(image), -MAX_SIGMA, MAX_SIGMA)
        pieces[i] = np.where(np.isnan(image), NO_VALUE, np.rint(limited * STEP))
    return pieces


def _streaks(image: Image, rng: np.random.Generator) -> None:
    """Add groups of one to three parallel lines, mostly nearly level, faint or saturated, bright or dark."""
    for _ in range(rng.integers(1, 4)):
        angle = np.radians(rng.normal(0, 5)) if rng.random() < 0.8 else rng.uniform(0, np.pi)
        x, y = rng.uniform(-60, SIDE, 2)
        length = rng.uniform(30, 300)
        spacing = rng.uniform(7, 22)
        width = rng.uniform(0.5, 2.5)
        sign = rng.choice([-1, 1])
        value = sign * log_uniform(rng, 0.4, 10)
        for k in range(rng.integers(1, 4)):
            x_start = x + rng.normal(0, 15) - k * spacing * np.sin(angle)
            y_start = y + k * spacing * np.cos(angle)
            own_length = length * rng.normal(1, 0.1)
            _add_line(image, (x_start, y_start), own_length, angle, width, value)


def _trails(image: Image, rng: np.random.Generator) -> None:
    """Add single slanted lines, some with gaps."""
    for _ in range(rng.integers(1, 4)):
        angle = rng.uniform(0, np.pi)
        width = rng.uniform(0.6, 4)
        sign = rng.choice([-1, -1, 1])
        value = sign * log_uniform(rng, 0.3, 6)
        x, y = rng.uniform(0, SIDE, 2)
        for _ in range(rng.integers(1, 4)):
            length = rng.uniform(15, 250)
            _add_line(image, (x, y), length, angle, width, value)
            x = x + (length + 20) * np.cos(angle)
            y = y + (length + 20) * np.sin(angle)


def _clusters(image: Image, rng: np.random.Generator) -> None:
    """Add ragged patches of bad pixels, of either sign or without a value.

    Large ones of the sign of a blob are left out: clipped, they are like small strong blobs, and only a measurement on the
    unclipped image can tell the two apart.
    """
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for _ in range(rng.integers(1, 9)):
        # A ragged ellipse around a random position
        sign = rng.choice([-1, 1])
        across = np.clip(rng.lognormal(np.log(3.0), 0.45), 1, 3 if sign > 0 else 8)
        stretch = rng.uniform(0.6, 1.7)
        x, y = rng.uniform(0, SIDE, 2)
        window_rows = slice(max(0, int(y) - CLUSTER_PX), int(y) + CLUSTER_PX + 1)
        window_columns = slice(max(0, int(x) - CLUSTER_PX), int(x) + CLUSTER_PX + 1)
        near = (window_rows, window_columns)
        distance = np.hypot((columns[near] - x) * stretch, (rows[near] - y) / stretch)
        raggedness = rng.uniform(0.2, 1.2)
        inside = distance + rng.normal(0, raggedness, distance.shape) <= across / 2

        # Uneven values, some of the other sign
        level = sign * log_uniform(rng, 2, 100)
        uneven = level * np.exp(rng.normal(0, 0.5, distance.shape))
        values = uneven * np.where(rng.random(distance.shape) < 0.1, -1, 1)
        is_missing = rng.random() < 0.2
        image[near][inside] = np.nan if is_missing else values[inside]


def _rims(image: Image, rng: np.random.Generator) -> None:
    """Add a ring in pieces that read high or low, like the Death Star's, around a missing or an ordinary disc."""
    x, y = rng.uniform(0, SIDE, 2)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    r = np.hypot(columns - x, rows - y)
    angle = np.arctan2(rows - y, columns - x) / (2 * np.pi) % 1
    radius = rng.uniform(8, 40)
    width = rng.uniform(0.7, 2.5)
    if rng.random() < 0.5:
        image[r < radius] = np.nan
    # One level to each piece, some of them zero
    spread = log_uniform(rng, 1, 15)
    n_levels = rng.integers(6, 40)
    levels = rng.normal(0, spread, n_levels)
    levels = np.where(rng.random(n_levels) < 0.3, 0, levels)
    piece = (angle * n_levels).astype(int)
    rim = np.abs(r - radius) < width
    image[rim] = levels[piece][rim]


def _stripes(image: Image, rng: np.random.Generator) -> None:
    """Add rows and columns whose zero point is off, singly or in bands, along the whole image or a part."""
    for _ in range(rng.integers(1, 6)):
        start = rng.integers(0, SIDE)
        width = 1 if rng.random() < 0.7 else rng.integers(2, 7)
        first, last = np.sort(rng.integers(0, SIDE, 2)) if rng.random() < 0.4 else (0, SIDE)
        lines = image.T if rng.random() < 0.6 else image
        deviate = rng.normal(0, 1)
        offset = deviate * log_uniform(rng, 0.3, 5)
        lines[start : start + width, first:last] += offset


def _slopes(image: Image, rng: np.random.Generator) -> None:
    """Add residual illumination and broad bumps, much larger than blobs."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    for _ in range(rng.integers(1, 5)):
        sx, sy = rng.uniform(22, 70, 2)
        cx, cy = rng.uniform(0, SIDE, 2)
        height = rng.normal(0, 0.7)
        image += height * np.exp(-(((x - cx) / sx) ** 2) / 2 - ((y - cy) / sy) ** 2 / 2)


def _borders(image: Image, rng: np.random.Generator) -> None:
    """Add the edge of the detector on one side: no values, then bright or unsteady pixels with a ragged border."""
    turned = np.rot90(image, int(rng.integers(4)))
    wandering = np.cumsum(rng.normal(0, 0.8, SIDE)).astype(int) % 5
    depth = wandering + rng.integers(0, 4)

    # Some have a notch
    if rng.random() < 0.5:
        extent = rng.uniform(40, 150)
        middle = rng.uniform(0, SIDE)
        notch = np.clip(1 - np.abs(np.arange(SIDE) - middle) / extent, 0, 1)
        notch = notch * rng.uniform(5, 25)
        depth = depth + notch.astype(int)

    row = np.arange(SIDE)[:, None]
    border = row < BORDER_PX + depth
    level = -rng.uniform(0, 15)
    spread = rng.uniform(0.5, 8)
    values = rng.normal(level, spread, (SIDE, SIDE))
    turned[border] = values[border]
    turned[:BORDER_PX] = np.nan


def _points(image: Image, rng: np.random.Generator) -> None:
    """Add stars, cosmic rays, and hot pixels with their neighbours: sharper than any blob."""
    for _ in range(rng.integers(2, 20)):
        x, y = rng.uniform(0, SIDE, 2)
        sign = rng.choice([-1, 1])
        value = float(sign * log_uniform(rng, 2, 60))
        width = rng.uniform(0.3, 0.8 if value > 0 else 1.2)
        length = rng.exponential(1.5)
        angle = rng.uniform(0, np.pi)
        _add_line(image, (x, y), length, angle, width, value)


def _crescents(image: Image, rng: np.random.Generator) -> None:
    """Add dips, known blobs that have moved, with a positive and a negative edge; or blobs of the wrong sign."""
    for _ in range(rng.integers(1, 5)):
        shape = SHAPES[rng.integers(len(SHAPES))]
        radius = rng.uniform(2.5, 11)
        depth = log_uniform(rng, 1, 12)
        size = log_uniform(rng, 0.1, 4)
        angle = rng.uniform(0, 2 * np.pi)
        dx = size * np.cos(angle)
        dy = size * np.sin(angle)
        here = blob_profile(shape, radius, 0.0, 0.0, CRESCENT_PX)
        there = blob_profile(shape, radius, dx, dy, CRESCENT_PX)
        residual = -here if rng.random() < 0.25 else there - here

        # Added as far as it lies on the image
        x, y = rng.integers(-20, SIDE - 29, 2)
        part = image[max(0, y) : y + CRESCENT_PX, max(0, x) : x + CRESCENT_PX]
        ny, nx = part.shape
        part += depth * residual[max(0, -y) :, max(0, -x) :][:ny, :nx]


def _rings(image: Image, rng: np.random.Generator) -> None:
    """Add concentric rings and spokes, like those of the wagon wheel."""
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    x = columns - rng.uniform(-40, SIDE + 40)
    y = rows - rng.uniform(-40, SIDE + 40)
    r = np.hypot(x, y)
    angle = np.arctan2(y, x)
    period = rng.uniform(6, 24)
    reach = rng.uniform(15, 90)
    height = rng.uniform(0.3, 2.5)
    phase = rng.uniform(0, 6)
    image += height * np.cos(2 * np.pi * r / period + phase) * np.exp(-r / reach)

    height = rng.uniform(0, 0.6)
    n_spokes = rng.integers(8, 40)
    image += height * np.cos(n_spokes * angle) * np.exp(-((r / (3 * reach)) ** 2))


KINDS: tuple[Callable[[Image, np.random.Generator], None], ...] = (
    _streaks,
    _trails,
    _clusters,
    _rims,
    _stripes,
    _slopes,
    _borders,
    _points,
    _crescents,
    _rings,
)


def _add_line(
    image: Image,
    start: tuple[float, float],
    length: float,
    angle: float,
    width: float,
    value: float,
) -> None:
    """Add a line with a Gaussian cross-section and soft ends to an image.

    Parameters
    ----------
    image : ndarray, shape (256, 256), float32
    start : (x, y)
        One end (px).
    length, width : float
        Length, and Gaussian sigma of the cross-section (px).
    angle : float
        Direction, from x to y (radians).
    value : float
        Height along the middle (sigma).
    """
    length = max(length, 0)
    ends = np.array([start, start])
    ends[1] += length * np.cos(angle), length * np.sin(angle)

    # The part of the image that the line reaches
    left, top = np.clip(ends.min(0) - FAR * width, 0, SIDE).astype(int)
    right, bottom = np.clip(ends.max(0) + FAR * width + 1, 0, SIDE).astype(int)
    y, x = np.mgrid[top:bottom, left:right].astype(np.float32)
    x = x - np.float32(start[0])
    y = y - np.float32(start[1])
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    # Distance from the nearest point of the line
    beyond = np.maximum(np.maximum(-along, along - length), 0)
    line = value * np.exp(-(across**2 + beyond**2) / (2 * width**2))
    image[top:bottom, left:right] += line.astype(np.float32)
