"""After either tool the other has nothing to do, and nothing is certified that was not made so."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from .conftest import Project

BELOW = {  # what a changed section of params.yaml must make anew
    "campaign": "campaign reference difference clip scale cutout augment train dense detect evaluate regression completeness",
    "bad_pixels": "reference difference clip scale cutout augment train dense detect evaluate regression completeness",
    "difference": "reference difference clip scale cutout augment train dense detect evaluate regression completeness",
    "clip": "clip scale cutout augment train dense detect evaluate regression completeness",
    "scale": "scale cutout augment train dense detect evaluate regression completeness",
    "cutout": "cutout augment train dense detect evaluate regression completeness",
    "augment": "augment train dense detect evaluate regression completeness",
    "train": "train evaluate regression completeness",
    "dense": "dense detect evaluate regression completeness",
    "vetting": "detect evaluate regression completeness",
    "detect": "detect evaluate regression completeness",
    "evaluate": "evaluate",
    "regression": "regression",
    "completeness": "completeness",
}
CHANGES = {
    "campaign": ("seed", 2),
    "bad_pixels": ("dq_flags", 4),
    "difference": ("register_shift", False),
    "clip": ("factor", 0.6),
    "scale": ("clip_sigma", 2.5),
    "cutout": ("seed", 2),
    "augment": ("noise_sigma", 0.5),
    "train": ("seed", 2),
    "dense": ("seed", 2),
    "vetting": ("min_radius_px", 1.6),
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
    "sections",
    [("campaign", "train", "detect"), pytest.param(tuple(BELOW), marks=pytest.mark.long, id="all")],
)
def test_a_changed_setting_reruns_what_depends_on_it(
    sections: tuple[str, ...], project: Project
) -> None:
    settings = project.root / "params.yaml"
    before = settings.read_text()
    for section in sections:
        project.set(section, *CHANGES[section])
        assert project.planned_stages() == set(BELOW[section].split()), section
        settings.write_text(before)


def test_everything_made_is_declared(finished: Project) -> None:
    """Else DVC would not version it, and a later stage could read it unseen."""
    entry = yaml.safe_load((finished.root / "dvc.yaml").read_text())["stages"].values()
    outs = [
        out if isinstance(out, str) else next(iter(out)) for stage in entry for out in stage["outs"]
    ]
    declared = outs + [f"results/{name}/metrics.json" for name in BELOW]
    assert [
        path
        for path in finished.made()
        if not any(f"{path}/".startswith(f"{out}/") for out in declared)
    ] == []


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
    assert "results/evaluate/metrics.json" in project.run(
        "dvc", "metrics", "diff", "--all", "HEAD~1"
    )
    assert "file://" in project.run("dvc", "plots", "show")
    page = (project.root / "dvc_plots/index.html").read_text()
    assert all(
        title in page
        for title in ("train_loss", "ROC curve", "Precision and recall", "Calibration")
    )
    project.run("git", "checkout", "-q", "HEAD~1")
    project.run("dvc", "checkout", "--quiet")
    assert project.is_at_rest()
    assert project.made() == before
    project.run("git", "checkout", "-q", "main")
    project.run("dvc", "checkout", "--quiet")
    assert project.is_at_rest()


def test_the_way_back_from_an_experiment_leaves_nothing_to_do(project: Project) -> None:
    """Also where most files of a stage came out alike, so that `dvc checkout` left them as they were."""
    printed = project.run("dvc", "exp", "run", "--set-param", "regression.n_gallery=3")
    # A stage of DVC tells its jobs in a line each
    assert "done] regression\n" in printed
    assert "Select jobs" not in printed
    project.run("git", "checkout", "-q", "params.yaml", "dvc.lock", "results")
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
    # and again, for as long as it is not settled
    printed = project.fails("snakemake", "--cores", "2")
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
    path = project.root / "src/blobpipe/validation/regression.py"
    time = path.stat().st_mtime
    path.write_text(path.read_text() + "# a remark\n")
    if old:
        os.utime(path, (time, time))
    # completeness takes the thresholds of the baselines from what regression has found
    assert project.planned_stages() == {"regression", "completeness"}


@pytest.mark.long
def test_edited_rules_recommit_without_running(project: Project) -> None:
    with (project.root / "workflow/rules/scale.smk").open("a") as file:
        file.write("# a remark\n")
    assert project.planned_stages() == set()
    project.run("snakemake", "--cores", "2")
    assert project.is_at_rest()


@pytest.mark.parametrize(
    "words",
    [
        ["--summary"],
        *(
            pytest.param(words, marks=pytest.mark.long)
            for words in (
                ["--detailed-summary"],
                ["--dag"],
                ["--rulegraph"],
                ["--filegraph"],
                ["--d3dag"],
                ["--list-changes", "code"],
                ["--list-rules"],
                ["--list-target-rules"],
                ["--list-untracked"],
                ["--lint"],
                ["--unlock"],
                ["--dry-run", "--forceall"],
                ["--dry-run", "--delete-all-output", "--cores", "1"],
                ["--dry-run", "explore", "quicklook"],
                ["--report", "results/report.html"],
            )
        ),
    ],
    ids=" ".join,
)
def test_what_runs_nothing_changes_nothing(words: list[str], project: Project) -> None:
    """Also where much would have to be set right first: here all that Snakemake and the bridge knew is gone."""
    shutil.rmtree(project.root / ".snakemake")
    project.set("scale", "clip_sigma", 2.5)
    before = project.listing()
    project.run("snakemake", *words)
    after = project.listing()
    after.pop("results/report.html", None)
    assert after == before


def test_finished_batches_are_kept_whatever_the_lock_says(project: Project) -> None:
    """A fresh clone with settings of its own: dvc.lock lists files of another machine, and of these none was committed."""
    entry = yaml.safe_load((project.root / "dvc.lock").read_text())
    for name in ("campaign", "difference", "clip", "scale"):
        for out in entry["stages"][name]["outs"]:
            out["md5"] = f"{'0' * 32}.dir"
    (project.root / "dvc.lock").write_text(yaml.safe_dump(entry))
    shutil.rmtree(project.root / ".snakemake/blobpipe")
    assert project.planned_stages() == set()
    stranger = project.root / "data/clip/frames-000.csv"
    os.utime(stranger, (stranger.stat().st_mtime + 1,) * 2)  # no longer what a job has made here
    assert {"clip", "scale"} <= project.planned_stages()
    assert not {"campaign", "difference"} & project.planned_stages()


def test_a_stage_of_dvc_runs_its_own_rules_alone(project: Project) -> None:
    """Also after a pull, or in a queued experiment, when all is of one date or of none."""
    shutil.rmtree(project.root / ".snakemake")
    for path in sorted((project.root / "results").rglob("*.csv"), reverse=True):
        path.touch()
    for stage in ("regression", "detect"):
        command = yaml.safe_load((project.root / "dvc.yaml").read_text())["stages"][stage][
            "cmd"
        ].split()
        printed = project.run(*command[:1], "--dry-run", *command[5:], BLOBPIPE_DVC="0")
        lines = printed.partition("Job stats:")[2].partition("total")[0].splitlines()
        ran = {
            line.split()[0]
            for line in lines
            if len(line.split()) == 2 and line.split()[1].isdigit()
        }
        assert ran <= {stage, f"{stage}_batch", f"stage_{stage}"}


@pytest.mark.long
@pytest.mark.parametrize("way", [["--queue"], ["--temp"]], ids=["queue", "temp"])
def test_an_experiment_of_its_own_folder_runs_what_depends_on_it(
    way: list[str], project: Project
) -> None:
    changed = [
        "--set-param",
        "regression.threshold=0.4",
        "--set-param",
        "detect.new_blobs_per_100_frames=7.0",
    ]
    printed = project.run("dvc", "exp", "run", *way, "--name", "other", *changed)
    if way == ["--queue"]:
        project.run("dvc", "queue", "start")
        printed = project.run("dvc", "queue", "logs", "other", "--follow")
    ran = {line.split("'")[1] for line in printed.splitlines() if line.startswith("Running stage")}
    assert ran == {"detect", "regression"}
    assert not re.search(r"rule (augment|dense|train|cutout):", printed)
    project.run("dvc", "exp", "apply", "other")
    assert project.is_at_rest()
    entry = yaml.safe_load((project.root / "dvc.lock").read_text())["stages"]["regression"]
    recorded = {out["path"]: out["md5"] for out in entry["outs"]}["results/regression/metrics.json"]
    assert (
        recorded
        == hashlib.md5((project.root / "results/regression/metrics.json").read_bytes()).hexdigest()
    )


@pytest.mark.parametrize(
    "name",
    [
        "dvc.lock",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("dvc.yaml", "params.yaml")),
    ],
)
def test_marks_of_a_merge_are_one_line(name: str, project: Project) -> None:
    path = project.root / name
    path.write_text(f"<<<<<<< HEAD\na: 1\n=======\na: 2\n>>>>>>> other\n{path.read_text()}")
    printed = project.fails("snakemake", "-n")
    assert "Traceback" not in printed
    assert (
        sum(
            f"{name}: line 1: found <<<<<<<, the mark of a merge" in line
            for line in printed.splitlines()
        )
        == 1
    )


def _damage(project: Project, digest: str) -> Path:
    """Cut an object of DVC's cache in half, as a disk might; DVC trusts what is read-only."""
    path = project.root / ".dvc/cache/files/md5" / digest[:2] / digest[2:]
    content = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(content[: len(content) // 2])
    path.chmod(0o444)
    return path


@pytest.mark.parametrize("tool", ["snakemake", pytest.param("dvc", marks=pytest.mark.long)])
def test_a_damaged_object_of_the_cache_is_named(tool: str, project: Project) -> None:
    entry = yaml.safe_load((project.root / "dvc.lock").read_text())["stages"]
    victim = project.root / "results/cutout/train_subframes.csv"
    digest = {out["path"]: out["md5"] for out in entry["cutout"]["outs"]}[
        "results/cutout/train_subframes.csv"
    ]
    damaged = _damage(project, digest)
    victim.unlink()
    project.run("dvc", "checkout", "--quiet")
    shutil.rmtree(project.root / ".snakemake")
    before = project.listing()
    project.set("augment", "copies", 3)
    command = ["snakemake", "--cores", "2"] if tool == "snakemake" else ["dvc", "repro", "augment"]
    printed = project.fails(*command)
    assert f"train_subframes.csv: DVC's cache holds a damaged copy of it, {damaged}" in printed
    if tool == "snakemake":
        assert {
            path: state
            for path, state in project.listing().items()
            if path.startswith(("data", "results"))
        } == {path: state for path, state in before.items() if path.startswith(("data", "results"))}


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
