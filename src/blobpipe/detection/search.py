"""Search one difference image for blobs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from blobpipe.core import fits_images
from blobpipe.core.arrays import FloatArray
from blobpipe.detection import matched_filter
from blobpipe.detection.fit import fit_blobs, rough_snr
from blobpipe.detection.match import without_repeats
from blobpipe.detection.vet import bad_pixels, vet
from blobpipe.images import tiles
from blobpipe.networks import dense, report_network
from blobpipe.simulation import render

CANDIDATE = 0.05  # of the map: a peak below it is no candidate; some twenty to a frame are above
# and one below this is a candidate only if it is bright; some eight to a frame are left
LIKELY = 0.2
BRIGHT_SNR = 5.0
DETECTORS = ("dense", "report", "matched_filter")
# S/N of blobs that must be found, and of those that should be
CLEAR = (7.0, math.inf)
FAINT = (5.0, 7.0)
NOTHING_KNOWN = {"catalogue": None, "shift_px": (0.0, 0.0), "pattern": None}


class Reference(NamedTuple):
    """The reference stack, its known blobs (both of shape (ny, nx), fraction of the light), and where its pixels are bad."""

    stack: npt.NDArray[np.float32]
    pattern: npt.NDArray[np.float32]
    bad: npt.NDArray[np.bool_]


def read_reference(difference_dir: str | Path) -> Reference:
    """Of ``reference.fits.fz`` of the stage difference."""
    stack, pattern = (
        fits_images.read_plane(Path(difference_dir) / "reference.fits.fz", name)
        for name in ("STACK", "PATTERN")
    )
    return Reference(stack, pattern, bad_pixels(stack, pattern))


def read_difference(
    image: pd.Series[Any],
    known: pd.DataFrame,
    difference_dir: str | Path,
    reference: Reference,
) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
    """A difference image, and what `vet.vet` wants to know of it.

    Parameters
    ----------
    image : Series
        Its row of `tables.image_table`.
    known : DataFrame
        The blobs that landed before it.
    reference : Reference
        From `read_reference`.
    """
    path = fits_images.find_image(difference_dir, image["frame"])
    about = {
        "catalogue": known,
        "shift_px": (float(image["shift_x_px"]), float(image["shift_y_px"])),
        "pattern": reference.pattern,
        "bad": reference.bad,
        "stack": reference.stack,
        "noise_frac": float(image["noise_frac"]),
        "scatter": fits_images.find_plane(path, "SCATTER"),
    }
    return fits_images.read_frame(path).data, about


def vet_peaks(
    cells: npt.NDArray[np.float32],
    difference: npt.NDArray[np.float32],
    *,
    noise_frac: float,
    **about: Any,
) -> pd.DataFrame:
    """Peaks of the dense network's map, measured on the unclipped difference, and judged; scores are the network's.

    Parameters
    ----------
    cells : ndarray
        From `dense.probability_map`.
    difference : ndarray, shape (ny, nx), float32
        As it was subtracted (fraction of the light).
    noise_frac, about
        As in `vet.vet`.
    """
    return vet(fit_peaks(cells, difference, noise_frac), difference, noise_frac=noise_frac, **about)


def fit_peaks(
    cells: npt.NDArray[np.float32], difference: npt.NDArray[np.float32], noise_frac: float
) -> pd.DataFrame:
    """The same before they are judged, for who wants to judge a few of them."""
    return fit_at(dense.peaks(cells, CANDIDATE), difference, noise_frac)


def fit_at(
    peaks: dense.Peaks, difference: npt.NDArray[np.float32], noise_frac: float
) -> pd.DataFrame:
    """The same at some peaks.

    Those that are both low on the map and faint on the image are not measured: of those tried, none scored half.
    """
    x, y, score = peaks
    worth = (score >= LIKELY) | (rough_snr(difference, x, y, noise_frac) >= BRIGHT_SNR)
    return without_repeats(fit_blobs(difference, x[worth], y[worth], score[worth], noise_frac))


def highest_scores(candidates: pd.DataFrame, corners_px: npt.NDArray[np.int64]) -> FloatArray:
    """Highest score of the candidates on each subframe that were not judged to be something else.

    Parameters
    ----------
    candidates : DataFrame
        Judged, with scores.
    corners_px : ndarray, shape (n, 2)
        x, y of each subframe's first pixel.

    Returns
    -------
    ndarray, shape (n,), float64
        0 where there is none.
    """
    candidates = candidates[candidates["status"].isin(["", "new"])]
    place = candidates[["x_px", "y_px"]].to_numpy() - corners_px[:, None]
    inside = ((place >= -0.5) & (place < tiles.SIDE - 0.5)).all(axis=2)
    return np.asarray(
        np.where(inside, candidates["score"].to_numpy(), 0.0).max(axis=1, initial=0.0)
    )


class Baselines(NamedTuple):
    """What the dense network is compared with: the report's network, and a matched filter of some radii (px)."""

    report: report_network.ReportNetwork
    radii_px: tuple[float, ...]


class Answers(NamedTuple):
    """What the baselines say about each of the ``n`` subframes of a frame.

    Attributes
    ----------
    origins : ndarray, shape (n, 4), int64
        Row, column, x0, y0, from `tiles.tile`.
    probability : ndarray, shape (n,), float64
        Of the report's network.
    match : Match
        Of the matched filter, each array of shape (n,); x, y in the frame (px).
    """

    origins: npt.NDArray[np.int64]
    probability: FloatArray
    match: matched_filter.Match


def subframes_of(
    scaled: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """A scaled frame as standardised subframes, and their origins (`tiles.tile`)."""
    subframes, origins = tiles.tile(scaled)
    return render.standardise(subframes), origins


def ask(
    others: Baselines, subframes: npt.NDArray[np.float32], origins: npt.NDArray[np.int64]
) -> Answers:
    """Ask the baselines about subframes."""
    match = matched_filter.filter_subframes(subframes, others.radii_px)
    match = match._replace(x=match.x + origins[:, 2], y=match.y + origins[:, 3])
    return Answers(origins, report_network.predict(others.report, subframes), match)
