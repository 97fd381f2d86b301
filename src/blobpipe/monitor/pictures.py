"""Pictures of detections, drawn pixel by pixel: Matplotlib takes more than ten times as long."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from blobpipe.core import files, plotting

Pixels = npt.NDArray[np.uint8]

# Margins around the two panels (px of the picture); the upper one without the lines of the title
LEFT = 75
GAP = 20
RIGHT = 15
BOTTOM = 50
TOP = 53
LINE = 22

# Shortest distance between ticks, which leaves room for their numbers, and length of a tick (px of the picture)
TICK_SPACE = 55
TICK = 5

# Circle around a detection: least radius, so that it does not cover the blob (px of the image), radius if that of the
# blob is unknown, and width of the line (px of the picture)
LEAST_RADIUS = 4.0
USUAL_RADIUS = 17.0
RING_WIDTH = 2.3


def draw_detection(
    path: str | Path,
    subframe: npt.NDArray[np.float32],
    saliency: npt.NDArray[np.float32],
    origin: tuple[int, int],
    peak: tuple[float, float],
    title: str,
    map_name: str = "saliency (logits per sigma)",
    limits: tuple[float, float] | None = None,
    radius_px: float | None = None,
) -> None:
    """Draw a positive subframe, or a detection, beside the network's map of it, with a circle on both.

    Every pixel is a square, and row 0 is at the bottom.

    Parameters
    ----------
    path : path
    subframe, saliency : ndarray, shape (ny, nx)
        Standardised pixels (sigma), and the map in any unit.
    origin : (x, y)
        First pixel of the subframe in the frame (px).
    peak : (x, y)
        Centre of the circle in the subframe (px).
    title, map_name : str
    limits : (low, high), optional
        Ends of the map's colour scale; its lowest and highest value by default.
    radius_px : float, optional
        Radius of the circle, at least `LEAST_RADIUS`; without it the circle has one size.
    """
    ny, nx = subframe.shape
    # A whole zoom makes every pixel of the image a square
    zoom = max(2, 384 // max(ny, nx))
    low, high = limits or (float(saliency.min()), float(saliency.max()))

    # The part that is the same on all pictures of this size
    lines = wrap(title, LEFT + 2 * zoom * nx + GAP)
    top = TOP + LINE * len(lines)
    sheet = _blank_sheet(zoom * ny, zoom * nx, len(lines)).copy()

    # Both panels with the circle, ticks, and numbers at the ticks
    radius = USUAL_RADIUS if radius_px is None else zoom * max(LEAST_RADIUS, radius_px)
    for column, shades in enumerate(
        (shade(subframe, -3, 3, "gray"), shade(saliency, low, high, "magma"))
    ):
        left = LEFT + column * (zoom * nx + GAP)
        panel = sheet[top : top + zoom * ny, left : left + zoom * nx]
        panel[:] = shades[::-1].repeat(zoom, 1).repeat(zoom, 0)
        _draw_ring(panel, zoom * (peak[0] + 0.5), zoom * (ny - peak[1] - 0.5), radius)
        _draw_columns(sheet, left, top + zoom * ny, ticks(origin[0], nx, zoom), origin[0], zoom)
        _draw_rows(sheet, left, top + zoom * ny, ticks(origin[1], ny, zoom), origin[1], zoom)

    # Titles of the map and of the picture
    name = f"{map_name}, {plotting.two_digits(low)} to {plotting.two_digits(high)}"
    _write(sheet, name, 11, LEFT + zoom * nx + GAP + zoom * nx // 2, top - 10)
    for k, line in enumerate(lines):
        _write(sheet, line, 12, sheet.shape[1] // 2, LINE * (k + 1) + 4)

    with files.atomic(path) as temporary:
        # Higher levels save a tenth and take half as long again
        Image.fromarray(sheet).save(temporary, "PNG", compress_level=1)


def shade(data: npt.NDArray[np.float32], low: float, high: float, name: str) -> Pixels:
    """Return the colours of an array by one of Matplotlib's maps, shape (ny, nx, 3); NaN is white."""
    share = (data - low) / ((high - low) or 1)
    index = np.where(np.isnan(share), 256, np.clip(256 * share, 0, 255))
    return _shades(name)[index.astype(np.intp)]


@functools.cache
def _shades(name: str) -> Pixels:
    """Return the 256 shades of a map of Matplotlib, and white, shape (257, 3)."""
    shades = matplotlib.colormaps[name](np.arange(256), bytes=True)[:, :3]
    return np.concatenate([shades, np.full((1, 3), 255, np.uint8)])


def _draw_ring(panel: Pixels, x: float, y: float, radius: float) -> None:
    """Draw a smooth circle on a panel, in place; the centre counts from its upper left edge (px of the picture)."""
    # Only the square around the circle is touched
    reach = int(radius + RING_WIDTH) + 1
    rows = slice(max(int(y) - reach, 0), int(y) + reach + 1)
    columns = slice(max(int(x) - reach, 0), int(x) + reach + 1)
    square = panel[rows, columns]
    dy = np.arange(len(square)) + rows.start + 0.5 - y
    dx = np.arange(square.shape[1]) + columns.start + 0.5 - x
    distance = np.abs(np.hypot(dy[:, None], dx) - radius)

    # A pixel at the edge of the line is covered in part
    covered = np.clip((RING_WIDTH + 1) / 2 - distance, 0, 1)[..., None]
    orange = np.array(list(bytes.fromhex(plotting.ORANGE[1:])))
    square[:] = np.rint(square + covered * (orange - square))


def _draw_columns(
    sheet: Pixels, left: int, bottom: int, columns: range, first: int, zoom: int
) -> None:
    """Draw ticks and numbers of columns, at their middles, below a panel with this lower left corner."""
    for column in columns:
        x = left + zoom * (column - first) + zoom // 2
        sheet[bottom : bottom + 1 + TICK, x] = 0
        _write(sheet, str(column), plotting.SMALL, x, bottom + 20)


def _draw_rows(sheet: Pixels, left: int, bottom: int, rows: range, first: int, zoom: int) -> None:
    """Draw ticks of rows, at their middles, left of a panel, and numbers left of the first panel."""
    for row in rows:
        y = bottom - 1 - zoom * (row - first) - zoom // 2
        sheet[y, left - 1 - TICK : left] = 0
        if left == LEFT:
            _write(sheet, str(row), plotting.SMALL, left - 10, y + 5, align=1)


def ticks(first: int, length: int, zoom: int) -> range:
    """Return the pixels at the ticks of an axis: multiples of 1, 2 or 5 times a power of ten, not too dense.

    Parameters
    ----------
    first, length : int
        First pixel and number of pixels (px of the frame).
    zoom : int
        Px of the picture for each.
    """
    step = next(
        factor * 10**power
        for power in range(10)
        for factor in (1, 2, 5)
        if factor * 10**power * zoom >= TICK_SPACE
    )
    return range(-(-first // step) * step, first + length, step)


def wrap(title: str, width: int) -> list[str]:
    """Break a title into lines that are no wider than ``width`` (px), also within a word that is too long."""
    font = _font(12)
    if font.getlength(title) <= width:
        return [title]

    lines = [""]
    for word in title.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue

        # A new line, and as many as a long word takes
        lines.append("")
        for character in word:
            if font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return [line for line in lines if line]


@functools.cache
def _font(points: float) -> ImageFont.FreeTypeFont:
    """Load the font of Matplotlib's figures in a size (points)."""
    path = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
    # The basic layout is the same on all machines
    return ImageFont.truetype(
        path, points * plotting.DPI / 72, layout_engine=ImageFont.Layout.BASIC
    )


@functools.lru_cache(256)
def _written(text: str, points: float) -> Pixels:
    """Write a text in black on white, as greys; the base line is at the ascent of the font."""
    font = _font(points)
    ascent, descent = font.getmetrics()
    image = Image.new("L", (math.ceil(font.getlength(text)) + 1, ascent + descent), 255)
    ImageDraw.Draw(image).text((0, ascent), text, 0, font, "ls")
    return np.asarray(image)


def _write(
    sheet: Pixels, text: str, points: float, x: int, y: int, align: float = 0.5, up: bool = False
) -> None:
    """Write a text on a white place of a sheet.

    Parameters
    ----------
    sheet : ndarray
    text : str
    points : float
        Size.
    x, y : int
        Place of the base line (px of the picture).
    align : float
        Share of the text that is left of the place, or below it.
    up : bool
        Turn the text, to be read upwards.
    """
    greys = _written(text, points)
    ascent, _ = _font(points).getmetrics()
    before = round(align * greys.shape[1])
    if up:
        greys = np.rot90(greys)
        x, y = x - ascent, y - len(greys) + before
    else:
        x, y = x - before, y - ascent
    sheet[y : y + len(greys), x : x + greys.shape[1]] = greys[..., None]


@functools.cache
def _blank_sheet(height: int, width: int, n_lines: int) -> Pixels:
    """Draw what all pictures with panels of one size share: frames, names of the axes, title of the image."""
    top = TOP + LINE * n_lines
    size = (top + height + BOTTOM, LEFT + 2 * width + GAP + RIGHT, 3)
    sheet = np.full(size, 255, np.uint8)
    for left in (LEFT, LEFT + width + GAP):
        sheet[top - 1 : top + height + 1, left - 1 : left + width + 1] = 0
        _write(sheet, "x (px)", 10, left + width // 2, len(sheet) - 8)
    _write(sheet, "y (px)", 10, 24, top + height // 2, up=True)
    _write(sheet, "image, -3 to 3 sigma", 11, LEFT + width // 2, top - 10)
    return sheet
