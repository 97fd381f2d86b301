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
depth holds at least half of the images since, and few before.
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

from blobpipe.core.arrays import FloatArray, Image, Int16Array
from blobpipe.core.cutouts import cut_square, window_around
from blobpipe.core.detector import DEFAULT
from blobpipe.core.detector import Detector as Instrument
from blobpipe.detection.detectors import Detector
from blobpipe.detection.fit import DETECTION_COLUMNS
from blobpipe.detection.match import NEAR_PX, without_repeats
from blobpipe.detection.operating_point import logit
from blobpipe.detection.search import observe
from blobpipe.images.noise import clean_noise
from blobpipe.images.pattern import smooth_gaussian
from blobpipe.images.register import NEGLIGIBLE_PX, NO_SHIFT, Shift, move_pattern
from blobpipe.images.stack import CELL_PX, ROWS
from blobpipe.images.template import Template
from blobpipe.params import Deep as Settings
from blobpipe.params import Vetting

# Numbers of latest images that are searched together (count); the image alone is searched as ever
DEPTHS = (2, 4, 8, 16, 32)

# Images before them with which they are compared (count), as many as a stack takes, and the fewest
BASELINE = 30
FEWEST = 15

# Settled images that the deepest difference takes
KEPT = max(DEPTHS) + BASELINE

# Step of a settled image (fraction of the light), 1/60 of an image's noise; its value for a missing pixel
STEP_FRAC = 2.0**-13
MISSING = np.iinfo(np.int16).min

# What an image differs by from its stack counts up to these (sigma): a pixel, and the mean over a Gaussian
# as wide as a streak (px). Of blobs, they limit only those that one image shows clearly.
PIXEL_SIGMA = 4.0
STREAK_SIGMA = 5.0
STREAK_PX = 1.5

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
    values = np.clip(steps, MISSING + 1, -(MISSING + 1)).astype(np.int16)
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

        # Sums over all images before each place at which a difference begins or ends
        starts = {depth: (max(n - depth - BASELINE, 0), n - depth) for depth in possible}
        marks = sorted({n, *(mark for pair in starts.values() for mark in pair)})
        values = [image.values for image in self.images]
        weights = np.array([1 / image.noise_frac**2 for image in self.images])
        sums, shares = sums_before(values, (weights / weights.mean()).astype(np.float32), marks)

        def mean(first: int, end: int) -> Image:
            at = (marks.index(first), marks.index(end))
            share = shares[at[1]] - shares[at[0]]
            total = (sums[at[1]] - sums[at[0]]) * np.float32(STEP_FRAC)
            return np.where(share > 0, total / np.maximum(share, 1e-6), np.float32(np.nan))

        found = []
        for depth, (first, end) in starts.items():
            baseline = mean(first, end)
            found.append(DeepDifference(depth, mean(end, n) - baseline, baseline))
        return found

    def rms(self) -> Image:
        """Return the RMS map of the oldest images, as `stack.rms_map`: flickering pixels stand out."""
        oldest = [image.values for image in islice(self.images, BASELINE)]
        variance = variances(oldest) * np.float32(STEP_FRAC**2)
        ny, nx = (side // CELL_PX for side in variance.shape)
        cells = variance[: ny * CELL_PX, : nx * CELL_PX].reshape(ny, CELL_PX, nx, CELL_PX)
        return np.asarray(np.sqrt(cells.mean(axis=(1, 3))), np.float32)


def sums_before(
    values: list[Int16Array], weights: FloatArray, marks: list[int]
) -> tuple[Image, Image]:
    """Return weighted sums over all images before each of some marks.

    Parameters
    ----------
    values : list of ndarray, shape (ny, nx), int16
        Settled images in order of date.
    weights : ndarray, shape (n,), float32
    marks : list of int
        Indices of images, increasing; the last may be ``n``.

    Returns
    -------
    sums, shares : ndarray, shape (len(marks), ny, nx), float32
        Sum of weight times value, and of the weights, both without missing values.
    """
    ny, nx = values[0].shape
    sums = np.zeros((len(marks), ny, nx), np.float32)
    shares = np.zeros((len(marks), ny, nx), np.float32)

    # Some rows at a time, which stay in the cache while all images are added
    def add_rows(row: int) -> None:
        rows = slice(row, row + ROWS)
        total = np.zeros_like(sums[0, rows])
        share = np.zeros_like(total)
        for k in range(marks[-1] + 1):
            if k in marks:
                sums[marks.index(k), rows] = total
                shares[marks.index(k), rows] = share
            if k < marks[-1]:
                _add(values[k][rows], weights[k], total, share)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(add_rows, range(0, ny, ROWS)))
    return sums, shares


@nb.njit(cache=True, nogil=True)
def _add(values, weight, total, share):  # type: ignore[no-untyped-def]
    """Add an image with its weight to a total, and the weight to a share, where it has a value."""
    for y in range(values.shape[0]):
        for x in range(values.shape[1]):
            value = values[y, x]
            there = np.float32(value != MISSING)
            total[y, x] += there * weight * np.float32(value)
            share[y, x] += there * weight


def variances(values: list[Int16Array]) -> Image:
    """Return the variance of each pixel over settled images, shape (ny, nx), float32 (steps squared)."""
    ny, nx = values[0].shape
    variance = np.zeros((ny, nx), np.float32)

    def fill(row: int) -> None:
        rows = slice(row, row + ROWS)
        variance[rows] = np.stack([image[rows] for image in values]).var(axis=0, dtype=np.float32)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill, range(0, ny, ROWS)))
    missing = np.logical_or.reduce([image == MISSING for image in values])
    variance[missing] = 0
    return variance


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
    detector: Detector,
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
    detector: Detector,
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
    detector : Detector
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
        found = observation.find_blobs(detector, vetting=vetting)
        return found.assign(n_images=deep.n_images)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(search, differences))
    empty = pd.DataFrame(columns=[*DETECTION_COLUMNS, "probability", "n_images"])
    return pd.concat(found, ignore_index=True) if found else empty


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
