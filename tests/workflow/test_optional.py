"""What is optional runs when asked for, and leaves both tools with nothing to do."""

from __future__ import annotations

import csv
import os
import signal
import sqlite3
import time

import psutil
import pytest
import yaml

from .conftest import Project, kill


@pytest.mark.long
def test_explore_runs_on_request_alone(project: Project) -> None:
    before = project.made()
    assert project.planned() == set()
    project.run("snakemake", "--cores", "2", "explore")
    made = project.made()
    assert {path for path in made if path not in before} == {
        f"results/explore/{name}"
        for name in ("metrics.json", "scores.csv", "embedding.csv", "anomaly.png", "embedding.png")
    }
    assert {path: made[path] for path in before} == before
    assert project.is_at_rest()
    assert (
        project.run("git", "status", "--porcelain", "-uall") == "?? results/explore/metrics.json\n"
    )
    assert "Nothing to be done" in project.run("snakemake", "-n", "explore")
    project.set("explore", "seed", 2)
    assert project.is_at_rest()
    assert "Nothing to be done" not in project.run("snakemake", "-n", "explore")


@pytest.mark.long
def test_back_processing_runs_on_request_alone_and_keeps_its_log(project: Project) -> None:
    before = project.made()
    images = sorted((project.root / "data/raw").glob("*.fits.fz"))
    project.run("snakemake", "--cores", "2", "quicklook")
    assert project.made() == before
    assert project.is_at_rest()
    assert project.run("git", "status", "--porcelain", "-uall") == ""
    assert "Nothing to be done" in project.run("snakemake", "-n", "quicklook")
    with open(project.root / "quicklook/images.csv", newline="") as file:
        outcomes = {row["name"]: row["outcome"] for row in csv.DictReader(file)}
    assert set(outcomes) == {path.name.removesuffix(".fits.fz") for path in images}
    assert set(outcomes.values()) == {"stack", "searched"}
    log = sqlite3.connect(project.root / "quicklook/log.sqlite")
    log.execute(
        "INSERT INTO reviews (candidate, decision, reviewer, at) VALUES (1, 'confirmed', 'Ada', 'today')"
    )
    log.commit()
    project.run("snakemake", "--cores", "2", "--force", "quicklook")
    assert log.execute("SELECT count(*) FROM images").fetchone()[0] == len(images)
    assert log.execute("SELECT count(*) FROM reviews").fetchone()[0] == 1


@pytest.mark.long
def test_an_archive_is_back_processed_in_batches_and_a_killed_one_goes_on(project: Project) -> None:
    """One batch after the other, each in order of date; what was searched before the kill is not searched again."""
    code = project.root / "src/blobpipe/core/tables.py"
    assert "\nBATCH = 64\n" in code.read_text()
    code.write_text(code.read_text().replace("\nBATCH = 64\n", "\nBATCH = 4\n"))
    command = (
        *("snakemake", "--cores", "2", "--allowed-rules", "quicklook", "quicklook_batch"),
        *("--", "quicklook"),
    )
    process = project.start(*command)
    project.wait_for("quicklook/batches/001.done", process)
    log = sqlite3.connect(project.root / "quicklook/log.sqlite")
    while (n_logged := log.execute("SELECT count(*) FROM images").fetchone()[0]) < 10:
        assert process.poll() is None
        time.sleep(0.05)
    kill(process)
    project.run(*command)
    names = sorted(path.name for path in (project.root / "data/raw").glob("*.fits.fz"))
    rows = log.execute("SELECT name || '.fits.fz', run FROM images ORDER BY id").fetchall()
    assert [name for name, _ in rows] == names
    assert n_logged < len(names)
    assert [run for _, run in rows] == sorted(run for _, run in rows)
    done = sorted((project.root / "quicklook/batches").iterdir())
    assert [path.name for path in done] == [f"{batch:03d}.done" for batch in range(4)]
    assert log.execute("SELECT count(*) FROM runs").fetchone()[0] == 5


SEARCHED = (
    *("trials.csv", "best.yaml", "metrics.json"),
    *(f"{name}.png" for name in ("history", "importance", "parallel", "cost")),
)


def points(project: Project) -> list[dict[str, str]]:
    """The table of a search without its times."""
    with open(project.root / "results/search/trials.csv", newline="") as file:
        return [{**row, "seconds": ""} for row in csv.DictReader(file)]


@pytest.mark.long
def test_a_search_survives_a_killed_worker_and_is_versioned_on_request_alone(
    project: Project,
) -> None:
    """Two workers, one of them killed in the middle: the same points as one worker alone."""
    project.set("search", "prune", False)
    before = project.made()
    run = project.start("snakemake", "--cores", "2", "search")
    journal = project.root / "results/search/journal.log"
    project.wait_for("results/search/journal.log", run)
    while journal.read_text().count('"worker"') < 3:
        assert run.poll() is None
    [worker, *_] = [
        process
        for process in psutil.process_iter(["cmdline"])
        if (process.info["cmdline"] or [])[-2:] == ["--worker", "2"]
        and process.cwd() == str(project.root)
    ]
    os.kill(worker.pid, signal.SIGKILL)
    run.communicate()
    assert run.returncode != 0
    project.run("snakemake", "--cores", "2", "search")
    found = points(project)
    assert [row["trial"] for row in found] == [str(number) for number in range(12)]
    assert {row["state"] for row in found} == {"done"}
    assert set(SEARCHED) <= {path.name for path in journal.parent.iterdir()}

    # the rest of the project is as it was, and the results are in DVC's cache
    assert {path: project.made()[path] for path in before} == before
    assert project.is_at_rest()
    pointer = yaml.safe_load((project.root / "results/search.dvc").read_text())
    assert pointer["outs"][0]["nfiles"] == len(SEARCHED)
    assert project.run("git", "status", "--porcelain", "-uall").split("\n") == [
        " M params.yaml",
        "?? results/search.dvc",
        "",
    ]

    # another number of workers finds the same
    journal.unlink()
    project.set("search", "n_workers", 1)
    project.run("snakemake", "--cores", "2", "search")
    assert points(project) == found
