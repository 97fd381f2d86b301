"""Measure how far the mirror has moved the blobs, and move their pattern there."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from blobpipe.core.arrays import Image
from blobpipe.images.noise import (
    clean_noise,
)
from blobpipe.images.pattern import (
    frequencies,
    soften,
)

if TYPE_CHECKING:
    pass

log = logging.getLogger(__name__)
SEARCH_PX = 3.0  # how softly the neighbourhood of the pattern ends in which a shift is measured
STEPS_PER_PX = 10  # of the correlation's peak
STEEP = 4.0  # flanks of blobs are steeper than the typical pixel of the pattern so many times
LARGEST_SHIFT_PX = 6.0  # beyond it the mirror has never been
NEGLIGIBLE_PX = 0.05  # so small a shift moves a blob's edge by a fraction of the noise
LARGEST_ERROR_PX = 0.1  # a pattern too faint to give the shift so well gives none


class Shift(NamedTuple):
    """Displacement of the blob pattern on the detector (px)."""

    x_px: float
    y_px: float


NO_SHIFT = Shift(0.0, 0.0)


def move_pattern(pattern: Image, shift: Shift) -> Image:
    """A blob pattern moved by a fraction of a pixel or more.

    Parameters
    ----------
    pattern : ndarray, shape (ny, nx), float32
        Smooth, so that it can be moved exactly; what leaves it on one side comes back on the other.
    shift : Shift
        Positive: to larger x and y.
    """
    return moved(pattern, *shift)


def moved(pattern: Image, x_px: Any, y_px: Any) -> Image:
    """The same of several patterns, shape (n, ny, nx), where the shifts are of shape (n, 1, 1), float32."""
    from scipy.fft import rfft2

    return _inverse(rfft2(pattern), pattern.shape[-2:], x_px, y_px)


def _inverse(spectrum: npt.NDArray[Any], shape: tuple[int, ...], x_px: Any, y_px: Any) -> Image:
    """What has this `rfft2`, moved."""
    from scipy.fft import irfft2

    fx, fy = frequencies(shape)
    x, y = (
        np.exp(-2j * np.pi * f * shift).astype(np.complex64)
        for f, shift in ((fx, x_px), (fy, y_px))
    )
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

        near = soften(pattern != 0, SEARCH_PX)
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
    # the standard error in white noise is their ratio
    if noise > LARGEST_ERROR_PX * known.steepness:
        return NO_SHIFT
    limit = 4 * noise + known.pattern.max()
    shift = _correlate(
        np.clip(np.nan_to_num(rest + known.pattern), -limit, limit) * known.near, known
    )
    if max(map(abs, shift)) > LARGEST_SHIFT_PX:
        log.warning("a shift of %.1f, %.1f px is taken for a mistake and ignored", *shift)
        return NO_SHIFT
    return _refine(shift, rest, known, noise)


def _correlate(image: Image, known: _Known) -> Shift:
    """Shift at the peak of the cross-correlation, to a tenth of a pixel; half the resolution is enough for that."""
    from scipy.fft import fft2
    from skimage.registration import phase_cross_correlation

    correlate: Any = phase_cross_correlation
    spectrum = fft2(_binned(image))
    steps = 2 * STEPS_PER_PX
    (y, x), _, _ = correlate(
        spectrum, known.correlated, space="fourier", upsample_factor=steps, normalization=None
    )
    return Shift(2 * float(x), 2 * float(y))


def _binned(image: Image) -> Image:
    """Sums of 2 x 2 pixels."""
    ny, nx = (length // 2 * 2 for length in image.shape)
    return np.asarray(sum(image[j:ny:2, i:nx:2] for j in (0, 1) for i in (0, 1)))


def _refine(shift: Shift, rest: Image, known: _Known, noise: float) -> Shift:
    """One least-squares step, from the blobs' flanks alone: on faint parts the pattern is the detector's too."""
    moved = known.moved(shift)
    pixels, x, y = _slopes(moved, known.near)
    steep = np.hypot(x, y)
    flanks = (steep > STEEP * np.median(steep)) & np.isfinite(rest.flat[pixels])
    pixels = pixels[flanks]
    x = x[flanks]
    y = y[flanks]
    left = rest.flat[pixels] + known.pattern.flat[pixels] - moved.flat[pixels]
    left = left.clip(-3 * noise, 3 * noise)
    xx, xy, yy, xl, yl = (
        float(np.sum(product)) for product in (x * x, x * y, y * y, x * left, y * left)
    )
    determinant = max(xx * yy - xy**2, 1e-30)
    return Shift(
        shift.x_px - (yy * xl - xy * yl) / determinant,
        shift.y_px - (xx * yl - xy * xl) / determinant,
    )


def _slopes(
    image: Image, near: Image
) -> tuple[npt.NDArray[np.intp], npt.NDArray[Any], npt.NDArray[Any]]:
    """The pixels of a neighbourhood (as flat indices), and the slope there along x and along y, per pixel."""
    width = image.shape[1]
    pixels = width + np.flatnonzero(near[1:-1] > 0.5)
    values = image.ravel().astype(np.float64)
    slope_x = values[pixels + 1] - values[pixels - 1]
    slope_y = values[pixels + width] - values[pixels - width]
    return pixels, slope_x / 2, slope_y / 2


def register(
    images: Image, stack: Image, pattern: Image, *, n_first: int | None = None
) -> tuple[Image, list[Shift]]:
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
