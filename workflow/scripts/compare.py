"""What `make compare` prints: every experiment in 80 columns, with what it changed, its rates and its time.

`dvc exp show` has a column for each of a hundred settings and metrics. Here each run takes a line, and another for the
settings in which it differs from the run it began from.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from records import BridgeError, dvc

from blobpipe.core.metrics import wilson_interval

COLUMNS = 80
NAME = 21
MISSING = "-"

# Rates of the regression test by detector, how many blobs they are of, and false alarms
RATES = ("dense_recall_snr_gt_7", "recall_snr_gt_7")
N_BLOBS = "n_blobs_snr_gt_7"
ALARMS = ("dense_false_alarms_per_100_frames", "false_alarms_per_frame")


class Run(NamedTuple):
    """A run: its name, its settings by their whole names, and its metrics by stage."""

    name: str
    settings: dict[str, Any]
    metrics: dict[str, dict[str, Any]]


def read_runs() -> Iterator[tuple[Run, list[Run]]]:
    """Yield the workspace and each commit that DVC shows, with the experiments that began there."""
    for entry in json.loads(dvc("exp", "show", "--json")):
        children = [
            _run(revision)
            for experiment in entry["experiments"] or []
            for revision in experiment["revs"][:1]
        ]
        yield _run(entry), children


def _run(entry: dict[str, Any]) -> Run:
    data = entry["data"] or {}
    metrics = {
        path.split("/")[-2]: content["data"]
        for path, content in (data.get("metrics") or {}).items()
        if "data" in content and "/" in path
    }
    params = (data.get("params") or {}).get("params.yaml", {}).get("data", {})
    revision = entry["rev"]
    short = revision if revision == "workspace" else revision[:7]
    return Run(entry["name"] or short, dict(_flat(params)), metrics)


def _flat(settings: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting by its whole name."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            yield from _flat(value, f"{name}.{key}" if name else key)
    else:
        yield name, settings


def lines(runs: Iterator[tuple[Run, list[Run]]]) -> Iterator[str]:
    """Yield the lines of the table, none of them longer than a terminal."""
    yield f"{'':{NAME}} {'recall, S/N > 7 (95 %)':^31} {'false alarms':^12} {'training, s':>13}"
    yield f"{'run':{NAME}} {'dense':^15} {'report':^15} {'/100':>5} {'/image':>6} {'dense':>6} {'report':>6}"
    yield "-" * COLUMNS
    for base, children in runs:
        yield _line(base)
        for child in children:
            yield _line(child)
            yield from _changes(base.settings, child.settings)


def _line(run: Run) -> str:
    regression = run.metrics.get("regression", {})
    dense, report = (_rate(regression, key) for key in RATES)
    alarms, per_frame = (
        _number(regression.get(key), digits) for key, digits in zip(ALARMS, (1, 2), strict=True)
    )
    times = [_number(run.metrics.get(stage, {}).get("seconds"), 0) for stage in ("dense", "train")]
    name = run.name if len(run.name) <= NAME else f"{run.name[: NAME - 3]}..."
    return f"{name:{NAME}} {dense:>15} {report:>15} {alarms:>5} {per_frame:>6} {times[0]:>6} {times[1]:>6}"


def _rate(metrics: dict[str, Any], key: str) -> str:
    """Return a rate and its interval, such as ``.96 (.92-.98)``; DVC leaves out lists, so it is computed again."""
    n = metrics.get(N_BLOBS)
    if not isinstance(metrics.get(key), float | int) or not n:
        return MISSING
    rate = float(metrics[key])
    ends = wilson_interval(np.array(round(rate * n)), np.array(n))
    rate_low_high = (f"{float(value):.2f}".removeprefix("0") for value in (rate, *ends))
    return "{} ({}-{})".format(*rate_low_high)


def _number(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, float | int) else MISSING


def _changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the settings in which a run differs from the one it began from, wrapped."""
    changed = [
        f"{key}={json.dumps(after[key]) if key in after else 'absent'}"
        for key in sorted(before.keys() | after.keys())
        if key not in before or key not in after or before[key] != after[key]
    ]
    return textwrap.wrap(
        ", ".join(changed) or "no setting changed",
        COLUMNS,
        initial_indent="    ",
        subsequent_indent="    ",
    )


if __name__ == "__main__":
    try:
        print("\n".join(lines(read_runs())))
    except BridgeError as error:
        sys.exit(str(error))
