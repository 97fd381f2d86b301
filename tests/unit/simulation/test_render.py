"""Scenes and recipes from the files of the stages, and the edges of rendering."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from blobpipe.core import fits_images, tables
from blobpipe.errors import BlobpipeError
from blobpipe.images import tiles
from blobpipe.simulation import augment, cutout, render
from blobpipe.simulation.recipes import STEP, Scene, load_scene, to_recipes


def test_a_scene_holds_what_the_stages_wrote(made_project: Path) -> None:
    difference = made_project / "data/difference"
    scale = made_project / "data/scale"
    stamps = np.zeros((1, 41, 41), np.float32)
    scene = load_scene(difference, scale, ["frame3", "frame1"], stamps)
    assert scene.names == ("frame3", "frame1")
    for i, name in enumerate(scene.names):
        image = fits_images.read_frame(scale / f"{name}.fits.fz").data
        np.testing.assert_allclose(scene.backgrounds[i] / STEP, image, atol=0.51 / STEP)
        assert scene.limits[i, 0] == pytest.approx(image.min(), abs=1 / 32)
        assert scene.limits[i, 1] == pytest.approx(image.max(), abs=1 / 32)
    np.testing.assert_allclose(scene.sigma_frac, 0.0101, rtol=0.15)
    assert scene.pattern.max() == pytest.approx(0.1, rel=0.05)


def test_what_is_beyond_two_bytes_a_pixel_keeps_its_sign(project: Path) -> None:
    name = "frame0"
    pattern = fits_images.read_plane(project / "data/difference/reference.fits.fz", "PATTERN")
    data = np.zeros(pattern.shape, np.float32)
    data[0], data[1] = 2e4, -2e4
    fits_images.write_image(project / f"data/scale/{name}.fits.fz", data, name="SCALED")
    stamps = np.zeros((1, 41, 41), np.float32)
    scene = load_scene(project / "data/difference", project / "data/scale", [name], stamps)
    assert (scene.backgrounds[0, 0] == 32767).all()
    assert (scene.backgrounds[0, 1] == -32768).all()


def test_recipes_hold_the_tables(made_project: Path) -> None:
    folder = made_project / "results/cutout"
    subframes, blobs = cutout.read_recipes(folder, "train")
    augmented = augment.read_augmentation(made_project / "results/augment")
    shuffled = augmented.sample(frac=1, random_state=1)
    names = tuple(sorted(set(subframes["frame"])))
    recipes = to_recipes(names, subframes, blobs.sample(frac=1, random_state=1), shuffled)
    assert len(recipes) == len(subframes)
    assert [names[i] for i in recipes.frame] == list(subframes["frame"])
    counts = blobs.groupby("subframe").size().reindex(range(len(subframes)), fill_value=0)
    np.testing.assert_array_equal(np.diff(recipes.first_blob), counts)
    for i in (0, 17, 59):
        mine = slice(recipes.first_blob[i], recipes.first_blob[i + 1])
        expected = blobs.query("subframe == @i")[["stamp", "x_px", "y_px"]].to_numpy()
        assert sorted(map(tuple, recipes.blob[mine])) == sorted(map(tuple, expected))
    row = augmented.query("copy == 1 and subframe == 7").iloc[0]
    assert recipes.noise_seed[1, 7] == np.uint64(row["noise_seed"])
    assert tuple(recipes.turn[1, 7]) == (row["rotation"], row["flip"])


def test_large_noise_seeds_survive_the_table(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {"copy": [0], "subframe": [0], "noise_seed": [2**62 - 1], "rotation": [0], "flip": [0]}
    )
    tables.write_table(tmp_path / "train.csv", table)
    assert augment.read_augmentation(tmp_path)["noise_seed"][0] == 2**62 - 1


def test_copies_come_round(made_project: Path) -> None:
    data = made_project / "data"
    augmented = augment.read_augmentation(made_project / "results/augment")
    scene, recipes = cutout.open_split(
        data / "difference",
        data / "scale",
        made_project / "results/cutout",
        "train",
        augmented,
        n=4,
    )
    images = [
        render.render_subframes(scene, recipes, np.arange(4), copy=copy, noise_sigma=0.75)
        for copy in range(3)
    ]
    assert images[0].tobytes() == images[2].tobytes()
    assert images[0].tobytes() != images[1].tobytes()


def test_the_first_rows_of_a_split_are_those_of_the_whole(made_project: Path) -> None:
    data = made_project / "data"
    folder = made_project / "results/cutout"
    whole = cutout.open_split(data / "difference", data / "scale", folder, "validation")
    part = cutout.open_split(data / "difference", data / "scale", folder, "validation", n=5)
    assert len(part[1]) == 5
    rows = np.arange(5)
    assert (
        render.render_subframes(*whole, rows).tobytes()
        == render.render_subframes(*part, rows).tobytes()
    )


def test_pixels_are_written_where_one_says(made_project: Path) -> None:
    data = made_project / "data"
    scene, recipes = cutout.open_split(
        data / "difference", data / "scale", made_project / "results/cutout", "validation", n=3
    )
    out = np.empty((3, tiles.SIDE, tiles.SIDE), np.float32)
    assert render.render_subframes(scene, recipes, np.arange(3), out=out) is out


def test_a_blob_cannot_exceed_the_frames_limits() -> None:
    """A real blob would have been clipped with its frame."""
    stamp = np.full((1, 41, 41), 50, np.float32)
    scene = Scene(
        ("a",),
        np.zeros((1, 300, 300), np.int16),
        np.array([[-3, 3]], np.float32),
        np.ones(1, np.float32),
        np.zeros((300, 300), np.float32),
        stamp,
    )
    subframes = pd.DataFrame([(0, "a", 0, 0, 1, 0.0, 0.0)], columns=list(cutout.SUBFRAME_COLUMNS))
    blobs = pd.DataFrame([(0, 0, 128, 128, 1.0, 0.0)], columns=list(cutout.BLOB_COLUMNS))
    image = render.render_subframes(scene, to_recipes(("a",), subframes, blobs), np.arange(1))[0]
    inside = 41**2 / 256**2
    assert image.max() - image.min() == pytest.approx(1 / np.sqrt(inside * (1 - inside)), rel=1e-3)


@pytest.mark.parametrize("value", [7, 0.001, 0.1, 0.37, 100.3, -0.3])
@pytest.mark.parametrize("shape", [(16, 16), (64, 64), (65, 33), (128, 128)])
def test_a_constant_subframe_becomes_zero(value: float, shape: tuple[int, int]) -> None:
    images = np.full((2, *shape), value, np.float32)
    assert not render.standardise(images).any()


def test_a_scene_of_frames_of_two_sizes_is_refused(project: Path) -> None:
    fits_images.write_image(
        project / "data/scale/frame1.fits.fz",
        np.zeros((300, 300), np.float32),
        name="SCALED",
        sigma=1,
    )
    with pytest.raises(BlobpipeError, match="frame1"):
        load_scene(
            project / "data/difference",
            project / "data/scale",
            ["frame0", "frame1"],
            np.zeros((1, 41, 41), np.float32),
        )
