"""Damaged FITS files, plain, in gzip and tile-compressed: the right image, or one line; by hand: see `runner`.

Where a checksum guards the bytes (a gzip stream, CHECKSUM), other pixels than those written are a fault; elsewhere only
where no byte of header or data was touched that tells them.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from astropy.io import fits

from blobpipe.core import fits_images
from blobpipe.core.dates import exposure_mjd
from blobpipe.errors import FrameError
from blobpipe.images import check
from tests.fuzz import runner

SIDE = (70, 90)
VALUES = (
    0,
    1,
    -1,
    2,
    7,
    8,
    16,
    255,
    999,
    1000,
    2**15,
    2**31 - 1,
    2**31,
    2_000_000_000,
    -(2**63),
    2**63,
    10**30,
)
TEXTS = (
    "T",
    "F",
    "'x'",
    "''",
    "'RICE_1'",
    "'GZIP_2'",
    "'HCOMPRESS_1'",
    "'1QB(9)'",
    "1,5",
    "nan",
    "(1, 2)",
    "1E400",
    "",
)
FLOATS = (np.inf, -np.inf, np.nan, 1e38, -1e300, 1e13, 0.0, 5e-324)


class Good(NamedTuple):
    """A file without damage, and the image in it."""

    content: bytes
    suffix: str
    image: np.ndarray
    guarded: bool  # by the sum of a gzip stream
    sums: tuple[bytes, ...] = ()  # cards with checksums of the image's HDU


@functools.cache
def good_files() -> tuple[Good, ...]:
    """One of each kind that is read."""
    rng = np.random.default_rng(20)
    image = rng.normal(0, 0.01, SIDE).astype(np.float32)
    image[5, 5:9] = np.nan
    counts = rng.integers(0, 30_000, SIDE).astype(np.int16)
    dq = fits.ImageHDU((counts % 3).astype(np.int16), name="DQ")
    cards = fits.Header({"EXPSTART": 56000.5, "FILTER": "F153M", "TARGNAME": "DARK-EARTH-CALIB"})
    plain = [fits.ImageHDU(image, cards, name="SCI"), dq]
    float64 = [fits.ImageHDU(image.astype(np.float64), cards, name="SCI")]
    scaled = fits.ImageHDU(counts, cards, name="SCI")
    scaled.header["BZERO"] = 5
    found = [
        _file(plain, ".fits", image),
        _file(float64, ".fits", image),
        _file([scaled], ".fits", counts + np.float32(5)),
    ]
    found.append(_file(plain[:1], ".fits", image, checksum=True))
    found += [
        good._replace(
            content=gzip.compress(good.content, 1, mtime=0), suffix=".fits.gz", guarded=True
        )
        for good in found[:2]
    ]
    for how in ({"compression_type": name} for name in ("RICE_1", "GZIP_1", "GZIP_2")):
        found.append(
            _file(
                [fits.CompImageHDU(image, cards, name="SCI", tile_shape=(16, 90), **how)],
                ".fits.fz",
                None,
            )
        )
        found.append(_file([fits.CompImageHDU(counts, cards, name="SCI", **how)], ".fits.fz", None))
    whole = fits.CompImageHDU(
        image, cards, name="SCI", quantize_level=0, compression_type="GZIP_1", tile_shape=SIDE
    )
    found.append(_file([whole], ".fits.fz", None))
    found.append(
        _file(
            [fits.CompImageHDU(image, cards, name="SCI", tile_shape=SIDE)],
            ".fits.fz",
            None,
            checksum=True,
        )
    )
    return tuple(found)


def _file(
    hdus: list[fits.ImageHDU], suffix: str, image: np.ndarray | None, *, checksum: bool = False
) -> Good:
    stream = io.BytesIO()
    fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto(stream, checksum=checksum)
    content = stream.getvalue()
    if image is None:  # what another reader finds in it
        image = np.array(fits.getdata(io.BytesIO(content), "SCI"), np.float32)
    places = [content.rindex(name) for name in (b"CHECKSUM=", b"DATASUM =")] if checksum else []
    return Good(
        content, suffix, image, False, tuple(content[place : place + 80] for place in places)
    )


# --- mutations: bytes in, bytes out; whether sizes, scales or pixels may have changed is up to the oracle -------------


def flips(rng: np.random.Generator, content: bytearray) -> None:
    """Some bits anywhere."""
    for place in rng.integers(0, len(content), rng.integers(1, 9)):
        content[place] ^= 1 << int(rng.integers(8))


def cut(rng: np.random.Generator, content: bytearray) -> None:
    """The end is missing, by a few bytes or by many."""
    del content[-int(rng.choice([rng.integers(1, 10), rng.integers(1, len(content))])) :]


def longer(rng: np.random.Generator, content: bytearray) -> None:
    """Something follows."""
    n = int(rng.choice([1, 9, 512, 2880, 5760]))
    content += bytes(n) if rng.random() < 0.5 else rng.bytes(n)


def card(rng: np.random.Generator, content: bytearray) -> None:
    """Another value in a card, mostly one that tells the structure."""
    for _ in range(rng.integers(1, 4)):
        header = [
            place
            for place in range(0, len(content), 80)
            if content[place + 8 : place + 10] == b"= "
        ]
        if not header:
            return
        place = int(rng.choice(header))
        if rng.random() < 0.5:
            value = str(VALUES[rng.integers(len(VALUES))])
        elif rng.random() < 0.7:
            value = TEXTS[rng.integers(len(TEXTS))]
        else:  # near what it was: the lie that is hardest to tell
            digits = [k for k in range(place + 10, place + 30) if 48 <= content[k] < 58]
            if digits:
                content[rng.choice(digits)] = 48 + int(rng.integers(10))
            continue
        content[place + 10 : place + 80] = value.rjust(20).ljust(70).encode()[:70]


def keyword(rng: np.random.Generator, content: bytearray) -> None:
    """A card is gone, or twice there, or of another name."""
    header = [
        place
        for place in range(0, len(content) - 160, 80)
        if content[place + 8 : place + 10] == b"= "
    ]
    if header:
        place, other = (int(each) for each in rng.choice(header, 2))
        content[place : place + 80] = (
            content[other : other + 80] if rng.random() < 0.5 else rng.bytes(80)
        )


def shuffle(rng: np.random.Generator, content: bytearray) -> None:
    """Two blocks changed places, or one is there twice, or gone."""
    n = max(1, len(content) // 2880)
    first, second = (2880 * int(each) for each in rng.integers(0, n, 2))
    block = content[first : first + 2880]
    other = content[second : second + 2880]
    match rng.integers(3):
        case 0 if len(block) == len(other):
            content[first : first + 2880], content[second : second + 2880] = other, block
        case 1:
            content[first:first] = other
        case _:
            del content[first : first + 2880]


def poison(rng: np.random.Generator, content: bytearray) -> None:
    """Numbers that are none, or beyond all sense, over what is there."""
    for place in rng.integers(0, len(content) // 8, rng.integers(1, 40)):
        kind = ">f4" if rng.random() < 0.5 else ">f8"
        with np.errstate(all="ignore"):
            number = np.array(FLOATS[rng.integers(len(FLOATS))]).astype(kind).tobytes()
        content[8 * place : 8 * place + len(number)] = number


def zeros(rng: np.random.Generator, content: bytearray) -> None:
    """A run of one byte: what a disk gives back for a sector that it lost."""
    start = int(rng.integers(0, len(content)))
    n = int(rng.choice([1, 64, 512, 4096]))
    n = len(content[start : start + n])
    content[start : start + n] = bytes([int(rng.choice([0, 255, 32]))]) * n


MUTATIONS: tuple[Callable[[np.random.Generator, bytearray], None], ...] = (
    *(flips, cut, longer, card, card, keyword, shuffle, poison, zeros),
)

SUMMED = {"flips", "poison", "zeros"}  # what changes a sum; the order of words does not


def case(seed: int, folder: Path) -> str:
    """Damage a file in one to three ways, in or around its compression, and let every reader try it."""
    rng = np.random.default_rng([18, seed])
    good = good_files()[rng.integers(len(good_files()))]
    packed = good.suffix == ".fits.gz"
    inside = packed and rng.random() < 0.4  # a whole gzip stream of a damaged file guards nothing
    content = bytearray(gzip.decompress(good.content) if inside else good.content)
    done = []
    for _ in range(rng.integers(1, 4)):
        mutate = MUTATIONS[rng.integers(len(MUTATIONS))]
        mutate(rng, content)
        done.append(mutate.__name__)
        if len(content) < 100:
            break
    path = folder / f"a{good.suffix if rng.random() < 0.9 else '.fits'}"
    path.write_bytes(gzip.compress(content, 1, mtime=0) if inside else content)
    outcomes = [_read(path, read) for read in (fits_images.read_frame, _science, _dq)]
    description = str(check.describe(path))
    assert "\n" not in description, description
    image = outcomes[0]
    if image is None:
        return f"{good.suffix}: refused"
    same = image.shape == good.image.shape and np.array_equal(image, good.image, equal_nan=True)
    if not same:
        summed = (
            good.sums
            and not inside
            and all(each in content for each in good.sums)
            and set(done) <= SUMMED
        )
        assert not summed, f"wrong pixels behind CHECKSUM, after {done}"
        assert inside or not good.guarded, f"wrong pixels in a whole gzip stream, after {done}"
        assert set(done) != {"longer"}, f"wrong pixels after {done}"
    return f"{good.suffix}: {'read' if same else 'read, other pixels'}"


def _science(path: Path) -> np.ndarray:
    return fits_images.read_plane(path, "SCI")


def _dq(path: Path) -> np.ndarray | None:
    return fits_images.find_plane(path, "DQ")


def _read(path: Path, read: Callable[[Path], object]) -> np.ndarray | None:
    """The pixels, or None for a line that says why not."""
    try:
        found = read(path)
    except FrameError as error:
        text = str(error)
        assert text.startswith(f"{path}: "), text
        assert "\n" not in text, text
        assert len(text) < 1000, text
        cause: BaseException | None = error
        while cause is not None:
            assert not isinstance(cause, (MemoryError, RecursionError)), repr(cause)
            cause = cause.__cause__ or cause.__context__
        return None
    if isinstance(found, fits_images.Frame):
        with contextlib.suppress(FrameError):
            exposure_mjd(found, path)
        with contextlib.suppress(FrameError):
            fits_images.require_usable(found, path)
        assert all(type(value) in (str, int, float, bool) for value in found.header.values()), (
            found.header
        )
        found = found.data
    if isinstance(found, np.ndarray):
        assert found.dtype == np.float32
        assert found.ndim == 2
        assert found.flags.c_contiguous
        assert not np.isinf(found).any()
        assert not (np.abs(found) > 1e12).any()
        return found
    return None


if __name__ == "__main__":
    good_files()
    runner.main(case)
