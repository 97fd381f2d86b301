"""Find the pixels that neither training nor the regression test has used."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from blobpipe.images import tiles
from blobpipe.simulation import cutout


class SeenPart(NamedTuple):
    """Images without a new blob that training has seen, left of a column."""

    frames: set[str]
    border_px: int


def seen_part(images: pd.DataFrame, blobs: pd.DataFrame, cutout_dir: str | Path) -> SeenPart:
    """Return which images without a new blob training has seen, and up to which column."""
    shown, _ = cutout.read_recipes(cutout_dir, "train")
    quiet = set(images["frame"]) - set(blobs["first_frame"])
    return SeenPart(quiet & set(shown["frame"]), int(shown["x0_px"].max()) + tiles.SIDE)


class HeldOut(NamedTuple):
    """Candidates that lie on held-out pixels (a mask of rows), and the images these pixels make up."""

    rows: npt.NDArray[np.bool_]
    frames: float


def find_held_out(
    candidates: pd.DataFrame,
    images: pd.DataFrame,
    blobs: pd.DataFrame,
    cutout_dir: str | Path,
    width: int,
) -> HeldOut:
    """Find candidates on pixels that neither training nor the regression test has used."""
    seen, border = seen_part(images, blobs, cutout_dir)
    quiet = set(images["frame"]) - set(blobs["first_frame"])
    share = max(0.0, 1 - border / width)
    unseen = candidates["frame"].isin(quiet - seen)
    beyond = candidates["frame"].isin(seen)
    rows = unseen | (beyond & (candidates["x_px"] >= border))
    return HeldOut(rows.to_numpy(bool), len(quiet - seen) + share * len(seen))


def first_image_index(images: pd.DataFrame, blobs: pd.DataFrame) -> npt.NDArray[np.int64]:
    """Return the index of the image that first shows each blob; -1 if all do, or it is missing."""
    order = {frame: i for i, frame in enumerate(images["frame"])}
    return blobs["first_frame"].map(order).fillna(-1).to_numpy(np.int64)
