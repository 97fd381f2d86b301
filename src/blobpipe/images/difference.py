"""Each image minus the median stack of those before it, with the blobs moved to where the mirror put them.

The blobs sit on a mirror that does not always return to the same angle, the pixels' own pattern sits on the
detector. So only the blob pattern of the stack is moved: known blobs leave no dips, and the noise elsewhere stays
what it was. A new blob is positive.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numba as nb
import numpy as np
import numpy.typing as npt

from blobpipe.core import frames
from blobpipe.errors import FrameError, TableError
from blobpipe.params import Difference

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

Image = npt.NDArray[np.float32]

SHAPE = (1024, 1024)
ROWS = 64  # of so many rows at a time the scatter is taken: they fit the cache
TOGETHER = 256  # pixels, whose ordered values fit the cache
SMOOTHING_PX = 1.1  # of the pattern: loses little of a blob's edge, most of the pixels' own pattern
FILL_PX = 6  # around a bad pixel from which it is filled: four standard deviations
SEARCH_PX = 3.0  # how softly the neighbourhood of the pattern ends in which a shift is measured
STEPS_PER_PX = 10  # of the correlation's peak
STEEP = 4.0  # flanks of blobs are steeper than the typical pixel of the pattern so many times
LARGEST_SHIFT_PX = 6.0  # beyond it the mirror has never been
NEGLIGIBLE_PX = 0.05  # so small a shift moves a blob's edge by a fraction of the noise
LARGEST_ERROR_PX = 0.1  # a pattern too faint to give the shift so well gives none
MOSTLY = 0.85  # of a blob's pixels are good
NO_BLOBS = ((362.0, 59.0, 28.0), (968.0, 50.0, 28.0))  # x, y, reach (px): the Death Star and the wagon wheel's hub
DEEPEST_FRAC = 0.35  # a blob takes up to 30 % of the light
CELL_PX = 2  # side of the cells of `scatter`
NOISE_FACTOR = (
    4.0  # an image's noise is within this factor of the usual one: half or twice the light changes it by 1.4; ours
)
STACK_NOISE = (
    6.0  # an image's noise is at most so many times that of its stack: 4.4 times for 30 without a common pattern
)
NEWEST = 3  # images of a stack may show a blob that nobody has confirmed yet: they have no part in its scatter
KEPT_CARDS = ("TELESCOP", "INSTRUME", "DETECTOR", "FILTER", "TARGNAME", "ROOTNAME", "EXPSTART")


class Shift(NamedTuple):
    """Displacement of the blob pattern on the detector (px)."""

    x_px: float
    y_px: float


NOWHERE = Shift(0.0, 0.0)


@dataclass(frozen=True)
class Candidate:
    """An image of the list, read or rejected for a reason; ``row`` is its place in ``frames.csv``, ``noise`` its own."""

    row: int
    name: str
    cards: dict[str, Any]
    reason: str
    noise: float = np.nan


@dataclass(frozen=True)
class Registered:
    """Images whose known blobs have been moved to their usual place.

    Attributes
    ----------
    images : ndarray, shape (n, ny, nx), float32
        In order of date (fraction of the light).
    shifts : list of Shift
        Where the mirror had put the blobs of each.
    pattern : ndarray, shape (ny, nx), float32
        The blobs that were moved.
    rows : list of int
        Row of each image in ``frames.csv``.
    """

    images: Image
    shifts: list[Shift]
    pattern: Image
    rows: list[int]


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
        ordered, number = np.full((size + 1, TOGETHER), infinite), np.zeros(TOGETHER, np.int64)
        leaving, coming = np.full(TOGETHER, infinite), np.full(TOGETHER, infinite)
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
        value, next_value, old, new = here[x], above[x], leaving[x], coming[x]
        kept = value if value < old else next_value
        here[x] = kept if kept < new else new
        coming[x] = new if kept < new else kept


@nb.njit(cache=True, nogil=True)
def _middle(ordered, number, median):  # type: ignore[no-untyped-def]
    for x in range(len(median)):
        low, high = ordered[max(number[x] - 1, 0) // 2, x], ordered[number[x] // 2, x]
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


def scatter(images: Image, stack: Image, recent: Sequence[Recent] = (), shifts: Sequence[Shift] | None = None) -> Image:
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
    counted, square = max(len(images) - NEWEST, 0), np.empty_like(stack)
    for row in range(0, len(stack), ROWS):
        rest = images[:counted, row : row + ROWS] - stack[row : row + ROWS]
        np.einsum("nij,nij->ij", rest, rest, out=square[row : row + ROWS])
    square /= max(counted, 1)
    for blob in recent:
        since, level = images[blob.start :, *blob.window], stack[blob.window]
        if shifts is not None:
            since = _since_landing(images, blob, shifts, level)
            level = _median_of(since)
        rest = since[: max(counted - blob.start, 0)] - level
        square[blob.window][blob.inside] = np.square(rest).sum(0)[blob.inside] / max(len(rest), 1)
    ny, nx = (side // CELL_PX for side in stack.shape)
    cells = square[: ny * CELL_PX, : nx * CELL_PX].reshape(ny, CELL_PX, nx, CELL_PX).mean(axis=(1, 3))
    found: Image = np.nan_to_num(np.sqrt(cells))
    return found


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
    shared = frames.median_and_noise(stack)[1]
    varying = 0.0 if scatter is None else noise_of_scatter(scatter)
    if not varying:
        return Range(shared / NOISE_FACTOR, shared * NOISE_FACTOR * STACK_NOISE)
    return noise_near(float(np.hypot(shared, varying)))


def noise_of_scatter(scatter: Image) -> float:
    """Noise of a stack's images without what they share (fraction of the light); 0 where nothing is known of it."""
    cells = scatter[::2, ::2]
    cells = cells[cells > 0]
    return float(frames.median(cells)) if cells.size else 0.0


def insist_on_noise_of_scatter(difference: Image, scatter: Image | None, path: str | Path) -> None:
    """Refuse a difference image whose noise is not that of the images of its stack, if the stack's scatter is known."""
    if scatter is not None and (usual := noise_of_scatter(scatter)):
        insist_on_noise(frames.median_and_noise(difference)[1], noise_near(usual), path)


def insist_on_noise(noise: float, expected: Range, path: str | Path) -> None:
    """Refuse an image that is in other units than those it is compared with, or scaled.

    Parameters
    ----------
    noise : float
        Of the image, from `frames.median_and_noise`.
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


def blob_pattern(stack: Image, blobs: pd.DataFrame | None = None) -> Image:
    """The known blobs alone, as a median stack shows them: smoothed, without bad pixels, 0 elsewhere.

    Parameters
    ----------
    stack : ndarray, shape (ny, nx), float32
        A median stack (fraction of the light).
    blobs : DataFrame, optional
        Catalogue with the columns x_px, y_px, radius_px. What stands out of the stack counts as a blob in any case.

    Returns
    -------
    ndarray, shape (ny, nx), float32
        Blobs that the detector's border cuts go on beyond it.

    Notes
    -----
    Source: ours. Smoothing twice, the second time what the first one lost, keeps a blob's edge.
    """
    noise = clean_noise(stack)
    filled, good = _without_bad_pixels(np.nan_to_num(_continued(stack)), noise)
    pattern = _smooth(filled, SMOOTHING_PX, twice=True)
    near = _standing_out(pattern, filled - pattern, good, noise)
    if blobs is not None:
        np.maximum(near, _near_blobs(stack.shape, blobs), out=near)
    return pattern * near


def _continued(stack: Image) -> Image:
    """Rows and columns without values mirror those inside: a shift moves some of what the border hides into view."""
    lines = [np.flatnonzero(np.isfinite(stack).any(axis=axis)) for axis in (1, 0)]
    if not lines[0].size:
        return stack
    inner = stack[tuple(slice(line[0], line[-1] + 1) for line in lines)]
    beyond = [(line[0], length - 1 - line[-1]) for line, length in zip(lines, stack.shape, strict=True)]
    return np.pad(inner, beyond, mode="symmetric")


def _without_bad_pixels(stack: Image, noise: float) -> tuple[Image, npt.NDArray[np.bool_]]:
    """Fill each pixel that no blob explains from around it; where none was to be filled."""
    sides = np.stack([np.roll(stack, step, axis) for axis in (0, 1) for step in (-1, 1)])
    usual = (sides.sum(axis=0) - sides.max(axis=0) - sides.min(axis=0)) / 2
    alike = np.abs(stack - usual) < 4 * noise + 0.3 * np.abs(usual)
    good = alike & (stack > -4 * noise) & (stack < DEEPEST_FRAC)
    filled = _filled(stack, good)
    sharp = _smooth(filled, SMOOTHING_PX, twice=True)
    rough = _smooth(np.square(filled - sharp), 1.0) > np.square(2 * noise + 0.1 * np.abs(sharp))
    good &= ~rough  # a cluster of bad pixels has harder edges than any blob
    return _filled(stack, good), good


def _filled(stack: Image, good: npt.NDArray[np.bool_]) -> Image:
    """Pixels that are not good have the mean of the good ones around, or less where these are few."""
    weights = np.exp(-np.square(np.arange(-FILL_PX, FILL_PX + 1) / 1.5) / 2).astype(np.float32)
    filled = np.where(good, stack, 0).astype(np.float32)
    padded, share = np.pad(filled, FILL_PX), np.pad(good.astype(np.float32), FILL_PX)
    _fill(padded, share, good, filled, weights / weights.sum())
    return filled


@nb.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _fill(values, share, good, filled, weights):  # type: ignore[no-untyped-def]
    n = len(weights)
    for y in range(good.shape[0]):
        for x in range(good.shape[1]):
            if not good[y, x]:
                total, counted = np.float32(0), np.float32(0)
                for j in range(n):
                    row, row_good = values[y + j, x : x + n], share[y + j, x : x + n]
                    row_total, row_counted = np.float32(0), np.float32(0)
                    for i in range(n):
                        row_total += weights[i] * row[i]
                        row_counted += weights[i] * row_good[i]
                    total += weights[j] * row_total
                    counted += weights[j] * row_counted
                filled[y, x] = total / max(counted, np.float32(0.02))


def _near_blobs(shape: tuple[int, ...], blobs: pd.DataFrame) -> Image:
    """1 on each blob of the catalogue, falling to 0 within two pixels of its outer edge."""
    near = np.zeros(shape, np.float32)
    for x, y, radius in blobs[["x_px", "y_px", "radius_px"]].itertuples(index=False):
        window, distance = _around(shape, x, y, 1.55 * radius + 3)
        np.maximum(near[window], np.clip((1.55 * radius + 2.5 - distance) / 2, 0, 1), out=near[window])
    return near


def _around(shape: tuple[int, ...], x: float, y: float, reach: float) -> tuple[tuple[slice, slice], npt.NDArray[Any]]:
    """The square around a place, as far as it is on the image, and each pixel's distance from the place."""
    rows = slice(max(0, int(y - reach)), max(0, min(shape[0], int(y + reach) + 2)))
    columns = slice(max(0, int(x - reach)), max(0, min(shape[1], int(x + reach) + 2)))
    distance = np.hypot(np.arange(rows.start, rows.stop)[:, None] - y, np.arange(columns.start, columns.stop) - x)
    return (rows, columns), distance


def _standing_out(pattern: Image, rest: Image, good: npt.NDArray[np.bool_], noise: float) -> Image:
    """1 on compact positive patches that are smooth like a blob, falling to 0 around them."""
    from scipy import ndimage

    smoothed = _smooth(pattern, 1.5)
    for x, y, reach in NO_BLOBS:
        window, distance = _around(smoothed.shape, x, y, reach)
        smoothed[window][distance < reach] = 0
    sigma = clean_noise(smoothed)
    labels, n = ndimage.label(smoothed > 2 * sigma)
    keep = np.zeros(n + 1, np.bool_)
    windows = ndimage.find_objects(labels)
    for label in np.unique(labels[smoothed > 5 * sigma]):
        window = windows[label - 1]
        patch = labels[window] == label
        likely = _compact(patch) and good[window][patch].mean() > MOSTLY
        keep[label] = likely and _blob_like(pattern[window][patch], rest[window][patch], noise)
    return _soft(keep[labels], 1.0)


def _compact(patch: npt.NDArray[np.bool_]) -> bool:
    """Neither a few pixels, nor much longer than wide, nor large: such are no blobs."""
    short, long = sorted(patch.shape)
    return bool(patch.sum() >= 16 and long < 2.5 * short and long < 45)


def _blob_like(values: Image, rest: Image, noise: float) -> bool:
    """No deeper than any blob, and what smoothing takes away is noise: a cluster of bad pixels has hard edges."""
    return bool(values.max() < DEEPEST_FRAC and np.std(rest) < 1.3 * noise + 0.03 * values.max())


def _soft(region: npt.NDArray[np.bool_], width: float) -> Image:
    """1 on a region and just around it, falling to 0 within three times ``width``."""
    return np.asarray(np.clip(4 * _smooth(region, width) - 0.05, 0, 1))


def _smooth(image: npt.NDArray[Any], sigma: float, *, twice: bool = False) -> Image:
    """Convolve with a Gaussian, and what that loses again if ``twice``; the image is taken as periodic."""
    from scipy.fft import irfft2, rfft2

    transfer = _transfer(image.shape[-2:], sigma, twice)
    return np.asarray(irfft2(rfft2(image.astype(np.float32)) * transfer, s=image.shape[-2:]))


@lru_cache(maxsize=32)
def _transfer(shape: tuple[int, int], sigma: float, twice: bool) -> Image:
    fx, fy = _frequencies(shape)
    transfer = np.exp(-2 * (np.pi * sigma) ** 2 * (fx**2 + fy**2))
    return np.asarray(2 * transfer - transfer**2 if twice else transfer)


def _frequencies(shape: tuple[int, ...]) -> tuple[Image, Image]:
    """Cycles per pixel along x and y of an image's `rfft2`."""
    fx, fy = np.fft.rfftfreq(shape[1])[None, :], np.fft.fftfreq(shape[0])[:, None]
    return fx.astype(np.float32), fy.astype(np.float32)


def move_pattern(pattern: Image, shift: Shift) -> Image:
    """A blob pattern moved by a fraction of a pixel or more.

    Parameters
    ----------
    pattern : ndarray, shape (ny, nx), float32
        Smooth, so that it can be moved exactly; what leaves it on one side comes back on the other.
    shift : Shift
        Positive: to larger x and y.
    """
    return _moved(pattern, *shift)


def _moved(pattern: Image, x_px: Any, y_px: Any) -> Image:
    """The same of several patterns, shape (n, ny, nx), where the shifts are of shape (n, 1, 1), float32."""
    from scipy.fft import rfft2

    return _inverse(rfft2(pattern), pattern.shape[-2:], x_px, y_px)


def _inverse(spectrum: npt.NDArray[Any], shape: tuple[int, ...], x_px: Any, y_px: Any) -> Image:
    """What has this `rfft2`, moved."""
    from scipy.fft import irfft2

    fx, fy = _frequencies(shape)
    x, y = (np.exp(-2j * np.pi * f * shift).astype(np.complex64) for f, shift in ((fx, x_px), (fy, y_px)))
    moved = spectrum * y
    moved *= x
    return np.asarray(irfft2(moved, s=shape))


class _Known(NamedTuple):
    """A `blob_pattern`, with what measuring shifts against it takes of it again and again."""

    pattern: Image
    near: Image  # 1 close to it, softly falling to 0
    spectrum: npt.NDArray[Any]
    correlated: npt.NDArray[Any]  # spectrum of its sums of 2 x 2 pixels
    steepness: float  # root of the sum of its squared slopes, along the flatter axis

    @classmethod
    def of(cls, pattern: Image) -> _Known:
        from scipy.fft import fft2, rfft2

        near = _soft(pattern != 0, SEARCH_PX)
        _, *slopes = _slopes(pattern, near)
        steepness = np.sqrt(min(np.sum(np.square(slope)) for slope in slopes))
        return cls(pattern, near, rfft2(pattern), fft2(_binned(pattern)), float(steepness))

    def moved(self, shift: Shift) -> Image:
        return _inverse(self.spectrum, self.pattern.shape, *shift)


def measure_shift(image: Image, stack: Image, pattern: Image) -> Shift:
    """How far the blobs of an image have moved from where the stack has them.

    Parameters
    ----------
    image, stack : ndarray, shape (ny, nx), float32
        NaN where there is no value.
    pattern : ndarray, shape (ny, nx), float32
        The stack's `blob_pattern`.

    Returns
    -------
    Shift
        0 if the pattern is too faint, or the result beyond belief.

    Notes
    -----
    Source: ours. All that does not move is taken off before: the image minus the rest of the stack is compared with the
    pattern, close to it only and with outliers limited, by upsampled correlation and then by least squares.
    """
    return _measure(image - stack, _Known.of(pattern))


def _measure(rest: Image, known: _Known) -> Shift:
    noise = clean_noise(rest)
    if noise > LARGEST_ERROR_PX * known.steepness:  # the standard error in white noise is their ratio
        return NOWHERE
    limit = 4 * noise + known.pattern.max()
    shift = _correlate(np.clip(np.nan_to_num(rest + known.pattern), -limit, limit) * known.near, known)
    if max(map(abs, shift)) > LARGEST_SHIFT_PX:
        log.warning("a shift of %.1f, %.1f px is taken for a mistake and ignored", *shift)
        return NOWHERE
    return _nearer(shift, rest, known, noise)


def _correlate(image: Image, known: _Known) -> Shift:
    """Shift at the peak of the cross-correlation, to a tenth of a pixel; half the resolution is enough for that."""
    from scipy.fft import fft2
    from skimage.registration import phase_cross_correlation

    correlate: Any = phase_cross_correlation
    spectrum, steps = fft2(_binned(image)), 2 * STEPS_PER_PX
    (y, x), _, _ = correlate(spectrum, known.correlated, space="fourier", upsample_factor=steps, normalization=None)
    return Shift(2 * float(x), 2 * float(y))


def _binned(image: Image) -> Image:
    """Sums of 2 x 2 pixels."""
    ny, nx = (length // 2 * 2 for length in image.shape)
    return np.asarray(sum(image[j:ny:2, i:nx:2] for j in (0, 1) for i in (0, 1)))


def _nearer(shift: Shift, rest: Image, known: _Known, noise: float) -> Shift:
    """One least-squares step, from the blobs' flanks alone: on faint parts the pattern is the detector's too."""
    moved = known.moved(shift)
    pixels, x, y = _slopes(moved, known.near)
    steep = np.hypot(x, y)
    flanks = (steep > STEEP * np.median(steep)) & np.isfinite(rest.flat[pixels])
    pixels, x, y = pixels[flanks], x[flanks], y[flanks]
    left = rest.flat[pixels] + known.pattern.flat[pixels] - moved.flat[pixels]
    left = left.clip(-3 * noise, 3 * noise)
    xx, xy, yy, xl, yl = (float(np.sum(product)) for product in (x * x, x * y, y * y, x * left, y * left))
    determinant = max(xx * yy - xy**2, 1e-30)
    return Shift(shift.x_px - (yy * xl - xy * yl) / determinant, shift.y_px - (xx * yl - xy * xl) / determinant)


def _slopes(image: Image, near: Image) -> tuple[npt.NDArray[np.intp], npt.NDArray[Any], npt.NDArray[Any]]:
    """The pixels of a neighbourhood (as flat indices), and the slope there along x and along y, per pixel."""
    width = image.shape[1]
    pixels = width + np.flatnonzero(near[1:-1] > 0.5)
    values = image.ravel().astype(np.float64)
    slope_x = values[pixels + 1] - values[pixels - 1]
    slope_y = values[pixels + width] - values[pixels - width]
    return pixels, slope_x / 2, slope_y / 2


def difference_image(
    image: Image, stack: Image, params: Difference, blobs: pd.DataFrame | None = None
) -> tuple[Image, Shift]:
    """One image minus a median stack whose blobs have been moved to where the image has them.

    Parameters
    ----------
    image, stack : ndarray, shape (ny, nx), float32
        Fraction of the light; NaN where there is no value.
    params : Difference
    blobs : DataFrame, optional
        Catalogue, as for `blob_pattern`.

    Returns
    -------
    ndarray, shape (ny, nx), float32
        A new blob is positive.
    Shift
        Measured against the stack; 0 where registration is off.

    Raises
    ------
    FrameError
        If the two differ in size.
    """
    if image.shape != stack.shape:
        (ny, nx), (stack_ny, stack_nx) = image.shape, stack.shape
        raise FrameError(f"found {nx}x{ny} pixels, expected {stack_nx}x{stack_ny} as in the median stack")
    if not params.register_shift:
        return image - stack, NOWHERE
    pattern = blob_pattern(stack, blobs)
    shift = measure_shift(image, stack, pattern)
    return image - (stack + move_pattern(pattern, shift) - pattern), shift


def subtract(raw_dir: str | Path, out_dir: str | Path, params: Difference, batch: int | None = None) -> None:
    """Write the difference image of each image that has a whole stack before it (stage ``difference``).

    Parameters
    ----------
    raw_dir : path
        Images, ``frames.csv``, and ``blobs.csv`` if there is a catalogue.
    out_dir : path
        ``{frame}.fits.fz`` (HDU DIFFERENCE, fraction of the light, new blob positive, and HDU SCATTER, see `scatter`),
        then ``frames-NNN.csv`` for each batch. An image that cannot be used is rejected there, with the reason, and left out of the stacks.
    params : Difference
    batch : int, optional
        Only this batch of `frames.BATCH` rows. What comes out does not depend on how the work is shared out.

    Raises
    ------
    TableError
        If ``frames.csv`` or ``blobs.csv`` is at fault.

    Notes
    -----
    Source: ISR 2021-08 section 2; registration and the stack that knows new blobs are ours.
    """
    import pandas as pd

    table, blobs = frames.read_frame_list(raw_dir), _catalogue(raw_dir)
    batches = frames.batches(len(table))
    if batch is not None and batch not in range(len(batches)):
        raise TableError(
            f"{raw_dir}/frames.csv: its {len(table)} images make batches 0 to {len(batches) - 1}, no {batch}"
        )
    for number, rows in enumerate(batches):
        if batch not in (None, number):
            continue
        done = _subtract_rows(Path(raw_dir), Path(out_dir), params, table, blobs, rows)
        frames.write_table(Path(out_dir) / f"frames-{number:03d}.csv", pd.DataFrame(done))


def _catalogue(raw_dir: str | Path) -> pd.DataFrame:
    """The catalogue, with the row of each blob's first image (-1: before all) as ``first``."""
    blobs, names = frames.read_blobs(raw_dir), frames.read_frame_list(raw_dir)["frame"]
    rows = {name: row for row, name in enumerate(names)}
    return blobs.assign(first=[rows.get(name, -1) for name in blobs["first_frame"]])


def _subtract_rows(
    raw_dir: Path, out_dir: Path, params: Difference, table: pd.DataFrame, blobs: pd.DataFrame, rows: slice
) -> list[dict[str, Any]]:
    read, images = _read_rows(raw_dir, table, rows, params.stack_size)
    candidates = [candidate for candidate in read if candidate.row >= rows.start]
    usable = [candidate for candidate in read if not candidate.reason]
    made: dict[str, dict[str, Any]] = {}
    if len(usable) > params.stack_size:
        registered = _register(images, usable, params, blobs)
        medians = running_median(registered.images[:-1], params.stack_size)
        for candidate, median in zip(usable[params.stack_size :], medians, strict=True):
            made[candidate.name] = _subtract_one(out_dir, params, candidate, registered, median, blobs)
    mjd = dict(zip(table["frame"], table["mjd"], strict=True))
    return [
        {"frame": candidate.name, "mjd": mjd[candidate.name]}
        | (made.get(candidate.name) or _without_difference(candidate, usable))
        for candidate in candidates
    ]


def _without_difference(candidate: Candidate, usable: list[Candidate]) -> dict[str, Any]:
    if candidate.reason:
        log.warning("%s rejected: %s", candidate.name, candidate.reason)
        return _result("rejected", reason=candidate.reason)
    n_stack = sum(other.row < candidate.row for other in usable)
    return _result("stack", reason=f"{n_stack} usable images before it", n_stack=n_stack)


def _result(status: str, *, reason: str = "", shift: Shift = NOWHERE, **found: Any) -> dict[str, Any]:
    shifts = {"shift_x_px": shift.x_px, "shift_y_px": shift.y_px}
    return {"status": status, "reason": reason} | shifts | {"noise_frac": np.nan, "n_stack": 0, "sha256": ""} | found


def _read_rows(raw_dir: Path, table: pd.DataFrame, rows: slice, wanted: int) -> tuple[list[Candidate], list[Image]]:
    """The images of some rows and before them, as many usable ones as ``wanted`` or there are; those that are usable."""
    read = [_read(raw_dir, table, row) for row in range(rows.start, rows.stop)]
    found = _compared([candidate for candidate, _ in read])
    start = rows.start
    while start and sum(not candidate.reason for candidate in found if candidate.row < rows.start) < wanted:
        start -= 1
        read.insert(0, _read(raw_dir, table, start))
        found = _compared([candidate for candidate, _ in read])
    images = [
        image for candidate, (_, image) in zip(found, read, strict=True) if image is not None and not candidate.reason
    ]
    return found, images


def _compared(candidates: list[Candidate]) -> list[Candidate]:
    """The same, those rejected whose noise is not that of most."""
    noise = [candidate.noise for candidate in candidates if not candidate.reason]
    if not noise:
        return candidates
    expected = noise_near(float(np.median(noise)))
    return [candidate if candidate.reason else _with_noise(candidate, expected) for candidate in candidates]


def _with_noise(candidate: Candidate, expected: Range) -> Candidate:
    try:
        insist_on_noise(candidate.noise, expected, candidate.name)
    except FrameError as error:
        return replace(candidate, reason=str(error))
    return candidate


def _read(raw_dir: Path, table: pd.DataFrame, row: int) -> tuple[Candidate, Image | None]:
    name = str(table["frame"].iloc[row])
    try:
        path = frames.find_image(raw_dir, name)
        frame = frames.read_frame(path)
        noise = frames.insist_on_usable(frame, path)
        if frame.data.shape != SHAPE:
            ny, nx = frame.data.shape
            raise FrameError(f"{path}: found {nx}x{ny} pixels, expected {SHAPE[1]}x{SHAPE[0]}")
    except FrameError as error:
        return Candidate(row, name, {}, str(error)), None
    cards = {card: frame.header[card] for card in KEPT_CARDS if card in frame.header}
    return Candidate(row, name, cards, "", noise), np.where(np.isfinite(frame.data), frame.data, np.float32(np.nan))


def _register(images: list[Image], usable: list[Candidate], params: Difference, blobs: pd.DataFrame) -> Registered:
    """Move the blobs of images to their usual place, as the first of them show it; empties the list."""
    rows = [candidate.row for candidate in usable]
    stacked = np.stack(images)
    images.clear()  # a batch is large: it need not be held twice
    if not params.register_shift:
        return Registered(stacked, [NOWHERE] * len(rows), np.zeros(stacked.shape[1:], np.float32), rows)
    first = stacked[: params.stack_size]
    known = blobs[blobs["first"] <= rows[len(first) - 1]]
    plain = _stack(first, rows[: len(first)], params, known)
    once, shifts = register(first.copy(), plain, blob_pattern(plain, known))  # images that lie off blur the median
    stack = _stack(once, rows[: len(first)], params, known, shifts)
    pattern = blob_pattern(stack, known)
    return Registered(*register(stacked, stack, pattern, n_first=len(first)), pattern, rows)


def _stack(
    images: Image, rows: list[int], params: Difference, known: pd.DataFrame, shifts: Sequence[Shift] | None = None
) -> Image:
    median = running_median(images, len(images))[0]
    return with_recent_blobs(median, images, _recent(known, rows, median.shape, params), shifts)


def register(images: Image, stack: Image, pattern: Image, *, n_first: int | None = None) -> tuple[Image, list[Shift]]:
    """Move the blobs of images to their usual place, in the array itself.

    Parameters
    ----------
    images : ndarray, shape (n, ny, nx), float32
        In order of date; changed.
    stack, pattern : ndarray, shape (ny, nx), float32
        A median stack and its `blob_pattern`.
    n_first : int, optional
        So many of the first images say which place is the usual one; all, if not given.

    Returns
    -------
    ndarray, shape (n, ny, nx), float32
        ``images``.
    list of Shift
        Of each image, from the usual place.
    """
    known = _Known.of(pattern)
    shifts = [_measure(image - stack, known) for image in images]
    shifts = usual_place_is_zero(shifts, n_first or len(images))
    for image, shift in zip(images, shifts, strict=True):
        image -= known.moved(shift) - pattern
    return images, shifts


def usual_place_is_zero(shifts: list[Shift], n_first: int) -> list[Shift]:
    """Count shifts from where most of the first images have the blobs: a stack of shifted images lies off it."""
    x, y = np.median(shifts[:n_first], axis=0)
    return [Shift(shift.x_px - float(x), shift.y_px - float(y)) for shift in shifts]


def _subtract_one(
    out_dir: Path, params: Difference, candidate: Candidate, registered: Registered, median: Image, blobs: pd.DataFrame
) -> dict[str, Any]:
    place = registered.rows.index(candidate.row)
    members = slice(place - params.stack_size, place)
    known, shift = blobs[blobs["first"] < candidate.row], registered.shifts[place]
    recent = _recent(known, registered.rows[members], median.shape, params)
    stack = with_recent_blobs(median, registered.images[members], recent, registered.shifts[members])
    difference = registered.images[place] - stack
    if np.hypot(*shift) > NEGLIGIBLE_PX:
        rest = blob_pattern(stack, known) - registered.pattern  # mostly of blobs that landed later
        difference -= move_pattern(rest, shift) - rest
    noise = clean_noise(difference)
    path = out_dir / f"{candidate.name}.fits.fz"
    found = {"BUNIT": "", "NSTACK": params.stack_size, "SHIFT_X": shift.x_px, "SHIFT_Y": shift.y_px}
    planes = {"DIFFERENCE": difference, "SCATTER": scatter(registered.images[members], stack, recent)}
    frames.write_images(path, planes, header=candidate.cards | found, sigma=noise)
    return _result("ok", shift=shift, noise_frac=noise, n_stack=params.stack_size, sha256=frames.sha256(path))


def landed_within(blobs: pd.DataFrame, rows: Sequence[float], shape: tuple[int, ...]) -> list[Recent]:
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
        Recent(*_around(shape, x, y, 1.55 * radius + LARGEST_SHIFT_PX), radius, int(np.searchsorted(rows, first)))
        for x, y, radius, first in recent[["x_px", "y_px", "radius_px", "first"]].itertuples(index=False)
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
            since = _since_landing(images, blob, shifts, stack[blob.window])
        stack[blob.window][blob.inside] = _median_of(since)[blob.inside]
    return stack


def _since_landing(images: Image, blob: Recent, shifts: Sequence[Shift], stack: Image) -> Image:
    """The window of a recent blob on the images since it landed, the blob moved to its usual place."""
    near = np.clip(1.55 * blob.radius_px + LARGEST_SHIFT_PX - blob.distance, 0, 1).astype(np.float32)
    return _moved_back(images[blob.start :, *blob.window], shifts[blob.start :], stack, near)


def _median_of(images: Image) -> Image:
    import bottleneck

    return np.asarray(bottleneck.nanmedian(images, axis=0))


def _recent(blobs: pd.DataFrame, rows: list[int], shape: tuple[int, ...], params: Difference) -> list[Recent]:
    return landed_within(blobs, rows, shape) if params.known_blobs else []


def _moved_back(images: Image, shifts: Sequence[Shift], stack: Image, near: Image) -> Image:
    """The neighbourhood of a blob that the stack has not learnt yet, in each image, the blob moved to its usual place."""
    x, y = np.array(shifts, np.float32).reshape(-1, 2, 1, 1).swapaxes(0, 1)
    far = np.flatnonzero(np.hypot(*np.array(shifts).T) > NEGLIGIBLE_PX)
    images = images.copy()
    if len(far):
        blobs = _smooth(np.nan_to_num(images[far] - stack), SMOOTHING_PX, twice=True) * near
        images[far] = images[far] - blobs + _moved(blobs, -x[far], -y[far])
    return images


def reference(raw_dir: str | Path, out_dir: str | Path, params: Difference) -> None:
    """Write ``reference.fits.fz``: the median of the first images, its blob pattern and `scatter` (HDU STACK, PATTERN, SCATTER).

    Raises
    ------
    FrameError
        If there are fewer usable images than a stack takes.
    """
    table, blobs = frames.read_frame_list(raw_dir), _catalogue(raw_dir)
    members: list[Candidate] = []
    images: list[Image] = []
    stop = 0
    while len(members) < params.stack_size and stop < len(table):
        stop = min(stop + params.stack_size - len(members), len(table))
        read, images = _read_rows(Path(raw_dir), table, slice(0, stop), 0)
        members = [candidate for candidate in read if not candidate.reason]
    if len(members) < params.stack_size:
        raise FrameError(
            f"{raw_dir}: found {len(members)} usable images, expected at least difference.stack_size="
            f"{params.stack_size}; add images or lower it"
        )
    registered = _register(images, members, params, blobs)
    known = blobs[blobs["first"] <= members[-1].row]
    stack = _stack(registered.images, registered.rows, params, known, registered.shifts)
    varied = scatter(registered.images, stack, _recent(known, registered.rows, stack.shape, params))
    planes = {"STACK": stack, "PATTERN": blob_pattern(stack, known), "SCATTER": varied}
    frames.write_images(Path(out_dir) / "reference.fits.fz", planes, sigma=clean_noise(stack))
