"""Figures of the search for better settings: its history, what matters, all points, and loss against cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from blobpipe.core import plotting

if TYPE_CHECKING:
    import pandas as pd

# Ground of a label that lines run through
LABEL = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.0}

# Names of the objectives, with unit
LABELS = {
    "loss": "validation loss (nat)",
    "missed": "missed at a false-positive rate of 1 % (fraction)",
}


def history(path: str | Path, table: pd.DataFrame, label: str) -> None:
    """Draw the objective of every trial, and the lowest so far.

    Parameters
    ----------
    path : path
    table : DataFrame
        ``trials.csv``.
    label : str
        Name and unit of the objective.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(figsize=(6.8, 4.4), layout="constrained")
    done = table[table["state"] == "done"]
    axes.plot(done["trial"], done["objective"], "o", color=plotting.BLUE, label="trial")
    lowest = done["objective"].cummin()
    axes.step(done["trial"], lowest, where="post", color=plotting.ORANGE, label="lowest so far")
    as_they_are = done[done["trial"] == 0]
    if len(as_they_are):
        height = float(as_they_are["objective"].iloc[0])
        axes.axhline(height, color=plotting.GREY, ls=":", label="the settings as they are")
    n_stopped = int((table["state"] == "stopped").sum())
    axes.set(
        xlabel="trial (number)",
        ylabel=label,
        title=f"Search of the report's network: {len(done)} trials done, {n_stopped} stopped",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    figure.legend(loc="outside lower center", ncols=3)
    plotting.save(figure, path)


def importance(path: str | Path, importances: dict[str, float], n_trials: int) -> None:
    """Draw how much of the variation of the objective each setting explains.

    Parameters
    ----------
    path : path
    importances : dict of float
        By the names of the settings (0 to 1).
    n_trials : int
        Finished trials that this is estimated from.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    names = sorted(importances, key=lambda name: importances[name])
    axes.barh(names, [importances[name] for name in names], color=plotting.BLUE)
    axes.set(
        xlabel="share of the variation of the objective (fraction)",
        title=f"Search of the report's network: importance, from {n_trials} trials",
    )
    if not names:
        axes.text(0.5, 0.5, "too few trials", ha="center", transform=axes.transAxes)
    plotting.save(figure, path)


def parallel(path: str | Path, done: pd.DataFrame, names: list[str], label: str) -> None:
    """Draw each trial as a line through its settings, coloured by its objective.

    Parameters
    ----------
    path : path
    done : DataFrame
        Rows of ``trials.csv`` that were finished.
    names : list of str
        Settings, one axis for each.
    label : str
        Name and unit of the objective.
    """
    import matplotlib.pyplot as plt
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure, axes = plt.subplots(figsize=(1.6 * len(names) + 1.5, 4.4), layout="constrained")

    # values in their order, evenly spaced on each axis
    heights = np.empty((len(done), len(names)))
    for column, name in enumerate(names):
        values = sorted({str(value) for value in done[name]}, key=json.loads)
        places = np.linspace(0, 1, len(values)) if len(values) > 1 else np.array([0.5])
        place_of = dict(zip(values, places, strict=True))
        heights[:, column] = [place_of[str(value)] for value in done[name]]
        for value, place in place_of.items():
            if len(values) <= 8:
                axes.text(
                    column + 0.04, place, value, fontsize=plotting.SMALL, va="center", bbox=LABEL
                )
        axes.axvline(column, color=plotting.GREY, lw=0.8)

    # the best on top; those that failed altogether share one colour
    objective = done["objective"].to_numpy(float)
    norm = Normalize(objective.min(), np.quantile(objective, 0.9))
    spread = np.linspace(-0.012, 0.012, max(1, len(done)))
    for row in np.argsort(-objective):
        color = plt.get_cmap("viridis_r")(norm(objective[row]))
        axes.plot(heights[row] + spread[row], color=color, alpha=0.8, lw=1.2)
    axes.set(
        yticks=[],
        xticks=range(len(names)),
        title="Search of the report's network: every trial that was done",
    )
    axes.set_xticklabels([name.removeprefix("network.") for name in names])
    figure.colorbar(ScalarMappable(norm, "viridis_r"), ax=axes, label=label, extend="max")
    plotting.save(figure, path)


def cost(path: str | Path, done: pd.DataFrame, label: str) -> None:
    """Draw the objective against the work that a network needs for one subframe.

    Parameters
    ----------
    path : path
    done : DataFrame
        Rows of ``trials.csv`` that were finished.
    label : str
        Name and unit of the objective.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.8, 4.4), layout="constrained")
    work = done["multiply_adds"].astype(float) / 1e6
    axes.scatter(work, done["objective"], color=plotting.BLUE, label="trial")

    # those that nothing cheaper beats
    order = np.lexsort((done["objective"], work))
    lowest = np.minimum.accumulate(done["objective"].to_numpy(float)[order])
    axes.step(
        work.to_numpy()[order],
        lowest,
        where="post",
        color=plotting.ORANGE,
        label="best at most as costly",
    )
    as_they_are = done["trial"] == 0
    axes.plot(
        work[as_they_are],
        done.loc[as_they_are, "objective"],
        "s",
        color=plotting.GREEN,
        ms=9,
        label="the settings as they are",
    )
    axes.set(
        xscale="log",
        xlabel="multiplications and additions per subframe (million)",
        ylabel=label,
        title="Search of the report's network: objective and cost of each trial",
    )
    figure.legend(loc="outside lower center", ncols=3)
    plotting.save(figure, path)
