"""Check a run against the thresholds of the regression test, and compare it with another revision."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd

from blobpipe.core import files, tables
from blobpipe.errors import BlobpipeError, ModelError
from blobpipe.networks import model_file
from blobpipe.params import Regression
from blobpipe.validation import regression


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


def compare_cases(old: pd.DataFrame, new: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Find the new blobs that only one of two runs finds.

    Parameters
    ----------
    old, new : DataFrame
        ``cases.csv`` of two runs; only blobs that are usable in both are compared.

    Returns
    -------
    won, lost : DataFrame
        Rows of ``new``, with the probability of the old run as ``old_probability``.
    """
    before = old[["frame", "blob"]].assign(
        old_status=old["status"], old_probability=old["probability"]
    )
    both = new.merge(before, on=["frame", "blob"], validate="one_to_one")
    won = both[(both["status"] == "found") & (both["old_status"] == "missed")]
    lost = both[(both["status"] == "missed") & (both["old_status"] == "found")]
    return won.drop(columns="old_status"), lost.drop(columns="old_status")


def against(cases_path: str | Path, revision: str) -> list[str]:
    """List the cases won and lost since a git revision, as lines to print.

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
        If there is no regression run.
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
    old = tables.parse_table(Path(f"{revision}:{path}"), shown, regression.CASE_COLUMNS)
    won, lost = compare_cases(old, new)
    return [
        f"{len(won)} won, {len(lost)} lost since {revision}",
        *(_describe_change("won", row) for row in won.itertuples()),
        *(_describe_change("lost", row) for row in lost.itertuples()),
    ]


def _describe_change(change: str, case: Any) -> str:
    """Describe a case won or lost in one line."""
    return (
        f"{change}: {case.frame} {case.blob}, S/N {case.snr:.1f}, radius {case.radius_px:.1f} px: "
        f"probability {case.old_probability:.2f} -> {case.probability:.2f}"
    )
