"""The dense network: what it is taught, that it learns, that it starts again where it stopped, and its maps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from blobpipe.core import files
from blobpipe.errors import ModelError
from blobpipe.networks import dense, dense_network, loop, model_file
from blobpipe.params import Dense
from blobpipe.simulation import augment, cutout, render
from blobpipe.simulation.recipes import Recipes, Scene

SMALL = Dense(batch_size=10, epochs=2, n_clutter=4, n_monitor=20, device="cpu", crop_px=64)
EXACT = ("model.safetensors", "history.csv")


def folders(project: Path) -> tuple[Path, ...]:
    data = project / "data"
    results = project / "results"
    return data / "difference", data / "scale", results / "cutout", results / "augment"


def opened(project: Path, n: int = 40) -> tuple[Scene, Recipes]:
    *first, last = folders(project)
    scene, recipes = cutout.open_split(*first, "train", augment.read_augmentation(last), n=n)
    return dense.with_ragged(scene, sizes(project), 1)[0], recipes


def sizes(project: Path) -> np.ndarray:
    return dense.evenly_sized(pd.read_csv(project / "results/cutout/stamps.csv"))


def new_training(
    project: Path, out: Path, params: Dense = SMALL, n: int = 40
) -> dense.DenseTraining:
    """Training on the first subframes, which are monitored, too."""
    scene, recipes = opened(project, n)
    state = dense.new_state(params, {}, out / "c.safetensors")
    validation = dense.render_validation(scene, recipes, params.min_snr)
    return dense.DenseTraining(state, scene, recipes, stamp_pairs(project), validation, params)


def stamp_pairs(project: Path) -> np.ndarray:
    smooth = sizes(project)
    n_stamps = len(pd.read_csv(project / "results/cutout/stamps.csv"))
    return np.stack([smooth, n_stamps + np.arange(len(smooth), dtype=np.int32)])


@pytest.fixture(scope="module")
def trained(made_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dense") / "dense"
    dense.train_dense(*folders(made_project), out, SMALL)
    return out


def test_a_run_writes_model_history_and_metrics(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {*EXACT, "history.png", "metrics.json"}
    assert list(pd.read_csv(trained / "history.csv")["epoch"]) == [1, 2]
    assert json.loads((trained / "metrics.json").read_text())["epochs"] == 2
    _, about = model_file.load_dense(trained / "model.safetensors")
    assert about["network"] == model_file.kind_of_model(trained / "model.safetensors") == "dense"
    with pytest.raises(ModelError, match="not a model of the report network"):
        model_file.load_model(trained / "model.safetensors")


def test_a_run_cut_off_ends_with_the_same_bytes(
    trained: Path, made_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = loop.save_checkpoint

    def stop(state: loop.State) -> None:
        save(state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            dense.train_dense(*folders(made_project), tmp_path, SMALL)
    torch.set_num_threads(3)
    dense.train_dense(*folders(made_project), tmp_path, SMALL)
    for name in EXACT:
        assert files.sha256(tmp_path / name) == files.sha256(trained / name), name


def test_targets_lie_where_the_blobs_are_drawn(made_project: Path) -> None:
    """For every turn and flip: what superimposing a blob changes is around its core, and a faint one does not count."""
    scene, recipes = opened(made_project)
    rows = np.flatnonzero(recipes.label == 1)
    still = {"noise_sigma": np.zeros(len(rows), np.float32), "piece": np.full(len(rows), -1)}
    pieces = np.zeros((1, 256, 256), np.int16)
    weights = np.ones(len(recipes.blob), np.float32)
    seen = set()
    for copy in range(len(recipes.turn)):
        with_blobs, without = (
            render.render_varied(
                scene, recipes, rows, copy=copy, strength=weights * by, pieces=pieces, **still
            )
            for by in (3, 0)
        )
        core, weight = dense.targets(recipes, rows, copy, dense.norms(scene, recipes), 0.0)
        changed = (with_blobs - without).reshape(-1, 64, 4, 64, 4).max((2, 4)) > 0.3
        assert core.sum() >= len(rows)
        assert changed[core > 0].mean() > 0.9
        assert (weight[core > 0] == 1).all()
        faint, unweighted = dense.targets(recipes, rows, copy, 0 * dense.norms(scene, recipes), 3.0)
        assert not faint.any()
        assert (unweighted[core > 0] == 0).all()
        seen |= {tuple(turn) for turn in recipes.turn[copy, rows]}
    assert len(seen) == 8


def test_no_blobs_no_cores() -> None:
    empty = np.zeros((1, 0, 2), np.int32)
    recipes = Recipes(*(np.zeros(0, np.int32) for _ in range(3)), *(np.zeros(1, np.int64),) * 2,
                             np.zeros((0, 3), np.int32), np.zeros(0, np.float32), np.zeros((1, 0), np.uint64), empty)  # fmt: skip
    core, weight = dense.targets(recipes, np.zeros(0, np.int64), 0, np.zeros(0, np.float32), 3.0)
    assert core.shape == weight.shape == (0, 64, 64)


@pytest.mark.long
def test_something_is_learnt(made_project: Path, tmp_path: Path) -> None:
    """Forty subframes without clutter can be learnt by heart: every clear blob is then a peak."""
    params = SMALL.model_copy(
        update={
            "epochs": 40,
            "clutter_frac": 0.0,
            "crop_px": 128,
            "strength": (0.99, 1.0),
            "rate": 8e-3,
        }
    )
    training = new_training(made_project, tmp_path, params)
    state = training.state
    loop.run_epochs(state, params.epochs, training.batches, training.update, training.monitor)
    assert state.history[-1]["train_loss"] < 0.3 * state.history[0]["train_loss"]
    assert state.history[-1]["val_accuracy"] > 0.85


def test_clutter_stamps_and_strength_change_every_epoch(made_project: Path) -> None:
    scene, recipes = opened(made_project)
    first, again, second = (
        dense.draw_variation(SMALL, scene, recipes, stamp_pairs(made_project), epoch)
        for epoch in (0, 0, 1)
    )
    for name in ("strength", "noise_sigma", "piece", "corner", "snr"):
        one, two, three = (getattr(drawn, name) for drawn in (first, again, second))
        np.testing.assert_array_equal(one, two)
        assert not np.array_equal(one, three)
    np.testing.assert_allclose(first.snr, first.strength * dense.norms(scene, first.recipes))
    assert not np.array_equal(first.recipes.blob[:, 0], second.recipes.blob[:, 0])
    np.testing.assert_array_equal(first.recipes.blob[:, 1:], recipes.blob[:, 1:])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_so_many_blobs_are_ragged(made_project: Path, share: float) -> None:
    (scene, recipes) = opened(made_project)
    pairs = stamp_pairs(made_project)
    params = SMALL.model_copy(update={"ragged_frac": share})
    drawn = dense.draw_variation(params, scene, recipes, pairs, 0).recipes
    smooth, ragged = pairs
    assert np.isin(drawn.blob[:, 0], pairs).all()
    assert np.isin(drawn.blob[:, 0], ragged).mean() == pytest.approx(share, abs=0.15)
    assert ragged.max() == len(scene.stamps) - 1
    like = [
        np.corrcoef(*scene.stamps[[i, k]].reshape(2, -1))[0, 1]
        for i, k in zip(smooth, ragged, strict=True)
    ]
    assert np.median(like) > 0.8
    assert max(like) < 1


def test_a_part_of_a_subframe_is_what_the_whole_one_has_there(made_project: Path) -> None:
    """For every turn and flip; pixels, noise, clutter and targets."""
    scene, recipes = opened(made_project)
    rng = np.random.default_rng(1)
    rows = np.arange(len(recipes))
    pieces = rng.integers(-32768, 32767, (2, 256, 256)).astype(np.int16)
    varied = {
        "strength": rng.uniform(1, 2, len(recipes.blob)).astype(np.float32),
        "noise_sigma": rng.uniform(0, 1, len(rows)).astype(np.float32),
        "piece": rng.integers(-1, 2, len(rows)),
        "pieces": pieces,
    }
    corner = 4 * rng.integers(0, 33, (len(rows), 2))
    snr = dense.norms(scene, recipes)
    for copy in range(len(recipes.turn)):
        whole = render.render_varied(scene, recipes, rows, copy=copy, **varied)
        part = render.render_varied(
            scene, recipes, rows, copy=copy, **varied, corner=corner, side=128
        )
        wanted, wanted_there = (
            dense.targets(recipes, rows, copy, snr, 3.0, **at)
            for at in ({}, {"corner": corner, "side": 128})
        )
        for i, (x, y) in enumerate(corner):
            np.testing.assert_array_equal(part[i], whole[i, y : y + 128, x : x + 128])
            for of_part, of_whole in zip(wanted_there, wanted, strict=True):
                np.testing.assert_array_equal(
                    of_part[i], of_whole[i, y // 4 : y // 4 + 32, x // 4 : x // 4 + 32]
                )


def test_what_is_shown_of_a_subframe_has_one_of_its_blobs_on_it(made_project: Path) -> None:
    _, recipes = opened(made_project)
    rows = np.repeat(np.arange(len(recipes)), np.diff(recipes.first_blob))
    for copy in range(len(recipes.turn)):
        at = np.stack(
            render.turned(recipes.blob[:, 1], recipes.blob[:, 2], recipes.turn[copy, rows]), axis=1
        )
        shown = [
            dense.corners(np.random.default_rng(seed), recipes, copy, 64) for seed in range(20)
        ]
        for corner in shown:
            assert (corner % 4 == 0).all()
            assert corner.min() >= 0
            assert corner.max() <= 256 - 64
            on_it = ((at >= corner[rows]) & (at < corner[rows] + 64)).all(axis=1)
            np.testing.assert_array_equal(
                np.bincount(rows, on_it, len(recipes)) > 0, recipes.label == 1
            )
        assert (np.ptp(shown, axis=0) > 0).all()


def test_all_sizes_of_training_stamps_come_equally_often() -> None:
    radius = np.concatenate([np.linspace(2.5, 4, 10), np.linspace(4, 10, 190), np.full(50, 3.0)])
    split = np.repeat(["train", "validation"], [200, 50])
    stamps = pd.DataFrame({"stamp": np.arange(250), "split": split, "radius_px": radius}).sample(
        frac=1, random_state=1
    )
    drawn = dense.evenly_sized(stamps)
    assert drawn.max() < 200
    share = np.mean(radius[drawn] < 5)
    assert share == pytest.approx(np.log(5 / 2.5) / np.log(10 / 2.5), abs=0.02)
    assert share > 2 * np.mean(radius[:200] < 5)


def test_parts_of_a_batch_have_the_gradient_of_the_whole(
    made_project: Path, tmp_path: Path
) -> None:
    """But for batch normalisation, which is each part's own: here it uses what it has kept."""
    slopes = []
    for threads in (1, 2, 3):
        params = SMALL.model_copy(update={"threads": threads})
        training = new_training(made_project, tmp_path, params)
        for network in training.networks:
            network.eval()
        training.update(next(training.batches(0)))
        parameters = training.state.network.parameters()
        slopes.append(torch.cat([weights.grad.flatten() for weights in parameters]))
    assert slopes[0].abs().max() > 0.1
    for other in slopes[1:]:
        torch.testing.assert_close(other, slopes[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(1024, 1024), (1014, 1014), (256, 300), (33, 16)])
def test_a_map_covers_a_frame_of_any_size(shape: tuple[int, int]) -> None:
    network = dense_network.new_dense_network(1).eval()
    cells = dense.probability_map(network, np.zeros(shape, np.float32))
    assert cells.shape == (-(-shape[0] // 4), -(-shape[1] // 4))
    assert ((cells > 0) & (cells < 1)).all()


def test_a_map_has_no_seams() -> None:
    """A part of a frame, away from its edges, looks the same as within the frame."""
    network = dense_network.new_dense_network(2).eval()
    image = np.random.default_rng(1).normal(size=(384, 384)).astype(np.float32)
    whole = dense.probability_map(network, image)
    part = dense.probability_map(network, image[64:320, 64:320])
    np.testing.assert_allclose(whole[40:56, 40:56], part[24:40, 24:40], rtol=1e-3)


@pytest.mark.parametrize("shape", [(700, 300), (768, 256), (517, 256)])
def test_a_large_image_is_mapped_in_bands_as_in_one_piece(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = dense_network.new_dense_network(2).eval()
    image = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    whole = dense.probability_map(network, image)
    monkeypatch.setattr(dense, "MAX_WHOLE_PX", 0)
    monkeypatch.setattr(dense, "BAND_PX", 256)
    np.testing.assert_allclose(dense.probability_map(network, image), whole, rtol=1e-3)


def test_peaks_are_found_between_cells() -> None:
    rows, columns = np.mgrid[:40, :50] * 4 + 1.5
    cells = np.zeros((40, 50))
    for x, y, height in ((60.0, 80.0, 0.9), (121.0, 33.5, 0.6), (20.0, 12.0, 0.8)):
        cells = np.maximum(
            cells, height * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 2 / 4**2)
        )
    found = dense.peaks(cells.astype(np.float32), 0.3)
    np.testing.assert_allclose(found.x_px, [60, 20, 121], atol=2)
    np.testing.assert_allclose(found.y_px, [80, 12, 33.5], atol=2)
    assert (np.diff(found.score) < 0).all()
    assert len(dense.peaks(cells.astype(np.float32), 0.95).score) == 0


def test_eight_looks_at_a_place_see_the_same_whichever_way_it_is_turned() -> None:
    network = dense_network.new_dense_network(3).eval()
    torch.nn.init.normal_(network.head.weight, std=3.0, generator=torch.Generator().manual_seed(1))
    image = np.random.default_rng(4).normal(size=(129, 129)).astype(np.float32)
    x, y = np.array([40.0, 64.0]), np.array([70.0, 64.0])
    looks = dense.look_again(network, image, x, y)
    assert looks.shape == (2,)
    assert ((looks > 0) & (looks < 1)).all()
    assert looks[0] != looks[1]
    # the middle of the image stays where it is, up to half a pixel of the even square
    for turned in (np.rot90(image), image[:, ::-1], image[::-1]):
        again = dense.look_again(network, np.ascontiguousarray(turned), x[1:], y[1:])
        assert np.log(again / looks[1]) == pytest.approx(0, abs=0.7)
    assert dense.look_again(network, image, x[:0], y[:0]).shape == (0,)


def test_the_place_looked_at_may_lie_at_the_edge() -> None:
    network = dense_network.new_dense_network(1).eval()
    image = np.zeros((64, 80), np.float32)
    edges = (np.array([0.0, 79.4, 40.0]), np.array([0.0, 63.4, -0.4]))
    assert np.isfinite(dense.look_again(network, image, *edges)).all()


def test_the_loss_counts_what_has_weight() -> None:
    logits = torch.tensor([[3.0, -3.0, 0.0]])
    core = torch.tensor([[1.0, 0.0, 1.0]])
    weight = torch.ones(1, 3)
    plain = dense.cell_loss(logits, core, weight, 0.0)
    assert dense.cell_loss(logits, core, weight * torch.tensor([[1.0, 1.0, 0.0]]), 0.0) < plain / 3
    assert dense.cell_loss(logits, core, weight, 2.0) < plain
