"""The user's own images instead of the simulated campaign: `dvc remove campaign`, images in data/raw, `dvc add data/raw`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import pytest

from .conftest import Project


@pytest.fixture
def own(project: Project) -> Project:
    """The images of the campaign, taken for the user's own, as in a fresh clone."""
    project.run("dvc", "remove", "campaign")
    project.run("dvc", "add", "--quiet", "data/raw")
    project.commit("images of our own")
    shutil.rmtree(project.root / ".snakemake")
    return project


@pytest.mark.long
def test_the_same_images_rerun_nothing(own: Project) -> None:
    assert own.planned_stages() == set()
    own.run("snakemake", "--cores", "2")
    assert own.is_at_rest()
    assert "Running stage" not in own.run("dvc", "repro")


@pytest.mark.long
def test_a_change_of_one_image_is_noticed(own: Project) -> None:
    assert own.planned_stages() == set()
    images = sorted((own.root / "data/raw").glob("*.fits.fz"))
    before = images[-2].stat()
    images[-2].unlink()
    shutil.copyfile(images[-1], images[-2])
    os.utime(images[-2], (before.st_atime, before.st_mtime))  # as `cp -p` would
    assert {"difference", "clip", "scale", "train", "regression"} <= own.planned_stages()
    assert "reference" not in own.planned_stages()


@pytest.mark.long
def test_an_image_more_or_less_is_noticed(own: Project) -> None:
    table = own.root / "data/raw/frames.csv"
    whole = table.read_text()
    table.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    assert "difference" in own.planned_stages()
    images = sorted((own.root / "data/raw").glob("*.fits.fz"))
    shutil.copyfile(images[-1], own.root / "data/raw/another.fits.fz")
    table.write_text(
        whole
        + whole.splitlines()[-1].replace(images[-1].name.removesuffix(".fits.fz"), "another")
        + "\n"
    )
    assert "difference" in own.planned_stages()
    table.write_text(whole + "unknown,99999\n")
    assert "frame unknown has no image" in own.fails("snakemake", "-n")


@pytest.mark.long
def test_a_shorter_list_leaves_nothing_behind(own: Project) -> None:
    table = own.root / "data/raw/frames.csv"
    *rows, last = table.read_text().splitlines(keepends=True)
    frame = last.partition(",")[0]
    table.write_text("".join(rows))
    blobs = own.root / "data/raw/blobs.csv"
    blobs.write_text(
        "".join(row for row in blobs.read_text().splitlines(keepends=True) if frame not in row)
    )
    (own.root / f"data/raw/{frame}.fits.fz").unlink()
    own.run("snakemake", "--cores", "2", "--until", "dvc_difference", "dvc_clip", "dvc_scale")
    assert [path for path in own.made() if frame in path] == []


def test_images_dropped_among_the_simulated_ones_are_not_removed(project: Project) -> None:
    """Who forgot `dvc remove campaign` must not lose images."""
    stranger = project.root / "data/raw/mine.fits"
    stranger.write_bytes(b"precious")
    assert "mine.fits: not an image of the simulated campaign" in project.fails(
        "snakemake", "--cores", "2"
    )
    assert stranger.read_bytes() == b"precious"


@pytest.mark.long
def test_an_archive_is_planned_in_few_jobs_and_without_a_trace(
    pristine: Project, copy_of: Callable[[Project], Project]
) -> None:
    """Ten thousand files in place of images: a plan does not open them."""
    project = copy_of(pristine)
    project.run("dvc", "remove", "campaign")
    raw = project.root / "data/raw"
    raw.mkdir(parents=True)
    for number in range(10_000):
        (raw / f"f{number:05d}.fits.fz").touch()
    rows = [f"f{number:05d},{55_000 + number / 3:.4f}" for number in range(10_000)]
    (raw / "frames.csv").write_text("\n".join(["frame,mjd", *rows, ""]))
    before = project.listing()
    printed = project.run("snakemake", "-n")
    assert project.listing() == before
    counts = {
        line.split()[0]: int(line.split()[1])
        for line in printed.partition("Job stats:")[2].splitlines()
        if len(line.split()) == 2 and line.split()[1].isdigit()
    }
    # On SLURM, clip and scale of a batch run within the job of its difference
    submitted = {
        rule: n
        for rule, n in counts.items()
        if rule not in ("all", "total", "clip", "scale") and not rule.startswith("dvc_")
    }
    assert submitted["difference"] == submitted["detect_batch"] == 40
    assert 120 < sum(submitted.values()) < 200
