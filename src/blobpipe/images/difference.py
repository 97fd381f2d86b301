"""Each image minus the median stack of those before it, with the blobs moved to where the mirror put them.

The blobs sit on a mirror that does not always return to the same angle, the pixels' own pattern sits on the
detector. So only the blob pattern of the stack is moved: known blobs leave no dips, and the noise elsewhere stays
what it was. A new blob is positive.
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
from blobpipe.errors import FrameError, TableError
from blobpipe.images.noise import (
    Range,
    clean_noise,
    noise_near,
    require_noise,
)
from blobpipe.images.pattern import (
    blob_pattern,
)
from blobpipe.images.register import (
    NEGLIGIBLE_PX,
    NO_SHIFT,
    Shift,
    measure_shift,
    move_pattern,
    register,
)
from blobpipe.images.stack import (
    Recent,
    landed_within,
    rms_map,
    running_median,
    with_recent_blobs,
)
from blobpipe.images.template import Template
from blobpipe.params import Difference

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

DEFAULTS = Difference()
SHAPE = (1024, 1024)
KEPT_CARDS = ("TELESCOP", "INSTRUME", "DETECTOR", "FILTER", "TARGNAME", "ROOTNAME", "EXPSTART")


@dataclass(frozen=True)
class Candidate:
    """An image of the list, read or rejected for a reason; ``row`` is its place in ``frames.csv``, ``noise`` its own."""

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
        Where the mirror had put the blobs of each.
    pattern : ndarray, shape (ny, nx), float32
        The blobs that were moved.
    rows : list of int
        Row of each image in ``frames.csv``.
    """

    images: Image
    shifts: list[Shift]
    pattern: Image
    rows: list[int]


def subtract(
    image: Image, template: Template, params: Difference = DEFAULTS
) -> tuple[Image, Shift]:
    """Subtract a template from an image, its blobs moved to where the image has them.

    Parameters
    ----------
    image : ndarray, shape (ny, nx), float32
        Fraction of the light; NaN where there is no value.
    template : Template
        With a stack and its pattern.
    params : Difference, optional

    Returns
    -------
    ndarray, shape (ny, nx), float32
        A new blob is positive.
    Shift
        Of the known blobs, measured against the template; 0 where registration is off.

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
            f"found {nx}x{ny} pixels, expected {stack_nx}x{stack_ny} as in the median stack"
        )
    if not params.register_shift:
        return image - stack, NO_SHIFT
    shift = measure_shift(image, stack, pattern)
    return image - (stack + move_pattern(pattern, shift) - pattern), shift


def write_differences(
    raw_dir: str | Path, out_dir: str | Path, params: Difference, batch: int | None = None
) -> None:
    """Write the difference image of each image that has a whole stack before it (stage ``difference``).

    Parameters
    ----------
    raw_dir : path
        Images, ``frames.csv``, and ``blobs.csv`` if there is a catalogue.
    out_dir : path
        ``{frame}.fits.fz`` (HDU DIFFERENCE, fraction of the light, new blob positive, and HDU SCATTER, see `scatter`),
        then ``frames-NNN.csv`` for each batch. An image that cannot be used is rejected there, with the reason, and left out of the stacks.
    params : Difference
    batch : int, optional
        Only this batch of `tables.BATCH` rows. What comes out does not depend on how the work is shared out.

    Raises
    ------
    TableError
        If ``frames.csv`` or ``blobs.csv`` is at fault.

    Notes
    -----
    Source: ISR 2021-08 section 2; registration and the stack that knows new blobs are ours.
    """
    import pandas as pd

    table = tables.read_frame_list(raw_dir)
    blobs = _catalogue(raw_dir)
    batches = tables.batches(len(table))
    if batch is not None and batch not in range(len(batches)):
        raise TableError(
            f"{raw_dir}/frames.csv: its {len(table)} images make batches 0 to {len(batches) - 1}, no {batch}"
        )
    for number, rows in enumerate(batches):
        if batch not in (None, number):
            continue
        done = _subtract_rows(Path(raw_dir), Path(out_dir), params, table, blobs, rows)
        tables.write_table(Path(out_dir) / f"frames-{number:03d}.csv", pd.DataFrame(done))


def _catalogue(raw_dir: str | Path) -> pd.DataFrame:
    """The catalogue, with the row of each blob's first image (-1: before all) as ``first``."""
    blobs = tables.read_blobs(raw_dir)
    names = tables.read_frame_list(raw_dir)["frame"]
    rows = {name: row for row, name in enumerate(names)}
    return blobs.assign(first=[rows.get(name, -1) for name in blobs["first_frame"]])


def _subtract_rows(
    raw_dir: Path,
    out_dir: Path,
    params: Difference,
    table: pd.DataFrame,
    blobs: pd.DataFrame,
    rows: slice,
) -> list[dict[str, Any]]:
    read, images = _read_rows(raw_dir, table, rows, params.stack_size)
    candidates = [candidate for candidate in read if candidate.row >= rows.start]
    usable = [candidate for candidate in read if not candidate.reason]
    made: dict[str, dict[str, Any]] = {}
    if len(usable) > params.stack_size:
        registered = _register(images, usable, params, blobs)
        medians = running_median(registered.images[:-1], params.stack_size)
        for candidate, median in zip(usable[params.stack_size :], medians, strict=True):
            made[candidate.name] = _subtract_one(
                out_dir, params, candidate, registered, median, blobs
            )
    mjd = dict(zip(table["frame"], table["mjd"], strict=True))
    return [
        {"frame": candidate.name, "mjd": mjd[candidate.name]}
        | (made.get(candidate.name) or _without_difference(candidate, usable))
        for candidate in candidates
    ]


def _without_difference(candidate: Candidate, usable: list[Candidate]) -> dict[str, Any]:
    if candidate.reason:
        log.warning("%s rejected: %s", candidate.name, candidate.reason)
        return _result("rejected", reason=candidate.reason)
    n_stack = sum(other.row < candidate.row for other in usable)
    return _result("stack", reason=f"{n_stack} usable images before it", n_stack=n_stack)


def _result(
    status: str, *, reason: str = "", shift: Shift = NO_SHIFT, **found: Any
) -> dict[str, Any]:
    shifts = {"shift_x_px": shift.x_px, "shift_y_px": shift.y_px}
    return (
        {"status": status, "reason": reason}
        | shifts
        | {"noise_frac": np.nan, "n_stack": 0, "sha256": ""}
        | found
    )


def _read_rows(
    raw_dir: Path, table: pd.DataFrame, rows: slice, wanted: int
) -> tuple[list[Candidate], list[Image]]:
    """The images of some rows and before them, as many usable ones as ``wanted`` or there are; those that are usable."""
    read = [_read(raw_dir, table, row) for row in range(rows.start, rows.stop)]
    found = _compared([candidate for candidate, _ in read])
    start = rows.start
    while (
        start
        and sum(not candidate.reason for candidate in found if candidate.row < rows.start) < wanted
    ):
        start -= 1
        read.insert(0, _read(raw_dir, table, start))
        found = _compared([candidate for candidate, _ in read])
    images = [
        image
        for candidate, (_, image) in zip(found, read, strict=True)
        if image is not None and not candidate.reason
    ]
    return found, images


def _compared(candidates: list[Candidate]) -> list[Candidate]:
    """The same, those rejected whose noise is not that of most."""
    noise = [candidate.noise for candidate in candidates if not candidate.reason]
    if not noise:
        return candidates
    expected = noise_near(float(np.median(noise)))
    return [
        candidate if candidate.reason else _with_noise(candidate, expected)
        for candidate in candidates
    ]


def _with_noise(candidate: Candidate, expected: Range) -> Candidate:
    try:
        require_noise(candidate.noise, expected, candidate.name)
    except FrameError as error:
        return replace(candidate, reason=str(error))
    return candidate


def _read(raw_dir: Path, table: pd.DataFrame, row: int) -> tuple[Candidate, Image | None]:
    name = str(table["frame"].iloc[row])
    try:
        path = fits_images.find_image(raw_dir, name)
        frame = fits_images.read_frame(path)
        noise = fits_images.require_usable(frame, path)
        if frame.data.shape != SHAPE:
            ny, nx = frame.data.shape
            raise FrameError(f"{path}: found {nx}x{ny} pixels, expected {SHAPE[1]}x{SHAPE[0]}")
    except FrameError as error:
        return Candidate(row, name, {}, str(error)), None
    cards = {card: frame.header[card] for card in KEPT_CARDS if card in frame.header}
    return Candidate(row, name, cards, "", noise), np.where(
        np.isfinite(frame.data), frame.data, np.float32(np.nan)
    )


def _register(
    images: list[Image], usable: list[Candidate], params: Difference, blobs: pd.DataFrame
) -> Registered:
    """Move the blobs of images to their usual place, as the first of them show it; empties the list."""
    rows = [candidate.row for candidate in usable]
    stacked = np.stack(images)
    images.clear()  # a batch is large: it need not be held twice
    if not params.register_shift:
        return Registered(
            stacked, [NO_SHIFT] * len(rows), np.zeros(stacked.shape[1:], np.float32), rows
        )
    first = stacked[: params.stack_size]
    known = blobs[blobs["first"] <= rows[len(first) - 1]]
    plain = _stack(first, rows[: len(first)], params, known)
    # images that lie off blur the median
    once, shifts = register(first.copy(), plain, blob_pattern(plain, known))
    stack = _stack(once, rows[: len(first)], params, known, shifts)
    pattern = blob_pattern(stack, known)
    return Registered(*register(stacked, stack, pattern, n_first=len(first)), pattern, rows)


def _stack(
    images: Image,
    rows: list[int],
    params: Difference,
    known: pd.DataFrame,
    shifts: Sequence[Shift] | None = None,
) -> Image:
    median = running_median(images, len(images))[0]
    return with_recent_blobs(median, images, _recent(known, rows, median.shape, params), shifts)


def _subtract_one(
    out_dir: Path,
    params: Difference,
    candidate: Candidate,
    registered: Registered,
    median: Image,
    blobs: pd.DataFrame,
) -> dict[str, Any]:
    place = registered.rows.index(candidate.row)
    members = slice(place - params.stack_size, place)
    known = blobs[blobs["first"] < candidate.row]
    shift = registered.shifts[place]
    recent = _recent(known, registered.rows[members], median.shape, params)
    stack = with_recent_blobs(
        median, registered.images[members], recent, registered.shifts[members]
    )
    difference = registered.images[place] - stack
    if np.hypot(*shift) > NEGLIGIBLE_PX:
        rest = blob_pattern(stack, known) - registered.pattern  # mostly of blobs that landed later
        difference -= move_pattern(rest, shift) - rest
    noise = fits_images.median_and_noise(difference)[1]
    path = out_dir / f"{candidate.name}.fits.fz"
    found = {"BUNIT": "", "NSTACK": params.stack_size, "SHIFT_X": shift.x_px, "SHIFT_Y": shift.y_px}
    planes = {
        "DIFFERENCE": difference,
        "SCATTER": rms_map(registered.images[members], stack, recent),
    }
    fits_images.write_images(path, planes, header=candidate.cards | found, sigma=noise)
    return _result(
        "ok", shift=shift, noise_frac=noise, n_stack=params.stack_size, sha256=files.sha256(path)
    )


def _recent(
    blobs: pd.DataFrame, rows: list[int], shape: tuple[int, ...], params: Difference
) -> list[Recent]:
    return landed_within(blobs, rows, shape) if params.known_blobs else []


def reference(raw_dir: str | Path, out_dir: str | Path, params: Difference) -> None:
    """Write ``reference.fits.fz``: the median of the first images, its blob pattern and `scatter` (HDU STACK, PATTERN, SCATTER).

    Raises
    ------
    FrameError
        If there are fewer usable images than a stack takes.
    """
    table = tables.read_frame_list(raw_dir)
    blobs = _catalogue(raw_dir)
    members: list[Candidate] = []
    images: list[Image] = []
    stop = 0
    while len(members) < params.stack_size and stop < len(table):
        stop = min(stop + params.stack_size - len(members), len(table))
        read, images = _read_rows(Path(raw_dir), table, slice(0, stop), 0)
        members = [candidate for candidate in read if not candidate.reason]
    if len(members) < params.stack_size:
        raise FrameError(
            f"{raw_dir}: found {len(members)} usable images, expected at least difference.stack_size="
            f"{params.stack_size}; add images or lower it"
        )
    registered = _register(images, members, params, blobs)
    known = blobs[blobs["first"] <= members[-1].row]
    stack = _stack(registered.images, registered.rows, params, known, registered.shifts)
    varied = rms_map(registered.images, stack, _recent(known, registered.rows, stack.shape, params))
    planes = {"STACK": stack, "PATTERN": blob_pattern(stack, known), "SCATTER": varied}
    fits_images.write_images(Path(out_dir) / "reference.fits.fz", planes, sigma=clean_noise(stack))
