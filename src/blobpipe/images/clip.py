"""Clip a difference image at a multiple of its zscale limits (stage ``clip``, ISR 3.1)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numba as nb
import numpy as np

from blobpipe.core import files, fits_images, tables
from blobpipe.core.arrays import Image
from blobpipe.errors import FrameError
from blobpipe.noise.whiten import WHITE, read_noise_model
from blobpipe.params import Clip

log = logging.getLogger(__name__)


DEFAULTS = Clip()


@dataclass(frozen=True)
class Clipping:
    """Limits of a clipped image, and how many of its pixels were changed.

    Attributes
    ----------
    low_frac, high_frac : float
        Limits (fraction of the light).
    clipped_frac, replaced_frac : float
        Fraction of the pixels that were beyond the limits, and of those that became the median.
    """

    low_frac: float
    high_frac: float
    clipped_frac: float
    replaced_frac: float


def zscale_limits(data: Image, n_points: int = 1000) -> tuple[float, float]:
    """Return the zscale display limits of an image.

    Parameters
    ----------
    data : ndarray, shape (ny, nx)
        At least one finite pixel.
    n_points : int
        Number of pixels that are sampled, evenly over the image.

    Returns
    -------
    low, high : float
        In the unit of the image.

    Notes
    -----
    Source: ISR 3.1; ginga's ``ZScale.calc_cut_levels_data`` gives the numbers of the original code.
    """
    from ginga.AutoCuts import ZScale
    from ginga.misc.log import NullLogger

    zscale = ZScale(NullLogger(), num_points=n_points)
    low, high = zscale.calc_cut_levels_data(data)
    return float(low), float(high)


def clip_image(data: Image, params: Clip = DEFAULTS) -> tuple[Image, Clipping]:
    """Clip an image at a multiple of its zscale limits; pixels without a value become the median.

    Parameters
    ----------
    data : ndarray, shape (ny, nx), float32
        A difference image or median stack (fraction of the light).
    params : Clip

    Returns
    -------
    ndarray, shape (ny, nx), float32
        All finite, within the limits.
    Clipping

    Raises
    ------
    FrameError
        If no pixel inside the border is finite or the limits coincide.

    Notes
    -----
    Source: ISR 3.1. Unlike the original, the median that fills the border is that of the finite pixels inside it.
    """
    border = params.border_px
    ny, nx = data.shape
    inside = np.s_[border : ny - border, border : nx - border]
    finite = np.isfinite(data[inside])
    n_finite = np.count_nonzero(finite)
    if not n_finite:
        raise FrameError(
            f"none of its {data.size} pixels inside the border is finite; expected an image; reject it"
        )

    # The median stands for the border and for pixels without a value, so that these are never blobs
    median = fits_images.median(data[inside][finite])
    filled = np.full(data.shape, median, np.float32)
    np.copyto(filled[inside], data[inside], where=finite)

    zscale_low, zscale_high = zscale_limits(filled, params.zscale_points)
    low = np.float32(params.factor * zscale_low)
    high = np.float32(params.factor * zscale_high)
    if not low < high:
        raise FrameError(
            f"zscale limits {low:.6g} and {high:.6g} coincide, expected noise; reject it"
        )
    n_clipped = _limit(filled, low, high)
    n_replaced = data.size - n_finite
    clipping = Clipping(
        low_frac=float(low),
        high_frac=float(high),
        clipped_frac=n_clipped / data.size,
        replaced_frac=n_replaced / data.size,
    )
    return filled, clipping


@nb.njit(cache=True, nogil=True)
def _limit(image, low, high):  # type: ignore[no-untyped-def]
    """Clip an image in place, and return the number of pixels that were beyond the limits."""
    n = 0
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            value = image[y, x]
            limited = low if value < low else high if value > high else value
            n += limited != value
            image[y, x] = limited
    return n


def clip(in_dir: str | Path, out_dir: str | Path, params: Clip, batch: int | None = None) -> None:
    """Clip every difference image of a folder into another (stage ``clip``).

    Parameters
    ----------
    in_dir : path
        ``{frame}.fits.fz``, ``frames-NNN.csv`` and ``reference.fits.fz`` of the difference stage; the
        last says how the noise is correlated, and images are whitened before they are clipped.
    out_dir : path
        ``{frame}.fits.fz`` (HDU CLIPPED, fraction of the light), and ``frames-NNN.csv`` for each batch, with the
        attributes of `Clipping`. A bad image is listed as rejected, with the reason.
    params : Clip
    batch : int, optional
        Only this batch.
    """
    reference = Path(in_dir) / "reference.fits.fz"
    noise_model = (read_noise_model(reference) if reference.exists() else None) or WHITE

    def clip_whitened(data: Image) -> tuple[Image, Clipping]:
        return clip_image(noise_model.even(noise_model.whiten(data)), params)

    each_frame(in_dir, out_dir, batch, "CLIPPED", clip_whitened, Clipping)


def each_frame(
    in_dir: str | Path,
    out_dir: str | Path,
    batch: int | None,
    name: str,
    work: Callable[[Image], tuple[Image, Any]],
    report: type[Any],
) -> None:
    """Apply a function to every usable image of a stage, and write images and tables of the next stage.

    Parameters
    ----------
    in_dir, out_dir : path
        Folders of the two stages.
    batch : int, optional
        Only this batch.
    name : str
        EXTNAME of the images that are written.
    work : callable
        From an image to a new one and its report; a `FrameError` rejects the image.
    report : dataclass
        Class of the reports; its fields are columns of the tables.

    Raises
    ------
    TableError
        If the stage before has made no table.
    """
    import pandas as pd

    nothing = dict.fromkeys(report.__dataclass_fields__, np.nan)
    columns = ["frame", "status", "reason", *nothing, "sha256"]
    for path in tables.stage_tables(in_dir, batch):
        frames = tables.read_table(path, ("frame", "status"))
        rows = []
        # The images that the stage before has made
        for frame in frames.query("status == 'ok'")["frame"]:
            out = Path(out_dir) / f"{frame}.fits.fz"
            row = {"frame": frame, "status": "ok", "reason": "", "sha256": ""}
            try:
                image = fits_images.read_pixels(fits_images.find_image(in_dir, frame))
                data, done = work(image)
            except FrameError as error:
                log.warning("%s rejected: %s", frame, error)
                out.unlink(missing_ok=True)  # the image of an earlier run
                rows.append(row | nothing | {"status": "rejected", "reason": str(error)})
                continue
            fits_images.write_image(out, data, name=name, sigma=float(data.std()))
            rows.append(row | asdict(done) | {"sha256": files.sha256(out)})
        table = pd.DataFrame(rows, columns=columns)
        tables.write_table(Path(out_dir) / path.name, table)
