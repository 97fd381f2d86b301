"""Match detections with each other, with blobs, and with those of other images."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from blobpipe.core.arrays import FloatArray

# Largest distance of a detection from the centre of the blob that it finds, unless the radius is larger (px)
NEAR_PX = 6.0

# Distance within which two detections are of one blob; larger than the errors of the fit (px)
KNOWN_PX = 3.0


def near_blobs(found: pd.DataFrame, blobs: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """Return which detections lie within 6 px, or within the radius, of which blobs.

    Parameters
    ----------
    found : DataFrame
        x_px, y_px.
    blobs : DataFrame
        x_px, y_px, radius_px.

    Returns
    -------
    ndarray of bool, shape (number of detections, number of blobs)
    """
    x_offset = found["x_px"].to_numpy()[:, None] - blobs["x_px"].to_numpy(float)
    y_offset = found["y_px"].to_numpy()[:, None] - blobs["y_px"].to_numpy(float)
    distance = np.hypot(x_offset, y_offset)
    reach = np.maximum(NEAR_PX, blobs["radius_px"].to_numpy(float))
    return np.asarray(distance <= reach)


def without_repeats(detections: pd.DataFrame, within_px: float = KNOWN_PX) -> pd.DataFrame:
    """Drop detections within a few pixels of an earlier one, because a large blob may have two peaks.

    Parameters
    ----------
    detections : DataFrame
        From `fit.fit_blobs`, the highest score first.
    within_px : float
        Distance within which two detections are of one blob (px).
    """
    places = detections[["x_px", "y_px"]].to_numpy(float)
    offset = places[:, None] - places
    apart = np.hypot(offset[..., 0], offset[..., 1])
    kept: list[int] = []
    for k in range(len(places)):
        if not (apart[k, kept] <= within_px).any():
            kept.append(k)
    return detections.iloc[kept].reset_index(drop=True)


def mark_seen_again(
    previous: pd.DataFrame, current: pd.DataFrame, tolerance_px: float = 3.0
) -> pd.DataFrame:
    """Mark new blobs that a later image shows again, because a blob neither moves nor vanishes.

    Parameters
    ----------
    previous, current : DataFrame
        From `vet.vet_candidates`, for an image and for a later one.
    tolerance_px : float
        Largest distance between the two places (px).

    Returns
    -------
    DataFrame
        ``previous``, with the status ``seen_again`` for each new blob that has a partner in ``current`` which is not
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


def pair(
    detections_xy: FloatArray, blobs_xy: FloatArray, tolerance_px: float
) -> npt.NDArray[np.intp]:
    """Pair detections with blobs one to one: as many pairs as possible, with the smallest sum of distances.

    Parameters
    ----------
    detections_xy, blobs_xy : ndarray, shape (n, 2), (m, 2)
        Places (px). A place that is not finite has no partner.
    tolerance_px : float
        Largest distance within a pair (px).

    Returns
    -------
    ndarray, shape (number of pairs, 2), intp
        Index of the detection and of the blob, in order of the first.
    """
    from scipy.optimize import linear_sum_assignment

    detections = np.reshape(np.asarray(detections_xy, np.float64), (-1, 2))
    blobs = np.reshape(np.asarray(blobs_xy, np.float64), (-1, 2))
    offset = detections[:, None] - blobs
    distance = np.hypot(offset[..., 0], offset[..., 1])
    distance = np.nan_to_num(distance, nan=np.inf, posinf=np.inf)
    near = distance <= tolerance_px

    # One forbidden pair costs more than any number of allowed ones
    forbidden = (min(near.shape) + 1) * (tolerance_px + 1)
    cost = np.where(near, distance, forbidden)
    rows, columns = linear_sum_assignment(cost)
    pairs = np.column_stack([rows, columns])
    return np.asarray(pairs[near[rows, columns]], dtype=np.intp)
