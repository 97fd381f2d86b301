"""The simulated campaign: as many cases as asked for, as blobs and monitor images really are, the same bytes every time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import gaussian_filter, zoom

from blobpipe.core import fits_images, tables
from blobpipe.core.arrays import Image
from blobpipe.core.blob_shapes import blob_profile, matched_snr
from blobpipe.core.detector import Detector
from blobpipe.errors import ParamsError
from blobpipe.params import Campaign
from blobpipe.simulation import campaign

TINY = Campaign(n_frames=6, first_frames=2, n_cases=2, n_known=5)


@pytest.fixture(scope="module")
def blobs() -> pd.DataFrame:
    return pd.DataFrame(campaign.population(Campaign()))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_names_look_like_rootnames() -> None:
    names = campaign.frame_names(Campaign(n_frames=12_000))
    assert names[0] == "idbb0a01q_blob"
    assert len(set(names)) == len(names) == 12_000
    assert names == sorted(names)
    assert {len(name) for name in names} == {len("idbb0a01q_blob")}


def test_names_are_found_without_heavy_imports() -> None:
    """Snakemake asks for them each time it reads the rules."""
    code = (
        "import sys; from blobpipe.simulation import campaign; from blobpipe.params import Campaign;"
        "assert len(campaign.frame_names(Campaign())) == 220;"
        "heavy = {'pandas', 'scipy', 'astropy', 'skimage', 'torch', 'numba'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_default_campaign_has_the_cases_of_the_report() -> None:
    labels = campaign.labels(Campaign())
    assert labels[:30] == ["stack"] * 30
    assert labels.count("historical") == 110 >= 105
    assert labels.count("clean") >= 40


def test_historical_frames_are_those_that_show_new_blobs(blobs: pd.DataFrame) -> None:
    labels = campaign.labels(Campaign())
    landed = blobs.query("first >= 0")["first"].value_counts()
    assert {i for i, label in enumerate(labels) if label == "historical"} == set(landed.index)
    assert landed.min() == 1
    assert landed.max() <= 3


@pytest.mark.parametrize("seed", [1, 7])
def test_counts_are_as_asked_for(seed: int) -> None:
    params = Campaign(n_frames=24, first_frames=8, n_cases=5, n_known=13, seed=seed)
    labels = campaign.labels(params)
    blobs = campaign.population(params)
    assert (len(labels), labels.count("stack"), labels.count("historical")) == (24, 8, 5)
    assert sum(blob.first < 0 for blob in blobs) == 13
    assert min(blob.first for blob in blobs if blob.first >= 0) >= 8


def test_too_many_cases_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ParamsError, match=r"n_cases=16, expected fewer than the 16 images after the first 8"
    ):
        campaign.simulate(tmp_path, Campaign(n_frames=24, first_frames=8, n_cases=16))
    assert not list(tmp_path.iterdir())


def test_sizes_are_those_of_real_blobs(blobs: pd.DataFrame) -> None:
    low, median, high = 2 * np.percentile(blobs["radius_px"], [5, 50, 95])
    assert median == pytest.approx(10.9, abs=1.0)
    assert (low, high) == (pytest.approx(6.8, abs=1.2), pytest.approx(16.3, abs=1.2))
    assert np.corrcoef(blobs["radius_px"], blobs["x_px"] + blobs["y_px"])[0, 1] < -0.8


def test_depths_are_those_of_real_blobs(blobs: pd.DataFrame) -> None:
    assert (blobs["depth_frac"] > 0.03).mean() == pytest.approx(44 / 114, abs=0.1)
    assert blobs["depth_frac"].between(0.003, 0.3).all()
    assert blobs["depth_frac"].median() == pytest.approx(0.022, abs=0.006)


def test_new_blobs_are_faint_to_strong_but_never_invisible(blobs: pd.DataFrame) -> None:
    new = blobs.query("first >= 0")
    snr = [
        matched_snr(b.depth_frac * blob_profile(b.shape, b.radius_px), 0.0101)
        for b in new.itertuples()
    ]
    assert min(snr) >= 3.0
    assert np.mean(np.array(snr) < 7) > 0.05
    assert max(snr) > 50


def test_new_blobs_keep_their_distance_and_lie_on_the_image(blobs: pd.DataFrame) -> None:
    x = blobs["x_px"].to_numpy()
    y = blobs["y_px"].to_numpy()
    apart = np.hypot(x[:, None] - x[None], y[:, None] - y[None])[np.triu_indices(len(x), 1)]
    assert apart.min() > 20
    new = blobs.query("first >= 0")[["x_px", "y_px"]]
    assert new.min().min() > 15
    assert new.max().max() < 1008


def test_large_ones_are_diamonds_and_rings(blobs: pd.DataFrame) -> None:
    radius = blobs.groupby("shape")["radius_px"].median()
    assert set(radius.index) == {"disc", "diamond", "ring"}
    assert radius["disc"] < min(radius["diamond"], radius["ring"])


def test_shifts_are_mostly_below_a_tenth_with_a_tail_to_three() -> None:
    shifts = np.array([campaign.conditions(Campaign(), i)[1:] for i in range(220)])
    assert np.mean(np.abs(shifts) < 0.1) > 0.75
    assert 1.5 < np.hypot(*shifts.T).max() <= 3.0


def test_photon_levels_stay_in_their_range() -> None:
    levels = [campaign.conditions(Campaign(), i).photons_e for i in range(220)]
    assert 12_000 <= min(levels) < 14_000
    assert 27_000 < max(levels) <= 30_000


def test_dates_increase() -> None:
    dates = campaign.dates(Campaign())
    assert (np.diff(dates) > 0).all()
    assert 55_000 < dates[0] < dates[-1] < 62_000


def test_image_has_a_border_and_the_noise_of_its_photons() -> None:
    params = Campaign()
    image = campaign.render_image(params, 3)
    assert image.dtype == np.float32
    assert image.shape == (1024, 1024)
    assert np.isnan(image).sum() == 1024**2 - 1014**2
    expected = np.hypot(
        campaign.pixel_noise(params, campaign.conditions(params, 3).photons_e), 0.005
    )
    core = image[100:-100, 100:-100]
    assert 1.4826 * np.median(np.abs(core - np.median(core))) == pytest.approx(expected, rel=0.05)


def test_blobs_move_with_the_mirror_and_bad_pixels_do_not() -> None:
    """The brightest known blob is found at its place plus the shift."""
    params = Campaign(shift_px=0.0, large_shift_frac=1.0, n_known=20)
    shift = campaign.conditions(params, 0)
    blob = max(
        (b for b in campaign.population(params) if b.first < 0),
        key=lambda b: b.depth_frac * b.radius_px,
    )
    at = round(blob.y_px), round(blob.x_px)
    layer = campaign.blob_layer([blob], *shift[1:])[
        at[0] - 20 : at[0] + 21, at[1] - 20 : at[1] + 21
    ]
    pixels = np.arange(-20, 21)
    assert layer.sum(axis=0) @ pixels / layer.sum() == pytest.approx(
        blob.x_px - at[1] + shift.shift_x_px, abs=0.01
    )
    assert layer.sum(axis=1) @ pixels / layer.sum() == pytest.approx(
        blob.y_px - at[0] + shift.shift_y_px, abs=0.01
    )
    image = np.nan_to_num(campaign.render_image(params, 0))[
        at[0] - 20 : at[0] + 21, at[1] - 20 : at[1] + 21
    ]
    assert np.corrcoef(gaussian_filter(image.clip(0, 0.3), 1).ravel(), layer.ravel())[0, 1] > 0.8


def test_a_blob_at_the_corner_is_cut_off() -> None:
    blob = campaign.Blob("b", 2.0, 1021.5, 8.0, 0.1, "disc", -1)
    assert campaign.blob_layer([blob], -3.0, 3.0).shape == (1024, 1024)


@pytest.mark.parametrize("shape", [(1024, 1014), (300, 517)])
def test_illumination_is_enlarged_as_by_scipy(shape: tuple[int, int]) -> None:
    ny, nx = shape
    coarse = np.random.default_rng(3).standard_normal((-(-ny // 8), -(-nx // 8)), np.float32)
    expected = zoom(coarse, 8, order=1)[:ny, :nx]
    found = campaign._compiled(campaign._enlarged)(coarse, ny, nx)
    np.testing.assert_array_equal(found, expected)


def test_image_depends_on_neither_order_nor_other_images() -> None:
    first = campaign.render_image(TINY, 4)
    campaign.render_image(TINY, 1)
    np.testing.assert_array_equal(first, campaign.render_image(TINY, 4))
    assert not np.array_equal(first, campaign.render_image(TINY, 5), equal_nan=True)


def test_tables_say_what_the_images_show(campaign_dir: Path, campaign_params: Campaign) -> None:
    table = tables.read_frame_list(campaign_dir)
    blobs = tables.read_blobs(campaign_dir)
    assert list(table.columns) == [
        "frame",
        "mjd",
        "label",
        "seed",
        "photons_e",
        "shift_x_px",
        "shift_y_px",
    ]
    assert list(blobs.columns) == [
        "blob",
        "x_px",
        "y_px",
        "radius_px",
        "depth_frac",
        "shape",
        "first_frame",
    ]
    assert table["frame"].tolist() == campaign.frame_names(campaign_params)
    historical = table.loc[table["label"] == "historical", "frame"]
    assert set(blobs["first_frame"]) - {""} == set(historical)


def test_header_is_that_of_a_monitor_image(campaign_dir: Path) -> None:
    frame = fits_images.read_frame(campaign_dir / "idbb0a01q_blob.fits.fz")
    expected = {
        "TARGNAME": "DARK-EARTH-CALIB",
        "FILTER": "F153M",
        "ROOTNAME": "idbb0a01q",
        "INSTRUME": "WFC3",
    }
    assert {card: frame.header[card] for card in expected} == expected
    assert frame.header["EXPSTART"] == pytest.approx(
        tables.read_frame_list(campaign_dir)["mjd"][0], abs=1e-6
    )


def test_stored_images_are_what_was_rendered(campaign_dir: Path, campaign_params: Campaign) -> None:
    """Rounded to a tenth of the noise, so that the default campaign stays below 250 MB."""
    path = campaign_dir / "idbb0a03q_blob.fits.fz"
    np.testing.assert_allclose(
        fits_images.read_frame(path).data, campaign.render_image(campaign_params, 2), atol=1e-3
    )
    assert path.stat().st_size * 220 < 250e6


def test_one_and_two_processes_give_the_same_bytes(tmp_path: Path) -> None:
    campaign.simulate(tmp_path / "one", TINY)
    campaign.simulate(tmp_path / "two", TINY, threads=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_interrupted_run_leaves_no_tables_and_is_made_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    campaign.simulate(tmp_path, TINY)
    undisturbed = content(tmp_path)
    render = campaign.render_image

    def interrupted(params: Campaign, index: int, detector: Detector) -> Image:
        if index == 3:
            raise KeyboardInterrupt
        return render(params, index, detector)

    with monkeypatch.context() as patch:
        patch.setattr(campaign, "render_image", interrupted)
        with pytest.raises(KeyboardInterrupt):
            campaign.simulate(tmp_path, TINY)
    assert not (tmp_path / "frames.csv").exists()
    campaign.simulate(tmp_path, TINY)
    assert content(tmp_path) == undisturbed


def test_another_seed_is_another_campaign() -> None:
    other = TINY.model_copy(update={"seed": 2})
    assert campaign.population(TINY) != campaign.population(other)
    assert campaign.labels(Campaign(seed=1)) != campaign.labels(Campaign(seed=2))
