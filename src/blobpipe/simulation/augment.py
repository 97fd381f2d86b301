"""Draw the augmentation of training subframes: noise, rotation and flip (ISR 3.4)."""

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

    Parameters
    ----------
    difference_dir, scale_dir, cutout_dir : path
        Folders of these stages.
    out_dir : path
        Folder of ``train.csv`` and ``contact_sheet.png``.
    params : Augment

    Notes
    -----
    Source: ISR 3.4. Several copies of each subframe, one per epoch in turn, are this project's.
    """
    out_dir = Path(out_dir)
    subframes, _ = cutout.read_recipes(cutout_dir, "train")
    rng = stream(params.seed, "augment")
    table = draw_augmentation(rng, len(subframes), params)
    tables.write_table(out_dir / "train.csv", table)

    scene, recipes = cutout.open_split(difference_dir, scale_dir, cutout_dir, "train", table, n=48)
    rows = np.arange(len(recipes))
    pixels = render.render_subframes(scene, recipes, rows, noise_sigma=params.noise_sigma)
    sheet = out_dir / "contact_sheet.png"
    plotting.contact_sheet(sheet, pixels, recipes.label, "Augmented training subframes")


def draw_augmentation(rng: np.random.Generator, n: int, params: Augment) -> pd.DataFrame:
    """Draw ``params.copies`` augmentations for each of ``n`` subframes.

    Returns
    -------
    DataFrame
        copy, subframe, noise_seed, rotation (quarter turns, 0 to 3), flip (0 or 1).
    """
    import pandas as pd

    size = params.copies * n
    n_rotations = 4 if params.rotate else 1
    n_flips = 2 if params.flip else 1
    table = pd.DataFrame(
        {
            "copy": np.repeat(np.arange(params.copies), n),
            "subframe": np.tile(np.arange(n), params.copies),
            "noise_seed": rng.integers(0, 2**62, size),
            "rotation": rng.integers(0, n_rotations, size),
            "flip": rng.integers(0, n_flips, size),
        }
    )
    return table[list(COLUMNS)]


def read_augmentation(augment_dir: str | Path) -> pd.DataFrame:
    """Read ``train.csv`` of the augment stage."""
    return tables.read_table(Path(augment_dir) / "train.csv", COLUMNS)
