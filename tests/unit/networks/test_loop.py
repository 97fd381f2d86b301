"""The training loop: its order, its bookkeeping and its checkpoints, with a network that is not trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from blobpipe.networks import loop, report_network


class Batch(NamedTuple):
    rows: np.ndarray
    loss: float


def new_state(folder: Path, **identity: object) -> loop.State:
    network = report_network.new_network(1, "plain")
    return loop.State(network, new_optimiser(network), identity, folder / "c.safetensors")


def new_optimiser(network: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=0.25)


def test_an_epoch_is_trained_monitored_and_recorded_in_this_order(tmp_path: Path) -> None:
    state = new_state(tmp_path)
    calls: list[object] = []

    def batches(epoch: int) -> Iterator[Batch]:
        calls.append(epoch)
        assert state.network.training
        yield Batch(np.arange(3), 1.0)
        yield Batch(np.arange(1), 5.0)

    def update(batch: Batch) -> Tensor:
        calls.append(batch.loss)
        return torch.tensor(batch.loss)

    def monitor() -> tuple[float, float]:
        calls.append("monitor")
        return 0.5, 0.75

    loop.run_epochs(state, 2, batches, update, monitor)
    assert calls == [0, 1.0, 5.0, "monitor", 1, 1.0, 5.0, "monitor"]
    assert (state.epoch, state.n_seen) == (2, 8)
    assert state.seconds > 0
    # the mean over subframes: (3 * 1 + 1 * 5) / 4
    for number, row in enumerate(state.history, 1):
        assert tuple(row) == loop.HISTORY
        assert tuple(row.values()) == (number, 2.0, 0.5, 0.75, 0.25)
    loop.run_epochs(state, 2, batches, update, monitor)
    assert len(calls) == 8


def test_batches_hold_each_subframe_once_in_an_order_of_seed_and_epoch() -> None:
    first, again, other, later = (
        loop.shuffled_batches(25, 10, seed, epoch)
        for seed, epoch in ((1, 0), (1, 0), (2, 0), (1, 1))
    )
    assert [len(batch) for batch in first] == [9, 8, 8]
    for batches in (first, other, later):
        np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(25))
    np.testing.assert_array_equal(np.concatenate(first), np.concatenate(again))
    assert not np.array_equal(np.concatenate(first), np.concatenate(other))
    assert not np.array_equal(np.concatenate(first), np.concatenate(later))


def test_what_is_prepared_ahead_comes_in_order() -> None:
    """One item ahead, no more; an error comes where its item would have."""
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        return 10 // (item - 4)

    coming = loop.prepare_ahead(work, range(6))
    for item in range(4):
        assert next(coming) == 10 // (item - 4)
        assert len(begun) <= item + 2
    with pytest.raises(ZeroDivisionError):
        next(coming)
    assert list(loop.prepare_ahead(work, [])) == []


def test_a_checkpoint_restores_everything_for_the_same_run_alone(tmp_path: Path) -> None:
    state = new_state(tmp_path, seed=1)
    state.optimiser = torch.optim.Adam(state.network.parameters(), lr=0.5)
    for weights in state.network.parameters():
        weights.grad = torch.ones_like(weights)
    state.optimiser.step()
    state.epoch = 3
    state.seconds = 2.5
    state.n_seen = 75
    state.history = [{"epoch": 3}]
    loop.save_checkpoint(state)

    asked: list[int] = []
    back = new_state(tmp_path, seed=1)

    def optimiser_of(epoch: int) -> torch.optim.Optimizer:
        asked.append(epoch)
        return torch.optim.Adam(back.network.parameters(), lr=0.5)

    loop.resume(back, optimiser_of)
    assert asked == [2]  # that of the last epoch that was done
    assert (back.epoch, back.seconds, back.n_seen, back.history) == (3, 2.5, 75, [{"epoch": 3}])
    for name, tensor in state.network.state_dict().items():
        assert torch.equal(back.network.state_dict()[name], tensor)
    for i, moments in state.optimiser.state_dict()["state"].items():
        for key, tensor in moments.items():
            assert torch.equal(back.optimiser.state_dict()["state"][i][key], tensor)

    other = new_state(tmp_path, seed=2)
    loop.resume(other, optimiser_of)
    assert (other.epoch, asked) == (0, [2])


def test_the_revision_is_that_of_the_repository_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert loop.git_revision() == ""
    monkeypatch.setenv("PATH", "")
    assert loop.git_revision() == ""
