"""Bad-pixel tables (BPIXTAB) and data-quality images: read, and written with the pixels of blobs added."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from astropy.io import fits

from blobpipe import __version__
from blobpipe.core import files
from blobpipe.core.dates import format_mjd, to_mjd
from blobpipe.core.detector import BORDER_PX, MJD_ZERO
from blobpipe.core.detector import SIDE_PX as SIZE_PX
from blobpipe.core.hdus import HDU, File, count, number, opened
from blobpipe.errors import BlobpipeError, FrameError, TableError

log = logging.getLogger(__name__)

BoolImage = npt.NDArray[np.bool_]
DqImage = npt.NDArray[np.int64]

BLOB = 512  # the DQ bit of a blob
# beyond a blob's radius and so much, 5 % of its depth is left (mean of all shapes, radii of 3 to 8
# px)
MARGIN_PX = 1.5
RADII_PX = (7.0, 8.2)  # of the discs in real DQ images
MEASURED = ("SCI", "ERR", "SAMP", "TIME")  # images of exposures that are no DQ, integers or not
MAX_LABEL = 24  # characters of a name where it is only to be read
RUN_COLUMNS = ("PIX1", "PIX2", "LENGTH", "AXIS", "VALUE")
DETECTOR = {"CCDAMP": "ABCD", "CCDCHIP": 1, "CCDGAIN": 2.5}  # as the headers of exposures have them
MAX_COLUMNS = 999  # of a table, by the standard
# more flagged pixels are no DQ image but counts; 20,438 pixels of a real one are 0.02
MAX_BAD_FRAC = 0.5
MAX_RUN_PX = 2**25  # pixels of all rows together: each bit of each pixel said once
USEAFTER_FORMS = ("%b %d %Y %H:%M:%S", "%b %d %Y", "%B %d %Y %H:%M:%S", "%B %d %Y", "%d/%m/%Y")
BLOCK = 2880  # bytes; FITS files are made of such blocks
DESCRIP = "Bad pixels, with the blobs that the CSM monitor has shown"
DESCRIP_LENGTH = 67  # reference files fill theirs up with dashes to so many characters


def date_span(blobs: pd.DataFrame) -> tuple[float, float]:
    """First and last date of a first sighting (MJD), NaN where none is known."""
    mjd = blobs["first_mjd"] if "first_mjd" in blobs else pd.Series([np.nan])
    return float(mjd.min()), float(mjd.max())


# ----------------------------------------------------------------------------------------------------- bad pixels


def disc_radius(
    radius_px: npt.ArrayLike, radii_px: tuple[float, float] = RADII_PX
) -> npt.NDArray[np.float64]:
    """Radius of the disc to flag (px): a blob's own and its blurred edge, within the limits of real masks.

    Parameters
    ----------
    radius_px : array_like
        Measured radii.
    radii_px : tuple of float
        Smallest and largest.

    Raises
    ------
    BlobpipeError
        If the limits are none.

    Notes
    -----
    Source: ours. Five discs of a real DQ image have radii of 7.0 to 8.2 px.
    """
    low, high = radii_px
    if not 0 < low <= high < SIZE_PX:
        raise BlobpipeError(
            f"radii of discs: found {low:g} and {high:g}, expected smallest and largest (px)"
        )
    return np.clip(np.asarray(radius_px, np.float64) + MARGIN_PX, low, high)


def disc_mask(x_px: npt.ArrayLike, y_px: npt.ArrayLike, radius_px: npt.ArrayLike) -> BoolImage:
    """The pixels whose centres lie in any of some discs; reference pixels never do.

    Parameters
    ----------
    x_px, y_px, radius_px : array_like, shape (n,)
        Discs.

    Returns
    -------
    ndarray, shape (1024, 1024), bool
    """
    mask = np.zeros((SIZE_PX, SIZE_PX), np.bool_)
    low = BORDER_PX
    high = SIZE_PX - BORDER_PX
    discs = np.column_stack(
        [np.atleast_1d(np.asarray(values, float)) for values in (x_px, y_px, radius_px)]
    )
    for x, y, radius in discs:
        columns, rows = (
            np.arange(max(low, int(np.ceil(at - radius))), min(high, int(at + radius) + 1))
            for at in (x, y)
        )
        mask[np.ix_(rows, columns)] |= np.hypot(columns - x, (rows - y)[:, None]) <= radius
    return mask


def runs(dq: npt.NDArray[Any]) -> pd.DataFrame:
    """Rows of a bad-pixel table for a DQ image, along x, each as long as its value goes on; `dq_image` undoes it.

    Parameters
    ----------
    dq : ndarray, shape (1024, 1024), int

    Returns
    -------
    DataFrame
        PIX1, PIX2 (first pixel, 1-based, 1014 frame), LENGTH, AXIS (1), VALUE; int64.
    """
    # a good pixel ends each line of the image
    line = np.pad(dq, ((0, 0), (0, 1))).ravel().astype(np.int64)
    ends = np.flatnonzero(np.diff(line, prepend=0))
    start = ends[:-1]
    length = np.diff(ends)
    bad = line[start] != 0
    start = start[bad]
    length = length[bad]
    y, x = np.divmod(start, SIZE_PX + 1)
    first = BORDER_PX - 1
    columns = (x - first, y - first, length, np.ones_like(length), line[start])
    return pd.DataFrame(dict(zip(RUN_COLUMNS, columns, strict=True)))


def dq_image(rows: Any) -> DqImage:
    """The DQ image of a bad-pixel table: where runs overlap, their bits are joined; what lies off the image is left out.

    Parameters
    ----------
    rows : DataFrame or FITS_rec
        With PIX1, PIX2, LENGTH, AXIS, VALUE.

    Returns
    -------
    ndarray, shape (1024, 1024), int64
    """
    image = np.zeros((SIZE_PX, SIZE_PX), np.int64)
    columns = np.array([np.asarray(rows[name], np.int64) for name in RUN_COLUMNS])
    # a million pixels at a time: what overlaps often would not fit into memory
    for part in np.array_split(columns, 1 + columns[2].sum() // 2**20, axis=1):
        first_x, first_y, length, axis, value = part
        row = np.repeat(np.arange(len(length)), length)
        along = np.arange(len(row)) - np.repeat(np.cumsum(length) - length, length)
        x = first_x[row] + along * (axis[row] == 1) + BORDER_PX - 1
        y = first_y[row] + along * (axis[row] == 2) + BORDER_PX - 1
        on = (x >= 0) & (x < SIZE_PX) & (y >= 0) & (y < SIZE_PX)
        np.bitwise_or.at(image, (y[on], x[on]), value[row[on]])
    return image


def read_dq(path: str | Path) -> DqImage:
    """The DQ image, shape (1024, 1024), int64, of a bad-pixel table or of a DQ image with or without reference pixels.

    Raises
    ------
    TableError
        As `read_bad_pixels`.
    """
    return dq_image(find_table(read_bad_pixels(path)).data)


def read_bad_pixels(path: str | Path) -> fits.HDUList:
    """Read a bad-pixel table as it is; an image of DQ values becomes one.

    Of an exposure, the first image called ``DQ`` is taken, never its counts.

    Raises
    ------
    TableError
        If the file is not FITS, or holds neither, or its rows are not runs of pixels.
    """
    try:
        with opened(path, "a bad-pixel table or a DQ image") as file:
            table = _runs_in(file)
            if table is not None:
                file.content(table)  # compares the checksums
                return _with_runs(path, file.whole())
            image = _dq_plane(file)
    except FrameError as error:
        raise TableError(str(error)) from error
    if image is None:
        raise TableError(
            f"{path}: found no bad pixels; expected a table with the columns {', '.join(RUN_COLUMNS)}, "
            f"or an image DQ of integers, 1014x1014 or 1024x1024"
        )
    if np.count_nonzero(image) > MAX_BAD_FRAC * image.size:
        share = np.count_nonzero(image) / image.size
        raise TableError(
            f"{path}: {share:.0%} of its pixels are flagged, expected at most {MAX_BAD_FRAC:.0%}: counts, not DQ"
        )
    rows = runs(np.pad(image, (SIZE_PX - len(image)) // 2))
    return with_rows(new_table(rows["VALUE"]), rows)


def _runs_in(file: File) -> HDU | None:
    """The table of a file that has the columns, one named BPIX first."""
    fit = []
    for hdu in file.hdus:
        n_columns = count(hdu.cards, "TFIELDS", 0, high=MAX_COLUMNS)
        names = {str(hdu.cards.get(f"TTYPE{i + 1}")).strip() for i in range(n_columns)}
        if hdu.kind == "BINTABLE" and set(RUN_COLUMNS) <= names:
            fit.append(hdu)
    return min(fit, key=lambda hdu: hdu.name != "BPIX", default=None)


def _with_runs(path: str | Path, content: bytes) -> fits.HDUList:
    try:
        hdus = _opened(content)
        _require_runs(path, find_table(hdus))
        # what cannot be put together again is refused here: cards that cannot be read, lists that are not there
        again = _opened(_content(with_rows(hdus, pd.DataFrame(columns=RUN_COLUMNS))))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _ = [find_table(again).data[name] for name in find_table(again).columns.names]
        _ = [again[0].header.get(card) for card in ("USEAFTER", "PEDIGREE", "FILENAME")]
        return _opened(content)
    except TableError:
        raise
    except Exception as error:  # a damaged table makes astropy raise nearly anything
        reason = " ".join(str(error).split())[:120]
        raise TableError(
            f"{path}: not a whole FITS table ({reason}), expected a bad-pixel table"
        ) from error


def _content(hdus: fits.HDUList) -> bytes:
    """The bytes of a file; cards of others, good or not, stay as they are."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hdus.writeto(buffer, output_verify="ignore")
    return buffer.getvalue()


def _opened(content: bytes) -> fits.HDUList:
    """Compressed images are tables here, and stay as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fits.open(
            io.BytesIO(content), memmap=False, disable_image_compression=True, lazy_load_hdus=False
        )


def _dq_plane(file: File) -> DqImage | None:
    """The image of DQ values of a file: one called DQ before others."""
    sides = (SIZE_PX, SIZE_PX - 2 * BORDER_PX)
    named = [hdu for hdu in file.hdus if hdu.name == "DQ"]
    for hdu in named or [hdu for hdu in file.hdus if hdu.name not in MEASURED]:
        if hdu.shape in [(side, side) for side in sides]:
            image = _integers(file, hdu)
            if image is not None:
                return image
    return None


def _integers(file: File, hdu: HDU) -> DqImage | None:
    """An image of integers, unsigned ones as they are meant; None if it holds others."""
    if hdu.compressed:
        from blobpipe.core import unpack

        stored = unpack.first_plane(hdu.cards, hdu.shape, file.content(hdu))
    else:
        stored = file.plane(hdu)
    zero = number(hdu.cards, "BZERO", 0)
    constant = not hdu.size and float(stored.flat[0]).is_integer()
    if (stored.dtype.kind not in "iu" and not constant) or number(hdu.cards, "BSCALE", 1) != 1:
        return None
    values = stored.astype(np.int64)
    if zero == 2.0**63:
        if values.max() >= 0:
            raise ValueError(f"DQ value {int(values.max()) + 2**63}, less than 2**63 expected")
        return values ^ np.int64(-(2**63))
    return values + int(zero)


def _require_runs(path: str | Path, table: fits.BinTableHDU) -> None:
    """Refuse rows that are not runs of pixels, and columns that do not hold one number each."""
    width = table.header["NAXIS1"]
    found = np.asarray(table.data).dtype.itemsize
    if width != found:
        raise TableError(
            f"{path}: rows of {width} bytes, expected {found} by its columns; fetch or write it again"
        )
    for name in RUN_COLUMNS:
        column = table.columns[name]
        stored = np.asarray(table.data)[name]
        if stored.dtype.kind not in "iuf" or stored.ndim != 1 or _is_scaled(column, stored.dtype):
            raise TableError(
                f"{path}: column {name} has the format {column.format}, expected one number in each row"
            )
        values = np.asarray(table.data[name])
        if isinstance(column.null, int):
            _require(path, name, stored != column.null, values, "a number (it is TNULL)")
        if values.dtype.kind == "f":
            _require(path, name, np.abs(values) < 2.0**63, values, "a number below 2**63")
            _require(path, name, values == np.trunc(values), values, "a whole number")
        elif values.dtype.kind == "u":
            _require(path, name, values < np.uint64(2**63), values, "a number below 2**63")
    rows = table.data
    _require(path, "AXIS", np.isin(rows["AXIS"], (1, 2)), rows["AXIS"], "1 or 2")
    length = np.asarray(rows["LENGTH"])
    _require(path, "LENGTH", (length > 0) & (length <= SIZE_PX), length, f"1 to {SIZE_PX}")
    if length.astype(np.int64).sum() > MAX_RUN_PX:
        raise TableError(
            f"{path}: its rows flag {length.sum():g} pixels, expected at most {MAX_RUN_PX}; take out some"
        )


def _require(path: str | Path, name: str, good: Any, values: Any, expected: str) -> None:
    for row in np.flatnonzero(~np.broadcast_to(good, len(values))):
        raise TableError(
            f"{path}: row {row + 1}: {name} is {values[row]}, expected {expected}; correct it"
        )


def find_table(hdus: fits.HDUList) -> fits.BinTableHDU:
    """The HDU of a file that holds the rows."""
    return hdus[_tables(hdus)[0]]


def read_rows(hdus: fits.HDUList) -> Any:
    """The rows of a bad-pixel table, of a copy: astropy writes lists anew once it has looked at the rows."""
    return find_table(_opened(_content(hdus))).data


def _tables(hdus: fits.HDUList) -> list[int]:
    """Which HDUs have the columns, one named BPIX first."""
    tables = [i for i, hdu in enumerate(hdus) if isinstance(hdu, fits.BinTableHDU)]
    fit = [i for i in tables if set(RUN_COLUMNS) <= set(hdus[i].columns.names)]
    return sorted(fit, key=lambda i: hdus[i].name != "BPIX")


def new_table(values: npt.ArrayLike = ()) -> fits.HDUList:
    """A bad-pixel table without a row, in the manner of calibration reference files.

    Parameters
    ----------
    values : array_like, int
        DQ values that it is to hold: those with bits above 14 need a wider column than int16.
    """
    primary = fits.PrimaryHDU()
    cards = {"TELESCOP": "HST", "INSTRUME": "WFC3", "DETECTOR": "IR", "FILETYPE": "BAD PIXELS"}
    primary.header.update(cards | {"DESCRIP": DESCRIP.ljust(DESCRIP_LENGTH, "-")})
    wide = {np.dtype(np.int16): "I", np.dtype(np.int32): "J", np.dtype(np.int64): "K"}[
        _int_type(values)
    ]
    formats = dict(
        zip((*DETECTOR, *RUN_COLUMNS), ("4A", "I", "E", "I", "I", "I", "I", wide), strict=True)
    )
    table = fits.BinTableHDU.from_columns(
        [fits.Column(name, form) for name, form in formats.items()], name="BPIX"
    )
    return fits.HDUList([primary, table])


def _int_type(values: npt.ArrayLike) -> np.dtype[Any]:
    """The smallest of int16, int32 and int64 that holds some integers as they are."""
    values = np.asarray(values, np.int64)
    low, high = (int(end) for end in (values.min(initial=0), values.max(initial=0)))
    return np.dtype(
        next(f"i{n}" for n in (2, 4, 8) if -(2 ** (8 * n - 1)) <= low and high < 2 ** (8 * n - 1))
    )


def with_rows(hdus: fits.HDUList, rows: pd.DataFrame) -> fits.HDUList:
    """A bad-pixel table with rows added at its end; columns, rows, headers and other HDUs stay as they are, byte for byte.

    Parameters
    ----------
    hdus : HDUList
        From `read_bad_pixels` or `new_table`.
    rows : DataFrame
        From `runs`. Amplifier, chip and gain are those of most rows there, other columns stay empty.

    Raises
    ------
    TableError
        If a column of the table cannot hold a value.
    """
    index = _tables(hdus)[0]
    content = _content(hdus)
    hdus = _opened(content)
    table = hdus[index]
    place = hdus.fileinfo(index)
    added = _stored_rows(table, rows)
    header = table.header.copy()
    header["NAXIS2"] = len(table.data) + len(added)
    if "THEAP" in header:
        header["THEAP"] += added.nbytes
    for axis in ("SIZAXIS1", "SIZAXIS2"):  # calwf3 asks for them
        header.setdefault(axis, SIZE_PX)
    primary = hdus[0].header.copy()
    for each in (primary, header):
        for sum_card in ("CHECKSUM", "DATASUM"):  # no longer true
            each.remove(sum_card, ignore_missing=True)
    # old rows, new rows, then the arrays of variable length that rows point to
    start = place["datLoc"]
    n_bytes = table.header["NAXIS1"] * table.header["NAXIS2"]
    heap = content[start + n_bytes : start + n_bytes + header.get("PCOUNT", 0)]
    data = content[start : start + n_bytes] + added.tobytes() + heap
    before = content[hdus.fileinfo(0)["datLoc"] : place["hdrLoc"]]
    after = content[start + place["datSpan"] :]
    heads = [each.tostring().encode("ascii") for each in (primary, header)]
    return _opened(
        heads[0] + before + heads[1] + data.ljust(-(-len(data) // BLOCK) * BLOCK, b"\0") + after
    )


def _stored_rows(table: fits.BinTableHDU, rows: pd.DataFrame) -> npt.NDArray[Any]:
    """Rows as the table's file stores them: big-endian, unsigned numbers less their TZERO."""
    old = np.asarray(table.data)
    added = np.zeros(len(rows), old.dtype)
    for column in table.columns:
        if old.dtype[column.name].kind == "f":
            added[column.name] = np.nan
        elif isinstance(column.null, int) and old.dtype[column.name].kind in "iu":
            added[column.name] = np.array(column.null).astype(old.dtype[column.name])
    usual = _usual(table)
    for name in set(DETECTOR) & set(table.columns.names):
        added[name] = usual.get(name, np.zeros((), old.dtype[name]))
    for filled in map(str, rows):
        added[filled] = _stored(table, filled, rows[filled].tolist())
    return added


def _stored(table: fits.BinTableHDU, name: str, values: list[Any]) -> npt.NDArray[Any]:
    """Values as a column stores them."""
    column = table.columns[name]
    kind = np.asarray(table.data).dtype[name]
    zero = int(column.bzero or 0)
    less = [value - zero if zero else value for value in values]
    with contextlib.suppress(OverflowError, ValueError, TypeError):
        stored = np.array(less, dtype=object).astype(kind)
        if (stored.tolist() == less or kind.kind == "S") and not _is_scaled(column, kind):
            return stored
    found = " or ".join(map(str, sorted(set(values))[:3]))
    raise TableError(
        f"bad-pixel table: its column {name} of format {column.format} cannot hold {found}; give it a wider one"
    )


def _is_scaled(column: fits.Column, kind: np.dtype[Any]) -> bool:
    """Whether values are stored in other steps than 1; TZERO alone makes integers unsigned."""
    whole = kind.kind in "iu" and float(column.bzero or 0).is_integer()
    return column.bscale not in (None, "", 1) or not (whole or not column.bzero)


def _usual(table: fits.BinTableHDU) -> dict[str, Any]:
    """Amplifier, chip and gain of most rows, as they are stored."""
    old = np.asarray(table.data)
    names = [name for name in DETECTOR if name in table.columns.names and not old.dtype[name].shape]
    if not len(old) or not names:
        return {name: _stored(table, name, [DETECTOR[name]])[0] for name in names}
    found = pd.DataFrame({name: old[name].tolist() for name in names}).value_counts(
        sort=False, dropna=False
    )
    return dict(zip(names, found.index[int(np.argmax(found.to_numpy()))], strict=True))


def add_discs(
    hdus: fits.HDUList, blobs: pd.DataFrame, useafter_mjd: float | None = None
) -> tuple[fits.HDUList, pd.DataFrame]:
    """Flag blobs in a bad-pixel table. Pixels that have the flag get no second row, so doing it twice changes nothing.

    Parameters
    ----------
    hdus : HDUList
        From `read_bad_pixels` or `new_table`.
    blobs : DataFrame
        From `select`, with ``disc_px``.
    useafter_mjd : float, optional
        Date from which the table is valid; if not given, the later of its own and that of the latest blob.

    Returns
    -------
    HDUList
        The table with the discs. USEAFTER is set, PEDIGREE if there was none, and HISTORY names the blobs.
    DataFrame
        The rows that were added, with all columns of the table.

    Raises
    ------
    TableError
        If there is no date to be had.
    """
    old = read_rows(hdus)
    flagged = (dq_image(old) & BLOB) != 0
    discs = blobs[["x_px", "y_px", "disc_px"]].to_numpy(float)
    masks = [disc_mask(*disc) & ~flagged for disc in discs]
    merged = with_rows(hdus, runs(np.any(masks, axis=0) * BLOB))
    _describe(merged[0].header, blobs, useafter_mjd)
    _add_history(merged[0].header, blobs[[bool(mask.any()) for mask in masks]])
    added = read_rows(merged)[len(old) :]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a logical value that is not known reads as false
        return merged, pd.DataFrame(
            {name: np.asarray(added[name]).tolist() for name in added.names}
        )


def _describe(header: fits.Header, blobs: pd.DataFrame, useafter_mjd: float | None) -> None:
    first, last = date_span(blobs)
    own = float("nan") if useafter_mjd is not None else _useafter(header)
    after = useafter_mjd if useafter_mjd is not None else float(np.fmax(last, own))
    if not np.isfinite(after):
        raise TableError(
            "bad-pixel table: its blobs have no dates, so that of its use is not known; give --useafter DATE"
        )
    if after != own:  # its own stays as it is written
        header["USEAFTER"] = format_mjd(after, "%b %d %Y %H:%M:%S")
    days = [
        format_mjd(mjd, "%d/%m/%Y")
        for mjd in ((first, last) if np.isfinite(first) else (after, after))
    ]
    header.setdefault("PEDIGREE", f"INFLIGHT {' '.join(days)}")


def _useafter(header: fits.Header) -> float:
    """The date of a table's USEAFTER (MJD), as reference files or ISO 8601 write it; NaN where it has none.

    Raises
    ------
    TableError
        If it has one that cannot be read: it could be the later one.
    """
    text = " ".join(str(header.get("USEAFTER") or "").split())
    if not text or isinstance(header.get("USEAFTER"), fits.card.Undefined):
        return float("nan")
    for form in USEAFTER_FORMS:
        with contextlib.suppress(ValueError):
            return (datetime.strptime(text, form) - MJD_ZERO) / timedelta(days=1)
    try:
        if re.match(r"\d{4}-\d\d-\d\d", text) is None:
            raise ValueError(text)
        return to_mjd(text, "USEAFTER")
    except (ValueError, BlobpipeError) as error:
        raise TableError(
            f"bad-pixel table: USEAFTER is {text[:40]!r}, expected a date such as Mar 01 2009 00:00:00 or 2009-03-01; "
            "correct it, or give --useafter DATE"
        ) from error


def _add_history(header: fits.Header, blobs: pd.DataFrame) -> None:
    if blobs.empty:
        return
    header.add_history(
        f"blobpipe {__version__} flagged {len(blobs)} blobs with DQ {BLOB} (PIX1, PIX2, radius):"
    )
    for blob in blobs.to_dict("records"):
        x, y = (blob[name] + 1 - BORDER_PX for name in ("x_px", "y_px"))
        since = blob.get("first_date") or "the first image"
        name = re.sub(r"[^\x20-\x7e]", "_", str(blob["blob"]))[:MAX_LABEL]  # what a card can hold
        header.add_history(f"  {name}: {x:.1f}, {y:.1f}, {blob['disc_px']:.1f}; since {since}")


def write_dq(path: str | Path, dq: DqImage, *, flt: bool = False) -> None:
    """Write a DQ image as an extension ``DQ``: int16, or int32 or int64 where the bits ask for it.

    Parameters
    ----------
    path : path
        A plain FITS file.
    dq : ndarray, shape (1024, 1024), int
        From `dq_image`.
    flt : bool
        Without the reference pixels, 1014 x 1014.
    """
    if flt:
        dq = dq[BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX]
    image = fits.ImageHDU(dq.astype(_int_type(dq)), name="DQ")
    write_fits(path, fits.HDUList([fits.PrimaryHDU(), image]))


def write_fits(path: str | Path, hdus: fits.HDUList) -> None:
    if "FILENAME" in hdus[0].header:
        hdus[0].header["FILENAME"] = Path(path).name
    with files.atomic(path) as temporary:
        temporary.write_bytes(_content(hdus))
