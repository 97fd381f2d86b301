"""The training loop of both networks: epochs, checkpoints, history and results.

A stage brings three functions: its batches, its update and its monitoring. `run_epochs` calls them, and writes a
checkpoint after every epoch, so that a run that was killed goes on from there and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numba
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from blobpipe.core import files, plotting, tables
from blobpipe.core.random_streams import stream
from blobpipe.networks import model_file
from blobpipe.networks.dense_network import DenseNetwork
from blobpipe.networks.report_network import ReportNetwork

log = logging.getLogger(__name__)

Rows = npt.NDArray[np.int64]
Network = TypeVar("Network", ReportNetwork, DenseNetwork)

HISTORY = ("epoch", "train_loss", "val_loss", "val_accuracy", "rate")


@dataclass
class State(Generic[Network]):
    """A training run between two epochs.

    Parameters
    ----------
    network : ReportNetwork or DenseNetwork
        On the device that it is trained on.
    optimiser : Optimizer
        Of the network's parameters.
    identity : dict
        Settings, checksum of the data and version; a checkpoint of another identity is not continued.
    checkpoint : path
        File that `save_checkpoint` writes and `resume` reads.
    epoch : int
        Epochs that are done.
    seconds : float
        Time spent on training, without monitoring (s).
    n_seen : int
        Subframes trained on, counted in every epoch.
    history : list of dict
        One row for each epoch that is done, with the columns `HISTORY`.
    """

    network: Network
    optimiser: torch.optim.Optimizer
    identity: dict[str, Any]
    checkpoint: Path
    epoch: int = 0
    seconds: float = 0.0
    n_seen: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Return the device of the network."""
        return next(self.network.parameters()).device


class Batch(Protocol):
    """Anything that knows which training subframes it holds; a stage adds what its update needs."""

    @property
    def rows(self) -> Rows:
        """Return the numbers of the subframes, shape (n,), int64."""


AnyBatch = TypeVar("AnyBatch", bound=Batch)
# yields the batches of an epoch, given its number (0 for the first one)
Batches = Callable[[int], Iterator[AnyBatch]]
# takes one step of the optimiser and returns the mean loss of the batch, shape ()
Update = Callable[[AnyBatch], Tensor]
# returns loss and accuracy (0 to 1) on the validation subframes
Monitor = Callable[[], tuple[float, float]]


# ------------------------------------------------------------------------------------------------ epochs


def run_epochs(
    state: State[Any],
    n_epochs: int,
    batches: Batches[AnyBatch],
    update: Update[AnyBatch],
    monitor: Monitor,
) -> None:
    """Train until ``n_epochs`` epochs are done, and write a checkpoint after each.

    Parameters
    ----------
    state : State
        Is updated.
    n_epochs : int
    batches : function
        Yields the batches of an epoch, given its number (0 for the first one).
    update : function
        Takes one step of the optimiser and returns the mean loss of the batch, shape ().
    monitor : function
        Returns loss and accuracy (0 to 1) on the validation subframes.
    """
    while state.epoch < n_epochs:
        run_epoch(state, batches, update, monitor)
        save_checkpoint(state)


def run_epoch(
    state: State[Any],
    batches: Batches[AnyBatch],
    update: Update[AnyBatch],
    monitor: Monitor,
) -> None:
    """Train on every subframe once, then measure loss and accuracy on the validation subframes.

    Parameters
    ----------
    state, batches, update, monitor
        As in `run_epochs`.
    """
    # train; the sum stays on the device, so that no step waits for its loss
    started = time.perf_counter()
    state.network.train()
    loss_sum = torch.zeros((), dtype=torch.float64, device=state.device)
    n_seen = 0
    for batch in batches(state.epoch):
        loss_sum += update(batch).double() * len(batch.rows)
        n_seen += len(batch.rows)
    train_loss = loss_sum.item() / n_seen
    state.seconds += time.perf_counter() - started
    state.n_seen += n_seen

    # monitor; this time is not counted
    val_loss, val_accuracy = monitor()

    # record the epoch, with the learning rate of its last step
    rate = float(state.optimiser.param_groups[0]["lr"])
    state.epoch += 1
    values = (state.epoch, train_loss, val_loss, val_accuracy, rate)
    state.history.append(dict(zip(HISTORY, values, strict=True)))
    log.info(
        "epoch %d: train loss %.4f, validation loss %.4f, accuracy %.4f",
        state.epoch,
        train_loss,
        val_loss,
        val_accuracy,
    )


def shuffled_batches(n: int, batch_size: int, seed: int, epoch: int) -> list[Rows]:
    """Split ``n`` subframes into batches of nearly equal size, in an order that is new in every epoch.

    Returns
    -------
    list of ndarray, shape (at most batch_size,), int64
    """
    order = stream(seed, "train", epoch).permutation(n)
    return np.array_split(order, math.ceil(n / batch_size))


def prepare_ahead(prepare: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Yield ``prepare(item)`` for each item; the next one is prepared in a thread meanwhile."""
    # the thread takes numba's number of threads from this one: each thread has its own
    n_threads = numba.get_num_threads()
    with ThreadPoolExecutor(1, "ahead", numba.set_num_threads, (n_threads,)) as pool:
        waiting = [pool.submit(prepare, item) for item in items[:1]]
        for item in items[1:]:
            waiting.append(pool.submit(prepare, item))
            yield waiting.pop(0).result()
        yield from (last.result() for last in waiting)


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameters."""
    for group in optimiser.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(rate)  # in place: a recorded CUDA graph reads this tensor
        else:
            group["lr"] = rate


# ------------------------------------------------------------------------------------------------ checkpoints


def save_checkpoint(state: State[Any]) -> None:
    """Write the whole state as one file, so that it is either there or not, and its metadata as JSON beside it."""
    # tensors of network and optimiser, under names that `_restore` takes apart again
    weights = state.network.state_dict()
    tensors = {f"network.{name}": value for name, value in weights.items()}
    for i, of_parameter in state.optimiser.state_dict()["state"].items():
        for key, value in of_parameter.items():
            if torch.is_tensor(value):
                tensors[f"optimiser.{i}.{key}"] = value
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    # everything else is metadata
    metadata = {
        **state.identity,
        "git_revision": git_revision(),
        "epoch": state.epoch,
        "seconds": state.seconds,
        "n_seen": state.n_seen,
        "history": state.history,
    }
    with files.atomic(state.checkpoint) as temporary:
        temporary.write_bytes(save(tensors, {"blobpipe": json.dumps(metadata)}))
    with files.atomic(state.checkpoint.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(metadata, indent=2) + "\n")


def resume(state: State[Any], new_optimiser: Callable[[int], torch.optim.Optimizer]) -> None:
    """Continue from the checkpoint if it has the same identity; leave the state as it is otherwise.

    Parameters
    ----------
    state : State
        Is updated.
    new_optimiser : function
        Returns a new optimiser of the kind that an epoch, given by its number, is trained with.
    """
    # a missing or damaged checkpoint is no error: training starts anew
    try:
        with safe_open(state.checkpoint, "pt") as file:
            metadata = json.loads(file.metadata()["blobpipe"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError):
        return

    # compare as JSON, which knows no tuples
    expected = json.loads(json.dumps(state.identity))
    if {key: metadata.get(key) for key in state.identity} != expected:
        log.warning("%s belongs to another run; training starts anew", state.checkpoint)
        return

    log.info("continuing after epoch %d of %s", metadata["epoch"], state.checkpoint)
    state.epoch = metadata["epoch"]
    state.history = metadata["history"]
    state.seconds = metadata["seconds"]
    state.n_seen = metadata["n_seen"]
    # the optimiser in the checkpoint is that of the last epoch that was done
    state.optimiser = new_optimiser(state.epoch - 1)
    _restore(state, tensors)


def _restore(state: State[Any], tensors: dict[str, Tensor]) -> None:
    """Load the tensors of a checkpoint into network and optimiser."""
    weights: dict[str, Tensor] = {}
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part == "network":
            weights[rest] = tensor
        else:
            i, _, key = rest.partition(".")
            moments.setdefault(int(i), {})[key] = tensor
    state.network.load_state_dict(weights)
    state.optimiser.load_state_dict({**state.optimiser.state_dict(), "state": moments})


def data_hash(*folders: str | Path) -> str:
    """Return the SHA-256 checksum of all tables (CSV) and stamps (FITS) in some folders, as hexadecimal digits."""
    paths = [
        path
        for folder in folders
        for path in (*Path(folder).glob("*.csv"), *Path(folder).glob("*.fits"))
    ]
    digest = hashlib.sha256()
    for path in sorted(paths):
        # hidden files are what a killed run left half-written
        if not path.name.startswith("."):
            digest.update(files.sha256(path).encode())
    return digest.hexdigest()


def git_revision() -> str:
    """Return the commit of the working folder, or an empty string outside a repository."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


# ------------------------------------------------------------------------------------------------ results


def write_results(out_dir: Path, state: State[Any], loss_label: str, name: str) -> None:
    """Write ``history.png``, ``history.csv``, ``metrics.json`` and ``model.safetensors`` of a run that is over.

    Parameters
    ----------
    out_dir : path
    state : State
    loss_label : str
        Name and unit of the loss, for the axis of the figure.
    name : str
        Name of the network, one of `plotting.NAMES`.
    """
    history = pd.DataFrame(state.history, columns=list(HISTORY))
    val_loss = history["val_loss"].to_numpy(np.float64)
    metrics = {
        "epochs": state.epoch,
        "best_epoch": int(history["epoch"].iloc[int(np.argmin(val_loss))]),
        "val_loss": round(float(val_loss[-1]), 6),
        "samples_per_s": round(state.n_seen / state.seconds, 1),
        "seconds": round(state.seconds, 1),
    }
    plotting.history(out_dir / "history.png", history, loss_label, name)
    tables.write_table(out_dir / "history.csv", history)
    tables.write_json(out_dir / "metrics.json", metrics)
    model_file.save_model(out_dir / "model.safetensors", state.network, state.identity)
