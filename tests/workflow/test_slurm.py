"""What the workflow says of jobs on SLURM, with stand-ins for SLURM's commands; test_cluster.py has a real one."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from .conftest import HERE, Project

sys.path.insert(0, str(HERE / "workflow/scripts"))
import run_lock
import slurm
from failures import Failures


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project folder, with a folder of commands before all others."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return tmp_path


def stand_in(here: Path, command: str, *lines: str, status: int = 0) -> None:
    """A command that prints some lines."""
    path = here / "bin" / command
    path.write_text(
        "\n".join(["#!/bin/sh", *(f"echo '{line}'" for line in lines), f"exit {status}\n"])
    )
    path.chmod(0o755)


def job(name: str, runtime: int, **resources: Any) -> Any:
    """As far as is needed, a job of Snakemake."""
    return SimpleNamespace(name=name, resources={"runtime": runtime, **resources})


# ---------------------------------------------------------------- jobs that can never start


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("5:00", 5),
        ("30", 0.5),
        ("1:00:00", 60),
        ("1-00:00:00", 1440),
        ("7-12:30:00", 7 * 1440 + 750),
        ("infinite", float("inf")),
        ("n/a", float("inf")),
    ],
)
def test_times_are_read_as_slurm_prints_them(time: str, expected: float) -> None:
    assert slurm.minutes(time) == expected


def test_a_job_that_would_wait_for_ever_is_refused(here: Path) -> None:
    stand_in(here, "sinfo", "long|2-00:00:00", "main*|1:00:00", "short|5:00")
    slurm.refuse_endless_waits([job("clip", 60), job("train", 600, slurm_partition="long")])
    slurm.refuse_endless_waits([job("train", 600, slurm_partition="short,long")])
    slurm.refuse_endless_waits([job("train", 600, qos="patient")])
    slurm.refuse_endless_waits([job("train", 600, slurm_partition="elsewhere")])
    with pytest.raises(slurm.SlurmError, match="train: asks for 600 min, partition main gives 60"):
        slurm.refuse_endless_waits([job("clip", 60), job("train", 600)])


def test_reasons_that_may_not_pass_are_told_once(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "FIRST_LOOK_S", 0.01)
    monkeypatch.setattr(slurm, "LOOK_S", 0.01)
    stand_in(
        here,
        "squeue",
        f"7|PENDING|QOSMaxCpuPerJobLimit|rule_train|{here}",
        f"8|PENDING|Resources|rule_dense|{here}",
        f"9|RUNNING|None|rule_detect|{here}",
        "10|PENDING|QOSMaxCpuPerJobLimit|rule_train|/elsewhere",
    )
    told: list[str] = []
    slurm.tell_reasons(told.append).join(1)
    assert told == ["train: job 7 of SLURM does not start: QOSMaxCpuPerJobLimit"]


# ---------------------------------------------------------------- jobs that outlive their run


def left_by(here: Path, **more: str) -> None:
    """A lock of Snakemake, and the note of a process that is gone."""
    (here / ".snakemake/locks").mkdir(parents=True)
    (here / ".snakemake/locks/0.output.lock").touch()
    owner = {"pid": 2**22 + 1, "started": 0.0, "command": "snakemake", "host": "elsewhere"}
    (here / ".snakemake/blobpipe").mkdir()
    (here / ".snakemake/blobpipe/owner.json").write_text(
        json.dumps([{**owner, "host": run_lock.platform.node(), **more}])
    )


def test_jobs_of_a_killed_run_are_recognised_from_any_machine(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "_unlock", lambda: None)
    left_by(here, executor="slurm")
    stand_in(
        here,
        "squeue",
        f"12|RUNNING|None|rule_difference_wildcards_003|{here}",
        f"13|PENDING|Resources|rule_train|{here}/",
        "14|RUNNING|None|rule_train|/elsewhere",
    )
    for start in (run_lock.claim, run_lock.unlock):
        with pytest.raises(run_lock.BusyError, match="'scancel 12 13'"):
            start()
    stand_in(here, "squeue")
    run_lock.claim()
    assert "executor" not in run_lock.owners()[0]


def test_a_person_decides_where_slurm_cannot_be_asked(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "_unlock", lambda: None)
    left_by(here, executor="slurm")
    stand_in(here, "squeue", status=1)
    with pytest.raises(run_lock.BusyError, match="'make unlock' if they are"):
        run_lock.claim()
    run_lock.unlock()
    run_lock.claim()


def test_slurm_is_not_asked_about_jobs_that_ran_elsewhere(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "_unlock", lambda: None)
    left_by(here, executor="local")
    stand_in(here, "squeue", f"12|RUNNING|None|rule_train|{here}")
    run_lock.claim()


# ---------------------------------------------------------------- failures


def said(tmp_path: Path, **record: Any) -> list[str]:
    """What is printed of a failed job."""
    logger = logging.getLogger("tests.failures")
    logger.propagate = False
    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if not hasattr(record, "event"):
                lines.extend(record.getMessage().splitlines())

    logger.handlers = [Failures(logger), Kept()]
    for path in (tmp_path / "new.log", tmp_path / "slurm.log"):
        path.write_text("".join(f"line {number} of {path.stem}\n" for number in range(100)))
    logger.error("Error in rule clip, jobid: 3", extra=record)
    return lines


def test_rule_log_and_message_of_a_failed_job_are_shown(tmp_path: Path) -> None:
    old = tmp_path / "old.log"
    old.write_text("of another run\n")
    os.utime(old, (1, 1))
    lines = said(
        tmp_path,
        event="job_error",
        rule_name="clip",
        rule_msg="SLURM-job '7' failed, SLURM status is: 'TIMEOUT'. For further error details see the cluster/cloud log "
        "and the log files of the involved rule(s).",
        log=[str(old), str(tmp_path / "new.log"), str(tmp_path / "slurm.log"), None],
    )
    assert lines[0] == "Error in rule clip: SLURM-job '7' failed, SLURM status is: 'TIMEOUT'."
    assert [line.split()[-1] for line in lines if "log: " in line] == [
        str(tmp_path / f"{name}.log") for name in ("old", "new", "slurm")
    ]
    assert lines[3].strip() == "line 80 of new"
    assert len(lines) == 4 + 20


def test_the_last_log_of_a_group_says_what_failed(tmp_path: Path) -> None:
    jobs = [
        {"rule_name": "difference", "log": [str(tmp_path / "new.log")]},
        {"rule_name": "clip", "log": [str(tmp_path / "slurm.log")]},
        {"rule_name": "scale", "log": [str(tmp_path / "missing.log")]},
    ]
    lines = said(tmp_path, event="group_error", job_error_info=jobs, aux_logs=[])
    assert lines[0] == "Error in one of the rules difference, clip, scale"
    assert lines[2].endswith("slurm.log")
    assert lines[3].strip() == "line 80 of slurm"
    assert said(tmp_path, event="job_error", indent=True, rule_name="clip", log=[]) == []


def test_a_failing_job_is_told_in_a_few_lines(project: Project) -> None:
    """The profile spares the reader the lists of images, and hid failures with them."""
    project.run("dvc", "remove", "campaign")
    blobs = project.root / "data/raw/blobs.csv"
    blobs.unlink()
    blobs.write_text("blob,x_px\n1,2\n")
    lines = project.fails("snakemake", "--cores", "1", "reference").splitlines()
    start = lines.index("Error in rule reference")
    assert lines[start + 1] == "    log: logs/reference.log"
    assert "blobs.csv: column y_px is missing" in lines[start + 2]
