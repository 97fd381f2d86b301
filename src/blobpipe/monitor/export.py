"""What the team hands on: DS9 regions, the catalogue, a bad-pixel table with the blobs' discs, a DQ image.

A bad-pixel table counts from 1 and leaves the 5 reference pixels out: ``x = PIX1 + 4`` in the frame of 1024 pixels
that counts from 0. Here all arrays have that frame; only files have the others.
"""

from __future__ import annotations

import logging
import re
import warnings
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
from blobpipe.core.detector import BORDER_PX, MJD_RANGE
from blobpipe.errors import TableError
from blobpipe.monitor import bad_pixel_table

log = logging.getLogger(__name__)
STATUSES = ("known", "confirmed")  # what is handed on unless more is asked for; only people confirm
SAME_PX = 3.0  # two blobs do not lie so near each other: they are sightings of one

COLUMNS = ("x_px", "y_px", "radius_px", "depth_frac")
# go into the meta data
ORIGIN = ("model", "params_hash", "model_sha256", "params_sha256", "stack_sha256")
UNITS = {"_px": "pix", "_px2": "pix2", "_mjd": "d", "_frac": ""}
DESCRIPTIONS = {
    "blob": "name",
    "x_px": "centre, 0-based, 1024 x 1024",
    "y_px": "centre, 0-based, 1024 x 1024",
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
COLORS = {"known": "cyan", "confirmed": "red", "new": "yellow", "seen_again": "orange"}
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
    radii_px: tuple[float, float] = bad_pixel_table.RADII_PX,
    flt: bool = False,
    all_flags: bool = False,
) -> None:
    """Write what the monitor has found in the forms that others use.

    Parameters
    ----------
    catalogue : path
        Read by `read_catalogue`.
    out_dir : path
        ``blobs.reg``, ``blobs.ecsv``, ``blobs_bpx.fits``, ``blobs_bpx.csv`` (the added rows alone), ``blobs_dq.fits``.
    until : str, optional
        Leave out blobs first seen after this date (the whole day counts) or MJD.
    statuses : collection of str
        Of the blobs that are handed on: of a log those that people have confirmed, unless others are asked for.
    dates : path, optional
        Table of images with ``frame`` and ``mjd``; ``frames.csv`` beside the catalogue if there is one.
    bpixtab : path, optional
        Bad pixels to add the discs to, read by `read_bad_pixels`.
    useafter : str, optional
        Date from which the new table is valid; otherwise that of its latest blob.
    radii_px : tuple of float
        Smallest and largest radius of a disc (px).
    flt : bool
        Write regions and DQ image for images of 1014 x 1014 pixels.
    all_flags : bool
        Give the DQ image all bits of the table, not 512 alone.

    Raises
    ------
    BlobpipeError
        If a date cannot be read, a table lacks something, no blob is left, or a file would overwrite what it is made of.

    Notes
    -----
    Source: ours, after the Data Handbook and the files of calibrated exposures.
    """
    out_dir = Path(out_dir)
    _refuse_overwriting(out_dir, catalogue, dates, bpixtab)
    limit = None if until is None else to_mjd(until, "--until", whole_day=True)
    after = None if useafter is None else to_mjd(useafter, "--useafter")
    blobs = select(catalogue, read_catalogue(catalogue, dates), statuses, limit)
    blobs["disc_px"] = bad_pixel_table.disc_radius(blobs["radius_px"], radii_px)
    table, rows = bad_pixel_table.add_discs(
        bad_pixel_table.new_table()
        if bpixtab is None
        else bad_pixel_table.read_bad_pixels(bpixtab),
        blobs,
        after,
    )
    flags = bad_pixel_table.dq_image(bad_pixel_table.read_rows(table)) & (
        -1 if all_flags else bad_pixel_table.BLOB
    )
    write_regions(out_dir / "blobs.reg", blobs, flt=flt)
    write_catalogue(out_dir / "blobs.ecsv", blobs)
    bad_pixel_table.write_fits(out_dir / "blobs_bpx.fits", table)
    tables.write_table(out_dir / "blobs_bpx.csv", rows)
    bad_pixel_table.write_dq(out_dir / "blobs_dq.fits", flags, flt=flt)
    log.info(
        "blobs handed on: %d, rows added to the bad-pixel table: %d, in %s",
        len(blobs),
        len(rows),
        out_dir,
    )


def _refuse_overwriting(out_dir: Path, *inputs: str | Path | None) -> None:
    for name in OUTPUTS:
        for path in [Path(given) for given in inputs if given]:
            if (out_dir / name).exists() and path.exists() and path.samefile(out_dir / name):
                raise TableError(
                    f"{path}: would be overwritten by the {name} made of it; name another --out"
                )


# ------------------------------------------------------------------------------------------------------ catalogue


def read_catalogue(path: str | Path, dates: str | Path | None = None) -> pd.DataFrame:
    """Read blobs from any table of the product, CSV or ECSV.

    Parameters
    ----------
    path : path
        With x_px, y_px, radius_px, depth_frac. Dates come from ``first_mjd``, else ``first_date``, else from looking
        up ``first_frame`` or ``frame``. All else is optional, and kept.
    dates : path, optional
        Where frames are looked up: a table with ``frame`` and ``mjd``; ``frames.csv`` beside ``path`` if it has both.

    Returns
    -------
    DataFrame
        The columns of the file; a ``decision`` of a review stands before the ``status``, which is ``known`` where there is
        none, and ``seen_again`` where a search, not a person, has called it ``confirmed`` (tables of older versions).
        ``first_mjd`` (d) and ``first_date`` if there are dates: NaN and empty for a blob older than the first image.

    Raises
    ------
    TableError
        If the file is no such table, or a date cannot be read or found.
    """
    table = _read_ecsv(path) if Path(path).suffix == ".ecsv" else tables.read_table(path, COLUMNS)
    table["status"] = _status(table)
    mjd = _first_mjd(Path(path), table, dates)
    if mjd is not None:
        table["first_mjd"] = mjd
        table["first_date"] = [format_mjd(each) for each in table["first_mjd"]]
    return table


def _read_ecsv(path: str | Path) -> pd.DataFrame:
    content = tables.read_table_bytes(Path(path), COLUMNS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table: pd.DataFrame = Table.read(
                content.decode("utf-8-sig"), format="ascii.ecsv"
            ).to_pandas()
    except Exception as error:  # what is no ECSV makes astropy raise nearly anything
        reason = " ".join(str(error).split())[:120]
        raise TableError(
            f"{path}: cannot be read as ECSV ({reason}); name a CSV table, or one that astropy wrote"
        ) from error
    missing = [column for column in COLUMNS if column not in table]
    if missing:
        raise TableError(
            f"{path}: column {missing[0]} is missing; expected {', '.join(COLUMNS)}; add it"
        )
    text = [name for name in table if table[name].dtype.kind not in "biuf"]
    for name in text:
        table[name] = table[name].fillna("").astype(str)
    return table


def _status(table: pd.DataFrame) -> pd.Series[str]:
    """What people have decided; else what the search has found; else it is a catalogue of known blobs."""
    found, decision = (
        table[column].fillna("").astype(str) if column in table else pd.Series("", table.index)
        for column in ("status", "decision")
    )
    if "decision" in table or "probability" in table:  # of a search
        found = found.replace("confirmed", "seen_again")
    return decision.where(decision != "", found).replace("", "known")


def _first_mjd(
    path: Path, table: pd.DataFrame, dates: str | Path | None
) -> pd.Series[float] | None:
    """When each blob was first seen, or None where nothing says so; a catalogue that has grown says it in two ways."""
    said = []
    if "first_mjd" in table:
        said.append(table["first_mjd"].astype(float))
    if "first_date" in table:
        texts = enumerate(table["first_date"].fillna("").astype(str), start=2)
        days = [
            to_mjd(text, f"{path}: row {row}: first_date") if text else np.nan
            for row, text in texts
        ]
        said.append(pd.Series(days, table.index))
    looked_up = _looked_up(path, table, dates)
    if looked_up is not None:
        said.append(looked_up)
    if not said:
        return None
    mjd = reduce(pd.Series.combine_first, said)
    low, high = MJD_RANGE
    for row in mjd.index[~(mjd.isna() | mjd.between(low, high))]:
        raise TableError(
            f"{path}: row {row + 2}: first seen on MJD {mjd[row]:g}, expected {low:g} to {high:g}; correct its date"
        )
    return mjd


def _looked_up(
    path: Path, table: pd.DataFrame, dates: str | Path | None
) -> pd.Series[float] | None:
    """Dates of the frames that first show the blobs, where there is a table of dates."""
    frame = "first_frame" if "first_frame" in table else "frame"
    images_csv = Path(dates or path.with_name("frames.csv"))
    if frame not in table or not images_csv.exists():
        return None
    images = tables.read_table(images_csv, ("frame",))
    if "mjd" not in images:
        return None
    tables.require_once(images_csv, images, "frame")
    named = table[frame]
    undated = table.get("first_mjd", pd.Series(np.nan, table.index)).isna()
    unknown = sorted(set(named[undated]) - {""} - set(images["frame"]))
    if unknown:
        raise TableError(
            f"{path}: {frame} {unknown[0]} is not a frame of {images_csv}; correct it or add the frame"
        )
    return named.map(dict(zip(images["frame"], images["mjd"], strict=True))).astype(float)


def select(
    path: str | Path,
    table: pd.DataFrame,
    statuses: Collection[str] = STATUSES,
    until_mjd: float | None = None,
) -> pd.DataFrame:
    """The blobs to hand on, in the order of their first sighting, each with a name.

    Parameters
    ----------
    path : path
        What errors name.
    table : DataFrame
        From `read_catalogue`.
    statuses : collection of str
        That are wanted.
    until_mjd : float, optional
        Latest date of the first sighting; a blob older than all images is in.

    Raises
    ------
    TableError
        If dates are wanted and there are none, no blob is left, or one is off the detector or has no size.
    """
    chosen = table[table["status"].isin(list(statuses))]
    if until_mjd is not None:
        if "first_mjd" not in table:
            raise TableError(
                f"{path}: no dates found, expected first_mjd, first_date, or first_frame and a table of images"
            )
        chosen = chosen[~(chosen["first_mjd"] > until_mjd)]
    if chosen.empty:
        found = ", ".join(sorted(set(table["status"]))) or "no row"
        raise TableError(
            f"{path}: no blob left of status {' or '.join(statuses)} (found {found}); review them, or ask for others with --also"
        )
    chosen = tables.require_blobs(path, chosen, COLUMNS)
    if "blob" not in table:
        return _first_sightings(chosen)
    chosen["blob"] = chosen["blob"].astype(str)
    tables.require_once(Path(path), chosen, "blob")
    return chosen.reset_index(drop=True)


def _first_sightings(detections: pd.DataFrame) -> pd.DataFrame:
    """Of detections at one place, the first, and a name for each place."""
    if "first_mjd" in detections:
        detections = detections.sort_values("first_mjd", kind="stable", na_position="first")
    places = detections[["x_px", "y_px"]].to_numpy(float)
    kept: list[int] = []
    for i, place in enumerate(places):
        if (np.hypot(*(places[kept] - place).T) > SAME_PX).all():
            kept.append(i)
    named = detections.iloc[kept].reset_index(drop=True)
    named.insert(0, "blob", [f"x{round(x)}y{round(y)}" for x, y in places[kept]])
    return named


def write_catalogue(path: str | Path, blobs: pd.DataFrame) -> None:
    """Write blobs as ECSV, with units, descriptions and where they come from; the same blobs give the same bytes."""
    table = Table({name: _plain(column) for name, column in blobs.items()})
    for name in table.colnames:
        suffix = re.search(r"_[a-z]+2?$", name)
        table[name].unit = UNITS.get(suffix.group() if suffix else "")
        table[name].description = DESCRIPTIONS.get(name)
    table.meta = _origin(blobs)
    with files.atomic(path) as temporary:
        table.write(temporary, format="ascii.ecsv")


def _plain(column: pd.Series[Any]) -> npt.NDArray[Any]:
    return (
        column.to_numpy()
        if column.dtype.kind in "biuf"
        else np.array(column.fillna("").astype(str).tolist())
    )


def _origin(blobs: pd.DataFrame) -> dict[str, Any]:
    """Version, models and settings, and the span of dates."""
    origin: dict[str, Any] = {"blobpipe": __version__}
    for column in ORIGIN:
        if column in blobs:
            origin[column] = sorted(set(_plain(blobs[column]).tolist()) - {""})
    span = bad_pixel_table.date_span(blobs)
    return origin | {"first_date": format_mjd(span[0]), "last_date": format_mjd(span[1])}


# -------------------------------------------------------------------------------------------------------- regions


def write_regions(path: str | Path, blobs: pd.DataFrame, *, flt: bool = False) -> None:
    """Write circles for DS9, in image coordinates (1-based), coloured by status.

    Parameters
    ----------
    path : path
        A DS9 region file.
    blobs : DataFrame
        From `select`.
    flt : bool
        For images of 1014 x 1014 pixels, without the reference pixels.
    """
    lines = [
        "# Region file format: DS9 version 4.1",
        f'global font="helvetica 10 normal" width=1 color={OTHER_COLOR}',
    ]
    lines += [
        "image",
        *(_circle(blob, 1 - BORDER_PX if flt else 1) for blob in blobs.to_dict("records")),
    ]
    with files.atomic(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _circle(blob: dict[Any, Any], shift: int) -> str:
    # braces would end the text
    name, status = (
        re.sub(r"[^\w.+-]", "_", str(blob[key]))[: bad_pixel_table.MAX_LABEL]
        for key in ("blob", "status")
    )
    label = [
        name,
        f"r={blob['radius_px']:.1f}px",
        blob.get("first_date", ""),
        f"{100 * blob['depth_frac']:.1f}%",
    ]
    place = f"{blob['x_px'] + shift:.4f},{blob['y_px'] + shift:.4f},{blob['radius_px']:.4f}"
    text = " ".join(part for part in label if part)
    return f"circle({place}) # color={COLORS.get(status, OTHER_COLOR)} text={{{text}}} tag={{{status}}}"
