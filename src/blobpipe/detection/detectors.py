"""Detectors: what a scaled image is searched with, and the score from which a peak counts.

The dense network is the detector of the daily work; the report's network and the matched filter are
what it is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pandas as pd

from blobpipe.core.arrays import FloatArray, Image, Mask
from blobpipe.detection import matched_filter
from blobpipe.detection.operating_point import (
    CANDIDATE,
    UNSET,
    OperatingPoint,
    logit,
    read_operating_point,
)
from blobpipe.detection.score import score_candidates
from blobpipe.errors import ModelError
from blobpipe.images import tiles
from blobpipe.networks import dense, dense_network, model_file, report_network, saliency
from blobpipe.simulation import render

# Score of a peak from which it is looked at again, and fitted
LIKELY = 0.2

# Score of a place that only a matched filter sees: the network's map has no peak of `CANDIDATE` there
UNSEEN = 0.02

DETECTORS = ("dense", "report", "matched_filter")


class Peaks(NamedTuple):
    """Places at which a detector sees something, the highest score first; arrays of one length.

    Attributes
    ----------
    x_px, y_px : ndarray, float64
        In the image (px).
    score : ndarray, float64
        In the detector's own unit.
    """

    x_px: FloatArray
    y_px: FloatArray
    score: FloatArray


class Detector(Protocol):
    """What `search.find_blobs` searches with."""

    @property
    def threshold(self) -> float:
        """Score from which a candidate is a detection."""

    @property
    def unseen(self) -> float | None:
        """Score of a place that only a matched filter sees; None if such places are not looked at."""

    def search(self, scaled: Image) -> Peaks:
        """Search a clipped and scaled image, shape (ny, nx), float32 (sigma)."""

    def rate(self, candidates: pd.DataFrame) -> pd.DataFrame:
        """Give fitted candidates, whose score is that of their peak, their score and probability."""


@dataclass(frozen=True)
class DenseDetector:
    """The dense network with its operating point.

    Attributes
    ----------
    network : DenseNetwork
        Folded for searching (`dense_network.folded`).
    point : OperatingPoint
    unseen : float
        Score of a place that only a matched filter sees.
    """

    network: dense_network.DenseNetwork
    point: OperatingPoint = UNSET
    unseen: float | None = UNSEEN

    @property
    def threshold(self) -> float:
        """Score from which a candidate is a detection, 0 to 1."""
        return self.point.threshold

    def respond(self, scaled: Image) -> Image:
        """Map the probability of a blob's core, in cells of 4 x 4 pixels (`dense.probability_map`)."""
        return dense.probability_map(self.network, scaled)

    def peaks(self, response: Image, scaled: Image) -> Peaks:
        """Find the peaks of such a map that may be candidates, and look at the likely ones again."""
        x, y, score = dense.peaks(response, CANDIDATE)
        likely = score >= LIKELY
        score[likely] = dense.look_again(self.network, scaled, x[likely], y[likely])
        order = np.argsort(-score, kind="stable")
        return Peaks(x[order], y[order], score[order])

    def search(self, scaled: Image) -> Peaks:
        """Search a scaled image."""
        return self.peaks(self.respond(scaled), scaled)

    def probability(self, score: FloatArray) -> FloatArray:
        """Turn scores into probabilities of a new blob, at the prior rate of the settings."""
        return self.point.probability(score)

    def rate(self, candidates: pd.DataFrame) -> pd.DataFrame:
        """Combine the network's log-odds with what was measured (`score.score_candidates`)."""
        scored = score_candidates(candidates, self.point.weights)
        return scored.assign(probability=self.probability(scored["score"].to_numpy()))


@dataclass(frozen=True)
class ReportDetector:
    """The report's network: one score for each subframe of 256 x 256 pixels.

    Attributes
    ----------
    network : ReportNetwork
    threshold : float
        Log-odds from which a subframe is positive.
    """

    network: report_network.ReportNetwork
    threshold: float = 0.0
    unseen: float | None = None

    def answer(self, scaled: Image, wanted: Mask | None = None) -> FloatArray:
        """Return the log-odds of each subframe of a scaled image, or of those that are wanted."""
        subframes = standardised_subframes(scaled)
        asked = subframes if wanted is None else subframes[wanted]
        return logit(report_network.predict(self.network, asked))

    def point_at(self, scaled: Image, positive: Mask) -> FloatArray:
        """Return x, y of the saliency map's peak in each positive subframe, shape (n, 2); else NaN."""
        subframes = standardised_subframes(scaled)
        origins = tiles.origins(scaled.shape)
        places = np.full((len(subframes), 2), np.nan)
        maps = saliency.saliency_maps(self.network, subframes[positive])
        places[positive] = origins[positive, 2:] + saliency.peaks(maps)
        return places

    def search(self, scaled: Image) -> Peaks:
        """Search a scaled image: a peak for each positive subframe, where the network looks."""
        odds = self.answer(scaled)
        positive = odds >= self.threshold
        places = self.point_at(scaled, positive)[positive]
        order = np.argsort(-odds[positive], kind="stable")
        return Peaks(places[order, 0], places[order, 1], odds[positive][order])

    def rate(self, candidates: pd.DataFrame) -> pd.DataFrame:
        """Leave the scores as they are; they have no calibrated probability."""
        return candidates.assign(probability=np.nan)


@dataclass(frozen=True)
class MatchedFilter:
    """A bank of matched filters: the highest response in each subframe.

    Attributes
    ----------
    radii_px : tuple of float
        Of its top-hats (px).
    threshold : float
        S/N from which a response is a detection.
    """

    radii_px: tuple[float, ...]
    threshold: float = 0.0
    unseen: float | None = None

    def answer(self, scaled: Image, wanted: Mask | None = None) -> FloatArray:
        """Return the highest S/N in each subframe of a scaled image, or in those that are wanted."""
        subframes = standardised_subframes(scaled)
        asked = subframes if wanted is None else subframes[wanted]
        return matched_filter.filter_subframes(asked, self.radii_px).snr

    def respond(self, scaled: Image) -> matched_filter.Match:
        """Return the highest response in each subframe, its place in the image (px)."""
        match = matched_filter.filter_subframes(standardised_subframes(scaled), self.radii_px)
        origins = tiles.origins(scaled.shape)
        return match._replace(x=match.x + origins[:, 2], y=match.y + origins[:, 3])

    def search(self, scaled: Image) -> Peaks:
        """Search a scaled image: a peak for each subframe, the highest first."""
        match = self.respond(scaled)
        order = np.argsort(-match.snr, kind="stable")
        x, y, snr = (values[order].astype(np.float64) for values in (match.x, match.y, match.snr))
        return Peaks(x, y, snr)

    def rate(self, candidates: pd.DataFrame) -> pd.DataFrame:
        """Leave the scores as they are; they have no calibrated probability."""
        return candidates.assign(probability=np.nan)


def standardised_subframes(scaled: Image) -> Image:
    """Cut a scaled image into subframes of mean 0 and standard deviation 1, shape (n, 256, 256)."""
    return render.standardise(tiles.tile(scaled)[0])


def load_detector(path: str | Path = model_file.PACKAGED) -> DenseDetector | ReportDetector:
    """Load the detector that a model file holds; the packaged one if none is named.

    Raises
    ------
    ModelError
        If the file is missing or damaged, or its operating point is invalid.
    """
    if model_file.kind_of_model(path) == "report":
        return ReportDetector(model_file.load_model(path)[0])
    return load_dense_detector(path)


def load_dense_detector(path: str | Path) -> DenseDetector:
    """Load a dense network with its operating point, ready for searching.

    Raises
    ------
    ModelError
        As `model_file.load_dense`; or if its operating point is invalid.
    """
    network, metadata = model_file.load_dense(path)
    try:
        point = read_operating_point(metadata)
    except ValueError as error:
        raise ModelError(
            f"{path}: the operating point is invalid ({error}); run the stage detect again or restore it"
        ) from error
    return DenseDetector(dense_network.folded(network), point)
