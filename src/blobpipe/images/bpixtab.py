"""Read bad-pixel tables (BPIXTAB) and DQ images: find them in a file, check them, and turn rows into pixels.

A row of such a table is a run of bad pixels: its first pixel (PIX1, PIX2; 1-based, in the frame without the
border of reference pixels, if the detector counts so), LENGTH, AXIS (1 along x, 2 along y) and VALUE, the DQ bits of its pixels.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from blobpipe.core.arrays import Int64Array
from blobpipe.core.detector import DEFAULT, Detector
from blobpipe.core.fits_images import integers
from blobpipe.core.hdus import HDU, File, count
from blobpipe.core.threads import unwarned
from blobpipe.errors import TableError

if TYPE_CHECKING:
    from astropy.io import fits

# Columns of a run of bad pixels
RUN_COLUMNS = ("PIX1", "PIX2", "LENGTH", "AXIS", "VALUE")

# Images of an exposure that are no DQ, even if they hold integers
MEASURED = ("SCI", "ERR", "SAMP", "TIME")

# Largest number of columns of a table; FITS 4.0, section 7.3
MAX_COLUMNS = 999

# Largest number of pixels in all rows of a table: each of 32 bits of each pixel once
MAX_RUN_PX = 2**25


def find_runs(file: File) -> HDU | None:
    """Return the table of a file that has the columns of runs, one named BPIX first."""
    found = []
    for hdu in file.hdus:
        n_columns = count(hdu.cards, "TFIELDS", 0, high=MAX_COLUMNS)
        names = {str(hdu.cards.get(f"TTYPE{i + 1}")).strip() for i in range(n_columns)}
        if hdu.kind == "BINTABLE" and set(RUN_COLUMNS) <= names:
            found.append(hdu)
    return min(found, key=lambda hdu: hdu.name != "BPIX", default=None)


def find_table(hdus: fits.HDUList) -> fits.BinTableHDU:
    """Return the HDU of a file that holds the bad pixels."""
    return hdus[table_index(hdus)]


def table_index(hdus: fits.HDUList) -> int:
    """Return the place of the first table with the columns of runs, one named BPIX first."""
    from astropy.io import fits

    found = []
    for i, hdu in enumerate(hdus):
        if isinstance(hdu, fits.BinTableHDU) and set(RUN_COLUMNS) <= set(hdu.columns.names):
            found.append(i)
    return sorted(found, key=lambda i: hdus[i].name != "BPIX")[0]


def hdus_from_bytes(content: bytes) -> fits.HDUList:
    """Read HDUs from memory; compressed images stay the tables that they are stored as."""
    from astropy.io import fits

    with unwarned():
        return fits.open(
            io.BytesIO(content), memmap=False, disable_image_compression=True, lazy_load_hdus=False
        )


def dq_image(rows: Any, detector: Detector = DEFAULT) -> Int64Array:
    """Return the DQ image of a bad-pixel table.

    Where runs overlap, their bits are combined; pixels off the image are left out.

    Parameters
    ----------
    rows : DataFrame or FITS_rec
        With PIX1, PIX2, LENGTH, AXIS, VALUE.
    detector : Detector, optional

    Returns
    -------
    ndarray, shape (ny, nx), int64
        Of a full frame, with its border.
    """
    ny, nx = detector.shape
    image = np.zeros((ny, nx), np.int64)
    columns = np.array([np.asarray(rows[name], np.int64) for name in RUN_COLUMNS])

    # about a million pixels at a time: rows that overlap often would not fit into memory
    n_parts = 1 + columns[2].sum() // 2**20
    for part in np.array_split(columns, n_parts, axis=1):
        first_x, first_y, length, axis, value = part

        # for each pixel of each run: the row it is of, and its distance from the run's first pixel
        row = np.repeat(np.arange(len(length)), length)
        start = np.cumsum(length) - length
        along = np.arange(len(row)) - start[row]

        # axis 1 runs along x, axis 2 along y
        x = first_x[row] + along * (axis[row] == 1) - detector.table_offset
        y = first_y[row] + along * (axis[row] == 2) - detector.table_offset
        on_image = (x >= 0) & (x < nx) & (y >= 0) & (y < ny)
        np.bitwise_or.at(image, (y[on_image], x[on_image]), value[row[on_image]])
    return image


def find_dq(file: File, detector: Detector = DEFAULT) -> Int64Array | None:
    """Return the image of DQ values of a file: one called DQ or, if there is none, any of integers."""
    named = [hdu for hdu in file.hdus if hdu.name == "DQ"]
    others = [hdu for hdu in file.hdus if hdu.name not in MEASURED]
    for hdu in named or others:
        if hdu.shape in (detector.shape, detector.light_shape):
            image = integers(file, hdu)
            if image is not None:
                return image
    return None


def require_runs(path: str | Path, table: fits.BinTableHDU, detector: Detector = DEFAULT) -> None:
    """Refuse a table whose columns do not hold one number in each row, or whose rows are not runs of pixels."""
    # astropy lays the columns out anew; a row of another width would be read shifted
    width = table.header["NAXIS1"]
    expected_width = np.asarray(table.data).dtype.itemsize
    if width != expected_width:
        raise TableError(
            f"{path}: rows of {width} bytes, expected {expected_width} by its columns; fetch or write it again"
        )
    for name in RUN_COLUMNS:
        _require_integers(path, table, name)

    # lengths are limited before they are summed: a run of 2**31 pixels would not fit into memory
    axis = table.data["AXIS"]
    length = np.asarray(table.data["LENGTH"])
    _require(path, "AXIS", np.isin(axis, (1, 2)), axis, "1 or 2")
    longest = max(detector.shape)
    _require(path, "LENGTH", (length > 0) & (length <= longest), length, f"1 to {longest}")
    if length.astype(np.int64).sum() > MAX_RUN_PX:
        raise TableError(
            f"{path}: its rows flag {length.sum():g} pixels, expected at most {MAX_RUN_PX}; remove some"
        )


def _require_integers(path: str | Path, table: fits.BinTableHDU, name: str) -> None:
    """Refuse a column that does not hold one whole number below 2**63 in each row."""
    column = table.columns[name]
    stored = np.asarray(table.data)[name]
    if stored.dtype.kind not in "iuf" or stored.ndim != 1 or is_scaled(column, stored.dtype):
        raise TableError(
            f"{path}: column {name} has the format {column.format}, expected one number in each row; write it again"
        )
    values = np.asarray(table.data[name])
    if isinstance(column.null, int):
        _require(path, name, stored != column.null, values, "a number (it is TNULL)")
    if values.dtype.kind == "f":
        _require(path, name, np.abs(values) < 2.0**63, values, "a number below 2**63")
        _require(path, name, values == np.trunc(values), values, "a whole number")
    elif values.dtype.kind == "u":
        _require(path, name, values < np.uint64(2**63), values, "a number below 2**63")


def _require(path: str | Path, name: str, good: Any, values: Any, expected: str) -> None:
    """Refuse a column in which not all values are good."""
    for row in np.flatnonzero(~np.broadcast_to(good, len(values))):
        raise TableError(
            f"{path}: row {row + 1}: {name} is {values[row]}, expected {expected}; correct it"
        )


def is_scaled(column: fits.Column, kind: np.dtype[Any]) -> bool:
    """Tell whether values are stored in other steps than 1; TZERO alone makes integers unsigned."""
    if column.bscale not in (None, "", 1):
        return True
    if not column.bzero:
        return False
    is_unsigned = kind.kind in "iu" and float(column.bzero).is_integer()
    return not is_unsigned
