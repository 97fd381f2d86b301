"""Peaks into detections: where a blob is, how large and how deep, with errors, and whether it is a new blob at all.

The depth of a blob is the highest point of its light loss, as in the catalogue. What is fitted are therefore the
shapes that blobs have (`blobpipe.core.profiles`), all of them: where the noise hides the shape, the results are averaged
with the weight of each shape's likelihood, and the spread between shapes is part of the error.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import bottleneck
import numba as nb
import numpy as np
import numpy.typing as npt

from blobpipe.core import frames, profiles
from blobpipe.images import difference as subtraction

if TYPE_CHECKING:
    import pandas as pd

Image = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[Any]

DETECTION_COLUMNS = (
    *("x_px", "y_px", "x_err_px", "y_err_px", "radius_px", "radius_err_px", "depth_frac", "depth_err_frac"),
    *("loss_frac_px2", "snr", "score", "status"),
)
MEASURED = len(DETECTION_COLUMNS) - 2

HALF = 16  # a cut-out of 33 x 33 px holds the largest blob and some background
SIDE = 2 * HALF + 1
FEWEST_PIXELS = 60  # fewer good pixels do not hold five parameters and a background
FARTHEST_PX = 8.0  # a peak of the search is nearer to its blob than this
NEIGHBOUR_PX = 15.0  # peaks nearer than this lie on one blob; beyond it, each keeps the pixels nearest to it
OUTLIER_SIGMA, OUTLIER_FRAC = 5.0, 0.5  # noise, and the top of the smallest blob, lie nearer to the median around them
SUSPECT_SIGMA = 3.0  # off the mean around it, a pixel may be an outlier: one of a cluster of eight lifts the mean
SMOOTHING_PX = 3.0  # finds where to start the fit

RADII_PX = np.linspace(0.7, 12.7, 25)  # of the tabulated shapes: from less than a bad pixel's to more than a blob's
FIRST_RADII = (4, 9, 14)  # of these are tried before the fit: 2.7, 5.2 and 7.7 px
PERIOD_PX = 49  # of the cosines that make up a shape: neither blob nor cut-out reaches around it
HIGHEST = 28  # so many of their frequencies: blur and pixels leave next to nothing beyond
FREQUENCIES = (2 * np.pi / PERIOD_PX * np.arange(HIGHEST)).astype(np.float32)  # radian per pixel
WAVES = np.exp(1j * np.multiply.outer(np.arange(SIDE), FREQUENCIES)).astype(np.complex64)

SQUARES_PX = (5, 11)  # in which a rough S/N is taken: of the sharpest blobs, and of all others
STEPS = 10  # of a fit at most; four are the rule
ENOUGH = 0.1  # a step that gains less chi square than this is the last
HOPELESS = 0.1  # or less than so much of what a shape lags behind the best: it will have no weight
TYPICAL_RADIUS_PX, RADIUS_SPREAD_PX = 5.7, 2.5  # of blobs all over the detector; the spread is twice the measured one
SHAPE_SHARES = (0.35, 0.45, 0.2)  # prior of each shape: evens out what a wrong one does to the depth of faint blobs
OTHER_SHAPES = (
    0.15  # of the depth, rms: so far a blob may differ from the shapes that are fitted; allowed, not measured
)
NOISE_FITTED = 3.0  # place and radius follow the noise and deepen the fit by this over the squared S/N: simulated
WANDERING = 40.0  # their own variances grow by this over the squared S/N, beyond what slopes tell: simulated

KNOWN_PX, KNOWN_RADII = 3.0, 0.5  # two blobs do not lie so near each other; the fit of one does not err so far
KNOWN_HALF = 2  # the middle of a blob, of any size
EXPLAINED = 0.5  # of the signal predicted by the shift; a shift is known to better than half of itself
WITNESSED = 0.4  # of the predicted negative side is there, or the shift has been taken off already
RING_PX = (4.0, 8.0)  # around a footprint: what its scatter is compared with
EDGE_PX = 1.6  # a cluster of bad pixels is smaller than the blob that is fitted to it
RESTLESS = 1.2  # times the scatter that a quarter of the surroundings exceed, streaks and single bad pixels among them
OUTBURST = (
    10.0  # times the scatter: one outburst on 27 images is 5 of its own; chosen on simulated images of both kinds
)
DARK_SIDE = 0.25  # what is above this part of the deepest is too faint to be a witness
DIP_REACH = 1.5  # radii of the known blob, within which its crescents lie
DIP_MARGIN_PX = 3.0  # and the largest shift that leaves two crescents and not two blobs
COUNTERPART, COUNTERPART_SNR = 0.5, 3.0  # the two crescents are alike; noise next to a new blob is not
SMALLEST_RADIUS_PX = 1.5  # a blob is blurred to more
FEW_PIXELS, FEW_SHARE = 8, 6  # the largest cluster of bad pixels, but no more than a sixth of a small blob
REST_SNR = 3.0  # what is fainter without them could be noise
HARD_SIGMA, HARD_FRAC, HARD_MARGIN_PX = 1.3, 0.13, 1.5  # no simulated blob loses so much; clusters of 3 x 3 to 7 x 7 do
UNEXPLAINED_SIGMA, UNEXPLAINED_FRAC = 5.0, 0.3  # no good pixel of a stack lies so far off; blobs have soft edges
OF_STACK = 0.5  # of the signal: where the stack is so much brighter than around, the image itself is not dark
MOST_MISSING = 1 / 3  # of a footprint without values, or bad; what is left does not make a blob


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


def measure(
    difference: Image, x: FloatArray, y: FloatArray, score: FloatArray, noise_frac: float | None = None
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

    Returns
    -------
    DataFrame
        `DETECTION_COLUMNS`, one row per peak. ``depth_frac`` is the highest point of the fitted profile,
        ``loss_frac_px2`` its sum, ``snr`` that of a matched filter for it. Errors are 1 sigma, widened where the fit
        is worse than the noise. Where the fit has failed, they are NaN, and the rest is of the disc that it started
        from; where there are too few pixels to fit, all but x, y and score is NaN. ``status`` is empty until `judge`.
        A last column, ``misfit``, says how badly the fit fits: the mean squared residual of the footprint in units of the
        noise, less what shapes beyond ours may leave: about 1 for a blob. `blobpipe.detection.verdict` takes it into the score.

    Notes
    -----
    Source: ours.
    """
    import pandas as pd

    peaks = np.column_stack([np.asarray(values, np.float64).ravel() for values in (x, y, score)])
    noise = _noise(difference) if noise_frac is None else float(noise_frac)
    rows = [[*peak[:2], *[np.nan] * (MEASURED - 1)] for peak in peaks]
    usable = [k for k, peak in enumerate(peaks) if noise > 0 and np.isfinite(peak).all()]
    for k in usable:
        cut = _cut(difference, peaks, k, noise)
        if cut.good.sum() >= FEWEST_PIXELS:
            rows[k] = _measure_one(cut, peaks[k], noise)
    table = np.reshape(np.array(rows, np.float64), (-1, MEASURED + 1))
    found = pd.DataFrame(table[:, :-1], columns=list(DETECTION_COLUMNS[:MEASURED]))
    return found.assign(score=peaks[:, 2], status=pd.Series([""] * len(peaks), dtype=str), misfit=table[:, -1])


def rough_snr(difference: Image, x: FloatArray, y: FloatArray, noise_frac: float) -> FloatArray:
    """Signal-to-noise ratio of the brightest square near each place, shape (n,): in a hundredth of the time of a fit.

    Parameters
    ----------
    difference, x, y, noise_frac
        As for `measure`.

    Returns
    -------
    ndarray, shape (n,), float64
        Of the square of 5 x 5 or 11 x 11 px within `FARTHEST_PX`, above the median around; 0 where there is no value. For a
        blob about two thirds of a matched filter's.

    Notes
    -----
    Source: ours.
    """
    half = round(FARTHEST_PX) + max(SQUARES_PX) // 2
    windows = [
        _window(difference, round(float(at[0])) - half, round(float(at[1])) - half, 2 * half + 1)
        for at in zip(x, y, strict=True)
    ]
    found = np.zeros(len(windows))
    for k, window in enumerate(windows):
        finite = np.isfinite(window)
        if finite.any():
            found[k] = _brightest_square(np.where(finite, window - bottleneck.median(window[finite]), 0)) / noise_frac
    return found


@nb.njit(cache=True, nogil=True)
def _brightest_square(signal):  # type: ignore[no-untyped-def]
    """Highest sum of a square, by the root of its area."""
    side, brightest = len(signal), 0.0
    sums = np.zeros((side + 1, side + 1))
    for y in range(side):
        for x in range(side):
            sums[y + 1, x + 1] = sums[y, x + 1] + sums[y + 1, x] - sums[y, x] + signal[y, x]
    for square in SQUARES_PX:
        trim = (max(SQUARES_PX) - square) // 2
        for y in range(trim, side + 1 - square - trim):
            for x in range(trim, side + 1 - square - trim):
                right, top = x + square, y + square
                inside = sums[top, right] - sums[y, right] - sums[top, x] + sums[y, x]
                brightest = max(brightest, inside / square)
    return brightest


def _noise(difference: Image) -> float:
    return frames.median_and_noise(difference)[1] if np.isfinite(difference).any() else float("nan")


def _measure_one(cut: Cut, peak: FloatArray, noise: float) -> list[float]:
    """What is measured at a peak, in the order of `DETECTION_COLUMNS`, and the misfit."""
    start = _start(cut, *peak[:2])
    low, high = _limits(start)
    model = Model(*_fit(cut.values, cut.good.astype(np.float32), start, low, high, _table()))
    inside = (model.parameters[:, :4] > low[:4]) & (model.parameters[:, :4] < high[:4])
    usable = inside.all(axis=1) & (model.parameters[:, 3] > 0)
    found = _averaged(cut, model, usable) if usable.any() else _unfitted(cut, start)
    x, y, x_err, y_err, radius, radius_err, depth, depth_err, loss, snr = found
    place = [x + cut.x, y + cut.y, x_err, y_err, radius, radius_err]
    return [*place, noise * depth, noise * depth_err, noise * loss, snr, _misfit(cut, model)]


def _misfit(cut: Cut, model: Model) -> float:
    """Mean squared residual of the best shape's footprint, less what other shapes than ours may leave."""
    best = int(model.chi2.argmin())
    x, y, radius, depth = model.parameters[best, :4]
    footprint = cut.good & (_distance(x, y, SIDE).ravel() <= radius + HARD_MARGIN_PX)
    if not footprint.any():
        return float("nan")
    left = float(np.square(model.residual[best, footprint]).mean())
    return left - float(np.clip(left - 1, 0, (OTHER_SHAPES * depth) ** 2))


def _limits(start: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Between which the parameters of fits may lie."""
    reach = np.array([FARTHEST_PX, FARTHEST_PX, 0, np.inf, np.inf])
    low, high = start - reach, start + reach
    low[2], high[2] = RADII_PX[[0, -1]]
    return low, high


def _cut(difference: Image, peaks: FloatArray, k: int, noise: float) -> Cut:
    x, y = (round(float(place)) - HALF for place in peaks[k, :2])
    values = _window(difference, x, y, SIDE) / np.float32(noise)
    good = _without_outliers(values) & _nearest(peaks[:, :2] - (x, y), k)
    return Cut(x, y, np.where(good, values, np.float32(0)).ravel(), good.ravel())


def _window(image: Image | Mask, x: int, y: int, side: int) -> Image:
    """A square whose first pixel is at x, y; NaN off the image."""
    ny, nx = image.shape
    window = np.full((side, side), np.nan, np.float32)
    top, left, bottom, right = max(y, 0), max(x, 0), min(y + side, ny), min(x + side, nx)
    if top < bottom and left < right:
        window[top - y : bottom - y, left - x : right - x] = image[top:bottom, left:right]
    return window


def _without_outliers(values: Image) -> Mask:
    """Finite, and not far from the median of the 5 x 5 pixels around, which is taken only where it may matter."""
    from scipy.ndimage import uniform_filter

    good = np.isfinite(values)
    if not good.any():
        return good
    filled = np.where(good, values, bottleneck.median(values[good]))
    rows, columns = np.nonzero(good & (np.abs(filled - uniform_filter(filled, 5, mode="nearest")) > SUSPECT_SIGMA))
    steps = np.arange(-2, 3)
    near_rows = np.clip(rows[:, None, None] + steps[:, None], 0, SIDE - 1)
    near_columns = np.clip(columns[:, None, None] + steps, 0, SIDE - 1)
    usual = np.partition(filled[near_rows, near_columns].reshape(-1, 25), 12, axis=1)[:, 12]
    good[rows, columns] = np.abs(filled[rows, columns] - usual) < OUTLIER_SIGMA + OUTLIER_FRAC * np.abs(usual)
    return good


def _nearest(peaks: FloatArray, k: int) -> Mask:
    """Pixels of a cut-out that are nearer to a peak than to any that lies on another blob."""
    apart = np.hypot(*(peaks - peaks[k]).T)
    others = peaks[(apart > NEIGHBOUR_PX) & (apart < 3 * HALF)]
    x, y = peaks[k]
    own = _distance(x, y, SIDE)
    nearest = np.ones(own.shape, bool)
    for x, y in others:
        nearest &= own <= _distance(x, y, SIDE)
    return nearest


def _distance(x: float, y: float, side: int) -> FloatArray:
    """Of each pixel of a square from a place in it."""
    pixels = np.arange(side)
    return np.asarray(np.hypot(pixels - x, (pixels - y)[:, None]))


@lru_cache(maxsize=1)
def _table() -> FloatArray:
    """Each shape as a sum of cosines, whose amplitudes are splines of the radius.

    Returns
    -------
    ndarray, shape (number of radii - 1, number of shapes, 4, HIGHEST**2), float32
        Coefficients of the cubes, squares, ... of the distance from each tabulated radius.
    """
    from scipy.interpolate import CubicSpline

    amplitudes = [[_amplitudes(shape, float(radius)) for shape in profiles.SHAPES] for radius in RADII_PX]
    coefficients = np.moveaxis(CubicSpline(RADII_PX, np.array(amplitudes)).c, 0, 2)
    return np.ascontiguousarray(coefficients.reshape(*coefficients.shape[:3], -1), dtype=np.float32)


def _amplitudes(shape: profiles.Shape, radius: float) -> FloatArray:
    """Amplitudes of the cosines along y and x, for a profile sampled twice per pixel and axis."""
    fine = np.empty((2 * PERIOD_PX, 2 * PERIOD_PX))
    for i, j in ((0, 0), (0, 1), (1, 1)):
        fine[i::2, j::2] = profiles.blob_profile(shape, radius, -j / 2, -i / 2, PERIOD_PX)
    fine[1::2, ::2] = fine[::2, 1::2].T  # blobs are alike along x and y
    middle = 2 * (PERIOD_PX // 2)
    spectrum = np.fft.rfft2(np.roll(fine, (-middle, -middle), (0, 1))).real[:HIGHEST, :HIGHEST] / fine.size
    twice = np.minimum(1 + np.arange(HIGHEST), 2)
    return np.asarray(spectrum * twice * twice[:, None])


@nb.njit(cache=True, nogil=True)
def _interpolated(table, shape, radius):  # type: ignore[no-untyped-def]
    """Amplitudes of a shape at a radius, and their derivatives by it; both of shape (HIGHEST, HIGHEST), float32."""
    place = min(max(np.searchsorted(RADII_PX, radius) - 1, 0), len(RADII_PX) - 2)
    t, cubes = np.float32(radius - RADII_PX[place]), table[place, shape]
    amplitudes, slopes = np.empty(HIGHEST * HIGHEST, np.float32), np.empty(HIGHEST * HIGHEST, np.float32)
    for k in range(HIGHEST * HIGHEST):
        a, b, c, d = cubes[0, k], cubes[1, k], cubes[2, k], cubes[3, k]
        amplitudes[k] = ((a * t + b) * t + c) * t + d
        slopes[k] = (np.float32(3) * a * t + np.float32(2) * b) * t + c
    return amplitudes.reshape(HIGHEST, HIGHEST), slopes.reshape(HIGHEST, HIGHEST)


@nb.njit(cache=True, nogil=True)
def _waves(centre):  # type: ignore[no-untyped-def]
    """Cosines around a centre, and their derivatives by it; both of shape (SIDE, HIGHEST), float32."""
    waves, slopes = np.empty((SIDE, HIGHEST), np.float32), np.empty((SIDE, HIGHEST), np.float32)
    for k in range(HIGHEST):
        cos, sin = np.float32(np.cos(centre * FREQUENCIES[k])), np.float32(np.sin(centre * FREQUENCIES[k]))
        for x in range(SIDE):
            wave = WAVES[x, k]
            waves[x, k] = wave.real * cos + wave.imag * sin
            slopes[x, k] = (wave.imag * cos - wave.real * sin) * FREQUENCIES[k]
    return waves, slopes


@nb.njit(cache=True, nogil=True, fastmath={"contract"})
def _multiply(left, right, product):  # type: ignore[no-untyped-def]
    """Product of two matrices, row by row: vectors of columns are added at a time."""
    for y in range(left.shape[0]):
        row = product[y]
        row[:] = 0
        for k in range(left.shape[1]):
            factor, other = left[y, k], right[k]
            for x in range(len(row)):
                row[x] += factor * other[x]


@nb.njit(cache=True, nogil=True, fastmath={"contract", "reassoc"})
def _dot(a, b):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for k in range(len(a)):
        total += a[k] * b[k]
    return np.float64(total)


@nb.njit(cache=True, nogil=True)
def _model(values, good, table, shape, parameters, residual, slopes):  # type: ignore[no-untyped-def]
    """The model of a cut-out (``values`` and ``good``, which is 0 or 1, of shape (n,), float32): fills in residual and slopes.

    Returns
    -------
    float
        Chi square, with the prior's part.
    """
    x, y, radius, depth, background = parameters
    amplitudes, by_radius = _interpolated(table, shape, radius)
    (cos_x, sin_x), (cos_y, sin_y) = _waves(x), _waves(y)
    cos_x, sin_x = np.ascontiguousarray(cos_x.T), np.ascontiguousarray(sin_x.T)
    along_y, images = np.empty((SIDE, HIGHEST), np.float32), slopes.reshape(5, SIDE, SIDE)
    _multiply(cos_y, amplitudes, along_y)
    _multiply(along_y, sin_x, images[0])
    _multiply(along_y, cos_x, images[3])
    _multiply(sin_y, amplitudes, along_y)
    _multiply(along_y, cos_x, images[1])
    _multiply(cos_y, by_radius, along_y)
    _multiply(along_y, cos_x, images[2])
    depth, background = np.float32(depth), np.float32(background)
    for k in range(len(values)):
        slopes[0, k] *= good[k] * depth
        slopes[1, k] *= good[k] * depth
        slopes[2, k] *= good[k] * depth
        slopes[3, k] *= good[k]
        slopes[4, k] = good[k]
        residual[k] = values[k] - depth * slopes[3, k] - background * good[k]
    prior = ((radius - TYPICAL_RADIUS_PX) / RADIUS_SPREAD_PX) ** 2 - 2 * np.log(SHAPE_SHARES[shape])
    return _dot(residual, residual) + prior


def _start(cut: Cut, x: float, y: float) -> FloatArray:
    """Parameters to start from: the highest place of the smoothed cut-out, and the disc that fits best there."""
    x, y = _highest(cut, x - cut.x, y - cut.y)
    radius, depth, background = _best_disc(cut.values, cut.good, _table(), x, y)
    return np.array([x, y, radius, depth, background])


@nb.njit(cache=True, nogil=True)
def _best_disc(values, good, table, x, y):  # type: ignore[no-untyped-def]
    """Radius of the disc at x, y that explains most, its depth and the background around it; only discs that darken do."""
    n, total = 0, 0.0
    for k in range(len(values)):
        n += good[k]
        total += good[k] * values[k]
    along_y, disc = np.empty((SIDE, HIGHEST), np.float32), np.empty((SIDE, SIDE), np.float32)
    cos_y, cos_x = _waves(y)[0], np.ascontiguousarray(_waves(x)[0].T)
    most, best = -1.0, (0.0, 0.0, 0.0)
    for place in FIRST_RADII:
        radius = RADII_PX[place]
        _multiply(cos_y, _interpolated(table, 0, radius)[0], along_y)
        _multiply(along_y, cos_x, disc)
        sum_d, sum_dd, sum_dv = 0.0, 0.0, 0.0
        for k, d in enumerate(disc.ravel()):
            sum_d += good[k] * d
            sum_dd += good[k] * d * d
            sum_dv += good[k] * d * values[k]
        power = max(sum_dd - sum_d * sum_d / n, 1e-6)
        depth = (sum_dv - sum_d * total / n) / power
        explained = depth * depth * power if depth > 0 else 0.0
        if explained > most:
            most, best = explained, (radius, depth, (total - depth * sum_d) / n)
    return best


def _highest(cut: Cut, x: float, y: float) -> tuple[float, float]:
    """Where the smoothed cut-out is highest, not too far from a place."""
    from scipy.ndimage import gaussian_filter

    image = np.where(cut.good, cut.values - bottleneck.median(cut.values[cut.good]), np.float32(0))
    smooth = gaussian_filter(image.reshape(SIDE, SIDE), SMOOTHING_PX, mode="constant", truncate=2.0)
    place = int(np.where(_distance(x, y, SIDE) < FARTHEST_PX - 1, smooth, -np.inf).argmax())
    return float(place % SIDE), float(place // SIDE)


@nb.njit(cache=True, nogil=True)
def _fit(values, good, start, low, high, table):  # type: ignore[no-untyped-def]
    """All shapes at a peak by Levenberg's and Marquardt's least squares, within limits: what makes a `Model`."""
    n_shapes, n = table.shape[1], len(values)
    parameters, chi2 = np.empty((n_shapes, 5)), np.empty(n_shapes)
    residual, slopes = np.empty((n_shapes, n), np.float32), np.empty((n_shapes, 5, n), np.float32)
    new_residual, new_slopes = np.empty(n, np.float32), np.empty((5, n), np.float32)
    damping, gain, moved = np.full(n_shapes, 1e-3), np.empty(n_shapes), np.empty(5)
    for shape in range(n_shapes):
        parameters[shape] = start
        chi2[shape] = _model(values, good, table, shape, start, residual[shape], slopes[shape])
    for _ in range(STEPS):
        for shape in range(n_shapes):
            normal, step = _normal(parameters[shape], residual[shape], slopes[shape])
            for i in range(5):
                normal[i, i] *= 1 + damping[shape]
            _solve(normal, step)
            for i in range(5):
                moved[i] = min(max(parameters[shape, i] + step[i], low[i]), high[i])
            new_chi2 = _model(values, good, table, shape, moved, new_residual, new_slopes)
            gain[shape] = chi2[shape] - new_chi2
            damping[shape] *= 10 if gain[shape] < 0 else 0.1
            if gain[shape] >= 0:
                parameters[shape], residual[shape], slopes[shape] = moved, new_residual, new_slopes
                chi2[shape] = new_chi2
        best, going = chi2.min(), False
        for shape in range(n_shapes):
            going |= abs(gain[shape]) >= max(ENOUGH, HOPELESS * (chi2[shape] - best))
        if not going:
            break
    return parameters, residual, slopes, chi2


@nb.njit(cache=True, nogil=True)
def _solve(matrix, vector):  # type: ignore[no-untyped-def]
    """Linear equations in place, the solution in ``vector``; the matrix is positive definite: any pivot will do."""
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
def _normal(parameters, residual, slopes):  # type: ignore[no-untyped-def]
    """The normal matrix of a shape, and its right-hand side."""
    normal, slope = np.empty((5, 5)), np.empty(5)
    for i in range(5):
        slope[i] = _dot(slopes[i], residual)
        for j in range(i + 1):
            normal[i, j] = normal[j, i] = _dot(slopes[i], slopes[j])
        normal[i, i] += 1e-6  # what is not there leaves its parameters where they are
    normal[2, 2] += 1 / RADIUS_SPREAD_PX**2
    slope[2] -= (parameters[2] - TYPICAL_RADIUS_PX) / RADIUS_SPREAD_PX**2
    return normal, slope


def _averaged(cut: Cut, model: Model, usable: Mask) -> list[float]:
    """The mean over the usable shapes, each with the weight of its likelihood: x, y and errors, radius, depth, ..."""
    chi2, n_pixels = model.chi2[usable], cut.good.sum()
    misfit = max(float(chi2.min()) / (n_pixels - 5), 1.0)
    weights = np.exp((chi2.min() - chi2) / (2 * misfit))
    weights /= weights.sum()
    values, depths = model.parameters[usable], model.parameters[usable, 3]
    normal = np.array([_normal(*each)[0] for each in zip(*model[:3], strict=True)])[usable]
    snr = depths * np.sqrt(normal[:, 3, 3])
    sums = [_profile_sum(shape, radius) for shape, radius in enumerate(model.parameters[:, 2])]
    loss = depths * np.array(sums)[usable]
    variances = misfit * np.einsum("kii->ki", np.linalg.inv(normal))
    mean = weights @ values
    x_err, y_err, radius_err, depth_err, _ = np.sqrt(weights @ (variances + np.square(values - mean)))
    mean_snr = float(weights @ snr)
    wider = np.sqrt(1 + WANDERING / max(mean_snr, 1.0) ** 2)
    depth = mean[3] * (1 - NOISE_FITTED / max(mean_snr, NOISE_FITTED) ** 2)
    x_err, y_err, radius_err = wider * x_err, wider * y_err, wider * radius_err
    return [*mean[:2], x_err, y_err, mean[2], radius_err, depth, depth_err, float(weights @ loss), mean_snr]


def _unfitted(cut: Cut, start: FloatArray) -> list[float]:
    """The disc that a failed fit started from, without errors, in the order of `_averaged`."""
    x, y, radius, depth, _ = start
    residual, slopes = np.empty_like(cut.values), np.empty((5, len(cut.values)), np.float32)
    _model(cut.values, cut.good.astype(np.float32), _table(), 0, start, residual, slopes)
    loss, snr = depth * _profile_sum(0, radius), float(depth * np.linalg.norm(slopes[3]))
    return [x, y, np.nan, np.nan, radius, np.nan, depth, np.nan, loss, snr]


def _profile_sum(shape: int, radius: float) -> float:
    return float(_interpolated(_table(), shape, radius)[0][0, 0]) * PERIOD_PX**2


def without_repeats(detections: pd.DataFrame, within_px: float = KNOWN_PX) -> pd.DataFrame:
    """Of detections whose fits have ended at one place only the first: a large blob may have two peaks.

    Parameters
    ----------
    detections : DataFrame
        From `measure`, the highest score first.
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


def judge(
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
        Light loss of the known blobs, from `difference.blob_pattern`.
    noise_frac : float
        Standard deviation of a pixel (fraction of the light).
    scatter : ndarray, shape (ny // 2, nx // 2), float32, optional
        Of the stack's images, from `difference.scatter`.
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
    known = np.zeros((0, 3)) if catalogue is None else catalogue[["x_px", "y_px", "radius_px"]].to_numpy(float)
    places = detections[["x_px", "y_px", "radius_px", "depth_frac", "snr"]].to_numpy(float)
    status = []
    for x, y, radius, depth, snr in places.tolist():
        catalogued = _is_near((x, y), known[:, :2], shift_px, np.maximum(KNOWN_PX, KNOWN_RADII * known[:, 2]))
        learning = seen is not None and _is_near((x, y), seen, shift_px, KNOWN_PX)
        of_stack = (scatter, None, None) if learning else (scatter, bad, stack)
        if not catalogued and _is_bad((x, y, radius, depth, snr), difference, lit, noise_frac, *of_stack):
            status.append("bad_pixels")
        elif _is_dip((x, y), radius, known, difference, residual, noise_frac):
            status.append("dip")
        elif catalogued or (pattern is not None and _height(pattern, x, y) >= depth):
            status.append("known")
        else:
            status.append("new")
    return detections.assign(status=pd.Series(status, detections.index, dtype=str))


def _is_near(
    place: tuple[float, float], others: FloatArray, shift_px: tuple[float, float], within_px: FloatArray | float
) -> bool:
    """Whether a place of an image is that of a blob, where the mirror has put it or where it usually is."""
    return any(bool((np.hypot(*(others + moved - place).T) <= within_px).any()) for moved in (shift_px, (0.0, 0.0)))


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
    window = _window(pattern, round(x) - KNOWN_HALF, round(y) - KNOWN_HALF, 2 * KNOWN_HALF + 1)
    return float(np.nan_to_num(window).mean())


def _shift_residual(pattern: Image | None, shift_px: tuple[float, float]) -> Image | None:
    """What the known blobs leave in a difference image whose shift has not been taken off."""
    shift = subtraction.Shift(float(shift_px[0]), float(shift_px[1]))
    if pattern is None or not np.hypot(*shift) > subtraction.NEGLIGIBLE_PX:
        return None
    return subtraction.move_pattern(pattern, shift) - pattern


def _lit(difference: Image) -> Mask:
    """Pixels of rows and columns that have any value: the rest is the detector's border, and no fault."""
    finite = np.isfinite(difference)
    return np.logical_and.outer(finite.any(axis=1), finite.any(axis=0))


def _on_few_pixels(x: float, y: float, radius: float, difference: Image, lit: Mask, noise: float) -> bool:
    """Whether too much of a footprint has no value, or nothing is left without its few highest pixels."""
    left, top = round(x) - HALF, round(y) - HALF
    window, distance = _window(difference, left, top, SIDE), _distance(x - left, y - top, SIDE)
    finite, footprint = np.isfinite(window), distance <= radius
    inside = footprint & (_window(lit.astype(np.float32), left, top, SIDE) > 0)
    if (inside & ~finite).sum() >= MOST_MISSING * inside.sum():
        return True
    around = window[finite & ~(distance < DIP_REACH * radius)]
    level = bottleneck.median(around) if len(around) else 0.0
    return bool(_trimmed_snr((window[inside & finite] - level) / noise) < REST_SNR)


def _hard(x: float, y: float, radius: float, depth: float, difference: Image, noise: float) -> bool:
    """Whether smoothing takes more away than from a blob: bad pixels are not blurred."""
    from scipy.ndimage import gaussian_filter

    left, top = round(x) - HALF, round(y) - HALF
    window = np.nan_to_num(_window(difference, left, top, SIDE))
    once = gaussian_filter(window, subtraction.SMOOTHING_PX)
    lost = window - once - gaussian_filter(window - once, subtraction.SMOOTHING_PX)
    edge = _distance(x - left, y - top, SIDE) <= radius + HARD_MARGIN_PX
    return bool(1.4826 * bottleneck.median(np.abs(lost[edge])) > HARD_SIGMA * noise + HARD_FRAC * depth)


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
    cell = subtraction.CELL_PX
    half = int(np.ceil((radius + RING_PX[1]) / cell)) + 1
    column, row = ((at + 0.5) / cell - 0.5 for at in (x, y))
    left, top = round(column) - half, round(row) - half
    window, distance = (
        _window(scatter, left, top, 2 * half + 1),
        cell * _distance(column - left, row - top, 2 * half + 1),
    )
    around = window[(distance > radius + RING_PX[0]) & (distance <= radius + RING_PX[1]) & (window > 0)]
    if not len(around):
        return False
    middle = float(bottleneck.nanmedian(window[distance <= max(radius - EDGE_PX, cell)]))
    excess = np.sqrt(max(middle**2 - float(bottleneck.median(around)) ** 2, 0.0))
    return bool(middle > RESTLESS * np.percentile(around, 75) and depth < OUTBURST * excess)


def bad_pixels(stack: Image, pattern: Image) -> Mask:
    """What of a median stack neither its noise nor the known blobs explain: clusters that read high or low on most days.

    On a day on which such a cluster reads otherwise it looks like a small blob.

    Parameters
    ----------
    stack : ndarray, shape (ny, nx), float32
        Median stack (fraction of the light).
    pattern : ndarray, shape (ny, nx), float32
        Its known blobs, from `difference.blob_pattern`.

    Returns
    -------
    ndarray, shape (ny, nx), bool
        Pixels without a value are not among them.

    Notes
    -----
    Source: ours.
    """
    noise = subtraction.clean_noise(stack)
    return np.asarray(np.abs(stack - pattern) > UNEXPLAINED_SIGMA * noise + UNEXPLAINED_FRAC * np.abs(pattern))


def on_bad_pixels(x: float, y: float, radius: float, bad: Mask) -> bool:
    """Whether too much of a footprint (px) is known to be bad.

    Parameters
    ----------
    bad
        As in `judge`.
    """
    left, top = round(x) - HALF, round(y) - HALF
    window = _window(bad, left, top, SIDE)
    footprint = (_distance(x - left, y - top, SIDE) <= radius) & np.isfinite(window)  # as far as it is on the image
    return bool(footprint.any() and window[footprint].mean() >= MOST_MISSING)


def is_of_the_stack(x: float, y: float, radius: float, depth: float, difference: Image, stack: Image) -> bool:
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
    left, top = round(x) - HALF, round(y) - HALF
    distance = _distance(x - left, y - top, SIDE)
    inside, around = distance <= radius, distance > DIP_REACH * radius
    both = [_window(image, left, top, SIDE) for image in (difference, stack)]
    finite: Mask = np.isfinite(both[0]) & np.isfinite(both[1])
    if not (finite[inside].any() and finite[around].any()):
        return False
    signal, of_stack = (
        np.clip(window[inside & finite] - bottleneck.median(window[around & finite]), -depth, depth).mean()
        for window in both
    )
    return bool(signal > 0 and -of_stack > OF_STACK * signal)


def _trimmed_snr(values: FloatArray) -> float:
    """S/N of a sum, without the few highest and as many of the lowest values, had those been like the rest."""
    few = min(FEW_PIXELS, len(values) // FEW_SHARE)
    return float(np.sort(values)[few : len(values) - few].mean() * np.sqrt(len(values)))


def _predicted(x: float, y: float, radius: float, difference: Image, residual: Image, noise: float) -> bool:
    """Whether the shift predicts much of the signal, and the negative side that belongs to it is there too."""
    left, top = round(x) - HALF, round(y) - HALF
    window, expected = (_window(image, left, top, SIDE) for image in (difference, residual))
    both = np.isfinite(window) & np.isfinite(expected)
    footprint = both & (_distance(x - left, y - top, SIDE) <= radius)
    if not expected[footprint].sum() > EXPLAINED * window[footprint].sum():
        return False
    dark = both & (expected < DARK_SIDE * np.nanmin(expected))
    deepest = float(-np.nanmin(expected)) + 3 * noise
    found = window[dark].clip(-deepest, deepest)
    return bool(found @ expected[dark] > WITNESSED * np.sum(np.square(expected[dark])))


def _has_counterpart(
    place: tuple[float, float], radius: float, blob: FloatArray, difference: Image, noise: float
) -> bool:
    """Whether a negative signal of comparable size lies beyond the centre of a known blob, seen from a detection."""
    from scipy.ndimage import uniform_filter

    reach = DIP_REACH * blob[2] + DIP_MARGIN_PX
    half = int(np.ceil(reach + radius)) + 3
    left, top = round(blob[0]) - half, round(blob[1]) - half
    (x, y), (blob_x, blob_y) = np.subtract(place, (left, top)), np.subtract(blob[:2], (left, top))
    side = int(np.clip(round(blob[2] / 2), 1, 3)) * 2 + 1
    window = np.nan_to_num(_window(difference, left, top, 2 * half + 1)).clip(-1, 1)
    mean = uniform_filter(window, side, mode="constant")
    height = float(mean[_distance(x, y, len(mean)) <= max(radius, 2.0)].max(initial=0.0))
    near = _distance(blob_x, blob_y, len(mean)) <= reach
    across = float(mean[near & _beyond((x, y), (blob_x, blob_y), len(mean))].min(initial=0.0))
    return -across >= max(COUNTERPART * height, COUNTERPART_SNR * noise / side)


def _beyond(place: tuple[float, float], centre: tuple[float, float], side: int) -> Mask:
    """Pixels within 60 degrees of the direction from a place to a centre; all, where the two are nearly the same."""
    pixels = np.arange(side)
    x, y = pixels - place[0], (pixels - place[1])[:, None]
    along = np.subtract(centre, place)
    length = float(np.hypot(*along))
    return np.asarray((x * along[0] + y * along[1] >= 0.5 * length * np.hypot(x, y)) | (length < 1))


def seen_again(previous: pd.DataFrame, current: pd.DataFrame, tolerance_px: float = 3.0) -> pd.DataFrame:
    """Mark new blobs that a later image shows again: a blob never moves and never vanishes.

    Parameters
    ----------
    previous, current : DataFrame
        From `judge`, of an image and of a later one.
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
    pairs = match(previous[columns].to_numpy(float)[new], later, tolerance_px)
    status = previous["status"].copy()
    status.iloc[new[pairs[:, 0]]] = "seen_again"
    return previous.assign(status=status)


def match(detections_xy: FloatArray, blobs_xy: FloatArray, tolerance: float) -> npt.NDArray[np.intp]:
    """Pair detections with blobs, one to one: as many pairs as there can be, and of those the nearest in sum.

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

    Notes
    -----
    Source: ours.
    """
    from scipy.optimize import linear_sum_assignment

    detections, blobs = (np.reshape(np.asarray(xy, np.float64), (-1, 2)) for xy in (detections_xy, blobs_xy))
    offset = detections[:, None] - blobs
    distance = np.nan_to_num(np.hypot(offset[..., 0], offset[..., 1]), nan=np.inf, posinf=np.inf)
    near = distance <= tolerance
    forbidden = (min(near.shape) + 1) * (tolerance + 1)  # dearer than any number of pairs
    rows, columns = linear_sum_assignment(np.where(near, distance, forbidden))
    return np.asarray(np.column_stack([rows, columns])[near[rows, columns]], dtype=np.intp)
