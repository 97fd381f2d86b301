"""FITS and CSV, in and out: every layout is read, what is written is the same bytes, and never half a file."""

from __future__ import annotations

import gzip
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits

from blobpipe.core import blob_shapes, files, fits_images, tables
from blobpipe.core.dates import exposure_mjd, is_date
from blobpipe.errors import FrameError, TableError

IMAGE = np.random.default_rng(1).normal(0, 0.01, (300, 310)).astype(np.float32)


def _hdus(*images: fits.ImageHDU) -> fits.HDUList:
    primary = fits.PrimaryHDU()
    primary.header["TARGNAME"] = "DARK-EARTH-CALIB"
    return fits.HDUList([primary, *images])


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".fits", ".fits.gz"])
@pytest.mark.parametrize("kind", [">f4", ">f8", "<f4", ">i2", ">i4", "u1", ">u2"])
def test_every_type_becomes_native_float32(tmp_path: Path, suffix: str, kind: str) -> None:
    image = (IMAGE * 1000 + 100).astype(kind)
    path = tmp_path / f"a{suffix}"
    fits.PrimaryHDU(image).writeto(path)
    data = fits_images.read_frame(path).data
    assert data.dtype == np.float32
    assert data.dtype.isnative
    assert data.flags.c_contiguous
    np.testing.assert_array_equal(data, image.astype(np.float32))


def test_blank_integers_become_nan(tmp_path: Path) -> None:
    header = fits.Header({"BLANK": -1, "BSCALE": 0.001, "BZERO": 0.0})
    hdu = fits.PrimaryHDU(np.full((20, 20), 10, np.int16), header)
    hdu.writeto(tmp_path / "a.fits")
    raw = bytearray((tmp_path / "a.fits").read_bytes())
    raw[2880:2882] = b"\xff\xff"
    (tmp_path / "a.fits").write_bytes(raw)
    data = fits_images.read_frame(tmp_path / "a.fits").data
    assert np.isnan(data[0, 0])
    assert np.isfinite(data).sum() == data.size - 1


@pytest.mark.parametrize("plane_axis", [False, True])
@pytest.mark.parametrize("where", ["primary", "HDU 1", "SCI behind ERR", "compressed"])
def test_the_science_plane_is_found(tmp_path: Path, where: str, plane_axis: bool) -> None:
    data = np.stack([IMAGE, IMAGE + 1, IMAGE + 2]) if plane_axis else IMAGE
    match where:
        case "primary":
            hdus = fits.HDUList([fits.PrimaryHDU(data)])
        case "HDU 1":
            hdus = _hdus(fits.ImageHDU(data))
        case "SCI behind ERR":
            hdus = _hdus(fits.ImageHDU(data + 5, name="ERR"), fits.ImageHDU(data, name="SCI"))
        case _:
            hdus = _hdus(fits.CompImageHDU(data, compression_type="GZIP_1", quantize_level=0))
    hdus.writeto(tmp_path / "a.fits")
    frame = fits_images.read_frame(tmp_path / "a.fits")
    np.testing.assert_array_equal(frame.data, IMAGE)
    assert frame.name == "a"
    assert "310x300" in frame.layout


def test_a_table_in_front_is_passed_over(tmp_path: Path) -> None:
    table = fits.BinTableHDU.from_columns([fits.Column("a", "J", array=np.arange(3))])
    _hdus(table, fits.ImageHDU(IMAGE)).writeto(tmp_path / "a.fits")
    np.testing.assert_array_equal(fits_images.read_frame(tmp_path / "a.fits").data, IMAGE)


def test_left_out_reference_pixels_come_back_as_nan(tmp_path: Path) -> None:
    fits.PrimaryHDU(np.ones((1014, 1014), np.float32)).writeto(tmp_path / "a.fits")
    data = fits_images.read_frame(tmp_path / "a.fits").data
    assert data.shape == (1024, 1024)
    assert np.isnan(data[:5]).all()
    assert np.isnan(data[:, -5:]).all()
    assert np.isfinite(data[5:-5, 5:-5]).all()


def test_the_header_is_that_of_primary_and_image(tmp_path: Path) -> None:
    image = fits.ImageHDU(IMAGE)
    image.header["BUNIT"] = "fraction"
    _hdus(image).writeto(tmp_path / "a.fits")
    header = fits_images.read_frame(tmp_path / "a.fits").header
    assert header["TARGNAME"] == "DARK-EARTH-CALIB"
    assert header["BUNIT"] == "fraction"


def test_a_plane_may_be_missing(tmp_path: Path) -> None:
    fits_images.write_images(
        tmp_path / "both.fits.fz",
        {"ONE": np.ones((20, 30)), "TWO": np.full((5, 6), 2.0)},
        sigma=0.1,
    )
    assert fits_images.find_plane(tmp_path / "both.fits.fz", "TWO").tolist() == [[2.0] * 6] * 5
    assert fits_images.find_plane(tmp_path / "both.fits.fz", "THREE") is None


def test_a_plane_is_read_by_name(tmp_path: Path) -> None:
    fits_images.write_images(
        tmp_path / "a.fits.fz", {"STACK": IMAGE, "PATTERN": IMAGE * 0}, sigma=0.01
    )
    assert not fits_images.read_plane(tmp_path / "a.fits.fz", "PATTERN").any()
    np.testing.assert_allclose(
        fits_images.read_plane(tmp_path / "a.fits.fz", "STACK"), IMAGE, atol=0.01 / 63
    )


@pytest.mark.parametrize(
    "content", ["another image", b"", b"text", b"SIMPLE  =                    T", None]
)
def test_a_plane_that_is_not_there_is_said(tmp_path: Path, content: str | bytes | None) -> None:
    path = tmp_path / "a.fits.fz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        fits_images.write_image(path, IMAGE, name="STACK")
    for read in (
        lambda: fits_images.read_plane(path, "PATTERN"),
        lambda: fits_images.read_cube(path),
    ):
        with pytest.raises(
            FrameError, match=r"a\.fits\.fz: .*; run the stage that makes it"
        ) as caught:
            read()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "frame"),
    [
        ("a/x_blob.fits", "x_blob"),
        ("x.fits.fz", "x"),
        ("x.fits.gz", "x"),
        ("x.y.fits", "x.y"),
        ("x.txt", "x"),
    ],
)
def test_a_frame_is_named_like_its_file(name: str, frame: str) -> None:
    assert fits_images.frame_name(name) == frame


@pytest.mark.parametrize("suffix", fits_images.SUFFIXES)
def test_an_image_is_found_by_its_frame(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"x.y{suffix}").touch()
    assert fits_images.find_image(tmp_path, "x.y") == tmp_path / f"x.y{suffix}"
    with pytest.raises(FrameError, match=r"z\.fits\.fz: not found"):
        fits_images.find_image(tmp_path, "z")


# --- is it usable ----------------------------------------------------------------------------------------------------


def _usable(tmp_path: Path, data: np.ndarray) -> None:
    fits.PrimaryHDU(data.astype(np.float32)).writeto(tmp_path / "a.fits")
    fits_images.usable_image(tmp_path / "a.fits")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d[:200], "310x200 pixels, expected a full frame"),
        (lambda d: d * np.nan, "0% of its pixels are finite"),
        (lambda d: np.where(np.arange(310) < 160, np.nan, d), "48% of its pixels are finite"),
        (lambda d: d * 0 + 3, "constant"),
        (lambda d: d * 1000, "not a blob image"),
        (lambda d: d + 1, "not flattened"),
    ],
)
def test_what_cannot_be_searched_is_refused(tmp_path: Path, change, message: str) -> None:
    with pytest.raises(FrameError, match=message) as caught:
        _usable(tmp_path, change(IMAGE))
    assert str(caught.value).startswith(str(tmp_path / "a.fits"))
    assert "\n" not in str(caught.value)


def test_an_image_with_some_bad_pixels_is_usable(tmp_path: Path) -> None:
    image = IMAGE.copy()
    image[:40], image[50, 50], image[60, 60] = np.nan, np.inf, 1e6
    _usable(tmp_path, image)


def test_median_and_noise_ignore_what_is_not_finite() -> None:
    image = IMAGE.copy()
    image[::7] = np.nan
    median, noise = fits_images.median_and_noise(image)
    assert abs(median) < 0.0005
    assert noise == pytest.approx(0.01, rel=0.03)


# --- writing ---------------------------------------------------------------------------------------------------------


def test_the_same_image_gives_the_same_bytes(tmp_path: Path) -> None:
    image = IMAGE.copy()
    image[3, 4] = np.nan
    for name in ("a", "b"):
        fits_images.write_image(
            tmp_path / f"{name}.fits.fz", image, name="SCI", header={"FILTER": "F153M"}, sigma=0.01
        )
    assert files.sha256(tmp_path / "a.fits.fz") == files.sha256(tmp_path / "b.fits.fz")


def test_a_written_image_is_read_with_name_header_and_gaps(tmp_path: Path) -> None:
    image = IMAGE.copy()
    image[3, 4] = np.nan
    fits_images.write_image(
        tmp_path / "a.fits.fz", image, name="DIFFERENCE", header={"FILTER": "F153M"}, sigma=0.01
    )
    frame = fits_images.read_frame(tmp_path / "a.fits.fz")
    assert frame.header["FILTER"] == "F153M"
    assert "DIFFERENCE" in frame.layout
    np.testing.assert_array_equal(np.isnan(frame.data), np.isnan(image))


def test_other_programs_can_unpack_what_is_written(tmp_path: Path) -> None:
    fits_images.write_image(tmp_path / "a.fits.fz", IMAGE, name="SCI", sigma=0.01)
    with fits.open(tmp_path / "a.fits.fz", disable_image_compression=True) as hdus:
        assert hdus[1].header["ZCMPTYPE"] == "RICE_1"
        assert hdus[1].header["ZIMAGE"] is True


def test_compression_saves_space(tmp_path: Path) -> None:
    fits_images.write_image(tmp_path / "a.fits.fz", IMAGE, name="SCI", sigma=0.01)
    assert (tmp_path / "a.fits.fz").stat().st_size < 0.4 * IMAGE.nbytes


def test_a_cube_is_kept_exactly(tmp_path: Path) -> None:
    cube = np.random.default_rng(2).normal(size=(3, 41, 41)).astype(np.float32)
    fits_images.write_cube(tmp_path / "a.fits", cube)
    np.testing.assert_array_equal(fits_images.read_cube(tmp_path / "a.fits"), cube)
    assert fits_images.read_cube(tmp_path / "a.fits").dtype.isnative


def test_atomic_makes_the_folder_and_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.b.csv"
    for text in ("one", "two"):
        with files.atomic(path) as temporary:
            assert temporary.parent == path.parent
            assert temporary.name.startswith(".")
            assert temporary.suffix == ".csv"
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "one"
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("old")
    with pytest.raises(TypeError), files.atomic(path) as temporary:
        temporary.write_text(7)  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# --- tables ----------------------------------------------------------------------------------------------------------


def test_text_stays_text_and_gaps_are_nan(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {"frame": ["007", "NA"], "reason": ["", "nan"], "sigma_frac": [0.5, np.nan], "n": [1, 2]}
    )
    tables.write_table(tmp_path / "a.csv", table)
    found = tables.read_table(tmp_path / "a.csv", ("frame", "sigma_frac"))
    assert list(found["frame"]) == ["007", "NA"]
    assert list(found["reason"]) == ["", "nan"]
    assert found["sigma_frac"].dtype == float
    assert np.isnan(found["sigma_frac"][1])
    assert found["n"].dtype == int


GOOD = b"blob,x_px,y_px,radius_px\nb1,312.5,118,8\nb2,801,644,4.5\n"


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + GOOD,
        GOOD.replace(b"\n", b"\r\n"),
        GOOD.replace(b"\n", b"\r"),
        GOOD.removesuffix(b"\n"),
        GOOD.replace(b"\n", b"\n\n") + b"\n",
        GOOD.replace(b"312.5", b'" 312.5"').replace(b"b2", b'"b2"'),
        GOOD.replace(b"\n", b",\n"),  # an empty column, as spreadsheets leave it
    ],
    ids=[
        "BOM",
        "CRLF",
        "CR",
        "no last line end",
        "blank lines",
        "quotes and blanks",
        "an empty column",
    ],
)
def test_tables_as_other_programs_write_them(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    table = tables.read_known(tmp_path / "a.csv", ("x_px", "y_px", "radius_px"))
    assert list(table["blob"]) == ["b1", "b2"]
    assert table[["x_px", "y_px", "radius_px"]].to_numpy().tolist() == [
        [312.5, 118, 8],
        [801, 644, 4.5],
    ]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (b"118", b"118,", "line 2: 5 fields, 4 in the header"),
        (b",8\n", b"\n", "line 2: 3 fields, 4 in the header"),
        (b",312", b",,312", "line 2: 5 fields"),
        (b"8\nb2", b"8\n \nb2", "line 3: 1 fields"),
        (b"y_px", b"x_px", "two columns are called 'x_px'"),
        (b"118", b'"118', "line 3: unexpected end of data"),
        (b"118", b'"118"x', "expected after '\"'"),
        (b"118", b"\xe9", "byte 0xe9 is not UTF-8; save it as UTF-8"),
        (b"118", b"1\x0018", "a byte 0: is it UTF-16?"),
        (b"118", b"x" * 200_000, "field larger than field limit"),
        (b",", b";", "semicolons between its fields, commas expected"),
        (b",", b"\t", "tabs between its fields, commas expected"),
        (GOOD, GOOD.decode().encode("utf-16"), "line 1: a byte 0: is it UTF-16?"),
        (GOOD, GOOD.decode().encode("utf-16-le"), "a byte 0: is it UTF-16?"),
        (GOOD, b"", "no header: the file is empty"),
        (GOOD, b"\n\n", "no header: the file is empty"),
        (b"118", b"north", "row 2: y_px is 'north', expected a number"),
        (b"118", b"True", "row 2: y_px is 'True', expected a number"),
        (b"118", b"1_18", "row 2: y_px is '1_18', expected a number"),
        (b"118", b"nan", "row 2: y_px is 'nan', expected a number"),
        (b"118", b"1.1.8", "row 2: y_px is '1.1.8', expected a number"),
        (b"118", b"", "row 2: y_px is nan, expected a number"),
        (b"118", b"-inf", "row 2: y_px is -inf, expected a number"),
        (b"118", b"1e308", "row 2: y_px is 1e+308, expected -0.5 to 1023.5"),
        (b"118", b"-1", "row 2: y_px is -1, expected -0.5 to 1023.5"),
        (b"644", b"1024", "row 3: y_px is 1024, expected -0.5 to 1023.5"),
        (b"4.5", b"-4.5", "row 3: radius_px is -4.5, expected 0.1 to 100"),
        (b"b2", b"b1", "blob b1 is listed twice"),
        (b"b2", b"", "row 3: blob is '', expected a name"),
    ],
)
def test_a_table_is_read_as_it_stands_or_refused_in_one_line(
    tmp_path: Path, old: bytes, new: bytes, says: str
) -> None:
    assert old in GOOD
    (tmp_path / "a.csv").write_bytes(GOOD.replace(old, new))
    with pytest.raises(TableError) as refusal:
        tables.read_known(tmp_path / "a.csv", ("x_px", "y_px", "radius_px"))
    line = str(refusal.value)
    assert line.startswith(f"{tmp_path}/a.csv: ")
    assert says in line
    assert "\n" not in line
    assert len(line) < len(str(tmp_path)) + 250


def test_all_true_is_no_number(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x_px\nTrue\nTrue\n")
    with pytest.raises(TableError, match="row 2: x_px is True, expected a number"):
        tables.read_table(tmp_path / "a.csv", ())


@pytest.mark.parametrize(
    "kind", ["folder", "pipe", "device", "loop", "too large", "NUL", "nothing"]
)
def test_only_files_are_tables(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.csv"
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "device":
            path = Path("/dev/zero")
        case "loop":
            path.symlink_to(path)
        case "too large":
            path.touch()
            os.truncate(path, tables.MAX_TABLE_BYTES + 1)
        case "NUL":
            path = tmp_path / "a\0.csv"
    with pytest.raises(
        TableError, match=r"cannot be read as CSV|not found, expected a table with the columns x_px"
    ):
        tables.read_table(path, ("x_px",))


NAMES = [
    "../raw/x",
    "..",
    ".",
    ".hidden",
    "-rf",
    "a/b",
    "/a",
    "a\\b",
    "a\0",
    "a\nb",
    "a\x1b[2J",
    "a\u202eb",
    "é" * 101,
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "good.fits").touch()
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "x.fits").touch()
    with pytest.raises(TableError, match="expected the name of a file"):
        fits_images.find_image(tmp_path / "raw", name)
    if "\0" in name:
        return  # no table may hold it
    for folder, table in (
        ("frames", {"mjd": 1.0}),
        ("stage", {"status": "ok"}),
        ("cases", {"first_frame": name}),
    ):
        path = tmp_path / folder / "frames-000.csv"
        tables.write_table(path, pd.DataFrame({"frame": ["good", name], **table}))
        with pytest.raises(TableError, match="expected the name of a file") as refusal:
            tables.read_table(path, ("frame",))
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "name",
    ["ibxy01z8q_blob", "a.b-c_d+e (2)", "Fleck-ä", "日", "x" * 200, "nan", "007", "a.", " a "],
)
def test_names_that_files_have_are_names(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.fits").touch()
    assert fits_images.find_image(tmp_path, name) == tmp_path / f"{name}.fits"
    tables.write_table(tmp_path / "frames.csv", pd.DataFrame({"frame": [name], "mjd": 1.0}))
    assert list(tables.read_frame_list(tmp_path)["frame"]) == [name]


def test_a_lone_carriage_return_does_not_end_a_row(tmp_path: Path) -> None:
    tables.write_table(
        tmp_path / "a.csv", pd.DataFrame({"reason": ["a\rb", "a\r\nb"], "n": [1, 2]})
    )
    assert list(tables.read_table(tmp_path / "a.csv", ())["reason"]) == ["a\nb", "a\nb"]


def test_a_table_has_unix_line_ends_and_nine_digits(tmp_path: Path) -> None:
    tables.write_table(tmp_path / "a.csv", pd.DataFrame({"x": [1 / 3, 2.0]}))
    assert (tmp_path / "a.csv").read_bytes() == b"x\n0.333333333\n2\n"


def test_json_refuses_what_json_has_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        tables.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256(tmp_path / "a").startswith("ba7816bf8f01cfea")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.fits").touch()
    (tmp_path / "frames.csv").write_text("frame,mjd\na,1\nb,2.5\nc,2.5\n")
    (tmp_path / "blobs.csv").write_text("blob,x_px,y_px,radius_px,depth_frac\n1,10,20,5,0.03\n")
    return tmp_path


def test_the_list_of_frames_keeps_its_order_and_further_columns(raw: Path) -> None:
    (raw / "frames.csv").write_text("seed,frame,mjd\n7,a,1\n8,b,2.5\n")
    table = tables.read_frame_list(raw)
    assert list(table["frame"]) == ["a", "b"]
    assert list(table["seed"]) == [7, 8]


def test_the_catalogue_has_its_optional_columns(raw: Path) -> None:
    table = tables.read_blobs(raw)
    assert list(table["blob"]) == ["1"]
    assert list(table["shape"]) == ["disc"]
    assert list(table["first_frame"]) == [""]


def test_no_catalogue_is_an_empty_one(raw: Path) -> None:
    (raw / "blobs.csv").unlink()
    table = tables.read_blobs(raw)
    assert table.empty
    assert {*tables.BLOB_COLUMNS, "shape", "first_frame"} == set(table)


def test_shapes_are_those_that_can_be_drawn() -> None:
    assert set(tables.BLOB_SHAPES) == set(blob_shapes.SHAPES)


def test_the_batches_of_a_stage_make_one_table(tmp_path: Path) -> None:
    (tmp_path / "frames-001.csv").write_text("frame,status\nc,ok\n")
    (tmp_path / "frames-000.csv").write_text("frame,status\nb,rejected\na,ok\n")
    (tmp_path / ".frames-002.99.tmp.csv").write_text("half")
    assert list(tables.read_stage(tmp_path)["frame"]) == ["b", "a", "c"]
    assert tables.stage_tables(tmp_path, 1) == [tmp_path / "frames-001.csv"]
    with pytest.raises(TableError, match="run the stage"):
        tables.stage_tables(tmp_path, 2)
    with pytest.raises(TableError, match="run the stage 'none' first"):
        tables.read_stage(tmp_path / "none")


def test_a_truncated_gzip_and_garbage_behind_a_good_header(tmp_path: Path) -> None:
    fits.PrimaryHDU(IMAGE).writeto(tmp_path / "a.fits")
    whole = gzip.compress((tmp_path / "a.fits").read_bytes())
    (tmp_path / "b.fits.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FrameError, match=r"b\.fits\.gz"):
        fits_images.read_frame(tmp_path / "b.fits.gz")


def _dated(cards: dict[str, object]) -> float:
    return exposure_mjd(fits_images.Frame("f", np.zeros((2, 2), np.float32), cards, ""), "f.fits")


@pytest.mark.parametrize(
    ("cards", "mjd"),
    [
        ({"EXPSTART": 60000.25, "DATE-OBS": "2012-01-01"}, 60000.25),
        ({"EXPSTART": "60000.25"}, 60000.25),
        ({"DATE-OBS": "2023-02-25", "TIME-OBS": "06:00:00"}, 60000.25),
        ({"DATE-OBS": "2023-02-25"}, 60000.0),
        ({"DATE-OBS": "2012-09-27T06:00:00.500"}, 56197.25 + 0.5 / 86400),
        ({"DATE-OBS": "2012-09-27T06:00:00.500Z"}, 56197.25 + 0.5 / 86400),
        ({"DATE-OBS": "2012-09-27T06:00:00.5", "TIME-OBS": "06:00:00.5"}, 56197.25 + 0.5 / 86400),
        ({"DATE-OBS": " 2012-09-27 06:00:00 "}, 56197.25),
        ({"DATE-OBS": "2012-09-27T06:00"}, 56197.25),
        ({"DATE-OBS": "2012-09-27", "TIME-OBS": "06:00:00Z"}, 56197.25),
        ({"DATE-OBS": "2012-09-27", "TIME-OBS": ""}, 56197.0),
        ({"DATE-OBS": "2016-12-31T23:59:60"}, 57754.0),
        ({"DATE-BEG": "2012-09-27T06:00:00"}, 56197.25),
        ({"MJD-OBS": 56197.25}, 56197.25),
        ({"MJD-AVG": 56197.25}, 56197.25),
        ({"EXPSTART": "", "DATE-OBS": "2012-09-27", "TIME-OBS": "06:00:00"}, 56197.25),
        ({"EXPSTART": "N/A", "MJD-OBS": 56197.25}, 56197.25),
        ({"EXPSTART": 2456197.75, "DATE-OBS": "2012-09-27T06:00:00"}, 56197.25),
        ({"EXPSTART": 0.0, "MJD-OBS": True, "DATE-OBS": "soon", "DATE-BEG": "2012-09-27"}, 56197.0),
    ],
)
def test_the_date_of_an_exposure(cards: dict[str, object], mjd: float) -> None:
    assert _dated(cards) == pytest.approx(mjd, abs=1e-9)


@pytest.mark.parametrize(
    "cards",
    [
        *(
            {"EXPSTART": value}
            for value in (2460006.5, 1677373200.0, "NaN", "inf", 0.0, -1, 54000.0, 99999.0, True)
        ),
        *(
            {"DATE-OBS": text}
            for text in (
                "27/09/97",
                "2012-13-01",
                "2012-09-27T25:00:00",
                "2012-09-27X",
                "1997-09-27",
            )
        ),
        *(
            {"DATE-OBS": text}
            for text in ("2099-01-01", "2012-09-27T06:00:00+02:00", "2012-W39-4", "20120927")
        ),
        {"DATE-OBS": "2012-09-27", "TIME-OBS": "noon"},
    ],
    ids=str,
)
def test_a_date_that_is_none_is_refused_with_what_was_found(cards: dict[str, object]) -> None:
    card, value = next(iter(cards.items()))
    with pytest.raises(
        FrameError, match=r"f\.fits: no date of the exposure, found .* from MJD 54960"
    ) as caught:
        _dated(cards)
    assert f"{card} {str(value)!r}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_limits_of_dates_are_the_instruments_life_and_tomorrow() -> None:
    now = time.time() / 86400 + 40587
    assert [is_date(mjd) for mjd in (54959, 54961, now, now + 0.9, now + 1.1)] == [
        False,
        True,
        True,
        True,
        False,
    ]
    assert not any(is_date(mjd) for mjd in (None, np.nan, np.inf, -np.inf))
    with pytest.raises(FrameError, match="no date of the exposure, expected EXPSTART, MJD-OBS"):
        _dated({"EXPSTART": "  "})


def test_an_exposure_without_a_date_is_named() -> None:
    frame = fits_images.Frame(
        "f", np.zeros((2, 2), np.float32), fits.Header({"EXPSTART": "soon"}), ""
    )
    with pytest.raises(
        FrameError,
        match=r"f.fits: no date of the exposure, found EXPSTART 'soon', expected EXPSTART",
    ):
        exposure_mjd(frame, "f.fits")
