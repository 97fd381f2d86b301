"""The model that a command takes: the pipeline's own if it has passed, else the packaged one."""

from __future__ import annotations

import importlib
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numba.core import event
from tests.unit.cli.calls import Calls

import blobpipe
from blobpipe import cli
from blobpipe.cli import settings
from blobpipe.cli.paths import LOG, OWN_MODEL, REGRESSION_METRICS
from blobpipe.core import files, fits_images, tables
from blobpipe.monitor import logbook


def test_scan_takes_the_pipelines_own_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Calls = []
    scan = importlib.import_module("blobpipe.monitor.scan")
    monkeypatch.setattr(
        scan, "scan", lambda *args, **settings: calls.append(("", args, settings)) or 0
    )
    own = _own_model(folder)
    assert cli.main(["scan", "a.fits", "--out", "o"]) == 0
    assert cli.main(["scan", "a.fits", "--out", "o", "--model", "m"]) == 0
    assert [args[2] for _, args, _ in calls] == [own, Path("m")]


def test_compiling_is_said_once_however_many_threads_begin_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listeners: list[event.Listener] = []
    monkeypatch.setattr(event, "register", lambda _, listener: listeners.append(listener))
    said: list[str] = []

    def say_slowly(text: str) -> None:
        time.sleep(0.1)
        said.append(text)

    monkeypatch.setattr(settings.logging, "info", say_slowly)
    settings.say_when_compiling.cache_clear()
    for _ in range(2):
        settings.say_when_compiling()
    [listener] = listeners
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(listener.on_start, [None] * 8))
    assert said == ["compiling for this processor, only at the first use"]
    settings.say_when_compiling.cache_clear()


PASSES = {
    **{"n_cases": 7, "recall": 0.9, "recall_snr_gt_7": 0.9, "false_alarms_per_frame": 1.0},
    **{"dense_recall_snr_gt_7": 0.9, "dense_false_alarms_per_100_frames": 0.0},
}


def _own_model(folder: Path, **metrics: object) -> Path:
    """What the stages detect and regression leave: a model, and that it passed."""
    own = Path(OWN_MODEL)
    own.parent.mkdir(parents=True)
    shutil.copy(Path(blobpipe.__file__).with_name("model.safetensors"), own)
    tables.write_json(
        folder / REGRESSION_METRICS, {**PASSES, "dense_sha256": files.sha256(own), **metrics}
    )
    return own


@pytest.mark.parametrize(
    ("metrics", "found"),
    [
        (
            {"recall": 0.0, "passed": False},
            "recall (report's network): found 0.0, expected at least 0.6",
        ),
        # by the settings of today
        ({"n_cases": 6, "passed": True}, "n_cases: found 6, expected at least 7"),
        ({"recall": "high"}, "recall (report's network): found high, expected at least 0.6"),
        (
            {"dense_sha256": "0" * 64},
            "results/regression/metrics.json is of the model 000000000000, not of this one",
        ),
        (
            {"dense_sha256": None},
            "results/regression/metrics.json is of the model None, not of this one",
        ),
        (None, "results/regression/metrics.json: not found; run the stage regression"),
        ("[", "results/regression/metrics.json: cannot be read as JSON"),
        ("[" * 100_000, "results/regression/metrics.json: cannot be read as JSON"),
        ("[]", "results/regression/metrics.json: found list"),
    ],
)
def test_a_model_that_the_regression_test_has_not_passed_is_refused(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    metrics: dict[str, object] | str | None,
    found: str,
) -> None:
    """By scan, quicklook and doctor alike, unless it is named."""
    caplog.set_level("INFO")
    _own_model(folder, **(metrics if isinstance(metrics, dict) else {}))
    if isinstance(metrics, str):
        (folder / REGRESSION_METRICS).write_text(metrics)
    elif metrics is None:
        (folder / REGRESSION_METRICS).unlink()
    (folder / "in").mkdir()
    noise = np.random.default_rng(1).normal(0, 0.01, (256, 256)).astype(np.float32)
    fits_images.write_image(folder / "a.fits", noise, name="DIFFERENCE")
    scan = ["scan", "a.fits", "--difference", "--out", "o"]
    quicklook = ["quicklook", "in", "--difference"]
    for words in (scan, quicklook):
        assert cli.main(words) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(
            f"blobpipe: {OWN_MODEL}: has not passed the regression test ({found}"
        )
        assert f"--model {OWN_MODEL}, or the packaged one, --model " in line
    assert not Path("o").exists()
    assert not Path(LOG).exists()
    assert cli.main(["doctor"]) == 1
    [said] = [line for line in capsys.readouterr().out.splitlines() if "model: " in line]
    assert said == f"fail  model: {line.removeprefix('blobpipe: ')}"
    for words in (scan, quicklook):
        caplog.clear()
        assert cli.main([*words, "--model", OWN_MODEL]) == 0
        assert f"model: {OWN_MODEL} (local, SHA-256 " in caplog.text
    cli.main(["doctor", "--model", OWN_MODEL])
    assert f"ok    model: {OWN_MODEL} (local, SHA-256 " in capsys.readouterr().out


@pytest.mark.parametrize("own", [True, False])
def test_every_run_names_its_model(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, own: bool
) -> None:
    caplog.set_level("INFO")
    model = _own_model(folder) if own else Path(blobpipe.__file__).with_name("model.safetensors")
    sha256 = files.sha256(model)
    named = f"model: {model} ({'local' if own else 'packaged'}, SHA-256 {sha256[:12]})"
    (folder / "in").mkdir()
    noise = np.random.default_rng(1).normal(0, 0.01, (256, 256)).astype(np.float32)
    fits_images.write_image(folder / "a.fits", noise, name="DIFFERENCE")
    for words in (["scan", "a.fits", "--difference", "--out", "o"], ["quicklook", "in"]):
        caplog.clear()
        assert cli.main(words) == 0
        assert named in caplog.messages
    cli.main(["doctor"])
    assert f"ok    {named}, score threshold " in capsys.readouterr().out
    assert list(tables.read_table("o/frames.csv", ("model_sha256",))["model_sha256"]) == [sha256]
    [run] = logbook.connect(LOG).execute("SELECT model, model_sha256 FROM runs").fetchall()
    assert tuple(run) == (str(model), sha256)
