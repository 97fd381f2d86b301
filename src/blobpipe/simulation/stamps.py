"""Stamps: blobs without background, to be superimposed on subframes (ISR 3.3).

They come from the median stack, at the catalogue's positions, or from the simulator's profiles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy.ndimage import affine_transform, gaussian_filter

from blobpipe.core.blob_shapes import SHAPES, blob_profile, typical_radius

if TYPE_CHECKING:
    import pandas as pd

SIZE = 41  # stamp side, pixels: the largest blob, its taper and some room
TAPER_PX = 4.0  # over which a stamp falls to zero
# Gaussian sigma: removes most of the stack's own noise, which must not come along
SMOOTHING_PX = 1.0
MIN_SNR = 5.0  # a stamp from pixels must be this clear in the stack to be a blob and not noise
STRETCH = 0.12  # standard deviation of the logarithm of each axis of a ragged stamp
GRAIN_PX = 1.5  # of its unevenness, the largest Gaussian sigma
UNEVEN_FRAC = 0.8  # and the largest standard deviation, as a fraction of the blob

Stamps = npt.NDArray[np.float32]


def extract_stamps(stack: Stamps, blobs: pd.DataFrame) -> tuple[Stamps, pd.DataFrame]:
    """Cut the catalogue's blobs out of the scaled median stack.

    The local background is removed, the stack's noise smoothed away, and the edge tapered to zero, so that
    adding a stamp leaves neither a seam nor a second texture. Blobs cut by the border, too close to
    another, or fainter than S/N 5 in the stack are left out.

    Parameters
    ----------
    stack : ndarray, shape (ny, nx), float32
        Clipped and scaled (sigma).
    blobs : DataFrame
        Catalogue: blob, x_px, y_px, radius_px.

    Returns
    -------
    ndarray, shape (n, 41, 41), float32
        In sigma; the blob's centre within half a pixel of [20, 20].
    DataFrame
        blob, radius_px, peak_sigma; one row per stamp.

    Notes
    -----
    Source: ISR 3.3; the smoothing, the taper and the choice are ours.
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
    return cube, pd.DataFrame(rows, columns=["blob", "radius_px", "peak_sigma"])


def _alone(shape: tuple[int, ...], blobs: pd.DataFrame) -> npt.NDArray[np.bool_]:
    x, y, radius = (blobs[column].to_numpy(float) for column in ("x_px", "y_px", "radius_px"))
    distance = np.hypot(x[:, None] - x, y[:, None] - y)
    np.fill_diagonal(distance, np.inf)
    reach = radius + TAPER_PX
    free = np.all(distance > reach[:, None] + reach, axis=1)
    half = SIZE // 2
    inside = (
        (np.rint(x) >= half)
        & (np.rint(y) >= half)
        & (np.rint(x) < shape[1] - half)
        & (np.rint(y) < shape[0] - half)
    )
    result: npt.NDArray[np.bool_] = free & inside & (reach <= half)
    return result


def _cut_stamp(stack: Stamps, x: float, y: float, radius: float) -> Stamps:
    half = SIZE // 2
    cx = round(x)
    cy = round(y)
    cutout = stack[cy - half : cy + half + 1, cx - half : cx + half + 1]
    rows, columns = np.mgrid[-half : half + 1, -half : half + 1]
    distance = np.hypot(columns + cx - x, rows + cy - y)
    around = (distance > radius + TAPER_PX) & (distance < radius + 2 * TAPER_PX)
    smooth = gaussian_filter(cutout - np.median(cutout[around]), SMOOTHING_PX)
    taper = 0.5 + 0.5 * np.cos(np.pi * np.clip((distance - radius) / TAPER_PX, 0, 1))
    return np.asarray(smooth * taper, dtype=np.float32)


def profile_stamps(
    rng: np.random.Generator,
    n: int,
    shape: tuple[int, int],
    *,
    sigma_frac: float,
    high_sigma: float,
) -> tuple[Stamps, pd.DataFrame]:
    """Draw stamps from the simulator's profiles, at random sub-pixel positions.

    Parameters
    ----------
    rng : Generator
    n : int
        How many.
    shape : (ny, nx)
        Of the detector: a blob's size depends on where it lands.
    sigma_frac : float
        One sigma of the scaled median stack (fraction of the light).
    high_sigma : float
        The stack's upper clipping limit (sigma), which also limits a stamp from pixels.

    Returns
    -------
    As `extract_stamps`.

    Notes
    -----
    Source: ours; the distribution of depths and sizes is the measured one.
    """
    import pandas as pd

    stamps = np.empty((n, SIZE, SIZE), np.float32)
    rows = []
    for i in range(n):
        x = rng.uniform(0, shape[1])
        y = rng.uniform(0, shape[0])
        radius = float(
            np.clip(typical_radius(np.array(x), np.array(y)) + rng.normal(0, 1), 2.5, 11)
        )
        depth = float(np.clip(np.exp(rng.normal(np.log(0.022), 0.6)), 0.008, 0.3))
        kind = SHAPES[rng.integers(len(SHAPES))]
        x_offset, y_offset = rng.uniform(-0.5, 0.5, 2)
        profile = blob_profile(kind, radius, x_offset, y_offset, SIZE)
        stamps[i] = np.minimum(profile * depth / sigma_frac, high_sigma)
        rows.append({"blob": "", "radius_px": radius, "peak_sigma": float(stamps[i].max())})
    return stamps, pd.DataFrame(rows, columns=["blob", "radius_px", "peak_sigma"])


def ragged_stamps(rng: np.random.Generator, stamps: Stamps) -> Stamps:
    """Stamps like these, stretched along a random axis, and uneven: real blobs are ragged.

    Parameters
    ----------
    rng : Generator
    stamps : ndarray, shape (n, size, size), float32

    Returns
    -------
    ndarray, shape (n, size, size), float32

    Notes
    -----
    Source: ours, after real stamps, which differ from smooth ones by half of themselves.
    """
    made = np.empty_like(stamps)
    middle = np.full(2, stamps.shape[1] // 2)
    for i, stamp in enumerate(stamps):
        angle = rng.uniform(0, np.pi)
        stretch = np.exp(rng.normal(0, STRETCH, 2))
        axes = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        shrink = axes.T @ np.diag(1 / stretch) @ axes
        stretched = affine_transform(stamp, shrink, middle - shrink @ middle, order=1)
        grain = gaussian_filter(rng.normal(0, 1, stamp.shape), rng.uniform(0, GRAIN_PX))
        made[i] = stretched * (1 + rng.uniform(0, UNEVEN_FRAC) * grain / grain.std())
    return made
