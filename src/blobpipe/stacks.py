"""The running stack of the daily routine: the median of the images before one, from the log and a cache.

Each image that has been searched is kept with its known blobs at their usual place. The cache holds nothing that could
not be made again from the images, and the same images always give the same stack.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from blobpipe import difference, frames
from blobpipe.errors import FrameError
from blobpipe.inbox import path_of
from blobpipe.params import Difference

log = logging.getLogger(__name__)

Image = npt.NDArray[np.float32]

KEPT = 2  # stacks' worth of images in the cache: those that a late image needs as well


@dataclass(frozen=True)
class Stack:
    """What is subtracted from an image.

    Attributes
    ----------
    data : ndarray, shape (ny, nx), float32
        Fraction of the light.
    scatter : ndarray, shape (ny // 2, nx // 2), float32, or None
        Of its images, from `difference.scatter`; None for a stack that came as a file without one.
    n_images : int
        Of which it is the median; 0 for a stack that came as a file.
    sha256 : str
        Of its pixels.
    """

    data: Image
    scatter: Image | None
    n_images: int
    sha256: str


@dataclass(frozen=True)
class Member:
    """An image of the log that a stack takes, and where its file was seen, the latest place first."""

    sha256: str
    paths: tuple[Path, ...]


def stack_before(
    connection: sqlite3.Connection,
    cache: Path,
    mjd: float,
    params: Difference,
    reference: Path | None = None,
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
    found = members_before(connection, mjd, params.stack_size, shape)
    if len(found) == params.stack_size:
        images = _at_usual_place(found, cache, params)
        median = _median(images)
        return _stack(median, difference.scatter(images, median), len(found))
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
    data, scatter = frames.usable_image(path).data, frames.find_plane(path, "SCATTER")
    expected = tuple(side // 2 for side in data.shape)
    if scatter is not None and scatter.shape != expected:
        raise FrameError(f"{path}: found a SCATTER of shape {scatter.shape}, expected {expected}; make the stack again")
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
        connection.execute("UPDATE images SET outcome = 'rejected', reason = ? WHERE id = ?", (reason, row["id"]))


def _other_size(found: tuple[int, ...], expected: tuple[int, ...] | None) -> str:
    (ny, nx), (expected_ny, expected_nx) = found, expected or (0, 0)
    return f"found {nx}x{ny} pixels, expected {expected_nx}x{expected_ny} as the images that this log searches; give it another log"


def members_before(
    connection: sqlite3.Connection, mjd: float, size: int, shape: tuple[int, ...] | None = None
) -> list[Member]:
    """The last images before a date that could be used, of a size if one is given, in order of date."""
    ny, nx = shape or (None, None)
    rows = connection.execute(
        "SELECT sha256, (SELECT json_group_array(path) FROM (SELECT path FROM files WHERE image = images.id "
        "ORDER BY files.id DESC)) AS paths FROM images WHERE kind = 'image' AND outcome != 'rejected' AND mjd < ? "
        "AND coalesce(ny_px = ? AND nx_px = ?, 1) ORDER BY mjd DESC, sha256 LIMIT ?",  # version 1 noted no size
        (mjd, ny, nx, size),
    ).fetchall()
    return [Member(row["sha256"], tuple(map(path_of, json.loads(row["paths"])))) for row in reversed(rows)]


def keep(cache: Path, sha256: str, image: Image) -> None:
    """Put an image into the cache; half precision rounds by a hundredth of the noise at most."""
    with frames.atomic(_cached(cache, sha256)) as temporary, open(temporary, "wb") as file:
        np.save(file, _half(image))


def _half(image: Image) -> npt.NDArray[np.float16]:
    limit = np.finfo(np.float16).max  # beyond it is no light loss
    return np.clip(image, -limit, limit).astype(np.float16)


def prune(connection: sqlite3.Connection, cache: Path, size: int) -> None:
    """Leave in the cache the newest images of the log only: no older ones, and nothing that a killed run left.

    What the cache holds then hangs on the log alone. Nobody else may be using it meanwhile.
    """
    needed = {_cached(cache, member.sha256) for member in members_before(connection, np.inf, KEPT * size)}
    for path in cache.glob("*.npy"):  # the temporary names of `frames.atomic` too
        if path not in needed:
            path.unlink(missing_ok=True)


def _cached(cache: Path, sha256: str) -> Path:
    return cache / f"{sha256}.npy"


def _at_usual_place(members: list[Member], cache: Path, params: Difference) -> Image:
    """The images with their blobs where they usually are, shape (n, ny, nx).

    Where one is missing, all are registered anew from their files: what comes out must not hang on what was cached.
    """
    paths = [_cached(cache, member.sha256) for member in members]
    if (cached := _loaded(paths)) is not None:
        return cached
    images = _registered(members, params)
    for path in paths:  # first, so that a run that is killed among them leaves no mixture that looks complete
        path.unlink(missing_ok=True)
    for member, image in zip(members, images, strict=True):
        keep(cache, member.sha256, image)
    return _half(images).astype(np.float32)  # as it will be read


def _loaded(paths: list[Path]) -> Image | None:
    """Images of the cache, or None if one is not there, or was cut off by a power failure."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            return np.stack(list(pool.map(lambda path: np.load(path).astype(np.float32), paths)))
        except (OSError, ValueError, EOFError):
            return None


def _registered(members: list[Member], params: Difference) -> Image:
    log.info("the stack's %d images are registered from their files", len(members))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = list(pool.map(_read, members))
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise FrameError(
            f"{members[0].paths[0].parent}: images of {len(shapes)} sizes in one stack, expected one; sort them"
        )
    stacked = np.stack(images)
    if not params.register_shift:
        return stacked
    for _ in range(2):  # the first time, those that lie off blur the median
        median = _median(stacked)
        moved, _ = difference.register(np.stack(images), median, difference.blob_pattern(median))
        stacked = moved
    return stacked


def _read(member: Member) -> Image:
    path = next((path for path in member.paths if _holds(path, member.sha256)), None)
    if path is None:
        raise FrameError(
            f"{member.paths[0]}: not found, or changed, expected the image {member.sha256[:12]} of the log, which the "
            "stack needs; put it back"
        )
    data = frames.usable_image(path).data
    return np.where(np.isfinite(data), data, np.float32(np.nan))


def _holds(path: Path, sha256: str) -> bool:
    """Whether a file that can be read has these bytes."""
    try:
        return path.is_file() and frames.sha256(path) == sha256
    except OSError:
        return False


def _median(images: Image) -> Image:
    """Median of each pixel, missing values left out, in blocks of rows on all cores."""
    import bottleneck

    median = np.empty(images.shape[1:], np.float32)

    def block(rows: slice) -> None:
        median[rows] = bottleneck.nanmedian(np.ascontiguousarray(np.moveaxis(images[:, rows], 0, -1)), axis=-1)

    starts = range(0, len(median), difference.ROWS)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(block, [slice(start, start + difference.ROWS) for start in starts]))
    return median


def _stack(data: Image, scatter: Image | None, n_images: int) -> Stack:
    return Stack(data, scatter, n_images, hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest())
