"""Images with one blob, and what is fitted to it."""

from __future__ import annotations

import numpy as np
import pandas as pd

from blobpipe.core.blob_shapes import Shape, blob_profile, matched_snr
from blobpipe.detection.fit import fit_blobs

NOISE = 0.0101

SIDE = 160


def noise(seed: int = 1, side: int = SIDE) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, NOISE, (side, side)).astype(np.float32)


def blob(
    x: float, y: float, radius: float, depth: float, shape: Shape = "disc", side: int = SIDE
) -> np.ndarray:
    """A blob alone on an image; what reaches over the edge is cut."""
    padded = np.zeros((side + 82, side + 82), np.float32)
    row = round(y)
    column = round(x)
    padded[row + 21 : row + 62, column + 21 : column + 62] = depth * blob_profile(
        shape, radius, x - column, y - row
    )
    return padded[41:-41, 41:-41]


def depth_of(snr: float, radius: float, shape: Shape) -> float:
    return snr / matched_snr(blob_profile(shape, radius), NOISE)


def measured(image: np.ndarray, *peaks: tuple[float, float]) -> pd.DataFrame:
    x, y = np.reshape(peaks, (-1, 2)).T
    return fit_blobs(image, x, y, np.linspace(1, 0.5, len(x)), NOISE)
