"""Detections instead of labels, at a rate of false alarms that was asked for: the dense network, and two to compare it with."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import minimize
from tqdm import tqdm

from blobpipe.core import figures, frames, profiles, statistics
from blobpipe.detection import baselines, measure, verdict
from blobpipe.errors import ModelError, TableError
from blobpipe.networks import dense, networks
from blobpipe.params import Detect
from blobpipe.simulation import cutout, render, stamps, tiles

FloatArray = npt.NDArray[Any]

CANDIDATE = 0.05  # of the map: a peak below it is no candidate; some twenty to a frame are above
LIKELY, BRIGHT_SNR = 0.2, 5.0  # and one below this is a candidate only if it is bright; some eight to a frame are left
NEAR_PX = 6.0  # a detection this near to a blob's centre, or within its radius, has found it
TAIL = 25  # of the highest false peaks; their tail is exponential, as that of logits is
PRACTICE_SNR, PRACTICE_RADII_PX = (4.0, 40.0), (2.4, 10.0)  # of superimposed blobs, each evenly in its logarithm
PRACTICE_RAGGED = 0.5  # of them, as real ones are: a misfit says less against a blob then
HALF_PX = 20  # half the side of a blob's stamp
DETECTORS = ("dense", "report", "matched_filter")
CLEAR, FAINT = (7.0, math.inf), (5.0, 7.0)  # S/N of blobs that must be found, and of those that should be
SHIFTED_PX = 0.5  # images whose known blobs have moved by more are counted apart
NOTHING_KNOWN = {"catalogue": None, "shift_px": (0.0, 0.0), "pattern": None}
LARGEST_WEIGHT = 1e3  # of the calibration and the joint score; those of a trained model are below 10
POINT_BOUNDS = {"threshold": (CANDIDATE, 1.0), "slope": (-40.0, 40.0), "offset": (-40.0, 40.0), "frames": (0.0, 1e6)}
FRAME_COLUMNS = ("frame", "mjd", "shift_px", "noise_frac", "kind", "false_alarms")


class OperatingPoint(NamedTuple):
    """What a score is, where detections begin, and what it means.

    Attributes
    ----------
    threshold : float
        Score from which a candidate is a detection.
    slope, offset : float
        Probability of a new blob: logistic function of ``slope * logit(score) + offset``.
    frames : float
        Held-out frames, and parts of frames, on which this rests (count).
    weights : tuple of float
        Of the joint score of network and measurement, from `verdict.fit`; none: the score is the network's.
    """

    threshold: float
    slope: float
    offset: float
    frames: float
    weights: tuple[float, ...] = ()

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
    network, about = networks.load_dense(model_path)
    networks.set_threads(1)  # frames share the cores
    images = frames.image_table(raw_dir, difference_dir, scale_dir).query("status == 'ok'").reset_index(drop=True)
    blobs = frames.read_blobs(raw_dir)
    folders = (difference_dir, scale_dir, cutout_dir)
    searcher = networks.folded(network)
    practised = practise(searcher, images, blobs, folders, params)
    weights = verdict.fit(practised, practised["is_blob"].to_numpy(bool))
    candidates = verdict.score(search(searcher, images, blobs, difference_dir, scale_dir, params.threads), weights)
    true = verdict.score(practised.query("is_blob == 1"), weights)["score"].to_numpy()
    point = operating_point(candidates, true, images, blobs, folders, params)._replace(weights=weights)
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
        frame, then what `measure.measure` gives, scores those of the network, and ``is_blob``: whether it lies on a blob
        that this image is the first to show.
    """
    reference = read_reference(difference_dir)
    first = landed(images, blobs)

    def one(i: int) -> pd.DataFrame:
        name = images["frame"].iloc[i]
        data, about = read_difference(images.iloc[i], blobs[first < i], difference_dir, reference)
        scaled = frames.read_frame(frames.find_image(scale_dir, name)).data
        found = judged(dense.probability_map(network, scaled), data, **about)
        found.insert(0, "frame", name)
        return found.assign(is_blob=near(found, blobs[first == i]).any(axis=1).astype(int))

    with ThreadPoolExecutor(threads) as pool:
        done = tqdm(pool.map(one, range(len(images))), "detect", len(images), unit="image", disable=None)
        return pd.concat(list(done), ignore_index=True)


class Reference(NamedTuple):
    """The reference stack, its known blobs (both of shape (ny, nx), fraction of the light), and where its pixels are bad."""

    stack: npt.NDArray[np.float32]
    pattern: npt.NDArray[np.float32]
    bad: npt.NDArray[np.bool_]


def read_reference(difference_dir: str | Path) -> Reference:
    """Of ``reference.fits.fz`` of the stage difference."""
    stack, pattern = (
        frames.read_plane(Path(difference_dir) / "reference.fits.fz", name) for name in ("STACK", "PATTERN")
    )
    return Reference(stack, pattern, measure.bad_pixels(stack, pattern))


def read_difference(
    image: pd.Series[Any],
    known: pd.DataFrame,
    difference_dir: str | Path,
    reference: Reference,
) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
    """A difference image, and what `measure.judge` wants to know of it.

    Parameters
    ----------
    image : Series
        Its row of `frames.image_table`.
    known : DataFrame
        The blobs that landed before it.
    reference : Reference
        From `read_reference`.
    """
    path = frames.find_image(difference_dir, image["frame"])
    about = {
        "catalogue": known,
        "shift_px": (float(image["shift_x_px"]), float(image["shift_y_px"])),
        "pattern": reference.pattern,
        "bad": reference.bad,
        "stack": reference.stack,
        "noise_frac": float(image["noise_frac"]),
        "scatter": frames.find_plane(path, "SCATTER"),
    }
    return frames.read_frame(path).data, about


def judged(
    cells: npt.NDArray[np.float32], difference: npt.NDArray[np.float32], *, noise_frac: float, **about: Any
) -> pd.DataFrame:
    """Peaks of the dense network's map, measured on the unclipped difference, and judged; scores are the network's.

    Parameters
    ----------
    cells : ndarray
        From `dense.probability_map`.
    difference : ndarray, shape (ny, nx), float32
        As it was subtracted (fraction of the light).
    noise_frac, about
        As in `measure.judge`.
    """
    return measure.judge(measured(cells, difference, noise_frac), difference, noise_frac=noise_frac, **about)


def measured(cells: npt.NDArray[np.float32], difference: npt.NDArray[np.float32], noise_frac: float) -> pd.DataFrame:
    """The same before they are judged, for who wants to judge a few of them."""
    return measured_at(dense.peaks(cells, CANDIDATE), difference, noise_frac)


def measured_at(peaks: dense.Peaks, difference: npt.NDArray[np.float32], noise_frac: float) -> pd.DataFrame:
    """The same at some peaks.

    Those that are both low on the map and faint on the image are not measured: of those tried, none scored half.
    """
    x, y, score = peaks
    worth = (score >= LIKELY) | (measure.rough_snr(difference, x, y, noise_frac) >= BRIGHT_SNR)
    return measure.without_repeats(measure.measure(difference, x[worth], y[worth], score[worth], noise_frac))


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
    inside = ((place >= -0.5) & (place < render.SIDE - 0.5)).all(axis=2)
    return np.asarray(np.where(inside, candidates["score"].to_numpy(), 0.0).max(axis=1, initial=0.0))


def practise(
    network: networks.DenseNetwork,
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
    limits = frames.read_stage(scale_dir).set_index("frame")
    first, part = landed(images, blobs), seen_part(images, blobs, cutout_dir)

    def one(i: int) -> pd.DataFrame:
        name = images["frame"].iloc[i]
        data, about = read_difference(images.iloc[i], blobs[first < i], difference_dir, reference)
        signal, put = superimposed(params.seed, name, (len(data), part.border_px), about["noise_frac"])
        signal = np.pad(signal, ((0, 0), (0, data.shape[1] - signal.shape[1])))
        low, high, sigma = limits.loc[name, ["low_sigma", "high_sigma", "sigma_frac"]].to_numpy(np.float32)
        scaled = frames.read_frame(frames.find_image(scale_dir, name)).data
        cells = dense.probability_map(network, np.clip(scaled + signal / sigma, low, high))
        found = judged(cells, data + signal, **about)
        found = found.assign(is_blob=near(found, put).any(axis=1).astype(int))
        return found[(found["x_px"] < part.border_px) & (found["status"] == "new")]

    rows = np.flatnonzero(images["frame"].isin(part.frames))
    with ThreadPoolExecutor(params.threads) as pool:
        done = list(tqdm(pool.map(one, rows), "practise", len(rows), unit="image", disable=None))
    nothing = judged(np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32), noise_frac=1.0, **NOTHING_KNOWN)
    return pd.concat([nothing.assign(is_blob=0), *done], ignore_index=True)


def superimpose(
    image: npt.NDArray[np.float32],
    *,
    shape: profiles.Shape,
    x_px: float,
    y_px: float,
    radius_px: float,
    depth_frac: float,
    ragged: np.random.Generator | None = None,
) -> None:
    """Add a blob to an image (fraction of the light), in place, cut where the image ends; uneven at random if ``ragged``."""
    x, y = round(x_px), round(y_px)
    stamp = profiles.blob_profile(shape, radius_px, x_px - x, y_px - y, 2 * HALF_PX + 1)
    if ragged is not None:
        stamp = stamps.ragged_stamps(ragged, stamp[None])[0]
    top, left = max(0, y - HALF_PX), max(0, x - HALF_PX)
    part = image[top : y + HALF_PX + 1, left : x + HALF_PX + 1]
    visible = stamp[top - y + HALF_PX :, left - x + HALF_PX :][: part.shape[0], : part.shape[1]]
    part += np.float32(depth_frac) * visible


def superimposed(
    seed: int, frame: str, shape: tuple[int, int], noise_frac: float
) -> tuple[npt.NDArray[np.float32], pd.DataFrame]:
    """A blob at a random place in every 256 x 256 pixels, of any shape, size and S/N, half of them ragged.

    Returns
    -------
    ndarray, shape ``shape``, float32
        Their light loss (fraction of the light).
    DataFrame
        x_px, y_px, radius_px of each.
    """
    rng = frames.stream(seed, "detect", frame)
    signal, put = np.zeros(shape, np.float32), []
    for top, left in product(*(range(0, side - render.SIDE + 1, render.SIDE) for side in shape)):
        y, x = (start + rng.uniform(HALF_PX, render.SIDE - HALF_PX) for start in (top, left))
        radius, snr = (float(np.exp(rng.uniform(*np.log(ends)))) for ends in (PRACTICE_RADII_PX, PRACTICE_SNR))
        shape_of = profiles.SHAPES[rng.integers(len(profiles.SHAPES))]
        depth = snr / profiles.matched_snr(profiles.blob_profile(shape_of, radius), noise_frac)
        ragged = rng if rng.random() < PRACTICE_RAGGED else None
        superimpose(signal, shape=shape_of, x_px=x, y_px=y, radius_px=radius, depth_frac=depth, ragged=ragged)
        put.append((x, y, radius))
    return signal, pd.DataFrame(put, columns=["x_px", "y_px", "radius_px"], dtype=float)


def operating_point(
    candidates: pd.DataFrame,
    true: FloatArray,
    images: pd.DataFrame,
    blobs: pd.DataFrame,
    folders: tuple[str | Path, str | Path, str | Path],
    params: Detect,
) -> OperatingPoint:
    """Threshold and calibration from held-out frames without a new blob, and from the scores of superimposed blobs.

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
    slope, offset = calibrate(true, false, n_frames, params.new_blobs_per_100_frames / 100)
    return OperatingPoint(round(tail_threshold(false, allowed), 5), round(slope, 5), round(offset, 5), n_frames)


class SeenPart(NamedTuple):
    """What training has seen of images without a new blob: these frames, left of a column."""

    frames: set[str]
    border_px: int


def seen_part(images: pd.DataFrame, blobs: pd.DataFrame, cutout_dir: str | Path) -> SeenPart:
    """The training windows' side of quiet images."""
    shown, _ = cutout.read_recipes(cutout_dir, "train")
    quiet = set(images["frame"]) - set(blobs["first_frame"])
    return SeenPart(quiet & set(shown["frame"]), int(shown["x0_px"].max()) + render.SIDE)


class HeldOut(NamedTuple):
    """Which candidates lie on held-out pixels, and how many whole frames these make."""

    rows: npt.NDArray[np.bool_]
    frames: float


def held_out(
    candidates: pd.DataFrame, images: pd.DataFrame, blobs: pd.DataFrame, cutout_dir: str | Path, width: int
) -> HeldOut:
    """What neither training nor the regression test uses: the validation windows' side of quiet images."""
    seen, border = seen_part(images, blobs, cutout_dir)
    quiet = set(images["frame"]) - set(blobs["first_frame"])
    share = max(0.0, 1 - border / width)
    unseen, beyond = candidates["frame"].isin(quiet - seen), candidates["frame"].isin(seen)
    rows = unseen | (beyond & (candidates["x_px"] >= border))
    return HeldOut(rows.to_numpy(bool), len(quiet - seen) + share * len(seen))


def in_frame_sigma(
    scene: render.Scene, recipes: render.Recipes, rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Some subframes as the dense network meets them: the pixels of `render.render`, not standardised."""
    return render.vary(
        scene,
        recipes,
        rows,
        copy=0,
        strength=np.ones(len(recipes.blob), np.float32),
        noise_sigma=np.zeros(len(rows), np.float32),
        piece=np.full(len(rows), -1),
        pieces=np.zeros((1, render.SIDE, render.SIDE), np.int16),
    )


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
    """A dense model of this stage, ready for use (`networks.folded`).

    Raises
    ------
    ModelError
        As `networks.load_dense`; or if its operating point is none.
    """
    network, about = networks.load_dense(path)
    found = about.get("operating_point", {"threshold": 0.5, "slope": 1.0, "offset": 0.0, "frames": 0.0})
    if fault := _fault(found):
        raise ModelError(f"{path}: the operating point is none ({fault}); run the stage detect again or restore it")
    point = OperatingPoint(**{**found, "weights": tuple(found.get("weights", ()))})
    return networks.folded(network), point


def _fault(point: Any) -> str:
    """What keeps the metadata of a model from being an operating point; empty if nothing does."""
    needed = [name for name in OperatingPoint._fields if name not in OperatingPoint._field_defaults]
    if not isinstance(point, dict) or not set(needed) <= set(point) <= set(OperatingPoint._fields):
        return f"found {str(point)[:60]}, expected {', '.join(OperatingPoint._fields)}"
    weights = point.get("weights", [])
    if not isinstance(weights, list) or len(weights) not in (0, verdict.N_WEIGHTS):
        return f"weights: found {str(weights)[:60]}, expected a list of {verdict.N_WEIGHTS} numbers, or an empty one"
    numbers = {**{name: point[name] for name in needed}, **{f"weights[{i}]": w for i, w in enumerate(weights)}}
    for name, value in numbers.items():
        low, high = POINT_BOUNDS.get(name, (-LARGEST_WEIGHT, LARGEST_WEIGHT))
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            return f"{name}: found {str(value)[:40]!r}, expected a number from {low:g} to {high:g}"
    return ""


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
