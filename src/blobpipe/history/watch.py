"""Watch the known blobs: they must not fade, grow or move.

On a deep difference a blob that stays as it was leaves nothing. What changes leaves, to first order,

    D = d (a P + dx dP/dx + dy dP/dy + dr dP/dr) + b

where d is its depth before, a the share by which it has become deeper, dx and dy (px) how far it has moved, and
dr (px) by how much its radius has grown. The four and the background b are fitted by least squares.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from blobpipe.core.arrays import FloatArray
from blobpipe.core.blob_shapes import SHAPES, Shape, blob_profile
from blobpipe.core.cutouts import cut_square, distance_from
from blobpipe.history.deep import DeepDifference
from blobpipe.history.depths import BACKGROUND_PX, HALF, SIDE, measure_depths
from blobpipe.noise.level import clean_noise

# Latest images over which changes are measured (count)
N_IMAGES = 16

# S/N of a blob before, from which its changes are measured: below it they drown in the noise
CLEAR_SNR = 15.0

# Step of the radius by which profiles are differentiated (px)
STEP_PX = 0.25

# What a blob has changed by, over its error, from which it counts as changed
CHANGED_SIGMA = 5.0

CHANGES = ("deeper_frac", "x_px", "y_px", "radius_px")


class BlobHealth(NamedTuple):
    """How the known blobs have changed, from `summarise_changes`.

    Attributes
    ----------
    n_watched : int
        Blobs that are clear enough.
    deeper_frac, x_px, y_px, radius_px : float
        Median change of all: of the depth (share), the place and the radius (px). All together say that mirror or
        focus has changed.
    n_changed : int
        Blobs that have changed by more than their errors allow, each for itself.
    """

    n_watched: int
    deeper_frac: float
    x_px: float
    y_px: float
    radius_px: float
    n_changed: int


def measure_changes(deep: DeepDifference, blobs: pd.DataFrame) -> pd.DataFrame:
    """Measure by what known blobs have changed between the images before and the latest ones.

    Parameters
    ----------
    deep : DeepDifference
    blobs : DataFrame
        x_px, y_px (usual place) and radius_px; ``shape`` if it is known, else a disc.

    Returns
    -------
    DataFrame
        A row for each blob that is clear before: its index in ``blobs``, the columns of `CHANGES`, their
        standard errors with ``_err`` at the end.
    """
    noise = clean_noise(deep.difference)
    before = measure_depths(deep.baseline, blobs, noise)
    clear = before.depth_frac > CLEAR_SNR * before.error_frac
    rows = []
    for k in np.flatnonzero(clear).tolist():
        blob = blobs.iloc[k]
        shape: Shape = blob["shape"] if blob.get("shape") in SHAPES else "disc"
        place = blob[["x_px", "y_px", "radius_px"]].to_numpy(float)
        fitted = _fit_change(deep, place, shape, before.depth_frac[k], noise)
        if fitted is not None:
            rows.append([blobs.index[k], *fitted[0], *fitted[1]])
    columns = ["blob", *CHANGES, *(f"{name}_err" for name in CHANGES)]
    return pd.DataFrame(rows, columns=columns).set_index("blob")


def summarise_changes(changes: pd.DataFrame) -> BlobHealth | None:
    """Summarise the changes of all blobs; None if none is watched.

    A blob has changed if one of its changes, the median of all taken off, is beyond `CHANGED_SIGMA`.
    """
    if changes.empty:
        return None
    values = changes[list(CHANGES)].to_numpy(float)
    errors = changes[[f"{name}_err" for name in CHANGES]].to_numpy(float)
    common = np.median(values, axis=0)
    deeper, x, y, radius = common.tolist()
    changed = (np.abs(values - common) > CHANGED_SIGMA * errors).any(axis=1)
    return BlobHealth(len(changes), deeper, x, y, radius, int(changed.sum()))


def _fit_change(
    deep: DeepDifference, place: FloatArray, shape: Shape, depth: float, noise: float
) -> tuple[FloatArray, FloatArray] | None:
    """Return the changes of a blob and their errors, shape (4,); None if too much of it has no value."""
    x, y, radius = place
    column = round(float(x))
    row = round(float(y))
    window = cut_square(deep.difference, column - HALF, row - HALF, SIDE)
    near = distance_from(x - column + HALF, y - row + HALF, SIDE) < BACKGROUND_PX
    good = near & np.isfinite(window)
    if good.sum() < 0.8 * near.sum():
        return None

    def profile(growth: float = 0.0) -> FloatArray:
        return blob_profile(shape, radius + growth, x - column, y - row, SIDE)

    slope_y, slope_x = np.gradient(profile())
    growth = (profile(STEP_PX) - profile(-STEP_PX)) / (2 * STEP_PX)
    waves = [wave[good] for wave in (profile(), -slope_x, -slope_y, growth)]
    design = np.column_stack([*(depth * wave for wave in waves), np.ones(good.sum())])
    normal = np.linalg.inv(design.T @ design)
    solution = normal @ (design.T @ window[good].astype(np.float64))
    rest = window[good] - design @ solution

    # Errors are wider where the blob is none of the shapes
    scale = max(float(np.sqrt(np.square(rest).mean())), noise)
    errors = scale * np.sqrt(np.diag(normal))
    return solution[:4], errors[:4]
