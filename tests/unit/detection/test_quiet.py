"""Simulated quiet images, and how many false alarms may be counted on images without a new blob."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import poisson

from blobpipe.core.detector import DEFAULT
from blobpipe.detection.detectors import DenseDetector, load_dense_detector
from blobpipe.detection.quiet import n_quiet_images, search_noise
from blobpipe.detection.thresholds import LEAST_OF_BUDGET, allowed_alarms
from blobpipe.networks.model_file import PACKAGED
from blobpipe.params import Campaign, Detect, Difference, Params
from blobpipe.simulation import campaign

FULL = (1024, 1024)


def images(folder: Path, params: Campaign, seed: int | None) -> Path:
    names = campaign.frame_names(params)
    table = pd.DataFrame({"frame": names, "mjd": 56000.0 + np.arange(len(names))})
    if seed is not None:
        table["seed"] = seed
    table.to_csv(folder / "frames.csv", index=False)
    for name in names:
        (folder / f"{name}.fits.fz").touch()
    return folder


@pytest.mark.parametrize(
    ("seed", "shape", "wanted", "expected"),
    [(1, FULL, 7, 7), (1, FULL, 0, 0), (2, FULL, 7, 0), (None, FULL, 7, 0), (1, (320, 320), 7, 0)],
)
def test_quiet_images_are_those_of_the_images_own_campaign(
    seed: int | None, shape: tuple[int, int], wanted: int, expected: int, tmp_path: Path
) -> None:
    few = Campaign(seed=1, n_frames=12, first_frames=4, n_cases=2)
    folder = images(tmp_path, few, seed)
    params = Params(
        campaign=few, difference=Difference(stack_size=4), detect=Detect(n_quiet=wanted)
    )
    assert n_quiet_images(folder, params, shape, DEFAULT) == expected


def test_a_quiet_image_shows_old_blobs_and_none_that_is_new() -> None:
    few = Campaign(n_frames=5, first_frames=2, n_cases=2, n_known=10)
    image = campaign.render_quiet_image(few, 0)
    np.testing.assert_array_equal(image, campaign.render_quiet_image(few, 0))
    assert (image != campaign.render_quiet_image(few, 1))[5:-5, 5:-5].any()
    assert len(campaign.known_blobs(few)) == 10
    new = [blob for blob in campaign.population(few) if blob.first >= 0]
    assert new
    for blob in new:
        y = round(blob.y_px)
        x = round(blob.x_px)
        window = image[max(y - 3, 0) : y + 4, max(x - 3, 0) : x + 4]
        assert np.nanmean(window) < 0.5 * blob.depth_frac


@pytest.mark.parametrize("confidence", [0.6, 0.9, 0.99])
@pytest.mark.parametrize("budget", [5.0, 10.0, 30.0, 200.0])
def test_a_mean_above_the_budget_rarely_gives_so_few(budget: float, confidence: float) -> None:
    allowed = allowed_alarms(budget, confidence)
    if allowed > LEAST_OF_BUDGET * budget:
        assert poisson.cdf(np.floor(allowed), budget) <= 1 - confidence + 1e-9
        assert poisson.cdf(np.ceil(allowed), budget) >= 1 - confidence - 1e-9
    assert LEAST_OF_BUDGET * budget <= allowed <= budget


def test_more_images_allow_more_and_more_confidence_less() -> None:
    allowed = [allowed_alarms(budget, 0.9) / budget for budget in (1, 3, 5, 10, 100, 1000)]
    assert (np.diff(allowed) >= 0).all()
    assert allowed[-1] > 0.9
    stricter = [allowed_alarms(10, confidence) for confidence in (0.5, 0.7, 0.9, 0.99)]
    assert (np.diff(stricter) < 0).all()


def test_images_of_noise_hold_blobs_and_noise_and_nothing_that_may_be_either() -> None:
    detector = DenseDetector(load_dense_detector(PACKAGED).network)
    params = Params(detect=Detect(n_noise=4))
    found = search_noise(detector, (600, 600), params)
    pd.testing.assert_frame_equal(found, search_noise(detector, (600, 600), params))
    on_blob = found["is_blob"] == 1
    assert 10 < on_blob.sum() <= 4 * 4 * 9
    assert 0 < (~on_blob).sum() < 4 * 5
    assert found["snr"][on_blob].median() > 8
    assert found["snr"][~on_blob].max() < 6.5
