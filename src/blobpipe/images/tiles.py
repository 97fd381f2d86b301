"""Cut a whole image into subframes, the input of the networks (ISR section 7)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Side of a subframe (px); ISR 3.3
SIDE = 256


def tile(image: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Cut an image into adjoining subframes, the bottom row of subframes first, each row from left to right.

    Parameters
    ----------
    image : ndarray, shape (ny, nx), float32
        A scaled image (sigma), all finite. If a side is not a multiple of 256, the image is mirrored beyond its upper
        and right edges: a constant filling would lower the standard deviation that subframes are standardised by.

    Returns
    -------
    subframes : ndarray, shape (n, 256, 256), float32
        A copy; n = 16 for 1024 x 1024.
    origins : ndarray, shape (n, 4), int64
        Row and column of each subframe, counted from the lower left, and x, y of its lower left pixel (px).

    Notes
    -----
    Source: ISR section 7 (16 subframes); other sizes are this project's.
    """
    padding = [(0, -side % SIDE) for side in image.shape]
    padded = np.pad(image, padding, mode="symmetric") if np.any(padding) else image
    n_rows = padded.shape[0] // SIDE
    n_columns = padded.shape[1] // SIDE

    blocks = padded.reshape(n_rows, SIDE, n_columns, SIDE).swapaxes(1, 2)
    subframes = np.array(blocks.reshape(-1, SIDE, SIDE), np.float32, order="C")

    row, column = np.divmod(np.arange(n_rows * n_columns), n_columns)
    origins = np.stack([row, column, column * SIDE, row * SIDE], axis=1)
    return subframes, origins.astype(np.int64)
