"""Tile-compressed images: what astropy (cfitsio) packs is unpacked to the same pixels, and damage never crashes."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits

from blobpipe.core import fits_images, hdus, unpack
from blobpipe.errors import FrameError

RNG = np.random.default_rng(7)
NOISE = RNG.normal(0, 0.01, (90, 70)).astype(np.float32)
COUNTS = RNG.normal(1000, 30, (90, 70)).astype(np.int32)


def packed(path: Path, data: np.ndarray, **how: Any) -> Path:
    """A file as astropy writes it, and what it reads from it."""
    fits.HDUList([fits.PrimaryHDU(), fits.CompImageHDU(data, name="SCI", **how)]).writeto(path)
    return path


@pytest.mark.parametrize("tile", [None, (16, 70), (90, 70), (32, 17), (5, 7)])
@pytest.mark.parametrize("method", [-1, 1, 2])
@pytest.mark.parametrize("algorithm", ["RICE_1", "GZIP_1", "GZIP_2"])
def test_quantized_floats_are_those_of_astropy(
    tmp_path: Path, algorithm: str, method: int, tile: Any
) -> None:
    """To the last bit without dither; with it cfitsio rounds in another order."""
    image = NOISE.copy()
    image[3, 4:9], image[40, 7] = np.nan, 0.0
    how = {
        "compression_type": algorithm,
        "quantize_method": method,
        "tile_shape": tile,
        "dither_seed": 9999,
    }
    path = packed(tmp_path / "a.fits.fz", image, **how)
    wanted = fits.getdata(path, "SCI")
    np.testing.assert_allclose(
        fits_images.read_frame(path).data, wanted, rtol=0 if method < 0 else 1e-6, atol=0
    )


@pytest.mark.parametrize("algorithm", ["GZIP_1", "GZIP_2", "NOCOMPRESS"])
@pytest.mark.parametrize("kind", ["f4", "f8"])
def test_floats_without_loss_are_kept(tmp_path: Path, algorithm: str, kind: str) -> None:
    path = packed(
        tmp_path / "a.fits.fz", NOISE.astype(kind), compression_type=algorithm, quantize_level=0
    )
    np.testing.assert_array_equal(fits_images.read_frame(path).data, NOISE)


@pytest.mark.parametrize("algorithm", ["RICE_1", "GZIP_1", "GZIP_2", "NOCOMPRESS"])
@pytest.mark.parametrize("kind", ["u1", "i2", "u2", "i4"])
def test_integers_are_those_that_were_packed(tmp_path: Path, algorithm: str, kind: str) -> None:
    """Noise, steps from the lowest to the highest number, and runs without change: every branch of the code."""
    low = np.iinfo(kind).min
    high = np.iinfo(kind).max
    image = (COUNTS % min(high, 3000)).astype(kind)
    image[10:30:2], image[11:30:2], image[60:] = low, high, 5
    image[40:50] = RNG.integers(low, high, (10, 70), dtype=kind)
    path = packed(tmp_path / "a.fits.fz", image, compression_type=algorithm)
    np.testing.assert_array_equal(fits_images.read_frame(path).data, image.astype(np.float32))


def test_plane_0_of_a_cube_is_unpacked(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.fits.fz", np.stack([COUNTS, COUNTS + 1]), compression_type="RICE_1")
    np.testing.assert_array_equal(fits_images.read_frame(path).data, COUNTS)


def test_missing_integers_become_nan(tmp_path: Path) -> None:
    """BLANK of the image that was packed, as funpack has it."""
    path = packed(tmp_path / "a.fits.fz", COUNTS, compression_type="RICE_1")
    with fits.open(path, mode="update", disable_image_compression=True) as written:
        written[1].header["BLANK"] = int(COUNTS[4, 5])
    np.testing.assert_array_equal(
        np.isnan(fits_images.read_frame(path).data), COUNTS[4, 5] == COUNTS
    )


@pytest.mark.parametrize("algorithm", ["PLIO_1", "HCOMPRESS_1"])
def test_what_is_not_unpacked_is_said_with_the_way_out(tmp_path: Path, algorithm: str) -> None:
    path = packed(tmp_path / "a.fits.fz", COUNTS, compression_type=algorithm)
    with pytest.raises(FrameError, match=f"compressed by '{algorithm}' instead of RICE_1.*funpack"):
        fits_images.read_frame(path)


def patched(path: Path, **cards: Any) -> Path:
    """The same file with other cards in the table's header, as a damaged or lying one has them."""
    content = bytearray(path.read_bytes())
    for name, value in cards.items():
        place = content.index(f"{name:8}=".encode())
        text = f"'{value}'" if isinstance(value, str) else str(value)
        content[place : place + 80] = f"{name:8}= {text:>20}".ljust(80).encode()
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("cards", "reason"),
    [
        # kills the process in cfitsio's code
        ({"ZVAL2": -1}, "RICE_1 with BLOCKSIZE 32 and BYTEPIX -1"),
        ({"ZVAL2": 8}, "BYTEPIX 8"),
        ({"ZVAL1": 0}, "BLOCKSIZE 0"),
        ({"ZVAL1": 2**31 - 1}, "no 1120 pixels compressed by RICE_1"),
        ({"ZVAL1": "x"}, "its card ZVAL1 is no whole number"),
        ({"ZNAXIS1": 71}, "compressed by RICE_1|tiles"),
        ({"ZNAXIS2": 900}, "tiles in 6 rows"),
        ({"ZNAXIS": 1}, "an array of shape"),
        ({"ZNAXIS": 2_000_000_000}, "its card ZNAXIS is 2000000000"),
        ({"ZNAXIS1": 2_000_000_000}, "2000000000x90 pixels, at most"),
        ({"ZTILE1": 0}, "tiles of 0x16"),
        ({"ZTILE2": -16}, "its card ZTILE2 is -16"),
        ({"ZTILE2": 15}, "tiles|compressed by RICE_1"),
        ({"ZBITPIX": 7}, "its card ZBITPIX is 7"),
        ({"ZBITPIX": -64, "ZCMPTYPE": "GZIP_1"}, "decompressing|header check"),
        ({"ZCMPTYPE": "LZMA"}, "compressed by 'LZMA'"),
        ({"ZCMPTYPE": 7}, "compressed by 7"),
        ({"TFORM1": "1PB"}, None),
        ({"TFORM1": "1PJ(900)"}, "column COMPRESSED_DATA has the format"),
        ({"TFORM1": "1QB(900)"}, "columns of 40 bytes in rows of 32"),
        ({"TFORM1": "8X"}, "its card TFORM1 is '8X'"),
        ({"TFORM3": "2E"}, "column ZSCALE has the format '2E'"),
        ({"TTYPE3": "OTHER"}, "without a scale"),
        ({"TTYPE1": "OTHER"}, "without the column COMPRESSED_DATA"),
        ({"TFIELDS": 2_000_000_000}, "its card TFIELDS is 2000000000"),
        ({"NAXIS1": 33}, "truncated|columns|behind HDU|no HDU"),
        ({"NAXIS2": 5}, "tiles in 5 rows|no HDU"),
        ({"PCOUNT": 5}, "outside of the heap of 5 bytes|no HDU"),
        ({"PCOUNT": -5}, "its card PCOUNT is -5"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_table_that_does_not_fit_together_is_refused(
    tmp_path: Path, cards: dict[str, Any], reason: str | None
) -> None:
    path = packed(tmp_path / "a.fits.fz", NOISE, compression_type="RICE_1", tile_shape=(16, 70))
    before = fits_images.read_frame(path).data
    patched(path, **cards)
    if reason is None:
        np.testing.assert_array_equal(fits_images.read_frame(path).data, before)
        return
    with pytest.raises(FrameError, match=reason) as caught:
        fits_images.read_frame(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("field", "value"), [(0, 2**30), (4, 2**30), (0, -1), (4, -1)])
def test_a_descriptor_outside_of_the_heap_is_refused(
    tmp_path: Path, field: int, value: int
) -> None:
    path = packed(tmp_path / "a.fits.fz", NOISE, compression_type="RICE_1", tile_shape=(16, 70))
    with hdus.opened(path, "") as file:
        start = file.hdus[1].start + 2 * 32 + field
    content = bytearray(path.read_bytes())
    content[start : start + 4] = value.to_bytes(4, "big", signed=True)
    path.write_bytes(content)
    with pytest.raises(FrameError, match="tile 2 lies outside of the heap"):
        fits_images.read_frame(path)


@pytest.mark.parametrize("value", [1e300, -1e300, np.inf, np.nan])
@pytest.mark.parametrize("column", [16, 24])
def test_a_scale_beyond_all_sense_gives_no_values(
    tmp_path: Path, column: int, value: float
) -> None:
    path = packed(tmp_path / "a.fits.fz", NOISE, compression_type="RICE_1", tile_shape=(16, 70))
    with hdus.opened(path, "") as file:
        start = file.hdus[1].start + 2 * 32 + column
    content = bytearray(path.read_bytes())
    content[start : start + 8] = np.array(value, ">f8").tobytes()
    path.write_bytes(content)
    data = fits_images.read_frame(path).data
    assert np.isnan(data[32:48]).sum() > 0.99 * data[32:48].size
    assert np.isfinite(data[:32]).all()


@pytest.mark.parametrize("pixel_bytes", unpack.RICE_BITS)
def test_any_bytes_are_pixels_or_an_error(pixel_bytes: int) -> None:
    """Zeros, which have no end for a reader that counts them; ones; noise; a good tile that is cut, changed, longer."""
    rng = np.random.default_rng(pixel_bytes)
    good = unpack_input(COUNTS.ravel()[:500] % 200, pixel_bytes)
    inputs = [np.zeros(n, np.uint8) for n in (0, 1, 5, 5000)] + [np.full(300, 255, np.uint8)]
    inputs += [rng.integers(0, 256, n).astype(np.uint8) for n in range(200)]
    inputs += [good[:n] for n in range(len(good))] + [np.append(good, np.uint8(0))]
    refused = 0
    for content in inputs:
        try:
            unpack._rice_pixels(content, 500, 32, pixel_bytes)
        except ValueError as error:
            assert "500 pixels" in str(error)  # noqa: PT017
            refused += 1
    assert refused == len(inputs)
    assert len(unpack._rice_pixels(good, 500, 32, pixel_bytes)) == 500


def unpack_input(values: np.ndarray, pixel_bytes: int) -> np.ndarray:
    """A tile as cfitsio packs it."""
    kind = {1: "u1", 2: "i2", 4: "i4"}[pixel_bytes]
    hdu = fits.CompImageHDU(
        values.astype(kind)[None], compression_type="RICE_1", tile_shape=(1, len(values))
    )
    stream = BytesIO()
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(stream)
    file = hdus.File(stream, len(stream.getvalue()))
    table = file.content(file.hdus[1])
    length = int.from_bytes(table[:4].tobytes(), "big")
    heap = int(file.hdus[1].cards["NAXIS1"])
    return table[heap : heap + length]
