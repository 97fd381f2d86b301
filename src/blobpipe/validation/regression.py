"""Search the historical images and compare with the catalogue (stage ``regression``, ISR 7)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import expit

from blobpipe.core import blob_shapes, files, fits_images, metrics, plotting, tables
from blobpipe.core.arrays import FloatArray
from blobpipe.detection import matched_filter
from blobpipe.detection.detect import CANDIDATE_COLUMNS
from blobpipe.detection.detectors import (
    DETECTORS,
    MatchedFilter,
    ReportDetector,
    load_dense_detector,
    standardised_subframes,
)
from blobpipe.detection.match import near_blobs
from blobpipe.detection.operating_point import logit
from blobpipe.detection.search import CLEAR, FAINT
from blobpipe.detection.thresholds import baseline_thresholds
from blobpipe.images import tiles
from blobpipe.networks import kernels, model_file, report_network, saliency
from blobpipe.params import Regression
from blobpipe.validation import curves
from blobpipe.validation.evaluate import DIP_SHIFT_PX, POINTING_MARGIN_PX, THREADS

CLEAR_SNR = 7.0  # a new blob above this must not be missed
BINS = {
    "snr": (0.0, 5.0, 7.0, 10.0, 15.0, 25.0, np.inf),
    "depth_frac": (0.0, 0.01, 0.015, 0.02, 0.03, 0.05, np.inf),
    "radius_px": (0.0, 4.0, 5.0, 6.0, 7.0, 8.0, np.inf),
}
BANDS = {"": (0.0, np.inf), "_snr_5_to_7": FAINT, "_snr_gt_7": CLEAR}
ALARMS = ("dip", "recent", "artefact")
OPERATING_POINTS = (("report", "isr"), *((name, "budget") for name in DETECTORS))
MEASURED = {  # of the dense network's candidate: column of cases.csv, and of candidates.csv
    **{"dense_score": "score", "dense_probability": "probability", "dense_status": "status"},
    **{"x_found_px": "x_px", "y_found_px": "y_px", "radius_found_px": "radius_px"},
    **{"depth_found_frac": "depth_frac", "depth_err_frac": "depth_err_frac"},
}
CASE_COLUMNS = (
    *("frame", "blob", "x_px", "y_px", "radius_px", "depth_frac", "shape", "snr", "row", "col"),
    *("probability", "saliency_px", "status", "reason"),
    *(f"found_{name}" for name in DETECTORS),
    *(*MEASURED, "matched_filter_snr"),
)
FRAME_COLUMNS = (
    *(
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
    ),
    *(f"{kind}_alarms" for kind in ALARMS),
    *(f"false_alarms_{name}" for name in DETECTORS),
)
ALARM_COLUMNS = (
    *(
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
    ),
)


class Case(NamedTuple):
    """A historical image: its row of the difference stage, its new blobs, the known and the recent ones."""

    image: Any
    new: pd.DataFrame
    known: pd.DataFrame
    recent: pd.DataFrame


class Answers(NamedTuple):
    """Answers of the baselines for the ``n`` subframes of an image (none of an unusable one).

    Attributes
    ----------
    origins : ndarray, shape (n, 4), int64
        Row, column, x0, y0, from `tiles.origins`.
    odds : ndarray, shape (n,), float64
        Log-odds of the report's network.
    match : Match
        Of the matched filter, each array of shape (n,); x, y in the image (px).
    peaks : ndarray, shape (n, 2), float64
        x, y of the saliency's peak in the image (px); NaN where neither operating point calls the
        subframe positive.
    """

    origins: npt.NDArray[np.int64]
    odds: FloatArray
    match: matched_filter.Match
    peaks: FloatArray


class Result(NamedTuple):
    """Rows of ``cases.csv`` and ``frames.csv``, and one row per false alarm."""

    cases: pd.DataFrame
    frames: pd.DataFrame
    alarms: pd.DataFrame


def regress(
    folders: tuple[str | Path, str | Path, str | Path, str | Path],
    detect_dir: str | Path,
    model_path: str | Path,
    out_dir: str | Path,
    params: Regression,
    *,
    radii_px: tuple[float, ...],
    per_100_frames: float,
) -> None:
    """Search every historical image with all three detectors and compare with the catalogue (stage ``regression``).

    A historical image is one that ``blobs.csv`` names as some blob's ``first_frame``.

    For the report's network, a new blob is found if the subframe that holds its centre is positive, and a positive
    subframe that no new blob reaches into is a false alarm. The dense network and the matched filter must say where: a
    new blob is found if one of their places lies within 6 px of its centre, or within its radius, and any other
    place is a false alarm. A false alarm is put down to what it lies on (for the report's network, the peak of
    its saliency map): a ``dip`` (a known blob while the measured shift is above 0.3 px), else a ``recent`` blob (landed
    within the stack that was subtracted, so not new but perhaps still to be seen), else an ``artefact``.

    Each detector has the threshold that gives the same rate of false alarms on held-out images (operating point
    ``budget``); the report's network also that of the report (``isr``).

    Parameters
    ----------
    folders : (path, path, path, path)
        Of the images, and of the stages difference, scale and cutout.
    detect_dir : path
        What the stage detect has made: candidates and operating point of the dense network.
    model_path : path
        The report's network.
    out_dir : path
        ``metrics.json``, ``cases.csv`` (a row per new blob), ``frames.csv`` (a row per historical image), ``alarms.csv``
        (a row per false alarm), ``detectors.csv`` (a row per operating point), ``recall.csv`` (by S/N, depth and radius),
        ``cases.png`` (the report's network), ``dense_cases.png``, ``detectors.png``, ``gallery.png``.
    params : Regression
    radii_px : tuple of float
        Of the matched filter.
    per_100_frames : float
        False alarms accepted on 100 images (count).

    Raises
    ------
    ModelError, TableError, FrameError
        If a model or a file of the stages before is missing or damaged. Images that a stage has rejected
        are no error: their blobs are listed as ``unusable``.

    Notes
    -----
    Source: ISR section 7; all but the report's network and its threshold is ours.
    """
    out_dir = Path(out_dir)
    (raw_dir, difference_dir, scale_dir, _) = folders
    report = ReportDetector(model_file.load_model(model_path)[0])
    filters = MatchedFilter(radii_px)
    dense_path = Path(detect_dir) / "model.safetensors"
    detector = load_dense_detector(dense_path)
    candidates = tables.read_table(Path(detect_dir) / "candidates.csv", CANDIDATE_COLUMNS)
    kernels.set_threads(1)  # images share the cores
    images = tables.image_table(raw_dir, difference_dir, scale_dir)
    blobs = tables.read_blobs(raw_dir)
    usable = images.query("status == 'ok'").reset_index(drop=True)
    levels = baseline_thresholds(
        report,
        filters,
        usable,
        blobs,
        folders[1:],
        per_100_frames=per_100_frames,
        threads=THREADS,
    )
    thresholds = {
        "isr": logit(np.array(params.threshold)).item(),
        "dense": detector.threshold,
        **levels,
    }
    report = replace(report, threshold=min(thresholds["isr"], thresholds["report"]))
    cases = historical_cases(images, blobs)
    with ThreadPoolExecutor(THREADS) as pool:
        answers = list(pool.map(lambda case: classify(report, filters, scale_dir, case), cases))
    by_frame = dict(tuple(candidates.groupby("frame")))
    found = [by_frame.get(case.image.frame, candidates[:0]) for case in cases]
    result = gather(
        [compare(*each, thresholds) for each in zip(cases, answers, found, strict=True)]
    )
    detectors = compare_detectors(result, thresholds)
    recall = recall_by_bin(result.cases)
    metrics = {**summarise(result), **side_by_side(detectors), **accuracy(result.cases)}
    metrics["passed"] = not failed_thresholds(metrics, params)
    # so that nobody takes this for another model's
    metrics["dense_sha256"] = files.sha256(dense_path)
    names = ("cases", "frames", "alarms", "detectors", "recall")
    for name, table in zip(names, (*result, detectors, recall), strict=True):
        tables.write_table(out_dir / f"{name}.csv", table)
    _draw(out_dir, result, detectors, recall)
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
    order = {frame: i for i, frame in enumerate(images["frame"])}
    landed = blobs["first_frame"].map(order).fillna(-1)
    cases = []
    stacked = images["n_stack"].fillna(0).to_numpy(int)
    for i, image in enumerate(images.itertuples()):
        if (landed == i).any():
            recent = (landed < i) & (landed >= max(i - stacked[i], 0))
            cases.append(Case(image, blobs[landed == i], blobs[landed < i], blobs[recent]))
    return cases


def classify(
    report: ReportDetector, filters: MatchedFilter, scale_dir: str | Path, case: Case
) -> Answers:
    """Ask the baselines about a historical image, and where the report's network looks."""
    if case.image.status != "ok":
        subframes = np.zeros((0, tiles.SIDE, tiles.SIDE), np.float32)
        nothing = matched_filter.filter_subframes(subframes, filters.radii_px)
        return Answers(np.zeros((0, 4), np.int64), np.zeros(0), nothing, np.zeros((0, 2)))
    scaled = fits_images.read_frame(fits_images.find_image(scale_dir, case.image.frame)).data
    odds = report.answer(scaled)
    peaks = report.point_at(scaled, odds >= report.threshold)
    return Answers(tiles.origins(scaled.shape), odds, filters.respond(scaled), peaks)


def compare(
    case: Case, answers: Answers, candidates: pd.DataFrame, thresholds: dict[str, float]
) -> Result:
    """Compare what the detectors see in one image with the catalogue, at all operating points.

    Parameters
    ----------
    candidates : DataFrame
        Of this image, by the stage detect.
    thresholds : dict of float
        ``isr`` and ``report`` (log-odds), ``dense`` (score), ``matched_filter`` (S/N).
    """
    odds = answers.odds
    match = answers.match
    isr, report = (judge(case, answers, odds >= thresholds[name]) for name in ("isr", "report"))
    claims = pd.DataFrame({"x_px": match.x, "y_px": match.y, "score": match.snr}).assign(
        status="new"
    )
    best, false = judge_places(case, candidates, thresholds["dense"])
    strongest, false_matches = judge_places(case, claims, thresholds["matched_filter"])
    cases = isr.cases.assign(
        found_dense=best["found"],
        found_report=(report.cases["status"] == "found").astype(int),
        found_matched_filter=strongest["found"],
        matched_filter_snr=strongest["score"],
        **{name: best[column] for name, column in MEASURED.items()},
    )
    alarms = {
        ("report", "isr"): isr.alarms,
        ("dense", "budget"): _place_alarms(case, false),
        ("report", "budget"): report.alarms,
        ("matched_filter", "budget"): _place_alarms(case, false_matches),
    }
    counts = {f"false_alarms_{name}": len(alarms[name, "budget"]) for name in DETECTORS}
    named = [
        alarms[point].assign(detector=point[0], operating_point=point[1])
        for point in OPERATING_POINTS
    ]
    return Result(
        cases[list(CASE_COLUMNS)],
        isr.frames.assign(**counts)[list(FRAME_COLUMNS)],
        pd.concat(named, ignore_index=True)[list(ALARM_COLUMNS)],
    )


def judge_places(
    case: Case, claims: pd.DataFrame, threshold: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Find which new blobs the claims of a detector name, and which claims name none.

    Parameters
    ----------
    claims : DataFrame
        x_px, y_px, score, status: places in this image, however low their score; only those with the status ``new`` count.
    threshold : float
        Score from which a place is named.

    Returns
    -------
    best : DataFrame
        One row per new blob: the best of the claims near it, and ``found``, 0 or 1; without one, no values.
    false : DataFrame
        The rows of ``claims`` that are named, and near no new blob.
    """
    named = ((claims["status"] == "new") & (claims["score"] >= threshold)).to_numpy(bool)
    near = near_blobs(claims, case.new)
    ranked = np.lexsort((claims["score"], named))
    rows: list[dict[Any, Any]] = []
    for is_near in near.T:
        last = [i for i in ranked if is_near[i]][-1:]
        rows += claims.iloc[last].assign(found=int(named[last].any())).to_dict("records") or [
            {"found": 0, "status": ""}
        ]
    best = pd.DataFrame(rows, columns=[*claims.columns, "found"])
    return best, claims[named & ~near.any(axis=1)]


def _place_alarms(case: Case, false: pd.DataFrame) -> pd.DataFrame:
    """Turn places that are false alarms into rows of ``alarms.csv``."""
    places = false[["x_px", "y_px"]].to_numpy(float)
    col, row = np.floor((places + 0.5) / tiles.SIDE).astype(np.int64).T
    alarms = false[["score", "x_px", "y_px"]].assign(frame=case.image.frame, row=row, col=col)
    return alarms.assign(
        x0_px=col * tiles.SIDE, y0_px=row * tiles.SIDE, kind=_alarm_kinds(case, places)
    )


def judge(case: Case, answers: Answers, positive: npt.NDArray[np.bool_]) -> Result:
    """Compare with the catalogue what the report's network says, where these subframes count as positive."""
    image = case.image
    origins = answers.origins
    cases = pd.DataFrame(
        [_judge_blob(image, blob, answers, positive) for blob in case.new.itertuples()]
    )
    false = positive & ~reaches_into(case.new, origins).any(axis=1)
    kinds = _alarm_kinds(case, answers.peaks[false])
    row = {
        **{key: getattr(image, key) for key in ("frame", "mjd", "status", "reason", "noise_frac")},
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
    return Result(cases, pd.DataFrame([row]), alarms)


def _judge_blob(
    image: Any, blob: Any, answers: Answers, positive: npt.NDArray[np.bool_]
) -> dict[str, Any]:
    known = {
        key: getattr(blob, key)
        for key in ("blob", "x_px", "y_px", "radius_px", "depth_frac", "shape")
    }
    nothing = dict.fromkeys(("snr", "row", "col", "probability", "saliency_px"), np.nan)
    row = {"frame": image.frame, **known, **nothing, "status": "unusable"}
    if image.status != "ok":
        return {**row, "reason": f"{image.status}: {image.reason}"}
    origins = answers.origins
    offset = np.floor([blob.x_px + 0.5, blob.y_px + 0.5]) - origins[:, 2:]
    holds = np.flatnonzero(((offset >= 0) & (offset < tiles.SIDE)).all(axis=1))
    if not len(holds):
        return {**row, "reason": "its centre is outside the image"}
    i = holds[0]
    found = {
        "snr": blob_snr(blob, image.noise_frac),
        "row": origins[i, 0],
        "col": origins[i, 1],
        "probability": expit(answers.odds[i]),
        "saliency_px": np.hypot(*(answers.peaks[i] - (blob.x_px, blob.y_px)))
        if positive[i]
        else np.nan,
    }
    return {**row, **found, "status": "found" if positive[i] else "missed", "reason": ""}


def blob_snr(blob: Any, noise_frac: float) -> float:
    """Return the matched-filter S/N of a catalogued blob; an unknown shape counts as a disc.

    Parameters
    ----------
    blob : row of the catalogue
    noise_frac : float
        Noise per pixel of the difference image (fraction of the light).
    """
    shape: blob_shapes.Shape = blob.shape if blob.shape in blob_shapes.SHAPES else "disc"
    size = max(41, 2 * int(np.ceil(1.8 * blob.radius_px)) + 1)
    offset = (blob.x_px - round(blob.x_px), blob.y_px - round(blob.y_px))
    profile = blob_shapes.blob_profile(shape, max(blob.radius_px, 0.5), *offset, size)
    return blob_shapes.matched_snr(profile * blob.depth_frac, noise_frac)


def reaches_into(blobs: pd.DataFrame, origins: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Say which blobs reach into which subframes: centre to subframe at most the radius.

    Parameters
    ----------
    blobs : DataFrame
        x_px, y_px, radius_px.
    origins : ndarray, shape (n, 4)

    Returns
    -------
    ndarray of bool, shape (n, number of blobs)
    """
    centre = blobs[["x_px", "y_px"]].to_numpy(float)
    low = origins[:, None, 2:] - 0.5
    outside = np.maximum(np.maximum(low - centre, centre - (low + tiles.SIDE)), 0)
    return np.asarray(
        np.hypot(outside[..., 0], outside[..., 1]) <= blobs["radius_px"].to_numpy(float)
    )


def _alarm_kinds(case: Case, peaks: FloatArray) -> npt.NDArray[np.str_]:
    shift = np.hypot(case.image.shift_x_px, case.image.shift_y_px)
    dip = _lies_on(peaks, case.known, POINTING_MARGIN_PX + shift) & (shift > DIP_SHIFT_PX)
    return np.select([dip, _lies_on(peaks, case.recent, POINTING_MARGIN_PX)], ALARMS[:2], ALARMS[2])


def _lies_on(points: FloatArray, blobs: pd.DataFrame, margin: float) -> npt.NDArray[np.bool_]:
    offset = points[:, None] - blobs[["x_px", "y_px"]].to_numpy(float)
    on_blob = (
        np.hypot(offset[..., 0], offset[..., 1]) <= blobs["radius_px"].to_numpy(float) + margin
    )
    return np.asarray(on_blob.any(axis=1))


def gather(results: list[Result]) -> Result:
    """Join the rows of all images; without images, tables without rows but with their columns."""
    columns = (CASE_COLUMNS, FRAME_COLUMNS, ALARM_COLUMNS)
    empty = Result(*(pd.DataFrame({column: [] for column in names}) for names in columns))
    if not results:
        return empty
    return Result(*(pd.concat(tables, ignore_index=True) for tables in zip(*results, strict=True)))


def summarise(result: Result) -> dict[str, Any]:
    """Summarise the report's network at its own threshold; ``None`` where nothing counts."""
    usable = _usable(result.cases)
    images = result.frames[result.frames["status"] == "ok"]
    clear = usable[usable["snr"] > CLEAR_SNR]
    n_found = int((usable["status"] == "found").sum())
    pointed = usable["saliency_px"] <= usable["radius_px"] + POINTING_MARGIN_PX
    low, high = metrics.wilson_interval(np.array(n_found), np.array(len(usable)))
    return {
        "n_cases": len(images),
        "n_blobs": len(usable),
        "recall": _share(n_found, len(usable)),
        "recall_snr_gt_7": _share(int((clear["status"] == "found").sum()), len(clear)),
        "false_alarms_per_frame": _share(int(images["false_alarms"].sum()), len(images)),
        "n_blobs_snr_gt_7": len(clear),
        "pointing_hit_rate": _share(int(pointed.sum()), n_found),
        "recall_interval": [round(float(low), 6), round(float(high), 6)] if len(usable) else None,
        "false_alarms": {kind: int(images[f"{kind}_alarms"].sum()) for kind in ALARMS},
        "n_unusable_frames": len(result.frames) - len(images),
        "n_unusable_blobs": len(result.cases) - len(usable),
    }


def _usable(cases: pd.DataFrame) -> pd.DataFrame:
    return cases[cases["status"] != "unusable"]


def _found(cases: pd.DataFrame, detector: str, point: str) -> npt.NDArray[np.bool_]:
    """Return which of the new blobs a detector finds at an operating point."""
    found = cases["status"] == "found" if point == "isr" else cases[f"found_{detector}"] == 1
    return found.to_numpy(bool)


def compare_detectors(result: Result, thresholds: dict[str, float]) -> pd.DataFrame:
    """Tabulate recall and false alarms of each detector at each of its operating points.

    Returns
    -------
    DataFrame
        detector, operating_point, threshold (of the score; a probability for the report's network), n_frames,
        false_alarms, false_alarms_per_100_frames; then of all new blobs, and of those with S/N 5 to 7 and of 7 and
        more: n_blobs, found, recall and its Wilson interval.
    """
    usable = _usable(result.cases)
    n_frames = int((result.frames["status"] == "ok").sum())
    snr = usable["snr"].to_numpy(float)
    rows = []
    for detector, point in OPERATING_POINTS:
        threshold = thresholds["isr" if point == "isr" else detector]
        mine = (result.alarms["detector"] == detector) & (result.alarms["operating_point"] == point)
        row = {
            "detector": detector,
            "operating_point": point,
            "threshold": expit(threshold) if detector == "report" else threshold,
            "n_frames": n_frames,
            "false_alarms": int(mine.sum()),
            "false_alarms_per_100_frames": 100 * mine.sum() / n_frames if n_frames else np.nan,
        }
        for band, ends in BANDS.items():
            table = metrics.share_by_bin(snr, _found(usable, detector, point), ends).iloc[0]
            names = (
                f"n_blobs{band}",
                f"found{band}",
                *(f"recall{band}{end}" for end in ("", "_low", "_high")),
            )
            row |= {name: table[column] for name, column in zip(names, _OF_BIN, strict=True)}
        rows.append(row)
    return pd.DataFrame(rows)


_OF_BIN = ("n", "successes", "share", "share_low", "share_high")


def side_by_side(detectors: pd.DataFrame) -> dict[str, Any]:
    """Return the numbers of ``metrics.json``: all detectors at the same budget of false alarms."""
    metrics: dict[str, Any] = {}
    for row in detectors[detectors["operating_point"] == "budget"].to_dict("records"):
        name = row["detector"]
        for key in ("threshold", "false_alarms_per_100_frames"):
            metrics[f"{name}_{key}"] = _plain(row[key])
        for band in BANDS:
            metrics[f"{name}_recall{band}"] = _plain(row[f"recall{band}"])
            interval = [_plain(row[f"recall{band}_{end}"]) for end in ("low", "high")]
            metrics[f"{name}_recall{band}_interval"] = interval if row[f"n_blobs{band}"] else None
    return metrics


def accuracy(cases: pd.DataFrame) -> dict[str, Any]:
    """Measure how well the dense network measures the blobs that it finds."""
    usable = _usable(cases)
    found = usable[usable["found_dense"] == 1]
    error = np.hypot(
        *(
            found[f"{axis}_found_px"].to_numpy(float) - found[f"{axis}_px"].to_numpy(float)
            for axis in "xy"
        )
    )
    depth = found["depth_frac"].to_numpy(float)
    excess = (found["depth_found_frac"] - found["depth_frac"]).to_numpy(float)
    pulls = excess / found["depth_err_frac"].to_numpy(float)
    pulls = pulls[np.isfinite(pulls)]
    return {
        "dense_position_error_px": _plain(np.median(error)) if len(found) else None,
        "dense_depth_bias": _plain(np.nanmedian(excess / depth))
        if np.isfinite(excess).any()
        else None,
        "dense_depth_pull_sd": _plain(pulls.std(ddof=1)) if len(pulls) > 1 else None,
    }


def _plain(value: float) -> float | None:
    """Round to six decimals; None for NaN, which JSON does not know."""
    return round(float(value), 6) if np.isfinite(value) else None


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 6) if whole else None


def recall_by_bin(cases: pd.DataFrame) -> pd.DataFrame:
    """Tabulate recall of each detector by S/N, depth and radius, with Wilson intervals.

    Returns
    -------
    DataFrame
        detector, operating_point, quantity, low, high (of the bin; an open end is empty), n, found, recall, recall_low,
        recall_high.
    """
    usable = _usable(cases)
    tables = []
    for detector, point in OPERATING_POINTS:
        found = _found(usable, detector, point)
        for quantity, edges in BINS.items():
            table = metrics.share_by_bin(usable[quantity].to_numpy(float), found, edges)
            for i, (name, value) in enumerate(zip(_OF, (detector, point, quantity), strict=True)):
                table.insert(i, name, value)
            tables.append(table)
    return pd.concat(tables, ignore_index=True).rename(columns=_AS_RECALL)


_OF = ("detector", "operating_point", "quantity")
_AS_RECALL = {
    "successes": "found",
    "share": "recall",
    "share_low": "recall_low",
    "share_high": "recall_high",
}


def _draw(out_dir: Path, result: Result, detectors: pd.DataFrame, recall: pd.DataFrame) -> None:
    """Draw what the detectors found, missed and imagined, and all three side by side."""
    for path, detector, point in (
        ("cases.png", "report", "isr"),
        ("dense_cases.png", "dense", "budget"),
    ):
        mine, alarms = (
            table[(table["detector"] == detector) & (table["operating_point"] == point)]
            for table in (recall, result.alarms)
        )
        usable = _usable(result.cases)
        status = np.where(_found(usable, detector, point), "found", "missed")
        curves.cases(out_dir / path, mine, usable.assign(status=status), alarms)
    rate = detectors[detectors["operating_point"] == "budget"].set_index("detector")[
        "false_alarms_per_100_frames"
    ]
    notes = {str(name): f": {value:.1f} false alarms on 100 images" for name, value in rate.items()}
    mine = recall[(recall["operating_point"] == "budget") & (recall["quantity"] == "snr")]
    shares = mine.rename(columns={new: old for old, new in _AS_RECALL.items()})
    curves.by_snr(
        out_dir / "detectors.png", shares, "New blobs, at the same budget of false alarms", notes
    )


def _draw_gallery(
    path: Path, network: report_network.ReportNetwork, scale_dir: str | Path, result: Result, n: int
) -> None:
    """Draw found blobs from faint to strong, the clearest misses, the surest false alarms."""
    n_each = -(-n // 3)
    found = result.cases[result.cases["status"] == "found"].sort_values("snr", kind="stable")
    missed = result.cases[result.cases["status"] == "missed"].sort_values(
        "snr", ascending=False, kind="stable"
    )
    alarms = result.alarms[result.alarms["operating_point"] == "isr"].rename(
        columns={"score": "probability"}
    )
    alarms = alarms.sort_values("probability", ascending=False, kind="stable")
    spread = np.unique(np.linspace(0, max(len(found) - 1, 0), n_each).astype(int))[: len(found)]
    rows = {"found": found.iloc[spread], "missed": missed[:n_each], "false alarm": alarms[:n_each]}
    panels = {
        name: [_panel(network, scale_dir, row, result.cases) for row in table.itertuples()]
        for name, table in rows.items()
    }
    plotting.gallery(path, panels, "circles: new blobs; contours: saliency")


def _panel(
    network: report_network.ReportNetwork, scale_dir: str | Path, row: Any, cases: pd.DataFrame
) -> plotting.Panel:
    scaled = fits_images.read_frame(fits_images.find_image(scale_dir, row.frame)).data
    subframes = standardised_subframes(scaled)
    origins = tiles.origins(scaled.shape)
    [index] = np.flatnonzero((origins[:, :2] == (row.row, row.col)).all(axis=1))
    subframe = subframes[index : index + 1]
    new = cases[(cases["frame"] == row.frame) & (cases["status"] != "unusable")]
    circles = new[["x_px", "y_px", "radius_px"]].to_numpy(float) - [*origins[index, 2:], 0]
    what = f"S/N {row.snr:.0f}" if hasattr(row, "snr") else row.kind
    title = f"{row.frame} row {row.row} col {row.col}\n{what}, p = {row.probability:.2f}"
    return plotting.Panel(title, subframe[0], saliency.saliency_maps(network, subframe)[0], circles)


def failed_thresholds(metrics: dict[str, Any], params: Regression) -> list[str]:
    """List the thresholds that ``metrics.json`` does not keep; a missing number fails.

    Parameters
    ----------
    metrics : dict
        From `summarise`.
    params : Regression
    """
    failed = []
    for key, bound, limit in (
        ("n_cases", "at least", params.min_cases),
        ("recall", "at least", params.min_recall),
        ("recall_snr_gt_7", "at least", params.min_recall_snr_gt_7),
        ("false_alarms_per_frame", "at most", params.max_false_alarms_per_frame),
        ("dense_recall_snr_gt_7", "at least", params.min_dense_recall_snr_gt_7),
        (
            "dense_false_alarms_per_100_frames",
            "at most",
            params.max_dense_false_alarms_per_100_frames,
        ),
    ):
        value = metrics.get(key)
        kept = isinstance(value, int | float) and (
            value >= limit if bound == "at least" else value <= limit
        )
        if not kept:
            failed.append(
                f"{key}: found {'none' if value is None else value}, expected {bound} {limit}"
            )
    return failed
