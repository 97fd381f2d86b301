"""Search images for new blobs: FITS files in, tables and pictures out (ISR 6, the daily routine)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd
from tqdm import tqdm

from blobpipe.core import files, fits_images, plotting, tables
from blobpipe.core.arrays import FloatArray, Image
from blobpipe.core.dates import Exposure, exposure_of, is_same_exposure
from blobpipe.detection.detectors import DenseDetector, load_detector
from blobpipe.detection.fit import DETECTION_COLUMNS
from blobpipe.detection.match import mark_seen_again
from blobpipe.detection.search import Observation, observe, subframe_scores
from blobpipe.errors import BlobpipeError, FrameError, internal_fault
from blobpipe.images import tiles
from blobpipe.images.bad_pixels import BadPixels, read_bad_pixels
from blobpipe.images.difference import subtract
from blobpipe.images.noise import require_noise, require_noise_of_rms_map
from blobpipe.images.register import NO_SHIFT
from blobpipe.images.template import Template, read_template
from blobpipe.networks import dense, kernels, model_file, report_network, saliency
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
)
SUBFRAME_COLUMNS = ("frame", "row", "col", "x0_px", "y0_px", "probability", "is_blob")
PLACE_COLUMNS = ("frame", "x_px", "y_px", "probability", "status")

# Further columns of a detection of the dense network
FIT_COLUMNS = (
    *(name for name in DETECTION_COLUMNS if name not in PLACE_COLUMNS),
    *("radius_ratio", "reason"),
)

# Side of the picture of a detection (px)
SIDE_PX = 128


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
    exposures: list[Exposure] = field(default_factory=list)
    frames: list[dict[str, Any]] = field(default_factory=list)
    subframes: list[dict[str, Any]] = field(default_factory=list)
    detections: list[dict[str, Any]] = field(default_factory=list)

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
        """Return the columns that say by which model and with which bad pixels an image was searched."""
        return {
            "model_sha256": self.model_sha256,
            "n_bad_px": n_bad_px,
            "bad_pixels_sha256": " ".join(file.sha256 for file in self.bad_pixels.files),
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

    Returns
    -------
    int
        0, or 1 if an image was rejected.

    Raises
    ------
    ModelError, FrameError
        If the model, the stack or a file of bad pixels cannot be used, or two images have the same name.
    """
    _require_distinct_names(paths)
    # Each worker thread searches whole images: more threads would only wait for each other
    kernels.set_threads(1)

    # Read everything that the options name before the first image is searched
    known = None
    if catalogue is not None:
        known = tables.read_known(catalogue, ("x_px", "y_px", "radius_px"))
    bad = read_bad_pixels(params.bad_pixels, bad_pixels)
    template = None if difference else _read_template(reference, known, bad)
    search = _choose_search(model, params)
    log.info("model: %s", model_file.described(model))
    preparation = Preparation(template, known, bad, params)
    found = ScanTables(files.sha256(model), bad)

    # Search in threads, record in the order of the list
    for path, result in _search_ahead(paths, preparation, search, params.train.threads):
        if isinstance(result, BlobpipeError):
            log.warning("blobpipe: %s (rejected)", " ".join(str(result).split()))
            found.add_rejected(path, str(result))
        else:
            search.record(result, found, out_dir)

    found.mark_seen_again()
    found.write(out_dir)
    log.info(
        "images scanned: %d, detections: %d, in %s", len(paths), len(found.detections), out_dir
    )
    return int(any(row["status"] == "rejected" for row in found.frames))


def _require_distinct_names(paths: Sequence[Path]) -> None:
    """Refuse two images of one name."""
    names = [fits_images.frame_name(path) for path in paths]
    for name in names:
        if names.count(name) > 1:
            raise FrameError(
                f"{name}: two images of this name; the tables could not tell them apart; rename one"
            )


def _read_template(
    reference: Path | None, catalogue: pd.DataFrame | None, bad_pixels: BadPixels
) -> Template:
    """Read the named median stack, or the one that the pipeline has made."""
    path = reference or Path("data/difference/reference.fits.fz")
    if not path.exists():
        raise FrameError(
            f"{path}: not found; name a median stack (--reference STACK) or say --difference"
        )
    return read_template(path, catalogue, bad_pixels)


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
    """

    template: Template | None
    catalogue: pd.DataFrame | None
    bad_pixels: BadPixels
    params: Params

    def prepare(self, path: Path) -> PreparedImage:
        """Read an image, subtract the template unless the image is a difference, clip and scale."""
        bad = self.bad_pixels
        frame = bad.blank(fits_images.read_frame(path), path)
        noise = fits_images.require_usable(frame, path)
        if self.template is None:
            data = frame.data
            template = Template(rms=bad.blank_cells(fits_images.find_plane(path, "SCATTER")))
            require_noise_of_rms_map(data, template.rms, path)
            shift = NO_SHIFT
        else:
            template = self.template
            expected = template.expected_noise()
            assert expected is not None
            require_noise(noise, expected, path)
            data, shift = subtract(frame.data, template, self.params.difference)

        # The network sees the difference whitened, clipped and scaled; the fit sees it whitened
        observation = observe(data, template, catalogue=self.catalogue, shift_px=shift)
        scaled = observation.scaled(self.params.clip, self.params.scale)
        return PreparedImage(exposure_of(frame, path), observation, scaled, bad.count(frame))


# --------------------------------------------------------------------------------------------------------- search


class ImageSearch(Protocol):
    """Search of one image by one kind of network."""

    def search_image(self, image: PreparedImage) -> Any:
        """Search an image; called in several threads."""

    def record(self, result: Any, found: ScanTables, out_dir: Path) -> None:
        """Add a result of `search_image` to the tables and draw its detections; called in order."""


def _choose_search(model: Path, params: Params) -> ImageSearch:
    """Choose the search for the network that the model file holds."""
    detector = load_detector(model)
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
        candidates = image.observation.find_blobs(
            self.detector, peaks=self.detector.peaks(response), vetting=self.vetting
        )
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
        f"depth {100 * row['depth_frac']:.2f} +- {100 * row['depth_err_frac']:.2f} %, "
        f"radius {row['radius_px']:.1f} px, S/N {row['snr']:.1f}"
    )
    plotting.draw_detection(
        out_dir / f"{image.name}_x{round(x)}y{round(y)}.png",
        square,
        cells.repeat(stride, 0).repeat(stride, 1),
        (x0, y0),
        (x - x0, y - y0),
        title,
        map_name="probability",
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
            plotting.draw_detection(
                out_dir / f"{image.name}_r{row}c{col}.png",
                subframes[k],
                maps[k],
                (x0, y0),
                (x, y),
                f"{image.name}, subframe row {row}, column {col}: probability {probability:.3f}",
            )
