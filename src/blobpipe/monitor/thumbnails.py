"""Small pictures for the log: what a person looks at to decide whether a detection is a blob."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt

from blobpipe.core.arrays import Image

SIDE_PX = 96  # of the surroundings of a detection
ENLARGED = 4  # so many times
OVERVIEW_PX = 768  # side of the picture of a whole image
RANGE_SIGMA = 4.0  # of the grey scale, to either side
SURFACE_PX = 48  # side of what the surface shows


def overview(scaled: Image) -> bytes:
    """A whole image as JPEG, y upwards, grey from -4 to 4 sigma.

    Parameters
    ----------
    scaled : ndarray, shape (ny, nx), float32
        Clipped and scaled (sigma).
    """
    from PIL import Image as Pillow

    picture = Pillow.fromarray(_grey(scaled, RANGE_SIGMA))
    picture.thumbnail((OVERVIEW_PX, OVERVIEW_PX), Pillow.Resampling.BOX)
    return _encoded(picture, "JPEG", quality=85)


def cutout(image: Image, x: float, y: float, noise: float) -> bytes:
    """The surroundings of a place as PNG, y upwards, enlarged, grey from -4 to 4 times the noise around their median.

    Parameters
    ----------
    image : ndarray, shape (ny, nx), float32
        In the unit of ``noise``; NaN is drawn as the median.
    x, y : float
        The middle (px).
    """
    part = window(image, x, y, SIDE_PX)
    middle = np.nanmedian(part) if np.isfinite(part).any() else 0.0
    return _enlarged(_grey(np.nan_to_num((part - middle) / noise), RANGE_SIGMA))


def probability(cells: Image, x: float, y: float, stride: int) -> bytes:
    """The network's map around a place as PNG, enlarged to the size of `cutout`; white is 1."""
    part = window(cells, (x + 0.5) / stride - 0.5, (y + 0.5) / stride - 0.5, SIDE_PX // stride)
    return _enlarged(_grey(2 * np.nan_to_num(part) - 1, 1.0), ENLARGED * stride)


def subframe_map(cells: Image) -> bytes:
    """A subframe's part of the network's map as PNG, a pixel per cell, y upwards; white is 1."""
    from PIL import Image as Pillow

    return _encoded(Pillow.fromarray(_grey(2 * cells - 1, 1.0)), "PNG", optimize=True)


def surface(image: Image, x: float, y: float) -> bytes:
    """The light loss around a place as a surface, PNG; without the peaks of single bad pixels, which would set its scale.

    Parameters
    ----------
    image : ndarray, shape (ny, nx), float32
        Fraction of the light.
    """
    import matplotlib.pyplot as plt
    from scipy.ndimage import gaussian_filter, median_filter

    part = gaussian_filter(median_filter(np.nan_to_num(window(image, x, y, SURFACE_PX)), 3), 1.0)
    columns, rows = np.meshgrid(
        *(round(place) - SURFACE_PX // 2 + np.arange(SURFACE_PX) for place in (x, y))
    )
    figure = plt.figure(figsize=(4, 4), dpi=96)
    axis: Any = figure.add_axes((-0.04, 0.03, 0.96, 0.97), projection="3d")
    axis.plot_surface(
        columns, rows, 100 * part, cmap="cividis", rcount=SURFACE_PX, ccount=SURFACE_PX, linewidth=0
    )
    axis.set(xlabel="x (px)", ylabel="y (px)", zlabel="light loss (%)")
    axis.set_box_aspect(None, zoom=0.95)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def window(image: Image, x: float, y: float, side: int) -> Image:
    """A square around a place, NaN beyond the image's edges."""
    left, bottom = (round(place) - side // 2 for place in (x, y))
    ny, nx = image.shape
    part = np.full((side, side), np.nan, np.float32)
    rows = slice(max(bottom, 0), min(bottom + side, ny))
    columns = slice(max(left, 0), min(left + side, nx))
    part[rows.start - bottom : rows.stop - bottom, columns.start - left : columns.stop - left] = (
        image[rows, columns]
    )
    return part


def _grey(values: Image, limit: float) -> npt.NDArray[np.uint8]:
    """8 bit, from -limit to limit, the top row first as pictures have it."""
    return np.ascontiguousarray(
        np.clip(127.5 * (values[::-1] / limit + 1), 0, 255).astype(np.uint8)
    )


def _enlarged(grey: npt.NDArray[np.uint8], times: int = ENLARGED) -> bytes:
    from PIL import Image as Pillow

    return _encoded(Pillow.fromarray(grey.repeat(times, 0).repeat(times, 1)), "PNG", optimize=True)


def _encoded(picture: Any, form: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **settings)
    return buffer.getvalue()
