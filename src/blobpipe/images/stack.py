"""Median stacks of images, and maps of the RMS deviation of images from their stack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numba as nb
import numpy as np

from blobpipe.core.arrays import Image, Mask
from blobpipe.core.cutouts import window_around
from blobpipe.images.pattern import SMOOTHING_PX, smooth_gaussian
from blobpipe.images.register import LARGEST_SHIFT_PX, NEGLIGIBLE_PX, Shift, moved

if TYPE_CHECKING:
    import pandas as pd

# Side of the cells of an RMS map (px)
CELL_PX = 2

# Newest images of a stack that have no part in its RMS map: they may show a blob that nobody has confirmed yet
NEWEST = 3

# Pixels whose median is computed at a time: they fit into the cache
TOGETHER = 256


def running_median(images: Image, size: int) -> Image:
    """Return the median of each run of ``size`` consecutive images, missing values left out.

    Parameters
    ----------
    images : ndarray, shape (n, ny, nx), float32
        In order of date; NaN where there is no value.
    size : int
        Number of images in a run, at most ``n``.

    Returns
    -------
    ndarray, shape (n - size + 1, ny, nx), float32
        NaN where no image of the run has a value.

    Notes
    -----
    Source: ISR 2021-08 section 2. The values of each pixel are kept sorted as the window slides, so the medians are exact.
    Many pixels are sorted at a time by vector instructions, in a seventh of the time of one pixel after the other.
    """
    n, *shape = images.shape
    medians = np.empty((n - size + 1, *shape), np.float32)
    _slide(images.reshape(n, -1), medians.reshape(len(medians), -1), size)
    return medians


@nb.njit(cache=True, nogil=True)
def _slide(images, medians, size):  # type: ignore[no-untyped-def]
    """Compute running medians of (n, pixels), into ``medians``.

    The values of a window are sorted from the lowest; missing ones are infinite, and so the last.
    """
    n, n_pixels = images.shape
    infinite = np.float32(np.inf)
    # One block of pixels after the other, along the whole sequence of images
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
    """Copy the values of an image that enters the window (sign 1) or leaves it (-1), and count them."""
    for x in range(len(values)):
        there = values[x] == values[x]
        number[x] += sign * there
        taken[x] = values[x] if there else np.float32(np.inf)


@nb.njit(cache=True, nogil=True)
def _exchange(here, above, leaving, coming):  # type: ignore[no-untyped-def]
    """Update one place of the sorted values.

    From the place of the value that leaves, higher values move down by one; from the place of the value that comes, they
    move up by one. ``coming`` carries the value that is to be inserted further up.
    """
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
    """Return the mean of the two middle values in ``median``; NaN where there is no value."""
    for x in range(len(median)):
        low = ordered[max(number[x] - 1, 0) // 2, x]
        high = ordered[number[x] // 2, x]
        middle = (np.float64(low) + np.float64(high)) / 2
        median[x] = np.float32(middle) if number[x] else np.float32(np.nan)


class Recent(NamedTuple):
    """A blob that landed on the mirror after the first image of a stack.

    Attributes
    ----------
    window : (slice, slice)
        Pixels that it can touch, wherever the mirror has moved it.
    distance : ndarray, shape of the window
        Distance of each pixel from its centre (px).
    radius_px : float
    start : int
        Index of the first of the stack's images that shows it.
    """

    window: tuple[slice, slice]
    distance: Image
    radius_px: float
    start: int

    @property
    def inside(self) -> Mask:
        """Return the mask of the blob in its window."""
        return self.distance < 1.55 * self.radius_px + 2.5


def rms_map(
    images: Image,
    stack: Image,
    recent: Sequence[Recent] = (),
    shifts: Sequence[Shift] | None = None,
) -> Image:
    """Return the RMS deviation of a stack's images from it: bad pixels that flicker stand out, blobs do not.

    Parameters
    ----------
    images : ndarray, shape (n, ny, nx), float32
        Images of a stack in order of date, their known blobs at their usual place; NaN where there is no value. The newest
        three do not count: a blob that landed on them has not flickered.
    stack : ndarray, shape (ny, nx), float32
        Their median.
    recent : sequence of Recent
        Blobs that landed on them: there, only the images since their landing count.
    shifts : sequence of Shift, optional
        Shift of the blobs of each image by the mirror. Required if ``stack`` does not show the recent blobs: there, the
        images since, moved back, are compared with their own median.

    Returns
    -------
    ndarray, shape (ny // 2, nx // 2), float32
        RMS in cells of 2 x 2 pixels (fraction of the light); 0 where a pixel has no value in any image, and everywhere if
        there are no more than three images.
    """
    counted = max(len(images) - NEWEST, 0)
    square = _mean_square(images[:counted], stack)

    # On a recent blob, that of the images since its landing
    for blob in recent:
        since = images[blob.start :, *blob.window]
        level = stack[blob.window]
        if shifts is not None:
            since = since_landing(images, blob, shifts, level)
            level = _median_of(since)
        n_since = max(counted - blob.start, 0)
        mean = _mean_square(since[:n_since], level)
        square[blob.window][blob.inside] = mean[blob.inside]

    # Root of the mean over each cell; an odd last row or column is left out
    ny, nx = (side // CELL_PX for side in stack.shape)
    cropped = square[: ny * CELL_PX, : nx * CELL_PX]
    pairs = cropped[:, ::CELL_PX] + cropped[:, 1::CELL_PX]
    cells = (pairs[::CELL_PX] + pairs[1::CELL_PX]) / np.float32(CELL_PX**2)
    found: Image = np.nan_to_num(np.sqrt(cells))
    return found


def _mean_square(images: Image, stack: Image) -> Image:
    """Return the mean square of each pixel of images minus their stack, missing values left out.

    It is NaN where all are missing, and 0 of no images.
    """
    mean: Image = _mean_square_of_all(*map(np.ascontiguousarray, (images, stack)))
    # Where some are missing
    some = np.isnan(mean) & np.isfinite(stack)
    if some.any():
        values = images[:, some] - stack[some]
        there = np.isfinite(values)
        total = np.square(np.where(there, values, 0)).sum(0)
        count = there.sum(0)
        mean[some] = np.where(count, total / np.maximum(count, 1), np.nan)
    return mean


@nb.njit(cache=True, nogil=True)
def _mean_square_of_all(images, stack):  # type: ignore[no-untyped-def]
    """Return the mean square of each pixel of images minus their stack; NaN where any value is missing."""
    n, ny, nx = images.shape
    mean = np.zeros((ny, nx), np.float32)
    for y in range(ny):
        for k in range(n):
            for x in range(nx):
                rest = images[k, y, x] - stack[y, x]
                mean[y, x] += rest * rest
        for x in range(nx):
            mean[y, x] /= np.float32(max(n, 1))
    return mean


def landed_within(
    blobs: pd.DataFrame, rows: Sequence[float], shape: tuple[int, ...]
) -> list[Recent]:
    """Return the blobs that landed after the first image of a stack, up to its last one.

    Parameters
    ----------
    blobs : DataFrame
        Catalogue with x_px, y_px, radius_px, and ``first``, the row of the first image that shows the blob.
    rows : sequence of float
        Row of each of the stack's images in ``frames.csv``. Dates may stand for rows, in ``first`` and here alike.
    shape : (ny, nx)
        Shape of the images.
    """
    landed = blobs[(blobs["first"] > rows[0]) & (blobs["first"] <= rows[-1])]
    recent = []
    columns = landed[["x_px", "y_px", "radius_px", "first"]]
    for x, y, radius, first in columns.itertuples(index=False):
        window, distance = window_around(shape, x, y, 1.55 * radius + LARGEST_SHIFT_PX)
        start = int(np.searchsorted(rows, first))
        recent.append(Recent(window, distance, radius, start))
    return recent


def with_recent_blobs(
    stack: Image, images: Image, recent: Sequence[Recent], shifts: Sequence[Shift] | None = None
) -> Image:
    """Return a stack that shows each recent blob as the images since its landing do.

    Otherwise a new blob would be new again on every image, until half of the stack's images show it.

    Parameters
    ----------
    stack : ndarray, shape (ny, nx), float32
        Median of ``images``.
    images : ndarray, shape (n, ny, nx), float32
        Images of the stack, older blobs at their usual place.
    recent : sequence of Recent
        From `landed_within`.
    shifts : sequence of Shift, optional
        Shift of the blobs of each image by the mirror; recent blobs are moved back by it.

    Returns
    -------
    ndarray, shape (ny, nx), float32
    """
    stack = stack.copy()
    for blob in recent:
        since = images[blob.start :, *blob.window]
        if shifts is not None:
            since = since_landing(images, blob, shifts, stack[blob.window])
        stack[blob.window][blob.inside] = _median_of(since)[blob.inside]
    return stack


def since_landing(images: Image, blob: Recent, shifts: Sequence[Shift], stack: Image) -> Image:
    """Return the window of a recent blob on the images since it landed, the blob moved to its usual place.

    Parameters
    ----------
    images : ndarray, shape (n, ny, nx), float32
        Images of the stack, older blobs at their usual place.
    blob : Recent
    shifts : sequence of Shift
        Shift of the blobs of each image by the mirror.
    stack : ndarray, shape of the window, float32
        Stack in the window, without the recent blob.

    Returns
    -------
    ndarray, shape (n - start, *window), float32
    """
    window = images[blob.start :, *blob.window].copy()
    shift_px = np.array(shifts[blob.start :], np.float32)
    far = np.flatnonzero(np.hypot(*np.array(shifts[blob.start :]).T) > NEGLIGIBLE_PX)
    if len(far):
        # The blob alone is moved, the pixels' own pattern stays
        reach = 1.55 * blob.radius_px + LARGEST_SHIFT_PX
        near = np.clip(reach - blob.distance, 0, 1).astype(np.float32)
        rest = np.nan_to_num(window[far] - stack)
        blobs = smooth_gaussian(rest, SMOOTHING_PX, twice=True) * near
        x = shift_px[far, 0].reshape(-1, 1, 1)
        y = shift_px[far, 1].reshape(-1, 1, 1)
        window[far] = window[far] - blobs + moved(blobs, -x, -y)
    return window


def _median_of(images: Image) -> Image:
    """Return the median of images, missing values left out."""
    import bottleneck

    return np.asarray(bottleneck.nanmedian(images, axis=0))
