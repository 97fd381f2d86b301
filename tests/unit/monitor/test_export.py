"""What is handed on can be read by those who get it, and says the same as the catalogue."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from astropy.table import Table
from regions import CirclePixelRegion, Regions
from tests.unit import synthetic_log

from blobpipe import cli
from blobpipe.core import tables
from blobpipe.core.dates import to_mjd
from blobpipe.errors import BlobpipeError, TableError
from blobpipe.monitor import bad_pixel_table, export, logbook

ROOT = Path(__file__).parents[3]
BAD_PIXELS = "wfc3ir_badpix_spars200_22.03.31.fits.gz"
EXPOSURE = "ibxy01z8q_ima.fits.gz"

BLOBS = """blob,x_px,y_px,radius_px,depth_frac,shape,first_frame
b001,312.4,118.25,8.1,0.035,diamond,
b002,801.9,644.2,4.3,0.021,disc,second
b003,6.0,1019.0,5.5,0.05,disc,first
"""
IMAGES = "frame,mjd\nfirst,56197.31\nsecond,56218.7\n"
LOG = """blob,x_px,y_px,radius_px,depth_frac,depth_err_frac,snr,first_frame,first_mjd,status,model,params_hash
7,100.5,200.5,5.0,0.02,0.001,12.5,a,56000.25,confirmed,dense-1,12e45678
8,300.5,200.5,6.0,0.03,0.001,22.5,b,56001,new,dense-1,0012
9,500.5,200.5,6.0,0.03,0.001,22.5,b,56001,rejected,dense-2,0012
10,,200.5,6.0,0.03,0.001,22.5,b,56001,bad_pixels,dense-2,0012
"""


@pytest.fixture
def catalogue(tmp_path: Path) -> Path:
    (tmp_path / "frames.csv").write_text(IMAGES)
    (tmp_path / "blobs.csv").write_text(BLOBS)
    return tmp_path / "blobs.csv"


@pytest.fixture
def daily_log(tmp_path: Path) -> Path:
    (tmp_path / "log.csv").write_text(LOG)
    return tmp_path / "log.csv"


@pytest.fixture
def existing(tmp_path: Path) -> Path:
    """A table as another would make it: other order and types, a column and an HDU of its own, sums, and a 512 disc."""
    disc = bad_pixel_table.runs(bad_pixel_table.disc_mask(312.4, 118.25, 8.2) * 512)
    rows = pd.concat(
        [
            pd.DataFrame(
                {"PIX1": [5, -3], "PIX2": [9, 1], "LENGTH": 3, "AXIS": 2, "VALUE": [4, 16]}
            ),
            disc,
        ]
    )
    n = len(rows)
    columns = [
        fits.Column("PIX2", "J", array=rows["PIX2"], disp="I6", unit="pixel"),
        fits.Column("PIX1", "J", array=rows["PIX1"]),
        *(fits.Column(name, "I", array=rows[name]) for name in ("VALUE", "AXIS", "LENGTH")),
        fits.Column("CCDAMP", "8A", array=["ABCD"] * n),
        fits.Column("CCDGAIN", "D", array=[2.0] * n),
        fits.Column("CCDCHIP", "J", array=[-999] * n),
        fits.Column("NOTE", "6A", array=["mine"] * n),
    ]
    table = fits.BinTableHDU.from_columns(columns, name="BPIX")
    table.header["SIZAXIS1"] = (1014, "their size")
    primary = fits.PrimaryHDU()
    primary.header.update(
        {"USEAFTER": "Jan 02 2010 00:00:00", "PEDIGREE": "GROUND", "FILENAME": "x.fits"}
    )
    primary.header.add_history("made by hand")
    path = tmp_path / "their_bpx.fits"
    hdus = fits.HDUList([primary, fits.ImageHDU(np.arange(4), name="OTHER"), table])
    hdus.writeto(path, checksum=True)
    return path


def exported(catalogue: Path, **options: Any) -> Path:
    out = catalogue.parent / "out"
    export.export_blobs(catalogue, out, **options)
    return out


def rows_of(path: Path) -> Any:
    with fits.open(path) as hdus:
        return hdus["BPIX"].data.copy()


def dq_of(path: Path) -> np.ndarray:
    with fits.open(path) as hdus:
        return hdus["DQ"].data.copy()


# -------------------------------------------------------------------------------------------------------- regions


@pytest.mark.parametrize(("flt", "shift"), [(False, 0), (True, -5)])
def test_regions_give_back_the_same_circles(catalogue: Path, flt: bool, shift: int) -> None:
    read = Regions.read(exported(catalogue, flt=flt) / "blobs.reg", format="ds9")
    table = tables.read_table(catalogue, tables.BLOB_COLUMNS)
    assert len(read) == len(table)
    for region, blob in zip(read, table.to_dict("records"), strict=True):
        assert isinstance(region, CirclePixelRegion)
        found = (region.center.x, region.center.y, region.radius)
        assert found == pytest.approx(
            (blob["x_px"] + shift, blob["y_px"] + shift, blob["radius_px"]), abs=1e-3
        )
        assert region.meta["text"].split()[0] == blob["blob"]
        assert f"{100 * blob['depth_frac']:.1f}%" in region.meta["text"]
    assert "2012-10-18" in read[1].meta["text"]


def test_colour_tells_the_status(daily_log: Path) -> None:
    read = Regions.read(
        exported(daily_log, statuses=("confirmed", "new", "rejected")) / "blobs.reg", format="ds9"
    )
    assert [region.visual["edgecolor"] for region in read] == ["red", "yellow", "magenta"]
    assert [region.meta["tag"] for region in read] == [["confirmed"], ["new"], ["rejected"]]


def test_a_region_says_in_words_what_it_is(tmp_path: Path) -> None:
    blob = {
        "blob": "b1",
        "x_px": 9.25,
        "y_px": 8.5,
        "radius_px": 5.26,
        "depth_frac": 0.214,
        "status": "new",
    }
    export.write_regions(
        tmp_path / "blobs.reg", pd.DataFrame([blob | {"first_date": "2012-01-02"}])
    )
    last = (tmp_path / "blobs.reg").read_text().splitlines()[-1]
    assert (
        last
        == "circle(10.2500,9.5000,5.2600) # color=yellow text={b1 r=5.3px 2012-01-02 21.4%} tag={new}"
    )


def test_names_cannot_break_the_file(catalogue: Path) -> None:
    text = BLOBS.replace("b001", "a}{;#b").replace("b002", "two words")
    catalogue.write_text(text)
    read = Regions.read(exported(catalogue) / "blobs.reg", format="ds9")
    assert [region.meta["text"].split()[0] for region in read] == ["a____b", "two_words", "b003"]


# ------------------------------------------------------------------------------------------------------ catalogue


def test_the_catalogue_round_trips_with_units_and_origin(daily_log: Path) -> None:
    out = exported(daily_log, statuses=("confirmed", "new"))
    table = Table.read(out / "blobs.ecsv")
    assert table["x_px"].unit == "pix"
    assert table["first_mjd"].unit == "d"
    assert table["snr"].unit is None
    assert "light" in table["depth_frac"].description
    assert table.meta["model"] == ["dense-1"]
    assert table.meta["params_hash"] == ["0012", "12e45678"]
    assert (table.meta["first_date"], table.meta["last_date"]) == ("2012-03-14", "2012-03-15")
    given = export.read_catalogue(daily_log).iloc[:2]
    for column in given:
        assert table[column].tolist() == given[column].tolist(), column
    again = export.read_catalogue(out / "blobs.ecsv")
    export.write_catalogue(out / "again.ecsv", again)
    assert (out / "again.ecsv").read_bytes() == (out / "blobs.ecsv").read_bytes()


def test_what_is_exported_can_be_exported(catalogue: Path) -> None:
    first = exported(catalogue)
    files = {path.name: path.read_bytes() for path in sorted(first.iterdir())}
    (catalogue.parent / "copy.ecsv").write_bytes(files["blobs.ecsv"])
    export.export_blobs(catalogue.parent / "copy.ecsv", first)
    assert {path.name: path.read_bytes() for path in sorted(first.iterdir())} == files
    assert len(files) == 5


def test_dates_come_from_wherever_they_are(catalogue: Path, tmp_path: Path) -> None:
    assert export.read_catalogue(catalogue)["first_date"].tolist() == [
        "",
        "2012-10-18",
        "2012-09-27",
    ]
    (tmp_path / "frames.csv").rename(tmp_path / "images.csv")
    assert "first_mjd" not in export.read_catalogue(catalogue)
    assert export.read_catalogue(catalogue, tmp_path / "images.csv")["first_mjd"][1] == 56218.7
    dated = tmp_path / "dated.csv"
    dated.write_text(
        "x_px,y_px,radius_px,depth_frac,first_date\n9,9,5,0.1,2012-09-27T12:00\n99,9,5,0.1,\n"
    )
    table = export.read_catalogue(dated)
    assert table["first_mjd"][0] == 56197.5
    assert np.isnan(table["first_mjd"][1])
    assert (table["status"] == "known").all()


def test_a_catalogue_that_has_grown_keeps_the_dates_of_its_frames(catalogue: Path) -> None:
    lines = BLOBS.splitlines()
    grown = [
        f"{lines[0]},first_mjd,status",
        *(f"{line},," for line in lines[1:]),
        "b4,50,60,5,0.1,disc,z,57000.5,confirmed",
    ]
    catalogue.write_text("\n".join(grown) + "\n")
    table = export.read_catalogue(catalogue)
    assert table["first_date"].tolist() == ["", "2012-10-18", "2012-09-27", "2014-12-09"]
    assert table["status"].tolist() == ["known"] * 3 + ["confirmed"]


def test_reviews_stand_before_the_status(tmp_path: Path) -> None:
    path = tmp_path / "candidates.csv"
    out = tmp_path / "out"
    path.write_text(
        "id,status,x_px,y_px,first_mjd,radius_px,depth_frac,decision,model_sha256\n1,confirmed,50,60,56000,5,0.1,rejected,a\n"
        "2,new,150,60,56000,5,0.1,confirmed,00\n3,confirmed,250,60,56000,5,0.1,,00\n4,confirmed,350,60,56000,5,0.1,unsure,a\n"
    )
    export.export_blobs(path, out)
    table = Table.read(out / "blobs.ecsv")
    assert table["blob"].tolist() == ["x150y60"]  # the only one that a person has confirmed
    assert table.meta["model_sha256"] == ["00"]
    export.export_blobs(path, out, statuses=("confirmed", "seen_again"))
    table = Table.read(out / "blobs.ecsv")
    assert table["blob"].tolist() == ["x150y60", "x250y60"]
    assert table["status"].tolist() == ["confirmed", "seen_again"]


@pytest.mark.parametrize("word", ["seen_again", "confirmed"])  # today's, and that of older versions
@pytest.mark.parametrize("form", ["csv", "ecsv"])
def test_what_nobody_reviewed_is_not_handed_on(tmp_path: Path, word: str, form: str) -> None:
    log = logbook.connect(tmp_path / "log.sqlite", make=True)
    with logbook.writing(log):
        logbook.insert(log, "runs", synthetic_log.RUN)
        image = {
            "run": 1,
            "sha256": "a",
            "name": "f1",
            "kind": "image",
            "mjd": 60000.0,
            "outcome": "searched",
        }
        logbook.insert(log, "images", image | {"logged": logbook.now()})
        for x in (100.0, 300.0):
            place = {"image": 1, "x_px": x, "y_px": 200.0}
            number = logbook.insert(log, "candidates", place | {"status": "seen_again"})
            size = {
                "radius_px": 5.0,
                "depth_frac": 0.1,
                "snr": 9.0,
                "score": 1.0,
                "probability": 1.0,
            }
            logbook.insert(log, "detections", place | size | {"candidate": number, "status": "new"})
    path = tmp_path / f"candidates.{form}"

    def export_log() -> list[str]:
        logbook.export_tables(log, "candidate_list", path)
        path.write_text(path.read_text().replace("seen_again", word))
        typed = ["export", str(path), "--out", str(tmp_path / "out")]
        assert cli.main([*typed, "--also", "seen_again"]) == 0
        everything = Table.read(tmp_path / "out" / "blobs.ecsv")["blob"].tolist()
        assert everything == ["x100y200", "x300y200"]
        return typed

    typed = export_log()
    assert cli.main(typed) == 1
    with logbook.writing(log):
        review = {"candidate": 2, "decision": "confirmed", "reviewer": "Ada", "at": logbook.now()}
        logbook.insert(log, "reviews", review)
    assert cli.main(export_log()) == 0
    assert Table.read(tmp_path / "out" / "blobs.ecsv")["blob"].tolist() == ["x300y200"]


def test_sightings_of_one_blob_are_one(tmp_path: Path) -> None:
    path = tmp_path / "detections.csv"
    out = tmp_path / "out"
    path.write_text(
        "frame,x_px,y_px,probability,status,radius_px,depth_frac\nb,100.5,50.2,0.9,seen_again,5,0.02\n"
        "a,101.0,50.0,0.9,confirmed,6,0.02\nb,300,50,0.9,dip,5,0.02\nb,200,50,0.9,new,5,0.02\n"
    )
    (tmp_path / "images.csv").write_text("frame,mjd\na,56000.5\nb,56001.5\n")
    with pytest.raises(
        TableError,
        match=r"no blob left of status known or confirmed \(found dip, new, seen_again\)",
    ):
        export.export_blobs(path, out, dates=tmp_path / "images.csv")
    export.export_blobs(path, out, dates=tmp_path / "images.csv", statuses=("seen_again",))
    table = Table.read(out / "blobs.ecsv")
    assert table["blob"].tolist() == ["x101y50"]
    assert table["first_date"].tolist() == ["2012-03-14"]


@pytest.mark.parametrize(
    ("until", "names"),
    [
        ("2012-09-26", ["b001"]),
        ("2012-09-27", ["b001", "b003"]),
        ("2012-09-27T01:00", ["b001"]),
        ("56218.7", ["b001", "b002", "b003"]),
        ("20121001", ["b001", "b003"]),
    ],
)
def test_until_takes_the_whole_day(catalogue: Path, until: str, names: list[str]) -> None:
    out = exported(catalogue, until=until, useafter="2020-01-01")
    assert Table.read(out / "blobs.ecsv")["blob"].tolist() == names


def test_a_day_ends_before_the_next_begins() -> None:
    assert 56197.99999 < to_mjd("2012-09-27", "", whole_day=True) < 56198
    assert to_mjd("2012-09-27T02:00+02:00", "") == 56197


# ----------------------------------------------------------------------------------------------- bad-pixel tables


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


def test_nothing_is_written_over_what_it_is_made_of(catalogue: Path) -> None:
    out = exported(catalogue)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for given, options in (
        (out / "blobs.ecsv", {"until": "2012-09-30"}),
        (catalogue, {"bpixtab": out / "blobs_bpx.fits"}),
        (catalogue, {"bpixtab": out / "blobs_dq.fits"}),
    ):
        with pytest.raises(TableError, match="would be overwritten by the blobs"):
            export.export_blobs(given, out, **options)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


ODD = [
    'a,b "c"\t}{#',
    "two\nlines",
    "=cmd|' /C calc'!A0",
    "../raw/x",
    "Fleck-ä 日本",
    "x" * 5000,
    "\x1b[2J",
]


@pytest.mark.parametrize("name", ODD)
def test_odd_names_reach_every_file(catalogue: Path, existing: Path, name: str) -> None:
    table = tables.read_table(catalogue, tables.BLOB_COLUMNS)
    table.loc[1, "blob"] = name
    table["remark"] = name
    tables.write_table(catalogue, table)
    out = exported(catalogue, bpixtab=existing)
    assert Table.read(out / "blobs.ecsv")["blob"].tolist() == ["b001", name, "b003"]
    assert export.read_catalogue(out / "blobs.ecsv")["remark"].tolist() == [name] * 3
    assert len(Regions.read(out / "blobs.reg", format="ds9")) == 3
    lines = (out / "blobs.reg").read_text().splitlines()
    assert len(lines) == 6
    assert max(map(len, lines)) < 250
    header = fits.getheader(out / "blobs_bpx.fits")
    assert len(header["HISTORY"]) == 1 + 1 + 2
    assert "since 2012-10-18" in str(header["HISTORY"])
    assert len(list(out.iterdir())) == 5


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (",first_frame", ",first_date", "row 3: first_date: found 'second', expected a date"),
        (",first_frame", ",first_mjd", "row 3: first_mjd is 'second', expected a number"),
        (
            "frame,mjd\nfirst,56197.31",
            "frame,mjd\nfirst,1e308",
            "first seen on MJD 1e\\+308, expected 0 to 100000",
        ),
        (
            "first,56197.31",
            "first,2456197.31",
            "row 4: first seen on MJD 2.4562e\\+06, expected 0 to 100000",
        ),
        ("first,56197.31", "second,56197.31", "frame second is listed twice"),
        ("first,56197.31", "first,-1", "row 4: first seen on MJD -1, expected"),
        ("first,56197.31", "first,inf", "row 4: first seen on MJD inf, expected"),
    ],
)
def test_odd_dates_are_named(
    catalogue: Path, tmp_path: Path, old: str, new: str, says: str
) -> None:
    catalogue.write_text(BLOBS.replace(old, new))
    (tmp_path / "frames.csv").write_text(IMAGES.replace(old, new))
    with pytest.raises(BlobpipeError, match=says):
        exported(catalogue)


@pytest.mark.parametrize(
    "text",
    ["nan", "inf", "1e999", "-1", "99999999", "0001-01-01T00:00+14:00", "2012-02-30", "x" * 999],
)
def test_what_is_no_date_is_named(text: str) -> None:
    with pytest.raises(BlobpipeError, match=r"--until: found .* expected a date") as refusal:
        to_mjd(text, "--until")
    assert len(str(refusal.value)) < 150


def test_other_flags_only_on_request(catalogue: Path, existing: Path) -> None:
    plain = dq_of(exported(catalogue, bpixtab=existing) / "blobs_dq.fits")
    every = dq_of(exported(catalogue, bpixtab=existing, all_flags=True) / "blobs_dq.fits")
    flt = dq_of(exported(catalogue, bpixtab=existing, all_flags=True, flt=True) / "blobs_dq.fits")
    assert set(np.unique(plain)) == {0, 512}
    assert (plain == (every & 512)).all()
    assert every[13:16, 9].tolist() == [4, 4, 4]  # PIX1 5, PIX2 9, three along y
    assert every[5:8, 1].tolist() == [16, 16, 16]  # a reference pixel keeps its flag
    assert flt.shape == (1014, 1014)
    assert (flt == every[5:-5, 5:-5]).all()


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


@pytest.mark.parametrize(
    ("column", "good", "bad"),
    [
        ("x_px", (-0.5, 1023.5), (-0.51, 1023.6)),
        ("y_px", (-0.5, 1023.5), (-0.6, 1023.51)),
        ("radius_px", (0.1, 100.0), (0.09, 100.1)),
        ("depth_frac", (1e-6, 1.0), (-0.01, 1.01)),
    ],
)
def test_blobs_lie_on_the_detector_and_have_a_size(
    column: str, good: tuple[float, float], bad: tuple[float, float]
) -> None:
    usual = {
        "blob": "b1",
        "x_px": 9.0,
        "y_px": 9.0,
        "radius_px": 5.0,
        "depth_frac": 0.1,
        "status": "known",
    }
    for value in good:
        export.select("t.csv", pd.DataFrame([usual, usual | {"blob": "b2", column: value}]))
    for value in bad:
        with pytest.raises(TableError, match=f"t.csv: row 3: {column} is {value}"):
            export.select("t.csv", pd.DataFrame([usual, usual | {"blob": "b2", column: value}]))


@pytest.mark.parametrize(("apart", "names"), [(3.0, ["x50y60"]), (3.1, ["x50y60", "x53y60"])])
def test_sightings_within_three_pixels_are_one(apart: float, names: list[str]) -> None:
    seen = pd.DataFrame(
        {"x_px": [50.0 + apart, 50.0], "y_px": 60.0, "radius_px": 5.0, "depth_frac": 0.1}
    )
    seen = seen.assign(status="known", first_mjd=[56001.0, 56000.0])
    assert export.select("t.csv", seen)["blob"].tolist() == names


def test_dates_are_numbers_below_a_hundred_thousand_or_iso() -> None:
    assert to_mjd("99999.5", "") == 99999.5
    assert to_mjd("20120927", "") == to_mjd("2012-09-27", "") == 56197
    assert to_mjd("2012-09-27T12:00", "", whole_day=True) == 56197.5
    assert to_mjd("56197", "", whole_day=True) == 56197
    with pytest.raises(BlobpipeError, match="--until: found '100000'"):
        to_mjd("100000", "--until")


def test_units_follow_the_names_of_columns(tmp_path: Path) -> None:
    blobs = pd.DataFrame(
        {"blob": ["b1"], "loss_frac_px2": 0.5, "depth_frac": 0.1, "x_px": 9.0, "seen_mjd": 56000.0}
    )
    export.write_catalogue(tmp_path / "t.ecsv", blobs)
    table = Table.read(tmp_path / "t.ecsv")
    assert [str(table[name].unit or "") for name in blobs] == ["", "pix2", "", "pix", "d"]
    assert (table.meta["first_date"], table.meta["last_date"]) == ("", "")


# ------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"until": "yesterday"}, "--until: found 'yesterday'"),
        ({"useafter": "13/2012"}, "--useafter"),
        ({"statuses": ("new",)}, r"blobs.csv: no blob left of status new \(found known\)"),
        ({"until": "1990-01-01"}, "give --useafter"),
        ({"radii_px": (8.0, 7.0)}, "radii of discs: found 8 and 7"),
        ({"bpixtab": "absent.fits"}, "absent.fits: not found"),
        ({"bpixtab": __file__}, "test_export.py: .* not a whole FITS file"),
        ({"dates": "absent.csv", "until": "2012-01-01"}, "no dates found"),
    ],
)
def test_mistakes_are_named(catalogue: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(BlobpipeError, match=says):
        exported(catalogue, **options)
    assert not (catalogue.parent / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("312.4", "1024", "row 2: x_px is 1024"),
        (",8.1,", ",,", "row 2: radius_px is nan"),
        ("0.021", "2.1", "row 3: depth_frac is 2.1"),
        ("radius_px", "size", "column radius_px is missing"),
        ("second", "third", "first_frame third is not a frame of"),
    ],
)
def test_bad_catalogues_are_named(catalogue: Path, old: str, new: str, says: str) -> None:
    catalogue.write_text(BLOBS.replace(old, new, 1))
    with pytest.raises(TableError, match=f"blobs.csv: {says}"):
        exported(catalogue)


def test_bad_files_of_others_are_named(catalogue: Path, existing: Path, tmp_path: Path) -> None:
    with fits.open(existing) as hdus:
        hdus["BPIX"].data["AXIS"][1] = 3
        hdus.writeto(tmp_path / "axis.fits", checksum=True)
    fits.PrimaryHDU(np.zeros((1014, 1014), np.float32)).writeto(tmp_path / "float.fits")
    (tmp_path / "bad.ecsv").write_text("x_px\n1\n")
    with pytest.raises(TableError, match=r"axis.fits: row 2: AXIS is 3, expected 1 or 2"):
        bad_pixel_table.read_dq(tmp_path / "axis.fits")
    with pytest.raises(TableError, match=r"float.fits: found no bad pixels"):
        bad_pixel_table.read_dq(tmp_path / "float.fits")
    with pytest.raises(TableError, match=r"bad.ecsv: cannot be read as ECSV"):
        export.read_catalogue(tmp_path / "bad.ecsv")


def test_the_command_does_the_same(
    catalogue: Path, existing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = exported(
        catalogue,
        bpixtab=existing,
        until="2012-09-30",
        radii_px=(3.0, 9.0),
        all_flags=True,
        flt=True,
    )
    typed = catalogue.parent / "typed"
    options = f"--bpixtab {existing} --until 2012-09-30 --disc-radii 3 9 --all-flags --flt"
    assert cli.main(["export", str(catalogue), "--out", str(typed), *options.split()]) == 0
    for path in out.iterdir():
        assert path.read_bytes() == (typed / path.name).read_bytes(), path.name
    assert cli.main(["export", str(catalogue), "--out", str(typed), "--until", "soon"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


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
        bad_pixel_table.RADII_PX[0]
        <= np.sqrt((around & near).sum() / np.pi)
        <= bad_pixel_table.RADII_PX[1]
    )
