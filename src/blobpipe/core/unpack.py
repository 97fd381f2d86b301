"""Tile-compressed FITS images into pixels (FITS 4.0, section 10).

Unpacked here and not by a C library, because no byte of a damaged file may end the process: every descriptor is checked
against the heap, every read against the end of its tile.
"""

from __future__ import annotations

import math
import re
import zlib
from functools import lru_cache
from typing import Any, NamedTuple

import numba as nb
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from blobpipe.core.hdus import TYPES, Cards, count, number

Pixels = npt.NDArray[Any]

MAX_TILES = 1 << 15  # of an image: 4096 x 4096 pixels in tiles of 32 x 32 are half as many
# bytes
WIDTHS = {
    "L": 1,
    "B": 1,
    "I": 2,
    "J": 4,
    "K": 8,
    "A": 1,
    "E": 4,
    "D": 8,
    "C": 8,
    "M": 16,
    "P": 8,
    "Q": 16,
}
# BYTEPIX: bits of a pixel, of a code, the raw block's code
RICE_BITS = {1: (8, 3, 6), 2: (16, 4, 14), 4: (32, 5, 25)}
DITHERS = {"NO_DITHER": 0, "NONE": 0, "SUBTRACTIVE_DITHER_1": 1, "SUBTRACTIVE_DITHER_2": 2}
N_RANDOM = 10_000  # numbers of the standard's own generator, appendix I
DITHERED_ZERO = -2147483646  # stands for 0.0 with the second method


class Column(NamedTuple):
    """Where a column of the table starts in each row, and its format."""

    start: int
    form: str


def first_plane(cards: Cards, shape: tuple[int, ...], content: npt.NDArray[np.uint8]) -> Pixels:
    """Unpack an image, or plane 0 of a cube.

    Parameters
    ----------
    cards : mapping
        Header of the table; a card that cannot be used is None.
    shape : tuple of int
        Of the image, two or three axes, the last one first.
    content : ndarray, shape (n,), uint8
        The table with its heap.

    Returns
    -------
    ndarray, shape (ny, nx)
        Integers as stored (``BLANK``, ``BSCALE`` and ``BZERO`` are left to the caller), floats with NaN.

    Raises
    ------
    ValueError
        If what the header says does not fit together, or the bytes of a tile do not give its pixels.
    """
    ny, nx = shape[-2:]
    tile_y, tile_x, n_tiles = _tiling(cards, shape)
    tiles = _Tiles(cards, content)
    if tiles.n_rows != n_tiles:
        raise ValueError(f"a compressed image of {n_tiles} tiles in {tiles.n_rows} rows")
    image = np.empty((ny, nx), _dtype(cards))
    row = 0
    for y in range(0, ny, tile_y):
        for x in range(0, nx, tile_x):
            target = image[y : y + tile_y, x : x + tile_x]
            with np.errstate(all="ignore"):  # beyond float32 is infinite
                target[:] = tiles.pixels(row, target.size).reshape(target.shape)
            row += 1
    return image


def _tiling(cards: Cards, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Height and width of a tile, and the number of tiles of the whole image."""
    axes = shape[::-1]
    sides = [count(cards, f"ZTILE{k + 1}", n if k == 0 else 1) for k, n in enumerate(axes)]
    if min(sides) < 1 or sides[2:] not in ([], [1]):
        raise ValueError(f"tiles of {'x'.join(map(str, sides))} pixels")
    n_tiles = math.prod(-(-n // side) for n, side in zip(axes, sides, strict=True))
    if n_tiles > MAX_TILES:
        raise ValueError(f"a compressed image of {n_tiles} tiles, at most {MAX_TILES} are unpacked")
    return sides[1], sides[0], n_tiles


def _dtype(cards: Cards) -> np.dtype[Any]:
    bits = count(cards, "ZBITPIX", low=-64)
    if bits not in TYPES:
        raise ValueError(f"its card ZBITPIX is {bits}")
    return np.dtype(TYPES[bits]).newbyteorder("=")


class _Tiles:
    """The table of a compressed image: a row for each tile, whose bytes lie in the heap behind the rows."""

    def __init__(self, cards: Cards, content: npt.NDArray[np.uint8]) -> None:
        self.algorithm = _algorithm(cards)
        width = count(cards, "NAXIS1")
        self.n_rows = count(cards, "NAXIS2")
        end = width * self.n_rows
        heap = count(cards, "THEAP", end)
        if (
            count(cards, "NAXIS") != 2
            or count(cards, "BITPIX") != 8
            or not end <= heap <= len(content)
        ):
            raise ValueError("a compressed image whose table has no place")
        self.rows = content[:end].reshape(self.n_rows, width)
        self.heap = content[heap:]
        self.columns = _columns(cards, width)
        self.dtype = _dtype(cards)
        self.packed = self._descriptors("COMPRESSED_DATA")
        if self.packed is None:
            raise ValueError("a compressed image without the column COMPRESSED_DATA")
        self.gzipped = self._descriptors("GZIP_COMPRESSED_DATA")
        self.plain = self._descriptors("UNCOMPRESSED_DATA")
        self.scale, self.zero = self._numbers(cards, "ZSCALE"), self._numbers(cards, "ZZERO")
        self.blank = self._numbers(cards, "ZBLANK")
        self.block, self.pixel_bytes = (
            _setting(cards, "BLOCKSIZE", 32),
            _setting(cards, "BYTEPIX", 4),
        )
        if self.algorithm == "RICE_1" and (self.block < 1 or self.pixel_bytes not in RICE_BITS):
            raise ValueError(f"RICE_1 with BLOCKSIZE {self.block} and BYTEPIX {self.pixel_bytes}")
        method = cards.get("ZQUANTIZ", "NO_DITHER")
        if method not in DITHERS:
            raise ValueError(f"ZQUANTIZ is {method!r}")
        self.dither = DITHERS[str(method)]
        self.seed = count(cards, "ZDITHER0", 0)
        if self.dtype.kind == "f" and self.scale is None and self.algorithm == "RICE_1":
            raise ValueError("floats compressed as integers, without a scale")
        if (self.scale is None) != (self.zero is None):
            raise ValueError("one of ZSCALE and ZZERO without the other")

    def _descriptors(self, name: str) -> npt.NDArray[np.int64] | None:
        """Length in bytes and place in the heap of each row's array; all within it."""
        if name not in self.columns:
            return None
        start, form = self.columns[name]
        match = re.fullmatch(r"[01]?([PQ])([BIJED])(\(\d*\))?", form)
        if not match or (match[2] != "B" and name != "UNCOMPRESSED_DATA"):
            raise ValueError(f"column {name} has the format {form!r}")
        size = WIDTHS[match[1]]
        pairs = self.rows[:, start : start + size].copy().view(f">i{size // 2}").astype(np.int64)
        lengths = WIDTHS[match[2]] * pairs[:, :1].clip(-1, len(self.heap) + 1)
        places = pairs[:, 1:].clip(-1, len(self.heap) + 1)
        bad = (lengths < 0) | (places < 0) | (lengths + places > len(self.heap))
        if np.any(bad & (pairs[:, :1] != 0)):
            raise ValueError(
                f"tile {int(np.argmax(bad))} lies outside of the heap of {len(self.heap)} bytes"
            )
        return np.hstack([lengths, places])

    def _numbers(self, cards: Cards, name: str) -> npt.NDArray[np.float64] | None:
        """A number for each row, from a column or a card."""
        if name not in self.columns:
            return np.full(self.n_rows, number(cards, name)) if name in cards else None
        start, form = self.columns[name]
        match = re.fullmatch(r"1?([BIJKED])", form)
        if not match:
            raise ValueError(f"column {name} has the format {form!r}")
        size = WIDTHS[match[1]]
        kind = "f" if match[1] in "ED" else "i" if size > 1 else "u"
        values = self.rows[:, start : start + size].copy().view(f">{kind}{size}")
        return values[:, 0].astype(np.float64)

    def pixels(self, row: int, n: int) -> Pixels:
        """The pixels of a tile, shape (n,)."""
        assert self.packed is not None
        if self.packed[row, 0]:
            stored = self._stored(self._bytes(self.packed, row), n)
            return self._scaled(stored, row)
        if self.gzipped is not None and self.gzipped[row, 0]:
            content = _gunzipped(self._bytes(self.gzipped, row), n * 8)
        elif self.plain is not None and self.plain[row, 0]:
            content = self._bytes(self.plain, row).tobytes()
        else:
            raise ValueError(f"tile {row} holds nothing")
        return _numbers_of(content, n, self.dtype.kind)

    def _bytes(self, descriptors: npt.NDArray[np.int64], row: int) -> npt.NDArray[np.uint8]:
        length, start = descriptors[row]
        return self.heap[start : start + length]

    def _stored(self, packed: npt.NDArray[np.uint8], n: int) -> Pixels:
        """What was compressed: integers where floats are quantized, else the pixels."""
        if self.algorithm == "RICE_1":
            return _rice_pixels(packed, n, self.block, self.pixel_bytes)
        kind = self.dtype.kind if self.scale is None else "i"
        if self.algorithm == "NOCOMPRESS":
            return _numbers_of(packed.tobytes(), n, kind)
        content = _gunzipped(packed, n * 8)
        if self.algorithm == "GZIP_2" and len(content) % n == 0:  # all first bytes come first
            content = np.frombuffer(content, np.uint8).reshape(-1, n).T.tobytes()
        return _numbers_of(content, n, kind)

    def _scaled(self, stored: Pixels, row: int) -> Pixels:
        if self.scale is None or self.zero is None:
            return stored
        values: Pixels = stored.astype(np.float64)
        if self.dither:
            values += 0.5 - _dither(row + self.seed, len(values))
        with np.errstate(all="ignore"):  # a damaged scale can be anything
            values = values * float(self.scale[row]) + float(self.zero[row])
        if self.dither == 2:
            values[stored == DITHERED_ZERO] = 0
        if self.blank is not None:
            values[stored == self.blank[row]] = np.nan
        return values


def _columns(cards: Cards, width: int) -> dict[str, Column]:
    """Columns of the table by name; they fill its rows."""
    columns = {}
    start = 0
    for field in range(1, count(cards, "TFIELDS", high=999) + 1):
        form = str(cards.get(f"TFORM{field}")).strip()
        match = re.match(r"(\d{0,9})([A-Z])", form)
        if not match or match[2] not in WIDTHS:
            raise ValueError(f"its card TFORM{field} is {form!r}")
        columns[str(cards.get(f"TTYPE{field}")).strip().upper()] = Column(start, form)
        start += int(match[1] or 1) * WIDTHS[match[2]]
    if start != width:
        raise ValueError(f"columns of {start} bytes in rows of {width}")
    return columns


def _algorithm(cards: Cards) -> str:
    found = cards.get("ZCMPTYPE")
    names = {
        "RICE_ONE": "RICE_1",
        **{name: name for name in ("RICE_1", "GZIP_1", "GZIP_2", "NOCOMPRESS")},
    }
    if found not in names:
        raise ValueError(
            f"compressed by {found!r} instead of {', '.join(list(names)[1:])}: unpack it first (funpack)"
        )
    return names[str(found)]


def _setting(cards: Cards, name: str, default: int) -> int:
    """A parameter of the compression: its name and value stand in a pair of cards."""
    pair = 1
    while (found := cards.get(f"ZNAME{pair}")) is not None:
        if str(found).strip().upper() == name:
            return count(cards, f"ZVAL{pair}", low=-64)
        pair += 1
    return default


def _numbers_of(content: bytes, n: int, kind: str) -> Pixels:
    """Big-endian numbers; their width follows from their count."""
    size = len(content) // n
    if len(content) != size * n or size not in ((4, 8) if kind == "f" else (1, 2, 4, 8)):
        raise ValueError(f"a tile of {n} pixels in {len(content)} bytes")
    return np.frombuffer(content, "u1" if size == 1 else f">{'f' if kind == 'f' else 'i'}{size}")


def _gunzipped(packed: npt.NDArray[np.uint8], most: int) -> bytes:
    """A whole gzip stream, its CRC and length checked, of at most so many bytes."""
    stream = zlib.decompressobj(wbits=31)
    content = stream.decompress(packed.tobytes(), most + 1)
    if len(content) > most or not stream.eof:
        raise ValueError("a tile whose gzip stream does not end where it should")
    return content


def _rice_pixels(packed: npt.NDArray[np.uint8], n: int, block: int, pixel_bytes: int) -> Pixels:
    words = np.zeros(len(packed) // 8 + 4, ">u8")  # beyond the end there are zeros to read
    words.view(np.uint8)[: len(packed)] = packed
    pixels = np.empty(n, np.uint32)
    if not _unrice(
        words.astype(np.uint64), 8 * len(packed), pixels, block, *RICE_BITS[pixel_bytes]
    ):
        raise ValueError(f"a tile whose {len(packed)} bytes are no {n} pixels compressed by RICE_1")
    return (
        pixels.astype("u1")
        if pixel_bytes == 1
        else pixels.astype(f"u{pixel_bytes}").view(f"i{pixel_bytes}")
    )


def _leading_zeros_of(typing: Any, word: Any) -> Any:
    """Number of zeros before the first one of a word of 64 bits; 64 if there is none."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), generate


_leading_zeros: Any = intrinsic(_leading_zeros_of)


@nb.njit(cache=True, nogil=True)
def _unrice(words, end, pixels, block, bits, code_bits, raw):  # type: ignore[no-untyped-def]
    """Undo Rice's coding of differences between neighbours; whether the bits gave the pixels, and none was left over.

    A block of pixels begins with a code: 0 for no differences, ``raw + 1`` for differences as they are, else one more
    than the number of their lower bits, before which the upper ones are counted in zeros that a one ends. A difference d
    is stored as 2 d, or as -2 d - 1 if it is negative.
    """
    one = np.uint64(1)
    mask = (one << np.uint64(bits)) - one
    last = _ahead(words, 0) >> np.uint64(64 - bits)
    at = bits  # the next bit; up to two words beyond the end can be read
    for start in range(0, len(pixels), block):
        code = np.int64(_ahead(words, at) >> np.uint64(64 - code_bits))
        at += code_bits
        if code > raw + 1 or at > end:
            return False
        n_low = bits if code > raw else code - 1
        for k in range(start, min(start + block, len(pixels))):
            if code > 0:
                upper = 0
                if code <= raw:
                    upper = _zeros(words, at, end)
                    at += upper + 1
                stored = np.uint64(upper) << np.uint64(n_low)
                stored |= (_ahead(words, at) >> one) >> np.uint64(63 - n_low)
                at += n_low
                if at > end or stored > mask:
                    return False
                last = (last + ((stored >> one) ^ (np.uint64(0) - (stored & one)))) & mask
            pixels[k] = last
    return end - 8 < at <= end and _ahead(words, at) == 0


@nb.njit(cache=True, nogil=True, inline="always")
def _ahead(words, at):  # type: ignore[no-untyped-def]
    """The next 64 bits."""
    here = at >> 6
    shift = np.uint64(at & 63)
    return words[here] << shift | (words[here + 1] >> np.uint64(1)) >> (np.uint64(63) - shift)


@nb.njit(cache=True, nogil=True, inline="always")
def _zeros(words, at, end):  # type: ignore[no-untyped-def]
    """How many zeros come before the next one."""
    zeros = np.int64(_leading_zeros(_ahead(words, at)))
    found = zeros
    while zeros == 64 and at + found < end:
        zeros = np.int64(_leading_zeros(_ahead(words, at + found)))
        found += zeros
    return found


def _dither(row: int, n: int) -> npt.NDArray[np.float64]:
    """What was subtracted from the pixels of a tile before they were rounded."""
    randoms = _randoms()
    place = (row - 1) % N_RANDOM
    parts: list[npt.NDArray[np.float64]] = []
    found = 0
    while found < n:
        part = randoms[int(randoms[place] * 500) :]
        parts.append(part)
        found += len(part)
        place = (place + 1) % N_RANDOM
    return np.concatenate(parts)[:n]


@lru_cache(maxsize=1)
def _randoms() -> npt.NDArray[np.float64]:
    seed = 1
    values = np.empty(N_RANDOM, np.float32)
    for k in range(N_RANDOM):
        seed = 16807 * seed % 2147483647
        values[k] = seed / 2147483647
    return values.astype(np.float64)
