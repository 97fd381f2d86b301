"""Training: the same bytes again, also after a kill, on one core or two, and something is learnt."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from blobpipe.core import files, tables
from blobpipe.networks import fused, loop, model_file, report_network, train
from blobpipe.params import Train, load_params
from blobpipe.simulation import cutout, render

pytestmark = pytest.mark.xdist_group("training")  # most compare with one undisturbed run
EXACT = ("model.safetensors", "history.csv", "history.png")


def train_in(project: Path, out: Path, **settings: object) -> Path:
    data = project / "data"
    results = project / "results"
    params = load_params(project / "params.yaml").train.model_copy(update=settings)
    folders = (data / "difference", data / "scale", results / "cutout", results / "augment")
    train.train(*folders, out, params, noise_sigma=0.75)
    return out


def digests(folder: Path) -> dict[str, str]:
    return {name: files.sha256(folder / name) for name in EXACT}


@pytest.fixture(scope="module")
def trained(made_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    return train_in(made_project, tmp_path_factory.mktemp("trained") / "train")


@pytest.fixture(scope="module")
def one_epoch(made_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_in(made_project, tmp_path_factory.mktemp("one_epoch") / "train", epochs=1)


def test_a_run_writes_model_history_and_metrics(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {*EXACT, "metrics.json"}
    history = pd.read_csv(trained / "history.csv")
    assert tuple(history) == loop.HISTORY
    assert list(history["epoch"]) == [1, 2, 3]
    metrics = json.loads((trained / "metrics.json").read_text())
    assert set(metrics) == {"epochs", "best_epoch", "val_loss", "samples_per_s", "seconds"}
    assert metrics["epochs"] == 3
    assert metrics["val_loss"] == pytest.approx(history["val_loss"].iloc[-1], abs=1e-6)
    assert metrics["best_epoch"] == history["epoch"][history["val_loss"].idxmin()]


def test_a_model_says_where_it_comes_from(trained: Path) -> None:
    _, about = model_file.load_model(trained / "model.safetensors")
    assert about["params"]["epochs"] == 3
    assert about["noise_sigma"] == 0.75
    assert len(about["data_sha256"]) == 64
    assert about["version"]


def test_the_history_is_that_of_the_model(trained: Path, made_project: Path) -> None:
    network, _ = model_file.load_model(trained / "model.safetensors")
    data = made_project / "data"
    scene, recipes = cutout.open_split(
        data / "difference", data / "scale", made_project / "results/cutout", "validation"
    )
    probability = report_network.predict(
        network, render.render_subframes(scene, recipes, np.arange(len(recipes)))
    )
    loss = -np.log(np.where(recipes.label == 1, probability, 1 - probability)).mean()
    assert pd.read_csv(trained / "history.csv")["val_loss"].iloc[-1] == pytest.approx(
        loss, rel=1e-5
    )


def test_adam_comes_first_rising_then_sgd_along_a_cosine(trained: Path) -> None:
    rate = pd.read_csv(trained / "history.csv")["rate"]
    steps = 3  # of an epoch; the last one begins two thirds of the way up or down
    assert rate[0] == pytest.approx(Train().adam_rate * ((steps - 1) / steps + train.WARM_UP_START))
    assert rate[1] == Train().adam_rate
    assert rate[2] == pytest.approx(
        Train().sgd_rate * (0.5 + 0.5 * np.cos(np.pi * (steps - 1) / steps))
    )


def test_the_same_again_whatever_the_number_of_threads_was(
    trained: Path, made_project: Path, tmp_path: Path
) -> None:
    torch.set_num_threads(3)
    assert digests(train_in(made_project, tmp_path / "again")) == digests(trained)
    assert torch.get_num_threads() == Train().threads


@pytest.mark.parametrize(
    "settings", [{"seed": 2}, {"batch_size": 30}, {"adam_rate": 0.003}], ids=str
)
def test_settings_matter(
    one_epoch: Path, made_project: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    one, other = (
        model_file.load_model(folder / "model.safetensors")[0].state_dict()
        for folder in (one_epoch, train_in(made_project, tmp_path, epochs=1, **settings))
    )
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_plain_and_fused_kernels_train_alike(
    one_epoch: Path, made_project: Path, tmp_path: Path
) -> None:
    if not fused.available():
        pytest.skip("the fused kernels do not run here")
    plain = pd.read_csv(train_in(made_project, tmp_path, epochs=1, kernels="plain") / "history.csv")
    fast = pd.read_csv(one_epoch / "history.csv")
    np.testing.assert_allclose(plain, fast, rtol=0.001)


def test_kept_subframes_train_alike(trained: Path, made_project: Path, tmp_path: Path) -> None:
    """Three epochs of two copies: one is shown again. Float16 keeps eleven bits."""
    kept = pd.read_csv(train_in(made_project, tmp_path, keep_rendered=True) / "history.csv")
    again = pd.read_csv(trained / "history.csv")
    # near chance, a subframe of the monitored ones may fall on the other side
    one_of_them = {"atol": 1.01 / 24}
    np.testing.assert_allclose(kept.pop("val_accuracy"), again.pop("val_accuracy"), **one_of_them)
    np.testing.assert_allclose(kept, again, rtol=0.005)
    assert not kept.equals(again)


def test_something_is_learnt(made_project: Path, tmp_path: Path) -> None:
    """Sixty subframes can be learnt by heart, given some time; chance is a loss of ln 2."""
    history = pd.read_csv(
        train_in(made_project, tmp_path, epochs=10, adam_epochs=9) / "history.csv"
    )
    assert history["train_loss"].iloc[-1] < 0.6 < np.log(2)


def test_a_network_knows_no_better_than_chance_at_first(one_epoch: Path) -> None:
    history = pd.read_csv(one_epoch / "history.csv")
    assert 0.5 < history["train_loss"][0] < 2


# --- cut off, and gone on --------------------------------------------------------------------------------------------


class StoppedError(Exception):
    pass


@pytest.mark.parametrize(
    ("epoch", "when"),
    [
        (1, "after the checkpoint"),
        (2, "before it"),
        (2, "after the checkpoint"),
        (3, "after the checkpoint"),
    ],
)
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(
    trained: Path,
    made_project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    epoch: int,
    when: str,
) -> None:
    save = loop.save_checkpoint

    def stop(state: loop.State) -> None:
        if state.epoch != epoch or when == "after the checkpoint":
            save(state)
        if state.epoch == epoch:
            raise StoppedError

    monkeypatch.setattr(loop, "save_checkpoint", stop)
    with pytest.raises(StoppedError):
        train_in(made_project, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    monkeypatch.setattr(loop, "save_checkpoint", save)
    epochs = []
    run_epoch = loop.run_epoch
    monkeypatch.setattr(
        loop,
        "run_epoch",
        lambda state, *functions: epochs.append(state.epoch) or run_epoch(state, *functions),
    )
    assert digests(train_in(made_project, tmp_path)) == digests(trained)
    assert epochs == list(range(epoch - (when == "before it"), 3))
    assert not (tmp_path / "checkpoint").exists()


@pytest.fixture(scope="module")
def stopped(made_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was stopped after its second epoch."""
    folder = tmp_path_factory.mktemp("stopped") / "train"
    save = loop.save_checkpoint

    def stop(state: loop.State) -> None:
        save(state)
        if state.epoch == 2:
            raise StoppedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", stop)
        with pytest.raises(StoppedError):
            train_in(made_project, folder)
    return folder


@pytest.fixture
def cut_off(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it to go on in."""
    return Path(shutil.copytree(stopped, tmp_path / "cut_off"))


def test_a_checkpoint_says_what_it_is(cut_off: Path) -> None:
    about = json.loads((cut_off / "checkpoint/checkpoint.json").read_text())
    assert about["epoch"] == 2
    assert about["params"]["epochs"] == 3
    assert len(about["history"]) == 2
    assert {"data_sha256", "version", "git_revision"} <= set(about)


def test_other_settings_start_anew(cut_off: Path, made_project: Path, tmp_path: Path) -> None:
    alone = train_in(made_project, tmp_path / "alone", seed=7)
    assert digests(train_in(made_project, cut_off, seed=7)) == digests(alone)


def test_other_data_start_anew(cut_off: Path, project: Path, tmp_path: Path) -> None:
    table = pd.read_csv(project / "results/augment/train.csv")
    table["flip"] = 1 - table["flip"]
    tables.write_table(project / "results/augment/train.csv", table)
    alone = train_in(project, tmp_path / "alone")
    assert digests(train_in(project, cut_off)) == digests(alone)


@pytest.mark.parametrize("keep", [0, -1])
def test_a_damaged_checkpoint_starts_anew(
    cut_off: Path, trained: Path, made_project: Path, keep: int
) -> None:
    path = cut_off / "checkpoint/checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert digests(train_in(made_project, cut_off)) == digests(trained)


def test_what_a_killed_stage_left_half_written_is_no_data(
    trained: Path, project: Path, tmp_path: Path
) -> None:
    for folder in ("data/scale", "results/cutout", "results/augment"):
        (project / folder / ".train.4194305.tmp.csv").write_text("half")
    assert digests(train_in(project, tmp_path / "train")) == digests(trained)


SCRIPT = """
import os, signal, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from blobpipe import cli
count = 0
def replace(source, target, replace=os.replace):
    global count
    count += "checkpoint.safetensors" in str(target)
    if count == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = replace
sys.exit(cli.main(["train"]))
"""


@pytest.mark.slow
def test_a_killed_process_on_one_core_ends_as_an_undisturbed_one_on_two(project: Path) -> None:
    """kill -9 in the middle of writing the second checkpoint."""
    undisturbed = shutil.copytree(project, project.with_name("undisturbed"))

    def run(folder: Path, *start: str) -> int:
        command = [sys.executable, *start]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode

    assert run(undisturbed, "-m", "blobpipe", "train") == 0
    assert run(project, "-c", SCRIPT, "2") == -signal.SIGKILL
    assert run(project, "-c", SCRIPT, "0") == 0
    killed, whole = (folder / "results/train" for folder in (project, undisturbed))
    assert digests(killed) == digests(whole)
    assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_trains_alike(trained: Path, made_project: Path, tmp_path: Path) -> None:
    """Dropout is the same there; sums are not, to the last bit."""
    history = pd.read_csv(train_in(made_project, tmp_path, device="cuda") / "history.csv")
    np.testing.assert_allclose(
        history["train_loss"], pd.read_csv(trained / "history.csv")["train_loss"], rtol=0.02
    )
