"""One FITS file, whatever it is: read right, or one line that says what is wrong with it."""

from __future__ import annotations

import bz2
import gzip
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from blobpipe.core import fits_images, hdus
from blobpipe.errors import FrameError
from blobpipe.images import check

IMAGE = np.random.default_rng(3).normal(0, 0.01, (300, 310)).astype(np.float32)


def plain(
    path: Path, data: np.ndarray = IMAGE, *, checksum: bool = False, **cards: object
) -> bytes:
    """Write an image as its own HDU; its bytes."""
    hdu = fits.ImageHDU(data, fits.Header(cards), name="SCI")
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(path, checksum=checksum, overwrite=True)
    return path.read_bytes()


def refused(path: Path, reason: str) -> str:
    """Every reader says the same against a file, in one line that names it."""
    said = []
    for read in (
        fits_images.read_frame,
        lambda p: fits_images.read_plane(p, "SCI"),
        lambda p: fits_images.find_plane(p, "SCI"),
    ):
        with pytest.raises(FrameError, match=reason) as caught:
            read(path)
        said.append(str(caught.value))
        assert said[-1].startswith(f"{path}: ")
        assert "\n" not in said[-1]
    assert check.describe(path).fault == said[0].removeprefix(f"{path}: ")
    return said[0]


def patched(content: bytes, name: str, card: str | bytes) -> bytes:
    """The same file with another card in place of the one of a name in the last header that has it."""
    place = content.rindex(f"{name:8}=".encode())
    new = card if isinstance(card, bytes) else card.encode()
    return content[:place] + new.ljust(80)[:80] + content[place + 80 :]


# --- compressed by gzip ----------------------------------------------------------------------------------------------


def test_every_damage_to_a_gzip_stream_is_found_or_harmless(tmp_path: Path) -> None:
    """One bit of 200 bytes all over the file, and 1 to 9 bytes cut off: never other pixels."""
    whole = gzip.compress(plain(tmp_path / "a.fits"), mtime=0)
    path = tmp_path / "b.fits.gz"
    rng = np.random.default_rng(1)
    n_read = 0
    for place in rng.integers(0, len(whole), 200):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            np.testing.assert_array_equal(fits_images.read_frame(path).data, IMAGE)
            n_read += 1
        except FrameError:
            pass
    assert n_read <= 2  # those whose damage is in the stream's header: name, time, system
    for n in range(1, 10):
        path.write_bytes(whole[:-n])
        refused(path, "ended before the end-of-stream marker")


@pytest.mark.parametrize("name", ["a.fits", "a.fits.fz", "a.fits.gz"])
@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, bytes])
def test_the_content_counts_and_not_the_name(
    tmp_path: Path, name: str, pack: Callable[[bytes], bytes]
) -> None:
    content = plain(tmp_path / "whole.fits")
    (tmp_path / name).write_bytes(pack(content))
    np.testing.assert_array_equal(fits_images.read_frame(tmp_path / name).data, IMAGE)


@pytest.mark.parametrize(
    ("more", "good"),
    [
        (b"\0" * 512, True),
        (gzip.compress(b"\0" * 5760, mtime=0), True),
        (b"text", False),
        (gzip.compress(b"X" * 5760, mtime=0), False),
    ],
    ids=["zeros", "zeros packed", "text", "text packed"],
)
def test_what_follows_a_gzip_stream(tmp_path: Path, more: bytes, good: bool) -> None:
    """Zeros of a tape and a second member that holds zeros are passed over; anything else is damage."""
    path = tmp_path / "a.fits.gz"
    path.write_bytes(gzip.compress(plain(tmp_path / "a.fits")) + more)
    if good:
        np.testing.assert_array_equal(fits_images.read_frame(path).data, IMAGE)
    else:
        refused(path, r"Not a gzipped file|5760 bytes behind HDU 1")


def test_a_gzip_bomb_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hdus, "MAX_BYTES", 1 << 22)
    (tmp_path / "a.fits").write_bytes(gzip.compress(b"\0" * (1 << 26)))
    refused(tmp_path / "a.fits", "more than 4194304 bytes when unpacked")


# --- checksums -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["pixel", "header", "sum"])
def test_a_file_with_checksums_is_as_they_say(tmp_path: Path, where: str) -> None:
    path = tmp_path / "a.fits"
    content = bytearray(plain(path, checksum=True, EXPSTART=56000.5))
    np.testing.assert_array_equal(fits_images.read_frame(path).data, IMAGE)
    if where == "pixel":
        content[-70_000] ^= 1
    elif where == "header":
        content[content.index(b"56000.5")] = ord("6")
    else:
        content[content.rindex(b"DATASUM") + 12] ^= 1
    path.write_bytes(content)
    said = refused(path, "(DATASUM|CHECKSUM) of HDU SCI does not agree with its bytes")
    assert "remove the card" in said


def test_checksums_of_compressed_tables_and_of_short_files_are_right(tmp_path: Path) -> None:
    path = tmp_path / "a.fits.fz"
    fits.HDUList([fits.PrimaryHDU(), fits.CompImageHDU(IMAGE, name="SCI")]).writeto(
        path, checksum=True
    )
    assert "DATASUM" in fits.getheader(path, 1) or b"DATASUM" in path.read_bytes()
    fits_images.read_frame(path)
    short = plain(tmp_path / "b.fits", checksum=True)
    (tmp_path / "b.fits").write_bytes(
        short[: -(-len(short) // 2880) * 2880 - (2880 - IMAGE.nbytes % 2880)]
    )
    np.testing.assert_array_equal(fits_images.read_frame(tmp_path / "b.fits").data, IMAGE)


@pytest.mark.parametrize("text", ["''", "'                '"])
def test_an_empty_checksum_is_none(tmp_path: Path, text: str) -> None:
    content = plain(tmp_path / "a.fits", CHECKSUM="x" * 16, DATASUM="1")
    for name in ("CHECKSUM", "DATASUM"):
        content = patched(content, name, f"{name:8}= {text}")
    (tmp_path / "a.fits").write_bytes(content)
    np.testing.assert_array_equal(fits_images.read_frame(tmp_path / "a.fits").data, IMAGE)


# --- how a file ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda whole, end: whole[:end],  # the last block is not filled
        lambda whole, end: whole[: end + 7],
        lambda whole, end: whole + b"\0" * 512,
        lambda whole, end: whole + b"\0" * 28800,
        lambda whole, end: whole + b"written by acquisition software v3\n",
    ],
)
def test_odd_ends_are_read(tmp_path: Path, change: Callable[[bytes, int], bytes]) -> None:
    whole = plain(tmp_path / "a.fits")
    (tmp_path / "a.fits").write_bytes(change(whole, len(whole) - 2880 + IMAGE.nbytes % 2880))
    np.testing.assert_array_equal(fits_images.read_frame(tmp_path / "a.fits").data, IMAGE)


def test_bytes_that_belong_to_no_hdu_are_a_wrong_size(tmp_path: Path) -> None:
    content = plain(tmp_path / "a.fits")
    (tmp_path / "a.fits").write_bytes(patched(content, "NAXIS2", "NAXIS2  =                  200"))
    refused(tmp_path / "a.fits", "bytes behind HDU 1 that are no HDU")
    (tmp_path / "a.fits").write_bytes(patched(content, "NAXIS2", "NAXIS2  =                  400"))
    refused(tmp_path / "a.fits", "truncated, 380160 bytes found, 501760 expected")


# --- what the header says --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "reason"),
    [
        ("NAXIS   =           2000000000", "its card NAXIS is 2000000000"),
        ("NAXIS   =                    9", "its card NAXIS9 is missing"),
        ("NAXIS1  =           2000000000", "truncated"),
        ("NAXIS1  =                 -310", "its card NAXIS1 is -310"),
        ("NAXIS1  =                31.5", "its card NAXIS1 is no whole number"),
        ("NAXIS2  =        (300.0, 1.0)", "its card NAXIS2 is no whole number"),
        ("BITPIX  =                   33", "its card BITPIX is 33"),
        ("PCOUNT  =           2000000000", "truncated"),
        ("GCOUNT  = 99999999999999999999", "its card GCOUNT is no whole number"),
        ("BITPIX  =                  -64", "truncated"),
        ("XTENSION= 'IMAGINE '", "no image found|no image SCI|array of shape"),
        ("EXTNAME = 'SCI     '", None),
    ],
)
def test_cards_that_tell_the_size_are_checked(
    tmp_path: Path, card: str, reason: str | None
) -> None:
    path = tmp_path / "a.fits"
    path.write_bytes(patched(plain(path), card[:8].strip(), card))
    start = time.monotonic()
    if reason is None:
        np.testing.assert_array_equal(fits_images.read_frame(path).data, IMAGE)
    else:
        with pytest.raises(FrameError, match=reason):
            fits_images.read_frame(path)
    assert time.monotonic() - start < 5


def test_a_large_image_is_refused_by_its_header(tmp_path: Path) -> None:
    """20000 x 20000 pixels, 1.6 GB: a file with a hole is enough."""
    path = tmp_path / "a.fits"
    header = fits.Header(
        [("SIMPLE", True), ("BITPIX", -32), ("NAXIS", 2), ("NAXIS1", 20000), ("NAXIS2", 20000)]
    )
    path.write_bytes(header.tostring().encode())
    os.truncate(path, 2880 + 4 * 20000**2 + 1280)
    refused(path, "1600004160 bytes, at most 536870912 are read")
    header["NAXIS1"], header["NAXIS2"], header["EXTNAME"] = 5000, 5000, "SCI"
    path.write_bytes(header.tostring().encode())
    os.truncate(path, 2880 + 4 * 5000**2)
    refused(path, "an image of 5000x5000 pixels, at most 16777216 are read")


@pytest.mark.parametrize(
    "card",
    [
        b"EXPTIME =             1402,937 / decimal comma",
        b"FILTER  = F153M              / not in quotes",
        b"TARGNAME= 'BARNARD'S STAR'",
        b"EXPTIME =                  nan",
        b"EXPTIME =                 1E400",
        b"EXPTIME =      (1.0, 2.0)",
        b"EXPTIME = " + b"9" * 70,
        b"TARGNAME= 'TERRE \xe9clair\xe9e'",
        b"EXPTIME =",
        b"EXPTIME = 'sixty'",
        b"\xff" * 80,
        b"EXPTIME = T",
    ],
)
def test_a_card_that_cannot_be_used_is_left_out(tmp_path: Path, card: bytes) -> None:
    """Only plain values leave the reader, whatever a header holds."""
    path = tmp_path / "a.fits"
    content = plain(
        path, EXPTIME=100.0, FILTER="F153M", TARGNAME="DARK-EARTH-CALIB", EXPSTART=56000.0
    )
    path.write_bytes(
        patched(content, card[:8].decode("latin1").strip() if card[0] < 128 else "EXPTIME", card)
    )
    frame = fits_images.read_frame(path)
    np.testing.assert_array_equal(frame.data, IMAGE)
    assert all(type(value) in (str, int, float, bool) for value in frame.header.values())
    assert all(np.isfinite(value) for value in frame.header.values() if not isinstance(value, str))
    assert all(
        value.isascii() and value.isprintable()
        for value in frame.header.values()
        if isinstance(value, str)
    )
    assert check.describe(path).fault == ""


def test_values_of_cards_are_those_that_astropy_reads(tmp_path: Path) -> None:
    cards = {
        "A": "it's", "B": -7, "C": 1.5e-7, "D": True, "E": False, "F": "", "G": "x" * 200, "H": 2**40, "I": -0.5
    }  # fmt: skip
    plain(tmp_path / "a.fits", **cards)
    header = fits_images.read_frame(tmp_path / "a.fits").header
    assert {name: header[name] for name in cards} == cards


@pytest.mark.parametrize("card", ["BSCALE  = 1,5", "BZERO   = 'x'", "BSCALE  ="])
def test_a_scale_that_cannot_be_read_is_no_scale_of_one(tmp_path: Path, card: str) -> None:
    path = tmp_path / "a.fits"
    path.write_bytes(patched(plain(path, BSCALES=2.0, OTHER=1), "OTHER", card))
    refused(path, f"its card {card[:8].strip()} is no number")


# --- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.inf, -np.inf, 1e38, -1e300, 1e13, np.nan])
@pytest.mark.parametrize("suffix", [".fits", ".fits.fz"])
def test_what_is_no_light_is_no_value(tmp_path: Path, suffix: str, value: float) -> None:
    """Infinite, or so large that its square is: NaN from the moment of reading, in every reader."""
    image = IMAGE.astype(np.float64)
    image[100:110, 50] = value
    path = tmp_path / f"a{suffix}"
    if suffix == ".fits.fz":
        packed = fits.CompImageHDU(image, name="SCI", compression_type="GZIP_1", quantize_level=0)
        fits.HDUList([fits.PrimaryHDU(), packed]).writeto(path)
    else:
        plain(path, image)
    wanted = IMAGE.copy()
    wanted[100:110, 50] = np.nan
    for found in (
        fits_images.read_frame(path).data,
        fits_images.read_plane(path, "SCI"),
        fits_images.find_plane(path, "sci"),
    ):
        np.testing.assert_array_equal(found, wanted)


def test_no_value_of_a_cube_is_infinite(tmp_path: Path) -> None:
    cube = np.full((3, 4, 5), np.inf, np.float32)
    cube[0] = 1
    fits.PrimaryHDU(cube).writeto(tmp_path / "a.fits")
    assert np.isnan(fits_images.read_cube(tmp_path / "a.fits")).sum() == 40


def test_a_constant_array_is_its_value(tmp_path: Path) -> None:
    """As HST's pipelines leave out a DQ without flags."""
    dq = fits.ImageHDU(name="DQ")
    dq.header.update({"NPIX1": 310, "NPIX2": 300, "PIXVALUE": 4})
    fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(IMAGE, name="SCI"), dq]).writeto(
        tmp_path / "a.fits"
    )
    np.testing.assert_array_equal(
        fits_images.read_plane(tmp_path / "a.fits", "DQ"), np.full(IMAGE.shape, 4, np.float32)
    )
    np.testing.assert_array_equal(fits_images.read_frame(tmp_path / "a.fits").data, IMAGE)


def test_the_empty_extension_of_a_primary_is_no_image(tmp_path: Path) -> None:
    fits.PrimaryHDU(header=fits.Header({"PIXVALUE": 3.0})).writeto(tmp_path / "a.fits")
    refused(tmp_path / "a.fits", "its card NPIX2 is missing")


# --- what is no file -------------------------------------------------------------------------------------------------


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """A pipe nobody writes to would keep us waiting for ever."""
    (tmp_path / "folder.fits").mkdir()
    os.mkfifo(tmp_path / "pipe.fits")
    (tmp_path / "device.fits").symlink_to("/dev/zero")
    (tmp_path / "loop.fits").symlink_to(tmp_path / "loop.fits")
    (tmp_path / "gone.fits").symlink_to(tmp_path / "nothing")
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(tmp_path)  # a socket's name is short
        try:
            listener.bind("socket.fits")
        finally:
            os.chdir(here)
        for name, reason in {
            "folder": "no regular file",
            "pipe": "no regular file",
            "device": "no regular file",
            "loop": r"cannot be read \(Too many levels of symbolic links\)",
            "gone": "not found",
            "socket": "cannot be read",
            "x" * 300: "cannot be read .File name too long",
        }.items():
            refused(tmp_path / f"{name}.fits", reason)


def test_a_file_of_another_user_is_that_files_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain(tmp_path / "a.fits")

    def deny(path: Path, *_: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", deny)
    refused(
        tmp_path / "a.fits",
        r"cannot be read \(Permission denied\), expected a FITS image|expected an image SCI",
    )


@pytest.mark.parametrize(
    "name", [b"day\xe9.fits", b"day\n1.fits", b"day\x1b[31m.fits", "tägɬich.fits".encode()]
)
def test_a_name_in_another_encoding_can_be_said_and_stored(tmp_path: Path, name: bytes) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    plain(path)
    frame = fits_images.read_frame(path)
    lines = [frame.name, str(check.describe(path))]
    path.write_bytes(b"nothing")
    with pytest.raises(FrameError) as caught:
        fits_images.read_frame(path)
    for line in (*lines, str(caught.value), str(check.describe(path))):
        assert line.isprintable()
        line.encode("utf-8")
