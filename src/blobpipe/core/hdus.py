"""The HDUs of a FITS file, from its bytes (FITS 4.0); files that are damaged, huge or not FITS are refused first.

Only what a monitor image needs: images, also constant ones, and tile-compressed ones, plain or in gzip or bzip2;
tables are passed over.
"""

from __future__ import annotations

import bz2
import gzip
import io
import math
import os
import re
import stat
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from blobpipe.core.arrays import Float32Array
from blobpipe.errors import FrameError

Value = str | int | float | bool
Cards = Mapping[str, Value | None]
Stored = npt.NDArray[Any]

# Sizes of a block and of a card (bytes); FITS 4.0, sections 3.1 and 4.1
BLOCK = 2880
CARD = 80

# Largest file, after decompression of the whole file (bytes): twice an IMA file of 16 reads
MAX_BYTES = 1 << 29

# Largest image (pixels): 16 times the detector
MAX_PX = 4096 * 4096

# Most HDUs of a file; an IMA file of 16 reads has 81
MAX_HDUS = 500

# Largest header (bytes), 9000 cards; those of HST exposures have 300
MAX_HEADER_BYTES = 250 * BLOCK

# Longest text of a card that is continued (characters)
MAX_TEXT = 1000

# Highest value of a pixel, in any unit; its squares and sums are finite in float32
MAX_VALUE = 1e12

# Bytes read from a compressed file at a time
CHUNK = 1 << 20

# Type of stored pixels by BITPIX
TYPES = {8: "u1", 16: ">i2", 32: ">i4", 64: ">i8", -32: ">f4", -64: ">f8"}

# Table for bytes.translate that replaces what is not printable ASCII by question marks
NOT_ASCII = bytes(code if 32 <= code < 127 else ord("?") for code in range(256))

# Value of a card: text, logical, integer or real, then perhaps a comment; FITS 4.0, section 4.2
CARD_VALUE = re.compile(
    r" *(?:'((?:[^']|'')*)'|([TF])|([+-]?\d+)|([+-]?(?:\d+\.?\d*|\.\d+)(?:[EDed][+-]?\d+)?)) *(?:/.*)?"
)


@dataclass(frozen=True)
class HDU:
    """A header, and where its data lie.

    Attributes
    ----------
    kind : str
        ``PRIMARY``, ``IMAGE``, ``BINTABLE`` or another value of XTENSION.
    name : str
        EXTNAME in capitals; ``PRIMARY`` for a first HDU without one.
    cards : dict
        Value of each card; None if it cannot be used. The first of repeated cards counts.
    header : bytes
        The header as stored, with its padding.
    start, size : int
        Position and length of the data (bytes).
    shape : tuple of int
        Shape of the image, ``(..., ny, nx)``; empty if there is none.
    """

    kind: str
    name: str
    cards: dict[str, Value | None]
    header: bytes
    start: int
    size: int
    shape: tuple[int, ...]

    @property
    def compressed(self) -> bool:
        """Say if this is a table that holds a tile-compressed image."""
        return self.cards.get("ZIMAGE") is True


class File:
    """An open FITS file and its HDUs.

    Raises
    ------
    ValueError
        If the file is not FITS, or is damaged.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self.hdus = list(self._walk())

    def named(self, name: str) -> HDU | None:
        """Return the first HDU of a name, or None."""
        return next((hdu for hdu in self.hdus if hdu.name == name.upper()), None)

    def whole(self) -> bytes:
        """Return all bytes of the file, after decompression by gzip or bzip2."""
        self._file.seek(0)
        return self._file.read()

    def content(self, hdu: HDU) -> npt.NDArray[np.uint8]:
        """Return the bytes of the data, whose checksums are verified."""
        self._verify(hdu)
        return self._array(hdu, "u1", hdu.size)

    def plane(self, hdu: HDU) -> Stored:
        """Return an uncompressed image, or plane 0 of a cube, as stored, shape (ny, nx)."""
        self._verify(hdu)
        if not hdu.size:
            return np.full(hdu.shape, number(hdu.cards, "PIXVALUE"))
        shape = hdu.shape[-2:]
        return self._array(hdu, _stored_type(hdu.cards), math.prod(shape)).reshape(shape)

    def cube(self, hdu: HDU) -> Stored:
        """Return all planes of an uncompressed cube as stored, shape (planes, ny, nx)."""
        self._verify(hdu)
        n = math.prod(hdu.shape)
        return self._array(hdu, _stored_type(hdu.cards), n).reshape(hdu.shape)

    def _array(self, hdu: HDU, dtype: str, n: int) -> npt.NDArray[Any]:
        self._file.seek(hdu.start)
        n_bytes = n * np.dtype(dtype).itemsize
        return np.frombuffer(self._file.read(n_bytes), dtype, n)

    def _walk(self) -> Iterator[HDU]:
        """Yield each HDU as described by its header; all of them lie within the file."""
        place = 0
        index = 0
        while place < self._size or not index:
            hdu = self._hdu(place, index)
            if hdu is None:
                return
            # The padding behind the last HDU may be missing, its data may not
            end = hdu.start + hdu.size
            if self._size < end:
                raise ValueError(f"truncated, {self._size} bytes found, {end} expected")
            yield hdu
            place = -(-end // BLOCK) * BLOCK
            index += 1
            if index > MAX_HDUS:
                raise ValueError(f"more than {MAX_HDUS} HDUs")

    def _hdu(self, place: int, index: int) -> HDU | None:
        """Return the HDU at a place; None if what is left is less than a block, or zeros alone."""
        self._file.seek(place)
        header = self._file.read(BLOCK)

        # Files may end in padding, but not in other bytes
        if index and not header.startswith(b"XTENSION"):
            if len(header) == BLOCK and any(header):
                raise ValueError(
                    f"{self._size - place} bytes behind HDU {index - 1} that are no HDU"
                )
            return None
        if not index and not header.startswith(b"SIMPLE  ="):
            raise ValueError(
                f"{self._size} bytes that are not a whole FITS file (they begin with {header[:8]!r})"
            )

        # Read on, block by block, until the header ends
        cards, ended = _parse_cards(header)
        while not ended:
            block = self._file.read(BLOCK)
            header += block
            if len(block) < BLOCK or len(header) > MAX_HEADER_BYTES:
                raise ValueError(
                    f"{self._size} bytes that are not a whole FITS file (header of HDU {index} has no END)"
                )
            if b"END     " in block:
                cards, ended = _parse_cards(header)
        return _described(cards, header, place, index)

    def _verify(self, hdu: HDU) -> None:
        """Compare the data with the checksums of the header; most files have none."""
        wanted = {}
        for name in ("DATASUM", "CHECKSUM"):
            if name in hdu.cards and str(hdu.cards[name]).strip():
                wanted[name] = hdu.cards[name]
        if not wanted:
            return
        self._file.seek(hdu.start)
        data_sum = _checksum(self._file.read(hdu.size))
        # With the card CHECKSUM in the header, header and data sum up to zero
        whole_sum = _checksum(hdu.header, data_sum)
        agrees = {
            "DATASUM": str(data_sum) == str(wanted.get("DATASUM")),
            "CHECKSUM": whole_sum in (0, 0xFFFFFFFF),
        }
        for name in wanted:
            if not agrees[name]:
                raise ValueError(
                    f"{name} of HDU {hdu.name} does not agree with its bytes: damaged, or edited by a tool that left the "
                    "old sum (remove the card if you know so)"
                )


@contextmanager
def opened(path: str | Path, expected: str) -> Iterator[File]:
    """Open a FITS file; whatever is wrong with it, now or while it is read, becomes a `FrameError`.

    Parameters
    ----------
    path : path
    expected : str
        What the file should be and what to do, for the message.

    Raises
    ------
    FrameError
        If it is not a regular file, cannot be read, is too large, or is damaged.
    """
    try:
        with _open_regular(path) as plain, _decompressed(plain) as file:
            size = file.seek(0, os.SEEK_END)
            if size > MAX_BYTES:
                raise ValueError(f"{size} bytes, at most {MAX_BYTES} are read")
            yield File(file, size)
    except FileNotFoundError as error:
        raise FrameError(f"{path}: not found, expected {expected}") from error
    except OSError as error:
        reason = error.strerror or error
        raise FrameError(f"{path}: cannot be read ({reason}), expected {expected}") from error
    except (ValueError, EOFError, zlib.error) as error:
        raise FrameError(f"{path}: {' '.join(str(error).split())}; expected {expected}") from error


def _open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file; a pipe without a writer would block for ever, a device never ends."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise ValueError("no regular file (a folder, a pipe or a device)")
    return os.fdopen(number, "rb")


def _decompressed(file: BinaryIO) -> BinaryIO:
    """Return the file itself, or its decompressed content, whatever its name.

    A compressed file is read to its end, which verifies its checksum.
    """
    magic = file.read(3)
    file.seek(0)
    if magic[:2] == b"\x1f\x8b":
        stream: BinaryIO = gzip.GzipFile(fileobj=file)  # type: ignore[assignment]
    elif magic == b"BZh":
        stream = bz2.BZ2File(file)  # type: ignore[assignment]
    else:
        return file
    content = io.BytesIO()
    while chunk := stream.read(CHUNK):
        content.write(chunk)
        if content.tell() > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes when unpacked, at most so many are read")
    return content


def _parse_cards(header: bytes) -> tuple[dict[str, Value | None], bool]:
    """Return the values of the cards up to END, and if END was found."""
    cards: dict[str, Value | None] = {}
    text = header.translate(NOT_ASCII).decode("ascii")
    # The card before, whose text a CONTINUE card goes on with
    previous = ""
    for start in range(0, len(text), CARD):
        card = text[start : start + CARD]
        keyword = card[:8].rstrip()
        if keyword == "END":
            return cards, True
        if keyword == "CONTINUE":
            before = cards.get(previous)
            more = _parse_value(card[8:])
            if isinstance(before, str) and before.endswith("&") and isinstance(more, str):
                cards[previous] = before[:-1] + more if len(before) < MAX_TEXT else None
        elif card[8:10] == "= ":
            # The first of repeated cards counts, and so do its continuations
            previous = keyword if keyword not in cards else ""
            cards.setdefault(keyword, _parse_value(card[10:]))
    return cards, False


def _parse_value(text: str) -> Value | None:
    """Return the value of a card; None if it has none, or one that no image needs (complex, huge, not standard)."""
    match = CARD_VALUE.fullmatch(text)
    if match is None:
        return None
    quoted, logical, integer, real = match.groups()
    if quoted is not None:
        return quoted.replace("''", "'").rstrip()
    if logical:
        return logical == "T"
    if integer:
        fits_64_bits = len(integer) <= 20 and abs(int(integer)) <= 1 << 63
        return int(integer) if fits_64_bits else None
    value = float(real.upper().replace("D", "E")) if real else math.inf
    return value if math.isfinite(value) else None


def count(
    cards: Cards, name: str, default: int | None = None, low: int = 0, high: int = 1 << 40
) -> int:
    """Return the whole number of a card.

    Parameters
    ----------
    cards : mapping
    name : str
    default : int, optional
        Value if the card is missing.
    low, high : int
        Range of values, both included.

    Raises
    ------
    ValueError
        If the card is missing and has no default, is no whole number, or is out of range.
    """
    value = cards.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"its card {name} is {'no whole number' if name in cards else 'missing'}")
    if not low <= value <= high:
        raise ValueError(f"its card {name} is {value}, from {low} to {high} is possible")
    return value


def number(cards: Cards, name: str, default: float | None = None) -> float:
    """Return the number of a card.

    Raises
    ------
    ValueError
        If the card is missing and has no default, or is no number.
    """
    value = cards.get(name, default)
    if value is None or isinstance(value, (bool, str)):
        raise ValueError(f"its card {name} is {'no number' if name in cards else 'missing'}")
    return float(value)


def physical(cards: Cards, stored: Stored) -> Float32Array:
    """Return scaled pixels as float32, NaN where a value is missing, infinite, or beyond `MAX_VALUE`.

    Parameters
    ----------
    cards : mapping
        Cards of the image; BSCALE, BZERO, BLANK or ZBLANK are applied.
    stored : ndarray, shape (ny, nx)
        Pixels as stored.

    Raises
    ------
    ValueError
        If one of these cards is no number.
    """
    blank = None
    if stored.dtype.kind != "f" and ("BLANK" in cards or "ZBLANK" in cards):
        blank = number(cards, "BLANK" if "BLANK" in cards else "ZBLANK")
    scale = number(cards, "BSCALE", 1)
    zero = number(cards, "BZERO", 0)
    with np.errstate(all="ignore"):
        values = stored if (scale, zero) == (1, 0) else stored.astype(np.float64) * scale + zero
        # Not copied if it is what is wanted: one that was unpacked belongs to nobody else
        pixels = np.require(values, np.float32, ["C", "W"])
    if blank is not None:
        pixels[stored == blank] = np.nan
    beyond = (pixels > MAX_VALUE) | (pixels < -MAX_VALUE)
    if beyond.any():
        pixels[beyond] = np.nan
    return pixels


def _described(cards: dict[str, Value | None], header: bytes, place: int, index: int) -> HDU:
    """Return the HDU that the mandatory cards of a header describe.

    Parameters
    ----------
    cards, header
        The header, parsed and as stored.
    place : int
        Where the header begins (bytes).
    index : int
        Number of the HDU.
    """
    kind = "PRIMARY" if not index else str(cards.get("XTENSION"))
    if not index and cards.get("SIMPLE") is not True:
        raise ValueError("its card SIMPLE is not T")

    # Size of the data; random groups have a first axis of no pixels (FITS 4.0, sections 4.4 and 6)
    axes = _axes(cards, "NAXIS")
    of_groups = cards.get("GROUPS") is True and axes[-1:] == (0,)
    n = math.prod(axes[:-1] if of_groups else axes) if axes else 0
    item_bytes = np.dtype(_stored_type(cards)).itemsize
    size = item_bytes * count(cards, "GCOUNT", 1) * (count(cards, "PCOUNT", 0) + n)

    # Shape of the image, which may be compressed into a table, or constant and without data
    shape: tuple[int, ...] = ()
    if kind == "BINTABLE" and cards.get("ZIMAGE") is True:
        shape = _axes(cards, "ZNAXIS")
    elif kind in ("PRIMARY", "IMAGE") and not of_groups:
        is_constant = not axes and "PIXVALUE" in cards
        shape = (count(cards, "NPIX2"), count(cards, "NPIX1")) if is_constant else axes

    extname = cards.get("EXTNAME")
    name = extname.strip().upper() if isinstance(extname, str) else ""
    if not name and not index:
        name = "PRIMARY"
    return HDU(kind, name, cards, header, place + len(header), size, shape)


def _axes(cards: Cards, name: str) -> tuple[int, ...]:
    """Return the lengths of the axes of an array in NumPy's order, (..., ny, nx)."""
    n_axes = count(cards, name, high=999)
    return tuple(count(cards, f"{name}{axis}") for axis in range(n_axes, 0, -1))


def _stored_type(cards: Cards) -> str:
    """Return the NumPy type of stored pixels."""
    bits = count(cards, "BITPIX", low=-64)
    if bits not in TYPES:
        raise ValueError(f"its card BITPIX is {bits}")
    return TYPES[bits]


def _checksum(content: bytes, before: int = 0) -> int:
    """Return the ones' complement sum of big-endian 32-bit words, continued from that of what comes before."""
    n_words = -(-len(content) // 4)
    words = np.frombuffer(content.ljust(n_words * 4, b"\0"), ">u4")
    total = int(words.sum(dtype=np.uint64)) + before
    # Carries are added at the other end
    while total >> 32:
        total = (total & 0xFFFFFFFF) + (total >> 32)
    return total
