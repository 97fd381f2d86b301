"""Whole runs on a real SLURM of one node, and DVC with a real S3 server, where this machine has them.

On Debian: `apt-get install slurm-wlm munge` and `pip install -c constraints.txt -e .[slurm,s3] moto[server]`.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from . import cluster
from .conftest import Project, environment, kill

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.xdist_group("cluster")]

# Looks at the queue more often than a shared cluster would like
ON_SLURM = ("--profile", "profiles/slurm", "--slurm-init-seconds-before-status-checks", "5")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a SLURM of one node."""
    if absent := cluster.missing():
        pytest.skip(f"no SLURM: {absent} is not installed")
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        pytest.skip("no snakemake-executor-plugin-slurm: pip install -e .[slurm]")
    with cluster.one_node(tmp_path_factory.mktemp("slurm")) as env:
        yield env


def jobs(slurm: dict[str, str], *options: str) -> list[str]:
    """The numbers of the jobs in the queue."""
    return _ask(slurm, "squeue", "--noheader", "--format=%i", *options).split()


def _ask(slurm: dict[str, str], *words: str) -> str:
    return subprocess.run(
        words, env={**environment(), **slurm}, check=True, capture_output=True, text=True
    ).stdout


def wait_for_job(slurm: dict[str, str], rule: str, process: subprocess.Popen[str]) -> str:
    """Wait until the job of a rule runs; its number."""
    while True:
        assert process.poll() is None, f"ended before {rule}:\n{process.communicate()[0]}"
        for line in _ask(
            slurm, "squeue", "--noheader", "--states=R", "--format=%i|%k"
        ).splitlines():
            number, _, comment = line.partition("|")
            if comment == f"rule_{rule}":
                return number
        time.sleep(0.1)


def test_a_whole_run_with_kills_ends_as_a_local_one(
    finished: Project,
    pristine: Project,
    copy_of: Callable[[Project], Project],
    slurm: dict[str, str],
) -> None:
    """From nothing, typed where there is one core: the run is killed and leaves a job behind; then a job is killed."""
    project = copy_of(pristine)
    process = project.start("taskset", "--cpu-list", "0", "snakemake", *ON_SLURM, **slurm)
    project.wait_for("results/train/checkpoint/*", process)
    assert "2" in _ask(slurm, "squeue", "--noheader", "--states=R", "--format=%C").split()
    kill(process)
    left = jobs(slurm)
    assert left

    # A second writer is refused, from wherever it is started, and so is a careless `make unlock`
    for command in (("snakemake", *ON_SLURM), ("python", "workflow/scripts/run_lock.py")):
        printed = project.fails(*command, **slurm)
        assert f"'scancel {' '.join(left)}'" in printed
        assert "Traceback" not in printed
    _ask(slurm, "scancel", *left)
    while jobs(slurm):
        time.sleep(0.1)

    process = project.start("snakemake", *ON_SLURM, **slurm)
    _ask(slurm, "scancel", wait_for_job(slurm, "detect", process))
    printed, _ = process.communicate()
    assert process.returncode != 0
    assert "Error in rule detect: SLURM-job" in printed
    assert "SLURM status is: 'CANCELLED'" in printed
    assert "log: logs/detect.log" in printed

    project.run("snakemake", *ON_SLURM, **slurm)
    assert project.made() == finished.made()
    assert project.is_at_rest()


def test_what_jobs_finish_after_their_run_was_killed_is_kept(
    pristine: Project, copy_of: Callable[[Project], Project], slurm: dict[str, str]
) -> None:
    """Nobody has ended them, and nothing has changed since; from then on there is a record of their settings."""
    project = copy_of(pristine)
    process = project.start("snakemake", *ON_SLURM, "stage_scale", **slurm)
    project.wait_for("data/difference/frames-000.csv", process)
    kill(process)
    while jobs(slurm):
        time.sleep(0.1)
    assert (project.root / "data/scale/frames-000.csv").exists()
    made = project.made()
    assert "difference" not in project.planned()
    printed = project.run("snakemake", "--cores", "1", "stage_scale", **slurm)
    assert "finished by jobs of the run that was killed, kept: difference, clip, scale" in printed
    assert project.made() == made
    project.set("clip", "factor", 0.6)
    assert {"clip", "scale"} <= project.planned_stages()
    assert "difference" not in project.planned_stages()


def test_a_failing_job_says_why(project: Project, slurm: dict[str, str]) -> None:
    project.run("dvc", "remove", "campaign")
    blobs = project.root / "data/raw/blobs.csv"
    blobs.unlink()
    blobs.write_text("blob,x_px\n1,2\n")
    printed = project.fails("snakemake", *ON_SLURM, "reference", **slurm)
    said = printed[printed.index("Error in rule reference") :].splitlines()
    assert "SLURM status is: 'FAILED'" in said[0]
    assert said[1] == "    log: logs/reference.log"
    assert "blobs.csv: column y_px is missing" in said[2]
    assert jobs(slurm) == []


def test_a_job_that_would_wait_for_ever_is_not_submitted(
    pristine: Project, copy_of: Callable[[Project], Project], slurm: dict[str, str]
) -> None:
    project = copy_of(pristine)
    short = ("--default-resources", "slurm_partition=short")
    printed = project.fails("snakemake", *ON_SLURM, *short, **slurm)
    assert "partition short gives 5 at most, so it would wait for ever" in printed
    assert "Traceback" not in printed
    assert jobs(slurm) == []
    assert not (project.root / "data/raw").exists()


def test_dvc_runs_its_stages_on_slurm(project: Project, slurm: dict[str, str]) -> None:
    project.set("clip", "factor", 0.6)
    env = {**slurm, "SNAKEMAKE_PROFILE": "profiles/slurm"}
    printed = project.run("dvc", "repro", "--single-item", "clip", **env)
    assert "has been submitted with SLURM jobid" in printed
    assert "clip" not in project.planned_stages()


# ---------------------------------------------------------------- S3


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The address of an S3 server on this machine, and a login."""
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("dvc_s3") is None:
        pytest.skip("no S3 server: pip install moto[server] and -e .[s3]")
    [port] = cluster.free_ports(1)
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(300):
            try:
                request = urllib.request.Request(f"{url}/blobs", method="PUT")
                urllib.request.urlopen(request).close()
                break
            except OSError:
                time.sleep(0.1)
        yield {
            "url": url,
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": "tests",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.terminate()
        server.wait(30)


def test_what_was_pushed_to_s3_is_whole_in_a_clone(
    project: Project, tmp_path: Path, s3: dict[str, str]
) -> None:
    login = {name: value for name, value in s3.items() if name != "url"}
    project.run("dvc", "remote", "add", "--default", "store", "s3://blobs/dvc")
    project.run("dvc", "remote", "modify", "store", "endpointurl", s3["url"])
    project.commit("a remote")
    project.run("dvc", "push", **login)
    project.run("git", "clone", "--quiet", ".", str(tmp_path / "clone"))
    clone = Project(tmp_path / "clone")
    assert not (clone.root / "data/raw").exists()
    clone.run("dvc", "pull", **login)
    assert clone.made() == project.made()
    assert clone.is_at_rest()
    shutil.rmtree(clone.root / ".dvc/cache")
    clone.run("dvc", "fetch", **login)
    assert "up to date" in clone.run("dvc", "status")
