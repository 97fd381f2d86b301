"""Check a run against the thresholds of the regression test, and compare it with another revision."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from blobpipe.core import files, tables
from blobpipe.errors import BlobpipeError, ModelError, TableError
from blobpipe.networks import model_file
from blobpipe.params import Params, Regression, read_yaml
from blobpipe.validation import regression

# Where `cases.csv` tells whether a detector found a blob, as (column, value), and the column that its threshold is set on;
# the dense network, which searches by default, comes first
ANSWERS = {
    "dense": (("found_dense", 1), "dense_score"),
    "report": (("status", "found"), "probability"),
}
NAMES = {"dense": "dense network", "report": "report's network"}

# Two runs show the same blob if its place is the same (px) and its S/N is within this share. Names do not tell: they are
# counters in simulated images. Other noise changes S/N: with a stack of 5 images instead of 30, it is 11 % less
# (computed from the variance of a median of white noise, pi / 2n; ours).
SAME_PX = 1.0
SAME_SNR_FRAC = 0.25

# Shown where there is no value
NO_VALUE = "\N{EN DASH}"

# Settings of the stage regression that no number depends on: thresholds, by which the gate judges whenever it is asked
THRESHOLDS = ("regression.min_", "regression.max_")


def check_gate(metrics_path: str | Path, params: Regression) -> list[str]:
    """List the thresholds that the last regression run does not meet; an empty list means that it passed.

    Raises
    ------
    BlobpipeError
        If there is no regression run, or its metrics cannot be read.
    """
    try:
        metrics = json.loads(Path(metrics_path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BlobpipeError(f"{metrics_path}: not found; run the stage regression first") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BlobpipeError(
            f"{metrics_path}: cannot be read as JSON ({error}); run the stage regression again"
        ) from error
    if not isinstance(metrics, dict):
        raise BlobpipeError(
            f"{metrics_path}: found {type(metrics).__name__}, expected metrics; "
            "run the stage regression again"
        )
    return regression.failed_thresholds(metrics, params)


def unlike_record(lock_path: str | Path, metrics_path: str | Path, params: Params) -> list[str]:
    """List why the last regression run is not one with these settings; an empty list means that it is.

    Parameters
    ----------
    lock_path : path
        ``dvc.lock``, which records the settings of each stage, and the checksums of what it read and wrote. Without it,
        or without the stage in it, nothing is known, and the list is empty.
    metrics_path : path
        ``metrics.json`` of the stage regression, in a folder below that of ``dvc.lock``.
    params : Params
        The settings in force. Thresholds may have changed: they are not part of a run.

    Raises
    ------
    BlobpipeError
        If ``dvc.lock`` cannot be read.
    """
    lock = Path(lock_path)
    try:
        stages = read_yaml(lock)["stages"] if lock.exists() else {}
        return _unlike(stages, lock, Path(metrics_path), params) if "regression" in stages else []
    except (KeyError, TypeError, AttributeError) as error:
        raise BlobpipeError(
            f"{lock}: not a record of stages as DVC writes it; restore it: git checkout {lock}"
        ) from error


def _unlike(stages: dict[str, Any], lock: Path, metrics: Path, params: Params) -> list[str]:
    """Compare the records of the stage regression and of those before it with the settings and the metrics."""
    made = {out["path"]: (name, out.get("md5")) for name in stages for out in stages[name]["outs"]}

    # The stage and all that it depends on: the list grows while it is walked
    needed = ["regression"]
    stale = []
    for name in needed:
        for dep in stages[name]["deps"]:
            path = dep["path"]
            maker, checksum = made.get(path, (name, dep.get("md5")))
            if maker not in needed:
                needed.append(maker)
            if checksum != dep.get("md5"):
                stale.append(f"  {path}: made again since the stage {name}")

    # Settings that these stages use, by their whole names
    used: dict[str, Any] = {}
    for name in needed:
        used |= stages[name].get("params", {}).get("params.yaml", {})
    now = {
        key: value
        for key, value in leaves(params.model_dump(mode="json"))
        if any(key == name or key.startswith(f"{name}.") for name in used)
    }
    recorded = {key: value for name in used for key, value in leaves(used[name], name)}
    changed = [
        f"  {key}: was {old}, is {new}"
        for key, old, new in differing(recorded, now)
        if not key.startswith(THRESHOLDS)
    ]

    reasons = changed or stale
    checksum = {lock.parent / path: md5 for path, (_, md5) in made.items()}.get(metrics)
    found = hashlib.md5(metrics.read_bytes(), usedforsecurity=False).hexdigest()
    if not reasons and checksum not in (None, found):
        reasons = [f"  {metrics}: not the file that {lock} records"]
    advice = "not of a run with the settings in force; run the pipeline: snakemake --cores 2"
    return [f"{metrics}: {advice}", *reasons] if reasons else []


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf of nested tables by its whole name, such as ``train.network.filters``."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, tree


def differing(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return the names whose values differ, with both; `NO_VALUE` stands for none."""
    return [
        (name, old.get(name, NO_VALUE), new.get(name, NO_VALUE))
        for name in dict.fromkeys((*old, *new))
        if old.get(name, NO_VALUE) != new.get(name, NO_VALUE)
    ]


def require_passed(model: Path, metrics_path: Path, params: Regression) -> None:
    """Refuse a model for daily work unless it has passed the regression test.

    Parameters
    ----------
    model : path
        Model of the stage detect.
    metrics_path : path
        ``metrics.json`` of the stage regression.
    params : Regression
        The thresholds in force.

    Raises
    ------
    ModelError
        If the test failed, has not been run, or was run on another model; the message says how to continue.
    """
    model_file.kind_of_model(model)  # reports a damaged file
    sha256 = files.sha256(model)
    try:
        failed = check_gate(metrics_path, params)
        tested = json.loads(metrics_path.read_text(encoding="utf-8")).get("dense_sha256")
        if tested != sha256:
            failed = [
                f"{metrics_path} is of the model {str(tested)[:12]}, not of this one, {sha256[:12]}"
            ]
    except BlobpipeError as error:
        failed = [str(error)]
    if failed:
        raise ModelError(
            f"{model}: has not passed the regression test ({'; '.join(failed)}); run the stage regression, train "
            f"the model again, or choose a model: --model {model}, or the packaged one, --model {model_file.PACKAGED}"
        )


def compare_cases(
    old: pd.DataFrame, new: pd.DataFrame, detector: str = "dense"
) -> tuple[pd.DataFrame, int]:
    """Find the new blobs that only one of two runs finds.

    Parameters
    ----------
    old, new : DataFrame
        ``cases.csv`` of two runs; only blobs that are usable in both are compared. A blob is the same if its name, its
        place and about its S/N are.
    detector : str
        ``dense`` or ``report``, each at the threshold that its gate tests.

    Returns
    -------
    changed : DataFrame
        frame, blob, snr, radius_px, change (``won`` or ``lost``), old_answer and answer: what the detector's
        threshold is set on (NaN without a candidate); the won ones first.
    n_both : int
        Blobs that are usable in both.
    """
    after = _answers(new, detector)
    before = _answers(old, detector).drop(columns="radius_px")
    both = after.merge(
        before, on=["frame", "blob"], validate="one_to_one", suffixes=("", "_before")
    )
    moved_px = np.hypot(both["x_px"] - both["x_px_before"], both["y_px"] - both["y_px_before"])
    snr_change = (both["snr"] / both["snr_before"] - 1).abs()
    both = both[(moved_px <= SAME_PX) & ~(snr_change > SAME_SNR_FRAC)]
    both = both.rename(columns={"answer_before": "old_answer"})
    parts = [
        both[both["found"] & ~both["found_before"]].assign(change="won"),
        both[~both["found"] & both["found_before"]].assign(change="lost"),
    ]
    return pd.concat(parts, ignore_index=True), len(both)


def _answers(cases: pd.DataFrame, detector: str) -> pd.DataFrame:
    """Return the usable cases with what one detector answers."""
    (column, value), answer = ANSWERS[detector]
    usable = cases[cases["status"] != "unusable"]
    return pd.DataFrame(
        {
            "frame": usable["frame"],
            "blob": usable["blob"],
            "x_px": usable["x_px"],
            "y_px": usable["y_px"],
            "snr": usable["snr"],
            "radius_px": usable["radius_px"],
            "found": usable[column] == value,
            "answer": usable[answer].astype(float),
        }
    )


def chance_of_split(won: int, lost: int) -> float:
    """Compute how often chance alone divides the changed cases at least as unevenly.

    Of two detectors that are equally good, each wins a case that only one of them finds in half of the cases.

    Parameters
    ----------
    won, lost : int

    Returns
    -------
    float
        Probability (0 to 1) of a split at least as uneven either way; 1 without a change.

    Notes
    -----
    Source: McNemar's exact test; not in the report.
    """
    from scipy.stats import binomtest

    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def against(cases_path: str | Path, revision: str) -> list[str]:
    """List the cases that each network has won and lost since a git revision, as lines to print.

    If most blobs are others, a single line says that.

    Parameters
    ----------
    cases_path : path
        ``cases.csv`` of the present run, in a git repository that has the file at ``revision``, too.
    revision : str
        A commit, branch or tag.

    Raises
    ------
    BlobpipeError
        If git has no such file at that revision.
    TableError
        If there is no regression run, or a table has a case twice.
    """
    path = Path(cases_path)
    new = tables.read_table(path, regression.CASE_COLUMNS)
    command = ["git", "show", f"{revision}:./{path.name}"]
    try:
        shown = subprocess.run(command, cwd=path.parent, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        message = getattr(error, "stderr", b"").decode(errors="replace") or str(error)
        reason = " ".join(message.split())
        raise BlobpipeError(
            f"{path}: git has none at revision {revision} ({reason}); name a commit that holds it"
        ) from error
    old_path = Path(f"{revision}:{path}")
    old = tables.parse_table(old_path, shown, regression.CASE_COLUMNS)
    _require_once(path, new)
    _require_once(old_path, old)
    n_both = compare_cases(old, new)[1]
    n_usable = min(int((cases["status"] != "unusable").sum()) for cases in (old, new))
    if n_both < n_usable / 2:
        return [
            f"different images since {revision}: only {n_both} of {n_usable} cases are of the same blob; "
            "cases cannot be paired"
        ]
    return [
        line for detector in ANSWERS for line in _describe_changes(old, new, detector, revision)
    ]


def _require_once(path: Path, cases: pd.DataFrame) -> None:
    """Refuse a table that has a blob of one image twice: it would say two things of one case."""
    repeated = cases[cases.duplicated(["frame", "blob"])]
    if len(repeated):
        row = repeated.index[0]
        frame, blob = repeated.loc[row, ["frame", "blob"]]
        raise TableError(
            f"{path}: row {row + 2}: found {frame} {blob} again, expected each blob of an image once; run the stage "
            "regression again"
        )


def _describe_changes(
    old: pd.DataFrame, new: pd.DataFrame, detector: str, revision: str
) -> Iterator[str]:
    """Yield a line on all cases of a detector, and one on each that was won or lost."""
    changed, n_both = compare_cases(old, new, detector)
    won = int((changed["change"] == "won").sum())
    lost = len(changed) - won
    summary = f"{NAMES[detector]}: {won} won, {lost} lost of {n_both} since {revision}"
    if won + lost:
        chance = chance_of_split(won, lost)
        summary += (
            f"; chance alone gives a split at least as uneven with a probability of {chance:.2g}"
        )
    yield summary
    word = ANSWERS[detector][1].removeprefix("dense_")
    for case in changed.itertuples():
        yield (
            f"  {case.change}: {case.frame} {case.blob}, S/N {case.snr:.1f}, "
            f"radius {case.radius_px:.1f} px: "
            f"{word} {_answer(case.old_answer)} -> {_answer(case.answer)}"
        )


def _answer(value: Any) -> str:
    """Return an answer as text; a blob without a candidate has none."""
    return f"{value:.3f}" if value == value else "none"
