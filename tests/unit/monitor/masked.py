"""Full frames with known blobs, a cluster of bad pixels that looks like a blob, and a mask of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from astropy.io import fits

from blobpipe.core.blob_shapes import blob_profile

Blob = tuple[int, int, float, float]

KNOWN: tuple[Blob, ...] = (
    (120, 150, 6.5, 0.08),
    (700, 800, 7.0, 0.06),
    (400, 300, 5.5, 0.1),
    (850, 200, 6.0, 0.09),
)
NEW: Blob = (300, 600, 6.0, 0.06)

# Pixels that react to light as if they were a blob, on some days
CLUSTER: Blob = (600, 450, 4.0, 0.07)


def pixels(day: int, *blobs: Blob) -> np.ndarray:
    """Noise and blobs, NaN on the border."""
    image = np.random.default_rng([31, day]).normal(0, 0.0076, (1024, 1024)).astype(np.float32)
    for x, y, radius, depth in blobs:
        image[y - 20 : y + 21, x - 20 : x + 21] += depth * blob_profile("disc", radius, 0.0, 0.0)
    image[:5] = image[-5:] = image[:, :5] = image[:, -5:] = np.nan
    return image


def write(path: Path, day: int, *blobs: Blob, dq: np.ndarray | None = None) -> Path:
    """A blob image of a day, with the known blobs."""
    path.parent.mkdir(exist_ok=True)
    header = fits.Header({"EXPSTART": 60000.0 + day, "FILTER": "F153M"})
    hdus: list[object] = [fits.PrimaryHDU(None, header)]
    hdus.append(fits.ImageHDU(pixels(day, *KNOWN, *blobs), name="SCI"))
    if dq is not None:
        hdus.append(fits.ImageHDU(dq.astype(np.int16), name="DQ"))
    fits.HDUList(hdus).writeto(path, overwrite=True)
    return path


def write_stack(path: Path) -> Path:
    """The median of eight images."""
    stack = np.median([pixels(day, *KNOWN) for day in range(100, 108)], axis=0)
    fits.PrimaryHDU(stack.astype(np.float32)).writeto(path)
    return path


def around(x: int, y: int, radius: float) -> np.ndarray:
    """Pixels of a disc, shape (1014, 1014)."""
    rows, columns = np.mgrid[:1014, :1014]
    return np.hypot(columns + 5 - x, rows + 5 - y) <= radius


def write_mask(path: Path, mask: np.ndarray) -> Path:
    """A mask of 1014 x 1014 pixels."""
    fits.PrimaryHDU(mask.astype(np.uint8)).writeto(path, overwrite=True)
    return path
