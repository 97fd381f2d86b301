"""Search images for new blobs: FITS files in, tables and pictures out (ISR 6, the daily routine)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from tqdm import tqdm

from blobpipe.core import files, fits_images, plotting, tables
from blobpipe.core.dates import Exposure, exposure_of, is_same_exposure
from blobpipe.detection.detectors import DenseDetector, load_detector
from blobpipe.detection.fit import DETECTION_COLUMNS
from blobpipe.detection.match import mark_seen_again
from blobpipe.detection.search import Observation, subframe_scores
from blobpipe.errors import BlobpipeError, FrameError, internal_fault
from blobpipe.images import tiles
from blobpipe.images.clip import clip_image
from blobpipe.images.difference import subtract
from blobpipe.images.noise import image_noise, require_noise, require_noise_of_rms_map
from blobpipe.images.register import NO_SHIFT
from blobpipe.images.scale import scale_image
from blobpipe.images.template import Template, read_template
from blobpipe.networks import dense, kernels, model_file, report_network, saliency
from blobpipe.params import Params, Vetting
from blobpipe.simulation import render

log = logging.getLogger(__name__)

READ_AHEAD = 4  # frames that are looked at, or wait to be told of
STANDARDISING = Lock()  # not every way that Numba runs threads can be asked by two at once

FRAME_COLUMNS = (
    "frame",
    "status",
    "reason",
    "shift_x_px",
    "shift_y_px",
    "noise_frac",
    "n_positive",
    "model_sha256",
)
SUBFRAME_COLUMNS = ("frame", "row", "col", "x0_px", "y0_px", "probability", "is_blob")
PLACE_COLUMNS = ("frame", "x_px", "y_px", "probability", "status")
# dense network
FIT_COLUMNS = tuple(name for name in DETECTION_COLUMNS if name not in PLACE_COLUMNS)
SIDE_PX = 128  # of the picture of a detection


@dataclass
class Found:
    """Rows of the three tables, their model, and the exposure of each image, in order."""

    model_sha256: str
    exposures: list[Exposure] = field(default_factory=list)
    frames: list[dict[str, Any]] = field(default_factory=list)
    subframes: list[dict[str, Any]] = field(default_factory=list)
    detections: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Prepared:
    """An image ready for a detector: its exposure, the observation, and that clipped and scaled."""

    exposure: Exposure
    observation: Observation
    scaled: npt.NDArray[np.float32]

    @property
    def name(self) -> str:
        """Of its file, without the suffix."""
        return self.exposure.name


def scan(
    paths: Sequence[Path],
    out_dir: Path,
    model: Path,
    params: Params,
    *,
    difference: bool = False,
    reference: Path | None = None,
    catalogue: Path | None = None,
) -> int:
    """Scan images and write ``frames.csv``, ``subframes.csv``, ``detections.csv`` and a picture per detection.

    With the dense network, detections are measured and judged, and one that the next exposure shows too is ``seen_again``. With
    the report's, each positive subframe is one detection, at the highest point of its saliency map. An image that cannot be used is rejected, with its reason in ``frames.csv``; the rest go on.

    Parameters
    ----------
    paths : sequence of path
        Blob images, or difference images if ``difference``.
    out_dir : path
        Written to; tables are replaced.
    model : path
        Trained model.
    params : Params
        Sections difference, clip, scale, train.threads and evaluate.threshold are used.
    reference : path, optional
        Median stack to subtract; without it that of the pipeline.
    catalogue : path, optional
        Known blobs: a table with x_px, y_px, radius_px. For the dense network.

    Returns
    -------
    int
        0, or 1 if an image was rejected.

    Raises
    ------
    ModelError, FrameError
        If the model or the stack cannot be used, or two images have the same name.
    """
    names = [fits_images.frame_name(path) for path in paths]
    for name in names:
        if names.count(name) > 1:
            raise FrameError(
                f"{name}: two images of this name; the tables could not tell them apart; rename one"
            )
    kernels.set_threads(1)  # whole frames share the cores: no thread waits for another
    known = (
        None if catalogue is None else tables.read_known(catalogue, ("x_px", "y_px", "radius_px"))
    )
    template = None if difference else _read_template(reference, known)
    search = _choose_search(model, params)
    log.info("model: %s", model_file.described(model))
    found = Found(files.sha256(model))
    for path, seen in _look_ahead(
        paths, partial(_prepare, template, known, params), search.look, params
    ):
        if isinstance(seen, BlobpipeError):
            log.warning("blobpipe: %s (rejected)", " ".join(str(seen).split()))
            row = (
                fits_images.frame_name(path),
                "rejected",
                str(seen),
                np.nan,
                np.nan,
                np.nan,
                0,
                found.model_sha256,
            )
            found.frames.append(dict(zip(FRAME_COLUMNS, row, strict=True)))
        else:
            search.tell(seen, out_dir, found)
    found.detections = _seen_again(found)
    for name, rows, columns in (
        ("frames", found.frames, FRAME_COLUMNS),
        ("subframes", found.subframes, SUBFRAME_COLUMNS),
        ("detections", found.detections, (*PLACE_COLUMNS, *FIT_COLUMNS)),
    ):
        tables.write_table(out_dir / f"{name}.csv", pd.DataFrame(rows, columns=list(columns)))
    log.info(
        "images scanned: %d, detections: %d, in %s", len(paths), len(found.detections), out_dir
    )
    return int(any(row["status"] == "rejected" for row in found.frames))


def _read_template(reference: Path | None, catalogue: pd.DataFrame | None) -> Template:
    path = reference or Path("data/difference/reference.fits.fz")
    if not path.exists():
        raise FrameError(
            f"{path}: not found; name a median stack (--reference STACK) or say --difference"
        )
    return read_template(path, catalogue)


class Search(NamedTuple):
    """How a kind of network searches: the part done in threads, and the part done in order."""

    look: Callable[[Prepared], Any]
    tell: Callable[[Any, Path, Found], None]


def _look_ahead(
    paths: Sequence[Path],
    prepare: Callable[[Path], Prepared],
    look: Callable[[Prepared], Any],
    params: Params,
) -> Iterator[tuple[Path, Any]]:
    """Prepare and search images in threads, a few ahead, so that memory does not grow."""

    def one(path: Path) -> Any:
        try:
            return look(prepare(path))
        except BlobpipeError as error:
            return error
        except (OSError, MemoryError):
            raise
        except Exception as error:  # a bug that this frame has brought to light
            log.debug("internal fault", exc_info=error)
            return FrameError(f"{path}: {internal_fault(error)}")

    with ThreadPoolExecutor(params.train.threads, "scan", kernels.set_threads, (1,)) as pool:
        waiting = [(path, pool.submit(one, path)) for path in paths[:READ_AHEAD]]
        for i, _ in enumerate(tqdm(paths, "scan", unit="frame", disable=None)):
            path, future = waiting.pop(0)
            if i + READ_AHEAD < len(paths):
                ahead = paths[i + READ_AHEAD]
                waiting.append((ahead, pool.submit(one, ahead)))
            yield path, future.result()


def _prepare(
    template: Template | None, catalogue: pd.DataFrame | None, params: Params, path: Path
) -> Prepared:
    """Read an image, subtract the template unless the image is a difference, clip and scale."""
    frame = fits_images.read_frame(path)
    data = frame.data
    shift = NO_SHIFT
    noise = fits_images.require_usable(frame, path)
    if template is None:
        template = Template(rms=fits_images.find_plane(path, "SCATTER"))
        require_noise_of_rms_map(data, template.rms, path)
    else:
        expected = template.expected_noise()
        assert expected is not None
        require_noise(noise, expected, path)
        data, shift = subtract(frame.data, template, params.difference)
    clipped, _ = clip_image(data, params.clip)
    scaled, _ = scale_image(clipped, params.scale)
    observation = Observation(data, template, catalogue, shift, image_noise(data))
    return Prepared(exposure_of(frame, path), observation, scaled)


def _choose_search(model: Path, params: Params) -> Search:
    """Choose the search for the network that the model file holds."""
    detector = load_detector(model)
    if isinstance(detector, DenseDetector):
        look = partial(_look_dense, detector, params.vetting)
        return Search(look, partial(_tell_dense, detector))
    look_report = partial(_look_report, detector.network)
    return Search(look_report, partial(_tell_report, detector.network, params.evaluate.threshold))


class Looked(NamedTuple):
    """An image, the dense network's map of it, and all candidates."""

    frame: Prepared
    response: npt.NDArray[np.float32]
    candidates: pd.DataFrame


def _look_dense(detector: DenseDetector, vetting: Vetting, frame: Prepared) -> Looked:
    response = detector.respond(frame.scaled)
    peaks = detector.peaks(response)
    candidates = frame.observation.find_blobs(detector, peaks=peaks, vetting=vetting)
    return Looked(frame, response, candidates)


def _tell_dense(detector: DenseDetector, seen: Looked, out_dir: Path, found: Found) -> None:
    candidates = seen.candidates
    detections = candidates[candidates["score"] >= detector.threshold]
    detections = detections.assign(frame=seen.frame.name)
    found.detections += [dict(row) for _, row in detections.iterrows()]
    shape = seen.frame.scaled.shape
    highest = subframe_scores(candidates, shape)
    probability = detector.probability(highest)
    positive = highest >= detector.threshold
    _note(seen.frame, tiles.origins(shape), probability, positive, found)
    for row in detections.query("status == 'new'").to_dict("records"):
        _draw(seen.frame, seen.response, row, out_dir)


def _within(
    cells: npt.NDArray[np.float32], x0: int, y0: int, side: int = tiles.SIDE
) -> npt.NDArray[np.float32]:
    stride = dense.STRIDE
    return cells[y0 // stride : (y0 + side) // stride, x0 // stride : (x0 + side) // stride]


def _draw(
    frame: Prepared, cells: npt.NDArray[np.float32], row: dict[Any, Any], out_dir: Path
) -> None:
    """Draw the surroundings of a detection, and the network's map of them."""
    ny, nx = frame.scaled.shape
    x0, y0 = (
        int(np.clip(round(at) - SIDE_PX // 2, 0, side - SIDE_PX)) // dense.STRIDE * dense.STRIDE
        for at, side in ((row["x_px"], nx), (row["y_px"], ny))
    )
    image = frame.scaled[y0 : y0 + SIDE_PX, x0 : x0 + SIDE_PX]
    part = _within(cells, x0, y0, SIDE_PX).repeat(dense.STRIDE, 0).repeat(dense.STRIDE, 1)
    title = (
        f"{frame.name}: probability {row['probability']:.3f}, depth {100 * row['depth_frac']:.2f} "
        f"+- {100 * row['depth_err_frac']:.2f} %, radius {row['radius_px']:.1f} px, S/N {row['snr']:.1f}"
    )
    path = out_dir / f"{frame.name}_x{round(row['x_px'])}y{round(row['y_px'])}.png"
    plotting.draw_detection(
        path,
        image,
        part,
        (x0, y0),
        (row["x_px"] - x0, row["y_px"] - y0),
        title,
        map_name="probability",
    )


def _seen_again(found: Found) -> list[dict[str, Any]]:
    """Mark detections that the next image of another exposure shows again."""
    if not found.detections or "score" not in found.detections[0]:
        return found.detections
    table = pd.DataFrame(found.detections)
    parts = [table[table["frame"] == exposure.name] for exposure in found.exposures]
    marked = []
    for i, exposure in enumerate(found.exposures):
        rest = range(i + 1, len(parts))
        after = next((k for k in rest if not is_same_exposure(exposure, found.exposures[k])), None)
        marked.append(parts[i] if after is None else mark_seen_again(parts[i], parts[after]))
    return [dict(row) for _, row in pd.concat(marked).iterrows()]


def _note(
    frame: Prepared,
    origins: npt.NDArray[np.int64],
    probability: npt.NDArray[np.float64],
    positive: npt.NDArray[np.bool_],
    found: Found,
) -> None:
    found.exposures.append(frame.exposure)
    for (row, col, x0, y0), p, is_blob in zip(origins, probability, positive, strict=True):
        found.subframes.append(
            dict(
                zip(SUBFRAME_COLUMNS, (frame.name, row, col, x0, y0, p, int(is_blob)), strict=True)
            )
        )
    about = (
        frame.name,
        "ok",
        "",
        *frame.observation.shift_px,
        frame.observation.noise_frac,
        int(positive.sum()),
        found.model_sha256,
    )
    found.frames.append(dict(zip(FRAME_COLUMNS, about, strict=True)))


class Answered(NamedTuple):
    """A frame's standardised subframes, where they lie, and the report's network's answers."""

    frame: Prepared
    subframes: npt.NDArray[np.float32]
    origins: npt.NDArray[np.int64]
    probability: npt.NDArray[np.float64]


def _look_report(network: report_network.ReportNetwork, frame: Prepared) -> Answered:
    subframes, origins = tiles.tile(frame.scaled)
    with STANDARDISING:
        render.standardise(subframes)
    return Answered(frame, subframes, origins, report_network.predict(network, subframes))


def _tell_report(
    network: report_network.ReportNetwork,
    threshold: float,
    seen: Answered,
    out_dir: Path,
    found: Found,
) -> None:
    frame, subframes, origins, probability = seen
    positive = probability >= threshold
    _note(frame, origins, probability, positive, found)
    if positive.any():
        _locate(
            network,
            frame,
            subframes[positive],
            origins[positive],
            probability[positive],
            out_dir,
            found,
        )


def _locate(
    network: report_network.ReportNetwork,
    frame: Prepared,
    subframes: npt.NDArray[np.float32],
    origins: npt.NDArray[np.int64],
    probability: npt.NDArray[np.float64],
    out_dir: Path,
    found: Found,
) -> None:
    maps = saliency.saliency_maps(network, subframes)
    for k, (x, y) in enumerate(saliency.peaks(maps)):
        row, col, x0, y0 = origins[k]
        detection = (frame.name, x0 + x, y0 + y, probability[k], "new")
        found.detections.append(dict(zip(PLACE_COLUMNS, detection, strict=True)))
        title = f"{frame.name}, subframe row {row}, column {col}: probability {probability[k]:.3f}"
        plotting.draw_detection(
            out_dir / f"{frame.name}_r{row}c{col}.png",
            subframes[k],
            maps[k],
            (x0, y0),
            (x, y),
            title,
        )
