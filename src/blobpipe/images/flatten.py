"""A calibrated exposure of the dark Earth as a blob image: the fraction of the light that each pixel lacks.

The exposure is divided by its own large scales. Blobs and everything else that stands out are left out when those
are measured, so a blob keeps its depth.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from blobpipe import __version__
from blobpipe.core import fits_images
from blobpipe.core.arrays import Image, Mask
from blobpipe.errors import FrameError

if TYPE_CHECKING:
    from astropy.io.fits import Header

log = logging.getLogger(__name__)

SIZE = 1024
# Every flag means a pixel that does not tell the light, as AstroDrizzle's default for this detector has it (DHB 7.9),
# but: 512, which is how known blobs are flagged and would mask what is sought; 64, in no use; and 2048, signal in the
# zeroth read, which calwf3 has corrected and which a bright Earth sets on much of the frame.
KEPT_FLAGS = 64 | 512 | 2048
# of the background: three times the largest blob, and 13 of them are the 1014 px exactly
BOX_PX = 78
SMOOTHING_PX = 2.0  # what stands out is sought on this scale
STANDS_OUT_SIGMA = 4.0
FAINTEST_FRAC = 1e-4  # nothing fainter stands out: an image without noise has no sigma
MARGIN_PX = 6  # around what stands out: the faint feet of a blob
MOST_MASKED = 0.75  # of a frame: some box has as many good pixels
MOSTLY = 80.0  # per cent of a box without good pixels: its neighbours tell its background
CARDS = (
    *(
        "TELESCOP",
        "INSTRUME",
        "DETECTOR",
        "FILTER",
        "TARGNAME",
        "ROOTNAME",
        "PROPOSID",
        "EXPSTART",
        "EXPTIME",
    ),
    *("SAMP_SEQ", "NSAMP", "CAL_VER", "BPIXTAB", "PFLTFILE", "DFLTFILE"),
)


def flatten(path: str | Path, out_dir: str | Path) -> Path:
    """Write the blob image of a calibrated exposure.

    Parameters
    ----------
    path : path
        FLT (1014 x 1014) or IMA (1024 x 1024, its last read is taken), with the extensions SCI (in any unit that is
        proportional to the light) and DQ.
    out_dir : path
        ``{rootname}_blob.fits.fz``: 1024 x 1024, light lost positive, NaN where a pixel is flagged and on the border.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    FrameError
        If it is no full frame, has no DQ, has not been divided by the flat, or holds too little light.

    Notes
    -----
    Source: ours; the convention of blob images is that of ISR 2021-08.
    """
    path = Path(path)
    frame = fits_images.read_frame(path)
    if frame.data.shape != (SIZE, SIZE):
        ny, nx = frame.data.shape
        raise FrameError(
            f"{path}: found {nx}x{ny} pixels, expected a full frame, 1014x1014 (FLT) or 1024x1024 (IMA); leave it out"
        )
    science = _without_border(frame.data)
    flags = _flags(path)
    _insist_on_light(
        path, frame.header, np.where(_bad(science, flags), np.float32(np.nan), science)
    )
    try:
        loss = np.pad(light_loss(science, flags), fits_images.BORDER_PX, constant_values=np.nan)
    except FrameError as error:
        raise FrameError(f"{path}: {error}") from error
    out = output(path, out_dir)
    noise = fits_images.median_and_noise(loss)[1]
    fits_images.write_image(out, loss, name="SCI", header=_header(path, frame.header), sigma=noise)
    return out


def output(path: str | Path, out_dir: str | Path) -> Path:
    """Where the blob image of an exposure is written to."""
    name = fits_images.frame_name(path).removesuffix("_flt").removesuffix("_ima")
    return Path(out_dir) / f"{name}_blob.fits.fz"


def refuse_overwriting(paths: Sequence[Path], index: int, out_dir: Path) -> None:
    """Refuse an exposure of a list whose blob image would be written over that of one before it, or over an exposure.

    Raises
    ------
    FrameError
        If so.
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


def light_loss(science: Image, flags: npt.NDArray[np.int32]) -> Image:
    """One minus an exposure over its background: the fraction of the light that each pixel lacks.

    Parameters
    ----------
    science : ndarray, shape (ny, nx), float32
        In any unit that is proportional to the light; at least four boxes of 78 px wide and high.
    flags : ndarray, shape (ny, nx), int32
        DQ of each pixel.

    Returns
    -------
    ndarray, shape (ny, nx), float32
        Around zero, a blob positive; NaN where a pixel is flagged (but for `KEPT_FLAGS`) or has no value.

    Raises
    ------
    FrameError
        If so much stands out of the background that it cannot be told.

    Notes
    -----
    Source: ours. Of blobs with radii of 3 to 12 px and depths of 2 to 30 %, the depth is kept within 1 %.
    """
    bad = _bad(science, flags)
    science = np.where(bad, np.float32(1), science)  # their values are not looked at
    once = science / background(science, bad)
    masked = bad | _standing_out(1 - once, bad)
    if masked.mean() > MOST_MASKED:
        raise FrameError(
            f"{masked.mean():.0%} of it stands out or is flagged, expected airglow; leave it out"
        )
    twice = once / background(once, masked)
    return np.where(bad, np.float32(np.nan), 1 - twice).astype(np.float32)


def _bad(science: Image, flags: npt.NDArray[np.int32]) -> Mask:
    return np.asarray(((flags & ~KEPT_FLAGS) != 0) | ~np.isfinite(science))


def background(image: Image, masked: Mask) -> Image:
    """The large scales: medians of boxes of 78 px, clipped at 3 sigma, and a cubic spline through them.

    Parameters
    ----------
    image : ndarray, shape (ny, nx), float32
    masked : ndarray, shape (ny, nx), bool
        Pixels that do not count.

    Returns
    -------
    ndarray, shape (ny, nx), float32

    Notes
    -----
    Source: the medians are photutils' ``Background2D``. Its own interpolation is flat beyond the outer boxes' centres,
    which leaves 1 % in the corners where the light falls off by a quarter; the spline goes on.
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
        surface = make_interp_spline(_centres(n), surface, axis=axis)(np.arange(n))
    return np.asarray(surface, dtype=np.float32)


def _centres(n: int) -> npt.NDArray[np.float64]:
    """Middle of each box along an axis of ``n`` pixels; the last one may be smaller."""
    edges = np.append(np.arange(0, n, BOX_PX), n)
    return np.asarray((edges[:-1] + edges[1:] - 1) / 2, dtype=np.float64)


def _standing_out(loss: Image, bad: Mask) -> Mask:
    """Blobs, stars, streaks: whatever is far from zero on the scale of two pixels, and its surroundings."""
    from scipy import ndimage

    weight = ndimage.gaussian_filter((~bad).astype(np.float32), SMOOTHING_PX)
    smoothed = ndimage.gaussian_filter(
        np.where(bad, np.float32(0), loss), SMOOTHING_PX
    ) / np.maximum(weight, 0.05)
    middle, sigma = fits_images.median_and_noise(smoothed)
    out = np.abs(smoothed - middle) > max(STANDS_OUT_SIGMA * sigma, FAINTEST_FRAC)
    return np.asarray(ndimage.binary_dilation(out, iterations=MARGIN_PX))


def _flags(path: Path) -> npt.NDArray[np.int32]:
    try:
        plane = _without_border(fits_images.read_plane(path, "DQ"))
    except FrameError as error:
        raise FrameError(
            f"{path}: no image DQ can be read, expected a calibrated exposure with SCI and DQ; fetch the FLT file"
        ) from error
    if plane.shape != (SIZE - 2 * fits_images.BORDER_PX,) * 2:
        raise FrameError(
            f"{path}: DQ has the shape {plane.shape}, expected that of SCI; fetch the file again"
        )
    return plane.astype(np.int32)  # read as float32, which keeps 16 bits exactly


def _without_border(plane: npt.NDArray[Any]) -> npt.NDArray[Any]:
    border = slice(fits_images.BORDER_PX, -fits_images.BORDER_PX)
    return plane[border, border] if plane.shape == (SIZE, SIZE) else plane


def _insist_on_light(path: Path, header: Mapping[str, Any], good: Image) -> None:
    if header.get("FLATCORR", "COMPLETE") != "COMPLETE":
        raise FrameError(
            f"{path}: FLATCORR is {header['FLATCORR']}, expected COMPLETE: not divided by the flat; calibrate it first"
        )
    share = np.isfinite(good).mean()
    if share < 0.5:
        raise FrameError(
            f"{path}: {share:.0%} of its pixels are good, expected at least 50%; leave it out"
        )
    median, noise = fits_images.median_and_noise(good)
    if not noise < fits_images.MAX_NOISE_FRAC * median:
        raise FrameError(
            f"{path}: median {median:.4g} with noise {noise:.4g} {header.get('BUNIT', '')}: too little light to miss a "
            "fraction of it, expected an exposure of the dark Earth; leave it out"
        )
    if header.get("DFLTFILE", "N/A") not in ("N/A", ""):
        log.warning(
            "%s: divided by a delta flat (%s): known blobs may be corrected already",
            path,
            header["DFLTFILE"],
        )


def _header(path: Path, exposure: Mapping[str, Any]) -> Header:
    from astropy.io.fits import Header

    header = Header([(card, exposure[card]) for card in CARDS if card in exposure])
    header["BUNIT"] = ("", "fraction of the light that is missing")
    header["HISTORY"] = f"blobpipe {__version__} flatten: {ascii(path.name)[1:-1]}"
    header["HISTORY"] = "1 - SCI / background, light lost positive"
    header["HISTORY"] = (
        f"background: medians of {BOX_PX} px boxes, cubic spline, blobs and stars left out"
    )
    header["HISTORY"] = f"NaN: DQ other than {KEPT_FLAGS} (64, 512 and 2048), reference border"
    return header
