"""Measure how far the mirror has moved the blobs, and move their pattern there."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from blobpipe.core.arrays import Image
from blobpipe.core.detector import DEFAULT
from blobpipe.images.pattern import frequencies, soften
from blobpipe.noise.level import clean_noise

log = logging.getLogger(__name__)

# Gaussian sigma of the soft edge of the neighbourhood of the pattern in which a shift is measured (px)
SEARCH_PX = 3.0

# Steps per pixel to which the peak of the cross-correlation is found
STEPS_PER_PX = 10

# Smallest slope of the flanks of blobs, over the median slope of the neighbourhood
STEEP = 4.0

# Largest shift for which the surroundings of a blob leave room (px)
LARGEST_SHIFT_PX = 6.0

# Largest shift that is not worth a correction (px): it moves the edge of a blob by a fraction of the noise
NEGLIGIBLE_PX = 0.05

# Largest standard error of a shift (px); no shift is measured on a pattern that is too faint for it
LARGEST_ERROR_PX = 0.1


class Shift(NamedTuple):
    """Displacement of the blob pattern on the detector (px)."""

    x_px: float
    y_px: float


NO_SHIFT = Shift(0.0, 0.0)


def move_pattern(pattern: Image, shift: Shift) -> Image:
    """Move a blob pattern by a fraction of a pixel or more.

    Parameters
    ----------
    pattern : ndarray, shape (ny, nx), float32
        Smooth, so that it can be moved exactly; taken as periodic.
    shift : Shift
        Positive towards larger x and y.

    Returns
    -------
    ndarray, shape (ny, nx), float32
    """
    return moved(pattern, *shift)


def moved(pattern: Image, x_px: Any, y_px: Any) -> Image:
    """Move patterns as `move_pattern` does, one of shape (ny, nx), or several of shape (n, ny, nx).

    Parameters
    ----------
    pattern : ndarray, shape (ny, nx) or (n, ny, nx), float32
    x_px, y_px : float, or ndarray of shape (n, 1, 1), float32
        Shift of each pattern (px).
    """
    from scipy.fft import rfft2

    return _moved_image(rfft2(pattern), pattern.shape[-2:], x_px, y_px)


def _moved_image(spectrum: npt.NDArray[Any], shape: tuple[int, ...], x_px: Any, y_px: Any) -> Image:
    """Return the image of an `rfft2`, moved by a phase ramp."""
    from scipy.fft import irfft2

    fx, fy = frequencies(shape)
    ramp_x = np.exp(-2j * np.pi * fx * x_px).astype(np.complex64)
    ramp_y = np.exp(-2j * np.pi * fy * y_px).astype(np.complex64)
    ramped = spectrum * ramp_y
    ramped *= ramp_x
    return np.asarray(irfft2(ramped, s=shape))


class Known(NamedTuple):
    """A `blob_pattern`, with all that shifts of many images are measured by.

    Attributes
    ----------
    pattern : ndarray, shape (ny, nx), float32
    near : ndarray, shape (ny, nx), float32
        1 close to the pattern, softly falling to 0.
    pixels : ndarray, shape (n,), intp
        Where that is above 0.5 (flat indices); the first and last row are left out.
    spectrum : ndarray, complex64
        `rfft2` of the pattern.
    binned_spectrum : ndarray, complex64
        `fft2` of its sums of 2 x 2 pixels.
    steepness : float
        Root of the sum of its squared slopes, along the flatter axis.
    """

    pattern: Image
    near: Image
    pixels: npt.NDArray[np.intp]
    spectrum: npt.NDArray[Any]
    binned_spectrum: npt.NDArray[Any]
    steepness: float

    @classmethod
    def of(cls, pattern: Image) -> Known:
        """Prepare a pattern."""
        from scipy.fft import fft2, rfft2

        near = soften(pattern != 0, SEARCH_PX)
        pixels = pattern.shape[1] + np.flatnonzero(near[1:-1] > 0.5)
        slope_x, slope_y = _slopes(pattern, pixels)
        energy = min(np.sum(np.square(slope_x)), np.sum(np.square(slope_y)))
        steepness = float(np.sqrt(energy))
        return cls(pattern, near, pixels, rfft2(pattern), fft2(_binned(pattern)), steepness)

    def moved(self, shift: Shift) -> Image:
        """Return the pattern, moved."""
        return _moved_image(self.spectrum, self.pattern.shape, *shift)


def measure_shift(
    image: Image, stack: Image, pattern: Image, largest_px: float = DEFAULT.motion.largest_px
) -> Shift:
    """Measure how far the blobs of an image have moved from their place in the stack.

    Parameters
    ----------
    image, stack : ndarray, shape (ny, nx), float32
        Fraction of the light; NaN where there is no value.
    pattern : ndarray, shape (ny, nx), float32
        The stack's `blob_pattern`.
    largest_px : float, optional
        Largest shift (px); that of the default detector if not given.

    Returns
    -------
    Shift
        0 if the pattern is too faint, or the result beyond the largest shift.

    Notes
    -----
    Source: this project. The part of the stack that does not move is subtracted first. What is left is compared with the
    pattern, close to it only and with outliers limited, by upsampled cross-correlation and then by least squares.
    """
    return shift_of(image - stack, Known.of(pattern), largest_px)


def shift_of(rest: Image, known: Known, largest_px: float) -> Shift:
    """Measure the shift of an image minus its stack, as `measure_shift` does."""
    noise = clean_noise(rest)
    # In white noise, the standard error is the noise over the steepness
    if noise > LARGEST_ERROR_PX * known.steepness:
        return NO_SHIFT

    # The stack's pattern put back, as the image has it; outliers limited
    limit = 4 * noise + known.pattern.max()
    blobs = rest + known.pattern
    blobs[np.isnan(blobs)] = 0
    np.clip(blobs, -limit, limit, out=blobs)
    blobs *= known.near
    shift = _correlate(blobs, known)
    if max(map(abs, shift)) > largest_px:
        log.warning("a shift of %.1f, %.1f px is taken for a mistake and ignored", *shift)
        return NO_SHIFT
    return _refine(shift, rest, known, noise)


def _correlate(image: Image, known: Known) -> Shift:
    """Return the shift at the peak of the cross-correlation, to a tenth of a pixel.

    Half the resolution is enough for that.
    """
    from scipy.fft import fft2
    from skimage.registration import phase_cross_correlation

    correlate: Any = phase_cross_correlation
    spectrum = fft2(_binned(image))
    steps = 2 * STEPS_PER_PX
    (y, x), _, _ = correlate(
        spectrum, known.binned_spectrum, space="fourier", upsample_factor=steps, normalization=None
    )
    return Shift(2 * float(x), 2 * float(y))


def _binned(image: Image) -> Image:
    """Return sums of 2 x 2 pixels; an odd last row or column is left out."""
    ny, nx = (length // 2 * 2 for length in image.shape)
    corners = [image[j:ny:2, i:nx:2] for j in (0, 1) for i in (0, 1)]
    return np.asarray(sum(corners))


def _refine(shift: Shift, rest: Image, known: Known, noise: float) -> Shift:
    """Improve a shift by one step of least squares, on the flanks of blobs alone.

    On its faint parts, the pattern contains some of the detector's own, which does not move.
    """
    moved = known.moved(shift)
    x, y = _slopes(moved, known.pixels)
    steepness = np.hypot(x, y)
    flanks = (steepness > STEEP * np.median(steepness)) & np.isfinite(rest.flat[known.pixels])
    pixels = known.pixels[flanks]
    x = x[flanks]
    y = y[flanks]

    # What the moved pattern leaves, outliers limited
    left = rest.flat[pixels] + known.pattern.flat[pixels] - moved.flat[pixels]
    left = left.clip(-3 * noise, 3 * noise)

    # Normal equations: a shift by dx changes the pattern by -dx times its slope
    xx = float(np.sum(x * x))
    xy = float(np.sum(x * y))
    yy = float(np.sum(y * y))
    xl = float(np.sum(x * left))
    yl = float(np.sum(y * left))
    determinant = max(xx * yy - xy**2, 1e-30)
    dx = (yy * xl - xy * yl) / determinant
    dy = (xx * yl - xy * xl) / determinant
    return Shift(shift.x_px - dx, shift.y_px - dy)


def _slopes(
    image: Image, pixels: npt.NDArray[np.intp]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the slopes of an image along x and y (per pixel) at some of its pixels (flat indices)."""
    values = image.ravel()
    ahead_x, behind_x, ahead_y, behind_y = (
        values[pixels + step].astype(np.float64)
        for step in (1, -1, image.shape[1], -image.shape[1])
    )
    return (ahead_x - behind_x) / 2, (ahead_y - behind_y) / 2


def register_images(
    images: Image,
    stack: Image,
    pattern: Image,
    *,
    largest_px: float,
    n_first: int | None = None,
) -> tuple[Image, list[Shift]]:
    """Move the blobs of images to their usual place, in place.

    Parameters
    ----------
    images : ndarray, shape (n, ny, nx), float32
        In order of date (fraction of the light); overwritten.
    stack, pattern : ndarray, shape (ny, nx), float32
        A median stack and its `blob_pattern`.
    largest_px : float
        Largest shift (px); larger results are mistakes, and count as none.
    n_first : int, optional
        Number of first images that define the usual place; all if not given.

    Returns
    -------
    ndarray, shape (n, ny, nx), float32
        ``images``.
    list of Shift
        Shift of each image from the usual place.
    """
    known = Known.of(pattern)
    shifts = [shift_of(image - stack, known, largest_px) for image in images]
    shifts = usual_place_is_zero(shifts, n_first or len(images))
    for image, shift in zip(images, shifts, strict=True):
        image -= known.moved(shift) - pattern
    return images, shifts


def usual_place_is_zero(shifts: list[Shift], n_first: int) -> list[Shift]:
    """Count shifts from their median over the first images, since a stack of shifted images lies off their place."""
    medians = np.median(shifts[:n_first], axis=0)
    x = float(medians[0])
    y = float(medians[1])
    return [Shift(shift.x_px - x, shift.y_px - y) for shift in shifts]
