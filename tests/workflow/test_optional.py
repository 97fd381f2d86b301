"""The optional stage runs when asked for, and leaves both tools with nothing to do."""

from __future__ import annotations

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
    assert project.run("git", "status", "--porcelain", "-uall") == "?? results/explore/metrics.json\n"
    assert "Nothing to be done" in project.run("snakemake", "-n", "explore")
    project.set("explore", "seed", 2)
    assert project.is_at_rest()
    assert "Nothing to be done" not in project.run("snakemake", "-n", "explore")
