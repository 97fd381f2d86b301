"""Subtract from each image the median stack of those before it, with the blobs moved to where the mirror put them.

The blobs are on a mirror that does not always return to the same angle; the pixels' own pattern is on the detector. So only
the blob pattern of the stack is moved: known blobs leave no dips, and the noise elsewhere stays what it was. A dip is what a
known blob leaves if it has not been moved: an excess of light on one side and a lack on the other. A new blob is positive.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from blobpipe.core import files, fits_images, tables
from blobpipe.core.arrays import Image
from blobpipe.core.detector import DEFAULT, Detector
from blobpipe.errors import FrameError, TableError
from blobpipe.images.bad_pixels import BadPixels
from blobpipe.images.pattern import blob_pattern
from blobpipe.images.register import (
    NEGLIGIBLE_PX,
    NO_SHIFT,
    Shift,
    move_pattern,
    register_images,
    shift_of,
)
from blobpipe.images.stack import (
    Recent,
    landed_within,
    rms_map,
    running_median,
    with_recent_blobs,
)
from blobpipe.images.template import Template, noise_model_of_stack
from blobpipe.noise.level import clean_noise, noise_near, require_noise
from blobpipe.noise.whiten import noise_model_planes
from blobpipe.params import Difference

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

DEFAULTS = Difference()

# Cards of an image that its difference image keeps
KEPT_CARDS = ("TELESCOP", "INSTRUME", "DETECTOR", "FILTER", "TARGNAME", "ROOTNAME", "EXPSTART")


@dataclass(frozen=True)
class Candidate:
    """An image of the list.

    Attributes
    ----------
    row : int
        Row in ``frames.csv``, from 0.
    name : str
    cards : dict
        Those of `KEPT_CARDS` that its header has.
    reason : str
        Why it is rejected; empty if it is usable.
    noise : float
        Noise (fraction of the light); NaN if it could not be read.
    """

    row: int
    name: str
    cards: dict[str, Any]
    reason: str
    noise: float = np.nan


@dataclass(frozen=True)
class Registered:
    """Images whose known blobs have been moved to their usual place.

    Attributes
    ----------
    images : ndarray, shape (n, ny, nx), float32
        In order of date (fraction of the light).
    shifts : list of Shift
        Shift of the blobs of each by the mirror.
    pattern : ndarray, shape (ny, nx), float32
        Pattern of the blobs that were moved.
    rows : list of int
        Row of each image in ``frames.csv``.
    """

    images: Image
    shifts: list[Shift]
    pattern: Image
    rows: list[int]


def subtract(
    image: Image,
    template: Template,
    params: Difference = DEFAULTS,
    detector: Detector = DEFAULT,
) -> tuple[Image, Shift]:
    """Subtract a template from an image, its blobs moved to where the image has them.

    Parameters
    ----------
    image : ndarray, shape (ny, nx), float32
        Fraction of the light; NaN where there is no value.
    template : Template
        With a stack and its pattern.
    params : Difference, optional
    detector : Detector, optional
        Says whether blobs move, and how far at most.

    Returns
    -------
    ndarray, shape (ny, nx), float32
        Difference (fraction of the light); a new blob is positive.
    Shift
        Of the known blobs, measured against the template; 0 where registration is off or nothing moves.

    Raises
    ------
    FrameError
        If the two differ in size.
    """
    stack = template.stack
    pattern = template.pattern
    assert stack is not None
    assert pattern is not None
    if image.shape != stack.shape:
        ny, nx = image.shape
        stack_ny, stack_nx = stack.shape
        raise FrameError(
            f"found {nx}x{ny} pixels, expected {stack_nx}x{stack_ny} as in the median stack; leave it out"
        )
    if not (params.register_shift and detector.moves):
        return image - stack, NO_SHIFT
    shift = shift_of(image - stack, template.known, detector.motion.largest_px)
    shifted_stack = stack + template.known.moved(shift) - pattern
    return image - shifted_stack, shift


def write_differences(
    raw_dir: str | Path,
    out_dir: str | Path,
    params: Difference,
    batch: int | None = None,
    bad_pixels: BadPixels | None = None,
    detector: Detector = DEFAULT,
) -> None:
    """Write the difference image of each image that has a whole stack before it (stage ``difference``).

    Parameters
    ----------
    raw_dir : path
        Images, ``frames.csv``, and ``blobs.csv`` if there is a catalogue.
    out_dir : path
        ``{frame}.fits.fz`` (HDU DIFFERENCE, fraction of the light, new blob positive; HDU SCATTER, see `stack.rms_map`),
        then ``frames-NNN.csv`` for each batch. An image that cannot be used is listed as rejected, with the reason, and
        left out of the stacks.
    params : Difference
    batch : int, optional
        Only this batch of `tables.BATCH` rows. The results do not depend on the division into batches.
    bad_pixels : BadPixels, optional
        Pixels that get no value; the header of a difference image names their files.
    detector : Detector, optional
        Images of other sizes are rejected.

    Raises
    ------
    TableError
        If ``frames.csv`` or ``blobs.csv`` is at fault.

    Notes
    -----
    Source: ISR 2021-08 section 2; registration, and the stack that shows new blobs, are this project's.
    """
    import pandas as pd

    table = tables.read_frame_list(raw_dir)
    blobs = _catalogue(raw_dir, detector)
    batches = tables.batches(len(table))
    if batch is not None and batch not in range(len(batches)):
        raise TableError(
            f"{raw_dir}/frames.csv: found no batch {batch}, expected 0 to {len(batches) - 1} for its {len(table)} images; "
            "choose one of these"
        )
    for number, rows in enumerate(batches):
        if batch not in (None, number):
            continue
        source = Source(
            Path(raw_dir),
            table,
            bad_pixels or BadPixels(dq_flags=detector.exposure.bad_dq),
            detector,
        )
        done = _subtract_batch(source, Path(out_dir), params, blobs, rows)
        tables.write_table(Path(out_dir) / f"frames-{number:03d}.csv", pd.DataFrame(done))


def _catalogue(raw_dir: str | Path, detector: Detector) -> pd.DataFrame:
    """Read the catalogue, and add as ``first`` the row of each blob's first image, -1 if older than all."""
    blobs = tables.read_blobs(raw_dir, detector)
    names = tables.read_frame_list(raw_dir)["frame"]
    rows = {name: row for row, name in enumerate(names)}
    first = [rows.get(name, -1) for name in blobs["first_frame"]]
    return blobs.assign(first=first)


@dataclass(frozen=True)
class Source:
    """Where images are read from.

    Attributes
    ----------
    folder : path
    table : DataFrame
        ``frames.csv``.
    bad_pixels : BadPixels
        Pixels that get no value.
    detector : Detector
    """

    folder: Path
    table: pd.DataFrame
    bad_pixels: BadPixels
    detector: Detector


def _subtract_batch(
    source: Source,
    out_dir: Path,
    params: Difference,
    blobs: pd.DataFrame,
    rows: slice,
) -> list[dict[str, Any]]:
    """Write the difference images of a batch, and return its rows of ``frames-NNN.csv``.

    Parameters
    ----------
    source : Source
    out_dir, params
        As in `write_differences`.
    blobs : DataFrame
        From `_catalogue`.
    rows : slice
        Rows of the batch.
    """
    read, images = _read_rows(source, rows, params.stack_size)
    usable = [candidate for candidate in read if not candidate.reason]

    # The first images of the list, as many as a stack takes, have no whole stack before them
    made: dict[str, dict[str, Any]] = {}
    if len(usable) > params.stack_size:
        registered = _register(images, usable, params, blobs, source.detector)
        medians = running_median(registered.images[:-1], params.stack_size)
        for candidate, median in zip(usable[params.stack_size :], medians, strict=True):
            made[candidate.name] = _subtract_one(
                out_dir, params, candidate, registered, median, blobs
            )

    # A row for every image of the batch, with a difference or without
    mjd = dict(zip(source.table["frame"], source.table["mjd"], strict=True))
    results = []
    for candidate in read:
        if candidate.row < rows.start:
            continue
        result = made.get(candidate.name) or _without_difference(candidate, usable)
        results.append({"frame": candidate.name, "mjd": mjd[candidate.name]} | result)
    return results


def _without_difference(candidate: Candidate, usable: list[Candidate]) -> dict[str, Any]:
    """Return the row of an image that is rejected, or has no whole stack before it."""
    if candidate.reason:
        log.warning("%s rejected: %s", candidate.name, candidate.reason)
        return _result("rejected", reason=candidate.reason)
    n_stack = sum(other.row < candidate.row for other in usable)
    return _result("stack", reason=f"{n_stack} usable images before it", n_stack=n_stack)


def _result(
    status: str,
    *,
    reason: str = "",
    shift: Shift = NO_SHIFT,
    noise_frac: float = np.nan,
    n_stack: int = 0,
    sha256: str = "",
) -> dict[str, Any]:
    """Return what ``frames-NNN.csv`` says of an image."""
    return {
        "status": status,
        "reason": reason,
        "shift_x_px": shift.x_px,
        "shift_y_px": shift.y_px,
        "noise_frac": noise_frac,
        "n_stack": n_stack,
        "sha256": sha256,
    }


def _read_rows(source: Source, rows: slice, wanted: int) -> tuple[list[Candidate], list[Image]]:
    """Read the images of some rows, and as many before them as their stacks take.

    Parameters
    ----------
    source : Source
    rows : slice
    wanted : int
        Number of usable images before these rows, fewer if the list begins there.

    Returns
    -------
    list of Candidate
        All images read, in order.
    list of ndarray
        Those that are usable.
    """
    read = [_read(source, row) for row in range(rows.start, rows.stop)]
    candidates = _reject_other_noise([candidate for candidate, _ in read])

    # Read backwards until enough images are usable; each one read may change what noise is usual
    start = rows.start
    while start:
        before = [candidate for candidate in candidates if candidate.row < rows.start]
        n_usable = sum(not candidate.reason for candidate in before)
        if n_usable >= wanted:
            break
        start -= 1
        read.insert(0, _read(source, start))
        candidates = _reject_other_noise([candidate for candidate, _ in read])

    return candidates, _usable_images(candidates, read)


def _usable_images(
    candidates: list[Candidate], read: list[tuple[Candidate, Image | None]]
) -> list[Image]:
    """Return the images, as they were read, of the candidates that are not rejected."""
    return [
        image
        for candidate, (_, image) in zip(candidates, read, strict=True)
        if image is not None and not candidate.reason
    ]


def _reject_other_noise(candidates: list[Candidate]) -> list[Candidate]:
    """Reject the usable images whose noise is far from the median of all: they are scaled, or in other units."""
    noise = [candidate.noise for candidate in candidates if not candidate.reason]
    if not noise:
        return candidates
    expected = noise_near(float(np.median(noise)))
    compared = []
    for candidate in candidates:
        reason = candidate.reason
        if not reason:
            try:
                require_noise(candidate.noise, expected, candidate.name)
            except FrameError as error:
                reason = str(error)
        compared.append(replace(candidate, reason=reason))
    return compared


def _read(source: Source, row: int) -> tuple[Candidate, Image | None]:
    """Read the image of a row, NaN where it has no value; None if it cannot be used."""
    name = str(source.table["frame"].iloc[row])
    try:
        path = fits_images.find_image(source.folder, name)
        frame = source.bad_pixels.blank(fits_images.read_frame(path, source.detector), path)
        noise = fits_images.require_usable(frame, path)
        expected_ny, expected_nx = source.detector.shape
        ny, nx = frame.data.shape
        if (ny, nx) != (expected_ny, expected_nx):
            raise FrameError(
                f"{path}: found {nx}x{ny} pixels, expected {expected_nx}x{expected_ny}; leave it out"
            )
    except FrameError as error:
        return Candidate(row, name, {}, str(error)), None
    cards = {card: frame.header[card] for card in KEPT_CARDS if card in frame.header}
    cards |= source.bad_pixels.cards(frame)
    return Candidate(row, name, cards, "", noise), frame.data


def _register(
    images: list[Image],
    usable: list[Candidate],
    params: Difference,
    blobs: pd.DataFrame,
    detector: Detector,
) -> Registered:
    """Move the blobs of images to their usual place, which the first of them define.

    Parameters
    ----------
    images : list of ndarray, shape (ny, nx), float32
        In order of date; the list is emptied, since a batch is too large to be held twice.
    usable : list of Candidate
        Of each image.
    params : Difference
    blobs : DataFrame
        From `_catalogue`.
    detector : Detector
    """
    rows = [candidate.row for candidate in usable]
    stacked = np.stack(images)
    images.clear()
    if not (params.register_shift and detector.moves):
        pattern = np.zeros(stacked.shape[1:], np.float32)
        return Registered(stacked, [NO_SHIFT] * len(rows), pattern, rows)

    # Blobs that are on the first stack, where they are on most of its images
    first = stacked[: params.stack_size]
    first_rows = rows[: len(first)]
    known = blobs[blobs["first"] <= first_rows[-1]]

    # Images that are shifted blur the median: register them to it, and take the median again
    blurred = _stack(first, first_rows, params, known)
    once, shifts = register_images(
        first.copy(), blurred, blob_pattern(blurred, known), largest_px=detector.motion.largest_px
    )
    stack = _stack(once, first_rows, params, known, shifts)

    pattern = blob_pattern(stack, known)
    moved, shifts = register_images(
        stacked, stack, pattern, largest_px=detector.motion.largest_px, n_first=len(first)
    )
    return Registered(moved, shifts, pattern, rows)


def _stack(
    images: Image,
    rows: list[int],
    params: Difference,
    known: pd.DataFrame,
    shifts: Sequence[Shift] | None = None,
) -> Image:
    """Return the median of images, with the blobs that landed on them."""
    median = running_median(images, len(images))[0]
    recent = _recent(known, rows, median.shape, params)
    return with_recent_blobs(median, images, recent, shifts)


def _subtract_one(
    out_dir: Path,
    params: Difference,
    candidate: Candidate,
    registered: Registered,
    median: Image,
    blobs: pd.DataFrame,
) -> dict[str, Any]:
    """Write the difference image of one image and its RMS map, and return its row of ``frames-NNN.csv``.

    Parameters
    ----------
    out_dir, params
        As in `subtract`.
    candidate : Candidate
    registered : Registered
        All images of the batch.
    median : ndarray, shape (ny, nx), float32
        Median of the images before this one.
    blobs : DataFrame
        From `_catalogue`.
    """
    index = registered.rows.index(candidate.row)
    members = slice(index - params.stack_size, index)
    shift = registered.shifts[index]

    # The stack, with all blobs that are known before this image
    known = blobs[blobs["first"] < candidate.row]
    recent = _recent(known, registered.rows[members], median.shape, params)
    stack = with_recent_blobs(
        median, registered.images[members], recent, registered.shifts[members]
    )

    # Registration has moved the blobs of the first stack back; move those that landed later
    difference = registered.images[index] - stack
    if np.hypot(*shift) > NEGLIGIBLE_PX:
        later = blob_pattern(stack, known) - registered.pattern
        difference -= move_pattern(later, shift) - later

    noise = clean_noise(difference)
    rms = rms_map(registered.images[members], stack, recent)
    path = out_dir / f"{candidate.name}.fits.fz"
    cards = {"BUNIT": "", "NSTACK": params.stack_size, "SHIFT_X": shift.x_px, "SHIFT_Y": shift.y_px}
    planes = {"DIFFERENCE": difference, "SCATTER": rms}
    fits_images.write_images(path, planes, header=candidate.cards | cards, sigma=noise)
    return _result(
        "ok", shift=shift, noise_frac=noise, n_stack=params.stack_size, sha256=files.sha256(path)
    )


def _recent(
    blobs: pd.DataFrame, rows: list[int], shape: tuple[int, ...], params: Difference
) -> list[Recent]:
    """Return the blobs that landed on a stack's images, none if the setting ``known_blobs`` is off."""
    return landed_within(blobs, rows, shape) if params.known_blobs else []


def reference(
    raw_dir: str | Path,
    out_dir: str | Path,
    params: Difference,
    bad_pixels: BadPixels | None = None,
    detector: Detector = DEFAULT,
) -> None:
    """Write ``reference.fits.fz``, the template of the first images.

    Its HDUs are STACK (their median), PATTERN (`pattern.blob_pattern`), SCATTER (`stack.rms_map`) and
    the noise model of the images (`template.noise_model_planes`).

    Parameters
    ----------
    raw_dir : path
        As in `subtract`.
    out_dir : path
    params : Difference
    bad_pixels : BadPixels, optional
        Pixels that get no value; the header names their files.
    detector : Detector, optional

    Raises
    ------
    FrameError
        If there are fewer usable images than a stack takes.
    """
    bad = bad_pixels or BadPixels(dq_flags=detector.exposure.bad_dq)
    source = Source(Path(raw_dir), tables.read_frame_list(raw_dir), bad, detector)
    n_listed = len(source.table)
    blobs = _catalogue(raw_dir, detector)

    # Read on until enough images are usable
    read: list[tuple[Candidate, Image | None]] = []
    members: list[Candidate] = []
    while len(members) < params.stack_size and len(read) < n_listed:
        n_missing = params.stack_size - len(members)
        rows = range(len(read), min(len(read) + n_missing, n_listed))
        read += [_read(source, row) for row in rows]
        candidates = _reject_other_noise([candidate for candidate, _ in read])
        members = [candidate for candidate in candidates if not candidate.reason]
    if len(members) < params.stack_size:
        raise FrameError(
            f"{raw_dir}: found {len(members)} usable images, expected at least difference.stack_size="
            f"{params.stack_size}; add images or lower it"
        )

    images = _usable_images(candidates, read)
    registered = _register(images, members, params, blobs, detector)
    known = blobs[blobs["first"] <= members[-1].row]
    stack = _stack(registered.images, registered.rows, params, known, registered.shifts)
    recent = _recent(known, registered.rows, stack.shape, params)
    rms = rms_map(registered.images, stack, recent)
    noise_model = noise_model_of_stack(registered.images, stack)
    planes = {"STACK": stack, "PATTERN": blob_pattern(stack, known), "SCATTER": rms}
    planes |= noise_model_planes(noise_model)
    path = Path(out_dir) / "reference.fits.fz"
    fits_images.write_images(path, planes, header=bad.cards(), sigma=clean_noise(stack))
