"""Which pixels neither training nor the regression test has used."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from blobpipe.images import tiles
from blobpipe.simulation import cutout


class SeenPart(NamedTuple):
    """What training has seen of images without a new blob: these frames, left of a column."""

    frames: set[str]
    border_px: int


def seen_part(images: pd.DataFrame, blobs: pd.DataFrame, cutout_dir: str | Path) -> SeenPart:
    """The training windows' side of quiet images."""
    shown, _ = cutout.read_recipes(cutout_dir, "train")
    quiet = set(images["frame"]) - set(blobs["first_frame"])
    return SeenPart(quiet & set(shown["frame"]), int(shown["x0_px"].max()) + tiles.SIDE)


class HeldOut(NamedTuple):
    """Which candidates lie on held-out pixels, and how many whole frames these make."""

    rows: npt.NDArray[np.bool_]
    frames: float


def find_held_out(
    candidates: pd.DataFrame,
    images: pd.DataFrame,
    blobs: pd.DataFrame,
    cutout_dir: str | Path,
    width: int,
) -> HeldOut:
    """What neither training nor the regression test uses: the validation windows' side of quiet images."""
    seen, border = seen_part(images, blobs, cutout_dir)
    quiet = set(images["frame"]) - set(blobs["first_frame"])
    share = max(0.0, 1 - border / width)
    unseen = candidates["frame"].isin(quiet - seen)
    beyond = candidates["frame"].isin(seen)
    rows = unseen | (beyond & (candidates["x_px"] >= border))
    return HeldOut(rows.to_numpy(bool), len(quiet - seen) + share * len(seen))


def first_image_index(images: pd.DataFrame, blobs: pd.DataFrame) -> npt.NDArray[np.int64]:
    """Number of the image that first shows each blob, -1 if all do or that image is not there."""
    order = {frame: i for i, frame in enumerate(images["frame"])}
    return blobs["first_frame"].map(order).fillna(-1).to_numpy(np.int64)
