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
from blobpipe.detection import operating_point
from blobpipe.detection.fit import DETECTION_COLUMNS
from blobpipe.detection.match import mark_seen_again
from blobpipe.detection.score import score_candidates
from blobpipe.detection.search import Reference, fit_peaks, highest_scores
from blobpipe.detection.vet import bad_pixels, vet
from blobpipe.errors import BlobpipeError, FrameError, internal_fault
from blobpipe.images import difference as subtraction
from blobpipe.images import tiles
from blobpipe.images.clip import clip_image
from blobpipe.images.noise import Range, noise_for_stack, require_noise, require_noise_of_rms_map
from blobpipe.images.pattern import blob_pattern
from blobpipe.images.scale import scale_image
from blobpipe.networks import dense, dense_network, kernels, model_file, report_network, saliency
from blobpipe.params import Params
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
    """The rows of the three tables, the model that they are of, and the exposure of each image that was searched, in order."""

    model_sha256: str
    exposures: list[Exposure] = field(default_factory=list)
    frames: list[dict[str, Any]] = field(default_factory=list)
    subframes: list[dict[str, Any]] = field(default_factory=list)
    detections: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Prepared:
    """A frame ready for the network: its exposure, as it was subtracted, its stack's scatter, clipped and scaled, shift, noise."""

    exposure: Exposure
    difference: npt.NDArray[np.float32]
    scatter: npt.NDArray[np.float32] | None
    scaled: npt.NDArray[np.float32]
    shift: tuple[float, float]
    noise_frac: float

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
    stack = None if difference else _read_stack(reference)
    search = _choose_search(model, stack, known, params)
    log.info("model: %s", model_file.described(model))
    found = Found(files.sha256(model))
    for path, seen in _look_ahead(paths, stack, search.look, params):
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


class MedianStack(NamedTuple):
    """What is subtracted, how its images scatter, if the file says so, and what noise they may have."""

    data: npt.NDArray[np.float32]
    scatter: npt.NDArray[np.float32] | None
    noise: Range


def _read_stack(reference: Path | None) -> MedianStack:
    path = reference or Path("data/difference/reference.fits.fz")
    if not path.exists():
        raise FrameError(
            f"{path}: not found; name a median stack (--reference STACK) or say --difference"
        )
    data = fits_images.usable_image(path).data
    scatter = fits_images.find_plane(path, "SCATTER")
    return MedianStack(data, scatter, noise_for_stack(data, scatter))


class Search(NamedTuple):
    """The way of a network: what is done with several frames at a time, and what is written down of one after the other."""

    look: Callable[[Prepared], Any]
    tell: Callable[[Any, Path, Found], None]


def _look_ahead(
    paths: Sequence[Path],
    stack: MedianStack | None,
    look: Callable[[Prepared], Any],
    params: Params,
) -> Iterator[tuple[Path, Any]]:
    """Prepare and look at the frames in threads, a few ahead of the one that is asked for: memory does not grow."""

    def one(path: Path) -> Any:
        try:
            return look(_prepare(path, stack, params))
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


def _prepare(path: Path, stack: MedianStack | None, params: Params) -> Prepared:
    frame = fits_images.read_frame(path)
    data = frame.data
    shift = (0.0, 0.0)
    noise = fits_images.require_usable(frame, path)
    if stack is None:
        scatter = fits_images.find_plane(path, "SCATTER")
        require_noise_of_rms_map(data, scatter, path)
    else:
        scatter = stack.scatter
        require_noise(noise, stack.noise, path)
        data, shift = subtraction.difference_image(frame.data, stack.data, params.difference)
        noise = fits_images.median_and_noise(data)[1]
    clipped, _ = clip_image(data, params.clip)
    scaled, _ = scale_image(clipped, params.scale)
    return Prepared(exposure_of(frame, path), data, scatter, scaled, shift, noise)


def _choose_search(
    model: Path, stack: MedianStack | None, catalogue: pd.DataFrame | None, params: Params
) -> Search:
    """The way of the network that the model file holds."""
    if model_file.kind_of_model(model) == "dense":
        dense_network, point = operating_point.load_operating_point(model)
        reference = None
        if stack is not None:
            pattern = blob_pattern(stack.data)
            reference = Reference(stack.data, pattern, bad_pixels(stack.data, pattern))
        look = partial(_look_dense, dense_network, point, catalogue, reference)
        return Search(look, partial(_tell_dense, point))
    network, _ = model_file.load_model(model)
    return Search(
        partial(_look_report, network), partial(_tell_report, network, params.evaluate.threshold)
    )


class Looked(NamedTuple):
    """A frame, the dense network's map of it, all candidates, and those that are detections; these are judged."""

    frame: Prepared
    cells: npt.NDArray[np.float32]
    candidates: pd.DataFrame
    detections: pd.DataFrame


def _look_dense(
    network: dense_network.DenseNetwork,
    point: operating_point.OperatingPoint,
    catalogue: pd.DataFrame | None,
    reference: Reference | None,
    frame: Prepared,
) -> Looked:
    cells = dense.probability_map(network, frame.scaled)
    candidates = score_candidates(
        fit_peaks(cells, frame.difference, frame.noise_frac), point.weights
    )
    candidates["probability"] = point.probability(candidates["score"].to_numpy())
    detections = vet(
        candidates[candidates["score"] >= point.threshold],
        frame.difference,
        catalogue=catalogue,
        shift_px=frame.shift,
        pattern=None if reference is None else reference.pattern,
        bad=None if reference is None else reference.bad,
        stack=None if reference is None else reference.stack,
        noise_frac=frame.noise_frac,
        scatter=frame.scatter,
    )
    candidates["status"] = detections["status"].reindex(candidates.index, fill_value="")
    detections.insert(0, "frame", frame.name)
    return Looked(frame, cells, candidates, detections)


def _tell_dense(
    point: operating_point.OperatingPoint, seen: Looked, out_dir: Path, found: Found
) -> None:
    found.detections += [dict(row) for _, row in seen.detections.iterrows()]
    _, origins = tiles.tile(seen.frame.scaled)
    highest = highest_scores(seen.candidates, origins[:, 2:])
    _note(seen.frame, origins, point.probability(highest), highest >= point.threshold, found)
    for row in seen.detections.query("status == 'new'").to_dict("records"):
        _draw(seen.frame, seen.cells, row, out_dir)


def _within(
    cells: npt.NDArray[np.float32], x0: int, y0: int, side: int = tiles.SIDE
) -> npt.NDArray[np.float32]:
    stride = dense.STRIDE
    return cells[y0 // stride : (y0 + side) // stride, x0 // stride : (x0 + side) // stride]


def _draw(
    frame: Prepared, cells: npt.NDArray[np.float32], row: dict[Any, Any], out_dir: Path
) -> None:
    """The surroundings of a detection, and the network's map of them."""
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
    """Detections, those marked that the next image of another exposure shows again."""
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
        *frame.shift,
        frame.noise_frac,
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
