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
from blobpipe.images.register import NEGLIGIBLE_PX, Shift, move_pattern
from blobpipe.images.stack import CELL_PX
from blobpipe.images.template import Template
from blobpipe.params import Vetting

if TYPE_CHECKING:
    import pandas as pd

DEFAULTS = Vetting()
PATTERN_HALF = 2  # half the side of the square in which the pattern is averaged (px)


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
    lit : ndarray, shape (ny, nx), bool
        Pixels of rows and columns that have any value.
    template : Template
    residual : ndarray, shape (ny, nx), float32, or None
        What the mirror's shift leaves of the known blobs in an image that was not registered.
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
    lit: Mask
    template: Template
    residual: Image | None
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
        lit=_lit(difference),
        template=template,
        residual=_shift_residual(template.pattern, shift_px) if len(candidates) else None,
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


def is_too_faint(fit: Fit, evidence: Evidence) -> bool:
    """Return whether the fit could be noise."""
    return not fit.snr >= evidence.params.min_snr


def lies_on_few_pixels(fit: Fit, evidence: Evidence) -> bool:
    """Return whether much of the footprint has no value, or a few pixels carry the signal."""
    place = (fit.x, fit.y, fit.radius)
    about = (evidence.difference, evidence.lit, evidence.noise)
    return _on_few_pixels(*place, *about, params=evidence.params)


def has_hard_edges(fit: Fit, evidence: Evidence) -> bool:
    """Return whether the signal is less blurred than any blob."""
    about = (fit.x, fit.y, fit.radius, fit.depth, evidence.difference, evidence.noise)
    return _hard(*about, params=evidence.params)


def flickers_in_the_stack(fit: Fit, evidence: Evidence) -> bool:
    """Return whether the images of the stack vary at this place as strongly."""
    rms = evidence.template.rms
    about = (fit.x, fit.y, fit.radius, fit.depth)
    return rms is not None and flickers(*about, rms, params=evidence.params)


def lies_on_bad_stack_pixels(fit: Fit, evidence: Evidence) -> bool:
    """Return whether the stack's bad pixels take much of the footprint."""
    bad = evidence.template.bad_pixels
    about = (fit.x, fit.y, fit.radius)
    return bad is not None and on_bad_pixels(*about, bad, params=evidence.params)


def is_bright_in_the_stack(fit: Fit, evidence: Evidence) -> bool:
    """Return whether the stack is bright at this place instead of the image dark."""
    stack = evidence.template.stack
    about = (fit.x, fit.y, fit.radius, fit.depth, evidence.difference)
    return stack is not None and is_of_the_stack(*about, stack, params=evidence.params)


def is_residual_of_the_shift(fit: Fit, evidence: Evidence) -> bool:
    """Return whether the measured shift of the mirror predicts the signal."""
    if evidence.residual is None or not np.isfinite(fit.radius):
        return False
    about = (fit.x, fit.y, fit.radius, evidence.difference, evidence.residual, evidence.noise)
    return _predicted(*about, params=evidence.params)


def has_a_counterpart(fit: Fit, evidence: Evidence) -> bool:
    """Return whether a negative crescent lies across a known blob: the other half of a dip."""
    if not np.isfinite(fit.radius):
        return False
    params = evidence.params
    known = evidence.known
    place = (fit.x, fit.y)
    apart = np.hypot(*(known[:, :2] - place).T)
    near = known[apart <= params.dip_reach_radii * known[:, 2] + params.dip_margin_px]
    about = (evidence.difference, evidence.noise)
    return any(_has_counterpart(place, fit.radius, each, *about, params=params) for each in near)


def is_catalogued(fit: Fit, evidence: Evidence) -> bool:
    """Return whether a blob of the catalogue lies there, or lies there usually."""
    params = evidence.params
    within = np.maximum(params.known_px, params.known_radii * evidence.known[:, 2])
    return _is_near((fit.x, fit.y), evidence.known[:, :2], evidence.shift, within)


def is_in_the_pattern(fit: Fit, evidence: Evidence) -> bool:
    """Return whether the stack shows a blob there that is deeper: blobs vary by less than that."""
    pattern = evidence.template.pattern
    return pattern is not None and _height(pattern, fit.x, fit.y) >= fit.depth


REASONS = (
    Reason("too_sharp", "bad_pixels", is_too_sharp),
    Reason("too_faint", "bad_pixels", is_too_faint),
    Reason("few_pixels", "bad_pixels", lies_on_few_pixels),
    Reason("hard_edges", "bad_pixels", has_hard_edges),
    Reason("flicker", "bad_pixels", flickers_in_the_stack),
    Reason("bad_stack_pixels", "bad_pixels", lies_on_bad_stack_pixels),
    Reason("bright_stack", "bad_pixels", is_bright_in_the_stack),
    Reason("shift_residual", "dip", is_residual_of_the_shift),
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


def _height(pattern: Image, x: float, y: float) -> float:
    """Return the mean light loss of the known blobs around a place."""
    window = cut_square(
        pattern, round(x) - PATTERN_HALF, round(y) - PATTERN_HALF, 2 * PATTERN_HALF + 1
    )
    return float(np.nan_to_num(window).mean())


def _shift_residual(pattern: Image | None, shift_px: tuple[float, float]) -> Image | None:
    """Return what a shift leaves of the known blobs in an image that was not registered."""
    shift = Shift(float(shift_px[0]), float(shift_px[1]))
    if pattern is None or not np.hypot(*shift) > NEGLIGIBLE_PX:
        return None
    return move_pattern(pattern, shift) - pattern


def _lit(difference: Image) -> Mask:
    """Mark pixels of rows and columns that have any value; the rest is the detector's border."""
    finite = np.isfinite(difference)
    return np.logical_and.outer(finite.any(axis=1), finite.any(axis=0))


def _on_few_pixels(
    x: float,
    y: float,
    radius: float,
    difference: Image,
    lit: Mask,
    noise: float,
    *,
    params: Vetting = DEFAULTS,
) -> bool:
    """Return whether a footprint lacks values, or its S/N without its highest pixels is low."""
    left = round(x) - CUT_HALF
    top = round(y) - CUT_HALF
    window = cut_square(difference, left, top, CUT_SIDE)
    distance = distance_from(x - left, y - top, CUT_SIDE)
    finite = np.isfinite(window)
    footprint = distance <= radius
    inside = footprint & (cut_square(lit.astype(np.float32), left, top, CUT_SIDE) > 0)
    if (inside & ~finite).sum() >= params.max_bad_frac * inside.sum():
        return True
    around = window[finite & ~(distance < params.dip_reach_radii * radius)]
    level = bottleneck.median(around) if len(around) else 0.0
    return bool(
        _trimmed_snr((window[inside & finite] - level) / noise, params=params) < params.min_snr
    )


def _hard(
    x: float,
    y: float,
    radius: float,
    depth: float,
    difference: Image,
    noise: float,
    *,
    params: Vetting = DEFAULTS,
) -> bool:
    """Return whether smoothing takes more away than from a blob: bad pixels are not blurred."""
    from scipy.ndimage import gaussian_filter

    left = round(x) - CUT_HALF
    top = round(y) - CUT_HALF
    window = np.nan_to_num(cut_square(difference, left, top, CUT_SIDE))
    once = gaussian_filter(window, SMOOTHING_PX)
    lost = window - once - gaussian_filter(window - once, SMOOTHING_PX)
    edge = distance_from(x - left, y - top, CUT_SIDE) <= radius + FOOTPRINT_MARGIN_PX
    return bool(
        1.4826 * bottleneck.median(np.abs(lost[edge]))
        > params.hard_edge_sigma * noise + params.hard_edge_frac * depth
    )


def flickers(
    x: float, y: float, radius: float, depth: float, scatter: Image, *, params: Vetting = DEFAULTS
) -> bool:
    """Return whether a footprint's core varies more than its surroundings, and enough.

    Parameters
    ----------
    x, y, radius : float
        Of a detection (px).
    depth : float
        In the unit of ``scatter``.
    scatter
        As in `vet.vet_candidates`.
    """
    cell = CELL_PX
    half = int(np.ceil((radius + params.rms_ring_px[1]) / cell)) + 1
    column, row = ((at + 0.5) / cell - 0.5 for at in (x, y))
    left = round(column) - half
    top = round(row) - half
    window = cut_square(scatter, left, top, 2 * half + 1)
    distance = cell * distance_from(column - left, row - top, 2 * half + 1)
    around = window[
        (distance > radius + params.rms_ring_px[0])
        & (distance <= radius + params.rms_ring_px[1])
        & (window > 0)
    ]
    if not len(around):
        return False
    middle = float(
        bottleneck.nanmedian(window[distance <= max(radius - params.rms_core_margin_px, cell)])
    )
    excess = np.sqrt(max(middle**2 - float(bottleneck.median(around)) ** 2, 0.0))
    return bool(
        middle > params.min_rms_ratio * np.percentile(around, 75)
        and depth < params.max_depth_over_rms * excess
    )


def on_bad_pixels(
    x: float, y: float, radius: float, bad: Mask, *, params: Vetting = DEFAULTS
) -> bool:
    """Return whether much of a footprint (px) is bad.

    Parameters
    ----------
    bad
        As in `vet.vet_candidates`.
    """
    left = round(x) - CUT_HALF
    top = round(y) - CUT_HALF
    window = cut_square(bad, left, top, CUT_SIDE)
    footprint = (distance_from(x - left, y - top, CUT_SIDE) <= radius) & np.isfinite(
        window
    )  # as far as it is on the image
    return bool(footprint.any() and window[footprint].mean() >= params.max_bad_frac)


def is_of_the_stack(
    x: float,
    y: float,
    radius: float,
    depth: float,
    difference: Image,
    stack: Image,
    *,
    params: Vetting = DEFAULTS,
) -> bool:
    """Return whether a signal comes from a bright stack and not from a dark image.

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
    On a real pair of other dates, all highest false peaks are clusters of bad pixels in the stack alone.
    """
    left = round(x) - CUT_HALF
    top = round(y) - CUT_HALF
    distance = distance_from(x - left, y - top, CUT_SIDE)
    inside = distance <= radius
    around = distance > params.dip_reach_radii * radius
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
    return bool(signal > 0 and -of_stack > params.bright_stack_frac * signal)


def _trimmed_snr(values: FloatArray, *, params: Vetting = DEFAULTS) -> float:
    """Return the S/N of a sum without its few highest and lowest values."""
    few = min(params.trimmed_px, len(values) // params.trimmed_share)
    return float(np.sort(values)[few : len(values) - few].mean() * np.sqrt(len(values)))


def _predicted(
    x: float,
    y: float,
    radius: float,
    difference: Image,
    residual: Image,
    noise: float,
    *,
    params: Vetting = DEFAULTS,
) -> bool:
    """Return whether the shift predicts the signal, and its negative lobe is there too."""
    left = round(x) - CUT_HALF
    top = round(y) - CUT_HALF
    window, expected = (cut_square(image, left, top, CUT_SIDE) for image in (difference, residual))
    both = np.isfinite(window) & np.isfinite(expected)
    footprint = both & (distance_from(x - left, y - top, CUT_SIDE) <= radius)
    if not expected[footprint].sum() > params.explained_frac * window[footprint].sum():
        return False
    negative = both & (expected < params.negative_lobe_frac * np.nanmin(expected))
    deepest = float(-np.nanmin(expected)) + 3 * noise
    found = window[negative].clip(-deepest, deepest)
    return bool(
        found @ expected[negative]
        > params.min_negative_lobe * np.sum(np.square(expected[negative]))
    )


def _has_counterpart(
    place: tuple[float, float],
    radius: float,
    blob: FloatArray,
    difference: Image,
    noise: float,
    *,
    params: Vetting = DEFAULTS,
) -> bool:
    """Return whether a negative signal lies across the centre of a known blob."""
    from scipy.ndimage import uniform_filter

    reach = params.dip_reach_radii * blob[2] + params.dip_margin_px
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
    return -across >= max(
        params.min_counterpart * height, params.min_counterpart_snr * noise / side
    )


def _beyond(place: tuple[float, float], centre: tuple[float, float], side: int) -> Mask:
    """Mark pixels within 60 degrees of the direction from a place to a centre."""
    pixels = np.arange(side)
    x = pixels - place[0]
    y = (pixels - place[1])[:, None]
    along = np.subtract(centre, place)
    length = float(np.hypot(*along))
    return np.asarray((x * along[0] + y * along[1] >= 0.5 * length * np.hypot(x, y)) | (length < 1))
