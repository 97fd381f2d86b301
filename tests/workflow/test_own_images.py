"""The user's own images instead of the simulated campaign: `dvc remove campaign`, images in data/raw, `dvc add data/raw`."""

from __future__ import annotations

import os
import shutil

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
