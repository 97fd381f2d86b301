"""Search the latest images together: a blob that has landed is on every later image.

Settled images
--------------
Each image is settled once. What it differs by from its own stack is limited, so that a streak counts for no
more than noise, and moved to where the mirror usually puts the blobs; the stack is added again. Settled
images then differ by noise and by new blobs alone, and are kept as whole numbers: the same images give
the same sums, whatever a run has been through.

Deep differences
----------------
The deep difference of n images is the mean of the latest n settled images minus that of the `BASELINE`
before them, each image weighted by the inverse square of its noise. In white noise s the noise of a blob
falls from s to s (1/n + 1/30)^(1/2). n doubles from one depth to the next: whenever a blob landed, some
depth holds at least half of the images since, and few before. The network looks at the places alone that a
matched filter sees (`WORTH_SNR`), which costs a tenth of a look at the whole image.
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

import numba as nb
import numpy as np
import pandas as pd
import torch

from blobpipe.core.arrays import FloatArray, Image, Int16Array
from blobpipe.core.cutouts import cut_square, window_around
from blobpipe.core.detector import DEFAULT
from blobpipe.core.detector import Detector as Instrument
from blobpipe.detection.detectors import DenseDetector
from blobpipe.detection.fit import DETECTION_COLUMNS
from blobpipe.detection.match import NEAR_PX, without_repeats
from blobpipe.detection.operating_point import logit
from blobpipe.detection.search import observe
from blobpipe.images.pattern import smooth_gaussian
from blobpipe.images.register import NEGLIGIBLE_PX, NO_SHIFT, Shift, move_pattern
from blobpipe.images.stack import CELL_PX
from blobpipe.images.template import Template
from blobpipe.networks.dense_network import DenseNetwork
from blobpipe.noise.level import clean_noise
from blobpipe.params import Deep as Settings
from blobpipe.params import Vetting

# Numbers of latest images that are searched together (count); the image alone is searched as ever
DEPTHS = (2, 4, 8, 16, 32)

# Images before them with which they are compared (count), as many as a stack takes, and the fewest
BASELINE = 30
FEWEST = 15

# Settled images that the deepest difference takes
KEPT = max(DEPTHS) + BASELINE

# Rows that are added at a time: their sums stay in the cache of a core
ROWS = 32

# Step of a settled image (fraction of the light), 1/60 of an image's noise; its value for a missing pixel
STEP_FRAC = 2.0**-13
MISSING = np.int16(np.iinfo(np.int16).min)

# What an image differs by from its stack counts up to these (sigma): a pixel, and the mean over a Gaussian
# as wide as a streak (px). Of blobs, they limit only those that one image shows clearly.
PIXEL_SIGMA = 4.0
STREAK_SIGMA = 5.0
STREAK_PX = 1.5

# Response of the matched filter from which the network looks at a place (S/N): on a simulated campaign,
# that of none of 178 detections was below 4.8, and of none of 347 with those nearly found below 4.4
WORTH_SNR = 4.25

# Side of the square that the network sees around a place, and up to what distance its answer counts (px)
SEEN_PX = 96
ANSWERED_PX = 20
STRIDE = DenseNetwork.STRIDE

# By how much the score of what is nearly found may lie below the threshold (log-odds)
NEARLY = 1.0

# Beyond the radius of a clear blob, what belongs to its edge (px)
CLEAR_MARGIN_PX = 4.0


@dataclass(frozen=True)
class SettledImage:
    """An image whose blobs lie at their usual place, in steps of `STEP_FRAC`.

    Attributes
    ----------
    values : ndarray, shape (ny, nx), int16
        `MISSING` where there is no value.
    noise_frac : float
        Noise of its difference from its stack (fraction of the light).
    """

    values: Int16Array
    noise_frac: float

    def cut(self, x: int, y: int, side: int) -> Image:
        """Return a square of the image (fraction of the light), as `cutouts.cut_square`."""
        window = cut_square(self.values, x, y, side)
        window[window == MISSING] = np.nan
        return window * np.float32(STEP_FRAC)


def settle(
    difference: Image,
    stack: Image,
    shift: Shift = NO_SHIFT,
    clear: pd.DataFrame | None = None,
) -> SettledImage:
    """Limit what an image differs by from its stack, and move it to where blobs usually lie.

    Parameters
    ----------
    difference : ndarray, shape (ny, nx), float32
        Image minus stack, from `difference.subtract` (fraction of the light); NaN where there is no value.
    stack : ndarray, shape (ny, nx), float32
        With its blobs at their usual place.
    shift : Shift
        By how much the blobs of the image lie off it (px).
    clear : DataFrame, optional
        x_px, y_px, radius_px of the new blobs that the image shows clearly, on the image: they are not limited.
    """
    missing = ~np.isfinite(difference)
    noise = clean_noise(difference)
    limit = np.float32(PIXEL_SIGMA * noise)
    whole = np.where(missing, np.float32(0), difference)
    rest = np.clip(whole, -limit, limit)

    # A streak is cut back as a whole: each of its pixels alone may be no more than noise
    smooth = smooth_gaussian(rest, STREAK_PX)
    limit = np.float32(STREAK_SIGMA * clean_noise(smooth))
    rest += np.clip(smooth, -limit, limit) - smooth
    if clear is not None:
        for x, y, radius in clear[["x_px", "y_px", "radius_px"]].to_numpy(float):
            window, distance = window_around(rest.shape, x, y, radius + CLEAR_MARGIN_PX)
            inside = distance <= radius + CLEAR_MARGIN_PX
            rest[window][inside] = whole[window][inside]

    # New blobs are moved back; the pixels' own pattern is in the stack, which stays
    if np.hypot(*shift) > NEGLIGIBLE_PX:
        rest = move_pattern(rest, Shift(-shift[0], -shift[1]))
    missing |= ~np.isfinite(stack)
    steps = np.rint(np.where(missing, np.float32(0), stack + rest) / np.float32(STEP_FRAC))
    largest = np.iinfo(np.int16).max
    values = np.clip(steps, -largest, largest).astype(np.int16)
    values[missing] = MISSING
    return SettledImage(values, noise)


class DeepDifference(NamedTuple):
    """The difference of the latest images from those before them.

    Attributes
    ----------
    n_images : int
        Number of latest images.
    difference : ndarray, shape (ny, nx), float32
        Fraction of the light; NaN where no image has a value.
    baseline : ndarray, shape (ny, nx), float32
        Mean of the images before them.
    """

    n_images: int
    difference: Image
    baseline: Image


@dataclass(frozen=True)
class Latest:
    """The latest settled images, at most `KEPT`, in order of date."""

    images: deque[SettledImage] = field(default_factory=lambda: deque(maxlen=KEPT))

    def add(self, image: SettledImage) -> None:
        """Add the newest image; the oldest is dropped."""
        self.images.append(image)

    def differences(self, depths: tuple[int, ...] = DEPTHS) -> list[DeepDifference]:
        """Return the deep differences, of those depths for which there are enough images before."""
        n = len(self.images)
        possible = [depth for depth in depths if n - depth >= FEWEST]
        if not possible:
            return []

        # Latest images of each depth, and those before them
        spans = [(n - depth, n) for depth in possible]
        spans += [(max(n - depth - BASELINE, 0), n - depth) for depth in possible]
        weights = np.array([1 / image.noise_frac**2 for image in self.images])
        weights = (weights / weights.mean()).astype(np.float32)
        means = means_within([image.values for image in self.images], weights, spans)
        return [
            DeepDifference(depth, latest - baseline, baseline)
            for depth, latest, baseline in zip(
                possible, means, means[len(possible) :], strict=False
            )
        ]

    def rms(self) -> Image:
        """Return the RMS map of the oldest images, as `stack.rms_map`: flickering pixels stand out."""
        oldest = [image.values for image in islice(self.images, BASELINE)]
        variance = variances(oldest) * np.float32(STEP_FRAC**2)
        ny, nx = (side // CELL_PX for side in variance.shape)
        cells = variance[: ny * CELL_PX, : nx * CELL_PX].reshape(ny, CELL_PX, nx, CELL_PX)
        return np.asarray(np.sqrt(cells.mean(axis=(1, 3))), np.float32)


def means_within(
    values: list[Int16Array], weights: FloatArray, spans: list[tuple[int, int]]
) -> list[Image]:
    """Return weighted means over some spans of images.

    Parameters
    ----------
    values : list of ndarray, shape (ny, nx), int16
        Settled images in order of date.
    weights : ndarray, shape (n,), float32
    spans : list of (int, int)
        Index of the first image of each span, and of the first one after it.

    Returns
    -------
    list of ndarray, shape (ny, nx), float32
        A mean for each span (fraction of the light), NaN where none of its images has a value.
    """
    marks = sorted({0, *(mark for span in spans for mark in span)})
    means = [np.empty(values[0].shape, np.float32) for _ in spans]

    # Some rows at a time, which stay in the cache while all images are added
    def fill(row: int) -> None:
        rows = slice(row, row + ROWS)
        sums = np.zeros((len(marks), *values[0][rows].shape), np.float32)
        shares = np.zeros_like(sums)
        for k in range(1, len(marks)):
            sums[k] = sums[k - 1]
            shares[k] = shares[k - 1]
            for i in range(marks[k - 1], marks[k]):
                _add(values[i][rows].ravel(), weights[i], sums[k].ravel(), shares[k].ravel())
        for mean, (first, end) in zip(means, spans, strict=True):
            a = marks.index(first)
            b = marks.index(end)
            pairs = (sums[a], sums[b], shares[a], shares[b], mean[rows])
            _divide(*(plane.ravel() for plane in pairs))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill, range(0, len(values[0]), ROWS)))
    return means


@nb.njit(cache=True, nogil=True)
def _add(values, weight, total, share):  # type: ignore[no-untyped-def]
    """Add an image with its weight to a total, and the weight to a share, where it has a value."""
    for k in range(values.size):
        there = np.float32(0) if values[k] == MISSING else weight
        total[k] += there * np.float32(values[k])
        share[k] += there


@nb.njit(cache=True, nogil=True)
def _divide(total_before, total, share_before, share, mean):  # type: ignore[no-untyped-def]
    """Fill in the mean of a span (fraction of the light), from what lies before its begin and its end."""
    for k in range(mean.size):
        weight = share[k] - share_before[k]
        sum_of_values = (total[k] - total_before[k]) * np.float32(STEP_FRAC)
        mean[k] = sum_of_values / weight if weight > 0 else np.float32(np.nan)


def variances(values: list[Int16Array]) -> Image:
    """Return the variance of each pixel over settled images, shape (ny, nx), float32 (steps squared).

    0 where one of them has no value.
    """
    variance = np.empty(values[0].shape, np.float32)

    # Whole numbers, so that the sums are exact
    def fill(row: int) -> None:
        rows = slice(row, row + ROWS)
        first = values[0][rows].ravel()
        total = np.zeros(first.size, np.int32)
        squares = np.zeros(first.size, np.int64)
        missing = first == MISSING
        for image in values[1:]:
            _add_squares(image[rows].ravel(), first, total, squares, missing)
        mean = total / len(values)
        found = np.where(missing, 0, squares / len(values) - mean**2)
        variance[rows] = found.reshape(variance[rows].shape)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill, range(0, len(variance), ROWS)))
    return variance


@nb.njit(cache=True, nogil=True)
def _add_squares(values, first, total, squares, missing):  # type: ignore[no-untyped-def]
    """Add by what an image differs from the first one to a total, and the square of it to another."""
    for k in range(values.size):
        step = np.int32(values[k]) - np.int32(first[k])
        total[k] += step
        squares[k] += np.int64(step) * np.int64(step)
        missing[k] |= values[k] == MISSING


def thresholds(single: float, params: Settings) -> dict[int, float]:
    """Return the score from which a candidate of each depth is a detection, by number of images.

    Parameters
    ----------
    single : float
        Threshold of a single image (score).
    params : Deep
    """
    start = logit(np.array(single))
    levels = 1 / (1 + np.exp(-(start + np.array(params.margins))))
    return dict(zip(DEPTHS, levels.tolist(), strict=True))


def find_deep_blobs(
    differences: list[DeepDifference],
    template: Template,
    detector: DenseDetector,
    thresholds: dict[int, float],
    *,
    catalogue: pd.DataFrame | None = None,
    vetting: Vetting | None = None,
    instrument: Instrument = DEFAULT,
) -> pd.DataFrame:
    """Search deep differences; list detections, and what is close to being one.

    Parameters
    ----------
    thresholds : dict of float
        By number of images: score from which a candidate of that depth is a detection.
    differences, template, detector, catalogue, vetting, instrument
        As for `search_depths`.

    Returns
    -------
    DataFrame
        One row per place, from the depth in which it is clearest, whatever its status: the columns of `search_depths`, and
        ``is_detection``: false for what lies below the threshold of each depth, but by no more than `NEARLY`.
    """
    found = search_depths(
        differences,
        template,
        detector,
        catalogue=catalogue,
        vetting=vetting,
        instrument=instrument,
    )
    over = logit(found["score"].to_numpy(float))
    over -= logit(found["n_images"].map(thresholds).to_numpy(float))
    detected = merge_depths(found[over >= 0]).assign(is_detection=True)
    nearly = merge_depths(found[(over < 0) & (over >= -NEARLY)]).assign(is_detection=False)

    # What a depth nearly finds, another may find
    places = [part[["x_px", "y_px"]].to_numpy(float) for part in (nearly, detected)]
    offset = places[0][:, None] - places[1]
    is_apart = (np.hypot(offset[..., 0], offset[..., 1]) > NEAR_PX).all(axis=1)
    return pd.concat([detected, pd.DataFrame(nearly[is_apart])], ignore_index=True)


def search_depths(
    differences: list[DeepDifference],
    template: Template,
    detector: DenseDetector,
    *,
    catalogue: pd.DataFrame | None = None,
    vetting: Vetting | None = None,
    instrument: Instrument = DEFAULT,
) -> pd.DataFrame:
    """List the candidates of each depth.

    Parameters
    ----------
    differences : list of DeepDifference
        From `Latest.differences`.
    template : Template
        That of the newest image, whose bad pixels and noise model are those of the deep differences, too, with
        the RMS map of `Latest.rms`.
    detector : DenseDetector
    catalogue : DataFrame, optional
        x_px, y_px, radius_px of the blobs known before.
    vetting : Vetting, optional
    instrument : core.detector.Detector, optional
        WFC3/IR if not given.

    Returns
    -------
    DataFrame
        The columns of `search.find_blobs` and ``n_images``, the depth.
    """

    def search(deep: DeepDifference) -> pd.DataFrame:
        # A pattern would take what landed within the baseline for known
        below = replace(template, stack=deep.baseline, pattern=None)
        observation = observe(deep.difference, below, catalogue=catalogue, instrument=instrument)
        filtered = observation.filter()
        scaled = observation.scaled()
        x, y, _ = filtered.places(WORTH_SNR)
        response = respond_at(detector, scaled, x, y)
        peaks = detector.peaks(response, scaled)
        found = observation.find_blobs(detector, peaks=peaks, filtered=filtered, vetting=vetting)
        return found.assign(n_images=deep.n_images)

    # A thread for each depth: a network on several threads would wait for them
    with ThreadPoolExecutor(os.cpu_count(), "deep", torch.set_num_threads, (1,)) as pool:
        found = list(pool.map(search, differences))
    empty = pd.DataFrame(columns=[*DETECTION_COLUMNS, "probability", "n_images"])
    return pd.concat(found, ignore_index=True) if found else empty


def respond_at(detector: DenseDetector, scaled: Image, x_px: FloatArray, y_px: FloatArray) -> Image:
    """Map the probability of a blob's core around some places.

    Parameters
    ----------
    detector : DenseDetector
    scaled : ndarray, shape (ny, nx), float32
        Clipped and scaled (sigma).
    x_px, y_px : ndarray, shape (n,)
        Places on it (px).

    Returns
    -------
    ndarray, shape (ceil(ny / 4), ceil(nx / 4)), float32
        As `DenseDetector.respond` up to `ANSWERED_PX` from a place, where the network sees no farther than a
        square of `SEEN_PX`; elsewhere 0. Of the whole image, where so many squares would cost more.
    """
    ny, nx = (-(-side // STRIDE) for side in scaled.shape)
    if len(x_px) == 0:
        return np.zeros((ny, nx), np.float32)

    # Squares begin where the network's cells do, those of its coarsest layer, too
    multiple = DenseNetwork.MULTIPLE
    places = np.stack([x_px, y_px], axis=1) - SEEN_PX / 2
    corners = np.unique(np.rint(places / multiple).astype(int) * multiple, axis=0)
    if len(corners) * SEEN_PX**2 >= scaled.size:
        return detector.respond(scaled)
    squares = [np.nan_to_num(cut_square(scaled, x, y, SEEN_PX)) for x, y in corners.tolist()]
    answers = detector.respond(np.stack(squares))

    # What squares hold beyond the image is cut off at the end
    margin = SEEN_PX // STRIDE
    middle = slice((SEEN_PX // 2 - ANSWERED_PX) // STRIDE, (SEEN_PX // 2 + ANSWERED_PX) // STRIDE)
    response = np.zeros((ny + 2 * margin, nx + 2 * margin), np.float32)
    for (column, row), answer in zip(corners // STRIDE + margin, answers, strict=True):
        around = response[row : row + margin, column : column + margin][middle, middle]
        np.maximum(around, answer[middle, middle], out=around)
    return response[margin:-margin, margin:-margin]


def merge_depths(found: pd.DataFrame) -> pd.DataFrame:
    """Return one row per place of detections of several depths: that of the highest S/N, new ones first.

    Parameters
    ----------
    found : DataFrame
        Detections of all depths, with x_px, y_px, snr, status and n_images.
    """
    is_new = found["status"] == "new"
    order = np.lexsort([-found["snr"].to_numpy(float), ~is_new.to_numpy(bool)])
    return without_repeats(found.iloc[order], NEAR_PX)
