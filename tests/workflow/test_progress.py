"""The screen of a run: a line for each job that starts, and nothing that only Snakemake's own log needs."""

from __future__ import annotations

import logging
import re
import sys
from typing import Any

import pytest

from .conftest import HERE, Project

sys.path.insert(0, str(HERE / "workflow/scripts"))
from progress import Progress, Screen


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Log records as Snakemake does, and return what a screen shows of them."""
    monkeypatch.setattr("progress.time.strftime", lambda _: "12:00:00")

    def run(
        *records: tuple[str | None, dict[str, Any]],
        remote: bool = False,
        dry: bool = False,
        inner: bool = False,
    ) -> list[str]:
        logger = logging.getLogger("tests.progress")
        logger.propagate = False
        logger.setLevel(logging.INFO)
        lines: list[str] = []

        class Stream(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                lines.append(record.getMessage())

        stream = Stream()
        stream.addFilter(Screen(dry=dry, inner=inner))
        logger.handlers = [] if dry else [Progress(logger, lambda: remote)]
        logger.addHandler(stream)
        for message, extra in records:
            logger.info(message, extra=extra)
        return lines

    return run


def table(total: int) -> tuple[str, dict[str, Any]]:
    """The table of jobs, before a run."""
    return "Job stats:\njob  count", {"event": "run_info", "stats": {"total": total}}


def starts(number: int, rule: str, **wildcards: str) -> Any:
    """A job that starts."""
    about = {"jobid": number, "rule_name": rule, "wildcards": wildcards}
    return f" Rule: {rule}", {"event": "job_info", **about}


def ends(number: int, done: int, total: int) -> list[Any]:
    """A job that has ended, and how many are done."""
    finished = f"Finished jobid: {number}", {"event": "job_finished", "job_id": number}
    return [finished, (None, {"event": "progress", "done": done, "total": total})]


def test_each_job_has_one_line_when_it_starts(shown: Any) -> None:
    lines = shown(
        ("Using shell: /usr/bin/bash", {}),
        ("Provided cores: 2", {"event": "resources_info"}),
        table(12),
        ("Select jobs to execute...", {}),
        ("Execute 2 jobs...", {"event": "job_started", "jobs": [1, 2]}),
        starts(1, "train"),
        starts(2, "detect_batch", batch="7"),
        *ends(1, 1, 12),
        # commits to DVC count, and are not announced
        starts(3, "dvc_train"),
        *ends(3, 2, 12),
        starts(4, "evaluate"),
        *ends(4, 12, 12),
    )
    assert lines == [
        "12:00:00 [ 0/12 done] train",
        "12:00:00 [ 0/12 done] detect_batch 7",
        "12:00:00 [ 2/12 done] evaluate",
        "12:00:00 [12/12 done]",
    ]


def test_a_job_elsewhere_is_told_when_it_ends_too(shown: Any) -> None:
    lines = shown(table(3), starts(1, "clip", batch="0"), *ends(1, 1, 3), remote=True)
    assert lines == ["12:00:00 [0/3 done] clip 0", "12:00:00 [1/3 done] clip 0 has ended"]


def test_a_dry_run_shows_its_table_once_and_points_at_nothing(shown: Any) -> None:
    reasons = "Reasons:\n    (check individual jobs above for details)\n    params have changed:\n        train"
    provenance = "Some jobs were triggered by provenance information, see 'reason' ..."
    lines = shown(table(9), starts(1, "train"), table(9), (reasons, {}), (provenance, {}), dry=True)
    assert lines[0].startswith("Job stats:")
    assert lines[-1] == "Reasons:\n    params have changed:\n        train"
    assert sum("Job stats" in line for line in lines) == 1
    assert len(lines) == 2


def test_warnings_errors_and_what_the_project_says_are_shown(shown: Any) -> None:
    said = ["taken over from DVC: train", "Error in rule train", "Nothing to be done"]
    assert shown(*((line, {}) for line in said), inner=True) == said
    assert shown(("Elapsed time: 0:04:32", {})) == ["Elapsed time: 0:04:32"]
    assert shown(("Elapsed time: 0:04:32", {}), inner=True) == []


def test_a_run_is_one_line_a_job_and_a_dry_run_one_table(project: Project) -> None:
    project.set("regression", "n_gallery", 3)
    planned = project.run("snakemake", "-n")
    assert planned.count("Job stats:") == 1
    assert "params have changed since last execution:\n        regression" in planned
    assert "above" not in planned
    printed = project.run("snakemake", "--cores", "1")
    steps = re.findall(r"^\d\d:\d\d:\d\d \[.*\].*$", printed, re.MULTILINE)
    assert [line.split("] ")[1] for line in steps[:-1]] == ["regression"]
    assert re.fullmatch(r".*\[(\d+)/\1 done\]", steps[-1])
    assert not re.search("Select jobs|Finished jobid|Execute|Using shell|Job stats", printed)
    # Snakemake's own log keeps everything
    log = max((project.root / ".snakemake/log").glob("*.log"))
    assert "Job stats:" in log.read_text()
