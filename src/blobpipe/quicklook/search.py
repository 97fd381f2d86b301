"""The search of one image: alone, and together with the latest before it (ISR 6)."""

from __future__ import annotations

import errno
import json
import logging
import math
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from blobpipe.core import fits_images
from blobpipe.core.arrays import Image
from blobpipe.core.dates import EXPOSURE_CARDS, exposure_mjd
from blobpipe.detection.detectors import DenseDetector
from blobpipe.detection.match import near_blobs
from blobpipe.detection.search import observe, subframe_scores
from blobpipe.errors import BlobpipeError, FrameError, internal_fault
from blobpipe.history import deep
from blobpipe.history.deep import DeepDifference, SettledImage
from blobpipe.history.depths import Depths, measure_histories
from blobpipe.history.landing import date_history
from blobpipe.history.watch import N_IMAGES, BlobHealth, measure_changes, summarise_changes
from blobpipe.images import tiles
from blobpipe.images.clip import clip_image
from blobpipe.images.difference import KEPT_CARDS as DIFFERENCE_CARDS
from blobpipe.images.difference import subtract
from blobpipe.images.flatten import read_blob_image
from blobpipe.images.register import NO_SHIFT, Shift
from blobpipe.images.scale import scale_image
from blobpipe.images.template import Template, make_template
from blobpipe.monitor import logbook, thumbnails
from blobpipe.monitor.inbox import refuse_difference
from blobpipe.networks import dense
from blobpipe.noise.level import require_noise, require_noise_of_rms_map
from blobpipe.quicklook import running_stack
from blobpipe.quicklook.arrivals import Arrival
from blobpipe.quicklook.options import PLACE_COLUMNS, Run
from blobpipe.quicklook.versions import earliest_mjd, newer_version

log = logging.getLogger(__name__)

# Cards of an image that the log keeps
KEPT_CARDS = (*dict.fromkeys((*DIFFERENCE_CARDS, "EXPTIME", "PROPOSID", "BUNIT", *EXPOSURE_CARDS)),)

# Card of the photon level of the airglow (electrons per pixel); only simulated images have it
LEVEL_CARD = "LEVEL_E"

# End of the reason of an image before which too few can be stacked
WAITS = "kept for stacks"

# Errors of reading that come from the bytes of a file, not from its disk: those of astropy, which
# have no number, and those of seeking where damaged sizes lead
ERRORS_OF_CONTENT = (None, errno.EINVAL, errno.EOVERFLOW)


class KnownBlobs(NamedTuple):
    """Blobs that are known before an image is searched.

    Attributes
    ----------
    known : DataFrame
        x_px, y_px, radius_px of the blobs of the catalogue, and of those that the log has found since.
    landed : DataFrame
        The same columns for the blobs that the log has found, with ``first``, the date (MJD) of the first image that
        shows each; in order of date.
    """

    known: pd.DataFrame
    landed: pd.DataFrame


@dataclass(frozen=True)
class Pictures:
    """Draw the detections of an image.

    Attributes
    ----------
    difference : ndarray, shape (ny, nx), float32
    noise_frac : float
        Noise of the difference.
    response : ndarray, float32
        The network's probability map.
    stack : ndarray, shape (ny, nx), float32, or None
        What was subtracted.
    """

    difference: Image
    noise_frac: float
    response: Image
    stack: Image | None

    def draw(self, row: Mapping[str, Any]) -> dict[str, bytes]:
        """Draw the surroundings of a detection; return the pictures by kind, PNG."""
        x = row["x_px"]
        y = row["y_px"]
        drawn = {
            "difference": thumbnails.cutout(self.difference, x, y, self.noise_frac),
            "map": thumbnails.probability(self.response, x, y, dense.STRIDE),
        }
        if self.stack is not None:
            stack_noise = fits_images.median_and_noise(self.stack)[1]
            drawn["stack"] = thumbnails.cutout(self.stack, x, y, stack_noise)
        drawn["surface"] = thumbnails.surface(self.difference, x, y)
        return drawn


@dataclass(frozen=True)
class DeepResult:
    """What the latest images show together, this one among them.

    Attributes
    ----------
    found : DataFrame
        New blobs that have landed and stayed: columns of `deep.find_deep_blobs`, at their usual place.
    images : list of str
        SHA-256 of the latest images, in order of date.
    places : DataFrame
        x_px, y_px, radius_px of what is new on this image, alone or together (usual places).
    depths : Depths
        Of these places on these images, shape (images, places).
    settled : SettledImage
        This image.
    health : BlobHealth or None
        How the known blobs have changed; None if none is watched.
    nearly : DataFrame
        As ``found``, but just below the thresholds.
    """

    found: pd.DataFrame
    images: list[str]
    places: pd.DataFrame
    depths: Depths
    settled: SettledImage
    health: BlobHealth | None
    nearly: pd.DataFrame


@dataclass(frozen=True)
class ImageResult:
    """Everything that the log keeps of an image; an image that was not searched has a row only.

    Attributes
    ----------
    row : dict
        Columns of ``images``.
    candidates : DataFrame
        Vetted candidates, with their probability.
    subframes : list of dict
        Columns of ``subframes``.
    overview : bytes
        Picture of the whole image, JPEG.
    pictures : Pictures or None
    corrections : dict of bytes
        By SHA-256, corrections of the images that a stack has taken for the first time, this one among them
        (`running_stack.correction`).
    rejected : dict of str
        By SHA-256, why images of the log turned out to be unusable for a stack.
    """

    row: dict[str, Any]
    candidates: pd.DataFrame = field(default_factory=pd.DataFrame)
    subframes: list[dict[str, Any]] = field(default_factory=list)
    overview: bytes = b""
    pictures: Pictures | None = None
    corrections: dict[str, bytes] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    deep: DeepResult | None = None


def search(arrival: Arrival, run: Run) -> ImageResult:
    """Search an image; only the cache of the stack is written.

    Raises
    ------
    FrameError
        If the file cannot be read for a reason that does not lie in its bytes; any other fault rejects the image.
    """
    row: dict[str, Any] = {
        "run": run.number,
        "sha256": arrival.sha256,
        "name": fits_images.frame_name(arrival.path),
        "kind": "difference" if run.options.difference else "image",
        "logged": logbook.now(),
        "outcome": "rejected",
        "reason": "",
    }
    if arrival.fatal:
        return ImageResult(row | {"reason": f"{arrival.fatal}; fetch or write the file again"})
    try:
        return _search_usable(arrival.path, row, run)
    except BlobpipeError as error:
        if _is_temporary(error):
            raise
        return ImageResult(row | {"outcome": "rejected", "reason": str(error)})
    except Exception as error:
        if not is_internal(error):
            raise
        return ImageResult(row | {"outcome": "rejected", "reason": describe_internal(error)})


def _search_usable(path: Path, row: dict[str, Any], run: Run) -> ImageResult:
    """Read and search an image; what its header tells is added to its row in place."""
    frame = read_blob_image(path, run.bad_pixels, run.instrument)
    fits_images.require_usable(frame, path)
    row["ny_px"], row["nx_px"] = frame.data.shape
    row["header"] = json.dumps(_kept_cards(frame))
    row["mjd"] = exposure_mjd(frame, path, run.instrument)
    row["late"] = _is_late(run.connection, row["mjd"])
    newer = newer_version(run.connection, row)
    if newer is not None:
        return ImageResult(row | newer)
    row["signal_e"] = _photon_level_e(frame)

    if run.options.difference:
        template = Template(rms=run.bad_pixels.blank_cells(fits_images.find_plane(path, "SCATTER")))
        require_noise_of_rms_map(frame.data, template.rms, path)
        blobs = _known_blobs(run, row["mjd"])
        return _search_difference(row, frame.data, template, NO_SHIFT, blobs, run)
    refuse_difference(frame, path)
    return _subtract_and_search(row, frame.data, run)


def _kept_cards(frame: fits_images.Frame) -> dict[str, Any]:
    """Return the header cards that the log keeps and that JSON can hold."""
    found = {card: _card_value(frame, card) for card in KEPT_CARDS}
    return {card: value for card, value in found.items() if value is not None}


def _photon_level_e(frame: fits_images.Frame) -> float | None:
    """Return the photon level that the header gives (electrons per pixel), or None."""
    level = _card_value(frame, LEVEL_CARD)
    is_number = isinstance(level, int | float) and not isinstance(level, bool)
    return float(level) if is_number else None


def _card_value(frame: fits_images.Frame, card: str) -> Any:
    """Return a card as text, truth value or finite number; None for anything else."""
    try:
        value = frame.header.get(card)
        is_usable = isinstance(value, str) or (
            isinstance(value, int | float) and math.isfinite(value)
        )
    except Exception:  # damaged cards make astropy raise nearly anything
        return None
    return value if is_usable else None


def _is_temporary(error: BlobpipeError) -> bool:
    """Return whether a file could not be read for a reason that does not lie in its bytes."""
    cause = error.__cause__
    if isinstance(cause, OSError):
        return cause.errno not in ERRORS_OF_CONTENT
    return isinstance(cause, MemoryError)


def is_internal(error: Exception) -> bool:
    """Return whether an error is a bug of this program, not a fault of disk, log or machine."""
    outside = (BlobpipeError, OSError, MemoryError, sqlite3.OperationalError)
    # SQLite reports a damaged log by the base class itself
    return not isinstance(error, outside) and type(error) is not sqlite3.DatabaseError


def describe_internal(error: Exception) -> str:
    """Describe a bug for the log, its traceback for --debug."""
    log.debug("internal fault", exc_info=error)
    return internal_fault(error)


def _is_late(connection: sqlite3.Connection, mjd: float) -> int:
    """Return 1 if the log has a usable image of a later date, else 0."""
    later = connection.execute(
        "SELECT 1 FROM images WHERE outcome != 'rejected' AND superseded_by IS NULL AND mjd > ? LIMIT 1",
        (mjd,),
    ).fetchone()
    return int(later is not None)


def _subtract_and_search(row: dict[str, Any], image: Image, run: Run) -> ImageResult:
    """Subtract the stack of the images before it, and search the difference."""
    params = run.params.difference
    blobs = _known_blobs(run, row["mjd"])
    running_stack.require_size(run.connection, image.shape)

    # Without a stack the image waits: the next stacks take it
    reason = f"fewer than {params.stack_size} usable images before it; {WAITS}"
    try:
        stack = running_stack.stack_before(
            run.connection,
            run.cache,
            earliest_mjd(run.connection, row),
            params,
            run.options.reference,
            blobs.landed,
            shape=image.shape,
        )
    except FrameError as error:  # an image of the stack is missing; this one is sound
        stack = None
        reason = str(error)
    if stack is None:
        return ImageResult(row | {"outcome": "stack", "reason": reason})

    # Subtract it, unless the noise shows that the image is in other units
    template = make_template(stack.data, stack.rms, blobs.known)
    expected = template.expected_noise()
    assert expected is not None
    require_noise(fits_images.median_and_noise(image)[1], expected, row["name"])
    difference, shift = subtract(image, template, params, run.instrument)

    # The stacks to come take the image with its blobs at their usual position
    corrections = dict(stack.corrections)
    if stack.n_images:
        assert template.pattern is not None
        packed = running_stack.correction(template.pattern, shift)
        corrections[row["sha256"]] = packed
        running_stack.keep(run.cache, row["sha256"], image, packed)

    row |= {"n_stack": stack.n_images, "stack_sha256": stack.sha256}
    result = _search_difference(row, difference, template, shift, blobs, run)
    result = replace(result, corrections=corrections, rejected=stack.rejected)
    if not stack.n_images:
        return result
    return replace(result, deep=_search_latest(result, difference, template, shift, blobs, run))


def _search_latest(
    result: ImageResult,
    difference: Image,
    template: Template,
    shift: Shift,
    blobs: KnownBlobs,
    run: Run,
) -> DeepResult:
    """Search the latest images together, up to the one that has just been searched alone."""
    row = result.row
    assert template.stack is not None
    candidates = result.candidates
    is_detected = candidates["score"] >= run.detector.threshold
    alone = candidates[is_detected & (candidates["status"] == "new")]

    # A fainter sighting of what earlier images have shown is clear, too: limited, its depth would date it wrongly
    usual = candidates.assign(
        x_px=candidates["x_px"] - shift.x_px, y_px=candidates["y_px"] - shift.y_px
    )
    is_clear = np.logical_or(is_detected, near_blobs(usual, blobs.landed).any(axis=1))
    clear = candidates[is_clear & candidates["status"].isin(["new", "known"])]
    settled = deep.settle(difference, template.stack, shift, clear=clear)
    latest, members = running_stack.latest_before(
        run.connection, run.cache, earliest_mjd(run.connection, row), template.stack
    )
    running_stack.keep_settled(run.cache, row["sha256"], settled)
    latest.add(settled)

    # What the image shows alone, and blobs that have landed, are no news
    alone = alone.assign(x_px=alone["x_px"] - shift.x_px, y_px=alone["y_px"] - shift.y_px)
    places = [*PLACE_COLUMNS]
    known = pd.concat([blobs.known[places], blobs.landed[places], alone[places]])
    differences = latest.differences()
    found = deep.find_deep_blobs(
        differences,
        replace(template, rms=latest.rms()),
        run.detector,
        deep.thresholds(run.detector.threshold, run.params.deep),
        catalogue=known,
        vetting=run.params.vetting,
        instrument=run.instrument,
    )
    found = found[found["status"] == "new"].reset_index(drop=True)

    # Of the rest count those that have landed and stayed
    new = pd.concat([found[places], alone[places]], ignore_index=True)
    depths = measure_histories(latest.images, new)
    mjd = np.array([*(member.mjd for member in members), row["mjd"]])
    persistent = [
        _is_persistent(mjd, depths.depth_frac[:, k], depths.error_frac[:, k])
        for k in range(len(found))
    ]
    stayed = found[np.array(persistent, bool)]
    is_detection = stayed["is_detection"].astype(bool)
    return DeepResult(
        stayed[is_detection],
        [*(member.sha256 for member in members), row["sha256"]],
        new,
        depths,
        settled,
        _watch_blobs(differences, blobs, members[0].mjd if members else row["mjd"], run),
        stayed[~is_detection],
    )


def _watch_blobs(
    differences: list[DeepDifference], blobs: KnownBlobs, since_mjd: float, run: Run
) -> BlobHealth | None:
    """Measure how the blobs of the catalogue have changed, those left out that have landed since a date."""
    latest = [each for each in differences if each.n_images == N_IMAGES]
    if run.catalogue is None or not latest:
        return None
    landed = blobs.landed[blobs.landed["first"] >= since_mjd]
    is_new = near_blobs(run.catalogue, landed).any(axis=1)
    return summarise_changes(measure_changes(latest[0], run.catalogue[np.logical_not(is_new)]))


def _is_persistent(
    mjd: npt.NDArray[np.float64], depth: npt.NDArray[Any], error: npt.NDArray[Any]
) -> bool:
    """Return whether a history is that of a blob that has landed and stayed."""
    landing = date_history(mjd, depth, error)
    return landing is not None and landing.is_persistent


def _search_difference(
    row: dict[str, Any],
    difference: Image,
    template: Template,
    shift: Shift,
    blobs: KnownBlobs,
    run: Run,
) -> ImageResult:
    """Search a difference image."""
    detector = run.detector
    observation = observe(
        difference,
        template,
        catalogue=blobs.known,
        shift_px=shift,
        recent_px=blobs.landed[["x_px", "y_px"]].to_numpy(float),
        instrument=run.instrument,
    )
    noise = observation.noise_frac

    # The network sees the difference whitened, clipped and scaled; the fit sees it whitened
    clipped, clipping = clip_image(observation.even(), run.params.clip)
    scaled, _ = scale_image(clipped, run.params.scale)
    response = detector.respond(scaled)
    peaks = detector.peaks(response, scaled)
    candidates = observation.find_blobs(detector, peaks=peaks, vetting=run.params.vetting)
    row |= {
        "outcome": "searched",
        "shift_x_px": shift.x_px,
        "shift_y_px": shift.y_px,
        "noise_frac": noise,
        "clipped_frac": clipping.clipped_frac,
    }
    return ImageResult(
        row,
        candidates,
        _subframe_rows(response, candidates, detector, difference.shape),
        thumbnails.overview(scaled),
        Pictures(difference, noise, response, template.stack),
    )


def _known_blobs(run: Run, mjd: float) -> KnownBlobs:
    """Read which blobs are known before a date; faded candidates do not count."""
    found = run.connection.execute(
        "SELECT x_px, y_px, radius_px, first_mjd, decision = 'confirmed' OR status = 'seen_again' FROM candidate_list "
        "WHERE radius_px IS NOT NULL AND (decision = 'confirmed' OR decision != 'rejected' AND status != 'faded') "
        "ORDER BY first_mjd, id"
    ).fetchall()
    columns = [*PLACE_COLUMNS, "first", "known"]
    rows = pd.DataFrame([tuple(row) for row in found], columns=columns, dtype=float)

    # A candidate that one image alone has shown is recent, but not known
    known = [rows.loc[rows["known"] == 1, list(PLACE_COLUMNS)]]
    if run.catalogue is not None:
        known.insert(0, run.catalogue[list(PLACE_COLUMNS)])
    return KnownBlobs(pd.concat(known, ignore_index=True), rows[rows["first"] < mjd])


def _subframe_rows(
    response: Image, candidates: pd.DataFrame, detector: DenseDetector, shape: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Make the rows of ``subframes``, each with a picture of the network's map."""
    scores = subframe_scores(candidates, shape)
    probability = detector.probability(scores)
    side = tiles.SIDE // dense.STRIDE
    rows = []
    for k, (row, col, _, _) in enumerate(tiles.origins(shape).tolist()):
        part = response[row * side : (row + 1) * side, col * side : (col + 1) * side]
        rows.append(
            {
                "row": row,
                "col": col,
                "probability": float(probability[k]),
                "positive": int(scores[k] >= detector.threshold),
                "saliency": thumbnails.subframe_map(part),
            }
        )
    return rows
