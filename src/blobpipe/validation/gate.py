"""Check a run against the thresholds of the regression test, and against another revision."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pandas as pd

from blobpipe.core import files, tables
from blobpipe.errors import BlobpipeError, ModelError
from blobpipe.networks import model_file
from blobpipe.params import Regression
from blobpipe.validation import regression


def check_gate(metrics_path: str | Path, params: Regression) -> list[str]:
    """List the thresholds that the last regression run does not keep; empty if it passed.

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
            f"{metrics_path}: found {type(metrics).__name__}, expected metrics; run the stage regression again"
        )
    return regression.failed_thresholds(metrics, params)


def require_passed(model: Path, metrics_path: Path, params: Regression) -> None:
    """Refuse a model for daily work unless the regression test has judged it and it passed.

    Parameters
    ----------
    model : path
        Of the stage detect.
    metrics_path : path
        What the stage regression has written.
    params : Regression
        The thresholds that hold now.

    Raises
    ------
    ModelError
        If the test failed, or is not there, or was of another model; it says how to go on.
    """
    model_file.kind_of_model(model)  # a damaged file is told of as such
    found = files.sha256(model)
    try:
        failed = check_gate(metrics_path, params)
        judged = json.loads(metrics_path.read_text(encoding="utf-8")).get("dense_sha256")
        if judged != found:
            failed = [
                f"{metrics_path} is of the model {str(judged)[:12]}, not of this one, {found[:12]}"
            ]
    except BlobpipeError as error:
        failed = [str(error)]
    if failed:
        raise ModelError(
            f"{model}: the regression test has not passed it ({'; '.join(failed)}); run the stage regression, train it "
            f"again, or name the model to take: --model {model}, or the packaged one, --model {model_file.PACKAGED}"
        )


def compare_cases(old: pd.DataFrame, new: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Find the new blobs that one model finds and another does not.

    Parameters
    ----------
    old, new : DataFrame
        ``cases.csv`` of two runs; only blobs that were usable in both are compared.

    Returns
    -------
    won, lost : DataFrame
        Rows of ``new``, and the probability before as ``old_probability``.
    """
    before = old[["frame", "blob", "status", "probability"]]
    both = new.merge(before, on=["frame", "blob"], suffixes=("", "_old"), validate="one_to_one")
    both = both.rename(columns={"probability_old": "old_probability"})
    won = both[(both["status"] == "found") & (both["status_old"] == "missed")]
    lost = both[(both["status"] == "missed") & (both["status_old"] == "found")]
    return won.drop(columns="status_old"), lost.drop(columns="status_old")


def against(cases_path: str | Path, revision: str) -> list[str]:
    """List the cases won and lost since a git revision, as lines to print.

    Parameters
    ----------
    cases_path : path
        ``cases.csv`` of the present run, in a git repository that also holds it at ``revision``.
    revision : str
        A commit, branch or tag.

    Raises
    ------
    BlobpipeError
        If git has no such file at that revision.
    TableError
        If there is no present run.
    """
    path = Path(cases_path)
    new = tables.read_table(path, regression.CASE_COLUMNS)
    command = ["git", "show", f"{revision}:./{path.name}"]
    try:
        shown = subprocess.run(command, cwd=path.parent, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        reason = " ".join(
            (getattr(error, "stderr", b"").decode(errors="replace") or str(error)).split()
        )
        raise BlobpipeError(
            f"{path}: git has none at revision {revision} ({reason}); name a commit that holds it"
        ) from error
    old = tables.parse_table(Path(f"{revision}:{path}"), shown, regression.CASE_COLUMNS)
    won, lost = compare_cases(old, new)
    return [
        f"{len(won)} won, {len(lost)} lost since {revision}",
        *_lines("won", won),
        *_lines("lost", lost),
    ]


def _lines(name: str, table: pd.DataFrame) -> list[str]:
    return [
        f"{name}: {row.frame} {row.blob}, S/N {row.snr:.1f}, radius {row.radius_px:.1f} px: "
        f"probability {row.old_probability:.2f} -> {row.probability:.2f}"
        for row in table.itertuples()
    ]
