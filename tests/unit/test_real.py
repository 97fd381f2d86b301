"""The chain on real pixels: images that are not ours to give away, so skipped where they are not at hand.

They are looked for in the folder that BLOBPIPE_REAL names, then in any folder ``real`` beside the project's own.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import gaussian_filter, maximum_filter

from blobpipe import cli
from blobpipe.core import fits_images, tables
from blobpipe.images import check, tiles
from blobpipe.images.clip import clip_image
from blobpipe.images.scale import scale_image
from blobpipe.networks import model_file, report_network
from blobpipe.params import Clip, Scale
from blobpipe.simulation import render, stamps

ROOT = Path(__file__).parents[2]
BLOB = "example_blob.fits.gz"
STACK = "example_median_stack.fits.gz"
EXPOSURE = "ibxy01z8q_ima.fits.gz"
BAD_PIXELS = "wfc3ir_badpix_spars200_22.03.31.fits.gz"


def _folder() -> Path | None:
    named = os.environ.get("BLOBPIPE_REAL")
    candidates = [Path(named)] if named else sorted(ROOT.parent.glob("*/real"))
    return next((folder for folder in candidates if (folder / BLOB).exists()), None)


REAL = _folder()
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        REAL is None, reason="no real images at hand: name their folder in BLOBPIPE_REAL"
    ),
]


@pytest.fixture(scope="module")
def real() -> Path:
    assert REAL is not None
    return REAL


@pytest.fixture(scope="module")
def difference(real: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blob image minus median stack, as a file."""
    data = fits_images.read_frame(real / BLOB).data - fits_images.read_frame(real / STACK).data
    path = tmp_path_factory.mktemp("real") / "difference.fits.fz"
    fits_images.write_image(
        path, data, name="DIFFERENCE", sigma=fits_images.median_and_noise(data)[1]
    )
    return path


@pytest.fixture(scope="module")
def scaled_stack(real: Path) -> np.ndarray:
    clipped, _ = clip_image(fits_images.read_image(real / STACK).data, Clip())
    return scale_image(clipped, Scale())[0]


@pytest.mark.parametrize(
    ("name", "words", "fault"),
    [
        (
            BLOB,
            ("HDU 0 (PRIMARY), 1024x1024", "DARK-EARTH-CALIB", "filter F153M", "noise 0.0078"),
            "",
        ),
        (
            STACK,
            ("HDU 1 (SCI), 1024x1024x3", "DARK-EARTH-CALIB", "filter F153M", "noise 0.0057"),
            "",
        ),
        (
            EXPOSURE,
            ("HDU 1 (SCI), 266x266", "filter F130N", "ELECTRONS/S"),
            "a calibrated exposure, expected a blob image",
        ),
        (BAD_PIXELS, ("HDU 0 (PRIMARY), 1014x1014", "98.1% finite"), "a constant image or a mask"),
    ],
)
def test_each_file_is_said_what_it_is(
    real: Path, name: str, words: tuple[str, ...], fault: str
) -> None:
    found = check.describe(real / name)
    assert all(word in found.found for word in words), found.found
    assert fault in found.fault
    assert bool(fault) == bool(found.fault)


def test_the_reference_border_is_missing(real: Path) -> None:
    for name in (BLOB, STACK, BAD_PIXELS):
        data = fits_images.read_frame(real / name).data
        assert data.shape == (1024, 1024)
        assert np.isnan(data[0]).all()
        assert np.isnan(data[:, -1]).all()


def test_limits_approach_three_sigma_as_more_pixels_are_sampled(
    real: Path, difference: Path
) -> None:
    """The two images were published without their extremes, and zscale does not go beyond those of its sample.

    So the usual thousand pixels give about two sigma, where an image with all its bad pixels gives 3.0 to 3.4.
    """
    for data in (
        fits_images.read_frame(difference).data,
        fits_images.read_frame(real / STACK).data,
    ):
        noise = fits_images.median_and_noise(data)[1]
        for points, lowest in ((1000, 1.5), (100_000, 2.2)):
            _, done = clip_image(data, Clip(zscale_points=points))
            assert lowest < -done.low_frac / noise < 3.4
            assert lowest < done.high_frac / noise < 3.4


def bright_blobs(scaled: np.ndarray) -> pd.DataFrame:
    """Peaks of the smoothed stack, far from each other: a catalogue for want of one."""
    smooth = gaussian_filter(scaled, 3)
    y, x = np.nonzero((smooth == maximum_filter(smooth, 31)) & (smooth > 1.2))
    table = pd.DataFrame({"x_px": x.astype(float), "y_px": y.astype(float), "radius_px": 5.0})
    return table.assign(blob=[f"b{i}" for i in range(len(table))])


def test_stamps_are_cut_out_of_the_real_stack(scaled_stack: np.ndarray) -> None:
    blobs = bright_blobs(scaled_stack)
    cube, table = stamps.extract_stamps(scaled_stack, blobs)
    assert len(cube) >= 20
    assert table["peak_sigma"].between(1, scaled_stack.max() + 1).all()
    ys, xs = np.mgrid[:41, :41]
    light = cube.clip(0).sum(axis=(1, 2))
    x = (cube.clip(0) * xs).sum(axis=(1, 2)) / light
    y = (cube.clip(0) * ys).sum(axis=(1, 2)) / light
    assert np.hypot(x - 20, y - 20).max() < 2
    assert not cube[:, np.hypot(xs - 20, ys - 20) > 5 + stamps.TAPER_PX].any()


def test_stamps_look_like_the_published_ones(real: Path, scaled_stack: np.ndarray) -> None:
    """Each published stamp, smoothed as ours are, is like the centre of one of ours, though ours all end at 5 px."""
    cube, _ = stamps.extract_stamps(scaled_stack, bright_blobs(scaled_stack))
    best = []
    for stamp in np.load(real / "blob_stamps.npz").values():
        smooth = gaussian_filter(stamp, stamps.SMOOTHING_PX)[2:-2, 2:-2]
        ny, nx = smooth.shape
        places = [(dy, dx) for dy in range(-3, 4) for dx in range(-3, 4)]
        windows = [
            cube[:, 20 - ny // 2 + dy :, 20 - nx // 2 + dx :][:, :ny, :nx] for dy, dx in places
        ]
        best.append(
            max(
                np.corrcoef(smooth.ravel(), ours.ravel())[0, 1]
                for window in windows
                for ours in window
            )
        )
    assert len(best) == 9
    assert np.median(best) > 0.85
    assert min(best) > 0.6


def test_the_difference_is_clipped_scaled_and_cut(difference: Path) -> None:
    assert not check.describe(difference).fault
    clipped, clipping = clip_image(fits_images.read_image(difference).data, Clip())
    assert clipping.replaced_frac == pytest.approx(1 - (1014 / 1024) ** 2, abs=0.001)
    scaled, scaling = scale_image(clipped, Scale())
    assert scaling.sigma_frac == pytest.approx(0.009, rel=0.1)
    subframes, origins = tiles.tile(scaled)
    assert subframes.shape == (16, 256, 256)
    assert origins[-1].tolist() == [3, 3, 768, 768]
    standard = render.standardise(subframes)
    np.testing.assert_allclose(standard.mean(axis=(1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(standard.std(axis=(1, 2)), 1, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["difference", "reference"])
def test_the_whole_is_scanned(
    real: Path, difference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """With a network that knows nothing: tables and pictures are whole, whatever it says."""
    monkeypatch.chdir(tmp_path)
    model_file.save_model("m.safetensors", report_network.new_network(1, "plain"), {})
    what = (
        [str(difference), "--difference"]
        if how == "difference"
        else [str(real / BLOB), "--reference", str(real / STACK)]
    )
    assert cli.main(["scan", *what, "--model", "m.safetensors", "--out", "out"]) == 0
    table = tables.read_table("out/frames.csv", ("frame", "status", "noise_frac", "n_positive"))
    assert list(table["status"]) == ["ok"]
    assert table["noise_frac"][0] == pytest.approx(0.009, rel=0.1)
    subframes = tables.read_table(
        "out/subframes.csv", ("frame", "row", "col", "x0_px", "y0_px", "probability", "is_blob")
    )
    assert len(subframes) == 16
    assert subframes["probability"].between(0, 1).all()
    assert (subframes["y0_px"] == 256 * subframes["row"]).all()
    detections = tables.read_table(
        "out/detections.csv", ("frame", "x_px", "y_px", "probability", "status")
    )
    assert len(detections) == subframes["is_blob"].sum() == table["n_positive"][0]
    assert len(list(Path("out").glob("*.png"))) == len(detections)
