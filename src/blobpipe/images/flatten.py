"""Flatten a calibrated exposure of the dark Earth into a blob image: the fraction of the light that each pixel lacks.

The exposure is divided by its own large scales. Blobs, and whatever else stands out, are masked when these are measured,
so a blob keeps its depth.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from blobpipe import __version__
from blobpipe.core import fits_images
from blobpipe.core.arrays import Image, Int64Array, Mask
from blobpipe.core.detector import DEFAULT, Detector
from blobpipe.core.hdus import MAX_TEXT, Value
from blobpipe.core.threads import unwarned
from blobpipe.errors import FrameError, printable
from blobpipe.images.bad_pixels import BadPixels

if TYPE_CHECKING:
    from astropy.io.fits import Header

log = logging.getLogger(__name__)

# Boxes with more masked pixels than this are interpolated from their neighbours (per cent)
MOSTLY = 80.0

# Gaussian sigma of the scale on which structures are found (px), their smallest height (sigma, and fraction of the light
# for images without noise), and the margin around them, which covers the faint feet of a blob (px)
SMOOTHING_PX = 2.0
STANDS_OUT_SIGMA = 4.0
FAINTEST_FRAC = 1e-4
MARGIN_PX = 6

# Largest fraction of masked pixels of an image; some box then has enough good ones
MOST_MASKED = 0.75

# Cards of an exposure that its blob image keeps
CARDS = (
    "TELESCOP",
    "INSTRUME",
    "DETECTOR",
    "FILTER",
    "TARGNAME",
    "ROOTNAME",
    "PROPOSID",
    "EXPSTART",
    "EXPTIME",
    "SAMP_SEQ",
    "NSAMP",
    "CAL_VER",
    "BPIXTAB",
    "PFLTFILE",
    "DFLTFILE",
)

# Cards of the date that it keeps if there is no EXPSTART
OTHER_DATES = ("MJD-OBS", "MJD-BEG", "MJD-AVG", "DATE-OBS", "TIME-OBS", "DATE-BEG", "DATE-AVG")

# Ends of the names of exposures by their level of calibration, which blob images do not have
LEVELS = ("_flt", "_ima", "_cal", "_rate")


def flatten_exposure(
    path: str | Path,
    out_dir: str | Path,
    bad_pixels: BadPixels | None = None,
    detector: Detector = DEFAULT,
    part: str = "",
) -> Path:
    """Write the blob image of a calibrated exposure.

    Parameters
    ----------
    path : path
        A full frame, with its border or without (of a cube, such as an IMA file, plane 0 is taken), in the layout that
        the detector's file describes, with DQ.
    out_dir : path
        Gets ``{rootname}_blob.fits.fz``: with its border, light lost positive, NaN where a pixel is flagged and on
        the border.
    bad_pixels : BadPixels, optional
        Pixels that get no value, and the DQ flags that count; by default those of the detector.
    detector : Detector, optional
    part : str
        Which of the detectors of a file that holds several; its blob images are in a folder of its name.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    FrameError
        If it is not a full frame, has no DQ, has not been divided by the flat, or holds too little light.

    Notes
    -----
    Source: this project; the convention of blob images is that of ISR 2021-08.
    """
    path = Path(path)
    bad = bad_pixels or BadPixels(dq_flags=detector.exposure.bad_dq)
    frame = _require_full_frame(read_exposure(path, detector, part), path, detector)
    frame = bad.blank_files(frame, path)
    loss = _loss_of(frame, path, bad, detector)

    out = output(path, out_dir, part)
    noise = fits_images.median_and_noise(loss)[1]
    header = _header(path, frame, bad, detector)
    fits_images.write_image(out, loss, name="SCI", header=header, sigma=noise)
    return out


def read_blob_image(
    path: str | Path, bad_pixels: BadPixels, detector: Detector = DEFAULT
) -> fits_images.Frame:
    """Read a blob image without its bad pixels; of a calibrated exposure, make one as `flatten_exposure` does.

    Raises
    ------
    FrameError
        If it cannot be read, or is an exposure that cannot be flattened.
    """
    path = Path(path)
    frame = fits_images.read_frame(path, detector)
    if not fits_images.is_exposure(frame, detector):
        return bad_pixels.blank(frame, path)
    exposure = _require_full_frame(read_exposure(path, detector), path, detector)
    exposure = bad_pixels.blank_files(exposure, path)
    return replace(exposure, data=_loss_of(exposure, path, bad_pixels, detector))


def _require_full_frame(
    frame: fits_images.Frame, path: Path, detector: Detector
) -> fits_images.Frame:
    """Refuse an exposure that is not a full frame."""
    if frame.data.shape != detector.shape:
        ny, nx = frame.data.shape
        raise FrameError(
            f"{path}: found {nx}x{ny} pixels, expected a full frame, {detector.sizes}; leave it out"
        )
    return frame


def _loss_of(frame: fits_images.Frame, path: Path, bad: BadPixels, detector: Detector) -> Image:
    """Return the light that is missing on an exposure, NaN where a pixel is flagged and on the border."""
    # The reference pixels see no light
    science = detector.without_border(frame.data)
    flags = detector.without_border(_flags(path, frame, detector))
    good = np.where(_bad(science, flags, bad.dq_flags), np.float32(np.nan), science)
    loss = _loss(path, frame, good, flags, bad, detector)
    return np.pad(loss, detector.border_px, constant_values=np.nan)


def read_exposure(
    path: str | Path, detector: Detector = DEFAULT, part: str = ""
) -> fits_images.Frame:
    """Read an exposure from the file that the detector's file describes, FITS or ASDF.

    Parameters
    ----------
    path : path
    detector : Detector, optional
    part : str
        Which of the detectors of a file that holds several.

    Returns
    -------
    Frame
        With its border. Pixels without a positive standard error have no value, if the files have standard errors.

    Raises
    ------
    FrameError
        If the file cannot be read, or holds no such image.
    """
    if detector.exposure.format == "asdf":
        return _read_asdf(Path(path), detector)
    return fits_images.read_exposure(path, detector, part)


def _read_asdf(path: Path, detector: Detector) -> fits_images.Frame:
    """Read an exposure from an ASDF file, such as Roman's level 2 images."""
    try:
        import asdf
    except ImportError as error:
        raise FrameError(
            f"{path}: an ASDF file, expected asdf to read it; pip install 'blobpipe[asdf]'"
        ) from error
    names = detector.exposure
    cards = (*detector.cards.model_dump().values(), names.flat_card)
    try:
        # Tags of packages that are not installed warn; what is needed of them is plain
        with unwarned(), asdf.open(path, lazy_load=False, memmap=False) as file:
            science = _array(file, names.image)
            errors = _array(file, names.error) if names.error else None
            flags = _array(file, names.dq) if names.dq else None
            found = {card: _plain(_at(file, card)) for card in cards if card}
    except FrameError:
        raise
    except Exception as error:
        # A damaged file makes asdf raise nearly anything
        reason = " ".join(str(error).split())[:120]
        raise FrameError(
            f"{path}: cannot be read as ASDF ({reason}), expected an image {names.image}; fetch the file again"
        ) from error

    data = np.array(science, np.float32)
    for other, name in ((errors, names.error), (flags, names.dq)):
        if other is not None and other.shape != data.shape:
            raise FrameError(
                f"{path}: {name} has the shape {other.shape}, expected that of the image, {data.shape}; fetch the file again"
            )
    if errors is not None:
        data = np.where(errors > 0, data, np.float32(np.nan))
    dq = None if flags is None else np.array(flags, np.int64)
    header = fits_images.with_usual_names(
        {card: value for card, value in found.items() if value is not None}, detector
    )
    ny, nx = data.shape
    name = path.name.removesuffix(".asdf")
    frame = fits_images.Frame(printable(name), data, header, f"{names.image}, {nx}x{ny}", dq)
    return fits_images.with_border(frame, detector)


def _at(tree: Any, place: str) -> Any:
    """Return what is at a place of a tree, such as ``roman.meta.filename``; None if nothing is."""
    for key in place.split("."):
        try:
            tree = tree[key]
        except (KeyError, TypeError, IndexError):
            return None
    return tree


def _array(tree: Any, place: str) -> npt.NDArray[Any]:
    """Return the image at a place of a tree, without its unit."""
    found = _at(tree, place)
    image = np.asarray(getattr(found, "value", found))
    if image.ndim != 2 or min(image.shape) < 2 or image.dtype.kind not in "iuf":
        raise ValueError(f"no image {place}")
    return image


def _plain(value: Any) -> Value | None:
    """Return a value of a tree as a header holds it: a number, or text; dates as ISO 8601."""
    if value is None or isinstance(value, bool | int | float):
        return value
    return str(getattr(value, "isot", value))[:MAX_TEXT]


def _loss(
    path: Path,
    frame: fits_images.Frame,
    good: Image,
    flags: Int64Array,
    bad: BadPixels,
    detector: Detector,
) -> Image:
    """Return the light that each pixel lacks, from an exposure of any unit and sign without its border."""
    sign = np.float32(1 if detector.exposure.blobs == "positive" else -1)
    if detector.exposure.unit == "light_lost":
        return sign * good
    _require_light(path, frame.header, good, detector)
    try:
        return -sign * light_loss(good, flags, bad.dq_flags, detector.exposure.box_px)
    except FrameError as error:
        raise FrameError(f"{path}: {error}") from error


def output(path: str | Path, out_dir: str | Path, part: str = "") -> Path:
    """Return the path of the blob image of an exposure, or of one of the detectors in it."""
    name = fits_images.frame_name(path)
    for suffix in (".asdf", *LEVELS):
        name = name.removesuffix(suffix)
    if part:
        return Path(out_dir) / part / f"{name}_{part}_blob.fits.fz"
    return Path(out_dir) / f"{name}_blob.fits.fz"


def refuse_overwriting(paths: Sequence[Path], index: int, out_dir: Path) -> None:
    """Refuse an exposure whose blob image would overwrite that of one before it, or an exposure.

    Parameters
    ----------
    paths : sequence of Path
        All exposures.
    index : int
        Which of them.
    out_dir : Path
        Folder of the blob images.

    Raises
    ------
    FrameError
        If it would.
    """
    out = output(paths[index], out_dir)
    if any(out == output(path, out_dir) for path in paths[:index]):
        raise FrameError(
            f"{paths[index]}: {out} is the blob image of another exposure of this list; leave one of them out"
        )
    if any(out.resolve() == path.resolve() for path in paths):
        raise FrameError(
            f"{paths[index]}: {out} is an exposure of this list; choose another folder for the blob images"
        )


def light_loss(
    science: Image,
    flags: Int64Array,
    dq_flags: int = DEFAULT.exposure.bad_dq,
    box_px: int = DEFAULT.exposure.box_px,
) -> Image:
    """Return one minus an exposure over its background: the fraction of the light that each pixel lacks.

    Parameters
    ----------
    science : ndarray, shape (ny, nx), float32
        In any unit that is proportional to the light; at least four boxes wide and high.
    flags : ndarray, shape (ny, nx), int
        DQ of each pixel.
    dq_flags : int
        Sum of the flags that make a pixel bad; those of the default detector if not given.
    box_px : int
        Side of the boxes in which the background is measured (px), about three times the largest blob.

    Returns
    -------
    ndarray, shape (ny, nx), float32
        Around zero, a blob positive; NaN where a pixel has one of the flags, or no value.

    Raises
    ------
    FrameError
        If so much stands out of the background that it cannot be measured.

    Notes
    -----
    Source: this project. The depths of blobs with radii of 3 to 12 px and depths of 2 to 30 % are kept within 1 %.
    """
    bad = _bad(science, flags, dq_flags)
    science = np.where(bad, np.float32(1), science)  # the values of bad pixels are not used

    # A first background finds what stands out, and a second one leaves that out
    once = science / background(science, bad, box_px)
    masked = bad | _structures(1 - once, bad)
    masked_frac = masked.mean()
    if masked_frac > MOST_MASKED:
        raise FrameError(
            f"{masked_frac:.0%} of it stands out or is flagged, expected airglow; leave it out"
        )
    twice = once / background(once, masked, box_px)
    return np.where(bad, np.float32(np.nan), 1 - twice).astype(np.float32)


def _bad(science: Image, flags: Int64Array, dq_flags: int) -> Mask:
    """Return the mask of pixels that do not measure the light."""
    is_flagged = (flags & dq_flags) != 0
    return np.asarray(is_flagged | ~np.isfinite(science))


def background(image: Image, masked: Mask, box_px: int = DEFAULT.exposure.box_px) -> Image:
    """Return the large scales of an image: a cubic spline through sigma-clipped medians of boxes.

    Parameters
    ----------
    image : ndarray, shape (ny, nx), float32
    masked : ndarray, shape (ny, nx), bool
        True for pixels that are left out.
    box_px : int
        Side of the boxes (px).

    Returns
    -------
    ndarray, shape (ny, nx), float32

    Notes
    -----
    Source: the medians, clipped at 3 sigma, are those of photutils' ``Background2D``. Its interpolation is flat beyond the
    centres of the outer boxes, which leaves 1 % in the corners, where the light falls off by a quarter; the spline
    extrapolates.
    """
    from photutils.background import Background2D, MedianBackground
    from scipy.interpolate import make_interp_spline

    # Pixels without a value make it warn, and it hides that from its own thread alone
    with unwarned():
        boxes = Background2D(
            image,
            box_px,
            mask=masked,
            exclude_percentile=MOSTLY,
            filter_size=1,
            bkg_estimator=MedianBackground(),
        )
        surface = boxes.background_mesh
    for axis, n in enumerate(image.shape):
        # Centres of the boxes; the last box may be smaller
        edges = np.append(np.arange(0, n, box_px), n)
        centres = np.asarray((edges[:-1] + edges[1:] - 1) / 2, dtype=np.float64)
        spline = make_interp_spline(centres, surface, axis=axis)
        surface = spline(np.arange(n))
    return np.asarray(surface, dtype=np.float32)


def _structures(loss: Image, bad: Mask) -> Mask:
    """Return the mask of blobs, stars and streaks: what is far from zero on a scale of two pixels, with a margin."""
    from scipy import ndimage

    # Smoothing that leaves bad pixels out: a weighted mean of the others
    weight = ndimage.gaussian_filter((~bad).astype(np.float32), SMOOTHING_PX)
    total = ndimage.gaussian_filter(np.where(bad, np.float32(0), loss), SMOOTHING_PX)
    smoothed = total / np.maximum(weight, 0.05)

    middle, sigma = fits_images.median_and_noise(smoothed)
    limit = max(STANDS_OUT_SIGMA * sigma, FAINTEST_FRAC)
    stands_out = np.abs(smoothed - middle) > limit
    return np.asarray(ndimage.binary_dilation(stands_out, iterations=MARGIN_PX))


def _flags(path: Path, frame: fits_images.Frame, detector: Detector) -> Int64Array:
    """Return the DQ of an exposure; refuse one without, unless the detector's files have none."""
    names = detector.exposure
    if not names.dq:
        return np.zeros(frame.data.shape, np.int64)
    if frame.dq is None:
        raise FrameError(
            f"{path}: no image {names.dq} found, expected a calibrated exposure with {names.image} and {names.dq}; fetch "
            "that file"
        )
    return frame.dq


def _require_light(path: Path, header: Mapping[str, Any], good: Image, detector: Detector) -> None:
    """Refuse an exposure that is not divided by the flat, or has too few good pixels or too little light.

    Parameters
    ----------
    path : Path
        File of the exposure, for the message.
    header : mapping
    good : ndarray, shape (ny, nx), float32
        Without the border; NaN where a pixel is bad.
    detector : Detector
    """
    card = detector.exposure.flat_card
    done = detector.exposure.flat_done
    if card and header.get(card, done) != done:
        raise FrameError(
            f"{path}: {card} is {header[card]}, expected {done}: not divided by the flat; calibrate it first"
        )

    # Half of the pixels, and much more light than noise
    good_frac = np.isfinite(good).mean()
    if good_frac < 0.5:
        raise FrameError(
            f"{path}: {good_frac:.0%} of its pixels are good, expected at least 50%; leave it out"
        )
    median, noise = fits_images.median_and_noise(good)
    if not noise < fits_images.MAX_NOISE_FRAC * median:
        raise FrameError(
            f"{path}: median {median:.4g} with noise {noise:.4g} {header.get('BUNIT', '')}: too little light to miss a "
            "fraction of it, expected an exposure of the dark Earth; leave it out"
        )

    # A delta flat has been made of the known blobs
    if header.get("DFLTFILE", "N/A") not in ("N/A", ""):
        log.warning(
            "%s: divided by a delta flat (%s): known blobs may be corrected already",
            path,
            header["DFLTFILE"],
        )


def _header(path: Path, frame: fits_images.Frame, bad: BadPixels, detector: Detector) -> Header:
    """Return the header of the blob image of an exposure."""
    from astropy.io.fits import Header

    cards = CARDS if "EXPSTART" in frame.header else (*CARDS, *OTHER_DATES)
    header = Header([(card, frame.header[card]) for card in cards if card in frame.header])
    header["BUNIT"] = ("", "fraction of the light that is missing")
    history = (
        f"blobpipe {__version__} flatten: {ascii(path.name)[1:-1]}",
        "1 - SCI / background, light lost positive",
        f"background: medians of {detector.exposure.box_px} px boxes, cubic spline, blobs and stars left out",
        f"NaN: DQ flags {bad.dq_flags}, bad-pixel files, reference border",
    )
    for line in history:
        header["HISTORY"] = line
    header.update(bad.cards(frame))
    return header
