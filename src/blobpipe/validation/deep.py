"""Measure the search of the latest images together: how faint, how soon, how many false alarms.

The images of the campaign are searched one after the other, as in the daily routine, with blobs superimposed from
certain dates on. The upper limit for these is a matched filter that knows shape, place and landing of each.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.stats import gamma
from tqdm import tqdm

from blobpipe.core import blob_shapes, fits_images, metrics, tables
from blobpipe.core.arrays import Image, Int64Array, Mask
from blobpipe.core.detector import Detector as Instrument
from blobpipe.core.detector import read_detector
from blobpipe.core.random_streams import stream
from blobpipe.detection.detectors import DenseDetector, load_dense_detector
from blobpipe.detection.match import NEAR_PX, near_blobs, without_repeats
from blobpipe.detection.operating_point import logit
from blobpipe.detection.search import observe, read_pipeline_template
from blobpipe.detection.thresholds import allowed_alarms, tail_threshold
from blobpipe.errors import TableError
from blobpipe.history import deep, landing
from blobpipe.history.deep import DEPTHS, FEWEST, Latest
from blobpipe.history.depths import measure_depths, measure_histories
from blobpipe.history.landing import Landing, date_history
from blobpipe.images.difference import subtract
from blobpipe.images.pattern import blob_pattern
from blobpipe.images.register import NEGLIGIBLE_PX, Shift, move_pattern
from blobpipe.images.template import Template
from blobpipe.networks import kernels
from blobpipe.noise.level import clean_noise
from blobpipe.params import Params
from blobpipe.simulation import held_out
from blobpipe.simulation.inject import add_blob
from blobpipe.validation import curves

log = logging.getLogger(__name__)

# Numbers of images since a landing that are reported, and on how many its blobs are looked for (count)
SINCE = (1, *DEPTHS)
WATCHED = max(SINCE)

# Side of the cells of the grid of superimposed blobs, and their distance from a cell's sides (px)
CELL_PX = 56
INSIDE_PX = 8

# Least distance of superimposed blobs from those of the catalogue (px)
FREE_PX = 14.0

# Spread of radii about the typical one (fraction), as in the campaign
RADIUS_SPREAD = 0.1

# Score from which a candidate that is no blob shows the tail of the false ones
LOW_SCORE = 0.5

# Places without a blob at which the noise of the matched filter is measured (count)
N_EMPTY = 400

# Error of a landing date that is small (images)
NEAR_IMAGES = 2

BLOB_COLUMNS = ("x_px", "y_px", "radius_px", "shape", "depth_frac", "snr", "first_frame")
SUPERIMPOSED_COLUMNS = (
    *BLOB_COLUMNS,
    *("found_after", "n_images", "optimum_after", "error_images", "within_interval"),
)
CASE_COLUMNS = ("blob", "first_frame", "x_px", "y_px", "snr", "found_after", "n_images")
ALARM_COLUMNS = (
    "frame",
    "n_images",
    "x_px",
    "y_px",
    "radius_px",
    "snr",
    "score",
    "persistent",
    "is_alarm",
)
COMPLETENESS_COLUMNS = (
    *("snr", "n_since", "n", "found", "completeness", "completeness_low", "completeness_high"),
    *("optimum", "alone"),
)


@dataclass(frozen=True)
class Series:
    """The usable images of a campaign in order of date.

    Attributes
    ----------
    images : DataFrame
        frame, mjd, status (``stack`` for those of the first stack), shift_x_px, shift_y_px, noise_frac.
    blobs : DataFrame
        The catalogue, with ``first``: index of the image that is the first to show it, -1 if all do.
    raw_dir, difference_dir : path
    template : Template
        Of the stage difference.
    params : Params
    instrument : core.detector.Detector
    """

    images: pd.DataFrame
    blobs: pd.DataFrame
    raw_dir: Path
    difference_dir: Path
    template: Template
    params: Params
    instrument: Instrument

    @property
    def usual_noise(self) -> float:
        """Return the median noise of the differences (fraction of the light)."""
        return float(self.images["noise_frac"].median())

    def read(self, i: int) -> OneImage:
        """Read an image and what is subtracted from it."""
        image = self.images.iloc[i]
        raw = fits_images.read_frame(
            fits_images.find_image(self.raw_dir, image["frame"]), self.instrument
        ).data
        if image["status"] == "stack":
            assert self.template.stack is not None
            difference, shift = subtract(
                raw, self.template, self.params.difference, self.instrument
            )
            return OneImage(difference, self.template.stack, shift, None)

        # What the stage has subtracted, its blobs moved to their usual place
        path = fits_images.find_image(self.difference_dir, image["frame"])
        difference = fits_images.read_pixels(path)
        stack = raw - difference
        shift = Shift(float(image["shift_x_px"]), float(image["shift_y_px"]))
        if np.hypot(*shift) > NEGLIGIBLE_PX:
            pattern = blob_pattern(stack)
            stack += move_pattern(pattern, Shift(-shift.x_px, -shift.y_px)) - pattern
        return OneImage(difference, stack, shift, fits_images.find_plane(path, "SCATTER"))


class OneImage(NamedTuple):
    """An image minus its stack, the stack (fraction of the light), the shift (px) and the RMS map."""

    difference: Image
    stack: Image
    shift: Shift
    rms: Image | None


def read_series(raw_dir: Path, difference_dir: Path, params: Params) -> Series:
    """List the usable images of a campaign.

    Raises
    ------
    TableError
        If there are too few for a deep difference.
    """
    instrument = read_detector(params.detector)
    listed = tables.read_frame_list(raw_dir)[["frame"]]
    images = listed.merge(tables.read_stage(difference_dir), on="frame", validate="one_to_one")
    images = images[images["status"].isin(["ok", "stack"])].reset_index(drop=True)
    fewest = FEWEST + min(DEPTHS)
    if len(images) < fewest:
        raise TableError(
            f"{difference_dir}: found {len(images)} usable images, expected at least {fewest}; add images"
        )
    if not (images["status"] == "ok").any():
        raise TableError(
            f"{difference_dir}: found no difference image, expected some after the first stack; add images"
        )
    blobs = tables.read_blobs(raw_dir, instrument)
    blobs = blobs.assign(first=held_out.first_image_index(images, blobs))
    template = read_pipeline_template(difference_dir)
    return Series(images, blobs, raw_dir, difference_dir, template, params, instrument)


def superimpose(series: Series) -> pd.DataFrame:
    """Draw blobs that are superimposed, on a grid, with evenly spaced landings.

    Returns
    -------
    DataFrame
        `BLOB_COLUMNS`, ``first``: index of the first image that shows it, and ``landed_mjd``.
    """
    params = series.params.deep
    rng = stream(params.seed, "deep")
    is_searched = (series.images["status"] == "ok").to_numpy()
    start = int(is_searched.argmax())
    landings = np.linspace(start, len(series.images), params.n_landings + 1)[:-1].astype(int)
    landings = np.maximum(landings, 1)
    ny, nx = fits_images.read_plane(series.difference_dir / "reference.fits.fz", "PATTERN").shape
    mjd = series.images["mjd"].to_numpy(float)

    # A cell holds one blob; landings and S/N take turns
    corners = [
        (x, y)
        for y in range(0, ny - CELL_PX + 1, CELL_PX)
        for x in range(0, nx - CELL_PX + 1, CELL_PX)
    ]
    rows = []
    for k, cell in enumerate(rng.permutation(len(corners)).tolist()):
        first = int(landings[k % len(landings)])
        snr = params.snrs[k // len(landings) % len(params.snrs)]
        x, y = corners[cell] + rng.uniform(INSIDE_PX, CELL_PX - INSIDE_PX, 2)
        typical = float(series.instrument.typical_radius(np.array(x), np.array(y)))
        radius = typical * rng.normal(1, RADIUS_SPREAD)
        radius = float(np.clip(radius, *series.instrument.blobs.radius_px))
        shape = blob_shapes.SHAPES[rng.integers(len(blob_shapes.SHAPES))]
        profile = blob_shapes.blob_profile(shape, radius)
        depth = snr / blob_shapes.matched_snr(profile, series.usual_noise)
        landed = rng.uniform(mjd[first - 1], mjd[first])
        frame = series.images["frame"].iloc[first]
        rows.append((x, y, radius, shape, depth, snr, frame, first, landed))
    drawn = pd.DataFrame(rows, columns=[*BLOB_COLUMNS, "first", "landed_mjd"])

    # None lies on a blob of the catalogue
    apart = drawn[["x_px", "y_px"]].to_numpy()[:, None] - series.blobs[["x_px", "y_px"]].to_numpy()
    is_free = (np.hypot(apart[..., 0], apart[..., 1]) > FREE_PX).all(axis=1)
    return pd.DataFrame(drawn[is_free]).reset_index(drop=True)


def signal_of(blobs: pd.DataFrame, shape: tuple[int, ...], shift: Shift) -> Image:
    """Return the light loss of blobs on an image, shape (ny, nx), float32."""
    signal = np.zeros(shape, np.float32)
    for blob in blobs.to_dict("records"):
        add_blob(
            signal,
            shape=blob["shape"],
            x_px=blob["x_px"] + shift.x_px,
            y_px=blob["y_px"] + shift.y_px,
            radius_px=blob["radius_px"],
            depth_frac=blob["depth_frac"],
        )
    return signal


@dataclass
class Findings:
    """What has been found of some blobs, so far.

    Attributes
    ----------
    blobs : DataFrame
        With ``first``, as in `Series`.
    found_after : ndarray, shape (n,), int
        Number of images since the landing when it was first found; 0: not found.
    n_images : ndarray, shape (n,), int
        Number of images in whose mean it was found; 1: on one image alone.
    """

    blobs: pd.DataFrame
    found_after: Int64Array
    n_images: Int64Array

    @classmethod
    def none(cls, blobs: pd.DataFrame) -> Findings:
        """Return that nothing has been found."""
        return cls(blobs, np.zeros(len(blobs), np.int64), np.zeros(len(blobs), np.int64))

    def landed(self, i: int) -> pd.DataFrame:
        """Return the blobs that image ``i`` shows."""
        return self.blobs[self.blobs["first"] <= i]

    def known(self) -> pd.DataFrame:
        """Return those that have been found, or are older than all images."""
        return self.blobs[(self.found_after > 0) | (self.blobs["first"] < 0)]

    def add(self, i: int, detections: pd.DataFrame) -> list[tuple[int, int]]:
        """Count what image ``i`` has shown, with ``n_images``; return pairs of blob and row that are new."""
        is_new = (self.found_after == 0) & (self.blobs["first"].to_numpy() <= i)
        is_new &= self.blobs["first"].to_numpy() >= 0
        near = near_blobs(detections, self.blobs) & is_new
        pairs = []
        for k in np.flatnonzero(near.any(axis=0)).tolist():
            row = int(near[:, k].argmax())
            self.found_after[k] = i - int(self.blobs["first"].iloc[k]) + 1
            self.n_images[k] = int(detections["n_images"].iloc[row])
            pairs.append((k, row))
        return pairs


@dataclass
class Walk:
    """The search of a campaign, image after image.

    Attributes
    ----------
    series : Series
    detector : DenseDetector
    real, superimposed : Findings
        Blobs of the campaign, and those added to it.
    alone : Findings
        Superimposed blobs, found on one image alone.
    optimum : ndarray, shape (n, len(SINCE)), bool
        Whether the matched filter finds each superimposed blob.
    landings : dict of Landing
        Of each superimposed blob found, when it was found.
    false : list of DataFrame
        Candidates that are no blob, of all depths, from `LOW_SCORE` on: `ALARM_COLUMNS`.
    """

    series: Series
    detector: DenseDetector
    real: Findings
    superimposed: Findings
    alone: Findings
    optimum: Mask
    landings: dict[int, Landing] = field(default_factory=dict)
    false: list[pd.DataFrame] = field(default_factory=list)
    latest: Latest = field(default_factory=Latest)
    mjd: list[float] = field(default_factory=list)

    def known(self) -> pd.DataFrame:
        """Return the places of all that has been found, and of the blobs older than the images."""
        places = ["x_px", "y_px", "radius_px"]
        found = (self.real.known(), self.superimposed.known())
        return pd.concat([blobs[places] for blobs in found], ignore_index=True)

    def step(self, i: int) -> None:
        """Search image ``i`` alone, and together with those before it."""
        image = self.series.images.iloc[i]
        one = self.series.read(i)
        superimposed = self.superimposed.landed(i)
        difference = one.difference + signal_of(superimposed, one.difference.shape, one.shift)
        clear = None
        if image["status"] == "ok":
            clear = self.search_alone(i, one)
        settled = deep.settle(difference, one.stack, one.shift, clear)
        self.latest.add(settled)
        self.mjd = [*self.mjd, float(image["mjd"])][-deep.KEPT :]
        if image["status"] == "ok":
            self.search_together(i, one)
            self.ask_optimum(i)

    def search_alone(self, i: int, one: OneImage) -> pd.DataFrame:
        """Search an image, and return the blobs that it shows clearly."""
        series = self.series
        image = series.images.iloc[i]

        # From the middle of the stack on, its median shows a blob that is not known
        newer = self.superimposed.landed(i)
        newer = newer[newer["first"] > i - series.params.difference.stack_size // 2]
        observation = observe(
            one.difference + signal_of(newer, one.difference.shape, one.shift),
            replace(series.template, rms=one.rms),
            catalogue=self.known(),
            shift_px=one.shift,
            noise_frac=float(image["noise_frac"]),
            instrument=series.instrument,
        )
        peaks = self.detector.search(observation.scaled(series.params.clip, series.params.scale))
        found = observation.find_blobs(self.detector, peaks=peaks, vetting=series.params.vetting)
        found = found[found["score"] >= self.detector.threshold]
        new = found[found["status"] == "new"].reset_index(drop=True)
        usual = new.assign(
            x_px=new["x_px"] - one.shift.x_px, y_px=new["y_px"] - one.shift.y_px, n_images=1
        )
        self.count(i, usual.assign(is_alarm=1))
        self.alone.add(i, usual)
        return pd.DataFrame(found[found["status"].isin(["new", "known"])])

    def search_together(self, i: int, one: OneImage) -> None:
        """Search the latest images together."""
        series = self.series
        template = replace(
            series.template, stack=one.stack, rms=self.latest.rms(), noise_model=None
        )
        found = deep.search_depths(
            self.latest.differences(),
            template,
            self.detector,
            catalogue=self.known(),
            vetting=series.params.vetting,
            instrument=series.instrument,
        )
        found = found[(found["status"] == "new") & (found["score"] >= LOW_SCORE)]
        found = found.reset_index(drop=True)

        # Of these count what has landed and stayed, according to its depths
        depths = measure_histories(self.latest.images, found)
        landings = [
            date_history(np.array(self.mjd), depths.depth_frac[:, k], depths.error_frac[:, k])
            for k in range(len(found))
        ]
        found["persistent"] = [bool(each and each.is_persistent) for each in landings]
        earliest = i - len(self.mjd) + 1
        in_campaign = [each and each._replace(first=earliest + each.first) for each in landings]
        found["landing"] = pd.Series(in_campaign, found.index, dtype=object)
        limits = deep.thresholds(self.detector.threshold, series.params.deep)
        found["is_alarm"] = found["persistent"] & (found["score"] >= found["n_images"].map(limits))
        self.count(i, found)

    def count(self, i: int, found: pd.DataFrame) -> None:
        """Count detections of blobs, and keep candidates that are none."""
        detected = found[found["is_alarm"].astype(bool)]
        detected = deep.merge_depths(detected)
        self.real.add(i, detected)
        for k, row in self.superimposed.add(i, detected):
            if "landing" in detected:
                self.landings[k] = detected["landing"].iloc[row]
        true = pd.concat([self.real.landed(i), self.superimposed.landed(i)], ignore_index=True)
        is_false = ~near_blobs(found, true).any(axis=1)
        frame = self.series.images["frame"].iloc[i]
        self.false.append(found[is_false].assign(frame=frame))

    def ask_optimum(self, i: int) -> None:
        """Ask the matched filter about the blobs that landed one of the numbers of images ago."""
        since = i - self.superimposed.blobs["first"].to_numpy() + 1
        for column, n in enumerate(SINCE):
            rows = np.flatnonzero(since == n)
            differences = self.latest.differences((n,)) if len(rows) else []
            if not differences:
                continue
            blobs = self.superimposed.blobs.iloc[rows]
            empty = self.empty_places(i)
            self.optimum[rows, column] = matched_filter_finds(
                differences[0].difference, blobs, empty, self.series.params
            )

    def empty_places(self, i: int) -> pd.DataFrame:
        """Draw places without a blob, and give each the typical radius."""
        rng = stream(self.series.params.deep.seed, "deep", "empty", i)
        ny, nx = self.latest.images[-1].values.shape
        x, y = rng.uniform(INSIDE_PX, [[nx - INSIDE_PX], [ny - INSIDE_PX]], (2, N_EMPTY))
        places = pd.DataFrame({"x_px": x, "y_px": y})
        places["radius_px"] = self.series.instrument.typical_radius(x, y)
        columns = ["x_px", "y_px", "radius_px"]
        blobs = pd.concat([self.series.blobs[columns], self.superimposed.blobs[columns]])
        apart = places[["x_px", "y_px"]].to_numpy()[:, None] - blobs[["x_px", "y_px"]].to_numpy()
        is_empty = (np.hypot(apart[..., 0], apart[..., 1]) > 2 * FREE_PX).all(axis=1)
        return pd.DataFrame(places[is_empty]).reset_index(drop=True)


def matched_filter_finds(
    difference: Image, blobs: pd.DataFrame, empty: pd.DataFrame, params: Params
) -> Mask:
    """Tell which blobs a matched filter finds that knows shape, place and landing: the upper limit.

    Parameters
    ----------
    difference : ndarray, shape (ny, nx), float32
        Mean of all images since the landing minus that of those before (fraction of the light).
    blobs : DataFrame
        x_px, y_px, radius_px, shape.
    empty : DataFrame
        x_px, y_px, radius_px of places without a blob: their spread is the noise of the filter, because an
        image's is not quite white.
    params : Params
        The threshold keeps their budget of false alarms over a whole image (`whole_image_level`).

    Returns
    -------
    ndarray, shape (n,), bool
    """
    noise = clean_noise(difference)
    background = measure_depths(difference, empty, noise)
    spread = 1.4826 * np.nanmedian(np.abs(background.depth_frac / background.error_frac))
    found = measure_depths(difference, blobs, noise)
    snr = found.depth_frac / found.error_frac / max(float(spread), 1.0)
    budget = params.detect.false_alarms_per_100_frames / 100
    level = whole_image_level(float(empty["radius_px"].median()), difference.size, budget)
    return np.asarray(snr >= level)


def whole_image_level(radius_px: float, n_pixels: int, expected: float) -> float:
    """Return the S/N that a matched filter exceeds so many times on an image of noise alone.

    Parameters
    ----------
    radius_px : float
        Of the blob it is matched to.
    n_pixels : int
        Of the image.
    expected : float
        Number of places above the level (count), far below one.

    Notes
    -----
    Source: the expected number of maxima of a Gaussian random field above a high level u (Adler 1981),
    ``A |L|^(1/2) (2 pi)^(-3/2) u exp(-u^2 / 2)``, L the covariance of its gradient, here that of the filtered noise.
    """
    profile = blob_shapes.blob_profile("disc", radius_px).astype(np.float64)
    slopes = np.gradient(profile)
    roughness = sum(np.square(slope).sum() for slope in slopes) / 2 / np.square(profile).sum()
    scale = n_pixels * roughness / (2 * np.pi) ** 1.5
    return float(brentq(lambda u: scale * u * np.exp(-u * u / 2) - expected, 1.5, 20.0))


def walk(series: Series, detector: DenseDetector, superimposed: pd.DataFrame) -> Walk:
    """Search a campaign with superimposed blobs, image after image."""
    searched = Walk(
        series,
        detector,
        Findings.none(series.blobs),
        Findings.none(superimposed),
        Findings.none(superimposed),
        np.zeros((len(superimposed), len(SINCE)), bool),
    )
    for i in tqdm(range(len(series.images)), "deep", unit="image", disable=None):
        searched.step(i)
    return searched


def measure_deep(
    raw_dir: str | Path,
    difference_dir: str | Path,
    model: str | Path,
    out_dir: str | Path,
    params: Params,
) -> None:
    """Measure the search of the latest images together (stage ``deep``).

    Parameters
    ----------
    raw_dir, difference_dir : path
        Folders of the earlier stages.
    model : path
        The dense network with its operating point.
    out_dir : path
        ``superimposed.csv`` (a row per superimposed blob), ``completeness.csv`` (a row per S/N and number of images since the
        landing), ``cases.csv`` (a row per blob of the catalogue that has landed: which depth found it first),
        ``alarms.csv`` (candidates that are no blob), ``completeness.png``, ``landing.png``, ``alarms.png``, ``metrics.json``.
    params : Params
        The section deep; and difference, clip, scale, vetting and detect.

    Raises
    ------
    TableError
        As `read_series`.
    """
    out_dir = Path(out_dir)
    kernels.set_threads(1)  # each depth is searched on a thread of its own
    series = read_series(Path(raw_dir), Path(difference_dir), params)
    detector = load_dense_detector(model)
    searched = walk(series, detector, superimpose(series))

    found = superimposed_table(searched)
    grid = completeness(searched)
    cases = cases_table(searched)
    alarms = alarms_table(searched)
    tables.write_table(out_dir / "superimposed.csv", found[list(SUPERIMPOSED_COLUMNS)])
    tables.write_table(out_dir / "completeness.csv", grid)
    tables.write_table(out_dir / "cases.csv", cases)
    tables.write_table(out_dir / "alarms.csv", alarms)
    curves.deep_completeness(out_dir / "completeness.png", grid)
    curves.landing_errors(out_dir / "landing.png", found, landing.COVERAGE)
    n_images = int((series.images["status"] == "ok").sum())
    limits = deep.thresholds(detector.threshold, params.deep)
    curves.deep_alarms(out_dir / "alarms.png", alarms, limits, n_images)
    content = summarise(found, grid, cases, alarms, n_images)
    budget = params.detect.false_alarms_per_100_frames / 100 * n_images
    allowed = allowed_alarms(budget, params.detect.confidence)
    content["margins"] = choose_margins(alarms, detector.threshold, allowed)
    log.info("deep.margins that keep the budget on these images: %s", content["margins"])
    tables.write_json(out_dir / "metrics.json", content)


def superimposed_table(searched: Walk) -> pd.DataFrame:
    """Return the superimposed blobs, what found each, and how well its landing is dated then."""
    blobs = searched.superimposed.blobs
    columns: dict[str, list[Any]] = {"error_images": [], "within_interval": []}
    for k, (first, landed) in enumerate(blobs[["first", "landed_mjd"]].itertuples(index=False)):
        dated = searched.landings.get(k)
        error = None if dated is None else dated.first - first
        inside = None if dated is None else int(dated.after_mjd <= landed <= dated.before_mjd)
        columns["error_images"].append(error)
        columns["within_interval"].append(inside)
    optimum = [
        next((n for n, is_found in zip(SINCE, row, strict=True) if is_found), 0)
        for row in searched.optimum
    ]
    return blobs.assign(
        found_after=searched.superimposed.found_after,
        n_images=searched.superimposed.n_images,
        optimum_after=optimum,
        **{name: pd.Series(values, blobs.index, dtype="Int64") for name, values in columns.items()},
    )


def completeness(searched: Walk) -> pd.DataFrame:
    """Count the superimposed blobs found, by S/N and number of images since the landing: `COMPLETENESS_COLUMNS`.

    A blob counts for the numbers of images that there are after its landing.
    """
    blobs = searched.superimposed.blobs
    n_after = len(searched.series.images) - blobs["first"].to_numpy()
    after = searched.superimposed.found_after
    alone = searched.alone.found_after
    rows = []
    for snr, group in blobs.groupby("snr"):
        for column, n_since in enumerate(SINCE):
            counted = group.index[n_after[group.index] >= n_since].to_numpy()
            n = len(counted)
            if not n:
                continue
            n_found = int(((after[counted] > 0) & (after[counted] <= n_since)).sum())
            low, high = metrics.wilson_interval(np.array(n_found), np.array(n))
            n_alone = int(((alone[counted] > 0) & (alone[counted] <= n_since)).sum())
            n_optimum = int(searched.optimum[counted, column].sum())
            shares = (n_found / n, float(low), float(high), n_optimum / n, n_alone / n)
            rows.append((snr, n_since, n, n_found, *shares))
    return pd.DataFrame(rows, columns=list(COMPLETENESS_COLUMNS))


def cases_table(searched: Walk) -> pd.DataFrame:
    """Return the blobs of the catalogue that have landed, and which depth found each first: `CASE_COLUMNS`."""
    series = searched.series
    blobs = series.blobs
    is_searched = (series.images["status"] == "ok").to_numpy()
    landed = blobs["first"].to_numpy()
    rows = np.flatnonzero((landed >= 0) & is_searched[np.maximum(landed, 0)])
    noise = series.images["noise_frac"].to_numpy(float)[landed[rows]]
    cases = blobs.iloc[rows]
    snr = [
        blob["depth_frac"]
        * blob_shapes.matched_snr(
            blob_shapes.blob_profile(blob["shape"], blob["radius_px"]), float(level)
        )
        for blob, level in zip(cases.to_dict("records"), noise, strict=True)
    ]
    cases = cases.assign(
        snr=np.round(snr, 3),
        found_after=searched.real.found_after[rows],
        n_images=searched.real.n_images[rows],
    )
    return cases[list(CASE_COLUMNS)].reset_index(drop=True)


def alarms_table(searched: Walk) -> pd.DataFrame:
    """Return the candidates that are no blob, of all depths: `ALARM_COLUMNS`."""
    false = pd.concat(searched.false, ignore_index=True)
    false = false[(false["score"] >= LOW_SCORE)]
    false["persistent"] = false["persistent"].astype("Int64") if "persistent" in false else pd.NA
    return false[list(ALARM_COLUMNS)].astype({"is_alarm": np.int64})


def summarise(
    found: pd.DataFrame,
    grid: pd.DataFrame,
    cases: pd.DataFrame,
    alarms: pd.DataFrame,
    n_images: int,
) -> dict[str, Any]:
    """Summarise the tables as the numbers of ``metrics.json``; None where nothing was counted."""
    content: dict[str, Any] = {"n_images": n_images, "n_superimposed": len(found)}

    # False alarms: places at which no blob was
    is_alarm = alarms["is_alarm"] == 1
    for name, part in (
        ("alone", alarms[is_alarm & (alarms["n_images"] == 1)]),
        ("together", alarms[is_alarm & (alarms["n_images"] > 1)]),
        ("all", alarms[is_alarm]),
    ):
        n = len(without_repeats(part, NEAR_PX))
        content[f"false_alarms_{name}"] = n
        low = gamma.ppf(0.025, n) if n else 0.0
        interval = [100 * float(low) / n_images, 100 * float(gamma.ppf(0.975, n + 1)) / n_images]
        content[f"false_alarms_per_100_{name}"] = round(100 * n / n_images, 3)
        content[f"false_alarms_per_100_{name}_interval"] = [round(end, 3) for end in interval]

    # How faint: the S/N at which half is found, and the share of what the matched filter finds
    for n_since, part in grid.groupby("n_since"):
        content[f"snr_50_within_{n_since}"] = half_level(part["snr"], part["completeness"])
        share = part["found"].sum() / max((part["optimum"] * part["n"]).sum(), 1e-9)
        content[f"share_of_optimum_{n_since}"] = round(float(share), 3) if share < 1e6 else None

    # Landing dates of blobs that several images showed, when they were found
    dated = found[found["error_images"].notna()]
    error = dated["error_images"].abs()
    content["n_dated"] = len(dated)
    content["landing_error_median_images"] = tables.number_or_none(error.median())
    content["landing_within_2_images"] = tables.number_or_none((error <= NEAR_IMAGES).mean())
    content["landing_interval_coverage"] = tables.number_or_none(dated["within_interval"].mean())

    # Blobs of the catalogue that landed among the images
    content["n_cases"] = len(cases)
    content["cases_found_alone"] = int((cases["n_images"] == 1).sum())
    content["cases_found_together"] = int((cases["n_images"] > 1).sum())
    return content


def half_level(snr: pd.Series[float], share: pd.Series[float]) -> float | None:
    """Return the S/N at which half of the blobs are found, linear between those that were tried; None outside."""
    order = np.argsort(snr.to_numpy(float))
    rising = np.maximum.accumulate(share.to_numpy(float)[order])
    levels = snr.to_numpy(float)[order]
    above = np.flatnonzero(rising >= 0.5)
    if not len(above) or above[0] == 0:
        return None
    k = int(above[0])
    part_way = (0.5 - rising[k - 1]) / (rising[k] - rising[k - 1])
    return round(float(levels[k - 1] + part_way * (levels[k] - levels[k - 1])), 3)


def choose_margins(alarms: pd.DataFrame, single: float, allowed: float) -> list[float]:
    """Choose the margins of the depths, so that all of them together raise so many false alarms on these images.

    Each depth gets the same share; what several depths show at one place counts once.

    Parameters
    ----------
    alarms : DataFrame
        From `alarms_table`.
    single : float
        Threshold of one image (score).
    allowed : float
        Count; may be a fraction.

    Returns
    -------
    list of float
        Log-odds above that of ``single``, for each of `deep.DEPTHS`.
    """
    persistent = alarms[(alarms["n_images"] > 1) & (alarms["persistent"] == 1)]
    persistent = persistent.sort_values("score", ascending=False)
    places = {
        depth: without_repeats(persistent[persistent["n_images"] == depth], NEAR_PX)
        for depth in DEPTHS
    }
    n_each = sum(len(part) for part in places.values())
    n_together = len(without_repeats(pd.concat(places.values()), NEAR_PX))
    share = allowed / len(DEPTHS) * n_each / max(n_together, 1)
    levels = [tail_threshold(places[depth]["score"].to_numpy(), share) for depth in DEPTHS]
    margins = logit(np.array(levels)) - logit(np.array(single))
    return [round(float(margin), 2) for margin in margins]
