"""What a detector must not call a blob: random structures to lay over training subframes.

The campaign has its own streaks, clusters and rims, always at the same places or of one kind. These are of every kind, size
and strength within wide ranges, so that what is learnt holds for images that nobody has simulated.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from blobpipe.core.arrays import Image
from blobpipe.core.blob_shapes import SHAPES, blob_profile
from blobpipe.core.random_streams import stream

SIDE = 256  # of a piece of clutter, as of a subframe (px)
STEP = 256  # kept as int16 in steps of 1/256 sigma
NO_VALUE = -32768  # a pixel without a value: it becomes the median, as clipping makes it
MAX_SIGMA = 120.0
FAR = 7.0  # times the width of a line: beyond, less than a step is left of any


def draw_pieces(seed: int, n: int) -> npt.NDArray[np.int16]:
    """Draw pieces of clutter.

    Parameters
    ----------
    seed : int
    n : int
        How many.

    Returns
    -------
    ndarray, shape (n, 256, 256), int16
        In steps of 1/256 sigma of the scaled image; `NO_VALUE` where a pixel has no value. Each holds one to four kinds
        of structure, each kind once to a few times.

    Notes
    -----
    Source: ours, after the structures found in real difference images.
    """
    pieces = np.zeros((n, SIDE, SIDE), np.int16)
    for i in range(n):
        rng = stream(seed, "clutter", i)
        image = np.zeros((SIDE, SIDE), np.float32)
        for kind in rng.choice(len(KINDS), rng.integers(1, 5), replace=False):
            KINDS[kind](image, rng)
        steps = np.rint(np.clip(np.nan_to_num(image), -MAX_SIGMA, MAX_SIGMA) * STEP)
        pieces[i] = np.where(np.isnan(image), NO_VALUE, steps)
    return pieces


def _streaks(image: Image, rng: np.random.Generator) -> None:
    """One to three parallel lines, mostly nearly level, faint or saturated, bright or dark."""
    for _ in range(rng.integers(1, 4)):
        angle = np.radians(rng.normal(0, 5)) if rng.random() < 0.8 else rng.uniform(0, np.pi)
        x, y = rng.uniform(-60, SIDE, 2)
        length = rng.uniform(30, 300)
        spacing = rng.uniform(7, 22)
        width = rng.uniform(0.5, 2.5)
        value = rng.choice([-1, 1]) * np.exp(rng.uniform(np.log(0.4), np.log(10)))
        for k in range(rng.integers(1, 4)):
            start = (
                x + rng.normal(0, 15) - k * spacing * np.sin(angle),
                y + k * spacing * np.cos(angle),
            )
            _line(image, start, length * rng.normal(1, 0.1), angle, width, value)


def _trails(image: Image, rng: np.random.Generator) -> None:
    """Single slanted lines, some with gaps."""
    for _ in range(rng.integers(1, 4)):
        angle = rng.uniform(0, np.pi)
        width = rng.uniform(0.6, 4)
        value = rng.choice([-1, -1, 1]) * np.exp(rng.uniform(np.log(0.3), np.log(6)))
        x, y = rng.uniform(0, SIDE, 2)
        for _ in range(rng.integers(1, 4)):
            length = rng.uniform(15, 250)
            _line(image, (x, y), length, angle, width, value)
            x = x + (length + 20) * np.cos(angle)
            y = y + (length + 20) * np.sin(angle)


def _clusters(image: Image, rng: np.random.Generator) -> None:
    """Ragged patches of bad pixels, either way or without a value.

    Large ones of the sign of a blob are left out: clipped, they are like small strong blobs, and it is for the
    measurement on the unclipped image to tell the two.
    """
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for _ in range(rng.integers(1, 9)):
        sign = rng.choice([-1, 1])
        across = np.clip(rng.lognormal(np.log(3.0), 0.45), 1, 3 if sign > 0 else 8)
        stretch = rng.uniform(0.6, 1.7)
        x, y = rng.uniform(0, SIDE, 2)
        near = np.s_[max(0, int(y) - 9) : int(y) + 10, max(0, int(x) - 9) : int(x) + 10]
        distance = np.hypot((columns[near] - x) * stretch, (rows[near] - y) / stretch)
        inside = distance + rng.normal(0, rng.uniform(0.2, 1.2), distance.shape) <= across / 2
        level = sign * np.exp(rng.uniform(np.log(2), np.log(100)))
        values = (
            level
            * np.exp(rng.normal(0, 0.5, distance.shape))
            * np.where(rng.random(distance.shape) < 0.1, -1, 1)
        )
        _set(image[near], inside, np.nan if rng.random() < 0.2 else values)


def _rims(image: Image, rng: np.random.Generator) -> None:
    """Rings in pieces that read high or low, like the Death Star's, around a patched or an ordinary disc."""
    x, y = rng.uniform(0, SIDE, 2)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    r = np.hypot(columns - x, rows - y)
    angle = np.arctan2(rows - y, columns - x) / (2 * np.pi) % 1
    radius = rng.uniform(8, 40)
    width = rng.uniform(0.7, 2.5)
    if rng.random() < 0.5:
        image[r < radius] = np.nan
    levels = rng.normal(0, np.exp(rng.uniform(np.log(1), np.log(15))), rng.integers(6, 40))
    levels = np.where(rng.random(len(levels)) < 0.3, 0, levels)
    _set(image, np.abs(r - radius) < width, levels[(angle * len(levels)).astype(int)])


def _stripes(image: Image, rng: np.random.Generator) -> None:
    """Rows and columns whose zero point is off, one by one or in bands, along the whole image or a part."""
    for _ in range(rng.integers(1, 6)):
        start = rng.integers(0, SIDE)
        width = 1 if rng.random() < 0.7 else rng.integers(2, 7)
        first, last = np.sort(rng.integers(0, SIDE, 2)) if rng.random() < 0.4 else (0, SIDE)
        lines = image.T if rng.random() < 0.6 else image
        lines[start : start + width, first:last] += rng.normal(0, 1) * np.exp(
            rng.uniform(np.log(0.3), np.log(5))
        )


def _slopes(image: Image, rng: np.random.Generator) -> None:
    """Slow residual illumination and broad bumps, well above the size of blobs."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    for _ in range(rng.integers(1, 5)):
        sx, sy = rng.uniform(22, 70, 2)
        cx, cy = rng.uniform(0, SIDE, 2)
        image += rng.normal(0, 0.7) * np.exp(-(((x - cx) / sx) ** 2) / 2 - ((y - cy) / sy) ** 2 / 2)


def _borders(image: Image, rng: np.random.Generator) -> None:
    """The edge of the detector on one side: no values, then bright or unsteady pixels with a ragged border."""
    turned = np.rot90(image, int(rng.integers(4)))
    ragged = np.cumsum(rng.normal(0, 0.8, SIDE)).astype(int) % 5 + rng.integers(0, 4)
    depth = np.arange(SIDE)[:, None]
    if rng.random() < 0.5:
        extent = rng.uniform(40, 150)
        bump = np.clip(
            1 - np.abs(np.arange(SIDE) - rng.uniform(0, SIDE)) / extent, 0, 1
        ) * rng.uniform(5, 25)
        ragged = ragged + bump.astype(int)
    _set(
        turned,
        depth < 5 + ragged,
        rng.normal(-rng.uniform(0, 15), rng.uniform(0.5, 8), (SIDE, SIDE)),
    )
    turned[:5] = np.nan


def _points(image: Image, rng: np.random.Generator) -> None:
    """Stars, cosmic rays and hot pixels with neighbours: sharper than any blob."""
    for _ in range(rng.integers(2, 20)):
        x, y = rng.uniform(0, SIDE, 2)
        value = _level(rng, 2, 60)
        width = rng.uniform(0.3, 0.8 if value > 0 else 1.2)
        _line(image, (x, y), rng.exponential(1.5), rng.uniform(0, np.pi), width, value)


def _crescents(image: Image, rng: np.random.Generator) -> None:
    """Known blobs that have moved: a positive and a negative edge; or blobs of the wrong sign."""
    for _ in range(rng.integers(1, 5)):
        shape = SHAPES[rng.integers(len(SHAPES))]
        radius = rng.uniform(2.5, 11)
        depth = np.exp(rng.uniform(np.log(1), np.log(12)))
        size = np.exp(rng.uniform(np.log(0.1), np.log(4)))
        angle = rng.uniform(0, 2 * np.pi)
        here = blob_profile(shape, radius, 0.0, 0.0, 49)
        there = blob_profile(shape, radius, size * np.cos(angle), size * np.sin(angle), 49)
        residual = -here if rng.random() < 0.25 else there - here
        x, y = rng.integers(-20, SIDE - 29, 2)
        part = image[max(0, y) : y + 49, max(0, x) : x + 49]
        part += depth * residual[max(0, -y) :, max(0, -x) :][: part.shape[0], : part.shape[1]]


def _rings(image: Image, rng: np.random.Generator) -> None:
    """Concentric rings and spokes, like those of the wagon wheel."""
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    x = columns - rng.uniform(-40, SIDE + 40)
    y = rows - rng.uniform(-40, SIDE + 40)
    r = np.hypot(x, y)
    angle = np.arctan2(y, x)
    period = rng.uniform(6, 24)
    reach = rng.uniform(15, 90)
    image += (
        rng.uniform(0.3, 2.5)
        * np.cos(2 * np.pi * r / period + rng.uniform(0, 6))
        * np.exp(-r / reach)
    )
    image += (
        rng.uniform(0, 0.6)
        * np.cos(rng.integers(8, 40) * angle)
        * np.exp(-((r / (3 * reach)) ** 2))
    )


KINDS: tuple[Callable[[Image, np.random.Generator], None], ...] = (
    *(
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
    ),
)


def _level(rng: np.random.Generator, low: float, high: float) -> float:
    return float(rng.choice([-1, 1]) * np.exp(rng.uniform(np.log(low), np.log(high))))


def _set(
    image: Image, where: npt.NDArray[np.bool_], values: npt.NDArray[np.float64] | float
) -> None:
    image[where] = values[where] if isinstance(values, np.ndarray) else values


def _line(
    image: Image,
    start: tuple[float, float],
    length: float,
    angle: float,
    width: float,
    value: float,
) -> None:
    """Add a line with a Gaussian cross-section (sigma ``width`` px) and soft ends, as far as it is above nothing."""
    ends = np.array([start, start])
    length = max(length, 0)
    ends[1] += length * np.cos(angle), length * np.sin(angle)
    left, top = np.clip(ends.min(0) - FAR * width, 0, SIDE).astype(int)
    right, bottom = np.clip(ends.max(0) + FAR * width + 1, 0, SIDE).astype(int)
    y, x = np.mgrid[top:bottom, left:right].astype(np.float32)
    x = x - np.float32(start[0])
    y = y - np.float32(start[1])
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    beyond = np.maximum(np.maximum(-along, along - length), 0)
    image[top:bottom, left:right] += (
        value * np.exp(-(across**2 + beyond**2) / (2 * width**2))
    ).astype(np.float32)
