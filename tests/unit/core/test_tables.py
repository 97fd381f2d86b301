"""Tables are read as they stand or refused in one line, and written as the same bytes."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from blobpipe.core import blob_shapes, tables
from blobpipe.errors import TableError


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
        (
            GOOD,
            b"SIMPLE  =                    T",
            "a FITS image, or a compressed file; name the table",
        ),
        (GOOD, gzip.compress(GOOD, mtime=0), "a FITS image, or a compressed file; name the table"),
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


def test_all_bits_come_back_from_an_exact_table(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    table = pd.DataFrame(
        {
            "frame": ["NA", "007", "", "nan"],
            "x": rng.normal(size=4) * 10.0 ** rng.integers(-300, 300, 4),
            "y": np.float32([0.1, np.nan, 1e-30, np.inf]),
            "n": np.array([1, -2, 3, 2**60]),
        }
    )
    tables.write_exact(tmp_path / "a.csv", table)
    back = tables.read_exact(tmp_path / "a.csv", table[:0])
    pd.testing.assert_frame_equal(back, table, check_exact=True)
    tables.write_exact(tmp_path / "b.csv", table[:0])
    pd.testing.assert_frame_equal(tables.read_exact(tmp_path / "b.csv", table[:0]), table[:0])
    (tmp_path / "c.csv").write_text("frame,x,y,n\na,1,2,much\n")
    with pytest.raises(TableError, match=r"c.csv: cannot be read as CSV"):
        tables.read_exact(tmp_path / "c.csv", table[:0])


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
