"""Say how large a blob is where it lies: its radius follows from its position, as the mirror is tilted.

A round thing of half the expected radius is no blob. On real images 71 clear blobs have 0.59 to 1.54
of it, and bad-pixel clusters whose edges resampling or diffusion has softened 0.23 to 0.41.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.optimize import least_squares

from blobpipe.core import fits_images, tables
from blobpipe.core.arrays import FloatArray
from blobpipe.core.detector import DEFAULT, Detector
from blobpipe.noise.level import image_noise
from blobpipe.params import Difference

if TYPE_CHECKING:
    import pandas as pd

# Fewest blobs with a radius that a law is fitted to (count); three numbers, each to a tenth of the
# scatter or better
FEWEST = 40

# Fewest images that a noise is measured on (count)
FEWEST_IMAGES = 4

# Range of the scatter of a catalogue's radii about its law (1 sigma of the logarithm). Below, the
# radii were not measured, but are those of the discs that were flagged; above, there is no law.
SCATTER = (0.05, 0.4)

# Least scatter that sizes are judged by: that of 71 blobs of a real image. The radii of a catalogue may
# be more regular than those that are measured.
LEAST_SCATTER = 0.17

# Range of ratios to the expected radius over which sizes of what is no blob are taken to be spread
# evenly (in the logarithm)
OTHER_RATIOS = (0.2, 3.0)

# Ratio below which a size counts as this
SMALLEST_RATIO = 1e-3

# Smallest radius that a law may give anywhere on the image (px)
MIN_RADIUS_PX = 1.0


class SizeLaw(NamedTuple):
    """Expected radius of a blob: a plane over the detector.

    Attributes
    ----------
    at_origin_px : float
        Radius at x = y = 0 (px).
    per_x, per_y : float
        Its change per pixel along x and y.
    scatter : float
        Of radii about it (1 sigma of the logarithm).
    """

    at_origin_px: float
    per_x: float
    per_y: float
    scatter: float

    def radius(self, x: FloatArray, y: FloatArray) -> FloatArray:
        """Return the expected radius at positions (px), at least `MIN_RADIUS_PX`."""
        plane = self.at_origin_px + self.per_x * np.asarray(x) + self.per_y * np.asarray(y)
        return np.asarray(np.maximum(plane, MIN_RADIUS_PX))

    def log_odds(self, ratio: FloatArray, error: FloatArray) -> FloatArray:
        """Return what a size says for a blob and against anything else, as log-odds of at most 0.

        Parameters
        ----------
        ratio : ndarray, shape (n,)
            Radius over the expected one.
        error : ndarray, shape (n,)
            Its relative error (1 sigma).

        Returns
        -------
        ndarray, shape (n,), float64
            Density of the law over that of sizes spread evenly over `OTHER_RATIOS`; 0 where that is above 1,
            since a usual size is no proof of a blob, and where the size is not known.

        Notes
        -----
        Source: ours.
        """
        sigma = np.hypot(max(self.scatter, LEAST_SCATTER), error)
        deviation = np.log(np.maximum(ratio, SMALLEST_RATIO)) / sigma
        evenly = math.log(OTHER_RATIOS[1] / OTHER_RATIOS[0])
        log_odds = np.log(evenly / (math.sqrt(2 * math.pi) * sigma)) - deviation**2 / 2
        return np.asarray(np.minimum(np.nan_to_num(log_odds, nan=0.0), 0.0))


def choose_size_law(
    catalogue: pd.DataFrame | None, shape: tuple[int, ...], detector: Detector = DEFAULT
) -> SizeLaw | None:
    """Return the law of a catalogue if it shows one, else the detector's for a full frame, if it has one.

    Parameters
    ----------
    catalogue : DataFrame or None
        x_px, y_px, radius_px of known blobs.
    shape : (ny, nx)
        Of the image.
    detector : Detector, optional
    """
    law = None if catalogue is None else fit_size_law(catalogue, shape)
    known = detector.blobs.size_law
    if law is None and known is not None and shape in (detector.shape, detector.light_shape):
        law = SizeLaw(known.at_origin_px, known.per_x, known.per_y, known.scatter)
    return law


def fit_size_law(catalogue: pd.DataFrame, shape: tuple[int, ...]) -> SizeLaw | None:
    """Fit a law to the blobs of a catalogue, robustly; None if they show none.

    Parameters
    ----------
    catalogue : DataFrame
        x_px, y_px, radius_px.
    shape : (ny, nx)
        Of the image: the law gives positive radii all over it.
    """
    blobs = catalogue[["x_px", "y_px", "radius_px"]].to_numpy(float)
    blobs = blobs[np.isfinite(blobs).all(axis=1) & (blobs[:, 2] > 0)]
    if len(blobs) < FEWEST:
        return None
    x, y, radius = blobs.T
    design = np.column_stack([np.ones(len(blobs)), x, y])
    if np.linalg.matrix_rank(design) < 3:
        return None

    # Relative residuals, since the scatter is relative; outliers count linearly
    relative: FloatArray = np.asarray(design / radius[:, None])

    def residuals(plane: FloatArray) -> FloatArray:
        return np.asarray(relative @ plane - 1)

    def slopes(plane: FloatArray) -> FloatArray:
        return relative

    start = np.array([np.median(radius), 0.0, 0.0])
    scales = np.array([1.0, 1e-3, 1e-3])
    fit = least_squares(residuals, start, slopes, loss="soft_l1", f_scale=0.15, x_scale=scales)

    # A law must be positive everywhere, and the radii must scatter about it as measured ones do
    ny, nx = shape
    corners = fit.x @ np.array([[1, 1, 1, 1], [0, nx, 0, nx], [0, 0, ny, ny]])
    if corners.min() < MIN_RADIUS_PX:
        return None
    ratio = np.log(radius / (design @ fit.x))
    scatter = 1.4826 * float(np.median(np.abs(ratio - np.median(ratio))))
    if not SCATTER[0] <= scatter <= SCATTER[1]:
        return None
    at_origin, per_x, per_y = fit.x.tolist()
    return SizeLaw(at_origin, per_x, per_y, scatter)


def measure_detector(
    paths: Sequence[Path], catalogue_path: Path | None, detector: Detector
) -> Iterator[str]:
    """Measure the noise and the sizes of blobs of a detector, and yield them as entries of its file.

    Parameters
    ----------
    paths : sequence of path
        Blob images. The noise is that of the difference of each from the median of the others, as it would be from the
        median of a whole stack.
    catalogue_path : path, optional
        Blobs with measured radii.
    detector : Detector

    Yields
    ------
    str
        A line of YAML, or a comment that says why there is none.

    Raises
    ------
    FrameError, TableError
        If a file cannot be read, or an image is none.
    """
    if len(paths) >= FEWEST_IMAGES:
        images = np.stack([fits_images.read_image(path, detector).data for path in paths])
        noise = []
        for i, image in enumerate(images):
            others = np.delete(images, i, axis=0)
            noise.append(image_noise(image - np.median(others, axis=0)))
        # The median of n images has about pi / 2n of the variance of one
        of_few = 1 + np.pi / 2 / (len(paths) - 1)
        of_stack = 1 + np.pi / 2 / Difference().stack_size
        yield f"difference_noise_frac: {np.median(noise) * np.sqrt(of_stack / of_few):.5f}"
    else:
        yield f"# difference_noise_frac: {len(paths)} images, expected {FEWEST_IMAGES} or more"
    if catalogue_path is None:
        return

    catalogue = tables.read_known(catalogue_path, ("x_px", "y_px", "radius_px"), detector)
    radii = catalogue["radius_px"].to_numpy(float)
    if len(radii):
        low, high = np.percentile(radii, [2.5, 97.5])
        yield f"# radius_px: 95 % of {len(radii)} blobs lie between {low:.1f} and {high:.1f} px"
    law = fit_size_law(catalogue, detector.shape)
    if law is None:
        yield f"size_law: null  # {len(radii)} blobs show none; {FEWEST} with measured radii are needed"
        return
    yield "size_law:"
    yield f"  at_origin_px: {law.at_origin_px:.4g}"
    yield f"  per_x: {law.per_x:.4g}"
    yield f"  per_y: {law.per_y:.4g}"
    yield f"  scatter: {law.scatter:.3g}"
