"""Find blobs in one difference image: the one search of the pipeline, the daily work and notebooks.

In this order: the noise is whitened, the detector's peaks, a fit at each of them, vetting, the
radius compared with the expected one, its surroundings, the score, its probability.
Vetting does not depend on the score, so all candidates are vetted, not only those above a threshold:
a subframe's probability then never rests on something that is no blob.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from blobpipe.core import fits_images
from blobpipe.core.arrays import FloatArray, Image
from blobpipe.core.detector import DEFAULT
from blobpipe.core.detector import Detector as Instrument
from blobpipe.detection.detectors import LIKELY, Detector, Peaks
from blobpipe.detection.fit import fit_blobs
from blobpipe.detection.lines import line_snr
from blobpipe.detection.match import without_repeats
from blobpipe.detection.matched_filter import FilteredImage, filter_image
from blobpipe.detection.size_law import SizeLaw, choose_size_law
from blobpipe.detection.vet import vet_candidates
from blobpipe.images import tiles
from blobpipe.images.clip import clip_image
from blobpipe.images.register import NO_SHIFT
from blobpipe.images.scale import scale_image
from blobpipe.images.template import Template, find_bad_pixels
from blobpipe.noise.level import image_noise
from blobpipe.noise.whiten import WHITE, NoiseModel, measure_noise_model, read_noise_model
from blobpipe.params import Clip, Scale, Vetting

# A peak is fitted if its score is likely, or if the matched filter has an S/N of this there: of 154 clear
# blobs of a campaign, three were found only so. Of pure noise, there are two such places on an image.
BRIGHT_SNR = 4.5

# S/N of the filter from which places that only it sees are examples for the joint score
ALONE_SNR = 5.5

# Distance within which a place of the filter is that of a peak (px): peaks are found in cells of 4 px
SAME_PX = 10.0

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
    recent_px: FloatArray | None = None,
    vetting: Vetting | None = None,
    instrument: Instrument = DEFAULT,
) -> pd.DataFrame:
    """Find blobs in a difference image.

    Parameters
    ----------
    difference : ndarray, shape (ny, nx), float32
        Image minus template, not clipped (fraction of the light; a new blob is positive); NaN where
        there is no value.
    template : Template, optional
        What was subtracted. Without it nothing can be known of bad pixels or of residuals of the
        mirror's shift, and the noise is measured on the difference itself.
    detector : Detector, optional
        The packaged dense network if not given.
    catalogue : DataFrame, optional
        x_px, y_px, radius_px of the blobs known before the image.
    shift_px : tuple of float
        By how much the known blobs of this image lie off their usual place, along x and y (px).
    recent_px : ndarray, shape (n, 2), optional
        Usual places of new blobs of earlier images, which the template is still learning (`vet.vet_candidates`).
    vetting : Vetting, optional
        Settings of the vetting; the defaults if not given.
    instrument : core.detector.Detector, optional
        The infrared detector of the image, which tells how large blobs are.

    Returns
    -------
    DataFrame
        As `Observation.find_blobs`.
    """
    if detector is None:
        from blobpipe.detection.detectors import load_detector

        detector = load_detector()
    observation = observe(
        difference,
        template,
        catalogue=catalogue,
        shift_px=shift_px,
        recent_px=recent_px,
        instrument=instrument,
    )
    return observation.find_blobs(detector, vetting=vetting)


@dataclass(frozen=True)
class Observation:
    """A difference image, and what is known of it before it is searched.

    Attributes
    ----------
    difference : ndarray, shape (ny, nx), float32
        Fraction of the light, NaN where there is no value.
    whitened : ndarray, shape (ny, nx), float32
        The same with white noise (fraction of the light).
    template : Template
        What was subtracted.
    catalogue : DataFrame or None
        The blobs that landed before it.
    shift_px : (float, float)
        Of its known blobs (px).
    noise_model : NoiseModel
        Of the difference.
    noise_frac : float
        Standard deviation of a pixel of the whitened difference (fraction of the light).
    size_law : SizeLaw or None
        Expected radius of a blob at each place.
    recent_px : ndarray, shape (n, 2), or None
        Usual places of new blobs of earlier images (px).
    """

    difference: Image
    whitened: Image
    template: Template
    catalogue: pd.DataFrame | None
    shift_px: tuple[float, float]
    noise_model: NoiseModel
    noise_frac: float
    size_law: SizeLaw | None = None
    recent_px: FloatArray | None = None

    def with_signal(self, signal: Image) -> Observation:
        """Return the observation with a light loss added to it, shape (ny, nx), float32."""
        return replace(
            self,
            difference=self.difference + signal,
            whitened=self.whitened + self.noise_model.whiten(signal),
        )

    def even(self) -> Image:
        """Return the whitened difference with the same noise everywhere on the scale of blobs."""
        return self.noise_model.even(self.whitened)

    def scaled(self, clip: Clip | None = None, scale: Scale | None = None) -> Image:
        """Return the whitened difference as a detector takes it: clipped and scaled (sigma)."""
        clipped, _ = clip_image(self.even(), clip or Clip())
        return scale_image(clipped, scale or Scale())[0]

    def filter(self) -> FilteredImage:
        """Return the response of the whitened difference to top-hats (`matched_filter.filter_image`)."""
        return filter_image(self.whitened, self.noise_frac, self.noise_model)

    def find_blobs(
        self,
        detector: Detector,
        *,
        peaks: Peaks | None = None,
        filtered: FilteredImage | None = None,
        vetting: Vetting | None = None,
    ) -> pd.DataFrame:
        """Search it.

        Parameters
        ----------
        detector : Detector
        peaks : Peaks, optional
            Where to look, if the detector has searched already; otherwise the difference is whitened,
            clipped and scaled with the default settings, and searched.
        filtered : FilteredImage, optional
            From `filter`, if it has been filtered already.
        vetting : Vetting, optional
            The defaults if not given.

        Returns
        -------
        DataFrame
            A row per candidate, in the order of its peak: the columns of `fit.fit_blobs`, with the
            ``score`` of the detector, the ``status`` and ``reason`` of `vet.vet_candidates`,
            ``radius_ratio`` (radius over the expected one, NaN if none is known), ``size_log_odds``
            (`size_law.SizeLaw.log_odds`), ``line_snr`` (`lines.line_snr`) and ``probability``. Detections are the rows whose score reaches ``detector.threshold``; new
            blobs are those of the status ``new``.
        """
        if peaks is None:
            peaks = detector.search(self.scaled())

        filtered = filtered or self.filter()
        peaks = worth_fitting(peaks, filtered, detector.unseen)

        # The fit sees the whitened difference, unclipped
        candidates = fit_peaks(
            peaks, self.whitened, self.noise_frac, self.noise_model, filtered, self.size_law
        )

        # Vetting compares with the stack and looks at single pixels, so it sees the difference itself
        is_white = self.noise_model.is_white
        candidates = vet_candidates(
            candidates,
            self.difference,
            self.template,
            catalogue=self.catalogue,
            shift_px=self.shift_px,
            noise_frac=self.noise_frac if is_white else image_noise(self.difference),
            recent_px=self.recent_px,
            params=vetting or Vetting(),
        )
        x, y, radius = candidates[["x_px", "y_px", "radius_px"]].to_numpy(float).T
        candidates = candidates.assign(radius_ratio=np.nan, size_log_odds=0.0)
        if self.size_law is not None:
            ratio = radius / self.size_law.radius(x, y)
            error = candidates["radius_err_px"].to_numpy(float) / radius
            candidates["radius_ratio"] = ratio
            candidates["size_log_odds"] = self.size_law.log_odds(ratio, error)
        candidates["line_snr"] = line_snr(self.whitened, x, y, radius, self.noise_frac)
        return detector.rate(candidates)


def observe(
    difference: Image,
    template: Template | None = None,
    *,
    catalogue: pd.DataFrame | None = None,
    shift_px: tuple[float, float] = NO_SHIFT,
    recent_px: FloatArray | None = None,
    noise_frac: float | None = None,
    instrument: Instrument = DEFAULT,
) -> Observation:
    """Measure the noise of a difference image, and collect what is known of it.

    Parameters
    ----------
    difference, template, catalogue, shift_px, recent_px, instrument
        As for `find_blobs`. The noise is measured on the difference if the template has no model.
    noise_frac : float, optional
        Standard deviation of a pixel, if it is known and the noise is white.
    """
    template = template or Template()
    noise_model = template.noise_model
    if noise_model is None:
        noise_model = measure_noise_model(difference)
    whitened = noise_model.whiten(difference)
    if noise_frac is None or not noise_model.is_white:
        noise_frac = image_noise(whitened)
    return Observation(
        difference=difference,
        whitened=whitened,
        template=template,
        catalogue=catalogue,
        shift_px=shift_px,
        noise_model=noise_model,
        noise_frac=noise_frac,
        size_law=choose_size_law(catalogue, difference.shape, instrument),
        recent_px=recent_px,
    )


def read_pipeline_template(difference_dir: str | Path) -> Template:
    """Read the template of the stage difference, without an RMS map: each image has its own."""
    path = Path(difference_dir) / "reference.fits.fz"
    stack, pattern = (fits_images.read_plane(path, name) for name in ("STACK", "PATTERN"))
    bad = find_bad_pixels(stack, pattern)
    return Template(stack, pattern, None, bad, read_noise_model(path))


def read_observation(
    image: pd.Series[Any],
    known: pd.DataFrame,
    difference_dir: str | Path,
    template: Template,
    instrument: Instrument = DEFAULT,
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
    instrument : core.detector.Detector, optional
    """
    path = fits_images.find_image(difference_dir, image["frame"])
    return observe(
        fits_images.read_pixels(path),
        replace(template, rms=fits_images.find_plane(path, "SCATTER")),
        catalogue=known,
        shift_px=(float(image["shift_x_px"]), float(image["shift_y_px"])),
        noise_frac=float(image["noise_frac"]),
        instrument=instrument,
    )


def worth_fitting(peaks: Peaks, filtered: FilteredImage, unseen: float | None) -> Peaks:
    """Return the peaks that are likely, or where a matched filter sees something, too.

    Parameters
    ----------
    peaks : Peaks
        Of a detector.
    filtered : FilteredImage
    unseen : float or None
        Score of places that only the filter sees, as in `Detector`; without one they are left out.

    Returns
    -------
    Peaks
        Those of the detector first, in their order.
    """
    x, y, snr = filtered.places(BRIGHT_SNR)
    distance = np.hypot(x[:, None] - peaks.x_px, y[:, None] - peaks.y_px)
    at_peak = distance.min(axis=1, initial=np.inf) <= SAME_PX
    worth = peaks.score >= LIKELY
    if at_peak.any():
        worth[distance[at_peak].argmin(axis=1)] = True
    seen = Peaks(*(values[worth] for values in peaks))
    if unseen is None:
        return seen
    is_alone = ~at_peak & (snr >= ALONE_SNR)
    alone = Peaks(x[is_alone], y[is_alone], np.full(is_alone.sum(), unseen))
    return Peaks(*(np.concatenate(both) for both in zip(seen, alone, strict=True)))


def fit_peaks(
    peaks: Peaks,
    whitened: Image,
    noise_frac: float,
    noise_model: NoiseModel = WHITE,
    filtered: FilteredImage | None = None,
    size_law: SizeLaw | None = None,
) -> pd.DataFrame:
    """Fit a blob at each peak; of fits that end at one place keep the first.

    Parameters
    ----------
    peaks : Peaks
    whitened : ndarray, shape (ny, nx), float32
        The whitened difference (fraction of the light).
    noise_frac : float
        Its noise.
    noise_model : NoiseModel
        That by which it was whitened.
    filtered : FilteredImage, optional
        Says where the noise on the scale of blobs is higher than usual: S/N and errors follow it.

    Returns
    -------
    DataFrame
        From `fit.fit_blobs`; the score is that of the peak.
    """
    found = without_repeats(fit_blobs(whitened, *peaks, noise_frac, noise_model, size_law))
    if filtered is not None:
        places = (found["x_px"].to_numpy(float), found["y_px"].to_numpy(float))
        noise = np.maximum(filtered.noise_at(*places), noise_model.coarse_at(*places))
        errors = ["x_err_px", "y_err_px", "radius_err_px", "depth_err_frac"]
        found[errors] = found[errors].mul(noise * noise_model.error_at(*places), axis=0)
        found["snr"] /= noise
    return found


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
