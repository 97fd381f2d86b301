"""Read and write FITS images; nothing here knows what a blob is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from blobpipe.core import files, hdus
from blobpipe.core.arrays import Float32Array, Int64Array
from blobpipe.core.detector import DEFAULT, Detector
from blobpipe.errors import FrameError, printable

# What a file should be and what to do, for messages
IMAGE = "a FITS image; fetch or write the file again"

SUFFIXES = (".fits.fz", ".fits", ".fits.gz")

# Name of the median stack among the difference images
STACK = "reference"

# Smallest side of an image that can be searched (px): one subframe
MIN_PX = 256

# Range of the noise of an image (fraction of the light). The lower end is the photon noise of 10^10 electrons; a stack
# of 200 images of a full well (80,000) has 1.6 x 10^7. Beyond the upper end, an image cannot be a fraction of the light.
MIN_NOISE_FRAC = 1e-5
MAX_NOISE_FRAC = 0.5

# Quantisation of stored images: steps per sigma of their noise
NOISE_STEPS = 32

# Units of counts begin with one of these
OF_COUNTS = ("ELECTRON", "COUNT", "DN", "ADU")

# Units of surface brightness hold one of these
OF_BRIGHTNESS = ("SR", "ARCSEC")

# Rows compressed together; half the time of one row at a time, and smaller files
TILE_ROWS = 16


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
        Cards of the primary header and of the image's header, which takes precedence: text, numbers and truth values;
        cards that cannot be used are left out.
    layout : str
        Where in the file the image was found, in words.
    dq : ndarray, shape (ny, nx), int64, or None
        Data-quality flags of each pixel (extension DQ); None if the file has none.
    """

    name: str
    data: Float32Array
    header: Mapping[str, hdus.Value]
    layout: str
    dq: Int64Array | None = None


def frame_name(path: str | Path) -> str:
    """Return the file name without ``.fits``, ``.fits.fz`` or ``.fits.gz``, unprintable characters escaped."""
    name = printable(Path(path).name)
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return Path(name).stem


def find_image(folder: str | Path, frame: str) -> Path:
    """Return the file of a frame in a folder: plain, tile-compressed or gzipped.

    Raises
    ------
    FrameError
        If there is none.
    TableError
        If ``frame`` cannot be the name of a frame.
    """
    files.require_name(frame, f"{folder}: frame")
    candidates = [Path(folder) / f"{frame}{suffix}" for suffix in SUFFIXES]
    for path in candidates:
        if path.is_file():
            return path
    raise FrameError(
        f"{candidates[0]}: not found (nor {', '.join(SUFFIXES[1:])}); add the image or take it off the list"
    )


def read_frame(path: str | Path, detector: Detector = DEFAULT) -> Frame:
    """Read an image in any layout that monitor images come in.

    The first HDU that holds an image is taken: a SCI extension before others, a 2-D array, or plane 0 of a cube.
    Reference pixels that the file leaves out are put back as NaN, with the DQ 0. Integer and big-endian data become
    native float32. Cards that the detector calls by other names are also found under those that blobpipe uses.

    Parameters
    ----------
    path : path
    detector : Detector, optional
        Whose image it is.

    Raises
    ------
    FrameError
        If the file is not FITS, is truncated, holds no image of at least two by two pixels, or has a DQ of another size.

    Notes
    -----
    Source: this project, after the layouts of real files.
    """
    return _read_frame(Path(path), detector, "SCI", "DQ", required=False)


def read_exposure(path: str | Path, detector: Detector = DEFAULT, part: str = "") -> Frame:
    """Read the exposure of a detector from a FITS file, from the extensions that the detector's file names.

    Parameters
    ----------
    path : path
    detector : Detector, optional
    part : str
        Which of the detectors of a file that holds several: one of ``detector.exposure.detectors``.

    Returns
    -------
    Frame
        Pixels without a positive standard error have no value, if the detector's files have standard errors.

    Raises
    ------
    FrameError
        As `read_frame`.
    """
    path = Path(path)
    names = detector.exposure
    image, dq, error = (name.format(detector=part) for name in (names.image, names.dq, names.error))
    frame = _read_frame(path, detector, image, dq, required=bool(part))
    if part:
        frame = replace(frame, name=f"{frame.name}_{part}")
    if not error:
        return frame
    errors = read_plane(path, error)
    if errors.shape == detector.light_shape:
        errors = np.pad(errors, detector.border_px, constant_values=np.nan)
    if errors.shape != frame.data.shape:
        raise FrameError(
            f"{path}: {error} has the shape {errors.shape}, expected that of the image, {frame.data.shape}; fetch the "
            "file again"
        )
    return replace(frame, data=np.where(errors > 0, frame.data, np.float32(np.nan)))


def _read_frame(
    path: Path, detector: Detector, image_name: str, dq_name: str, *, required: bool
) -> Frame:
    """Read an image and its flags by the names of their extensions.

    Parameters
    ----------
    required : bool
        Take no other image if there is none of that name.
    """
    with hdus.opened(path, IMAGE) as file:
        if required and file.named(image_name) is None:
            names = ", ".join(hdu.name for hdu in file.hdus[:9])
            raise FrameError(
                f"{path}: found no image {image_name} in its {len(file.hdus)} HDU ({names}, ...), expected one; fetch the "
                "file again, or correct exposure in the detector's file"
            )
        index, image = _science_image(path, file, image_name)
        # The image's cards come last, so that they take precedence
        cards = [*file.hdus[0].cards.items(), *image.cards.items()]
        header = with_usual_names(
            {name: value for name, value in cards if value is not None}, detector
        )
        size = "x".join(map(str, image.shape[::-1]))
        layout = f"HDU {index} ({image.name or 'unnamed'}), {size}"
        data = plane(file, image)
        dq = _read_dq(path, file, data.shape, dq_name)
    return with_border(Frame(frame_name(path), data, header, layout, dq), detector)


def with_usual_names(header: Mapping[str, hdus.Value], detector: Detector) -> dict[str, hdus.Value]:
    """Return a header in which the cards of a detector are also found under the names that blobpipe uses."""
    named = dict(header)
    cards = detector.cards
    for usual, own in (
        ("TARGNAME", cards.target),
        ("FILTER", cards.filter),
        ("ROOTNAME", cards.exposure),
        ("LEVEL_E", cards.level),
    ):
        if own in header:
            named[usual] = header[own]
    # A number is an MJD, a text is ISO 8601
    if cards.date in header:
        date = header[cards.date]
        named["DATE-OBS" if isinstance(date, str) else "EXPSTART"] = date
    return named


def with_border(frame: Frame, detector: Detector) -> Frame:
    """Return an image with the border that its file leaves out: NaN, with the DQ 0."""
    if frame.data.shape != detector.light_shape:
        return frame
    width = detector.border_px
    dq = None if frame.dq is None else np.pad(frame.dq, width)
    return replace(frame, data=np.pad(frame.data, width, constant_values=np.nan), dq=dq)


def _read_dq(path: Path, file: hdus.File, shape: tuple[int, ...], name: str) -> Int64Array | None:
    """Read the data-quality flags of an image; None if the file has none."""
    hdu = file.named(name)
    if not name or hdu is None or not hdu.shape:
        return None
    flags = integers(file, hdu)
    if flags is None:
        # Measured values, which no DQ should be, count as far as they are whole numbers
        flags = np.nan_to_num(plane(file, hdu)).astype(np.int64)
    if flags.shape != shape:
        raise FrameError(
            f"{path}: {name} has the shape {flags.shape}, expected that of the image, {shape}; fetch the file again"
        )
    return flags


def integers(file: hdus.File, hdu: hdus.HDU) -> Int64Array | None:
    """Return an image of integers, or plane 0 of a cube, BZERO applied to unsigned ones; None if it holds other values."""
    if hdu.compressed:
        from blobpipe.core import unpack

        stored = unpack.first_plane(hdu.cards, hdu.shape, file.content(hdu))
    else:
        stored = file.plane(hdu)

    # An image of one value may have no data; other scales than 1 mean measured values
    is_constant = not hdu.size and float(stored.flat[0]).is_integer()
    is_integer = stored.dtype.kind in "iu" or is_constant
    if not is_integer or hdus.number(hdu.cards, "BSCALE", 1) != 1:
        return None

    values = stored.astype(np.int64)
    zero = hdus.number(hdu.cards, "BZERO", 0)
    if zero != 2.0**63:
        return values + int(zero)

    # Unsigned 64-bit integers: adding BZERO flips the sign bit, and the result must fit into 63 bits
    if values.max() >= 0:
        raise ValueError(f"DQ value {int(values.max()) + 2**63}, less than 2**63 expected")
    return values ^ np.int64(-(2**63))


def read_pixels(path: str | Path) -> Float32Array:
    """Read the image of a file that a stage has written, as it is: no border is put back, no other card looked up.

    Returns
    -------
    ndarray, shape (ny, nx), float32

    Raises
    ------
    FrameError
        If the file holds no image, or cannot be read.
    """
    path = Path(path)
    with hdus.opened(path, IMAGE) as file:
        _, image = _science_image(path, file, "SCI")
        return plane(file, image)


def read_plane(path: str | Path, name: str) -> Float32Array:
    """Read the image of a given EXTNAME from a file that `write_images` wrote.

    Returns
    -------
    ndarray, shape (ny, nx), float32

    Raises
    ------
    FrameError
        If there is none, or the file cannot be read.
    """
    with hdus.opened(path, f"an image {name}; run the stage that makes it") as file:
        hdu = file.named(name)
        if hdu is None:
            raise ValueError(f"no image {name} in its {len(file.hdus)} HDU")
        return plane(file, hdu)


def find_plane(path: str | Path, name: str) -> Float32Array | None:
    """Read the image of a given EXTNAME, or return None if the file has none, as files of others may.

    Raises
    ------
    FrameError
        If the file cannot be read.
    """
    with hdus.opened(path, IMAGE) as file:
        hdu = file.named(name)
        return None if hdu is None else plane(file, hdu)


def plane(file: hdus.File, hdu: hdus.HDU) -> Float32Array:
    """Read an image, or plane 0 of a cube, of a size that fits into memory."""
    if len(hdu.shape) not in (2, 3) or min(hdu.shape) < 1:
        raise ValueError(f"an array of shape {hdu.shape} instead of (ny, nx) or (planes, ny, nx)")
    ny, nx = hdu.shape[-2:]
    if nx * ny > hdus.MAX_PX:
        raise ValueError(f"an image of {nx}x{ny} pixels, at most {hdus.MAX_PX} are read")
    if not hdu.compressed:
        return hdus.physical(hdu.cards, file.plane(hdu))
    from blobpipe.core import unpack

    stored = unpack.first_plane(hdu.cards, hdu.shape, file.content(hdu))
    return hdus.physical(hdu.cards, stored)


def _science_image(path: Path, file: hdus.File, name: str) -> tuple[int, hdus.HDU]:
    """Return the first HDU that holds an image, those of a name before others, and its number."""
    order = sorted(range(len(file.hdus)), key=lambda i: file.hdus[i].name != name.upper())
    index = next((i for i in order if file.hdus[i].shape and 0 not in file.hdus[i].shape), None)
    if index is None:
        kinds = ", ".join(f"{hdu.kind} {hdu.name}".strip() for hdu in file.hdus[:9])
        raise FrameError(
            f"{path}: no image found in its {len(file.hdus)} HDU ({kinds}); expected one in HDU 0, 1 or {name}; "
            "fetch or write the file again"
        )
    image = file.hdus[index]
    if len(image.shape) not in (2, 3) or min(image.shape[-2:]) < 2:
        raise FrameError(
            f"{path}: found an array of shape {image.shape}, expected (ny, nx) or (planes, ny, nx); fetch or write the "
            "file again"
        )
    return index, image


def read_image(path: str | Path, detector: Detector = DEFAULT) -> Frame:
    """Read an image that can be searched for blobs.

    Raises
    ------
    FrameError
        As `read_frame` and `require_usable`.
    """
    frame = read_frame(path, detector)
    require_usable(frame, path)
    return frame


def require_usable(frame: Frame, path: str | Path) -> float:
    """Refuse what is neither a blob image nor a difference image of a full frame.

    Parameters
    ----------
    frame : Frame
    path : path
        File of the image, for the message.

    Returns
    -------
    float
        Noise of the image (fraction of the light), from `median_and_noise`.

    Raises
    ------
    FrameError
        If the image is smaller than one subframe, has values in less than half of its pixels, is constant, is not in
        units of a fraction of the light (its noise is below any photon noise, or too high), or is far from zero.
    """
    # Size, and values in most pixels
    ny, nx = frame.data.shape
    if min(ny, nx) < MIN_PX:
        raise FrameError(
            f"{path}: found {nx}x{ny} pixels, expected a full frame of at least {MIN_PX}x{MIN_PX}; reject it"
        )
    finite_frac = np.count_nonzero(np.isfinite(frame.data)) / frame.data.size
    if finite_frac < 0.5:
        raise FrameError(
            f"{path}: {finite_frac:.0%} of its pixels are finite, expected at least 50%; reject it"
        )

    # The noise and the median tell the unit, and if the light has been divided out
    middle, noise = median_and_noise(frame.data)
    if not noise > 0:
        raise FrameError(
            f"{path}: most pixels are {middle:.6g}: a constant image or a mask, expected noise; reject it"
        )
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
    if abs(middle) > 5 * noise:
        raise FrameError(
            f"{path}: median {middle:.4g} with noise {noise:.4g}: not flattened, expected values around zero "
            "(light lost as a fraction); divide by the flat and subtract the large scales first"
        )
    return noise


def is_exposure(frame: Frame, detector: Detector = DEFAULT) -> bool:
    """Tell whether an image is a calibrated exposure, in units of light and with flags, and no blob image."""
    if frame.dq is None or detector.exposure.unit == "light_lost":
        return False
    unit = str(frame.header.get("BUNIT", "")).upper()
    if detector.exposure.unit == "surface_brightness":
        return any(name in unit for name in OF_BRIGHTNESS)
    return unit.startswith(OF_COUNTS)


def median_and_noise(data: Float32Array) -> tuple[float, float]:
    """Return the median and the robust standard deviation (1.4826 MAD) of the finite pixels.

    Every third row and column is taken, or all pixels if none of these is finite.

    Parameters
    ----------
    data : ndarray, shape (ny, nx)
        At least one finite pixel.
    """
    values = data[::3, ::3]
    values = values[np.isfinite(values)]
    if not values.size:
        values = data[np.isfinite(data)]
    middle = median(values)
    deviation = median(np.abs(values - middle))
    return float(middle), float(1.4826 * deviation)


def median(values: Float32Array) -> np.floating[Any]:
    """Return ``np.median(values)`` of numbers that are all finite, in a quarter of the time.

    Parameters
    ----------
    values : ndarray, shape (n,)

    Notes
    -----
    Source: this project. NumPy partitions an array quickly at one place only; of an even number of values, the lower
    middle one is the highest of those below that place.
    """
    half = len(values) // 2
    parted = np.partition(values, half)
    middle = parted[half : half + 1]
    if len(values) % 2 == 0:
        middle = np.append(parted[:half].max(), middle)
    return np.mean(middle)


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
        Noise of float data, in its unit; estimated tile by tile if not given.
    """
    write_images(path, {name: data}, header=header, sigma=sigma)


def write_images(
    path: str | Path,
    images: dict[str, npt.NDArray[Any]],
    *,
    header: Mapping[str, Any] | None = None,
    sigma: float | None = None,
) -> None:
    """Write several images, by EXTNAME, to one file, as `write_image` writes one.

    A constant image is not compressed: it cannot be quantised, and what astropy does instead stores
    the time.
    """
    from astropy.io import fits

    written = fits.HDUList([fits.PrimaryHDU()])
    for name, data in images.items():
        if data.dtype.kind == "f" and (data == data.flat[0]).all():
            written.append(fits.ImageHDU(data.astype(np.float32), fits.Header(header or {}), name))
            continue
        tile = (min(TILE_ROWS, len(data)), *data.shape[1:])
        quantised: dict[str, Any] = {}
        if data.dtype.kind == "f":
            # Astropy takes a negative level as the size of a step, a positive one as steps per sigma
            level = -sigma / NOISE_STEPS if sigma else float(NOISE_STEPS)
            quantised = {"quantize_level": level, "quantize_method": -1}
            data = data.astype(np.float32)
        compressed = fits.CompImageHDU(
            data,
            fits.Header(header or {}),
            name=name,
            compression_type="RICE_1",
            tile_shape=tile,
            **quantised,
        )
        written.append(compressed)
    with files.atomic(path) as temporary:
        written.writeto(temporary, overwrite=True)


def write_cube(path: str | Path, cube: Float32Array) -> None:
    """Write small images of one size, shape (n, ny, nx), as a plain FITS cube of float32."""
    from astropy.io import fits

    with files.atomic(path) as temporary:
        fits.PrimaryHDU(cube.astype(np.float32)).writeto(temporary, overwrite=True)


def read_cube(path: str | Path) -> Float32Array:
    """Read what `write_cube` wrote, shape (n, ny, nx), float32.

    Raises
    ------
    FrameError
        If the file cannot be read, or holds no cube.
    """
    with hdus.opened(path, "a cube of images; run the stage that makes it") as file:
        cube = file.hdus[0]
        if len(cube.shape) != 3:
            raise ValueError(f"an array of shape {cube.shape} instead of (planes, ny, nx)")
        return hdus.physical(cube.cards, file.cube(cube))
