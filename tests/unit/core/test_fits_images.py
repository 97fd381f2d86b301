"""FITS images: every layout is read, what is not usable is refused, and what is written is the same bytes."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from blobpipe.core import files, fits_images
from blobpipe.errors import FrameError

IMAGE = np.random.default_rng(1).normal(0, 0.01, (300, 310)).astype(np.float32)


def _hdus(*images: fits.ImageHDU) -> fits.HDUList:
    primary = fits.PrimaryHDU()
    primary.header["TARGNAME"] = "DARK-EARTH-CALIB"
    return fits.HDUList([primary, *images])


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


def _usable(tmp_path: Path, data: np.ndarray) -> None:
    fits.PrimaryHDU(data.astype(np.float32)).writeto(tmp_path / "a.fits")
    fits_images.read_image(tmp_path / "a.fits")


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


def test_a_truncated_gzip_and_garbage_behind_a_good_header(tmp_path: Path) -> None:
    fits.PrimaryHDU(IMAGE).writeto(tmp_path / "a.fits")
    whole = gzip.compress((tmp_path / "a.fits").read_bytes())
    (tmp_path / "b.fits.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FrameError, match=r"b\.fits\.gz"):
        fits_images.read_frame(tmp_path / "b.fits.gz")
