"""Inject blobs into difference images."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd

from blobpipe.core import blob_shapes
from blobpipe.core.arrays import Float32Array, Int64Array
from blobpipe.core.random_streams import log_uniform, stream
from blobpipe.images import tiles
from blobpipe.simulation import render, stamps
from blobpipe.simulation.recipes import Recipes, Scene

# Ranges of S/N and radius (px) of injected blobs, each drawn evenly in its logarithm
PRACTICE_SNR = (4.0, 40.0)
PRACTICE_RADII_PX = (2.4, 10.0)

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
    top = max(0, y - HALF_PX)
    left = max(0, x - HALF_PX)
    part = image[top : y + HALF_PX + 1, left : x + HALF_PX + 1]
    ny, nx = part.shape
    visible = stamp[top - y + HALF_PX :, left - x + HALF_PX :][:ny, :nx]
    part += np.float32(depth_frac) * visible


def random_blobs(
    seed: int, frame: str, shape: tuple[int, int], noise_frac: float
) -> tuple[Float32Array, pd.DataFrame]:
    """Draw a blob at a random position in every 256 x 256 pixels, of any shape, size and S/N, half of them ragged.

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
