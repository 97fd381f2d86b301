"""Give the pixels of an image and its regions to the browser: what was searched, subtracted, seen and is known."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np

from blobpipe.core import files, fits_images
from blobpipe.core.arrays import Image
from blobpipe.core.detector import Detector
from blobpipe.errors import BlobpipeError, LogError, printable
from blobpipe.images.bad_pixels import BadPixels
from blobpipe.images.flatten import read_blob_image
from blobpipe.monitor import logbook, thumbnails
from blobpipe.monitor.inbox import path_of
from blobpipe.review.queries import Row

# Planes in the order of their buttons, with the keys that show them
PLANES = {"difference": "d", "template": "t", "image": "i", "map": "m"}
USUAL_RADIUS_PX = 8.0  # circle of a region whose radius could not be measured


def log_path(connection: sqlite3.Connection) -> Path:
    """Return the file of a log; a log in memory has the path ``log`` in no folder."""
    return Path(connection.execute("PRAGMA database_list").fetchone()["file"] or "log")


def available(connection: sqlite3.Connection, row: Row) -> list[str]:
    """Return which of `PLANES` of an image can be read, in order.

    Parameters
    ----------
    row : dict
        Row of ``images``.
    """
    path = log_path(connection)
    kept = {
        plane
        for plane in ("difference", "map")
        if thumbnails.pixels_path(path, row["sha256"], plane).exists()
    }
    # The template is the image less the difference
    if row["kind"] == "image" and image_path(connection, row["id"]) is not None:
        kept |= {"image", "template"} if "difference" in kept else {"image"}
    return [plane for plane in PLANES if plane in kept]


def image_path(connection: sqlite3.Connection, number: int) -> Path | None:
    """Return the latest of an image's files that is there; None if there is none."""
    return next(filter(_is_file, _paths(connection, number)), None)


def last_path(connection: sqlite3.Connection, number: int) -> str:
    """Return where the log last saw an image's file, there or not; empty if it never did."""
    return next((printable(str(path)) for path in _paths(connection, number)), "")


def _paths(connection: sqlite3.Connection, number: int) -> list[Path]:
    """Return the paths of an image's files, the latest first."""
    rows = connection.execute(
        "SELECT path FROM files WHERE image = ? ORDER BY id DESC", (number,)
    ).fetchall()
    return [path_of(row["path"]) for row in rows]


def _is_file(path: Path) -> bool:
    """Tell whether there is a file that can be looked at."""
    try:
        return path.is_file()
    except OSError:
        return False


def packed(connection: sqlite3.Connection, row: Row, plane: str) -> bytes:
    """Return a plane of an image, as `thumbnails.pack` writes it.

    Parameters
    ----------
    row : dict
        Row of ``images``.
    plane : str
        One of `PLANES`.

    Raises
    ------
    LogError
        If it is not kept, or the file of the image is gone or has changed.
    """
    kept = thumbnails.pixels_path(log_path(connection), row["sha256"], plane)
    if plane in ("difference", "map"):
        try:
            return kept.read_bytes()
        except OSError as error:
            raise LogError(
                f"the pixels of image {row['id']} are not kept; the log keeps those of the newest {thumbnails.KEPT}"
            ) from error

    image = _read_image(connection, row)
    if plane == "image":
        return thumbnails.pack(image, thumbnails.step_of(fits_images.median_and_noise(image)[1]))
    values, step = difference(connection, row)
    return thumbnails.pack(image - values, step)


def difference(connection: sqlite3.Connection, row: Row) -> tuple[Image, float]:
    """Return the difference image that was searched (fraction of the light), and the step it was packed in.

    Raises
    ------
    LogError
        If it is not kept.
    """
    try:
        return thumbnails.unpack(packed(connection, row, "difference"))
    except ValueError as error:
        raise LogError(f"the pixels of image {row['id']}: {error}") from error


def _read_image(connection: sqlite3.Connection, row: Row) -> Image:
    """Read an image from its file, which must still hold the bytes that were logged."""
    path = image_path(connection, row["id"])
    if path is None:
        raise LogError(f"no file of image {row['id']} where the log saw it")
    try:
        if files.sha256(path) != row["sha256"]:
            raise LogError(f"the file of image {row['id']} has changed since it was logged")
        detector = logbook.detector_of(connection)
        bad = BadPixels(dq_flags=detector.exposure.bad_dq)
        return np.asarray(read_blob_image(path, bad, detector).data, np.float32)
    except (OSError, BlobpipeError) as error:
        if isinstance(error, LogError):
            raise
        raise LogError(f"the file of image {row['id']} cannot be read") from error


def flt_shift(shape: tuple[int, int], detector: Detector) -> int | None:
    """Return what leads from 0-based pixels to the 1-based ones of files without the border; None for another size."""
    if shape == detector.shape:
        return 1 - detector.border_px
    return 1 if shape == detector.light_shape else None


def regions(marked: list[Row], detector: Detector, *, flt: bool) -> str:
    """Write what is marked on an image as DS9 regions.

    Parameters
    ----------
    marked : list of dict
        x_px, y_px, radius_px (None: not measured), depth_frac, blob (name), status.
    flt : bool
        For files without the border, such as FLT.
    """
    import pandas as pd

    from blobpipe.monitor.export import regions_text

    columns = ("x_px", "y_px", "radius_px", "depth_frac", "blob", "status")
    blobs = pd.DataFrame([{name: row[name] for name in columns} for row in marked], columns=columns)
    blobs["radius_px"] = blobs["radius_px"].fillna(USUAL_RADIUS_PX).astype(float)
    blobs["depth_frac"] = blobs["depth_frac"].fillna(0.0).astype(float)
    return regions_text(blobs, flt=flt, detector=detector)
