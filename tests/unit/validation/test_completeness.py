"""Completeness: what is superimposed is counted right, and the detectors are compared at the same rate of false alarms."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from blobpipe.core import tables
from blobpipe.params import Clip, Completeness, Scale, Vetting
from blobpipe.validation import completeness, regression

PARAMS = Completeness(radii_px=(4.0, 6.0), depths_frac=(0.001, 0.06), n_per_cell=5)
SETTING = completeness.Setting(Clip(), Scale(), Vetting(), (4.0, 6.0), 5.0)


def folders(project: Path) -> tuple[Path, ...]:
    data = project / "data"
    return data / "raw", data / "difference", data / "scale", project / "results/cutout"


@pytest.fixture(scope="module")
def measured(
    made_project: Path, dense_model: Path, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("completeness")
    where = folders(made_project)
    regression.score_batches(where, model, out, radii_px=SETTING.radii_px)
    models = (dense_model, model)
    completeness.measure_completeness(*where, models, out / "batches", out, PARAMS, setting=SETTING)
    return out


def test_deep_blobs_are_found_and_invisible_ones_are_not(measured: Path) -> None:
    grid = pd.read_csv(measured / "completeness.csv")
    assert tuple(grid) == completeness.GRID_COLUMNS
    assert (grid["n"] == 5).all()
    dense = grid[grid["detector"] == "dense"].set_index("depth_frac")["completeness"]
    assert (dense[0.06] >= 0.8).all()
    assert (dense[0.001] <= 0.2).all()
    matched = grid[grid["detector"] == "matched_filter"].set_index("depth_frac")["completeness"]
    assert matched[0.06].mean() > matched[0.001].mean() + 0.5
    limits = pd.read_csv(measured / "limits.csv")
    assert tuple(limits) == completeness.LIMIT_COLUMNS
    assert (limits[limits["detector"] == "dense"]["depth_50_frac"].between(0.001, 0.06)).all()


def test_every_blob_is_counted_once(measured: Path) -> None:
    injections = pd.read_csv(measured / "injections.csv")
    assert tuple(injections) == completeness.INJECTION_COLUMNS
    assert len(injections) == 20
    assert injections["x_px"].between(8, 503).all()
    assert json.loads((measured / "metrics.json").read_text())["n_injections"] == 20
    # an image of four subframes at a time
    for _, part in injections.groupby(injections.index // 4):
        assert part["frame"].nunique() == 1
        assert not part[["x_px", "y_px"]].floordiv(256).duplicated().any()


def test_thresholds_are_in_the_units_of_the_stage_regression() -> None:
    """The report's network is asked in log-odds, and its threshold is written as a probability."""
    own = completeness.Detectors(*(SimpleNamespace(threshold=each) for each in (0.7, 2.0, 18.0)))
    assert own.thresholds == pytest.approx(
        {"dense": 0.7, "report": 1 / (1 + math.exp(-2.0)), "matched_filter": 18.0}
    )


def test_only_images_that_training_has_not_seen(made_project: Path) -> None:
    raw, difference, scale, recipes = folders(made_project)
    shown = set(pd.read_csv(recipes / "train_subframes.csv")["frame"])
    images = tables.image_table(raw, difference, scale)
    found = completeness.list_backgrounds(images, tables.read_blobs(raw), difference, recipes)
    assert found
    assert not any("observation" in vars(background) for background in found)  # read when used
    assert not shown & {background.name for background in found}
    assert "frame5" not in {background.name for background in found}  # the one with the new blob


def test_limits_lie_between_the_depths() -> None:
    columns = ("detector", "radius_px", "depth_frac", "completeness")
    rows = [("a", 5.0, depth, share) for depth, share in ((0.01, 0.0), (0.02, 1.0), (0.04, 0.8))]
    rows += [("b", 5.0, depth, 0.2) for depth in (0.01, 0.02)] + [("c", 5.0, 0.01, 0.95)]
    limits = completeness.depth_limits(pd.DataFrame(rows, columns=list(columns))).set_index(
        "detector"
    )
    assert limits.loc["a", "depth_50_frac"] == pytest.approx(0.01 * 2**0.5, rel=1e-3)
    assert limits.loc["a", "depth_90_frac"] == pytest.approx(0.01 * 2**0.9, rel=1e-3)
    assert limits.loc["b"][["depth_50_frac", "depth_90_frac"]].isna().all()
    assert limits.loc["c", "depth_90_frac"] == pytest.approx(0.01)
