"""What is exported can be read by those who get it, and says the same as the catalogue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from astropy.table import Table
from regions import CirclePixelRegion, Regions
from tests.unit import synthetic_log
from tests.unit.exported import BLOBS, IMAGES, dq_of, exported

from blobpipe import cli
from blobpipe.core import tables
from blobpipe.core.dates import to_mjd
from blobpipe.errors import BlobpipeError, TableError
from blobpipe.monitor import bad_pixel_table, export, logbook

LOG = """blob,x_px,y_px,radius_px,depth_frac,depth_err_frac,snr,first_frame,first_mjd,status,model,params_hash
7,100.5,200.5,5.0,0.02,0.001,12.5,a,56000.25,confirmed,dense-1,12e45678
8,300.5,200.5,6.0,0.03,0.001,22.5,b,56001,new,dense-1,0012
9,500.5,200.5,6.0,0.03,0.001,22.5,b,56001,rejected,dense-2,0012
10,,200.5,6.0,0.03,0.001,22.5,b,56001,bad_pixels,dense-2,0012
"""


@pytest.fixture
def daily_log(tmp_path: Path) -> Path:
    (tmp_path / "log.csv").write_text(LOG)
    return tmp_path / "log.csv"


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


def test_a_date_of_its_own_needs_no_table_of_images(tmp_path: Path) -> None:
    (tmp_path / "frames.csv").write_text("frame,mjd\nother,60000\n")
    dated = tmp_path / "dated.csv"
    dated.write_text(
        "x_px,y_px,radius_px,depth_frac,first_frame,first_date\n9,9,5,0.1,day1,2012-09-27\n"
    )
    assert export.read_catalogue(dated)["first_mjd"].tolist() == [56197.0]


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
