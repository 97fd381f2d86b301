"""Alternatives that the report names (ISR 7): an autoencoder, and embeddings of subframes in two dimensions.

Optional: scikit-learn is needed, and umap-learn for UMAP; both belong to the extra ``explore`` of this package.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blobpipe.core import metrics, tables
from blobpipe.core.arrays import FloatArray
from blobpipe.errors import ExtraError, TableError
from blobpipe.networks import kernels, model_file, report_network
from blobpipe.params import Explore
from blobpipe.simulation import cutout, render
from blobpipe.simulation.recipes import Recipes, Scene
from blobpipe.validation import autoencoder, explore_figures

Labels = npt.NDArray[np.int64]
Subframes = npt.NDArray[np.float32]

SCORES = ("mean_error_sigma2", "peak_error_sigma2", "peak_square_sigma2", "report_probability")
SCORE_COLUMNS = ("subframe", "label", *SCORES)
EMBEDDING_COLUMNS = ("features", "method", "subframe", "label", "x", "y")
FOLDS = 5  # of the cross-validation of the neighbours' vote
MAX_COMPONENTS = 50  # principal components given to t-SNE; the number of its authors
BATCH = 50  # subframes shown to a network at a time; bounds the memory


def explore(
    difference_dir: str | Path,
    scale_dir: str | Path,
    cutout_dir: str | Path,
    models: tuple[str | Path, str | Path],
    out_dir: str | Path,
    params: Explore,
) -> None:
    """Score and embed validation subframes, and measure how well either separates those with blobs (stage ``explore``).

    Parameters
    ----------
    difference_dir, scale_dir, cutout_dir : path
        Folders that the earlier stages have written.
    models : (path, path)
        Models of the report's network and of the dense network.
    out_dir : path
        ``metrics.json``, ``scores.csv``, ``embedding.csv``, ``anomaly.png``, ``embedding.png``.
    params : Explore

    Raises
    ------
    ExtraError
        If scikit-learn is not installed.
    TableError
        If there are too few subframes of either class.
    ModelError, FrameError
        If a model or a file of an earlier stage is missing or damaged.

    Notes
    -----
    Source: ISR section 7 names the methods; shapes and numbers are ours.
    """
    require_extra()
    out_dir = Path(out_dir)
    folders = (difference_dir, scale_dir, cutout_dir)
    kernels.set_threads(params.threads)

    # networks, training subframes without blobs, and validation subframes
    report = model_file.load_model(models[0], "plain")[0]
    dense = model_file.load_dense(models[1])[0]
    background = _background(*cutout.open_split(*folders, "train"), params.n_train)
    scene, recipes = cutout.open_split(*folders, "validation", n=params.n_validation)
    subframes = render.render_subframes(scene, recipes, np.arange(len(recipes)))
    labels = recipes.label
    _require_both_classes(cutout_dir, len(background), labels)

    # scores: errors of the autoencoder, and the report's network to compare with
    network = autoencoder.train(background, params)
    reconstructed = autoencoder.reconstruct(network, subframes)
    scores = score(subframes, reconstructed, params.smooth_px)
    scores["report_probability"] = report_network.predict(report, subframes)

    # embeddings: of binned pixels, and of the last layers of both networks
    features = {
        "pixels": binned(subframes, params.bin_px),
        "report": layer_outputs(report, report.layers[-2], F.relu, subframes),
        "dense": layer_outputs(dense, dense.last, lambda maps: maps.amax((2, 3)), subframes),
    }
    embedded = {name: embed(values, params) for name, values in features.items()}

    # standardised pixels have variance 1, so the rest of the error is explained
    explained = 1 - float(np.square(subframes - reconstructed)[labels == 0].mean())
    metrics = {
        "n_train": len(background),
        **_anomaly_metrics(scores, labels, explained),
        **_embedding_metrics(features, embedded, labels, params),
    }

    # tables and figures; those of the scores show the worst subframe with blobs and the worst without
    _write_tables(out_dir, scores, embedded, labels)
    explore_figures.embeddings(out_dir / "embedding.png", embedded, labels, metrics["knn_auc"])
    peak_error = scores["peak_error_sigma2"]
    worst = np.array([peak_error.where(labels == label).idxmax() for label in (1, 0)])
    maps = autoencoder.error_maps(subframes[worst], reconstructed[worst], params.smooth_px)
    examples = (subframes[worst], reconstructed[worst], maps)
    explore_figures.anomaly(out_dir / "anomaly.png", scores, labels, examples)
    tables.write_json(out_dir / "metrics.json", metrics)


def require_extra() -> None:
    """Check that scikit-learn is installed, before anything is computed.

    Raises
    ------
    ExtraError
        If it is not; the message is the command that installs it.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise ExtraError(
            "explore: scikit-learn is not installed, expected for this optional stage; run: "
            "pip install -c constraints.txt -e '.[explore]'"
        )


def _background(scene: Scene, recipes: Recipes, n: int) -> Subframes:
    """Render the first ``n`` subframes without superimposed blobs."""
    rows = np.flatnonzero(recipes.label == 0)[:n]
    return render.render_subframes(scene, recipes, rows)


def _require_both_classes(cutout_dir: str | Path, n_background: int, labels: Labels) -> None:
    rarer = int(np.bincount(labels, minlength=2).min())
    if rarer < FOLDS or not n_background:
        raise TableError(
            f"{cutout_dir}: {n_background} training subframes without blobs, and {rarer} validation subframes of the rarer "
            f"class; expected at least 1 and {FOLDS}; raise explore.n_validation or the counts of cutout"
        )


def score(subframes: Subframes, reconstructed: Subframes, smooth_px: float) -> pd.DataFrame:
    """Score how badly each subframe is reconstructed.

    Parameters
    ----------
    subframes, reconstructed : ndarray, shape (n, ny, nx), float32
        In sigma.
    smooth_px : float
        See `autoencoder.error_maps`.

    Returns
    -------
    DataFrame
        mean_error_sigma2, the mean squared error of the reconstruction; peak_error_sigma2, the highest value of its
        smoothed map; and for comparison peak_square_sigma2, the same of the subframe itself, without any autoencoder.
    """
    mean_error = np.square(subframes - reconstructed).mean((1, 2))
    peak_error = autoencoder.error_maps(subframes, reconstructed, smooth_px).max((1, 2))
    peak_square = autoencoder.error_maps(subframes, 0.0, smooth_px).max((1, 2))
    return pd.DataFrame(
        {
            "mean_error_sigma2": mean_error,
            "peak_error_sigma2": peak_error,
            "peak_square_sigma2": peak_square,
        }
    )


def binned(subframes: Subframes, bin_px: int) -> Subframes:
    """Average squares of ``bin_px`` x ``bin_px`` pixels, shape (n, (ny / bin_px) * (nx / bin_px))."""
    n, ny, nx = subframes.shape
    squares = subframes.reshape(n, ny // bin_px, bin_px, nx // bin_px, bin_px)
    return np.asarray(squares.mean((2, 4)).reshape(n, -1))


def layer_outputs(
    network: nn.Module, layer: nn.Module, reduce: Callable[[Tensor], Tensor], subframes: Subframes
) -> Subframes:
    """Compute features of each subframe from the output of a layer of a network.

    Parameters
    ----------
    network : Module
        In evaluation mode.
    layer : Module
        One of its layers.
    reduce : function
        Turns the layer's output into k numbers for each subframe.
    subframes : ndarray, shape (n, ny, nx), float32

    Returns
    -------
    ndarray, shape (n, k), float32
    """
    kept: list[Tensor] = []

    def keep(_layer: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kept.append(reduce(output))

    handle = layer.register_forward_hook(keep)
    with torch.inference_mode():
        for start in range(0, len(subframes), BATCH):
            network(torch.from_numpy(subframes[start : start + BATCH, None]))
    handle.remove()
    return np.asarray(torch.cat(kept).numpy())


def embed(features: FloatArray, params: Explore) -> dict[str, FloatArray]:
    """Embed features in two dimensions by PCA, t-SNE, and UMAP where umap-learn is installed, without their labels.

    Parameters
    ----------
    features : ndarray, shape (n, k)
        In any units: each feature is scaled to mean 0 and standard deviation 1.
    params : Explore

    Returns
    -------
    dict of ndarray, shape (n, 2)
        By method: pca, tsne, umap.

    Notes
    -----
    Source: ISR section 7 names the methods. They run on one thread, so that sums come out the same on any machine.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    n = len(features)
    seed = params.seed
    with threadpool_limits(1):
        # the others start from the principal components
        scaled = _scaled(features)
        n_components = min(MAX_COMPONENTS, *scaled.shape)
        pca = PCA(n_components, svd_solver="full", random_state=seed)
        components = pca.fit_transform(scaled)
        embedded = {"pca": components[:, :2]}

        # perplexity and neighbours are bounded by the number of subframes
        perplexity = min(params.perplexity, (n - 1) / 3)
        tsne = TSNE(perplexity=perplexity, init="pca", random_state=seed, n_jobs=1)
        embedded["tsne"] = tsne.fit_transform(components)

        if importlib.util.find_spec("umap") is not None:
            from umap import UMAP

            neighbours = min(params.neighbours, n // 2)
            umap = UMAP(n_neighbors=neighbours, random_state=seed, n_jobs=1)
            embedded["umap"] = umap.fit_transform(components)
    return embedded


def _scaled(features: FloatArray) -> FloatArray:
    """Scale each feature to mean 0 and standard deviation 1, as float64."""
    from sklearn.preprocessing import StandardScaler

    return np.asarray(StandardScaler().fit_transform(features.astype(np.float64)))


def knn_auc(points: FloatArray, labels: Labels, params: Explore) -> float:
    """Measure how well the labels of the nearest neighbours predict the label of a point.

    Parameters
    ----------
    points : ndarray, shape (n, k)
    labels : ndarray, shape (n,)
        0 or 1.
    params : Explore

    Returns
    -------
    float
        Area under the ROC curve, the mean over five folds: 0.5 for chance, 1 for a perfect separation.
    """
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.neighbors import KNeighborsClassifier
    from threadpoolctl import threadpool_limits

    vote = KNeighborsClassifier(min(params.neighbours, len(points) // 2))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=params.seed)
    with threadpool_limits(1):
        return float(cross_val_score(vote, points, labels, cv=folds, scoring="roc_auc").mean())


def silhouette(points: FloatArray, labels: Labels) -> float:
    """Measure how far apart the two classes lie: 1 for two tight clusters, 0 for a mixture, negative if they are swapped."""
    from sklearn.metrics import silhouette_score
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        return float(silhouette_score(points, labels))


def _anomaly_metrics(scores: pd.DataFrame, labels: Labels, explained: float) -> dict[str, Any]:
    """Describe the scores: their areas under the ROC curve, and the scatter of one that knows nothing."""
    n = len(labels)
    n_with_blobs = int(labels.sum())
    # of the area under the curve of a random score (Mann and Whitney), to judge an area of 0.52 by
    chance_sd = float(np.sqrt((n + 1) / (12 * n_with_blobs * (n - n_with_blobs))))
    return {
        "n_validation": n,
        "n_with_blobs": n_with_blobs,
        "explained_variance": round(explained, 6),
        "anomaly_auc": {name: _auc(labels, scores[name]) for name in SCORES},
        "chance_auc_sd": round(chance_sd, 6),
    }


def _auc(labels: Labels, values: pd.Series[float]) -> float:
    return round(float(metrics.roc_auc(labels, values.to_numpy(np.float64))[0]), 6)


def _embedding_metrics(
    features: dict[str, Subframes],
    embedded: dict[str, dict[str, FloatArray]],
    labels: Labels,
    params: Explore,
) -> dict[str, Any]:
    """Measure how well each embedding separates the classes, and ``all`` features before they are embedded."""
    aucs: dict[str, dict[str, float]] = {}
    silhouettes: dict[str, dict[str, float]] = {}
    for name, values in features.items():
        points = {"all": _scaled(values), **embedded[name]}
        aucs[name] = {
            method: round(knn_auc(at, labels, params), 6) for method, at in points.items()
        }
        silhouettes[name] = {
            method: round(silhouette(at, labels), 6) for method, at in points.items()
        }
    return {
        "umap_installed": all("umap" in methods for methods in embedded.values()),
        "knn_auc": aucs,
        "silhouette": silhouettes,
    }


def _write_tables(
    out_dir: Path, scores: pd.DataFrame, embedded: dict[str, dict[str, FloatArray]], labels: Labels
) -> None:
    """Write ``scores.csv``, a row for each subframe, and ``embedding.csv``, one for each subframe, features and method."""
    subframes = pd.DataFrame({"subframe": np.arange(len(labels)), "label": labels})
    scored = pd.concat([subframes, scores], axis=1)
    tables.write_table(out_dir / "scores.csv", scored[list(SCORE_COLUMNS)])
    parts = [
        subframes.assign(features=name, method=method, x=at[:, 0], y=at[:, 1])
        for name, methods in embedded.items()
        for method, at in methods.items()
    ]
    tables.write_table(out_dir / "embedding.csv", pd.concat(parts)[list(EMBEDDING_COLUMNS)])
