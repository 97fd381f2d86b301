"""Killed runs, runs of both tools at once, and failures: nothing is lost, nothing half made is taken for whole."""

from __future__ import annotations

import json
import os
import platform
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from .conftest import Project, kill

STAGES = (
    "campaign",
    "difference",
    "clip",
    "scale",
    "cutout",
    "augment",
    "train",
    "dense",
    "detect",
    "evaluate",
    "regression",
    "completeness",
)


@pytest.mark.long
def test_killed_in_every_stage_snakemake_ends_as_if_undisturbed(
    finished: Project, pristine: Project, copy_of: Callable[[Project], Project]
) -> None:
    """On one core, where the undisturbed run had two: no result may depend on that either."""
    project = copy_of(pristine)
    for stage in STAGES:
        process = project.start("snakemake", "--cores", "1")
        project.wait_for(f"logs/{stage}*.log", process)
        time.sleep(0.7)
        kill(process)
    project.run("snakemake", "--cores", "1")
    assert project.made() == finished.made()
    assert project.is_at_rest()


@pytest.mark.long
def test_interrupted_in_a_fresh_clone_loses_at_most_a_batch(
    project: Project, tmp_path: Path
) -> None:
    """dvc.lock lists the files of other settings, and nothing has been committed here when the run is cut off."""
    project.run("git", "clone", "--quiet", ".", str(tmp_path / "clone"))
    clone = Project(tmp_path / "clone")
    code = clone.root / "src/blobpipe/core/tables.py"
    assert "\nBATCH = 64\n" in code.read_text()
    code.write_text(code.read_text().replace("\nBATCH = 64\n", "\nBATCH = 2\n"))
    clone.set("campaign", "n_known", 20)
    # a shell's background jobs ignore it, and what they start
    signal.signal(signal.SIGINT, signal.default_int_handler)
    draw = random.Random(18)
    finished: dict[Path, int] = {}
    for end in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
        before = finished
        process = clone.start("snakemake", "--cores", "1", "stage_scale")
        wanted = len(before) + draw.randrange(2, 6)
        while len(finished) < wanted:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(draw.uniform(0.02, 0.4))
            finished = _batches(clone)
        os.killpg(process.pid, end)
        process.communicate()
        finished = _batches(clone)
        assert sum(finished.get(path) != time_ns for path, time_ns in before.items()) <= 1
        left = clone.planned_stages() - {"stage_scale"}
        assert "campaign" not in left
        assert _batches(clone) == finished
    clone.run("snakemake", "--cores", "1", "stage_scale")
    whole = _batches(clone)
    assert len(whole) == 3 * 8
    assert sum(whole[path] != time_ns for path, time_ns in finished.items()) <= 1


def _batches(project: Project) -> dict[Path, int]:
    """When each batch of the image stages was finished."""
    return {
        path: path.stat().st_mtime_ns for path in (project.root / "data").glob("*/frames-*.csv")
    }


@pytest.mark.long
def test_killed_dvc_ends_as_if_undisturbed(project: Project) -> None:
    project.set("train", "seed", 2)
    process = project.start("dvc", "repro", "--single-item", "train")
    project.wait_for("results/train/checkpoint/*", process)
    kill(process)
    project.run("dvc", "repro", "--single-item", "train")
    resumed = project.made()
    project.run("dvc", "repro", "--force", "--single-item", "train")
    assert project.made() == resumed


@pytest.mark.long
def test_dvc_waits_for_snakemake(project: Project) -> None:
    """Also a second Snakemake, even a dry one: what it would say would be true for a moment only."""
    first = _start_regression(project, "snakemake", "--cores", "2")
    assert "is busy, it is being blocked by:" in project.fails("dvc", "repro")
    assert "is working in this folder: wait until it ends" in project.fails("snakemake", "-n")
    printed, _ = first.communicate()
    assert first.returncode == 0, printed
    assert project.is_at_rest()


@pytest.mark.long
def test_snakemake_waits_for_dvc(project: Project) -> None:
    first = _start_regression(project, "dvc", "repro")
    assert "is working in this folder: wait until it ends" in project.fails(
        "snakemake", "--cores", "2"
    )
    printed, _ = first.communicate()
    assert first.returncode == 0, printed
    assert project.is_at_rest()


def _start_regression(project: Project, *command: str) -> subprocess.Popen[str]:
    """Start a run that has the last stage alone to do, and wait until that is at work."""
    begun = (project.root / "logs/regression.log").stat().st_mtime
    project.set("regression", "threshold", 0.4)
    process = project.start(*command)
    project.wait_for("logs/regression.log", process, newer_than=begun)
    return process


def test_a_stale_lock_is_cleared(project: Project) -> None:
    """Snakemake's lock names no process; the owner's note does."""
    lock = project.root / ".snakemake/locks/0.output.lock"
    lock.parent.mkdir(exist_ok=True)
    lock.write_text("results/train/model.safetensors\n")
    project.run("snakemake", "--cores", "2")
    assert not lock.exists()


def test_a_killed_run_that_nobody_waited_for_is_over(project: Project) -> None:
    """Where no init process collects them (many containers), the dead stay in the process table."""
    process = project.start("true")
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    started = psutil.Process(process.pid).create_time()
    owner = {
        "pid": process.pid,
        "started": started,
        "command": "snakemake",
        "host": platform.node(),
    }
    (project.root / ".snakemake/blobpipe/owner.json").write_text(json.dumps([owner]))
    assert "Nothing to be done" in project.run("snakemake", "-n")
    process.communicate()


def test_a_bad_image_list_is_one_line(project: Project) -> None:
    project.run("dvc", "remove", "campaign")
    (project.root / "data/raw/frames.csv").write_text("image,mjd\na,1\n")
    printed = project.fails("snakemake", "-n")
    assert "Traceback" not in printed
    assert sum("column frame is missing" in line for line in printed.splitlines()) == 1


def test_a_failing_stage_says_why_and_leaves_nothing(project: Project) -> None:
    blobs = project.root / "data/raw/blobs.csv"
    project.run("dvc", "remove", "campaign")
    blobs.unlink()
    blobs.write_text("blob,x_px\n1,2\n")
    printed = project.fails("snakemake", "--cores", "2")
    assert "blobs.csv: column y_px is missing" in printed
    assert "blobs.csv: column y_px is missing" in (project.root / "logs/reference.log").read_text()
    assert not (project.root / "data/difference/reference.fits.fz").exists()
