"""Figures of the optional stage ``explore``, apart from other figures, so that no other stage depends on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from blobpipe.core import metrics, plotting
from blobpipe.core.arrays import FloatArray

if TYPE_CHECKING:
    import pandas as pd

CLASSES = ((0, plotting.BLUE, "o", "no blob"), (1, plotting.ORANGE, "x", "blobs"))
CURVES = {
    "mean_error_sigma2": ("mean error", plotting.PURPLE, ":"),
    "peak_error_sigma2": ("highest error", plotting.ORANGE, "-"),
    "peak_square_sigma2": ("the same, no autoencoder", plotting.GREEN, "--"),
    "report_probability": ("report's network", plotting.BLUE, "-."),
}


def embeddings(
    path: str | Path,
    embedded: dict[str, dict[str, FloatArray]],
    labels: npt.NDArray[np.int64],
    aucs: dict[str, dict[str, float]],
) -> None:
    """Draw subframes in two dimensions: a row for each kind of features, a column for each method.

    Parameters
    ----------
    path : path
    embedded : dict of dict of ndarray, shape (n, 2)
        By features and method.
    labels : ndarray, shape (n,)
        1 with blobs, 0 without.
    aucs : dict of dict of float
        Area under the ROC curve of the vote of the neighbours, by features and method.
    """
    import matplotlib.pyplot as plt

    n_rows = len(embedded)
    n_columns = len(next(iter(embedded.values())))
    size = (3.6 * n_columns, 3.5 * n_rows)
    figure, axes = plt.subplots(
        n_rows, n_columns, figsize=size, squeeze=False, layout="constrained"
    )

    # one panel for each kind of features and method
    style: dict[str, Any] = {"s": 9, "lw": 0.7, "alpha": 0.6}
    for (name, methods), row in zip(embedded.items(), axes, strict=True):
        for (method, points), axis in zip(methods.items(), row, strict=True):
            for label, color, marker, text in CLASSES:
                x, y = points[labels == label].T
                axis.scatter(x, y, color=color, marker=marker, label=text, **style)
            axis.set_title(f"{name}, {method}: area {aucs[name][method]:.2f}")
            axis.set(xlabel="first axis (any unit)", ylabel="second axis (any unit)")
            axis.set(xticks=[], yticks=[])

    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(
        "Validation subframes; area under the ROC curve of the nearest neighbours (0.5: nothing told apart)"
    )
    plotting.save(figure, path)


def anomaly(
    path: str | Path,
    scores: pd.DataFrame,
    labels: npt.NDArray[np.int64],
    examples: tuple[FloatArray, FloatArray, FloatArray],
) -> None:
    """Draw ROC curves of the scores, and the subframe of either class that is reconstructed worst.

    Parameters
    ----------
    path : path
    scores : DataFrame
        See `explore.score`, and report_probability.
    labels : ndarray, shape (n,)
        1 with blobs, 0 without.
    examples : (subframes, reconstructions, smoothed errors), each of shape (2, ny, nx)
        With blobs and without; the first two in sigma, the last in sigma squared.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplot_mosaic("aabcd;aaefg", figsize=(16, 6.4), layout="constrained")

    # ROC curves, left
    for name, (text, color, style) in CURVES.items():
        values = scores[name].to_numpy(np.float64)
        area = metrics.roc_auc(labels, values)[0]
        fpr, tpr, _ = metrics.roc_curve(labels, values)
        axes["a"].plot(fpr, tpr, style, color=color, label=f"{text}, area {area:.3f}")
    axes["a"].plot([0, 1], [0, 1], color=plotting.GREY, lw=0.8)
    axes["a"].set(
        xlabel="false-positive rate (fraction)", ylabel="true-positive rate (fraction)", title="ROC"
    )
    axes["a"].legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)

    # examples, right: a row for each class, a column for each kind of image
    names = (
        "subframe, -3 to 3 sigma",
        "reconstruction, -1 to 1 sigma",
        "smoothed error, 0.5 to 3 sigma\u00b2",
    )
    limits = ((-3, 3), (-1, 1), (0.5, 3))
    colours = ("gray", "gray", "magma")
    for row, (keys, text) in enumerate(zip(("bcd", "efg"), ("with blobs", "without"), strict=True)):
        for key, images, name, (low, high), colour in zip(
            keys, examples, names, limits, colours, strict=True
        ):
            axes[key].imshow(images[row], origin="lower", cmap=colour, vmin=low, vmax=high)
            axes[key].set(xlabel="x (px)", ylabel="y (px)")
            axes[key].set_title(f"Oddest {text}:\n{name}", fontsize=plotting.SMALL)
    plotting.save(figure, path)
