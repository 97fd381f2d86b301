"""Search simulated images without a new blob: what noise looks like, and pixels on which a threshold can rest."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from blobpipe.core import tables
from blobpipe.core.arrays import FloatArray
from blobpipe.core.detector import Detector, read_detector
from blobpipe.core.random_streams import stream
from blobpipe.detection.detectors import DenseDetector
from blobpipe.detection.match import near_blobs
from blobpipe.detection.score import score_candidates
from blobpipe.detection.search import observe, read_pipeline_template
from blobpipe.images.difference import subtract
from blobpipe.images.template import Template
from blobpipe.noise.whiten import WHITE
from blobpipe.params import Campaign, Params
from blobpipe.simulation import campaign
from blobpipe.simulation.practice import draw_blobs

# Noise of simulated noise (fraction of the light): all is measured in its units
NOISE_FRAC = 0.01

# Distance from each blob beyond which a candidate is noise (px)
APART_PX = 25.0


def n_quiet_images(
    raw_dir: str | Path, params: Params, shape: tuple[int, ...], instrument: Detector
) -> int:
    """Return how many quiet images can be simulated: those that are wanted, if images are the campaign's.

    Parameters
    ----------
    raw_dir : path
        The images that are searched, with their list.
    params : Params
    shape : (ny, nx)
        Of the images; only full frames are simulated.
    instrument : core.detector.Detector
    """
    is_possible = shape == instrument.shape and _is_simulated(raw_dir, params.campaign)
    return params.detect.n_quiet if is_possible else 0


def _is_simulated(raw_dir: str | Path, params: Campaign) -> bool:
    """Return whether images are those of the campaign with these settings, by their list."""
    table = tables.read_frame_list(raw_dir)
    same_frames = table["frame"].tolist() == campaign.frame_names(params)
    return same_frames and "seed" in table and bool((table["seed"] == params.seed).all())


def search_noise(detector: DenseDetector, shape: tuple[int, ...], params: Params) -> pd.DataFrame:
    """Search images of white noise, which is what all noise is when it has been whitened, with some blobs.

    Parameters
    ----------
    detector : DenseDetector
        Without weights.
    shape : (ny, nx)
        Of the images.
    params : Params
        `Detect.n_noise` images.

    Returns
    -------
    DataFrame
        Candidates of the status ``new``, from `search.find_blobs`; ``is_blob``: 1 for those that lie on a
        blob, 0 for noise. What is neither on a blob nor `APART_PX` away from each is left out.
    """
    instrument = read_detector(params.detector)

    def search(number: int) -> pd.DataFrame:
        rng = stream(params.detect.seed, "noise", number)
        signal, blobs = draw_blobs(rng, shape, NOISE_FRAC, instrument)
        image = signal + rng.standard_normal(shape, np.float32) * np.float32(NOISE_FRAC)
        observation = observe(image, Template(noise_model=WHITE), instrument=instrument)
        peaks = detector.search(observation.scaled(params.clip, params.scale))
        found = observation.find_blobs(detector, peaks=peaks, vetting=params.vetting)
        found = found[found["status"] == "new"]
        on_blob = near_blobs(found, blobs).any(axis=1)
        apart = ~near_blobs(found, blobs.assign(radius_px=APART_PX)).any(axis=1)
        found = found.assign(is_blob=on_blob.astype(int))
        return pd.DataFrame(found[on_blob | apart])

    n_images = params.detect.n_noise
    with ThreadPoolExecutor(params.detect.threads) as pool:
        work = pool.map(search, range(n_images))
        found = list(tqdm(work, "noise", n_images, unit="image", disable=None))
    return pd.concat(found, ignore_index=True)


def search_quiet_images(
    detector: DenseDetector,
    difference_dir: str | Path,
    params: Params,
    weights: tuple[float, ...],
    n_images: int,
) -> FloatArray:
    """Search simulated images of the same detector that show no new blob.

    Each is compared with the template of the campaign's first images.

    Parameters
    ----------
    detector : DenseDetector
        Without weights.
    difference_dir : path
        Of the stage difference.
    params : Params
    weights : tuple of float
        Of the joint score.
    n_images : int
        From `n_quiet_images`.

    Returns
    -------
    ndarray, shape (n,), float64
        Joint score of each candidate of the status ``new``: false peaks, all of them.
    """
    template = read_pipeline_template(difference_dir)
    instrument = read_detector(params.detector)
    known = pd.DataFrame(campaign.known_blobs(params.campaign, instrument))

    def search(number: int) -> FloatArray:
        image = campaign.render_quiet_image(params.campaign, number, instrument)
        difference, shift = subtract(image, template, params.difference, instrument)
        observation = observe(
            difference, template, catalogue=known, shift_px=shift, instrument=instrument
        )
        peaks = detector.search(observation.scaled(params.clip, params.scale))
        found = observation.find_blobs(detector, peaks=peaks, vetting=params.vetting)
        found = score_candidates(found[found["status"] == "new"], weights)
        return np.asarray(found["score"].to_numpy(float))

    with ThreadPoolExecutor(params.detect.threads) as pool:
        work = pool.map(search, range(n_images))
        scores = list(tqdm(work, "quiet", n_images, unit="image", disable=None))
    return np.concatenate([np.zeros(0), *scores])
