"""Inject blobs into difference images."""

from __future__ import annotations

import numpy as np

from blobpipe.core import blob_shapes
from blobpipe.core.arrays import Float32Array, Int64Array
from blobpipe.images import tiles
from blobpipe.simulation import render, stamps
from blobpipe.simulation.recipes import Recipes, Scene

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
    add_stamp(image, np.float32(depth_frac) * stamp, x, y)


def add_stamp(image: Float32Array, stamp: Float32Array, x: int, y: int) -> None:
    """Add a square of 41 x 41 pixels around a pixel, in place, cut where the image ends."""
    top = max(0, y - HALF_PX)
    left = max(0, x - HALF_PX)
    part = image[top : y + HALF_PX + 1, left : x + HALF_PX + 1]
    ny, nx = part.shape
    part += stamp[top - y + HALF_PX :, left - x + HALF_PX :][:ny, :nx]


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
