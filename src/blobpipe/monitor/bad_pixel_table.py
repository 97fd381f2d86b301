"""Read bad-pixel tables (BPIXTAB) and data-quality images, and write them with the pixels of blobs added.

The steps of `add_discs`: discs become a mask, the mask becomes rows (runs of pixels), and the rows are appended to the
bytes of the table, so that everything else in the file stays as it was.
"""

from __future__ import annotations

import contextlib
import io
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
from blobpipe.core.hdus import opened
from blobpipe.errors import BlobpipeError, FrameError, TableError
from blobpipe.images.bpixtab import (
    RUN_COLUMNS,
    dq_image,
    find_dq,
    find_runs,
    find_table,
    hdus_from_bytes,
    is_scaled,
    require_runs,
    table_index,
)

BoolImage = npt.NDArray[np.bool_]
DqImage = npt.NDArray[np.int64]

BLOB = 512  # DQ bit of a blob
# distance (px) beyond a blob's radius at which 5 % of its depth is left: mean of all shapes with
# radii of 3 to 8 px; simulated
MARGIN_PX = 1.5
RADII_PX = (7.0, 8.2)  # smallest and largest radius of five discs in a real DQ image
MAX_LABEL = 24  # characters of a blob's name in a label or a comment
DETECTOR = {"CCDAMP": "ABCD", "CCDCHIP": 1, "CCDGAIN": 2.5}  # values in the headers of exposures
# share of flagged pixels above which an image holds counts and not DQ; a real one has 0.02
MAX_BAD_FRAC = 0.5
USEAFTER_FORMS = ("%b %d %Y %H:%M:%S", "%b %d %Y", "%B %d %Y %H:%M:%S", "%B %d %Y", "%d/%m/%Y")
BLOCK = 2880  # bytes of a block, of which FITS files are made
DESCRIP = "Bad pixels, with the blobs that the CSM monitor has shown"
DESCRIP_LENGTH = 67  # characters to which reference files fill DESCRIP up with dashes


def date_span(blobs: pd.DataFrame) -> tuple[float, float]:
    """Return the earliest and the latest date of a first sighting (MJD), NaN where none is known."""
    mjd = blobs["first_mjd"] if "first_mjd" in blobs else pd.Series([np.nan])
    return float(mjd.min()), float(mjd.max())


# ----------------------------------------------------------------------------------------------- discs, rows, DQ


def disc_radius(
    radius_px: npt.ArrayLike, radii_px: tuple[float, float] = RADII_PX
) -> npt.NDArray[np.float64]:
    """Return the radius of the disc to flag (px): a blob with its blurred edge, within the limits of real masks.

    Parameters
    ----------
    radius_px : array_like
        Measured radii of blobs.
    radii_px : tuple of float
        Smallest and largest radius of a disc.

    Raises
    ------
    BlobpipeError
        If the limits are not positive, in the wrong order, or larger than the detector.
    """
    low, high = radii_px
    if not 0 < low <= high < SIZE_PX:
        raise BlobpipeError(
            f"radii of discs: found {low:g} and {high:g}, expected the smallest and the largest (px); correct them"
        )
    return np.clip(np.asarray(radius_px, np.float64) + MARGIN_PX, low, high)


def disc_mask(x_px: npt.ArrayLike, y_px: npt.ArrayLike, radius_px: npt.ArrayLike) -> BoolImage:
    """Mark the pixels whose centres lie in any of some discs, reference pixels excepted.

    Parameters
    ----------
    x_px, y_px, radius_px : array_like, shape (n,)
        Centres and radii of the discs.

    Returns
    -------
    ndarray, shape (1024, 1024), bool
    """
    mask = np.zeros((SIZE_PX, SIZE_PX), np.bool_)
    columns = [np.atleast_1d(np.asarray(values, float)) for values in (x_px, y_px, radius_px)]
    for x, y, radius in np.column_stack(columns):
        # only the pixels of the square around a disc can lie in it
        x_around = _pixels_around(x, radius)
        y_around = _pixels_around(y, radius)
        distance = np.hypot(x_around - x, (y_around - y)[:, None])
        mask[np.ix_(y_around, x_around)] |= distance <= radius
    return mask


def _pixels_around(centre: float, radius: float) -> npt.NDArray[np.int64]:
    """Return the pixels along an axis that a disc can reach, reference pixels excepted."""
    first = max(BORDER_PX, int(np.ceil(centre - radius)))
    end = min(SIZE_PX - BORDER_PX, int(centre + radius) + 1)
    return np.arange(first, end)


def runs(dq: npt.NDArray[Any]) -> pd.DataFrame:
    """Write a DQ image as rows of a bad-pixel table: runs of one value along x; `dq_image` is the inverse.

    Parameters
    ----------
    dq : ndarray, shape (1024, 1024), int

    Returns
    -------
    DataFrame
        PIX1, PIX2 (first pixel, 1-based, 1014 frame), LENGTH, AXIS (1), VALUE; int64.
    """
    # all rows of the image in one line, with a good pixel between them to end each run
    line = np.pad(dq, ((0, 0), (0, 1))).ravel().astype(np.int64)

    # runs of equal values, of which those of bad pixels are kept
    ends = np.flatnonzero(np.diff(line, prepend=0))
    start = ends[:-1]
    length = np.diff(ends)
    is_bad = line[start] != 0
    start = start[is_bad]
    length = length[is_bad]

    # from 0-based pixels with reference pixels to 1-based ones without
    y, x = np.divmod(start, SIZE_PX + 1)
    offset = 1 - BORDER_PX
    return pd.DataFrame(
        {
            "PIX1": x + offset,
            "PIX2": y + offset,
            "LENGTH": length,
            "AXIS": np.ones_like(length),
            "VALUE": line[start],
        }
    )


# -------------------------------------------------------------------------------------------------------- reading


def read_dq(path: str | Path) -> DqImage:
    """Read the DQ image of a bad-pixel table, or of a DQ image with or without reference pixels.

    Returns
    -------
    ndarray, shape (1024, 1024), int64

    Raises
    ------
    TableError
        If the file cannot be read (`read_bad_pixels`).
    """
    return dq_image(find_table(read_bad_pixels(path)).data)


def read_bad_pixels(path: str | Path) -> fits.HDUList:
    """Read a bad-pixel table as it is, or turn an image of DQ values into one.

    Of an exposure, the first image called ``DQ`` is taken, never its counts.

    Raises
    ------
    TableError
        If the file is not FITS, holds neither, or has rows that are not runs of pixels.
    """
    try:
        with opened(path, "a bad-pixel table or a DQ image") as file:
            table = find_runs(file)
            if table is not None:
                # reading the content compares the checksums
                file.content(table)
                return _checked_table(path, file.whole())
            image = find_dq(file)
    except FrameError as error:
        raise TableError(str(error)) from error

    if image is None:
        raise TableError(
            f"{path}: found no bad pixels; expected a table with the columns {', '.join(RUN_COLUMNS)}, "
            f"or an image DQ of integers, 1014x1014 or 1024x1024"
        )
    bad_frac = np.count_nonzero(image) / image.size
    if bad_frac > MAX_BAD_FRAC:
        raise TableError(
            f"{path}: {bad_frac:.0%} of its pixels are flagged, expected at most {MAX_BAD_FRAC:.0%}: counts, not DQ; "
            "name a DQ image"
        )

    # an image without reference pixels gets good ones
    rows = runs(np.pad(image, (SIZE_PX - len(image)) // 2))
    return with_rows(new_table(rows["VALUE"]), rows)


def _checked_table(path: str | Path, content: bytes) -> fits.HDUList:
    """Return the HDUs of a file with a bad-pixel table, after trying everything that will be done with them."""
    try:
        hdus = hdus_from_bytes(content)
        require_runs(path, find_table(hdus))

        # a file that cannot be written again is refused here: unreadable cards, missing arrays
        again = hdus_from_bytes(_to_bytes(with_rows(hdus, pd.DataFrame(columns=RUN_COLUMNS))))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = find_table(again)
            for name in table.columns.names:
                _ = table.data[name]
        for card in ("USEAFTER", "PEDIGREE", "FILENAME"):
            again[0].header.get(card)
        return hdus_from_bytes(content)
    except TableError:
        raise
    except Exception as error:
        # a damaged table makes astropy raise nearly anything
        reason = " ".join(str(error).split())[:120]
        raise TableError(
            f"{path}: not a whole FITS table ({reason}), expected a bad-pixel table; fetch or write it again"
        ) from error


def _to_bytes(hdus: fits.HDUList) -> bytes:
    """Write HDUs into memory; invalid cards stay as they are."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hdus.writeto(buffer, output_verify="ignore")
    return buffer.getvalue()


def read_rows(hdus: fits.HDUList) -> Any:
    """Return the rows of a bad-pixel table.

    A copy is read: once astropy has looked at the rows, it writes arrays of variable length differently.
    """
    return find_table(hdus_from_bytes(_to_bytes(hdus))).data


# --------------------------------------------------------------------------------------------------- adding rows


def new_table(values: npt.ArrayLike = ()) -> fits.HDUList:
    """Make a bad-pixel table without rows, in the form of calibration reference files.

    Parameters
    ----------
    values : array_like, int
        DQ values that it is to hold: bits above 14 need a wider column than int16.
    """
    # the cards by which the calibration pipeline knows a reference file
    primary = fits.PrimaryHDU()
    primary.header.update(
        {"TELESCOP": "HST", "INSTRUME": "WFC3", "DETECTOR": "IR", "FILETYPE": "BAD PIXELS"}
    )
    primary.header["DESCRIP"] = DESCRIP.ljust(DESCRIP_LENGTH, "-")

    # the columns of a reference file, VALUE as wide as its bits need
    value_format = {"int16": "I", "int32": "J", "int64": "K"}[_int_type(values).name]
    formats = {
        "CCDAMP": "4A",
        "CCDCHIP": "I",
        "CCDGAIN": "E",
        "PIX1": "I",
        "PIX2": "I",
        "LENGTH": "I",
        "AXIS": "I",
        "VALUE": value_format,
    }
    columns = [fits.Column(name, form) for name, form in formats.items()]
    table = fits.BinTableHDU.from_columns(columns, name="BPIX")
    return fits.HDUList([primary, table])


def _int_type(values: npt.ArrayLike) -> np.dtype[Any]:
    """Return the smallest of int16, int32 and int64 that holds some integers."""
    values = np.asarray(values, np.int64)
    # 0, a good pixel, is always among the values
    low = int(values.min(initial=0))
    high = int(values.max(initial=0))
    for kind in (np.int16, np.int32):
        limits = np.iinfo(kind)
        if limits.min <= low and high <= limits.max:
            return np.dtype(kind)
    return np.dtype(np.int64)


def with_rows(hdus: fits.HDUList, rows: pd.DataFrame) -> fits.HDUList:
    """Append rows to a bad-pixel table; its columns, rows and headers and other HDUs keep their bytes.

    Parameters
    ----------
    hdus : HDUList
        From `read_bad_pixels` or `new_table`.
    rows : DataFrame
        From `runs`. Amplifier, chip and gain are those of most rows of the table; other columns stay empty.

    Raises
    ------
    TableError
        If a column of the table cannot hold a value.
    """
    index = table_index(hdus)
    content = _to_bytes(hdus)
    hdus = hdus_from_bytes(content)
    table = hdus[index]
    added = _stored_rows(table, rows)

    # headers: more rows, and no sums of what the file was before; calwf3 needs the size of the image
    primary = hdus[0].header.copy()
    header = table.header.copy()
    header["NAXIS2"] = len(table.data) + len(added)
    if "THEAP" in header:
        header["THEAP"] += added.nbytes
    for card in ("SIZAXIS1", "SIZAXIS2"):
        header.setdefault(card, SIZE_PX)
    for each in (primary, header):
        for card in ("CHECKSUM", "DATASUM"):
            each.remove(card, ignore_missing=True)

    # data: old rows, new rows, then the heap of arrays that rows point to, filled up to a block
    place = hdus.fileinfo(index)
    start = place["datLoc"]
    rows_end = start + table.header["NAXIS1"] * table.header["NAXIS2"]
    heap_end = rows_end + header.get("PCOUNT", 0)
    data = content[start:rows_end] + added.tobytes() + content[rows_end:heap_end]
    n_blocks = -(-len(data) // BLOCK)
    data = data.ljust(n_blocks * BLOCK, b"\0")

    # the HDUs before and after the table are copied
    before = content[hdus.fileinfo(0)["datLoc"] : place["hdrLoc"]]
    after = content[start + place["datSpan"] :]
    primary_bytes = primary.tostring().encode("ascii")
    header_bytes = header.tostring().encode("ascii")
    return hdus_from_bytes(primary_bytes + before + header_bytes + data + after)


def _stored_rows(table: fits.BinTableHDU, rows: pd.DataFrame) -> npt.NDArray[Any]:
    """Return rows as the table's file stores them: big-endian, unsigned numbers less their TZERO."""
    old = np.asarray(table.data)
    added = np.zeros(len(rows), old.dtype)

    # empty columns: NaN, or the value that stands for no number
    for column in table.columns:
        kind = old.dtype[column.name]
        if kind.kind == "f":
            added[column.name] = np.nan
        elif isinstance(column.null, int) and kind.kind in "iu":
            added[column.name] = np.array(column.null).astype(kind)

    # amplifier, chip and gain, then the run itself
    usual = _usual_detector(table)
    for name in set(DETECTOR) & set(table.columns.names):
        added[name] = usual.get(name, np.zeros((), old.dtype[name]))
    for name in map(str, rows):
        added[name] = _stored(table, name, rows[name].tolist())
    return added


def _stored(table: fits.BinTableHDU, name: str, values: list[Any]) -> npt.NDArray[Any]:
    """Return values as a column stores them.

    Raises
    ------
    TableError
        If the column cannot hold one of them.
    """
    # unsigned integers are stored less their TZERO
    column = table.columns[name]
    kind = np.asarray(table.data).dtype[name]
    zero = int(column.bzero or 0)
    shifted = [value - zero if zero else value for value in values]

    # a value that is not the same after the conversion does not fit
    with contextlib.suppress(OverflowError, ValueError, TypeError):
        stored = np.array(shifted, dtype=object).astype(kind)
        is_exact = stored.tolist() == shifted or kind.kind == "S"
        if is_exact and not is_scaled(column, kind):
            return stored
    found = " or ".join(map(str, sorted(set(values))[:3]))
    raise TableError(
        f"bad-pixel table: its column {name} of format {column.format} cannot hold {found}; give it a wider one"
    )


def _usual_detector(table: fits.BinTableHDU) -> dict[str, Any]:
    """Return amplifier, chip and gain of most rows as they are stored, or those of exposures for an empty table."""
    old = np.asarray(table.data)
    # columns of more than one value for each row are left empty
    names = [name for name in DETECTOR if name in table.columns.names and not old.dtype[name].shape]
    if not len(old) or not names:
        return {name: _stored(table, name, [DETECTOR[name]])[0] for name in names}
    columns = pd.DataFrame({name: old[name].tolist() for name in names})
    counts = columns.value_counts(sort=False, dropna=False)
    most = int(np.argmax(counts.to_numpy()))
    return dict(zip(names, counts.index[most], strict=True))


def add_discs(
    hdus: fits.HDUList, blobs: pd.DataFrame, useafter_mjd: float | None = None
) -> tuple[fits.HDUList, pd.DataFrame]:
    """Flag blobs in a bad-pixel table.

    Pixels that have the flag get no second row, so flagging the same blobs again changes nothing.

    Parameters
    ----------
    hdus : HDUList
        From `read_bad_pixels` or `new_table`.
    blobs : DataFrame
        From `select`, with ``disc_px``.
    useafter_mjd : float, optional
        Date from which the table is valid; by default the later of its own and that of the latest blob.

    Returns
    -------
    HDUList
        The table with the discs. USEAFTER is set, PEDIGREE if there was none, and HISTORY names the blobs.
    DataFrame
        The rows that were added, with all columns of the table.

    Raises
    ------
    TableError
        If there is no date from which the table is valid, or a column cannot hold a value.
    """
    old = read_rows(hdus)
    flagged = (dq_image(old) & BLOB) != 0
    discs = blobs[["x_px", "y_px", "disc_px"]].to_numpy(float)
    masks = [disc_mask(*disc) & ~flagged for disc in discs]
    merged = with_rows(hdus, runs(np.any(masks, axis=0) * BLOB))

    # the history names the blobs that add pixels
    header = merged[0].header
    _set_dates(header, blobs, useafter_mjd)
    _add_history(header, blobs[[bool(mask.any()) for mask in masks]])

    added = read_rows(merged)[len(old) :]
    with warnings.catch_warnings():
        # a logical value that is neither true nor false reads as false
        warnings.simplefilter("ignore")
        columns = {name: np.asarray(added[name]).tolist() for name in added.names}
    return merged, pd.DataFrame(columns)


def _set_dates(header: fits.Header, blobs: pd.DataFrame, useafter_mjd: float | None) -> None:
    """Set USEAFTER, and PEDIGREE if there is none.

    Raises
    ------
    TableError
        If there is no date from which the table is valid.
    """
    # the later of the table's own date and that of its latest blob, unless a date is given
    first, last = date_span(blobs)
    if useafter_mjd is None:
        own = _useafter(header)
        after = float(np.fmax(last, own))
    else:
        own = float("nan")
        after = useafter_mjd
    if not np.isfinite(after):
        raise TableError(
            "bad-pixel table: its blobs have no dates, so its USEAFTER is not known; give --useafter DATE"
        )

    # its own date stays as it is written
    if after != own:
        header["USEAFTER"] = format_mjd(after, "%b %d %Y %H:%M:%S")

    # PEDIGREE gives the span of the observations
    span = (first, last) if np.isfinite(first) else (after, after)
    days = " ".join(format_mjd(mjd, "%d/%m/%Y") for mjd in span)
    header.setdefault("PEDIGREE", f"INFLIGHT {days}")


def _useafter(header: fits.Header) -> float:
    """Return the date of a table's USEAFTER (MJD), written as in reference files or ISO 8601; NaN for none.

    Raises
    ------
    TableError
        If it cannot be read: it could be later than that of the blobs.
    """
    # an empty card means no date
    text = " ".join(str(header.get("USEAFTER") or "").split())
    if not text or isinstance(header.get("USEAFTER"), fits.card.Undefined):
        return float("nan")
    for form in USEAFTER_FORMS:
        with contextlib.suppress(ValueError):
            return (datetime.strptime(text, form) - MJD_ZERO) / timedelta(days=1)
    try:
        # a bare number, which `to_mjd` would take as an MJD, is no date here
        if re.match(r"\d{4}-\d\d-\d\d", text) is None:
            raise ValueError(text)
        return to_mjd(text, "USEAFTER")
    except (ValueError, BlobpipeError) as error:
        raise TableError(
            f"bad-pixel table: USEAFTER is {text[:40]!r}, expected a date such as Mar 01 2009 00:00:00 or 2009-03-01; "
            "correct it, or give --useafter DATE"
        ) from error


def _add_history(header: fits.Header, blobs: pd.DataFrame) -> None:
    """Name the blobs in the header, with their discs in the table's own pixels."""
    if blobs.empty:
        return
    header.add_history(
        f"blobpipe {__version__} flagged {len(blobs)} blobs with DQ {BLOB} (PIX1, PIX2, radius):"
    )
    for blob in blobs.to_dict("records"):
        # a card holds ASCII only
        name = re.sub(r"[^\x20-\x7e]", "_", str(blob["blob"]))[:MAX_LABEL]
        x = blob["x_px"] + 1 - BORDER_PX
        y = blob["y_px"] + 1 - BORDER_PX
        since = blob.get("first_date") or "the first image"
        header.add_history(f"  {name}: {x:.1f}, {y:.1f}, {blob['disc_px']:.1f}; since {since}")


# -------------------------------------------------------------------------------------------------------- writing


def write_dq(path: str | Path, dq: DqImage, *, flt: bool = False) -> None:
    """Write a DQ image as an extension ``DQ``, in the smallest of int16, int32 and int64 that holds its bits.

    Parameters
    ----------
    path : path
        FITS file, not compressed.
    dq : ndarray, shape (1024, 1024), int
        From `dq_image`.
    flt : bool
        Leave out the reference pixels: 1014 x 1014.
    """
    if flt:
        dq = dq[BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX]
    image = fits.ImageHDU(dq.astype(_int_type(dq)), name="DQ")
    write_fits(path, fits.HDUList([fits.PrimaryHDU(), image]))


def write_fits(path: str | Path, hdus: fits.HDUList) -> None:
    """Write HDUs whole or not at all; a card FILENAME gets the new name."""
    if "FILENAME" in hdus[0].header:
        hdus[0].header["FILENAME"] = Path(path).name
    with files.atomic(path) as temporary:
        temporary.write_bytes(_to_bytes(hdus))
