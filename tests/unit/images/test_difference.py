"""Difference images: the right sign, the right noise, no dips, and new blobs new only once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from blobpipe.core import files, fits_images, tables
from blobpipe.core.blob_shapes import blob_profile, matched_snr
from blobpipe.core.cutouts import window_around
from blobpipe.errors import FrameError, TableError
from blobpipe.images import difference
from blobpipe.images.noise import clean_noise
from blobpipe.images.pattern import (
    SMOOTHING_PX,
    _blob_like,
    _compact,
    _continued,
    _filled,
    blob_pattern,
    smooth_gaussian,
    soften,
)
from blobpipe.images.register import (
    NO_SHIFT,
    Shift,
    _binned,
    measure_shift,
    move_pattern,
    usual_place_is_zero,
)
from blobpipe.images.stack import landed_within, rms_map, running_median, with_recent_blobs
from blobpipe.params import Campaign, Difference
from blobpipe.simulation import campaign

NOISE = 0.0101


@pytest.fixture(scope="module")
def done(campaign_dir: Path, difference_dir: Path) -> pd.DataFrame:
    """What the stage wrote, beside the truth (columns with ``_true``)."""
    truth = tables.read_frame_list(campaign_dir)
    return truth.merge(tables.read_stage(difference_dir), on="frame", suffixes=("_true", ""))


@pytest.fixture(scope="module")
def images(campaign_dir: Path) -> np.ndarray:
    """The first 18 images of the campaign."""
    names = tables.read_frame_list(campaign_dir)["frame"][:18]
    return np.stack(
        [fits_images.read_frame(fits_images.find_image(campaign_dir, name)).data for name in names]
    )


@pytest.fixture(scope="module")
def known(campaign_dir: Path) -> pd.DataFrame:
    return tables.read_blobs(campaign_dir).query("first_frame == ''")


@pytest.fixture(scope="module")
def reference(difference_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    path = difference_dir / "reference.fits.fz"
    return fits_images.read_plane(path, "STACK"), fits_images.read_plane(path, "PATTERN")


@pytest.fixture(scope="module")
def shifted(
    campaign_params: Campaign, reference: tuple[np.ndarray, np.ndarray]
) -> dict[Shift, np.ndarray]:
    """The same images but for the shift of their blobs, and noise."""
    blobs = [blob for blob in campaign.population(campaign_params) if blob.first < 0]
    still = reference[0] - campaign.blob_layer(blobs, 0.0, 0.0)
    rng = np.random.default_rng(1)
    shifts = [Shift(*rng.uniform(-3, 3, 2)) for _ in range(6)] + [
        Shift(0.3, 0.0),
        Shift(0.0, -0.5),
        Shift(0.0, 0.0),
    ]
    noise = {shift: NOISE * rng.standard_normal(still.shape, np.float32) for shift in shifts}
    return {shift: still + campaign.blob_layer(blobs, *shift) + noise[shift] for shift in shifts}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def snr_at(image: np.ndarray, blob: object, noise: float) -> float:
    """Matched-filter signal-to-noise ratio of a blob of the catalogue on an image."""
    row = round(blob.y_px)
    column = round(blob.x_px)
    window = np.pad(np.nan_to_num(image), 20)[row : row + 41, column : column + 41]
    profile = blob_profile(blob.shape, blob.radius_px, blob.x_px - column, blob.y_px - row)
    return float((window * profile).sum() / np.sqrt((profile**2).sum()) / noise)


def some(campaign_dir: Path, folder: Path, n: int) -> pd.DataFrame:
    """The first images of the campaign in a folder of their own; its table."""
    table = tables.read_frame_list(campaign_dir)[["frame", "mjd"]][:n]
    folder.mkdir()
    for name in table["frame"]:
        shutil.copy(fits_images.find_image(campaign_dir, name), folder)
    tables.write_table(folder / "frames.csv", table)
    return table


# --- the stage ---


def test_each_image_after_the_first_stack_has_a_difference(
    done: pd.DataFrame, difference_dir: Path
) -> None:
    assert done["status"].tolist() == ["stack"] * 16 + ["ok"] * 20
    assert done["n_stack"].tolist() == list(range(16)) + [16] * 20
    columns = [
        "frame",
        "mjd",
        "status",
        "reason",
        "shift_x_px",
        "shift_y_px",
        "noise_frac",
        "n_stack",
        "sha256",
    ]
    assert list(tables.read_stage(difference_dir).columns) == columns
    for row in done.query("status == 'ok'").itertuples():
        assert files.sha256(difference_dir / f"{row.frame}.fits.fz") == row.sha256


def test_noise_is_that_of_real_difference_images(done: pd.DataFrame) -> None:
    assert done["noise_frac"].median() == pytest.approx(NOISE, rel=0.1)


def test_noise_of_the_stack_is_that_of_a_real_one(reference: tuple[np.ndarray, np.ndarray]) -> None:
    """0.0055 for 30 images: the fixed pattern, and what the median leaves of the rest; here there are 16."""
    rest = clean_noise(reference[0]) ** 2 - 0.005**2
    assert np.sqrt(0.005**2 + rest * 16 / 30) == pytest.approx(0.0055, rel=0.05)


def test_shifts_are_recovered(done: pd.DataFrame) -> None:
    """The requirement is 0.1 px, for shifts above 0.2 px; the usual small ones must not suffer either."""
    ok = done.query("status == 'ok'")
    error = (
        ok[["shift_x_px", "shift_y_px"]].to_numpy()
        - ok[["shift_x_px_true", "shift_y_px_true"]].to_numpy()
    )
    large = np.hypot(ok["shift_x_px_true"], ok["shift_y_px_true"]) > 0.2
    assert large.sum() >= 4
    assert (np.sqrt((error[large] ** 2).mean(axis=0)) < 0.1).all()
    assert (np.sqrt((error[~large] ** 2).mean(axis=0)) < 0.06).all()


def test_new_blob_is_positive_and_as_deep_as_it_is(
    done: pd.DataFrame, campaign_dir: Path, difference_dir: Path
) -> None:
    blobs = tables.read_blobs(campaign_dir).set_index("first_frame", drop=False)
    ratios = []
    for row in done.query("status == 'ok' and label == 'historical'").itertuples():
        image = fits_images.read_frame(difference_dir / f"{row.frame}.fits.fz").data
        for blob in blobs.loc[[row.frame]].itertuples():
            profile = blob_profile(blob.shape, blob.radius_px) * blob.depth_frac
            found = snr_at(image, blob, row.noise_frac)
            true = matched_snr(profile, row.noise_frac)
            assert found > 0
            ratios += [found / true] if true > 10 else []
    assert np.median(ratios) == pytest.approx(1.0, abs=0.1)


def test_blob_is_new_only_once(
    done: pd.DataFrame, campaign_dir: Path, difference_dir: Path
) -> None:
    """In the images after its first, it is gone, though the plain median has not learnt it yet."""
    rows = {name: row for row, name in enumerate(done["frame"])}
    residuals = []
    plain = []
    for blob in tables.read_blobs(campaign_dir).query("first_frame != ''").itertuples():
        for row in range(rows[blob.first_frame] + 1, min(rows[blob.first_frame] + 6, len(done))):
            image = fits_images.read_frame(difference_dir / f"{done['frame'][row]}.fits.fz").data
            residuals.append(abs(snr_at(image, blob, done["noise_frac"][row])))
            plain.append(
                matched_snr(blob_profile(blob.shape, blob.radius_px) * blob.depth_frac, NOISE)
            )
    assert np.median(residuals) < 2
    assert np.mean(np.array(residuals) > 5) < 0.1 < np.mean(np.array(plain) > 5)


def test_header_keeps_the_frame_and_says_what_was_done(
    done: pd.DataFrame, difference_dir: Path
) -> None:
    row = done.iloc[-1]
    frame = fits_images.read_frame(difference_dir / f"{row['frame']}.fits.fz")
    assert frame.header["EXTNAME"] == "DIFFERENCE"
    assert frame.header["ROOTNAME"] == row["frame"].removesuffix("_blob")
    assert frame.header["NSTACK"] == 16
    assert frame.header["SHIFT_X"] == pytest.approx(row["shift_x_px"], abs=1e-6)


def test_border_stays_without_values(done: pd.DataFrame, difference_dir: Path) -> None:
    image = fits_images.read_frame(difference_dir / f"{done['frame'].iloc[-1]}.fits.fz").data
    assert np.isnan(image[:5]).all()
    assert np.isfinite(image[5:-5, 5:-5]).all()


def test_another_process_gives_the_same_bytes(campaign_dir: Path, tmp_path: Path) -> None:
    """With another number of threads, too."""
    some(campaign_dir, tmp_path / "raw", 7)
    difference.subtract(tmp_path / "raw", tmp_path / "here", Difference(stack_size=4))
    code = (
        "import sys; from blobpipe.images import difference; from blobpipe.params import Difference;"
        "difference.subtract(sys.argv[1], sys.argv[2], Difference(stack_size=4), 0)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "raw"), str(tmp_path / "there")]
    subprocess.run(
        words, check=True, env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    )
    assert content(tmp_path / "here") == content(tmp_path / "there")


def test_batches_may_be_made_in_any_order(
    campaign_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some(campaign_dir, tmp_path / "raw", 7)
    params = Difference(stack_size=3)
    monkeypatch.setattr(tables, "BATCH", 4)
    difference.subtract(tmp_path / "raw", tmp_path / "all", params)
    for batch in (1, 0):
        difference.subtract(tmp_path / "raw", tmp_path / "each", params, batch)
    assert content(tmp_path / "all") == content(tmp_path / "each")
    assert tables.read_stage(tmp_path / "all")["status"].tolist() == ["stack"] * 3 + ["ok"] * 4


def test_as_many_images_before_a_batch_are_read_as_its_stacks_take(
    campaign_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three usable ones before rows 6 and 7, of which the fifth cannot be used."""
    names = some(campaign_dir, tmp_path / "raw", 8)["frame"]
    fits_images.find_image(tmp_path / "raw", names[4]).write_bytes(b"")
    monkeypatch.setattr(tables, "BATCH", 6)
    read: list[int] = []
    original = difference._read
    monkeypatch.setattr(difference, "_read", lambda *args: read.append(args[2]) or original(*args))
    difference.subtract(tmp_path / "raw", tmp_path / "out", Difference(stack_size=3), 1)
    assert sorted(read) == [2, 3, 4, 5, 6, 7]
    assert pd.read_csv(tmp_path / "out" / "frames-001.csv")["n_stack"].tolist() == [3, 3]


def test_bad_images_are_rejected_and_the_rest_goes_on(campaign_dir: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    names = some(campaign_dir, raw, 9)["frame"]
    truncated, empty, cut = (fits_images.find_image(raw, names[i]) for i in (1, 4, 6))
    truncated.write_bytes(truncated.read_bytes()[:100_000])
    fits_images.write_image(empty, np.full((1024, 1024), np.nan, np.float32), name="SCI")
    fits_images.write_image(
        cut, np.random.default_rng(1).normal(0, 0.01, (512, 512)).astype(np.float32), name="SCI"
    )
    difference.subtract(raw, tmp_path / "out", Difference(stack_size=3))
    done = tables.read_stage(tmp_path / "out")
    s = "stack"
    o = "ok"
    r = "rejected"
    assert done["status"].tolist() == [s, r, s, s, r, o, r, o, o]
    assert all(done["reason"][i].startswith(str(raw / names[i])) for i in (1, 4, 6))
    assert "512x512 pixels, expected 1024x1024" in done["reason"][6]
    assert done.query("status == 'ok'")["n_stack"].tolist() == [3, 3, 3]
    assert done.query("status != 'ok'")[["shift_x_px", "shift_y_px"]].eq(0).all(axis=None)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.fz")) == sorted(
        f"{names[i]}.fits.fz" for i in (5, 7, 8)
    )


@pytest.mark.parametrize(
    "factor", [1 / 40, *(pytest.param(f, marks=pytest.mark.long) for f in (30.0, 1e-9))]
)
def test_images_of_another_noise_are_rejected_and_left_out_of_stacks(
    campaign_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """Among the first images, too, and where batches end."""
    names = some(campaign_dir, tmp_path / "raw", 9)["frame"]
    for i in (1, 4, 7):
        path = fits_images.find_image(tmp_path / "raw", names[i])
        plane = fits_images.read_frame(path).data * np.float32(factor)
        path.unlink()  # a link to the one that other tests use
        fits_images.write_image(path, plane, name="SCI", sigma=0.01 * factor)
    monkeypatch.setattr(tables, "BATCH", 5)
    difference.subtract(tmp_path / "raw", tmp_path / "out", Difference(stack_size=3))
    done = tables.read_stage(tmp_path / "out")
    s = "stack"
    o = "ok"
    r = "rejected"
    assert done["status"].tolist() == [s, r, s, s, r, o, o, r, o]
    assert all(
        f"{names[i]}" in done["reason"][i] and "noise" in done["reason"][i] for i in (1, 4, 7)
    )
    assert done.query("status == 'ok'")["noise_frac"].between(0.005, 0.02).all()
    difference.reference(tmp_path / "raw", tmp_path / "out", Difference(stack_size=3))
    scatter = fits_images.read_plane(tmp_path / "out" / "reference.fits.fz", "SCATTER")
    assert not scatter.any()  # of three images; a fourth has not been taken
    stack = fits_images.read_plane(tmp_path / "out" / "reference.fits.fz", "STACK")
    assert clean_noise(stack) < 0.02


def test_unregistered_difference_is_image_minus_median(campaign_dir: Path, tmp_path: Path) -> None:
    names = some(campaign_dir, tmp_path / "raw", 5)["frame"]
    params = Difference(stack_size=3, register_shift=False, known_blobs=False)
    difference.subtract(tmp_path / "raw", tmp_path / "out", params)
    images = [
        fits_images.read_frame(fits_images.find_image(tmp_path / "raw", name)).data
        for name in names
    ]
    expected = images[4] - np.median(images[1:4], axis=0)
    found = fits_images.read_frame(tmp_path / "out" / f"{names[4]}.fits.fz").data
    np.testing.assert_allclose(found, expected, atol=NOISE / 16)
    assert tables.read_stage(tmp_path / "out")[["shift_x_px", "shift_y_px"]].eq(0).all(axis=None)


def test_too_few_images_for_the_reference(campaign_dir: Path, tmp_path: Path) -> None:
    some(campaign_dir, tmp_path / "raw", 4)
    with pytest.raises(
        FrameError, match=r"found 4 usable images, expected at least difference.stack_size=5"
    ):
        difference.reference(tmp_path / "raw", tmp_path / "out", Difference(stack_size=5))
    assert not (tmp_path / "out").exists()


def test_unknown_batch_is_refused(
    campaign_dir: Path, tmp_path: Path, difference_params: Difference
) -> None:
    with pytest.raises(TableError, match="found no batch 7, expected 0 to "):
        difference.subtract(campaign_dir, tmp_path, difference_params, 7)


# --- on arrays ---


def test_running_median_is_the_median_of_each_run(images: np.ndarray) -> None:
    crop = images[:, :70, 300:340]
    medians = running_median(crop, 5)
    assert medians.dtype == np.float32
    assert medians.shape == (14, 70, 40)
    expected = np.stack([np.median(crop[i : i + 5], axis=0) for i in range(14)])
    np.testing.assert_allclose(medians, expected, rtol=1e-6)


def test_running_median_leaves_missing_values_out() -> None:
    images = np.arange(12, dtype=np.float32).reshape(4, 1, 3)
    images[1, 0, 0] = np.nan
    images[:, 0, 2] = np.nan
    np.testing.assert_array_equal(
        running_median(images, 3)[:, 0], [[3, 4, np.nan], [7.5, 7, np.nan]]
    )


def test_clean_noise_ignores_outliers_edges_and_missing_values() -> None:
    image = np.random.default_rng(1).normal(0, 0.01, (512, 512)).astype(np.float32)
    image[100:110, 100:110], image[:30], image[200, 200:210] = 5, 5, np.nan
    assert clean_noise(image) == pytest.approx(0.01, rel=0.02)


def test_scatter_is_the_noise_and_shows_what_flickers() -> None:
    images = np.random.default_rng(5).normal(0, 0.01, (30, 101, 100)).astype(np.float32)
    images[4, 40:44, 60:64] += 0.1
    images[-3:, 80:84, 20:24] += 0.2
    images[:, 10, 10] = np.nan
    found = rms_map(images, np.median(images, axis=0))
    assert found.shape == (50, 50)
    assert np.median(found) == pytest.approx(0.01, rel=0.03)
    np.testing.assert_allclose(found[20:22, 30:32], np.hypot(0.01, 0.1 / np.sqrt(27)), rtol=0.2)
    assert found[40:42, 10:12].max() < 0.015, "the newest do not count"
    assert found[5, 5] == 0
    assert np.isfinite(found).all()
    assert not rms_map(images[:3], images[0]).any()


def test_difference_and_reference_hold_the_scatter(
    done: pd.DataFrame, difference_dir: Path
) -> None:
    for name in (done.query("status == 'ok'")["frame"].iloc[0], "reference"):
        found = fits_images.read_plane(difference_dir / f"{name}.fits.fz", "SCATTER")
        assert found.shape == (512, 512)
        assert 0.005 < np.median(found[20:-20, 20:-20]) < 0.015


def test_pattern_is_the_known_blobs_and_nothing_else(
    reference: tuple[np.ndarray, np.ndarray], known: pd.DataFrame, campaign_params: Campaign
) -> None:
    _, pattern = reference
    truth = campaign.blob_layer(
        [b for b in campaign.population(campaign_params) if b.first < 0], 0, 0
    )
    assert (pattern == 0).mean() > 0.95
    assert np.corrcoef(pattern[20:-20, 20:-20].ravel(), truth[20:-20, 20:-20].ravel())[0, 1] > 0.98
    assert np.abs(pattern[truth == 0]).max() < 0.2 * pattern.max()


def test_pattern_is_found_without_a_catalogue(
    reference: tuple[np.ndarray, np.ndarray], known: pd.DataFrame
) -> None:
    found = blob_pattern(reference[0])
    strong = known.query(
        "depth_frac > 0.03 and x_px > 20 and x_px < 1000 and y_px > 20 and y_px < 1000"
    )
    at = found[strong["y_px"].round().astype(int), strong["x_px"].round().astype(int)]
    assert np.mean(at > 0.5 * strong["depth_frac"]) > 0.9


@pytest.mark.parametrize("catalogue", ["whole", "none"])
def test_shift_is_measured(
    shifted: dict[Shift, np.ndarray],
    reference: tuple[np.ndarray, np.ndarray],
    known: pd.DataFrame,
    catalogue: str,
) -> None:
    stack, _ = reference
    pattern = blob_pattern(stack, known if catalogue == "whole" else None)
    errors = [
        np.subtract(measure_shift(image, stack, pattern), shift) for shift, image in shifted.items()
    ]
    assert (np.sqrt(np.mean(np.square(errors), axis=0)) < 0.1).all()
    assert np.abs(errors).max() < 0.15


def test_streaks_and_flashing_pixels_do_not_pull_the_shift(
    shifted: dict[Shift, np.ndarray], reference: tuple[np.ndarray, np.ndarray]
) -> None:
    stack, pattern = reference
    rng = np.random.default_rng(2)
    for shift, image in list(shifted.items())[:3]:
        dirty = image.copy()
        for row in rng.integers(50, 950, 8):
            dirty[row : row + 3, 100:400] -= 0.05
        dirty.flat[rng.choice(dirty.size, 20_000)] += 1.0
        found = measure_shift(dirty, stack, pattern)
        assert tuple(found) == pytest.approx(tuple(shift), abs=0.15)


def test_a_burst_next_to_a_known_blob_does_not_pull_the_shift() -> None:
    """Whatever is brighter than the deepest known blob and the noise counts as this bright."""
    rng = np.random.default_rng(2)
    pattern = np.zeros((192, 192), np.float32)
    for x, y, radius in OLD:
        window = pattern[round(y) - 20 : round(y) + 21, round(x) - 20 : round(x) + 21]
        window += 0.1 * blob_profile("disc", radius, x - round(x), y - round(y), 41)
    image = move_pattern(pattern, Shift(1.3, -0.6)) + rng.normal(0, 5e-3, pattern.shape).astype(
        np.float32
    )
    x, y, radius = OLD[0]
    image[round(y) - 2 : round(y) + 3, round(x + radius) : round(x + radius) + 5] += 500
    found = measure_shift(image, pattern, pattern)
    assert tuple(found) == pytest.approx((1.3, -0.6), abs=0.1)


def test_no_pattern_gives_no_shift(reference: tuple[np.ndarray, np.ndarray]) -> None:
    stack, pattern = reference
    image = stack + NOISE * np.random.default_rng(3).standard_normal(stack.shape, np.float32)
    assert measure_shift(image, stack, np.zeros_like(pattern)) == (0.0, 0.0)
    assert measure_shift(image, stack, 1e-4 * pattern) == (0.0, 0.0)


def test_dips_go_and_noise_stays(
    shifted: dict[Shift, np.ndarray], reference: tuple[np.ndarray, np.ndarray], known: pd.DataFrame
) -> None:
    stack, pattern = reference
    near = (pattern > 0.01) & np.isfinite(stack)
    for shift, image in shifted.items():
        left, found = difference.difference_image(image, stack, Difference(), known)
        plain, nowhere = difference.difference_image(
            image, stack, Difference(register_shift=False), known
        )
        assert nowhere == (0.0, 0.0)
        assert tuple(found) == pytest.approx(tuple(shift), abs=0.15)
        assert clean_noise(left) == pytest.approx(clean_noise(plain), rel=0.01)
        before, after = (np.sqrt(max(np.var(each[near]) - NOISE**2, 0)) for each in (plain, left))
        assert after < (0.4 * before if np.hypot(*shift) > 0.9 else before + 0.003)


@pytest.mark.parametrize("shift", [Shift(1.9, -1.9), Shift(-2.2, 0.7)])
def test_blob_that_the_border_cuts_leaves_no_dip_either(shift: Shift) -> None:
    rng = np.random.default_rng(4)
    places = [
        (6.2, 100.8),
        (150.3, 250.4),
        (60.7, 6.1),
        (130.1, 60.9),
        (200.4, 150.2),
        (60.3, 200.7),
        (250.1, 90.4),
    ]

    def image(shift: Shift, noise: float) -> np.ndarray:
        padded = np.zeros((256 + 40, 256 + 40), np.float32)
        for x, y in places:
            x = x + shift.x_px + 20
            y = y + shift.y_px + 20
            stamp = blob_profile("diamond", 5.9, x - round(x), y - round(y))
            padded[round(y) - 20 : round(y) + 21, round(x) - 20 : round(x) + 21] += 0.066 * stamp
        inner = padded[25:-25, 25:-25] + noise * rng.standard_normal((246, 246), np.float32)
        return np.pad(inner, 5, constant_values=np.nan)

    left, found = difference.difference_image(
        image(shift, 0.0085), image(Shift(0, 0), 0.0055), Difference()
    )
    assert tuple(found) == pytest.approx(tuple(shift), abs=0.1)
    at_the_border = left[95:107, 5:9], left[5:9, 55:67]
    assert max(abs(part.mean()) for part in at_the_border) < 0.01  # a sixth of the depth


def test_stack_of_another_size_is_refused(images: np.ndarray) -> None:
    with pytest.raises(FrameError, match="found 1024x1024 pixels, expected 512x512"):
        difference.difference_image(images[0], images[1, :512, :512], Difference())


def test_recent_blob_is_taken_from_the_images_since_it_landed() -> None:
    images = np.zeros((5, 64, 64), np.float32)
    images[3:, 20:41, 20:41] = 0.1
    blob = pd.DataFrame({"x_px": [30.0], "y_px": [30.0], "radius_px": [5.0], "first": [13]})
    rows = [8, 9, 11, 13, 14]
    recent = landed_within(blob, rows, images[0].shape)
    stack = with_recent_blobs(np.median(images, axis=0), images, recent)
    assert stack[30, 30] == np.float32(0.1)
    assert stack[30, 30 + 12] == 0
    assert landed_within(blob.assign(first=8), rows, images[0].shape) == []


def test_a_blob_that_landed_within_the_stack_has_not_flickered() -> None:
    rng = np.random.default_rng(1)
    images = rng.normal(0, 0.01, (30, 64, 64)).astype(np.float32)
    images[20:, 12:53, 12:53] += 0.1 * blob_profile("disc", 5.0)
    blob = pd.DataFrame({"x_px": [32.0], "y_px": [32.0], "radius_px": [5.0], "first": [20]})
    recent = landed_within(blob, list(range(30)), images[0].shape)
    stack = with_recent_blobs(np.median(images, axis=0), images, recent)
    blind = rms_map(images, stack)
    aware = rms_map(images, stack, recent)
    middle = slice(14, 18)
    assert blind[middle, middle].mean() > 0.05
    assert aware[middle, middle].mean() == pytest.approx(0.01, rel=0.2)
    np.testing.assert_array_equal(blind[:6], aware[:6])


def test_recent_blob_of_a_shifted_image_is_moved_back() -> None:
    """Else it would leave a dip in the next image."""
    images = np.zeros((4, 64, 64), np.float32)
    images[3, 12:53, 12:53] = 0.1 * blob_profile("disc", 5.0, 2.0, -1.5)
    blob = pd.DataFrame({"x_px": [32.0], "y_px": [32.0], "radius_px": [5.0], "first": [3]})
    shifts = [Shift(0.0, 0.0)] * 3 + [Shift(2.0, -1.5)]
    recent = landed_within(blob, [0, 1, 2, 3], images[0].shape)
    stack = with_recent_blobs(np.median(images, axis=0), images, recent, shifts)
    np.testing.assert_allclose(stack[12:53, 12:53], 0.1 * blob_profile("disc", 5.0), atol=0.01)


# --- a small campaign, 256 x 256 px ---

SMALL_NOISE = 0.004
OLD = [
    (40.2, 60.7, 6.0),
    (150.4, 40.3, 5.0),
    (100.0, 100.0, 7.0),
    (30.8, 150.1, 4.5),
    (160.6, 150.9, 6.5),
]
# row of the image on which it landed
LATER = {2: (90.3, 30.2, 5.0), 3: (60.1, 110.4, 5.0), 5: (120.3, 165.6, 5.5)}
MIRROR = {4: Shift(1.5, -1.0), 6: Shift(-2.0, 0.6)}
REJECTED = 7


def small_image(row: int, rng: np.random.Generator) -> np.ndarray:
    """What has landed by this row, where the mirror puts it, and noise."""
    image = rng.normal(0, SMALL_NOISE, (256, 256)).astype(np.float32)
    shift = MIRROR.get(row, NO_SHIFT)
    for x, y, radius in [*OLD, *(blob for first, blob in LATER.items() if first <= row)]:
        x = x + shift.x_px
        y = y + shift.y_px
        window = image[round(y) - 20 : round(y) + 21, round(x) - 20 : round(x) + 21]
        window += 0.1 * blob_profile("disc", radius, x - round(x), y - round(y), 41)
    return image


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images, of which one cannot be read, and their catalogue; only for reading."""
    raw = tmp_path_factory.mktemp("small") / "raw"
    rng = np.random.default_rng(6)
    names = [f"f{row}" for row in range(10)]
    for row, name in enumerate(names):
        fits_images.write_image(
            raw / f"{name}.fits.fz", small_image(row, rng), name="SCI", sigma=SMALL_NOISE
        )
    fits_images.write_image(
        raw / f"f{REJECTED}.fits.fz", np.zeros((50, 256), np.float32), name="SCI", sigma=1.0
    )
    tables.write_table(raw / "frames.csv", pd.DataFrame({"frame": names, "mjd": np.arange(10.0)}))
    blobs = pd.DataFrame([*OLD, *LATER.values()], columns=["x_px", "y_px", "radius_px"])
    blobs = blobs.assign(first_frame=[""] * len(OLD) + [f"f{row}" for row in LATER])
    blobs = blobs.assign(blob=[f"b{i}" for i in range(len(blobs))], depth_frac=0.1)
    tables.write_table(raw / "blobs.csv", blobs)
    return raw


@pytest.fixture
def small_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(difference, "SHAPE", (256, 256))


def light_at(image: np.ndarray, blob: tuple[float, float, float]) -> float:
    """Mean around the middle of a blob."""
    x = round(blob[0])
    y = round(blob[1])
    return float(np.nanmean(image[y - 1 : y + 2, x - 1 : x + 2]))


@pytest.mark.usefixtures("small_shape")
@pytest.mark.parametrize("batch", [4, 10])
def test_a_blob_is_new_on_the_image_on_which_it_lands(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """However the images are shared out, whatever the mirror does: as deep as it is then, gone from then on."""
    monkeypatch.setattr(tables, "BATCH", batch)
    difference.subtract(small, tmp_path, Difference(stack_size=3))
    done = tables.read_stage(tmp_path)
    assert done["status"].tolist() == ["stack"] * 3 + ["ok"] * 4 + ["rejected"] + ["ok"] * 2
    assert done["reason"].tolist()[:3] == [f"{k} usable images before it" for k in range(3)]
    assert done["n_stack"].tolist() == [0, 1, 2, 3, 3, 3, 3, 0, 3, 3]
    assert (done["shift_x_px"].abs() + done["shift_y_px"].abs()).gt(0.2).tolist() == [
        row in MIRROR for row in range(10)
    ]
    for row in np.flatnonzero(done["status"] == "ok"):
        image = fits_images.read_frame(tmp_path / f"f{row}.fits.fz").data
        assert tuple(done.loc[row, ["shift_x_px", "shift_y_px"]]) == pytest.approx(
            MIRROR.get(row, (0, 0)), abs=0.1
        )
        assert clean_noise(image) == pytest.approx(SMALL_NOISE * np.sqrt(1 + np.pi / 6), rel=0.1)
        for first, blob in LATER.items():
            assert light_at(image, blob) == pytest.approx(0.1 if first == row else 0, abs=0.015), (
                row,
                first,
            )
        assert max(abs(light_at(image, blob)) for blob in OLD) < 0.015


@pytest.mark.usefixtures("small_shape")
def test_the_reference_knows_what_landed_on_its_images_and_nothing_later(
    small: Path, tmp_path: Path
) -> None:
    difference.reference(small, tmp_path, Difference(stack_size=3))
    stack, pattern = (
        fits_images.read_plane(tmp_path / "reference.fits.fz", name)
        for name in ("STACK", "PATTERN")
    )
    for image in (stack, pattern):
        assert light_at(image, LATER[2]) == pytest.approx(0.1, abs=0.015)
        assert light_at(image, LATER[3]) == pytest.approx(0, abs=0.01)
        assert [light_at(image, blob) for blob in OLD] == pytest.approx([0.1] * len(OLD), abs=0.015)
    difference.reference(small, tmp_path / "plain", Difference(stack_size=3, known_blobs=False))
    assert (
        light_at(fits_images.read_plane(tmp_path / "plain/reference.fits.fz", "STACK"), LATER[2])
        < 0.02
    )


@pytest.mark.usefixtures("small_shape")
def test_the_blobs_that_are_moved_back_are_those_known_by_the_end_of_the_first_stack(
    small: Path,
) -> None:
    table = tables.read_frame_list(small)
    blobs = difference._catalogue(small)
    members, images = zip(*(difference._read(small, table, row) for row in range(7)), strict=True)
    pattern = difference._register(
        list(images), list(members), Difference(stack_size=3), blobs
    ).pattern
    assert light_at(pattern, LATER[2]) == pytest.approx(0.1, abs=0.015)
    assert light_at(pattern, LATER[3]) == 0  # not even the noise at the place of what lands later


# --- what is a blob of the stack, and what is not ---


def stack_with(
    *structures: tuple[slice, slice, float], shape: tuple[int, int] = (256, 512)
) -> np.ndarray:
    """Noise, a blob at 60, 60 that is one in any case, and structures with the soft edges of blobs."""
    image = np.zeros(shape, np.float32)
    for rows, columns, level in structures:
        image[rows, columns] = level
    image = smooth_gaussian(image, 1.2)
    image[40:81, 40:81] += 0.1 * blob_profile("disc", 6.0)
    return image + np.random.default_rng(8).normal(0, 0.003, shape).astype(np.float32)


@pytest.mark.parametrize(
    ("structure", "is_blob"),
    [
        ((slice(150, 160), slice(200, 212), 0.1), True),
        ((slice(150, 154), slice(200, 260), 0.1), False),  # a streak
        ((slice(150, 210), slice(200, 260), 0.1), False),  # larger than any blob
        ((slice(150, 160), slice(200, 212), 0.5), False),  # deeper than any blob
        ((slice(150, 160), slice(200, 212), -0.1), False),  # bright
        ((slice(54, 64), slice(357, 367), 0.1), False),  # the Death Star
    ],
)
def test_of_the_stack_compact_dark_patches_are_blobs(
    structure: tuple[slice, slice, float], is_blob: bool
) -> None:
    pattern = blob_pattern(stack_with(structure))
    inside = pattern[structure[:2]]
    assert inside.mean() > 0.08 if is_blob else np.abs(inside).max() < 0.01
    assert pattern[60, 60] > 0.08


@pytest.mark.parametrize("side", [2, 4, 6])
def test_clusters_of_bad_pixels_with_hard_edges_are_no_blobs(side: int) -> None:
    stack = stack_with()
    stack[150 : 150 + side, 200 : 200 + side] += np.random.default_rng(3).uniform(
        0.05, 0.2, (side, side)
    )
    assert np.abs(blob_pattern(stack)[140:170, 190:220]).max() < 0.01


def test_a_blob_of_the_catalogue_is_in_the_pattern_however_faint_up_to_its_outer_edge() -> None:
    stack = stack_with()
    faint = pd.DataFrame({"x_px": [300.0], "y_px": [150.0], "radius_px": [6.0]})
    found = blob_pattern(stack, faint) - blob_pattern(stack)
    rows, columns = np.mgrid[:256, :512]
    distance = np.hypot(columns - 300, rows - 150)
    assert (found[distance >= 1.55 * 6 + 2.5] == 0).all()
    assert (found[distance < 1.55 * 6 + 2.4] != 0).mean() > 0.99
    smooth = smooth_gaussian(stack, SMOOTHING_PX, twice=True)
    np.testing.assert_allclose(found[distance < 1.55 * 6], smooth[distance < 1.55 * 6], atol=0.003)


def test_the_pattern_goes_on_beyond_the_border_as_a_mirror_image() -> None:
    stack = np.full((12, 10), np.nan, np.float32)
    stack[2:-1, 3:] = np.random.default_rng(1).normal(0, 1, (9, 7))
    continued = _continued(stack)
    np.testing.assert_array_equal(continued[2:-1, 3:], stack[2:-1, 3:])
    np.testing.assert_array_equal(continued[:2], continued[2:4][::-1])
    np.testing.assert_array_equal(continued[-1], continued[-2])
    np.testing.assert_array_equal(continued[:, :3], continued[:, 3:6][:, ::-1])


def test_bad_pixels_are_filled_from_around_and_the_rest_is_left_alone() -> None:
    image = np.full((40, 40), 0.07, np.float32)
    image[:, 20:] = 0.01
    good = np.ones(image.shape, bool)
    good[10, 5] = good[0, 0] = good[39, 30] = False
    damaged = np.where(good, image, 9.0).astype(np.float32)
    np.testing.assert_allclose(_filled(damaged, good), image, atol=1e-6)
    nothing = _filled(damaged, np.zeros_like(good))
    assert not nothing.any()


def test_smoothing_is_a_gaussian_and_twice_what_the_first_time_lost() -> None:
    image = np.zeros((64, 80), np.float32)
    pixels = np.arange(-20, 21)
    image[30, 41] = 1
    once = smooth_gaussian(image, 1.7)
    along = np.exp(-((pixels / 1.7) ** 2) / 2) / (1.7 * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(once[10:51, 21:62], np.outer(along, along), atol=1e-5)
    twice = smooth_gaussian(image, 1.7, twice=True)
    np.testing.assert_allclose(twice, once + smooth_gaussian(image - once, 1.7), atol=1e-6)


def test_a_shift_is_exact_without_noise() -> None:
    rng = np.random.default_rng(2)
    pattern = np.zeros((192, 192), np.float32)
    for x, y, radius in OLD:
        window = pattern[round(y) - 20 : round(y) + 21, round(x) - 20 : round(x) + 21]
        window += 0.1 * blob_profile("disc", radius, x - round(x), y - round(y), 41)
    # of the detector: does not move
    stack = pattern + rng.normal(0, 0.01, pattern.shape).astype(np.float32)
    for shift in (
        Shift(0.04, 0.0),
        Shift(0.73, -0.31),
        Shift(-2.46, 1.87),
        Shift(0.0, 3.5),
        Shift(5.2, -4.9),
    ):
        noise = rng.normal(0, 1e-4, pattern.shape).astype(np.float32)
        image = stack - pattern + move_pattern(pattern, shift) + noise
        assert tuple(measure_shift(image, stack, pattern)) == pytest.approx(tuple(shift), abs=0.03)


def test_a_shift_beyond_any_of_the_mirror_is_a_mistake(caplog: pytest.LogCaptureFixture) -> None:
    pattern = np.zeros((192, 192), np.float32)
    pattern[76:117, 76:117] = 0.1 * blob_profile("disc", 6.0)
    noise = np.random.default_rng(2).normal(0, 1e-3, pattern.shape).astype(np.float32)
    image = np.roll(pattern, 7, axis=1) + noise
    assert measure_shift(image, pattern, pattern) == (0.0, 0.0)
    assert (
        "a shift of 7.0" in caplog.text
        or "a shift of 6.9" in caplog.text
        or "a shift of 7.1" in caplog.text
    )


def test_the_usual_place_is_where_most_of_the_first_images_have_the_blobs() -> None:
    shifts = [Shift(0.5, -1.0), Shift(0.5, -1.0), Shift(3.0, 1.0), Shift(2.5, 4.0)]
    assert usual_place_is_zero(shifts, 3) == [(0.0, 0.0), (0.0, 0.0), (2.5, 2.0), (2.0, 5.0)]


def test_sums_of_two_by_two_pixels_leave_an_odd_row_and_column_out() -> None:
    assert _binned(np.arange(15.0).reshape(3, 5)).tolist() == [[12, 20]]


def test_what_landed_within_a_stack_is_known_by_the_rows_of_its_images() -> None:
    """After the first of them, for that is how all of them show it, and up to the last."""
    blobs = pd.DataFrame(
        {"x_px": 30.0, "y_px": 40.0, "radius_px": 4.0, "first": [-1, 8, 9, 10, 13, 14, 15]}
    )
    recent = landed_within(blobs, [8, 9, 11, 13, 14], (64, 48))
    assert [blob.start for blob in recent] == [1, 2, 3, 4]
    for blob in recent:
        rows, columns = np.mgrid[blob.window]
        np.testing.assert_allclose(blob.distance, np.hypot(columns - 30, rows - 40))
        assert (blob.inside == (blob.distance < 1.55 * 4 + 2.5)).all()
        # what a shift of 6 px may touch
        assert (blob.window[0].start, blob.window[1].stop) == (27, 44)


@pytest.mark.parametrize(("x", "y"), [(1.2, 2.0), (46.9, 60.7), (-3.0, 30.0), (60.0, -9.0)])
def test_the_square_around_a_place_ends_where_the_image_does(x: float, y: float) -> None:
    image = np.zeros((64, 48))
    window, distance = window_around(image.shape, x, y, 5.0)
    assert image[window].shape == distance.shape
    image[window][distance <= 5] = 1
    rows, columns = np.mgrid[:64, :48]
    assert (image == (np.hypot(columns - x, rows - y) <= 5)).all()


@pytest.mark.parametrize(
    ("shape", "compact"),
    [
        ((4, 4), True),
        ((3, 5), False),
        ((4, 9), True),
        ((4, 10), False),
        ((44, 44), True),
        ((45, 40), False),
    ],
)
def test_compact_is_neither_a_few_pixels_nor_long_nor_large(
    shape: tuple[int, int], compact: bool
) -> None:
    assert _compact(np.ones(shape, bool)) == compact
    assert _compact(np.ones(shape[::-1], bool)) == compact


def test_a_soft_region_is_whole_and_ends_within_three_widths() -> None:
    rows, columns = np.mgrid[:80, :80]
    distance = np.hypot(columns - 40, rows - 40)
    soft = soften(distance <= 10, 3.0)
    assert (soft[distance <= 10] == 1).all()
    assert (soft[distance > 19.5] == 0).all()
    assert ((soft > 0) & (soft < 1)).any()


def test_a_blob_is_not_deeper_than_any_and_leaves_noise() -> None:
    rest = np.random.default_rng(1).normal(0, 1, 400)
    rest *= 0.01 / rest.std()
    for depth, scale, likely in (
        (0.34, 1.0, True),
        (0.36, 1.0, False),
        (0.1, 1.55, True),
        (0.1, 1.65, False),
    ):
        values = np.linspace(0, depth, 400)
        assert _blob_like(values, scale * rest, 0.01) == likely, (depth, scale)
