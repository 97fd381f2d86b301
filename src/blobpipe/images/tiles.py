"""A whole image as subframes, as the report's network looks at real images (ISR section 7)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from blobpipe.core.arrays import Image

SIDE = 256  # of a subframe (px; ISR 3.3)


def origins(shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Return where the subframes of an image lie, the bottom row first, each from left to right.

    Parameters
    ----------
    shape : (ny, nx)
        Of the image (px).

    Returns
    -------
    ndarray, shape (n, 4), int64
        Row and column of each (0 is the bottom row, the left column), and x, y of its lower left
        pixel (px, 0-based); n = 16 for four by four subframes.
    """
    rows, columns = (-(-side // SIDE) for side in shape)
    row, column = np.divmod(np.arange(rows * columns), columns)
    return np.stack([row, column, column * SIDE, row * SIDE], axis=1).astype(np.int64)


def tile(image: Image) -> tuple[Image, npt.NDArray[np.int64]]:
    """Cut an image into adjoining subframes.

    Parameters
    ----------
    image : ndarray, shape (ny, nx), float32
        A scaled image (sigma), all finite. Where a side is no multiple of 256, the image is mirrored
        beyond its upper and right edges: a constant filling would lower the spread that subframes
        are standardised by.

    Returns
    -------
    subframes : ndarray, shape (n, 256, 256), float32
        A copy.
    origins : ndarray, shape (n, 4), int64
        From `origins`.

    Notes
    -----
    Source: ISR section 7 (16 subframes); other sizes are this project's.
    """
    rows, columns = (-(-side // SIDE) for side in image.shape)
    missing = [(0, -side % SIDE) for side in image.shape]
    padded = np.pad(image, missing, mode="symmetric") if np.any(missing) else image
    blocks = padded.reshape(rows, SIDE, columns, SIDE).swapaxes(1, 2)
    subframes = np.array(blocks.reshape(-1, SIDE, SIDE), np.float32, order="C")
    return subframes, origins(image.shape)
