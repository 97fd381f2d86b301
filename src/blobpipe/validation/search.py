"""Search for better settings of the report's network: by a grid, at random, or by Optuna's TPE (ISR 4, 7).

Points are drawn beforehand and wait in a journal, a file that any number of workers share. A worker
takes the next point that waits, trains in its own process on subframes that it has rendered once, and
judges the network by validation subframes alone. When no point waits, the results are written.

Optional: Optuna is needed; it belongs to the extra ``search`` of this package.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from pydantic import ValidationError

from blobpipe.core import files, metrics, tables
from blobpipe.core.random_streams import log_uniform, stream
from blobpipe.errors import BlobpipeError, ExtraError, ParamsError
from blobpipe.networks import kernels, loop, report_network, train
from blobpipe.params import (
    N_CLASSES,
    SUBFRAME_PX,
    Params,
    ReportShape,
    Search,
    Span,
    Train,
    to_yaml,
    varied,
)
from blobpipe.simulation import augment, cutout
from blobpipe.simulation.recipes import Recipes, Scene
from blobpipe.validation import search_figures

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

log = logging.getLogger(__name__)

Point = dict[str, Any]
JOURNAL = "journal.log"
MAX_DRAWS = 1000  # draws of one random point until its settings fit together
FPR = 0.01  # false-positive rate of the objective ``missed``
FIRST_TRIALS = 5  # trials that are never stopped, so that there is a median
TRIAL_COLUMNS = (
    "trial",
    "state",
    "objective",
    "loss",
    "missed",
    "weights",
    "multiply_adds",
    "seconds",
)


class Data(NamedTuple):
    """What every trial is trained on and judged by.

    Attributes
    ----------
    scene, recipes
        Of the training subframes.
    validation : train.Validation
    noise_sigma : float
        Standard deviation of the noise added to training subframes (sigma).
    kept_copies : dict
        Rendered training subframes, by augmented copy; filled by the first training.
    """

    scene: Scene
    recipes: Recipes
    validation: train.Validation
    noise_sigma: float
    kept_copies: dict[int, Any]


def search(
    difference_dir: str | Path,
    scale_dir: str | Path,
    cutout_dir: str | Path,
    augment_dir: str | Path,
    out_dir: str | Path,
    params: Params,
    *,
    worker: int | None = None,
) -> None:
    """Try points until none waits, then write what was found (stage ``search``).

    Parameters
    ----------
    difference_dir, scale_dir, cutout_dir, augment_dir : path
        Folders that the earlier stages have written.
    out_dir : path
        ``journal.log``; then ``trials.csv``, ``best.yaml``, ``metrics.json`` and four figures.
    params : Params
    worker : int, optional
        From 1: take points only, as one of several workers, and write ``worker-N.done``. Without it, whatever
        still waits is tried here, and the results are written.

    Raises
    ------
    ExtraError
        If Optuna is not installed.
    ParamsError
        If no point can be drawn.
    BlobpipeError
        If another worker has not finished yet.

    Notes
    -----
    Source: ISR sections 4 and 7 wish for a grid or random search; numbers are ours. The objective never
    sees a historical case.
    """
    require_extra()
    out_dir = Path(out_dir)
    folders = (difference_dir, scale_dir, cutout_dir)
    identity = _identity(params, loop.data_hash(scale_dir, cutout_dir, augment_dir))
    study = _open_study(out_dir / JOURNAL, identity, params, worker or 0)
    if _waiting(study):
        data = _read_data(folders, augment_dir, params)
        kernels.set_threads(params.search.threads)
        _work(study, out_dir / JOURNAL, worker or 0, data, params)
    if worker:
        with files.atomic(out_dir / f"worker-{worker}.done") as temporary:
            temporary.write_text(f"{identity}\n")
        return
    _write_results(out_dir, study, params)


def require_extra() -> None:
    """Check that Optuna is installed, before anything is computed.

    Raises
    ------
    ExtraError
        If it is not; the message is the command that installs it.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ExtraError(
            "search: Optuna is not installed, expected for this optional stage; run: "
            "pip install -c constraints.txt -e '.[search]'"
        )


# ------------------------------------------------------------------------------------------------ points


def draw_points(params: Params) -> list[Point]:
    """Draw the points of a grid or a random search; they depend on the settings alone.

    Returns
    -------
    list of dict
        Values by the names of ``search.space``. The first is empty: the settings as they are. For TPE all are
        empty, since each is chosen when its turn comes.

    Raises
    ------
    ParamsError
        If no values of the space fit together.
    """
    wanted = params.search.n_trials - 1
    if params.search.sampler == "tpe":
        return [{}] * (1 + wanted)
    draw = _grid if params.search.sampler == "grid" else _random
    points = [{}, *itertools.islice(draw(params.search, params.train), wanted)]
    if wanted and len(points) == 1:
        raise ParamsError(
            "search.space: found no values that fit together on the grid, expected some; raise network.pool_px, or lower "
            "network.filters or network.neurons"
        )
    return points


def _grid(search: Search, base: Train) -> Any:
    """Yield all points whose values fit together, the last setting varying fastest."""
    names = list(search.space)
    for values in itertools.product(*search.space.values()):
        point = dict(zip(names, values, strict=True))
        if _fits(base, point):
            yield point


def _random(search: Search, base: Train) -> Any:
    """Yield random points whose values fit together; each has its own random stream."""
    for number in itertools.count(1):
        rng = stream(search.seed, "search", number)
        for _ in range(MAX_DRAWS):
            point = {name: _draw(rng, values, base, name) for name, values in search.space.items()}
            if _fits(base, point):
                break
        else:
            raise ParamsError(
                f"search.space: found no values that fit together in {MAX_DRAWS} draws, expected some; "
                "raise network.pool_px, or lower network.filters or network.neurons"
            )
        yield point


def _draw(rng: np.random.Generator, values: Span | tuple[Any, ...], base: Train, name: str) -> Any:
    """Draw one value."""
    if not isinstance(values, Span):
        return values[rng.integers(len(values))]
    if _is_whole(base, name):
        low, high = math.ceil(values.low), math.floor(values.high)
        if not values.log:
            return int(rng.integers(low, high + 1))
        return int(np.clip(round(log_uniform(rng, low - 0.5, high + 0.5)), low, high))
    draw = log_uniform if values.log else np.random.Generator.uniform
    return float(draw(rng, values.low, values.high))


def _is_whole(base: Train, name: str) -> bool:
    """Return whether a setting takes whole numbers."""
    return isinstance(functools.reduce(getattr, name.split("."), base), int)


def _fits(base: Train, point: Point) -> bool:
    """Return whether settings with these values are possible."""
    try:
        varied(base, point)
    except ValidationError:
        return False
    return True


# ------------------------------------------------------------------------------------------------ journal


def _identity(params: Params, data_sha256: str) -> str:
    """Return a name for all that decides the results of a trial; other settings begin another study."""
    decisive = params.search.model_dump(mode="json", exclude={"n_workers"})
    content = (decisive, params.train.model_dump(mode="json"), params.augment.noise_sigma)
    digest = hashlib.sha256(json.dumps([*content, data_sha256]).encode())

    # and the code of the rooms that take part
    package = Path(__file__).parents[1]
    rooms = ("core", "images", "simulation", "networks")
    for path in (
        Path(__file__),
        *(each for room in rooms for each in sorted(package.glob(f"{room}/*.py"))),
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _open_study(path: Path, identity: str, params: Params, worker: int) -> Study:
    """Open the study, with all its points; those that a killed worker left wait again."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path.parent.mkdir(parents=True, exist_ok=True)
    _mend(path)
    storage = JournalStorage(JournalFileBackend(str(path), JournalFileOpenLock(str(path))))
    sampler = optuna.samplers.TPESampler(seed=params.search.seed + worker, multivariate=True)
    pruner = (
        optuna.pruners.MedianPruner(FIRST_TRIALS)
        if params.search.prune
        else optuna.pruners.NopPruner()
    )
    with _locked(path):
        study = optuna.create_study(
            study_name=identity,
            storage=storage,
            sampler=sampler,
            pruner=pruner,
            load_if_exists=True,
        )
        known = {trial.user_attrs.get("point") for trial in study.get_trials(deepcopy=False)}
        for number, point in enumerate(draw_points(params)):
            if number not in known:
                _enqueue(study, number, point)
        _take_back(study, worker, params.search.n_workers)
    return study


def _from_choice(choice: Any) -> Any:
    """Return the value that `_as_choice` has made a choice of."""
    return json.loads(choice) if isinstance(choice, str) else choice


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other workers from opening the study or taking a point."""
    from optuna.storages.journal import JournalFileOpenLock

    lock = JournalFileOpenLock(f"{path}.points")
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _mend(path: Path) -> None:
    """Cut off a last line that a full disk or a lack of power has left half-written."""
    from optuna.storages.journal import JournalFileOpenLock

    if not path.exists():
        return
    lock = JournalFileOpenLock(str(path))
    lock.acquire()
    try:
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)
    finally:
        lock.release()


def _enqueue(study: Study, number: int, point: Point) -> None:
    """Let a point wait."""
    values = {name: _as_choice(value) for name, value in point.items()}
    study.enqueue_trial(values, user_attrs={"point": number, "values": point})


def _as_choice(value: Any) -> Any:
    """Return a value as Optuna takes it: lists and texts as their JSON."""
    return json.dumps(value) if isinstance(value, list | tuple | str) else value


def _take_back(study: Study, worker: int, n_workers: int) -> None:
    """Let the trials wait again that this worker, or one that is no more, has begun and not finished."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        owner = trial.user_attrs.get("worker", worker)
        if owner == worker or (worker == 1 and owner > n_workers):
            # First the new one: whatever ends this process between the two, no point is lost
            number = trial.user_attrs.get("point")
            if number is not None:
                log.info("search: point %d is tried again", number)
                _enqueue(study, number, trial.user_attrs["values"])
            study.tell(trial.number, state=TrialState.FAIL)


def _waiting(study: Study) -> list[FrozenTrial]:
    """Return the trials that nobody has begun."""
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.WAITING,))


# ------------------------------------------------------------------------------------------------ trials


def _read_data(folders: tuple[str | Path, ...], augment_dir: str | Path, params: Params) -> Data:
    """Read the training subframes, and render those of the validation."""
    augmented = augment.read_augmentation(augment_dir)
    difference_dir, scale_dir, cutout_dir = folders
    scene, recipes = cutout.open_split(
        difference_dir, scale_dir, cutout_dir, "train", augmented, n=params.search.n_train
    )
    validation = cutout.open_split(
        difference_dir, scale_dir, cutout_dir, "validation", n=params.search.n_validation
    )
    noise_sigma = params.augment.noise_sigma
    return Data(scene, recipes, train.render_validation(*validation), noise_sigma, {})


def _work(study: Study, path: Path, worker: int, data: Data, params: Params) -> None:
    """Try points until none waits."""
    from optuna.trial import TrialState

    while _waiting(study):
        # No other worker may see a trial that nobody owns
        with _locked(path):
            trial = study.ask()
            trial.set_user_attr("worker", worker)
            if "point" not in trial.user_attrs:  # another worker was faster with the last one
                study.tell(trial, state=TrialState.FAIL)
                break
        point = _suggest(trial, params)
        try:
            settings = varied(params.train, point)
        except ValidationError:
            # TPE does not know which values fit together
            study.tell(trial, state=TrialState.PRUNED)
            continue
        _try_point(study, trial, settings, data, params.search)


def _suggest(trial: Trial, params: Params) -> Point:
    """Return the values of a trial: those that were drawn beforehand, else what the sampler suggests."""
    if trial.user_attrs["point"] == 0:
        return {}
    point: Point = {}
    for name, values in params.search.space.items():
        if not isinstance(values, Span):
            choice = trial.suggest_categorical(name, [_as_choice(value) for value in values])
            point[name] = _from_choice(choice)
        elif _is_whole(params.train, name):
            low, high = math.ceil(values.low), math.floor(values.high)
            point[name] = trial.suggest_int(name, low, high, log=values.log)
        else:
            point[name] = trial.suggest_float(name, values.low, values.high, log=values.log)
    return point


def _try_point(study: Study, trial: Trial, settings: Train, data: Data, params: Search) -> None:
    """Train with some settings, once for each seed, and tell the study how it went."""
    from optuna.trial import TrialState

    started = time.perf_counter()
    found = []
    for repetition in range(params.n_seeds):
        changes = {
            "seed": settings.seed + repetition,
            "threads": params.threads,
            "keep_rendered": True,
            "n_monitor": params.n_validation,
        }
        judged = _train(
            settings.model_copy(update=changes), data, trial if repetition == 0 else None
        )
        if judged is None:
            break
        found.append(judged)

    # what every row of the table says, whether the trial was stopped or not
    trial.set_user_attr("weights", settings.network.n_weights)
    trial.set_user_attr("multiply_adds", multiply_adds(settings.network))
    trial.set_user_attr("seconds", round(time.perf_counter() - started, 1))
    if not found or len(found) < params.n_seeds:
        study.tell(trial, state=TrialState.PRUNED)
        return
    loss, missed = (float(value) for value in np.mean(found, axis=0))
    trial.set_user_attr("loss", round(loss, 6))
    trial.set_user_attr("missed", round(missed, 6))
    study.tell(trial, loss if params.objective == "loss" else missed)


def _train(settings: Train, data: Data, trial: Trial | None) -> tuple[float, float] | None:
    """Train a network; return its loss and the share that it misses, or None if the trial is stopped.

    Parameters
    ----------
    settings : Train
    data : Data
    trial : Trial or None
        Is told the validation loss of every epoch, and may be stopped.
    """
    state = train.new_state(settings, {}, Path())
    training = train.ReportTraining(
        state, data.scene, data.recipes, data.validation, settings, data.noise_sigma
    )
    training.kept_copies = data.kept_copies
    while state.epoch < settings.epochs:
        loop.run_epoch(state, training.batches, training.update, training.monitor)
        loss = state.history[-1]["val_loss"]
        if not math.isfinite(loss):
            return None
        if trial is not None:
            trial.report(loss, state.epoch)
            # The settings as they are, point 0, are what all others are compared with
            may_stop = state.epoch < settings.epochs and trial.user_attrs["point"] > 0
            if may_stop and trial.should_prune():
                return None

    probability = report_network.predict(state.network, training.monitored)
    true, false, _ = metrics.cumulative(data.validation.labels, probability)
    missed = 1 - float(metrics.tpr_at_fpr(true, false, FPR)[0])
    return float(state.history[-1]["val_loss"]), missed


def multiply_adds(shape: ReportShape) -> int:
    """Return the multiplications and additions that a network needs for one subframe, as it is defined (count)."""
    total = 0
    side = SUBFRAME_PX
    channels = (1, *shape.filters)
    for a, b in itertools.pairwise(channels):
        total += a * b * shape.kernel_px**2 * side**2
        side //= shape.pool_px
    neurons = (shape.filters[-1] * shape.n_last_cells, *shape.neurons, N_CLASSES)
    return total + sum(a * b for a, b in itertools.pairwise(neurons))


# ------------------------------------------------------------------------------------------------ results


def _write_results(out_dir: Path, study: Study, params: Params) -> None:
    """Write the table, the best settings, the metrics and the figures."""
    from optuna.trial import TrialState

    unfinished = sorted(
        {
            trial.user_attrs.get("worker", 0)
            for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        }
    )
    if unfinished:
        raise BlobpipeError(
            f"{out_dir / JOURNAL}: worker {', '.join(map(str, unfinished))} has not finished its trial, expected all "
            "to be done; wait for it, or start it again (blobpipe search --worker N)"
        )
    table = trial_table(study, params)
    done = table[table["state"] == "done"]
    if done.empty:
        raise BlobpipeError(
            f"{out_dir / JOURNAL}: no trial was finished, expected at least one; set search.prune to false"
        )
    best = done.iloc[int(done["objective"].argmin())]
    of_best = json.loads(str(best["values"])) if best["trial"] else {}
    better = params.model_copy(update={"train": varied(params.train, of_best)})
    importance = _importance(study, list(params.search.space))

    tables.write_table(out_dir / "trials.csv", table.drop(columns="values"))
    with files.atomic(out_dir / "best.yaml") as temporary:
        temporary.write_text(to_yaml(better), encoding="utf-8")
    as_they_are = table.iloc[0]  # point 0 is never left out
    tables.write_json(
        out_dir / "metrics.json",
        {
            "n_trials": len(table),
            "n_done": len(done),
            "n_stopped": int((table["state"] == "stopped").sum()),
            "best_trial": int(best["trial"]),
            "best_objective": tables.number_or_none(best["objective"]),
            "best_missed": tables.number_or_none(best["missed"]),
            "as_they_are_objective": tables.number_or_none(float(as_they_are["objective"])),
            "as_they_are_missed": tables.number_or_none(float(as_they_are["missed"])),
            "importance": importance,
        },
    )
    names = [name for name in params.search.space if name in table]
    label = search_figures.LABELS[params.search.objective]
    search_figures.history(out_dir / "history.png", table, label)
    search_figures.importance(out_dir / "importance.png", importance, len(done))
    search_figures.parallel(out_dir / "parallel.png", done, names, label)
    search_figures.cost(out_dir / "cost.png", done, label)


def trial_table(study: Study, params: Params) -> pd.DataFrame:
    """Return a row for each point, in their order.

    Returns
    -------
    DataFrame
        `TRIAL_COLUMNS`, a column for each setting of ``search.space``, and ``values``, all of them as JSON. The state
        is ``done``, ``stopped`` (by the median, or because values did not fit together) or ``waiting``.
    """
    from optuna.trial import TrialState

    states = {TrialState.COMPLETE: "done", TrialState.PRUNED: "stopped"}
    rows = {}
    for trial in study.get_trials(deepcopy=False):
        about = trial.user_attrs
        if "point" not in about or trial.state == TrialState.FAIL:
            continue
        point = {name: _from_choice(value) for name, value in trial.params.items()}
        settings = {}
        if _fits(params.train, point):
            settings = varied(params.train, point).model_dump(mode="json")
        rows[about["point"]] = {
            "trial": about["point"],
            "state": states.get(trial.state, "waiting"),
            "objective": trial.value if trial.state == TrialState.COMPLETE else np.nan,
            **{name: about.get(name, np.nan) for name in TRIAL_COLUMNS[3:]},
            **{name: json.dumps(_value_of(settings, name, point)) for name in params.search.space},
            "values": json.dumps(point),
        }
    table = pd.DataFrame([rows[number] for number in sorted(rows)])
    return table.astype({"weights": "Int64", "multiply_adds": "Int64"})


def _value_of(settings: dict[str, Any], name: str, point: Point) -> Any:
    """Return the value of a setting as it was used."""
    if not settings:
        return point.get(name)
    return functools.reduce(dict.__getitem__, name.split("."), settings)


def _importance(study: Study, names: list[str]) -> dict[str, float]:
    """Return how much of the variation of the objective each setting explains (0 to 1); empty with too few trials."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # few trials have a value: said in the docs
            found = get_param_importances(
                study, evaluator=PedAnovaImportanceEvaluator(), params=names
            )
    except (ValueError, RuntimeError):
        return {}
    return {name: round(float(value), 4) for name, value in found.items()}
