"""Search all images with the dense network and set its operating point (stage ``detect``)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from blobpipe.core import fits_images, metrics, plotting, tables
from blobpipe.core.arrays import Image
from blobpipe.core.detector import DEFAULT, Detector, read_detector
from blobpipe.detection import quiet, thresholds
from blobpipe.detection.detectors import UNSEEN, DenseDetector, Peaks
from blobpipe.detection.fit import DETECTION_COLUMNS
from blobpipe.detection.match import near_blobs
from blobpipe.detection.operating_point import OperatingPoint
from blobpipe.detection.score import fit_weights, score_candidates
from blobpipe.detection.search import (
    Observation,
    observe,
    read_observation,
    read_pipeline_template,
)
from blobpipe.images.template import Template
from blobpipe.networks import dense_network, kernels, model_file
from blobpipe.noise.whiten import WHITE
from blobpipe.params import Detect, Params, Vetting
from blobpipe.simulation import clutter, held_out
from blobpipe.simulation.practice import draw_practice

CANDIDATES = "candidates"  # name of the tables of batches
CANDIDATE_COLUMNS = ("frame", *DETECTION_COLUMNS, "is_blob", "probability")
SHIFTED_PX = 0.5  # images whose known blobs have moved by more are counted apart
N_CLUTTER = 128  # different pieces of clutter to practise on (count)
FRAME_COLUMNS = ("frame", "mjd", "shift_px", "noise_frac", "kind", "false_alarms")


def detect(
    raw_dir: str | Path,
    difference_dir: str | Path,
    scale_dir: str | Path,
    cutout_dir: str | Path,
    model_path: str | Path,
    out_dir: str | Path,
    settings: Params,
) -> None:
    """Gather what `search_batches` has found, and set the operating point (stage ``detect``).

    A candidate's score combines the network and the fit (`score`); the weights are learnt from blobs
    injected into training images. The threshold rests on what is held out: the images without a new
    blob that training has not seen, and the right part of those that it has. No number that this stage sets rests on a
    historical image; `regression` compares with the catalogue what is found on them.

    Parameters
    ----------
    raw_dir, difference_dir, scale_dir, cutout_dir : path
        What the stages before have made.
    model_path : path
        The dense network.
    out_dir : path
        ``batches`` (of `search_batches`), ``model.safetensors`` (the network and its operating point, ready for ``blobpipe scan``),
        ``metrics.json``, ``candidates.csv`` (a row per candidate of any image), ``frames.csv``,
        ``reliability.csv``, ``reliability.png``.
    settings : Params
        The section detect; and vetting, campaign, difference, clip and scale, to simulate and search
        quiet images.
    """
    out_dir = Path(out_dir)
    params = settings.detect
    vetting = settings.vetting
    instrument = read_detector(settings.detector)
    network, metadata = model_file.load_dense(model_path)
    kernels.set_threads(1)  # images share the cores
    detector = DenseDetector(dense_network.folded(network))
    stages = tables.image_table(raw_dir, difference_dir, scale_dir)
    images = stages.query("status == 'ok'").reset_index(drop=True)
    blobs = tables.read_blobs(raw_dir, instrument)
    folders = (difference_dir, scale_dir, cutout_dir)

    # Learn from injected blobs and structure, from what the same images have of it, and from noise,
    # what network and fit are worth together.
    found = read_candidates(detector, out_dir, scale_dir)
    learning = replace(detector, unseen=UNSEEN)
    injected = inject_training_frames(learning, images, blobs, folders, params, vetting, instrument)
    seen = seen_structure(found, images, blobs, cutout_dir)
    shape = fits_images.read_plane(Path(difference_dir) / "reference.fits.fz", "PATTERN").shape
    on_noise = quiet.search_noise(detector, shape, settings)
    weights = fit_weights(pd.concat([injected, seen], ignore_index=True), on_noise)
    true = score_candidates(injected.query("is_blob == 1"), weights)["score"].to_numpy()

    # Set the threshold on the images that are held out, and on simulated ones.
    candidates = score_candidates(found, weights)
    n_quiet = quiet.n_quiet_images(raw_dir, settings, shape, instrument)
    simulated = quiet.search_quiet_images(detector, difference_dir, settings, weights, n_quiet)
    point = thresholds.set_operating_point(
        candidates, true, images, blobs, folders, params, simulated, n_quiet
    )
    point = point._replace(weights=weights)
    candidates["probability"] = np.round(point.probability(candidates["score"].to_numpy()), 5)

    alarms = count_alarms(images, blobs, candidates, point.threshold)
    reliability = _reliability(candidates, blobs)
    metadata = {**metadata, "operating_point": point._asdict()}
    model_file.save_model(out_dir / "model.safetensors", network, metadata)
    tables.write_table(out_dir / "candidates.csv", candidates[list(CANDIDATE_COLUMNS)])
    tables.write_table(out_dir / "frames.csv", alarms)
    tables.write_table(out_dir / "reliability.csv", reliability)
    plotting.calibration(
        out_dir / "reliability.png",
        {"dense": reliability},
        "candidates",
        "historical images: new blobs are more frequent than the prior assumes",
    )
    tables.write_json(out_dir / "metrics.json", summarise(alarms, point))


def search_batches(
    raw_dir: str | Path,
    difference_dir: str | Path,
    scale_dir: str | Path,
    model_path: str | Path,
    out_dir: str | Path,
    settings: Params,
    batch: int | None = None,
) -> None:
    """Search the images of one batch, or of each, with the dense network (stage ``detect``).

    Parameters
    ----------
    raw_dir, difference_dir, scale_dir : path
        What the stages before have made; of the two stages, this batch.
    model_path : path
        The dense network.
    out_dir : path
        ``batches/candidates-NNN.csv``, with all digits: ``frame``, then the columns of `search.find_blobs`, and
        ``is_blob``: whether the candidate lies on a blob that this image is the first to show.
    settings : Params
        The sections detect and vetting.
    batch : int, optional
        All if not given.
    """
    network, _ = model_file.load_dense(model_path)
    kernels.set_threads(1)  # images share the cores
    detector = DenseDetector(dense_network.folded(network))
    blobs = tables.read_blobs(raw_dir, read_detector(settings.detector))
    for path in tables.stage_tables(scale_dir, batch):
        number = int(path.stem.rpartition("-")[2])
        images = tables.image_table(raw_dir, difference_dir, scale_dir, number)
        found = search_images(detector, images, blobs, (difference_dir, scale_dir), settings)
        table = path.name.replace("frames", CANDIDATES, 1)
        tables.write_exact(Path(out_dir) / "batches" / table, found)


def read_candidates(
    detector: DenseDetector, out_dir: str | Path, scale_dir: str | Path
) -> pd.DataFrame:
    """Read the candidates of all batches, in the order of the images."""
    like = _no_candidates(detector)
    paths = tables.batch_tables(Path(out_dir) / "batches", CANDIDATES, scale_dir)
    return pd.concat([tables.read_exact(path, like) for path in paths], ignore_index=True)


def search_images(
    detector: DenseDetector,
    images: pd.DataFrame,
    blobs: pd.DataFrame,
    folders: tuple[str | Path, str | Path],
    settings: Params,
) -> pd.DataFrame:
    """Search all usable images of a list.

    Parameters
    ----------
    images : DataFrame
        From `tables.image_table`; an image is searched if its status is ``ok``.
    folders : (path, path)
        Of the stages difference and scale.
    settings : Params
        The sections detector, detect and vetting.

    Returns
    -------
    DataFrame
        As in the tables of `search_batches`.
    """
    difference_dir, scale_dir = folders
    instrument = read_detector(settings.detector)
    template = read_pipeline_template(difference_dir)
    first = held_out.first_image_index(images, blobs)
    usable = np.flatnonzero(images["status"] == "ok")

    def search(i: int) -> pd.DataFrame:
        name = images["frame"].iloc[i]
        known = blobs[first < i]
        observation = read_observation(images.iloc[i], known, difference_dir, template, instrument)
        peaks = detector.search(_read_scaled(scale_dir, name))
        found = observation.find_blobs(detector, peaks=peaks, vetting=settings.vetting)
        found.insert(0, "frame", name)
        is_blob = near_blobs(found, blobs[first == i]).any(axis=1)
        return found.assign(is_blob=is_blob.astype(int))

    with ThreadPoolExecutor(settings.detect.threads) as pool:
        work = pool.map(search, usable)
        done = list(tqdm(work, "detect", len(usable), unit="image", disable=None))
    return pd.concat([_no_candidates(detector), *done], ignore_index=True)


def seen_structure(
    found: pd.DataFrame, images: pd.DataFrame, blobs: pd.DataFrame, cutout_dir: str | Path
) -> pd.DataFrame:
    """Return what may be new blobs on the part of the training images that training has seen.

    Nothing new is on them, so this is what structure they have, and noise.
    """
    part = held_out.seen_part(images, blobs, cutout_dir)
    seen = found["frame"].isin(part.frames) & (found["x_px"] < part.border_px)
    return found[seen & (found["status"] == "new")]


def inject_training_frames(
    detector: DenseDetector,
    images: pd.DataFrame,
    blobs: pd.DataFrame,
    folders: tuple[str | Path, str | Path, str | Path],
    params: Detect,
    vetting: Vetting,
    instrument: Detector = DEFAULT,
) -> pd.DataFrame:
    """Search the part of the training images that training has seen, with blobs and structure on it.

    Each image is searched `Detect.n_draws` times, with other blobs each time.

    Parameters
    ----------
    folders : (path, path, path)
        Of the stages difference, scale and cutout.

    Returns
    -------
    DataFrame
        Candidates of the status ``new``, from `search.find_blobs`; ``is_blob``: whether one lies on
        an injected blob.
    """
    difference_dir, scale_dir, cutout_dir = folders
    template = read_pipeline_template(difference_dir)
    limits = tables.read_stage(scale_dir).set_index("frame")
    first = held_out.first_image_index(images, blobs)
    part = held_out.seen_part(images, blobs, cutout_dir)
    pieces = clutter.draw_pieces(params.seed, N_CLUTTER)

    def search(i: int) -> pd.DataFrame:
        name = images["frame"].iloc[i]
        known = blobs[first < i]
        observation = read_observation(images.iloc[i], known, difference_dir, template, instrument)
        image = _read_scaled(scale_dir, name)
        draws = [search_with_draw(observation, image, name, k) for k in range(params.n_draws)]
        return pd.concat(draws, ignore_index=True)

    def search_with_draw(
        observation: Observation, image: Image, name: str, draw: int
    ) -> pd.DataFrame:
        ny, nx = observation.difference.shape
        seen = (ny, part.border_px)
        about = (params.seed, name, draw, seen, observation.noise_frac)
        signal, injected = draw_practice(*about, pieces, instrument)
        signal = np.pad(signal, ((0, 0), (0, nx - part.border_px)))

        # The network sees the blobs clipped and scaled as the image is; the fit sees them whole.
        columns = ["low_sigma", "high_sigma", "sigma_frac"]
        low, high, sigma = limits.loc[name, columns].to_numpy(np.float32)
        changed = observation.with_signal(signal)
        whitened = changed.whitened - observation.whitened
        scaled = np.clip(image + np.nan_to_num(whitened) / sigma, low, high)
        found = changed.find_blobs(detector, peaks=detector.search(scaled), vetting=vetting)
        found = found[(found["x_px"] < part.border_px) & (found["status"] == "new")]
        is_blob = near_blobs(found, injected).any(axis=1)
        return found.assign(is_blob=is_blob.astype(int))

    rows = np.flatnonzero(images["frame"].isin(part.frames))
    with ThreadPoolExecutor(params.threads) as pool:
        work = pool.map(search, rows)
        done = list(tqdm(work, "inject", len(rows), unit="image", disable=None))
    nothing = _no_candidates(detector).drop(columns="frame")
    return pd.concat([nothing, *done], ignore_index=True)


def _no_candidates(detector: DenseDetector) -> pd.DataFrame:
    """Make a table of candidates without rows, with all its columns."""
    nowhere = Peaks(*(np.zeros(0) for _ in Peaks._fields))
    template = Template(noise_model=WHITE)
    nothing = observe(np.zeros((1, 1), np.float32), template, noise_frac=1.0)
    found = nothing.find_blobs(detector, peaks=nowhere)
    found.insert(0, "frame", pd.Series([], dtype=str))
    return found.assign(is_blob=np.zeros(0, int))


def _read_scaled(scale_dir: str | Path, frame: str) -> Image:
    return fits_images.read_pixels(fits_images.find_image(scale_dir, frame))


def count_alarms(
    images: pd.DataFrame, blobs: pd.DataFrame, candidates: pd.DataFrame, threshold: float
) -> pd.DataFrame:
    """Count the false alarms of each image: new detections that lie on no blob new in it."""
    detections = candidates[(candidates["score"] >= threshold) & (candidates["status"] == "new")]
    alarms = detections[detections["is_blob"] == 0].groupby("frame").size()
    shift = np.hypot(images["shift_x_px"], images["shift_y_px"])
    table = images[["frame", "mjd"]].assign(shift_px=shift, noise_frac=images["noise_frac"])
    table["kind"] = np.where(table["frame"].isin(blobs["first_frame"]), "historical", "quiet")
    table["false_alarms"] = table["frame"].map(alarms).fillna(0).astype(int)
    return table[list(FRAME_COLUMNS)]


def summarise(table: pd.DataFrame, point: OperatingPoint) -> dict[str, Any]:
    """Summarise the search in the numbers of ``metrics.json``."""
    metrics: dict[str, Any] = {
        "threshold": point.threshold,
        "held_out_frames": round(point.frames, 2),
    }
    for name, part in (
        ("quiet", table[table["kind"] == "quiet"]),
        ("shifted", table[table["shift_px"] >= SHIFTED_PX]),
    ):
        metrics[f"n_{name}"] = len(part)
        alarms = round(100 * float(part["false_alarms"].mean()), 3) if len(part) else None
        metrics[f"false_alarms_per_100_{name}"] = alarms
    return metrics


def _reliability(candidates: pd.DataFrame, blobs: pd.DataFrame) -> pd.DataFrame:
    """Compare probabilities with the share of new blobs, on the historical images.

    These images show new blobs more often than the prior says: more are, throughout, than the probability promises.
    """
    part = candidates[
        candidates["frame"].isin(blobs["first_frame"]) & (candidates["status"] == "new")
    ]
    return metrics.reliability(part["is_blob"].to_numpy(np.int64), part["probability"].to_numpy())
