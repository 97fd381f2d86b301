"""Bad-pixel tables: discs become rows, nothing of a table is lost, and odd files are refused."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from tests.unit.exported import dq_of, exported, rows_of

from blobpipe.core import tables
from blobpipe.core.detector import DEFAULT
from blobpipe.errors import TableError
from blobpipe.monitor import bad_pixel_table, export

ROOT = Path(__file__).parents[3]
BAD_PIXELS = "wfc3ir_badpix_spars200_22.03.31.fits.gz"
EXPOSURE = "ibxy01z8q_ima.fits.gz"


def test_a_new_table_flags_the_discs(catalogue: Path) -> None:
    out = exported(catalogue)
    y, x = np.mgrid[:1024, :1024]
    expected = np.zeros((1024, 1024), bool)
    for cx, cy, radius in ((312.4, 118.25, 8.2), (801.9, 644.2, 7.0), (6.0, 1019.0, 7.0)):
        expected |= np.hypot(x - cx, y - cy) <= radius
    expected[:5] = expected[-5:] = expected[:, :5] = expected[:, -5:] = False
    dq = dq_of(out / "blobs_dq.fits")
    assert dq.dtype == ">i2"
    assert (dq == 512 * expected).all()
    rows = rows_of(out / "blobs_bpx.fits")
    assert rows.names == ["CCDAMP", "CCDCHIP", "CCDGAIN", "PIX1", "PIX2", "LENGTH", "AXIS", "VALUE"]
    assert (rows["LENGTH"].sum(), len(rows)) == (expected.sum(), 16 + 15 + 6)
    lowest = rows[np.argmin(rows["PIX2"])]
    # x = 309 to 316, y = 111, 0-based with the border
    assert tuple(lowest) == ("ABCD", 1, 2.5, 305, 107, 8, 1, 512)
    assert (expected[111].nonzero()[0] == np.arange(309, 317)).all()


def test_the_header_is_that_of_a_reference_file(catalogue: Path) -> None:
    header = fits.getheader(exported(catalogue) / "blobs_bpx.fits")
    assert [header[key] for key in ("TELESCOP", "INSTRUME", "DETECTOR")] == ["HST", "WFC3", "IR"]
    assert header["USEAFTER"] == "Oct 18 2012 16:48:00"
    assert header["PEDIGREE"] == "INFLIGHT 27/09/2012 18/10/2012"
    assert len(header["DESCRIP"]) == 67
    assert "b002" in str(header["HISTORY"])
    table = fits.getheader(catalogue.parent / "out" / "blobs_bpx.fits", "BPIX")
    assert (table["SIZAXIS1"], table["SIZAXIS2"]) == (1024, 1024)


def test_merging_loses_nothing(catalogue: Path, existing: Path) -> None:
    out = exported(catalogue, bpixtab=existing)
    old = rows_of(existing)
    new = rows_of(out / "blobs_bpx.fits")
    assert new.dtype == old.dtype
    assert new[: len(old)].tobytes() == old.tobytes()
    added = new[len(old) :]
    assert len(added) == 15 + 6  # the disc of b001 is there already
    assert set(added["CCDAMP"]) == {"ABCD"}
    assert set(added["CCDGAIN"]) == {2.0}
    assert set(added["CCDCHIP"]) == {-999}
    assert set(added["NOTE"]) == {""}
    with fits.open(existing) as before, fits.open(out / "blobs_bpx.fits", checksum=True) as after:
        assert [hdu.name for hdu in after] == ["PRIMARY", "OTHER", "BPIX"]
        assert (after["OTHER"].data == before["OTHER"].data).all()
        assert after["BPIX"].columns["PIX2"].unit == "pixel"
        assert after["BPIX"].columns["PIX2"].disp == "I6"
        assert after["BPIX"].header["SIZAXIS1"] == 1014
        assert "CHECKSUM" not in after["BPIX"].header
        head = after[0].header
    assert (head["PEDIGREE"], head["FILENAME"]) == ("GROUND", "blobs_bpx.fits")
    assert head["USEAFTER"] == "Oct 18 2012 16:48:00"
    assert head["HISTORY"][0] == "made by hand"
    assert [name in str(head["HISTORY"]) for name in ("b001", "b002", "b003")] == [
        False,
        True,
        True,
    ]
    csv = tables.read_table(out / "blobs_bpx.csv", bad_pixel_table.RUN_COLUMNS)
    assert csv["PIX1"].tolist() == added["PIX1"].tolist()


def test_the_later_useafter_stays(catalogue: Path, existing: Path) -> None:
    fits.setval(existing, "USEAFTER", value="Mar 01 2019 00:00:00")
    assert (
        fits.getval(exported(catalogue, bpixtab=existing) / "blobs_bpx.fits", "USEAFTER")
        == "Mar 01 2019 00:00:00"
    )
    out = exported(catalogue, bpixtab=existing, useafter="2013-05-01")
    assert fits.getval(out / "blobs_bpx.fits", "USEAFTER") == "May 01 2013 00:00:00"


@pytest.mark.parametrize(
    ("text", "later"),
    [
        ("Mar 01 2019 00:00:00", True),
        ("Mar  1 2019", True),
        ("MARCH 1 2019", True),
        ("2019-03-01T00:00:00", True),
        ("2019-03-01 00:00:00.000", True),
        ("2019-03-01", True),
        ("01/03/2019", True),
        ("2009-03-01T00:00:00", False),
        ("Mar 01 2009 00:00:00", False),
        ("", False),
    ],
)
def test_a_later_useafter_is_never_set_back(
    catalogue: Path, existing: Path, text: str, later: bool
) -> None:
    fits.setval(existing, "USEAFTER", value=text)
    found = fits.getval(exported(catalogue, bpixtab=existing) / "blobs_bpx.fits", "USEAFTER")
    assert found == (text if later else "Oct 18 2012 16:48:00")


@pytest.mark.parametrize("value", ["next spring", "2019", 58543.0, "13/13/2019"])
def test_a_useafter_that_cannot_be_read_is_named(
    catalogue: Path, existing: Path, value: str | float
) -> None:
    fits.setval(existing, "USEAFTER", value=value)
    with pytest.raises(TableError, match=r"USEAFTER is .* or give --useafter"):
        exported(catalogue, bpixtab=existing)
    out = exported(catalogue, bpixtab=existing, useafter="2013-05-01")
    assert fits.getval(out / "blobs_bpx.fits", "USEAFTER") == "May 01 2013 00:00:00"


def unusual(path: Path, values: list[int], kind: str, zero: int, **others: Any) -> Path:
    """A bad-pixel table whose numbers are stored in a given way, with all sorts of columns beside them."""
    n = len(values)
    rows = {
        "PIX1": [1 + 3 * i for i in range(n)],
        "PIX2": [9 + i for i in range(n)],
        "LENGTH": [1] * n,
        "AXIS": [1] * n,
    }
    made = {
        "VALUE": np.array(values, object),
        **{name: np.array(row, object) for name, row in rows.items()},
    }
    kinds = {"VALUE": (kind, zero), "PIX1": others.get("place", ("I", 0)), "PIX2": ("E", 0)}
    columns = [
        fits.Column("NOTE", "6A", array=["mine"] * n),
        fits.Column("FLAG", "L", array=np.arange(n) % 2 == 0),
        fits.Column("BITS", "11X", array=np.ones((n, 11), bool)),
        fits.Column(
            "LIST", "PJ()", array=np.array([np.arange(i % 3) for i in range(n)], dtype=object)
        ),
        fits.Column("GAP", "J", null=-7, array=np.arange(n)),
        fits.Column("MORE", "2E", array=np.ones((n, 2))),
    ]
    for name, column in made.items():
        form, offset = kinds.get(name, ("J", 0))
        dtype = {"B": "u1", "I": "i2", "J": "i4", "K": "i8", "E": "f4", "D": "f8"}[form]
        unsigned = np.array(column).astype(dtype.replace("i", "u") if offset else dtype)
        columns.append(fits.Column(name, form, bzero=offset or None, array=unsigned))
    hdus = fits.HDUList([fits.PrimaryHDU(), fits.BinTableHDU.from_columns(columns, name="BPIX")])
    hdus.append(fits.CompImageHDU(np.arange(40000, dtype=np.int32).reshape(200, 200), name="OTHER"))
    hdus[0].header["USEAFTER"] = "Mar 01 2009 00:00:00"
    hdus.writeto(path)
    return path


KINDS = {
    "unsigned 16": ([4, 16, 32768, 33000, 512, 65535], "I", 2**15),
    "unsigned 32": ([4, 2**31 + 1, 2**32 - 1, 65537], "J", 2**31),
    "unsigned 64": ([4, 2**40, 2**62], "K", 2**63),
    "signed 16": ([4, -32768, 16384], "I", 0),
    "signed 32": ([4, 2**30, -1], "J", 0),
    "signed 64": ([4, 2**40 + 512], "K", 0),
    "doubles": ([4, 2**40, 512], "D", 0),
}
PLACES = [("I", 2**15), ("I", 0), ("J", 2**31), ("D", 0), ("E", 0), ("K", 0), ("J", 0)]


@pytest.mark.parametrize(("kind", "place"), [*zip(KINDS, PLACES, strict=True)])
def test_old_rows_keep_their_bytes_however_they_are_stored(
    catalogue: Path, tmp_path: Path, kind: str, place: tuple[str, int]
) -> None:
    path = unusual(tmp_path / "their_bpx.fits", *KINDS[kind], place=place)
    out = exported(catalogue, bpixtab=path, all_flags=True)
    with (
        fits.open(path, disable_image_compression=True) as before,
        fits.open(out / "blobs_bpx.fits", disable_image_compression=True) as after,
    ):
        old, new = (np.asarray(hdus["BPIX"].data) for hdus in (before, after))
        assert new.dtype == old.dtype
        assert new[: len(old)].tobytes() == old.tobytes()
        assert before["BPIX"].data["VALUE"].tolist() == KINDS[kind][0]
        rows = after["BPIX"].data
        assert rows["VALUE"].tolist() == KINDS[kind][0] + [512] * (len(new) - len(old))
        assert [each.tolist() for each in rows["LIST"][: len(old)]] == [
            list(range(i % 3)) for i in range(len(old))
        ]
        assert all(len(each) == 0 for each in rows["LIST"][len(old) :])
        assert set(rows["GAP"][len(old) :]) == {-7}
        assert before["OTHER"].data.tobytes() == after["OTHER"].data.tobytes()
        added = after["BPIX"].data[len(old) :]
        assert [int(added[name].min()) for name in ("PIX1", "PIX2")] == [1, 107]
    dq = dq_of(out / "blobs_dq.fits").astype(object)
    for i, value in enumerate(KINDS[kind][0]):
        assert dq[9 + i + 4, 1 + 3 * i + 4] & ~512 == value & ~512
    assert (bad_pixel_table.read_dq(out / "blobs_bpx.fits") == dq).all()


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (
            fits.Column("VALUE", "B", array=[4, 16]),
            "column VALUE of format B cannot hold 512; give it a wider one",
        ),
        (fits.Column("PIX1", "B", array=[4, 16]), "column PIX1 of format B cannot hold"),
        (
            fits.Column("VALUE", "2I", array=[[4, 4], [5, 5]]),
            "column VALUE has the format 2I, expected one number",
        ),
        (
            fits.Column("VALUE", "3A", array=["4", "5"]),
            "column VALUE has the format 3A, expected one number",
        ),
        (
            fits.Column("VALUE", "PI()", array=np.array([[4], [5]], object)),
            "column VALUE has the format PI",
        ),
        (
            fits.Column("VALUE", "I", null=16, array=[4, 16]),
            "row 2: VALUE is 16, expected a number",
        ),
        (fits.Column("PIX1", "E", array=[4, 1.5]), "row 2: PIX1 is 1.5, expected a whole number"),
        (
            fits.Column("PIX2", "D", array=[np.nan, 1]),
            "row 1: PIX2 is nan, expected a number below",
        ),
        (
            fits.Column("PIX2", "D", array=[1e300, 1]),
            "row 1: PIX2 is 1e\\+300, expected a number below",
        ),
        (
            fits.Column("VALUE", "K", bzero=2**63, array=np.array([2**63, 1], np.uint64)),
            "row 1: VALUE is 9223372036854775808",
        ),
        (fits.Column("AXIS", "I", array=[1, 3]), "row 2: AXIS is 3, expected 1 or 2"),
        (fits.Column("LENGTH", "J", array=[0, 3]), "row 1: LENGTH is 0, expected 1 to 1024"),
        (
            fits.Column("LENGTH", "J", array=[1, 2_000_000_000]),
            "row 2: LENGTH is 2000000000, expected 1 to 1024",
        ),
    ],
)
def test_a_table_that_is_odd_is_refused(
    catalogue: Path, tmp_path: Path, column: Any, says: str
) -> None:
    usual = [
        fits.Column(name, "I", array=[1, 2])
        for name in bad_pixel_table.RUN_COLUMNS
        if name != column.name
    ]
    table = fits.BinTableHDU.from_columns([*usual, column], name="BPIX")
    fits.HDUList([fits.PrimaryHDU(), table]).writeto(tmp_path / "odd.fits")
    with pytest.raises(TableError, match=says):
        exported(catalogue, bpixtab=tmp_path / "odd.fits")
    assert not (tmp_path / "out").exists()


def test_numbers_in_other_steps_are_refused(catalogue: Path, existing: Path) -> None:
    fits.setval(existing, "TSCAL3", value=2.0, extname="BPIX")
    with pytest.raises(TableError, match="column VALUE has the format I, expected one number"):
        exported(catalogue, bpixtab=existing)


@pytest.mark.parametrize(
    ("dtype", "packed"),
    [
        *((dtype, True) for dtype in (np.uint8, np.int16, np.uint16, np.int32, np.uint32)),
        *(
            (dtype, False)
            for dtype in (np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64)
        ),
    ],
)
def test_an_image_of_any_bits_keeps_them(
    catalogue: Path, tmp_path: Path, dtype: Any, packed: bool
) -> None:
    given = np.zeros((1024, 1024), dtype)
    top = min(int(np.iinfo(dtype).max), 2**63 - 1)
    given[100, 200:203], given[300, 7], given[400, 400] = 4, np.iinfo(dtype).min, top
    hdu = fits.CompImageHDU(given, name="DQ") if packed else fits.ImageHDU(given, name="DQ")
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(tmp_path / "dq.fits")
    out = exported(catalogue, bpixtab=tmp_path / "dq.fits", all_flags=True)
    found = dq_of(out / "blobs_dq.fits").astype(object)
    discs = bad_pixel_table.disc_mask([312.4, 801.9, 6.0], [118.25, 644.2, 1019.0], [8.2, 7.0, 7.0])
    assert (found == (given.astype(object) | 512 * discs.astype(object))).all()
    assert (bad_pixel_table.read_dq(out / "blobs_bpx.fits").astype(object) == found).all()


def exposure(path: Path, dq: Any, **primary: Any) -> Path:
    """Counts as raw files have them, as integers, before their DQ."""
    counts = np.random.default_rng(1).integers(9000, 14000, (1024, 1024)).astype(np.uint16)
    hdus = fits.HDUList(
        [
            fits.PrimaryHDU(**primary),
            fits.ImageHDU(counts, name="SCI"),
            fits.ImageHDU(counts, name="ERR"),
        ]
    )
    if dq is not None:
        hdus.append(fits.ImageHDU(dq, name="DQ") if isinstance(dq, np.ndarray) else dq)
    hdus.writeto(path)
    return path


def constant(value: int) -> fits.ImageHDU:
    hdu = fits.ImageHDU(name="DQ")
    hdu.header.update({"NPIX1": 1024, "NPIX2": 1024, "PIXVALUE": value})
    return hdu


def test_of_an_exposure_dq_is_taken_never_its_counts(tmp_path: Path) -> None:
    dq = np.zeros((1024, 1024), np.int16)
    dq[100, 200:203] = 4
    assert (bad_pixel_table.read_dq(exposure(tmp_path / "raw.fits", dq)) == dq).all()
    assert not bad_pixel_table.read_dq(exposure(tmp_path / "constant.fits", constant(0))).any()
    for name, hdu in (("none", None), ("small", dq[:100, :100]), ("floats", dq.astype(np.float32))):
        with pytest.raises(TableError, match=f"{name}.fits: found no bad pixels"):
            bad_pixel_table.read_dq(exposure(tmp_path / f"{name}.fits", hdu))
    with pytest.raises(
        TableError, match=r"flagged\.fits: 100% of its pixels are flagged, expected at most 50%"
    ):
        bad_pixel_table.read_dq(exposure(tmp_path / "flagged.fits", constant(4)))
    with pytest.raises(
        TableError, match=r"counts\.fits: 100% of its pixels are flagged.*: counts, not DQ"
    ):
        bad_pixel_table.read_dq(
            exposure(tmp_path / "counts.fits", None, data=np.full((1024, 1024), 9000, np.int16))
        )


def patched(content: bytes, old: bytes, new: bytes) -> bytes:
    assert content.count(old) == 1
    return content.replace(old, new.ljust(len(old)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda c: patched(c, b"TFIELDS =                    9", b"TFIELDS = 2000000000"),
            "its card TFIELDS is 2000000000",
        ),
        (
            lambda c: patched(c, b"NAXIS   =                    2 /", b"NAXIS   = 2000000000"),
            "its card NAXIS is",
        ),
        (lambda c: c[:-4000], "not a whole FITS file|truncated"),
        (lambda c: gzip.compress(c)[:-9], "ended before the end-of-stream"),
        (lambda c: gzip.compress(c)[:-6] + b"xxxxxx", "CRC check failed"),
        (lambda c: c.replace(b"mine", b"ours", 1), "DATASUM of HDU BPIX does not agree"),
        (
            lambda c: c.replace(b"TFORM5  = 'I ", b"TFORM5  = '9I", 1),
            "not a whole FITS table|CHECKSUM",
        ),
    ],
)
def test_a_damaged_table_is_refused(
    catalogue: Path, existing: Path, change: Any, says: str
) -> None:
    existing.write_bytes(change(existing.read_bytes()))
    with pytest.raises(TableError, match=f"their_bpx.fits: .*({says})"):
        exported(catalogue, bpixtab=existing)


def test_a_pipe_is_no_table(catalogue: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.fits")
    with pytest.raises(TableError, match=r"pipe\.fits: no regular file"):
        exported(catalogue, bpixtab=tmp_path / "pipe.fits")


def test_discs_keep_within_the_limits() -> None:
    assert bad_pixel_table.disc_radius([3.0, 6.0, 9.0]).tolist() == [7.0, 7.5, 8.2]
    assert bad_pixel_table.disc_radius([3.0, 9.0], (2.0, 20.0)).tolist() == [4.5, 10.5]
    assert bad_pixel_table.disc_radius([0.1], (0.5, 0.9)).tolist() == [0.9]


def test_wide_bits_need_wide_pixels(tmp_path: Path) -> None:
    dq = np.zeros((1024, 1024), np.int32)
    dq[7, 8] = 2**16
    bad_pixel_table.write_dq(tmp_path / "dq.fits", dq)
    assert (dq_of(tmp_path / "dq.fits") == dq).all()


@pytest.mark.parametrize(("bits", "kind"), [(2**15 - 1, ">i2"), (2**15, ">i4")])
def test_pixels_are_as_wide_as_their_bits(tmp_path: Path, bits: int, kind: str) -> None:
    bad_pixel_table.write_dq(tmp_path / "dq.fits", np.full((1024, 1024), bits, np.int32))
    assert dq_of(tmp_path / "dq.fits").dtype == kind


def test_an_image_of_either_size_is_read_as_one_with_reference_pixels(tmp_path: Path) -> None:
    dq = np.zeros((1024, 1024), np.int16)
    dq[5, 9], dq[1018, 1018], dq[500, 5:8] = 4, 16, 32
    fits.PrimaryHDU(dq).writeto(tmp_path / "whole.fits")
    fits.PrimaryHDU(dq[5:-5, 5:-5]).writeto(tmp_path / "flt.fits")
    for name in ("whole", "flt"):
        assert (bad_pixel_table.read_dq(tmp_path / f"{name}.fits") == dq).all(), name


def test_the_history_names_the_discs_in_the_table_s_own_pixels(catalogue: Path) -> None:
    history = list(fits.getheader(exported(catalogue) / "blobs_bpx.fits")["HISTORY"])
    assert "flagged 3 blobs with DQ 512" in history[0]
    assert [line.strip() for line in history[1:]] == [
        "b001: 308.4, 114.2, 8.2; since the first image",
        "b002: 797.9, 640.2, 7.0; since 2012-10-18",
        "b003: 2.0, 1015.0, 7.0; since 2012-09-27",
    ]


def test_new_rows_have_the_amplifier_chip_and_gain_of_most(tmp_path: Path, catalogue: Path) -> None:
    table = bad_pixel_table.with_rows(
        bad_pixel_table.new_table(), bad_pixel_table.runs(4 * np.eye(1024, dtype=np.int32)[:, ::-1])
    )
    rows = bad_pixel_table.find_table(table).data
    rows["CCDAMP"][:1000], rows["CCDGAIN"][:600], rows["CCDCHIP"][:3] = "A", 4.0, 7
    table.writeto(tmp_path / "bpx.fits")
    added = rows_of(exported(catalogue, bpixtab=tmp_path / "bpx.fits") / "blobs_bpx.fits")[
        len(rows) :
    ]
    assert {(row["CCDAMP"], row["CCDGAIN"], row["CCDCHIP"]) for row in added} == {("A", 4.0, 1)}


# ---------------------------------------------------------------------------------------------------- real pixels


def _real(name: str) -> Path:
    named = os.environ.get("BLOBPIPE_REAL")
    folders = [Path(named)] if named else sorted(ROOT.parent.glob("*/real"))
    found = [folder / name for folder in folders if (folder / name).exists()]
    if not found:
        pytest.skip(f"no {name} at hand: name its folder in BLOBPIPE_REAL")
    return found[0]


@pytest.mark.real
def test_the_real_bad_pixels_all_survive(catalogue: Path) -> None:
    path = _real(BAD_PIXELS)
    given = fits.getdata(path)
    assert np.count_nonzero(given) == 20_438
    read = bad_pixel_table.read_dq(path)
    assert (read[5:-5, 5:-5] == given).all()
    out = exported(catalogue, bpixtab=path, all_flags=True)
    dq = dq_of(out / "blobs_dq.fits")
    assert (dq & ~512 == read).all()
    discs = bad_pixel_table.disc_mask([312.4, 801.9, 6.0], [118.25, 644.2, 1019.0], [8.2, 7.0, 7.0])
    assert ((dq & 512 != 0) == discs).all()
    assert (bad_pixel_table.read_dq(out / "blobs_bpx.fits") == dq).all()
    export.export_blobs(
        catalogue, out.parent / "again", bpixtab=out / "blobs_bpx.fits", all_flags=True
    )
    again = out.parent / "again" / "blobs_bpx.fits"
    assert again.read_bytes() == (out / "blobs_bpx.fits").read_bytes()


@pytest.mark.real
@pytest.mark.parametrize(
    ("x", "y", "radius"), [(123.36, 58.19, 7.05), (231.83, 237.17, 7.83), (132.24, 247.76, 8.2)]
)
def test_real_masks_are_discs_within_the_limits(x: float, y: float, radius: float) -> None:
    """The three of a subarray that nothing cuts: our disc at their centre differs by a few pixels of the rim."""
    mask = fits.getdata(_real(EXPOSURE), ("DQ", 1)) & 512 != 0
    around = np.zeros((1024, 1024), bool)
    around[300 : 300 + 266, 300 : 300 + 266] = mask
    ours = bad_pixel_table.disc_mask(x + 300, y + 300, radius)
    near = bad_pixel_table.disc_mask(x + 300, y + 300, radius + 3)
    assert (ours ^ (around & near)).sum() <= 4
    assert (
        DEFAULT.bad_pixel_table.disc_px[0]
        <= np.sqrt((around & near).sum() / np.pi)
        <= DEFAULT.bad_pixel_table.disc_px[1]
    )
