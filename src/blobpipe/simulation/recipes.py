"""Recipes of training subframes as arrays, and the images that they are rendered from."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from blobpipe.core import fits_images, tables
from blobpipe.core.arrays import Float32Array, Int16Array, Int32Array, Int64Array
from blobpipe.errors import FrameError

if TYPE_CHECKING:
    import pandas as pd

# Steps per sigma of backgrounds, which are kept as int16 in half the memory of float32
STEP = 4096

Subframes = Float32Array


@dataclass(frozen=True)
class Scene:
    """The images that recipes refer to.

    Attributes
    ----------
    names : tuple of str
        The frames, in the order of the first axis of `backgrounds`.
    backgrounds : ndarray, shape (n, ny, nx), int16
        Scaled difference images (sigma / 4096).
    limits : ndarray, shape (n, 2), float32
        Limits at which each was clipped (sigma).
    sigma_frac : ndarray, shape (n,), float32
        One sigma of each (fraction of the light).
    pattern : ndarray, shape (ny, nx), float32
        Pattern of the known blobs (fraction of the light), 0 elsewhere.
    stamps : ndarray, shape (m, size, size), float32
        Blobs to superimpose (sigma of the scaled median stack).
    """

    names: tuple[str, ...]
    backgrounds: Int16Array
    limits: Float32Array
    sigma_frac: Float32Array
    pattern: Float32Array
    stamps: Float32Array


@dataclass(frozen=True)
class Recipes:
    """Rows of the recipe tables as arrays.

    Attributes
    ----------
    frame : ndarray, shape (n,), int32
        Index of the frame in `Scene.names`.
    window : ndarray, shape (n, 2), int32
        x, y of the first pixel in the frame (px).
    dip : ndarray, shape (n, 2), float32
        x, y of the shift of the known blobs that has not been corrected (px); 0 for no dip.
    label : ndarray, shape (n,), int64
        1 with blobs, 0 without.
    first_blob : ndarray, shape (n + 1,), int64
        Row i has the blobs ``first_blob[i]:first_blob[i + 1]``.
    blob : ndarray, shape (m, 3), int32
        Index of the stamp, and x, y of its middle in the subframe (px).
    factor : ndarray, shape (m,), float32
        Factor of the stamp.
    noise_seed : ndarray, shape (copies, n), uint64
        Seed of the noise of each augmented copy.
    turn : ndarray, shape (copies, n, 2), int32
        Quarter turns (0 to 3), and flip (0 or 1), of each augmented copy.
    """

    frame: Int32Array
    window: Int32Array
    dip: Float32Array
    label: Int64Array
    first_blob: Int64Array
    blob: Int32Array
    factor: Float32Array
    noise_seed: npt.NDArray[np.uint64]
    turn: Int32Array

    def __len__(self) -> int:
        return len(self.frame)


def load_scene(
    difference_dir: str | Path, scale_dir: str | Path, names: list[str], stamps: Subframes
) -> Scene:
    """Read the scaled images of some frames, and the pattern of the known blobs, into memory (2 bytes per pixel).

    Parameters
    ----------
    difference_dir, scale_dir : path
        Folders of the two stages.
    names : list of str
        Frames.
    stamps : ndarray, shape (m, size, size), float32
        As in `Scene`.

    Raises
    ------
    FrameError
        If an image cannot be read, or has another size than the template.
    """
    # What the tables and the template say of the frames
    table = tables.read_stage(scale_dir).set_index("frame").loc[names]
    pattern = fits_images.read_plane(Path(difference_dir) / "reference.fits.fz", "PATTERN")
    backgrounds = np.empty((len(names), *pattern.shape), np.int16)

    def fill(i: int) -> None:
        path = fits_images.find_image(scale_dir, names[i])
        data = fits_images.read_pixels(path)
        if data.shape != pattern.shape:
            ny, nx = data.shape
            reference_ny, reference_nx = pattern.shape
            raise FrameError(
                f"{path}: found {nx}x{ny} pixels, expected {reference_nx}x{reference_ny} as in reference.fits.fz; make "
                "all images again from the difference stage on"
            )
        backgrounds[i] = np.rint(np.clip(data * STEP, -32768, 32767))

    # Decompression releases the interpreter
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fill, range(len(names))))
    return Scene(
        names=tuple(names),
        backgrounds=backgrounds,
        limits=_columns(table, ["low_sigma", "high_sigma"], np.float32),
        sigma_frac=table["sigma_frac"].to_numpy(np.float32),
        pattern=pattern,
        stamps=stamps,
    )


def to_recipes(
    names: tuple[str, ...],
    subframes: pd.DataFrame,
    blobs: pd.DataFrame,
    augmented: pd.DataFrame | None = None,
) -> Recipes:
    """Return the tables of the cutout stage, and that of the augment stage, as arrays.

    Parameters
    ----------
    names : tuple of str
        Frames of the scene.
    subframes, blobs : DataFrame
        ``*_subframes.csv`` and ``*_blobs.csv``.
    augmented : DataFrame, optional
        ``train.csv`` of the augment stage; without it, there is one copy of seed 0 that is not turned.
    """
    n = len(subframes)
    number = {name: i for i, name in enumerate(names)}
    frame = np.array([number[name] for name in subframes["frame"]], np.int32)

    # The blobs of a row are found by their place among those sorted by subframe
    blobs = blobs.sort_values("subframe", kind="stable")
    first_blob = np.searchsorted(blobs["subframe"], np.arange(n + 1))

    seeds = np.zeros((1, n), np.uint64)
    turns = np.zeros((1, n, 2), np.int32)
    if augmented is not None:
        augmented = augmented.sort_values(["copy", "subframe"], kind="stable")
        seeds = augmented["noise_seed"].to_numpy(np.uint64).reshape(-1, n)
        turns = _columns(augmented, ["rotation", "flip"], np.int32).reshape(-1, n, 2)
    return Recipes(
        frame=frame,
        window=_columns(subframes, ["x0_px", "y0_px"], np.int32),
        dip=_columns(subframes, ["dip_x_px", "dip_y_px"], np.float32),
        label=subframes["label"].to_numpy(np.int64),
        first_blob=first_blob.astype(np.int64),
        blob=_columns(blobs, ["stamp", "x_px", "y_px"], np.int32),
        factor=blobs["factor"].to_numpy(np.float32),
        noise_seed=seeds,
        turn=turns,
    )


def _columns(table: pd.DataFrame, names: list[str], dtype: type) -> npt.NDArray[Any]:
    """Return columns as a writable array in C order, shape (rows, columns).

    Numba would compile its functions again for an array in another order, or one that is read-only.
    """
    return np.array(table[names], dtype, order="C")
