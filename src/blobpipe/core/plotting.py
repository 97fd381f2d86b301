"""Figures that several rooms draw, and what all figures share."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import matplotlib
import numpy as np
import numpy.typing as npt

matplotlib.use("Agg")

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.lines import Line2D

# Okabe and Ito
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#009E73"
PURPLE = "#CC79A7"
GREY = "#666666"
NAMES = {"dense": "dense network", "report": "report's network", "matched_filter": "matched filter"}
STYLES = {  # colour, line and marker of each detector
    "report": (BLUE, "-", "o"),
    "dense": (GREEN, "-.", "^"),
    "matched_filter": (ORANGE, "--", "s"),
}
DPI = 110


def save(figure: Figure, path: str | Path, box: str | None = "tight") -> None:
    """Write a figure under a temporary name, rename it, and close it; without a box, at the size that it was given."""
    import matplotlib.pyplot as plt

    from blobpipe.core import files

    with files.atomic(path) as temporary:
        figure.savefig(
            temporary, format="png", dpi=DPI, bbox_inches=box, metadata={"Software": None}
        )
    plt.close(figure)


def contact_sheet(
    path: str | Path, subframes: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], title: str
) -> None:
    """Samples of both classes side by side, three sigma from black to white.

    Parameters
    ----------
    subframes : ndarray, shape (n, ny, nx)
        In sigma.
    labels : ndarray, shape (n,)
        1 with blobs, 0 without.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 8, figsize=(16, 6.6), squeeze=False)
    for label, block in ((0, axes[:, :4]), (1, axes[:, 4:])):
        for axis in block.flat:
            axis.set_axis_off()
        for axis, image in zip(block.flat, subframes[labels == label], strict=False):
            axis.imshow(image, origin="lower", cmap="gray", vmin=-3, vmax=3)
    figure.text(0.31, 0.905, "no blob superimposed", ha="center")
    figure.text(0.71, 0.905, "1-5 blobs superimposed (bright)", ha="center")
    figure.suptitle(f"{title}: -3 (black) to 3 sigma (white)")
    save(figure, path)


def history(path: str | Path, table: pd.DataFrame, loss: str) -> None:
    """Losses, by the name and unit given, and accuracy of each epoch (``history.csv``)."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    left.plot(table["epoch"], table["train_loss"], "o-", color=BLUE, label="training")
    left.plot(table["epoch"], table["val_loss"], "s--", color=ORANGE, label="validation")
    left.set(xlabel="epoch", ylabel=loss, title="Loss")
    left.legend()
    right.plot(table["epoch"], table["val_accuracy"], "s--", color=ORANGE)
    right.set(
        xlabel="epoch",
        ylabel="accuracy on validation (fraction)",
        title="Accuracy at probability 0.5",
    )
    save(figure, path)


def draw_detection(
    path: str | Path,
    subframe: npt.NDArray[np.float32],
    saliency: npt.NDArray[np.float32],
    origin: tuple[int, int],
    peak: tuple[float, float],
    title: str,
    map_name: str = "saliency",
) -> None:
    """A positive subframe, or the surroundings of a detection, beside the network's map of it, the peak marked on both.

    Parameters
    ----------
    subframe, saliency : ndarray, shape (ny, nx)
        Standardised pixels (sigma), and the map in any unit.
    origin : (x, y)
        Of the subframe's first pixel in the frame (px).
    peak : (x, y)
        In the subframe (px).
    """
    ny, nx = subframe.shape
    sheet = _new_sheet(ny, nx)
    extent = (origin[0] - 0.5, origin[0] + nx - 0.5, origin[1] - 0.5, origin[1] + ny - 0.5)
    for picture, mark, data in zip(sheet.pictures, sheet.marks, (subframe, saliency), strict=True):
        picture.set(data=data, extent=extent)
        mark.set_data([origin[0] + peak[0]], [origin[1] + peak[1]])
    sheet.pictures[1].autoscale()
    sheet.figure.axes[1].set_title(map_name, y=1)
    sheet.figure.suptitle(title, wrap=True)
    save(sheet.figure, path, box=None)


class _Sheet(NamedTuple):
    figure: Figure
    pictures: list[AxesImage]
    marks: list[Line2D]


@functools.cache
def _new_sheet(ny: int, nx: int) -> _Sheet:
    """What is the same on every picture of a detection: most of the time goes into making axes and their ticks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    zoom = max(2, 384 // max(ny, nx))  # whole: each pixel is a square
    # px
    width = zoom * nx
    height = zoom * ny
    first = 75
    second = 95 + zoom * nx
    bottom = 50
    size = np.array([second + width + 15, bottom + height + 75])
    figure = Figure(tuple(size / DPI), DPI)
    FigureCanvasAgg(figure)
    left = figure.add_axes((*((first, bottom) / size), *((width, height) / size)))
    right = figure.add_axes(
        (*((second, bottom) / size), *((width, height) / size)), sharex=left, sharey=left
    )
    left.set(ylabel="y (px)")
    left.set_title("image, -3 to 3 sigma", y=1)  # said, it need not be sought
    right.tick_params(labelleft=False)
    sheet = _Sheet(figure, [], [])
    nothing = np.zeros((ny, nx))
    for axis, shades in (
        (left, {"cmap": "gray", "vmin": -3, "vmax": 3}),
        (right, {"cmap": "magma"}),
    ):
        axis.set(xlabel="x (px)")
        sheet.pictures.append(
            axis.imshow(nothing, origin="lower", interpolation="nearest", **shades)
        )
        sheet.marks.extend(axis.plot(0, 0, "o", ms=22, mfc="none", mec=ORANGE, mew=1.5))
    return sheet


class Panel(NamedTuple):
    """One subframe of a gallery.

    Attributes
    ----------
    title : str
    image : ndarray, shape (ny, nx)
        In sigma.
    saliency : ndarray, shape (ny, nx)
        Drawn as contours at a half and at nine tenths of its highest value.
    circles : ndarray, shape (n, 3)
        x, y, radius of the true blobs (px).
    """

    title: str
    image: npt.NDArray[np.float32]
    saliency: npt.NDArray[np.float32]
    circles: npt.NDArray[np.float64]


def gallery(path: str | Path, rows: dict[str, list[Panel]], title: str) -> None:
    """Subframes in rows, each row with its name; a row without subframes says so."""
    import matplotlib.pyplot as plt

    columns = max(1, *(len(panels) for panels in rows.values()))
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(2.5 * columns + 0.6, 2.9 * len(rows) + 0.5), squeeze=False
    )
    for (name, panels), line in zip(rows.items(), axes, strict=True):
        line[0].annotate(
            name if panels else f"{name}: none",
            (-0.06, 0.5),
            xycoords="axes fraction",
            rotation=90,
            ha="right",
            va="center",
        )
        for axis in line:
            axis.set_axis_off()
            # although they are off, matplotlib would measure them again and again
            axis.set(xticks=[], yticks=[])
        for axis, panel in zip(line, panels, strict=False):
            _draw_panel(axis, panel)
    figure.suptitle(
        f"{title}; 256 x 256 px in means of 2 x 2, -2 (black) to 2 sigma (white)", fontsize=10
    )
    figure.tight_layout()
    save(figure, path)


def _draw_panel(axis: Axes, panel: Panel) -> None:
    from matplotlib.patches import Circle

    ny, nx = panel.image.shape
    # less noise to see, a tenth to store
    binned = panel.image.reshape(ny // 2, 2, nx // 2, 2).mean(axis=(1, 3))
    extent = (-0.5, nx - 0.5, -0.5, ny - 0.5)
    axis.imshow(
        binned, origin="lower", cmap="gray", vmin=-2, vmax=2, extent=extent, interpolation="nearest"
    )
    if panel.saliency.max() > 0:
        axis.contour(
            panel.saliency / panel.saliency.max(), [0.5, 0.9], colors=ORANGE, linewidths=0.8
        )
    for x, y, radius in panel.circles:
        axis.add_patch(Circle((x, y), radius + 4, fill=False, ec=BLUE, lw=1.2))
    axis.set(xlim=(-0.5, nx - 0.5), ylim=(-0.5, ny - 0.5))
    axis.set_title(panel.title, fontsize=8)


def calibration(path: str | Path, tables: dict[str, pd.DataFrame], of: str = "subframes") -> None:
    """How often a blob is there where a probability is given, and how often each probability is given."""
    import matplotlib.pyplot as plt

    figure, (upper, lower) = plt.subplots(
        2,
        1,
        figsize=(5.4, 5.6),
        sharex=True,
        gridspec_kw={"height_ratios": [3, 1]},
        layout="constrained",
    )
    upper.plot([0, 1], [0, 1], color=GREY, lw=0.8)
    for name, table in tables.items():
        color, line, marker = STYLES[name]
        drawn = table[table["n"] > 0]
        share = drawn["blob_frac"]
        errors = [share - drawn["blob_frac_low"], drawn["blob_frac_high"] - share]
        upper.errorbar(
            drawn["mean_probability"],
            share,
            yerr=np.abs(errors),
            ls=line,
            marker=marker,
            color=color,
            capsize=2,
            label=NAMES[name],
        )
        edges = [*table["probability_low"], 1.0]
        lower.stairs(table["n"], edges, color=color, ls=line)
    upper.set(ylabel=f"{of} with a blob (fraction)", title="Calibration, with 95 % intervals")
    upper.legend(loc="upper left")
    lower.set(xlabel="probability of a blob (fraction)", ylabel=f"{of} (count)")
    # nothing at all cannot be drawn on such an axis
    if any(table["n"].any() for table in tables.values()):
        lower.set_yscale("log")
    save(figure, path)
