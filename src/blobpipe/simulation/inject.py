"""Inject blobs into difference images."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter

from blobpipe.core import blob_shapes
from blobpipe.core.arrays import Float32Array, Int64Array
from blobpipe.core.random_streams import log_uniform, stream
from blobpipe.images import tiles
from blobpipe.simulation import render, stamps
from blobpipe.simulation.recipes import Recipes, Scene

# Ranges of S/N and radius (px) of injected blobs, each drawn evenly in its logarithm
PRACTICE_SNR = (4.0, 40.0)
PRACTICE_RADII_PX = (2.4, 10.0)

# Fraction of injected blobs whose radius is that of their place, with this scatter (1 sigma of the
# logarithm; measured on 71 blobs of a real image: 0.17); the others have any radius
PRACTICE_LAWFUL = 0.85
PRACTICE_SCATTER = 0.18

# Ranges of radius (px), of the Gaussian that softens the edges (px), of axis ratio and of S/N of
# injected clusters of bad pixels; real ones whose edges resampling or diffusion has softened have radii
# of 1.6 to 2.9 px and S/N 8 to 26
CLUSTER_RADII_PX = (0.8, 3.2)
CLUSTER_SOFTNESS_PX = (0.3, 1.4)
CLUSTER_AXES = (0.6, 1.6)
CLUSTER_SNR = (5.0, 40.0)

# Least distance between an injected blob and an injected cluster (px)
APART_PX = 40.0

# Places that are tried for a cluster (count); a blob takes a tenth of them
N_TRIES = 20

# Fraction of injected blobs that are ragged as real ones are, so that a high reduced chi-squared is no proof against a blob
PRACTICE_RAGGED = 0.5

# Half the side of the stamp of a blob (px)
HALF_PX = 20


def add_blob(
    image: Float32Array,
    *,
    shape: blob_shapes.Shape,
    x_px: float,
    y_px: float,
    radius_px: float,
    depth_frac: float,
    ragged: np.random.Generator | None = None,
) -> None:
    """Add a blob to an image, in place, cut where the image ends.

    Parameters
    ----------
    image : ndarray, shape (ny, nx), float32
        Fraction of the light.
    shape : {"disc", "diamond", "ring"}
    x_px, y_px : float
        Centre (px).
    radius_px : float
        Radius of the best top-hat (px).
    depth_frac : float
        Depth (fraction of the light).
    ragged : Generator, optional
        Source of randomness for a ragged blob; a smooth one if not given.
    """
    x = round(x_px)
    y = round(y_px)
    stamp = blob_shapes.blob_profile(shape, radius_px, x_px - x, y_px - y, 2 * HALF_PX + 1)
    if ragged is not None:
        stamp = stamps.ragged_stamps(ragged, stamp[None])[0]
    _add_stamp(image, np.float32(depth_frac) * stamp, x, y)


def _add_stamp(image: Float32Array, stamp: Float32Array, x: int, y: int) -> None:
    """Add a square of 41 x 41 pixels around a pixel, in place, cut where the image ends."""
    top = max(0, y - HALF_PX)
    left = max(0, x - HALF_PX)
    part = image[top : y + HALF_PX + 1, left : x + HALF_PX + 1]
    ny, nx = part.shape
    part += stamp[top - y + HALF_PX :, left - x + HALF_PX :][:ny, :nx]


def random_blobs(
    seed: int, frame: str, shape: tuple[int, int], noise_frac: float
) -> tuple[Float32Array, pd.DataFrame]:
    """Draw a blob at a random position in every 256 x 256 pixels.

    They have any shape and S/N, most the radius that is usual at their place; half are ragged.

    Parameters
    ----------
    seed : int
        Seed of the detect stage.
    frame : str
        Name of the frame, which selects the random stream.
    shape : (ny, nx)
        Shape of the image.
    noise_frac : float
        Noise per pixel (fraction of the light), which sets the depth of a given S/N.

    Returns
    -------
    ndarray, shape (ny, nx), float32
        Light loss of the blobs (fraction of the light).
    DataFrame
        x_px, y_px, radius_px of each.
    """
    rng = stream(seed, "detect", frame)
    signal = np.zeros(shape, np.float32)
    corners = product(*(range(0, side - tiles.SIDE + 1, tiles.SIDE) for side in shape))
    positions = []
    for top, left in corners:
        y = top + rng.uniform(HALF_PX, tiles.SIDE - HALF_PX)
        x = left + rng.uniform(HALF_PX, tiles.SIDE - HALF_PX)
        radius = float(log_uniform(rng, *PRACTICE_RADII_PX))
        if rng.random() < PRACTICE_LAWFUL:
            usual = float(blob_shapes.typical_radius(np.array(x), np.array(y)))
            lawful = usual * np.exp(rng.normal(0, PRACTICE_SCATTER))
            radius = float(np.clip(lawful, *PRACTICE_RADII_PX))
        snr = float(log_uniform(rng, *PRACTICE_SNR))
        kind = blob_shapes.SHAPES[rng.integers(len(blob_shapes.SHAPES))]

        # The depth that gives a blob of this shape its S/N
        profile = blob_shapes.blob_profile(kind, radius)
        depth = snr / blob_shapes.matched_snr(profile, noise_frac)

        ragged = rng if rng.random() < PRACTICE_RAGGED else None
        add_blob(
            signal, shape=kind, x_px=x, y_px=y, radius_px=radius, depth_frac=depth, ragged=ragged
        )
        positions.append((x, y, radius))
    return signal, pd.DataFrame(positions, columns=["x_px", "y_px", "radius_px"], dtype=float)


def random_clusters(
    seed: int, frame: str, shape: tuple[int, int], noise_frac: float, blobs: pd.DataFrame
) -> Float32Array:
    """Draw a soft cluster of bad pixels in every 256 x 256 pixels, apart from the blobs there.

    Parameters
    ----------
    seed, frame, shape, noise_frac
        As for `random_blobs`.
    blobs : DataFrame
        From `random_blobs`.

    Returns
    -------
    ndarray, shape (ny, nx), float32
        Light that the clusters seem to lose (fraction of the light).
    """
    rng = stream(seed, "detect", "clusters", frame)
    signal = np.zeros(shape, np.float32)
    for top, left in product(*(range(0, side - tiles.SIDE + 1, tiles.SIDE) for side in shape)):
        y = top + rng.uniform(HALF_PX, tiles.SIDE - HALF_PX, N_TRIES)
        x = left + rng.uniform(HALF_PX, tiles.SIDE - HALF_PX, N_TRIES)
        apart = np.hypot(
            x[:, None] - blobs["x_px"].to_numpy(), y[:, None] - blobs["y_px"].to_numpy()
        )
        free = np.flatnonzero((apart > APART_PX).all(axis=1))
        _add_cluster(signal, rng, float(x[free[0]]), float(y[free[0]]), noise_frac)
    return signal


def _add_cluster(
    image: Float32Array, rng: np.random.Generator, x_px: float, y_px: float, noise_frac: float
) -> None:
    """Add an elliptical cluster of bad pixels with soft edges that reads low, as a blob does."""
    radius = float(log_uniform(rng, *CLUSTER_RADII_PX))
    softness = rng.uniform(*CLUSTER_SOFTNESS_PX)
    axes = float(log_uniform(rng, *CLUSTER_AXES))
    snr = float(log_uniform(rng, *CLUSTER_SNR))
    x = round(x_px)
    y = round(y_px)
    rows, columns = np.mgrid[-HALF_PX : HALF_PX + 1, -HALF_PX : HALF_PX + 1]
    distance = np.hypot((columns - (x_px - x)) * axes, (rows - (y_px - y)) / axes)
    spot = gaussian_filter((distance <= radius).astype(np.float32), softness)
    if not spot.any():  # smaller than a pixel, between two
        return
    depth = snr * noise_frac / np.linalg.norm(spot)
    _add_stamp(image, np.float32(depth) * spot, x, y)


def render_in_sigma(scene: Scene, recipes: Recipes, rows: Int64Array) -> Float32Array:
    """Render subframes for the dense network: those of `render.render_subframes`, but in sigma, not standardised.

    Parameters
    ----------
    scene : Scene
    recipes : Recipes
    rows : ndarray, shape (n,), int
        Which rows, in any order.

    Returns
    -------
    ndarray, shape (n, 256, 256), float32
    """
    return render.render_varied(
        scene,
        recipes,
        rows,
        copy=0,
        strength=np.ones(len(recipes.blob), np.float32),
        noise_sigma=np.zeros(len(rows), np.float32),
        piece=np.full(len(rows), -1),
        pieces=np.zeros((1, tiles.SIDE, tiles.SIDE), np.int16),
    )
