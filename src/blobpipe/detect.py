"""Detections instead of labels, at a rate of false alarms that was asked for: the dense network, and two to compare it with."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import minimize
from tqdm import tqdm

from blobpipe import baselines, cutout, dense, figures, frames, measure, networks, render, statistics, tiles
from blobpipe.errors import TableError
from blobpipe.params import Detect

FloatArray = npt.NDArray[Any]

CANDIDATE = 0.2  # score below which nothing is a candidate: far below any threshold, many such peaks to a frame
NEAR_PX = 6.0  # a detection this near to a blob's centre, or within its radius, has found it
TAIL = 25  # of the highest false peaks; their tail is exponential, as that of logits is
N_POSITIVE = 400  # validation subframes with blobs on which the calibration rests
DETECTORS = ("dense", "report", "matched_filter")
CLEAR, FAINT = (7.0, math.inf), (5.0, 7.0)  # S/N of blobs that must be found, and of those that should be
SHIFTED_PX = 0.5  # images whose known blobs have moved by more are counted apart
FRAME_COLUMNS = ("frame", "mjd", "shift_px", "noise_frac", "kind", "false_alarms")


class OperatingPoint(NamedTuple):
    """Where detections begin, and what a score means.

    Attributes
    ----------
    threshold : float
        Score from which a candidate is a detection.
    slope, offset : float
        Probability of a new blob: logistic function of ``slope * logit(score) + offset``.
    frames : float
        Held-out frames, and parts of frames, on which this rests (count).
    """

    threshold: float
    slope: float
    offset: float
    frames: float

    def probability(self, score: FloatArray) -> FloatArray:
        """Probability that a candidate of this score is a new blob, at the prior rate of the settings."""
        return np.asarray(1 / (1 + np.exp(-self.slope * logit(score) - self.offset)))


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

    Held out are the images without a new blob that training has not seen, and the right part of those that it has. No
    historical image takes part in choosing anything; `regression` compares with the catalogue what is found on them.

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
    network, about = networks.load_dense(model_path)
    networks.set_threads(1)  # frames share the cores
    images = frames.image_table(raw_dir, difference_dir, scale_dir).query("status == 'ok'").reset_index(drop=True)
    blobs = frames.read_blobs(raw_dir)
    candidates = search(network, images, blobs, difference_dir, scale_dir, params.threads)
    point = operating_point(network, candidates, images, blobs, (difference_dir, scale_dir, cutout_dir), params)
    candidates["probability"] = np.round(point.probability(candidates["score"].to_numpy()), 5)
    table = count_alarms(images, blobs, candidates, point.threshold)
    reliability = _reliability(candidates, blobs)
    networks.save_model(out_dir / "model.safetensors", network, {**about, "operating_point": point._asdict()})
    for name, rows in (("candidates", candidates), ("frames", table), ("reliability", reliability)):
        frames.write_table(out_dir / f"{name}.csv", rows)
    figures.calibration(out_dir / "reliability.png", {"dense": reliability}, "candidates")
    frames.write_json(out_dir / "metrics.json", summarise(table, point))


def search(
    network: networks.DenseNetwork,
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
        frame, then `measure.DETECTION_COLUMNS`, and ``is_blob``: whether it lies on a blob that this image is the first
        to show.
    """
    pattern = frames.read_plane(Path(difference_dir) / "reference.fits.fz", "PATTERN")
    first = landed(images, blobs)

    def one(i: int) -> pd.DataFrame:
        image = images.iloc[i]
        scaled = frames.read_frame(frames.find_image(scale_dir, image["frame"])).data
        path = frames.find_image(difference_dir, image["frame"])
        shift = (float(image["shift_x_px"]), float(image["shift_y_px"]))
        found = candidates_of(
            network,
            scaled,
            frames.read_plane(path, "DIFFERENCE"),
            scatter=frames.read_plane(path, "SCATTER"),
            catalogue=blobs[first < i],
            shift_px=shift,
            pattern=pattern,
            noise_frac=float(image["noise_frac"]),
        )
        found.insert(0, "frame", image["frame"])
        return found.assign(is_blob=near(found, blobs[first == i]).any(axis=1).astype(int))

    with ThreadPoolExecutor(threads) as pool:
        done = tqdm(pool.map(one, range(len(images))), "detect", len(images), unit="image", disable=None)
        return pd.concat(list(done), ignore_index=True)


def candidates_of(
    network: networks.DenseNetwork,
    scaled: npt.NDArray[np.float32],
    difference: npt.NDArray[np.float32],
    *,
    catalogue: pd.DataFrame | None,
    shift_px: tuple[float, float],
    pattern: npt.NDArray[np.float32] | None,
    noise_frac: float,
    scatter: npt.NDArray[np.float32] | None = None,
    at_least: float = CANDIDATE,
) -> pd.DataFrame:
    """Peaks of the network's map on one frame, measured on the unclipped difference, and judged.

    Parameters
    ----------
    scaled, difference : ndarray, shape (ny, nx), float32
        The same frame clipped and scaled (sigma), and as it was subtracted (fraction of the light).
    catalogue, shift_px, pattern, noise_frac, scatter
        As in `measure.judge`.
    """
    peaks = dense.peaks(dense.probability_map(network, scaled), at_least)
    found = measure.without_repeats(measure.measure(difference, *peaks, noise_frac))
    return measure.judge(
        found,
        difference,
        catalogue=catalogue,
        shift_px=shift_px,
        pattern=pattern,
        noise_frac=noise_frac,
        scatter=scatter,
    )


def operating_point(
    network: networks.DenseNetwork,
    candidates: pd.DataFrame,
    images: pd.DataFrame,
    blobs: pd.DataFrame,
    folders: tuple[str | Path, str | Path, str | Path],
    params: Detect,
) -> OperatingPoint:
    """Threshold and calibration from held-out frames without a new blob, and from validation subframes.

    Raises
    ------
    TableError
        If nothing is held out.
    """
    width = frames.read_plane(Path(folders[0]) / "reference.fits.fz", "PATTERN").shape[1]
    aside = held_out(candidates, images, blobs, folders[2], width)
    n_frames = aside.frames
    if n_frames == 0:
        raise TableError(f"{folders[2]}: no image is held out, expected some without a new blob; add images")
    false = candidates[aside.rows & (candidates["status"] == "new")]["score"].to_numpy()
    allowed = params.false_alarms_per_100_frames / 100 * n_frames
    true = injected_scores(network, folders)
    slope, offset = calibrate(true, false, n_frames, params.new_blobs_per_100_frames / 100)
    return OperatingPoint(round(tail_threshold(false, allowed), 5), round(slope, 5), round(offset, 5), n_frames)


class HeldOut(NamedTuple):
    """Which candidates lie on held-out pixels, and how many whole frames these make."""

    rows: npt.NDArray[np.bool_]
    frames: float


def held_out(
    candidates: pd.DataFrame, images: pd.DataFrame, blobs: pd.DataFrame, cutout_dir: str | Path, width: int
) -> HeldOut:
    """What neither training nor the regression test uses: the validation windows' side of quiet images."""
    shown, _ = cutout.read_recipes(cutout_dir, "train")
    quiet = set(images["frame"]) - set(blobs["first_frame"])
    seen = set(shown["frame"])
    border = int(shown["x0_px"].max()) + render.SIDE
    share = max(0.0, 1 - border / width)
    unseen, beyond = candidates["frame"].isin(quiet - seen), candidates["frame"].isin(quiet & seen)
    rows = unseen | (beyond & (candidates["x_px"] >= border))
    return HeldOut(rows.to_numpy(bool), len(quiet - seen) + share * len(quiet & seen))


def injected_scores(network: networks.DenseNetwork, folders: tuple[str | Path, str | Path, str | Path]) -> FloatArray:
    """Highest score near each superimposed blob of some validation subframes; 0 where there is no candidate."""
    difference_dir, scale_dir, cutout_dir = folders
    scene, recipes = cutout.open_split(difference_dir, scale_dir, cutout_dir, "validation")
    rows = np.flatnonzero(recipes.label == 1)[:N_POSITIVE]
    pixels = in_frame_sigma(scene, recipes, rows)
    scores = []
    for row, image in zip(rows, pixels, strict=True):
        peaks = dense.peaks(dense.probability_map(network, image), CANDIDATE)
        for _, x, y in recipes.blob[recipes.first_blob[row] : recipes.first_blob[row + 1]]:
            near = np.hypot(peaks.x_px - x, peaks.y_px - y) <= NEAR_PX
            scores.append(float(peaks.score[near].max(initial=0)))
    return np.array(scores)


def in_frame_sigma(
    scene: render.Scene, recipes: render.Recipes, rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Some subframes as the dense network meets them: the pixels of `render.render`, not standardised."""
    still = {"noise_sigma": np.zeros(len(rows), np.float32), "piece": np.full(len(rows), -1)}
    strength, pieces = np.ones(len(recipes.blob), np.float32), np.zeros((1, render.SIDE, render.SIDE), np.int16)
    return render.vary(scene, recipes, rows, copy=0, strength=strength, pieces=pieces, **still)


def tail_threshold(scores: FloatArray, allowed: float) -> float:
    """Score above which ``allowed`` of false peaks are expected, from the exponential tail of their logits.

    Parameters
    ----------
    scores : ndarray
        Of the false peaks of all held-out frames.
    allowed : float
        How many may lie above (count); may be a fraction.
    """
    highest = np.sort(logit(scores))[::-1][:TAIL]
    if len(highest) <= max(allowed, 1):
        return CANDIDATE
    start, excess = highest[-1], highest[:-1] - highest[-1]
    level = start + excess.mean() * math.log(len(highest) / allowed)
    return float(max(CANDIDATE, 1 / (1 + math.exp(-level))))


def calibrate(true: FloatArray, false: FloatArray, n_frames: float, per_frame: float) -> tuple[float, float]:
    """Slope and offset of the logistic calibration, at the real rate of new blobs.

    Parameters
    ----------
    true, false : ndarray
        Scores of blobs, and of false peaks on ``n_frames`` frames.
    per_frame : float
        New blobs to a frame.
    """
    true = true[true > 0]
    x = logit(np.concatenate([true, false]))
    blob = np.repeat([1.0, 0.0], [len(true), len(false)])
    weight = np.repeat([per_frame / max(len(true), 1), 1 / n_frames], [len(true), len(false)])

    def loss(at: FloatArray) -> float:
        z = at[0] * x + at[1]
        # a little is held back, so that classes that do not overlap leave the slope finite
        return float(weight @ (np.logaddexp(0, z) - blob * z) / weight.sum() + 1e-4 * at[0] ** 2)

    slope, offset = minimize(loss, np.array([1.0, 0.0]), method="BFGS").x
    return float(slope), float(offset)


def count_alarms(images: pd.DataFrame, blobs: pd.DataFrame, candidates: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """False alarms of each image: detections that are no blob that it is the first to show."""
    detections = candidates[(candidates["score"] >= threshold) & (candidates["status"] == "new")]
    alarms = detections[detections["is_blob"] == 0].groupby("frame").size()
    shift = np.hypot(images["shift_x_px"], images["shift_y_px"])
    table = images[["frame", "mjd"]].assign(shift_px=shift, noise_frac=images["noise_frac"])
    table["kind"] = np.where(table["frame"].isin(blobs["first_frame"]), "historical", "quiet")
    table["false_alarms"] = table["frame"].map(alarms).fillna(0).astype(int)
    return table[list(FRAME_COLUMNS)]


def summarise(table: pd.DataFrame, point: OperatingPoint) -> dict[str, Any]:
    """The numbers of ``metrics.json``."""
    metrics: dict[str, Any] = {"threshold": point.threshold, "held_out_frames": round(point.frames, 2)}
    for name, part in (("quiet", table[table["kind"] == "quiet"]), ("shifted", table[table["shift_px"] >= SHIFTED_PX])):
        metrics[f"n_{name}"] = len(part)
        alarms = round(100 * float(part["false_alarms"].mean()), 3) if len(part) else None
        metrics[f"false_alarms_per_100_{name}"] = alarms
    return metrics


class Baselines(NamedTuple):
    """What the dense network is compared with: the report's network, and a matched filter of some radii (px)."""

    report: networks.ReportNetwork
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
    match: baselines.Match


def subframes_of(scaled: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """A scaled frame as standardised subframes, and their origins (`tiles.tile`)."""
    subframes, origins = tiles.tile(scaled)
    return render.standardise(subframes), origins


def ask(others: Baselines, subframes: npt.NDArray[np.float32], origins: npt.NDArray[np.int64]) -> Answers:
    """Ask the baselines about subframes."""
    match = baselines.matched_filter(subframes, others.radii_px)
    match = match._replace(x=match.x + origins[:, 2], y=match.y + origins[:, 3])
    return Answers(origins, networks.predict(others.report, subframes), match)


def baseline_thresholds(
    others: Baselines,
    images: pd.DataFrame,
    blobs: pd.DataFrame,
    folders: tuple[str | Path, str | Path, str | Path],
    *,
    per_100_frames: float,
    threads: int,
) -> dict[str, float]:
    """Log-odds of the report's network, and S/N of the matched filter, from which they give so many false alarms.

    On the pixels on which the dense network's threshold rests (`held_out`), as far as they make whole subframes.

    Parameters
    ----------
    folders : (path, path, path)
        Of the stages difference, scale and cutout.
    per_100_frames : float
        Accepted false alarms on 100 frames (count).

    Raises
    ------
    TableError
        If nothing is held out.
    """
    difference_dir, scale_dir, cutout_dir = folders
    pattern = frames.read_plane(Path(difference_dir) / "reference.fits.fz", "PATTERN")
    origins = tiles.tile(pattern)[1]
    names = images["frame"].to_numpy()
    rows = pd.DataFrame({"frame": names.repeat(len(origins)), "x_px": np.tile(origins[:, 2], len(names))})
    aside = held_out(rows, images, blobs, cutout_dir, pattern.shape[1]).rows.reshape(len(names), len(origins))
    if not aside.any():
        raise TableError(f"{cutout_dir}: no subframe is held out, expected some without a new blob; add images")

    def one(i: np.int64) -> Answers:
        subframes, origins = subframes_of(frames.read_frame(frames.find_image(scale_dir, names[i])).data)
        return ask(others, subframes[aside[i]], origins[aside[i]])

    with ThreadPoolExecutor(threads) as pool:
        answers = list(pool.map(one, np.flatnonzero(aside.any(axis=1))))
    allowed = per_100_frames / 100 * aside.sum() / len(origins)
    return {
        "report": tail_level(logit(np.concatenate([answer.probability for answer in answers])), allowed),
        "matched_filter": tail_level(np.concatenate([answer.match.snr for answer in answers]), allowed),
    }


def tail_level(values: FloatArray, allowed: float) -> float:
    """Value that ``allowed`` of the subframes without a blob exceed: interpolated, or beyond the highest, extrapolated.

    Parameters
    ----------
    values : ndarray, shape (n,)
        With an exponential tail, as log-odds have.
    allowed : float
        Count; may be a fraction.
    """
    highest = np.sort(values)[::-1][:TAIL]
    if allowed >= 1:
        return float(np.interp(allowed, np.arange(1, len(highest) + 1), highest))
    return float(highest[-1] + (highest[:-1] - highest[-1]).mean() * np.log(len(highest) / allowed))


def load_operating_point(path: str | Path) -> tuple[networks.DenseNetwork, OperatingPoint]:
    """A dense model of this stage, ready for use.

    Raises
    ------
    ModelError
        As `networks.load_dense`.
    """
    network, about = networks.load_dense(path)
    point = about.get("operating_point") or {"threshold": 0.5, "slope": 1.0, "offset": 0.0, "frames": 0.0}
    return network, OperatingPoint(**point)


def logit(score: FloatArray) -> FloatArray:
    """Log-odds; scores of 0 and 1 are taken for the nearest numbers that have some."""
    inside = np.clip(np.asarray(score, dtype=np.float64), 1e-7, 1 - 1e-7)
    return np.asarray(np.log(inside / (1 - inside)))


def landed(images: pd.DataFrame, blobs: pd.DataFrame) -> npt.NDArray[np.int64]:
    """Number of the image that first shows each blob, -1 if all do or that image is not there."""
    order = {frame: i for i, frame in enumerate(images["frame"])}
    return blobs["first_frame"].map(order).fillna(-1).to_numpy(np.int64)


def near(found: pd.DataFrame, blobs: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """Which places name which blobs, shape (places, blobs): they lie within 6 px, or within the blob's radius."""
    x, y, radius = (blobs[column].to_numpy(float) for column in ("x_px", "y_px", "radius_px"))
    distance = np.hypot(found["x_px"].to_numpy()[:, None] - x, found["y_px"].to_numpy()[:, None] - y)
    return np.asarray(distance <= np.maximum(NEAR_PX, radius))


def _reliability(candidates: pd.DataFrame, blobs: pd.DataFrame) -> pd.DataFrame:
    """How often candidates of the historical images are new blobs, by their probability.

    These images show new blobs more often than the prior says: more are, throughout, than the probability promises.
    """
    part = candidates[candidates["frame"].isin(blobs["first_frame"]) & (candidates["status"] == "new")]
    return statistics.reliability(part["is_blob"].to_numpy(np.int64), part["probability"].to_numpy())
