"""Which files are made anew before a run, in a made-up folder; test_two_tools.py has whole projects."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
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
import run_lock
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
        record("metadata", path, {"endtime": 1000.0})
    calls: list[tuple[str, ...]] = []

    def snakemake(*words: str) -> Any:
        calls.append(words)
        if words[0] == "--touch":
            for path in words[words.index("--") + 1 :]:
                if path in TABLES:
                    record("metadata", path, {"endtime": Path(path).stat().st_mtime})
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(reconcile, "snakemake", snakemake)
    return calls


def record(kind: str, path: str, content: dict[str, Any]) -> None:
    """Write one of Snakemake's own records."""
    name = urlsafe_b64encode(path.encode()).decode()
    Path(".snakemake", kind).mkdir(exist_ok=True)
    Path(".snakemake", kind, name).write_text(json.dumps(content))


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
    """After an experiment and `dvc checkout` here, or `dvc pull` in a clone: adopted."""
    committed(monkeypatch, [], here=here)
    reconcile.reconcile({"clip": TABLES})
    assert aged() == []
    assert [words[0] for words in asked] == ["--touch"]
    assert records.known("clip")["files"] == records.look(["data/clip"])


def test_what_was_edited_by_hand_is_left_to_its_commit(
    asked: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    committed(monkeypatch, EDITED, here=True)
    reconcile.reconcile({"clip": TABLES})
    assert aged() == []
    assert asked == []


def killed_on_slurm(begun: float) -> None:
    """Leave what a run leaves that had its jobs on SLURM and was killed: it began at a time, with settings of its own."""
    Path("params.yaml").write_text("clip: {}\n")
    run_lock.OWNER.write_text(json.dumps([{"executor": "slurm"}]))
    os.utime(run_lock.OWNER, (begun, begun))
    run_lock.SNAKEMAKE_LOCKS.mkdir()
    (run_lock.SNAKEMAKE_LOCKS / "0.output.lock").touch()


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of DVC."""
    monkeypatch.setattr(records, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def test_what_jobs_have_finished_after_their_run_was_killed_is_kept(
    asked: list[tuple[str, ...]], no_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = time.time() + 10
    killed_on_slurm(begun)
    for path in (REPLACED, UNSEEN):
        os.utime(path, (begun + 5, begun + 5))
    reconcile.reconcile({"clip": TABLES}, reconcile.begun_unchanged(["params.yaml"]))
    assert aged() == []
    assert [words[0] for words in asked] == ["--touch"]
    assert asked[0][-3:] == ("--", REPLACED, UNSEEN)
    assert capsys.readouterr().err == "finished by jobs of the run that was killed, kept: clip\n"


def test_a_link_of_a_plan_is_known_by_its_own_date(asked: list[tuple[str, ...]]) -> None:
    """A dry run adopts what it finds in its stand-in, where each file is a link."""
    link = Path("data/clip/frames-009.csv")
    link.symlink_to(Path(UNSEEN).absolute())
    os.utime(link, (3000, 3000), follow_symlinks=False)
    record("metadata", str(link), {"endtime": 3000.0})
    assert records.made_here(str(link))
    record("metadata", str(link), {"endtime": Path(UNSEEN).stat().st_mtime})
    assert not records.made_here(str(link))


def changed_settings(no_cache: Path) -> None:
    os.utime(run_lock.OWNER, (time.time() - 10, time.time() - 10))


def ended_well(no_cache: Path) -> None:
    (run_lock.SNAKEMAKE_LOCKS / "0.output.lock").unlink()


def ran_here(no_cache: Path) -> None:
    begun = run_lock.OWNER.stat().st_mtime
    run_lock.OWNER.write_text(json.dumps([{"executor": "local"}]))
    os.utime(run_lock.OWNER, (begun, begun))


def cut_off(no_cache: Path) -> None:
    for path in TABLES:
        record("incomplete", path, {})


def checked_out(no_cache: Path) -> None:
    digest = hashlib.md5(Path(UNSEEN).read_bytes()).hexdigest()
    (no_cache / digest[:2]).mkdir(parents=True)
    (no_cache / digest[:2] / digest[2:]).touch()


def older(no_cache: Path) -> None:
    for path in (REPLACED, UNSEEN):
        os.utime(path, (1001, 1001))


@pytest.mark.parametrize(
    "spoil", [changed_settings, ended_well, ran_here, cut_off, checked_out, older]
)
def test_what_a_job_may_have_made_otherwise_is_made_anew(
    asked: list[tuple[str, ...]], no_cache: Path, spoil: Callable[[Path], None]
) -> None:
    begun = time.time() + 10
    killed_on_slurm(begun)
    for path in (REPLACED, UNSEEN):
        os.utime(path, (begun + 5, begun + 5))
    spoil(no_cache)
    reconcile.reconcile({"clip": TABLES}, reconcile.begun_unchanged(["params.yaml"]))
    assert aged() == [REPLACED, UNSEEN]
    assert [words[0] for words in asked] == ["--cleanup-metadata"]


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
