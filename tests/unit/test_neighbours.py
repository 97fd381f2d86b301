"""The daily routine beside files of every bad kind: each is accounted for by name, and none stops the others."""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

import blobpipe
from blobpipe.core import fits_images, tables
from blobpipe.core.blob_shapes import blob_profile
from blobpipe.errors import printable
from blobpipe.monitor import logbook, scan
from blobpipe.params import Difference, Params, Quicklook, to_yaml

SIDE = 256
IMAGES = 60
NEIGHBOURS = 40
KNOWN = ((100, 120, 6.5, 0.08), (190, 60, 5.5, 0.1))
STARTS = 3  # a file that crashes its reader costs one
CARD = 80  # bytes
BLOCK = 2880  # bytes


def pixels(day: int) -> np.ndarray:
    image = np.random.default_rng([18, day]).normal(0, 0.0076, (SIDE, SIDE)).astype(np.float32)
    for x, y, radius, depth in KNOWN:
        image[y - 20 : y + 21, x - 20 : x + 21] += depth * blob_profile("disc", radius, 0, 0)
    return image


def content(day: int, data: np.ndarray | None = None, **cards: object) -> bytes:
    """An image of our own as a FITS file."""
    header = fits.Header({"FILTER": "F153M", "EXPSTART": 57000.0 + day} | cards)
    hdu = fits.PrimaryHDU(pixels(day) if data is None else data, header)
    return hdu.header.tostring().encode() + padded(
        hdu.data.astype(hdu.data.dtype.newbyteorder(">")).tobytes()
    )


def padded(data: bytes, fill: bytes = b"\0") -> bytes:
    return data + fill * (-len(data) % BLOCK)


def header(*cards: str) -> bytes:
    """A header of cards as they stand, right or not."""
    return padded("".join(card.ljust(CARD) for card in (*cards, "END")).encode(), b" ")


def with_card(day: int, card: str) -> bytes:
    """An image with a card that is written as it stands."""
    return content(day, KEYWORD=1).replace(
        b"KEYWORD =                    1".ljust(CARD), card.ljust(CARD).encode()
    )


def crashing(folder: Path) -> bytes:
    """A compressed image whose decompressor is told of negative bytes per pixel."""
    fits_images.write_image(
        folder / "sound.fits.fz", pixels(500), name="SCI", header={"EXPSTART": 57500.0}
    )
    sound = (folder / "sound.fits.fz").read_bytes()
    assert b"ZVAL2   =                    4" in sound
    return sound.replace(b"ZVAL2   =                    4", b"ZVAL2   =                   -1")


def hostile(folder: Path, outside: Path) -> list[str]:
    """Put files of every bad kind into a folder; their names."""
    outside.mkdir()
    before = set(folder.iterdir())
    whole = content(900)
    first = b"SIMPLE  =                    T"
    packed = gzip.compress(content(901))
    big = (
        "NAXIS   =                    2",
        "NAXIS1  =                20000",
        "NAXIS2  =                20000",
    )
    files = {
        "notes.txt": b"weather: fine\n",
        "text.fits": b"no image at all\n" * 300,
        "empty.fits": b"",
        "page.fits.gz": b"<!DOCTYPE html><title>404</title>",
        "cut.fits": whole[:-SIDE],
        "cut_header.fits": whole[:1000],
        "cut.fits.gz": packed[:-9],
        "flipped.fits.gz": packed[:5000] + bytes([packed[5000] ^ 4]) + packed[5001:],
        "cut.fits.fz": crashing(outside)[:-20000],
        "crash.fits.fz": crashing(outside),
        "endless.fits": header(
            first.decode(), "BITPIX  =                    8", "NAXIS   =           2000000000"
        ),
        "endless_table.fits": header(
            first.decode(), "BITPIX  =                    8", "NAXIS   =                    0"
        )
        + header(
            "XTENSION= 'BINTABLE'",
            "BITPIX  =                    8",
            *big,
            "TFIELDS =           2000000000",
        ),
        "huge.fits": header(first.decode(), "BITPIX  =                  -64", *big) + bytes(BLOCK),
        "comma.fits": with_card(902, "EXPSTART=           57902,5"),
        "unquoted.fits": with_card(903, "LEVEL_E = about a hundred"),
        "complex.fits": content(904, LEVEL_E=1 + 2j),
        "text_level.fits": content(905, LEVEL_E="high"),
        "long_number.fits": with_card(906, f"LEVEL_E = {10**60}"),
        "undated.fits": fits.PrimaryHDU(pixels(1)).header.tostring().encode()
        + padded(pixels(1).tobytes()),
        "unix_date.fits": content(907, EXPSTART=1.7e9),
        "nan.fits": content(908, np.full((SIDE, SIDE), np.nan, np.float32)),
        "constant.fits": content(909, np.ones((SIDE, SIDE), np.float32)),
        "infinite.fits": content(910, np.full((SIDE, SIDE), np.inf, np.float32)),
        "exposure.fits": content(911, 100 + 900 * pixels(911)),
        "subarray.fits": content(912, pixels(912)[:100, :100]),
        "larger.fits": content(913, np.tile(pixels(913), (2, 2))),
        "cube.fits": content(914, np.zeros((4, 4, 4, 4), np.float32)),
        "'; DROP TABLE images; --.fits": b"",
        "%s%n \x1b[31m\nred.fits": b"%",
        "n" * (255 - len(".fits")) + ".fits": b"long",
        os.fsdecode(b"day\xe9\xff.fits"): b"Latin",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    shutil.copy(folder / "day000.fits", folder / "copy.fits")
    (folder / "folder.fits").mkdir()
    os.mkfifo(folder / "pipe.fits")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as unix, contextlib.chdir(folder):
        unix.bind("socket.fits")
    targets = {
        "dangling": outside / "none",
        "self": folder / "self.fits",
        "device": "/dev/zero",
        "to_folder": outside,
    }
    for name, target in targets.items():
        (folder / f"{name}.fits").symlink_to(target)
    with open(folder / "terabyte.fits", "wb") as sparse:
        sparse.truncate(10**12)
    return sorted(path.name for path in set(folder.iterdir()) - before)


def quicklook(root: Path, *words: str) -> tuple[int, str]:
    """Run the command until it does not crash; the exit status of the last start, and all that was said."""
    said = ""
    for _ in range(STARTS):
        command = (
            sys.executable,
            "-m",
            "blobpipe",
            "quicklook",
            "in",
            "--log",
            "out/log.sqlite",
            *words,
        )
        ended = subprocess.run(
            command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300
        )
        said += ended.stdout.decode("utf-8", "surrogateescape")
        if ended.returncode >= 0:
            break
    return ended.returncode, said


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    settings = {"difference": Difference(stack_size=4), "quicklook": Quicklook(settle_s=0.0)}
    (tmp_path / "params.yaml").write_text(to_yaml(Params().model_copy(update=settings)))
    (tmp_path / "stack.fits").write_bytes(content(800))
    return tmp_path


@pytest.mark.slow
def test_sixty_images_beside_forty_hostile_neighbours_are_all_searched(root: Path) -> None:
    for day in range(IMAGES):
        (root / "in" / f"day{day:03d}.fits").write_bytes(content(day))
    os.utime(root / "in" / "day007.fits", (2e10, 2e10))  # of the year 2603
    names = hostile(root / "in", root / "outside")
    assert len(names) >= NEIGHBOURS
    status, said = quicklook(root, "--reference", "stack.fits")
    assert status == 0, said
    assert "Traceback" not in said
    log = logbook.connect(root / "out" / "log.sqlite")
    rows = log.execute(
        "SELECT f.path, i.outcome FROM files f JOIN images i ON i.id = f.image"
    ).fetchall()
    logged = {Path(row["path"]).name: row["outcome"] for row in rows}
    assert {logged.get(f"day{day:03d}.fits") for day in range(IMAGES)} == {"searched"}
    unaccounted = [name for name in names if name not in logged and printable(name) not in said]
    assert unaccounted == []


def test_a_bug_that_one_frame_brings_to_light_does_not_end_a_scan(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [root / "in" / f"day{day:03d}.fits" for day in range(3)]
    for day, path in enumerate(paths):
        path.write_bytes(content(day))
    prepare = scan.Preparation.prepare

    def fail_on_the_second(self: scan.Preparation, path: Path) -> scan.PreparedImage:
        if path == paths[1]:
            raise KeyError("no such column")
        return prepare(self, path)

    monkeypatch.setattr(scan.Preparation, "prepare", fail_on_the_second)
    model = Path(blobpipe.__file__).with_name("model.safetensors")
    assert scan.scan(paths, root / "out", model, Params(), reference=root / "stack.fits") == 1
    table = tables.read_table(root / "out" / "frames.csv", ("frame", "status", "reason")).set_index(
        "frame"
    )
    assert table["status"].tolist() == ["ok", "rejected", "ok"]
    assert table.loc["day001", "reason"].endswith(
        "internal fault (KeyError: 'no such column'): please report it"
    )
