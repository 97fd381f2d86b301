"""Recipes of subframes: where windows lie, which blobs they get, and what is kept apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from blobpipe.core import fits_images, tables
from blobpipe.errors import BlobpipeError, TableError
from blobpipe.images import tiles
from blobpipe.images.clip import clip
from blobpipe.images.scale import scale
from blobpipe.params import Clip, Cutout, Scale
from blobpipe.simulation import cutout, render
from blobpipe.validation import leakage

SPLITS = cutout.SPLITS


def cut(project: Path, out: Path, **settings: object) -> Path:
    data = project / "data"
    params = Cutout(**{"n_train": 40, "n_validation": 30, "n_profiles": 8, **settings})
    cutout.cut(
        data / "raw", data / "difference", data / "scale", out, params, clip=Clip(), scale=Scale()
    )
    return out


def test_the_tables_have_their_columns(made_project: Path) -> None:
    folder = made_project / "results/cutout"
    for split in SPLITS:
        subframes, blobs = cutout.read_recipes(folder, split)
        assert tuple(subframes) == cutout.SUBFRAME_COLUMNS
        assert tuple(blobs) == cutout.BLOB_COLUMNS
    assert (
        tuple(tables.read_table(folder / "stamps.csv", cutout.STAMP_COLUMNS))
        == cutout.STAMP_COLUMNS
    )
    assert (folder / "contact_sheet.png").stat().st_size > 10_000


def test_the_same_seed_gives_the_same_bytes(made_project: Path, tmp_path: Path) -> None:
    one, two, other = (
        cut(made_project, tmp_path / str(i), seed=seed) for i, seed in enumerate((5, 5, 6))
    )
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name
    assert (one / "train_blobs.csv").read_bytes() != (other / "train_blobs.csv").read_bytes()


def test_subframes_are_counted_numbered_and_half_have_blobs(made_project: Path) -> None:
    folder = made_project / "results/cutout"
    for split, n in zip(SPLITS, (60, 24), strict=True):
        subframes, blobs = cutout.read_recipes(folder, split)
        assert list(subframes["subframe"]) == list(range(n))
        assert subframes["label"].sum() == n / 2
        assert set(blobs["subframe"]) == set(subframes.query("label == 1")["subframe"])
        assert blobs.groupby("subframe").size().between(1, 5).all()
        assert blobs["factor"].between(0.5, 1.5).all()


def test_training_and_validation_share_no_stamp(made_project: Path) -> None:
    folder = made_project / "results/cutout"
    stamp = tables.read_table(folder / "stamps.csv", cutout.STAMP_COLUMNS).set_index("stamp")
    assert len(fits_images.read_cube(folder / "stamps.fits")) == len(stamp)
    assert set(stamp["split"]) == set(SPLITS)
    assert set(stamp["source"]) == {"stack", "profile"}
    for split in SPLITS:
        used = cutout.read_recipes(folder, split)[1]["stamp"]
        assert set(stamp.loc[used, "split"]) == {split}


def test_training_and_validation_share_no_pixel(made_project: Path) -> None:
    folder = made_project / "results/cutout"
    covered = {}
    for split in SPLITS:
        subframes, _ = cutout.read_recipes(folder, split)
        covered[split] = masks = {}
        for row in subframes.itertuples():
            mask = masks.setdefault(row.frame, np.zeros((512, 512), bool))
            mask[row.y0_px : row.y0_px + tiles.SIDE, row.x0_px : row.x0_px + tiles.SIDE] = True
    for name in covered["train"].keys() & covered["validation"].keys():
        assert not (covered["train"][name] & covered["validation"][name]).any()


def test_historical_images_are_left_to_the_regression_test(made_project: Path) -> None:
    for split in SPLITS:
        assert "frame5" not in set(
            cutout.read_recipes(made_project / "results/cutout", split)[0]["frame"]
        )


def test_the_snr_is_that_of_the_visible_part(made_project: Path) -> None:
    folder = made_project / "results/cutout"
    cube = fits_images.read_cube(folder / "stamps.fits")
    for blob in cutout.read_recipes(folder, "train")[1].head(30).itertuples():
        canvas = np.zeros((tiles.SIDE + 80, tiles.SIDE + 80))
        canvas[blob.y_px + 20 : blob.y_px + 61, blob.x_px + 20 : blob.x_px + 61] = (
            cube[blob.stamp] * blob.factor
        )
        assert blob.snr == pytest.approx(np.linalg.norm(canvas[40:-40, 40:-40]), abs=0.002)


def test_blobs_lie_anywhere_and_partly_off_every_edge(made_project: Path, tmp_path: Path) -> None:
    _, blobs = cutout.read_recipes(cut(made_project, tmp_path, n_train=1000), "train")
    for axis in ("x_px", "y_px"):
        assert blobs[axis].min() < 4
        assert blobs[axis].max() > tiles.SIDE - 5
        counts = np.histogram(blobs[axis], bins=8, range=(0, tiles.SIDE))[0]
        assert counts.min() > 0.75 * counts.mean()


def test_physical_amplitudes_keep_the_light_loss(made_project: Path, tmp_path: Path) -> None:
    """The factor falls by the ratio of the two noises, here 0.0055 to 0.0101."""
    report, physical = (
        cut(made_project, tmp_path / name, amplitude=name) for name in ("report", "physical")
    )
    one, other = (cutout.read_recipes(folder, "train")[1] for folder in (report, physical))
    pd.testing.assert_frame_equal(one[["stamp", "x_px", "y_px"]], other[["stamp", "x_px", "y_px"]])
    assert (other["factor"] / one["factor"]).mean() == pytest.approx(0.0055 / 0.0101, rel=0.05)


@pytest.mark.parametrize(("source", "found"), [("stack", {"stack"}), ("profiles", {"profile"})])
def test_stamps_come_from_where_one_says(
    made_project: Path, tmp_path: Path, source: str, found: set[str]
) -> None:
    table = tables.read_table(
        cut(made_project, tmp_path, stamps=source) / "stamps.csv", ("source",)
    )
    assert set(table["source"]) == found


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_none_or_all_may_have_blobs(made_project: Path, tmp_path: Path, share: float) -> None:
    subframes, blobs = cutout.read_recipes(cut(made_project, tmp_path, blob_frac=share), "train")
    assert (subframes["label"] == share).all()
    assert blobs["subframe"].nunique() == share * len(subframes)
    frames_of = cutout.open_split(
        made_project / "data/difference", made_project / "data/scale", tmp_path, "train"
    )
    assert np.isfinite(render.render_subframes(*frames_of, np.arange(3))).all()


def test_dips_have_the_share_and_size_one_says() -> None:
    params = Cutout(dip_frac=0.3, dip_px=(0.5, 2.0))
    region = [cutout.Region(["a"], (0, 1024))]
    table = cutout.draw_subframes(np.random.default_rng(1), 3000, region, (1024, 1024), params)
    size = np.hypot(table["dip_x_px"], table["dip_y_px"])
    assert (size > 0).mean() == pytest.approx(0.3, abs=0.03)
    assert size[size > 0].between(0.498, 2.002).all()
    assert (
        abs(size[size > 0][table["label"] == 1].mean() - size[size > 0][table["label"] == 0].mean())
        < 0.08
    )


def test_a_rejected_image_is_passed_over(project: Path) -> None:
    """Also where its numbers are missing in the table."""
    table = tables.read_table(project / "data/scale/frames-000.csv", ("frame",))
    table.loc[table["frame"] == "frame2", ["status", "sigma_frac", "low_sigma", "high_sigma"]] = [
        "rejected",
        *[np.nan] * 3,
    ]
    tables.write_table(project / "data/scale/frames-000.csv", table)
    for amplitude in ("report", "physical"):
        folder = cut(project, project / amplitude, amplitude=amplitude)
        used = {
            frame for split in SPLITS for frame in cutout.read_recipes(folder, split)[0]["frame"]
        }
        assert used == {"frame0", "frame1", "frame3", "frame4"}


def test_no_catalogue_means_profiles_and_no_historical_image(project: Path) -> None:
    (project / "data/raw/blobs.csv").unlink()
    folder = cut(project, project / "out")
    assert set(tables.read_table(folder / "stamps.csv", ("source",))["source"]) == {"profile"}


def test_too_few_images_are_refused(project: Path) -> None:
    table = tables.read_table(project / "data/scale/frames-000.csv", ("frame",))
    tables.write_table(project / "data/scale/frames-000.csv", table[4:])
    with pytest.raises(
        TableError, match=r"1 usable images without a new blob, expected at least 2"
    ):
        cut(project, project / "out")


def test_too_few_stamps_are_refused(project: Path) -> None:
    (project / "data/raw/blobs.csv").unlink()
    with pytest.raises(TableError, match=r"blobs\.csv: found 0 usable stamps"):
        cut(project, project / "out", stamps="stack")


def test_too_narrow_a_left_part_is_refused(made_project: Path, tmp_path: Path) -> None:
    with pytest.raises(BlobpipeError, match="left 40%"):
        cut(made_project, tmp_path, left_frac=0.4)


@pytest.fixture(scope="module")
def scaled_campaign(difference_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared campaign, clipped and scaled: streaks, bad pixels, dips and all."""
    root = tmp_path_factory.mktemp("scaled")
    clip(difference_dir, root / "clip", Clip())
    scale(root / "clip", root / "scale", Scale())
    return root / "scale"


@pytest.mark.slow
@pytest.mark.parametrize("amplitude", ["report", "physical"])
def test_labels_do_not_leak(
    campaign_dir: Path, difference_dir: Path, scaled_campaign: Path, tmp_path: Path, amplitude: str
) -> None:
    """Neither mean, spread nor the level of the borders tells the classes apart."""
    n = 3000
    params = Cutout(n_train=2, n_validation=n, n_profiles=60, amplitude=amplitude)
    folders = (campaign_dir, difference_dir, scaled_campaign)
    cutout.cut(*folders, tmp_path, params, clip=Clip(), scale=Scale())
    scene, recipes = cutout.open_split(difference_dir, scaled_campaign, tmp_path, "validation")
    rows = np.array_split(np.arange(n), 10)
    features = np.concatenate(
        [leakage.leakage_features(render.render_subframes(scene, recipes, part)) for part in rows]
    )
    assert leakage.leakage_auc(features, recipes.label) == pytest.approx(0.5, abs=0.03)
