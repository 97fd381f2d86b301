"""Mutated tables, read by everything that reads tables: the values that stand there, or one line.

What stands there is told by Python's ``csv`` alone. By hand: ``python -m tests.fuzz.tables --seed 0 --count 300``.
"""

from __future__ import annotations

import csv
import functools
import io
import logging
import math
import random
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from astropy.table import Table

from blobpipe.core import tables
from blobpipe.errors import BlobpipeError, TableError
from blobpipe.monitor import catalogue, export, logbook
from tests.fuzz import runner

NUMBER = re.compile(r"[ \t]*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?[ \t]*", re.ASCII)
RANGES = {
    "x_px": (-0.5, 1023.5),
    "y_px": (-0.5, 1023.5),
    "radius_px": (0.1, 100),
    "depth_frac": (1e-9, 1),
}
PLACE = ("x_px", "y_px", "radius_px")
BLOBS = '''blob,x_px,y_px,radius_px,depth_frac,remark,first_frame
b001,312.40,118.0,8.1,3.5e-2,"large, ""old""",
b0007,801.9,644.2,4.30,0.021,5" across,a
b8,6,1019,5.5,.05,,b
b0009,40,50,6,0.5,"two
lines",c
'''
IMAGES = """frame,mjd,seed
a,56197.31,1
b,56218.7,2
c,60001.5,"3"
"""
CANDIDATES = """id,status,x_px,y_px,first_mjd,radius_px,depth_frac,decision,probability
1,seen_again,50,60,56000,5,0.1,rejected,0.9
2,new,150,60,56000.5,5.25,0.1,confirmed,0.9
3,confirmed,250,60,56000,5,0.1,,1
4,seen_again,350.125,60,56000,5,0.1,unsure,0.9
5,faded,450,60,56001,,,,0.5
6,new,550,60,56002,7,0.2,confirmed,0.5
"""
TOKENS = [
    *(
        '"',
        '""',
        ",",
        ",,",
        ";",
        "\t",
        "\n",
        "\r",
        "\r\n",
        "\n\n",
        "\\",
        "'",
        "#",
        "=",
        "\0",
        "\x1a",
        "\x85",
        "\u2028",
    ),
    *(
        "nan",
        "NaN",
        "inf",
        "-inf",
        "1e308",
        "1e400",
        "-1",
        "0",
        "1024",
        "0x10",
        "1_0",
        "1.2.3",
        "1,5",
        "True",
        "None",
    ),
    *(
        "٣",
        "²",
        "9" * 30,
        "9" * 400,
        "1e-400",
        "x" * 300,
        "é",
        "\ufeff",
        "../raw/x",
        "..",
        ".a",
        "-a",
        "a/b",
        "a\\b",
        "A",
    ),
    *(
        " ",
        "  ",
        "reference",
        "x_px",
        "frame",
        "confirmed",
        "known",
        "b001",
        "2012-09-27",
        "0001-01-01T00:00+14:00",
    ),
]


def case(seed: int, folder: Path) -> str:
    """One mutated table and one reader; the outcome in a word."""
    logging.disable(logging.WARNING)
    rng = random.Random(seed)
    text, read = rng.choice(READERS)
    content = text.encode()
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        content = rng.choice(MUTATIONS)(rng, content)
    try:
        read(folder, content)
    except RefusedError:
        return f"{read.__name__} refused"
    return f"{read.__name__} read"


class RefusedError(Exception):
    """The table was refused as it should be."""


# --- what is done to a table -----------------------------------------------------------------------------------------


def insert_token(rng: random.Random, content: bytes) -> bytes:
    at = rng.randint(0, len(content))
    return content[:at] + rng.choice(TOKENS).encode() + content[at:]


def change_byte(rng: random.Random, content: bytes) -> bytes:
    at = rng.randrange(len(content) or 1)
    return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]


def cut_out(rng: random.Random, content: bytes) -> bytes:
    first, last = sorted(rng.randint(0, len(content)) for _ in range(2))
    return content[:first] + content[min(last, first + rng.choice((1, 3, 30, 1000))) :]


def repeat_part(rng: random.Random, content: bytes) -> bytes:
    first, last = sorted(rng.randint(0, len(content)) for _ in range(2))
    return content[:last] + content[first:]


def store_otherwise(rng: random.Random, content: bytes) -> bytes:
    text = content.decode(errors="replace")
    match rng.randrange(7):
        case 0:
            return text.encode(
                rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "cp037")),
                errors="replace",
            )
        case 1:
            return (text + "é").encode("latin-1", errors="replace")
        case 2:
            return content.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\n\n", b" \n")))
        case 3:
            return content.replace(b",", rng.choice((b";", b"\t", b", ", b",,", b"|")))
        case 4:
            return content.rstrip(b"\n")
        case 5:
            return content.replace(b"\n", b",\n")
        case _:
            return re.sub(rb"\n(.)", rb"\n,\1", content)


def by_rows(
    change: Callable[[random.Random, list[list[str]]], None],
) -> Callable[[random.Random, bytes], bytes]:
    @functools.wraps(change)
    def mutation(rng: random.Random, content: bytes) -> bytes:
        text = content.decode(errors="replace")
        rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row] or [["a"]]
        change(rng, rows)
        written = io.StringIO()
        quoting = rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
        csv.writer(
            written, lineterminator=rng.choice(("\n", "\n", "\r\n")), quoting=quoting
        ).writerows(rows)
        return written.getvalue().encode()

    return mutation


@by_rows
def change_field(rng: random.Random, rows: list[list[str]]) -> None:
    row = rng.choice(rows[1:] or rows)
    row[rng.randrange(len(row))] = rng.choice(TOKENS)


@by_rows
def change_row(rng: random.Random, rows: list[list[str]]) -> None:
    row = rng.choice([row for row in rows if row])
    at = rng.randrange(len(row))
    row[at : at + 1] = rng.choice(([], [row[at], row[at]], ["", row[at]], [row[at], ""]))


@by_rows
def change_columns(rng: random.Random, rows: list[list[str]]) -> None:
    order = rng.sample(range(len(rows[0])), len(rows[0]))
    order = rng.choice((order, order[1:], [*order, order[0]]))
    rows[:] = [[row[i] for i in order if i < len(row)] for row in rows]
    if rng.random() < 0.2:
        at = rng.randrange(len(rows[0]) or 1)
        rows[0][at : at + 1] = [rng.choice(("", "x_px", "id", "status", " frame"))]


@by_rows
def change_order(rng: random.Random, rows: list[list[str]]) -> None:
    rows[1:] = rng.choice(
        (rng.sample(rows[1:], len(rows[1:])), rows[1:] * 2, [], (rows[1:] * 300)[:3000])
    )


MUTATIONS = (
    *(insert_token, insert_token, change_byte, cut_out, repeat_part, store_otherwise),
    *(change_field, change_field, change_row, change_columns, change_order),
)


# --- what stands there -----------------------------------------------------------------------------------------------


def fields_of(content: bytes) -> list[list[str]] | None:
    """Header and rows as Python's csv has them; None if there are none, or they are not all as long."""
    try:
        text = content.decode("utf-8-sig")
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    except (UnicodeDecodeError, csv.Error):
        return None
    if not rows or "\0" in text or any(len(row) != len(rows[0]) for row in rows):
        return None
    named = [name for name in rows[0] if name]
    return rows if len(set(named)) == len(named) else None


def same(value: object, field: str) -> bool:
    """Whether a value is what a field says."""
    if isinstance(value, str):
        return value == field
    if isinstance(value, float) and math.isnan(value):
        return field == ""
    if isinstance(value, bool):
        return str(value).lower() == field.lower()
    return math.isclose(float(value), float(field), rel_tol=1e-12)  # type: ignore[arg-type]


def agree(table: pd.DataFrame, rows: list[list[str]] | None) -> None:
    """Insist that a table says what its bytes say, row by row."""
    assert rows is not None, "read, though no table"
    assert len(table) == len(rows) - 1, "rows were lost or made up"
    for at, name in enumerate(rows[0]):
        for value, row in zip(table[name].tolist() if name else [], rows[1:], strict=bool(name)):
            assert same(value, row[at]), f"{name}: {value!r} of {row[at]!r}"


def is_good(rows: list[list[str]] | None, columns: tuple[str, ...]) -> bool:
    """Whether known blobs surely must be read."""
    if rows is None or not set(columns) <= set(rows[0]):
        return False
    table = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    for row in table:
        for name, field in row.items():
            of_numbers = name in columns and name in RANGES
            if of_numbers and not (
                NUMBER.fullmatch(field) and RANGES[name][0] <= float(field) <= RANGES[name][1]
            ):
                return False
            by_name = re.fullmatch(r"(.*_)?(px|px2|frac|sigma|mjd|snr|score|probability)", name)
            if by_name and field and not NUMBER.fullmatch(field):
                return False
            if name in ("frame", "first_frame") and not re.fullmatch(r"\w{0,60}", field):
                return False
    names = [row["blob"] for row in table if "blob" in row]
    return all(names) and len(set(names)) == len(names)


def refused_well(line: str, path: Path, *, good: bool = False) -> None:
    assert not good, f"refused, though good: {line}"
    assert "\n" not in line, f"more than one line: {line!r}"
    assert line.startswith(str(path.parent)), f"names no file: {line!r}"
    assert len(line) < len(str(path)) + 400, f"{len(line)} characters: {line[:500]!r}"


def put(folder: Path, name: str, content: bytes) -> Path:
    for image in "abc":
        (folder / f"{image}.fits").touch()
    path = folder / name
    path.write_bytes(content)
    return path


# --- who reads it ----------------------------------------------------------------------------------------------------


def known(folder: Path, content: bytes, columns: tuple[str, ...] = PLACE) -> None:
    path = put(folder, "known.csv", content)
    rows = fields_of(content)
    try:
        table = tables.read_known(path, columns)
    except TableError as error:
        refused_well(str(error), path, good=is_good(rows, columns))
        raise RefusedError(error) from error
    agree(table, rows)
    for column in set(columns) & set(RANGES):
        assert table[column].between(*RANGES[column]).all()


def blobs(folder: Path, content: bytes) -> None:
    put(folder, "frames.csv", IMAGES.encode())
    path = put(folder, "blobs.csv", content)
    try:
        table = tables.read_blobs(folder)
    except TableError as error:
        refused_well(str(error), path)
        raise RefusedError(error) from error
    agree(table, fields_of(content))
    assert set(table["first_frame"]) <= {"", "a", "b", "c"}


def image_list(folder: Path, content: bytes) -> None:
    path = put(folder, "frames.csv", content)
    try:
        table = tables.read_frame_list(folder)
    except TableError as error:
        refused_well(str(error), path)
        raise RefusedError(error) from error
    agree(table, fields_of(content))
    assert set(table["frame"]) <= {"a", "b", "c"}
    assert table["mjd"].is_monotonic_increasing


def stage(folder: Path, content: bytes) -> None:
    path = put(folder, "frames-000.csv", content.replace(b"seed", b"status", 1))
    try:
        table = tables.read_stage(folder)
    except TableError as error:
        refused_well(str(error), path)
        raise RefusedError(error) from error
    agree(table, fields_of(path.read_bytes()))
    for frame in table["frame"]:
        assert not frame or (folder / frame).resolve().parent == folder.resolve()


def update(folder: Path, content: bytes) -> None:
    path = put(folder, "known.csv", content)
    before = fields_of(content)
    with logbook.connect(log_with_blobs()) as log:
        try:
            added = catalogue.update(log, path)
        except TableError as error:
            refused_well(str(error), path, good=is_good(before, tables.BLOB_COLUMNS))
            assert path.read_bytes() == content, "refused and changed"
            raise RefusedError(error) from error
        after = fields_of(path.read_bytes())
        assert before is not None
        assert after is not None
        more = len(after[0]) - len(before[0])
        assert [row + [""] * more for row in before[1:]] == after[1 : len(before)]
        assert after[0][: len(before[0])] == before[0]
        assert len(after) == len(before) + len(added)
        assert more or path.read_bytes().startswith(content)
        tables.read_known(path, catalogue.COLUMNS if added else tables.BLOB_COLUMNS)
        now = path.read_bytes()
        assert not catalogue.update(log, path)
        assert path.read_bytes() == now
    log.close()


def list_images(folder: Path, content: bytes) -> None:
    path = put(folder, "frames.csv", content)
    before = fields_of(content)
    with logbook.connect(log_with_blobs()) as log:
        files = [(str((folder / f"new{i}.fits").resolve()), f"s{i}", i) for i in (1, 2)]
        for file, _, _ in files:
            Path(file).touch()
        with logbook.writing(log):
            log.execute("DELETE FROM files")
            for file, sha256, image in files:
                row = {
                    "path": file,
                    "sha256": sha256,
                    "size_bytes": 0,
                    "modified_ns": 0,
                    "seen": "",
                    "image": image,
                }
                logbook.insert(log, "files", row | {"outcome": "logged"})
        try:
            added = catalogue.list_images(log, path)
        except TableError as error:
            refused_well(str(error), path)
            assert path.read_bytes() == content, "refused and changed"
            raise RefusedError(error) from error
        after = fields_of(path.read_bytes())
        assert before is not None
        assert after is not None
        new = [row for row in after if row[after[0].index("frame")] in ("new1", "new2")]
        assert [row for row in after if row not in new or row in before] == before
        assert len(after) == len(before) + len(added)
        assert tables.read_image_list(path)["mjd"].is_monotonic_increasing
    log.close()


def exported(folder: Path, content: bytes) -> None:
    path = put(folder, "candidates.csv", content)
    rows = fields_of(content)
    out = folder / "out"
    try:
        export.export_blobs(path, out)
    except BlobpipeError as error:
        line = str(error)
        assert line.startswith((str(folder), "bad-pixel table: "))
        assert "\n" not in line
        assert not out.exists(), "refused, and something written"
        raise RefusedError(error) from error
    assert rows is not None
    table = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    wanted = {
        tuple(float(row[name]) for name in (*PLACE, "depth_frac"))
        for row in table
        if status(row) in export.STATUSES
    }
    handed_on = Table.read(out / "blobs.ecsv").to_pandas()
    found = set(handed_on[[*PLACE, "depth_frac"]].itertuples(index=False, name=None))
    for values in found:
        assert any(all(map(math.isclose, values, each)) for each in wanted), (
            f"{values} was not in the table"
        )
    assert found
    assert len((out / "blobs.reg").read_text().splitlines()) == 3 + len(handed_on)
    assert len(list(out.iterdir())) == 5


def status(row: dict[str, str]) -> str:
    """What a row is, in the words of the docs."""
    by_search = "decision" in row or "probability" in row
    found = row.get("status", "")
    found = "seen_again" if by_search and found == "confirmed" else found
    return row.get("decision", "") or found or "known"


@functools.cache
def log_with_blobs() -> Path:
    """A log with two confirmed candidates."""
    path = Path(tempfile.mkdtemp(prefix="fuzz-log-")) / "log.sqlite"
    log = logbook.connect(path, make=True)
    run = dict.fromkeys(
        ("started", "version", "model", "model_sha256", "params_sha256", "catalogue_sha256"), "x"
    )
    with logbook.writing(log):
        logbook.insert(log, "runs", run | {"threshold": 0.5})
        for number, x in ((1, 700.0), (2, 720.0)):
            image = {
                "run": 1,
                "sha256": f"s{number}",
                "name": "abc"[number],
                "kind": "image",
                "outcome": "searched",
            }
            logbook.insert(
                log, "images", image | {"mjd": 56200.0 + 9 * number, "logged": logbook.now()}
            )
            place = {"image": number, "x_px": x, "y_px": 300.0, "status": "new"}
            logbook.insert(log, "candidates", place)
            size = {
                "radius_px": 5.0,
                "depth_frac": 0.1,
                "snr": 9.0,
                "score": 1.0,
                "probability": 1.0,
            }
            logbook.insert(log, "detections", place | size | {"candidate": number})
            review = {
                "candidate": number,
                "decision": "confirmed",
                "reviewer": "a\rb",
                "at": logbook.now(),
            }
            logbook.insert(log, "reviews", review)
    log.close()
    return path


READERS: tuple[tuple[str, Callable[[Path, bytes], None]], ...] = (
    *((BLOBS, reader) for reader in (known, known, blobs, update, update)),
    *((IMAGES, reader) for reader in (image_list, stage, list_images)),
    (CANDIDATES, known),
    (CANDIDATES, exported),
)

if __name__ == "__main__":
    runner.main(case)
