"""What is optional runs when asked for, and leaves both tools with nothing to do."""

from __future__ import annotations

import csv
import sqlite3

import pytest

from .conftest import Project


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
    assert log.execute("SELECT count(*) FROM runs").fetchone()[0] == 2
    assert log.execute("SELECT count(*) FROM reviews").fetchone()[0] == 1
