"""Thresholds that keep a budget of false alarms on a team's own quiet images, and the file that holds one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from blobpipe.core import files
from blobpipe.core.arrays import FloatArray
from blobpipe.detection.detectors import DenseDetector
from blobpipe.detection.operating_point import CANDIDATE
from blobpipe.errors import ModelError, ParamsError, TableError
from blobpipe.params import parse_yaml, text_of

# Spacing of the thresholds, and its number of decimals; scores on two machines differ by less
STEP = 1e-6
N_DECIMALS = 6

# Standard errors by which the dispersion of the counts must exceed that of independent alarms
SIGNIFICANT = 2.0

# Numbers of peaks per image at which the dispersion of the counts is measured; above 1, the noise of a night, which
# moves all images a little, would count as groups
LEVELS = (0.25, 0.5, 1.0)

# What is said of an operating point that was set with another mask
OTHER_BAD_PIXELS = "set with other bad pixels than these; run 'blobpipe calibrate' again with them"

FIRST_LINES = (
    "# Operating point of one dense network on one detector, written by 'blobpipe calibrate'.\n"
)


# --------------------------------------------------------------------------------------------------------- limits


def upper_limit(
    n_alarms: float, n_images: int, confidence: float, dispersion: float = 1.0
) -> float:
    """Return the upper limit of the expected number of false alarms per image.

    Parameters
    ----------
    n_alarms : float
        Counted on all images.
    n_images : int
        Images, of which each is as likely to show false alarms as any other.
    confidence : float
        One-sided (0 to 1).
    dispersion : float
        Variance of the counts per image over their mean, from `measure_dispersion`.

    Notes
    -----
    Without dispersion: the exact upper limit of a Poisson mean after k events, the gamma quantile of shape k + 1
    (Garwood 1936). It is also exact at a threshold just above the (k + 1)-th highest score, because the expected number
    above that score follows this gamma distribution, whatever the distribution of the scores. With a dispersion d,
    alarms come in groups: the limit is that of k / d groups, times d. This is exact for groups of d alarms each.
    """
    from scipy.stats import gamma

    quantile = gamma.ppf(confidence, n_alarms / dispersion + 1)
    return float(dispersion * quantile / n_images)


def most_alarms(budget: float, n_images: int, confidence: float, dispersion: float = 1.0) -> int:
    """Return how many false alarms may be counted so that the budget is kept; -1 if not even none.

    Parameters
    ----------
    budget : float
        Largest expected number of false alarms per image.
    n_images, confidence, dispersion
        As for `upper_limit`.
    """
    # The limit exceeds the count for each confidence from 0.5, so the count stays below budget times images
    most = -1
    beyond = math.ceil(budget * n_images) + 1
    while beyond - most > 1:
        middle = (most + beyond) // 2
        if upper_limit(middle, n_images, confidence, dispersion) <= budget:
            most = middle
        else:
            beyond = middle
    return most


def images_needed(budget: float, confidence: float, dispersion: float = 1.0) -> int:
    """Return the number of quiet images from which a budget (false alarms per image) can be promised."""
    return math.ceil(-math.log1p(-confidence) * dispersion / budget)


def measure_dispersion(scores: Sequence[FloatArray]) -> float:
    """Return the variance of the number of false peaks per image over its mean; 1 unless significantly more.

    Parameters
    ----------
    scores : sequence of ndarray
        Scores of the false peaks of each image.

    Notes
    -----
    False peaks on one image need not be independent: a bad image shows several. The budget is of their expected number,
    so the ratio is taken among the peaks of lower scores, of which there are enough, and the largest of a few levels
    counts. It counts where it exceeds 1 by two standard errors, sqrt(2 / (n - 1)) each for independent counts; then it
    is increased by one standard error, for it is itself measured. What no image has shown cannot be allowed for: kinds
    of bad image of which fewer than 1 in n is expected.
    """
    n_images = len(scores)
    if n_images < 2:
        return 1.0
    ordered = np.sort(np.concatenate([np.zeros(0), *scores]))[::-1]
    ratios = [1.0]
    for level in LEVELS:
        n_peaks = int(min(level * n_images, len(ordered)))
        # Of one peak there is no variance
        if n_peaks > 1:
            counts = np.array([np.count_nonzero(each >= ordered[n_peaks - 1]) for each in scores])
            ratios.append(float(counts.var(ddof=1) / counts.mean()))
    error = math.sqrt(2 / (n_images - 1))
    largest = max(ratios)
    return largest * (1 + error) if largest > 1 + SIGNIFICANT * error else 1.0


class Promise(NamedTuple):
    """A threshold, and the false alarms that it promises.

    Attributes
    ----------
    threshold : float
        Lowest score at which the limit is within the budget or, where no score is, just above the highest false one.
    per_image : float
        Upper limit of the expected number of false alarms per image there.
    n_alarms : int
        False peaks that lie above it.
    dispersion : float
        Variance of the counts per image over their mean that was allowed for.
    """

    threshold: float
    per_image: float
    n_alarms: int
    dispersion: float


def promise_threshold(scores: Sequence[FloatArray], budget: float, confidence: float) -> Promise:
    """Find the lowest threshold at which a budget of false alarms is kept; nothing is extrapolated.

    Parameters
    ----------
    scores : sequence of ndarray
        Scores of the false peaks of each quiet image; an image without any is an empty array.
    budget : float
        Largest expected number of false alarms per image.
    confidence : float
        One-sided (0 to 1).

    Raises
    ------
    TableError
        If there is no image, or more false peaks than allowed have the highest possible score.
    """
    n_images = len(scores)
    if n_images == 0:
        raise TableError("found no quiet image, expected some; name images without a new blob")
    dispersion = measure_dispersion(scores)
    ordered = np.sort(np.concatenate([np.zeros(0), *scores]))[::-1]
    candidates = ordered[ordered >= CANDIDATE]

    # Too few images for the budget: the threshold lies above all false peaks, and less is promised
    n_alarms = max(most_alarms(budget, n_images, confidence, dispersion), 0)

    # The threshold lies just above the first peak that is too many; without one, every candidate is a detection
    threshold = CANDIDATE
    if len(candidates) > n_alarms:
        threshold = _just_above(float(candidates[n_alarms]))
    n_alarms = min(n_alarms, len(candidates))
    limit = upper_limit(n_alarms, n_images, confidence, dispersion)
    return Promise(threshold, limit, n_alarms, dispersion)


def _just_above(score: float) -> float:
    """Return the lowest threshold above a score, in steps of `STEP`."""
    if score >= 1:
        raise TableError(
            "found false peaks of the score 1, expected lower ones: no threshold excludes them; "
            "look at these images, and name their blobs by --catalogue or their bad pixels by --bad-pixels"
        )
    threshold = round(math.floor(score / STEP + 1) * STEP, N_DECIMALS)
    # The product may be rounded down to the score itself
    if threshold <= score:
        threshold = round(threshold + STEP, N_DECIMALS)
    return min(threshold, 1.0)


# ----------------------------------------------------------------------------------------------------------- file


@dataclass(frozen=True)
class PromisedPoint:
    """An operating point that a team has set on its own images.

    Attributes
    ----------
    threshold : float
        Score from which a candidate is a detection.
    false_alarms_per_100_images : float
        Promised: upper limit of the expected number, rounded up (count).
    budget_per_100_images : float
        What was asked for (count).
    confidence : float
        Of the promise, one-sided (0 to 1).
    n_images, n_alarms : int
        Quiet images, and false peaks on them above the threshold.
    dispersion : float
        As in `Promise`.
    model_sha256 : str
    bad_pixels_sha256 : str
        Of each mask, separated by blanks; empty if there was none.
    subtracted : str
        ``difference`` (images that were differences already), ``running stack``, or the SHA-256 of the median stack.
    first_date, last_date : str
        Days of the first and last image, YYYY-MM-DD; empty if the headers have no dates.
    version : str
        Of blobpipe.
    """

    threshold: float
    false_alarms_per_100_images: float
    budget_per_100_images: float
    confidence: float
    n_images: int
    n_alarms: int
    dispersion: float
    model_sha256: str
    bad_pixels_sha256: str
    subtracted: str
    first_date: str
    last_date: str
    version: str

    @property
    def is_within_budget(self) -> bool:
        """Return whether the promise is as good as what was asked for."""
        return self.false_alarms_per_100_images <= self.budget_per_100_images

    def describe(self) -> str:
        """Return threshold and promise in a few words."""
        return (
            f"threshold {self.threshold:.6g}, at most {self.false_alarms_per_100_images:g} false alarms per 100 images "
            f"(confidence {self.confidence:g}, {self.n_images} images)"
        )

    def shortfall(self) -> str:
        """Say that there are too few images for the budget, and how many are needed; empty if there are enough."""
        if self.is_within_budget:
            return ""
        needed = images_needed(self.budget_per_100_images / 100, self.confidence, self.dispersion)
        return (
            f"{self.n_images} images promise at most {self.false_alarms_per_100_images:g} false alarms per 100 with "
            f"confidence {self.confidence:g}; {needed} are needed for {self.budget_per_100_images:g}"
        )


# What a file may hold, by name
CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "threshold": (f"a number from {CANDIDATE:g} to 1", lambda v: _is_number(v, CANDIDATE, 1)),
    "false_alarms_per_100_images": ("a number above 0", lambda v: _is_number(v, 1e-9, 1e9)),
    "budget_per_100_images": ("a number above 0", lambda v: _is_number(v, 1e-9, 1e9)),
    "confidence": ("a number from 0.5 to below 1", lambda v: _is_number(v, 0.5, 1) and v < 1),
    "n_images": ("a count from 1", lambda v: _is_count(v, 1)),
    "n_alarms": ("a count", lambda v: _is_count(v, 0)),
    "dispersion": ("a number from 1", lambda v: _is_number(v, 1, 1e9)),
    "model_sha256": ("a SHA-256", lambda v: _matches(v, r"[0-9a-f]{64}")),
    "bad_pixels_sha256": ("SHA-256, or nothing", lambda v: _matches(v, r"([0-9a-f]{64} ?)*")),
    "subtracted": (
        "difference, running stack or a SHA-256",
        lambda v: _matches(v, r"difference|running stack|[0-9a-f]{64}"),
    ),
    "first_date": ("a day", lambda v: _matches(v, r"(\d{4}-\d\d-\d\d)?")),
    "last_date": ("a day", lambda v: _matches(v, r"(\d{4}-\d\d-\d\d)?")),
    "version": ("a version", lambda v: _matches(v, r"[\w.+-]{1,40}")),
}


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _is_count(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _matches(value: Any, pattern: str) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def write_promised_point(path: str | Path, point: PromisedPoint) -> None:
    """Write an operating point as YAML; the same point gives the same bytes."""
    lines = [f"{name}: {json.dumps(value)}\n" for name, value in asdict(point).items()]
    with files.atomic(path) as temporary:
        temporary.write_text(FIRST_LINES + "".join(lines), encoding="utf-8")


def read_promised_point(path: str | Path) -> PromisedPoint:
    """Read an operating point.

    Raises
    ------
    ParamsError
        If the file is missing or damaged, or a value is out of range.
    """
    found = parse_yaml(text_of(path), path)
    names = [each.name for each in fields(PromisedPoint)]
    advice = "run 'blobpipe calibrate' again or restore it"
    if not isinstance(found, dict):
        raise ParamsError(
            f"{path}: found no operating point, expected {names[0]} and more; {advice}"
        )
    missing = [name for name in names if name not in found]
    unknown = [str(name)[:40] for name in found if name not in names]
    if missing or unknown:
        what = f"{missing[0]} is missing" if missing else f"found {unknown[0]!r}"
        raise ParamsError(f"{path}: {what}, expected the keys of an operating point; {advice}")
    for name, (expected, is_valid) in CHECKS.items():
        if not is_valid(found[name]):
            value = str(found[name])[:40]
            raise ParamsError(f"{path}: {name}: found {value!r}, expected {expected}; {advice}")
    return PromisedPoint(**found)


def apply_promised_point(
    detector: DenseDetector, model: str | Path, path: str | Path
) -> tuple[DenseDetector, PromisedPoint]:
    """Replace the threshold of a detector by that of a file; probabilities stay as they are.

    Parameters
    ----------
    model : path
        File of the detector.
    path : path
        From `write_promised_point`.

    Raises
    ------
    ModelError
        If the operating point is that of another model.
    ParamsError
        As `read_promised_point`.
    """
    point = read_promised_point(path)
    sha256 = files.sha256(model)
    if point.model_sha256 != sha256:
        raise ModelError(
            f"{path}: found the operating point of the model {point.model_sha256[:12]}, expected that of {model} "
            f"({sha256[:12]}); run 'blobpipe calibrate' with this model"
        )
    threshold = detector.point._replace(threshold=float(point.threshold))
    return replace(detector, point=threshold), point
