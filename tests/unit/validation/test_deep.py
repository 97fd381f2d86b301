"""The stage deep: what it superimposes it finds again, later the fainter it is, and it counts honestly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from blobpipe.core import blob_shapes, fits_images, tables
from blobpipe.errors import TableError
from blobpipe.networks import model_file
from blobpipe.params import Deep, Params
from blobpipe.validation import deep

SIDE = 320
NOISE = 0.0101
N_STACK = 20
N_IMAGES = 44
PARAMS = Params(deep=Deep(snrs=(1.5, 4.0, 9.0), n_landings=2))
CASE = (250.0, 60.0, 5.0)
CASE_SNR = 3.0
SHIFTED = 30


def write_series(root: Path, n_images: int = N_IMAGES) -> tuple[Path, Path]:
    """Images of white noise of which one is shifted; a faint blob of the catalogue lands in the middle."""
    rng = np.random.default_rng(3)
    raw, difference = root / "raw", root / "difference"
    names = [f"frame{k:02d}" for k in range(n_images)]
    pattern = np.zeros((SIDE, SIDE), np.float32)
    add(pattern, 60.0, 250.0, 6.0, 0.1)
    pixels = rng.normal(0, 0.002, pattern.shape).astype(np.float32)
    stack = pattern + pixels
    x, y, radius = CASE
    depth = CASE_SNR * NOISE / np.sqrt(np.square(blob_shapes.blob_profile("disc", radius)).sum())
    rows = []
    for k, name in enumerate(names):
        shift = 1.0 if k == SHIFTED else 0.0
        moved = pixels.copy()
        add(moved, 60.0 + shift, 250.0, 6.0, 0.1)
        noise = rng.normal(0, NOISE, pattern.shape).astype(np.float32)
        if k >= N_STACK + 2:
            add(noise, x + shift, y, radius, depth)
        fits_images.write_image(raw / f"{name}.fits.fz", moved + noise, name="SCI")
        if k >= N_STACK:
            fits_images.write_image(difference / f"{name}.fits.fz", noise, name="DIFFERENCE")
        status = "ok" if k >= N_STACK else "stack"
        rows.append((name, 55_000.0 + k, status, "", shift, 0.0, NOISE))
    columns = ["frame", "mjd", "status", "reason", "shift_x_px", "shift_y_px", "noise_frac"]
    done = pd.DataFrame(rows, columns=columns)
    planes = {"STACK": stack, "PATTERN": pattern}
    fits_images.write_images(difference / "reference.fits.fz", planes)
    tables.write_table(difference / "frames-000.csv", done.assign(n_stack=N_STACK))
    tables.write_table(raw / "frames.csv", done[["frame", "mjd"]])
    known = [("b1", 60.0, 250.0, 6.0, 0.1, "disc", "")]
    known += [("b2", x, y, radius, depth, "disc", names[min(N_STACK + 2, n_images - 1)])]
    columns = [*tables.BLOB_COLUMNS, "shape", "first_frame"]
    tables.write_table(raw / "blobs.csv", pd.DataFrame(known, columns=columns))
    return raw, difference


def add(image: np.ndarray, x: float, y: float, radius: float, depth: float) -> None:
    column = round(x)
    row = round(y)
    window = image[row - 20 : row + 21, column - 20 : column + 21]
    window += depth * blob_shapes.blob_profile("disc", radius, x - column, y - row, 41)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_series(tmp_path_factory.mktemp("series"))


@pytest.fixture(scope="module")
def measured(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("deep")
    deep.measure_deep(*folders, model_file.PACKAGED, out, PARAMS)
    return out


@pytest.mark.slow
def test_clear_blobs_are_found_at_once_and_faint_ones_later(measured: Path) -> None:
    grid = pd.read_csv(measured / "completeness.csv")
    assert tuple(grid) == deep.COMPLETENESS_COLUMNS
    share = grid.pivot(index="snr", columns="n_since", values="completeness")
    assert share.loc[9.0, 1] > 0.8
    assert share.loc[4.0, 1] < 0.4
    assert share.loc[4.0, 8] > share.loc[4.0, 1] + 0.3
    assert share.loc[1.5, 1] == 0
    # found within more images are those within fewer, and some
    assert (share.diff(axis=1).iloc[:, 1:] >= -1e-9).all(axis=None)
    optimum = grid.pivot(index="snr", columns="n_since", values="optimum")
    assert (optimum.loc[9.0] == 1).all()
    assert optimum.loc[4.0, 8] == pytest.approx(1, abs=0.1)


@pytest.mark.slow
def test_first_images_are_counted_from_the_first_of_the_campaign(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the earliest images are no longer kept."""
    monkeypatch.setattr(deep.deep, "KEPT", 33)
    deep.measure_deep(*folders, model_file.PACKAGED, tmp_path, PARAMS)
    error = pd.read_csv(tmp_path / "superimposed.csv")["error_images"].dropna()
    assert len(error) > 3
    assert error.abs().median() <= 1


@pytest.mark.slow
def test_every_table_says_what_the_metrics_say(measured: Path) -> None:
    content = json.loads((measured / "metrics.json").read_text())
    found = pd.read_csv(measured / "superimposed.csv")
    cases = pd.read_csv(measured / "cases.csv")
    alarms = pd.read_csv(measured / "alarms.csv")
    assert tuple(found) == deep.SUPERIMPOSED_COLUMNS
    assert tuple(cases) == deep.CASE_COLUMNS
    assert tuple(alarms) == deep.ALARM_COLUMNS
    assert content["n_images"] == N_IMAGES - N_STACK
    assert content["n_superimposed"] == len(found) > 20
    assert content["n_dated"] == found["error_images"].notna().sum() > 3
    assert content["landing_error_median_images"] <= 2
    assert content["false_alarms_all"] <= 2
    low, high = content["false_alarms_per_100_all_interval"]
    assert low <= content["false_alarms_per_100_all"] <= high
    assert len(content["margins"]) == len(deep.DEPTHS)

    # The blob of the catalogue is too faint for one image
    [case] = cases.to_dict("records")
    assert case["blob"] == "b2"
    assert case["snr"] == pytest.approx(CASE_SNR, rel=0.01)
    assert case["n_images"] > 1
    assert content["cases_found_together"] == 1
    for name in ("completeness", "landing", "alarms"):
        assert (measured / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_superimposed_blobs_keep_apart_and_land_between_two_images(
    folders: tuple[Path, Path],
) -> None:
    series = deep.read_series(*folders, PARAMS)
    blobs = deep.superimpose(series)
    assert blobs.equals(deep.superimpose(series))
    places = blobs[["x_px", "y_px"]].to_numpy()
    apart = np.hypot(*(places[:, None] - places).transpose(2, 0, 1))
    assert apart[~np.eye(len(blobs), dtype=bool)].min() >= 2 * deep.INSIDE_PX
    known = series.blobs[["x_px", "y_px"]].to_numpy()
    assert np.hypot(*(places[:, None] - known).transpose(2, 0, 1)).min() > deep.FREE_PX
    mjd = series.images["mjd"].to_numpy()
    first = blobs["first"].to_numpy()
    assert ((mjd[first - 1] <= blobs["landed_mjd"]) & (blobs["landed_mjd"] <= mjd[first])).all()
    profile = blob_shapes.blob_profile(blobs["shape"][0], blobs["radius_px"][0])
    snr = blob_shapes.matched_snr(blobs["depth_frac"][0] * profile, NOISE)
    assert snr == pytest.approx(blobs["snr"][0])


def test_a_shifted_image_is_read_with_its_stack_at_the_usual_place(
    folders: tuple[Path, Path],
) -> None:
    series = deep.read_series(*folders, PARAMS)
    one = series.read(SHIFTED)
    assert one.shift.x_px == 1.0
    usual = series.read(SHIFTED - 1).stack
    known = np.s_[235:265, 45:75]
    assert np.abs(one.stack - usual)[known].max() < 0.1 * 0.1


def test_the_level_of_a_whole_image_keeps_the_budget() -> None:
    """On images of smoothed noise the level is exceeded at about as many places as it says."""
    profile = blob_shapes.blob_profile("disc", 4.0).astype(float)
    rng = np.random.default_rng(5)
    kernel = np.fft.rfft2(np.fft.ifftshift(np.pad(profile, [(108, 107)] * 2)))
    expected = 0.5
    level = deep.whole_image_level(4.0, 256 * 256, expected)
    n_above = 0
    for _ in range(60):
        noise = np.fft.rfft2(rng.standard_normal((256, 256)))
        filtered = np.fft.irfft2(noise * kernel) / np.sqrt(np.square(profile).sum())
        above = filtered > level
        peaks = above & (
            filtered
            == np.max(
                [np.roll(filtered, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)],
                axis=0,
            )
        )
        n_above += peaks.sum()
    assert n_above == pytest.approx(60 * expected, rel=0.5)
    assert deep.whole_image_level(4.0, 1024 * 1024, 0.05) > level


def test_margins_keep_the_allowed_number() -> None:
    """Half of the tail of one depth is another's too: a place counts once."""
    rng = np.random.default_rng(7)
    parts = []
    for depth in deep.DEPTHS:
        log_odds = rng.exponential(0.7, 60)
        score = 1 / (1 + np.exp(-log_odds))
        places = {"x_px": rng.uniform(0, 1e5, 60), "y_px": rng.uniform(0, 1e5, 60)}
        parts.append(pd.DataFrame({"n_images": depth, "score": score, "persistent": 1, **places}))
    alarms = pd.concat(parts)
    margins = deep.choose_margins(alarms, 0.5, 10.0)
    n_above = sum(
        (part["score"] >= 1 / (1 + np.exp(-margin))).sum()
        for part, margin in zip(parts, margins, strict=True)
    )
    assert 5 <= n_above <= 15
    # fewer are allowed: all margins are higher
    fewer = deep.choose_margins(alarms, 0.5, 2.0)
    assert (np.array(fewer) > np.array(margins)).all()
    # with a higher single threshold the same scores lie less far above it
    higher = deep.choose_margins(alarms, 0.7, 10.0)
    assert np.allclose(np.array(margins) - np.array(higher), np.log(0.7 / 0.3), atol=0.011)


def test_half_level_lies_between_what_was_tried() -> None:
    snr = pd.Series([1.0, 2.0, 4.0])
    assert deep.half_level(snr, pd.Series([0.0, 0.25, 0.75])) == pytest.approx(3.0)
    assert deep.half_level(snr, pd.Series([0.0, 0.1, 0.4])) is None
    assert deep.half_level(snr, pd.Series([0.6, 0.7, 0.8])) is None


def test_too_few_images_are_one_line(tmp_path: Path) -> None:
    raw, difference = write_series(tmp_path, n_images=N_STACK)
    table = pd.read_csv(difference / "frames-000.csv")
    tables.write_table(difference / "frames-000.csv", table.head(10))
    with pytest.raises(TableError, match="found 10 usable images, expected at least 17"):
        deep.read_series(raw, difference, PARAMS)
    tables.write_table(difference / "frames-000.csv", table)
    with pytest.raises(TableError, match="found no difference image"):
        deep.read_series(raw, difference, PARAMS)
