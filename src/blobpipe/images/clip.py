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
from blobpipe.params import Clip

log = logging.getLogger(__name__)


DEFAULTS = Clip()


@dataclass(frozen=True)
class Clipping:
    """What clipping did to an image: limits (fraction of the light), shares of pixels clipped and replaced."""

    low_frac: float
    high_frac: float
    clipped_frac: float
    replaced_frac: float


def zscale_limits(data: Image, n_points: int = 1000) -> tuple[float, float]:
    """The zscale display limits of an image, from pixels all over it.

    Parameters
    ----------
    data : ndarray, shape (ny, nx)
        At least one finite pixel.
    n_points : int
        Pixels sampled.

    Notes
    -----
    Source: ISR 3.1; ginga's ``ZScale.calc_cut_levels_data`` gives the numbers of the original code.
    """
    from ginga.AutoCuts import ZScale
    from ginga.misc.log import NullLogger

    low, high = ZScale(NullLogger(), num_points=n_points).calc_cut_levels_data(data)
    return float(low), float(high)


def clip_image(data: Image, params: Clip = DEFAULTS) -> tuple[Image, Clipping]:
    """Limit an image to a multiple of its zscale limits; pixels without a value become the median.

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
    (ny, nx) = data.shape
    inside = np.s_[border : ny - border, border : nx - border]
    finite = np.isfinite(data[inside])
    n_finite = np.count_nonzero(finite)
    if not n_finite:
        raise FrameError(
            f"none of its {data.size} pixels inside the border is finite; expected an image; reject it"
        )
    filled = np.full(data.shape, fits_images.median(data[inside][finite]), np.float32)
    np.copyto(filled[inside], data[inside], where=finite)
    low, high = (
        np.float32(params.factor * limit) for limit in zscale_limits(filled, params.zscale_points)
    )
    if not low < high:
        raise FrameError(
            f"zscale limits {low:.6g} and {high:.6g} coincide, expected noise; reject it"
        )
    clipped_frac = _limit(filled, low, high) / data.size
    return filled, Clipping(
        float(low), float(high), clipped_frac, (data.size - n_finite) / data.size
    )


@nb.njit(cache=True, nogil=True)
def _limit(image, low, high):  # type: ignore[no-untyped-def]
    """In place; how many pixels were beyond."""
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

    One table ``frames-NNN.csv`` per batch says what was done to each image; a bad image stands there as
    rejected, with the reason.
    """
    each_frame(in_dir, out_dir, batch, "CLIPPED", lambda data: clip_image(data, params), Clipping)


def each_frame(
    in_dir: str | Path,
    out_dir: str | Path,
    batch: int | None,
    name: str,
    work: Callable[[Image], tuple[Image, Any]],
    report: type[Any],
) -> None:
    import pandas as pd

    empty = dict.fromkeys(report.__dataclass_fields__, np.nan)
    for path in tables.stage_tables(in_dir, batch):
        rows = []
        for frame in tables.read_table(path, ("frame", "status")).query("status == 'ok'")["frame"]:
            out = Path(out_dir) / f"{frame}.fits.fz"
            try:
                data, done = work(
                    fits_images.read_frame(fits_images.find_image(in_dir, frame)).data
                )
            except FrameError as error:
                log.warning("%s rejected: %s", frame, error)
                out.unlink(missing_ok=True)  # of an earlier run
                rows.append(
                    {
                        "frame": frame,
                        "status": "rejected",
                        "reason": str(error),
                        **empty,
                        "sha256": "",
                    }
                )
                continue
            fits_images.write_image(out, data, name=name, sigma=float(data.std()))
            rows.append(
                {
                    "frame": frame,
                    "status": "ok",
                    "reason": "",
                    **asdict(done),
                    "sha256": files.sha256(out),
                }
            )
        columns = ["frame", "status", "reason", *empty, "sha256"]
        tables.write_table(Path(out_dir) / path.name, pd.DataFrame(rows, columns=columns))
