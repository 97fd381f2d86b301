"""Draw the small pictures of the log, from which a person decides whether a detection is a blob, and pack whole images.

The packed pixels of the newest images lie beside the log, so that the pages can show any value without searching again.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from blobpipe.core.arrays import Image
from blobpipe.monitor import logbook

SIDE_PX = 96  # side of a cutout around a detection, in pixels of the image
ENLARGED = 4  # pixels of the picture for each pixel of a cutout, along each axis
OVERVIEW_PX = 768  # side of the picture of a whole image
RANGE_SIGMA = 4.0  # end of the grey scale on either side of the median, in units of the noise
SURFACE_PX = 48  # side of the cutout that is drawn as a surface
SURFACE_STYLE: Any = {
    # Grey that stands out from white and from the pages' dark ground alike (contrast 4)
    **dict.fromkeys(
        ("axes.edgecolor", "axes.labelcolor", "grid.color", "xtick.color", "ytick.color"), "#7f7f7f"
    ),
    "axes.labelpad": 8,
    "font.size": 12,
    "grid.linewidth": 0.5,
}
KEPT = 200  # images whose pixels are kept, the newest by date; about 1 MB each
STEPS = 32  # steps of packed values in one standard deviation of the noise
MAP_STEP = 2.0**-8  # step of a packed map of probabilities
SHIFT = 128  # added to packed values, so that most high bytes are 0
MISSING = -(2**15)  # packed value of a pixel without a value
HEADER = struct.Struct("<IIf")  # nx, ny, step


def overview(scaled: Image) -> bytes:
    """Draw a whole image as JPEG, y upwards, grey from -4 to 4 sigma.

    Parameters
    ----------
    scaled : ndarray, shape (ny, nx), float32
        Clipped and scaled image (sigma).
    """
    from PIL import Image as Pillow

    picture = Pillow.fromarray(_grey(scaled, RANGE_SIGMA))
    picture.thumbnail((OVERVIEW_PX, OVERVIEW_PX), Pillow.Resampling.BOX)
    return _encode(picture, "JPEG", quality=85)


def cutout(image: Image, x: float, y: float, noise: float) -> bytes:
    """Draw the surroundings of a position as an enlarged PNG, y upwards.

    Grey runs from -4 to 4 times the noise around the median of the surroundings.

    Parameters
    ----------
    image : ndarray, shape (ny, nx), float32
        Image in the unit of ``noise``; NaN is drawn as the median.
    x, y : float
        Centre of the cutout (px).
    noise : float
        Standard deviation that sets the grey scale.
    """
    part = window(image, x, y, SIDE_PX)
    median = np.nanmedian(part) if np.isfinite(part).any() else 0.0
    # NaN becomes 0, which is the median
    sigma = np.nan_to_num((part - median) / noise)
    return _enlarge(_grey(sigma, RANGE_SIGMA))


def probability(cells: Image, x: float, y: float, stride: int) -> bytes:
    """Draw the network's map around a position as PNG, of the size of `cutout`; white is 1.

    Parameters
    ----------
    cells : ndarray, shape (ny, nx), float32
        Probability of a blob in each cell (0 to 1).
    x, y : float
        Centre of the picture, in pixels of the image.
    stride : int
        Side of a cell (px).
    """
    # the centre of the first cell lies (stride - 1) / 2 pixels from that of the first pixel
    x_cell = (x + 0.5) / stride - 0.5
    y_cell = (y + 0.5) / stride - 0.5
    part = window(cells, x_cell, y_cell, SIDE_PX // stride)
    grey = _grey(2 * np.nan_to_num(part) - 1, 1.0)
    return _enlarge(grey, ENLARGED * stride)


def subframe_map(cells: Image) -> bytes:
    """Draw a subframe's part of the network's map as PNG, one pixel for a cell, y upwards; white is 1."""
    from PIL import Image as Pillow

    grey = _grey(2 * cells - 1, 1.0)
    return _encode(Pillow.fromarray(grey), "PNG", optimize=True)


def surface(image: Image, x: float, y: float) -> bytes:
    """Draw the light loss around a position as a surface: a transparent PNG, for light and dark pages.

    Parameters
    ----------
    image : ndarray, shape (ny, nx), float32
        Light loss (fraction of the light).
    x, y : float
        Centre of the surface (px).
    """
    import matplotlib.pyplot as plt
    from scipy.ndimage import gaussian_filter, median_filter

    # the median removes single bad pixels, whose peaks would set the scale
    part = np.nan_to_num(window(image, x, y, SURFACE_PX))
    smooth = gaussian_filter(median_filter(part, 3), 1.0)

    # axes in pixels of the whole image
    offsets = np.arange(SURFACE_PX) - SURFACE_PX // 2
    columns, rows = np.meshgrid(round(x) + offsets, round(y) + offsets)

    buffer = io.BytesIO()
    with plt.rc_context(SURFACE_STYLE):
        figure = plt.figure(figsize=(4, 4), dpi=96)
        axis: Any = figure.add_axes((-0.04, 0.05, 0.94, 0.95), projection="3d")
        axis.plot_surface(
            columns,
            rows,
            100 * smooth,
            cmap="cividis",
            rcount=SURFACE_PX,
            ccount=SURFACE_PX,
            linewidth=0,
        )
        axis.set(xlabel="x (px)", ylabel="y (px)", zlabel="light loss (%)")
        axis.locator_params(nbins=4)
        axis.set_box_aspect(None, zoom=0.9)
        for side in (axis.xaxis, axis.yaxis, axis.zaxis):
            side.set_pane_color((0.0, 0.0, 0.0, 0.0))

        # no version of matplotlib in the file: the same surface gives the same bytes
        figure.savefig(buffer, format="png", transparent=True, metadata={"Software": None})
        plt.close(figure)
    return buffer.getvalue()


def window(image: Image, x: float, y: float, side: int) -> Image:
    """Cut a square around a position, shape (side, side), NaN beyond the edges of the image."""
    left = round(x) - side // 2
    bottom = round(y) - side // 2

    # the part of the square that lies on the image
    ny, nx = image.shape
    rows = slice(max(bottom, 0), min(bottom + side, ny))
    columns = slice(max(left, 0), min(left + side, nx))

    part = np.full((side, side), np.nan, np.float32)
    part_rows = slice(rows.start - bottom, rows.stop - bottom)
    part_columns = slice(columns.start - left, columns.stop - left)
    part[part_rows, part_columns] = image[rows, columns]
    return part


def _grey(values: Image, limit: float) -> npt.NDArray[np.uint8]:
    """Map -limit to limit onto 0 to 255, with the top row first as in picture files."""
    grey = 127.5 * (values[::-1] / limit + 1)
    return np.ascontiguousarray(np.clip(grey, 0, 255).astype(np.uint8))


def _enlarge(grey: npt.NDArray[np.uint8], times: int = ENLARGED) -> bytes:
    """Repeat each pixel along both axes and encode the result as PNG."""
    from PIL import Image as Pillow

    enlarged = grey.repeat(times, 0).repeat(times, 1)
    return _encode(Pillow.fromarray(enlarged), "PNG", optimize=True)


def _encode(picture: Any, form: str, **settings: Any) -> bytes:
    """Write a picture into memory in a format of Pillow."""
    buffer = io.BytesIO()
    picture.save(buffer, form, **settings)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------- pixels


def pixels_folder(log_path: Path) -> Path:
    """Return the folder of the packed pixels of a log."""
    return logbook.folder_beside(log_path, "pixels")


def pixels_path(log_path: Path, sha256: str, plane: str) -> Path:
    """Return the file of the packed pixels of an image of a log.

    Parameters
    ----------
    log_path : path
    sha256 : str
        Checksum of the image's file.
    plane : str
        ``difference`` or ``map``.
    """
    return pixels_folder(log_path) / f"{sha256}.{plane}"


def step_of(noise: float) -> float:
    """Return the step in which values with a noise are packed: the power of two at or below noise / `STEPS`."""
    return 2.0 ** math.floor(math.log2(noise / STEPS)) if noise > 0 else 2.0**-12


def pack(image: Image, step: float) -> bytes:
    """Pack an image in 16-bit steps, low and high bytes apart, compressed by zlib.

    Values beyond the range of 65,535 steps become the end of it; NaN and infinite ones are marked as missing.

    Parameters
    ----------
    image : ndarray, shape (ny, nx), float32
    step : float
        From `step_of`.

    Returns
    -------
    bytes
        After `HEADER`, for each pixel from the lower left on the low byte of ``round(value / step) + SHIFT``, then
        the high bytes; as signed 16-bit numbers, of which `MISSING` marks no value.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        steps = np.clip(np.rint(image / np.float32(step)) + SHIFT, MISSING + 1, 2**15 - 1)
        packed = np.where(np.isfinite(image), steps, MISSING).astype("<i2").view(np.uint8)
    ny, nx = image.shape
    low = packed.reshape(-1, 2)[:, 0].tobytes()
    high = packed.reshape(-1, 2)[:, 1].tobytes()
    return zlib.compress(HEADER.pack(nx, ny, step) + low + high, 1)


def unpack(content: bytes) -> tuple[Image, float]:
    """Return an image from `pack`, shape (ny, nx), float32, NaN where it has no value, and its step.

    Raises
    ------
    ValueError
        If the bytes are not such an image.
    """
    try:
        body = zlib.decompress(content)
        nx, ny, step = HEADER.unpack_from(body)
        planes = np.frombuffer(body, np.uint8, offset=HEADER.size).reshape(2, ny, nx)
    except (zlib.error, struct.error, ValueError) as error:
        raise ValueError("found other bytes, expected packed pixels") from error
    steps = np.ascontiguousarray(np.moveaxis(planes, 0, -1)).view("<i2")[..., 0]
    image = (steps.astype(np.float32) - SHIFT) * np.float32(step)
    return np.where(steps == MISSING, np.float32(np.nan), image), step
