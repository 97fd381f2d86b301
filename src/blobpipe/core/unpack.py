"""Unpack tile-compressed FITS images (FITS 4.0, section 10).

This is not left to a C library, because no byte of a damaged file may end the process: every descriptor is checked
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

from blobpipe.core.arrays import Int64Array
from blobpipe.core.hdus import TYPES, Cards, count, number

Pixels = npt.NDArray[Any]

# Most tiles of an image; 4096 x 4096 pixels in tiles of 32 x 32 are half as many
MAX_TILES = 1 << 15

# Width of a value by the letter of its column's format (bytes); FITS 4.0, table 18
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

# Rice coding by BYTEPIX: bits of a pixel, bits of a block's code, and the code of a block that is stored as it is
RICE_BITS = {1: (8, 3, 6), 2: (16, 4, 14), 4: (32, 5, 25)}

# Method of dithering by ZQUANTIZ; FITS 4.0, section 10.2
DITHERS = {"NO_DITHER": 0, "NONE": 0, "SUBTRACTIVE_DITHER_1": 1, "SUBTRACTIVE_DITHER_2": 2}

# Length of the standard's sequence of random numbers; FITS 4.0, appendix I
N_RANDOM = 10_000

# Stored integer that stands for 0.0 with SUBTRACTIVE_DITHER_2
DITHERED_ZERO = -2147483646


class Column(NamedTuple):
    """Start of a column in each row of the table (bytes), and its format."""

    start: int
    form: str


def first_plane(cards: Cards, shape: tuple[int, ...], content: npt.NDArray[np.uint8]) -> Pixels:
    """Unpack an image, or plane 0 of a cube.

    Parameters
    ----------
    cards : mapping
        Header of the table; a card that cannot be used is None.
    shape : tuple of int
        Shape of the image, (ny, nx) or (planes, ny, nx).
    content : ndarray, shape (n,), uint8
        The table and its heap.

    Returns
    -------
    ndarray, shape (ny, nx)
        Integers as stored (``BLANK``, ``BSCALE`` and ``BZERO`` are left to the caller), floats with NaN.

    Raises
    ------
    ValueError
        If the header contradicts itself, or the bytes of a tile do not decode to its pixels.
    """
    ny, nx = shape[-2:]
    tile_y, tile_x, n_tiles = _tiling(cards, shape)
    tiles = _Tiles(cards, content)
    if tiles.n_rows != n_tiles:
        raise ValueError(f"a compressed image of {n_tiles} tiles in {tiles.n_rows} rows")

    # Rows of the table are tiles, x running fastest; those of further planes come last
    image = np.empty((ny, nx), _pixel_type(cards))
    row = 0
    for y in range(0, ny, tile_y):
        for x in range(0, nx, tile_x):
            target = image[y : y + tile_y, x : x + tile_x]
            pixels = tiles.pixels(row, target.size)
            # Values beyond float32 become infinite without a warning
            with np.errstate(all="ignore"):
                target[:] = pixels.reshape(target.shape)
            row += 1
    return image


def _tiling(cards: Cards, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the height and width of a tile, and the number of tiles of all planes."""
    axes = shape[::-1]
    # By default, a tile is a row; FITS 4.0, section 10.1.1
    defaults = (axes[0], *[1] * (len(axes) - 1))
    sides = [count(cards, f"ZTILE{k}", default) for k, default in enumerate(defaults, 1)]
    if min(sides) < 1 or sides[2:] not in ([], [1]):
        raise ValueError(f"tiles of {'x'.join(map(str, sides))} pixels")
    n_tiles = math.prod(-(-n // side) for n, side in zip(axes, sides, strict=True))
    if n_tiles > MAX_TILES:
        raise ValueError(f"a compressed image of {n_tiles} tiles, at most {MAX_TILES} are unpacked")
    return sides[1], sides[0], n_tiles


def _pixel_type(cards: Cards) -> np.dtype[Any]:
    """Return the type of the pixels, in the byte order of this machine."""
    bits = count(cards, "ZBITPIX", low=-64)
    if bits not in TYPES:
        raise ValueError(f"its card ZBITPIX is {bits}")
    return np.dtype(TYPES[bits]).newbyteorder("=")


class _Tiles:
    """The table of a compressed image: a row for each tile, whose bytes lie in the heap behind the rows.

    Parameters
    ----------
    cards : mapping
        Header of the table.
    content : ndarray, shape (n,), uint8
        The table and its heap.

    Raises
    ------
    ValueError
        If the header contradicts itself, or a descriptor points outside of the heap.
    """

    def __init__(self, cards: Cards, content: npt.NDArray[np.uint8]) -> None:
        self.algorithm = _algorithm(cards)

        # Rows of the table, then the heap
        width = count(cards, "NAXIS1")
        self.n_rows = count(cards, "NAXIS2")
        end = width * self.n_rows
        heap = count(cards, "THEAP", end)
        is_table = count(cards, "NAXIS") == 2 and count(cards, "BITPIX") == 8
        if not is_table or not end <= heap <= len(content):
            raise ValueError("a compressed image whose table has no place")
        self.rows = content[:end].reshape(self.n_rows, width)
        self.heap = content[heap:]
        self.columns = _columns(cards, width)
        self.dtype = _pixel_type(cards)

        # The bytes of each tile are in one of three columns
        self.packed = self._descriptors("COMPRESSED_DATA")
        if self.packed is None:
            raise ValueError("a compressed image without the column COMPRESSED_DATA")
        self.gzipped = self._descriptors("GZIP_COMPRESSED_DATA")
        self.plain = self._descriptors("UNCOMPRESSED_DATA")

        # Floats may be quantised: value = stored * scale + zero
        self.scale = self._numbers(cards, "ZSCALE")
        self.zero = self._numbers(cards, "ZZERO")
        self.blank = self._numbers(cards, "ZBLANK")

        # Parameters of the algorithm, and of dithering
        self.block = _setting(cards, "BLOCKSIZE", 32)
        self.pixel_bytes = _setting(cards, "BYTEPIX", 4)
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

    def _descriptors(self, name: str) -> Int64Array | None:
        """Return the length and the place in the heap (bytes) of each row's array, shape (rows, 2)."""
        if name not in self.columns:
            return None
        start, form = self.columns[name]
        match = re.fullmatch(r"[01]?([PQ])([BIJED])(\(\d*\))?", form)
        if not match or (match[2] != "B" and name != "UNCOMPRESSED_DATA"):
            raise ValueError(f"column {name} has the format {form!r}")
        size = WIDTHS[match[1]]
        fields = self.rows[:, start : start + size].copy()
        pairs = fields.view(f">i{size // 2}").astype(np.int64)

        # Clipped, so that sums cannot overflow
        n_heap = len(self.heap)
        lengths = WIDTHS[match[2]] * pairs[:, :1].clip(-1, n_heap + 1)
        places = pairs[:, 1:].clip(-1, n_heap + 1)
        outside = (lengths < 0) | (places < 0) | (lengths + places > n_heap)
        is_used = pairs[:, :1] != 0
        if np.any(outside & is_used):
            raise ValueError(
                f"tile {int(np.argmax(outside))} lies outside of the heap of {n_heap} bytes"
            )
        return np.hstack([lengths, places])

    def _numbers(self, cards: Cards, name: str) -> npt.NDArray[np.float64] | None:
        """Return a number for each row, from a column or else a card; None if there is neither."""
        if name not in self.columns:
            if name not in cards:
                return None
            return np.full(self.n_rows, number(cards, name))
        start, form = self.columns[name]
        match = re.fullmatch(r"1?([BIJKED])", form)
        if not match:
            raise ValueError(f"column {name} has the format {form!r}")
        size = WIDTHS[match[1]]
        integer = "i" if size > 1 else "u"
        kind = "f" if match[1] in "ED" else integer
        fields = self.rows[:, start : start + size].copy()
        values = fields.view(f">{kind}{size}")
        return values[:, 0].astype(np.float64)

    def pixels(self, row: int, n: int) -> Pixels:
        """Return the ``n`` pixels of a tile, shape (n,).

        Raises
        ------
        ValueError
            If its bytes do not decode to so many pixels.
        """
        assert self.packed is not None
        if self.packed[row, 0]:
            packed = self._bytes(self.packed, row)
            return self._scaled(self._stored(packed, n), row)
        # Tiles that cannot be quantised are in a column of their own
        if self.gzipped is not None and self.gzipped[row, 0]:
            packed = self._bytes(self.gzipped, row)
            content = _gunzipped(packed, n * 8)
        elif self.plain is not None and self.plain[row, 0]:
            content = self._bytes(self.plain, row).tobytes()
        else:
            raise ValueError(f"tile {row} holds nothing")
        return _numbers_of(content, n, self.dtype.kind)

    def _bytes(self, descriptors: Int64Array, row: int) -> npt.NDArray[np.uint8]:
        length, start = descriptors[row]
        return self.heap[start : start + length]

    def _stored(self, packed: npt.NDArray[np.uint8], n: int) -> Pixels:
        """Return the decompressed numbers of a tile: integers if floats are quantised, else the pixels."""
        if self.algorithm == "RICE_1":
            return _rice_pixels(packed, n, self.block, self.pixel_bytes)
        kind = self.dtype.kind if self.scale is None else "i"
        if self.algorithm == "NOCOMPRESS":
            return _numbers_of(packed.tobytes(), n, kind)
        content = _gunzipped(packed, n * 8)
        # GZIP_2 stores the first bytes of all numbers, then their second bytes, and so on
        if self.algorithm == "GZIP_2" and len(content) % n == 0:
            shuffled = np.frombuffer(content, np.uint8).reshape(-1, n)
            content = shuffled.T.tobytes()
        return _numbers_of(content, n, kind)

    def _scaled(self, stored: Pixels, row: int) -> Pixels:
        """Return the pixels of a tile from its quantised numbers; FITS 4.0, section 10.2."""
        if self.scale is None or self.zero is None:
            return stored
        scale = float(self.scale[row])
        zero = float(self.zero[row])
        # NaN equals no number
        blank = np.nan if self.blank is None else float(self.blank[row])
        if self.dtype == np.float32 and stored.dtype == np.int32 and not self.dither:
            pixels = np.empty(len(stored), np.float32)
            _scale(stored, scale, zero, blank, pixels)
            return pixels
        values: Pixels = stored.astype(np.float64)
        if self.dither:
            values += 0.5 - _dither(row + self.seed, len(values))
        # The scale of a damaged file can be anything
        with np.errstate(all="ignore"):
            values = values * scale + zero
        if self.dither == 2:
            values[stored == DITHERED_ZERO] = 0
        values[stored == blank] = np.nan
        return values


def _columns(cards: Cards, width: int) -> dict[str, Column]:
    """Return the columns of the table by name; they must fill its rows."""
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
    """Return the name of the compression algorithm."""
    found = cards.get("ZCMPTYPE")
    # An older name of the same algorithm
    if found == "RICE_ONE":
        return "RICE_1"
    names = ("RICE_1", "GZIP_1", "GZIP_2", "NOCOMPRESS")
    if found not in names:
        raise ValueError(
            f"compressed by {found!r} instead of {', '.join(names)}: unpack it first (funpack)"
        )
    return str(found)


def _setting(cards: Cards, name: str, default: int) -> int:
    """Return a parameter of the compression, whose name and value are in a pair of cards."""
    pair = 1
    while (found := cards.get(f"ZNAME{pair}")) is not None:
        if str(found).strip().upper() == name:
            return count(cards, f"ZVAL{pair}", low=-64)
        pair += 1
    return default


def _numbers_of(content: bytes, n: int, kind: str) -> Pixels:
    """Return ``n`` big-endian numbers, whose width follows from their count.

    Parameters
    ----------
    content : bytes
    n : int
    kind : str
        ``f`` for floats; anything else for integers, unsigned if they are single bytes.
    """
    size = len(content) // n
    sizes = (4, 8) if kind == "f" else (1, 2, 4, 8)
    if len(content) != size * n or size not in sizes:
        raise ValueError(f"a tile of {n} pixels in {len(content)} bytes")
    if size == 1:
        return np.frombuffer(content, "u1")
    letter = "f" if kind == "f" else "i"
    return np.frombuffer(content, f">{letter}{size}")


def _gunzipped(packed: npt.NDArray[np.uint8], most: int) -> bytes:
    """Return the content of a complete gzip stream of at most ``most`` bytes, its CRC and length verified."""
    stream = zlib.decompressobj(wbits=31)
    content = stream.decompress(packed.tobytes(), most + 1)
    if len(content) > most or not stream.eof:
        raise ValueError("a tile whose gzip stream does not end where it should")
    return content


def _rice_pixels(packed: npt.NDArray[np.uint8], n: int, block: int, pixel_bytes: int) -> Pixels:
    """Return ``n`` pixels from bytes compressed by RICE_1: uint8, int16 or int32 by ``pixel_bytes``."""
    # Zeros behind the end, which the decoder may read
    words = np.zeros(len(packed) // 8 + 4, ">u8")
    words.view(np.uint8)[: len(packed)] = packed
    native = words.astype(np.uint64)

    pixels = np.empty(n, np.uint32)
    n_bits = 8 * len(packed)
    if not _unrice(native, n_bits, pixels, block, *RICE_BITS[pixel_bytes]):
        raise ValueError(f"a tile whose {len(packed)} bytes are no {n} pixels compressed by RICE_1")
    if pixel_bytes == 1:
        return pixels.astype("u1")
    return pixels.astype(f"u{pixel_bytes}", copy=False).view(f"i{pixel_bytes}")


def _leading_zeros_of(typing: Any, word: Any) -> Any:
    """Count the zeros before the first one of a word of 64 bits; 64 if there is none."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), generate


_leading_zeros: Any = intrinsic(_leading_zeros_of)


@nb.njit(cache=True, nogil=True)
def _unrice(words, end, pixels, block, bits, code_bits, raw):  # type: ignore[no-untyped-def]
    """Decode differences of neighbouring pixels, in place; return False if the bits do not give exactly these pixels.

    A block of pixels begins with a code: 0 if all differences are zero, ``raw + 1`` if they are stored as they are, else
    one more than the number of their lower bits. Before these, the upper bits are given by a number of zeros that a one
    ends. A difference d is stored as 2 d, or as -2 d - 1 if it is negative.

    Parameters
    ----------
    words : ndarray, uint64
        The bits, with at least two words of zeros behind the end.
    end : int
        Number of bits.
    pixels : ndarray, shape (n,), uint32
        Overwritten.
    block : int
        Pixels in a block.
    bits, code_bits, raw : int
        Of `RICE_BITS`.
    """
    one = np.uint64(1)
    mask = (one << np.uint64(bits)) - one
    last = _ahead(words, 0) >> np.uint64(64 - bits)
    # The next bit; up to two words beyond the end can be read
    at = bits
    for start in range(0, len(pixels), block):
        code = np.int64(_ahead(words, at) >> np.uint64(64 - code_bits))
        at += code_bits
        if code > raw + 1 or at > end:
            return False
        n_low = bits if code > raw else code - 1
        for k in range(start, min(start + block, len(pixels))):
            if code > 0:
                ahead = _ahead(words, at)
                zeros = np.int64(0)
                n_upper = np.int64(0)
                if code <= raw:
                    zeros = np.int64(_leading_zeros(ahead))
                    n_upper = zeros + 1
                if n_upper + n_low <= 64:
                    # The usual case: all bits of the pixel are among the next 64
                    ahead = ahead << np.uint64(zeros) << np.uint64(n_upper - zeros)
                    at += n_upper + n_low
                else:
                    zeros = _zeros(words, at, end)
                    at += zeros + 1
                    ahead = _ahead(words, at)
                    at += n_low
                stored = np.uint64(zeros) << np.uint64(n_low)
                stored |= (ahead >> one) >> np.uint64(63 - n_low)
                if at > end or stored > mask:
                    return False
                last = (last + ((stored >> one) ^ (np.uint64(0) - (stored & one)))) & mask
            pixels[k] = last
    return end - 8 < at <= end and _ahead(words, at) == 0


@nb.njit(cache=True, nogil=True)
def _scale(stored, scale, zero, blank, pixels):  # type: ignore[no-untyped-def]
    """Overwrite ``pixels``, float32, by ``stored * scale + zero``, and by NaN where ``stored`` is ``blank``."""
    for k in range(len(stored)):
        pixels[k] = np.nan if stored[k] == blank else stored[k] * scale + zero


@nb.njit(cache=True, nogil=True, inline="always")
def _ahead(words, at):  # type: ignore[no-untyped-def]
    """Return the next 64 bits."""
    here = at >> 6
    shift = np.uint64(at & 63)
    return words[here] << shift | (words[here + 1] >> np.uint64(1)) >> (np.uint64(63) - shift)


@nb.njit(cache=True, nogil=True, inline="always")
def _zeros(words, at, end):  # type: ignore[no-untyped-def]
    """Count the zeros before the next one."""
    zeros = np.int64(_leading_zeros(_ahead(words, at)))
    found = zeros
    while zeros == 64 and at + found < end:
        zeros = np.int64(_leading_zeros(_ahead(words, at + found)))
        found += zeros
    return found


def _dither(row: int, n: int) -> npt.NDArray[np.float64]:
    """Return the random numbers that dithered the ``n`` pixels of a tile; FITS 4.0, section 10.2.1."""
    randoms = _randoms()
    place = (row - 1) % N_RANDOM
    parts: list[npt.NDArray[np.float64]] = []
    n_found = 0
    while n_found < n:
        # The sequence is entered at a random place, and again when it ends
        start = int(randoms[place] * 500)
        parts.append(randoms[start:])
        n_found += N_RANDOM - start
        place = (place + 1) % N_RANDOM
    return np.concatenate(parts)[:n]


@lru_cache(maxsize=1)
def _randoms() -> npt.NDArray[np.float64]:
    """Return the standard's sequence of random numbers, 0 to 1, rounded to float32; FITS 4.0, appendix I."""
    seed = 1
    values = np.empty(N_RANDOM, np.float32)
    for k in range(N_RANDOM):
        seed = 16807 * seed % 2147483647
        values[k] = seed / 2147483647
    return values.astype(np.float64)
