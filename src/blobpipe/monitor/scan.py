"""Search images for new blobs: FITS files in, tables and pictures out (ISR 6, the daily routine).

`calibrate` searches quiet images in the same way, to set the threshold.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd
from tqdm import tqdm

from blobpipe import __version__
from blobpipe.core import files, fits_images, tables
from blobpipe.core.arrays import FloatArray, Image
from blobpipe.core.dates import Exposure, exposure_of, format_mjd, is_same_exposure
from blobpipe.core.detector import Detector, read_detector
from blobpipe.detection.detectors import (
    DenseDetector,
    ReportDetector,
    load_dense_detector,
    load_detector,
)
from blobpipe.detection.fit import DETECTION_COLUMNS
from blobpipe.detection.match import KNOWN_PX, mark_seen_again, near_blobs, without_repeats
from blobpipe.detection.operating_point import CANDIDATE
from blobpipe.detection.promise import (
    OTHER_BAD_PIXELS,
    PromisedPoint,
    apply_promised_point,
    promise_threshold,
    write_promised_point,
)
from blobpipe.detection.search import Observation, observe, subframe_scores
from blobpipe.errors import BlobpipeError, FrameError, LogError, ModelError, internal_fault
from blobpipe.images import tiles
from blobpipe.images.bad_pixels import BadPixels, read_bad_pixels
from blobpipe.images.difference import subtract
from blobpipe.images.listing import list_images
from blobpipe.images.register import NO_SHIFT
from blobpipe.images.template import Template, read_template
from blobpipe.monitor import logbook, pictures
from blobpipe.monitor.inbox import refuse_difference, require_short_name
from blobpipe.networks import dense, kernels, model_file, report_network, saliency
from blobpipe.noise.level import require_noise, require_noise_of_rms_map
from blobpipe.params import Params, Vetting
from blobpipe.simulation import render

log = logging.getLogger(__name__)

# Images that are being searched, or wait to be recorded
READ_AHEAD = 4

# Numba's threading layer cannot be entered by two threads at once on every machine
STANDARDISING = Lock()

FRAME_COLUMNS = (
    "frame",
    "status",
    "reason",
    "shift_x_px",
    "shift_y_px",
    "noise_frac",
    "n_positive",
    "model_sha256",
    "n_bad_px",
    "bad_pixels_sha256",
    "operating_point_sha256",
)
SUBFRAME_COLUMNS = ("frame", "row", "col", "x0_px", "y0_px", "probability", "is_blob")
PLACE_COLUMNS = ("frame", "x_px", "y_px", "probability", "status")

# Further columns of a detection of the dense network
FIT_COLUMNS = (
    *(name for name in DETECTION_COLUMNS if name not in PLACE_COLUMNS),
    *("radius_ratio", "line_snr", "reason"),
)

# Statuses of a detection, and what the last line of a scan calls them
STATUSES = {
    "new": "new",
    "seen_again": "new and seen again",
    "known": "known",
    "dip": "on dips",
    "bad_pixels": "on bad pixels",
}

# Side of the picture of a detection (px)
SIDE_PX = 128

# Images that show a false peak at one place, from which it is said to be a blob perhaps; most places that are named
MIN_REPEATS = 3
MOST_NAMED = 5

# New detections on a difference image, beyond which it is probably none (count)
MOST_NEW = 20


@dataclass(frozen=True)
class PreparedImage:
    """An image ready for a detector.

    Attributes
    ----------
    exposure : Exposure
    observation : Observation
        The difference image, and what is known of it.
    scaled : ndarray, shape (ny, nx), float32
        The difference image, clipped and scaled (sigma).
    n_bad_px : int
        Number of its bad pixels, by the files and its own DQ.
    """

    exposure: Exposure
    observation: Observation
    scaled: Image
    n_bad_px: int = 0

    @property
    def name(self) -> str:
        """Return the file name without its suffix."""
        return self.exposure.name


@dataclass
class ScanTables:
    """Rows of the three tables of a scan, and the exposure of each searched image, in order."""

    model_sha256: str
    bad_pixels: BadPixels
    operating_point_sha256: str = ""
    exposures: list[Exposure] = field(default_factory=list)
    frames: list[dict[str, Any]] = field(default_factory=list)
    subframes: list[dict[str, Any]] = field(default_factory=list)
    detections: list[dict[str, Any]] = field(default_factory=list)

    def count(self) -> str:
        """Say how many detections there are of each status, new ones first, even if there are none."""
        statuses = Counter(str(row["status"]) for row in self.detections)
        numbers = [
            f"{statuses[status]} {word}"
            for status, word in STATUSES.items()
            if statuses[status] or status == "new"
        ]
        return ", ".join(numbers)

    def n_new(self, frame: str) -> int:
        """Return the number of new detections on an image."""
        return sum(row["frame"] == frame and row["status"] == "new" for row in self.detections)

    def made(self) -> str:
        """Say what the folder of a scan holds: pictures are drawn of new detections only."""
        is_drawn = any(row["status"] in ("new", "seen_again") for row in self.detections)
        return "tables and pictures" if is_drawn else "tables"

    def add_rejected(self, path: Path, reason: str) -> None:
        """Add the row of an image that cannot be used."""
        self.frames.append(
            {
                "frame": fits_images.frame_name(path),
                "status": "rejected",
                "reason": reason,
                "shift_x_px": np.nan,
                "shift_y_px": np.nan,
                "noise_frac": np.nan,
                "n_positive": 0,
                **self._provenance(0),
            }
        )

    def add_searched(
        self, image: PreparedImage, probability: FloatArray, positive: npt.NDArray[np.bool_]
    ) -> None:
        """Add the row of a searched image and those of its subframes, in the order of `tiles.origins`."""
        self.exposures.append(image.exposure)
        origins = tiles.origins(image.scaled.shape)
        for (row, col, x0, y0), p, is_blob in zip(origins, probability, positive, strict=True):
            self.subframes.append(
                {
                    "frame": image.name,
                    "row": row,
                    "col": col,
                    "x0_px": x0,
                    "y0_px": y0,
                    "probability": p,
                    "is_blob": int(is_blob),
                }
            )
        shift_x, shift_y = image.observation.shift_px
        self.frames.append(
            {
                "frame": image.name,
                "status": "ok",
                "reason": "",
                "shift_x_px": shift_x,
                "shift_y_px": shift_y,
                "noise_frac": image.observation.noise_frac,
                "n_positive": int(positive.sum()),
                **self._provenance(image.n_bad_px),
            }
        )

    def _provenance(self, n_bad_px: int) -> dict[str, Any]:
        """Return the columns that say by which model, threshold and bad pixels an image was searched."""
        return {
            "model_sha256": self.model_sha256,
            "n_bad_px": n_bad_px,
            "bad_pixels_sha256": _sha256_of(self.bad_pixels),
            "operating_point_sha256": self.operating_point_sha256,
        }

    def mark_seen_again(self) -> None:
        """Mark the detections that the next image of another exposure shows again."""
        # The report's network has no scores: its detections are not compared
        if not self.detections or "score" not in self.detections[0]:
            return
        table = pd.DataFrame(self.detections)
        parts = [table[table["frame"] == exposure.name] for exposure in self.exposures]
        marked = []
        for i, exposure in enumerate(self.exposures):
            later = range(i + 1, len(parts))
            others = (k for k in later if not is_same_exposure(exposure, self.exposures[k]))
            following = next(others, None)
            if following is None:
                marked.append(parts[i])
            else:
                marked.append(mark_seen_again(parts[i], parts[following]))
        self.detections = [dict(row) for _, row in pd.concat(marked).iterrows()]

    def write(self, out_dir: Path) -> None:
        """Write ``frames.csv``, ``subframes.csv`` and ``detections.csv``."""
        for name, rows, columns in (
            ("frames", self.frames, FRAME_COLUMNS),
            ("subframes", self.subframes, SUBFRAME_COLUMNS),
            ("detections", self.detections, (*PLACE_COLUMNS, *FIT_COLUMNS)),
        ):
            table = pd.DataFrame(rows, columns=list(columns))
            tables.write_table(out_dir / f"{name}.csv", table)


def scan(
    paths: Sequence[Path],
    out_dir: Path,
    model: Path,
    params: Params,
    *,
    difference: bool = False,
    reference: Path | None = None,
    catalogue: Path | None = None,
    bad_pixels: Sequence[Path] = (),
    operating_point: Path | None = None,
) -> int:
    """Scan images and write ``frames.csv``, ``subframes.csv``, ``detections.csv`` and a picture per detection.

    With the dense network, detections are measured and vetted, and one that the next exposure shows too is
    ``seen_again``. With the report's, each positive subframe is one detection, at the highest point of its saliency map.
    An image that cannot be used is rejected, with its reason in ``frames.csv``; the others are searched.

    Parameters
    ----------
    paths : sequence of path
        Blob images, or difference images if ``difference``.
    out_dir : path
        Written to; tables are replaced.
    model : path
        Trained model.
    params : Params
        Sections bad_pixels, difference, clip, scale, vetting, train.threads and evaluate.threshold are used.
    reference : path, optional
        Median stack to subtract; without it that of the pipeline.
    catalogue : path, optional
        Known blobs: a table with x_px, y_px, radius_px. For the dense network.
    bad_pixels : sequence of path
        Files of bad pixels, besides those of the settings.
    operating_point : path, optional
        From `calibrate`; its threshold replaces the model's.

    Returns
    -------
    int
        0, or 1 if an image was rejected.

    Raises
    ------
    ModelError, ParamsError, FrameError
        If the model, the operating point, the stack or a file of bad pixels cannot be used, two images have the same
        name, or no image is there.
    """
    _require_files(paths)
    # Each worker thread searches whole images: more threads would only wait for each other
    kernels.set_threads(1)

    # Read everything that the options name before the first image is searched
    preparation = _read_preparation(params, difference, reference, catalogue, bad_pixels)
    detector = load_detector(model)
    log.info("model: %s", model_file.described(model))
    if not difference:
        log.info("stack: %s", _stack_path(reference))
    point_sha256 = ""
    if operating_point is not None:
        detector = _apply_point(detector, model, operating_point, preparation.bad_pixels)
        point_sha256 = files.sha256(operating_point)
    search = _choose_search(detector, params)
    found = ScanTables(files.sha256(model), preparation.bad_pixels, point_sha256)

    # Search in threads, record in the order of the list
    for path, result in _search_ahead(paths, preparation, search, params.train.threads):
        if isinstance(result, BlobpipeError):
            log.warning("blobpipe: %s (rejected)", " ".join(str(result).split()))
            found.add_rejected(path, str(result))
        else:
            search.record(result, found, out_dir)
            n_new = found.n_new(fits_images.frame_name(path)) if difference else 0
            if n_new > MOST_NEW:
                log.warning(
                    "blobpipe: %s: found %d new blobs, expected a few; if it is no difference, leave out --difference",
                    path,
                    n_new,
                )

    found.mark_seen_again()
    found.write(out_dir)
    log.info("images scanned: %d; %s; %s in %s", len(paths), found.count(), found.made(), out_dir)
    return int(any(row["status"] == "rejected" for row in found.frames))


def _require_files(paths: Sequence[Path]) -> None:
    """Refuse a folder, two images of one name, and a list of which nothing is there."""
    for path in paths:
        if path.is_dir():
            raise FrameError(f"{path}: a folder, expected images; name its files: {path}/*.fits*")
    # A mistyped name must not replace the tables of the last scan
    if not any(path.exists() for path in paths):
        raise FrameError(f"{paths[0]}: not found, expected a FITS image; correct the name")
    names = [fits_images.frame_name(path) for path in paths]
    for name in names:
        if names.count(name) > 1:
            raise FrameError(
                f"{name}: two images of this name; the tables could not tell them apart; rename one"
            )


def _read_preparation(
    params: Params,
    difference: bool,
    reference: Path | None,
    catalogue: Path | None,
    bad_pixels: Sequence[Path],
) -> Preparation:
    """Read the known blobs, the bad pixels and the template."""
    instrument = read_detector(params.detector)
    known = None
    if catalogue is not None:
        known = tables.read_known(catalogue, ("x_px", "y_px", "radius_px"), instrument)
    bad = read_bad_pixels(params.bad_pixels, bad_pixels, instrument)
    template = None if difference else _read_template(reference, known, bad, instrument)
    return Preparation(template, known, bad, params, instrument)


def _apply_point(
    detector: DenseDetector | ReportDetector, model: Path, path: Path, bad_pixels: BadPixels
) -> DenseDetector:
    """Give a detector the threshold of a file; say what it promises, and whether that was with other bad pixels."""
    if not isinstance(detector, DenseDetector):
        raise ModelError(
            f"{path}: found an operating point for the report's network, expected the dense one; name its --model"
        )
    detector, point = apply_promised_point(detector, model, path)
    log.info("operating point: %s, %s", path, point.describe())
    if point.bad_pixels_sha256 != _sha256_of(bad_pixels):
        log.warning("blobpipe: %s: %s", path, OTHER_BAD_PIXELS)
    return detector


def _sha256_of(bad_pixels: BadPixels) -> str:
    """Return the SHA-256 of each file of bad pixels, separated by blanks."""
    return " ".join(file.sha256 for file in bad_pixels.files)


def _stack_path(reference: Path | None) -> Path:
    """Return the named median stack, or the one that the pipeline has made."""
    return reference or Path("data/difference/reference.fits.fz")


def _read_template(
    reference: Path | None,
    catalogue: pd.DataFrame | None,
    bad_pixels: BadPixels,
    instrument: Detector,
) -> Template:
    """Read the stack that is subtracted."""
    path = _stack_path(reference)
    if not path.exists():
        raise FrameError(
            f"{path}: not found; name a median stack (--reference STACK) or give --difference"
        )
    return read_template(path, catalogue, bad_pixels, instrument)


@dataclass(frozen=True)
class Preparation:
    """What turns a file into an image ready for a detector.

    Attributes
    ----------
    template : Template or None
        What is subtracted; None if the images are differences already.
    catalogue : DataFrame or None
        Known blobs.
    bad_pixels : BadPixels
        Pixels that get no value.
    params : Params
    instrument : Detector
        Whose images they are.
    """

    template: Template | None
    catalogue: pd.DataFrame | None
    bad_pixels: BadPixels
    params: Params
    instrument: Detector

    def prepare(self, path: Path) -> PreparedImage:
        """Read an image, subtract the template unless the image is a difference, clip and scale."""
        require_short_name(path)
        bad = self.bad_pixels
        frame = bad.blank(fits_images.read_frame(path, self.instrument), path)
        noise = fits_images.require_usable(frame, path)
        if self.template is None:
            data = frame.data
            template = Template(rms=bad.blank_cells(fits_images.find_plane(path, "SCATTER")))
            require_noise_of_rms_map(data, template.rms, path)
            shift = NO_SHIFT
        else:
            template = self.template
            refuse_difference(frame, path)
            if _is_same(frame.data, template.stack):
                raise FrameError(
                    f"{path}: found the pixels of the stack that is subtracted, expected another image; leave it out, or "
                    "name a stack of other images with --reference"
                )
            expected = template.expected_noise()
            assert expected is not None
            require_noise(noise, expected, path)
            data, shift = subtract(frame.data, template, self.params.difference, self.instrument)

        # The network sees the difference whitened, clipped and scaled; the fit sees it whitened
        observation = observe(
            data,
            template,
            catalogue=self.catalogue,
            shift_px=shift,
            instrument=self.instrument,
        )
        scaled = observation.scaled(self.params.clip, self.params.scale)
        return PreparedImage(
            exposure_of(frame, path, self.instrument), observation, scaled, bad.count(frame)
        )


# --------------------------------------------------------------------------------------------------------- search


class ImageSearch(Protocol):
    """Search of one image by one kind of network."""

    def search_image(self, image: PreparedImage) -> Any:
        """Search an image; called in several threads."""

    def record(self, result: Any, found: ScanTables, out_dir: Path) -> None:
        """Add a result of `search_image` to the tables and draw its detections; called in order."""


def _choose_search(detector: DenseDetector | ReportDetector, params: Params) -> ImageSearch:
    """Choose the search for the network of a detector."""
    if isinstance(detector, DenseDetector):
        return DenseSearch(detector, params.vetting)
    return ReportSearch(detector.network, params.evaluate.threshold)


def _search_ahead(
    paths: Sequence[Path], preparation: Preparation, search: ImageSearch, threads: int
) -> Iterator[tuple[Path, Any]]:
    """Yield each path with its result or error, in order.

    Images are searched in threads, a few ahead, so that memory does not grow with their number.
    """

    def search_file(path: Path) -> Any:
        """Return the result of an image, or the error that rejects it."""
        try:
            return search.search_image(preparation.prepare(path))
        except BlobpipeError as error:
            return error
        except (OSError, MemoryError):
            raise
        except Exception as error:  # a bug that one image triggers must not end the scan
            log.debug("internal fault", exc_info=error)
            return FrameError(f"{path}: {internal_fault(error)}")

    with ThreadPoolExecutor(threads, "scan", kernels.set_threads, (1,)) as pool:
        waiting = [(path, pool.submit(search_file, path)) for path in paths[:READ_AHEAD]]
        for i, _ in enumerate(tqdm(paths, "scan", unit="frame", disable=None)):
            path, future = waiting.pop(0)
            if i + READ_AHEAD < len(paths):
                ahead = paths[i + READ_AHEAD]
                waiting.append((ahead, pool.submit(search_file, ahead)))
            yield path, future.result()


def _is_same(image: Image, stack: Image | None) -> bool:
    """Return whether an image is the stack itself, by some of its rows: from itself nothing would be left of it."""
    return stack is not None and np.array_equal(image[::64], stack[::64], equal_nan=True)


@dataclass(frozen=True)
class DenseResult:
    """An image, the dense network's probability map of it, and all vetted candidates."""

    image: PreparedImage
    response: Image
    candidates: pd.DataFrame


@dataclass(frozen=True)
class DenseSearch:
    """Search by the dense network: every candidate is measured and vetted."""

    detector: DenseDetector
    vetting: Vetting

    def search_image(self, image: PreparedImage) -> DenseResult:
        """Find the candidates of an image."""
        response = self.detector.respond(image.scaled)
        peaks = self.detector.peaks(response, image.scaled)
        candidates = image.observation.find_blobs(self.detector, peaks=peaks, vetting=self.vetting)
        return DenseResult(image, response, candidates)

    def record(self, result: DenseResult, found: ScanTables, out_dir: Path) -> None:
        """Record detections and subframes, and draw each new detection."""
        image = result.image
        candidates = result.candidates
        threshold = self.detector.threshold

        # Detections are the candidates that reach the threshold
        detections = candidates[candidates["score"] >= threshold].assign(frame=image.name)
        found.detections += [dict(row) for _, row in detections.iterrows()]

        # A subframe is as probable as its best candidate
        highest = subframe_scores(candidates, image.scaled.shape)
        found.add_searched(image, self.detector.probability(highest), highest >= threshold)

        for row in detections.query("status == 'new'").to_dict("records"):
            _draw_detection(image, result.response, row, out_dir)


def _draw_detection(
    image: PreparedImage, response: Image, row: dict[Any, Any], out_dir: Path
) -> None:
    """Draw the surroundings of a detection, and the network's map of them."""
    x = row["x_px"]
    y = row["y_px"]

    # A square inside the image that begins at a cell of the map
    ny, nx = image.scaled.shape
    x0 = _first_pixel(x, nx)
    y0 = _first_pixel(y, ny)
    square = image.scaled[y0 : y0 + SIDE_PX, x0 : x0 + SIDE_PX]
    stride = dense.STRIDE
    cells = response[
        y0 // stride : (y0 + SIDE_PX) // stride, x0 // stride : (x0 + SIDE_PX) // stride
    ]

    title = (
        f"{image.name}: probability {row['probability']:.3f}, "
        f"depth {100 * row['depth_frac']:.2f} ± {100 * row['depth_err_frac']:.2f} %, "
        f"radius {row['radius_px']:.1f} px, S/N {row['snr']:.1f}"
    )
    pictures.draw_detection(
        out_dir / f"{image.name}_x{round(x)}y{round(y)}.png",
        square,
        cells.repeat(stride, 0).repeat(stride, 1),
        (x0, y0),
        (x - x0, y - y0),
        title,
        map_name="probability",
        limits=(0, 1),
        radius_px=row["radius_px"],
    )


def _first_pixel(centre: float, length: int) -> int:
    """Return where the picture of a detection begins along an axis of an image."""
    first = int(np.clip(round(centre) - SIDE_PX // 2, 0, length - SIDE_PX))
    return first // dense.STRIDE * dense.STRIDE


@dataclass(frozen=True)
class ReportResult:
    """An image, its standardised subframes, and their probabilities from the report's network."""

    image: PreparedImage
    subframes: Image
    probability: FloatArray


@dataclass(frozen=True)
class ReportSearch:
    """Search by the report's network: every subframe has one probability."""

    network: report_network.ReportNetwork
    threshold: float

    def search_image(self, image: PreparedImage) -> ReportResult:
        """Compute the probability of each subframe of an image."""
        subframes, _ = tiles.tile(image.scaled)
        with STANDARDISING:
            render.standardise(subframes)
        return ReportResult(image, subframes, report_network.predict(self.network, subframes))

    def record(self, result: ReportResult, found: ScanTables, out_dir: Path) -> None:
        """Record subframes, and locate a detection in each positive one by its saliency map."""
        image = result.image
        positive = result.probability >= self.threshold
        found.add_searched(image, result.probability, positive)
        if not positive.any():
            return

        subframes = result.subframes[positive]
        origins = tiles.origins(image.scaled.shape)[positive]
        maps = saliency.saliency_maps(self.network, subframes)
        for k, (x, y) in enumerate(saliency.peaks(maps)):
            row, col, x0, y0 = origins[k]
            probability = result.probability[positive][k]
            found.detections.append(
                {
                    "frame": image.name,
                    "x_px": x0 + x,
                    "y_px": y0 + y,
                    "probability": probability,
                    "status": "new",
                }
            )
            pictures.draw_detection(
                out_dir / f"{image.name}_r{row}c{col}.png",
                subframes[k],
                maps[k],
                (x0, y0),
                (x, y),
                f"{image.name}, subframe row {row}, column {col}: probability {probability:.3f}",
            )


# ---------------------------------------------------------------------------------------------------- calibration


def calibrate(
    paths: Sequence[Path],
    out: Path,
    model: Path,
    params: Params,
    *,
    budget: float,
    confidence: float,
    difference: bool = False,
    reference: Path | None = None,
    catalogue: Path | None = None,
    bad_pixels: Sequence[Path] = (),
) -> PromisedPoint:
    """Set the threshold at which quiet images keep a budget of false alarms, and write it as YAML.

    Every candidate that `scan` would report as new counts as a false peak, whatever its score. An image that cannot be
    used is left out with a warning, and so is a second version of one exposure.

    Parameters
    ----------
    paths : sequence of path
        Images without a new blob, as for `scan`, or folders of them.
    out : path
        File that is written.
    model : path
        Dense network.
    params, difference, reference, catalogue, bad_pixels
        As for `scan`.
    budget : float
        Accepted false alarms per 100 images (count).
    confidence : float
        One-sided (0 to 1).

    Raises
    ------
    ModelError, FrameError, TableError
        If an input cannot be used, or no image is left.
    """
    kernels.set_threads(1)
    detector = _load_dense(model)
    preparation = _read_preparation(params, difference, reference, catalogue, bad_pixels)
    search = DenseSearch(detector, params.vetting)

    # Search as `scan` does, and keep what may be new
    exposures: list[Exposure] = []
    peaks: list[pd.DataFrame] = []
    for path, result in _search_ahead(
        _named_images(paths), preparation, search, params.train.threads
    ):
        if isinstance(result, BlobpipeError):
            log.warning("blobpipe: %s (left out)", " ".join(str(result).split()))
            continue
        exposure = result.image.exposure
        if any(is_same_exposure(exposure, other) for other in exposures):
            log.warning("blobpipe: %s: another version of an exposure (left out)", path)
            continue
        exposures.append(exposure)
        found = result.candidates
        is_false = (found["status"] == "new") & (found["score"] >= CANDIDATE)
        peaks.append(found.loc[is_false, ["x_px", "y_px", "score"]])

    subtracted = "difference"
    if not difference:
        subtracted = files.sha256(_stack_path(reference))
    return _write_promise(
        out,
        peaks,
        [exposure.mjd for exposure in exposures],
        (budget, confidence),
        model_sha256=files.sha256(model),
        bad_pixels_sha256=_sha256_of(preparation.bad_pixels),
        subtracted=subtracted,
    )


def calibrate_log(
    log_path: Path, out: Path, model: Path, *, budget: float, confidence: float
) -> PromisedPoint:
    """Set the threshold as `calibrate` does, from the images that `quicklook` has searched.

    The images are those of the log that were searched with this model and, of these, with the bad pixels of the latest
    run. Candidates that a second image or a reviewer has confirmed are left out; those that nobody has decided count as
    false.

    Raises
    ------
    LogError
        If the log cannot be read, or holds no such image.
    """
    _load_dense(model)
    model_sha256 = files.sha256(model)
    with closing(logbook.connect(log_path)) as connection:
        images = _quiet_images(connection, model_sha256)
        found = _false_peaks_of_log(connection)
    if images.empty:
        raise LogError(
            f"{log_path}: found no searched image of the model {model_sha256[:12]} with its peaks, which logs keep from "
            "version 4 on; run 'blobpipe quicklook' on more images, or name a folder of images instead of --log"
        )

    latest = images.iloc[-1]
    return _write_promise(
        out,
        [found[found["image"] == image] for image in images["id"]],
        images["mjd"].tolist(),
        (budget, confidence),
        model_sha256=model_sha256,
        bad_pixels_sha256=_sha256_in_log(latest["bad_pixels"]),
        subtracted="difference" if latest["kind"] == "difference" else "running stack",
    )


def _named_images(paths: Sequence[Path]) -> list[Path]:
    """List image files: those that are named, and those in the folders that are named, by name.

    Raises
    ------
    FrameError
        If a folder holds no image.
    """
    listed: list[Path] = []
    for path in paths:
        if not path.is_dir():
            listed.append(path)
            continue
        inside = list_images(path)
        if not inside:
            raise FrameError(
                f"{path}: found no image, expected {', '.join(fits_images.SUFFIXES)}; name another folder"
            )
        listed += inside
    return listed


def _load_dense(model: Path) -> DenseDetector:
    """Load the dense network; refuse the report's, whose threshold is a setting."""
    if model_file.kind_of_model(model) != "dense":
        raise ModelError(
            f"{model}: the report's network, expected the dense one, which has an operating point; name its --model"
        )
    return load_dense_detector(model)


def _quiet_images(connection: logbook.Log, model_sha256: str) -> pd.DataFrame:
    """Read the images that were searched by a model as the latest of them was: of its kind, with its bad pixels."""
    rows = connection.execute(
        "SELECT i.id, i.kind, i.mjd, r.bad_pixels FROM images i JOIN runs r ON r.id = i.run "
        "WHERE i.outcome = 'searched' AND i.superseded_by IS NULL AND i.n_peaks IS NOT NULL AND r.model_sha256 = ? "
        "ORDER BY i.id",
        (model_sha256,),
    ).fetchall()
    images = pd.DataFrame(map(tuple, rows), columns=["id", "kind", "mjd", "bad_pixels"])
    if images.empty:
        return images
    masks = images["bad_pixels"].map(_sha256_in_log)
    is_alike = (masks == masks.iloc[-1]) & (images["kind"] == images["kind"].iloc[-1])
    return images.loc[np.flatnonzero(is_alike)]


def _sha256_in_log(bad_pixels: str) -> str:
    """Return the SHA-256 of each file of bad pixels of a run, separated by blanks."""
    return " ".join(file["sha256"] for file in json.loads(bad_pixels))


def _false_peaks_of_log(connection: logbook.Log) -> pd.DataFrame:
    """Read the peaks of all images, without those at the place of a blob."""
    peaks = logbook.table(connection, "peaks")
    candidates = logbook.table(connection, "candidate_list").fillna({"radius_px": 0})
    blobs = candidates.query(
        "decision == 'confirmed' or status == 'seen_again' and decision != 'rejected'"
    )
    undecided = candidates.query("status == 'new' and decision in ('', 'unsure')")
    if len(undecided):
        log.info(
            "%d candidates are undecided: they count as false; review them first", len(undecided)
        )
    is_blob = near_blobs(peaks, blobs).any(axis=1)
    return peaks.loc[np.flatnonzero(~is_blob)]


def _write_promise(
    out: Path,
    peaks: list[pd.DataFrame],
    dates_mjd: list[float],
    asked: tuple[float, float],
    **provenance: str,
) -> PromisedPoint:
    """Find the threshold that keeps the budget on the false peaks of images, write it, and say what it promises."""
    budget, confidence = asked
    scores = [found["score"].to_numpy(float) for found in peaks]
    promise = promise_threshold(scores, budget / 100, confidence)

    # Rounded up, so that the file promises no more than was found, but not beyond a budget that is kept
    promised = math.ceil(promise.per_image * 1e4) / 100
    if 100 * promise.per_image <= budget:
        promised = min(promised, budget)
    days = sorted(day for day in map(format_mjd, dates_mjd) if day)
    point = PromisedPoint(
        threshold=promise.threshold,
        false_alarms_per_100_images=promised,
        budget_per_100_images=budget,
        confidence=confidence,
        n_images=len(peaks),
        n_alarms=promise.n_alarms,
        dispersion=round(promise.dispersion, 2),
        first_date=days[0] if days else "",
        last_date=days[-1] if days else "",
        version=__version__,
        **provenance,
    )
    write_promised_point(out, point)

    _name_repeats(peaks)
    if point.dispersion > 1:
        log.info(
            "false peaks come in groups: variance of their number per image %.2f times the mean, allowed for",
            point.dispersion,
        )
    log.info("%s: %s", out, point.describe())
    if point.shortfall():
        log.warning("blobpipe: %s", point.shortfall())
    return point


def _name_repeats(peaks: list[pd.DataFrame]) -> None:
    """Name the places that several images show among the highest false peaks: a blob is no false alarm."""
    joined = pd.concat([found.assign(number=i) for i, found in enumerate(peaks)])
    # Those that set the threshold are among one per image
    highest = joined.nlargest(len(peaks), "score")
    places = without_repeats(highest)
    named = 0
    for x, y in places[["x_px", "y_px"]].to_numpy(float):
        is_here = np.hypot(highest["x_px"] - x, highest["y_px"] - y) <= KNOWN_PX
        n_images = highest.loc[is_here, "number"].nunique()
        if n_images >= MIN_REPEATS and named < MOST_NAMED:
            named += 1
            log.warning(
                "blobpipe: x %.0f, y %.0f: a false peak on %d images; a blob belongs in --catalogue, a defect in "
                "--bad-pixels",
                x,
                y,
                n_images,
            )
