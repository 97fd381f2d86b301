"""After either tool the other has nothing to do, and nothing is certified that was not made so."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from .conftest import Project

BELOW = {  # what a changed section of params.yaml must make anew
    "campaign": "campaign reference difference clip scale cutout augment train dense detect evaluate regression completeness",
    "difference": "reference difference clip scale cutout augment train dense detect evaluate regression completeness",
    "clip": "clip scale cutout augment train dense detect evaluate regression completeness",
    "scale": "scale cutout augment train dense detect evaluate regression completeness",
    "cutout": "cutout augment train dense detect evaluate regression completeness",
    "augment": "augment train dense detect evaluate regression completeness",
    "train": "train evaluate regression completeness",
    "dense": "dense detect evaluate regression completeness",
    "detect": "detect evaluate regression completeness",
    "evaluate": "evaluate",
    "regression": "regression",
    "completeness": "completeness",
}
CHANGES = {
    "campaign": ("seed", 2),
    "difference": ("register_shift", False),
    "clip": ("factor", 0.6),
    "scale": ("clip_sigma", 2.5),
    "cutout": ("seed", 2),
    "augment": ("noise_sigma", 0.5),
    "train": ("seed", 2),
    "dense": ("seed", 2),
    "detect": ("new_blobs_per_100_frames", 6.0),
    "evaluate": ("threshold", 0.4),
    "regression": ("threshold", 0.4),
    "completeness": ("seed", 2),
}
MODEL = "results/train/model.safetensors"


@pytest.mark.slow
def test_dvc_from_nothing_makes_the_same(
    pristine: Project, copy_of: Callable[[Project], Project], request: pytest.FixtureRequest
) -> None:
    project = copy_of(pristine)
    project.run("dvc", "repro")
    assert project.is_at_rest()
    finished = request.getfixturevalue("finished")  # only now: another worker makes it meanwhile
    assert project.made() == finished.made()


def test_after_snakemake_nothing_is_left_to_do(finished: Project) -> None:
    assert finished.is_at_rest()
    assert "Running stage" not in finished.run("dvc", "repro")
    assert finished.run("git", "status", "--porcelain") == ""


@pytest.mark.parametrize(
    "sections", [("campaign", "train", "detect"), pytest.param(tuple(BELOW), marks=pytest.mark.long, id="all")]
)
def test_a_changed_setting_reruns_what_depends_on_it(sections: tuple[str, ...], project: Project) -> None:
    settings = project.root / "params.yaml"
    before = settings.read_text()
    for section in sections:
        project.set(section, *CHANGES[section])
        assert project.planned_stages() == set(BELOW[section].split()), section
        settings.write_text(before)


def test_everything_made_is_declared(finished: Project) -> None:
    """Else DVC would not version it, and a later stage could read it unseen."""
    entry = yaml.safe_load((finished.root / "dvc.yaml").read_text())["stages"].values()
    outs = [out if isinstance(out, str) else next(iter(out)) for stage in entry for out in stage["outs"]]
    declared = outs + [f"results/{name}/metrics.json" for name in BELOW]
    assert [path for path in finished.made() if not any(f"{path}/".startswith(f"{out}/") for out in declared)] == []


@pytest.mark.long
@pytest.mark.parametrize("section", ["evaluate", "train"])
def test_experiment_and_back(section: str, project: Project) -> None:
    before = project.made()
    setting, value = CHANGES[section]
    printed = project.run("dvc", "exp", "run", "--set-param", f"{section}.{setting}={value}")
    ran = {line.split("'")[1] for line in printed.splitlines() if line.startswith("Running stage")}
    assert ran == set(BELOW[section].split())
    assert project.is_at_rest()
    assert (project.made()[MODEL] != before[MODEL]) == (section == "train")
    project.commit("an experiment")
    assert f"{section}.{setting}" in project.run("dvc", "params", "diff", "HEAD~1")
    assert "results/evaluate/metrics.json" in project.run("dvc", "metrics", "diff", "--all", "HEAD~1")
    assert "file://" in project.run("dvc", "plots", "show")
    page = (project.root / "dvc_plots/index.html").read_text()
    assert all(title in page for title in ("train_loss", "ROC curve", "Precision and recall", "Calibration"))
    project.run("git", "checkout", "-q", "HEAD~1")
    project.run("dvc", "checkout", "--quiet")
    assert project.is_at_rest()
    assert project.made() == before
    project.run("git", "checkout", "-q", "main")
    project.run("dvc", "checkout", "--quiet")
    assert project.is_at_rest()


@pytest.mark.long
def test_clone_takes_what_was_pushed(project: Project, tmp_path: Path) -> None:
    project.run("dvc", "remote", "add", "--quiet", "--default", "store", str(tmp_path / "store"))
    project.run("dvc", "push", "--quiet")
    project.commit("a remote")
    project.run("git", "clone", "--quiet", ".", str(tmp_path / "clone"))
    clone = Project(tmp_path / "clone")
    clone.run("dvc", "repro", "--allow-missing", "--dry")
    clone.run("dvc", "pull", "--quiet")
    assert clone.is_at_rest()
    assert clone.made() == project.made()


@pytest.mark.long
def test_clone_without_the_cache_makes_its_own(project: Project, tmp_path: Path) -> None:
    """Floating point may differ on another machine: no reason to refuse a result whose forerunner is not at hand."""
    lock = project.root / "dvc.lock"
    entry = yaml.safe_load(lock.read_text())
    for out in entry["stages"]["regression"]["outs"]:
        out["md5"] = "0" * 32
    lock.write_text(yaml.safe_dump(entry))
    project.run("snakemake", "--cores", "2")
    assert project.is_at_rest()


@pytest.mark.parametrize(
    "path",
    [
        "results/evaluate/metrics.json",
        *(
            pytest.param(path, marks=pytest.mark.long)
            for path in ("results/regression/cases.csv", "data/scale/*.fits.fz")
        ),
    ],
)
def test_edited_output_is_refused(path: str, project: Project) -> None:
    victim = sorted(project.root.glob(path))[-1]
    name = str(victim.relative_to(project.root))
    before = project.made()
    content = victim.read_bytes()
    victim.unlink()  # it may be linked to the cache
    victim.write_bytes(content.replace(b"0", b"1"))
    project.fails("snakemake", "--cores", "2")
    printed = project.fails("snakemake", "--cores", "2")  # and again, for as long as it is not settled
    assert f"{name} differ from dvc.lock although nothing that they are made from does" in printed
    undo = printed.partition("reproducible; '")[2].partition("'")[0]
    project.run("sh", "-c", undo)
    assert project.made() == before
    assert project.planned_stages() == set()


@pytest.mark.long
def test_edited_output_can_be_accepted(project: Project) -> None:
    with (project.root / "results/regression/cases.csv").open("a") as file:
        file.write("\n")
    project.run("snakemake", "--cores", "2", BLOBPIPE_ACCEPT="1")
    assert project.is_at_rest()


@pytest.mark.long
def test_lost_image_is_made_again(project: Project) -> None:
    before = project.made()
    sorted((project.root / "data/scale").glob("*.fits.fz"))[-1].unlink()
    assert "scale" in project.planned_stages()
    project.run("snakemake", "--cores", "2", "--until", "dvc_scale")
    assert project.made() == before


def test_lost_memory_certifies_nothing(project: Project) -> None:
    """Without .snakemake, files of other settings must not be taken for those of the present ones."""
    project.set("evaluate", "threshold", 0.4)
    shutil.rmtree(project.root / ".snakemake")
    assert project.planned_stages() == {"evaluate"}


@pytest.mark.long
def test_recorded_files_under_other_settings_certify_nothing(project: Project) -> None:
    """`dvc checkout` after a change was run, but not committed: Snakemake remembers files that are gone."""
    project.set("evaluate", "threshold", 0.4)
    project.run("snakemake", "--cores", "2", "results/evaluate/metrics.json")
    assert "evaluate" not in project.planned_stages()
    project.run("git", "checkout", "results/evaluate/metrics.json")
    project.run("dvc", "checkout", "--quiet", "--force")
    assert "evaluate" in project.planned_stages()


@pytest.mark.slow
def test_settings_edited_during_a_run_certify_nothing(project: Project) -> None:
    project.set("train", "seed", 2)
    log = project.root / "logs/train.log"
    begun = log.stat().st_mtime
    process = project.start("snakemake", "--cores", "2")
    project.wait_for("logs/train.log", process, newer_than=begun)
    project.set("train", "seed", 3)
    printed, _ = process.communicate()
    assert process.returncode != 0
    assert "was edited while the pipeline ran" in printed
    assert "train" in project.planned_stages()


@pytest.mark.parametrize("old", [False, True], ids=["new", "restored"])
def test_edited_code_is_noticed_whatever_its_date(old: bool, project: Project) -> None:
    path = project.root / "src/blobpipe/regression.py"
    time = path.stat().st_mtime
    path.write_text(path.read_text() + "# a remark\n")
    if old:
        os.utime(path, (time, time))
    assert project.planned_stages() == {"regression"}


@pytest.mark.long
def test_edited_rules_recommit_without_running(project: Project) -> None:
    with (project.root / "workflow/rules/scale.smk").open("a") as file:
        file.write("# a remark\n")
    assert project.planned_stages() == set()
    project.run("snakemake", "--cores", "2")
    assert project.is_at_rest()


def test_merged_locks_conflict(project: Project) -> None:
    """Git must not mix the records of two experiments into one that nobody ran."""
    lock = project.root / "dvc.lock"
    before = lock.read_text()
    for branch, stage in (("one", "campaign"), ("two", "regression")):
        project.run("git", "checkout", "-q", "-B", branch, "main")
        content = yaml.safe_load(before)
        content["stages"][stage]["outs"][0]["md5"] = "0" * 32
        lock.write_text(yaml.safe_dump(content))
        project.commit(branch)
    assert "CONFLICT" in project.fails("git", "merge", "one")


@pytest.mark.long
def test_without_dvc_snakemake_works_alone(project: Project) -> None:
    project.set("regression", "threshold", 0.4)
    project.run("snakemake", "--cores", "2", BLOBPIPE_DVC="0")
    assert "regression" in project.run("dvc", "status")
    project.run("snakemake", "--cores", "2")
    assert project.is_at_rest()


def test_report_works_offline(project: Project) -> None:
    project.run("snakemake", "--report", "results/report.html")
    page = (project.root / "results/report.html").read_text()
    assert "Regression test" in page
    assert "matched filter" in page


def test_metrics_are_whole(finished: Project) -> None:
    for stage in ("train", "evaluate", "regression"):
        assert json.loads((finished.root / f"results/{stage}/metrics.json").read_text())
