"""Read bad-pixel tables (BPIXTAB) and DQ images: find them in a file, check them, and turn rows into pixels.

A row of such a table is a run of bad pixels: its first pixel (PIX1, PIX2; 1-based, in the 1014 x 1014 frame without
reference pixels), LENGTH, AXIS (1 along x, 2 along y) and VALUE, the DQ bits of its pixels.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from blobpipe.core.arrays import Int64Array
from blobpipe.core.detector import BORDER_PX, LIGHT_SIDE_PX, SIDE_PX
from blobpipe.core.hdus import HDU, File, count, number
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

# Shapes of a full frame: with the reference pixels, and without (FLT)
FULL_FRAMES = ((SIDE_PX, SIDE_PX), (LIGHT_SIDE_PX, LIGHT_SIDE_PX))


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

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fits.open(
            io.BytesIO(content), memmap=False, disable_image_compression=True, lazy_load_hdus=False
        )


def dq_image(rows: Any) -> Int64Array:
    """Return the DQ image of a bad-pixel table.

    Where runs overlap, their bits are combined; pixels off the image are left out.

    Parameters
    ----------
    rows : DataFrame or FITS_rec
        With PIX1, PIX2, LENGTH, AXIS, VALUE.

    Returns
    -------
    ndarray, shape (1024, 1024), int64
    """
    image = np.zeros((SIDE_PX, SIDE_PX), np.int64)
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
        x = first_x[row] + along * (axis[row] == 1) + BORDER_PX - 1
        y = first_y[row] + along * (axis[row] == 2) + BORDER_PX - 1
        on_image = (x >= 0) & (x < SIDE_PX) & (y >= 0) & (y < SIDE_PX)
        np.bitwise_or.at(image, (y[on_image], x[on_image]), value[row[on_image]])
    return image


def find_dq(file: File) -> Int64Array | None:
    """Return the image of DQ values of a file: one called DQ or, if there is none, any of integers."""
    named = [hdu for hdu in file.hdus if hdu.name == "DQ"]
    others = [hdu for hdu in file.hdus if hdu.name not in MEASURED]
    for hdu in named or others:
        if hdu.shape in FULL_FRAMES:
            image = integers(file, hdu)
            if image is not None:
                return image
    return None


def integers(file: File, hdu: HDU) -> Int64Array | None:
    """Return an image of integers, BZERO applied to unsigned ones; None if it holds other values."""
    if hdu.compressed:
        from blobpipe.core import unpack

        stored = unpack.first_plane(hdu.cards, hdu.shape, file.content(hdu))
    else:
        stored = file.plane(hdu)

    # an image of one value may have no data; other scales than 1 mean measured values
    is_constant = not hdu.size and float(stored.flat[0]).is_integer()
    is_integer = stored.dtype.kind in "iu" or is_constant
    if not is_integer or number(hdu.cards, "BSCALE", 1) != 1:
        return None

    values = stored.astype(np.int64)
    zero = number(hdu.cards, "BZERO", 0)
    if zero != 2.0**63:
        return values + int(zero)

    # unsigned 64-bit integers: adding BZERO flips the sign bit, and the result must fit into 63 bits
    if values.max() >= 0:
        raise ValueError(f"DQ value {int(values.max()) + 2**63}, less than 2**63 expected")
    return values ^ np.int64(-(2**63))


def require_runs(path: str | Path, table: fits.BinTableHDU) -> None:
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
    _require(path, "LENGTH", (length > 0) & (length <= SIDE_PX), length, f"1 to {SIDE_PX}")
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
