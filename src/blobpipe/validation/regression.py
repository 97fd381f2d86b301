"""Search the historical images and match detections with the catalogue (stage ``regression``, ISR 7)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import expit

from blobpipe.core import blob_shapes, files, fits_images, metrics, plotting, tables
from blobpipe.core.arrays import FloatArray, Int64Array, Mask
from blobpipe.core.detector import DEFAULT, Detector
from blobpipe.detection import matched_filter
from blobpipe.detection.detect import CANDIDATE_COLUMNS
from blobpipe.detection.detectors import (
    MatchedFilter,
    ReportDetector,
    load_dense_detector,
    standardised_subframes,
)
from blobpipe.detection.match import near_blobs
from blobpipe.detection.operating_point import logit
from blobpipe.detection.search import CLEAR, FAINT
from blobpipe.detection.thresholds import (
    BASELINES,
    baseline_thresholds,
    read_scores,
    score_held_out,
)
from blobpipe.images import tiles
from blobpipe.networks import kernels, model_file, report_network, saliency
from blobpipe.params import Regression
from blobpipe.validation import curves
from blobpipe.validation.evaluate import (
    DIP_SHIFT_PX,
    POINTING_MARGIN_PX,
    THREADS,
)

# Quantities and bin edges of ``recall.csv`` (matched-filter S/N, fraction of the light, px)
BINS = {
    "snr": (0.0, 5.0, 7.0, 10.0, 15.0, 25.0, np.inf),
    "depth_frac": (0.0, 0.01, 0.015, 0.02, 0.03, 0.05, np.inf),
    "radius_px": (0.0, 4.0, 5.0, 6.0, 7.0, 8.0, np.inf),
}

# Ranges of S/N of ``detectors.csv``, by the suffix of their columns
SNR_RANGES = {"": (0.0, np.inf), "_snr_5_to_7": FAINT, "_snr_gt_7": CLEAR}

# Kinds of false alarm
ALARMS = ("dip", "recent", "artefact")

# Detectors and operating points that are compared: the report's threshold, and the budget of false alarms
OPERATING_POINTS = (
    ("report", "isr"),
    ("dense", "budget"),
    ("report", "budget"),
    ("matched_filter", "budget"),
)

CASE_COLUMNS = (
    "frame",
    "blob",
    "x_px",
    "y_px",
    "radius_px",
    "depth_frac",
    "shape",
    "snr",
    "row",
    "col",
    "probability",
    "saliency_px",
    "status",
    "reason",
    "found_dense",
    "found_report",
    "found_matched_filter",
    "dense_score",
    "dense_probability",
    "dense_status",
    "x_found_px",
    "y_found_px",
    "radius_found_px",
    "depth_found_frac",
    "depth_err_frac",
    "matched_filter_snr",
)
FRAME_COLUMNS = (
    "frame",
    "mjd",
    "status",
    "reason",
    "shift_px",
    "noise_frac",
    "new_blobs",
    "found",
    "positive",
    "false_alarms",
    "dip_alarms",
    "recent_alarms",
    "artefact_alarms",
    "false_alarms_dense",
    "false_alarms_report",
    "false_alarms_matched_filter",
)
ALARM_COLUMNS = (
    "detector",
    "operating_point",
    "frame",
    "row",
    "col",
    "x0_px",
    "y0_px",
    "score",
    "x_px",
    "y_px",
    "kind",
)


class Case(NamedTuple):
    """A historical image, and the rows of the catalogue that matter for it.

    Attributes
    ----------
    image : named tuple
        Its row of `tables.image_table`.
    new : DataFrame
        Blobs that it is the first to show.
    known : DataFrame
        Blobs that landed before it.
    recent : DataFrame
        Those of them that landed within its stack.
    """

    image: Any
    new: pd.DataFrame
    known: pd.DataFrame
    recent: pd.DataFrame


class Answers(NamedTuple):
    """Answers of the baselines for the ``n`` subframes of an image; an unusable image has none.

    Attributes
    ----------
    origins : ndarray, shape (n, 4), int64
        Row, column, x0, y0, from `tiles.origins`.
    odds : ndarray, shape (n,), float64
        Log-odds of the report's network.
    match : Match
        Of the matched filter, each array of shape (n,); x, y in the image (px).
    peaks : ndarray, shape (n, 2), float64
        x, y of the saliency map's peak in the image (px); NaN where the subframe is negative at both operating
        points.
    """

    origins: Int64Array
    odds: FloatArray
    match: matched_filter.Match
    peaks: FloatArray


class Result(NamedTuple):
    """Rows of ``cases.csv``, ``frames.csv`` and ``alarms.csv``."""

    cases: pd.DataFrame
    frames: pd.DataFrame
    alarms: pd.DataFrame


def score_batches(
    folders: tuple[str | Path, str | Path, str | Path, str | Path],
    model_path: str | Path,
    out_dir: str | Path,
    *,
    radii_px: tuple[float, ...],
    batch: int | None = None,
    detector: Detector = DEFAULT,
) -> None:
    """Ask the two baselines about the held-out subframes of one batch of images, or of each.

    Parameters
    ----------
    folders : (path, path, path, path)
        Of the images, and of the stages difference, scale and cutout.
    model_path : path
        The report's network.
    out_dir : path
        ``batches/baselines-NNN.csv``, with all digits: the columns of `thresholds.score_held_out`.
    radii_px : tuple of float
        Radii of the matched filter (px).
    batch : int, optional
        All if not given.
    detector : Detector, optional
        Whose images they are.
    """
    kernels.set_threads(1)  # each thread searches an image of its own
    raw_dir, difference_dir, scale_dir, _ = folders
    report = ReportDetector(model_file.load_model(model_path)[0])
    filters = MatchedFilter(radii_px)
    blobs = tables.read_blobs(raw_dir, detector)
    for path in tables.stage_tables(scale_dir, batch):
        number = int(path.stem.rpartition("-")[2])
        images = tables.image_table(raw_dir, difference_dir, scale_dir, number)
        usable = images.query("status == 'ok'").reset_index(drop=True)
        scores = score_held_out(report, filters, usable, blobs, folders[1:], threads=THREADS)
        table = path.name.replace("frames", BASELINES, 1)
        tables.write_exact(Path(out_dir) / "batches" / table, scores)


def regress(
    folders: tuple[str | Path, str | Path, str | Path, str | Path],
    detect_dir: str | Path,
    model_path: str | Path,
    out_dir: str | Path,
    params: Regression,
    *,
    radii_px: tuple[float, ...],
    per_100_frames: float,
    detector: Detector = DEFAULT,
) -> None:
    """Search every historical image with all three detectors and compare with the catalogue (stage ``regression``).

    A historical image is one that ``blobs.csv`` names as some blob's ``first_frame``.

    The report's network finds a new blob if it calls the subframe that holds the blob's centre positive; a positive
    subframe that no new blob reaches into is a false alarm. The dense network and the matched filter must give the place: a
    detection finds a new blob within 6 px of its centre, or within its radius; any other detection is a false alarm.
    False alarms are classified by what lies at their place (for the report's network, at the peak of its saliency
    map): ``dip`` (a known blob, while the measured shift is above 0.3 px), else ``recent`` (a blob that landed within
    the stack, so no longer new but perhaps still visible), else ``artefact``.

    Each detector has the threshold that gives the same rate of false alarms on held-out images (operating point
    ``budget``); the report's network also has that of the report (``isr``).

    Parameters
    ----------
    folders : (path, path, path, path)
        Of the images, and of the stages difference, scale and cutout.
    detect_dir : path
        Folder of the stage detect: candidates and operating point of the dense network.
    model_path : path
        The report's network.
    out_dir : path
        With ``batches`` of `score_batches`. ``metrics.json``, ``cases.csv`` (a row per new blob), ``frames.csv`` (a row per historical image), ``alarms.csv``
        (a row per false alarm), ``detectors.csv`` (a row per operating point), ``recall.csv`` (by S/N, depth and radius),
        ``cases.png`` (the report's network), ``dense_cases.png``, ``detectors.png``, ``gallery.png``.
    params : Regression
    radii_px : tuple of float
        Radii of the matched filter (px).
    per_100_frames : float
        Budget of false alarms on 100 images (count).

    Raises
    ------
    ModelError, TableError, FrameError
        If a model or a file of an earlier stage is missing or damaged. Images that a stage has rejected
        are no error: their blobs are listed as ``unusable``.

    Notes
    -----
    Source: ISR section 7; everything except the report's network and its threshold is ours.
    """
    out_dir = Path(out_dir)
    raw_dir, difference_dir, scale_dir, _ = folders
    report = ReportDetector(model_file.load_model(model_path)[0])
    filters = MatchedFilter(radii_px)
    shape = fits_images.read_plane(Path(difference_dir) / "reference.fits.fz", "PATTERN").shape
    dense_path = Path(detect_dir) / "model.safetensors"
    dense_detector = load_dense_detector(dense_path)
    candidates = tables.read_table(Path(detect_dir) / "candidates.csv", CANDIDATE_COLUMNS)
    images = tables.image_table(raw_dir, difference_dir, scale_dir)
    blobs = tables.read_blobs(raw_dir, detector)
    kernels.set_threads(1)  # each thread searches an image of its own

    # The threshold of each detector
    levels = baseline_thresholds(
        read_scores(out_dir / "batches", scale_dir),
        len(tiles.origins(shape)),
        per_100_frames=per_100_frames,
    )
    thresholds = {
        "isr": logit(np.array(params.threshold)).item(),
        "dense": dense_detector.threshold,
        **levels,
    }

    # The baselines search the historical images; the dense network has searched them in the stage detect
    report = replace(report, threshold=min(thresholds["isr"], thresholds["report"]))
    cases = historical_cases(images, blobs)
    with ThreadPoolExecutor(THREADS) as pool:
        answers = list(
            pool.map(lambda case: search_with_baselines(report, filters, scale_dir, case), cases)
        )
    by_frame = dict(tuple(candidates.groupby("frame")))
    results = []
    for case, answer in zip(cases, answers, strict=True):
        found = by_frame.get(case.image.frame, candidates[:0])
        results.append(compare(case, answer, found, thresholds))
    result = gather(results)

    # The model's checksum says which model the numbers belong to
    detectors = compare_detectors(result, thresholds)
    recall = recall_by_bin(result.cases)
    metrics = {**summarise(result), **side_by_side(detectors), **accuracy(result.cases)}
    metrics["passed"] = not failed_thresholds(metrics, params)
    metrics["dense_sha256"] = files.sha256(dense_path)

    tables.write_table(out_dir / "cases.csv", result.cases)
    tables.write_table(out_dir / "frames.csv", result.frames)
    tables.write_table(out_dir / "alarms.csv", result.alarms)
    tables.write_table(out_dir / "detectors.csv", detectors)
    tables.write_table(out_dir / "recall.csv", recall)
    _draw(out_dir, result, detectors, recall, per_100_frames, shape)
    _draw_gallery(out_dir / "gallery.png", report.network, scale_dir, result, params.n_gallery)
    tables.write_json(out_dir / "metrics.json", metrics)


def historical_cases(images: pd.DataFrame, blobs: pd.DataFrame) -> list[Case]:
    """Make one `Case` for each image that is some blob's first, in order of date.

    Parameters
    ----------
    images : DataFrame
        From `image_table`.
    blobs : DataFrame
        The catalogue, from `tables.read_blobs`.
    """
    index = {frame: i for i, frame in enumerate(images["frame"])}
    landed = blobs["first_frame"].map(index).fillna(-1)
    n_stack = images["n_stack"].fillna(0).to_numpy(int)
    cases = []
    for i, image in enumerate(images.itertuples()):
        if (landed == i).any():
            first_of_stack = max(i - n_stack[i], 0)
            recent = (landed < i) & (landed >= first_of_stack)
            cases.append(Case(image, blobs[landed == i], blobs[landed < i], blobs[recent]))
    return cases


def search_with_baselines(
    report: ReportDetector, filters: MatchedFilter, scale_dir: str | Path, case: Case
) -> Answers:
    """Search a historical image with the report's network and the matched filter."""
    if case.image.status != "ok":
        subframes = np.zeros((0, tiles.SIDE, tiles.SIDE), np.float32)
        no_match = matched_filter.filter_subframes(subframes, filters.radii_px)
        return Answers(np.zeros((0, 4), np.int64), np.zeros(0), no_match, np.zeros((0, 2)))
    scaled = fits_images.read_pixels(fits_images.find_image(scale_dir, case.image.frame))
    odds = report.answer(scaled)
    peaks = report.point_at(scaled, odds >= report.threshold)
    return Answers(tiles.origins(scaled.shape), odds, filters.respond(scaled), peaks)


def compare(
    case: Case, answers: Answers, candidates: pd.DataFrame, thresholds: dict[str, float]
) -> Result:
    """Compare the detections in one image with the catalogue, at all operating points.

    Parameters
    ----------
    case : Case
    answers : Answers
    candidates : DataFrame
        Candidates of the stage detect in this image.
    thresholds : dict of float
        ``isr`` and ``report`` (log-odds), ``dense`` (score), ``matched_filter`` (S/N).
    """
    # The report's network, at both of its thresholds
    isr = match_subframes(case, answers, answers.odds >= thresholds["isr"])
    report = match_subframes(case, answers, answers.odds >= thresholds["report"])

    # The other two give places
    match = answers.match
    responses = pd.DataFrame(
        {"x_px": match.x, "y_px": match.y, "score": match.snr, "status": "new"}
    )
    dense, dense_false = match_places(case, candidates, thresholds["dense"])
    strongest, filter_false = match_places(case, responses, thresholds["matched_filter"])

    cases = isr.cases.assign(
        found_dense=dense["found"],
        found_report=(report.cases["status"] == "found").astype(int),
        found_matched_filter=strongest["found"],
        matched_filter_snr=strongest["score"],
        dense_score=dense["score"],
        dense_probability=dense["probability"],
        dense_status=dense["status"],
        x_found_px=dense["x_px"],
        y_found_px=dense["y_px"],
        radius_found_px=dense["radius_px"],
        depth_found_frac=dense["depth_frac"],
        depth_err_frac=dense["depth_err_frac"],
    )
    alarms = {
        ("report", "isr"): isr.alarms,
        ("dense", "budget"): _place_alarms(case, dense_false),
        ("report", "budget"): report.alarms,
        ("matched_filter", "budget"): _place_alarms(case, filter_false),
    }
    frames = isr.frames.assign(
        false_alarms_dense=len(alarms["dense", "budget"]),
        false_alarms_report=len(alarms["report", "budget"]),
        false_alarms_matched_filter=len(alarms["matched_filter", "budget"]),
    )
    labelled = [
        alarms[detector, point].assign(detector=detector, operating_point=point)
        for detector, point in OPERATING_POINTS
    ]
    return Result(
        cases[list(CASE_COLUMNS)],
        frames[list(FRAME_COLUMNS)],
        pd.concat(labelled, ignore_index=True)[list(ALARM_COLUMNS)],
    )


def match_places(
    case: Case, places: pd.DataFrame, threshold: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Match the places that a detector gives with the new blobs.

    Parameters
    ----------
    case : Case
    places : DataFrame
        x_px, y_px, score, status in this image, down to the lowest score; only those with the status ``new`` can be
        detections.
    threshold : float
        Score from which a place is a detection.

    Returns
    -------
    best : DataFrame
        One row per new blob: the nearby place with the highest score, detections first, and ``found``, 0 or 1; empty
        cells if no place is near.
    false : DataFrame
        Detections near no new blob.
    """
    detected = (places["status"] == "new") & (places["score"] >= threshold)
    is_detection = detected.to_numpy(bool)
    near = near_blobs(places, case.new)
    order = np.lexsort((places["score"], is_detection))
    rows: list[dict[Any, Any]] = []
    for is_near in near.T:
        nearby = order[is_near[order]]
        if len(nearby):
            best = nearby[-1]
            [row] = places.iloc[[best]].to_dict("records")
            rows.append({**row, "found": int(is_detection[best])})
        else:
            rows.append({"found": 0, "status": ""})
    matched = pd.DataFrame(rows, columns=[*places.columns, "found"])
    return matched, places[is_detection & ~near.any(axis=1)]


def _place_alarms(case: Case, false: pd.DataFrame) -> pd.DataFrame:
    """Turn false detections into rows of ``alarms.csv``."""
    places = false[["x_px", "y_px"]].to_numpy(float)
    col, row = np.floor((places + 0.5) / tiles.SIDE).astype(np.int64).T
    return false[["score", "x_px", "y_px"]].assign(
        frame=case.image.frame,
        row=row,
        col=col,
        x0_px=col * tiles.SIDE,
        y0_px=row * tiles.SIDE,
        kind=_alarm_kinds(case, places),
    )


def match_subframes(case: Case, answers: Answers, positive: Mask) -> Result:
    """Match the positive subframes of the report's network with the new blobs."""
    image = case.image
    origins = answers.origins
    cases = pd.DataFrame(
        [_match_blob(image, blob, answers, positive) for blob in case.new.itertuples()]
    )
    false = positive & ~reaches_into(case.new, origins).any(axis=1)
    kinds = _alarm_kinds(case, answers.peaks[false])
    frame = {
        "frame": image.frame,
        "mjd": image.mjd,
        "status": image.status,
        "reason": image.reason,
        "noise_frac": image.noise_frac,
        "shift_px": np.hypot(image.shift_x_px, image.shift_y_px),
        "new_blobs": len(case.new),
        "found": int((cases["status"] == "found").sum()),
        "positive": int(positive.sum()),
        "false_alarms": int(false.sum()),
        **{f"{kind}_alarms": int((kinds == kind).sum()) for kind in ALARMS},
    }
    alarms = pd.DataFrame(origins[false], columns=["row", "col", "x0_px", "y0_px"])
    alarms[["x_px", "y_px"]] = answers.peaks[false]
    alarms = alarms.assign(frame=image.frame, score=expit(answers.odds[false]), kind=kinds)
    return Result(cases, pd.DataFrame([frame]), alarms)


def _match_blob(image: Any, blob: Any, answers: Answers, positive: Mask) -> dict[str, Any]:
    """Return the row of a new blob: what the network says of the subframe that holds its centre."""
    row = {
        "frame": image.frame,
        "blob": blob.blob,
        "x_px": blob.x_px,
        "y_px": blob.y_px,
        "radius_px": blob.radius_px,
        "depth_frac": blob.depth_frac,
        "shape": blob.shape,
        "snr": np.nan,
        "row": np.nan,
        "col": np.nan,
        "probability": np.nan,
        "saliency_px": np.nan,
        "status": "unusable",
    }
    if image.status != "ok":
        return {**row, "reason": f"{image.status}: {image.reason}"}

    # The pixel of the centre lies on one subframe
    origins = answers.origins
    offset = np.floor([blob.x_px + 0.5, blob.y_px + 0.5]) - origins[:, 2:]
    holds = np.flatnonzero(((offset >= 0) & (offset < tiles.SIDE)).all(axis=1))
    if not len(holds):
        return {**row, "reason": "its centre is outside the image"}
    i = holds[0]
    row["snr"] = blob_snr(blob, image.noise_frac)
    row["row"] = origins[i, 0]
    row["col"] = origins[i, 1]
    row["probability"] = expit(answers.odds[i])
    if positive[i]:
        x_peak, y_peak = answers.peaks[i]
        row["saliency_px"] = np.hypot(x_peak - blob.x_px, y_peak - blob.y_px)
    row["status"] = "found" if positive[i] else "missed"
    row["reason"] = ""
    return row


def blob_snr(blob: Any, noise_frac: float) -> float:
    """Return the matched-filter S/N of a catalogued blob; an unknown shape counts as a disc.

    Parameters
    ----------
    blob : named tuple
        A row of the catalogue.
    noise_frac : float
        Noise per pixel of the difference image (fraction of the light).
    """
    shape: blob_shapes.Shape = blob.shape if blob.shape in blob_shapes.SHAPES else "disc"
    size = max(41, 2 * int(np.ceil(1.8 * blob.radius_px)) + 1)
    x_offset = blob.x_px - round(blob.x_px)
    y_offset = blob.y_px - round(blob.y_px)
    radius = max(blob.radius_px, 0.5)
    profile = blob_shapes.blob_profile(shape, radius, x_offset, y_offset, size)
    return blob_shapes.matched_snr(profile * blob.depth_frac, noise_frac)


def reaches_into(blobs: pd.DataFrame, origins: Int64Array) -> Mask:
    """Return which blobs reach into which subframes: those at most their radius away.

    Parameters
    ----------
    blobs : DataFrame
        x_px, y_px, radius_px.
    origins : ndarray, shape (n, 4)
        From `tiles.origins`.

    Returns
    -------
    ndarray of bool, shape (n, number of blobs)
    """
    centre = blobs[["x_px", "y_px"]].to_numpy(float)
    radius = blobs["radius_px"].to_numpy(float)
    low = origins[:, None, 2:] - 0.5
    high = low + tiles.SIDE
    outside = np.maximum(np.maximum(low - centre, centre - high), 0)
    distance = np.hypot(outside[..., 0], outside[..., 1])
    return np.asarray(distance <= radius)


def _alarm_kinds(case: Case, places: FloatArray) -> FloatArray:
    """Classify false alarms by the blobs that lie at their places, shape (n,)."""
    shift = np.hypot(case.image.shift_x_px, case.image.shift_y_px)
    on_known = _lies_on(places, case.known, POINTING_MARGIN_PX + shift)
    on_recent = _lies_on(places, case.recent, POINTING_MARGIN_PX)
    dip = on_known & (shift > DIP_SHIFT_PX)
    return np.select([dip, on_recent], ["dip", "recent"], "artefact")


def _lies_on(points: FloatArray, blobs: pd.DataFrame, margin_px: float) -> Mask:
    """Return whether each point lies within the radius and a margin of some blob."""
    offset = points[:, None] - blobs[["x_px", "y_px"]].to_numpy(float)
    distance = np.hypot(offset[..., 0], offset[..., 1])
    on_blob = distance <= blobs["radius_px"].to_numpy(float) + margin_px
    return np.asarray(on_blob.any(axis=1))


def gather(results: list[Result]) -> Result:
    """Join the rows of all images; without images, the tables have columns but no rows."""
    if not results:
        return Result(
            pd.DataFrame({column: [] for column in CASE_COLUMNS}),
            pd.DataFrame({column: [] for column in FRAME_COLUMNS}),
            pd.DataFrame({column: [] for column in ALARM_COLUMNS}),
        )
    return Result(
        pd.concat([result.cases for result in results], ignore_index=True),
        pd.concat([result.frames for result in results], ignore_index=True),
        pd.concat([result.alarms for result in results], ignore_index=True),
    )


def summarise(result: Result) -> dict[str, Any]:
    """Summarise the report's network at its own threshold; ``None`` where nothing is counted."""
    usable = _usable(result.cases)
    images = result.frames[result.frames["status"] == "ok"]
    is_found = usable["status"] == "found"
    is_clear = usable["snr"] > CLEAR[0]
    n_blobs = len(usable)
    n_clear = int(is_clear.sum())
    n_found = int(is_found.sum())
    n_alarms = int(images["false_alarms"].sum())
    points_at_it = usable["saliency_px"] <= usable["radius_px"] + POINTING_MARGIN_PX
    low, high = metrics.wilson_interval(np.array(n_found), np.array(n_blobs))
    return {
        "n_cases": len(images),
        "n_blobs": n_blobs,
        "recall": _share(n_found, n_blobs),
        "recall_snr_gt_7": _share(int((is_found & is_clear).sum()), n_clear),
        "false_alarms_per_frame": _share(n_alarms, len(images)),
        "n_blobs_snr_gt_7": n_clear,
        "pointing_hit_rate": _share(int(points_at_it.sum()), n_found),
        "recall_interval": [round(float(low), 6), round(float(high), 6)] if n_blobs else None,
        "false_alarms": {kind: int(images[f"{kind}_alarms"].sum()) for kind in ALARMS},
        "n_unusable_frames": len(result.frames) - len(images),
        "n_unusable_blobs": len(result.cases) - n_blobs,
    }


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 6) if whole else None


def _usable(cases: pd.DataFrame) -> pd.DataFrame:
    return cases[cases["status"] != "unusable"]


def _found(cases: pd.DataFrame, detector: str, point: str) -> Mask:
    """Return which of the new blobs a detector finds at an operating point."""
    found = cases["status"] == "found" if point == "isr" else cases[f"found_{detector}"] == 1
    return found.to_numpy(bool)


def compare_detectors(result: Result, thresholds: dict[str, float]) -> pd.DataFrame:
    """Tabulate recall and false alarms of each detector at each of its operating points.

    Returns
    -------
    DataFrame
        detector, operating_point, threshold (of the score; a probability for the report's network), n_frames,
        false_alarms, false_alarms_per_100_frames; then for all new blobs, for those with S/N 5 to 7, and for those of 7 and
        more: n_blobs, found, recall and its Wilson interval.
    """
    usable = _usable(result.cases)
    snr = usable["snr"].to_numpy(float)
    n_frames = int((result.frames["status"] == "ok").sum())
    rows = []
    for detector, point in OPERATING_POINTS:
        threshold = thresholds["isr" if point == "isr" else detector]
        is_mine = result.alarms["detector"] == detector
        is_here = result.alarms["operating_point"] == point
        n_alarms = int((is_mine & is_here).sum())
        row = {
            "detector": detector,
            "operating_point": point,
            "threshold": expit(threshold) if detector == "report" else threshold,
            "n_frames": n_frames,
            "false_alarms": n_alarms,
            "false_alarms_per_100_frames": 100 * n_alarms / n_frames if n_frames else np.nan,
        }
        found = _found(usable, detector, point)
        for suffix, ends in SNR_RANGES.items():
            [share] = metrics.share_by_bin(snr, found, ends).itertuples()
            row[f"n_blobs{suffix}"] = share.n
            row[f"found{suffix}"] = share.successes
            row[f"recall{suffix}"] = share.share
            row[f"recall{suffix}_low"] = share.share_low
            row[f"recall{suffix}_high"] = share.share_high
        rows.append(row)
    return pd.DataFrame(rows)


def side_by_side(detectors: pd.DataFrame) -> dict[str, Any]:
    """Return the numbers of ``metrics.json`` that compare the detectors at the same budget of false alarms."""
    numbers: dict[str, Any] = {}
    for row in detectors[detectors["operating_point"] == "budget"].to_dict("records"):
        name = row["detector"]
        for key in ("threshold", "false_alarms_per_100_frames"):
            numbers[f"{name}_{key}"] = tables.number_or_none(row[key])
        for suffix in SNR_RANGES:
            low = tables.number_or_none(row[f"recall{suffix}_low"])
            high = tables.number_or_none(row[f"recall{suffix}_high"])
            counted = row[f"n_blobs{suffix}"] > 0
            numbers[f"{name}_recall{suffix}"] = tables.number_or_none(row[f"recall{suffix}"])
            numbers[f"{name}_recall{suffix}_interval"] = [low, high] if counted else None
    return numbers


def accuracy(cases: pd.DataFrame) -> dict[str, Any]:
    """Measure errors of place and depth of the blobs that the dense network finds; ``None`` if there are too few."""
    usable = _usable(cases)
    found = usable[usable["found_dense"] == 1]
    x_error = found["x_found_px"].to_numpy(float) - found["x_px"].to_numpy(float)
    y_error = found["y_found_px"].to_numpy(float) - found["y_px"].to_numpy(float)
    distance = np.hypot(x_error, y_error)
    depth = found["depth_frac"].to_numpy(float)
    depth_error = (found["depth_found_frac"] - found["depth_frac"]).to_numpy(float)

    # Errors over their own estimates; of a standard deviation of 1 if these are right
    pulls = depth_error / found["depth_err_frac"].to_numpy(float)
    pulls = pulls[np.isfinite(pulls)]

    numbers: dict[str, Any] = {
        "dense_position_error_px": None,
        "dense_depth_bias": None,
        "dense_depth_pull_sd": None,
    }
    if len(found):
        numbers["dense_position_error_px"] = tables.number_or_none(np.median(distance))
    if np.isfinite(depth_error).any():
        numbers["dense_depth_bias"] = tables.number_or_none(np.nanmedian(depth_error / depth))
    if len(pulls) > 1:
        numbers["dense_depth_pull_sd"] = tables.number_or_none(pulls.std(ddof=1))
    return numbers


def recall_by_bin(cases: pd.DataFrame) -> pd.DataFrame:
    """Tabulate recall of each detector by S/N, depth and radius, with Wilson intervals.

    Returns
    -------
    DataFrame
        detector, operating_point, quantity, low, high (of the bin; an open end is empty), n, found, recall, recall_low,
        recall_high.
    """
    usable = _usable(cases)
    parts = []
    for detector, point in OPERATING_POINTS:
        found = _found(usable, detector, point)
        for quantity, edges in BINS.items():
            share = metrics.share_by_bin(usable[quantity].to_numpy(float), found, edges)
            columns = {
                "detector": detector,
                "operating_point": point,
                "quantity": quantity,
                "low": share["low"],
                "high": share["high"],
                "n": share["n"],
                "found": share["successes"],
                "recall": share["share"],
                "recall_low": share["share_low"],
                "recall_high": share["share_high"],
            }
            parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def _draw(
    out_dir: Path,
    result: Result,
    detectors: pd.DataFrame,
    recall: pd.DataFrame,
    per_100_frames: float,
    shape: tuple[int, ...],
) -> None:
    """Draw the cases of the report's network and of the dense one, and recall of all three detectors."""
    usable = _usable(result.cases)
    for name, detector, point in (
        ("cases.png", "report", "isr"),
        ("dense_cases.png", "dense", "budget"),
    ):
        is_found = _found(usable, detector, point)
        blobs = usable.assign(status=np.where(is_found, "found", "missed"))
        mine = _at_point(recall, detector, point)
        alarms = _at_point(result.alarms, detector, point)
        curves.cases(out_dir / name, mine, blobs, alarms, detector, shape)

    budget = detectors[detectors["operating_point"] == "budget"].set_index("detector")
    notes = {
        str(name): f": {rate:.1f} per 100 measured on these images"
        for name, rate in budget["false_alarms_per_100_frames"].items()
    }
    by_snr = recall[(recall["operating_point"] == "budget") & (recall["quantity"] == "snr")]
    title = (
        "New blobs found, with thresholds set on other images\n"
        f"for {per_100_frames:g} false alarms per 100 images; with 95 % intervals"
    )
    curves.by_snr(out_dir / "detectors.png", by_snr, title, notes, share="recall")


def _at_point(table: pd.DataFrame, detector: str, point: str) -> pd.DataFrame:
    """Return the rows of a detector at an operating point."""
    return table[(table["detector"] == detector) & (table["operating_point"] == point)]


def _draw_gallery(
    path: Path, network: report_network.ReportNetwork, scale_dir: str | Path, result: Result, n: int
) -> None:
    """Draw found blobs from faint to strong, the misses of highest S/N, the most confident false alarms."""
    n_each = -(-n // 3)
    found = result.cases[result.cases["status"] == "found"].sort_values("snr", kind="stable")
    missed = result.cases[result.cases["status"] == "missed"].sort_values(
        "snr", ascending=False, kind="stable"
    )
    alarms = _at_point(result.alarms, "report", "isr").sort_values(
        "score", ascending=False, kind="stable"
    )
    evenly = np.linspace(0, max(len(found) - 1, 0), n_each).astype(int)
    spread = np.unique(evenly)[: len(found)]

    panels: dict[str, list[plotting.Panel]] = {"found": [], "missed": [], "false alarm": []}
    for name, rows in (("found", found.iloc[spread]), ("missed", missed[:n_each])):
        for blob in rows.itertuples():
            label = f"S/N {blob.snr:.0f}, p = {blob.probability:.2f}"
            panels[name].append(_panel(network, scale_dir, blob, label, result.cases))
    for alarm in alarms[:n_each].itertuples():
        label = f"{alarm.kind}, p = {alarm.score:.2f}"
        panels["false alarm"].append(_panel(network, scale_dir, alarm, label, result.cases))
    plotting.gallery(path, panels, f"{plotting.NAMES['report']}; circles: new blobs")


def _panel(
    network: report_network.ReportNetwork,
    scale_dir: str | Path,
    place: Any,
    label: str,
    cases: pd.DataFrame,
) -> plotting.Panel:
    """Make the panel of the subframe that holds a place, with the new blobs of its image."""
    scaled = fits_images.read_pixels(fits_images.find_image(scale_dir, place.frame))
    origins = tiles.origins(scaled.shape)
    [index] = np.flatnonzero((origins[:, :2] == (place.row, place.col)).all(axis=1))
    subframe = standardised_subframes(scaled)[index : index + 1]
    new = _usable(cases[cases["frame"] == place.frame])
    x0, y0 = origins[index, 2:]
    circles = new[["x_px", "y_px", "radius_px"]].to_numpy(float) - [x0, y0, 0]
    title = f"{place.frame} row {place.row} col {place.col}\n{label}"
    return plotting.Panel(title, subframe[0], saliency.saliency_maps(network, subframe)[0], circles)


def failed_thresholds(metrics: dict[str, Any], params: Regression) -> list[str]:
    """List the thresholds that ``metrics.json`` does not meet; a missing number fails.

    Parameters
    ----------
    metrics : dict
        From `summarise` and `side_by_side`.
    params : Regression
    """
    lowest = {
        "n_cases": params.min_cases,
        "recall": params.min_recall,
        "recall_snr_gt_7": params.min_recall_snr_gt_7,
        "dense_recall_snr_gt_7": params.min_dense_recall_snr_gt_7,
    }
    highest = {
        "false_alarms_per_frame": params.max_false_alarms_per_frame,
        "dense_false_alarms_per_100_frames": params.max_dense_false_alarms_per_100_frames,
    }
    failed = []
    for key in (
        "n_cases",
        "recall",
        "recall_snr_gt_7",
        "false_alarms_per_frame",
        "dense_recall_snr_gt_7",
        "dense_false_alarms_per_100_frames",
    ):
        value = metrics.get(key)
        low = lowest.get(key, -np.inf)
        high = highest.get(key, np.inf)
        if not (isinstance(value, int | float) and low <= value <= high):
            found = "none" if value is None else value
            expected = f"at least {low}" if key in lowest else f"at most {high}"
            failed.append(f"{key}{_whose(key)}: found {found}, expected {expected}")
    return failed


def _whose(key: str) -> str:
    """Name the network that a metric is of; nothing for a count of cases."""
    if key == "n_cases":
        return ""
    return f" ({plotting.NAMES['dense' if key.startswith('dense_') else 'report']})"
