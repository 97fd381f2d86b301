"""Make stamps, blobs without background to be superimposed on subframes (ISR 3.3).

They come from the median stack, at the positions of the catalogue, or from the profiles of the simulation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.ndimage import affine_transform, gaussian_filter

from blobpipe.core.arrays import Float32Array, Mask
from blobpipe.core.blob_shapes import SHAPES, blob_profile
from blobpipe.core.detector import DEFAULT, Detector

if TYPE_CHECKING:
    import pandas as pd

# Side of a stamp (px): the largest blob, its taper and some room
SIZE = 41

# Width over which a stamp falls to zero (px)
TAPER_PX = 4.0

# Gaussian sigma by which stamps are smoothed (px); it removes most of the noise of the stack
SMOOTHING_PX = 1.0

# Smallest S/N of a stamp in the stack
MIN_SNR = 5.0

# Stamps from profiles: range of radii and their scatter (px), and median, scatter of the logarithm, and range of depths
# (fraction of the light); measured on a real median stack
RADII_PX = (2.5, 11)
RADIUS_SCATTER_PX = 1.0
MEDIAN_DEPTH_FRAC = 0.022
DEPTH_SPREAD = 0.6
DEPTHS_FRAC = (0.008, 0.3)

# Ragged stamps: standard deviation of the logarithm of each axis, largest Gaussian sigma of the grain (px), and its
# largest standard deviation (fraction of the blob)
STRETCH = 0.12
GRAIN_PX = 1.5
UNEVEN_FRAC = 0.8

COLUMNS = ["blob", "radius_px", "peak_sigma"]

Stamps = Float32Array


def extract_stamps(stack: Stamps, blobs: pd.DataFrame) -> tuple[Stamps, pd.DataFrame]:
    """Cut the blobs of the catalogue out of the scaled median stack.

    The local background is removed, the noise of the stack smoothed away, and the edge tapered to zero, so that adding a
    stamp leaves neither a seam nor a second texture. Blobs that the border cuts, that are too close to another, or fainter
    than S/N 5 in the stack are left out.

    Parameters
    ----------
    stack : ndarray, shape (ny, nx), float32
        Clipped and scaled (sigma).
    blobs : DataFrame
        Catalogue: blob, x_px, y_px, radius_px.

    Returns
    -------
    ndarray, shape (n, 41, 41), float32
        In sigma; the centre of the blob is within half a pixel of [20, 20].
    DataFrame
        blob, radius_px, peak_sigma; one row per stamp.

    Notes
    -----
    Source: ISR 3.3; the smoothing, the taper and the selection are this project's.
    """
    import pandas as pd

    stamps = []
    rows = []
    alone = blobs[_alone(stack.shape, blobs)]
    for blob, x, y, radius in alone[["blob", "x_px", "y_px", "radius_px"]].itertuples(index=False):
        stamp = _cut_stamp(stack, x, y, radius)
        if np.sqrt((stamp**2).sum()) >= MIN_SNR:
            stamps.append(stamp)
            rows.append({"blob": blob, "radius_px": radius, "peak_sigma": float(stamp.max())})
    cube = np.array(stamps, np.float32).reshape(-1, SIZE, SIZE)
    return cube, pd.DataFrame(rows, columns=COLUMNS)


def _alone(shape: tuple[int, ...], blobs: pd.DataFrame) -> Mask:
    """Return the mask of blobs whose stamps lie on the image and touch no other, shape (n,)."""
    x = blobs["x_px"].to_numpy(float)
    y = blobs["y_px"].to_numpy(float)
    reach = blobs["radius_px"].to_numpy(float) + TAPER_PX

    distance = np.hypot(x[:, None] - x, y[:, None] - y)
    np.fill_diagonal(distance, np.inf)
    free = np.all(distance > reach[:, None] + reach, axis=1)

    half = SIZE // 2
    column = np.rint(x)
    row = np.rint(y)
    in_columns = (column >= half) & (column < shape[1] - half)
    in_rows = (row >= half) & (row < shape[0] - half)
    result: Mask = free & in_columns & in_rows & (reach <= half)
    return result


def _cut_stamp(stack: Stamps, x: float, y: float, radius: float) -> Stamps:
    """Cut a stamp out of the stack, without its background and noise, tapered to zero."""
    half = SIZE // 2
    cx = round(x)
    cy = round(y)
    cutout = stack[cy - half : cy + half + 1, cx - half : cx + half + 1]
    rows, columns = np.mgrid[-half : half + 1, -half : half + 1]
    distance = np.hypot(columns + cx - x, rows + cy - y)

    # The background is the median of a ring around the taper
    around = (distance > radius + TAPER_PX) & (distance < radius + 2 * TAPER_PX)
    background = np.median(cutout[around])
    smooth = gaussian_filter(cutout - background, SMOOTHING_PX)

    outside = np.clip((distance - radius) / TAPER_PX, 0, 1)
    taper = 0.5 + 0.5 * np.cos(np.pi * outside)
    return np.asarray(smooth * taper, dtype=np.float32)


def profile_stamps(
    rng: np.random.Generator,
    n: int,
    shape: tuple[int, int],
    *,
    sigma_frac: float,
    high_sigma: float,
    detector: Detector = DEFAULT,
) -> tuple[Stamps, pd.DataFrame]:
    """Draw stamps from the profiles of the simulation, at random sub-pixel positions.

    Parameters
    ----------
    rng : Generator
    n : int
        Number of stamps.
    shape : (ny, nx)
        Shape of the image, since the size of a blob depends on where it lands.
    sigma_frac : float
        One sigma of the scaled median stack (fraction of the light).
    high_sigma : float
        Upper clipping limit of the stack (sigma), which also limits a stamp cut from it.
    detector : Detector, optional
        Says how large blobs are.

    Returns
    -------
    ndarray, shape (n, 41, 41), float32
        As from `extract_stamps`.
    DataFrame
        As from `extract_stamps`; ``blob`` is empty.

    Notes
    -----
    Source: this project; depths and sizes are distributed as those of real blobs.
    """
    import pandas as pd

    stamps = np.empty((n, SIZE, SIZE), np.float32)
    rows = []
    for i in range(n):
        x = rng.uniform(0, shape[1])
        y = rng.uniform(0, shape[0])
        # The size of a blob depends on where it lands
        typical = detector.typical_radius(np.array(x), np.array(y))
        radius = float(np.clip(typical + rng.normal(0, RADIUS_SCATTER_PX), *RADII_PX))
        log_depth = rng.normal(np.log(MEDIAN_DEPTH_FRAC), DEPTH_SPREAD)
        depth = float(np.clip(np.exp(log_depth), *DEPTHS_FRAC))
        kind = SHAPES[rng.integers(len(SHAPES))]
        x_offset, y_offset = rng.uniform(-0.5, 0.5, 2)
        # A stamp from pixels would have been clipped with the stack
        profile = blob_profile(kind, radius, x_offset, y_offset, SIZE)
        stamps[i] = np.minimum(profile * depth / sigma_frac, high_sigma)
        rows.append({"blob": "", "radius_px": radius, "peak_sigma": float(stamps[i].max())})
    return stamps, pd.DataFrame(rows, columns=COLUMNS)


def ragged_stamps(rng: np.random.Generator, stamps: Stamps) -> Stamps:
    """Stretch stamps along a random axis, and make them uneven, as real blobs are.

    Parameters
    ----------
    rng : Generator
    stamps : ndarray, shape (n, size, size), float32

    Returns
    -------
    ndarray, shape (n, size, size), float32

    Notes
    -----
    Source: this project, after real stamps, which differ from smooth ones by half of their height.
    """
    made = np.empty_like(stamps)
    middle = np.full(2, stamps.shape[1] // 2)
    for i, stamp in enumerate(stamps):
        # Stretch along the axes of a turned system
        angle = rng.uniform(0, np.pi)
        stretch = np.exp(rng.normal(0, STRETCH, 2))
        cosine = np.cos(angle)
        sine = np.sin(angle)
        axes = np.array([[cosine, sine], [-sine, cosine]])
        shrink = axes.T @ np.diag(1 / stretch) @ axes
        stretched = affine_transform(stamp, shrink, middle - shrink @ middle, order=1)

        # Multiply by smoothed noise around 1
        noise = rng.normal(0, 1, stamp.shape)
        grain = gaussian_filter(noise, rng.uniform(0, GRAIN_PX))
        made[i] = stretched * (1 + rng.uniform(0, UNEVEN_FRAC) * grain / grain.std())
    return made
