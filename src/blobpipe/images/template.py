"""The template: what is subtracted from an image, and all that is known of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from blobpipe.core import fits_images, tables
from blobpipe.core.arrays import Image, Mask
from blobpipe.core.detector import DEFAULT, Detector
from blobpipe.errors import FrameError
from blobpipe.images.bad_pixels import BadPixels
from blobpipe.images.pattern import blob_pattern
from blobpipe.images.register import Known
from blobpipe.images.stack import rms_map, running_median
from blobpipe.noise.level import Range, clean_noise, noise_for_stack
from blobpipe.noise.whiten import NoiseModel, measure_noise_model, read_noise_model

if TYPE_CHECKING:
    import pandas as pd

# A pixel of a stack is bad if it lies farther than this from the pattern of the known blobs: no good
# pixel does, and blobs have soft edges (simulated stacks of 27 images).
UNEXPLAINED_SIGMA = 5.0  # times the noise of the stack, and
UNEXPLAINED_FRAC = 0.3  # times the pattern

# Fewest images of a stack whose residuals show the noise of an image, and how many of them, the newest,
# are measured (count)
FEWEST_FOR_NOISE = 8
MEASURED_FOR_NOISE = 8


@dataclass(frozen=True)
class Template:
    """What is subtracted from an image; what is not known is None.

    Attributes
    ----------
    stack : ndarray, shape (ny, nx), float32
        Median stack (fraction of the light); NaN where there is no value.
    pattern : ndarray, shape (ny, nx), float32
        The known blobs alone (fraction of the light), from `pattern.blob_pattern`.
    rms : ndarray, shape (ny // 2, nx // 2), float32
        RMS map of the stack's images in cells of 2 x 2 pixels (fraction of the light), from
        `stack.rms_map`; 0 where it is not known.
    bad_pixels : ndarray, shape (ny, nx), bool
        Pixels of the stack that neither its noise nor the known blobs explain.
    noise_model : NoiseModel
        Of the images minus the stack.
    """

    stack: Image | None = None
    pattern: Image | None = None
    rms: Image | None = None
    bad_pixels: Mask | None = None
    noise_model: NoiseModel | None = None

    @cached_property
    def known(self) -> Known:
        """Return the pattern with all that the shifts of many images are measured by."""
        assert self.pattern is not None
        return Known.of(self.pattern)

    def expected_noise(self) -> Range | None:
        """Return the range of noise that an image may have; None where nothing is known of it."""
        return None if self.stack is None else noise_for_stack(self.stack, self.rms)


def make_template(
    stack: Image, rms: Image | None = None, catalogue: pd.DataFrame | None = None
) -> Template:
    """Make a template of a median stack: find the pattern of its blobs and its bad pixels.

    Parameters
    ----------
    stack : ndarray, shape (ny, nx), float32
        Fraction of the light; NaN where there is no value.
    rms : ndarray, shape (ny // 2, nx // 2), float32, optional
        RMS map of its images.
    catalogue : DataFrame, optional
        Known blobs, with x_px, y_px, radius_px; blobs that stand out of the stack are found without.
    """
    pattern = blob_pattern(stack, catalogue)
    return Template(stack, pattern, rms, find_bad_pixels(stack, pattern))


def median_template(images: Image, catalogue: pd.DataFrame | None = None) -> Template:
    """Make the template of a stack of images.

    Parameters
    ----------
    images : ndarray, shape (n, ny, nx), float32
        In order of date, known blobs at the same place (fraction of the light).
    catalogue
        As for `make_template`.
    """
    stack = running_median(images, len(images))[0]
    template = make_template(stack, rms_map(images, stack), catalogue)
    return replace(template, noise_model=noise_model_of_stack(images, stack))


def read_template(
    path: str | Path,
    catalogue: pd.DataFrame | str | Path | None = None,
    bad_pixels: BadPixels | None = None,
    detector: Detector = DEFAULT,
) -> Template:
    """Read a median stack, and its RMS map if the file has one (HDU SCATTER).

    Parameters
    ----------
    path : path
        A FITS image, or ``reference.fits.fz`` of the stage difference.
    catalogue : DataFrame or path, optional
        As for `make_template`.
    bad_pixels : BadPixels, optional
        Pixels that get no value.
    detector : Detector, optional

    Raises
    ------
    FrameError
        If the file is missing or no usable image.
    """
    if not Path(path).exists():
        raise FrameError(f"{path}: not found, expected a median stack; name one")
    if isinstance(catalogue, str | Path):
        catalogue = tables.read_known(catalogue, ("x_px", "y_px", "radius_px"), detector)
    bad = bad_pixels or BadPixels(dq_flags=detector.exposure.bad_dq)
    stack = bad.blank(fits_images.read_image(path, detector), path).data
    rms = bad.blank_cells(fits_images.find_plane(path, "SCATTER"))
    template = make_template(stack, rms, catalogue)
    return replace(template, noise_model=read_noise_model(path))


def noise_model_of_stack(images: Image, stack: Image) -> NoiseModel | None:
    """Measure the noise model of a stack's images, on what the newest of them differ from it by.

    Parameters
    ----------
    images : ndarray, shape (n, ny, nx), float32
        In order of date.
    stack : ndarray, shape (ny, nx), float32
        Their median.

    Returns
    -------
    NoiseModel
        None if there are fewer than `FEWEST_FOR_NOISE` images: a stack of few follows their noise.
    """
    if len(images) < FEWEST_FOR_NOISE:
        return None
    return measure_noise_model(images[-MEASURED_FOR_NOISE:] - stack)


def find_bad_pixels(stack: Image, pattern: Image) -> Mask:
    """Find pixels of a median stack that neither its noise nor the known blobs explain.

    These are clusters that read high or low on most days; on a day on which one reads otherwise it
    looks like a small blob.

    Parameters
    ----------
    stack : ndarray, shape (ny, nx), float32
        Median stack (fraction of the light).
    pattern : ndarray, shape (ny, nx), float32
        Its known blobs, from `pattern.blob_pattern`.

    Returns
    -------
    ndarray, shape (ny, nx), bool
        Pixels without a value are not among them.
    """
    allowed = UNEXPLAINED_SIGMA * clean_noise(stack) + UNEXPLAINED_FRAC * np.abs(pattern)
    return np.asarray(np.abs(stack - pattern) > allowed)
