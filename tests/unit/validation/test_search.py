"""The optional search: points that depend on the settings alone, and results on neither the workers nor a kill."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from blobpipe.core import tables
from blobpipe.errors import BlobpipeError, ExtraError, ParamsError
from blobpipe.params import Params, Search, Span, Train, load_params, varied
from blobpipe.validation import search

SPACE = {
    "network.filters": ((2,), (2, 4)),
    "network.kernel_px": (3, 5),
    "batch_size": (10, 20),
    "adam_rate": Span(low=1e-4, high=1e-2, log=True),
    "epochs": Span(low=1, high=2),
}
SMALL = Search(n_trials=4, n_train=20, n_validation=10, prune=False, space=SPACE)
MADE = {"trials.csv", "best.yaml", "metrics.json"} | {
    f"{name}.png" for name in ("history", "importance", "parallel", "cost")
}


def params_of(project: Path, settings: Search) -> Params:
    params = load_params(project / "params.yaml")
    return params.model_copy(update={"search": settings})


def run(
    project: Path, out: Path, settings: Search = SMALL, worker: int | None = None
) -> pd.DataFrame | None:
    data, results = project / "data", project / "results"
    folders = (data / "difference", data / "scale", results / "cutout", results / "augment")
    search.search(*folders, out, params_of(project, settings), worker=worker)
    return None if worker else pd.read_csv(out / "trials.csv")


def untimed(table: pd.DataFrame | None) -> pd.DataFrame:
    assert table is not None
    return table.drop(columns="seconds")


@pytest.fixture(scope="module")
def alone(made_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of one process."""
    out = tmp_path_factory.mktemp("search")
    run(made_project, out)
    return out


# ------------------------------------------------------------------------------------------------ points


def points(**settings: Any) -> list[dict[str, Any]]:
    return search.draw_points(Params(search=Search(**{"space": SPACE, **settings})))


def test_points_depend_on_the_seed_alone() -> None:
    assert points(n_trials=20) == points(n_trials=20, n_workers=7, threads=3)
    assert points(n_trials=20)[:10] == points(n_trials=10)
    assert points(n_trials=20)[1:] != points(n_trials=20, seed=2)[1:]


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_the_settings_as_they_are_come_first(sampler: str) -> None:
    found = points(n_trials=3, sampler=sampler)
    assert len(found) == 3
    assert found[0] == {}
    assert (found[1] == {}) == (sampler == "tpe")


def test_whole_numbers_can_be_drawn_evenly_in_the_logarithm() -> None:
    space = {"epochs": Span(low=1, high=10_000, log=True)}
    found = [point["epochs"] for point in points(space=space, n_trials=400)[1:]]
    assert all(isinstance(epochs, int) and 1 <= epochs <= 10_000 for epochs in found)
    assert 50 < np.median(found) < 200


def test_a_grid_in_which_nothing_fits_is_refused() -> None:
    space = {"network.filters": ((8, 8, 8, 8, 8),), "network.pool_px": (4,)}
    with pytest.raises(ParamsError, match="no values that fit together on the grid"):
        points(sampler="grid", space=space)


def test_random_points_cover_the_space() -> None:
    found = pd.DataFrame(points(n_trials=400)[1:])
    for name in ("network.filters", "network.kernel_px", "batch_size"):
        assert set(found[name]) == set(SPACE[name])  # type: ignore[call-overload]
        assert found[name].value_counts(normalize=True).between(0.4, 0.6).all()
    assert set(found["epochs"]) == {1, 2}
    exponent = np.log10(found["adam_rate"].astype(float))
    assert np.histogram(exponent, 4, (-4, -2))[0] == pytest.approx(100, rel=0.3)


def test_a_grid_has_every_point_that_fits_once() -> None:
    space = {"network.filters": ((8,), (8, 16)), "network.pool_px": (4, 15), "batch_size": (10, 20)}
    found = points(sampler="grid", space=space, n_trials=100)[1:]
    # two blocks of windows of 15 px still leave a pixel of 256
    assert len(found) == 8
    assert len({json.dumps(point) for point in found}) == 8
    space["network.filters"] = ((8,), (8, 16, 32))
    found = points(sampler="grid", space=space, n_trials=100)[1:]
    assert len(found) == 6
    assert found == points(sampler="grid", space=space, n_trials=7)[1:]


def test_a_space_in_which_nothing_fits_is_refused() -> None:
    space = {"network.filters": ((8, 8, 8),), "network.pool_px": (15,)}
    with pytest.raises(ParamsError, match=r"search\.space: found no values that fit together"):
        points(space=space)


def test_a_dropout_fits_any_number_of_blocks() -> None:
    for filters, expected in (((8,), (0.1,)), ((8, 8), (0.1, 0.2)), ((4, 4, 4), (0.1, 0.2, 0.2))):
        values = {"network.filters": filters, "network.dropout": (0.1, 0.2)}
        assert varied(Train(), values).network.dropout == expected


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        ({"network.pool": (2,)}, "expected a setting of train"),
        ({"rate": (2,)}, "expected a setting of train"),
        ({"network.kernel_px": (5, 4)}, r"space\.network\.kernel_px: found 4"),
        ({"epochs": ("many",)}, r"space\.epochs: found many"),
        ({"momentum": {"low": 0.5, "high": 1.5}}, r"space\.momentum: found 1\.5"),
        ({"momentum": {"low": 0.9, "high": 0.5}}, "expected low < high"),
        ({"adam_rate": {"low": 0.0, "high": 0.5, "log": True}}, "expected a low above 0"),
        ({"epochs": ()}, "space"),
        ({"network.filters": (8, 16)}, r"space\.network\.filters: found 8"),
        ({"network.dropout": {"low": 0.1, "high": 0.3}}, r"space\.network\.dropout: found 0\.1"),
        ({"network.dropout": ((),)}, "found an empty list"),
        ({"seed.x": (1,)}, "expected a setting of train"),
        ({"network": ("a",)}, "which a search cannot vary"),
        ({"threads": (1, 2)}, "which a search cannot vary"),
        ({}, "space"),
    ],
)
def test_a_space_of_other_things_is_refused(space: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Search.model_validate({"space": space})


def test_a_range_has_no_grid() -> None:
    with pytest.raises(ValueError, match="found a range, expected a list"):
        Search(sampler="grid", space=SPACE)


# ------------------------------------------------------------------------------------------------ trials


def test_results_are_written(alone: Path, made_project: Path) -> None:
    assert {path.name for path in alone.iterdir()} >= MADE
    table = pd.read_csv(alone / "trials.csv")
    assert list(table["trial"]) == [0, 1, 2, 3]
    assert list(table.columns[: len(search.TRIAL_COLUMNS)]) == list(search.TRIAL_COLUMNS)
    assert (table["state"] == "done").all()
    np.testing.assert_allclose(table["objective"], table["loss"], atol=1e-6)
    assert table["missed"].between(0, 1).all()

    # the best settings are those of the lowest row, and can be run as they are
    best = table.loc[table["objective"].idxmin()]
    train = load_params(alone / "best.yaml").train
    assert json.dumps(list(train.network.filters)) == best["network.filters"]
    assert train.epochs == best["epochs"]
    assert train.network.n_weights == best["weights"]
    rest = load_params(alone / "best.yaml").model_copy(update={"train": Train()})
    assert rest == params_of(made_project, SMALL).model_copy(update={"train": Train()})
    metrics = json.loads((alone / "metrics.json").read_text())
    assert metrics["best_objective"] == pytest.approx(table["objective"].min(), abs=1e-6)
    assert metrics["as_they_are_objective"] == pytest.approx(table["objective"][0], abs=1e-6)


def test_three_workers_find_what_one_finds(alone: Path, made_project: Path, tmp_path: Path) -> None:
    for worker in (1, 2, 3):
        run(made_project, tmp_path, worker=worker)
        assert (tmp_path / f"worker-{worker}.done").exists()
        assert not (tmp_path / "trials.csv").exists()
    pd.testing.assert_frame_equal(
        untimed(run(made_project, tmp_path)), untimed(pd.read_csv(alone / "trials.csv"))
    )


def test_a_killed_worker_loses_one_trial(
    alone: Path, made_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    try_point = search._try_point

    def killed_at_the_third(study: Any, trial: Any, *rest: Any) -> None:
        tried.append(trial.user_attrs["point"])
        if len(tried) == 3:
            raise KeyboardInterrupt
        try_point(study, trial, *rest)

    monkeypatch.setattr(search, "_try_point", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(made_project, tmp_path, worker=2)

    # what it had begun is its own: another worker does the rest
    run(made_project, tmp_path, worker=1)
    assert tried == [0, 1, 2, 3]
    with pytest.raises(BlobpipeError, match=r"worker 2 has not finished its trial.*start it again"):
        run(made_project, tmp_path)
    run(made_project, tmp_path, worker=2)
    assert tried == [0, 1, 2, 3, 2]
    pd.testing.assert_frame_equal(
        untimed(run(made_project, tmp_path)), untimed(pd.read_csv(alone / "trials.csv"))
    )
    assert tried == [0, 1, 2, 3, 2]


def test_a_trial_of_a_worker_that_is_no_more_is_taken_over(
    made_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "_try_point", kill)
    with pytest.raises(KeyboardInterrupt):
        run(made_project, tmp_path, worker=3)
    monkeypatch.undo()
    run(made_project, tmp_path, worker=1)
    assert (untimed(run(made_project, tmp_path))["state"] == "done").all()


def test_other_settings_are_another_search(made_project: Path, tmp_path: Path) -> None:
    run(made_project, tmp_path)
    settings = SMALL.model_copy(update={"n_trials": 3, "objective": "missed", "n_seeds": 2})
    table = untimed(run(made_project, tmp_path, settings))
    assert len(table) == 3
    np.testing.assert_allclose(table["objective"], table["missed"], atol=1e-6)


def test_hopeless_trainings_are_stopped(made_project: Path, tmp_path: Path) -> None:
    """Those of a learning rate at which the loss explodes, after the first of their epochs."""
    space = {"adam_rate": (2e-3, 1.0), "epochs": (3,), "adam_epochs": (3,)}
    settings = SMALL.model_copy(
        update={"n_trials": 16, "prune": True, "space": space, "n_train": 100}
    )
    table = untimed(run(made_project, tmp_path, settings))
    stopped = table["state"] == "stopped"
    assert 0 < stopped.sum() < 16
    assert table["objective"].isna().equals(stopped)
    assert not stopped[:5].any()
    assert json.loads((tmp_path / "metrics.json").read_text())["n_stopped"] == stopped.sum()


def test_a_training_without_bounds_is_stopped_and_the_rest_goes_on(
    made_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the loss of the settings as they are, point 0, there are results."""
    monitor = search.train.ReportTraining.monitor

    def exploding(training: Any) -> tuple[float, float]:
        loss, accuracy = monitor(training)
        return (np.nan if training.params.batch_size != 20 else loss), accuracy

    monkeypatch.setattr(search.train.ReportTraining, "monitor", exploding)
    settings = SMALL.model_copy(update={"space": {"batch_size": (10, 20)}, "n_trials": 8})
    table = untimed(run(made_project, tmp_path, settings))
    assert list(table["trial"]) == list(range(8))
    exploded = table["batch_size"] != 20
    assert 0 < exploded.sum() < 8
    assert (table["state"] == "stopped").equals(exploded)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["as_they_are_objective"] is None) == exploded[0]


def test_texts_may_be_choices(made_project: Path, tmp_path: Path) -> None:
    settings = SMALL.model_copy(update={"space": {"kernels": ("plain", "auto")}, "n_trials": 3})
    table = untimed(run(made_project, tmp_path, settings))
    assert set(table["kernels"][1:]) <= {'"plain"', '"auto"'}
    assert table["loss"].nunique() <= 2


def test_a_journal_that_was_cut_off_goes_on(
    alone: Path, made_project: Path, tmp_path: Path
) -> None:
    run(made_project, tmp_path, SMALL.model_copy(update={"n_trials": 2}))
    with open(tmp_path / "journal.log", "a") as file:
        file.write('{"op_code": 5, "wor')
    pd.testing.assert_frame_equal(
        untimed(run(made_project, tmp_path)), untimed(pd.read_csv(alone / "trials.csv"))
    )


def test_tpe_learns_from_the_trials_before(made_project: Path, tmp_path: Path) -> None:
    settings = SMALL.model_copy(update={"sampler": "tpe", "n_trials": 3})
    table = untimed(run(made_project, tmp_path, settings))
    assert list(table["trial"]) == [0, 1, 2]
    assert (table["state"] == "done").all()
    assert table["adam_rate"][1:].between(1e-4, 1e-2).all()


def test_optuna_is_an_extra(
    made_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(ExtraError, match=r"\[search\]"):
        run(made_project, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_work_of_the_report_network() -> None:
    """Of ISR 4: 25 taps on 256 x 256 pixels, 25 taps of 8 maps on 64 x 64, and the dense layers."""
    blocks = 8 * 25 * 256**2 + 8 * 16 * 25 * 64**2
    assert search.multiply_adds(Params().train.network) == blocks + 4096 * 128 + 128 * 2


def test_the_table_can_be_read_back(alone: Path) -> None:
    assert tables.read_table(alone / "trials.csv", search.TRIAL_COLUMNS)["trial"].tolist() == [
        0,
        1,
        2,
        3,
    ]
