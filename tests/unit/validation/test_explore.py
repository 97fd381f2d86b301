"""The optional stage: embeddings tell apart what is apart and nothing else, and what is missing is said."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from blobpipe import cli
from blobpipe.core import plotting
from blobpipe.errors import ExtraError, TableError
from blobpipe.networks import report_network
from blobpipe.params import Explore
from blobpipe.validation import explore, explore_figures

from ..conftest import opinionated_network

SMALL = Explore(n_train=10, epochs=1, neighbours=5, bin_px=16)
MADE = {"metrics.json", "scores.csv", "embedding.csv", "anomaly.png", "embedding.png"}
LABELS = np.arange(120) % 2


def hide(package: str, patch: pytest.MonkeyPatch) -> None:
    """Let a package be missing."""
    find = importlib.util.find_spec
    patch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == package else find(name, *rest),
    )


def two_heaps() -> np.ndarray:
    """120 points in eight dimensions, those of odd number elsewhere."""
    return np.random.default_rng(1).normal(size=(120, 8)) + 6.0 * LABELS[:, None]


def run(
    project: Path, models: tuple[Path, Path], out: Path, params: Explore = SMALL
) -> dict[str, Any]:
    explore.explore(
        project / "data/difference",
        project / "data/scale",
        project / "results/cutout",
        models,
        out,
        params,
    )
    return json.loads((out / "metrics.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture
def without_umap(monkeypatch: pytest.MonkeyPatch) -> None:
    hide("umap", monkeypatch)


@pytest.mark.usefixtures("without_umap")
def test_a_run_writes_the_same_bytes_each_time(
    made_project: Path, model: Path, dense_model: Path, tmp_path: Path
) -> None:
    for name in "ab":
        metrics = run(made_project, (model, dense_model), tmp_path / name)
    assert {path.name for path in (tmp_path / "a").iterdir()} == MADE
    assert [
        name
        for name in MADE
        if (tmp_path / "a" / name).read_bytes() != (tmp_path / "b" / name).read_bytes()
    ] == []
    scores, embedding = (
        pd.read_csv(tmp_path / "a" / f"{name}.csv") for name in ("scores", "embedding")
    )
    assert list(scores) == list(explore.SCORE_COLUMNS)
    assert list(embedding) == list(explore.EMBEDDING_COLUMNS)
    assert metrics["n_train"] == 10
    assert len(scores) == metrics["n_validation"] == 2 * metrics["n_with_blobs"] == 24
    assert not metrics["umap_installed"]
    assert {tuple(methods) for methods in metrics["knn_auc"].values()} == {("all", "pca", "tsne")}
    assert set(embedding["method"]) == {"pca", "tsne"}


@pytest.mark.usefixtures("without_umap")
def test_embeddings_keep_apart_what_is_apart() -> None:
    embedded = explore.embed(two_heaps(), SMALL)
    assert [points.shape for points in embedded.values()] == [(120, 2)] * 2
    for method, points in embedded.items():
        assert explore.knn_auc(points, LABELS, SMALL) > 0.99, method
        assert explore.silhouette(points, LABELS) > 0.3, method


@pytest.mark.usefixtures("without_umap")
def test_labels_that_mean_nothing_are_not_found() -> None:
    rng = np.random.default_rng(2)
    labels = rng.permutation(np.arange(400) % 2)
    for method, points in explore.embed(rng.normal(size=(400, 8)), SMALL).items():
        # the standard deviation is 0.03
        assert abs(explore.knn_auc(points, labels, SMALL) - 0.5) < 0.1, method
        assert abs(explore.silhouette(points, labels)) < 0.05, method


@pytest.mark.long
def test_umap_keeps_apart_what_is_apart_the_same_way_each_time() -> None:
    pytest.importorskip("umap")
    one, two = (explore.embed(two_heaps(), SMALL)["umap"] for _ in range(2))
    assert explore.knn_auc(one, LABELS, SMALL) > 0.99
    assert one.tobytes() == two.tobytes()


def test_a_missing_extra_ends_as_one_line(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hide("sklearn", monkeypatch)
    with pytest.raises(ExtraError):
        explore.require_extra()
    assert cli.main(["explore"]) == 1
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "pip install" in printed
    assert "[explore]" in printed
    assert not (project / "results/explore").exists()


def test_too_few_subframes_are_refused(
    made_project: Path, model: Path, dense_model: Path, tmp_path: Path
) -> None:
    few = SMALL.model_copy(update={"n_validation": 6})
    with pytest.raises(TableError, match="of the rarer class; expected at least 1 and 5"):
        run(made_project, (model, dense_model), tmp_path / "out", few)
    assert not (tmp_path / "out").exists()


def test_scores_are_those_of_the_errors() -> None:
    subframes = np.zeros((2, 64, 64), np.float32)
    subframes[1, 20:30, 20:30] = 3
    nothing, blob = explore.score(subframes, subframes + 1, 2.0).to_numpy()
    np.testing.assert_allclose(nothing, [1, 1, 0], atol=1e-5)
    assert blob[0] == pytest.approx(1)
    assert blob[2] == pytest.approx(9, rel=0.1)


def test_binned_pixels_are_means() -> None:
    subframes = np.arange(2 * 8 * 8, dtype=np.float32).reshape(2, 8, 8)
    bins = explore.binned(subframes, 4)
    assert bins.shape == (2, 4)
    assert bins[0, 0] == subframes[0, :4, :4].mean()
    assert bins[1, 3] == subframes[1, 4:, 4:].mean()


def test_layer_outputs_lead_to_the_networks_answer() -> None:
    network = opinionated_network(1).eval()
    subframes = np.random.default_rng(1).normal(size=(60, 256, 256)).astype(np.float32)
    units = explore.layer_outputs(network, network.layers[0], torch.relu, subframes)
    assert units.shape == (60, 128)
    with torch.inference_mode():
        logits = network.layers[1](torch.from_numpy(units)).double()
    np.testing.assert_allclose(
        torch.softmax(logits, 1)[:, 1], report_network.predict(network, subframes), rtol=1e-5
    )
    assert not network.layers[0]._forward_hooks


def drawn(name: str, path: Path) -> None:
    rng = np.random.default_rng(1)
    labels = np.arange(20) % 2
    if name == "embeddings":
        points = {"pixels": {"pca": rng.normal(size=(20, 2)), "tsne": rng.normal(size=(20, 2))}}
        explore_figures.embeddings(path, points, labels, {"pixels": {"pca": 0.5, "tsne": 0.6}})
    else:
        scores = pd.DataFrame(rng.random((20, 4)), columns=list(explore.SCORES))
        images = rng.normal(size=(3, 2, 64, 64))
        explore_figures.anomaly(path, scores, labels, (images[0], images[1], images[2]))


@pytest.mark.parametrize("name", ["embeddings", "anomaly"])
def test_every_axis_has_a_name_with_its_unit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Figure] = []
    monkeypatch.setattr(plotting, "save", lambda figure, path: kept.append(figure))
    drawn(name, tmp_path / "a.png")
    labels = [text for axis in kept[0].axes for text in (axis.get_xlabel(), axis.get_ylabel())]
    assert all("(" in label for label in labels), labels
    plt.close("all")
