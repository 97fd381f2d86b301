"""Find blobs in one difference image: the one search of the pipeline, the daily work and notebooks.

In this order: the detector's peaks, a fit at each of them, vetting, the score, its probability.
Vetting does not depend on the score, so all candidates are vetted, not only those above a threshold:
a subframe's probability then never rests on something that is no blob.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from blobpipe.core import fits_images
from blobpipe.core.arrays import FloatArray, Image
from blobpipe.detection.detectors import Detector, Peaks
from blobpipe.detection.fit import fit_blobs, rough_snr
from blobpipe.detection.match import without_repeats
from blobpipe.detection.vet import vet_candidates
from blobpipe.images import tiles
from blobpipe.images.clip import clip_image
from blobpipe.images.noise import image_noise
from blobpipe.images.register import NO_SHIFT
from blobpipe.images.scale import scale_image
from blobpipe.images.template import Template, find_bad_pixels
from blobpipe.params import Clip, Scale, Vetting

# A peak is fitted if its score is at least this, or the image is bright there: of those that are
# neither, none of those tried reached half. Some eight peaks of an image are left.
LIKELY = 0.2
BRIGHT_SNR = 5.0

# S/N of blobs that must be found, and of those that should be.
CLEAR = (7.0, math.inf)
FAINT = (5.0, 7.0)


def find_blobs(
    difference: Image,
    template: Template | None = None,
    detector: Detector | None = None,
    *,
    catalogue: pd.DataFrame | None = None,
    shift_px: tuple[float, float] = NO_SHIFT,
    noise_frac: float | None = None,
    recent_px: FloatArray | None = None,
    peaks: Peaks | None = None,
    vetting: Vetting | None = None,
) -> pd.DataFrame:
    """Find blobs in a difference image.

    Parameters
    ----------
    difference : ndarray, shape (ny, nx), float32
        Image minus template, not clipped (fraction of the light; a new blob is positive); NaN where
        there is no value.
    template : Template, optional
        What was subtracted. Without it nothing can be known of bad pixels or of residuals of the
        mirror's shift.
    detector : Detector, optional
        The packaged dense network if not given.
    catalogue : DataFrame, optional
        x_px, y_px, radius_px of the blobs known before the image.
    shift_px : tuple of float
        By how much the known blobs of this image lie off their usual place, along x and y (px).
    noise_frac : float, optional
        Standard deviation of a pixel (fraction of the light); estimated if not given.
    recent_px : ndarray, shape (n, 2), optional
        Usual places of new blobs of earlier images, which the template is still learning (`vet.vet_candidates`).
    peaks : Peaks, optional
        Where to look, if the detector has searched already; otherwise the difference is clipped and
        scaled with the default settings, and searched.
    vetting : Vetting, optional
        Settings of the vetting; the defaults if not given.

    Returns
    -------
    DataFrame
        A row per candidate, in the order of its peak: the columns of `fit.fit_blobs`, with the
        ``score`` of the detector and the ``status`` of `vet.vet_candidates`, and ``probability``. Detections
        are the rows whose score reaches ``detector.threshold``; new blobs are those of the status
        ``new``.
    """
    if detector is None:
        from blobpipe.detection.detectors import load_detector

        detector = load_detector()
    if noise_frac is None:
        noise_frac = image_noise(difference)
    if peaks is None:
        clipped, _ = clip_image(difference, Clip())
        peaks = detector.search(scale_image(clipped, Scale())[0])

    # The fit and the vetting see the unclipped difference.
    candidates = fit_peaks(peaks, difference, noise_frac)
    candidates = vet_candidates(
        candidates,
        difference,
        template or Template(),
        catalogue=catalogue,
        shift_px=shift_px,
        noise_frac=noise_frac,
        recent_px=recent_px,
        params=vetting or Vetting(),
    )
    return detector.rate(candidates)


class Observation(NamedTuple):
    """A difference image of the pipeline, and what is known of it before it is searched.

    Attributes
    ----------
    difference : ndarray, shape (ny, nx), float32
    template : Template
    catalogue : DataFrame
        The blobs that landed before it.
    shift_px : (float, float)
        Of its known blobs (px).
    noise_frac : float
    """

    difference: Image
    template: Template
    catalogue: pd.DataFrame | None
    shift_px: tuple[float, float]
    noise_frac: float

    def find_blobs(
        self, detector: Detector, *, peaks: Peaks | None = None, vetting: Vetting | None = None
    ) -> pd.DataFrame:
        """Search it (`find_blobs`)."""
        return find_blobs(
            self.difference,
            self.template,
            detector,
            catalogue=self.catalogue,
            shift_px=self.shift_px,
            noise_frac=self.noise_frac,
            peaks=peaks,
            vetting=vetting,
        )


def read_pipeline_template(difference_dir: str | Path) -> Template:
    """Read the template of the stage difference, without an RMS map: each image has its own."""
    path = Path(difference_dir) / "reference.fits.fz"
    stack, pattern = (fits_images.read_plane(path, name) for name in ("STACK", "PATTERN"))
    return Template(stack, pattern, None, find_bad_pixels(stack, pattern))


def read_observation(
    image: pd.Series[Any], known: pd.DataFrame, difference_dir: str | Path, template: Template
) -> Observation:
    """Read a difference image of the pipeline.

    Parameters
    ----------
    image : Series
        Its row of `tables.image_table`.
    known : DataFrame
        The blobs that landed before it.
    template : Template
        From `read_pipeline_template`.
    """
    path = fits_images.find_image(difference_dir, image["frame"])
    return Observation(
        fits_images.read_frame(path).data,
        replace(template, rms=fits_images.find_plane(path, "SCATTER")),
        known,
        (float(image["shift_x_px"]), float(image["shift_y_px"])),
        float(image["noise_frac"]),
    )


def fit_peaks(peaks: Peaks, difference: Image, noise_frac: float) -> pd.DataFrame:
    """Fit a blob at each peak that is worth it; of fits that end at one place keep the first.

    Parameters
    ----------
    peaks : Peaks
    difference, noise_frac
        As for `find_blobs`.

    Returns
    -------
    DataFrame
        From `fit.fit_blobs`; the score is that of the peak.
    """
    x, y, score = peaks
    bright = rough_snr(difference, x, y, noise_frac) >= BRIGHT_SNR
    worth = (score >= LIKELY) | bright
    return without_repeats(fit_blobs(difference, x[worth], y[worth], score[worth], noise_frac))


def subframe_scores(candidates: pd.DataFrame, shape: tuple[int, ...]) -> FloatArray:
    """Return the highest score of a new blob on each subframe of an image.

    Parameters
    ----------
    candidates : DataFrame
        From `find_blobs`.
    shape : (ny, nx)
        Of the image.

    Returns
    -------
    ndarray, shape (n,), float64
        In the order of `tiles.origins`; 0 where there is none.
    """
    new = candidates[candidates["status"] == "new"]
    corners = tiles.origins(shape)[:, 2:]
    place = new[["x_px", "y_px"]].to_numpy() - corners[:, None]
    inside = ((place >= -0.5) & (place < tiles.SIDE - 0.5)).all(axis=2)
    scores = np.where(inside, new["score"].to_numpy(), 0.0)
    return np.asarray(scores.max(axis=1, initial=0.0))
