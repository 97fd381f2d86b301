"""Measure the completeness of three detectors by injecting blobs of every depth and size."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import expit
from tqdm import tqdm

from blobpipe.core import blob_shapes, fits_images, metrics, tables
from blobpipe.core.arrays import FloatArray
from blobpipe.core.detector import DEFAULT, Detector
from blobpipe.core.random_streams import stream
from blobpipe.detection import thresholds
from blobpipe.detection.detectors import (
    DETECTORS,
    DenseDetector,
    MatchedFilter,
    ReportDetector,
    load_dense_detector,
)
from blobpipe.detection.match import NEAR_PX
from blobpipe.detection.search import (
    CLEAR,
    FAINT,
    Observation,
    read_observation,
    read_pipeline_template,
)
from blobpipe.images import tiles
from blobpipe.networks import kernels, model_file
from blobpipe.params import Clip, Completeness, Scale, Vetting
from blobpipe.simulation import cutout, held_out
from blobpipe.simulation.inject import add_blob
from blobpipe.validation import curves

INJECTION_COLUMNS = (
    "frame",
    "x_px",
    "y_px",
    "radius_px",
    "depth_frac",
    "shape",
    "snr",
    "radius_ratio",
    "on_grid",
    "dense",
    "report",
    "matched_filter",
)
N_DRAWN = 9  # columns that are drawn; the others are found
GRID_COLUMNS = (
    "detector",
    "radius_px",
    "depth_frac",
    "n",
    "recovered",
    "completeness",
    "completeness_low",
    "completeness_high",
)
LIMIT_COLUMNS = ("detector", "radius_px", "depth_50_frac", "depth_90_frac")

# Shortest distance of an injected centre from the edges (px)
EDGE_PX = 8

# Largest logarithm of the ratio of a usual radius to the expected one; 71 blobs of a real image: 0.53
USUAL = 0.35

# Ratios of the radius of other blobs to the expected one, and their S/N
OFF_LAW = (0.5, 0.6, 0.7, 1.5, 2.0)
OFF_LAW_SNR = 12.0

# Images in succession that take no blob of the grid, after which it may lie anywhere (count)
MAX_USELESS = 50

# Levels of completeness whose depths are given (fraction of the injected blobs)
LEVELS = (0.5, 0.9)


class Setting(NamedTuple):
    """Settings of the stages that prepare an image, vet its candidates, and set the budget of false alarms."""

    clip: Clip
    scale: Scale
    vetting: Vetting
    radii_px: tuple[float, ...]
    false_alarms_per_100_frames: float
    instrument: Detector = DEFAULT


class Detectors(NamedTuple):
    """The three detectors, with thresholds at the same rate of false alarms."""

    dense: DenseDetector
    report: ReportDetector
    matched_filter: MatchedFilter

    @property
    def thresholds(self) -> dict[str, float]:
        """Return the threshold of each detector by its name.

        A score of the dense network, a probability of the report's network (its own threshold is in
        log-odds), an S/N of the matched filter: the units of ``metrics.json`` of the stage regression.
        """
        own = {name: getattr(self, name).threshold for name in DETECTORS}
        return own | {"report": float(expit(own["report"]))}


@dataclass
class Background:
    """An image without a new blob, read when it is first used: there may be many more than are used."""

    name: str
    read: Callable[[], Observation]

    @cached_property
    def observation(self) -> Observation:
        """Return the image, with what is known of it."""
        return self.read()


def measure_completeness(
    raw_dir: str | Path,
    difference_dir: str | Path,
    scale_dir: str | Path,
    cutout_dir: str | Path,
    models: tuple[str | Path, str | Path],
    baselines_dir: str | Path,
    out_dir: str | Path,
    params: Completeness,
    *,
    setting: Setting,
) -> None:
    """Inject blobs into held-out images and count how many are found (stage ``completeness``).

    The images are those without a new blob that training has not seen. Each subframe receives one blob of a radius and
    depth of the grid, of any shape, where its size is usual (where none fits, one of an unusual size). It is added to the unclipped difference, which then passes through
    clipping, scaling and the detectors like any other image. All detectors have the same rate of false alarms on
    these images: the stage `detect` has set the dense network's threshold; those of the other two are set here in the same
    way.

    Parameters
    ----------
    raw_dir, difference_dir, scale_dir, cutout_dir : path
        Folders of the earlier stages.
    models : (path, path)
        The dense network with its operating point, and the report's.
    baselines_dir : path
        Of `regression.score_batches`: ``baselines-NNN.csv``.
    out_dir : path
        ``injections.csv`` (a row per blob), ``completeness.csv`` (a row per detector, radius and depth), ``limits.csv``
        (depth of 50 % and 90 % completeness), ``completeness.png``, ``metrics.json``.
    params : Completeness
    setting : Setting
    """
    out_dir = Path(out_dir)
    kernels.set_threads(1)  # each thread searches an image of its own
    dense = load_dense_detector(models[0])
    report = ReportDetector(model_file.load_model(models[1])[0])
    matched_filter = MatchedFilter(setting.radii_px)
    stages = tables.image_table(raw_dir, difference_dir, scale_dir)
    images = stages.query("status == 'ok'").reset_index(drop=True)
    blobs = tables.read_blobs(raw_dir, setting.instrument)

    # All three detectors at the same budget of false alarms
    shape = fits_images.read_plane(Path(difference_dir) / "reference.fits.fz", "PATTERN").shape
    levels = thresholds.baseline_thresholds(
        thresholds.read_scores(baselines_dir, scale_dir),
        len(tiles.origins(shape)),
        per_100_frames=setting.false_alarms_per_100_frames,
    )
    detectors = Detectors(
        dense,
        replace(report, threshold=levels["report"]),
        replace(matched_filter, threshold=levels["matched_filter"]),
    )

    # Each image is used as often as the number of injections asks for
    backgrounds = list_backgrounds(images, blobs, difference_dir, cutout_dir, setting.instrument)
    plan = draw(backgrounds, params)
    with ThreadPoolExecutor(params.threads) as pool:
        work = pool.map(lambda one: inject(one[0], one[1], detectors, setting), plan)
        done = list(tqdm(work, "completeness", len(plan), unit="image", disable=None))

    injections = pd.concat(done, ignore_index=True)
    grid = recovered(injections.query("on_grid == 1"))
    limits = depth_limits(grid)
    tables.write_table(out_dir / "injections.csv", injections)
    tables.write_table(out_dir / "completeness.csv", grid)
    tables.write_table(out_dir / "limits.csv", limits)
    curves.completeness(out_dir / "completeness.png", grid, limits)
    tables.write_json(out_dir / "metrics.json", summarise(injections, detectors, len(backgrounds)))


def list_backgrounds(
    images: pd.DataFrame,
    blobs: pd.DataFrame,
    difference_dir: str | Path,
    cutout_dir: str | Path,
    instrument: Detector = DEFAULT,
) -> list[Background]:
    """List the images without a new blob that training has not seen."""
    training, _ = cutout.read_recipes(cutout_dir, "train")
    template = read_pipeline_template(difference_dir)
    landed = held_out.first_image_index(images, blobs)
    usable = ~images["frame"].isin({*training["frame"], *blobs["first_frame"]})
    backgrounds = []
    for i in np.flatnonzero(usable):
        image = images.iloc[i]
        known = blobs[landed < i]
        read = partial(read_observation, image, known, difference_dir, template, instrument)
        backgrounds.append(Background(str(image["frame"]), read))
    return backgrounds


def draw(
    backgrounds: list[Background], params: Completeness
) -> list[tuple[Background, pd.DataFrame]]:
    """Draw the blobs of each use of an image, one to a subframe, over the cells of the grid.

    Returns
    -------
    list of (Background, DataFrame)
        An image, and its blobs: the columns of ``injections.csv`` up to ``on_grid``.
    """
    rng = stream(params.seed, "completeness")

    # Each cell of the grid equally often, in random order
    cells = [(radius, depth) for radius in params.radii_px for depth in params.depths_frac]
    n_blobs = params.n_per_cell * len(cells)
    wanted = [cells[k % len(cells)] for k in rng.permutation(n_blobs)]

    plan: list[tuple[Background, pd.DataFrame]] = []
    n_useless = 0  # images in succession on which no place fits any blob that is left
    while wanted:
        image = backgrounds[len(plan) % len(backgrounds)]
        n_wanted = len(wanted)
        blobs = _draw_on_image(rng, image, wanted, anywhere=n_useless >= MAX_USELESS)
        n_useless = n_useless + 1 if len(wanted) == n_wanted else 0
        plan.append((image, blobs))
    return plan


def _draw_on_image(
    rng: np.random.Generator,
    image: Background,
    wanted: list[tuple[float, float]],
    *,
    anywhere: bool,
) -> pd.DataFrame:
    """Draw a blob on each subframe of an image; those of the grid are taken off the list.

    A blob of the grid lies where its size is usual. Where none that is left fits, the blob has another
    size than is usual there, to tell what the law of sizes costs.
    """
    side = tiles.SIDE
    observation = image.observation
    ny, nx = observation.difference.shape
    rows = []
    for y0, x0 in product(range(0, ny - side + 1, side), range(0, nx - side + 1, side)):
        if not wanted:
            break
        x = float(np.clip(x0 + rng.uniform(0, side), EDGE_PX, nx - EDGE_PX - 1))
        y = float(np.clip(y0 + rng.uniform(0, side), EDGE_PX, ny - EDGE_PX - 1))
        shape = blob_shapes.SHAPES[rng.integers(len(blob_shapes.SHAPES))]
        ratio = float(OFF_LAW[rng.integers(len(OFF_LAW))])

        # The first blob of the list that is usual here
        usual = _usual_radius(observation, x, y)
        fits = (
            k
            for k, (radius, _) in enumerate(wanted)
            if usual is None or anywhere or abs(np.log(radius / usual)) <= USUAL
        )
        k = next(fits, None)
        if k is not None:
            radius, depth = wanted.pop(k)
        else:
            assert usual is not None
            radius = round(ratio * usual, 3)
            profile = blob_shapes.blob_profile(shape, radius)
            depth = round(OFF_LAW_SNR / blob_shapes.matched_snr(profile, observation.noise_frac), 6)

        signal = depth * blob_shapes.blob_profile(shape, radius)
        snr = blob_shapes.matched_snr(signal, observation.noise_frac)
        of_usual = np.nan if usual is None else round(radius / usual, 3)
        drawn = (image.name, round(x, 2), round(y, 2), radius, depth, shape, round(snr, 3))
        rows.append((*drawn, of_usual, int(k is not None)))
    return pd.DataFrame(rows, columns=list(INJECTION_COLUMNS[:N_DRAWN]))


def _usual_radius(observation: Observation, x: float, y: float) -> float | None:
    """Return the radius that is usual at a place (px), if a law of sizes is known."""
    if observation.size_law is None:
        return None
    return float(observation.size_law.radius(np.array([x]), np.array([y]))[0])


def inject(
    image: Background, blobs: pd.DataFrame, detectors: Detectors, setting: Setting
) -> pd.DataFrame:
    """Add the blobs to the image and find out which detector finds which."""
    signal = np.zeros_like(image.observation.difference)
    for blob in blobs.to_dict("records"):
        add_blob(
            signal,
            shape=blob["shape"],
            x_px=blob["x_px"],
            y_px=blob["y_px"],
            radius_px=blob["radius_px"],
            depth_frac=blob["depth_frac"],
        )
    observation = image.observation.with_signal(signal)
    scaled = observation.scaled(setting.clip, setting.scale)

    # The dense network gives places, which are vetted
    peaks = detectors.dense.search(scaled)
    found = observation.find_blobs(detectors.dense, peaks=peaks, vetting=setting.vetting)
    new = found[(found["score"] >= detectors.dense.threshold) & (found["status"] == "new")]

    # The baselines answer for each subframe; the matched filter also gives a place
    origins = tiles.origins(scaled.shape)
    positive = detectors.report.answer(scaled) >= detectors.report.threshold
    match = detectors.matched_filter.respond(scaled)
    strong = match.snr >= detectors.matched_filter.threshold

    result: dict[str, list[int]] = {name: [] for name in DETECTORS}
    for blob in blobs.to_dict("records"):
        x = blob["x_px"]
        y = blob["y_px"]
        near_px = max(NEAR_PX, blob["radius_px"])
        subframe = int(np.flatnonzero((origins[:, 2] <= x) & (origins[:, 3] <= y))[-1])
        distance = np.hypot(new["x_px"] - x, new["y_px"] - y)
        match_distance = np.hypot(match.x[subframe] - x, match.y[subframe] - y)
        result["dense"].append(int((distance <= near_px).any()))
        result["report"].append(int(positive[subframe]))
        result["matched_filter"].append(int(strong[subframe] and match_distance <= near_px))
    return blobs.assign(**result)


def recovered(injections: pd.DataFrame) -> pd.DataFrame:
    """Tabulate the share that each detector finds, by radius and depth, with Wilson intervals."""
    parts = []
    for name in DETECTORS:
        cells = injections.groupby(["radius_px", "depth_frac"])[name]
        table = cells.agg(["size", "sum"]).reset_index()
        n = table["size"].to_numpy()
        n_found = table["sum"].to_numpy()
        low, high = metrics.wilson_interval(n_found, n)
        columns = {
            "detector": name,
            "radius_px": table["radius_px"],
            "depth_frac": table["depth_frac"],
            "n": n,
            "recovered": n_found,
            "completeness": n_found / n,
            "completeness_low": low,
            "completeness_high": high,
        }
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def depth_limits(grid: pd.DataFrame) -> pd.DataFrame:
    """Interpolate the depth at which each detector finds 50 % and 90 % of the blobs of a radius.

    Completeness is assumed to rise with depth, and to be linear in the logarithm of depth between the cells of the grid.

    Returns
    -------
    DataFrame
        detector, radius_px, depth_50_frac, depth_90_frac; NaN where the deepest blobs do not reach the level, and the
        smallest depth of the grid where all reach it.
    """
    rows = []
    for (name, radius), part in grid.groupby(["detector", "radius_px"], sort=False):
        part = part.sort_values("depth_frac")
        rising = np.maximum.accumulate(part["completeness"].to_numpy())
        log_depth = np.log(part["depth_frac"].to_numpy())
        depths = [_depth_at(level, log_depth, rising) for level in LEVELS]
        rows.append((name, radius, *depths))
    return pd.DataFrame(rows, columns=list(LIMIT_COLUMNS))


def _depth_at(level: float, log_depth: FloatArray, completeness: FloatArray) -> float:
    """Interpolate the depth at a level of completeness, both of shape (n,) and rising; NaN if it is not reached."""
    reached = np.flatnonzero(completeness >= level)
    if not len(reached):
        return np.nan
    k = reached[0]
    if k == 0:
        return float(np.exp(log_depth[0]))
    part_way = (level - completeness[k - 1]) / (completeness[k] - completeness[k - 1])
    log_limit = log_depth[k - 1] + part_way * (log_depth[k] - log_depth[k - 1])
    return round(float(np.exp(log_limit)), 5)


def summarise(injections: pd.DataFrame, detectors: Detectors, n_frames: int) -> dict[str, Any]:
    """Summarise the injections as the numbers of ``metrics.json``."""
    metrics: dict[str, Any] = {"n_injections": len(injections), "n_frames": n_frames}
    off_grid = injections.query("on_grid == 0")
    injections = injections.query("on_grid == 1")
    for name in DETECTORS:
        metrics[f"{name}_threshold"] = round(detectors.thresholds[name], 5)
        for label, (low, high) in (("snr_5_to_7", FAINT), ("snr_gt_7", CLEAR)):
            part = injections[(injections["snr"] >= low) & (injections["snr"] < high)]
            metrics[f"{name}_{label}"] = round(float(part[name].mean()), 6) if len(part) else None

    # What the law of sizes costs: blobs of an S/N of 12 whose radius is not the usual one
    ratio = off_grid["radius_ratio"].to_numpy(float)
    for wanted in OFF_LAW:
        part = off_grid[np.abs(ratio - wanted) < 0.01]
        name = f"dense_radius_{round(100 * wanted)}_percent"
        metrics[name] = tables.number_or_none(part["dense"].mean())
    return metrics
