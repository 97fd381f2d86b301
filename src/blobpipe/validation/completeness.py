"""Measure which blobs three detectors find, by injecting blobs of every depth and size."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from blobpipe.core import blob_shapes, metrics, tables
from blobpipe.core.random_streams import stream
from blobpipe.detection import held_out, thresholds
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
from blobpipe.simulation import cutout
from blobpipe.simulation.inject import add_blob
from blobpipe.validation import curves

INJECTION_COLUMNS = ("frame", "x_px", "y_px", "radius_px", "depth_frac", "shape", "snr", *DETECTORS)
GRID_COLUMNS = (
    *("detector", "radius_px", "depth_frac", "n", "recovered", "completeness"),
    *("completeness_low", "completeness_high"),
)
LIMIT_COLUMNS = ("detector", "radius_px", "depth_50_frac", "depth_90_frac")


class Setting(NamedTuple):
    """Settings of other stages that decide what a frame looks like to a detector."""

    clip: Clip
    scale: Scale
    vetting: Vetting
    radii_px: tuple[float, ...]
    false_alarms_per_100_frames: float


class Detectors(NamedTuple):
    """The three detectors, with thresholds at the same rate of false alarms."""

    dense: DenseDetector
    report: ReportDetector
    matched_filter: MatchedFilter

    @property
    def thresholds(self) -> dict[str, float]:
        """Return the threshold of each detector by its name."""
        return {name: getattr(self, name).threshold for name in DETECTORS}


class Background(NamedTuple):
    """An image without a new blob."""

    name: str
    observation: Observation


def measure_completeness(
    raw_dir: str | Path,
    difference_dir: str | Path,
    scale_dir: str | Path,
    cutout_dir: str | Path,
    models: tuple[str | Path, str | Path],
    out_dir: str | Path,
    params: Completeness,
    *,
    setting: Setting,
) -> None:
    """Inject blobs into held-out images and count how many are found (stage ``completeness``).

    The images are those without a new blob that training has not seen. One blob to each subframe, of the depth and radius
    of the grid, of any shape, anywhere, is added to the unclipped difference; then the image goes through clipping,
    scaling and the detectors, as any other. All detectors have the same rate of false alarms on these images:
    `detect` has set the dense network's; those of the other two are set here, in the same way.

    Parameters
    ----------
    raw_dir, difference_dir, scale_dir, cutout_dir : path
        What the stages before have made.
    models : (path, path)
        The dense network with its operating point, and the report's.
    out_dir : path
        ``injections.csv`` (a row per blob), ``completeness.csv`` (a row per detector, radius and depth), ``limits.csv``
        (depth of 50 % and 90 % completeness), ``completeness.png``, ``metrics.json``.
    params : Completeness
    setting : Setting
    """
    out_dir = Path(out_dir)
    kernels.set_threads(1)
    dense = load_dense_detector(models[0])
    report = ReportDetector(model_file.load_model(models[1])[0])
    matched_filter = MatchedFilter(setting.radii_px)
    stages = tables.image_table(raw_dir, difference_dir, scale_dir)
    images = stages.query("status == 'ok'").reset_index(drop=True)
    blobs = tables.read_blobs(raw_dir)
    folders = (difference_dir, scale_dir, cutout_dir)
    levels = thresholds.baseline_thresholds(
        report,
        matched_filter,
        images,
        blobs,
        folders,
        per_100_frames=setting.false_alarms_per_100_frames,
        threads=params.threads,
    )
    detectors = Detectors(
        dense,
        replace(report, threshold=levels["report"]),
        replace(matched_filter, threshold=levels["matched_filter"]),
    )
    backgrounds = read_backgrounds(images, blobs, difference_dir, cutout_dir)
    plan = draw(backgrounds, params)
    with ThreadPoolExecutor(params.threads) as pool:
        work = pool.map(lambda one: inject(one[0], one[1], detectors, setting), plan)
        done = list(tqdm(work, "completeness", len(plan), unit="image", disable=None))
    injections = pd.concat(done, ignore_index=True)
    grid = recovered(injections)
    limits = depth_limits(grid)
    for name, table in (("injections", injections), ("completeness", grid), ("limits", limits)):
        tables.write_table(out_dir / f"{name}.csv", table)
    curves.completeness(out_dir / "completeness.png", grid, limits)
    tables.write_json(out_dir / "metrics.json", summarise(injections, detectors, len(backgrounds)))


def read_backgrounds(
    images: pd.DataFrame, blobs: pd.DataFrame, difference_dir: str | Path, cutout_dir: str | Path
) -> list[Background]:
    """Read the images without a new blob from which no training subframe comes."""
    shown, _ = cutout.read_recipes(cutout_dir, "train")
    template = read_pipeline_template(difference_dir)
    landed = held_out.first_image_index(images, blobs)
    free = ~images["frame"].isin({*shown["frame"], *blobs["first_frame"]})
    found = []
    for i in np.flatnonzero(free):
        image = images.iloc[i]
        observation = read_observation(image, blobs[landed < i], difference_dir, template)
        found.append(Background(str(image["frame"]), observation))
    return found


def draw(
    backgrounds: list[Background], params: Completeness
) -> list[tuple[Background, pd.DataFrame]]:
    """Draw the blobs of each turn of an image, one to a subframe, over the cells of the grid."""
    cells = [(radius, depth) for radius in params.radii_px for depth in params.depths_frac]
    rng = stream(params.seed, "completeness")
    side = tiles.SIDE
    wanted = [cells[k % len(cells)] for k in range(params.n_per_cell * len(cells))]
    wanted = [wanted[k] for k in rng.permutation(len(wanted))]
    plan: list[tuple[Background, pd.DataFrame]] = []
    start = 0
    while start < len(wanted):
        image = backgrounds[len(plan) % len(backgrounds)]
        ny, nx = image.observation.difference.shape
        corners = [
            (x, y) for y in range(0, ny - side + 1, side) for x in range(0, nx - side + 1, side)
        ]
        rows = []
        for (x0, y0), (radius, depth) in zip(
            corners, wanted[start : start + len(corners)], strict=False
        ):
            x, y = (
                float(np.clip(c + rng.uniform(0, side), 8, n - 9)) for c, n in ((x0, nx), (y0, ny))
            )
            shape = blob_shapes.SHAPES[rng.integers(len(blob_shapes.SHAPES))]
            signal = depth * blob_shapes.blob_profile(shape, radius)
            snr = blob_shapes.matched_snr(signal, image.observation.noise_frac)
            rows.append((image.name, round(x, 2), round(y, 2), radius, depth, shape, round(snr, 3)))
        start += len(corners)
        plan.append((image, pd.DataFrame(rows, columns=list(INJECTION_COLUMNS[:7]))))
    return plan


def inject(
    image: Background, blobs: pd.DataFrame, detectors: Detectors, setting: Setting
) -> pd.DataFrame:
    """Add the blobs to the image and say which detector found which."""
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

    # The dense network says where; its detections are vetted.
    peaks = detectors.dense.search(scaled)
    found = observation.find_blobs(detectors.dense, peaks=peaks, vetting=setting.vetting)
    new = found[(found["score"] >= detectors.dense.threshold) & (found["status"] == "new")]

    # The baselines answer for each subframe; the matched filter says where, too.
    origins = tiles.origins(scaled.shape)
    positive = detectors.report.answer(scaled) >= detectors.report.threshold
    match = detectors.matched_filter.respond(scaled)
    strong = match.snr >= detectors.matched_filter.threshold

    result: dict[str, list[int]] = {name: [] for name in DETECTORS}
    for blob in blobs.to_dict("records"):
        x = blob["x_px"]
        y = blob["y_px"]
        near = max(NEAR_PX, blob["radius_px"])
        holds = int(np.flatnonzero((origins[:, 2] <= x) & (origins[:, 3] <= y))[-1])
        apart = np.hypot(new["x_px"] - x, new["y_px"] - y)
        match_apart = np.hypot(match.x[holds] - x, match.y[holds] - y)
        result["dense"].append(int((apart <= near).any()))
        result["report"].append(int(positive[holds]))
        result["matched_filter"].append(int(strong[holds] and match_apart <= near))
    return blobs.assign(**result)


def recovered(injections: pd.DataFrame) -> pd.DataFrame:
    """Tabulate the share that each detector finds, by radius and depth, with Wilson intervals."""
    parts = []
    for name in DETECTORS:
        table = (
            injections.groupby(["radius_px", "depth_frac"])[name].agg(["size", "sum"]).reset_index()
        )
        n = table["size"].to_numpy()
        k = table["sum"].to_numpy()
        low, high = metrics.wilson_interval(k, n)
        parts.append(
            pd.DataFrame(
                dict(
                    zip(
                        GRID_COLUMNS,
                        (name, table["radius_px"], table["depth_frac"], n, k, k / n, low, high),
                        strict=True,
                    )
                )
            )
        )
    return pd.concat(parts, ignore_index=True)


def depth_limits(grid: pd.DataFrame) -> pd.DataFrame:
    """Interpolate the depth at which each detector finds 50 % and 90 % of the blobs of a radius.

    Completeness is taken to rise with depth, and to be linear in its logarithm between the grid's depths.
    """
    rows = []
    for (name, radius), part in grid.groupby(["detector", "radius_px"], sort=False):
        part = part.sort_values("depth_frac")
        share = np.maximum.accumulate(part["completeness"].to_numpy())
        depth = np.log(part["depth_frac"].to_numpy())
        limits = []
        for level in (0.5, 0.9):
            above = np.flatnonzero(share >= level)
            if not len(above):
                limits.append(np.nan)
            elif above[0] == 0:
                limits.append(float(np.exp(depth[0])))
            else:
                k = above[0]
                part_way = (level - share[k - 1]) / (share[k] - share[k - 1])
                limits.append(
                    round(float(np.exp(depth[k - 1] + part_way * (depth[k] - depth[k - 1]))), 5)
                )
        rows.append((name, radius, *limits))
    return pd.DataFrame(rows, columns=list(LIMIT_COLUMNS))


def summarise(injections: pd.DataFrame, detectors: Detectors, n_frames: int) -> dict[str, Any]:
    """Summarise the injections in the numbers of ``metrics.json``."""
    metrics: dict[str, Any] = {"n_injections": len(injections), "n_frames": n_frames}
    for name in DETECTORS:
        metrics[f"{name}_threshold"] = round(detectors.thresholds[name], 5)
        for label, (low, high) in (("snr_5_to_7", FAINT), ("snr_gt_7", CLEAR)):
            part = injections[(injections["snr"] >= low) & (injections["snr"] < high)]
            metrics[f"{name}_{label}"] = round(float(part[name].mean()), 6) if len(part) else None
    return metrics
