"""Evaluation: kinds of failures and pointing on plain arrays, and the stage on a project in miniature."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from blobpipe.core import fits_images, metrics, tables
from blobpipe.detection.detectors import load_dense_detector
from blobpipe.detection.search import fit_peaks
from blobpipe.errors import ModelError
from blobpipe.networks import model_file, report_network
from blobpipe.params import Evaluate, Vetting
from blobpipe.simulation import cutout
from blobpipe.simulation.inject import render_in_sigma
from blobpipe.validation import evaluate

PARAMS = Evaluate(n_bootstrap=50, n_gallery=2)
FIGURES = ("by_snr", "confusion", "roc", "precision_recall", "calibration", "saliency", "failures")
TABLES = ("predictions", "roc", "precision_recall", "calibration", "snr", "failures")


Models = tuple[Path, Path]


@pytest.fixture(scope="module")
def models(model: Path, dense_model: Path) -> Models:
    """The report's network and the dense one."""
    return model, dense_model


@pytest.fixture(scope="module")
def evaluated(made_project: Path, models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of the stage; only for reading."""
    out = tmp_path_factory.mktemp("evaluate") / "results"
    _evaluate(made_project, models, out)
    return out


def _evaluate(
    project: Path, models: Models, out: str | Path = "results/evaluate", params: Evaluate = PARAMS
) -> Path:
    folders = (project / name for name in ("data/difference", "data/scale", "results/cutout"))
    evaluate.evaluate(*folders, models, project / out, params, vetting=Vetting())
    return project / out


# --- plain arrays ----------------------------------------------------------------------------------------------------


def test_a_point_within_radius_and_margin_of_a_blob_hits_it() -> None:
    blobs = pd.DataFrame(
        {
            "subframe": [0, 0, 2, 3],
            "x_px": [10, 200, 50, 5],
            "y_px": [10, 200, 50, 5],
            "radius_px": 6.0,
        }
    )
    points = np.array([[200, 208.9], [10, 10], [50, 59.1], [np.nan, np.nan]])
    assert evaluate.points_at_blob(points, blobs).tolist() == [True, False, False, False]


def test_a_blob_beyond_the_edge_can_be_hit() -> None:
    blobs = pd.DataFrame({"subframe": [0], "x_px": [-4], "y_px": [100], "radius_px": [6.0]})
    assert evaluate.points_at_blob(np.array([[2.0, 103.0]]), blobs).all()


FOUND = {
    "label": 1,
    "dip_px": 0.0,
    "known_px": np.nan,
    "snr": 30.0,
    "radius_px": 7.0,
    "edge_px": 90,
}
ALARM = {
    "label": 0,
    "dip_px": 0.0,
    "known_px": 40.0,
    "snr": np.nan,
    "radius_px": np.nan,
    "edge_px": np.nan,
}


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (FOUND, "artefact"),
        ({**FOUND, "dip_px": 1.0}, "dip"),
        ({**FOUND, "dip_px": 1.0, "radius_px": 4.0}, "small"),
        ({**FOUND, "dip_px": 1.0, "radius_px": 4.0, "snr": 6.0}, "faint"),
        ({**FOUND, "dip_px": 1.0, "radius_px": 4.0, "snr": 6.0, "edge_px": 2}, "edge"),
        ({**FOUND, "edge_px": -3}, "edge"),
        (ALARM, "artefact"),
        ({**ALARM, "dip_px": 1.0}, "artefact"),
        ({**ALARM, "dip_px": 1.0, "known_px": 3.9}, "dip"),
        ({**ALARM, "known_px": 0.0}, "artefact"),
    ],
)
def test_the_first_kind_that_fits_is_taken(row: dict[str, float], kind: str) -> None:
    assert evaluate.failure_kinds(pd.DataFrame([row])).tolist() == [kind]


def test_a_dip_needs_a_known_blob_on_the_window_and_a_shift() -> None:
    pattern = np.zeros((512, 600))
    pattern[300, 320] = 0.03
    windows = np.array(
        [[65, 45], [64, 45], [320, 300], [321, 200], [100, 100], [100, 100], [100, 100]]
    )
    drawn = np.array([[0.2, 0]] * 4 + [[0, 0]] * 3)
    measured = np.array([[0, 0]] * 4 + [[0.29, 0], [0.2, 0.3], [np.nan, np.nan]])
    pattern = np.pad(pattern, ((0, 44), (0, 0)))
    sizes = evaluate.dip_sizes(pattern, windows, drawn, measured)
    np.testing.assert_allclose(sizes, [0.2, 0, 0.2, 0, 0, np.hypot(0.2, 0.3), 0])


def test_distance_to_the_nearest_known_blob() -> None:
    pattern = np.zeros((100, 120))
    points = np.array([[50.0, 44.0], [50.0, 40.0], [np.nan, np.nan]])
    assert np.isinf(evaluate.distance_to_known(pattern, points)).all()
    pattern[40, 50] = 0.01
    np.testing.assert_array_equal(evaluate.distance_to_known(pattern, points), [4, 0, np.nan])


# --- the stage -------------------------------------------------------------------------------------------------------


def test_stage_writes_what_it_says(evaluated: Path) -> None:
    expected = (
        {f"{name}.csv" for name in TABLES} | {f"{name}.png" for name in FIGURES} | {"metrics.json"}
    )
    assert {path.name for path in evaluated.iterdir()} == expected
    found = json.loads((evaluated / "metrics.json").read_text())
    assert set(metrics.KEYS) <= set(found)
    assert set(found["interval"]) == {*metrics.KEYS, "dense", "matched_filter"}
    for name in ("dense", "matched_filter"):
        assert set(found[name]) == {*metrics.KEYS, "tpr_at_network_fpr"}
        assert set(found["interval"][name]) == set(metrics.KEYS)
    assert set(found["failures"]) == set(evaluate.KINDS)
    for key in metrics.KEYS:
        low, high = found["interval"][key]
        assert low <= found[key] <= high, key


def test_numbers_follow_from_the_predictions(evaluated: Path) -> None:
    found = json.loads((evaluated / "metrics.json").read_text())
    table = pd.read_csv(evaluated / "predictions.csv")
    labels = table["label"] == 1
    positive = table["probability"] >= 0.5
    assert list(table["subframe"]) == list(range(24))
    assert found["tpr"] == pytest.approx(positive[labels].mean(), abs=1e-6)
    assert found["tnr"] == pytest.approx(1 - positive[~labels].mean(), abs=1e-6)
    assert found["roc_auc"] == pytest.approx(
        metrics.roc_auc(*table[["label", "probability"]].to_numpy().T)[0], abs=1e-6
    )
    failures = pd.read_csv(evaluated / "failures.csv")
    assert set(failures["subframe"]) == set(table["subframe"][positive != labels])
    assert sum(found["failures"].values()) == len(failures)
    by_snr = (
        pd.read_csv(evaluated / "snr.csv")
        .groupby(["detector", "operating_point"])[["n", "found"]]
        .sum()
    )
    assert len(by_snr) == 6
    assert (by_snr["n"] == labels.sum()).all()
    assert by_snr.loc[("report", "threshold"), "found"] == (positive & labels).sum()
    for name, numbers in (
        ("report", found),
        ("dense", found["dense"]),
        ("matched_filter", found["matched_filter"]),
    ):
        assert by_snr.loc[(name, "fpr_0.01"), "found"] / labels.sum() == pytest.approx(
            numbers["tpr_at_fpr_0.01"], abs=1e-6
        )
    curve = pd.read_csv(evaluated / "roc.csv")
    assert (
        curve["fpr"].iloc[0],
        curve["tpr"].iloc[0],
        curve["fpr"].iloc[-1],
        curve["tpr"].iloc[-1],
    ) == (0, 0, 1, 1)


def test_a_network_that_sees_blobs_finds_the_strong_ones_and_points_at_them(
    evaluated: Path,
) -> None:
    found = json.loads((evaluated / "metrics.json").read_text())
    assert found["tpr"] > 0.8
    assert found["pointing_hit_rate"] > 0.8
    for name in ("dense", "matched_filter"):
        assert found[name]["tpr"] > 0.8
        assert found[name]["pointing_hit_rate"] > 0.8


def test_a_subframe_scores_what_a_scan_would_give_it(
    made_project: Path, models: Models, evaluated: Path
) -> None:
    """Its pixels as they were before clipping, the blobs added, are measured where the map is highest."""
    folders = (made_project / name for name in ("data/difference", "data/scale", "results/cutout"))
    scene, recipes = cutout.open_split(*folders, "validation")
    detector = load_dense_detector(models[1])
    table = pd.read_csv(evaluated / "predictions.csv")
    stage = tables.read_stage(made_project / "data/difference").set_index("frame")
    rows = np.flatnonzero((recipes.label == 1) & (recipes.dip == 0).all(axis=1))[:6]
    for row, pixels in zip(rows, render_in_sigma(scene, recipes, rows), strict=True):
        frame = recipes.frame[row]
        (x0, y0) = recipes.window[row]
        whole = fits_images.read_frame(
            fits_images.find_image(made_project / "data/difference", scene.names[frame])
        ).data
        whole = np.pad(whole[y0 : y0 + 256, x0 : x0 + 256], 20)
        for k in range(*recipes.first_blob[row : row + 2]):
            stamp, x, y = recipes.blob[k]
            whole[y : y + 41, x : x + 41] += (
                recipes.factor[k] * scene.stamps[stamp] * scene.sigma_frac[frame]
            )
        noise = stage["noise_frac"][scene.names[frame]]
        found = fit_peaks(detector.search(pixels), whole[20:-20, 20:-20], noise)
        found = detector.rate(found)[: evaluate.N_PEAKS]
        best = found.loc[found["score"].idxmax()]
        for name in ("score", "x_px", "y_px"):
            assert table[f"dense_{name}"][row] == pytest.approx(best[name], rel=2e-3, abs=2e-3)


def test_same_bytes_each_time(
    made_project: Path, models: Models, evaluated: Path, tmp_path: Path
) -> None:
    again = _evaluate(made_project, models, tmp_path / "again")
    for path in evaluated.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_chunks_of_any_size_give_the_same_answers(
    made_project: Path,
    models: Models,
    evaluated: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate, "CHUNK", 7)
    chunks = pd.read_csv(_evaluate(made_project, models, tmp_path / "chunks") / "predictions.csv")
    pd.testing.assert_frame_equal(chunks, pd.read_csv(evaluated / "predictions.csv"), atol=1e-5)


def test_a_network_that_never_sees_a_blob(
    project: Path, tmp_path: Path, blob_finder: report_network.ReportNetwork, dense_model: Path
) -> None:
    blob_finder.dense2.weight.data.zero_()
    model_file.save_model(tmp_path / "blind.safetensors", blob_finder, {})
    models = (tmp_path / "blind.safetensors", dense_model)
    found = json.loads((_evaluate(project, models) / "metrics.json").read_text())
    assert (found["tpr"], found["tnr"]) == (0, 1)
    # Of few subframes such rates are uncertain too
    for key in ("tpr", "tnr", "fpr", "fnr"):
        low, high = found["interval"][key]
        assert 0.02 < high - low < 0.6
        assert low <= found[key] <= high
    assert found["pointing_hit_rate"] is None
    assert found["interval"]["pointing_hit_rate"] == [None, None]


@pytest.mark.parametrize("label", [0, 1])
def test_a_class_without_subframes(project: Path, models: Models, label: int) -> None:
    path = project / "results/cutout/validation_subframes.csv"
    subframes = pd.read_csv(path).assign(label=label)
    tables.write_table(path, subframes)
    found = json.loads((_evaluate(project, models) / "metrics.json").read_text())
    assert found["roc_auc"] is None
    assert found["leakage_auc"] is None
    assert found["tpr" if label == 0 else "tnr"] is None


@pytest.mark.parametrize("missing", [0, 1])
def test_without_a_model_one_line_and_no_output(
    project: Path, models: Models, missing: int
) -> None:
    given = tuple(
        project / "nowhere.safetensors" if i == missing else path for i, path in enumerate(models)
    )
    with pytest.raises(ModelError, match=r"nowhere\.safetensors: not found"):
        _evaluate(project, given)
    assert not (project / "results/evaluate").exists()
