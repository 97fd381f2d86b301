"""Median stacks of images, and how much each place varied from image to image."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numba as nb
import numpy as np
import numpy.typing as npt

from blobpipe.core.arrays import Image
from blobpipe.core.cutouts import window_around
from blobpipe.images.pattern import (
    SMOOTHING_PX,
    smooth_gaussian,
)
from blobpipe.images.register import (
    LARGEST_SHIFT_PX,
    NEGLIGIBLE_PX,
    Shift,
    moved,
)

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)
ROWS = 64  # of so many rows at a time the scatter is taken: they fit the cache
TOGETHER = 256  # pixels, whose ordered values fit the cache
CELL_PX = 2  # side of the cells of `scatter`
# images of a stack may show a blob that nobody has confirmed yet: they have no part in its scatter
NEWEST = 3


def running_median(images: Image, size: int) -> Image:
    """Median of each run of ``size`` consecutive images, missing values left out.

    Parameters
    ----------
    images : ndarray, shape (n, ny, nx), float32
        In order of date; NaN where there is no value.
    size : int
        Images in a run, at most ``n``.

    Returns
    -------
    ndarray, shape (n - size + 1, ny, nx), float32
        NaN where no image of the run has a value.

    Notes
    -----
    Source: ISR 2021-08 section 2. Exact: each pixel's values are kept in order as the window slides; many pixels at a time,
    so that vectors compare them. A seventh of the time of a moving median that takes one pixel after the other.
    """
    n, *shape = images.shape
    medians = np.empty((n - size + 1, *shape), np.float32)
    _slide(images.reshape(n, -1), medians.reshape(len(medians), -1), size)
    return medians


@nb.njit(cache=True, nogil=True)
def _slide(images, medians, size):  # type: ignore[no-untyped-def]
    """Values are ordered from the lowest; what is missing stands at the end, as infinite."""
    n, n_pixels = images.shape
    infinite = np.float32(np.inf)
    for first in range(0, n_pixels, TOGETHER):
        count = min(TOGETHER, n_pixels - first)
        ordered = np.full((size + 1, TOGETHER), infinite)
        number = np.zeros(TOGETHER, np.int64)
        leaving = np.full(TOGETHER, infinite)
        coming = np.full(TOGETHER, infinite)
        for k in range(n):
            _take(images[k, first : first + count], coming, number, 1)
            if k >= size:
                _take(images[k - size, first : first + count], leaving, number, -1)
            for i in range(size):
                _exchange(ordered[i], ordered[i + 1], leaving, coming)
            if k >= size - 1:
                _middle(ordered, number, medians[k - size + 1, first : first + count])


@nb.njit(cache=True, nogil=True)
def _take(values, taken, number, sign):  # type: ignore[no-untyped-def]
    for x in range(len(values)):
        there = values[x] == values[x]
        number[x] += sign * there
        taken[x] = values[x] if there else np.float32(np.inf)


@nb.njit(cache=True, nogil=True)
def _exchange(here, above, leaving, coming):  # type: ignore[no-untyped-def]
    """One place in the order: from that of what leaves on, what is above moves down; what comes pushes what is higher up."""
    for x in range(TOGETHER):
        value = here[x]
        next_value = above[x]
        old = leaving[x]
        new = coming[x]
        kept = value if value < old else next_value
        here[x] = kept if kept < new else new
        coming[x] = new if kept < new else kept


@nb.njit(cache=True, nogil=True)
def _middle(ordered, number, median):  # type: ignore[no-untyped-def]
    for x in range(len(median)):
        low = ordered[max(number[x] - 1, 0) // 2, x]
        high = ordered[number[x] // 2, x]
        middle = (np.float64(low) + np.float64(high)) / 2
        median[x] = np.float32(middle) if number[x] else np.float32(np.nan)


class Recent(NamedTuple):
    """A blob that landed within a stack.

    Attributes
    ----------
    window : (slice, slice)
        What it may touch.
    distance : ndarray, shape of the window
        Of each pixel from its centre (px).
    radius_px : float
    start : int
        The first of the stack's images that shows it.
    """

    window: tuple[slice, slice]
    distance: Image
    radius_px: float
    start: int

    @property
    def inside(self) -> npt.NDArray[np.bool_]:
        """Where it is."""
        return self.distance < 1.55 * self.radius_px + 2.5


def rms_map(
    images: Image,
    stack: Image,
    recent: Sequence[Recent] = (),
    shifts: Sequence[Shift] | None = None,
) -> Image:
    """How much each place varied from image to image: bad pixels that flicker stand out, blobs do not.

    Parameters
    ----------
    images : ndarray, shape (n, ny, nx), float32
        The images of a stack in order of date, their known blobs at their usual place; NaN where there is no value. The
        newest three do not count: a blob that landed on them has not flickered.
    stack : ndarray, shape (ny, nx), float32
        Their median.
    recent : sequence of Recent
        What landed on them: there only the images since count.
    shifts : sequence of Shift, optional
        Where the mirror had put the blobs of each image. To be given if ``stack`` does not show the recent blobs: there,
        the images since, moved back, are compared with their own median.

    Returns
    -------
    ndarray, shape (ny // 2, nx // 2), float32
        Root mean square of the differences in cells of 2 x 2 pixels (fraction of the light); 0 where a value is missing,
        and all over if there are no more than three images.

    Notes
    -----
    Source: ours.
    """
    counted = max(len(images) - NEWEST, 0)
    square = np.empty_like(stack)
    for row in range(0, len(stack), ROWS):
        rest = images[:counted, row : row + ROWS] - stack[row : row + ROWS]
        np.einsum("nij,nij->ij", rest, rest, out=square[row : row + ROWS])
    square /= max(counted, 1)
    for blob in recent:
        since = images[blob.start :, *blob.window]
        level = stack[blob.window]
        if shifts is not None:
            since = since_landing(images, blob, shifts, level)
            level = _median_of(since)
        rest = since[: max(counted - blob.start, 0)] - level
        square[blob.window][blob.inside] = np.square(rest).sum(0)[blob.inside] / max(len(rest), 1)
    ny, nx = (side // CELL_PX for side in stack.shape)
    cells = (
        square[: ny * CELL_PX, : nx * CELL_PX].reshape(ny, CELL_PX, nx, CELL_PX).mean(axis=(1, 3))
    )
    found: Image = np.nan_to_num(np.sqrt(cells))
    return found


def landed_within(
    blobs: pd.DataFrame, rows: Sequence[float], shape: tuple[int, ...]
) -> list[Recent]:
    """The blobs that landed within a stack.

    Parameters
    ----------
    blobs : DataFrame
        Catalogue with x_px, y_px, radius_px, and ``first``, the row of the first image that shows the blob.
    rows : sequence of float
        Row of each of the stack's images in ``frames.csv``; or ``first`` and these are dates.
    shape : (ny, nx)
        Of the images.
    """
    recent = blobs[(blobs["first"] > rows[0]) & (blobs["first"] <= rows[-1])]
    return [
        Recent(
            *window_around(shape, x, y, 1.55 * radius + LARGEST_SHIFT_PX),
            radius,
            int(np.searchsorted(rows, first)),
        )
        for x, y, radius, first in recent[["x_px", "y_px", "radius_px", "first"]].itertuples(
            index=False
        )
    ]


def with_recent_blobs(
    stack: Image, images: Image, recent: Sequence[Recent], shifts: Sequence[Shift] | None = None
) -> Image:
    """A stack with each blob that landed within it as the images since its landing show it.

    Otherwise a new blob would be new again in every image until half of the stack has it.

    Parameters
    ----------
    stack : ndarray, shape (ny, nx), float32
        Median of ``images``.
    images : ndarray, shape (n, ny, nx), float32
        The stack's images, older blobs at their usual place.
    recent : sequence of Recent
        From `landed_within`.
    shifts : sequence of Shift, optional
        Where the mirror had put the blobs of each image: the recent one is moved back.
    """
    stack = stack.copy()
    for blob in recent:
        since = images[blob.start :, *blob.window]
        if shifts is not None:
            since = since_landing(images, blob, shifts, stack[blob.window])
        stack[blob.window][blob.inside] = _median_of(since)[blob.inside]
    return stack


def since_landing(images: Image, blob: Recent, shifts: Sequence[Shift], stack: Image) -> Image:
    """The window of a recent blob on the images since it landed, the blob moved to its usual place."""
    near = np.clip(1.55 * blob.radius_px + LARGEST_SHIFT_PX - blob.distance, 0, 1).astype(
        np.float32
    )
    return _moved_back(images[blob.start :, *blob.window], shifts[blob.start :], stack, near)


def _median_of(images: Image) -> Image:
    import bottleneck

    return np.asarray(bottleneck.nanmedian(images, axis=0))


def _moved_back(images: Image, shifts: Sequence[Shift], stack: Image, near: Image) -> Image:
    """The neighbourhood of a blob that the stack has not learnt yet, in each image, the blob moved to its usual place."""
    x, y = np.array(shifts, np.float32).reshape(-1, 2, 1, 1).swapaxes(0, 1)
    far = np.flatnonzero(np.hypot(*np.array(shifts).T) > NEGLIGIBLE_PX)
    images = images.copy()
    if len(far):
        blobs = smooth_gaussian(np.nan_to_num(images[far] - stack), SMOOTHING_PX, twice=True) * near
        images[far] = images[far] - blobs + moved(blobs, -x[far], -y[far])
    return images
