"""Clip: the report's numbers, and a folder with a bad image in it; scaling of what clipping leaves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from blobpipe.core import files, fits_images, tables
from blobpipe.errors import FrameError, TableError
from blobpipe.images.clip import clip, clip_image, zscale_limits
from blobpipe.images.scale import scale
from blobpipe.params import Clip, Scale


def image(seed: int = 1, sigma: float = 0.0101, bad: float = 0.02) -> np.ndarray:
    """Noise with bad pixels either way, and reference pixels without a value."""
    rng = np.random.default_rng(seed)
    data = rng.normal(0, sigma, (300, 320)).astype(np.float32)
    outliers = rng.random(data.shape) < bad
    data[outliers] += rng.choice([-0.2, 0.2], int(outliers.sum()))
    data[:5], data[-5:], data[:, :5], data[:, -5:] = np.nan, np.nan, np.nan, np.nan
    return data


def test_limits_are_half_of_zscale() -> None:
    filled = np.nan_to_num(image())
    low, high = zscale_limits(filled, Clip().zscale_points)
    _, done = clip_image(image(), Clip())
    assert done.low_frac == pytest.approx(0.5 * low, rel=0.01)
    assert done.high_frac == pytest.approx(0.5 * high, rel=0.01)


def test_limits_are_about_three_sigma() -> None:
    """As on the real difference image, 3.0 to 3.4; a little less here, for want of its stripes and streaks."""
    limits = [clip_image(image(seed), Clip())[1] for seed in range(12)]
    values = np.array([(-done.low_frac, done.high_frac) for done in limits]) / 0.0101
    assert values.mean() == pytest.approx(3.0, abs=0.4)
    assert 2.3 < values.min() <= values.max() < 3.9


def test_the_whole_image_is_sampled_not_its_first_rows() -> None:
    data = image()
    data[:20] *= 40
    _, done = clip_image(data, Clip())
    assert done.high_frac < 6 * 0.0101


def test_limits_follow_the_factor() -> None:
    wide, narrow = (clip_image(image(), Clip(factor=factor))[1] for factor in (0.5, 0.25))
    assert narrow.low_frac == pytest.approx(wide.low_frac / 2)
    assert narrow.clipped_frac > wide.clipped_frac


def test_gaps_and_border_become_the_median_of_the_rest() -> None:
    data = image() + 0.005
    data[:, :10] = 1e9  # extreme reference pixels, and five more columns that are not
    data[100, 100], data[101, 101] = np.nan, np.inf
    clipped, done = clip_image(data, Clip())
    inside = data[5:-5, 5:-5]
    median = np.median(inside[np.isfinite(inside)])
    assert clipped[0, 0] == clipped[100, 100] == clipped[101, 101] == median
    assert clipped[50, 7] == np.float32(done.high_frac)
    assert done.replaced_frac == pytest.approx(1 - (290 * 310 - 2) / data.size)
    assert done.clipped_frac == pytest.approx(
        np.mean((clipped == clipped.min()) | (clipped == clipped.max()))
    )


def test_no_border_is_possible() -> None:
    data = np.nan_to_num(image())
    _, done = clip_image(data, Clip(border_px=0))
    assert done.replaced_frac == 0


@pytest.mark.parametrize(
    ("data", "message"), [(np.nan, "finite"), (3.0, "coincide"), (np.inf, "finite")]
)
def test_an_image_without_noise_is_refused(data: float, message: str) -> None:
    with pytest.raises(FrameError, match=message):
        clip_image(np.full((300, 300), data, np.float32), Clip())


# --- the stages ------------------------------------------------------------------------------------------------------


@pytest.fixture
def difference(tmp_path: Path) -> Path:
    """Two batches; one frame rejected earlier, one damaged, one constant."""
    folder = tmp_path / "difference"
    for name in ("a", "b", "d", "e"):
        fits_images.write_image(
            folder / f"{name}.fits.fz",
            image(ord(name)),
            name="DIFFERENCE",
            header={"FILTER": "F153M"},
        )
    (folder / "b.fits.fz").write_bytes((folder / "b.fits.fz").read_bytes()[:9000])
    fits_images.write_image(
        folder / "d.fits.fz", np.ones((300, 300), np.float32), name="DIFFERENCE"
    )
    first = pd.DataFrame({"frame": ["a", "b", "c"], "status": ["ok", "ok", "rejected"]})
    tables.write_table(folder / "frames-000.csv", first)
    tables.write_table(
        folder / "frames-001.csv", pd.DataFrame({"frame": ["d", "e"], "status": ["ok", "ok"]})
    )
    return folder


def test_a_bad_image_is_rejected_with_its_reason_and_the_rest_go_on(
    difference: Path, tmp_path: Path
) -> None:
    clip(difference, tmp_path / "clip", Clip())
    table = tables.read_stage(tmp_path / "clip").set_index("frame")
    assert list(table.index) == ["a", "b", "d", "e"]
    assert dict(table["status"]) == {"a": "ok", "b": "rejected", "d": "rejected", "e": "ok"}
    assert "b.fits.fz" in table.loc["b", "reason"]
    assert "coincide" in table.loc["d", "reason"]
    assert table.loc["a", "reason"] == ""
    assert np.isnan(table.loc["b", "low_frac"])
    assert table.loc["a", "sha256"] == files.sha256(tmp_path / "clip" / "a.fits.fz")
    written = sorted(path.name for path in (tmp_path / "clip").iterdir())
    assert written == ["a.fits.fz", "e.fits.fz", "frames-000.csv", "frames-001.csv"]


def test_both_stages_carry_on_what_is_usable(difference: Path, tmp_path: Path) -> None:
    clip(difference, tmp_path / "clip", Clip())
    scale(tmp_path / "clip", tmp_path / "scale", Scale())
    table = tables.read_stage(tmp_path / "scale")
    assert list(table["frame"]) == ["a", "e"]
    data = fits_images.read_frame(tmp_path / "scale" / "a.fits.fz").data
    assert data.mean() == pytest.approx(0, abs=0.01)
    assert data.std() == pytest.approx(1, abs=0.01)
    assert data.max() == pytest.approx(table["high_sigma"][0], abs=1 / 32)


def test_batches_give_the_same_bytes_as_all_at_once(difference: Path, tmp_path: Path) -> None:
    clip(difference, tmp_path / "all", Clip())
    for batch in (1, 0):
        clip(difference, tmp_path / "one by one", Clip(), batch)
    for path in (tmp_path / "all").iterdir():
        assert path.read_bytes() == (tmp_path / "one by one" / path.name).read_bytes()


def test_a_batch_that_is_not_there_is_said(difference: Path, tmp_path: Path) -> None:
    with pytest.raises(TableError, match="no table"):
        clip(difference, tmp_path / "clip", Clip(), 7)


def test_an_image_that_became_bad_is_not_left_from_the_run_before(
    difference: Path, tmp_path: Path
) -> None:
    clip(difference, tmp_path / "clip", Clip())
    (difference / "a.fits.fz").write_bytes(b"")
    clip(difference, tmp_path / "clip", Clip())
    assert not (tmp_path / "clip" / "a.fits.fz").exists()
