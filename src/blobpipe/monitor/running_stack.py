"""The running stack of the daily routine: the median of the images before one, from the log and a cache.

A stack takes each image with its known blobs at their usual place. What has to be taken off an image for that is measured
once and kept in the log (table ``corrections``); file and correction make the image again, to the byte. The cache only saves
that work: what it holds is used if its checksum is right, so that the same images give the same stack with it or without.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import sqlite3
import zlib
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from blobpipe.core import files, fits_images
from blobpipe.core.arrays import Image
from blobpipe.errors import FrameError
from blobpipe.images.noise import noise_near, require_noise
from blobpipe.images.pattern import blob_pattern
from blobpipe.images.register import NEGLIGIBLE_PX, Shift, register_images
from blobpipe.images.stack import ROWS, landed_within, rms_map
from blobpipe.monitor.inbox import path_of
from blobpipe.params import Difference

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

KEPT = 2  # stacks' worth of images in the cache: those that a late image needs as well
# of the light: corrections are kept in such steps, 1/60 of the noise of an image
STEP_FRAC = 2.0**-13
LARGEST = np.iinfo(np.int16).max  # steps: all of the light
DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Stack:
    """What is subtracted from an image.

    Attributes
    ----------
    data : ndarray, shape (ny, nx), float32
        Fraction of the light.
    scatter : ndarray, shape (ny // 2, nx // 2), float32, or None
        Of its images, from `stack.rms_map`; None for a stack that came as a file without one.
    n_images : int
        Of which it is the median; 0 for a stack that came as a file.
    sha256 : str
        Of its pixels.
    corrections : dict of bytes
        Of those of its images that had none in the log, by their SHA-256: to be logged with what the stack is used for.
    rejected : dict of str
        Why an image was left out although the log has it as usable, by its SHA-256: to be logged, too.
    """

    data: Image
    scatter: Image | None
    n_images: int
    sha256: str
    corrections: dict[str, bytes] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Member:
    """An image of the log that a stack takes.

    Attributes
    ----------
    sha256 : str
    paths : tuple of path
        Where its file was seen, the latest place first.
    mjd : float
    shift : Shift
        As it was searched; 0 if it was not.
    correction : bytes or None
        From `correction`; None for an image that no stack has taken yet.
    """

    sha256: str
    paths: tuple[Path, ...]
    mjd: float
    shift: Shift
    correction: bytes | None


def stack_before(
    connection: sqlite3.Connection,
    cache: Path,
    mjd: float,
    params: Difference,
    reference: Path | None = None,
    landed: pd.DataFrame | None = None,
    *,
    shape: tuple[int, ...] | None = None,
) -> Stack | None:
    """The stack for an image of this date.

    Parameters
    ----------
    cache : path
        Folder of the images at their usual place.
    mjd : float
        The images before it count.
    reference : path, optional
        A median stack to take while there are too few.
    landed : DataFrame, optional
        x_px, y_px, radius_px of new blobs, and the date of the image that showed each first (``first``, MJD): what the
        images before it show there is no scatter.
    shape : tuple of int, optional
        Of the image: only images of this size count, and a stack of this size.

    Returns
    -------
    Stack or None
        None if fewer than ``params.stack_size`` images are before it, and no stack of its size was named.

    Raises
    ------
    FrameError
        If an image that the log knows is neither cached nor a file any more, or is of another size.
    """
    rejected: dict[str, str] = {}
    while (
        len(found := members_before(connection, mjd, params.stack_size, shape, rejected))
        == params.stack_size
    ):
        images, corrections, unlike = _at_usual_place(found, cache, params)
        if unlike:
            rejected |= unlike
            continue
        median = _median(images)
        recent = (
            []
            if landed is None
            else landed_within(landed, [each.mjd for each in found], median.shape)
        )
        scatter = rms_map(images, median, recent, [each.shift for each in found])
        return _stack(median, scatter, len(found), corrections, rejected)
    if reference is None:
        return None
    stack = named(reference)
    return stack if shape in (None, stack.data.shape) else None


def named(path: Path) -> Stack:
    """Read a median stack that came as a file.

    Raises
    ------
    FrameError
        If it is no usable image, or its scatter is of another size.
    """
    data = fits_images.usable_image(path).data
    scatter = fits_images.find_plane(path, "SCATTER")
    expected = tuple(side // 2 for side in data.shape)
    if scatter is not None and scatter.shape != expected:
        raise FrameError(
            f"{path}: found a SCATTER of shape {scatter.shape}, expected {expected}; make the stack again"
        )
    return _stack(data, scatter, 0)


def size_of(connection: sqlite3.Connection) -> tuple[int, int] | None:
    """Shape (ny, nx) of the images that a log searches; None before the first."""
    row = connection.execute(
        "SELECT ny_px, nx_px FROM images WHERE kind = 'image' AND outcome = 'searched' AND ny_px IS NOT NULL LIMIT 1"
    ).fetchone()
    return None if row is None else (row["ny_px"], row["nx_px"])


def insist_on_size(connection: sqlite3.Connection, shape: tuple[int, ...]) -> None:
    """Refuse an image of another size than those that the log searches.

    Raises
    ------
    FrameError
        If it is.
    """
    if (expected := size_of(connection)) not in (None, shape):
        raise FrameError(_other_size(shape, expected))


def reject_other_sizes(connection: sqlite3.Connection, shape: tuple[int, int]) -> None:
    """Once the first image is searched, reject those that waited for a stack of another size; in its transaction."""
    rows = connection.execute(
        "SELECT id, ny_px, nx_px FROM images WHERE kind = 'image' AND outcome = 'stack' AND (ny_px, nx_px) != (?, ?)",
        shape,
    ).fetchall()
    for row in rows:
        reason = _other_size((row["ny_px"], row["nx_px"]), shape)
        connection.execute(
            "UPDATE images SET outcome = 'rejected', reason = ? WHERE id = ?", (reason, row["id"])
        )


def _other_size(found: tuple[int, ...], expected: tuple[int, ...] | None) -> str:
    (ny, nx) = found
    (expected_ny, expected_nx) = expected or (0, 0)
    return f"found {nx}x{ny} pixels, expected {expected_nx}x{expected_ny} as the images that this log searches; give it another log"


def members_before(
    connection: sqlite3.Connection,
    mjd: float,
    size: int,
    shape: tuple[int, ...] | None = None,
    left_out: Collection[str] = (),
) -> list[Member]:
    """The last images before a date that could be used, in order of date, those of some SHA-256 left out; of a size if one is given."""
    ny, nx = shape or (None, None)
    rows = connection.execute(
        "SELECT sha256, mjd, shift_x_px, shift_y_px, "
        "(SELECT bytes FROM corrections WHERE image = images.id) AS correction, "
        "(SELECT json_group_array(path) FROM (SELECT path FROM files WHERE image = images.id ORDER BY files.id DESC)) AS paths "
        "FROM images WHERE kind = 'image' AND outcome != 'rejected' AND superseded_by IS NULL AND mjd < ? "
        "AND sha256 NOT IN (SELECT value FROM json_each(?)) "
        # version 1 noted no size
        "AND coalesce(ny_px = ? AND nx_px = ?, 1) ORDER BY mjd DESC, sha256 LIMIT ?",
        (mjd, json.dumps(list(left_out)), ny, nx, size),
    ).fetchall()
    return [
        Member(
            row["sha256"],
            tuple(map(path_of, json.loads(row["paths"]))),
            row["mjd"],
            Shift(row["shift_x_px"] or 0.0, row["shift_y_px"] or 0.0),
            row["correction"],
        )
        for row in reversed(rows)
    ]


def correction(image: Image, difference_frac: Image, stack: Image, shift: Shift) -> bytes:
    """What has to be taken off an image to have its blobs at their usual place, as the log keeps it.

    Parameters
    ----------
    image, difference_frac, stack : ndarray, shape (ny, nx), float32
        What `difference.difference_image` took and gave.
    shift : Shift
        Where it found the blobs; for a negligible shift nothing is taken off.
    """
    if np.hypot(*shift) <= NEGLIGIBLE_PX:
        return b""
    return _packed(np.nan_to_num(image - difference_frac - stack))


def _packed(change: Image) -> bytes:
    """As compressed numbers of `STEP_FRAC`; empty for no change."""
    steps = np.rint(change / STEP_FRAC).clip(-LARGEST, LARGEST).astype("<i2")
    return zlib.compress(steps.tobytes(), 1) if steps.any() else b""


def _corrected(image: npt.NDArray[Any], packed: bytes) -> npt.NDArray[np.float16]:
    """An image with its blobs at their usual place, as stacks take it: half precision rounds by a hundredth of the noise."""
    if packed:
        steps = np.frombuffer(zlib.decompress(packed), "<i2").reshape(image.shape)
        image = (image - steps * np.float32(STEP_FRAC)).astype(np.float32)
    limit = np.finfo(np.float16).max  # beyond it is no light loss
    rounded: npt.NDArray[np.float16] = np.clip(image, -limit, limit).astype(np.float16)
    return rounded


def keep(cache: Path, sha256: str, image: Image, packed: bytes) -> None:
    """Put an image into the cache, its correction taken off."""
    _keep(cache, sha256, _corrected(image, packed), packed)


def _keep(cache: Path, sha256: str, image: npt.NDArray[np.float16], packed: bytes) -> None:
    buffer = io.BytesIO()
    np.save(buffer, image)
    with files.atomic(_cached(cache, sha256)) as temporary:
        temporary.write_bytes(buffer.getvalue() + _digest(sha256, packed, buffer.getbuffer()))


def _digest(sha256: str, packed: bytes, content: memoryview) -> bytes:
    """Checksum of a cached image, which also says of which image and correction it is."""
    found = hashlib.sha256(sha256.encode() + packed)
    found.update(content)
    return found.digest()


def prune(connection: sqlite3.Connection, cache: Path, size: int) -> None:
    """Leave in the cache the newest images of the log only: no older ones, and nothing that a killed run left.

    What the cache holds then hangs on the log alone. Nobody else may be using it meanwhile.
    """
    needed = {
        _cached(cache, member.sha256) for member in members_before(connection, np.inf, KEPT * size)
    }
    for path in cache.glob("*.npy"):  # the temporary names of `files.atomic` too
        if path not in needed:
            path.unlink(missing_ok=True)


def _cached(cache: Path, sha256: str) -> Path:
    return cache / f"{sha256}.npy"


def _at_usual_place(
    members: list[Member], cache: Path, params: Difference
) -> tuple[Image, dict[str, bytes], dict[str, str]]:
    """The images with their blobs where they usually are, shape (n, ny, nx).

    Those that no stack has taken yet are compared with the others, and registered to where these have the blobs.

    Returns
    -------
    ndarray, shape (n, ny, nx), float32
    dict of bytes
        The corrections that are new.
    dict of str
        Which images cannot be in one stack with the others, and why; the rest is of no use then.
    """
    new = [i for i, member in enumerate(members) if member.correction is None]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = list(pool.map(lambda member: _usual(member, cache), members))
        _insist_on_one_size(images, members)
        stacked = np.empty((len(images), *images[0].shape), np.float32)
        list(pool.map(stacked.__setitem__, range(len(images)), images))
    if not new:
        return stacked, {}, {}
    if unlike := _unlike(stacked, new, members):
        return stacked, {}, unlike
    corrections = {}
    for i, change in zip(new, _changes(stacked, new, params), strict=True):
        packed = corrections[members[i].sha256] = _packed(change)
        half = _corrected(images[i], packed)
        _keep(cache, members[i].sha256, half, packed)
        stacked[i] = half
    return stacked, corrections, {}


def _unlike(images: Image, new: list[int], members: list[Member]) -> dict[str, str]:
    """Those of some images that are new whose noise is not that of most, and what is wrong with each."""
    noise = [fits_images.median_and_noise(image)[1] for image in images]
    expected = noise_near(float(np.median(noise)))
    unlike = {}
    for i in new:
        try:
            require_noise(noise[i], expected, members[i].paths[0])
        except FrameError as error:
            unlike[members[i].sha256] = str(error)
    return unlike


def _usual(member: Member, cache: Path) -> npt.NDArray[Any]:
    """A member with its blobs at their usual place, from the cache or from its file; as it is if nobody knows that place."""
    if member.correction is None:
        return _read(member)
    image = _loaded(member, cache)
    if image is None:
        image = _corrected(_read(member), member.correction)
        _keep(cache, member.sha256, image, member.correction)
    return image


def _loaded(member: Member, cache: Path) -> npt.NDArray[np.float16] | None:
    """An image of the cache; None if it is not there, or not what was kept."""
    try:
        content = memoryview(_cached(cache, member.sha256).read_bytes())
    except OSError:
        return None
    body = content[:-DIGEST_BYTES]
    digest = content[-DIGEST_BYTES:]
    if digest != _digest(member.sha256, member.correction or b"", body):
        return None
    image: npt.NDArray[np.float16] = np.load(io.BytesIO(body))
    return image


def _insist_on_one_size(images: list[npt.NDArray[Any]], members: list[Member]) -> None:
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise FrameError(
            f"{members[0].paths[0].parent}: images of {len(shapes)} sizes in one stack, expected one; sort them"
        )


def _changes(images: Image, new: list[int], params: Difference) -> Image:
    """What moves the blobs of those of some images that are new to where the others have them or, without others, most have."""
    log.info("%d of the stack's %d images are registered from their files", len(new), len(images))
    changes = np.zeros_like(images[new])
    if not params.register_shift:
        return changes
    others = np.delete(images, new, axis=0)
    for _ in range(2):  # the first time, those that lie off blur the median
        median = _median(np.concatenate([others, images[new] - changes]))
        both = np.concatenate([others, images[new]])
        _, shifts = register_images(both, median, blob_pattern(median), n_first=len(others) or None)
        moved = np.hypot(*np.array(shifts[len(others) :]).T) > NEGLIGIBLE_PX
        changes = np.where(
            moved[:, None, None], np.nan_to_num(images[new] - both[len(others) :]), np.float32(0)
        )
    return changes


def _read(member: Member) -> Image:
    path = next((path for path in member.paths if _holds(path, member.sha256)), None)
    if path is None:
        raise FrameError(
            f"{member.paths[0]}: not found, or changed, expected the image {member.sha256[:12]} of the log, which the "
            "stack needs; put it back"
        )
    data = fits_images.usable_image(path).data
    return np.where(np.isfinite(data), data, np.float32(np.nan))


def _holds(path: Path, sha256: str) -> bool:
    """Whether a file that can be read has these bytes."""
    try:
        return path.is_file() and files.sha256(path) == sha256
    except OSError:
        return False


def _median(images: Image) -> Image:
    """Median of each pixel, missing values left out, in blocks of rows on all cores."""
    import bottleneck

    median = np.empty(images.shape[1:], np.float32)

    def block(rows: slice) -> None:
        median[rows] = bottleneck.nanmedian(
            np.ascontiguousarray(np.moveaxis(images[:, rows], 0, -1)), axis=-1
        )

    starts = range(0, len(median), ROWS)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(block, [slice(start, start + ROWS) for start in starts]))
    return median


def _stack(
    data: Image,
    scatter: Image | None,
    n_images: int,
    corrections: dict[str, bytes] | None = None,
    rejected: dict[str, str] | None = None,
) -> Stack:
    sha256 = hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest()
    return Stack(data, scatter, n_images, sha256, corrections or {}, rejected or {})
