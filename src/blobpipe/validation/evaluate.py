"""Evaluate three detectors on validation subframes; classify their failures (stage ``evaluate``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy.ndimage import distance_transform_edt

from blobpipe.core import fits_images, metrics, plotting, tables
from blobpipe.core.arrays import FloatArray, Image, Int64Array, Mask
from blobpipe.core.random_streams import stream
from blobpipe.detection import matched_filter
from blobpipe.detection.detectors import DenseDetector, Peaks, load_dense_detector
from blobpipe.detection.operating_point import logit
from blobpipe.detection.score import fit_logistic, logistic
from blobpipe.detection.search import Observation, read_pipeline_template
from blobpipe.images import tiles
from blobpipe.images.register import NO_SHIFT
from blobpipe.images.stack import CELL_PX
from blobpipe.images.template import Template
from blobpipe.networks import dense, kernels, model_file, report_network, saliency
from blobpipe.noise.whiten import WHITE
from blobpipe.params import Evaluate, Vetting
from blobpipe.simulation import cutout, render
from blobpipe.simulation.inject import render_in_sigma
from blobpipe.simulation.recipes import Recipes, Scene
from blobpipe.validation import curves, leakage

# Threads of PyTorch, however many cores there are: sums depend on their number in the last bits
THREADS = 2

# Subframes rendered at a time; so many fit into the cache
CHUNK = 64

# Gap between subframes that are searched as one image; larger than the window of a fit (px)
GAP_PX = 64

# Highest peaks of a subframe that are fitted
N_PEAKS = 2

# Training subframes to which the calibrations of the other two detectors are fitted
N_CALIBRATION = 1000

# Edges of the bins of matched-filter S/N
SNR_EDGES = (0.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0, np.inf)

# Measured shift above which known blobs leave visible crescents (px)
DIP_SHIFT_PX = 0.3

# Limits below which a missed blob counts as faint, or small (S/N; px)
FAINT_SNR = 10.0
SMALL_RADIUS_PX = 5.0

# Tolerance of a saliency peak: maps are smoothed over 4 px, centres are known to half a pixel (px)
POINTING_MARGIN_PX = 3.0

# Kinds of failure, from `failure_kinds`
KINDS = ("dip", "faint", "small", "edge", "artefact")

# Column of each detector's probability, and columns of the place it points at
PROBABILITY = {
    "report": "probability",
    "dense": "dense_probability",
    "matched_filter": "matched_filter_probability",
}
PLACE = {
    "report": ["saliency_x_px", "saliency_y_px"],
    "dense": ["dense_x_px", "dense_y_px"],
    "matched_filter": ["matched_filter_x_px", "matched_filter_y_px"],
}

# Detectors that the report's network is compared with
COMPARED = ("dense", "matched_filter")


def points_at_blob(points: FloatArray, blobs: pd.DataFrame) -> Mask:
    """Return whether each point lies on a true blob: within its radius and 3 px of its centre.

    The margin allows for the smoothing of the maps (4 px), and for centres given in whole pixels.

    Parameters
    ----------
    points : ndarray, shape (n, 2)
        x, y of one point on each subframe (px); NaN never lies on a blob.
    blobs : DataFrame
        subframe, x_px, y_px, radius_px.

    Returns
    -------
    ndarray of bool, shape (n,)
    """
    subframe = blobs["subframe"].to_numpy(np.int64)
    offset = points[subframe] - blobs[["x_px", "y_px"]].to_numpy(float)
    distance = np.hypot(offset[:, 0], offset[:, 1])
    on_blob = distance <= blobs["radius_px"].to_numpy(float) + POINTING_MARGIN_PX
    n_hits = np.bincount(subframe[on_blob], minlength=len(points))
    return np.asarray(n_hits > 0)


def failure_kinds(table: pd.DataFrame) -> npt.NDArray[np.str_]:
    """Classify failures by their likely cause; the first kind that applies is taken.

    A false alarm is a ``dip`` if a known blob was shifted on this window (`dip_sizes`) and the saliency map peaks
    within that shift and 3 px of a known blob; otherwise an ``artefact``. A missed subframe is classified by its
    strongest blob: ``edge`` if the subframe's edge cuts it, ``faint`` if the S/N of the part on the subframe is
    below 10, ``small`` if its radius is below 5 px, ``dip`` if a known blob was shifted on this window, otherwise
    ``artefact``.

    Parameters
    ----------
    table : DataFrame
        label, dip_px, known_px (distance of the saliency peak to the nearest known blob), and of the strongest blob snr,
        radius_px, edge_px (distance of its centre to the nearest edge).

    Returns
    -------
    ndarray of str, shape (n,)
    """
    missed = table["label"] == 1
    edge = missed & (table["edge_px"] < table["radius_px"])
    faint = missed & (table["snr"] < FAINT_SNR)
    small = missed & (table["radius_px"] < SMALL_RADIUS_PX)

    # A dip explains a false alarm only if the network looks at it
    shifted = table["dip_px"] > 0
    points_at_known = table["known_px"] <= table["dip_px"] + POINTING_MARGIN_PX
    dip = shifted & (missed | points_at_known)

    conditions = [condition.to_numpy(bool) for condition in (edge, faint, small, dip)]
    return np.select(conditions, ["edge", "faint", "small", "dip"], "artefact")


def dip_sizes(
    pattern: FloatArray, windows: npt.NDArray[np.int32], drawn: FloatArray, measured: FloatArray
) -> npt.NDArray[np.float64]:
    """Return the shift of the known blobs on each window that shows crescents of them (px); otherwise 0.

    Parameters
    ----------
    pattern : ndarray, shape (ny, nx)
        The known blobs, 0 elsewhere.
    windows : ndarray, shape (n, 2)
        x, y of the lower left pixel of each window.
    drawn : ndarray, shape (n, 2)
        Shift of the recipe's dip (px); all of it is left in the subframe.
    measured : ndarray, shape (n, 2)
        Shift measured in the image (px). It counts above 0.3 px, because the stage difference has corrected most of it.

    Returns
    -------
    ndarray, shape (n,), float64
    """
    # Known pixels in each window, from a summed-area table
    sums = np.pad((pattern != 0).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    x, y = windows.T
    right = x + tiles.SIDE
    top = y + tiles.SIDE
    n_known = sums[top, right] - sums[y, right] - sums[top, x] + sums[y, x]

    shift_drawn = np.hypot(drawn[:, 0], drawn[:, 1])
    shift_measured = np.hypot(measured[:, 0], measured[:, 1])
    visible = np.where(shift_measured > DIP_SHIFT_PX, shift_measured, 0)
    return np.where(n_known > 0, np.maximum(shift_drawn, visible), 0)


def distance_to_known(pattern: FloatArray, points: FloatArray) -> npt.NDArray[np.float64]:
    """Return the distance of points from the nearest pixel of a known blob (px).

    Parameters
    ----------
    pattern : ndarray, shape (ny, nx)
        The known blobs, 0 elsewhere.
    points : ndarray, shape (n, 2)
        x, y in the image (px); NaN gives NaN.

    Returns
    -------
    ndarray, shape (n,), float64
        Infinite if there is no known blob.
    """
    if not pattern.any():
        return np.full(len(points), np.inf)
    distance_map = distance_transform_edt(pattern == 0)
    finite = np.isfinite(points).all(axis=1)
    x, y = points[finite].astype(np.int64).T
    distance = np.full(len(points), np.nan)
    distance[finite] = distance_map[y, x]
    return distance


def evaluate(
    difference_dir: str | Path,
    scale_dir: str | Path,
    cutout_dir: str | Path,
    models: tuple[str | Path, str | Path],
    out_dir: str | Path,
    params: Evaluate,
    *,
    vetting: Vetting,
) -> None:
    """Evaluate the report's network, the dense network and a matched filter on all validation subframes (stage ``evaluate``).

    The dense network's score of a subframe is that of its best candidate in the search of daily work, without candidates
    that the vetting rejects. The matched filter's is its highest S/N. A logistic regression on training subframes turns
    each into a probability, which is compared with the same ``threshold`` as that of the report's network. No detector has
    seen the validation subframes. ``tpr_at_network_fpr`` and ``tpr_at_fpr_0.01`` compare the three at equal rates of
    false alarms.

    Parameters
    ----------
    difference_dir, scale_dir, cutout_dir : path
        Folders of the earlier stages.
    models : (path, path)
        The report's network, and the dense one with its operating point (stage ``detect``).
    out_dir : path
        ``metrics.json`` (numbers, 95 % intervals under ``interval``, the same for ``dense`` and ``matched_filter``), the
        tables predictions, roc, precision_recall, calibration, snr and failures, and figures.
    params : Evaluate
    vetting : Vetting

    Raises
    ------
    ModelError, TableError, FrameError
        If a model or a file of an earlier stage is missing or damaged.

    Notes
    -----
    Source: ISR section 6; intervals, calibration, pointing and the other two detectors are ours.
    """
    out_dir = Path(out_dir)
    folders = (difference_dir, scale_dir, cutout_dir)
    network, _ = model_file.load_model(models[0])
    dense_detector = load_dense_detector(models[1])
    search = SubframeSearch(dense_detector, difference_dir, vetting)
    kernels.set_threads(THREADS)

    # The scores of the other two detectors are calibrated on training subframes
    train_scene, train_recipes = cutout.open_split(*folders, "train", n=N_CALIBRATION)
    weights = _calibrate(search, train_scene, train_recipes, params.radii_px)

    # All three detectors search the validation subframes
    scene, recipes = cutout.open_split(*folders, "validation")
    table, features = _predict(network, scene, recipes, params)
    table = pd.concat([table, search(scene, recipes)], axis=1)
    for name, feature in _calibration_features(table).items():
        table[PROBABILITY[name]] = logistic(feature, weights[name])

    # What is true of each subframe, and whether the detectors point at a blob
    saliency_peaks = recipes.window + table[PLACE["report"]].to_numpy(float)
    table["known_px"] = distance_to_known(scene.pattern, saliency_peaks)
    blobs = _read_validation_blobs(cutout_dir)
    table = pd.concat([_describe(difference_dir, scene, recipes, blobs), table], axis=1)
    hits = {
        name: points_at_blob(table[columns].to_numpy(float), blobs)
        for name, columns in PLACE.items()
    }

    numbers = _metrics(table, hits, params)
    numbers["leakage_auc"] = tables.number_or_none(leakage.leakage_auc(features, recipes.label))
    failures = _failures(table, params.threshold)
    numbers["failures"] = {kind: int((failures["kind"] == kind).sum()) for kind in KINDS}
    by_snr = shares_by_snr(table, params.threshold)

    _write_tables(out_dir, table, failures, by_snr)
    _draw_curves(out_dir, table, numbers, by_snr, params.threshold)
    _draw_galleries(out_dir, network, scene, recipes, table, blobs, failures, params)
    tables.write_json(out_dir / "metrics.json", numbers)


def _chunks(n: int) -> Iterator[Int64Array]:
    """Yield the numbers of the subframes of each chunk."""
    for start in range(0, n, CHUNK):
        yield np.arange(start, min(start + CHUNK, n))


def _calibrate(
    search: SubframeSearch, scene: Scene, recipes: Recipes, radii_px: tuple[float, ...]
) -> dict[str, FloatArray]:
    """Fit the logistic regressions that turn scores into probabilities, to training subframes."""
    snr = []
    for rows in _chunks(len(recipes)):
        pixels = render.render_subframes(scene, recipes, rows)
        snr.append(matched_filter.filter_subframes(pixels, radii_px).snr)
    scores = search(scene, recipes).assign(matched_filter_snr=np.concatenate(snr))
    return {
        name: fit_logistic(feature, recipes.label)
        for name, feature in _calibration_features(scores).items()
    }


def _calibration_features(scores: pd.DataFrame) -> dict[str, FloatArray]:
    """Return the features of the logistic regressions, each of shape (n, 1)."""
    return {
        "dense": logit(scores["dense_score"].to_numpy())[:, None],
        "matched_filter": np.log1p(scores[["matched_filter_snr"]].to_numpy()),
    }


class _Difference(NamedTuple):
    """A difference image, the same with white noise, and its RMS map, in units of the image's noise."""

    pixels: Image
    whitened: Image
    rms: Image


class SubframeSearch:
    """Search for new blobs on subframes as on whole images, many at a time.

    Each subframe is cut out of an unclipped difference image and its template, and the blobs of its
    recipe are added. Everything is in units of the noise of the image.

    Parameters
    ----------
    detector : DenseDetector
    difference_dir : path
        Folder of the stage difference.
    vetting : Vetting
    """

    def __init__(
        self, detector: DenseDetector, difference_dir: str | Path, vetting: Vetting
    ) -> None:
        self.detector = detector
        self.difference_dir = Path(difference_dir)
        self.vetting = vetting
        self.template = read_pipeline_template(difference_dir)
        self.noise = tables.read_stage(difference_dir).set_index("frame")["noise_frac"]
        self.noise_model = self.template.noise_model or WHITE
        self.images: dict[str, _Difference] = {}  # read once, by name

    def __call__(self, scene: Scene, recipes: Recipes) -> pd.DataFrame:
        """Find the best new blob on each subframe.

        Returns
        -------
        DataFrame
            ``dense_score`` (0 if there is none), ``dense_x_px`` and ``dense_y_px`` in the subframe.
        """
        missing = [name for name in scene.names if name not in self.images]
        with ThreadPoolExecutor(THREADS) as pool:
            images = pool.map(self._read, missing)
            self.images.update(zip(missing, images, strict=True))

        # Rendered on empty images without limits, a recipe gives its blobs alone, not clipped
        limits = np.full_like(scene.limits, (-np.inf, np.inf))
        empty = replace(scene, backgrounds=np.zeros_like(scene.backgrounds), limits=limits)

        def search(rows: Int64Array) -> pd.DataFrame:
            clipped = render_in_sigma(scene, recipes, rows)
            blobs = render_in_sigma(empty, recipes, rows)
            return self._search_mosaic(scene, recipes, rows, clipped, blobs).set_index(rows)

        # Mosaics share the cores: PyTorch computes each on one thread
        with ThreadPoolExecutor(THREADS, "mosaic", torch.set_num_threads, (1,)) as pool:
            parts = list(pool.map(search, _chunks(len(recipes))))
        return pd.concat(parts).add_prefix("dense_")

    def _read(self, name: str) -> _Difference:
        path = fits_images.find_image(self.difference_dir, name)
        noise = np.float32(self.noise[name])
        pixels = fits_images.read_pixels(path)
        rms = fits_images.find_plane(path, "SCATTER")
        if rms is None:
            # Differences from elsewhere have no RMS map
            n_cells = [-(-side // CELL_PX) for side in pixels.shape]
            rms = np.zeros(n_cells, np.float32)
        whitened = self.noise_model.whiten(pixels)
        return _Difference(pixels / noise, whitened / noise, rms / noise)

    def _search_mosaic(
        self,
        scene: Scene,
        recipes: Recipes,
        rows: Int64Array,
        clipped: Image,
        blobs: Image,
    ) -> pd.DataFrame:
        """Search subframes stacked to one image, in half the time of a search one by one; ``blobs`` is overwritten."""
        names = [scene.names[index] for index in recipes.frame[rows]]
        images = [self.images[name] for name in names]
        n = len(names)
        windows = recipes.window[rows]
        cells = windows // CELL_PX
        noise = self.noise[names].to_numpy()

        # Blobs are rendered in sigma of the scaled image, which is not quite the noise
        gain = (scene.sigma_frac[recipes.frame[rows]] / noise).astype(np.float32)
        blobs *= gain[:, None, None]
        pixels = _cut([image.pixels for image in images], windows, tiles.SIDE)
        whitened = _cut([image.whitened for image in images], windows, tiles.SIDE)

        # The template of each subframe, stacked in the same way
        stack_squares = _cut([self.template.stack] * n, windows, tiles.SIDE)
        stack = [
            (square / usual).astype(np.float32)
            for square, usual in zip(stack_squares, noise, strict=True)
        ]
        bad_pixels = _cut([self.template.bad_pixels] * n, windows, tiles.SIDE)
        rms = _cut([image.rms for image in images], cells, tiles.SIDE // CELL_PX)
        template = Template(
            stack=_mosaic(stack, GAP_PX, np.nan),
            rms=_mosaic(rms, GAP_PX // CELL_PX, np.nan),
            bad_pixels=_mosaic(bad_pixels, GAP_PX, False),
        )

        # The network sees each subframe alone; of each, the few highest peaks are fitted
        response = _mosaic(self.detector.respond(clipped), GAP_PX // dense.STRIDE, 0.0)
        peaks = self.detector.peaks(response, _mosaic(clipped, GAP_PX, 0.0))
        step = tiles.SIDE + GAP_PX
        of_peak = pd.Series((peaks.y_px + GAP_PX / 2) // step)
        rank = of_peak.groupby(of_peak).cumcount().to_numpy()
        highest = Peaks(*(values[rank < N_PEAKS] for values in peaks))
        # Superimposed blobs lie anywhere, whatever their size: no law of sizes holds for them
        observation = Observation(
            difference=_mosaic(list(map(np.add, pixels, blobs)), GAP_PX, np.nan),
            whitened=_mosaic(list(map(np.add, whitened, blobs)), GAP_PX, np.nan),
            template=template,
            catalogue=None,
            shift_px=NO_SHIFT,
            noise_model=replace(self.noise_model, scale=None, coarse=None),
            noise_frac=1.0,
        )
        found = observation.find_blobs(self.detector, peaks=highest, vetting=self.vetting)

        # The best new blob of each subframe, in the subframe's coordinates
        found = found[found["status"] == "new"]
        subframe = ((found["y_px"] + GAP_PX / 2) // step).astype(int)
        found = found.assign(y_px=found["y_px"] - subframe * step).set_index(subframe)
        ordered = found.sort_values("score", ascending=False, kind="stable")
        best = ordered[["score", "x_px", "y_px"]][~ordered.index.duplicated()]
        return best.reindex(range(n)).fillna({"score": 0.0})


def _cut(images: Sequence[Any], windows: npt.NDArray[Any], side: int) -> list[npt.NDArray[Any]]:
    """Cut a square out of each image."""
    return [
        image[y : y + side, x : x + side] for image, (x, y) in zip(images, windows, strict=True)
    ]


def _mosaic(
    images: Sequence[npt.NDArray[Any]] | npt.NDArray[Any], gap: int, value: float
) -> npt.NDArray[Any]:
    """Stack images of one shape (ny, nx) above each other: shape (n * (ny + gap), nx)."""
    between = np.full((gap, images[0].shape[1]), value, images[0].dtype)
    return np.concatenate([part for image in images for part in (image, between)])


def _read_validation_blobs(cutout_dir: str | Path) -> pd.DataFrame:
    """Read the blobs of the validation subframes, each with the radius of its stamp."""
    _, blobs = cutout.read_recipes(cutout_dir, "validation")
    stamps = tables.read_table(Path(cutout_dir) / "stamps.csv", cutout.STAMP_COLUMNS)
    radii = stamps[["stamp", "radius_px"]]
    return blobs.merge(radii, on="stamp", how="left", validate="many_to_one")


def _predict(
    network: report_network.ReportNetwork, scene: Scene, recipes: Recipes, params: Evaluate
) -> tuple[pd.DataFrame, FloatArray]:
    """Apply the report's network and the matched filter to each subframe; return features of leakage, too."""
    parts = []
    features = []
    for rows in _chunks(len(recipes)):
        pixels = render.render_subframes(scene, recipes, rows)
        probability = report_network.predict(network, pixels)
        match = matched_filter.filter_subframes(pixels, params.radii_px)

        # The report's network points at the peak of its saliency map
        positive = probability >= params.threshold
        peaks = np.full((len(rows), 2), np.nan)
        peaks[positive] = saliency.peaks(saliency.saliency_maps(network, pixels[positive]))

        columns = {
            "probability": probability,
            "saliency_x_px": peaks[:, 0],
            "saliency_y_px": peaks[:, 1],
            "matched_filter_snr": match.snr,
            "matched_filter_x_px": match.x,
            "matched_filter_y_px": match.y,
            "matched_filter_radius_px": match.radius,
        }
        parts.append(pd.DataFrame(columns))
        features.append(leakage.leakage_features(pixels))
    return pd.concat(parts, ignore_index=True), np.concatenate(features)


def _describe(
    difference_dir: str | Path, scene: Scene, recipes: Recipes, blobs: pd.DataFrame
) -> pd.DataFrame:
    """Describe each subframe: label, dip, number of blobs, and the strongest of them."""
    subframes = pd.DataFrame({"subframe": np.arange(len(recipes)), "label": recipes.label})
    subframes["frame"] = np.array(scene.names)[recipes.frame]

    # Known blobs are shifted by the recipe, or in the image itself
    stage = tables.read_stage(difference_dir).set_index("frame")
    shifts = stage.loc[list(scene.names), ["shift_x_px", "shift_y_px"]].to_numpy(float)
    measured = shifts[recipes.frame]
    subframes["dip_px"] = dip_sizes(scene.pattern, recipes.window, recipes.dip, measured)

    # The blob with the highest S/N, and its distance to the nearest edge
    last = tiles.SIDE - 1
    x = blobs["x_px"]
    y = blobs["y_px"]
    blobs = blobs.assign(edge_px=np.min([x, y, last - x, last - y], axis=0))
    strongest = blobs.sort_values("snr", ascending=False, kind="stable").drop_duplicates("subframe")
    strongest = strongest.set_index("subframe")[["snr", "radius_px", "x_px", "y_px", "edge_px"]]
    subframes["n_blobs"] = np.bincount(blobs["subframe"], minlength=len(subframes))
    return subframes.join(strongest, on="subframe")


def _metrics(table: pd.DataFrame, hits: dict[str, Mask], params: Evaluate) -> dict[str, Any]:
    """Compute the numbers of ``metrics.json``: those of the report's network, then of the others."""
    labels = table["label"].to_numpy()
    n = len(table)
    numbers = {}
    intervals = {}
    for name, column in PROBABILITY.items():
        measure = partial(
            metrics.measures,
            labels,
            table[column].to_numpy(),
            hits[name],
            threshold=params.threshold,
        )
        once = measure(np.ones((1, n)))
        numbers[name] = {key: tables.number_or_none(value[0]) for key, value in once.items()}

        # All detectors have the same resamplings
        rng = stream(params.seed, "evaluate", "bootstrap")
        ends = metrics.bootstrap(measure, n, params.n_bootstrap, rng)
        intervals[name] = {
            key: [tables.number_or_none(low), tables.number_or_none(high)]
            for key, (low, high) in (ends | _rate_intervals(labels, numbers[name])).items()
        }

    # The others at the false-positive rate of the report's network
    fpr = numbers["report"]["fpr"]
    for name in COMPARED:
        true, false, _ = metrics.cumulative(labels, table[PROBABILITY[name]].to_numpy())
        tpr = (
            None if fpr is None else tables.number_or_none(metrics.tpr_at_fpr(true, false, fpr)[0])
        )
        numbers[name]["tpr_at_network_fpr"] = tpr

    return {
        **numbers["report"],
        "threshold": params.threshold,
        "n_subframes": n,
        "n_with_blobs": int(labels.sum()),
        **{name: numbers[name] for name in COMPARED},
        "interval": {**intervals["report"], **{name: intervals[name] for name in COMPARED}},
    }


def _rate_intervals(
    labels: Int64Array, numbers: dict[str, float | None]
) -> dict[str, tuple[float, float]]:
    """Return the 95 % intervals of the four rates of a detector, of those that have a value.

    Resampling cannot tell how uncertain a rate of 0 or 1 is: every sample has the same.
    """
    n_with = int(labels.sum())
    n_without = len(labels) - n_with
    intervals = {}
    for key, n in {"tpr": n_with, "fnr": n_with, "tnr": n_without, "fpr": n_without}.items():
        rate = numbers[key]
        if rate is not None:
            low, high = metrics.wilson_interval(np.array(round(rate * n)), np.array(n))
            intervals[key] = float(low), float(high)
    return intervals


def shares_by_snr(table: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Return the share of subframes with blobs that each detector finds, by S/N.

    The operating points are ``threshold``, and the false-positive rate 0.01, at which all give equally many false alarms.

    Parameters
    ----------
    table : DataFrame
        ``predictions.csv``.
    threshold : float
        Probability from which a subframe counts as blob.

    Returns
    -------
    DataFrame
        detector, operating_point, and the columns of `metrics.share_by_bin`.
    """
    labels = table["label"].to_numpy()
    with_blobs = labels == 1
    snr = table["snr"].to_numpy()[with_blobs]
    parts = []
    for name, column in PROBABILITY.items():
        probability = table[column].to_numpy()
        equal = metrics.threshold_at_fpr(labels, probability, metrics.FPR_POINT)
        for point, level in (("threshold", threshold), ("fpr_0.01", equal)):
            found = probability[with_blobs] >= level
            part = metrics.share_by_bin(snr, found, SNR_EDGES)
            part.insert(0, "detector", name)
            part.insert(1, "operating_point", point)
            parts.append(part)
    return pd.concat(parts, ignore_index=True)


def _failures(table: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """List the subframes that are misclassified, by kind, the most confident first."""
    positive = table["probability"] >= threshold
    wrong = table[positive != (table["label"] == 1)].copy()
    wrong.insert(0, "kind", failure_kinds(wrong))
    rank = wrong["kind"].map({kind: i for i, kind in enumerate(KINDS)})
    confidence = (wrong["probability"] - threshold).abs()
    wrong = wrong.assign(rank=rank, confidence=confidence)
    wrong = wrong.sort_values(
        ["rank", "label", "confidence", "subframe"], ascending=[True, True, False, True]
    )
    return wrong.drop(columns=["rank", "confidence"])


def _write_tables(
    out_dir: Path, table: pd.DataFrame, failures: pd.DataFrame, by_snr: pd.DataFrame
) -> None:
    labels = table["label"].to_numpy()
    probability = table["probability"].to_numpy()
    fpr, tpr, threshold = metrics.roc_curve(labels, probability)
    roc = pd.DataFrame({"fpr": fpr, "tpr": tpr, "threshold": threshold})
    recall, precision, threshold = metrics.precision_recall_curve(labels, probability)
    precision_recall = pd.DataFrame(
        {"recall": recall, "precision": precision, "threshold": threshold}
    )
    snr = pd.DataFrame(
        {
            "detector": by_snr["detector"],
            "operating_point": by_snr["operating_point"],
            "snr_low": by_snr["low"],
            "snr_high": by_snr["high"],
            "n": by_snr["n"],
            "found": by_snr["successes"],
            "tpr": by_snr["share"],
            "tpr_low": by_snr["share_low"],
            "tpr_high": by_snr["share_high"],
        }
    )
    tables.write_table(out_dir / "roc.csv", roc)
    tables.write_table(out_dir / "precision_recall.csv", precision_recall)
    tables.write_table(out_dir / "calibration.csv", metrics.reliability(labels, probability))
    tables.write_table(out_dir / "snr.csv", snr)
    tables.write_table(out_dir / "predictions.csv", table)
    tables.write_table(out_dir / "failures.csv", failures)


def _draw_curves(
    out_dir: Path,
    table: pd.DataFrame,
    numbers: dict[str, Any],
    by_snr: pd.DataFrame,
    threshold: float,
) -> None:
    """Draw confusion matrices, ROC, precision and recall, calibration, and recall by S/N."""
    labels = table["label"].to_numpy()
    by_detector = {"report": numbers, **{name: numbers[name] for name in COMPARED}}
    interval = numbers["interval"]
    intervals = {"report": interval, **{name: interval[name] for name in COMPARED}}

    counts = {}
    roc = {}
    points = {}
    precision_recall = {}
    reliability = {}
    for name, column in PROBABILITY.items():
        probability = table[column].to_numpy()
        cell = 2 * labels + (probability >= threshold)
        counts[name] = np.bincount(cell, minlength=4).reshape(2, 2)
        fpr, tpr, _ = metrics.roc_curve(labels, probability)
        roc[name] = (fpr, tpr)
        recall, precision, _ = metrics.precision_recall_curve(labels, probability)
        precision_recall[name] = (recall, precision)
        reliability[name] = metrics.reliability(labels, probability)
        if by_detector[name]["roc_auc"] is not None:
            points[name] = (by_detector[name]["fpr"], by_detector[name]["tpr"])

    roc_areas = {name: by_detector[name]["roc_auc"] for name in roc}
    averages = {name: by_detector[name]["average_precision"] for name in precision_recall}
    curves.confusion(out_dir / "confusion.png", counts, intervals)
    curves.roc(out_dir / "roc.png", roc, points, roc_areas)
    curves.precision_recall(out_dir / "precision_recall.png", precision_recall, averages)
    plotting.calibration(out_dir / "calibration.png", reliability)
    equal = by_snr[by_snr["operating_point"] == "fpr_0.01"]
    title = "Subframes with blobs, at a false-positive rate of 0.01; with 95 % intervals"
    curves.by_snr(out_dir / "by_snr.png", equal, title)


def _draw_galleries(
    out_dir: Path,
    network: report_network.ReportNetwork,
    scene: Scene,
    recipes: Recipes,
    table: pd.DataFrame,
    blobs: pd.DataFrame,
    failures: pd.DataFrame,
    params: Evaluate,
) -> None:
    """Draw saliency maps of right and wrong answers, and failures by kind."""

    def panels(rows: pd.DataFrame) -> list[plotting.Panel]:
        rows = rows[: params.n_gallery]
        # A copy, because the compiled renderer would be compiled again for the read-only array of pandas
        subframes = np.array(rows["subframe"], np.int64)
        pixels = render.render_subframes(scene, recipes, subframes)
        maps = saliency.saliency_maps(network, pixels)
        drawn = []
        for i, row in enumerate(rows.itertuples()):
            title = f"subframe {row.subframe}: {row.probability:.2f}"
            mine = blobs[blobs["subframe"] == row.subframe]
            circles = mine[["x_px", "y_px", "radius_px"]].to_numpy(float)
            drawn.append(plotting.Panel(title, pixels[i], maps[i], circles))
        return drawn

    title = (
        f"{plotting.NAMES['report']}, with the probability of a blob; circles: superimposed blobs"
    )
    positive = table["probability"] >= params.threshold
    blob = table["label"] == 1

    # The most confident failures first
    missed = failures[failures["label"] == 1].sort_values("probability", kind="stable")
    alarms = failures[failures["label"] == 0].sort_values(
        "probability", ascending=False, kind="stable"
    )
    answers = {
        "blob found": panels(table[positive & blob]),
        "blob missed": panels(missed),
        "false alarm": panels(alarms),
        "no blob, none found": panels(table[~positive & ~blob]),
    }
    plotting.gallery(out_dir / "saliency.png", answers, title)

    kinds = {kind: panels(failures[failures["kind"] == kind]) for kind in KINDS}
    plotting.gallery(out_dir / "failures.png", kinds, title)
