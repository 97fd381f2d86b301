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

from blobpipe.monitor import handover

PLACE = st.floats(-0.5, 1023.5) | st.sampled_from([-0.5, 0.0, 4.5, 5.0, 511.5, 1018.0, 1018.5, 1023.5])
BLOB = st.tuples(PLACE, PLACE, st.floats(0.5, 20))
BLOBS = st.lists(BLOB, min_size=1, max_size=6)
COUNT = st.integers(1, 1014)
ROW = st.tuples(COUNT, COUNT, st.integers(1, 40), st.sampled_from([1, 2]), st.sampled_from([4, 16, 32, 512, 528]))
ROWS = st.lists(ROW, max_size=12)
NAMES = ("CCDAMP", "CCDCHIP", "CCDGAIN", *handover.RUN_COLUMNS)
FORMATS = list(zip(NAMES, ("4A", "I", "E", "I", "I", "I", "I", "I"), strict=True))
few = settings(max_examples=15)


def catalogue(blobs: list[tuple[float, float, float]]) -> pd.DataFrame:
    table = pd.DataFrame(blobs, columns=["x_px", "y_px", "disc_px"])
    return table.assign(blob=[f"b{i}" for i in range(len(table))], first_mjd=56000.0 + table.index)


def made(rows: list[tuple[int, ...]]) -> fits.HDUList:
    return handover.with_rows(handover.new_table(), pd.DataFrame(rows, columns=list(handover.RUN_COLUMNS), dtype=int))


def written(hdus: fits.HDUList) -> tuple[bytes, fits.HDUList]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bpx.fits"
        hdus.writeto(path)
        return path.read_bytes(), handover.read_bad_pixels(path)


@few
@given(BLOBS)
def test_discs_as_rows_are_the_discs(blobs: list[tuple[float, float, float]]) -> None:
    y, x = np.mgrid[:1024, :1024]
    direct = np.any([np.hypot(x - blob[0], y - blob[1]) <= blob[2] for blob in blobs], axis=0)
    direct[:5] = direct[-5:] = direct[:, :5] = direct[:, -5:] = False
    rows = handover.runs(handover.disc_mask(*np.transpose(blobs)) * 512)
    assert (handover.dq_image(rows) == 512 * direct).all()
    assert rows["LENGTH"].sum() == direct.sum()
    assert rows["PIX1"].between(1, 1014).all()
    assert (rows["PIX1"] + rows["LENGTH"] - 1 <= 1014).all()
    assert len(rows) <= sum(2 * blob[2] + 1 for blob in blobs)


@few
@given(hnp.arrays(np.int16, (6, 9), elements=st.sampled_from([0, 4, 512, 516])), st.booleans(), st.booleans())
def test_any_image_is_its_rows(patch: np.ndarray, right: bool, top: bool) -> None:
    dq = np.zeros((1024, 1024), np.int32)
    dq[1018 * top : 1018 * top + 6, 1015 * right : 1015 * right + 9] = patch
    rows = handover.runs(dq)
    assert (handover.dq_image(rows) == dq).all()
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
    before = handover.dq_image(handover.find_table(table).data)
    merged, added = handover.add_discs(table, catalogue(blobs))
    after = handover.find_table(written(merged)[1]).data
    assert after[: len(rows)].tobytes() == handover.find_table(table).data.tobytes()
    assert len(after) == len(rows) + len(added)
    discs = handover.disc_mask(*np.transpose(blobs)) * 512
    assert (handover.dq_image(after) == (before | discs)).all()
    assert not (handover.dq_image(after[len(rows) :]) & before & 512).any()


@few
@given(ROWS, BLOBS)
def test_merging_twice_is_merging_once(rows: list[tuple[int, ...]], blobs: list[tuple[float, float, float]]) -> None:
    once, read = written(handover.add_discs(made(rows), catalogue(blobs))[0])
    merged, added = handover.add_discs(read, catalogue(blobs))
    assert added.empty
    assert written(merged)[0] == once


@few
@given(ROWS, BLOBS)
def test_what_is_written_is_read(rows: list[tuple[int, ...]], blobs: list[tuple[float, float, float]]) -> None:
    merged, _ = handover.add_discs(made(rows), catalogue(blobs))
    bytes_, read = written(merged)
    found, made_up = (handover.find_table(hdus) for hdus in (read, merged))
    assert [(column.name, column.format) for column in found.columns] == FORMATS
    assert all(found.data[name].tolist() == made_up.data[name].tolist() for name, _ in FORMATS)
    assert written(handover.add_discs(made(rows), catalogue(blobs))[0])[0] == bytes_
