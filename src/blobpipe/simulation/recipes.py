"""Recipes of training subframes, and the images that they draw on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from blobpipe.core import fits_images, tables
from blobpipe.errors import FrameError

if TYPE_CHECKING:
    import pandas as pd
STEP = 4096  # backgrounds are kept as int16 in steps of 1/4096 sigma, half the memory of float32

Subframes = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Scene:
    """What recipes refer to.

    Attributes
    ----------
    names : tuple of str
        The frames, in the order of the first axis of `backgrounds`.
    backgrounds : ndarray, shape (n, ny, nx), int16
        Scaled difference images (sigma / 4096).
    limits : ndarray, shape (n, 2), float32
        Lowest and highest value that clipping left in each (sigma).
    sigma_frac : ndarray, shape (n,), float32
        What one sigma is worth (fraction of the light).
    pattern : ndarray, shape (ny, nx), float32
        The known blobs (fraction of the light), 0 elsewhere.
    stamps : ndarray, shape (m, size, size), float32
        Blobs to superimpose (sigma of the scaled median stack).
    """

    names: tuple[str, ...]
    backgrounds: npt.NDArray[np.int16]
    limits: npt.NDArray[np.float32]
    sigma_frac: npt.NDArray[np.float32]
    pattern: npt.NDArray[np.float32]
    stamps: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Recipes:
    """Rows of the recipe tables as arrays; row i has the blobs ``first_blob[i]:first_blob[i + 1]``."""

    frame: npt.NDArray[np.int32]
    window: npt.NDArray[np.int32]  # (n, 2): x0, y0
    dip: npt.NDArray[np.float32]  # (n, 2): x, y shift, px
    label: npt.NDArray[np.int64]
    first_blob: npt.NDArray[np.int64]
    blob: npt.NDArray[np.int32]  # (blobs, 3): stamp, x, y
    factor: npt.NDArray[np.float32]  # (blobs,)
    noise_seed: npt.NDArray[np.uint64]  # (copies, n)
    turn: npt.NDArray[np.int32]  # (copies, n, 2): quarter turns, flip

    def __len__(self) -> int:
        return len(self.frame)


def load_scene(
    difference_dir: str | Path, scale_dir: str | Path, names: list[str], stamps: Subframes
) -> Scene:
    """Read the scaled images of some frames, and the known blobs, into memory (2 bytes a pixel)."""
    table = tables.read_stage(scale_dir).set_index("frame").loc[names]
    pattern = fits_images.read_plane(Path(difference_dir) / "reference.fits.fz", "PATTERN")
    backgrounds = np.empty((len(names), *pattern.shape), np.int16)

    def fill(i: int) -> None:
        path = fits_images.find_image(scale_dir, names[i])
        data = fits_images.read_frame(path).data
        if data.shape != pattern.shape:
            raise FrameError(
                f"{path}: found {data.shape} pixels, expected {pattern.shape} as in reference.fits.fz"
            )
        backgrounds[i] = np.rint(np.clip(data * STEP, -32768, 32767))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fill, range(len(names))))
    limits = _columns(table, ["low_sigma", "high_sigma"], np.float32)
    return Scene(
        tuple(names), backgrounds, limits, table["sigma_frac"].to_numpy(np.float32), pattern, stamps
    )


def to_recipes(
    names: tuple[str, ...],
    subframes: pd.DataFrame,
    blobs: pd.DataFrame,
    augmented: pd.DataFrame | None = None,
) -> Recipes:
    """The tables of the cutout stage, and that of the augment stage if given, as arrays.

    Parameters
    ----------
    names : tuple of str
        Frames of the scene.
    subframes, blobs : DataFrame
        ``*_subframes.csv`` and ``*_blobs.csv``.
    augmented : DataFrame, optional
        ``train.csv``; without it there is one copy, neither turned nor noisy.
    """
    number = {name: i for i, name in enumerate(names)}
    blobs = blobs.sort_values("subframe", kind="stable")
    n = len(subframes)
    seeds = np.zeros((1, n), np.uint64)
    turns = np.zeros((1, n, 2), np.int32)
    if augmented is not None:
        augmented = augmented.sort_values(["copy", "subframe"], kind="stable")
        seeds = augmented["noise_seed"].to_numpy(np.uint64).reshape(-1, n)
        turns = _columns(augmented, ["rotation", "flip"], np.int32).reshape(-1, n, 2)
    return Recipes(
        frame=np.array([number[name] for name in subframes["frame"]], np.int32),
        window=_columns(subframes, ["x0_px", "y0_px"], np.int32),
        dip=_columns(subframes, ["dip_x_px", "dip_y_px"], np.float32),
        label=subframes["label"].to_numpy(np.int64),
        first_blob=np.searchsorted(blobs["subframe"], np.arange(n + 1)).astype(np.int64),
        blob=_columns(blobs, ["stamp", "x_px", "y_px"], np.int32),
        factor=blobs["factor"].to_numpy(np.float32),
        noise_seed=seeds,
        turn=turns,
    )


def _columns(table: pd.DataFrame, names: list[str], dtype: type) -> npt.NDArray[Any]:
    """A copy in C order, whatever pandas has: for another order, or read-only, all would be compiled again."""
    return np.array(table[names], dtype, order="C")
