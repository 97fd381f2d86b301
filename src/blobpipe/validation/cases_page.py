"""Write the page of historical cases: cut-outs of each, and why each detector found or missed it."""

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
from blobpipe.detection.detectors import load_dense_detector, standardised_subframes
from blobpipe.detection.match import NEAR_PX
from blobpipe.images import tiles
from blobpipe.networks import dense, kernels, model_file, report_network, saliency
from blobpipe.validation import regression
from blobpipe.validation.evaluate import THREADS

# Side of a cut-out: a blob and its surroundings (px)
SIDE_PX = 96

# Grey levels of a cut-out; more would only enlarge the file, as noise compresses badly
GREYS = 32

# Range of grey of the difference image, either way (noise per pixel)
NOISE_SIGMA = 4.0

# Range of grey of the median stack, black to white: known blobs are up to a tenth deep (fraction of the light)
STACK_FRAC = (-0.03, 0.09)

# Pixels of the saliency map's means: it is smoothed over as many (px)
SALIENCY_PX = 4

# Radius of the circle around a false alarm, before the margin (px)
ALARM_RADIUS_PX = 6.0

# Distance of the circle from the edge of the blob (px)
CIRCLE_MARGIN_PX = 4

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
    """One case on the page.

    Attributes
    ----------
    group : str
        Key of `GROUPS`.
    frame : str
    title, facts : str
    reasons : dict of str
        Why each detector found or missed it, or raised it or not.
    x_px, y_px, radius_px : float
        Place in the image and radius (px).
    """

    group: str
    frame: str
    title: str
    facts: str
    reasons: dict[str, str]
    x_px: float
    y_px: float
    radius_px: float


class View(NamedTuple):
    """A cut-out as a grey picture, shape (ny, nx), uint8, first row at the bottom, and the name of what it shows."""

    name: str
    pixels: npt.NDArray[np.uint8]


# Columns that are read of the tables of the stage regression
TABLES = {
    "cases": regression.CASE_COLUMNS,
    "frames": regression.FRAME_COLUMNS,
    "alarms": regression.ALARM_COLUMNS,
    "detectors": ("detector", "operating_point", "threshold"),
}

# Threshold of each detector at each operating point
Thresholds = dict[tuple[str, str], float]


def write_cases(
    difference_dir: str | Path,
    scale_dir: str | Path,
    detect_dir: str | Path,
    model_path: str | Path,
    out_dir: str | Path,
) -> None:
    """Write ``cases.html``: a single file that needs no network and no script.

    Parameters
    ----------
    difference_dir, scale_dir, detect_dir : path
        Folders of the earlier stages.
    model_path : path
        The report's network.
    out_dir : path
        Folder of the stage regression, with the tables of `regression.regress`.
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
    dense_network = load_dense_detector(detect_dir / "model.safetensors").network
    kernels.set_threads(1)  # each thread works on an image of its own
    stack = fits_images.read_plane(Path(difference_dir) / "reference.fits.fz", "STACK")
    noise = results["frames"].set_index("frame")["noise_frac"]

    def cut_views(frame: str) -> list[list[View]]:
        difference = fits_images.read_pixels(fits_images.find_image(difference_dir, frame))
        scaled = fits_images.read_pixels(fits_images.find_image(scale_dir, frame))
        limit = NOISE_SIGMA * noise[frame]
        here = [case for case in cases if case.frame == frame]
        cells = dense.probability_map(dense_network, scaled)
        maps = saliency_of(network, scaled, here)
        views = []
        for case, saliency_map in zip(here, maps, strict=True):
            pictures = {
                "difference image": cut_out(difference, case, 1, -limit, limit),
                "median stack": cut_out(stack, case, 1, *STACK_FRAC),
                "probability map of the dense network": cut_out(
                    cells, case, dense.STRIDE, 0.0, 1.0
                ),
                "saliency map of the report's network": cut_out(
                    saliency_map, case, SALIENCY_PX, 0.0, 1.0
                ),
            }
            views.append([View(name, pixels) for name, pixels in pictures.items()])
        return views

    # Image by image; then the cases in their order, each with the next views of its image
    names = list(dict.fromkeys(case.frame for case in cases))
    with ThreadPoolExecutor(THREADS) as pool:
        cut = list(pool.map(cut_views, names))
    views = {name: iter(found) for name, found in zip(names, cut, strict=True)}
    html = page([(case, next(views[case.frame])) for case in cases])
    with files.atomic(out_dir / "cases.html") as temporary:
        temporary.write_text(html, encoding="utf-8")


# ------------------------------------------------------------------ the cases and the reasons


def collect(tables: dict[str, pd.DataFrame], candidates: pd.DataFrame) -> list[Case]:
    """Collect all new blobs and all false alarms, those first that the dense network gets wrong.

    Parameters
    ----------
    tables : dict of DataFrame
        ``cases``, ``frames``, ``alarms`` and ``detectors`` of the stage regression.
    candidates : DataFrame
        ``candidates.csv`` of the stage detect.
    """
    thresholds: Thresholds = {}
    for row in tables["detectors"].to_dict("records"):
        thresholds[row["detector"], row["operating_point"]] = float(row["threshold"])
    images = {row["frame"]: row for row in tables["frames"].to_dict("records")}

    # New blobs
    usable = tables["cases"][tables["cases"]["status"] != "unusable"]
    cases = [
        _blob_case(blob, images[blob["frame"]], thresholds) for blob in usable.to_dict("records")
    ]

    # A detector's false alarm at two operating points is one case
    same = tables["alarms"].groupby(
        ["detector", "frame", "x_px", "y_px"], sort=False, as_index=False
    )
    alarms = same.agg({"operating_point": tuple, "score": "first", "kind": "first"})
    by_frame = dict(tuple(candidates.groupby("frame")))
    for alarm in alarms.to_dict("records"):
        frame = alarm["frame"]
        here = by_frame.get(frame, candidates[:0])
        cases.append(_alarm_case(alarm, images[frame], here, thresholds))

    order = list(GROUPS)
    return sorted(cases, key=lambda case: order.index(case.group))


def _blob_case(blob: dict[Any, Any], image: dict[Any, Any], thresholds: Thresholds) -> Case:
    """Make the case of a new blob, from its row of ``cases.csv``."""
    group = "missed"
    if blob["found_dense"]:
        group = "found" if blob["status"] == "found" else "report"
    facts = (
        f"{blob['shape']} at x {blob['x_px']:.1f}, y {blob['y_px']:.1f} px; S/N {blob['snr']:.1f}, "
        f"radius {blob['radius_px']:.1f} px, depth {100 * blob['depth_frac']:.2f} %; {_describe(image)}"
    )
    reasons = {
        "dense": dense_reason(blob, image, thresholds["dense", "budget"]),
        "report": report_reason(blob, thresholds),
        "matched_filter": filter_reason(blob, thresholds["matched_filter", "budget"]),
    }
    return Case(
        group,
        blob["frame"],
        f"Blob {blob['blob']} on {blob['frame']}",
        facts,
        reasons,
        blob["x_px"],
        blob["y_px"],
        blob["radius_px"],
    )


def _describe(image: dict[Any, Any]) -> str:
    """State shift and noise of an image, from its row of ``frames.csv``."""
    return f"measured shift {image['shift_px']:.2f} px, noise {100 * image['noise_frac']:.2f} %"


def dense_reason(blob: dict[Any, Any], image: dict[Any, Any], threshold: float) -> str:
    """Say why the dense network finds or misses a new blob.

    Parameters
    ----------
    blob, image : dict
        Rows of ``cases.csv`` and ``frames.csv``.
    threshold : float
        Score from which a candidate is a detection.
    """
    score = blob["dense_score"]
    status = blob["dense_status"]
    if not np.isfinite(score):
        near_px = max(NEAR_PX, blob["radius_px"])
        return f"missed: no candidate within {near_px:.0f} px; S/N {blob['snr']:.1f}"
    if status in VETOES:
        return f"missed: {_vetoed(status, score)}; {_describe(image)}"
    if not blob["found_dense"]:
        return f"missed: score {score:.3f} below the threshold {threshold:.3f}"
    offset = np.hypot(blob["x_found_px"] - blob["x_px"], blob["y_found_px"] - blob["y_px"])
    depth = 100 * blob["depth_found_frac"]
    error = 100 * blob["depth_err_frac"]
    return (
        f"found: score {score:.3f}, threshold {threshold:.3f}; {offset:.1f} px off, "
        f"radius {blob['radius_found_px']:.1f} px, depth {depth:.2f} ± {error:.2f} %"
    )


def _vetoed(status: str, score: float) -> str:
    """State the reason of a veto."""
    return f"vetoed as {status.replace('_', ' ')} ({VETOES[status]}), score {score:.3f}"


def report_reason(blob: dict[Any, Any], thresholds: Thresholds) -> str:
    """Say why the report's network finds or misses a new blob, at both its thresholds."""
    isr = thresholds["report", "isr"]
    budget = thresholds["report", "budget"]
    found = blob["status"] == "found"
    saliency_peak = f", its saliency peak {blob['saliency_px']:.0f} px off" if found else ""
    return (
        f"{'found' if found else 'missed'}: probability {blob['probability']:.4f} of its subframe, "
        f"threshold {isr:g}{saliency_peak}; {'found' if blob['found_report'] else 'missed'} "
        f"at the threshold of the same rate of false alarms, {budget:.4f}"
    )


def filter_reason(blob: dict[Any, Any], threshold: float) -> str:
    """Say why the matched filter finds or misses a new blob."""
    snr = blob["matched_filter_snr"]
    if not np.isfinite(snr):
        return "missed: the highest S/N of its subframe lies elsewhere"
    if blob["found_matched_filter"]:
        return f"found: S/N {snr:.1f}, above the threshold {threshold:.1f}"
    return f"missed: S/N {snr:.1f}, below the threshold {threshold:.1f}"


# What the score of each detector is
SCORES = {"dense": "score", "report": "probability of its subframe", "matched_filter": "S/N"}


def _alarm_case(
    alarm: dict[Any, Any], image: dict[Any, Any], candidates: pd.DataFrame, thresholds: Thresholds
) -> Case:
    """Make the case of a false alarm, from its row of ``alarms.csv`` and the candidates of its image."""
    x = alarm["x_px"]
    y = alarm["y_px"]
    detector = alarm["detector"]
    levels = " and ".join(
        f"{thresholds[detector, point]:.4g}" for point in alarm["operating_point"]
    )
    raised = (
        f"raised: {SCORES[detector]} {alarm['score']:.4g}, threshold {levels}; "
        f"{KINDS[alarm['kind']]}"
    )
    reasons = {detector: raised}

    # The candidate of the dense network at the same place
    near = candidates[np.hypot(candidates["x_px"] - x, candidates["y_px"] - y) <= NEAR_PX]
    best = near.sort_values("score").iloc[-1].to_dict() if len(near) else None
    if detector != "dense":
        reasons["dense"] = _not_raised(best, thresholds["dense", "budget"])
    measured = ""
    if best is not None:
        depth = 100 * best["depth_frac"]
        error = 100 * best["depth_err_frac"]
        measured = (
            f"measured S/N {best['snr']:.1f}, radius {best['radius_px']:.1f} px, "
            f"depth {depth:.2f} ± {error:.2f} %; "
        )

    return Case(
        "false" if detector == "dense" else "others",
        alarm["frame"],
        f"False alarm on {alarm['frame']}, {NAMES[detector]}",
        f"{alarm['kind']} at x {x:.1f}, y {y:.1f} px; {measured}{_describe(image)}",
        reasons,
        x,
        y,
        ALARM_RADIUS_PX,
    )


def _not_raised(best: dict[Any, Any] | None, threshold: float) -> str:
    """Say why the dense network raises no false alarm where another detector does."""
    if best is None:
        return f"not raised: no candidate within {NEAR_PX:.0f} px"
    if best["status"] in VETOES:
        return f"not raised: {_vetoed(best['status'], best['score'])}"
    if best["is_blob"]:
        return f"a new blob lies there, score {best['score']:.3f}"
    if best["score"] >= threshold:
        return f"raised too: score {best['score']:.3f}, threshold {threshold:.3f}"
    return f"not raised: score {best['score']:.3f} below the threshold {threshold:.3f}"


# ----------------------------------------------------------------------------- the cut-outs


def saliency_of(
    network: report_network.ReportNetwork, scaled: FloatArray, cases: list[Case]
) -> list[FloatArray]:
    """Map the saliency of the subframe of each case, on a copy of the image in means of 4 x 4 px.

    Each map is relative to its maximum, and zero outside the subframe.
    """
    subframes = standardised_subframes(scaled)
    origins = tiles.origins(scaled.shape)
    numbers = [_subframe_of(case, origins) for case in cases]
    wanted = sorted(set(numbers))

    # Means of 4 x 4 pixels
    side = subframes.shape[1] // SALIENCY_PX
    maps = saliency.saliency_maps(network, subframes[wanted])
    blocks = maps.reshape(-1, side, SALIENCY_PX, side, SALIENCY_PX)
    means = blocks.mean(axis=(2, 4))

    # Each at its place in the image
    x_last, y_last = origins[:, 2:].max(axis=0)
    nx = (x_last + subframes.shape[1]) // SALIENCY_PX
    ny = (y_last + subframes.shape[1]) // SALIENCY_PX
    images = {}
    for number, mean in zip(wanted, means, strict=True):
        x, y = origins[number, 2:] // SALIENCY_PX
        images[number] = np.zeros((ny, nx), np.float32)
        images[number][y : y + side, x : x + side] = mean / max(float(mean.max()), 1e-12)
    return [images[number] for number in numbers]


def _subframe_of(case: Case, origins: npt.NDArray[np.int64]) -> int:
    """Return the number of the subframe that holds a case."""
    right_of = origins[:, 2] <= case.x_px + 0.5
    above = origins[:, 3] <= case.y_px + 0.5
    return int(np.flatnonzero(right_of & above)[-1])


def cut_out(
    image: FloatArray, case: Case, scale: int, low: float, high: float
) -> npt.NDArray[np.uint8]:
    """Cut out the surroundings of a case as grey levels; mid-grey where there is no value.

    Parameters
    ----------
    image : ndarray, shape (ny, nx)
    case : Case
    scale : int
        Pixels of the frame per pixel of ``image``, along each axis.
    low, high : float
        Values of black and white.

    Returns
    -------
    ndarray, shape (96 / scale, 96 / scale), uint8
    """
    x0, y0 = corner(case)
    steps = np.arange(SIDE_PX // scale)
    rows = y0 // scale + steps
    columns = x0 // scale + steps

    # Beyond the edges of the image there is no value
    ny, nx = image.shape
    row_inside = (rows >= 0) & (rows < ny)
    column_inside = (columns >= 0) & (columns < nx)
    inside = np.logical_and.outer(row_inside, column_inside)
    values = image[np.ix_(rows.clip(0, ny - 1), columns.clip(0, nx - 1))]

    relative = np.clip((values - low) / (high - low), 0, 1)
    grey = np.where(inside & np.isfinite(values), relative, 0.5)
    steps_of_grey = np.rint(grey * (GREYS - 1))
    return np.asarray(steps_of_grey * (255 / (GREYS - 1)), dtype=np.uint8)


def corner(case: Case) -> tuple[int, int]:
    """Return x, y of the lower left pixel of a case's cut-outs in the image, a multiple of the maps' cells."""
    x_cell = np.floor((case.x_px - SIDE_PX / 2) / dense.STRIDE + 0.5)
    y_cell = np.floor((case.y_px - SIDE_PX / 2) / dense.STRIDE + 0.5)
    return int(x_cell) * dense.STRIDE, int(y_cell) * dense.STRIDE


# --------------------------------------------------------------------------------- the page

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
figure { margin: 0; width: 12rem; max-width: calc(50% - .3rem); position: relative; }
figure img, figure svg { width: 100%; aspect-ratio: 1; }
figure img { height: auto; image-rendering: pixelated; display: block; }
figure svg { position: absolute; top: 0; left: 0; }
@media (max-width: 40rem) { dt { float: none; } dd { margin-left: 0; } }
circle { fill: none; stroke: #e69f00; stroke-width: .8; }
"""


def page(cases: list[tuple[Case, list[View]]]) -> str:
    """Write the page of all cases by group, each with its cut-outs."""
    links = []
    sections = []
    for key, heading in GROUPS.items():
        articles = [article(case, views) for case, views in cases if case.group == key]
        content = "".join(articles) or "<p>None.</p>"
        links.append(f'<li><a href="#{key}">{heading}</a>: {len(articles)}</li>')
        sections.append(
            f'<section id="{key}"><h2>{heading} ({len(articles)})</h2>{content}</section>\n'
        )
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
    reasons = "".join(
        f"<dt>{NAMES[name]}</dt><dd>{escape(why)}</dd>" for name, why in case.reasons.items()
    )
    figures = "".join(figure(case, view) for view in views)
    return (
        f'<article><h3>{escape(case.title)}</h3><p class="facts">{escape(case.facts)}</p><dl>{reasons}</dl>'
        f'<div class="views">{figures}</div></article>\n'
    )


def figure(case: Case, view: View) -> str:
    """Write one cut-out as HTML, with a circle around the case."""
    x0, y0 = corner(case)
    x = case.x_px - x0 + 0.5
    y = SIDE_PX - (case.y_px - y0 + 0.5)  # downwards, as in SVG
    radius = case.radius_px + CIRCLE_MARGIN_PX
    alt = escape(f"{view.name} around x {case.x_px:.0f}, y {case.y_px:.0f} of {case.frame}")
    return (
        f'<figure><img alt="{alt}" src="data:image/png;base64,{png(view.pixels)}">'
        f'<svg viewBox="0 0 {SIDE_PX} {SIDE_PX}" aria-hidden="true"><circle cx="{x:.1f}" cy="{y:.1f}" '
        f'r="{radius:.1f}"/></svg><figcaption>{escape(view.name)}</figcaption></figure>'
    )


def png(pixels: npt.NDArray[np.uint8]) -> str:
    """Encode a grey picture as base64, first row at the bottom."""
    content = BytesIO()
    Image.fromarray(pixels[::-1]).save(content, "PNG", compress_level=6)
    return b64encode(content.getvalue()).decode()
