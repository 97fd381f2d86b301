"""Confirmed candidates, and nothing else, become known blobs and cases of the next regression test."""

from __future__ import annotations

import logging
import re
import sqlite3
from pathlib import Path

import pandas as pd
import pytest
from tests.unit import synthetic_log

from blobpipe import cli
from blobpipe.core import fits_images, tables
from blobpipe.errors import TableError
from blobpipe.monitor import catalogue, export, logbook
from blobpipe.validation import regression

# as somebody wrote it by hand: other digits, quotes and columns than ours
KNOWN = (
    "blob,x_px,y_px,radius_px,depth_frac,remark,first_frame\n"
    'b001,312.40,118.0,8.1,3.5e-2,"large, ""old""",\n'
    'b0007,801.9,644.2,4.30,0.021,"two\nlines",\n'
)


@pytest.fixture
def log(tmp_path: Path) -> sqlite3.Connection:
    """Four images and four candidates that nobody has looked at."""
    connection = logbook.connect(tmp_path / "log.sqlite", make=True)
    with logbook.writing(connection):
        logbook.insert(connection, "runs", synthetic_log.RUN)
        for number in range(1, 5):
            add_image(connection, number)
        for number, place in enumerate([(100, 100), (200, 300), (400, 50), (500, 500)], start=1):
            # the first candidate is on the last image
            add_candidate(connection, 5 - number, *place)
    return connection


def add_image(log: sqlite3.Connection, number: int, **more: object) -> None:
    row = {
        "id": number,
        "run": 1,
        "sha256": f"{number:064}",
        "name": f"day{number}",
        "kind": "image",
    }
    row |= {
        "mjd": 60000.0 + number,
        "logged": logbook.now(),
        "outcome": "searched",
        "stack_sha256": "c" * 64,
    }
    logbook.insert(log, "images", row | more)


def add_candidate(log: sqlite3.Connection, image: int, x: float, y: float, **more: object) -> int:
    place = {"x_px": float(x), "y_px": float(y)}
    number = logbook.insert(log, "candidates", {"image": image, "status": "new", **place})
    row = {
        "radius_px": 5.5,
        "radius_err_px": 0.2,
        "depth_frac": 0.0312345678912,
        "depth_err_frac": 0.001,
        "snr": 20.0,
    }
    row |= {
        "image": image,
        "candidate": number,
        "status": "new",
        "score": 0.99,
        "probability": 0.98,
    }
    logbook.insert(log, "detections", row | place | more)
    return number


def review(log: sqlite3.Connection, candidate: int, decision: str, reviewer: str = "Ada") -> None:
    with logbook.writing(log):
        row = {
            "candidate": candidate,
            "decision": decision,
            "reviewer": reviewer,
            "at": "2024-05-01T12:00:00.000Z",
        }
        logbook.insert(log, "reviews", row)


def logged_file(
    log: sqlite3.Connection, folder: Path, number: int, name: str = "", outcome: str = "logged"
) -> Path:
    path = folder / f"{name or f'day{number}'}.fits.fz"
    path.touch()
    row = {
        "path": str(path.resolve()),
        "sha256": f"{number:064}",
        "size_bytes": 0,
        "modified_ns": 0,
    }
    with logbook.writing(log):
        logbook.insert(
            log, "files", row | {"seen": logbook.now(), "outcome": outcome, "image": number}
        )
    return path


# --- which come in ---------------------------------------------------------------------------------------------------


def test_only_what_the_latest_review_confirms_comes_in(
    log: sqlite3.Connection, tmp_path: Path
) -> None:
    for candidate, *decisions in (
        (1, "confirmed"),
        (2, "confirmed", "rejected"),
        (3, "unsure", "confirmed"),
    ):
        for decision in decisions:
            review(log, candidate, decision, "Ada" if decision == "confirmed" else "Bob")
    assert catalogue.update(log, tmp_path / "blobs.csv") == ["b0001", "b0002"]
    table = tables.read_table(tmp_path / "blobs.csv", catalogue.COLUMNS)
    assert list(table.columns) == list(catalogue.COLUMNS)
    assert table["first_frame"].tolist() == ["day2", "day4"]
    assert table[["x_px", "y_px"]].to_numpy().tolist() == [[400, 50], [100, 100]]
    assert set(table["reviewer"]) == {"Ada"}
    assert table["model_sha256"].tolist() == ["a" * 64] * 2
    assert table["depth_frac"].tolist() == [0.0312345679] * 2


def test_without_a_confirmed_one_the_table_is_a_header(
    log: sqlite3.Connection, tmp_path: Path
) -> None:
    review(log, 1, "rejected")
    assert catalogue.update(log, tmp_path / "blobs.csv") == []
    assert (tmp_path / "blobs.csv").read_text() == ",".join(catalogue.COLUMNS) + "\n"


def test_the_order_is_that_of_dates_not_of_reviews(log: sqlite3.Connection, tmp_path: Path) -> None:
    for candidate in (2, 4, 1, 3):
        review(log, candidate, "confirmed")
    catalogue.update(log, tmp_path / "blobs.csv")
    assert pd.read_csv(tmp_path / "blobs.csv")["first_frame"].tolist() == [
        "day1",
        "day2",
        "day3",
        "day4",
    ]


def test_a_second_time_changes_nothing(log: sqlite3.Connection, tmp_path: Path) -> None:
    path = tmp_path / "blobs.csv"
    review(log, 1, "confirmed")
    catalogue.update(log, path)
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    assert catalogue.update(log, path) == []
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_what_lies_on_a_known_blob_is_not_added_again(
    log: sqlite3.Connection, tmp_path: Path
) -> None:
    path = tmp_path / "blobs.csv"
    path.write_text(KNOWN)
    with logbook.writing(log):
        close = [add_candidate(log, 3, 312.4 + dx, 118.0) for dx in (-2.9, 2.9)]  # both on b001
        apart, twice = (add_candidate(log, 3, 312.4 + dx, 118.0) for dx in (3.1, 5.0))
    for candidate in (*close, apart, twice):
        review(log, candidate, "confirmed")
    assert catalogue.update(log, path) == ["b0008"]
    assert tables.read_table(path, catalogue.COLUMNS)["x_px"].iloc[-1] == pytest.approx(315.5)


@pytest.mark.parametrize("decision", ["rejected", ""])
def test_a_blob_whose_candidate_is_confirmed_no_longer_is_named(
    log: sqlite3.Connection, tmp_path: Path, caplog: pytest.LogCaptureFixture, decision: str
) -> None:
    for candidate in (1, 2):
        review(log, candidate, "confirmed")
    path = tmp_path / "blobs.csv"
    catalogue.update(log, path)
    before = path.read_bytes()
    review(log, 2, decision)
    review(log, 3, "rejected")
    assert catalogue.update(log, path) == []
    assert path.read_bytes() == before
    [message] = caplog.messages
    word = decision or "undecided again"
    assert f"candidate 2 is {word}, but its blob b0001 is still listed" in message


def test_one_that_was_not_measured_is_named_and_left_out(
    log: sqlite3.Connection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with logbook.writing(log):
        faint = add_candidate(log, 3, 700.0, 700.0, radius_px=None, depth_frac=None, snr=None)
    review(log, faint, "confirmed")
    with caplog.at_level(logging.WARNING):
        assert catalogue.update(log, tmp_path / "blobs.csv") == []
    assert caplog.messages == [
        "candidate 5: confirmed, but its radius_px and depth_frac cannot be that of a blob; add its row by hand"
    ]


@pytest.mark.parametrize(
    ("radius", "depth", "good"),
    [(0.0, 0.1, False), (0.5, 1.0, True), (5.0, 1.01, False), (5.0, 0.0, False)],
)
def test_a_radius_and_a_depth_are_above_zero(
    log: sqlite3.Connection, tmp_path: Path, radius: float, depth: float, good: bool
) -> None:
    with logbook.writing(log):
        number = add_candidate(log, 3, 700.0, 700.0, radius_px=radius, depth_frac=depth)
    review(log, number, "confirmed")
    assert catalogue.update(log, tmp_path / "blobs.csv") == (["b0001"] if good else [])


@pytest.mark.parametrize(
    ("taken", "names"),
    [
        (["b001", "b0112", "b7"], ["b0113", "b0114"]),
        (["x12y400", "Death Star", "", "17"], ["b0001", "b0002"]),
        (["a0005"], ["b0006", "b0007"]),
    ],
)
def test_names_go_on_from_the_highest_number(taken: list[str], names: list[str]) -> None:
    assert catalogue._names(taken, 2) == names


# --- the text that is there ------------------------------------------------------------------------------------------


def test_known_rows_are_kept_byte_for_byte(log: sqlite3.Connection, tmp_path: Path) -> None:
    path = tmp_path / "blobs.csv"
    path.write_text(KNOWN)
    review(log, 4, "confirmed")
    assert catalogue.update(log, path) == ["b0008"]
    header, b001, *b0007, new = path.read_text().splitlines()
    added = [name for name in catalogue.COLUMNS if name not in KNOWN.splitlines()[0].split(",")]
    commas = "," * len(added)
    assert header == ",".join([KNOWN.splitlines()[0], *added])
    assert [b001, "\n".join(b0007)] == [
        row + commas for row in KNOWN.split("\n", 1)[1].removesuffix("\n").split("\n", 1)
    ]
    assert new.startswith("b0008,500,500,5.5,0.0312345679,,day1,disc,60001,0.001,20,confirmed,Ada,")
    before = path.read_text()
    review(log, 1, "confirmed")
    assert catalogue.update(log, path) == ["b0009"]
    assert path.read_text().startswith(before)  # from now on, lines are added and nothing else
    assert path.read_text().count("\n") == before.count("\n") + 1


ROWS = (
    'b001,312.40,118.0,8.1,3.5e-2,"5"" scope",',
    'b0007,801.9,644.2,4.30,0.021,5" x "y",',
    "b8,7,6,5,0.1,,",
)
HEADER = "blob,x_px,y_px,radius_px,depth_frac,remark,first_frame"
AS_WRITTEN = {
    "stray quotes": "\n".join([HEADER, *ROWS]) + "\n",
    "CRLF": "\r\n".join([HEADER, *ROWS]) + "\r\n",
    "CR": "\r".join([HEADER, *ROWS]) + "\r",
    "both": f"{HEADER}\n{ROWS[0]}\r\n{ROWS[1]}\n",
    "BOM": "\ufeff" + "\n".join([HEADER, *ROWS]) + "\n",
    "no last line end": "\n".join([HEADER, *ROWS]),
    "CRLF, no last line end": "\r\n".join([HEADER, *ROWS]),
    "blank lines": "\n\n" + "\n\n".join([HEADER, *ROWS]) + "\n\n\n",
    "another order": "depth_frac,remark,radius_px,y_px,x_px,blob\n0.1,é,5,6,7,b3\n",
    "only a header": HEADER,
}


@pytest.mark.parametrize("written", AS_WRITTEN)
@pytest.mark.parametrize("has_all", [False, True])
def test_a_catalogue_keeps_its_bytes_however_it_is_written(
    log: sqlite3.Connection, tmp_path: Path, written: str, has_all: bool
) -> None:
    path = tmp_path / "blobs.csv"
    path.write_bytes(AS_WRITTEN[written].encode())
    review(log, 4, "confirmed")
    if has_all:  # its columns have been added by an earlier update
        catalogue.update(log, path)
        review(log, 1, "confirmed")
    before = path.read_bytes()
    known = tables.read_known(path)
    [name] = catalogue.update(log, path)
    after = path.read_bytes()
    table = tables.read_known(path, catalogue.COLUMNS)
    pd.testing.assert_frame_equal(table.iloc[:-1][list(known)], known, check_dtype=False)
    assert table["blob"].iloc[-1] == name
    assert table[["x_px", "y_px"]].iloc[-1].tolist() == ([100, 100] if has_all else [500, 500])
    if has_all:
        assert after.startswith(before)
    else:
        added = len(table.columns) - len(known.columns)
        commas = re.sub(rb",{%d}(?=[\r\n])" % added, b"", after)
        commas = commas.replace(b"," + ",".join(list(table)[-added:]).encode(), b"")
        assert commas.startswith(before)
    ends = set(re.findall(rb"\r\n|\r|\n", after))
    assert ends == (set(re.findall(rb"\r\n|\r|\n", before)) or {b"\n"})


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (",8.1", ',"8.1', "cannot be read as CSV (line 2: ',' expected after '\"')"),
        ("\nb0007", "\n,b0007", "line 3: 8 fields, 7 in the header"),
        ("x_px", "y_px", "two columns are called 'y_px'"),
        ("312.40", "north", "row 2: x_px is 'north', expected a number"),
        ("b0007", "b001", "blob b001 is listed twice"),
    ],
)
def test_a_catalogue_that_cannot_be_read_is_left_alone(
    log: sqlite3.Connection, tmp_path: Path, old: str, new: str, says: str
) -> None:
    path = tmp_path / "blobs.csv"
    path.write_text(AS_WRITTEN["stray quotes"].replace(old, new))
    before = path.read_bytes()
    review(log, 4, "confirmed")
    with pytest.raises(TableError) as refusal:
        catalogue.update(log, path)
    assert says in str(refusal.value)
    assert path.read_bytes() == before


def test_a_link_into_nothing_is_no_empty_catalogue(log: sqlite3.Connection, tmp_path: Path) -> None:
    path = tmp_path / "blobs.csv"
    path.symlink_to(tmp_path / "cache" / "gone")
    review(log, 4, "confirmed")
    with pytest.raises(TableError, match=r"blobs\.csv: not found"):
        catalogue.update(log, path)
    assert path.is_symlink()


@pytest.mark.parametrize("name", ["b\u00b2", "b" + "9" * 5000, "B12", "no number"])
def test_odd_names_do_not_stop_the_count(
    log: sqlite3.Connection, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "blobs.csv"
    path.write_text(f"blob,x_px,y_px,radius_px,depth_frac\n{name},1,2,5,0.1\n")
    review(log, 4, "confirmed")
    assert catalogue.update(log, path) == ["b0013" if name == "B12" else "b0001"]


def test_what_the_catalogue_would_refuse_is_left_out(
    log: sqlite3.Connection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with logbook.writing(log):
        add_image(log, 9, name="-odd")
        off = add_candidate(log, 3, -1.5, 700.0)
        odd = add_candidate(log, 9, 600.0, 700.0)
    for candidate in (off, odd, 4):
        review(log, candidate, "confirmed")
    assert catalogue.update(log, tmp_path / "blobs.csv") == ["b0001"]
    assert len(tables.read_known(tmp_path / "blobs.csv")) == 1
    assert caplog.messages == [
        "candidate 5: confirmed, but its x_px cannot be that of a blob; add its row by hand",
        "candidate 6: confirmed, but its first_frame cannot be that of a blob; add its row by hand",
    ]


def test_a_table_without_a_column_is_refused(log: sqlite3.Connection, tmp_path: Path) -> None:
    (tmp_path / "blobs.csv").write_text("blob,x_px\nb1,1\n")
    with pytest.raises(TableError, match=r"blobs\.csv: column y_px is missing"):
        catalogue.update(log, tmp_path / "blobs.csv")


# --- the chain takes it ----------------------------------------------------------------------------------------------


def test_an_image_that_is_not_listed_is_named_and_nothing_is_written(
    log: sqlite3.Connection, tmp_path: Path
) -> None:
    (tmp_path / "frames.csv").write_text("frame,mjd\nday1,60001\n")
    review(log, 1, "confirmed")
    with pytest.raises(
        TableError, match=r"frames\.csv: found no row for day4, the first image of candidate 1; put"
    ):
        catalogue.update(log, tmp_path / "blobs.csv")
    assert not (tmp_path / "blobs.csv").exists()


def test_images_are_listed_by_date_between_those_that_are(
    log: sqlite3.Connection, tmp_path: Path
) -> None:
    listed = tmp_path / "frames.csv"
    listed.write_text("frame,seed,mjd\nold,5,59999.50\nday2,6,60002.000\nlast,7,60009\n")
    with logbook.writing(log):
        add_image(log, 5, outcome="rejected", mjd=None)
        add_image(log, 6, kind="difference")
        add_image(log, 7)
    for number in (4, 1, 2, 5, 6):
        logged_file(log, tmp_path, number)
    logged_file(log, tmp_path, 1, "copy", outcome="duplicate")
    logged_file(log, tmp_path, 3).unlink()  # gone since
    (tmp_path / "elsewhere").mkdir()
    logged_file(log, tmp_path / "elsewhere", 7)
    assert catalogue.list_images(log, listed) == ["day1", "day4"]
    wanted = (
        "frame,seed,mjd\nold,5,59999.50\nday1,,60001\nday2,6,60002.000\nday4,,60004\nlast,7,60009\n"
    )
    assert listed.read_text() == wanted
    assert catalogue.list_images(log, listed) == []
    assert listed.read_text() == wanted


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("last", [True, False])
def test_a_list_of_images_keeps_its_bytes(
    log: sqlite3.Connection, tmp_path: Path, newline: str, mark: str, last: bool
) -> None:
    listed = tmp_path / "frames.csv"
    lines = [
        'frame,note,"mjd"',
        'old,"5"" a\n,b",59999.50',
        "",
        'mid,5" tall,60002.5',
        "end,,60009",
    ]
    text = mark + newline.join(lines) + (newline if last else "")
    listed.write_bytes(text.encode())
    with logbook.writing(log):
        add_image(log, 7, mjd=60010.0)
    for number in (4, 1, 7):
        logged_file(log, tmp_path, number)
    assert catalogue.list_images(log, listed) == ["day1", "day4", "day7"]
    lines = [*lines[:3], "day1,,60001", lines[3], "day4,,60004", lines[4], "day7,,60010"]
    assert listed.read_bytes().decode() == mark + newline.join(lines) + newline
    assert tables.read_image_list(listed)["note"].iloc[0] == '5" a\n,b'


@pytest.mark.parametrize(
    "content",
    ["frame,mjd\nb,2\na,1\n", "frame,mjd\na,x\n", "frame,mjd\n../a,1\n", 'frame,mjd\n"a,1\n'],
)
def test_a_list_that_cannot_be_read_is_left_alone(
    log: sqlite3.Connection, tmp_path: Path, content: str
) -> None:
    (tmp_path / "frames.csv").write_text(content)
    logged_file(log, tmp_path, 1)
    with pytest.raises(TableError, match=r"frames\.csv: "):
        catalogue.list_images(log, tmp_path / "frames.csv")
    assert (tmp_path / "frames.csv").read_text() == content


def test_an_image_whose_name_no_list_takes_is_named(
    log: sqlite3.Connection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logged_file(log, tmp_path, 1, "-rf")
    logged_file(log, tmp_path, 2)
    assert catalogue.list_images(log, tmp_path / "frames.csv") == ["day2"]
    assert (
        "'-rf' is not listed, as a frame cannot have such a name; rename the image" in caplog.text
    )


def test_a_list_of_images_is_made(log: sqlite3.Connection, tmp_path: Path) -> None:
    for number in (2, 1):
        logged_file(log, tmp_path, number)
    assert catalogue.list_images(log, tmp_path / "frames.csv") == ["day1", "day2"]
    assert (tmp_path / "frames.csv").read_text() == "frame,mjd\nday1,60001\nday2,60002\n"


def test_the_loop_closes(
    log: sqlite3.Connection, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A confirmed blob is, for the chain, a known blob with a case of its own, and handed on."""
    raw = project / "data" / "raw"
    before = tables.read_blobs(raw)
    image = fits_images.read_frame(raw / "frame5.fits.fz").data
    fits_images.write_image(logged_file(log, raw, 4), image, name="SCI")
    review(log, 1, "confirmed")
    words = [
        "catalogue",
        "update",
        "--log",
        str(log.execute("PRAGMA database_list").fetchone()["file"]),
    ]
    words += [
        "--catalogue",
        "data/raw/blobs.csv",
        "--frames",
        "data/raw/frames.csv",
        "--reviews",
        "reviews.csv",
    ]
    assert cli.main(words) == 0
    assert capsys.readouterr().out.splitlines() == [
        "data/raw/frames.csv: 1 image added",
        f"data/raw/blobs.csv: 1 blob added: b{len(before):04d}",
        "reviews.csv: 1 review",
    ]
    images = tables.read_frame_list(raw)
    blobs = tables.read_blobs(raw)
    pd.testing.assert_frame_equal(blobs.iloc[:-1][list(before.columns)], before, check_dtype=False)
    cases = regression.historical_cases(images.assign(n_stack=4), blobs)
    assert [list(case.new["blob"]) for case in cases] == [["b4"], [f"b{len(before):04d}"]]
    handed_on = export.read_catalogue(raw / "blobs.csv")
    assert handed_on["status"].tolist() == ["known"] * len(before) + ["confirmed"]
    assert handed_on["first_mjd"].iloc[-1] == 60004


def test_reviews_are_written_in_the_order_in_which_they_were_made(
    log: sqlite3.Connection, tmp_path: Path
) -> None:
    with pytest.raises(TableError, match=r"reviews\.csv: no review in the log"):
        catalogue.write_reviews(log, tmp_path / "reviews.csv")
    for candidate, decision in ((3, "unsure"), (1, "confirmed"), (3, "rejected")):
        review(log, candidate, decision)
    assert catalogue.write_reviews(log, tmp_path / "reviews.csv") == 3
    first = (tmp_path / "reviews.csv").read_text()
    assert [line.split(",")[1:3] for line in first.splitlines()[1:]] == [
        ["3", "unsure"],
        ["1", "confirmed"],
        ["3", "rejected"],
    ]
    review(log, 4, "confirmed")
    catalogue.write_reviews(log, tmp_path / "reviews.csv")
    assert (tmp_path / "reviews.csv").read_text().startswith(first)


def test_reviews_of_another_log_are_kept(log: sqlite3.Connection, tmp_path: Path) -> None:
    path = tmp_path / "reviews.csv"
    for candidate in (3, 1):
        review(log, candidate, "confirmed")
    catalogue.write_reviews(log, path)
    kept = path.read_bytes().replace(b"\n", b"\r\n")
    path.write_bytes(kept)  # as git puts it on some machines
    assert catalogue.write_reviews(log, path) == 2
    assert path.read_bytes() == kept
    review(log, 4, "rejected")
    assert catalogue.write_reviews(log, path) == 3
    assert path.read_bytes().startswith(kept)
    assert path.read_bytes().count(b"\r\n") == 4
    for other in (
        kept.replace(b"Ada", b"Bob"),
        path.read_bytes() + b"9,1,unsure,Bob,,today\r\n",
        KNOWN.encode(),
    ):
        path.write_bytes(other)
        with pytest.raises(
            TableError,
            match=r"reviews\.csv: (row \d is not a review of this log|column id is missing)",
        ):
            catalogue.write_reviews(log, path)
        assert path.read_bytes() == other
