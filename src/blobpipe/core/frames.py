"""FITS images and CSV tables, in and out; nothing here knows what a blob is.

Everything is written under a temporary name and then renamed, so that no run leaves half a file.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import re
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from blobpipe.core import hdus
from blobpipe.errors import FrameError, TableError, printable

if TYPE_CHECKING:
    import pandas as pd
    from astropy.io.fits import Header

BATCH = 64  # frames to a job: how work is shared out, never what comes out
BORDER_PX = 5  # reference pixels that FLT files leave out on each side
IMAGE = "a FITS image; fetch or write the file again"  # what a file should be
MJD_CARDS = ("EXPSTART", "MJD-OBS", "MJD-BEG", "MJD-AVG")  # in order: the first that is a date counts
DATE_CARDS = ("DATE-OBS", "DATE-BEG", "DATE-AVG")  # ISO 8601 in UTC, with or without the time
ISO_DATE = re.compile(r"(\d{4}-\d\d-\d\d)(?:(?:T| +)([\d:.]+))? *Z?")
ISO_TIME = re.compile(r"(\d\d):(\d\d)(?::(\d\d(?:\.\d*)?))? *Z?")
FIRST_MJD = 54960.0  # 2009-05-09, two days before the launch that brought the instrument
UNIX_MJD = 40587.0  # 1970-01-01
SUFFIXES = (".fits.fz", ".fits", ".fits.gz")
MIN_PX = 256  # one subframe
MIN_NOISE_FRAC = 1e-5  # photon noise of 10^10 electrons; 200 images of a full well (80,000) have 1.6 x 10^7
MAX_NOISE_FRAC = 0.5  # beyond it, an image cannot be a fraction of the light
NOISE_STEPS = 32  # quantisation of stored images: this many steps to one sigma of their noise
TILE_ROWS = 16  # rows compressed together: half the time of one by one, and smaller files

SAME_EXPOSURE_D, SAME_START_D = 1.0, 1.0 / 86_400  # between the dates of two versions: of one ROOTNAME, of one date
EXPOSURE_CARDS = (*MJD_CARDS, *DATE_CARDS, "TIME-OBS", "ROOTNAME", "FILTER", "TARGNAME", "DATE", "CAL_VER")

FRAME_COLUMNS = ("frame", "mjd")
BLOB_COLUMNS = ("blob", "x_px", "y_px", "radius_px", "depth_frac")
BLOB_SHAPES = ("disc", "diamond", "ring")
SIZE_PX = 1024  # side of the detector
BLOB_RANGES = {  # of a blob that can be; from the least to the largest that is taken
    "x_px": (-0.5, SIZE_PX - 0.5),
    "y_px": (-0.5, SIZE_PX - 0.5),
    "radius_px": (0.1, 100.0),
    "depth_frac": (1e-9, 1.0),
}
MJD_RANGE = (0.0, 100_000.0)  # 1858 to 2132; a Julian date or a time in seconds lies beyond
TEXT_COLUMNS = (
    *("frame", "blob", "first_frame", "first_date", "status", "reason", "shape", "label_name", "sha256", "decision"),
    *("reviewer", "at", "model", "params_hash", "model_sha256", "params_sha256", "stack_sha256"),
)
NUMBER_COLUMN = re.compile(r"(.*_)?(px|px2|frac|sigma|mjd|snr|score|probability)")  # words are none of their values
MAX_TABLE_BYTES = 2**28  # four times the largest table of 10,000 images
MAX_NAME_BYTES = 200  # what file systems take (255), less suffixes and the rest of temporary names
STACK = "reference"  # name of the median stack among the differences


class Exposure(NamedTuple):
    """What tells exposures and their versions apart: file name without its suffix, date, `EXPOSURE_CARDS` as far as there."""

    name: str
    mjd: float
    cards: Mapping[str, Any]


@dataclass(frozen=True)
class Frame:
    """One image as read.

    Attributes
    ----------
    name : str
        File name without its suffix.
    data : ndarray, shape (ny, nx), float32
        The science plane, NaN where the file has no value.
    header : mapping
        Cards of the primary header and of the image's, which come first where both have one: text, numbers and truth
        values; what cannot be used is left out.
    layout : str
        Where in the file the image was found, in words.
    """

    name: str
    data: npt.NDArray[np.float32]
    header: Mapping[str, hdus.Value]
    layout: str


def stream(seed: int, stage: str, *items: int | str) -> np.random.Generator:
    """An independent random stream for one item of one stage, whatever the order or number of cores."""
    words = [zlib.crc32(item.encode()) if isinstance(item, str) else item for item in (stage, *items)]
    # the count, because NumPy takes a short list of words for one with zeros at its end
    return np.random.default_rng([seed, len(words), *words])


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary name beside ``path``, renamed to it on success and removed on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = "".join(path.suffixes[-2:])
    temporary = path.with_name(f".{path.name.removesuffix(suffix)}.{os.getpid()}.tmp{suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.filename not in (None, str(temporary)):
            raise
        reason = (error.strerror or " ".join(str(error).split()))[:120]
        # NumPy hides why it wrote less than it was asked to: for lack of space
        hidden = errno.ENOSPC if "requested and" in reason else errno.EIO
        raise OSError(error.errno or hidden, reason, str(path)) from error  # now it names the file
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def frame_name(path: str | Path) -> str:
    """The file name without ``.fits``, ``.fits.fz`` or ``.fits.gz``; what cannot be printed is escaped."""
    name = printable(Path(path).name)
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), Path(name).stem)


def find_image(folder: str | Path, frame: str) -> Path:
    """The file of a frame in a folder, plain, tile-compressed or gzipped.

    Raises
    ------
    FrameError
        If there is none.
    TableError
        If the name is none.
    """
    require_name(frame, f"{folder}: frame")
    candidates = [Path(folder) / f"{frame}{suffix}" for suffix in SUFFIXES]
    for path in candidates:
        if path.is_file():
            return path
    raise FrameError(
        f"{candidates[0]}: not found (nor {', '.join(SUFFIXES[1:])}); add the image or take it off the list"
    )


def read_frame(path: str | Path) -> Frame:
    """Read an image in any layout that monitor images come in.

    The first HDU that holds an image is taken: a SCI extension before others, a 2-D array, or plane 0
    of a cube. Reference pixels that the file leaves out (1014 x 1014) are put back as NaN. Integer and
    big-endian data become native float32.

    Raises
    ------
    FrameError
        If the file is not FITS, is truncated, or holds no image of at least two by two pixels.

    Notes
    -----
    Source: ours, after the layouts met in real files.
    """
    path = Path(path)
    with hdus.opened(path, IMAGE) as file:
        index, image = _science_image(path, file)
        header = {
            name: value for hdu in (file.hdus[0], image) for name, value in hdu.cards.items() if value is not None
        }
        layout = f"HDU {index} ({image.name or 'unnamed'}), {'x'.join(map(str, image.shape[::-1]))}"
        plane = _plane(file, image)
    return Frame(frame_name(path), _with_reference_pixels(plane), header, layout)


def read_plane(path: str | Path, name: str) -> npt.NDArray[np.float32]:
    """Read the image of a given EXTNAME, float32, shape (ny, nx), from a file that `write_images` wrote."""
    with hdus.opened(path, f"an image {name}; run the stage that makes it") as file:
        hdu = file.named(name)
        if hdu is None:
            raise ValueError(f"no image {name} in its {len(file.hdus)} HDU")
        return _plane(file, hdu)


def find_plane(path: str | Path, name: str) -> npt.NDArray[np.float32] | None:
    """The same from a file that need not have one: others write stacks and differences too."""
    with hdus.opened(path, IMAGE) as file:
        hdu = file.named(name)
        return None if hdu is None else _plane(file, hdu)


def _plane(file: hdus.File, hdu: hdus.HDU) -> npt.NDArray[np.float32]:
    """An image or plane 0 of a cube, of a size that fits into memory, by its header."""
    if len(hdu.shape) not in (2, 3) or min(hdu.shape) < 1:
        raise ValueError(f"an array of shape {hdu.shape} instead of (ny, nx) or (planes, ny, nx)")
    ny, nx = hdu.shape[-2:]
    if nx * ny > hdus.MAX_PX:
        raise ValueError(f"an image of {nx}x{ny} pixels, at most {hdus.MAX_PX} are read")
    if not hdu.compressed:
        return hdus.physical(hdu.cards, file.plane(hdu))
    from blobpipe.core import unpack

    return hdus.physical(hdu.cards, unpack.first_plane(hdu.cards, hdu.shape, file.content(hdu)))


def _science_image(path: Path, file: hdus.File) -> tuple[int, hdus.HDU]:
    """The first HDU that holds an image, those named SCI before others, and its number."""
    order = sorted(range(len(file.hdus)), key=lambda i: file.hdus[i].name != "SCI")
    index = next((i for i in order if file.hdus[i].shape and 0 not in file.hdus[i].shape), None)
    if index is None:
        kinds = ", ".join(f"{hdu.kind} {hdu.name}".strip() for hdu in file.hdus[:9])
        raise FrameError(
            f"{path}: no image found in its {len(file.hdus)} HDU ({kinds}); expected one in HDU 0, 1 or SCI"
        )
    image = file.hdus[index]
    if len(image.shape) not in (2, 3) or min(image.shape[-2:]) < 2:
        raise FrameError(f"{path}: found an array of shape {image.shape}, expected (ny, nx) or (planes, ny, nx)")
    return index, image


def _with_reference_pixels(data: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    if data.shape != (1014, 1014):
        return data
    return np.pad(data, BORDER_PX, constant_values=np.nan)


def usable_image(path: str | Path) -> Frame:
    """Read an image and insist that blobs can be sought in it.

    Raises
    ------
    FrameError
        As `read_frame` and `insist_on_usable`.
    """
    frame = read_frame(path)
    insist_on_usable(frame, path)
    return frame


def exposure_mjd(frame: Frame, path: str | Path) -> float:
    """Date of an exposure (MJD), its start where the header tells it.

    The first of `MJD_CARDS` and `DATE_CARDS` that is a date within the instrument's life is taken; an empty card is none.

    Raises
    ------
    FrameError
        If the header has no such card.
    """
    found = []
    for card in (*MJD_CARDS, *DATE_CARDS):
        text = str(frame.header.get(card, "")).strip()
        if not text:
            continue
        clock = str(frame.header.get("TIME-OBS", "")).strip() if card == "DATE-OBS" else ""
        mjd = _number(text) if card in MJD_CARDS else _mjd_of(text, clock)
        if mjd is not None and is_date(mjd):
            return mjd
        found.append(f"{card} {text[:30]!r}")
    names = ", ".join(MJD_CARDS[:2])
    if not found:
        raise FrameError(f"{path}: no date of the exposure, expected {names} (MJD) or DATE-OBS in its header; add one")
    raise FrameError(
        f"{path}: no date of the exposure, found {', '.join(found)}, expected {names} (MJD) or DATE-OBS, from MJD "
        f"{FIRST_MJD:.0f} (2009-05-09) to tomorrow; correct its header"
    )


def is_date(mjd: float | None) -> bool:
    """Whether an image can be of this date."""
    first, last = dates()
    return mjd is not None and first <= mjd <= last


def dates() -> tuple[float, float]:
    """First and last date that an image can be of (MJD): from before the instrument was brought to orbit to tomorrow."""
    return FIRST_MJD, UNIX_MJD + time.time() / 86400 + 1


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _mjd_of(text: str, clock: str) -> float | None:
    """MJD of a date as the standard writes it, with its time or beside it; None if it is none."""
    match = ISO_DATE.fullmatch(text)
    if match is None:
        return None
    day, with_time = match.groups()
    at = ISO_TIME.fullmatch(with_time or clock or "00:00:00")
    if at is None:
        return None
    hours, minutes, seconds = (float(part or 0) for part in at.groups())
    try:
        days = date.fromisoformat(day).toordinal() - date(1858, 11, 17).toordinal()
    except ValueError:
        return None
    if hours >= 24 or minutes >= 60 or seconds >= 61:  # a leap second is the 61st
        return None
    return days + (3600 * hours + 60 * minutes + seconds) / 86400


def exposure_of(frame: Frame, path: str | Path) -> Exposure:
    """What tells an image's exposure from others; the date is NaN, and like no other, if the header has none."""
    try:
        mjd = exposure_mjd(frame, path)
    except FrameError:
        mjd = float("nan")
    return Exposure(frame.name, mjd, {card: frame.header[card] for card in EXPOSURE_CARDS if card in frame.header})


def is_same_exposure(one: Exposure, other: Exposure) -> bool:
    """Whether two images are versions of one exposure, such as before and after a new calibration.

    They are if they have the same ROOTNAME and the same date to a day; where one has no ROOTNAME, if they began in the same
    second (and neither filter nor target differ). Of a date without a time, the names of the files must be the same, too.

    Notes
    -----
    Source: ours. A ROOTNAME names one exposure of HST; the date guards against images that share a header.
    """
    apart_d = abs(one.mjd - other.mjd)
    names = [_text(each, "ROOTNAME").lower() for each in (one, other)]
    if all(names):
        return names[0] == names[1] and apart_d < SAME_EXPOSURE_D
    for card in ("FILTER", "TARGNAME"):
        if len({_text(one, card), _text(other, card)} - {""}) > 1:
            return False
    return apart_d <= SAME_START_D and ((_has_time(one) and _has_time(other)) or one.name == other.name)


def is_older_version(one: Exposure, other: Exposure) -> bool:
    """Whether one version of an exposure was made before another: by DATE (of the file), else by CAL_VER (of its calibration).

    False if the headers do not say: then the later arrival is the newer version.
    """
    made = [text if ISO_DATE.match(text) else "" for text in (_text(one, "DATE"), _text(other, "DATE"))]
    if all(made) and made[0] != made[1]:
        return made[0] < made[1]
    calibrated = [_version(_text(each, "CAL_VER")) for each in (one, other)]
    return all(map(bool, calibrated)) and calibrated[0] < calibrated[1]


def _text(exposure: Exposure, card: str) -> str:
    return str(exposure.cards.get(card, "")).strip()


def _has_time(exposure: Exposure) -> bool:
    """Whether the date tells more than the day."""
    return any(_text(exposure, card) for card in (*MJD_CARDS, "TIME-OBS")) or any(
        ":" in _text(exposure, card) for card in DATE_CARDS
    )


def _version(text: str) -> list[int]:
    """Numbers of a version such as 3.5.2(28-Oct-2020)."""
    return [int(number) for number in re.findall(r"\d+", text.partition("(")[0])]


def insist_on_usable(frame: Frame, path: str | Path) -> float:
    """Refuse what is no blob image or difference image of a full frame.

    Returns
    -------
    float
        Its noise (`median_and_noise`).

    Raises
    ------
    FrameError
        If it is smaller than one subframe, mostly without values, constant, in other units than a
        fraction of the light (its noise is less than any photon noise, or too high), or far from zero.
    """
    ny, nx = frame.data.shape
    if min(ny, nx) < MIN_PX:
        raise FrameError(
            f"{path}: found {nx}x{ny} pixels, expected a full frame of at least {MIN_PX}x{MIN_PX}; reject it"
        )
    finite = np.count_nonzero(np.isfinite(frame.data)) / frame.data.size
    if finite < 0.5:
        raise FrameError(f"{path}: {finite:.0%} of its pixels are finite, expected at least 50%; reject it")
    median, noise = median_and_noise(frame.data)
    if not noise > 0:
        raise FrameError(f"{path}: most pixels are {median:.6g}: a constant image or a mask, expected noise; reject it")
    if noise < MIN_NOISE_FRAC:
        raise FrameError(
            f"{path}: noise {noise:.3g}, expected light lost as a fraction (noise about 0.01): in other units, or scaled; "
            "make it again"
        )
    if noise > MAX_NOISE_FRAC:
        raise FrameError(
            f"{path}: noise {noise:.4g} {frame.header.get('BUNIT', '')}, expected light lost as a fraction (noise about "
            "0.01): a calibrated exposure, not a blob image; divide it by the flat first"
        )
    if abs(median) > 5 * noise:
        raise FrameError(
            f"{path}: median {median:.4g} with noise {noise:.4g}: not flattened, expected values around zero "
            "(light lost as a fraction); divide by the flat and subtract the large scales first"
        )
    return noise


def median_and_noise(data: npt.NDArray[np.float32]) -> tuple[float, float]:
    """Median and robust standard deviation (1.4826 MAD) of the finite pixels, every third row and column taken.

    Parameters
    ----------
    data : ndarray, shape (ny, nx)
        Some of them finite.
    """
    values = data[::3, ::3]
    values = values[np.isfinite(values)]
    if not values.size:
        values = data[np.isfinite(data)]
    middle = median(values)
    return float(middle), float(1.4826 * median(np.abs(values - middle)))


def median(values: npt.NDArray[np.float32]) -> np.floating[Any]:
    """``np.median(values)`` of numbers that are all finite, in a quarter of the time.

    Parameters
    ----------
    values : ndarray, shape (n,)

    Notes
    -----
    Source: ours. NumPy parts an array quickly at one place only; where two numbers are in the middle, the lower one is
    the highest of those below.
    """
    half = len(values) // 2
    parted = np.partition(values, half)
    return np.mean(parted[half : half + 1] if len(values) % 2 else [parted[:half].max(), parted[half]])


def write_image(
    path: str | Path,
    data: npt.NDArray[Any],
    *,
    name: str,
    header: Mapping[str, Any] | None = None,
    sigma: float | None = None,
) -> None:
    """Write a tile-compressed FITS image; the same input gives the same bytes.

    Parameters
    ----------
    path : path
        Written under a temporary name, then renamed.
    data : ndarray, shape (ny, nx)
        Integers are kept exactly; floats are rounded to ``sigma / 32``, NaN kept.
    name : str
        EXTNAME of the image.
    header : mapping, optional
        Cards for the image's header.
    sigma : float, optional
        Noise of float data; estimated tile by tile if not given.
    """
    write_images(path, {name: data}, header=header, sigma=sigma)


def write_images(
    path: str | Path,
    images: dict[str, npt.NDArray[Any]],
    *,
    header: Mapping[str, Any] | None = None,
    sigma: float | None = None,
) -> None:
    """Write several images to one file, as `write_image` writes one."""
    from astropy.io import fits

    written = fits.HDUList([fits.PrimaryHDU()])
    for name, data in images.items():
        written.append(_compressed(data, name, fits.Header(header or {}), sigma))
    with atomic(path) as temporary:
        written.writeto(temporary, overwrite=True)


def write_cube(path: str | Path, cube: npt.NDArray[np.float32]) -> None:
    """Write small images of one size, shape (n, ny, nx), float32, exactly, as a plain FITS cube."""
    from astropy.io import fits

    with atomic(path) as temporary:
        fits.PrimaryHDU(cube.astype(np.float32)).writeto(temporary, overwrite=True)


def read_cube(path: str | Path) -> npt.NDArray[np.float32]:
    """Read back what `write_cube` wrote."""
    with hdus.opened(path, "a cube of images; run the stage that makes it") as file:
        cube = file.hdus[0]
        if len(cube.shape) != 3:
            raise ValueError(f"an array of shape {cube.shape} instead of (planes, ny, nx)")
        return hdus.physical(cube.cards, file.cube(cube))


def _compressed(data: npt.NDArray[Any], name: str, header: Header, sigma: float | None) -> Any:
    from astropy.io import fits

    tile = (min(TILE_ROWS, len(data)), *data.shape[1:])
    if data.dtype.kind == "f":
        level = -sigma / NOISE_STEPS if sigma else float(NOISE_STEPS)
        return fits.CompImageHDU(
            data.astype(np.float32),
            header,
            name=name,
            compression_type="RICE_1",
            tile_shape=tile,
            quantize_level=level,
            quantize_method=-1,
        )
    return fits.CompImageHDU(data, header, name=name, compression_type="RICE_1", tile_shape=tile)


def is_name(name: str) -> bool:
    """Whether a frame can be called so: its files lie in the folder that they are meant for, and no name is two.

    That is what can be printed, without slash or backslash, without a dot or dash at its start, and no longer than
    `MAX_NAME_BYTES`.
    """
    tidy = name.isprintable() and not name.startswith((".", "-")) and "/" not in name and "\\" not in name
    return tidy and 0 < len(name.encode()) <= MAX_NAME_BYTES


def require_name(name: str, where: str) -> None:
    """Refuse what `is_name` says no to; the message begins with ``where`` it was found.

    Raises
    ------
    TableError
        If it is none.
    """
    if not is_name(name):
        found = f"{name[:40]}..." if len(name) > 40 else name
        raise TableError(
            f"{where} is {found!r}, expected the name of a file: at most {MAX_NAME_BYTES} bytes that can be printed, no "
            "slash or backslash, no dot or dash at its start; correct it"
        )


def read_table(path: str | Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read a CSV table and insist on its columns; ``frame``, ``blob`` and the like stay text, other gaps are NaN.

    Returns
    -------
    DataFrame
        Columns whose names say that they hold numbers (``x_px``, ``depth_frac``, ``mjd``, ...) do, or gaps; ``frame``
        and ``first_frame`` hold names (`require_name`) or nothing.

    Raises
    ------
    TableError
        If the file is missing, is no CSV table, lacks a column or has one twice, if one of its rows has more or fewer
        fields than its header, or if a value is not what its column holds.
    """
    path = Path(path)
    return parse_table(path, read_table_bytes(path, columns), columns)


def parse_table(path: Path, content: bytes, columns: Sequence[str]) -> pd.DataFrame:
    """The same from the bytes of a table; errors name ``path``."""
    import pandas as pd

    header, n_rows = _header_and_rows(path, content, columns)
    gaps = {name: [""] for name in header if name not in TEXT_COLUMNS}
    try:
        table = pd.read_csv(
            io.BytesIO(content),
            encoding="utf-8-sig",
            dtype=dict.fromkeys(TEXT_COLUMNS, str),
            keep_default_na=False,
            na_values=gaps,
            index_col=False,
            low_memory=False,
        )
    except (ValueError, OverflowError) as error:
        raise _no_table(path, " ".join(str(error).split())[:120]) from error
    if len(table) != n_rows:  # a line of blanks alone
        raise _no_table(path, f"{n_rows} rows, of which {len(table)} hold something")
    for name in [name for name in map(str, table) if NUMBER_COLUMN.fullmatch(name)]:
        table[name] = _numbers(path, table, name)
    for name in {"frame", "first_frame"} & set(table):
        for frame in set(table[name]) - {""}:
            require_name(frame, f"{path}: {name}")
    return table


def read_table_bytes(path: Path, columns: Sequence[str]) -> bytes:
    """All of a table's file.

    Raises
    ------
    TableError
        If it is missing, is no regular file, cannot be read, or is larger than any table.
    """
    try:
        if path.exists() and not path.is_file():
            raise _no_table(path, "not a file: a folder, a pipe or a device")
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise _no_table(path, f"{path.stat().st_size} bytes, at most {MAX_TABLE_BYTES} expected")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise TableError(f"{path}: not found, expected a table with the columns {', '.join(columns)}") from error
    except (OSError, ValueError) as error:  # a name with a NUL is a ValueError
        raise _no_table(path, getattr(error, "strerror", None) or str(error)) from error


def table_rows(path: Path, content: bytes) -> Iterator[tuple[list[str], str]]:
    """The rows of a CSV table, its header first: their fields, and each as it is written, with the end of its line.

    Blank lines belong to the row before them. A mark of the byte order at the beginning is left out.

    Raises
    ------
    TableError
        If the table is not UTF-8, has bytes 0, a quote that does not end, a column twice, or a row with more or fewer
        fields than its header.
    """
    if b"\0" in content:
        line = content.count(b"\n", 0, content.index(b"\0")) + 1
        raise _no_table(path, f"line {line}: a byte 0: is it UTF-16? save it as UTF-8")
    written: list[str] = []
    lines = io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", newline="")
    rows = csv.reader(_noting(lines, written), strict=True)
    try:
        yield from _checked_rows(rows, written)
    except UnicodeDecodeError as error:
        raise _no_table(path, f"byte {error.object[error.start]:#x} is not UTF-8; save it as UTF-8") from error
    except (ValueError, csv.Error) as error:
        raise _no_table(path, f"line {max(rows.line_num, 1)}: {error}") from error


def _checked_rows(rows: Iterable[list[str]], written: list[str]) -> Iterator[tuple[list[str], str]]:
    """Each row with the lines that were written down while it was read, and the blank ones after it."""
    header: list[str] = []
    row: list[str] = []
    n_lines = 0
    for fields in rows:
        if fields and row:
            yield row, "".join(written[:n_lines])
            del written[:n_lines]
        row = fields or row
        n_lines = len(written)
        header = header or _checked_header(fields)
        if len(row) != len(header):
            raise ValueError(f"{len(row)} fields, {len(header)} in the header")
    if not header:
        raise ValueError("no header: the file is empty")
    yield row, "".join(written)


def _noting(lines: Iterable[str], written: list[str]) -> Iterator[str]:
    """Lines as they are asked for, noted down."""
    for line in lines:
        written.append(line)
        yield line


def _checked_header(header: list[str]) -> list[str]:
    twice = [name for name in header if name and header.count(name) > 1]
    if twice:
        raise ValueError(f"two columns are called {twice[0][:40]!r}; rename or remove one")
    for other, mark in (("semicolons", ";"), ("tabs", "\t")):
        if len(header) == 1 and mark in header[0]:
            raise ValueError(f"{other} between its fields, commas expected, and points in its numbers")
    return header


def _header_and_rows(path: Path, content: bytes, columns: Sequence[str]) -> tuple[list[str], int]:
    """The header of a table, which has all columns, and how many rows follow it."""
    rows = table_rows(path, content)
    header, _ = next(rows)
    missing = [column for column in columns if column not in header]
    if missing:
        found = " ".join(", ".join(header).split())
        found = f"{found[:200]}..." if len(found) > 200 else found
        raise TableError(
            f"{path}: column {missing[0]} is missing; found {found}; expected {', '.join(columns)}; add it"
        )
    return header, sum(1 for _ in rows)


def _no_table(path: Path, reason: str) -> TableError:
    return TableError(f"{path}: cannot be read as CSV ({reason})")


def _numbers(path: Path, table: pd.DataFrame, column: str) -> pd.Series[Any]:
    """A column as numbers; whatever is neither a number nor a gap is refused."""
    import pandas as pd

    found = table[column]
    if found.dtype.kind in "iuf":
        return found
    if found.dtype.kind == "b":
        _insist_on(path, table, column, ~found.notna(), "a number")
    numbers = pd.to_numeric(found, errors="coerce").astype(float)
    _insist_on(path, table, column, numbers.notna() | found.isna(), "a number")
    return numbers


def csv_text(table: pd.DataFrame, *, header: bool = True, newline: str = "\n") -> str:
    """A table as CSV: nine significant digits, the same bytes everywhere."""
    text = str(table.to_csv(index=False, header=header, float_format="%.9g", lineterminator=newline))
    if "\r" in text.replace(newline, ""):  # Python's csv leaves one alone unquoted, and it would end the row
        return csv_text(table.replace("\r\n?", "\n", regex=True), header=header, newline=newline)
    return text


def write_table(path: str | Path, table: pd.DataFrame) -> None:
    """Write a CSV table: nine significant digits, the same bytes everywhere."""
    with atomic(path) as temporary:
        temporary.write_text(csv_text(table), encoding="utf-8", newline="")


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write a JSON file, keys in the order given."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_frame_list(raw_dir: str | Path) -> pd.DataFrame:
    """``frames.csv`` of a folder of images: one row per image, in the order of the file.

    Raises
    ------
    TableError
        As `read_image_list`, or if there is no row, or a frame has no image.
    """
    path = Path(raw_dir) / "frames.csv"
    table = read_image_list(path)
    if table.empty:
        raise TableError(f"{path}: found no row below its header, expected one for each image; list the images")
    for frame in table["frame"]:
        if not any((Path(raw_dir) / f"{frame}{suffix}").is_file() for suffix in SUFFIXES):
            raise TableError(
                f"{path}: frame {frame} has no image {frame}{SUFFIXES[0]} beside it; add it or drop the row"
            )
    return table


def read_image_list(path: str | Path) -> pd.DataFrame:
    """A table of images with their names and dates, wherever the images are.

    Raises
    ------
    TableError
        If a column is missing, a frame stands twice or has a name that none can have, a date is no MJD, or the dates do
        not increase.
    """
    path = Path(path)
    table = read_table(path, FRAME_COLUMNS)
    for frame in table["frame"]:
        require_name(frame, f"{path}: frame")
    require_once(path, table, "frame")
    _refuse_one_file(path, table["frame"])
    low, high = MJD_RANGE
    _insist_on(path, table, "mjd", np.isfinite(table["mjd"]), "a number")
    _insist_on(path, table, "mjd", table["mjd"].between(low, high), f"a modified Julian date, {low:g} to {high:g}")
    if not table["mjd"].is_monotonic_increasing:
        raise TableError(
            f"{path}: the column mjd does not increase; sort the rows by date, the stack is of preceding images"
        )
    return table


def _refuse_one_file(path: Path, names: pd.Series[str]) -> None:
    """Refuse names whose files would be one: those of the median stack, or of each other where case is not told apart."""
    folded = names.str.casefold()
    if (folded == STACK).any():
        raise TableError(f"{path}: frame {STACK} would overwrite the median stack {STACK}.fits.fz; rename the image")
    if folded.duplicated().any():
        again = names[folded.duplicated()].iloc[0]
        raise TableError(f"{path}: frame {again} is there in other letters, one file on some disks; rename one image")


def read_known(path: str | Path, columns: Sequence[str] = BLOB_COLUMNS) -> pd.DataFrame:
    """Read known blobs: a table whose values of these columns blobs can have.

    Raises
    ------
    TableError
        As `read_table` and `require_blobs`, or if a blob stands twice.
    """
    path = Path(path)
    table = require_blobs(path, read_table(path, columns), columns)
    if "blob" in table:
        _insist_on(path, table, "blob", table["blob"] != "", "a name")
        require_once(path, table, "blob")
    return table


def require_blobs(path: str | Path, table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Refuse places off the detector, and sizes and depths that no blob has (`BLOB_RANGES`).

    Parameters
    ----------
    path : path
        What errors name.
    table : DataFrame
        Its index counts the rows below the header.
    columns : sequence of str
        Those of them that have a range are looked at.

    Returns
    -------
    DataFrame
        The same with numbers in these columns.

    Raises
    ------
    TableError
        If a value is a word, a gap, infinite, or out of its range.
    """
    table = table.copy()
    for column in filter(BLOB_RANGES.__contains__, columns):
        table[column] = _numbers(Path(path), table, column)
        low, high = BLOB_RANGES[column]
        _insist_on(Path(path), table, column, np.isfinite(table[column]), "a number")
        _insist_on(Path(path), table, column, table[column].between(low, high), f"{low:g} to {high:g}")
    return table


def read_blobs(raw_dir: str | Path) -> pd.DataFrame:
    """``blobs.csv`` of a folder of images: the catalogue; empty if there is no such file.

    Columns blob, x_px, y_px, radius_px, depth_frac, shape (``disc`` if not given) and first_frame (empty
    for a blob older than the first image).

    Raises
    ------
    TableError
        As `read_known`, or if a shape cannot be drawn, or a first frame is not in ``frames.csv``.
    """
    import pandas as pd

    path = Path(raw_dir) / "blobs.csv"
    if not path.exists():
        return pd.DataFrame({column: [] for column in (*BLOB_COLUMNS, "shape", "first_frame")})
    table = read_known(path)
    for column, default in (("shape", "disc"), ("first_frame", "")):
        if column not in table:
            table[column] = default
    _insist_on(path, table, "shape", table["shape"].isin(BLOB_SHAPES), f"one of {', '.join(BLOB_SHAPES)}")
    unknown = sorted(set(table["first_frame"]) - {""} - set(read_frame_list(raw_dir)["frame"]))
    if unknown:
        raise TableError(f"{path}: first_frame {unknown[0]} is not a frame of frames.csv; correct it or add the frame")
    return table


def require_once(path: Path, table: pd.DataFrame, column: str) -> None:
    repeated = table[column][table[column].duplicated()]
    if len(repeated):
        found = " ".join(repeated.iloc[0].split())[:MAX_NAME_BYTES]
        raise TableError(f"{path}: {column} {found} stands twice, expected once; remove a row")


def _insist_on(path: Path, table: pd.DataFrame, column: str, good: pd.Series[bool], expected: str) -> None:
    if not good.all():
        row = table.index[~good][0]
        found = np.asarray(table[column], dtype=object)[~good][0]
        found = f"{found[:40]}..." if isinstance(found, str) and len(found) > 40 else found
        raise TableError(f"{path}: row {row + 2}: {column} is {found!r}, expected {expected}; correct it")


def read_stage(folder: str | Path) -> pd.DataFrame:
    """The per-frame tables of all batches of a stage, as one, in the order of the frames.

    Raises
    ------
    TableError
        If the stage has made none, or a frame stands in them twice.
    """
    import pandas as pd

    paths = stage_tables(folder)
    table = pd.concat([read_table(path, ("frame", "status")) for path in paths], ignore_index=True)
    require_once(Path(folder) / "frames-*.csv", table, "frame")
    return table


def image_table(raw_dir: str | Path, difference_dir: str | Path, scale_dir: str | Path) -> pd.DataFrame:
    """All images in order of date, and whether they came through to the scale stage.

    Returns
    -------
    DataFrame
        frame, mjd, status (``ok`` or why not), reason, shift_x_px, shift_y_px, noise_frac, n_stack.
    """
    listed = read_frame_list(raw_dir)[["frame", "mjd"]]
    subtracted = read_stage(difference_dir).drop(columns=["mjd"], errors="ignore")
    table = listed.merge(subtracted, on="frame", how="left", validate="one_to_one")
    scaled = listed[["frame"]].merge(read_stage(scale_dir)[["frame", "status", "reason"]], on="frame", how="left")
    lost = (table["status"] == "ok") & (scaled["status"] != "ok")
    table["status"] = table["status"].mask(lost, "rejected").fillna("rejected")
    unusual = "rejected by the stage clip or scale, see their tables"
    table["reason"] = table["reason"].mask(lost, scaled["reason"].fillna(unusual)).fillna("not in the difference stage")
    return table


def stage_tables(folder: str | Path, batch: int | None = None) -> list[Path]:
    """The tables ``frames-NNN.csv`` of an image stage, of one batch or of all.

    Raises
    ------
    TableError
        If the stage has made none.
    """
    paths = sorted(Path(folder).glob("frames-*.csv" if batch is None else f"frames-{batch:03d}.csv"))
    if not paths:
        raise TableError(f"{folder}: no table frames-*.csv found; run the stage '{Path(folder).name}' first")
    return paths


def batches(n_frames: int) -> list[slice]:
    """Consecutive runs of at most `BATCH` rows."""
    return [slice(start, min(start + BATCH, n_frames)) for start in range(0, n_frames, BATCH)]
