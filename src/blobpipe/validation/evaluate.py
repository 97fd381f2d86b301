"""Evaluate three detectors on validation subframes, and say where and why they fail (stage ``evaluate``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.ndimage import distance_transform_edt

from blobpipe.core import fits_images, metrics, plotting, tables
from blobpipe.core.arrays import FloatArray, Image
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
from blobpipe.images.whiten import WHITE
from blobpipe.networks import dense, kernels, model_file, report_network, saliency
from blobpipe.params import Evaluate, Vetting
from blobpipe.simulation import cutout, render
from blobpipe.simulation.inject import render_in_sigma
from blobpipe.simulation.recipes import Recipes, Scene
from blobpipe.validation import curves, leakage

THREADS = 2  # of PyTorch, however many cores there are: the sums come out the same anywhere
CHUNK = 64  # subframes rendered at a time: they stay in the cache, and their memory is used again
GAP_PX = 64  # between subframes that are searched together: farther than a fit looks
N_PEAKS = 2  # of a subframe are measured at most
# training subframes with which the others' scores are turned into probabilities
N_CALIBRATION = 1000

SNR_EDGES = (0.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0, np.inf)
DIP_SHIFT_PX = 0.3  # a measured shift above this leaves crescents of the known blobs
FAINT_SNR = 10.0
SMALL_RADIUS_PX = 5.0
POINTING_MARGIN_PX = 3.0  # a map is smoothed by 4 px and a blob's centre is known to half a pixel
KINDS = ("dip", "faint", "small", "edge", "artefact")
SNR_COLUMNS = {
    **{"low": "snr_low", "high": "snr_high", "successes": "found"},
    **{"share": "tpr", "share_low": "tpr_low", "share_high": "tpr_high"},
}


def points_at_blob(points: FloatArray, blobs: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """Return whether each point lies on a true blob: within its radius and 3 px of its centre.

    The margin is for the smoothing of the maps (4 px) and for the centres, which are whole pixels.

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
    distance = np.hypot(*(points[subframe] - blobs[["x_px", "y_px"]].to_numpy(float)).T)
    on_blob = distance <= blobs["radius_px"].to_numpy(float) + POINTING_MARGIN_PX
    return np.asarray(np.bincount(subframe[on_blob], minlength=len(points)) > 0)


def failure_kinds(table: pd.DataFrame) -> npt.NDArray[np.str_]:
    """Sort failures by what they are put down to; the first kind that fits is taken.

    A false alarm is a ``dip`` if the network looks at one: a known blob was shifted on this window (`dip_sizes`), and
    the peak of the saliency map is within that shift and 3 px of a known blob; else an ``artefact``. A missed
    subframe is judged by its strongest blob, the one that was easiest to see: ``edge`` if the subframe's edge
    cuts it, ``faint`` if its S/N (of the part on the subframe) is below 10, ``small`` if its radius is below 5 px,
    then ``dip`` if there is one that may have hidden it, else ``artefact``.

    Parameters
    ----------
    table : DataFrame
        label, dip_px, known_px (distance of the saliency's peak to the nearest known blob), and of the strongest blob snr,
        radius_px, edge_px (distance of its centre to the nearest edge).

    Returns
    -------
    ndarray of str, shape (n,)
    """
    missed = table["label"] == 1
    dip = table["dip_px"] > 0
    seen = table["known_px"] <= table["dip_px"] + POINTING_MARGIN_PX
    cases = [
        (missed & (table["edge_px"] < table["radius_px"]), "edge"),
        (missed & (table["snr"] < FAINT_SNR), "faint"),
        (missed & (table["radius_px"] < SMALL_RADIUS_PX), "small"),
        (dip & (missed | seen), "dip"),
    ]
    return np.select(
        [case.to_numpy(bool) for case, _ in cases], [kind for _, kind in cases], "artefact"
    )


def dip_sizes(
    pattern: FloatArray, windows: npt.NDArray[np.int32], drawn: FloatArray, measured: FloatArray
) -> npt.NDArray[np.float64]:
    """Return by how much known blobs have moved where they leave crescents; else 0.

    Parameters
    ----------
    pattern : ndarray, shape (ny, nx)
        The known blobs, 0 elsewhere.
    windows : ndarray, shape (n, 2)
        x, y of each lower left pixel.
    drawn : ndarray, shape (n, 2)
        Shift of the recipe's dip (px): any counts.
    measured : ndarray, shape (n, 2)
        Shift measured in the image (px): counts above 0.3 px, since the difference stage has taken out most of it.

    Returns
    -------
    ndarray, shape (n,), float64
    """
    sums = np.pad((pattern != 0).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    (x, y) = windows.T
    side = tiles.SIDE
    known = sums[y + side, x + side] - sums[y, x + side] - sums[y + side, x] + sums[y, x] > 0
    shift = np.hypot(*measured.T)
    return np.where(
        known, np.maximum(np.hypot(*drawn.T), np.where(shift > DIP_SHIFT_PX, shift, 0)), 0
    )


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
    distance = distance_transform_edt(pattern == 0)
    real = np.isfinite(points).all(axis=1)
    x, y = points[real].astype(np.int64).T
    found = np.full(len(points), np.nan)
    found[real] = distance[y, x]
    return found


DETECTORS = {  # column of the probability; columns of the place that a detector points at
    "report": ("probability", ["saliency_x_px", "saliency_y_px"]),
    "dense": ("dense_probability", ["dense_x_px", "dense_y_px"]),
    "matched_filter": (
        "matched_filter_probability",
        ["matched_filter_x_px", "matched_filter_y_px"],
    ),
}
OTHERS = tuple(DETECTORS)[1:]


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
    """Evaluate the report's network, the dense one and a matched filter on all validation subframes (stage ``evaluate``).

    The dense network's score of a subframe is that of its best candidate, as a scan gives it: network and measurement together
    (`verdict`), without what the stack explains. The matched filter's is its highest S/N. Each becomes a probability by a
    logistic regression on training subframes, and counts as blob from the same ``threshold`` as the report's network: none of
    the three has seen validation. ``tpr_at_network_fpr`` and ``tpr_at_fpr_0.01`` compare them where they give equally many
    false alarms.

    Parameters
    ----------
    difference_dir, scale_dir, cutout_dir : path
        What the stages before have made.
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
        If a model or a file of the stages before is missing or damaged.

    Notes
    -----
    Source: ISR section 6; intervals, calibration, pointing and the other two detectors are ours.
    """
    out_dir = Path(out_dir)
    network, _ = model_file.load_model(models[0])
    detector = load_dense_detector(models[1])
    search = SubframeSearch(detector, difference_dir, vetting)
    kernels.set_threads(THREADS)
    folders = (difference_dir, scale_dir, cutout_dir)
    weights = _calibrate(
        search, *cutout.open_split(*folders, "train", n=N_CALIBRATION), params.radii_px
    )
    scene, recipes = cutout.open_split(*folders, "validation")
    blobs = _read_blobs(cutout_dir)
    table, features = _predict(network, scene, recipes, params)
    table = pd.concat([table, search(scene, recipes)], axis=1)
    for name, feature in _features(table).items():
        table[DETECTORS[name][0]] = logistic(feature, weights[name])
    table["known_px"] = distance_to_known(
        scene.pattern, recipes.window + table[DETECTORS["report"][1]].to_numpy(float)
    )
    table = pd.concat([_describe(difference_dir, scene, recipes, blobs), table], axis=1)
    hits = {
        name: points_at_blob(table[place].to_numpy(float), blobs)
        for name, (_, place) in DETECTORS.items()
    }
    found = _metrics(table, hits, params)
    found["leakage_auc"] = _plain(leakage.leakage_auc(features, recipes.label))
    failures = _failures(table, params.threshold)
    found["failures"] = {kind: int((failures["kind"] == kind).sum()) for kind in KINDS}
    by_snr = shares_by_snr(table, params.threshold)
    _write_tables(out_dir, table, failures, by_snr)
    _draw_curves(out_dir, table, found, by_snr, params.threshold)
    _draw_galleries(out_dir, network, scene, recipes, table, blobs, failures, params)
    tables.write_json(out_dir / "metrics.json", found)


def _chunks(n: int) -> Iterator[npt.NDArray[np.int64]]:
    return (np.arange(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK))


def _calibrate(
    search: SubframeSearch, scene: Scene, recipes: Recipes, radii_px: tuple[float, ...]
) -> dict[str, FloatArray]:
    """Fit logistic regressions that turn scores into probabilities, to training subframes."""
    pixels = (render.render_subframes(scene, recipes, rows) for rows in _chunks(len(recipes)))
    snr = np.concatenate([matched_filter.filter_subframes(part, radii_px).snr for part in pixels])
    scores = search(scene, recipes).assign(matched_filter_snr=snr)
    return {
        name: fit_logistic(feature, recipes.label) for name, feature in _features(scores).items()
    }


def _features(scores: pd.DataFrame) -> dict[str, FloatArray]:
    """Return what the regressions take, each of shape (n, 1)."""
    return {
        "dense": logit(scores["dense_score"].to_numpy())[:, None],
        "matched_filter": np.log1p(scores[["matched_filter_snr"]].to_numpy()),
    }


class SubframeSearch:
    """Searches subframes as whole images are searched, many at a time.

    Each is cut out of a difference image and its template, with the blobs of its recipe added; all
    are in units of the noise of their image.

    Parameters
    ----------
    detector : DenseDetector
    difference_dir : path
        Of the stage difference.
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
        # difference, whitened difference and RMS map of each image, by name
        self.images: dict[str, tuple[Image, Image, Image]] = {}

    def __call__(self, scene: Scene, recipes: Recipes) -> pd.DataFrame:
        """Find the best new blob on each subframe.

        Returns
        -------
        DataFrame
            ``dense_score`` (0: there is none), ``dense_x_px`` and ``dense_y_px`` in the subframe.
        """
        missing = [name for name in scene.names if name not in self.images]
        with ThreadPoolExecutor(THREADS) as pool:
            self.images.update(zip(missing, pool.map(self._read, missing), strict=True))

        # The blobs of a recipe alone, not clipped: on empty images without limits.
        limits = np.full_like(scene.limits, (-np.inf, np.inf))
        empty = replace(scene, backgrounds=np.zeros_like(scene.backgrounds), limits=limits)
        parts = []
        for rows in _chunks(len(recipes)):
            clipped = render_in_sigma(scene, recipes, rows)
            blobs = render_in_sigma(empty, recipes, rows)
            best = self._best(scene, recipes, rows, clipped, blobs)
            parts.append(best.set_index(rows))
        return pd.concat(parts).add_prefix("dense_")

    def _read(self, name: str) -> tuple[Image, Image, Image]:
        path = fits_images.find_image(self.difference_dir, name)
        noise = np.float32(self.noise[name])
        image = fits_images.read_frame(path).data
        rms = fits_images.find_plane(path, "SCATTER")
        if rms is None:  # of differences that others have made
            rms = np.zeros([-(-side // CELL_PX) for side in image.shape], np.float32)
        return image / noise, self.noise_model.whiten(image) / noise, rms / noise

    def _best(
        self,
        scene: Scene,
        recipes: Recipes,
        rows: npt.NDArray[np.int64],
        clipped: Image,
        blobs: Image,
    ) -> pd.DataFrame:
        """Search the subframes of some rows, stacked to one tall image: half the time of one by one."""
        names = [scene.names[i] for i in recipes.frame[rows]]
        windows = recipes.window[rows]
        noise = self.noise[names].to_numpy()[:, None, None]
        gain = (scene.sigma_frac[recipes.frame[rows]][:, None, None] / noise).astype(np.float32)
        pixels = _cut([self.images[name][0] for name in names], windows, tiles.SIDE)
        whitened = _cut([self.images[name][1] for name in names], windows, tiles.SIDE)
        rms = _cut(
            [self.images[name][2] for name in names], windows // CELL_PX, tiles.SIDE // CELL_PX
        )
        stack = _cut([self.template.stack] * len(names), windows, tiles.SIDE) / noise
        bad = _cut([self.template.bad_pixels] * len(names), windows, tiles.SIDE)
        template = Template(
            stack=_tower(stack.astype(np.float32), GAP_PX, np.nan),
            rms=_tower(rms, GAP_PX // CELL_PX, np.nan),
            bad_pixels=_tower(bad, GAP_PX, False),
        )
        response = _tower(self.detector.respond(clipped), GAP_PX // dense.STRIDE, 0.0)

        # Of each storey of the tower, the few highest peaks.
        step = tiles.SIDE + GAP_PX
        peaks = self.detector.peaks(response)
        of_peak = pd.Series((peaks.y_px + GAP_PX / 2) // step)
        high = (of_peak.groupby(of_peak).cumcount() < N_PEAKS).to_numpy()
        # Superimposed blobs lie anywhere, whatever their size: no law of sizes holds for them.
        difference = _tower(pixels + gain * blobs, GAP_PX, np.nan)
        observation = Observation(
            difference=difference,
            whitened=_tower(whitened + gain * blobs, GAP_PX, np.nan),
            template=template,
            catalogue=None,
            shift_px=NO_SHIFT,
            noise_model=replace(self.noise_model, scale=None),
            noise_frac=1.0,
        )
        likely = Peaks(*(values[high] for values in peaks))
        found = observation.find_blobs(self.detector, peaks=likely, vetting=self.vetting)
        found = found[found["status"] == "new"]
        storey = ((found["y_px"] + GAP_PX / 2) // step).astype(int)
        found = found.assign(y_px=found["y_px"] - storey * step).set_index(storey)
        best = found.sort_values("score", ascending=False, kind="stable")[["score", "x_px", "y_px"]]
        return best[~best.index.duplicated()].reindex(range(len(rows))).fillna({"score": 0.0})


def _cut(images: Sequence[Any], windows: npt.NDArray[Any], side: int) -> npt.NDArray[Any]:
    """Cut a square out of each image, shape (n, side, side)."""
    return np.stack(
        [image[y : y + side, x : x + side] for image, (x, y) in zip(images, windows, strict=True)]
    )


def _tower(images: npt.NDArray[Any], gap: int, value: float) -> npt.NDArray[Any]:
    """Stack images, shape (n, ny, nx), to one of shape (n * (ny + gap), nx)."""
    apart = np.pad(images, ((0, 0), (0, gap), (0, 0)), constant_values=value)
    return apart.reshape(-1, images.shape[2])


def _read_blobs(cutout_dir: str | Path) -> pd.DataFrame:
    """Read the blobs of the validation subframes, each with its stamp's radius."""
    _, blobs = cutout.read_recipes(cutout_dir, "validation")
    stamps = tables.read_table(Path(cutout_dir) / "stamps.csv", cutout.STAMP_COLUMNS)
    return blobs.merge(
        stamps[["stamp", "radius_px"]], on="stamp", how="left", validate="many_to_one"
    )


def _predict(
    network: report_network.ReportNetwork, scene: Scene, recipes: Recipes, params: Evaluate
) -> tuple[pd.DataFrame, FloatArray]:
    """Ask the report's network and the matched filter about each subframe."""
    parts = []
    features = []
    for rows in _chunks(len(recipes)):
        pixels = render.render_subframes(scene, recipes, rows)
        probability = report_network.predict(network, pixels)
        match = matched_filter.filter_subframes(pixels, params.radii_px)
        positive = probability >= params.threshold
        peak = np.full((len(rows), 2), np.nan)
        peak[positive] = saliency.peaks(saliency.saliency_maps(network, pixels[positive]))
        columns = (probability, peak[:, 0], peak[:, 1], *match)
        parts.append(pd.DataFrame(dict(zip(ANSWERS, columns, strict=True))))
        features.append(leakage.leakage_features(pixels))
    return pd.concat(parts, ignore_index=True), np.concatenate(features)


ANSWERS = (
    *("probability", "saliency_x_px", "saliency_y_px", "matched_filter_snr"),
    *("matched_filter_x_px", "matched_filter_y_px", "matched_filter_radius_px"),
)


def _describe(
    difference_dir: str | Path, scene: Scene, recipes: Recipes, blobs: pd.DataFrame
) -> pd.DataFrame:
    """Describe each subframe: label, dip, number of blobs, and the strongest of them."""
    subframes = pd.DataFrame({"subframe": np.arange(len(recipes)), "label": recipes.label})
    subframes["frame"] = np.array(scene.names)[recipes.frame]
    shifts = (
        tables.read_stage(difference_dir)
        .set_index("frame")
        .loc[list(scene.names), ["shift_x_px", "shift_y_px"]]
    )
    measured = shifts.to_numpy(float)[recipes.frame]
    subframes["dip_px"] = dip_sizes(scene.pattern, recipes.window, recipes.dip, measured)
    last = tiles.SIDE - 1
    x = blobs["x_px"]
    y = blobs["y_px"]
    blobs = blobs.assign(edge_px=np.min([x, y, last - x, last - y], axis=0))
    strongest = blobs.sort_values("snr", ascending=False, kind="stable").drop_duplicates("subframe")
    strongest = strongest.set_index("subframe")[["snr", "radius_px", "x_px", "y_px", "edge_px"]]
    subframes["n_blobs"] = np.bincount(blobs["subframe"], minlength=len(subframes))
    return subframes.join(strongest, on="subframe")


def _metrics(
    table: pd.DataFrame, hits: dict[str, npt.NDArray[np.bool_]], params: Evaluate
) -> dict[str, Any]:
    labels = table["label"].to_numpy()
    n = len(table)
    plain = {}
    interval = {}
    for name, (column, _) in DETECTORS.items():
        probability = table[column].to_numpy()
        hit = hits[name]

        def measure(
            weights: FloatArray, p: FloatArray = probability, hit: npt.NDArray[np.bool_] = hit
        ) -> metrics.Measures:
            return metrics.measures(labels, p, hit, weights, threshold=params.threshold)

        plain[name] = {key: _plain(value[0]) for key, value in measure(np.ones((1, n))).items()}
        rng = stream(params.seed, "evaluate", "bootstrap")  # the same resamplings for all
        found = metrics.bootstrap(measure, n, params.n_bootstrap, rng)
        interval[name] = {key: [_plain(low), _plain(high)] for key, (low, high) in found.items()}
    for name in OTHERS:
        true, false, _ = metrics.cumulative(labels, table[DETECTORS[name][0]].to_numpy())
        fpr = plain["report"]["fpr"]
        at_same = None if fpr is None else _plain(metrics.tpr_at_fpr(true, false, fpr)[0])
        plain[name]["tpr_at_network_fpr"] = at_same
    counts = {"threshold": params.threshold, "n_subframes": n, "n_with_blobs": int(labels.sum())}
    intervals = {**interval["report"], **{name: interval[name] for name in OTHERS}}
    return {
        **plain["report"],
        **counts,
        **{name: plain[name] for name in OTHERS},
        "interval": intervals,
    }


def shares_by_snr(table: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Return the share of subframes with blobs that each detector finds, by S/N.

    At ``threshold`` and, so that all give equally many false alarms, where one background in a hundred is one.

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
    parts = []
    snr = table["snr"].to_numpy()[labels == 1]
    for name, (column, _) in DETECTORS.items():
        probability = table[column].to_numpy()
        equal = metrics.threshold_at_fpr(labels, probability, metrics.FPR_POINT)
        for point, level in (("threshold", threshold), ("fpr_0.01", equal)):
            part = metrics.share_by_bin(snr, probability[labels == 1] >= level, SNR_EDGES)
            part.insert(0, "detector", name)
            part.insert(1, "operating_point", point)
            parts.append(part)
    return pd.concat(parts, ignore_index=True)


def _plain(value: float) -> float | None:
    """Round to six decimals; None for NaN, which JSON does not know."""
    return round(float(value), 6) if np.isfinite(value) else None


def _failures(table: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """List the subframes that are misclassified, by kind, the most confident first."""
    wrong = table[(table["probability"] >= threshold) != (table["label"] == 1)].copy()
    wrong.insert(0, "kind", failure_kinds(wrong))
    rank = wrong["kind"].map({kind: i for i, kind in enumerate(KINDS)})
    confidence = (wrong["probability"] - threshold).abs()
    return (
        wrong.assign(rank=rank, confidence=confidence)
        .sort_values(
            ["rank", "label", "confidence", "subframe"], ascending=[True, True, False, True]
        )
        .drop(columns=["rank", "confidence"])
    )


def _write_tables(
    out_dir: Path, table: pd.DataFrame, failures: pd.DataFrame, by_snr: pd.DataFrame
) -> None:
    labels = table["label"].to_numpy()
    probability = table["probability"].to_numpy()
    roc = dict(
        zip(("fpr", "tpr", "threshold"), metrics.roc_curve(labels, probability), strict=True)
    )
    curve = dict(
        zip(
            ("recall", "precision", "threshold"),
            metrics.precision_recall_curve(labels, probability),
            strict=True,
        )
    )
    tables.write_table(out_dir / "roc.csv", pd.DataFrame(roc))
    tables.write_table(out_dir / "precision_recall.csv", pd.DataFrame(curve))
    tables.write_table(out_dir / "calibration.csv", metrics.reliability(labels, probability))
    tables.write_table(out_dir / "snr.csv", by_snr.rename(columns=SNR_COLUMNS))
    tables.write_table(out_dir / "predictions.csv", table)
    tables.write_table(out_dir / "failures.csv", failures)


def _draw_curves(
    out_dir: Path,
    table: pd.DataFrame,
    found: dict[str, Any],
    by_snr: pd.DataFrame,
    threshold: float,
) -> None:
    labels = table["label"].to_numpy()
    scores = {name: table[column].to_numpy() for name, (column, _) in DETECTORS.items()}
    numbers = {"report": found, **{name: found[name] for name in OTHERS}}
    intervals = {"report": found["interval"], **{name: found["interval"][name] for name in OTHERS}}
    roc = {name: metrics.roc_curve(labels, score)[:2] for name, score in scores.items()}
    precision = {
        name: metrics.precision_recall_curve(labels, score)[:2] for name, score in scores.items()
    }
    points = {
        name: (numbers[name]["fpr"], numbers[name]["tpr"])
        for name in scores
        if numbers[name]["roc_auc"] is not None
    }
    counts = {
        name: np.bincount(2 * labels + (score >= threshold), minlength=4)
        for name, score in scores.items()
    }
    squares = {name: count.reshape(2, 2) for name, count in counts.items()}
    curves.confusion(out_dir / "confusion.png", squares, intervals)
    curves.roc(
        out_dir / "roc.png", roc, points, {name: numbers[name]["roc_auc"] for name in scores}
    )
    areas = {name: numbers[name]["average_precision"] for name in scores}
    curves.precision_recall(out_dir / "precision_recall.png", precision, areas)
    reliability = {name: metrics.reliability(labels, score) for name, score in scores.items()}
    plotting.calibration(out_dir / "calibration.png", reliability)
    equal = by_snr[by_snr["operating_point"] == "fpr_0.01"]
    curves.by_snr(
        out_dir / "by_snr.png", equal, "Subframes with blobs, at a false-positive rate of 0.01"
    )


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
    """Draw saliency of right and wrong cases, and failures by kind."""
    positive = table["probability"] >= params.threshold
    blob = table["label"] == 1
    answers = {
        "blob found": table[positive & blob],
        "blob missed": failures[failures["label"] == 1].sort_values("probability", kind="stable"),
        "false alarm": failures[failures["label"] == 0].sort_values(
            "probability", ascending=False, kind="stable"
        ),
        "no blob, none found": table[~positive & ~blob],
    }
    kinds = {kind: failures[failures["kind"] == kind] for kind in KINDS}

    def panels(rows: pd.DataFrame) -> list[plotting.Panel]:
        rows = rows[: params.n_gallery]
        # a copy: for pandas' own, read-only, all would be compiled again
        which = np.array(rows["subframe"], np.int64)
        pixels = render.render_subframes(scene, recipes, which)
        maps = saliency.saliency_maps(network, pixels)
        return [
            plotting.Panel(
                f"subframe {row.subframe}: {row.probability:.2f}",
                pixels[i],
                maps[i],
                blobs[blobs["subframe"] == row.subframe][["x_px", "y_px", "radius_px"]].to_numpy(
                    float
                ),
            )
            for i, row in enumerate(rows.itertuples())
        ]

    title = "circles: superimposed blobs; contours: saliency; number: probability of a blob"
    plotting.gallery(
        out_dir / "saliency.png", {name: panels(rows) for name, rows in answers.items()}, title
    )
    plotting.gallery(
        out_dir / "failures.png", {kind: panels(rows) for kind, rows in kinds.items()}, title
    )
