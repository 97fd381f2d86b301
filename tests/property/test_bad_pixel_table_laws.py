"""Laws of bad-pixel tables: nothing is lost, nothing is said twice, and rows and images say the same."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from astropy.io import fits
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from blobpipe.monitor import bad_pixel_table

PLACE = st.floats(-0.5, 1023.5) | st.sampled_from(
    [-0.5, 0.0, 4.5, 5.0, 511.5, 1018.0, 1018.5, 1023.5]
)
BLOB = st.tuples(PLACE, PLACE, st.floats(0.5, 20))
BLOBS = st.lists(BLOB, min_size=1, max_size=6)
COUNT = st.integers(1, 1014)
ROW = st.tuples(
    COUNT,
    COUNT,
    st.integers(1, 40),
    st.sampled_from([1, 2]),
    st.sampled_from([4, 16, 32, 512, 528]),
)
ROWS = st.lists(ROW, max_size=12)
NAMES = ("CCDAMP", "CCDCHIP", "CCDGAIN", *bad_pixel_table.RUN_COLUMNS)
FORMATS = list(zip(NAMES, ("4A", "I", "E", "I", "I", "I", "I", "I"), strict=True))
few = settings(max_examples=15)


def catalogue(blobs: list[tuple[float, float, float]]) -> pd.DataFrame:
    table = pd.DataFrame(blobs, columns=["x_px", "y_px", "disc_px"])
    return table.assign(blob=[f"b{i}" for i in range(len(table))], first_mjd=56000.0 + table.index)


def made(rows: list[tuple[int, ...]]) -> fits.HDUList:
    return bad_pixel_table.with_rows(
        bad_pixel_table.new_table(),
        pd.DataFrame(rows, columns=list(bad_pixel_table.RUN_COLUMNS), dtype=int),
    )


def written(hdus: fits.HDUList) -> tuple[bytes, fits.HDUList]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bpx.fits"
        hdus.writeto(path)
        return path.read_bytes(), bad_pixel_table.read_bad_pixels(path)


@few
@given(BLOBS)
def test_discs_as_rows_are_the_discs(blobs: list[tuple[float, float, float]]) -> None:
    y, x = np.mgrid[:1024, :1024]
    direct = np.any([np.hypot(x - blob[0], y - blob[1]) <= blob[2] for blob in blobs], axis=0)
    direct[:5] = direct[-5:] = direct[:, :5] = direct[:, -5:] = False
    rows = bad_pixel_table.runs(bad_pixel_table.disc_mask(*np.transpose(blobs)) * 512)
    assert (bad_pixel_table.dq_image(rows) == 512 * direct).all()
    assert rows["LENGTH"].sum() == direct.sum()
    assert rows["PIX1"].between(1, 1014).all()
    assert (rows["PIX1"] + rows["LENGTH"] - 1 <= 1014).all()
    assert len(rows) <= sum(2 * blob[2] + 1 for blob in blobs)


@few
@given(
    hnp.arrays(np.int16, (6, 9), elements=st.sampled_from([0, 4, 512, 516])),
    st.booleans(),
    st.booleans(),
)
def test_any_image_is_its_rows(patch: np.ndarray, right: bool, top: bool) -> None:
    dq = np.zeros((1024, 1024), np.int32)
    dq[1018 * top : 1018 * top + 6, 1015 * right : 1015 * right + 9] = patch
    rows = bad_pixel_table.runs(dq)
    assert (bad_pixel_table.dq_image(rows) == dq).all()
    ends = rows["PIX1"] + rows["LENGTH"]
    following = rows.shift(-1)
    touching = (following["PIX1"] == ends) & (following["PIX2"] == rows["PIX2"])
    assert not (touching & (following["VALUE"] == rows["VALUE"])).any()  # as long as they can be


@few
@given(ROWS, BLOBS)
def test_merging_loses_nothing_and_adds_only_the_discs(
    rows: list[tuple[int, ...]], blobs: list[tuple[float, float, float]]
) -> None:
    table = written(made(rows))[1]
    before = bad_pixel_table.dq_image(bad_pixel_table.find_table(table).data)
    merged, added = bad_pixel_table.add_discs(table, catalogue(blobs))
    after = bad_pixel_table.find_table(written(merged)[1]).data
    assert after[: len(rows)].tobytes() == bad_pixel_table.find_table(table).data.tobytes()
    assert len(after) == len(rows) + len(added)
    discs = bad_pixel_table.disc_mask(*np.transpose(blobs)) * 512
    assert (bad_pixel_table.dq_image(after) == (before | discs)).all()
    assert not (bad_pixel_table.dq_image(after[len(rows) :]) & before & 512).any()


@few
@given(ROWS, BLOBS)
def test_merging_twice_is_merging_once(
    rows: list[tuple[int, ...]], blobs: list[tuple[float, float, float]]
) -> None:
    once, read = written(bad_pixel_table.add_discs(made(rows), catalogue(blobs))[0])
    merged, added = bad_pixel_table.add_discs(read, catalogue(blobs))
    assert added.empty
    assert written(merged)[0] == once


@few
@given(ROWS, BLOBS)
def test_what_is_written_is_read(
    rows: list[tuple[int, ...]], blobs: list[tuple[float, float, float]]
) -> None:
    merged, _ = bad_pixel_table.add_discs(made(rows), catalogue(blobs))
    bytes_, read = written(merged)
    found, made_up = (bad_pixel_table.find_table(hdus) for hdus in (read, merged))
    assert [(column.name, column.format) for column in found.columns] == FORMATS
    assert all(found.data[name].tolist() == made_up.data[name].tolist() for name, _ in FORMATS)
    assert written(bad_pixel_table.add_discs(made(rows), catalogue(blobs))[0])[0] == bytes_
