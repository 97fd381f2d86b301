"""The HDUs of a FITS file, from its bytes (FITS 4.0): what is damaged, huge or no FITS is told before it is unpacked.

Only what a monitor image needs: images, constant ones too, and tile-compressed ones, plain or in gzip or bzip2; tables
are passed over.
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

from blobpipe.errors import FrameError

Value = str | int | float | bool
Cards = Mapping[str, Value | None]
Stored = npt.NDArray[Any]

# bytes, of the standard
BLOCK = 2880
CARD = 80
MAX_BYTES = 1 << 29  # of a file, unpacked by gzip: twice an IMA file of 16 reads
MAX_PX = 4096 * 4096  # of an image: 16 times the detector
MAX_HDUS = 500  # an IMA file of 16 reads has 81
MAX_HEADER_BYTES = 250 * BLOCK  # 9000 cards; those of HST's exposures are 300
MAX_TEXT = 1000  # characters of a card's value
MAX_VALUE = 1e12  # of a pixel, in any unit; squares and sums of it are finite in float32
CHUNK = 1 << 20  # bytes read from a compressed file at a time

TYPES = {8: "u1", 16: ">i2", 32: ">i4", 64: ">i8", -32: ">f4", -64: ">f8"}  # by BITPIX
NOT_ASCII = bytes(code if 32 <= code < 127 else ord("?") for code in range(256))
CARD_VALUE = re.compile(
    r" *(?:'((?:[^']|'')*)'|([TF])|([+-]?\d+)|([+-]?(?:\d+\.?\d*|\.\d+)(?:[EDed][+-]?\d+)?)) *(?:/.*)?"
)


@dataclass(frozen=True)
class HDU:
    """A header and where its data lie.

    Attributes
    ----------
    kind : str
        ``PRIMARY``, ``IMAGE``, ``BINTABLE`` or what else XTENSION says.
    name : str
        EXTNAME in capitals; ``PRIMARY`` for the first one without.
    cards : dict
        Value of each card; None where there is none that can be used. Of repeated cards the first counts.
    header : bytes
        The same as stored, with its padding.
    start, size : int
        Of the data (bytes).
    shape : tuple of int
        Of the image, the last axis first; empty if there is none.
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
        """Whether it is a table that holds an image."""
        return self.cards.get("ZIMAGE") is True


class File:
    """An open FITS file and its HDUs."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self.hdus = list(self._walk())

    def named(self, name: str) -> HDU | None:
        """The first HDU of a name, if there is one."""
        return next((hdu for hdu in self.hdus if hdu.name == name.upper()), None)

    def whole(self) -> bytes:
        """All bytes of the file, unpacked by gzip or bzip2."""
        self._file.seek(0)
        return self._file.read()

    def content(self, hdu: HDU) -> npt.NDArray[np.uint8]:
        """The bytes of the data, after their checksums."""
        self._verify(hdu)
        return self._array(hdu, "u1", hdu.size)

    def plane(self, hdu: HDU) -> Stored:
        """An uncompressed image, or plane 0 of a cube, as stored, shape (ny, nx)."""
        self._verify(hdu)
        if not hdu.size:
            return np.full(hdu.shape, number(hdu.cards, "PIXVALUE"))
        return self._array(hdu, _dtype(hdu), math.prod(hdu.shape[-2:])).reshape(hdu.shape[-2:])

    def cube(self, hdu: HDU) -> Stored:
        """All planes of an uncompressed cube as stored, shape (planes, ny, nx)."""
        self._verify(hdu)
        return self._array(hdu, _dtype(hdu), math.prod(hdu.shape)).reshape(hdu.shape)

    def _array(self, hdu: HDU, dtype: str, n: int) -> npt.NDArray[Any]:
        self._file.seek(hdu.start)
        return np.frombuffer(self._file.read(n * np.dtype(dtype).itemsize), dtype, n)

    def _walk(self) -> Iterator[HDU]:
        """Each HDU as its header tells; all of them lie within the file."""
        place = index = 0
        while place < self._size or not index:
            hdu = self._hdu(place, index)
            if hdu is None:
                return
            end = hdu.start + hdu.size
            if self._size < end:  # the padding behind the last one may be missing
                raise ValueError(f"truncated, {self._size} bytes found, {end} expected")
            yield hdu
            place = _padded(end)
            index += 1
            if index > MAX_HDUS:
                raise ValueError(f"more than {MAX_HDUS} HDUs")

    def _hdu(self, place: int, index: int) -> HDU | None:
        """The HDU at a place; None if what is left is less than a block, or nothing but zeros."""
        self._file.seek(place)
        header = self._file.read(BLOCK)
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
        cards, ended = _cards(header)
        while not ended:
            block = self._file.read(BLOCK)
            header += block
            if len(block) < BLOCK or len(header) > MAX_HEADER_BYTES:
                raise ValueError(
                    f"{self._size} bytes that are not a whole FITS file (header of HDU {index} has no END)"
                )
            cards, ended = _cards(header) if b"END     " in block else (cards, False)
        return _described(cards, header, place, index)

    def _verify(self, hdu: HDU) -> None:
        """Compare with the checksums that the header has; most have none."""
        wanted = {
            name: hdu.cards.get(name) for name in ("DATASUM", "CHECKSUM") if name in hdu.cards
        }
        wanted = {name: value for name, value in wanted.items() if str(value).strip()}
        if not wanted:
            return
        self._file.seek(hdu.start)
        data = _checksum(self._file.read(hdu.size))
        whole = _checksum(hdu.header, data)
        found = {
            "DATASUM": str(data) == str(wanted.get("DATASUM")),
            "CHECKSUM": whole in (0, 0xFFFFFFFF),
        }
        for name in wanted:
            if not found[name]:
                raise ValueError(
                    f"{name} of HDU {hdu.name} does not agree with its bytes: damaged, or edited by a tool that left the "
                    "old sum (remove the card if you know so)"
                )


@contextmanager
def opened(path: str | Path, expected: str) -> Iterator[File]:
    """Open a FITS file; whatever is wrong with it, now or while it is read, becomes a `FrameError`.

    Parameters
    ----------
    expected : str
        What the file should be and what to do, for the message.

    Raises
    ------
    FrameError
        If it is no regular file, cannot be read, is too large, or is damaged.
    """
    try:
        with _regular(path) as plain, _unpacked(plain) as file:
            size = file.seek(0, os.SEEK_END)
            if size > MAX_BYTES:
                raise ValueError(f"{size} bytes, at most {MAX_BYTES} are read")
            yield File(file, size)
    except FileNotFoundError as error:
        raise FrameError(f"{path}: not found, expected {expected}") from error
    except OSError as error:
        raise FrameError(
            f"{path}: cannot be read ({error.strerror or error}), expected {expected}"
        ) from error
    except (ValueError, EOFError, zlib.error) as error:
        raise FrameError(f"{path}: {' '.join(str(error).split())}; expected {expected}") from error


def _regular(path: str | Path) -> BinaryIO:
    """Open a regular file; a pipe without a writer would keep us waiting, a device never ends."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise ValueError("no regular file (a folder, a pipe or a device)")
    return os.fdopen(number, "rb")


def _unpacked(file: BinaryIO) -> BinaryIO:
    """The file itself, or what it holds if it is compressed, whatever its name: read to its end, which checks it."""
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


def _cards(header: bytes) -> tuple[dict[str, Value | None], bool]:
    """Values of the cards up to END, and whether it is there."""
    cards: dict[str, Value | None] = {}
    text = header.translate(NOT_ASCII).decode("ascii")
    name = ""  # of the card before, whose text may go on
    for start in range(0, len(text), CARD):
        keyword = text[start : start + 8].rstrip()
        if keyword == "END":
            return cards, True
        if keyword == "CONTINUE":
            before = cards.get(name)
            more = _value(text[start + 8 : start + CARD])
            if isinstance(before, str) and before.endswith("&") and isinstance(more, str):
                cards[name] = before[:-1] + more if len(before) < MAX_TEXT else None
        elif text[start + 8 : start + 10] == "= ":
            name = keyword if keyword not in cards else ""
            cards.setdefault(keyword, _value(text[start + 10 : start + CARD]))
    return cards, False


def _value(text: str) -> Value | None:
    """A card's value; None if it has none, or one that no image needs: complex, huge, not as the standard has it."""
    match = CARD_VALUE.fullmatch(text)
    if match is None:
        return None
    quoted, logical, whole, real = match.groups()
    if quoted is not None:
        return quoted.replace("''", "'").rstrip()
    if logical:
        return logical == "T"
    if whole:
        return int(whole) if len(whole) <= 20 and abs(int(whole)) <= 1 << 63 else None
    value = float(real.upper().replace("D", "E")) if real else math.inf
    return value if math.isfinite(value) else None


def count(
    cards: Cards, name: str, default: int | None = None, low: int = 0, high: int = 1 << 40
) -> int:
    """A whole number that a header has, or should have.

    Raises
    ------
    ValueError
        If it is missing and has no default, is no whole number, or out of range.
    """
    value = cards.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"its card {name} is {'no whole number' if name in cards else 'missing'}")
    if not low <= value <= high:
        raise ValueError(f"its card {name} is {value}, from {low} to {high} is possible")
    return value


def number(cards: Cards, name: str, default: float | None = None) -> float:
    """A number that a header has, or should have.

    Raises
    ------
    ValueError
        If it is missing and has no default, or is no number.
    """
    value = cards.get(name, default)
    if value is None or isinstance(value, (bool, str)):
        raise ValueError(f"its card {name} is {'no number' if name in cards else 'missing'}")
    return float(value)


def physical(cards: Cards, stored: Stored) -> npt.NDArray[np.float32]:
    """Pixels as float32: scaled, and NaN where there is no value, an infinite one, or one beyond all sense."""
    blank = None
    if stored.dtype.kind != "f" and ("BLANK" in cards or "ZBLANK" in cards):
        blank = number(cards, "BLANK" if "BLANK" in cards else "ZBLANK")
    scale = number(cards, "BSCALE", 1)
    zero = number(cards, "BZERO", 0)
    with np.errstate(all="ignore"):
        values = stored if (scale, zero) == (1, 0) else stored.astype(np.float64) * scale + zero
        pixels = np.array(values, dtype=np.float32, order="C")
    if blank is not None:
        pixels[stored == blank] = np.nan
    pixels[~(np.abs(pixels) <= MAX_VALUE)] = np.nan
    return pixels


def _described(cards: dict[str, Value | None], header: bytes, place: int, index: int) -> HDU:
    """What the mandatory cards say."""
    kind = "PRIMARY" if not index else str(cards.get("XTENSION"))
    if not index and cards.get("SIMPLE") is not True:
        raise ValueError("its card SIMPLE is not T")
    axes = _axes(cards, "NAXIS")
    of_groups = cards.get("GROUPS") is True and axes[-1:] == (0,)
    n = math.prod(axes[:-1] if of_groups else axes) if axes else 0
    bits = count(cards, "BITPIX", low=-64)
    if bits not in TYPES:
        raise ValueError(f"its card BITPIX is {bits}")
    size = abs(bits) // 8 * count(cards, "GCOUNT", 1) * (count(cards, "PCOUNT", 0) + n)
    shape: tuple[int, ...] = ()
    if kind == "BINTABLE" and cards.get("ZIMAGE") is True:
        shape = _axes(cards, "ZNAXIS")
    elif kind in ("PRIMARY", "IMAGE") and not of_groups:
        constant = not axes and "PIXVALUE" in cards
        shape = (count(cards, "NPIX2"), count(cards, "NPIX1")) if constant else axes
    name = cards.get("EXTNAME")
    name = name.strip().upper() if isinstance(name, str) else ""
    return HDU(
        kind, name or ("" if index else "PRIMARY"), cards, header, place + len(header), size, shape
    )


def _axes(cards: Cards, name: str) -> tuple[int, ...]:
    """Lengths of the axes of an array, the last axis first."""
    return tuple(
        count(cards, f"{name}{axis}") for axis in range(count(cards, name, high=999), 0, -1)
    )


def _dtype(hdu: HDU) -> str:
    return TYPES[count(hdu.cards, "BITPIX", low=-64)]


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _checksum(content: bytes, before: int = 0) -> int:
    """Ones' complement sum of big-endian 32-bit words, after that of what comes before; zeros are as nothing."""
    words = np.frombuffer(content.ljust(-(-len(content) // 4) * 4, b"\0"), ">u4")
    total = int(words.sum(dtype=np.uint64)) + before
    while total >> 32:
        total = (total & 0xFFFFFFFF) + (total >> 32)
    return total
