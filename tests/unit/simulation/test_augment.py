"""Recipes of augmentation: evenly drawn, reproducible, and as the settings say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from blobpipe.core import files
from blobpipe.params import Augment
from blobpipe.simulation import augment


def draw(n: int = 4000, **settings: object):
    return augment.draw_augmentation(np.random.default_rng(1), n, Augment(**settings))


def test_every_copy_of_every_subframe_has_a_row() -> None:
    table = draw(10, copies=3)
    assert tuple(table) == augment.COLUMNS
    assert list(table["copy"]) == sorted([0, 1, 2] * 10)
    assert list(table["subframe"]) == list(range(10)) * 3


def test_rotations_and_flips_are_evenly_drawn_and_independent() -> None:
    table = draw(copies=4)
    counts = table.groupby(["rotation", "flip"]).size()
    assert len(counts) == 8
    assert counts.between(2000 * 0.9, 2000 * 1.1).all()


def test_no_two_subframes_share_their_noise() -> None:
    assert draw(copies=4)["noise_seed"].is_unique


@pytest.mark.parametrize(("setting", "column"), [("rotate", "rotation"), ("flip", "flip")])
def test_rotations_and_flips_can_be_left_out(setting: str, column: str) -> None:
    assert (draw(50, **{setting: False})[column] == 0).all()


def test_the_stage_writes_a_table_and_a_sheet(made_project: Path) -> None:
    folder = made_project / "results/augment"
    table = augment.read_augmentation(folder)
    assert len(table) == 2 * 60
    assert (folder / "contact_sheet.png").read_bytes()[:4] == b"\x89PNG"


def test_the_same_seed_gives_the_same_bytes(made_project: Path, tmp_path: Path) -> None:
    data = made_project / "data"
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        recipes = made_project / "results/cutout"
        augment.augment(
            data / "difference",
            data / "scale",
            recipes,
            tmp_path / name,
            Augment(copies=2, seed=seed),
        )
    for path in (tmp_path / "a").iterdir():
        assert files.sha256(path) == files.sha256(tmp_path / "b" / path.name)
        assert files.sha256(path) != files.sha256(tmp_path / "c" / path.name)
