"""Figures of the validation: confusion, ROC, precision and recall, recall by S/N, cases, completeness."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import numpy.typing as npt

matplotlib.use("Agg")
from blobpipe.core import plotting

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def confusion(
    path: str | Path, counts: dict[str, npt.NDArray[np.int64]], intervals: dict[str, dict[str, Any]]
) -> None:
    """Draw the confusion matrix of each detector, with 95 % intervals.

    Parameters
    ----------
    counts : dict of ndarray, shape (2, 2)
        [true class, answer]; 0 no blob, 1 blob.
    intervals : dict of dict
        tnr, fpr, fnr, tpr as (low, high) or (None, None).
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(counts), figsize=(4.6 * len(counts), 4.2), squeeze=False)
    for (name, square), axis in zip(counts.items(), axes.flat, strict=True):
        _draw_confusion(axis, square, intervals[name])
        axis.set(title=f"Validation subframes (count), {plotting.NAMES[name]}")
    figure.tight_layout()
    plotting.save(figure, path)


def _draw_confusion(axis: Axes, counts: npt.NDArray[np.int64], interval: dict[str, Any]) -> None:
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (i, j), key in zip(np.ndindex(2, 2), ("tnr", "fpr", "fnr", "tpr"), strict=True):
        low, high = interval[key]
        limits = f"\n({low:.3f} - {high:.3f})" if low is not None else ""
        color = "white" if shares[i, j] > 0.5 else "black"
        axis.text(
            j,
            i,
            f"{counts[i, j]}\n{key.upper()} {shares[i, j]:.3f}{limits}",
            ha="center",
            va="center",
            color=color,
        )
    classes = ["no blob", "blob"]
    axis.set_xticks([0, 1], classes)
    axis.set_yticks([0, 1], classes, rotation=90, va="center")
    axis.set(xlabel="answer (class)", ylabel="truth (class)")


Curve = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]


def roc(
    path: str | Path,
    curves: dict[str, Curve],
    points: dict[str, tuple[float, float]],
    areas: dict[str, float],
) -> None:
    """Draw ROC curves on a linear and a logarithmic axis, with each operating point.

    Parameters
    ----------
    curves : dict of (fpr, tpr)
    points : dict of (fpr, tpr)
        At the threshold in use; may lack a name.
    areas : dict of float
        Under the curves; None if there is none.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for axis in axes:
        for name, curve in curves.items():
            color, line, marker = plotting.STYLES[name]
            area = f", area {areas[name]:.4f}" if areas[name] is not None else ""
            axis.plot(*curve, line, color=color, label=plotting.NAMES[name] + area)
            if name in points:
                axis.plot(*points[name], marker, color=color)
        axis.plot(0.12, 0.94, "*", color=plotting.GREY, ms=11, label="ISR 2021-08")
        axis.set(xlabel="false-positive rate (fraction)", ylim=(0, 1.02))
    axes[0].set(
        ylabel="true-positive rate (fraction)", title="ROC; points: at the threshold in use"
    )
    axes[0].legend(loc="lower right")
    axes[1].set(xscale="log", xlim=(3e-4, 1), title="the same, few false alarms")
    plotting.save(figure, path)


def precision_recall(path: str | Path, curves: dict[str, Curve], areas: dict[str, float]) -> None:
    """Draw precision over recall.

    Parameters
    ----------
    curves : dict of (recall, precision)
    areas : dict of float
        Average precision.
    """
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5.4, 4.2))
    for name, curve in curves.items():
        area = f", average {areas[name]:.4f}" if areas[name] is not None else ""
        axis.plot(
            *curve,
            plotting.STYLES[name][1],
            color=plotting.STYLES[name][0],
            label=plotting.NAMES[name] + area,
        )
    axis.set(
        xlabel="recall (fraction)",
        ylabel="precision (fraction)",
        ylim=(0, 1.02),
        title="Precision and recall",
    )
    axis.legend(loc="lower left")
    plotting.save(figure, path)


def by_snr(
    path: str | Path, table: pd.DataFrame, title: str, notes: dict[str, str] | None = None
) -> None:
    """Draw the share of blobs that each detector finds by S/N, with 95 % intervals.

    Parameters
    ----------
    table : DataFrame
        detector, low, high (of the bin; an open end is NaN), n, share, share_low, share_high.
    notes : dict of str, optional
        What the legend adds to a detector's name.
    """
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.6, 4.6), layout="constrained")
    for k, (name, part) in enumerate(table.groupby("detector", sort=False)):
        position = np.arange(len(part)) + 0.12 * (k - 1)
        (color, line, marker) = plotting.STYLES[str(name)]
        errors = np.nan_to_num(
            np.abs([part["share"] - part["share_low"], part["share_high"] - part["share"]])
        )
        label = plotting.NAMES[str(name)] + (notes or {}).get(str(name), "")
        axis.errorbar(
            position,
            part["share"],
            errors,
            ls=line,
            marker=marker,
            color=color,
            capsize=3,
            label=label,
        )
    _name_bins(axis, table.drop_duplicates("low"))
    axis.set(
        xlabel="matched-filter S/N (ratio)",
        ylabel="found (fraction)",
        ylim=(-0.03, 1.03),
        title=title,
    )
    figure.legend(loc="outside lower center")
    plotting.save(figure, path)


def _name_bins(axis: Axes, table: pd.DataFrame) -> None:
    ends = zip(table["low"], table["high"], table["n"], strict=True)
    labels = [
        f"{low:g}-{high:g}\nn = {n}" if high == high else f"> {low:g}\nn = {n}"
        for low, high, n in ends
    ]
    axis.set_xticks(np.arange(len(table)), labels, fontsize=7)


def cases(
    path: str | Path, recall: pd.DataFrame, blobs: pd.DataFrame, alarms: pd.DataFrame
) -> None:
    """Draw recall of the historical cases, and where blobs were found, missed and imagined.

    Parameters
    ----------
    recall : DataFrame
        ``recall.csv``.
    blobs : DataFrame
        ``cases.csv``.
    alarms : DataFrame
        ``alarms.csv``.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 8.4), layout="constrained")
    names = {
        "snr": "matched-filter S/N (ratio)",
        "depth_frac": "depth (fraction of the light)",
        "radius_px": "radius (px)",
    }
    for (quantity, name), axis in zip(names.items(), axes.flat, strict=False):
        _draw_recall(axis, recall[recall["quantity"] == quantity], name)
    _draw_places(axes[1, 1], blobs, alarms)
    plotting.save(figure, path)


def _draw_recall(axis: Axes, table: pd.DataFrame, name: str) -> None:
    position = np.arange(len(table))
    share = table["recall"]
    errors = np.nan_to_num(np.abs([share - table["recall_low"], table["recall_high"] - share]))
    axis.errorbar(position, share, yerr=errors, fmt="o", color=plotting.BLUE, capsize=3)
    _name_bins(axis, table)
    axis.set(xlabel=name, ylabel="recall of new blobs (fraction)", ylim=(-0.03, 1.03))


def _draw_places(axis: Axes, blobs: pd.DataFrame, alarms: pd.DataFrame) -> None:
    axis.scatter(
        alarms["x_px"],
        alarms["y_px"],
        s=24,
        color=plotting.PURPLE,
        marker="+",
        label=f"false alarm ({len(alarms)})",
    )
    for status, color, marker in (("found", plotting.BLUE, "o"), ("missed", plotting.ORANGE, "X")):
        rows = blobs[blobs["status"] == status]
        axis.scatter(
            rows["x_px"],
            rows["y_px"],
            s=26,
            color=color,
            marker=marker,
            label=f"{status} ({len(rows)})",
        )
    axis.set(
        aspect="equal",
        xlabel="x (px)",
        ylabel="y (px)",
        title="New blobs, and what was taken for one",
    )
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))


def completeness(path: str | Path, grid: pd.DataFrame, limits: pd.DataFrame) -> None:
    """Draw the share of injected blobs that each detector finds, and its limits.

    Parameters
    ----------
    grid, limits : DataFrame
        ``completeness.csv``, ``limits.csv``.
    """
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(grid["detector"]))
    figure, axes = plt.subplots(
        1, len(names) + 1, figsize=(4.2 * (len(names) + 1), 4.2), layout="constrained"
    )
    for axis, name in zip(axes, names, strict=False):
        part = grid[grid["detector"] == name].pivot(
            index="radius_px", columns="depth_frac", values="completeness"
        )
        axis.imshow(part, origin="lower", cmap="viridis", vmin=0, vmax=1, aspect="auto")
        for (row, column), share in np.ndenumerate(part.to_numpy()):
            axis.text(
                column,
                row,
                f"{100 * share:.0f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if share < 0.6 else "black",
            )
        axis.set_xticks(range(part.shape[1]), [f"{100 * depth:.2g}" for depth in part.columns])
        axis.set_yticks(range(part.shape[0]), [f"{radius:g}" for radius in part.index])
        axis.set(
            xlabel="depth (% of the light)",
            ylabel="radius (px)",
            title=f"{name.replace('_', ' ')}: found (%)",
        )
    for name in names:
        part = limits[limits["detector"] == name]
        for column, style in (("depth_50_frac", "o--"), ("depth_90_frac", "s-")):
            label = f"{name.replace('_', ' ')}, {column.split('_')[1]} %"
            axes[-1].plot(
                part["radius_px"],
                100 * part[column],
                style,
                color=plotting.STYLES[name][0],
                label=label,
            )
    axes[-1].set(
        xlabel="radius (px)",
        ylabel="depth (% of the light)",
        title="limits of completeness",
        yscale="log",
    )
    axes[-1].legend(fontsize=7)
    plotting.save(figure, path)
