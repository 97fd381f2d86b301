"""Figures that several rooms draw, and the style of all figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
import numpy as np
import numpy.typing as npt

matplotlib.use("Agg")

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that the colour-blind can tell apart; Okabe and Ito 2008
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#009E73"
PURPLE = "#CC79A7"
GREY = "#666666"

# Name, and colour, line and marker, of each detector
NAMES = {"dense": "dense network", "report": "report's network", "matched_filter": "matched filter"}
STYLES = {
    "report": (BLUE, "-", "o"),
    "dense": (GREEN, "-.", "^"),
    "matched_filter": (ORANGE, "--", "s"),
}

# Resolution of figures (pixels per inch)
DPI = 110

# The style of every figure; nothing is written smaller than SMALL (points)
SMALL = 9
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "figure.titlesize": 12,
    "legend.fontsize": SMALL,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
}
matplotlib.rcParams.update(STYLE)

# Levels of the contours of a gallery, in shares of the highest saliency of all its panels
CONTOURS = (0.2, 0.4, 0.8)

# Digits of an exponent
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG under a temporary name, rename it, and close it.

    Parameters
    ----------
    figure : Figure
    path : path
    """
    import matplotlib.pyplot as plt

    from blobpipe.core import files

    with files.atomic(path) as temporary:
        figure.savefig(
            temporary, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None}
        )
    plt.close(figure)


def two_digits(value: float) -> str:
    """Write a number with two digits, a small one with a power of ten in raised digits."""
    digits, _, exponent = f"{value:.2g}".partition("e")
    power = f"10{str(int(exponent or 0)).translate(RAISED)}"
    return f"{digits} \N{MULTIPLICATION SIGN} {power}" if exponent else digits


def contact_sheet(
    path: str | Path, subframes: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], title: str
) -> None:
    """Draw samples of both classes side by side, from -3 sigma (black) to 3 sigma (white).

    Parameters
    ----------
    path : path
    subframes : ndarray, shape (n, ny, nx)
        In sigma.
    labels : ndarray, shape (n,)
        1 with blobs, 0 without.
    title : str
    """
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(14, 5.8), layout="constrained")
    # Typed as one figure or an array of them
    halves: Any = figure.subfigures(1, 2, wspace=0.03)
    names = ("no blob superimposed", "1-5 blobs superimposed (bright)")
    for label, (half, name) in enumerate(zip(halves, names, strict=True)):
        half.suptitle(name, fontsize=11)
        axes = half.subplots(3, 4)
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, image in zip(axes.flat, subframes[labels == label], strict=False):
            axis.imshow(image, origin="lower", cmap="gray", vmin=-3, vmax=3)
    ny, nx = subframes.shape[1:]
    figure.suptitle(f"{title}: {nx} x {ny} px, -3 (black) to 3 sigma (white)")
    save(figure, path)


def history(path: str | Path, table: pd.DataFrame, loss: str, name: str) -> None:
    """Draw loss and accuracy of a network against the epoch.

    Parameters
    ----------
    path : path
    table : DataFrame
        ``history.csv``: epoch, train_loss, val_loss, val_accuracy.
    loss : str
        Name and unit of the loss.
    name : str
        Name of the network, one of `NAMES`.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    left.plot(table["epoch"], table["train_loss"], "o-", color=BLUE, label="training, augmented")
    left.plot(
        table["epoch"], table["val_loss"], "s--", color=ORANGE, label="validation, not augmented"
    )
    left.set(ylabel=loss, title="Loss")
    right.plot(table["epoch"], table["val_accuracy"], "s--", color=ORANGE)
    right.set(ylabel="accuracy on validation (fraction)", title="Accuracy at probability 0.5")
    for axis in (left, right):
        axis.set(xlabel="epoch (count)", xlim=(0.5, len(table) + 0.5))
        # Whole epochs, also where there is but one
        whole = MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
        axis.xaxis.set_major_locator(whole)
    figure.suptitle(f"Training of the {NAMES[name]}")
    figure.legend(loc="outside lower center", ncols=2)
    save(figure, path)


class Panel(NamedTuple):
    """One subframe of a gallery.

    Attributes
    ----------
    title : str
    image : ndarray, shape (ny, nx)
        In sigma.
    saliency : ndarray, shape (ny, nx)
        In logits per sigma; drawn as contours at the same levels in all panels.
    circles : ndarray, shape (n, 3)
        x, y, radius of the true blobs (px).
    """

    title: str
    image: npt.NDArray[np.float32]
    saliency: npt.NDArray[np.float32]
    circles: npt.NDArray[np.float64]


def gallery(path: str | Path, rows: dict[str, list[Panel]], title: str) -> None:
    """Draw subframes in rows, each row with its name; a row without subframes says so.

    Parameters
    ----------
    path : path
    rows : dict of list of Panel
        Panels of each row by its name.
    title : str
    """
    import matplotlib.pyplot as plt

    columns = max(1, *(len(panels) for panels in rows.values()))
    highest = max((panel.saliency.max() for line in rows.values() for panel in line), default=0.0)
    levels = highest * np.array(CONTOURS)
    figsize = (2.5 * columns + 0.6, 2.9 * len(rows) + 0.8)
    figure, axes = plt.subplots(len(rows), columns, figsize=figsize, squeeze=False)
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
            # Matplotlib would measure ticks again and again, although they are off
            axis.set(xticks=[], yticks=[])
        for axis, panel in zip(line, panels, strict=False):
            _draw_panel(axis, panel, levels)
    *lower, last = (f"{100 * share:.0f}" for share in CONTOURS)
    figure.suptitle(
        f"{title}; contours: {', '.join(lower)} and {last} % of the highest saliency of all panels, "
        f"{two_digits(highest)} logits per sigma\n"
        "256 x 256 px in means of 2 x 2, -2 (black) to 2 sigma (white)",
        fontsize=10,
    )
    figure.tight_layout()
    save(figure, path)


def _draw_panel(axis: Axes, panel: Panel, levels: npt.NDArray[np.float64]) -> None:
    """Draw a subframe with contours of its saliency map and circles around its true blobs."""
    from matplotlib.patches import Circle

    ny, nx = panel.image.shape
    # Means of 2 x 2 pixels have less noise, and take a tenth of the space
    blocks = panel.image.reshape(ny // 2, 2, nx // 2, 2)
    binned = blocks.mean(axis=(1, 3))
    extent = (-0.5, nx - 0.5, -0.5, ny - 0.5)
    axis.imshow(
        binned, origin="lower", cmap="gray", vmin=-2, vmax=2, extent=extent, interpolation="nearest"
    )
    # Matplotlib warns of contours that a panel does not reach
    reached = levels[levels < panel.saliency.max()]
    if len(reached):
        axis.contour(panel.saliency, reached, colors=ORANGE, linewidths=0.9)
    for x, y, radius in panel.circles:
        axis.add_patch(Circle((x, y), radius + 6, fill=False, ec=BLUE, lw=1.4, zorder=3))
    axis.set(xlim=(-0.5, nx - 0.5), ylim=(-0.5, ny - 0.5))
    axis.set_title(panel.title, fontsize=SMALL)


def calibration(
    path: str | Path, tables: dict[str, pd.DataFrame], of: str = "subframes", note: str = ""
) -> None:
    """Draw the share of subframes with a blob against the predicted probability, and the counts below it.

    Parameters
    ----------
    path : path
    tables : dict of DataFrame
        Table of `metrics.reliability` for each detector, by the keys of `NAMES`.
    of : str
        What is counted, for the labels.
    note : str
        Second line of the title.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    figure, (upper, lower) = plt.subplots(
        2,
        1,
        figsize=(6.2, 6.4),
        sharex=True,
        gridspec_kw={"height_ratios": [3, 1.2]},
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
    title = "\n".join(filter(None, ("Calibration, with 95 % intervals", note)))
    upper.set(ylabel=f"{of} with a blob (fraction)", title=title)
    figure.legend(loc="outside lower center", ncols=len(tables))
    lower.set(xlabel="probability of a blob (fraction)", ylabel=f"{of} (count)")
    # Counts are whole; a logarithmic axis cannot show zeros alone
    most = max((table["n"].max() for table in tables.values()), default=0)
    if most > 0:
        lower.set(yscale="log", ylim=(0.6, 1.6 * most))
        lower.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most < 20 else (1,)))
        lower.yaxis.set_minor_formatter(NullFormatter())
        lower.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    else:
        lower.set(ylim=(0, 1))
        lower.text(0.5, 0.5, "none", ha="center", va="center", transform=lower.transAxes)
        lower.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    save(figure, path)
