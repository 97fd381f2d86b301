"""Export blobs: DS9 regions, a catalogue, a bad-pixel table with the blobs' discs, a DQ image.

A bad-pixel table of WFC3/IR counts from 1 and leaves out the 5 reference pixels: ``x = PIX1 + 4`` in the full frame that
counts from 0. All arrays here have that frame; only files have the others.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from astropy.table import Table

from blobpipe import __version__
from blobpipe.core import files, tables
from blobpipe.core.dates import format_mjd, to_mjd
from blobpipe.core.detector import DEFAULT, MJD_RANGE, Detector
from blobpipe.core.threads import unwarned
from blobpipe.errors import TableError
from blobpipe.images.bpixtab import dq_image
from blobpipe.monitor import bad_pixel_table, logbook
from blobpipe.monitor.bad_pixel_table import MAX_LABEL

log = logging.getLogger(__name__)

STATUSES = ("known", "confirmed")  # statuses exported by default; only people confirm blobs
SAME_PX = 3.0  # distance (px) up to which two detections are sightings of one blob

COLUMNS = ("x_px", "y_px", "radius_px", "depth_frac")  # columns that every table of blobs must have
ORIGIN = (
    "model",
    "params_hash",
    "model_sha256",
    "params_sha256",
    "stack_sha256",
)  # kept as metadata
UNITS = {"_px": "pix", "_px2": "pix2", "_mjd": "d", "_frac": ""}  # by the end of a column's name
DESCRIPTIONS = {
    "blob": "name",
    "x_px": "centre, 0-based, with the reference pixels",
    "y_px": "centre, 0-based, with the reference pixels",
    "radius_px": "radius of the top-hat that detects it best",
    "depth_frac": "light lost at its deepest point, as a fraction",
    "depth_err_frac": "standard error of depth_frac",
    "snr": "matched-filter S/N of the fit",
    "first_frame": "first image that shows it; empty if all do",
    "first_mjd": "date of that image; NaN if not known or before all images",
    "first_date": "the same as a calendar date",
    "status": "known, confirmed (by a person), seen_again, ...",
    "disc_px": "radius of its disc in the bad-pixel table",
}
COLORS = {
    "known": "cyan",
    "confirmed": "red",
    "new": "yellow",
    "seen_again": "orange",
}  # of regions
OTHER_COLOR = "magenta"
OUTPUTS = ("blobs.reg", "blobs.ecsv", "blobs_bpx.fits", "blobs_bpx.csv", "blobs_dq.fits")


def export_blobs(
    catalogue: str | Path,
    out_dir: str | Path,
    *,
    until: str | None = None,
    statuses: Collection[str] = STATUSES,
    dates: str | Path | None = None,
    bpixtab: str | Path | None = None,
    useafter: str | None = None,
    radii_px: tuple[float, float] | None = None,
    flt: bool = False,
    all_flags: bool = False,
    detector: Detector = DEFAULT,
) -> None:
    """Write the blobs of a catalogue or log in the formats of other programs.

    Parameters
    ----------
    catalogue : path
        Read by `read_catalogue`.
    out_dir : path
        Gets ``blobs.reg``, ``blobs.ecsv``, ``blobs_dq.fits`` and, unless the detector's bad-pixel table is an image alone,
        ``blobs_bpx.fits`` and ``blobs_bpx.csv`` (the added rows alone).
    until : str, optional
        Leave out blobs first seen after this date (the whole day counts) or MJD.
    statuses : collection of str
        Statuses to export; of a log, by default, only what people have confirmed.
    dates : path, optional
        Table of images with ``frame`` and ``mjd``; ``frames.csv`` beside the catalogue if there is one.
    bpixtab : path, optional
        Bad pixels to add the discs to, read by `read_bad_pixels`.
    useafter : str, optional
        Date from which the new table is valid; by default that of its latest blob.
    radii_px : tuple of float, optional
        Smallest and largest radius of a disc (px); those of the detector if not given.
    flt : bool
        Write regions and DQ image for images without the reference pixels.
    all_flags : bool
        Give the DQ image all bits of the table instead of that of blobs alone.
    detector : Detector, optional
        Says where pixels are counted from, and which bit is that of blobs.

    Raises
    ------
    BlobpipeError
        If a date cannot be read, a table lacks something, no blob is left, or an output would overwrite an input.

    Notes
    -----
    Source: the WFC3 Data Handbook and the files of calibrated exposures.
    """
    out_dir = Path(out_dir)
    _refuse_overwriting(out_dir, catalogue, dates, bpixtab)
    limit = None if until is None else to_mjd(until, "--until", whole_day=True)
    valid_from = None if useafter is None else to_mjd(useafter, "--useafter")

    # the blobs, and the radii of their discs
    blobs = select(catalogue, read_catalogue(catalogue, dates), statuses, limit, detector)
    blobs["disc_px"] = bad_pixel_table.disc_radius(blobs["radius_px"], radii_px, detector)

    # discs are added to the given table, or to an empty one
    if bpixtab is None:
        given = bad_pixel_table.new_table(detector=detector)
    else:
        given = bad_pixel_table.read_bad_pixels(bpixtab, detector)
    table, rows = bad_pixel_table.add_discs(given, blobs, valid_from, detector)

    dq = dq_image(bad_pixel_table.read_rows(table), detector)
    if not all_flags:
        dq &= detector.bad_pixel_table.blob_bit

    # everything has been read and checked before the first file is written
    write_regions(out_dir / "blobs.reg", blobs, flt=flt, detector=detector)
    write_catalogue(out_dir / "blobs.ecsv", blobs)
    added = "set their pixels in the DQ image"
    if detector.bad_pixel_table.layout == "runs":
        bad_pixel_table.write_fits(out_dir / "blobs_bpx.fits", table)
        tables.write_table(out_dir / "blobs_bpx.csv", rows)
        added = f"added {logbook.counted(len(rows), 'row')} to the bad-pixel table"
    bad_pixel_table.write_dq(out_dir / "blobs_dq.fits", dq, flt=flt, detector=detector)
    log.info("%s: exported %s, %s", out_dir, logbook.counted(len(blobs), "blob"), added)


def _refuse_overwriting(out_dir: Path, *inputs: str | Path | None) -> None:
    """Refuse to write an output over a file that it is made of."""
    for name in OUTPUTS:
        output = out_dir / name
        for path in [Path(given) for given in inputs if given]:
            if output.exists() and path.exists() and path.samefile(output):
                raise TableError(
                    f"{path}: would be overwritten by the {name} made of it; name another --out"
                )


# ------------------------------------------------------------------------------------------------------ catalogue


def read_catalogue(path: str | Path, dates: str | Path | None = None) -> pd.DataFrame:
    """Read blobs from any table that blobpipe writes, CSV or ECSV.

    Parameters
    ----------
    path : path
        Table with x_px, y_px, radius_px, depth_frac. Dates come from ``first_mjd``, else ``first_date``, else from
        looking up ``first_frame`` or ``frame``. Other columns are optional, and kept.
    dates : path, optional
        Table with ``frame`` and ``mjd`` in which frames are looked up; by default ``frames.csv`` beside ``path``.

    Returns
    -------
    DataFrame
        The columns of the file. The ``decision`` of a review replaces the ``status``; a blob with neither is
        ``known``. A ``confirmed`` that a search and not a person wrote (tables of older versions) becomes
        ``seen_again``. ``first_mjd`` (d) and ``first_date`` if there are dates: NaN and empty for a blob older than
        the first image.

    Raises
    ------
    TableError
        If the file is not such a table, or a date cannot be read or found.
    """
    table = _read_ecsv(path) if Path(path).suffix == ".ecsv" else tables.read_table(path, COLUMNS)
    table["status"] = _status(table)
    mjd = _first_mjd(Path(path), table, dates)
    if mjd is not None:
        table["first_mjd"] = mjd
        table["first_date"] = [format_mjd(each) for each in table["first_mjd"]]
    return table


def _read_ecsv(path: str | Path) -> pd.DataFrame:
    """Read a table of blobs that astropy wrote."""
    content = tables.read_table_bytes(Path(path), COLUMNS)
    try:
        with unwarned():
            read = Table.read(content.decode("utf-8-sig"), format="ascii.ecsv")
            table: pd.DataFrame = read.to_pandas()
    except Exception as error:
        # a file that is not ECSV makes astropy raise nearly anything
        reason = " ".join(str(error).split())[:120]
        raise TableError(
            f"{path}: cannot be read as ECSV ({reason}); name a CSV table, or one that astropy wrote"
        ) from error

    missing = [column for column in COLUMNS if column not in table]
    if missing:
        raise TableError(
            f"{path}: column {missing[0]} is missing; expected {', '.join(COLUMNS)}; add it"
        )

    # text as in CSV tables, where an empty field is an empty string
    for name in table:
        if table[name].dtype.kind not in "biuf":
            table[name] = table[name].fillna("").astype(str)
    return table


def _status(table: pd.DataFrame) -> pd.Series[str]:
    """Return the decision of people, else the status that the search gave, else ``known``."""
    empty = pd.Series("", table.index)
    found = table["status"].fillna("").astype(str) if "status" in table else empty
    decision = table["decision"].fillna("").astype(str) if "decision" in table else empty

    # in tables of older versions a search could write "confirmed"; only people do so now
    is_of_search = "decision" in table or "probability" in table
    if is_of_search:
        found = found.replace("confirmed", "seen_again")
    return decision.where(decision != "", found).replace("", "known")


def _first_mjd(
    path: Path, table: pd.DataFrame, dates: str | Path | None
) -> pd.Series[float] | None:
    """Return the date of each blob's first sighting (MJD), or None if the table has no dates."""
    # in order of precedence: a catalogue that has grown may have some dates in one form, some in another
    sources = []
    if "first_mjd" in table:
        sources.append(table["first_mjd"].astype(float))
    if "first_date" in table:
        days = []
        for row, text in enumerate(table["first_date"].fillna("").astype(str), start=2):
            day = to_mjd(text, f"{path}: row {row}: first_date") if text else np.nan
            days.append(day)
        sources.append(pd.Series(days, table.index))
    own = reduce(pd.Series.combine_first, sources, pd.Series(np.nan, table.index))
    looked_up = _looked_up(path, table, dates, own.isna())
    if looked_up is not None:
        sources.append(looked_up)
    if not sources:
        return None

    mjd = reduce(pd.Series.combine_first, sources)
    low, high = MJD_RANGE
    in_range = mjd.isna() | mjd.between(low, high)
    for row in mjd.index[~in_range]:
        raise TableError(
            f"{path}: row {row + 2}: first seen on MJD {mjd[row]:g}, expected {low:g} to {high:g}; correct its date"
        )
    return mjd


def _looked_up(
    path: Path, table: pd.DataFrame, dates: str | Path | None, undated: pd.Series[bool]
) -> pd.Series[float] | None:
    """Look up the dates of the frames that first show the blobs (MJD); None without a table of dates."""
    column = "first_frame" if "first_frame" in table else "frame"
    images_csv = Path(dates or path.with_name("frames.csv"))
    if column not in table or not images_csv.exists():
        return None
    images = tables.read_table(images_csv, ("frame",))
    if "mjd" not in images:
        return None
    tables.require_once(images_csv, images, "frame")

    # a blob without a date of its own needs a frame of the table, or none at all
    frames = table[column]
    unknown = sorted(set(frames[undated]) - {""} - set(images["frame"]))
    if unknown:
        raise TableError(
            f"{path}: {column} {unknown[0]} is not a frame of {images_csv}; correct it or add the frame"
        )
    mjd_of_frame = dict(zip(images["frame"], images["mjd"], strict=True))
    return frames.map(mjd_of_frame).astype(float)


def select(
    path: str | Path,
    table: pd.DataFrame,
    statuses: Collection[str] = STATUSES,
    until_mjd: float | None = None,
    detector: Detector = DEFAULT,
) -> pd.DataFrame:
    """Select the blobs to export, in the order of their first sighting, each with a name.

    Parameters
    ----------
    path : path
        File that error messages name.
    table : DataFrame
        From `read_catalogue`.
    statuses : collection of str
        Statuses to select.
    until_mjd : float, optional
        Latest date of the first sighting; blobs older than all images are selected.
    detector : Detector, optional

    Raises
    ------
    TableError
        If a date is given and the table has none, no blob is left, or one is off the detector or has no size.
    """
    selected = table[table["status"].isin(list(statuses))]
    if until_mjd is not None:
        if "first_mjd" not in table:
            raise TableError(
                f"{path}: no dates found, expected first_mjd, first_date, or first_frame and a table of images"
            )
        # NaN, the date of a blob older than all images, is not after any date
        selected = selected[~(selected["first_mjd"] > until_mjd)]
    if selected.empty:
        found = ", ".join(sorted(set(table["status"]))) or "no row"
        raise TableError(
            f"{path}: no blob left of status {' or '.join(statuses)} (found {found}); review them, or select others with --also"
        )

    # a catalogue names its blobs; a table of detections lists a blob once for each sighting
    selected = tables.require_blobs(path, selected, COLUMNS, detector)
    if "blob" not in table:
        return _first_sightings(selected)
    selected["blob"] = selected["blob"].astype(str)
    tables.require_once(Path(path), selected, "blob")
    return selected.reset_index(drop=True)


def _first_sightings(detections: pd.DataFrame) -> pd.DataFrame:
    """Keep the first of the detections at each position, and name it after the position."""
    if "first_mjd" in detections:
        detections = detections.sort_values("first_mjd", kind="stable", na_position="first")
    positions = detections[["x_px", "y_px"]].to_numpy(float)
    kept: list[int] = []
    for i, position in enumerate(positions):
        distances = np.hypot(*(positions[kept] - position).T)
        if (distances > SAME_PX).all():
            kept.append(i)
    blobs = detections.iloc[kept].reset_index(drop=True)
    names = [f"x{round(x)}y{round(y)}" for x, y in positions[kept]]
    blobs.insert(0, "blob", names)
    return blobs


def write_catalogue(path: str | Path, blobs: pd.DataFrame) -> None:
    """Write blobs as ECSV with units, descriptions and provenance; the same blobs give the same bytes.

    Parameters
    ----------
    path : path
    blobs : DataFrame
        From `select`.
    """
    table = Table({name: _plain(column) for name, column in blobs.items()})
    for name in table.colnames:
        suffix = re.search(r"_[a-z]+2?$", name)
        table[name].unit = UNITS.get(suffix.group() if suffix else "")
        table[name].description = DESCRIPTIONS.get(name)

    # provenance: version, models and settings, and the span of dates
    table.meta = {"blobpipe": __version__}
    for column in ORIGIN:
        if column in blobs:
            values = set(_plain(blobs[column]).tolist())
            table.meta[column] = sorted(values - {""})
    first_mjd, last_mjd = bad_pixel_table.date_span(blobs)
    table.meta["first_date"] = format_mjd(first_mjd)
    table.meta["last_date"] = format_mjd(last_mjd)

    with files.atomic(path) as temporary:
        table.write(temporary, format="ascii.ecsv")


def _plain(column: pd.Series[Any]) -> npt.NDArray[Any]:
    """Return a column as numbers, or as text with empty strings in place of missing values."""
    if column.dtype.kind in "biuf":
        return column.to_numpy()
    return np.array(column.fillna("").astype(str).tolist())


# -------------------------------------------------------------------------------------------------------- regions


def write_regions(
    path: str | Path, blobs: pd.DataFrame, *, flt: bool = False, detector: Detector = DEFAULT
) -> None:
    """Write circles for DS9, in image coordinates (1-based), coloured by status.

    Parameters
    ----------
    path : path
        DS9 region file.
    blobs : DataFrame
        x_px, y_px, radius_px, depth_frac, and as far as they are there ``blob`` (name), ``status``
        and ``first_date``: from `select`, or from `search.find_blobs`.
    flt : bool
        Write them for images without the reference pixels.
    detector : Detector, optional
    """
    with files.atomic(path) as temporary:
        text = regions_text(blobs, flt=flt, detector=detector)
        temporary.write_text(text, encoding="utf-8")


def regions_text(blobs: pd.DataFrame, *, flt: bool = False, detector: Detector = DEFAULT) -> str:
    """Return the text of a DS9 region file, as for `write_regions`."""
    # from 0-based pixels with reference pixels to 1-based ones, with or without them
    shift = 1 - detector.border_px if flt else 1
    lines = [
        "# Region file format: DS9 version 4.1",
        f'global font="helvetica 10 normal" width=1 color={OTHER_COLOR}',
        "image",
    ]
    lines += [_circle(blob, shift) for blob in blobs.to_dict("records")]
    return "\n".join(lines) + "\n"


def _circle(blob: dict[Any, Any], shift: int) -> str:
    """Write a blob as a DS9 circle with a label."""
    name = _label(blob.get("blob", ""))
    status = _label(blob.get("status", ""))
    parts = [
        name,
        f"r={blob['radius_px']:.1f}px",
        blob.get("first_date", ""),
        f"{100 * blob['depth_frac']:.1f}%",
    ]
    text = " ".join(part for part in parts if part)
    color = COLORS.get(status, OTHER_COLOR)
    x = blob["x_px"] + shift
    y = blob["y_px"] + shift
    circle = f"circle({x:.4f},{y:.4f},{blob['radius_px']:.4f})"
    return f"{circle} # color={color} text={{{text}}} tag={{{status}}}"


def _label(text: Any) -> str:
    """Shorten a text and replace what could end it within a region file, such as braces."""
    return re.sub(r"[^\w.+-]", "_", str(text))[:MAX_LABEL]
