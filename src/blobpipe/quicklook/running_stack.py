"""Keep the running stack of the daily routine: the median of the images before a date, from the log and a cache.

A stack takes each image with its known blobs at their usual position. What has to be subtracted from an image for that
is measured once and kept in the log (table ``corrections``); file and correction reproduce the image to the byte. The
cache only saves that work: a cached image is used if its checksum is right, so the same images give the same stack with
or without it. The checksum covers how images are read, too: with other bad pixels, or a detector's file that was corrected,
images are read anew from their files.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import re
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
from blobpipe.core.detector import DEFAULT, Detector
from blobpipe.errors import FrameError
from blobpipe.history import deep
from blobpipe.history.deep import Latest, SettledImage
from blobpipe.images.bad_pixels import BadPixels
from blobpipe.images.flatten import read_blob_image
from blobpipe.images.pattern import blob_pattern
from blobpipe.images.register import NEGLIGIBLE_PX, Shift, move_pattern, register_images
from blobpipe.images.stack import landed_within, rms_map
from blobpipe.monitor.inbox import path_of
from blobpipe.noise.level import noise_near, require_noise
from blobpipe.params import Difference

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

HalfImage = npt.NDArray[np.float16]

KEPT = 2  # stacks' worth of images in the cache: a late image needs older ones, too
STEP_FRAC = (
    2.0**-13
)  # step of a stored correction (fraction of the light): 1/60 of an image's noise
LARGEST = np.iinfo(np.int16).max  # largest correction in such steps: all of the light
DIGEST_BYTES = hashlib.sha256().digest_size
ROWS = 64  # of a stack that a thread works on at a time: they fit into the cache


@dataclass(frozen=True)
class Cache:
    """Folder of images of a detector with their blobs at their usual position, and the bad pixels that have no value in them.

    The settled images that the latest deep search took stay in memory, by the checksum of their file.
    """

    folder: Path
    bad_pixels: BadPixels = field(default_factory=BadPixels)
    detector: Detector = DEFAULT
    settled: dict[str, SettledImage] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Return what tells how the images were read: their bad pixels and, unless it is the default, the exposures' detector."""
        reading = (self.detector.exposure, self.detector.border_px)
        if reading == (DEFAULT.exposure, DEFAULT.border_px):
            return self.bad_pixels.key
        return f"{self.bad_pixels.key} {reading}"

    def path_of(self, sha256: str) -> Path:
        """Return the file of an image."""
        return self.folder / f"{sha256}.npy"

    def settled_path(self, sha256: str) -> Path:
        """Return the file of a settled image."""
        return self.folder / f"{sha256}-settled.npy"


@dataclass(frozen=True)
class Stack:
    """Hold what is subtracted from an image.

    Attributes
    ----------
    data : ndarray, shape (ny, nx), float32
        Median (fraction of the light).
    rms : ndarray, shape (ny // 2, nx // 2), float32, or None
        RMS map of its images, from `images.stack.rms_map`; None for a stack from a file without one.
    n_images : int
        Number of images; 0 for a stack from a file.
    sha256 : str
        Checksum of the pixels.
    corrections : dict of bytes
        Corrections that were measured for this stack, by the SHA-256 of their image; to be logged with what the stack
        is used for.
    rejected : dict of str
        Why images that the log has as usable were left out, by their SHA-256; to be logged, too.
    """

    data: Image
    rms: Image | None
    n_images: int
    sha256: str
    corrections: dict[str, bytes] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Member:
    """Describe an image of the log that a stack takes.

    Attributes
    ----------
    sha256 : str
    paths : tuple of path
        Places where its file was seen, the latest first.
    mjd : float
    shift : Shift
        Shift with which it was searched; 0 if it was not.
    correction : bytes or None
        From `correction`; None for an image that no stack has taken yet.
    """

    sha256: str
    paths: tuple[Path, ...]
    mjd: float
    shift: Shift
    correction: bytes | None


# --------------------------------------------------------------------------------------------------------- stacks


def stack_before(
    connection: sqlite3.Connection,
    cache: Cache,
    mjd: float,
    params: Difference,
    reference: Path | None = None,
    landed: pd.DataFrame | None = None,
    *,
    shape: tuple[int, ...] | None = None,
) -> Stack | None:
    """Make the stack for an image of a date.

    Parameters
    ----------
    connection : sqlite3.Connection
        The log.
    cache : Cache
    mjd : float
        Date of the image; the stack takes the images before it.
    params : Difference
    reference : path, optional
        Median stack to use as long as there are too few images.
    landed : DataFrame, optional
        x_px, y_px, radius_px of new blobs, and the date of the image that showed each first (``first``, MJD). Their
        signal does not count as variation of the images before them.
    shape : tuple of int, optional
        Shape of the image; images and stacks of other shapes are left out.

    Returns
    -------
    Stack or None
        None if fewer than ``params.stack_size`` images precede the date, and no reference of that shape was given.

    Raises
    ------
    FrameError
        If an image of the log is neither cached nor found as a file, or has another size.
    """
    rejected: dict[str, str] = {}
    while True:
        members = members_before(connection, mjd, params.stack_size, shape, rejected)
        if len(members) < params.stack_size:
            break

        # an image that turns out unusable is replaced by the next older one
        images, corrections, unusable = _at_usual_position(members, cache, params)
        if unusable:
            rejected |= unusable
            continue

        median = _median(images)
        recent: Any = []
        if landed is not None:
            recent = landed_within(landed, [member.mjd for member in members], median.shape)
        rms = rms_map(images, median, recent, [member.shift for member in members])
        return _stack(median, rms, len(members), corrections, rejected)

    if reference is None:
        return None
    stack = read_stack(reference, cache.bad_pixels, cache.detector)
    return stack if shape in (None, stack.data.shape) else None


def read_stack(
    path: Path, bad_pixels: BadPixels | None = None, detector: Detector = DEFAULT
) -> Stack:
    """Read a median stack without its bad pixels, with its RMS map (extension SCATTER) if it has one.

    Raises
    ------
    FrameError
        If it is no usable image, or its RMS map has the wrong size.
    """
    bad = bad_pixels or BadPixels(dq_flags=detector.exposure.bad_dq)
    data = bad.blank(fits_images.read_image(path, detector), path).data
    rms = fits_images.find_plane(path, "SCATTER")
    expected = tuple(side // 2 for side in data.shape)
    if rms is not None and rms.shape != expected:
        raise FrameError(
            f"{path}: found a SCATTER of shape {rms.shape}, expected {expected}; make the stack again"
        )
    return _stack(data, bad.blank_cells(rms), 0)


def _stack(
    data: Image,
    rms: Image | None,
    n_images: int,
    corrections: dict[str, bytes] | None = None,
    rejected: dict[str, str] | None = None,
) -> Stack:
    """Make a stack with the checksum of its pixels."""
    sha256 = hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest()
    return Stack(data, rms, n_images, sha256, corrections or {}, rejected or {})


def _median(images: Image) -> Image:
    """Return the median of each pixel without missing values, computed in blocks of rows on all cores."""
    import bottleneck

    median = np.empty(images.shape[1:], np.float32)

    def fill(start: int) -> None:
        rows = slice(start, start + ROWS)
        # the values of a pixel side by side in memory
        values = np.ascontiguousarray(np.moveaxis(images[:, rows], 0, -1))
        median[rows] = bottleneck.nanmedian(values, axis=-1)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill, range(0, len(median), ROWS)))
    return median


# ---------------------------------------------------------------------------------------------------------- sizes


def size_of(connection: sqlite3.Connection) -> tuple[int, int] | None:
    """Return the shape (ny, nx) of the images that a log searches; None before the first of them."""
    row = connection.execute(
        "SELECT ny_px, nx_px FROM images WHERE kind = 'image' AND outcome = 'searched' AND ny_px IS NOT NULL LIMIT 1"
    ).fetchone()
    return None if row is None else (row["ny_px"], row["nx_px"])


def require_size(connection: sqlite3.Connection, shape: tuple[int, ...]) -> None:
    """Refuse an image of another shape than those that the log searches.

    Raises
    ------
    FrameError
        If its shape differs.
    """
    expected = size_of(connection)
    if expected not in (None, shape):
        raise FrameError(_other_size(shape, expected))


def reject_other_sizes(connection: sqlite3.Connection, shape: tuple[int, int]) -> None:
    """Reject the images that waited for a stack of another shape than that of the first image to be searched.

    Call it within the transaction that logs that image.
    """
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
    """Say that an image has another size than those of the log."""
    (ny, nx) = found
    (expected_ny, expected_nx) = expected or (0, 0)
    return (
        f"found {nx}x{ny} pixels, expected {expected_nx}x{expected_ny} as the images that this log searches; "
        "give it another log"
    )


# -------------------------------------------------------------------------------------------------------- members


def members_before(
    connection: sqlite3.Connection,
    mjd: float,
    size: int,
    shape: tuple[int, ...] | None = None,
    left_out: Collection[str] = (),
) -> list[Member]:
    """Return the last usable images before a date, in order of date.

    Parameters
    ----------
    mjd : float
    size : int
        Largest number of images.
    shape : tuple of int, optional
        Shape that the images must have; those that an old log noted no size of pass.
    left_out : collection of str
        SHA-256 of images to leave out.
    """
    ny, nx = shape or (None, None)
    rows = connection.execute(
        "SELECT sha256, mjd, shift_x_px, shift_y_px, "
        "(SELECT bytes FROM corrections WHERE image = images.id) AS correction, "
        "(SELECT json_group_array(path) FROM (SELECT path FROM files WHERE image = images.id ORDER BY files.id DESC)) AS paths "
        "FROM images WHERE kind = 'image' AND outcome != 'rejected' AND superseded_by IS NULL AND mjd < ? "
        "AND sha256 NOT IN (SELECT value FROM json_each(?)) "
        # version 1 of the log noted no size
        "AND coalesce(ny_px = ? AND nx_px = ?, 1) ORDER BY mjd DESC, sha256 LIMIT ?",
        (mjd, json.dumps(list(left_out)), ny, nx, size),
    ).fetchall()
    return [
        Member(
            sha256=row["sha256"],
            paths=tuple(map(path_of, json.loads(row["paths"]))),
            mjd=row["mjd"],
            shift=Shift(row["shift_x_px"] or 0.0, row["shift_y_px"] or 0.0),
            correction=row["correction"],
        )
        for row in reversed(rows)
    ]


def _at_usual_position(
    members: list[Member], cache: Cache, params: Difference
) -> tuple[Image, dict[str, bytes], dict[str, str]]:
    """Return the images with their blobs at their usual position, and what was learnt of new ones.

    Images that no stack has taken yet are compared with the others and registered to them.

    Returns
    -------
    ndarray, shape (n, ny, nx), float32
    dict of bytes
        Corrections of the new images.
    dict of str
        Images that cannot be in one stack with the others, and why. If there are any, the rest is of no use.
    """
    # read in parallel, then copied into one array in parallel
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = list(pool.map(lambda member: _corrected_member(member, cache), members))
        shapes = {image.shape for image in images}
        if len(shapes) > 1:
            raise FrameError(
                f"{members[0].paths[0].parent}: images of {len(shapes)} sizes in one stack, expected one; sort them into "
                "folders with a log each"
            )
        stacked = np.empty((len(images), *images[0].shape), np.float32)
        list(pool.map(stacked.__setitem__, range(len(images)), images))

    new = [i for i, member in enumerate(members) if member.correction is None]
    if not new:
        return stacked, {}, {}

    # a noisy image would spoil the registration of the others
    unusable = _of_other_noise(stacked, new, members)
    if unusable:
        return stacked, {}, unusable

    corrections = {}
    for i, change in zip(new, _changes(stacked, new, params, cache.detector), strict=True):
        packed = _packed(change)
        half = _corrected(images[i], packed)
        _keep(cache, members[i].sha256, half, packed)
        corrections[members[i].sha256] = packed
        stacked[i] = half
    return stacked, corrections, {}


def _of_other_noise(images: Image, new: list[int], members: list[Member]) -> dict[str, str]:
    """Return the new images whose noise is not near that of most images, and what is wrong with each."""
    noise = [fits_images.median_and_noise(image)[1] for image in images]
    expected = noise_near(float(np.median(noise)))
    reasons = {}
    for i in new:
        try:
            require_noise(noise[i], expected, members[i].paths[0])
        except FrameError as error:
            reasons[members[i].sha256] = str(error)
    return reasons


def _corrected_member(member: Member, cache: Cache) -> npt.NDArray[Any]:
    """Return an image with its blobs at their usual position, or as it is if it has no correction yet."""
    if member.correction is None:
        return _read(member, cache)
    image = _loaded(member, cache)
    if image is None:
        image = _corrected(_read(member, cache), member.correction)
        _keep(cache, member.sha256, image, member.correction)
    return image


def _changes(images: Image, new: list[int], params: Difference, detector: Detector) -> Image:
    """Return what to subtract from the new images to move their blobs to where the others have them.

    Without others, the usual position is the one that most of the new images share.
    """
    if len(new) == len(images):
        log.info("preparing the first stack from %d images (once)", len(images))
    else:
        log.info("registering %d of the stack's %d images (once)", len(new), len(images))
    changes = np.zeros_like(images[new])
    if not (params.register_shift and detector.moves):
        return changes

    # twice, as images that are off blur the first median
    others = np.delete(images, new, axis=0)
    n_others = len(others)
    for _ in range(2):
        median = _median(np.concatenate([others, images[new] - changes]))
        pattern = blob_pattern(median)
        registered = np.concatenate([others, images[new]])
        _, shifts = register_images(
            registered,
            median,
            pattern,
            largest_px=detector.motion.largest_px,
            n_first=n_others or None,
        )
        for change, shift in zip(changes, shifts[n_others:], strict=True):
            change[:] = _displacement(pattern, shift)
    return changes


def _read(member: Member, cache: Cache) -> Image:
    """Read an image from the first of its files that still holds it, NaN for missing and for bad pixels."""
    path = next((path for path in member.paths if _holds(path, member.sha256)), None)
    if path is None:
        raise FrameError(
            f"{member.paths[0]}: not found, or changed, expected the image {member.sha256[:12]} of the log, which the "
            "stack needs; put it back, then run once with --again"
        )
    data = read_blob_image(path, cache.bad_pixels, cache.detector).data
    return np.where(np.isfinite(data), data, np.float32(np.nan))


def _holds(path: Path, sha256: str) -> bool:
    """Tell whether a file can be read and has a checksum."""
    try:
        return path.is_file() and files.sha256(path) == sha256
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------------- corrections


def correction(pattern: Image, shift: Shift) -> bytes:
    """Return what has to be subtracted from an image to have its blobs at their usual position, as the log keeps it.

    It does not depend on the image's bad pixels, which may be others when it is used again.

    Parameters
    ----------
    pattern : ndarray, shape (ny, nx), float32
        Of the stack that was subtracted from the image.
    shift : Shift
        Where `difference.subtract` found the blobs; for a negligible shift the correction is empty.
    """
    return _packed(_displacement(pattern, shift))


def _displacement(pattern: Image, shift: Shift) -> Image:
    """Return a blob pattern as an image has it, minus the pattern at its usual place; 0 for a negligible shift."""
    if np.hypot(*shift) <= NEGLIGIBLE_PX:
        return np.zeros_like(pattern)
    return move_pattern(pattern, shift) - pattern


def _packed(change: Image) -> bytes:
    """Compress a correction in steps of `STEP_FRAC`; empty for no change."""
    steps = np.rint(change / STEP_FRAC).clip(-LARGEST, LARGEST).astype("<i2")
    return zlib.compress(steps.tobytes(), 1) if steps.any() else b""


def _corrected(image: npt.NDArray[Any], packed: bytes) -> HalfImage:
    """Subtract a correction from an image, in half precision, which rounds by a hundredth of the noise."""
    if packed:
        steps = np.frombuffer(zlib.decompress(packed), "<i2").reshape(image.shape)
        image = (image - steps * np.float32(STEP_FRAC)).astype(np.float32)
    # values beyond half precision are no light loss
    limit = np.finfo(np.float16).max
    rounded: HalfImage = np.clip(image, -limit, limit).astype(np.float16)
    return rounded


# ---------------------------------------------------------------------------------------------------------- cache


def keep(cache: Cache, sha256: str, image: Image, packed: bytes) -> None:
    """Put an image into the cache with its correction subtracted.

    Parameters
    ----------
    cache : Cache
    sha256 : str
        Checksum of the image's file.
    image : ndarray, shape (ny, nx), float32
        Without its bad pixels.
    packed : bytes
        From `correction`.
    """
    _keep(cache, sha256, _corrected(image, packed), packed)


def _keep(cache: Cache, sha256: str, image: HalfImage, packed: bytes) -> None:
    """Write a corrected image and its checksum."""
    buffer = io.BytesIO()
    np.save(buffer, image)
    digest = _digest(cache, sha256, packed, buffer.getbuffer())
    with files.atomic(cache.path_of(sha256)) as temporary:
        temporary.write_bytes(buffer.getvalue() + digest)


def _loaded(member: Member, cache: Cache) -> HalfImage | None:
    """Read an image from the cache; None if it is not there or not what was put there."""
    try:
        content = memoryview(cache.path_of(member.sha256).read_bytes())
    except OSError:
        return None
    body = content[:-DIGEST_BYTES]
    digest = content[-DIGEST_BYTES:]
    if digest != _digest(cache, member.sha256, member.correction or b"", body):
        return None
    image: HalfImage = np.load(io.BytesIO(body))
    return image


def _digest(cache: Cache, sha256: str, packed: bytes, content: memoryview) -> bytes:
    """Return the checksum of a cached image with that of its file, its correction, and its bad pixels."""
    digest = hashlib.sha256(f"{cache.key} {sha256}".encode() + packed)
    digest.update(content)
    return digest.digest()


# --------------------------------------------------------------------------------------------------- latest images


def latest_before(
    connection: sqlite3.Connection, cache: Cache, mjd: float, stack: Image
) -> tuple[Latest, list[Member]]:
    """Return the latest settled images before a date, and what the log has of each.

    An image that has not been settled yet, since it waited for the first stack, is compared with this one.

    Parameters
    ----------
    connection : sqlite3.Connection
        The log.
    cache : Cache
    mjd : float
    stack : ndarray, shape (ny, nx), float32
        What is subtracted from the image of that date.
    """
    latest = Latest()
    taken = []
    settled: dict[str, SettledImage] = {}
    for member in members_before(connection, mjd, deep.KEPT - 1, stack.shape):
        image = cache.settled.get(member.sha256) or _load_settled(member.sha256, cache, stack.shape)
        if image is None:
            # One that is neither settled nor there any more is left out
            try:
                registered = _corrected_member(member, cache).astype(np.float32)
            except FrameError:
                continue
            image = deep.settle(registered - stack, stack)
            keep_settled(cache, member.sha256, image)
        settled[member.sha256] = image
        latest.add(image)
        taken.append(member)

    # What the next image does not take either is dropped
    cache.settled.clear()
    cache.settled.update(settled)
    return latest, taken


def keep_settled(cache: Cache, sha256: str, image: SettledImage) -> None:
    """Put a settled image into the cache.

    Parameters
    ----------
    cache : Cache
    sha256 : str
        Checksum of the image's file.
    image : SettledImage
    """
    cache.settled[sha256] = image
    with files.atomic(cache.settled_path(sha256)) as temporary, temporary.open("wb") as file:
        file.write(image.values.data)
        file.write(np.float64(image.noise_frac).tobytes())
        file.write(_settled_digest(cache, sha256, image))


def _load_settled(sha256: str, cache: Cache, shape: tuple[int, ...]) -> SettledImage | None:
    """Read a settled image from the cache; None if it is not there or not what was put there."""
    try:
        content = np.fromfile(cache.settled_path(sha256), np.uint8)
    except OSError:
        return None
    n_bytes = math.prod(shape) * np.dtype(np.int16).itemsize
    if len(content) != n_bytes + np.dtype(np.float64).itemsize + DIGEST_BYTES:
        return None
    values = content[:n_bytes].view(np.int16).reshape(shape)
    noise = content[n_bytes:-DIGEST_BYTES].view(np.float64)
    image = SettledImage(values, float(noise[0]))
    is_sound = content[-DIGEST_BYTES:].tobytes() == _settled_digest(cache, sha256, image)
    return image if is_sound else None


def _settled_digest(cache: Cache, sha256: str, image: SettledImage) -> bytes:
    """Return the checksum of a settled image; of its pixels the CRC, since sixty images are read at a time."""
    content = f"settled {image.noise_frac} {zlib.crc32(image.values.data)}"
    return hashlib.sha256(f"{cache.key} {sha256} {content}".encode()).digest()


def prune(connection: sqlite3.Connection, cache: Cache, size: int) -> None:
    """Remove all images from the cache but those of the newest images of the log.

    What the cache holds of this log's images then depends on the log alone, whatever a killed run has left there. No
    other process may be using it meanwhile. Images of other logs in the same folder stay.

    Parameters
    ----------
    size : int
        Number of images in a stack.
    """
    members = members_before(connection, np.inf, max(KEPT * size, deep.KEPT))
    needed = {cache.path_of(member.sha256) for member in members[-KEPT * size :]}
    needed |= {cache.settled_path(member.sha256) for member in members}
    for path in own_files(connection, cache.folder, ".npy"):
        if path not in needed:
            path.unlink(missing_ok=True)

    # nor may memory know more than a run that begins anew
    for sha256 in cache.settled.keys() - {member.sha256 for member in members}:
        del cache.settled[sha256]


def own_files(connection: sqlite3.Connection, folder: Path, *suffixes: str) -> list[Path]:
    """List the files of a folder that were made for images of a log, and those that a killed `files.atomic` has left.

    Parameters
    ----------
    connection : sqlite3.Connection
        The log.
    folder : path
        Other logs, and people, may keep files there, too.
    suffixes : str
        Such as ``.npy``.
    """
    ends = "|".join(map(re.escape, suffixes))
    named = re.compile(rf"\.?([0-9a-f]{{64}})(-settled)?(\.\d+\.tmp)?({ends})")
    own = []
    for path in folder.glob("*"):
        found = named.fullmatch(path.name)
        query = "SELECT 1 FROM images WHERE sha256 = ?"
        if found and connection.execute(query, (found[1],)).fetchone():
            own.append(path)
    return own
