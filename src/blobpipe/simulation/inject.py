"""Inject blobs into difference images."""

from __future__ import annotations

from itertools import product

import numpy as np
import numpy.typing as npt
import pandas as pd

from blobpipe.core import blob_shapes
from blobpipe.core.random_streams import stream
from blobpipe.images import tiles
from blobpipe.simulation import render, stamps
from blobpipe.simulation.recipes import Recipes, Scene

# of superimposed blobs, each evenly in its logarithm
PRACTICE_SNR = (4.0, 40.0)
PRACTICE_RADII_PX = (2.4, 10.0)
PRACTICE_RAGGED = 0.5  # of them, as real ones are: a misfit says less against a blob then
HALF_PX = 20  # half the side of a blob's stamp


def add_blob(
    image: npt.NDArray[np.float32],
    *,
    shape: blob_shapes.Shape,
    x_px: float,
    y_px: float,
    radius_px: float,
    depth_frac: float,
    ragged: np.random.Generator | None = None,
) -> None:
    """Add a blob to an image (fraction of the light), in place, cut where the image ends; uneven at random if ``ragged``."""
    x = round(x_px)
    y = round(y_px)
    stamp = blob_shapes.blob_profile(shape, radius_px, x_px - x, y_px - y, 2 * HALF_PX + 1)
    if ragged is not None:
        stamp = stamps.ragged_stamps(ragged, stamp[None])[0]
    top = max(0, y - HALF_PX)
    left = max(0, x - HALF_PX)
    part = image[top : y + HALF_PX + 1, left : x + HALF_PX + 1]
    visible = stamp[top - y + HALF_PX :, left - x + HALF_PX :][: part.shape[0], : part.shape[1]]
    part += np.float32(depth_frac) * visible


def random_blobs(
    seed: int, frame: str, shape: tuple[int, int], noise_frac: float
) -> tuple[npt.NDArray[np.float32], pd.DataFrame]:
    """A blob at a random place in every 256 x 256 pixels, of any shape, size and S/N, half of them ragged.

    Returns
    -------
    ndarray, shape ``shape``, float32
        Their light loss (fraction of the light).
    DataFrame
        x_px, y_px, radius_px of each.
    """
    rng = stream(seed, "detect", frame)
    signal = np.zeros(shape, np.float32)
    put = []
    for top, left in product(*(range(0, side - tiles.SIDE + 1, tiles.SIDE) for side in shape)):
        y, x = (start + rng.uniform(HALF_PX, tiles.SIDE - HALF_PX) for start in (top, left))
        radius, snr = (
            float(np.exp(rng.uniform(*np.log(ends)))) for ends in (PRACTICE_RADII_PX, PRACTICE_SNR)
        )
        shape_of = blob_shapes.SHAPES[rng.integers(len(blob_shapes.SHAPES))]
        depth = snr / blob_shapes.matched_snr(
            blob_shapes.blob_profile(shape_of, radius), noise_frac
        )
        ragged = rng if rng.random() < PRACTICE_RAGGED else None
        add_blob(
            signal,
            shape=shape_of,
            x_px=x,
            y_px=y,
            radius_px=radius,
            depth_frac=depth,
            ragged=ragged,
        )
        put.append((x, y, radius))
    return signal, pd.DataFrame(put, columns=["x_px", "y_px", "radius_px"], dtype=float)


def render_in_sigma(
    scene: Scene, recipes: Recipes, rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Some subframes as the dense network meets them: the pixels of `render.render_subframes`, not standardised."""
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
