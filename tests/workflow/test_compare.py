"""`make compare`: twenty experiments on a terminal of 80 columns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from shutil import copyfile
from typing import Any

from .conftest import HERE

sys.path.insert(0, str(HERE / "workflow/scripts"))
import compare


def entry(name: str | None, rev: str, recall: float, **train: Any) -> dict[str, Any]:
    """What ``dvc exp show --json`` says of a run."""
    settings = {"train": {"seed": 1, "network": {"filters": [8, 16]}, **train}}
    regression = {
        "dense_recall_snr_gt_7": recall,
        "recall_snr_gt_7": 0.8,
        "n_blobs_snr_gt_7": 160,
        "dense_false_alarms_per_100_frames": 4.545,
        "false_alarms_per_frame": 1.53,
    }
    data = {
        "params": {"params.yaml": {"data": settings}},
        "metrics": {
            "results/regression/metrics.json": {"data": regression},
            "results/train/metrics.json": {"data": {"seconds": 89.4}},
        },
    }
    return {"name": name, "rev": rev, "data": data, "experiments": None}


def printed(entries: list[dict[str, Any]], monkeypatch: Any) -> list[str]:
    monkeypatch.setattr(compare, "dvc", lambda *_: compare.json.dumps(entries))
    return list(compare.lines(compare.read_runs()))


def test_every_run_says_what_it_changed_and_what_came_of_it(monkeypatch: Any) -> None:
    base = entry("main", "a" * 40, 0.9625)
    changed = entry("loose-cane", "b" * 40, 0.5, seed=2, network={"filters": [8, 16, 32]})
    base["experiments"] = [{"revs": [changed, entry("older", "c" * 40, 0.1)]}]
    lines = printed([entry(None, "workspace", 1.0), base], monkeypatch)[3:]
    assert [line.split()[0] for line in lines] == [
        "workspace",
        "main",
        "loose-cane",
        "train.network.filters=[8,",
    ]
    # of 154 of 160, by Wilson's formula
    assert ".96 (.92-.98)" in lines[1]
    assert lines[1].split()[-4:] == ["4.5", "1.53", "-", "89"]
    assert ".50 (.42-.58)" in lines[2]
    assert lines[3].strip() == "train.network.filters=[8, 16, 32], train.seed=2"


def test_no_line_is_longer_than_a_terminal(monkeypatch: Any) -> None:
    base = entry("main", "a" * 40, 0.9)
    many = {f"setting_{number}": number / 7 for number in range(12)}
    base["experiments"] = [
        {"revs": [entry("x" * 60, f"{number:040}", 0.9, **many)]} for number in range(20)
    ]
    base["data"]["params"]["params.yaml"]["data"]["train"] |= dict.fromkeys(many, 0)
    lines = printed([base], monkeypatch)
    assert len(lines) > 40
    assert max(map(len, lines)) <= 80


def test_columns_stand_below_each_other_whatever_the_rate(monkeypatch: Any) -> None:
    runs = [entry("all", "a" * 40, 1.0), entry("none", "b" * 40, 0.0)]
    lines = printed(runs, monkeypatch)[3:]
    assert "1.00 (.98-1.00)" in lines[0]
    assert len({len(line) for line in lines}) == 1
    assert len({line.index(" 4.5 ") for line in lines}) == 1


def test_what_has_not_been_measured_is_a_dash(monkeypatch: Any) -> None:
    empty = {"name": None, "rev": "d" * 40, "data": None, "experiments": None}
    assert printed([empty], monkeypatch)[3].split() == ["ddddddd", *"------"]


def test_make_compare_builds_no_environment(tmp_path: Path) -> None:
    copyfile(HERE / "Makefile", tmp_path / "Makefile")
    command = ["make", "-n", "compare"]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "workflow/scripts/compare.py" in done.stdout
    assert "venv" not in done.stdout
