"""Match detections with each other, with blobs, and with those of other images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from blobpipe.core.arrays import FloatArray

if TYPE_CHECKING:
    import pandas as pd
NEAR_PX = 6.0  # a detection this near to a blob's centre, or within its radius, has found it


def near_blobs(found: pd.DataFrame, blobs: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """Say which places lie within 6 px, or within the radius, of which blobs: (places, blobs)."""
    x, y, radius = (blobs[column].to_numpy(float) for column in ("x_px", "y_px", "radius_px"))
    distance = np.hypot(
        found["x_px"].to_numpy()[:, None] - x, found["y_px"].to_numpy()[:, None] - y
    )
    return np.asarray(distance <= np.maximum(NEAR_PX, radius))


KNOWN_PX = 3.0  # two blobs do not lie so near each other; the fit of one does not err so far


def without_repeats(detections: pd.DataFrame, within_px: float = KNOWN_PX) -> pd.DataFrame:
    """Drop detections within a few pixels of an earlier one: a large blob may have two peaks.

    Parameters
    ----------
    detections : DataFrame
        From `fit.fit_blobs`, the highest score first.
    within_px : float
        Two blobs do not lie so near each other (px).
    """
    places = detections[["x_px", "y_px"]].to_numpy(float)
    apart = np.hypot(*np.moveaxis(places[:, None] - places, -1, 0))
    kept: list[int] = []
    for k in range(len(places)):
        if not (apart[k, kept] <= within_px).any():
            kept.append(k)
    return detections.iloc[kept].reset_index(drop=True)


def mark_seen_again(
    previous: pd.DataFrame, current: pd.DataFrame, tolerance_px: float = 3.0
) -> pd.DataFrame:
    """Mark new blobs that a later image shows again: a blob never moves and never vanishes.

    Parameters
    ----------
    previous, current : DataFrame
        From `vet.vet_candidates`, of an image and of a later one.
    tolerance_px : float
        Largest distance between the two places.

    Returns
    -------
    DataFrame
        ``previous``, with the status ``seen_again`` of each new blob that is among those of ``current`` other than
        ``bad_pixels``.

    Notes
    -----
    Source: ours, after the Data Handbook on the nature of blobs.
    """
    columns = ["x_px", "y_px"]
    new = np.flatnonzero(previous["status"].to_numpy(object) == "new")
    later = current.loc[current["status"] != "bad_pixels", columns].to_numpy(float)
    pairs = pair(previous[columns].to_numpy(float)[new], later, tolerance_px)
    status = previous["status"].copy()
    status.iloc[new[pairs[:, 0]]] = "seen_again"
    return previous.assign(status=status)


def pair(detections_xy: FloatArray, blobs_xy: FloatArray, tolerance: float) -> npt.NDArray[np.intp]:
    """Pair detections with blobs one to one: as many pairs as possible, the nearest in sum.

    Parameters
    ----------
    detections_xy, blobs_xy : ndarray, shape (n, 2), (m, 2)
        Places (px). One that is not finite has no partner.
    tolerance : float
        Largest distance within a pair (px).

    Returns
    -------
    ndarray, shape (number of pairs, 2), intp
        Index of the detection and of the blob, in order of the first.
    """
    from scipy.optimize import linear_sum_assignment

    detections, blobs = (
        np.reshape(np.asarray(xy, np.float64), (-1, 2)) for xy in (detections_xy, blobs_xy)
    )
    offset = detections[:, None] - blobs
    distance = np.nan_to_num(np.hypot(offset[..., 0], offset[..., 1]), nan=np.inf, posinf=np.inf)
    near = distance <= tolerance
    forbidden = (min(near.shape) + 1) * (tolerance + 1)  # dearer than any number of pairs
    rows, columns = linear_sum_assignment(np.where(near, distance, forbidden))
    return np.asarray(np.column_stack([rows, columns])[near[rows, columns]], dtype=np.intp)
