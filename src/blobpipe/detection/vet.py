"""Vet candidates: is one a new blob, a known one, what a shift left of one, or bad pixels?

Each reason for which a candidate is no new blob has a name and a function here; `REASONS` lists them
in the order in which they are asked. Their thresholds are the settings of the section ``vetting``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import bottleneck
import numpy as np

from blobpipe.core.arrays import FloatArray, Image, Mask
from blobpipe.core.cutouts import cut_square, distance_from
from blobpipe.detection.fit import CUT_HALF, CUT_SIDE, FOOTPRINT_MARGIN_PX
from blobpipe.images.pattern import SMOOTHING_PX
from blobpipe.images.stack import CELL_PX
from blobpipe.images.template import Template
from blobpipe.params import Vetting

if TYPE_CHECKING:
    import pandas as pd

DEFAULTS = Vetting()
PATTERN_HALF = 2  # half the side of the square in which the pattern is averaged (px)
MIN_SHARE = (
    0.02  # share of values among the neighbours below which a missing pixel is filled towards 0
)


class Fit(NamedTuple):
    """What is known of a candidate: place and radius (px), depth (fraction of the light), S/N."""

    x: float
    y: float
    radius: float
    depth: float
    snr: float


@dataclass(frozen=True)
class Evidence:
    """What candidates of one image are vetted with.

    Attributes
    ----------
    difference : ndarray, shape (ny, nx), float32
    template : Template
    known : ndarray, shape (n, 3)
        x, y, radius of the blobs of the catalogue (px).
    recent : ndarray, shape (n, 2)
        x, y of the new blobs of earlier images (px).
    shift : (float, float)
        Of the known blobs on this image (px).
    noise : float
        Standard deviation of a pixel (fraction of the light).
    params : Vetting
    """

    difference: Image
    template: Template
    known: FloatArray
    recent: FloatArray
    shift: tuple[float, float]
    noise: float
    params: Vetting


def vet_candidates(
    candidates: pd.DataFrame,
    difference: Image,
    template: Template,
    *,
    catalogue: pd.DataFrame | None = None,
    shift_px: tuple[float, float] = (0.0, 0.0),
    noise_frac: float,
    recent_px: FloatArray | None = None,
    params: Vetting = DEFAULTS,
) -> pd.DataFrame:
    """Say of each candidate whether it is a new blob, and if not, what else.

    Parameters
    ----------
    candidates : DataFrame
        From `fit.fit_blobs`.
    difference : ndarray, shape (ny, nx), float32
        The image on which they were fitted (fraction of the light).
    template : Template
        What was subtracted, as far as it is known.
    catalogue : DataFrame, optional
        x_px, y_px, radius_px of the blobs known before the image.
    shift_px : tuple of float
        By how much the known blobs of this image lie off their usual place, along x and y (px).
    noise_frac : float
        Standard deviation of a pixel (fraction of the light).
    recent_px : ndarray, shape (n, 2), optional
        Usual places (px) at which an earlier image has shown something new. The template is still
        learning it, so what its stack shows there does not count; its RMS map does, if it is of the
        images since.
    params : Vetting

    Returns
    -------
    DataFrame
        ``candidates`` with ``reason``, the name of the first of `REASONS` that holds (empty: none),
        and ``status``: ``bad_pixels``, ``dip`` (residual of the mirror's shift, ISR 2021-08
        section 6), ``known``, or else ``new``.
    """
    import pandas as pd

    columns = ["x_px", "y_px", "radius_px"]
    known = np.zeros((0, 3)) if catalogue is None else catalogue[columns].to_numpy(float)
    evidence = Evidence(
        difference=difference,
        template=template,
        known=known,
        recent=np.zeros((0, 2)) if recent_px is None else recent_px,
        shift=shift_px,
        noise=noise_frac,
        params=params,
    )
    fits = candidates[[*columns, "depth_frac", "snr"]].to_numpy(float)
    found = [first_reason(Fit(*fit), evidence) for fit in fits.tolist()]
    return candidates.assign(
        status=pd.Series([each.status for each in found], candidates.index, dtype=str),
        reason=pd.Series([each.name for each in found], candidates.index, dtype=str),
    )


class Reason(NamedTuple):
    """Why a candidate is no new blob: its name, the status that it gives, and its test."""

    name: str
    status: str
    holds: Callable[[Fit, Evidence], bool]


def first_reason(fit: Fit, evidence: Evidence) -> Reason:
    """Return the first reason that holds for a candidate; `NEW` if none does."""
    catalogued = is_catalogued(fit, evidence)
    # The stack is still learning the new blobs of earlier images.
    recent = _is_near((fit.x, fit.y), evidence.recent, evidence.shift, evidence.params.known_px)
    for reason in REASONS:
        if catalogued and reason.status == "bad_pixels":
            continue
        if recent and reason.name in LEARNT_SLOWLY:
            continue
        if reason.holds(fit, evidence):
            return reason
    return NEW


def is_too_sharp(fit: Fit, evidence: Evidence) -> bool:
    """Return whether it is sharper than a blob can be, or could not be fitted."""
    return not fit.radius >= evidence.params.min_radius_px


def has_hard_edges(fit: Fit, evidence: Evidence) -> bool:
    """Return whether smoothing takes more away than from a blob: bad pixels are not blurred."""
    from scipy.ndimage import gaussian_filter

    window, distance = _window_of(fit, evidence.difference)
    finite = np.isfinite(window)
    window = np.nan_to_num(window)

    # The rim of missing pixels is no edge: they are filled from their neighbours
    if not finite.all():
        share = gaussian_filter(finite.astype(np.float32), SMOOTHING_PX)
        nearby = gaussian_filter(window, SMOOTHING_PX) / np.maximum(share, MIN_SHARE)
        window = np.where(finite, window, nearby)

    once = gaussian_filter(window, SMOOTHING_PX)
    lost = window - once - gaussian_filter(window - once, SMOOTHING_PX)
    footprint = finite & (distance <= fit.radius + FOOTPRINT_MARGIN_PX)
    if not footprint.any():
        return False
    typical = 1.4826 * bottleneck.median(np.abs(lost[footprint]))
    of_noise = evidence.params.hard_edge_sigma * evidence.noise
    of_blob = evidence.params.hard_edge_frac * fit.depth
    return bool(typical > of_noise + of_blob)


def flickers_in_the_stack(fit: Fit, evidence: Evidence) -> bool:
    """Return whether the images of the stack vary at this place as strongly."""
    rms = evidence.template.rms
    if rms is None:
        return False
    params = evidence.params
    ring_px = params.rms_ring_px

    # Cells of the RMS map around the candidate, and their distance from it (px)
    half = int(np.ceil((fit.radius + ring_px[1]) / CELL_PX)) + 1
    column = (fit.x + 0.5) / CELL_PX - 0.5
    row = (fit.y + 0.5) / CELL_PX - 0.5
    left = round(column) - half
    top = round(row) - half
    window = cut_square(rms, left, top, 2 * half + 1)
    distance = CELL_PX * distance_from(column - left, row - top, 2 * half + 1)

    # The ring around it says what is usual here; cells without a value are 0.
    beyond = distance - fit.radius
    ring = window[(beyond > ring_px[0]) & (beyond <= ring_px[1]) & (window > 0)]
    if not len(ring):
        return False
    core_px = max(fit.radius - params.rms_core_margin_px, CELL_PX)
    core = float(bottleneck.nanmedian(window[distance <= core_px]))
    usual = float(bottleneck.median(ring))
    excess = np.sqrt(max(core**2 - usual**2, 0.0))
    is_higher = core > params.min_rms_ratio * np.percentile(ring, 75)
    return bool(is_higher and fit.depth < params.max_depth_over_rms * excess)


def lies_on_bad_stack_pixels(fit: Fit, evidence: Evidence) -> bool:
    """Return whether the stack's bad pixels take much of the footprint."""
    bad = evidence.template.bad_pixels
    if bad is None:
        return False
    window, distance = _window_of(fit, bad)
    footprint = window[(distance <= fit.radius) & np.isfinite(window)]
    return bool(len(footprint) and footprint.mean() >= evidence.params.max_bad_frac)


def is_bright_in_the_stack(fit: Fit, evidence: Evidence) -> bool:
    """Return whether the stack is bright at this place instead of the image dark.

    On a real pair of dates, all the strongest false peaks are clusters of bad pixels in the stack
    alone.
    """
    if evidence.template.stack is None:
        return False
    difference, distance = _window_of(fit, evidence.difference)
    stack, _ = _window_of(fit, evidence.template.stack)
    finite = np.isfinite(difference) & np.isfinite(stack)
    inside = finite & (distance <= fit.radius + FOOTPRINT_MARGIN_PX)
    around = finite & (distance > evidence.params.dip_reach_radii * fit.radius)
    if not (inside.any() and around.any()):
        return False

    # A pixel counts for no more than the fitted depth: a hot one explains one pixel.
    def mean_signal(window: Image) -> float:
        signal = window[inside] - bottleneck.median(window[around])
        return float(np.clip(signal, -fit.depth, fit.depth).mean())

    signal = mean_signal(difference)
    of_stack = mean_signal(stack)
    return signal > 0 and -of_stack > evidence.params.bright_stack_frac * signal


def has_a_counterpart(fit: Fit, evidence: Evidence) -> bool:
    """Return whether a negative crescent lies across a known blob: the other half of a dip."""
    params = evidence.params
    known = evidence.known
    apart = np.hypot(known[:, 0] - fit.x, known[:, 1] - fit.y)
    reach = params.dip_reach_radii * known[:, 2] + params.dip_margin_px
    near = known[apart <= reach] if np.isfinite(fit.radius) else known[:0]
    return any(
        _lies_across(fit, blob, evidence) or _moved_in_over_the_border(fit, blob, evidence)
        for blob in near
    )


def _moved_in_over_the_border(fit: Fit, blob: FloatArray, evidence: Evidence) -> bool:
    """Return whether the shift has moved a known blob that the border cuts towards the candidate.

    What lay beyond the border is not in the stack, so it cannot be subtracted.
    """
    params = evidence.params
    moved = np.asarray(evidence.shift)
    forward = float(np.subtract((fit.x, fit.y), blob[:2]) @ moved) > 0
    if not forward or float(np.hypot(*moved)) < params.hidden_shift_px:
        return False
    half = int(np.ceil(blob[2]))
    left = round(blob[0]) - half
    top = round(blob[1]) - half
    window = cut_square(evidence.difference, left, top, 2 * half + 1)
    disc = distance_from(blob[0] - left, blob[1] - top, 2 * half + 1) <= blob[2]
    return bool(np.isnan(window[disc]).mean() >= params.hidden_frac)


def _lies_across(fit: Fit, blob: FloatArray, evidence: Evidence) -> bool:
    """Return whether a negative signal lies across the centre of a known blob (x, y, radius)."""
    from scipy.ndimage import uniform_filter

    params = evidence.params
    reach = params.dip_reach_radii * blob[2] + params.dip_margin_px
    half = int(np.ceil(reach + fit.radius)) + 3
    left = round(blob[0]) - half
    top = round(blob[1]) - half
    place = (fit.x - left, fit.y - top)
    centre = (blob[0] - left, blob[1] - top)

    # Means over squares as large as crescents are wide, so that no single pixel decides
    window = cut_square(evidence.difference, left, top, 2 * half + 1)
    side = int(np.clip(round(blob[2] / 2), 1, 3)) * 2 + 1
    mean = uniform_filter(np.nan_to_num(window).clip(-1, 1), side, mode="constant")

    here = distance_from(*place, len(mean)) <= max(fit.radius, 2.0)
    across = distance_from(*centre, len(mean)) <= reach
    across &= _beyond(place, centre, len(mean))
    positive = float(mean[here].max(initial=0.0))
    negative = float(mean[across].min(initial=0.0))
    of_noise = params.min_counterpart_snr * evidence.noise / side
    return -negative >= max(params.min_counterpart * positive, of_noise)


def is_catalogued(fit: Fit, evidence: Evidence) -> bool:
    """Return whether a blob of the catalogue lies there, or lies there usually."""
    params = evidence.params
    within = np.maximum(params.known_px, params.known_radii * evidence.known[:, 2])
    return _is_near((fit.x, fit.y), evidence.known[:, :2], evidence.shift, within)


def is_in_the_pattern(fit: Fit, evidence: Evidence) -> bool:
    """Return whether the stack shows a blob there that is deeper: blobs vary by less than that."""
    pattern = evidence.template.pattern
    if pattern is None:
        return False
    x = round(fit.x) - PATTERN_HALF
    y = round(fit.y) - PATTERN_HALF
    window = cut_square(pattern, x, y, 2 * PATTERN_HALF + 1)
    return bool(np.nan_to_num(window).mean() >= fit.depth)


REASONS = (
    Reason("too_sharp", "bad_pixels", is_too_sharp),
    Reason("hard_edges", "bad_pixels", has_hard_edges),
    Reason("flicker", "bad_pixels", flickers_in_the_stack),
    Reason("bad_stack_pixels", "bad_pixels", lies_on_bad_stack_pixels),
    Reason("bright_stack", "bad_pixels", is_bright_in_the_stack),
    Reason("counterpart", "dip", has_a_counterpart),
    Reason("catalogued", "known", is_catalogued),
    Reason("in_pattern", "known", is_in_the_pattern),
)
NEW = Reason("", "new", lambda fit, evidence: True)
LEARNT_SLOWLY = ("bad_stack_pixels", "bright_stack")  # until half of a stack shows a new blob


def _is_near(
    place: tuple[float, float],
    others: FloatArray,
    shift_px: tuple[float, float],
    within_px: FloatArray | float,
) -> bool:
    """Return whether a place is that of a blob, as the mirror has moved it or as it usually lies."""
    return any(
        bool((np.hypot(*(others + moved - place).T) <= within_px).any())
        for moved in (shift_px, (0.0, 0.0))
    )


def _window_of(fit: Fit, image: Image | Mask) -> tuple[Image, FloatArray]:
    """Cut out an image around a candidate; return it and the distance of its pixels (px)."""
    left = round(fit.x) - CUT_HALF
    top = round(fit.y) - CUT_HALF
    distance = distance_from(fit.x - left, fit.y - top, CUT_SIDE)
    return cut_square(image, left, top, CUT_SIDE), distance


def _beyond(place: tuple[float, float], centre: tuple[float, float], side: int) -> Mask:
    """Mark pixels within 60 degrees of the direction from a place to a centre."""
    pixels = np.arange(side)
    x = pixels - place[0]
    y = (pixels - place[1])[:, None]
    along = np.subtract(centre, place)
    length = float(np.hypot(*along))
    return np.asarray((x * along[0] + y * along[1] >= 0.5 * length * np.hypot(x, y)) | (length < 1))
