"""Recipes for augmentation: noise, rotation and flip of each training subframe (ISR 3.4)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from blobpipe.core import plotting, tables
from blobpipe.core.random_streams import stream
from blobpipe.params import Augment
from blobpipe.simulation import cutout, render

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("copy", "subframe", "noise_seed", "rotation", "flip")


def augment(
    difference_dir: str | Path,
    scale_dir: str | Path,
    cutout_dir: str | Path,
    out_dir: str | Path,
    params: Augment,
) -> None:
    """Write ``train.csv``, the augmentation of every training subframe, and a contact sheet (stage ``augment``).

    Notes
    -----
    Source: ISR 3.4. Several copies of each subframe, one per epoch in turn, are ours.
    """
    subframes, _ = cutout.read_recipes(cutout_dir, "train")
    table = draw_augmentation(stream(params.seed, "augment"), len(subframes), params)
    tables.write_table(Path(out_dir) / "train.csv", table)
    scene, recipes = cutout.open_split(difference_dir, scale_dir, cutout_dir, "train", table, n=48)
    pixels = render.render_subframes(
        scene, recipes, np.arange(len(recipes)), noise_sigma=params.noise_sigma
    )
    plotting.contact_sheet(
        Path(out_dir) / "contact_sheet.png", pixels, recipes.label, "Augmented training subframes"
    )


def draw_augmentation(rng: np.random.Generator, n: int, params: Augment) -> pd.DataFrame:
    """Draw ``copies`` augmentations for each of ``n`` subframes.

    Returns
    -------
    DataFrame
        copy, subframe, noise_seed, rotation (quarter turns), flip (0 or 1).
    """
    import pandas as pd

    size = params.copies * n
    columns = (
        np.repeat(np.arange(params.copies), n),
        np.tile(np.arange(n), params.copies),
        rng.integers(0, 2**62, size),
        rng.integers(0, 4 if params.rotate else 1, size),
        rng.integers(0, 2 if params.flip else 1, size),
    )
    return pd.DataFrame(dict(zip(COLUMNS, columns, strict=True)))


def read_augmentation(augment_dir: str | Path) -> pd.DataFrame:
    """``train.csv`` of the augment stage."""
    return tables.read_table(Path(augment_dir) / "train.csv", COLUMNS)
