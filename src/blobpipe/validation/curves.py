"""Figures of the validation: confusion, ROC, precision and recall, recall by S/N, cases, completeness."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import numpy.typing as npt

matplotlib.use("Agg")
from blobpipe.core import metrics, plotting

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

# Abscissa and ordinate
Curve = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]

# False-positive and true-positive rate of the report; ISR 2021-08
REPORT_POINT = (0.12, 0.94)


def confusion(
    path: str | Path, counts: dict[str, npt.NDArray[np.int64]], intervals: dict[str, dict[str, Any]]
) -> None:
    """Draw the confusion matrix of each detector, with 95 % intervals.

    Parameters
    ----------
    path : path
    counts : dict of ndarray, shape (2, 2)
        Subframes by [true class, answer]; 0 no blob, 1 blob.
    intervals : dict of dict
        (low, high) or (None, None) for tnr, fpr, fnr and tpr.
    """
    import matplotlib.pyplot as plt

    figsize = (3.9 * len(counts), 4.4)
    figure, axes = plt.subplots(
        1, len(counts), figsize=figsize, squeeze=False, layout="constrained"
    )
    for (name, square), axis in zip(counts.items(), axes.flat, strict=True):
        _draw_confusion(axis, square, intervals[name])
        axis.set(title=plotting.NAMES[name])
    figure.suptitle("Validation subframes: count, rate, and its 95 % interval")
    plotting.save(figure, path)


def _draw_confusion(axis: Axes, counts: npt.NDArray[np.int64], interval: dict[str, Any]) -> None:
    """Draw one matrix, each cell with its count and its rate."""
    n_of_class = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(n_of_class, 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (i, j), key in zip(np.ndindex(2, 2), ("tnr", "fpr", "fnr", "tpr"), strict=True):
        low, high = interval[key]
        limits = f"\n({low:.3f} to {high:.3f})" if low is not None else ""
        label = f"{counts[i, j]}\n{key.upper()} {shares[i, j]:.3f}{limits}"
        color = "white" if shares[i, j] > 0.5 else "black"
        axis.text(j, i, label, ha="center", va="center", color=color)
    classes = ["no blob", "blob"]
    axis.set_xticks([0, 1], classes)
    axis.set_yticks([0, 1], classes, rotation=90, va="center")
    axis.set(xlabel="answer (class)", ylabel="truth (class)")


def roc(
    path: str | Path,
    curves: dict[str, Curve],
    points: dict[str, tuple[float, float]],
    areas: dict[str, float],
) -> None:
    """Draw ROC curves on a linear and a logarithmic axis, with each operating point.

    Parameters
    ----------
    path : path
    curves : dict of (fpr, tpr)
    points : dict of (fpr, tpr)
        Operating points, of those detectors that have one.
    areas : dict of float
        Areas under the curves; None without one.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True, layout="constrained")
    for axis in axes:
        for name, curve in curves.items():
            color, line, marker = plotting.STYLES[name]
            area = f", area {areas[name]:.4f}" if areas[name] is not None else ""
            fpr, tpr = curve
            axis.plot(fpr, tpr, line, color=color, label=plotting.NAMES[name] + area)
            if name in points:
                axis.plot(*points[name], marker, color=color)
        axis.plot(*REPORT_POINT, "*", color=plotting.GREY, ms=11, label="ISR 2021-08")
        axis.set(xlabel="false-positive rate (fraction)", ylim=(0, 1.02))
    axes[0].set(ylabel="true-positive rate (fraction)", title="linear axis")
    axes[1].set(xscale="log", xlim=(3e-4, 1), title="logarithmic axis")
    figure.suptitle("ROC of validation subframes; points: at the threshold in use")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    plotting.save(figure, path)


def precision_recall(path: str | Path, curves: dict[str, Curve], areas: dict[str, float]) -> None:
    """Draw precision against recall.

    Parameters
    ----------
    path : path
    curves : dict of (recall, precision)
    areas : dict of float
        Average precision.
    """
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5.6, 5.2), layout="constrained")
    for name, curve in curves.items():
        color, line, _ = plotting.STYLES[name]
        area = f", average precision {areas[name]:.4f}" if areas[name] is not None else ""
        recall, precision = curve
        axis.plot(recall, precision, line, color=color, label=plotting.NAMES[name] + area)
    axis.set(
        xlabel="recall (fraction)",
        ylabel="precision (fraction)",
        ylim=(0, 1.02),
        title="Precision and recall of validation subframes",
    )
    figure.legend(loc="outside lower center")
    plotting.save(figure, path)


def by_snr(
    path: str | Path,
    table: pd.DataFrame,
    title: str,
    notes: dict[str, str] | None = None,
    share: str = "share",
) -> None:
    """Draw the share of blobs that each detector finds by S/N, with 95 % intervals.

    Parameters
    ----------
    path : path
    table : DataFrame
        detector, low, high (of the bin; an open end is NaN), n, and the share with the ends of its interval.
    title : str
    notes : dict of str, optional
        Additions to the detectors' names in the legend.
    share : str
        Name of the column of the share; with ``_low`` and ``_high`` those of its interval.
    """
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.6, 4.6), layout="constrained")
    for k, (detector, part) in enumerate(table.groupby("detector", sort=False)):
        name = str(detector)
        color, line, marker = plotting.STYLES[name]
        note = (notes or {}).get(name, "")

        # Beside each other, so that equal shares can be told apart
        position = np.arange(len(part)) + 0.12 * (k - 1)
        axis.errorbar(
            position,
            part[share],
            _error_bars(part, share),
            ls=line,
            marker=marker,
            color=color,
            capsize=3,
            label=plotting.NAMES[name] + note,
        )
    _label_bins(axis, table.drop_duplicates("low"))
    axis.set(
        xlabel="matched-filter S/N (ratio)",
        ylabel="found (fraction)",
        ylim=(-0.03, 1.03),
        title=title,
    )
    figure.legend(loc="outside lower center")
    plotting.save(figure, path)


def _error_bars(table: pd.DataFrame, share: str) -> npt.NDArray[np.float64]:
    """Return the lengths of the lower and upper error bars, shape (2, n); 0 where there is no share."""
    lower = table[share] - table[f"{share}_low"]
    upper = table[f"{share}_high"] - table[share]
    return np.nan_to_num(np.abs([lower, upper]))


def _label_bins(axis: Axes, table: pd.DataFrame, unit: float = 1.0) -> None:
    """Label the bins with their edges, in a unit, and counts."""
    labels = []
    for low, high, n in zip(table["low"], table["high"], table["n"], strict=True):
        first = f"{low / unit:g}"
        edges = f"{first}-{high / unit:g}" if np.isfinite(high) else f"> {first}"
        labels.append(f"{edges}\nn = {n}")
    axis.set_xticks(np.arange(len(table)), labels)
    # Bins without blobs keep their place, also at the ends
    axis.set_xlim(-0.5, len(table) - 0.5)


def cases(
    path: str | Path,
    recall: pd.DataFrame,
    blobs: pd.DataFrame,
    alarms: pd.DataFrame,
    detector: str,
    shape: tuple[int, ...],
) -> None:
    """Draw recall of the historical cases, and the places of found and missed blobs and of false alarms.

    Parameters
    ----------
    path : path
    recall, blobs, alarms : DataFrame
        Rows of ``recall.csv``, ``cases.csv`` and ``alarms.csv``.
    detector : str
        One of `plotting.NAMES`: names and colours what it has found.
    shape : (ny, nx)
        Of an image, all of which is drawn.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 8.4), layout="constrained")
    labels = {
        "snr": "matched-filter S/N (ratio)",
        "depth_frac": "depth (% of the light)",
        "radius_px": "radius (px)",
    }
    for (quantity, label), axis in zip(labels.items(), axes.flat, strict=False):
        unit = 0.01 if quantity == "depth_frac" else 1.0
        _draw_recall(axis, recall[recall["quantity"] == quantity], label, detector, unit)
    _draw_places(axes[1, 1], blobs, alarms, detector, shape)
    figure.suptitle(
        f"New blobs in historical images: {plotting.NAMES[detector]}, with 95 % intervals"
    )
    plotting.save(figure, path)


def _draw_recall(axis: Axes, table: pd.DataFrame, label: str, detector: str, unit: float) -> None:
    """Draw recall in the bins of one quantity."""
    errors = _error_bars(table, "recall")
    position = np.arange(len(table))
    color, _, marker = plotting.STYLES[detector]
    axis.errorbar(position, table["recall"], yerr=errors, fmt=marker, color=color, capsize=3)
    _label_bins(axis, table, unit)
    axis.set(xlabel=label, ylabel="recall of new blobs (fraction)", ylim=(-0.03, 1.03))


def _draw_places(
    axis: Axes, blobs: pd.DataFrame, alarms: pd.DataFrame, detector: str, shape: tuple[int, ...]
) -> None:
    """Draw the places of found and missed blobs, and of false alarms."""
    axis.scatter(
        alarms["x_px"],
        alarms["y_px"],
        s=24,
        color=plotting.PURPLE,
        marker="+",
        label=f"false alarm ({len(alarms)})",
    )
    of_detector, _, point = plotting.STYLES[detector]
    for status, color, marker in (("found", of_detector, point), ("missed", plotting.ORANGE, "X")):
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
        xlim=(-0.5, shape[1] - 0.5),
        ylim=(-0.5, shape[0] - 0.5),
        xlabel="x (px)",
        ylabel="y (px)",
        title="Positions",
    )
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)


def completeness(path: str | Path, grid: pd.DataFrame, limits: pd.DataFrame) -> None:
    """Draw the completeness of each detector by radius and depth, and the limits of completeness.

    Parameters
    ----------
    path : path
    grid, limits : DataFrame
        ``completeness.csv``, ``limits.csv``.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    names = list(dict.fromkeys(grid["detector"]))
    figure, axes = plt.subplots(2, 2, figsize=(11, 9), layout="constrained")
    for axis, name in zip(axes.flat, names, strict=False):
        _draw_grid(axis, grid[grid["detector"] == name], name)
    last = axes[1, 1]
    for name in names:
        _draw_limits(last, limits[limits["detector"] == name], name)
    radii = sorted(grid["radius_px"].unique())
    depths = sorted(100 * grid["depth_frac"].unique())
    last.set(
        xlabel="radius (px)",
        ylabel="depth (% of the light)",
        title="depth at which 50 % and 90 % are found\n(no point: at no depth that was injected)",
        yscale="log",
        # What was injected, so that an empty panel says that nothing in this range was found often enough
        xlim=(radii[0] - 0.5, radii[-1] + 0.5),
        ylim=(0.8 * depths[0], 1.25 * depths[-1]),
    )
    last.set_xticks(radii, [f"{radius:g}" for radius in radii])
    last.set_yticks(depths, [f"{depth:.2g}" for depth in depths])
    last.yaxis.set_minor_locator(NullLocator())
    figure.legend(*last.get_legend_handles_labels(), loc="outside lower center", ncols=3)

    # The widest interval of any cell, on either side
    ends = grid[["completeness_low", "completeness_high"]].sub(grid["completeness"], axis=0)
    widest = 100 * float(np.abs(ends.to_numpy(float)).max())
    figure.suptitle(
        f"Injected blobs that are found; {grid['n'].min()} in each cell, "
        f"95 % intervals reach up to {widest:.0f} points"
    )
    plotting.save(figure, path)


def _draw_grid(axis: Axes, grid: pd.DataFrame, name: str) -> None:
    """Draw the completeness of one detector as a map with numbers."""
    shares = grid.pivot(index="radius_px", columns="depth_frac", values="completeness")
    axis.imshow(shares, origin="lower", cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares.to_numpy()):
        percent = f"{100 * share:.0f}"
        color = "white" if share < 0.6 else "black"
        axis.text(column, row, percent, ha="center", va="center", color=color)
    axis.set_xticks(range(shares.shape[1]), [f"{100 * depth:.2g}" for depth in shares.columns])
    axis.set_yticks(range(shares.shape[0]), [f"{radius:g}" for radius in shares.index])
    axis.set(
        xlabel="depth (% of the light)",
        ylabel="radius (px)",
        title=f"{plotting.NAMES[name]}: found (%)",
    )


def _draw_limits(axis: Axes, limits: pd.DataFrame, name: str) -> None:
    """Draw the depths of 50 % and 90 % completeness of one detector."""
    color, _, _ = plotting.STYLES[name]
    for percent, style in ((50, "o--"), (90, "s-")):
        depth = 100 * limits[f"depth_{percent}_frac"]
        label = f"{plotting.NAMES[name]}, {percent} %"
        axis.plot(limits["radius_px"], depth, style, color=color, label=label)


def deep_completeness(path: str | Path, grid: pd.DataFrame) -> None:
    """Draw how faint the blobs are that are found within so many images since their landing.

    Parameters
    ----------
    path : path
    grid : DataFrame
        ``completeness.csv`` of the stage deep.
    """
    import matplotlib.pyplot as plt

    numbers = sorted(grid["n_since"].unique())
    colors = plt.get_cmap("viridis_r")(np.linspace(0.1, 1, len(numbers)))
    markers = "os^Dvp"
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 5.0), sharex=True, sharey=True, layout="constrained"
    )
    for k, n_since in enumerate(numbers):
        part = grid[grid["n_since"] == n_since].sort_values("snr")
        errors = [
            part["completeness"] - part["completeness_low"],
            part["completeness_high"] - part["completeness"],
        ]
        label = f"{n_since} image" if n_since == 1 else f"{n_since} images"
        style = {"color": colors[k], "marker": markers[k % len(markers)], "ms": 5}
        left.errorbar(
            part["snr"],
            part["completeness"],
            yerr=np.clip(errors, 0, None),
            capsize=2,
            label=label,
            **style,
        )
        right.plot(part["snr"], part["optimum"], ls="--", label=label, **style)
    left.set(
        xscale="log",
        xlabel="S/N on one image (ratio)",
        ylabel="superimposed blobs found (fraction)",
        title="Found within so many images, with 95 % intervals",
        ylim=(-0.03, 1.03),
    )
    levels = sorted(grid["snr"].unique())
    left.set_xticks(levels, [f"{level:g}" for level in levels])
    left.minorticks_off()
    right.set(
        xlabel="S/N on one image (ratio)", title="The upper limit: a matched filter that knows all"
    )
    figure.suptitle("The dense network on the latest images together")
    handles, labels = left.get_legend_handles_labels()
    columns = len(numbers)
    title = "since the landing"
    figure.legend(handles, labels, title=title, loc="outside lower center", ncols=columns)
    plotting.save(figure, path)


def landing_errors(path: str | Path, found: pd.DataFrame, coverage: float) -> None:
    """Draw the errors of landing dates, and how often the interval holds them, by S/N.

    Parameters
    ----------
    path : path
    found : DataFrame
        snr, error_images and within_interval of superimposed blobs; those without a date are left out.
    coverage : float
        Probability that an interval is meant to hold (fraction).
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator, MultipleLocator

    dated = found[found["error_images"].notna()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    edges = np.arange(-8.5, 9)
    errors = np.clip(dated["error_images"].to_numpy(float), -8, 8)
    left.hist(errors, edges, color=plotting.BLUE)
    left.set(
        xlabel="first image found minus true one (images; 8: or more)",
        ylabel="superimposed blobs (count)",
        title="Error of the landing when found",
    )
    left.xaxis.set_major_locator(MultipleLocator(2))
    left.yaxis.set_major_locator(MaxNLocator(integer=True))
    groups = dated.groupby("snr")["within_interval"]
    n = groups.size().to_numpy()
    inside = groups.sum().to_numpy(float)
    low, high = metrics.wilson_interval(inside, n)
    share = inside / n
    labels = [f"{snr:g}\n({count})" for snr, count in zip(groups.groups, n, strict=True)]
    right.errorbar(
        range(len(n)),
        share,
        yerr=np.clip([share - low, high - share], 0, None),
        fmt="o",
        capsize=2,
        color=plotting.BLUE,
    )
    right.axhline(coverage, color=plotting.GREY, lw=0.8)
    right.set_xticks(range(len(n)), labels)
    right.set(
        xlabel="S/N on one image (ratio; below it blobs)",
        ylabel="interval holds the landing (fraction)",
        title=f"Coverage of the {100 * coverage:g} % interval, with 95 % intervals",
        ylim=(-0.03, 1.03),
    )
    plotting.save(figure, path)


def deep_alarms(
    path: str | Path, alarms: pd.DataFrame, thresholds: dict[int, float], n_images: int
) -> None:
    """Draw the false alarms of each depth against the threshold, and the thresholds that are set.

    Parameters
    ----------
    path : path
    alarms : DataFrame
        ``alarms.csv`` of the stage deep.
    thresholds : dict of float
        Score, by number of images.
    n_images : int
        Images searched.
    """
    import matplotlib.pyplot as plt

    colors = plt.get_cmap("viridis_r")(np.linspace(0.1, 1, len(thresholds)))
    figure, axis = plt.subplots(figsize=(6.4, 5.0), layout="constrained")
    for color, (depth, threshold) in zip(colors, thresholds.items(), strict=True):
        counted = alarms[(alarms["n_images"] == depth) & (alarms["persistent"] == 1)]
        scores = np.sort(counted["score"].to_numpy(float))[::-1]
        rate = 100 * np.arange(1, len(scores) + 1) / n_images
        label = "1 image" if depth == 1 else f"{depth} images"
        axis.step(_log_odds(scores), rate, where="post", color=color, label=label)
        axis.axvline(_log_odds(threshold), color=color, ls=":", lw=1)
    axis.set(
        xlabel="threshold (log-odds of the score)",
        ylabel="candidates above, without a blob (per 100 images)",
        title="Dense network, by the number of images searched together\n(dotted: thresholds that are set)",
    )
    figure.legend(loc="outside lower center", ncols=3)
    plotting.save(figure, path)


def _log_odds(score: Any) -> Any:
    """Return the logarithm of score / (1 - score)."""
    return np.log(score) - np.log1p(-np.asarray(score))
