"""Compare blobpipe with other detectors on the same frames: ``python -m benchmarks.peers``.

Recall at three rates of false alarms and time per frame of SEP, of two detectors of photutils, of matched filters, of the
report's network and of the packaged network. Results go to ``benchmarks/peers.csv`` and ``docs/img/peers.png``.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from benchmarks.measure import ROOT, progress
from benchmarks.peer_frames import KINDS, make_frame
from blobpipe.cli.run import rest_idle_threads
from blobpipe.core import plotting, tables
from blobpipe.core.arrays import FloatArray, Image
from blobpipe.detection.detectors import MatchedFilter, Peaks, ReportDetector, load_dense_detector
from blobpipe.detection.match import near_blobs
from blobpipe.detection.search import find_blobs
from blobpipe.images.clip import clip_image
from blobpipe.images.scale import scale_image
from blobpipe.networks import kernels, model_file
from blobpipe.params import Params

# Accepted false alarms per frame at which recall is given
RATES = (0.05, 0.25, 1.0)

# Row of the results for which one threshold serves all kinds of frames
ALL = "all"

# What each detector is called in tables and figures
NAMES = {
    "sep": "SEP",
    "daofind": "DAOStarFinder",
    "segmentation": "image segmentation",
    "matched_filter": "matched filter",
    "whitened": "matched filter, whitened",
    "report": "report's network",
    "dense": "blobpipe",
}

# What kinds of frames are called on the figure
KIND_NAMES = {
    "white": "white\nnoise",
    "one_over_f": "1/f noise",
    "one_over_f_strong": "strong\n1/f noise",
    "soft_clusters": "soft\nclusters",
    "halved": "half of\nthe noise",
    "doubled": "twice\nthe noise",
}

# Package that a detector needs beyond those of blobpipe
PACKAGES = {"sep": "sep", "daofind": "photutils", "segmentation": "photutils"}

# Full width at half maximum of the Gaussian kernel of SEP and of the segmentation, and of DAOStarFinder's, and the latter's
# radius (px; sigma); the best of 5 to 13 px, and of 1.5 and 2.5 sigma, on white frames of another seed
FWHM_PX = 9.0
DAOFIND_FWHM_PX = 11.0
DAOFIND_RADIUS_SIGMA = 2.5

# S/N in the filtered image from which SEP and photutils report sources, below the thresholds that are swept
LOWEST_SNR = 3.5

# Least area of a source above that (px); SEP's default
MIN_AREA_PX = 5

# Side of the boxes of SEP's background (px); SEP's default
BACKGROUND_BOX_PX = 64

# Log-odds from which the report's network gives a place; its own threshold is 0
LOWEST_ODDS = -4.0

# Frequencies along y over which the power spectrum is averaged; the lines of read-out noise are narrow along x (count)
SMOOTHED_FREQUENCIES = 33

# Lowest power by which is divided, relative to the mean; an interpolated image has none at high frequencies
LOWEST_POWER = 0.2

Search = Callable[[Image], Peaks]


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table, write it and its figure."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    warnings.simplefilter("ignore")
    rest_idle_threads()
    kernels.set_threads(1)

    searches, skipped = make_searches(args.report)
    for name, reason in skipped.items():
        print(f"skipped: {NAMES[name]} ({reason})")
    table = compare(searches, args.kinds, args.frames, seed=args.seed, side=args.side)
    print(to_text(table))

    out = args.out or ROOT / "benchmarks"
    figure = (args.out or ROOT / "docs" / "img") / "peers.png"
    tables.write_table(out / "peers.csv", table)
    draw(figure, table)
    print(f"written: {os.path.relpath(out / 'peers.csv')}, {os.path.relpath(figure)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=(__doc__ or "").split(": ", 1)[0] + "."
    )
    parser.add_argument(
        "--frames", type=int, default=6, metavar="N", help="frames of each kind (default: 6)"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the frames (default: 1)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of peers.csv and peers.png (default: benchmarks and docs/img)",
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=list(KINDS),
        default=list(KINDS),
        metavar="KIND",
        help=f"of {', '.join(KINDS)}",
    )
    parser.add_argument(
        "--side", type=int, default=1024, help="side of a frame, a multiple of 256 (px)"
    )
    parser.add_argument(
        "--report",
        type=Path,
        default=ROOT / "results" / "train" / "model.safetensors",
        metavar="MODEL",
        help="the report's network (default: that of the last run)",
    )
    return parser


# --------------------------------------------------------------------------------- detectors


def make_searches(report_path: Path) -> tuple[dict[str, Search], dict[str, str]]:
    """Make all detectors that can be had.

    Returns
    -------
    searches : dict of callable
        By name; each takes a difference image and returns its peaks, down to scores that are of no use.
    skipped : dict of str
        Reasons of the others, by name.
    """
    params = Params()
    filters = MatchedFilter(params.evaluate.radii_px)
    dense = load_dense_detector(model_file.PACKAGED)

    def search_dense(image: Image) -> Peaks:
        found = find_blobs(image, None, dense)
        new = found[found["status"] == "new"]
        return Peaks(new["x_px"].to_numpy(), new["y_px"].to_numpy(), new["score"].to_numpy())

    searches: dict[str, Search] = {
        "sep": search_sep,
        "daofind": search_daofind,
        "segmentation": search_segmentation,
        "matched_filter": lambda image: filters.search(_scaled(image, params)),
        "whitened": lambda image: filters.search(whiten(_scaled(image, params))),
        "dense": search_dense,
    }
    skipped = {}
    for name, package in PACKAGES.items():
        if find_spec(package) is None:
            del searches[name]
            skipped[name] = (
                f"{package} is not installed; pip install -c constraints.txt -e '.[bench]'"
            )
    if report_path.exists():
        network, _ = model_file.load_model(report_path)
        report = ReportDetector(network, LOWEST_ODDS)
        searches["report"] = lambda image: report.search(_scaled(image, params))
    else:
        skipped["report"] = f"{report_path.name} not found; run the pipeline, or name it: --report"
    return {name: searches[name] for name in NAMES if name in searches}, skipped


def _scaled(image: Image, params: Params) -> Image:
    clipped, _ = clip_image(image, params.clip)
    scaled, _ = scale_image(clipped, params.scale)
    return scaled


def search_sep(image: Image) -> Peaks:
    """Search with SEP: its background, a Gaussian kernel, its deblending; the score is the S/N of the filtered peak."""
    import sep

    mask = ~np.isfinite(image)
    data = np.where(mask, 0, image)
    background = sep.Background(data, mask=mask, bw=BACKGROUND_BOX_PX, bh=BACKGROUND_BOX_PX)
    data = data - background.back()
    kernel = _gaussian_kernel()
    noise = background.globalrms * np.sqrt(np.sum(kernel**2))
    found = sep.extract(
        data,
        LOWEST_SNR * noise,
        mask=mask,
        minarea=MIN_AREA_PX,
        filter_kernel=kernel,
        filter_type="conv",
    )
    x = found["xcpeak"].astype(float)
    y = found["ycpeak"].astype(float)
    return Peaks(x, y, found["cpeak"] / noise)


def search_daofind(image: Image) -> Peaks:
    """Search with DAOStarFinder, without limits of sharpness and roundness, which are for stars."""
    from photutils.detection import DAOStarFinder

    mask = ~np.isfinite(image)
    data = np.where(mask, 0, image)
    finder = DAOStarFinder(
        LOWEST_SNR * _noise(data[~mask]),
        DAOFIND_FWHM_PX,
        sigma_radius=DAOFIND_RADIUS_SIGMA,
        sharpness_range=(-np.inf, np.inf),
        roundness_range=(-np.inf, np.inf),
    )
    found = finder(data, mask=mask)
    if found is None:
        return Peaks(np.zeros(0), np.zeros(0), np.zeros(0))
    # Magnitudes are relative to the threshold
    snr = LOWEST_SNR * 10 ** (-0.4 * np.asarray(found["daofind_mag"]))
    return Peaks(np.asarray(found["x_centroid"]), np.asarray(found["y_centroid"]), snr)


def search_segmentation(image: Image) -> Peaks:
    """Search with the image segmentation of photutils on the filtered image; the score is the S/N of a segment's peak."""
    from photutils.segmentation import SourceCatalog, detect_sources
    from scipy.signal import fftconvolve

    mask = ~np.isfinite(image)
    filtered = fftconvolve(np.where(mask, 0, image), _gaussian_kernel(), mode="same")
    noise = _noise(filtered[~mask])
    segments = detect_sources(filtered, LOWEST_SNR * noise, n_pixels=MIN_AREA_PX, mask=mask)
    if segments is None:
        return Peaks(np.zeros(0), np.zeros(0), np.zeros(0))
    found = SourceCatalog(filtered, segments)
    x = np.asarray(found.max_value_xindex, float)
    y = np.asarray(found.max_value_yindex, float)
    return Peaks(x, y, np.asarray(found.max_value) / noise)


def _gaussian_kernel() -> FloatArray:
    """Return the kernel of SEP and of the segmentation, of sum 1."""
    sigma = FWHM_PX / 2.3548
    half = int(np.ceil(2.5 * sigma))
    offset = np.arange(-half, half + 1)
    profile = np.exp(-0.5 * (offset / sigma) ** 2)
    kernel = np.outer(profile, profile)
    return (kernel / kernel.sum()).astype(np.float32)


def _noise(values: FloatArray) -> float:
    """Return the robust standard deviation (1.4826 MAD)."""
    return float(1.4826 * np.median(np.abs(values - np.median(values))))


def whiten(scaled: Image) -> Image:
    """Divide an image in Fourier space by the square root of its own power spectrum.

    The power is the geometric mean over neighbouring frequencies of an image that is clipped, so that blobs and bad pixels
    have little influence on it.

    Parameters
    ----------
    scaled : ndarray, shape (ny, nx), float32
        Clipped and scaled (sigma).

    Returns
    -------
    ndarray, shape (ny, nx), float32
    """
    from scipy.fft import irfft2, rfft2
    from scipy.ndimage import uniform_filter1d

    spectrum = rfft2(scaled)
    log_power = np.log(np.abs(spectrum) ** 2 + 1e-12)
    smooth = uniform_filter1d(log_power, SMOOTHED_FREQUENCIES, axis=0, mode="wrap")
    power = np.exp(smooth)
    relative = np.maximum(power / power.mean(), LOWEST_POWER)
    return np.asarray(irfft2(spectrum / np.sqrt(relative), scaled.shape), np.float32)


# -------------------------------------------------------------------------------- measuring


class Answer(NamedTuple):
    """What a detector makes of a frame.

    Attributes
    ----------
    true : ndarray, shape (number of blobs,)
        Highest score near each blob; -inf if there is none.
    false : ndarray
        Scores of the detections near no blob.
    ms : float
        Time of the search (ms).
    """

    true: FloatArray
    false: FloatArray
    ms: float


def compare(
    searches: dict[str, Search], kinds: list[str], n_frames: int, *, seed: int, side: int
) -> pd.DataFrame:
    """Search frames of all kinds with all detectors in turn.

    Returns
    -------
    DataFrame
        kind, detector, n_frames, n_blobs, recall_at_0.05, recall_at_0.25, recall_at_1, ms_per_frame (median). The kind
        ``all`` has one threshold for all kinds.
    """
    # The first search imports and compiles
    warm_up = make_frame("white", n_frames, seed=seed, side=side)
    for search in searches.values():
        search(warm_up.image)

    answers: dict[tuple[str, str], list[Answer]] = {key: [] for key in product(kinds, searches)}
    for number, (kind, index) in enumerate(product(kinds, range(n_frames))):
        progress(f"{kind}, frame {index + 1} of {n_frames}")
        frame = make_frame(kind, index, seed=seed, side=side)
        # Every other frame backwards, so that what changes in time favours none
        for name in list(searches)[:: -1 if number % 2 else 1]:
            answers[kind, name].append(_answer(searches[name], frame.image, frame.blobs))
    progress("")

    rows = []
    for kind, name in product([*kinds, ALL], searches):
        those = kinds if kind == ALL else [kind]
        rows.append(_summarise(kind, name, [one for k in those for one in answers[k, name]]))
    return pd.DataFrame(rows)


def _answer(search: Search, image: Image, blobs: pd.DataFrame) -> Answer:
    """Search an image and match its peaks with the blobs."""
    started = time.perf_counter()
    peaks = search(image)
    ms = 1e3 * (time.perf_counter() - started)
    near = near_blobs(pd.DataFrame({"x_px": peaks.x_px, "y_px": peaks.y_px}), blobs)
    score = np.asarray(peaks.score, float)
    true = np.where(near, score[:, None], -np.inf).max(axis=0, initial=-np.inf)
    return Answer(true, score[~near.any(axis=1)], ms)


def _summarise(kind: str, name: str, answers: list[Answer]) -> dict[str, object]:
    """Compute recall at each rate of false alarms, the threshold swept on these frames."""
    true = np.concatenate([one.true for one in answers])
    false = np.sort(np.concatenate([one.false for one in answers]))[::-1]
    row: dict[str, object] = {
        "kind": kind,
        "detector": name,
        "n_frames": len(answers),
        "n_blobs": len(true),
    }
    for rate in RATES:
        # The highest false alarm that is not accepted
        n_allowed = int(rate * len(answers) + 1e-9)
        threshold = false[n_allowed] if len(false) > n_allowed else -np.inf
        row[f"recall_at_{rate:g}"] = round(float((true > threshold).mean()), 4)
    row["ms_per_frame"] = round(float(np.median([one.ms for one in answers])), 1)
    return row


# ------------------------------------------------------------------------- table and figure


def to_text(table: pd.DataFrame) -> str:
    """Write recall at the three rates by kind and detector, and the time, as lines of text."""
    lines = [f"recall at {', '.join(f'{rate:g}' for rate in RATES)} false alarms per frame"]
    for kind, part in table.groupby("kind", sort=False):
        lines.append(f"{kind} ({part['n_frames'].iloc[0]} frames)")
        for row in part.to_dict("records"):
            recall = "  ".join(f"{row[f'recall_at_{rate:g}']:.2f}" for rate in RATES)
            time_text = f"{row['ms_per_frame']:8.0f} ms"
            lines.append(f"  {NAMES[row['detector']]:<26} {recall} {time_text}")
    return "\n".join(lines)


def draw(path: Path, table: pd.DataFrame) -> None:
    """Draw recall of each detector on each kind of frame: at 0.25 false alarms per frame, and the range from 0.05 to 1."""
    import matplotlib.pyplot as plt

    styles = {
        "sep": (plotting.PURPLE, "s"),
        "daofind": (plotting.PURPLE, "v"),
        "segmentation": (plotting.PURPLE, "D"),
        "matched_filter": (plotting.ORANGE, "s"),
        "whitened": (plotting.ORANGE, "D"),
        "report": (plotting.BLUE, "o"),
        "dense": (plotting.GREEN, "^"),
    }
    lowest, middle, highest = (f"recall_at_{rate:g}" for rate in RATES)
    kinds = list(dict.fromkeys(table["kind"]))
    detectors = list(dict.fromkeys(table["detector"]))
    figure, axis = plt.subplots(figsize=(10.5, 4.8), layout="constrained")
    for k, name in enumerate(detectors):
        part = table[table["detector"] == name]
        color, marker = styles[name]
        position = np.arange(len(part)) + 0.11 * (k - (len(detectors) - 1) / 2)
        axis.vlines(position, part[lowest], part[highest], color=color, lw=1.5)
        axis.plot(position, part[middle], marker, color=color, ls="", label=NAMES[name])
    axis.set_xticks(range(len(kinds)), [KIND_NAMES.get(kind, kind) for kind in kinds])
    axis.set(
        xlabel="kind of frame",
        ylabel="recall of blobs of S/N 4 to 20 (fraction)",
        ylim=(-0.03, 1.03),
        title=f"Recall at 0.25 false alarms per frame (lines: at 0.05 to 1), "
        f"{table['n_blobs'].min()} blobs of each kind",
    )
    figure.legend(loc="outside right center")
    plotting.save(figure, path)


if __name__ == "__main__":
    sys.exit(main())
