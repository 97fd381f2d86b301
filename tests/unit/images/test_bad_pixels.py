"""Bad pixels: masks, tables and DQ mean the same pixels, and what is none of these is refused in one line."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits

from blobpipe.core import files, fits_images
from blobpipe.core.detector import DEFAULT
from blobpipe.errors import BlobpipeError, FrameError, TableError
from blobpipe.images.bad_pixels import BadPixels, read_bad_pixels, read_mask
from blobpipe.params import BadPixels as Settings

REAL_MAP = "wfc3ir_badpix_spars200_22.03.31.fits.gz"


def small_mask() -> np.ndarray:
    """Three bad pixels of the 1014 frame, the first and the last among them."""
    mask = np.zeros((1014, 1014), np.uint8)
    mask[[0, 300, 1013], [0, 200, 1013]] = 1
    return mask


def bad_places(mask: np.ndarray) -> list[tuple[int, int]]:
    """x, y of the bad pixels."""
    return [(int(x), int(y)) for y, x in np.argwhere(mask)]


EXPECTED = [(5, 5), (205, 305), (1018, 1018)]


def write_table(path: Path, rows: list[tuple[int, int, int, int, int]], name: str = "BPIX") -> Path:
    """A bad-pixel table: PIX1, PIX2, LENGTH, AXIS, VALUE."""
    names = ("PIX1", "PIX2", "LENGTH", "AXIS", "VALUE")
    columns = [
        fits.Column(column, "I", array=[row[i] for row in rows]) for i, column in enumerate(names)
    ]
    hdus = [fits.PrimaryHDU(), fits.BinTableHDU.from_columns(columns, name=name)]
    fits.HDUList(hdus).writeto(path)
    return path


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".fits", ".fits.gz"])
@pytest.mark.parametrize("dtype", ["u1", "i2", "i8", "f4", ">f8"])
def test_a_mask_of_1014_pixels_gets_the_border(tmp_path: Path, suffix: str, dtype: str) -> None:
    path = tmp_path / f"mask{suffix}"
    fits.PrimaryHDU((small_mask() * 16).astype(dtype)).writeto(path)
    mask = read_mask(path)
    assert mask.shape == (1024, 1024)
    assert mask.dtype == bool
    assert bad_places(mask) == EXPECTED


def test_a_packed_mask_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mask.fits.fz"
    fits_images.write_image(path, small_mask().astype("i2"), name="MASK")
    assert bad_places(read_mask(path)) == EXPECTED


def test_a_mask_of_1024_pixels_is_taken_as_it_is(tmp_path: Path) -> None:
    data = np.zeros((1024, 1024), np.int16)
    data[3, 900] = -1
    data[40, 50] = 512  # any value but 0 is bad in a mask
    path = tmp_path / "mask.fits"
    fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(data, name="MASK")]).writeto(path)
    assert bad_places(read_mask(path)) == [(900, 3), (50, 40)]


def test_runs_of_a_table_lie_along_x_or_y_and_only_flags_that_count_are_bad(tmp_path: Path) -> None:
    rows = [
        (1, 1, 3, 1, 4),  # along x
        (10, 20, 2, 2, 16),  # along y
        (500, 500, 9, 1, 512),  # a blob
        (700, 800, 1, 1, 512 + 32),  # an unstable pixel on a blob
        (1014, 1014, 5, 1, 4),  # its end lies off the image
        (-3, 7, 1, 1, 4),  # on the reference pixels
    ]
    path = write_table(tmp_path / "bpx.fits", rows)
    expected = {(5, 5), (6, 5), (7, 5), (14, 24), (14, 25), (704, 804), (1, 11)}
    expected |= {(x, 1018) for x in range(1018, 1023)}
    assert set(bad_places(read_mask(path))) == expected
    assert read_mask(path, DEFAULT.exposure.bad_dq | 512).sum() == len(expected) + 9
    assert set(bad_places(read_mask(path, 16))) == {(14, 24), (14, 25)}


def test_of_an_exposure_the_dq_is_taken(tmp_path: Path) -> None:
    dq = small_mask().astype(np.int16) * 4
    dq[100, 100] = 512
    dq[101, 101] = 2048
    science = np.ones((1014, 1014), np.float32)
    hdus = [fits.PrimaryHDU(), fits.ImageHDU(science, name="SCI"), fits.ImageHDU(dq, name="DQ")]
    fits.HDUList(hdus).writeto(tmp_path / "a_flt.fits")
    assert bad_places(read_mask(tmp_path / "a_flt.fits")) == EXPECTED


def test_several_files_are_combined_and_counted(tmp_path: Path) -> None:
    fits.PrimaryHDU(small_mask()).writeto(tmp_path / "mask.fits")
    table = write_table(tmp_path / "bpx.fits", [(201, 301, 2, 1, 4)])
    settings = Settings(files=(str(tmp_path / "mask.fits"),))
    found = read_bad_pixels(settings, [table, tmp_path / "mask.fits"])
    assert found.mask is not None
    assert bad_places(found.mask) == [(5, 5), (205, 305), (206, 305), (1018, 1018)]
    assert [(file.path.name, file.n_px) for file in found.files] == [
        ("mask.fits", 3),
        ("bpx.fits", 2),
    ]
    assert found.files[1].sha256 == files.sha256(table)
    assert found.count() == 4
    assert found.key == f"62911 {files.sha256(tmp_path / 'mask.fits')} {files.sha256(table)}"
    assert found.as_rows()[0] == {
        "file": str(tmp_path / "mask.fits"),
        "n_px": 3,
        "sha256": found.files[0].sha256,
    }


def test_without_files_nothing_is_bad() -> None:
    found = read_bad_pixels(Settings())
    assert (found.mask, found.files, found.count(), found.cards()) == (None, (), 0, {})


def test_flags_of_known_blobs_are_not_among_the_defaults() -> None:
    assert [bit for bit in range(16) if not DEFAULT.exposure.bad_dq & (1 << bit)] == [6, 9, 11]
    assert BadPixels().dq_flags == DEFAULT.exposure.bad_dq


@pytest.mark.skipif("BLOBPIPE_REAL" not in os.environ, reason="real pixels are not kept here")
def test_the_real_map_is_read() -> None:
    real = Path(os.environ["BLOBPIPE_REAL"])
    mask = read_mask(real / REAL_MAP)
    assert mask.sum() == 20_438
    with gzip.open(real / REAL_MAP) as file:
        data = fits.getdata(file)
    np.testing.assert_array_equal(mask[5:-5, 5:-5], data != 0)


# --- what is refused -------------------------------------------------------------------------------------------------


ONES = np.ones((1014, 1014), np.uint8)
NOISE = np.random.default_rng(1).normal(0, 1, ONES.shape)
ONE_COLUMN = [fits.Column("PIX1", "I", array=[1])]


def cut_off(path: Path) -> None:
    fits.PrimaryHDU(ONES).writeto(path)
    path.write_bytes(path.read_bytes()[:9999])


def behind_primary(path: Path, hdu: Any) -> None:
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(path)


WRONG: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "text": lambda path: path.write_text("x y\n3 4\n"),
    "folder": lambda path: path.mkdir(),
    "cut off": cut_off,
    "another size": lambda path: fits.PrimaryHDU(ONES[:512, :512]).writeto(path),
    "a cube": lambda path: fits.PrimaryHDU(np.stack([ONES, ONES])).writeto(path),
    "all bad": lambda path: fits.PrimaryHDU(ONES).writeto(path),
    "an image": lambda path: fits.PrimaryHDU(NOISE).writeto(path),
    "nothing": lambda path: fits.PrimaryHDU().writeto(path),
    "no BPIX": lambda path: behind_primary(path, fits.BinTableHDU.from_columns(ONE_COLUMN)),
    "DQ of a subarray": lambda path: behind_primary(
        path, fits.ImageHDU(ONES[:266, :266].astype(np.int16), name="DQ")
    ),
    "DQ of fractions": lambda path: behind_primary(path, fits.ImageHDU(ONES * 0.5, name="DQ")),
    "axis 3": lambda path: write_table(path, [(1, 1, 1, 3, 4)]),
    "length 0": lambda path: write_table(path, [(1, 1, 0, 1, 4)]),
}


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("missing", "not found, expected a bad-pixel mask or table"),
        ("text", "not a whole FITS file .*; expected a bad-pixel mask or table"),
        ("folder", "no regular file .*; expected a bad-pixel mask or table"),
        ("cut off", "truncated, 9999 bytes found, .* expected; expected a bad-pixel mask"),
        ("another size", "found an image of 512x512 pixels, expected 1014x1014 or 1024x1024; name"),
        ("a cube", "found an image of 1014x1014x2 pixels, expected 1014x1014 or 1024x1024; name"),
        ("all bad", "98% of its pixels are bad, expected at most 50%: .*; name a mask"),
        ("an image", "98% of its pixels are bad, expected at most 50%: .*; name a mask"),
        ("no BPIX", r"found no bad pixels \(PRIMARY PRIMARY, BINTABLE\); expected an image"),
        ("nothing", r"found no bad pixels \(PRIMARY PRIMARY\); expected an image .*PIX1, PIX2"),
        ("DQ of a subarray", "found its DQ of 266x266 pixels, expected 1014x1014 or 1024x1024"),
        ("DQ of fractions", "a DQ that does not hold integers; expected a bad-pixel mask"),
        ("axis 3", "row 1: AXIS is 3, expected 1 or 2; correct it"),
        ("length 0", "row 1: LENGTH is 0, expected 1 to 1024; correct it"),
    ],
)
def test_what_holds_no_bad_pixels_is_refused_in_one_line(
    tmp_path: Path, kind: str, line: str
) -> None:
    path = tmp_path / "mask.fits"
    WRONG[kind](path)
    with pytest.raises((FrameError, TableError), match=line) as caught:
        read_bad_pixels(Settings(), [path])
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_any_damage_of_a_table_is_one_line(tmp_path: Path) -> None:
    """Bytes of its header changed at random: it is read, or refused with an error of ours."""
    path = write_table(tmp_path / "bpx.fits", [(1, 1, 3, 1, 4), (10, 20, 2, 2, 16)])
    content = path.read_bytes()
    rng = np.random.default_rng(3)
    refused = 0
    for _ in range(60):
        damaged = bytearray(content)
        for place in rng.integers(2880, 2880 * 2, 3):
            damaged[place] = rng.choice(np.frombuffer(b"9 -'\0=A", np.uint8))
        path.write_bytes(damaged)
        try:
            read_mask(path)
        except BlobpipeError:
            refused += 1
    assert 5 < refused < 60


# --- images without their bad pixels ---------------------------------------------------------------------------------


def frame_of(data: np.ndarray, dq: np.ndarray | None = None) -> fits_images.Frame:
    return fits_images.Frame("a", data.astype(np.float32), {}, "HDU 0", dq)


def test_bad_pixels_and_flagged_ones_have_no_value(tmp_path: Path) -> None:
    fits.PrimaryHDU(small_mask()).writeto(tmp_path / "mask.fits")
    bad = read_bad_pixels(Settings(), [tmp_path / "mask.fits"])
    data = np.ones((1024, 1024), np.float32)
    dq = np.zeros((1024, 1024), np.int64)
    dq[30, 40] = 4
    dq[31, 41] = 512 | 64 | 2048
    dq[305, 205] = 16  # in the mask too
    frame = frame_of(data, dq)
    blank = bad.blank(frame, "a.fits")
    assert bad_places(np.isnan(blank.data)) == [(5, 5), (40, 30), (205, 305), (1018, 1018)]
    assert np.isfinite(data).all()  # the image itself is left alone
    assert bad.count(frame) == 4
    assert bad.cards(frame) == {
        "BPXFIL1": "mask.fits",
        "BPXNUM1": 3,
        "BPXSHA1": files.sha256(tmp_path / "mask.fits"),
        "BPXFLAGS": 62911,
        "BPXCOUNT": 4,
    }
    assert bad.cards(frame_of(data))["BPXCOUNT"] == 3
    assert bad.blank_files(frame, "a.fits").data[30, 40] == 1


def test_an_image_of_another_size_than_the_mask_is_refused(tmp_path: Path) -> None:
    fits.PrimaryHDU(small_mask()).writeto(tmp_path / "mask.fits")
    bad = read_bad_pixels(Settings(), [tmp_path / "mask.fits"])
    with pytest.raises(
        FrameError, match=r"^a\.fits: found 512x512 pixels, expected 1024x1024 as the bad-pixel"
    ):
        bad.blank(frame_of(np.ones((512, 512))), "a.fits")


def test_the_dq_of_a_file_is_read_with_its_image(tmp_path: Path) -> None:
    dq = np.zeros((1014, 1014), np.int16)
    dq[1, 2] = 16384
    hdus = [fits.PrimaryHDU(), fits.ImageHDU(np.ones((1014, 1014), np.float32), name="SCI")]
    fits.HDUList([*hdus, fits.ImageHDU(dq, name="DQ")]).writeto(tmp_path / "a.fits")
    frame = fits_images.read_frame(tmp_path / "a.fits")
    assert frame.dq is not None
    assert frame.dq.shape == (1024, 1024)
    assert bad_places(frame.dq == 16384) == [(7, 6)]
    assert bad_places(np.isnan(BadPixels().blank(frame, "a").data[5:-5, 5:-5])) == [(2, 1)]
    fits.HDUList(hdus).writeto(tmp_path / "b.fits")
    assert fits_images.read_frame(tmp_path / "b.fits").dq is None
    fits.HDUList([*hdus, fits.ImageHDU(dq[1:], name="DQ")]).writeto(tmp_path / "c.fits")
    with pytest.raises(FrameError, match=r"c\.fits: DQ has the shape \(1013, 1014\), expected"):
        fits_images.read_frame(tmp_path / "c.fits")


def test_cells_of_an_rms_map_that_hold_a_bad_pixel_are_not_known(tmp_path: Path) -> None:
    fits.PrimaryHDU(small_mask()).writeto(tmp_path / "mask.fits")
    bad = read_bad_pixels(Settings(), [tmp_path / "mask.fits"])
    rms = bad.blank_cells(np.ones((512, 512), np.float32))
    assert rms is not None
    assert bad_places(rms == 0) == [(2, 2), (102, 152), (509, 509)]
    assert bad.blank_cells(None) is None
    assert BadPixels().blank_cells(rms) is rms
