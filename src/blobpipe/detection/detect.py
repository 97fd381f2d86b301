"""Detections instead of labels, at a rate of false alarms that was asked for: the dense network, and two to compare it with."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from blobpipe.core import fits_images, metrics, plotting, tables
from blobpipe.detection import held_out, operating_point
from blobpipe.detection.match import near_blobs
from blobpipe.detection.score import fit_weights, score_candidates
from blobpipe.detection.search import (
    NOTHING_KNOWN,
    read_difference,
    read_reference,
    vet_peaks,
)
from blobpipe.networks import dense, dense_network, kernels, model_file
from blobpipe.params import Detect
from blobpipe.simulation.inject import random_blobs

SHIFTED_PX = 0.5  # images whose known blobs have moved by more are counted apart
FRAME_COLUMNS = ("frame", "mjd", "shift_px", "noise_frac", "kind", "false_alarms")


def detect(
    raw_dir: str | Path,
    difference_dir: str | Path,
    scale_dir: str | Path,
    cutout_dir: str | Path,
    model_path: str | Path,
    out_dir: str | Path,
    params: Detect,
) -> None:
    """Search all images, and set the operating point on those that are held out (stage ``detect``).

    A candidate's score is that of network and measurement together (`verdict`), learnt from blobs superimposed on training
    images. Held out are the images without a new blob that training has not seen, and the right part of those that it has. No
    number that this stage sets rests on a historical image; `regression` compares with the catalogue what is found on them.

    Parameters
    ----------
    raw_dir, difference_dir, scale_dir, cutout_dir : path
        What the stages before have made.
    model_path : path
        The dense network.
    out_dir : path
        ``model.safetensors`` (the network and its operating point, ready for ``blobpipe scan``), ``metrics.json``,
        ``candidates.csv`` (a row per candidate of any image), ``frames.csv``, ``reliability.csv``, ``reliability.png``.
    params : Detect

    Notes
    -----
    Source: ours.
    """
    out_dir = Path(out_dir)
    network, about = model_file.load_dense(model_path)
    kernels.set_threads(1)  # frames share the cores
    images = (
        tables.image_table(raw_dir, difference_dir, scale_dir)
        .query("status == 'ok'")
        .reset_index(drop=True)
    )
    blobs = tables.read_blobs(raw_dir)
    folders = (difference_dir, scale_dir, cutout_dir)
    searcher = dense_network.folded(network)
    practised = inject_training_frames(searcher, images, blobs, folders, params)
    weights = fit_weights(practised, practised["is_blob"].to_numpy(bool))
    candidates = score_candidates(
        search_images(searcher, images, blobs, difference_dir, scale_dir, params.threads), weights
    )
    true = score_candidates(practised.query("is_blob == 1"), weights)["score"].to_numpy()
    point = operating_point.set_operating_point(
        candidates, true, images, blobs, folders, params
    )._replace(weights=weights)
    candidates["probability"] = np.round(point.probability(candidates["score"].to_numpy()), 5)
    table = count_alarms(images, blobs, candidates, point.threshold)
    reliability = _reliability(candidates, blobs)
    model_file.save_model(
        out_dir / "model.safetensors", network, {**about, "operating_point": point._asdict()}
    )
    for name, rows in (("candidates", candidates), ("frames", table), ("reliability", reliability)):
        tables.write_table(out_dir / f"{name}.csv", rows)
    plotting.calibration(out_dir / "reliability.png", {"dense": reliability}, "candidates")
    tables.write_json(out_dir / "metrics.json", summarise(table, point))


def search_images(
    network: dense_network.DenseNetwork,
    images: pd.DataFrame,
    blobs: pd.DataFrame,
    difference_dir: str | Path,
    scale_dir: str | Path,
    threads: int,
) -> pd.DataFrame:
    """Candidates of all images, measured and judged.

    Returns
    -------
    DataFrame
        frame, then what `fit.fit_blobs` gives, scores those of the network, and ``is_blob``: whether it lies on a blob
        that this image is the first to show.
    """
    reference = read_reference(difference_dir)
    first = held_out.first_image_index(images, blobs)

    def one(i: int) -> pd.DataFrame:
        name = images["frame"].iloc[i]
        data, about = read_difference(images.iloc[i], blobs[first < i], difference_dir, reference)
        scaled = fits_images.read_frame(fits_images.find_image(scale_dir, name)).data
        found = vet_peaks(dense.probability_map(network, scaled), data, **about)
        found.insert(0, "frame", name)
        return found.assign(is_blob=near_blobs(found, blobs[first == i]).any(axis=1).astype(int))

    with ThreadPoolExecutor(threads) as pool:
        done = tqdm(
            pool.map(one, range(len(images))), "detect", len(images), unit="image", disable=None
        )
        return pd.concat(list(done), ignore_index=True)


def inject_training_frames(
    network: dense_network.DenseNetwork,
    images: pd.DataFrame,
    blobs: pd.DataFrame,
    folders: tuple[str | Path, str | Path, str | Path],
    params: Detect,
) -> pd.DataFrame:
    """Candidates on that part of the training images which training has seen, a blob superimposed on each subframe of it.

    Parameters
    ----------
    folders : (path, path, path)
        Of the stages difference, scale and cutout.

    Returns
    -------
    DataFrame
        As from `search`, of status ``new`` only; ``is_blob``: whether it lies on a superimposed blob.
    """
    difference_dir, scale_dir, cutout_dir = folders
    reference = read_reference(difference_dir)
    limits = tables.read_stage(scale_dir).set_index("frame")
    first = held_out.first_image_index(images, blobs)
    part = held_out.seen_part(images, blobs, cutout_dir)

    def one(i: int) -> pd.DataFrame:
        name = images["frame"].iloc[i]
        data, about = read_difference(images.iloc[i], blobs[first < i], difference_dir, reference)
        signal, put = random_blobs(
            params.seed, name, (len(data), part.border_px), about["noise_frac"]
        )
        signal = np.pad(signal, ((0, 0), (0, data.shape[1] - signal.shape[1])))
        low, high, sigma = limits.loc[name, ["low_sigma", "high_sigma", "sigma_frac"]].to_numpy(
            np.float32
        )
        scaled = fits_images.read_frame(fits_images.find_image(scale_dir, name)).data
        cells = dense.probability_map(network, np.clip(scaled + signal / sigma, low, high))
        found = vet_peaks(cells, data + signal, **about)
        found = found.assign(is_blob=near_blobs(found, put).any(axis=1).astype(int))
        return found[(found["x_px"] < part.border_px) & (found["status"] == "new")]

    rows = np.flatnonzero(images["frame"].isin(part.frames))
    with ThreadPoolExecutor(params.threads) as pool:
        done = list(tqdm(pool.map(one, rows), "practise", len(rows), unit="image", disable=None))
    nothing = vet_peaks(
        np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32), noise_frac=1.0, **NOTHING_KNOWN
    )
    return pd.concat([nothing.assign(is_blob=0), *done], ignore_index=True)


def count_alarms(
    images: pd.DataFrame, blobs: pd.DataFrame, candidates: pd.DataFrame, threshold: float
) -> pd.DataFrame:
    """False alarms of each image: detections that are no blob that it is the first to show."""
    detections = candidates[(candidates["score"] >= threshold) & (candidates["status"] == "new")]
    alarms = detections[detections["is_blob"] == 0].groupby("frame").size()
    shift = np.hypot(images["shift_x_px"], images["shift_y_px"])
    table = images[["frame", "mjd"]].assign(shift_px=shift, noise_frac=images["noise_frac"])
    table["kind"] = np.where(table["frame"].isin(blobs["first_frame"]), "historical", "quiet")
    table["false_alarms"] = table["frame"].map(alarms).fillna(0).astype(int)
    return table[list(FRAME_COLUMNS)]


def summarise(table: pd.DataFrame, point: operating_point.OperatingPoint) -> dict[str, Any]:
    """The numbers of ``metrics.json``."""
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
    """How often candidates of the historical images are new blobs, by their probability.

    These images show new blobs more often than the prior says: more are, throughout, than the probability promises.
    """
    part = candidates[
        candidates["frame"].isin(blobs["first_frame"]) & (candidates["status"] == "new")
    ]
    return metrics.reliability(part["is_blob"].to_numpy(np.int64), part["probability"].to_numpy())
