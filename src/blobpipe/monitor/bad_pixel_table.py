"""Read bad-pixel tables (BPIXTAB) and data-quality images, and write them with the pixels of blobs added.

The steps of `add_discs`: discs become a mask, the mask becomes rows (runs of pixels), and the rows are appended to the
bytes of the table, so that everything else in the file stays as it was.
"""

from __future__ import annotations

import contextlib
import io
import re
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
from blobpipe.core.detector import DEFAULT, MJD_ZERO, Detector
from blobpipe.core.hdus import opened
from blobpipe.core.threads import unwarned
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

# distance (px) beyond a blob's radius at which 5 % of its depth is left: mean of all shapes with
# radii of 3 to 8 px; simulated
MARGIN_PX = 1.5
MAX_LABEL = 24  # characters of a blob's name in a label or a comment
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
    radius_px: npt.ArrayLike,
    radii_px: tuple[float, float] | None = None,
    detector: Detector = DEFAULT,
) -> npt.NDArray[np.float64]:
    """Return the radius of the disc to flag (px): a blob with its blurred edge, within the limits of real masks.

    Parameters
    ----------
    radius_px : array_like
        Measured radii of blobs.
    radii_px : tuple of float, optional
        Smallest and largest radius of a disc; those of the detector if not given.
    detector : Detector, optional

    Raises
    ------
    BlobpipeError
        If the limits are not positive, in the wrong order, or larger than the detector.
    """
    low, high = radii_px or detector.bad_pixel_table.disc_px
    if not 0 < low <= high < min(detector.shape):
        raise BlobpipeError(
            f"radii of discs: found {low:g} and {high:g}, expected the smallest and the largest (px); correct them"
        )
    return np.clip(np.asarray(radius_px, np.float64) + MARGIN_PX, low, high)


def disc_mask(
    x_px: npt.ArrayLike,
    y_px: npt.ArrayLike,
    radius_px: npt.ArrayLike,
    detector: Detector = DEFAULT,
) -> BoolImage:
    """Mark the pixels whose centres lie in any of some discs, reference pixels excepted.

    Parameters
    ----------
    x_px, y_px, radius_px : array_like, shape (n,)
        Centres and radii of the discs.
    detector : Detector, optional

    Returns
    -------
    ndarray, shape (ny, nx), bool
    """
    ny, nx = detector.shape
    border = detector.border_px
    mask = np.zeros((ny, nx), np.bool_)
    columns = [np.atleast_1d(np.asarray(values, float)) for values in (x_px, y_px, radius_px)]
    for x, y, radius in np.column_stack(columns):
        # only the pixels of the square around a disc can lie in it
        x_around = _pixels_around(x, radius, border, nx - border)
        y_around = _pixels_around(y, radius, border, ny - border)
        distance = np.hypot(x_around - x, (y_around - y)[:, None])
        mask[np.ix_(y_around, x_around)] |= distance <= radius
    return mask


def _pixels_around(centre: float, radius: float, first: int, end: int) -> npt.NDArray[np.int64]:
    """Return the pixels along an axis, from a first one to below an end, that a disc can reach."""
    first = max(first, int(np.ceil(centre - radius)))
    end = min(end, int(centre + radius) + 1)
    return np.arange(first, end)


def runs(dq: npt.NDArray[Any], detector: Detector = DEFAULT) -> pd.DataFrame:
    """Write a DQ image as rows of a bad-pixel table: runs of one value along x; `dq_image` is the inverse.

    Parameters
    ----------
    dq : ndarray, shape (ny, nx), int
        With the reference pixels.
    detector : Detector, optional

    Returns
    -------
    DataFrame
        PIX1, PIX2 (first pixel, 1-based, in the frame of the table), LENGTH, AXIS (1), VALUE; int64.
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

    # from 0-based pixels with reference pixels to 1-based ones, with or without them
    y, x = np.divmod(start, dq.shape[1] + 1)
    offset = detector.table_offset
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


def read_dq(path: str | Path, detector: Detector = DEFAULT) -> DqImage:
    """Read the DQ image of a bad-pixel table, or of a DQ image with or without reference pixels.

    Returns
    -------
    ndarray, shape (ny, nx), int64
        Of a full frame, with its border.

    Raises
    ------
    TableError
        If the file cannot be read (`read_bad_pixels`).
    """
    return dq_image(find_table(read_bad_pixels(path, detector)).data, detector)


def read_bad_pixels(path: str | Path, detector: Detector = DEFAULT) -> fits.HDUList:
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
                return _checked_table(path, file.whole(), detector)
            image = find_dq(file, detector)
    except FrameError as error:
        raise TableError(str(error)) from error

    if image is None:
        raise TableError(
            f"{path}: found no bad pixels; expected a table with the columns {', '.join(RUN_COLUMNS)}, "
            f"or an image DQ of integers, {detector.sizes}"
        )
    bad_frac = np.count_nonzero(image) / image.size
    if bad_frac > MAX_BAD_FRAC:
        raise TableError(
            f"{path}: {bad_frac:.0%} of its pixels are flagged, expected at most {MAX_BAD_FRAC:.0%}: counts, not DQ; "
            "name a DQ image"
        )

    # an image without reference pixels gets good ones
    if image.shape != detector.shape:
        image = np.pad(image, detector.border_px)
    rows = runs(image, detector)
    return with_rows(new_table(rows["VALUE"], detector), rows, detector)


def _checked_table(path: str | Path, content: bytes, detector: Detector) -> fits.HDUList:
    """Return the HDUs of a file with a bad-pixel table, after trying everything that will be done with them."""
    try:
        hdus = hdus_from_bytes(content)
        require_runs(path, find_table(hdus), detector)

        # a file that cannot be written again is refused here: unreadable cards, missing arrays
        nothing = pd.DataFrame(columns=RUN_COLUMNS)
        again = hdus_from_bytes(_to_bytes(with_rows(hdus, nothing, detector)))
        with unwarned():
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
    with unwarned():
        hdus.writeto(buffer, output_verify="ignore")
    return buffer.getvalue()


def read_rows(hdus: fits.HDUList) -> Any:
    """Return the rows of a bad-pixel table.

    A copy is read: once astropy has looked at the rows, it writes arrays of variable length differently.
    """
    return find_table(hdus_from_bytes(_to_bytes(hdus))).data


# --------------------------------------------------------------------------------------------------- adding rows


def new_table(values: npt.ArrayLike = (), detector: Detector = DEFAULT) -> fits.HDUList:
    """Make a bad-pixel table without rows, in the form of calibration reference files.

    Parameters
    ----------
    values : array_like, int
        DQ values that it is to hold: bits above 14 need a wider column than int16.
    detector : Detector, optional
        Says which cards and columns it has.
    """
    # the cards by which the calibration pipeline knows a reference file
    primary = fits.PrimaryHDU()
    primary.header.update(detector.bad_pixel_table.header)
    primary.header["DESCRIP"] = DESCRIP.ljust(DESCRIP_LENGTH, "-")

    # the columns of a reference file, VALUE as wide as its bits need
    value_format = {"int16": "I", "int32": "J", "int64": "K"}[_int_type(values).name]
    formats = {
        **{name: _format(value) for name, value in detector.bad_pixel_table.columns.items()},
        "PIX1": "I",
        "PIX2": "I",
        "LENGTH": "I",
        "AXIS": "I",
        "VALUE": value_format,
    }
    columns = [fits.Column(name, form) for name, form in formats.items()]
    table = fits.BinTableHDU.from_columns(columns, name="BPIX")
    return fits.HDUList([primary, table])


def _format(value: str | int | float) -> str:
    """Return the format of a column for a value."""
    match value:
        case str():
            return f"{max(len(value), 1)}A"
        case int():
            return "I"
        case float():
            return "E"


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


def with_rows(hdus: fits.HDUList, rows: pd.DataFrame, detector: Detector = DEFAULT) -> fits.HDUList:
    """Append rows to a bad-pixel table; its columns, rows and headers and other HDUs keep their bytes.

    Parameters
    ----------
    hdus : HDUList
        From `read_bad_pixels` or `new_table`.
    rows : DataFrame
        From `runs`. Amplifier, chip and gain are those of most rows of the table; other columns stay empty.
    detector : Detector, optional

    Raises
    ------
    TableError
        If a column of the table cannot hold a value.
    """
    index = table_index(hdus)
    content = _to_bytes(hdus)
    hdus = hdus_from_bytes(content)
    table = hdus[index]
    added = _stored_rows(table, rows, detector)

    # headers: more rows, and no sums of what the file was before; calwf3 needs the size of the image
    primary = hdus[0].header.copy()
    header = table.header.copy()
    header["NAXIS2"] = len(table.data) + len(added)
    if "THEAP" in header:
        header["THEAP"] += added.nbytes
    header.setdefault("SIZAXIS1", detector.width_px)
    header.setdefault("SIZAXIS2", detector.height_px)
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


def _stored_rows(
    table: fits.BinTableHDU, rows: pd.DataFrame, detector: Detector
) -> npt.NDArray[Any]:
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
    own = detector.bad_pixel_table.columns
    usual = _usual_detector(table, own)
    for name in set(own) & set(table.columns.names):
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


def _usual_detector(
    table: fits.BinTableHDU, columns: dict[str, str | int | float]
) -> dict[str, Any]:
    """Return amplifier, chip and gain of most rows as they are stored, or those of exposures for an empty table."""
    old = np.asarray(table.data)
    # columns of more than one value for each row are left empty
    names = [name for name in columns if name in table.columns.names and not old.dtype[name].shape]
    if not len(old) or not names:
        return {name: _stored(table, name, [columns[name]])[0] for name in names}
    found = pd.DataFrame({name: old[name].tolist() for name in names})
    counts = found.value_counts(sort=False, dropna=False)
    most = int(np.argmax(counts.to_numpy()))
    return dict(zip(names, counts.index[most], strict=True))


def add_discs(
    hdus: fits.HDUList,
    blobs: pd.DataFrame,
    useafter_mjd: float | None = None,
    detector: Detector = DEFAULT,
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
    detector : Detector, optional

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
    bit = detector.bad_pixel_table.blob_bit
    flagged = (dq_image(old, detector) & bit) != 0
    discs = blobs[["x_px", "y_px", "disc_px"]].to_numpy(float)
    masks = [disc_mask(x, y, radius, detector) & ~flagged for x, y, radius in discs]
    merged = with_rows(hdus, runs(np.any(masks, axis=0) * bit, detector), detector)

    # the history names the blobs that add pixels
    header = merged[0].header
    if detector.bad_pixel_table.layout == "runs":
        _set_dates(header, blobs, useafter_mjd)
    _add_history(header, blobs[[bool(mask.any()) for mask in masks]], detector)

    added = read_rows(merged)[len(old) :]
    with unwarned():  # of a logical value that is neither true nor false, which reads as false
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


def _add_history(header: fits.Header, blobs: pd.DataFrame, detector: Detector) -> None:
    """Name the blobs in the header, with their discs in the table's own pixels."""
    if blobs.empty:
        return
    header.add_history(
        f"blobpipe {__version__} flagged {len(blobs)} blobs with DQ "
        f"{detector.bad_pixel_table.blob_bit} (PIX1, PIX2, radius):"
    )
    for blob in blobs.to_dict("records"):
        # a card holds ASCII only
        name = re.sub(r"[^\x20-\x7e]", "_", str(blob["blob"]))[:MAX_LABEL]
        x = blob["x_px"] + detector.table_offset
        y = blob["y_px"] + detector.table_offset
        since = blob.get("first_date") or "the first image"
        header.add_history(f"  {name}: {x:.1f}, {y:.1f}, {blob['disc_px']:.1f}; since {since}")


# -------------------------------------------------------------------------------------------------------- writing


def write_dq(
    path: str | Path, dq: DqImage, *, flt: bool = False, detector: Detector = DEFAULT
) -> None:
    """Write a DQ image as an extension ``DQ``, in the smallest of int16, int32 and int64 that holds its bits.

    Parameters
    ----------
    path : path
        FITS file, not compressed.
    dq : ndarray, shape (ny, nx), int
        From `dq_image`.
    flt : bool
        Leave out the reference pixels.
    detector : Detector, optional
    """
    if flt:
        dq = detector.without_border(dq)
    image = fits.ImageHDU(dq.astype(_int_type(dq)), name="DQ")
    primary = fits.PrimaryHDU()
    if detector.bad_pixel_table.layout == "image":
        # The bad-pixel table itself, which needs its cards
        primary.header.update(detector.bad_pixel_table.header)
    write_fits(path, fits.HDUList([primary, image]))


def write_fits(path: str | Path, hdus: fits.HDUList) -> None:
    """Write HDUs whole or not at all; a card FILENAME gets the new name."""
    if "FILENAME" in hdus[0].header:
        hdus[0].header["FILENAME"] = Path(path).name
    with files.atomic(path) as temporary:
        temporary.write_bytes(_to_bytes(hdus))
