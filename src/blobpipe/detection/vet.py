"""Vet detections: is one a new blob, a known one, what a shift left of one, or bad pixels?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import bottleneck
import numpy as np

from blobpipe.core.arrays import FloatArray, Image, Mask
from blobpipe.core.cutouts import cut_square, distance_from
from blobpipe.detection.fit import (
    CUT_HALF,
    CUT_SIDE,
    FOOTPRINT_MARGIN_PX,
)
from blobpipe.detection.match import KNOWN_PX
from blobpipe.images.noise import clean_noise
from blobpipe.images.pattern import SMOOTHING_PX
from blobpipe.images.register import NEGLIGIBLE_PX, Shift, move_pattern
from blobpipe.images.stack import CELL_PX

if TYPE_CHECKING:
    import pandas as pd
KNOWN_RADII = 0.5  # nor by so much of the known one's radius
KNOWN_HALF = 2  # the middle of a blob, of any size
# of the signal predicted by the shift; a shift is known to better than half of itself
EXPLAINED = 0.5
# of the predicted negative side is there, or the shift has been taken off already
MIN_NEGATIVE_LOBE = 0.4
RING_PX = (4.0, 8.0)  # around a footprint: what its scatter is compared with
EDGE_PX = 1.6  # a cluster of bad pixels is smaller than the blob that is fitted to it
# times the scatter that a quarter of the surroundings exceed, streaks and single bad pixels among
# them
MIN_RMS_RATIO = 1.2
# times the scatter: one outburst on 27 images is 5 of its own; chosen on simulated images of both
# kinds
MAX_DEPTH_OVER_RMS = 10.0
DARK_SIDE = 0.25  # what is above this part of the deepest is too faint to be a witness
DIP_REACH = 1.5  # radii of the known blob, within which its crescents lie
DIP_MARGIN_PX = 3.0  # and the largest shift that leaves two crescents and not two blobs
# the two crescents are alike; noise next to a new blob is not
COUNTERPART = 0.5
COUNTERPART_SNR = 3.0
SMALLEST_RADIUS_PX = 1.5  # a blob is blurred to more
# the largest cluster of bad pixels, but no more than a sixth of a small blob
FEW_PIXELS = 8
FEW_SHARE = 6
REST_SNR = 3.0  # what is fainter without them could be noise
# no simulated blob loses so much; clusters of 3 x 3 to 7 x 7 do
HARD_SIGMA = 1.3
HARD_FRAC = 0.13
# no good pixel of a stack lies so far off; blobs have soft edges
UNEXPLAINED_SIGMA = 5.0
UNEXPLAINED_FRAC = 0.3
# of the signal: where the stack is so much brighter than around, the image itself is not dark
OF_STACK = 0.5
MOST_MISSING = 1 / 3  # of a footprint without values, or bad; what is left does not make a blob


def vet(
    detections: pd.DataFrame,
    difference: Image,
    *,
    catalogue: pd.DataFrame | None,
    shift_px: tuple[float, float],
    pattern: Image | None,
    noise_frac: float,
    scatter: Image | None = None,
    bad: Mask | None = None,
    stack: Image | None = None,
    seen: FloatArray | None = None,
) -> pd.DataFrame:
    """Say of each detection whether it is a new blob, and if not, what else.

    Parameters
    ----------
    detections : DataFrame
        From `measure`.
    difference : ndarray, shape (ny, nx), float32
        The image that they were measured on.
    catalogue : DataFrame, optional
        x_px, y_px, radius_px of the blobs known before the image.
    shift_px : tuple of float
        How far the blobs of this image were found off their usual place, along x and y.
    pattern : ndarray, shape (ny, nx), float32, optional
        Light loss of the known blobs, from `pattern.blob_pattern`.
    noise_frac : float
        Standard deviation of a pixel (fraction of the light).
    scatter : ndarray, shape (ny // 2, nx // 2), float32, optional
        Of the stack's images, from `stack.rms_map`.
    bad : ndarray, shape (ny, nx), bool, optional
        Pixels that are known to be bad, from `bad_pixels`.
    stack : ndarray, shape (ny, nx), float32, optional
        What was subtracted (fraction of the light).
    seen : ndarray, shape (n, 2), optional
        Usual places (px) at which an earlier image has shown something new. The stack is still learning it, so that what
        ``bad`` and ``stack`` say there does not count; ``scatter`` does, if it is of the images since.

    Returns
    -------
    DataFrame
        ``detections`` with ``status``: ``bad_pixels`` (a few pixels or hard edges carry the signal, too few are left, many
        are known to be bad, the stack's images flicker at this place as strongly, or the stack is bright there instead of the
        image dark; never near a blob of the catalogue), ``dip`` (what a
        shift has left of a known blob), ``known`` (near one of the catalogue, or on one of the pattern that is deeper than
        the detection: blobs vary by less than themselves), or else ``new``.

    Notes
    -----
    Source: ours; dips are the report's main false alarms (ISR 2021-08 section 6).
    """
    import pandas as pd

    residual = _shift_residual(pattern, shift_px) if len(detections) else None
    lit = _lit(difference)
    known = (
        np.zeros((0, 3))
        if catalogue is None
        else catalogue[["x_px", "y_px", "radius_px"]].to_numpy(float)
    )
    places = detections[["x_px", "y_px", "radius_px", "depth_frac", "snr"]].to_numpy(float)
    status = []
    for x, y, radius, depth, snr in places.tolist():
        catalogued = _is_near(
            (x, y), known[:, :2], shift_px, np.maximum(KNOWN_PX, KNOWN_RADII * known[:, 2])
        )
        learning = seen is not None and _is_near((x, y), seen, shift_px, KNOWN_PX)
        of_stack = (scatter, None, None) if learning else (scatter, bad, stack)
        if not catalogued and _is_bad(
            (x, y, radius, depth, snr), difference, lit, noise_frac, *of_stack
        ):
            status.append("bad_pixels")
        elif _is_dip((x, y), radius, known, difference, residual, noise_frac):
            status.append("dip")
        elif catalogued or (pattern is not None and _height(pattern, x, y) >= depth):
            status.append("known")
        else:
            status.append("new")
    return detections.assign(status=pd.Series(status, detections.index, dtype=str))


def _is_near(
    place: tuple[float, float],
    others: FloatArray,
    shift_px: tuple[float, float],
    within_px: FloatArray | float,
) -> bool:
    """Whether a place of an image is that of a blob, where the mirror has put it or where it usually is."""
    return any(
        bool((np.hypot(*(others + moved - place).T) <= within_px).any())
        for moved in (shift_px, (0.0, 0.0))
    )


def _is_bad(
    fit: tuple[float, float, float, float, float],
    difference: Image,
    lit: Mask,
    noise: float,
    scatter: Image | None,
    bad: Mask | None,
    stack: Image | None,
) -> bool:
    """Whether bad pixels, of the image or of the stack, explain a fit: its x, y, radius, depth and S/N."""
    x, y, radius, depth, snr = fit
    return (
        not (radius >= SMALLEST_RADIUS_PX and snr >= REST_SNR)
        or _on_few_pixels(x, y, radius, difference, lit, noise)
        or _hard(x, y, radius, depth, difference, noise)
        or (scatter is not None and flickers(x, y, radius, depth, scatter))
        or (bad is not None and on_bad_pixels(x, y, radius, bad))
        or (stack is not None and is_of_the_stack(x, y, radius, depth, difference, stack))
    )


def _is_dip(
    place: tuple[float, float],
    radius: float,
    known: FloatArray,
    difference: Image,
    residual: Image | None,
    noise: float,
) -> bool:
    """Whether a shift has left it of a known blob."""
    if not np.isfinite(radius):
        return False
    if residual is not None and _predicted(*place, radius, difference, residual, noise):
        return True
    apart = np.hypot(*(known[:, :2] - place).T)
    near = known[apart <= DIP_REACH * known[:, 2] + DIP_MARGIN_PX]
    return any(_has_counterpart(place, radius, blob, difference, noise) for blob in near)


def _height(pattern: Image, x: float, y: float) -> float:
    """Mean light loss of the known blobs around a place."""
    window = cut_square(pattern, round(x) - KNOWN_HALF, round(y) - KNOWN_HALF, 2 * KNOWN_HALF + 1)
    return float(np.nan_to_num(window).mean())


def _shift_residual(pattern: Image | None, shift_px: tuple[float, float]) -> Image | None:
    """What the known blobs leave in a difference image whose shift has not been taken off."""
    shift = Shift(float(shift_px[0]), float(shift_px[1]))
    if pattern is None or not np.hypot(*shift) > NEGLIGIBLE_PX:
        return None
    return move_pattern(pattern, shift) - pattern


def _lit(difference: Image) -> Mask:
    """Pixels of rows and columns that have any value: the rest is the detector's border, and no fault."""
    finite = np.isfinite(difference)
    return np.logical_and.outer(finite.any(axis=1), finite.any(axis=0))


def _on_few_pixels(
    x: float, y: float, radius: float, difference: Image, lit: Mask, noise: float
) -> bool:
    """Whether too much of a footprint has no value, or nothing is left without its few highest pixels."""
    left = round(x) - CUT_HALF
    top = round(y) - CUT_HALF
    window = cut_square(difference, left, top, CUT_SIDE)
    distance = distance_from(x - left, y - top, CUT_SIDE)
    finite = np.isfinite(window)
    footprint = distance <= radius
    inside = footprint & (cut_square(lit.astype(np.float32), left, top, CUT_SIDE) > 0)
    if (inside & ~finite).sum() >= MOST_MISSING * inside.sum():
        return True
    around = window[finite & ~(distance < DIP_REACH * radius)]
    level = bottleneck.median(around) if len(around) else 0.0
    return bool(_trimmed_snr((window[inside & finite] - level) / noise) < REST_SNR)


def _hard(x: float, y: float, radius: float, depth: float, difference: Image, noise: float) -> bool:
    """Whether smoothing takes more away than from a blob: bad pixels are not blurred."""
    from scipy.ndimage import gaussian_filter

    left = round(x) - CUT_HALF
    top = round(y) - CUT_HALF
    window = np.nan_to_num(cut_square(difference, left, top, CUT_SIDE))
    once = gaussian_filter(window, SMOOTHING_PX)
    lost = window - once - gaussian_filter(window - once, SMOOTHING_PX)
    edge = distance_from(x - left, y - top, CUT_SIDE) <= radius + FOOTPRINT_MARGIN_PX
    return bool(
        1.4826 * bottleneck.median(np.abs(lost[edge])) > HARD_SIGMA * noise + HARD_FRAC * depth
    )


def flickers(x: float, y: float, radius: float, depth: float, scatter: Image) -> bool:
    """Whether the middle of a footprint has varied more than its surroundings, and enough to explain the signal.

    Parameters
    ----------
    x, y, radius : float
        Of a detection (px).
    depth : float
        In the unit of ``scatter``.
    scatter
        As in `judge`.
    """
    cell = CELL_PX
    half = int(np.ceil((radius + RING_PX[1]) / cell)) + 1
    column, row = ((at + 0.5) / cell - 0.5 for at in (x, y))
    left = round(column) - half
    top = round(row) - half
    window = cut_square(scatter, left, top, 2 * half + 1)
    distance = cell * distance_from(column - left, row - top, 2 * half + 1)
    around = window[
        (distance > radius + RING_PX[0]) & (distance <= radius + RING_PX[1]) & (window > 0)
    ]
    if not len(around):
        return False
    middle = float(bottleneck.nanmedian(window[distance <= max(radius - EDGE_PX, cell)]))
    excess = np.sqrt(max(middle**2 - float(bottleneck.median(around)) ** 2, 0.0))
    return bool(
        middle > MIN_RMS_RATIO * np.percentile(around, 75) and depth < MAX_DEPTH_OVER_RMS * excess
    )


def bad_pixels(stack: Image, pattern: Image) -> Mask:
    """What of a median stack neither its noise nor the known blobs explain: clusters that read high or low on most days.

    On a day on which such a cluster reads otherwise it looks like a small blob.

    Parameters
    ----------
    stack : ndarray, shape (ny, nx), float32
        Median stack (fraction of the light).
    pattern : ndarray, shape (ny, nx), float32
        Its known blobs, from `pattern.blob_pattern`.

    Returns
    -------
    ndarray, shape (ny, nx), bool
        Pixels without a value are not among them.

    Notes
    -----
    Source: ours.
    """
    noise = clean_noise(stack)
    return np.asarray(
        np.abs(stack - pattern) > UNEXPLAINED_SIGMA * noise + UNEXPLAINED_FRAC * np.abs(pattern)
    )


def on_bad_pixels(x: float, y: float, radius: float, bad: Mask) -> bool:
    """Whether too much of a footprint (px) is known to be bad.

    Parameters
    ----------
    bad
        As in `judge`.
    """
    left = round(x) - CUT_HALF
    top = round(y) - CUT_HALF
    window = cut_square(bad, left, top, CUT_SIDE)
    footprint = (distance_from(x - left, y - top, CUT_SIDE) <= radius) & np.isfinite(
        window
    )  # as far as it is on the image
    return bool(footprint.any() and window[footprint].mean() >= MOST_MISSING)


def is_of_the_stack(
    x: float, y: float, radius: float, depth: float, difference: Image, stack: Image
) -> bool:
    """Whether a signal is there because the stack is bright, and not because the image is dark, as a blob makes it.

    Parameters
    ----------
    x, y, radius : float
        Of a detection (px).
    depth : float
        In the unit of ``difference``. What lies farther off than this counts as no more: a hot pixel explains one pixel.
    difference, stack : ndarray, shape (ny, nx), float32
        What was left by subtraction, and what was subtracted, in the same unit.

    Notes
    -----
    Source: ours. On a real pair of other dates, all highest false peaks are clusters of bad pixels in the stack alone.
    """
    left = round(x) - CUT_HALF
    top = round(y) - CUT_HALF
    distance = distance_from(x - left, y - top, CUT_SIDE)
    inside = distance <= radius
    around = distance > DIP_REACH * radius
    both = [cut_square(image, left, top, CUT_SIDE) for image in (difference, stack)]
    finite: Mask = np.isfinite(both[0]) & np.isfinite(both[1])
    if not (finite[inside].any() and finite[around].any()):
        return False
    signal, of_stack = (
        np.clip(
            window[inside & finite] - bottleneck.median(window[around & finite]), -depth, depth
        ).mean()
        for window in both
    )
    return bool(signal > 0 and -of_stack > OF_STACK * signal)


def _trimmed_snr(values: FloatArray) -> float:
    """S/N of a sum, without the few highest and as many of the lowest values, had those been like the rest."""
    few = min(FEW_PIXELS, len(values) // FEW_SHARE)
    return float(np.sort(values)[few : len(values) - few].mean() * np.sqrt(len(values)))


def _predicted(
    x: float, y: float, radius: float, difference: Image, residual: Image, noise: float
) -> bool:
    """Whether the shift predicts much of the signal, and the negative side that belongs to it is there too."""
    left = round(x) - CUT_HALF
    top = round(y) - CUT_HALF
    window, expected = (cut_square(image, left, top, CUT_SIDE) for image in (difference, residual))
    both = np.isfinite(window) & np.isfinite(expected)
    footprint = both & (distance_from(x - left, y - top, CUT_SIDE) <= radius)
    if not expected[footprint].sum() > EXPLAINED * window[footprint].sum():
        return False
    dark = both & (expected < DARK_SIDE * np.nanmin(expected))
    deepest = float(-np.nanmin(expected)) + 3 * noise
    found = window[dark].clip(-deepest, deepest)
    return bool(found @ expected[dark] > MIN_NEGATIVE_LOBE * np.sum(np.square(expected[dark])))


def _has_counterpart(
    place: tuple[float, float], radius: float, blob: FloatArray, difference: Image, noise: float
) -> bool:
    """Whether a negative signal of comparable size lies beyond the centre of a known blob, seen from a detection."""
    from scipy.ndimage import uniform_filter

    reach = DIP_REACH * blob[2] + DIP_MARGIN_PX
    half = int(np.ceil(reach + radius)) + 3
    left = round(blob[0]) - half
    top = round(blob[1]) - half
    (x, y) = np.subtract(place, (left, top))
    (blob_x, blob_y) = np.subtract(blob[:2], (left, top))
    side = int(np.clip(round(blob[2] / 2), 1, 3)) * 2 + 1
    window = np.nan_to_num(cut_square(difference, left, top, 2 * half + 1)).clip(-1, 1)
    mean = uniform_filter(window, side, mode="constant")
    height = float(mean[distance_from(x, y, len(mean)) <= max(radius, 2.0)].max(initial=0.0))
    near = distance_from(blob_x, blob_y, len(mean)) <= reach
    across = float(mean[near & _beyond((x, y), (blob_x, blob_y), len(mean))].min(initial=0.0))
    return -across >= max(COUNTERPART * height, COUNTERPART_SNR * noise / side)


def _beyond(place: tuple[float, float], centre: tuple[float, float], side: int) -> Mask:
    """Pixels within 60 degrees of the direction from a place to a centre; all, where the two are nearly the same."""
    pixels = np.arange(side)
    x = pixels - place[0]
    y = (pixels - place[1])[:, None]
    along = np.subtract(centre, place)
    length = float(np.hypot(*along))
    return np.asarray((x * along[0] + y * along[1] >= 0.5 * length * np.hypot(x, y)) | (length < 1))
