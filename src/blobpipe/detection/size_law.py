"""Say how large a blob is where it lies: its radius follows from its position, as the mirror is tilted.

A round thing of half the expected radius is no blob. On real images 71 clear blobs have 0.59 to 1.54
of it, and bad-pixel clusters whose edges resampling or diffusion has softened 0.23 to 0.41.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from scipy.optimize import least_squares

from blobpipe.core.arrays import FloatArray
from blobpipe.core.blob_shapes import RADIUS_LAW_PX
from blobpipe.core.detector import LIGHT_SIDE_PX, SIDE_PX

if TYPE_CHECKING:
    import pandas as pd

# Fewest blobs with a radius that a law is fitted to (count); three numbers, each to a tenth of the
# scatter or better
FEWEST = 40

# Range of the scatter of a catalogue's radii about its law (1 sigma of the logarithm). Below, the
# radii were not measured, but are those of the discs that were flagged; above, there is no law.
SCATTER = (0.05, 0.4)

# Smallest radius that a law may give anywhere on the image (px)
MIN_RADIUS_PX = 1.0


class RadiusLaw(Protocol):
    """Expected radius of a blob at each place of an image."""

    def radius(self, x: FloatArray, y: FloatArray) -> FloatArray:
        """Return the expected radius at positions; all in px."""


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


# Of WFC3/IR: measured on 71 blobs of a real blob image
WFC3_IR = SizeLaw(*RADIUS_LAW_PX, scatter=0.17)


def choose_size_law(catalogue: pd.DataFrame | None, shape: tuple[int, ...]) -> SizeLaw | None:
    """Return the law of a catalogue if it shows one, else WFC3/IR's for a full frame, else none.

    Parameters
    ----------
    catalogue : DataFrame or None
        x_px, y_px, radius_px of known blobs.
    shape : (ny, nx)
        Of the image.
    """
    law = None if catalogue is None else fit_size_law(catalogue, shape)
    if law is None and shape in ((SIDE_PX, SIDE_PX), (LIGHT_SIDE_PX, LIGHT_SIDE_PX)):
        law = WFC3_IR
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
