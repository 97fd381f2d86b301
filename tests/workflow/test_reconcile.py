"""Which files are made anew before a run, in a made-up folder; test_two_tools.py has whole projects."""

from __future__ import annotations

import json
import os
import sys
from base64 import urlsafe_b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import HERE, Project

sys.path.insert(0, str(HERE / "workflow/scripts"))
import reconcile
import records
import stages

TABLES = [f"data/clip/frames-{batch:03d}.csv" for batch in range(3)]
SEEN, REPLACED, UNSEEN = TABLES

CHANGED_SETTINGS = [{"changed deps": {"params.yaml": {"clip": "modified"}}}]
EDITED = [{"changed outs": {"data/clip": "modified"}}]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """In the folder of a run that was killed: what Snakemake is asked to do.

    Of three batches the run saw one end. The second was made again, and the third made, by jobs that ended unseen.
    """
    monkeypatch.chdir(tmp_path)
    stage = stages._stage("clip", {"cmd": "snakemake", "outs": ["data/clip"]})
    monkeypatch.setattr(reconcile, "stages", lambda: {"clip": stage})
    Path("data/clip").mkdir(parents=True)
    Path(".snakemake/metadata").mkdir(parents=True)
    Path(records.NOTES).mkdir()
    for number, path in enumerate(TABLES):
        Path(path).write_text("frame\n")
        os.utime(path, (1000 + number, 1000 + number))
    for path in (SEEN, REPLACED):
        name = urlsafe_b64encode(path.encode()).decode()
        Path(".snakemake/metadata", name).write_text(json.dumps({"endtime": 1000.0}))
    calls: list[tuple[str, ...]] = []

    def snakemake(*words: str) -> Any:
        calls.append(words)
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(reconcile, "snakemake", snakemake)
    return calls


def committed(monkeypatch: pytest.MonkeyPatch, status: list[Any], *, here: bool) -> None:
    """An entry in dvc.lock, known to Snakemake if it was made here, and what `dvc status` says of the stage."""
    records.LOCK.write_text(yaml.safe_dump({"stages": {"clip": {"cmd": "snakemake", "outs": []}}}))
    monkeypatch.setattr(reconcile, "dvc", lambda *_: json.dumps({"clip": status} if status else {}))
    if here:
        records.replace(
            records.NOTES / "clip.json",
            json.dumps({"version": records.versions()["clip"], "files": "as they were"}),
        )


def aged() -> list[str]:
    """The tables that Snakemake will make anew."""
    return [path for path in TABLES if Path(path).stat().st_mtime == 1]


def test_what_nobody_vouches_for_is_made_anew(
    asked: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    reconcile.reconcile({"clip": TABLES})
    assert aged() == [REPLACED, UNSEEN]
    assert asked == [("--cleanup-metadata", REPLACED, UNSEEN)]
    assert capsys.readouterr().err == f"{reconcile.NO_RECORD}: clip\n"


@pytest.mark.parametrize("here", [True, False], ids=["here", "elsewhere"])
def test_nor_is_it_kept_for_an_entry_of_other_settings(
    here: bool, asked: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    committed(monkeypatch, CHANGED_SETTINGS, here=here)
    reconcile.reconcile({"clip": TABLES})
    assert aged() == [REPLACED, UNSEEN]
    assert asked == [("--cleanup-metadata", REPLACED, UNSEEN)]


@pytest.mark.parametrize("here", [True, False], ids=["here", "elsewhere"])
def test_what_is_as_committed_is_kept_without_a_record(
    here: bool, asked: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `dvc checkout` here, or `dvc pull` in a clone, which is adopted."""
    committed(monkeypatch, [], here=here)
    reconcile.reconcile({"clip": TABLES})
    assert aged() == []
    assert [words[0] for words in asked] == ([] if here else ["--touch"])
    assert records.known("clip")["files"] == records.look(["data/clip"])


def test_what_was_edited_by_hand_is_left_to_its_commit(
    asked: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    committed(monkeypatch, EDITED, here=True)
    reconcile.reconcile({"clip": TABLES})
    assert aged() == []
    assert asked == []


@pytest.mark.long
def test_images_without_a_record_are_simulated_again(
    pristine: Project, copy_of: Callable[[Project], Project]
) -> None:
    """A dry run says so, and changes nothing."""
    project = copy_of(pristine)
    project.run("snakemake", "--cores", "1", "stage_campaign")
    assert "campaign" not in project.planned()
    for record in (project.root / ".snakemake/metadata").iterdir():
        record.unlink()
    project.set("campaign", "n_known", 20)
    assert "campaign" in project.planned()
