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
from blobpipe.core.detector import BORDER_PX, SIDE_PX
from blobpipe.errors import FrameError
from blobpipe.images.bad_pixels import DEFAULTS, BadPixels
from blobpipe.images.check import is_exposure

if TYPE_CHECKING:
    from astropy.io.fits import Header

log = logging.getLogger(__name__)

# Side of the boxes of the background (px): three times the largest blob, and 13 of them are exactly the 1014 px of the
# detector without its reference pixels
BOX_PX = 78

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


def flatten_exposure(
    path: str | Path, out_dir: str | Path, bad_pixels: BadPixels | None = None
) -> Path:
    """Write the blob image of a calibrated exposure.

    Parameters
    ----------
    path : path
        FLT (1014 x 1014), or IMA (1024 x 1024; its last read is taken), with the extensions SCI (in any unit that is
        proportional to the light) and DQ.
    out_dir : path
        Folder of ``{rootname}_blob.fits.fz``: 1024 x 1024, light lost positive, NaN where a pixel is flagged and on the
        border.
    bad_pixels : BadPixels, optional
        Pixels that get no value, and the DQ flags that count.

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
    bad = bad_pixels or BadPixels()
    frame = bad.blank_files(_require_full_frame(fits_images.read_frame(path), path), path)
    loss = _loss_of(frame, path, bad)

    out = output(path, out_dir)
    noise = fits_images.median_and_noise(loss)[1]
    fits_images.write_image(out, loss, name="SCI", header=_header(path, frame, bad), sigma=noise)
    return out


def read_blob_image(path: str | Path, bad_pixels: BadPixels) -> fits_images.Frame:
    """Read a blob image without its bad pixels; of a calibrated exposure, make one as `flatten_exposure` does.

    Raises
    ------
    FrameError
        If it cannot be read, or is an exposure that cannot be flattened.
    """
    path = Path(path)
    frame = fits_images.read_frame(path)
    if not is_exposure(frame):
        return bad_pixels.blank(frame, path)
    frame = bad_pixels.blank_files(_require_full_frame(frame, path), path)
    return replace(frame, data=_loss_of(frame, path, bad_pixels))


def _require_full_frame(frame: fits_images.Frame, path: Path) -> fits_images.Frame:
    """Refuse an exposure that is not a full frame."""
    if frame.data.shape != (SIDE_PX, SIDE_PX):
        ny, nx = frame.data.shape
        raise FrameError(
            f"{path}: found {nx}x{ny} pixels, expected a full frame, 1014x1014 (FLT) or 1024x1024 (IMA); leave it out"
        )
    return frame


def _loss_of(frame: fits_images.Frame, path: Path, bad: BadPixels) -> Image:
    """Return the light that is missing on an exposure, NaN where a pixel is flagged and on the border."""
    # The reference pixels see no light
    science = _without_border(frame.data)
    flags = _without_border(_require_flags(path, frame.dq))
    good = np.where(_bad(science, flags, bad.dq_flags), np.float32(np.nan), science)
    _require_light(path, frame.header, good)
    try:
        loss = light_loss(science, flags, bad.dq_flags)
    except FrameError as error:
        raise FrameError(f"{path}: {error}") from error
    return np.pad(loss, BORDER_PX, constant_values=np.nan)


def output(path: str | Path, out_dir: str | Path) -> Path:
    """Return the path of the blob image of an exposure."""
    name = fits_images.frame_name(path).removesuffix("_flt").removesuffix("_ima")
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


def light_loss(science: Image, flags: Int64Array, dq_flags: int = DEFAULTS.dq_flags) -> Image:
    """Return one minus an exposure over its background: the fraction of the light that each pixel lacks.

    Parameters
    ----------
    science : ndarray, shape (ny, nx), float32
        In any unit that is proportional to the light; at least four boxes of 78 px wide and high.
    flags : ndarray, shape (ny, nx), int
        DQ of each pixel.
    dq_flags : int
        Sum of the flags that make a pixel bad: `params.BadPixels.dq_flags`.

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
    once = science / background(science, bad)
    masked = bad | _structures(1 - once, bad)
    masked_frac = masked.mean()
    if masked_frac > MOST_MASKED:
        raise FrameError(
            f"{masked_frac:.0%} of it stands out or is flagged, expected airglow; leave it out"
        )
    twice = once / background(once, masked)
    return np.where(bad, np.float32(np.nan), 1 - twice).astype(np.float32)


def _bad(science: Image, flags: Int64Array, dq_flags: int) -> Mask:
    """Return the mask of pixels that do not measure the light."""
    is_flagged = (flags & dq_flags) != 0
    return np.asarray(is_flagged | ~np.isfinite(science))


def background(image: Image, masked: Mask) -> Image:
    """Return the large scales of an image: a cubic spline through sigma-clipped medians of boxes of 78 px.

    Parameters
    ----------
    image : ndarray, shape (ny, nx), float32
    masked : ndarray, shape (ny, nx), bool
        True for pixels that are left out.

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

    boxes = Background2D(
        image,
        BOX_PX,
        mask=masked,
        exclude_percentile=MOSTLY,
        filter_size=1,
        bkg_estimator=MedianBackground(),
    )
    surface = boxes.background_mesh
    for axis, n in enumerate(image.shape):
        # Centres of the boxes; the last box may be smaller
        edges = np.append(np.arange(0, n, BOX_PX), n)
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


def _require_flags(path: Path, dq: Int64Array | None) -> Int64Array:
    """Refuse an exposure without DQ."""
    if dq is None:
        raise FrameError(
            f"{path}: no image DQ found, expected a calibrated exposure with SCI and DQ; fetch the FLT file"
        )
    return dq


def _without_border(plane: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a plane without its reference pixels, if it has them."""
    if plane.shape != (SIDE_PX, SIDE_PX):
        return plane
    return plane[BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX]


def _require_light(path: Path, header: Mapping[str, Any], good: Image) -> None:
    """Refuse an exposure that is not divided by the flat, or has too few good pixels or too little light.

    Parameters
    ----------
    path : Path
        File of the exposure, for the message.
    header : mapping
    good : ndarray, shape (1014, 1014), float32
        NaN where a pixel is bad.
    """
    if header.get("FLATCORR", "COMPLETE") != "COMPLETE":
        raise FrameError(
            f"{path}: FLATCORR is {header['FLATCORR']}, expected COMPLETE: not divided by the flat; calibrate it first"
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


def _header(path: Path, frame: fits_images.Frame, bad: BadPixels) -> Header:
    """Return the header of the blob image of an exposure."""
    from astropy.io.fits import Header

    header = Header([(card, frame.header[card]) for card in CARDS if card in frame.header])
    header["BUNIT"] = ("", "fraction of the light that is missing")
    history = (
        f"blobpipe {__version__} flatten: {ascii(path.name)[1:-1]}",
        "1 - SCI / background, light lost positive",
        f"background: medians of {BOX_PX} px boxes, cubic spline, blobs and stars left out",
        f"NaN: DQ flags {bad.dq_flags}, bad-pixel files, reference border",
    )
    for line in history:
        header["HISTORY"] = line
    header.update(bad.cards(frame))
    return header
