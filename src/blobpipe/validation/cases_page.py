"""Write a page of every historical case: its pixels, and why each detector found it or not."""

from __future__ import annotations

from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image

from blobpipe.core import files, fits_images, tables
from blobpipe.core.arrays import FloatArray
from blobpipe.core.plotting import NAMES
from blobpipe.detection.detect import CANDIDATE_COLUMNS
from blobpipe.detection.detectors import standardised_subframes
from blobpipe.detection.match import NEAR_PX
from blobpipe.images import tiles
from blobpipe.networks import dense, kernels, model_file, report_network, saliency
from blobpipe.validation import regression
from blobpipe.validation.evaluate import THREADS

SIDE_PX = 96  # of a cut-out: a blob, and enough around it to see what it lies on
GREYS = 32  # enough for the eye, and noise compresses badly
NOISE_SIGMA = 4.0  # the difference is shown to so many sigma either way
# the stack from black to white: known blobs lose up to a tenth of the light
STACK_FRAC = (-0.03, 0.09)
SALIENCY_PX = 4  # the map is smoothed by as much: one pixel of the picture
GROUPS = {
    "missed": "New blobs that the dense network misses",
    "false": "False alarms of the dense network",
    "report": "New blobs that it finds and the report's network misses",
    "others": "False alarms of the report's network and of the matched filter",
    "found": "New blobs that both networks find",
}
VETOES = {
    "known": "a catalogued blob lies there",
    "dip": "a shifted blob explains it",
    "bad_pixels": "a few pixels or hard edges carry the signal, or the stack's images flicker there",
}
KINDS = {
    "dip": "a known blob that has moved lies there",
    "recent": "a blob lies there that landed within the stack that was subtracted",
    "artefact": "the catalogue has nothing there",
}


class Case(NamedTuple):
    """One case: where to look, and what to say."""

    group: str
    frame: str
    title: str
    facts: str
    reasons: dict[str, str]
    x_px: float
    y_px: float
    radius_px: float


class View(NamedTuple):
    """A cut-out as a grey picture, shape (ny, nx), uint8, first row at the bottom, and what it shows."""

    name: str
    pixels: npt.NDArray[np.uint8]


def write_cases(
    difference_dir: str | Path,
    scale_dir: str | Path,
    detect_dir: str | Path,
    model_path: str | Path,
    out_dir: str | Path,
) -> None:
    """Write ``cases.html``: one file that needs no other, no network and no script.

    Parameters
    ----------
    difference_dir, scale_dir, detect_dir : path
        What the stages before have made.
    model_path : path
        The report's network.
    out_dir : path
        Of the stage regression, with the tables that `regression.regress` has written.
    """
    out_dir = Path(out_dir)
    detect_dir = Path(detect_dir)
    results = {
        name: tables.read_table(out_dir / f"{name}.csv", columns)
        for name, columns in TABLES.items()
    }
    candidates = tables.read_table(detect_dir / "candidates.csv", CANDIDATE_COLUMNS)
    cases = collect(results, candidates)
    network, _ = model_file.load_model(model_path)
    dense_network, _ = model_file.load_dense(detect_dir / "model.safetensors")
    kernels.set_threads(1)  # images share the cores
    stack = fits_images.read_plane(Path(difference_dir) / "reference.fits.fz", "STACK")
    noise = results["frames"].set_index("frame")["noise_frac"]

    def views_of(frame: str) -> list[list[View]]:
        data, scaled = (
            fits_images.read_frame(fits_images.find_image(folder, frame)).data
            for folder in (difference_dir, scale_dir)
        )
        places = [case for case in cases if case.frame == frame]
        cells = dense.probability_map(dense_network, scaled)
        maps = saliency_of(network, scaled, places)
        return [
            [
                View(
                    "difference image",
                    cut_out(data, case, 1, -NOISE_SIGMA * noise[frame], NOISE_SIGMA * noise[frame]),
                ),
                View("median stack", cut_out(stack, case, 1, *STACK_FRAC)),
                View(
                    "probability map of the dense network",
                    cut_out(cells, case, dense.STRIDE, 0.0, 1.0),
                ),
                View(
                    "saliency map of the report's network",
                    cut_out(saliency, case, SALIENCY_PX, 0.0, 1.0),
                ),
            ]
            for case, saliency in zip(places, maps, strict=True)
        ]

    names = list(dict.fromkeys(case.frame for case in cases))
    with ThreadPoolExecutor(THREADS) as pool:
        views = {
            name: iter(found) for name, found in zip(names, pool.map(views_of, names), strict=True)
        }
    with files.atomic(out_dir / "cases.html") as temporary:
        temporary.write_text(
            page([(case, next(views[case.frame])) for case in cases]), encoding="utf-8"
        )


TABLES = {
    "cases": regression.CASE_COLUMNS,
    "frames": regression.FRAME_COLUMNS,
    "alarms": regression.ALARM_COLUMNS,
    "detectors": ("detector", "operating_point", "threshold"),
}


# ---------------------------------------------------------------------------------------------------- what is said


def collect(tables: dict[str, pd.DataFrame], candidates: pd.DataFrame) -> list[Case]:
    """Collect all new blobs and all false alarms, those first that the dense network gets wrong.

    Parameters
    ----------
    tables : dict of DataFrame
        ``cases``, ``frames``, ``alarms`` and ``detectors`` of the stage regression.
    candidates : DataFrame
        ``candidates.csv`` of the stage detect.
    """
    points = zip(*(tables["detectors"][column] for column in TABLES["detectors"]), strict=True)
    thresholds = {(detector, point): float(level) for detector, point, level in points}
    images = {row["frame"]: row for row in tables["frames"].to_dict("records")}
    usable = tables["cases"][tables["cases"]["status"] != "unusable"]
    cases = [
        _of_blob(blob, images[blob["frame"]], thresholds) for blob in usable.to_dict("records")
    ]
    by_frame = dict(tuple(candidates.groupby("frame")))
    alarms = tables["alarms"].groupby(
        ["detector", "frame", "x_px", "y_px"], sort=False, as_index=False
    )
    for alarm in alarms.agg({"operating_point": tuple, "score": "first", "kind": "first"}).to_dict(
        "records"
    ):
        there = by_frame.get(alarm["frame"], candidates[:0])
        cases.append(_of_alarm(alarm, images[alarm["frame"]], there, thresholds))
    return sorted(cases, key=lambda case: list(GROUPS).index(case.group))


Thresholds = dict[tuple[str, str], float]


def _of_blob(blob: dict[Any, Any], image: dict[Any, Any], thresholds: Thresholds) -> Case:
    x = blob["x_px"]
    y = blob["y_px"]
    radius = blob["radius_px"]
    found = "found" if blob["status"] == "found" else "report"
    facts = (
        f"{blob['shape']} at x {x:.1f}, y {y:.1f} px; S/N {blob['snr']:.1f}, radius {radius:.1f} px, "
        f"depth {100 * blob['depth_frac']:.2f} %; {_about(image)}"
    )
    reasons = {
        "dense": dense_reason(blob, image, thresholds["dense", "budget"]),
        "report": report_reason(blob, thresholds),
        "matched_filter": filter_reason(blob, thresholds["matched_filter", "budget"]),
    }
    title = f"Blob {blob['blob']} on {blob['frame']}"
    return Case(
        found if blob["found_dense"] else "missed",
        blob["frame"],
        title,
        facts,
        reasons,
        x,
        y,
        radius,
    )


def _about(image: dict[Any, Any]) -> str:
    return f"measured shift {image['shift_px']:.2f} px, noise {100 * image['noise_frac']:.2f} %"


def dense_reason(blob: dict[Any, Any], image: dict[Any, Any], threshold: float) -> str:
    """Say why the dense network finds or misses a new blob.

    Parameters
    ----------
    blob, image : dict
        Rows of ``cases.csv`` and ``frames.csv``.
    threshold : float
        Of the score.
    """
    score = blob["dense_score"]
    status = blob["dense_status"]
    if not np.isfinite(score):
        return f"missed: no candidate within {max(NEAR_PX, blob['radius_px']):.0f} px; S/N {blob['snr']:.1f}"
    if status in VETOES:
        return f"missed: vetoed as {status.replace('_', ' ')} ({VETOES[status]}), score {score:.3f}; {_about(image)}"
    if not blob["found_dense"]:
        return f"missed: score {score:.3f} below the threshold {threshold:.3f}"
    off = np.hypot(blob["x_found_px"] - blob["x_px"], blob["y_found_px"] - blob["y_px"])
    depth = 100 * blob["depth_found_frac"]
    error = 100 * blob["depth_err_frac"]
    return (
        f"found: score {score:.3f}, threshold {threshold:.3f}; {off:.1f} px off, radius {blob['radius_found_px']:.1f} px, "
        f"depth {depth:.2f} ± {error:.2f} %"
    )


def report_reason(blob: dict[Any, Any], thresholds: Thresholds) -> str:
    """Say why the report's network finds or misses a new blob, at both its thresholds."""
    probability = blob["probability"]
    isr = thresholds["report", "isr"]
    budget = thresholds["report", "budget"]
    found = blob["status"] == "found"
    looks = f", its saliency peak {blob['saliency_px']:.0f} px off" if found else ""
    at_budget = "found" if blob["found_report"] else "missed"
    return (
        f"{'found' if found else 'missed'}: probability {probability:.4f} of its subframe, threshold {isr:g}{looks}; "
        f"{at_budget} at the threshold of the same rate of false alarms, {budget:.4f}"
    )


def filter_reason(blob: dict[Any, Any], threshold: float) -> str:
    """Say why the matched filter finds or misses a new blob."""
    snr = blob["matched_filter_snr"]
    if not np.isfinite(snr):
        return "missed: the highest S/N of its subframe lies elsewhere"
    found, where = ("found", "above") if blob["found_matched_filter"] else ("missed", "below")
    return f"{found}: S/N {snr:.1f}, {where} the threshold {threshold:.1f}"


def _of_alarm(
    alarm: dict[Any, Any], image: dict[Any, Any], candidates: pd.DataFrame, thresholds: Thresholds
) -> Case:
    x = alarm["x_px"]
    y = alarm["y_px"]
    detector = alarm["detector"]
    near = candidates[np.hypot(candidates["x_px"] - x, candidates["y_px"] - y) <= NEAR_PX]
    best = near.sort_values("score").iloc[-1].to_dict() if len(near) else None
    named = {"dense": "score", "report": "probability of its subframe", "matched_filter": "S/N"}[
        detector
    ]
    levels = " and ".join(
        f"{thresholds[detector, point]:.4g}" for point in alarm["operating_point"]
    )
    reasons = {
        detector: f"raised: {named} {alarm['score']:.4g}, threshold {levels}; {KINDS[alarm['kind']]}"
    }
    if detector != "dense":
        reasons["dense"] = _not_raised(best, thresholds["dense", "budget"])
    title = f"False alarm on {alarm['frame']}, {NAMES[detector]}"
    measured = (
        ""
        if best is None
        else (
            f"measured S/N {best['snr']:.1f}, radius {best['radius_px']:.1f} px, "
            f"depth {100 * best['depth_frac']:.2f} ± {100 * best['depth_err_frac']:.2f} %; "
        )
    )
    facts = f"{alarm['kind']} at x {x:.1f}, y {y:.1f} px; {measured}{_about(image)}"
    return Case(
        "false" if detector == "dense" else "others",
        alarm["frame"],
        title,
        facts,
        reasons,
        x,
        y,
        6.0,
    )


def _not_raised(best: dict[Any, Any] | None, threshold: float) -> str:
    """Say what the dense network makes of a place that another detector raises."""
    if best is None:
        return f"not raised: no candidate within {NEAR_PX:.0f} px"
    if best["status"] in VETOES:
        status = best["status"].replace("_", " ")
        return (
            f"not raised: vetoed as {status} ({VETOES[best['status']]}), score {best['score']:.3f}"
        )
    if best["is_blob"]:
        return f"a new blob lies there, score {best['score']:.3f}"
    if best["score"] >= threshold:
        return f"raised too: score {best['score']:.3f}, threshold {threshold:.3f}"
    return f"not raised: score {best['score']:.3f} below the threshold {threshold:.3f}"


# --------------------------------------------------------------------------------------------------- what is shown


def saliency_of(
    network: report_network.ReportNetwork, scaled: FloatArray, cases: list[Case]
) -> list[FloatArray]:
    """Make a saliency map of the image for each case, in means of 4 x 4 px."""
    subframes = standardised_subframes(scaled)
    origins = tiles.origins(scaled.shape)
    ny, nx = (origins[:, :1:-1].max(axis=0) + subframes.shape[1]) // SALIENCY_PX
    side = subframes.shape[1] // SALIENCY_PX
    of_subframe = [_holding(case, origins) for case in cases]
    wanted = sorted(set(of_subframe))
    means = saliency.saliency_maps(network, subframes[wanted]).reshape(
        -1, side, SALIENCY_PX, side, SALIENCY_PX
    )
    images = {}
    for k, part in zip(wanted, means.mean(axis=(2, 4)), strict=True):
        x, y = origins[k, 2:] // SALIENCY_PX
        images[k] = np.zeros((ny, nx), np.float32)
        images[k][y : y + side, x : x + side] = part / max(float(part.max()), 1e-12)
    return [images[k] for k in of_subframe]


def _holding(case: Case, origins: npt.NDArray[np.int64]) -> int:
    """Return the number of the subframe that holds a case."""
    return int(
        np.flatnonzero((origins[:, 2] <= case.x_px + 0.5) & (origins[:, 3] <= case.y_px + 0.5))[-1]
    )


def cut_out(
    image: FloatArray, case: Case, scale: int, low: float, high: float
) -> npt.NDArray[np.uint8]:
    """Cut out the surroundings of a case as grey levels; what has no value is mid-grey.

    Parameters
    ----------
    image : ndarray, shape (ny, nx)
    scale : int
        Pixels of the frame to one of ``image``.
    low, high : float
        Black and white.
    """
    x0, y0 = corner(case)
    steps = np.arange(SIDE_PX // scale)
    (ny, nx) = image.shape
    rows = y0 // scale + steps
    columns = x0 // scale + steps
    inside = np.logical_and.outer((rows >= 0) & (rows < ny), (columns >= 0) & (columns < nx))
    values = image[np.ix_(rows.clip(0, ny - 1), columns.clip(0, nx - 1))]
    level = np.where(
        inside & np.isfinite(values), np.clip((values - low) / (high - low), 0, 1), 0.5
    )
    return np.asarray(np.rint(level * (GREYS - 1)) * (255 / (GREYS - 1)), dtype=np.uint8)


def corner(case: Case) -> tuple[int, int]:
    """Return the first pixel of a case's cut-outs in the image, in steps of the maps."""
    x, y = (
        int(np.floor((at - SIDE_PX / 2) / dense.STRIDE + 0.5)) * dense.STRIDE
        for at in (case.x_px, case.y_px)
    )
    return x, y


# -------------------------------------------------------------------------------------------------------- the page

STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --quiet: #666; --line: #ccc; --mark: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ddd; --paper: #181818; --quiet: #999; --line: #444; --mark: #56b4e9; }
}
body { margin: 0 auto; padding: 1rem; max-width: 64rem; background: var(--paper); color: var(--ink);
  font: 16px/1.45 system-ui, sans-serif; }
a { color: var(--mark); }
article { border-top: 1px solid var(--line); padding: .6rem 0; }
h3 { margin: .2rem 0; font-size: 1rem; }
p, dl { margin: .2rem 0; }
.facts, figcaption { color: var(--quiet); font-size: .85rem; }
dt { float: left; clear: left; width: 9.5rem; color: var(--quiet); }
dd { margin-left: 10rem; }
.views { display: flex; flex-wrap: wrap; gap: .6rem; margin-top: .5rem; }
figure { margin: 0; width: 12rem; position: relative; }
figure img { width: 12rem; height: 12rem; image-rendering: pixelated; display: block; }
figure svg { position: absolute; top: 0; left: 0; width: 12rem; height: 12rem; }
circle { fill: none; stroke: #e69f00; stroke-width: .8; }
"""


def page(cases: list[tuple[Case, list[View]]]) -> str:
    """Write the page about cases, in the order of their groups, each with its cut-outs."""
    groups = {
        key: [article(case, views) for case, views in cases if case.group == key] for key in GROUPS
    }
    links = [f'<li><a href="#{key}">{GROUPS[key]}</a>: {len(groups[key])}</li>' for key in GROUPS]
    sections = [
        f'<section id="{key}"><h2>{GROUPS[key]} ({len(articles)})</h2>{"".join(articles) or "<p>None.</p>"}</section>\n'
        for key, articles in groups.items()
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>The historical cases</title><style>{STYLE}</style></head>\n<body><h1>The historical cases</h1>"
        f"<p>{INTRODUCTION}</p><ul>{''.join(links)}</ul>\n{''.join(sections)}</body></html>\n"
    )


INTRODUCTION = (
    "Why was this raised, why was this missed? Every new blob on the images that first show it, and everything that was "
    f"taken for one. Cut-outs are {SIDE_PX} px wide, x to the right, y upwards, the case in the circle. A blob is bright: "
    f"the difference from -{NOISE_SIGMA:g} (black) to {NOISE_SIGMA:g} times its noise (white), the median stack from "
    f"{100 * STACK_FRAC[0]:g} to {100 * STACK_FRAC[1]:g} % of the light. The dense network's map goes from 0 to 1. The saliency map "
    "is that of the case's subframe alone, relative to its highest point."
)


def article(case: Case, views: list[View]) -> str:
    """Write one case as HTML."""
    said = "".join(
        f"<dt>{NAMES[name]}</dt><dd>{escape(why)}</dd>" for name, why in case.reasons.items()
    )
    figures = "".join(figure(case, view) for view in views)
    return (
        f'<article><h3>{escape(case.title)}</h3><p class="facts">{escape(case.facts)}</p><dl>{said}</dl>'
        f'<div class="views">{figures}</div></article>\n'
    )


def figure(case: Case, view: View) -> str:
    """Write one cut-out as HTML, with a circle around the case."""
    x0, y0 = corner(case)
    x = case.x_px - x0 + 0.5
    y = SIDE_PX - (case.y_px - y0 + 0.5)
    alt = escape(f"{view.name} around x {case.x_px:.0f}, y {case.y_px:.0f} of {case.frame}")
    return (
        f'<figure><img alt="{alt}" src="data:image/png;base64,{png(view.pixels)}">'
        f'<svg viewBox="0 0 {SIDE_PX} {SIDE_PX}" aria-hidden="true"><circle cx="{x:.1f}" cy="{y:.1f}" '
        f'r="{case.radius_px + 4:.1f}"/></svg><figcaption>{escape(view.name)}</figcaption></figure>'
    )


def png(pixels: npt.NDArray[np.uint8]) -> str:
    """Encode a grey picture as base64, first row at the bottom."""
    content = BytesIO()
    Image.fromarray(pixels[::-1]).save(content, "PNG", compress_level=6)
    return b64encode(content.getvalue()).decode()
