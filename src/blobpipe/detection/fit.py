"""Fit a blob at each peak: place, radius and depth, with errors.

Model
-----
On a cut-out of 33 x 33 pixels around a peak, in units of the noise, a blob of shape s is

    m_i = b + d P_s(x_i - x, y_i - y; r)

with five parameters: the centre x, y and the radius r (px), the depth d and the background b (units
of the noise). P_s is the profile of `core.blob_shapes`, 1 at its highest point, so d is the highest
point of the light loss, as in the catalogue. P_s is tabulated as a sum of cosines,

    P_s(u, v; r) = sum_kl A_kl(r) cos(w_k u) cos(w_l v),    w_k = 2 pi k / 49 px,   k, l < 28,

whose amplitudes are cubic splines of the radius: profile and derivatives are four products of small
matrices each.

Derivatives
-----------
    dm/dx = d sum A_kl w_k sin(w_k u) cos(w_l v)        dm/dd = P_s
    dm/dy = d sum A_kl cos(w_k u) w_l sin(w_l v)        dm/db = 1
    dm/dr = d sum A'_kl(r) cos(w_k u) cos(w_l v)

Least squares
-------------
Minimised over the good pixels by Levenberg's and Marquardt's method, within 8 px of the start:

    chi2_s = sum_i (v_i - m_i)^2 + ((r - r_u) / s_u)^2 - 2 ln p_s

The usual radius r_u and its spread s_u are those of the law of sizes at the peak, or 5.7 and 2.5 px where
no law is known: the spread is twice the measured one. p_s is the prior of the shape.

A faint blob has several minima: its noise has small spots, and a part of it may be taken for a smaller
one. Fits therefore start from the discs that explain most, of several radii and at any pixel around the peak,
and of each shape the best is kept.

Correlated noise
----------------
Where the noise is correlated, the image has been whitened, and the model is whitened too: whitening
multiplies a wave by a factor, so A_kl becomes W_kl A_kl (`noise.whiten.NoiseModel.transfer`). The
depth is still that of the blob itself. Where the noise varies over the detector, depth and light loss
are multiplied by its local scale.

Within 24 px of where outputs that share noise meet, whitening also mirrors the blob, each output its own
part, and W_kl is only near to that. There the blob that has been fitted is whitened as the image has been, the
difference from the model is subtracted from the image, and the blob is fitted again.

Averaging over shapes
---------------------
Where the noise hides the shape, the results are averaged. With f^2 = max(chi2_min / (n - 5), 1), the
factor by which errors are widened where no shape fits, the weights are

    w_s ~ exp(-(chi2_s - chi2_min) / (2 f^2)),

a result is sum_s w_s q_s, and its variance sum_s w_s (f^2 (N_s^-1)_qq + (q_s - mean)^2), where N_s is
the normal matrix: the spread between shapes is part of the error. S/N = sum_s w_s d_s (N_s)_dd^(1/2)
is that of a matched filter. A fit follows the noise to a depth that is too high: it is lowered by
3 / (S/N)^2 of itself, and errors of place and radius are widened by (1 + 25 / (S/N)^2)^(1/2); both
were found on simulated blobs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import bottleneck
import numba as nb
import numpy as np

from blobpipe.core import blob_shapes, fits_images
from blobpipe.core.arrays import FloatArray, Image, Mask
from blobpipe.core.cutouts import cut_square, distance_from
from blobpipe.detection.size_law import LEAST_SCATTER, SizeLaw
from blobpipe.noise.whiten import WHITE, NoiseModel

if TYPE_CHECKING:
    import pandas as pd

DETECTION_COLUMNS = (
    *(
        "x_px",
        "y_px",
        "x_err_px",
        "y_err_px",
        "radius_px",
        "radius_err_px",
        "depth_frac",
        "depth_err_frac",
    ),
    *("loss_frac_px2", "snr", "score", "status"),
)
MEASURED = len(DETECTION_COLUMNS) - 2

X, Y, RADIUS, DEPTH, BACKGROUND = range(5)  # of the parameters

CUT_HALF = 16  # a cut-out of 33 x 33 px holds the largest blob and some background
CUT_SIDE = 2 * CUT_HALF + 1
FOOTPRINT_MARGIN_PX = 1.5  # beyond the radius, what belongs to a blob's edge
FEWEST_PIXELS = 60  # fewer good pixels do not hold five parameters and a background
FARTHEST_PX = 8.0  # a peak of the search is nearer to its blob than this
# peaks nearer than this lie on one blob; beyond it, each keeps the pixels nearest to it
NEIGHBOUR_PX = 15.0
# noise, and the top of the smallest blob, lie nearer to the median around them
OUTLIER_SIGMA = 5.0
OUTLIER_FRAC = 0.5
# off the mean around it, a pixel may be an outlier: one of a cluster of eight lifts the mean
SUSPECT_SIGMA = 3.0

# of the tabulated shapes: from less than a bad pixel's to more than a blob's
RADII_PX = np.linspace(0.7, 12.7, 25)
FIRST_RADII = (4, 6, 9, 13, 18)  # of these are tried before the fit: 2.7, 3.7, 5.2, 7.2 and 9.7 px
PERIOD_PX = 49  # of the cosines that make up a shape: neither blob nor cut-out reaches around it
HIGHEST = 28  # so many of their frequencies: blur and pixels leave next to nothing beyond
RADIANS_PER_PX = 2 * np.pi / PERIOD_PX * np.arange(HIGHEST)
FREQUENCIES = RADIANS_PER_PX.astype(np.float32)
PHASES = np.multiply.outer(RADIANS_PER_PX, np.arange(CUT_SIDE))
COSINES = np.cos(PHASES).astype(np.float32)  # shape (HIGHEST, CUT_SIDE)
SINES = np.sin(PHASES).astype(np.float32)
WAVES = np.concatenate([COSINES, SINES])

# The scatter of radii is widened by this: a prior is to say where to look, not what is found
WIDER = 2.0

# Fits are started from so many discs at most, and from those that explain less than the best by up to this chi
# square: a fit moves a disc by less than a pixel, which is worth that
MOST_STARTS = 3
WORTH_A_FIT = 4.0

STEPS = 10  # of a fit at most; four are the rule
ENOUGH = 0.1  # a step that gains less chi square than this is the last
# or less than so much of what a shape lags behind the best: it will have no weight
STOP_IF_WORSE = 0.1
# prior of each shape: evens out what a wrong one does to the depth of faint blobs
SHAPE_SHARES = (0.35, 0.45, 0.2)
# of the depth, rms: so far a blob may differ from the shapes that are fitted; allowed, not
# measured
OTHER_SHAPES = 0.15
# place and radius follow the noise and deepen the fit by this over the squared S/N: simulated
NOISE_FITTED = 3.0
# their own variances grow by this over the squared S/N, beyond what slopes tell: simulated
WANDERING = 25.0


class Usual(NamedTuple):
    """Radii of blobs where a peak lies, as a prior: the usual one and its spread (px)."""

    radius_px: float
    spread_px: float


# All over the detector; the spread is twice the measured one
ANYWHERE = Usual(5.7, 2.5)


class Result(NamedTuple):
    """What a fit gives, on the cut-out (px) and in units of the noise; errors are 1 sigma."""

    x: float
    y: float
    x_err: float
    y_err: float
    radius: float
    radius_err: float
    depth: float
    depth_err: float
    loss: float  # sum of the profile
    snr: float


class Cut(NamedTuple):
    """The neighbourhood of a peak, in units of the noise.

    Attributes
    ----------
    x, y : int
        Its first pixel in the image (px); may lie off it.
    values : ndarray, shape (SIDE * SIDE,), float32
        Of the good pixels: finite, no outliers, and nearer to this peak than to another blob's. Of others 0.
    good : ndarray, shape (SIDE * SIDE,), bool
    """

    x: int
    y: int
    values: FloatArray
    good: Mask


class Model(NamedTuple):
    """Each of the ``s`` shapes on the cut-out of a peak, of ``n`` pixels.

    Attributes
    ----------
    parameters : ndarray, shape (s, 5), float64
        x, y, radius (px), depth, background (in units of the noise).
    residual : ndarray, shape (s, n), float32
        Data minus model; 0 on pixels that are not good.
    slopes : ndarray, shape (s, 5, n), float32
        Derivatives of the model by the parameters; 0 on the same pixels.
    chi2 : ndarray, shape (s,), float64
        With the prior's part.
    """

    parameters: FloatArray
    residual: FloatArray
    slopes: FloatArray
    chi2: FloatArray


def fit_blobs(
    difference: Image,
    x: FloatArray,
    y: FloatArray,
    score: FloatArray,
    noise_frac: float | None = None,
    noise_model: NoiseModel = WHITE,
    size_law: SizeLaw | None = None,
) -> pd.DataFrame:
    """Fit a blob at each peak.

    Parameters
    ----------
    difference : ndarray, shape (ny, nx), float32
        Image minus median stack, not clipped (fraction of the light, a new blob is positive); NaN where there is no value.
    x, y : ndarray, shape (n,)
        Peaks of a search (px).
    score : ndarray, shape (n,)
        What the search gave them; kept as it is.
    noise_frac : float, optional
        Standard deviation of a pixel (fraction of the light); robustly estimated if not given.
    noise_model : NoiseModel, optional
        That by which ``difference`` has been whitened.
    size_law : SizeLaw, optional
        Of the radii of blobs where they lie; without one, all radii of known blobs are as likely anywhere.

    Returns
    -------
    DataFrame
        `DETECTION_COLUMNS`, one row per peak. ``depth_frac`` is the highest point of the fitted profile,
        ``loss_frac_px2`` its sum, ``snr`` that of a matched filter for it. Errors are 1 sigma, widened where the fit
        is worse than the noise. Where the fit has failed, they are NaN, and the rest is of the disc that it started
        from; where there are too few pixels to fit, all but x, y and score is NaN. ``status`` is empty until `vet.vet_candidates`.
        A last column, ``misfit``, says how badly the fit fits: the mean squared residual of the footprint in units of the
        noise, less what shapes beyond ours may leave: about 1 for a blob. `blobpipe.detection.score` takes it into the score.
    """
    import pandas as pd

    peaks = np.column_stack([np.asarray(values, np.float64).ravel() for values in (x, y, score)])
    noise = _noise(difference) if noise_frac is None else float(noise_frac)
    rows = [[*peak[:2], *[np.nan] * (MEASURED - 1)] for peak in peaks]
    usable = [k for k, peak in enumerate(peaks) if noise > 0 and np.isfinite(peak).all()]
    shapes = whitened_shapes(noise_model)
    for k in usable:
        cut = _cut(difference, peaks, k, noise)
        if cut.good.sum() >= FEWEST_PIXELS:
            whiten = None
            if noise_model.outputs is not None:
                shapes = whitened_shapes(noise_model, (float(peaks[k, 0]), float(peaks[k, 1])))
                whiten = _at_border(noise_model, cut, peaks[k], difference.shape)
            usual = _usual(size_law, *peaks[k, :2])
            rows[k] = _measure_one(cut, peaks[k], noise, shapes, usual, whiten)
    table = np.reshape(np.array(rows, np.float64), (-1, MEASURED + 1))

    # The image was divided by the local scale of its noise
    scale = noise_model.scale_at(table[:, 0], table[:, 1])
    of_light = [
        DETECTION_COLUMNS.index(name) for name in ("depth_frac", "depth_err_frac", "loss_frac_px2")
    ]
    table[:, of_light] *= scale[:, None]
    found = pd.DataFrame(table[:, :-1], columns=list(DETECTION_COLUMNS[:MEASURED]))
    return found.assign(
        score=peaks[:, 2], status=pd.Series([""] * len(peaks), dtype=str), misfit=table[:, -1]
    )


def _usual(size_law: SizeLaw | None, x: float, y: float) -> Usual:
    """Return the usual radius of a blob at a place (px) and its spread."""
    if size_law is None:
        return ANYWHERE
    radius = float(size_law.radius(np.array(x), np.array(y)))
    return Usual(radius, WIDER * max(size_law.scatter, LEAST_SCATTER) * radius)


def _noise(difference: Image) -> float:
    return (
        fits_images.median_and_noise(difference)[1]
        if np.isfinite(difference).any()
        else float("nan")
    )


def _at_border(
    noise_model: NoiseModel, cut: Cut, peak: FloatArray, shape: tuple[int, ...]
) -> Callable[[Image], Image] | None:
    """Return what whitens a blob on a cut-out (33 x 33 px) so near to where outputs meet that waves do not tell it, else None."""
    outputs, gain = noise_model.outputs, noise_model.gain
    if outputs is None or gain is None:
        return None
    if not outputs.is_at_border(peak[:1], peak[1:2], PERIOD_PX // 2).any():
        return None
    return lambda blob: outputs.whiten_square(blob, cut.x, cut.y, shape, gain)


def _measure_one(
    cut: Cut,
    peak: FloatArray,
    noise: float,
    shapes: FloatArray,
    usual: Usual,
    whiten: Callable[[Image], Image] | None = None,
) -> list[float]:
    """Fit a blob at a peak, with the whitening from `_at_border`: a row of `DETECTION_COLUMNS` up to the S/N, then the misfit."""
    starts = _starts(cut, peak[0], peak[1], shapes, usual)
    model, usable = _best_fit(cut, starts, shapes, usual)
    if whiten is not None and usable.any():
        best = int(np.where(usable, model.chi2, np.inf).argmin())
        cut = cut._replace(values=cut.values - _not_told(cut, model, best, whiten))
        model, usable = _best_fit(cut, starts, shapes, usual)
    fit = (
        _averaged(cut, model, usable, usual) if usable.any() else _unfitted(cut, starts[0], shapes)
    )
    return [
        fit.x + cut.x,
        fit.y + cut.y,
        fit.x_err,
        fit.y_err,
        fit.radius,
        fit.radius_err,
        noise * fit.depth,
        noise * fit.depth_err,
        noise * fit.loss,
        fit.snr,
        _reduced_chi2(cut, model),
    ]


def _best_fit(
    cut: Cut, starts: list[FloatArray], shapes: FloatArray, usual: Usual
) -> tuple[Model, Mask]:
    """Fit all shapes from each start, and return the best fit of each shape, and which have succeeded."""
    good = cut.good.astype(np.float32)
    models = []
    costs = []
    for start in starts:
        low, high = _limits(start)
        parameters, residual, slopes, chi2, here = _fit(
            cut.values, good, start, low, high, usual, shapes
        )
        reached = (here, np.arange(len(here)))
        model = Model(parameters[reached], residual[reached], slopes[reached], chi2)

        # A fit that has run to a limit, or to a bright spot, has failed.
        place = model.parameters[:, :BACKGROUND]
        inside = (place > low[:BACKGROUND]) & (place < high[:BACKGROUND])
        usable = inside.all(axis=1) & (model.parameters[:, DEPTH] > 0)
        models.append(model)
        costs.append(np.where(usable, model.chi2, np.inf))
    best = np.argmin(costs, axis=0)
    parts = zip(*models, strict=True)
    model = Model(*(np.stack([part[k][shape] for shape, k in enumerate(best)]) for part in parts))
    return model, np.isfinite(np.min(costs, axis=0))


def _not_told(cut: Cut, model: Model, shape: int, whiten: Callable[[Image], Image]) -> FloatArray:
    """Return what whitening makes of a shape, less the model of it (units of the noise); 0 on pixels that are not good."""
    parameters = model.parameters[shape]
    residual = np.empty_like(cut.values)
    slopes = np.empty((5, len(cut.values)), np.float32)
    _model(
        cut.values,
        np.ones_like(cut.values),
        _table(),
        shape,
        parameters,
        ANYWHERE,
        residual,
        slopes,
    )
    whitened = whiten(slopes[DEPTH].reshape(CUT_SIDE, CUT_SIDE)).ravel()
    difference = np.float32(parameters[DEPTH]) * (whitened - model.slopes[shape, DEPTH])
    return np.where(cut.good, difference, np.float32(0))


def _reduced_chi2(cut: Cut, model: Model) -> float:
    """Return the best shape's mean squared residual, less what other shapes may leave."""
    best = int(model.chi2.argmin())
    x, y, radius, depth = model.parameters[best, :4]
    footprint = cut.good & (distance_from(x, y, CUT_SIDE).ravel() <= radius + FOOTPRINT_MARGIN_PX)
    if not footprint.any():
        return float("nan")
    left = float(np.square(model.residual[best, footprint]).mean())
    return left - float(np.clip(left - 1, 0, (OTHER_SHAPES * depth) ** 2))


def _limits(start: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the lower and upper limits of the parameters."""
    reach = np.array([FARTHEST_PX, FARTHEST_PX, 0, np.inf, np.inf])
    low = start - reach
    high = start + reach
    low[RADIUS] = RADII_PX[0]
    high[RADIUS] = RADII_PX[-1]
    return low, high


def _cut(difference: Image, peaks: FloatArray, k: int, noise: float) -> Cut:
    x, y = (round(float(place)) - CUT_HALF for place in peaks[k, :2])
    values = cut_square(difference, x, y, CUT_SIDE) / np.float32(noise)
    good = _without_outliers(values) & _nearest(peaks[:, :2] - (x, y), k)
    return Cut(x, y, np.where(good, values, np.float32(0)).ravel(), good.ravel())


def _without_outliers(values: Image) -> Mask:
    """Mark finite pixels that are not far from the median of the 5 x 5 pixels around them."""
    good = np.isfinite(values)
    if not good.any():
        return good
    filled = np.where(good, values, bottleneck.median(values[good]))
    _unmark_outliers(filled, good)
    return good


@nb.njit(cache=True, nogil=True)
def _unmark_outliers(values, good):  # type: ignore[no-untyped-def]
    """Unmark the good pixels that are far from the median around them."""
    side = len(values)
    around = np.empty(25, np.float32)
    for y in range(side):
        for x in range(side):
            total = np.float32(0)
            for k in range(25):
                row = min(max(y + k // 5 - 2, 0), side - 1)
                column = min(max(x + k % 5 - 2, 0), side - 1)
                around[k] = values[row, column]
                total += around[k]
            if good[y, x] and abs(values[y, x] - total / 25) > SUSPECT_SIGMA:
                usual = _middle(around)
                limit = OUTLIER_SIGMA + OUTLIER_FRAC * abs(usual)
                good[y, x] = abs(values[y, x] - usual) < limit


@nb.njit(cache=True, nogil=True)
def _middle(values):  # type: ignore[no-untyped-def]
    """Return the median of an odd number of values, which are sorted in place."""
    for i in range(1, len(values)):
        value = values[i]
        k = i
        while k > 0 and values[k - 1] > value:
            values[k] = values[k - 1]
            k -= 1
        values[k] = value
    return values[len(values) // 2]


def _nearest(peaks: FloatArray, k: int) -> Mask:
    """Mark the pixels of a cut-out that are nearest to its own peak."""
    apart = np.hypot(*(peaks - peaks[k]).T)
    others = peaks[(apart > NEIGHBOUR_PX) & (apart < 3 * CUT_HALF)]
    x, y = peaks[k]
    own = distance_from(x, y, CUT_SIDE)
    nearest = np.ones(own.shape, bool)
    for x, y in others:
        nearest &= own <= distance_from(x, y, CUT_SIDE)
    return nearest


@lru_cache(maxsize=1)
def _table() -> FloatArray:
    """Tabulate each shape as a sum of cosines whose amplitudes are splines of the radius.

    Returns
    -------
    ndarray, shape (number of radii - 1, number of shapes, 4, HIGHEST**2), float32
        Coefficients of the cubes, squares, ... of the distance from each tabulated radius.
    """
    from scipy.interpolate import CubicSpline

    amplitudes = [
        [_amplitudes(shape, float(radius)) for shape in blob_shapes.SHAPES] for radius in RADII_PX
    ]
    coefficients = np.moveaxis(CubicSpline(RADII_PX, np.array(amplitudes)).c, 0, 2)
    return np.ascontiguousarray(coefficients.reshape(*coefficients.shape[:3], -1), dtype=np.float32)


def whitened_shapes(noise_model: NoiseModel, place: tuple[float, float] = (0.0, 0.0)) -> FloatArray:
    """Return the tabulated shapes as they are at a place (x, y; px) of an image that has been whitened."""
    transfer = noise_model.transfer(PERIOD_PX, HIGHEST, place)
    if transfer is None:
        return _table()
    return np.asarray(_table() * transfer.ravel(), np.float32)


def _amplitudes(shape: blob_shapes.Shape, radius: float) -> FloatArray:
    """Return the amplitudes of the cosines along y and x, for a profile sampled twice per pixel."""
    fine = np.empty((2 * PERIOD_PX, 2 * PERIOD_PX))
    for i, j in ((0, 0), (0, 1), (1, 1)):
        fine[i::2, j::2] = blob_shapes.blob_profile(shape, radius, -j / 2, -i / 2, PERIOD_PX)
    fine[1::2, ::2] = fine[::2, 1::2].T  # blobs are alike along x and y
    middle = 2 * (PERIOD_PX // 2)
    spectrum = (
        np.fft.rfft2(np.roll(fine, (-middle, -middle), (0, 1))).real[:HIGHEST, :HIGHEST] / fine.size
    )
    twice = np.minimum(1 + np.arange(HIGHEST), 2)
    return np.asarray(spectrum * twice * twice[:, None])


@nb.njit(cache=True, nogil=True)
def _interpolated(table, shape, radius):  # type: ignore[no-untyped-def]
    """Interpolate the amplitudes of a shape, and their derivatives, at a radius."""
    place = min(max(np.searchsorted(RADII_PX, radius) - 1, 0), len(RADII_PX) - 2)
    t = np.float32(radius - RADII_PX[place])
    cubes = table[place, shape]
    amplitudes = np.empty(HIGHEST * HIGHEST, np.float32)
    slopes = np.empty(HIGHEST * HIGHEST, np.float32)
    for k in range(HIGHEST * HIGHEST):
        a = cubes[0, k]
        b = cubes[1, k]
        c = cubes[2, k]
        d = cubes[3, k]
        amplitudes[k] = ((a * t + b) * t + c) * t + d
        slopes[k] = (np.float32(3) * a * t + np.float32(2) * b) * t + c
    return amplitudes.reshape(HIGHEST, HIGHEST), slopes.reshape(HIGHEST, HIGHEST)


@nb.njit(cache=True, nogil=True)
def _waves(centre):  # type: ignore[no-untyped-def]
    """Return cosines around a centre, and their derivatives by it, each of shape (HIGHEST, CUT_SIDE)."""
    waves = np.empty((HIGHEST, CUT_SIDE), np.float32)
    slopes = np.empty((HIGHEST, CUT_SIDE), np.float32)
    for k in range(HIGHEST):
        cos = np.float32(np.cos(centre * FREQUENCIES[k]))
        sin = np.float32(np.sin(centre * FREQUENCIES[k]))
        for x in range(CUT_SIDE):
            waves[k, x] = COSINES[k, x] * cos + SINES[k, x] * sin
            slopes[k, x] = (SINES[k, x] * cos - COSINES[k, x] * sin) * FREQUENCIES[k]
    return waves, slopes


@nb.njit(cache=True, nogil=True)
def _model(values, good, table, shape, parameters, usual, residual, slopes):  # type: ignore[no-untyped-def]
    """Evaluate the model on a cut-out: fill in residual and slopes, return chi-squared.

    Returns
    -------
    float
        Chi square, with the prior's part.
    """
    x, y, radius, depth, background = parameters
    amplitudes, by_radius = _interpolated(table, shape, radius)
    cos_x, sin_x = _waves(x)
    cos_y, sin_y = _waves(y)
    along_y = np.empty((CUT_SIDE, HIGHEST), np.float32)
    images = slopes.reshape(5, CUT_SIDE, CUT_SIDE)
    np.dot(cos_y.T, amplitudes, along_y)
    np.dot(along_y, sin_x, images[X])
    np.dot(along_y, cos_x, images[DEPTH])
    np.dot(sin_y.T, amplitudes, along_y)
    np.dot(along_y, cos_x, images[Y])
    np.dot(cos_y.T, by_radius, along_y)
    np.dot(along_y, cos_x, images[RADIUS])
    depth = np.float32(depth)
    background = np.float32(background)
    for k in range(len(values)):
        slopes[X, k] *= good[k] * depth
        slopes[Y, k] *= good[k] * depth
        slopes[RADIUS, k] *= good[k] * depth
        slopes[DEPTH, k] *= good[k]
        slopes[BACKGROUND, k] = good[k]
        residual[k] = values[k] - depth * slopes[DEPTH, k] - background * good[k]
    prior = ((radius - usual[0]) / usual[1]) ** 2 - 2 * np.log(SHAPE_SHARES[shape])
    return np.dot(residual, residual) + prior


def _starts(cut: Cut, x: float, y: float, shapes: FloatArray, usual: Usual) -> list[FloatArray]:
    """Return the parameters to start from: discs of several radii, each where it explains most around a place.

    The best first, then those that are nearly as good.
    """
    good = cut.good.astype(np.float32)
    starts, gains = _discs(cut.values, good, x - cut.x, y - cut.y, shapes)
    off_usual = (starts[:, RADIUS] - usual.radius_px) / usual.spread_px
    gains -= np.square(off_usual)
    order = np.argsort(-gains, kind="stable")[:MOST_STARTS]
    return [starts[i] for i in order if gains[i] >= gains[order[0]] - WORTH_A_FIT]


@nb.njit(cache=True, nogil=True)
def _discs(values, good, x, y, shapes):  # type: ignore[no-untyped-def]
    """Return discs of several radii, each where it explains most around a place, and the chi square that each explains.

    Returns
    -------
    discs : ndarray, shape (n, 5), float64
        Their parameters.
    gains : ndarray, shape (n,), float64
    """
    n_good = np.dot(good, good)
    level = np.dot(values, good) / n_good
    left = np.empty((CUT_SIDE, CUT_SIDE), np.float32)
    for row in range(CUT_SIDE):
        for column in range(CUT_SIDE):
            k = row * CUT_SIDE + column
            left[row, column] = (values[k] - level) * good[k]

    # A disc is a sum of cosines, so what it has in common with the pixels, wherever it lies, is a product of matrices
    waves = np.dot(np.dot(WAVES, left), WAVES.T)
    weighted = np.empty_like(waves)
    discs = np.empty((len(FIRST_RADII), 5))
    gains = np.empty(len(FIRST_RADII))
    for i, number in enumerate(FIRST_RADII):
        amplitudes = shapes[number, 0, 3].reshape(HIGHEST, HIGHEST)
        for k in range(HIGHEST):
            for m in range(HIGHEST):
                for half in (0, HIGHEST):
                    weighted[k, half + m] = amplitudes[k, m] * waves[k, half + m]
                    weighted[HIGHEST + k, half + m] = (
                        amplitudes[k, m] * waves[HIGHEST + k, half + m]
                    )
        common = np.dot(np.dot(WAVES.T, weighted), WAVES)
        row, column = _highest_near(common, x, y)

        # Its depth there, and the chi square that it explains
        along_y = np.dot(_waves(row)[0].T, amplitudes)
        disc = np.dot(along_y, _waves(column)[0]).reshape(CUT_SIDE * CUT_SIDE)
        for k in range(len(disc)):
            disc[k] *= good[k]
        mean = np.dot(disc, good) / n_good
        power = max(np.dot(disc, disc) - mean * mean * n_good, 1e-6)
        depth = common[row, column] / power
        gains[i] = max(depth, 0.0) * depth * power
        discs[i, X] = column
        discs[i, Y] = row
        discs[i, RADIUS] = RADII_PX[number]
        discs[i, DEPTH] = depth
        discs[i, BACKGROUND] = level - depth * mean
    return discs, gains


@nb.njit(cache=True, nogil=True)
def _highest_near(image, x, y):  # type: ignore[no-untyped-def]
    """Return row and column of the highest pixel around a place."""
    highest = (0, 0)
    value = -np.inf
    for row in range(image.shape[0]):
        for column in range(image.shape[1]):
            is_near = np.hypot(column - x, row - y) <= FARTHEST_PX - 1
            if is_near and image[row, column] > value:
                highest = (row, column)
                value = image[row, column]
    return highest


@nb.njit(cache=True, nogil=True)
def _fit(values, good, start, low, high, usual, table):  # type: ignore[no-untyped-def]
    """Fit all shapes by Levenberg's and Marquardt's method, within limits.

    Returns
    -------
    parameters, residual, slopes
        Those of a `Model` twice: where each shape is, and where it has tried to go.
    chi2 : ndarray, shape (s,), float64
    here : ndarray, shape (s,), int64
        Which of the two is where it is.
    """
    n_shapes = table.shape[1]
    n = len(values)
    parameters = np.empty((2, n_shapes, 5))
    residual = np.empty((2, n_shapes, n), np.float32)
    slopes = np.empty((2, n_shapes, 5, n), np.float32)
    chi2 = np.empty(n_shapes)
    here = np.zeros(n_shapes, np.int64)
    damping = np.full(n_shapes, 1e-3)
    gain = np.empty(n_shapes)
    for shape in range(n_shapes):
        for i in range(5):
            parameters[0, shape, i] = start[i]
        chi2[shape] = _model(
            values, good, table, shape, start, usual, residual[0, shape], slopes[0, shape]
        )
    for _ in range(STEPS):
        for shape in range(n_shapes):
            now = here[shape]
            then = 1 - now
            normal, right = _normal(
                parameters[now, shape], usual, residual[now, shape], slopes[now, shape]
            )
            moved = parameters[then, shape]
            _move(parameters[now, shape], normal, right, damping[shape], low, high, moved)
            new_chi2 = _model(
                values, good, table, shape, moved, usual, residual[then, shape], slopes[then, shape]
            )
            gain[shape] = chi2[shape] - new_chi2
            damping[shape] *= 10 if gain[shape] < 0 else 0.1
            if gain[shape] >= 0:
                here[shape] = then
                chi2[shape] = new_chi2
        best = chi2.min()
        going = False
        for shape in range(n_shapes):
            going |= abs(gain[shape]) >= max(ENOUGH, STOP_IF_WORSE * (chi2[shape] - best))
        if not going:
            break
    return parameters, residual, slopes, chi2, here


@nb.njit(cache=True, nogil=True)
def _move(parameters, normal, right, damping, low, high, moved):  # type: ignore[no-untyped-def]
    """Solve the damped normal equations, which are lost, and write where their step leads within the limits."""
    for i in range(5):
        normal[i, i] *= 1 + damping
    _solve(normal, right)
    for i in range(5):
        moved[i] = min(max(parameters[i] + right[i], low[i]), high[i])


@nb.njit(cache=True, nogil=True)
def _solve(matrix, vector):  # type: ignore[no-untyped-def]
    """Solve linear equations in place; the matrix is positive definite, so any pivot will do."""
    for i in range(5):
        for j in range(i + 1, 5):
            factor = matrix[j, i] / matrix[i, i]
            vector[j] -= factor * vector[i]
            for k in range(i, 5):
                matrix[j, k] -= factor * matrix[i, k]
    for i in range(4, -1, -1):
        for k in range(i + 1, 5):
            vector[i] -= matrix[i, k] * vector[k]
        vector[i] /= matrix[i, i]


@nb.njit(cache=True, nogil=True)
def _normal(parameters, usual, residual, slopes):  # type: ignore[no-untyped-def]
    """Return the normal matrix of a shape and its right-hand side, priors included."""
    normal = np.empty((5, 5))
    slope = np.empty(5)
    for i in range(5):
        slope[i] = np.dot(slopes[i], residual)
        for j in range(i + 1):
            normal[i, j] = normal[j, i] = np.dot(slopes[i], slopes[j])
        normal[i, i] += 1e-6  # what is not there leaves its parameters where they are
    normal[RADIUS, RADIUS] += 1 / usual[1] ** 2
    slope[RADIUS] -= (parameters[RADIUS] - usual[0]) / usual[1] ** 2
    return normal, slope


def _averaged(cut: Cut, model: Model, usable: Mask, usual: Usual) -> Result:
    """Average the usable shapes, each with the weight of its likelihood."""
    chi2 = model.chi2[usable]
    values = model.parameters[usable]
    scale = max(float(chi2.min()) / (cut.good.sum() - 5), 1.0)  # f^2
    weights = np.exp((chi2.min() - chi2) / (2 * scale))
    weights /= weights.sum()

    # Mean and variance of each parameter; the spread between shapes counts as an error.
    normal = np.array(
        [
            _normal(parameters, usual, residual, slopes)[0]
            for parameters, residual, slopes in zip(*model[:3], strict=True)
        ]
    )[usable]
    mean = weights @ values
    variances = scale * np.einsum("kii->ki", np.linalg.inv(normal))
    errors = np.sqrt(weights @ (variances + np.square(values - mean)))
    snr = float(weights @ (values[:, DEPTH] * np.sqrt(normal[:, DEPTH, DEPTH])))

    # A shape's sum follows from its radius.
    sums = [_profile_sum(shape, radius) for shape, radius in enumerate(model.parameters[:, RADIUS])]
    loss = float(weights @ (values[:, DEPTH] * np.array(sums)[usable]))

    # What the fit has taken from the noise.
    wider = np.sqrt(1 + WANDERING / max(snr, 1.0) ** 2)
    depth = mean[DEPTH] * (1 - NOISE_FITTED / max(snr, NOISE_FITTED) ** 2)
    return Result(
        x=mean[X],
        y=mean[Y],
        x_err=wider * errors[X],
        y_err=wider * errors[Y],
        radius=mean[RADIUS],
        radius_err=wider * errors[RADIUS],
        depth=depth,
        depth_err=errors[DEPTH],
        loss=loss,
        snr=snr,
    )


def _unfitted(cut: Cut, start: FloatArray, shapes: FloatArray) -> Result:
    """Return the disc that a failed fit started from, without errors."""
    x, y, radius, depth, _ = start
    residual = np.empty_like(cut.values)
    slopes = np.empty((5, len(cut.values)), np.float32)
    _model(cut.values, cut.good.astype(np.float32), shapes, 0, start, ANYWHERE, residual, slopes)
    return Result(
        x=x,
        y=y,
        x_err=np.nan,
        y_err=np.nan,
        radius=radius,
        radius_err=np.nan,
        depth=depth,
        depth_err=np.nan,
        loss=depth * _profile_sum(0, radius),
        snr=float(depth * np.linalg.norm(slopes[DEPTH])),
    )


def _profile_sum(shape: int, radius: float) -> float:
    return float(_interpolated(_table(), shape, radius)[0][0, 0]) * PERIOD_PX**2
