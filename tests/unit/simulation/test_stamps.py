"""Stamps: a blob and nothing but the blob, from pixels or from profiles."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from blobpipe.core.blob_shapes import blob_profile
from blobpipe.simulation import stamps

HALF = stamps.SIZE // 2


def stack_with(
    blobs: list[tuple[float, float, float, float]], noise: float = 1.0, seed: int = 1
) -> np.ndarray:
    """Noise of one sigma with discs at (x, y), of a radius and a depth in sigma, on a sloping background."""
    image = np.random.default_rng(seed).normal(0, noise, (400, 420)).astype(np.float32)
    image += np.linspace(-0.5, 0.5, 420, dtype=np.float32)
    for x, y, radius, depth in blobs:
        column = round(x)
        row = round(y)
        image[row - HALF : row + HALF + 1, column - HALF : column + HALF + 1] += (
            depth * blob_profile("disc", radius, x - column, y - row, stamps.SIZE)
        )
    return image


def catalogue(blobs: list[tuple[float, float, float, float]]) -> pd.DataFrame:
    table = pd.DataFrame(blobs, columns=["x_px", "y_px", "radius_px", "depth_sigma"])
    return table.assign(blob=[f"b{i}" for i in range(len(blobs))])


ONE = (120.3, 200.6, 6.0, 5.0)


def test_a_stamp_is_the_blob_centred_without_background() -> None:
    cube, table = stamps.extract_stamps(stack_with([ONE]), catalogue([ONE]))
    assert cube.shape == (1, stamps.SIZE, stamps.SIZE)
    assert cube.dtype == np.float32
    assert dict(table.iloc[0]) == {"blob": "b0", "radius_px": 6.0, "peak_sigma": cube.max()}
    truth = 5 * blob_profile("disc", 6.0, 0.3, -0.4, stamps.SIZE)
    assert np.corrcoef(cube[0].ravel(), truth.ravel())[0, 1] > 0.97
    ys, xs = np.mgrid[: stamps.SIZE, : stamps.SIZE]
    assert (cube[0] * xs).sum() / cube[0].sum() == pytest.approx(HALF + 0.3, abs=0.5)
    assert (cube[0] * ys).sum() / cube[0].sum() == pytest.approx(HALF - 0.4, abs=0.5)
    assert cube.sum() == pytest.approx(truth.sum(), rel=0.15)


def test_a_stamp_has_no_seam() -> None:
    """It is exactly zero from the end of the taper on, and so all along its edge."""
    cube, _ = stamps.extract_stamps(stack_with([ONE]), catalogue([ONE]))
    ys, xs = np.mgrid[-HALF : HALF + 1, -HALF : HALF + 1]
    assert not cube[0][np.hypot(xs - 0.3, ys + 0.4) >= 6.0 + stamps.TAPER_PX].any()


def test_a_stamp_carries_little_of_the_stacks_noise() -> None:
    others = [
        stamps.extract_stamps(stack_with([ONE], seed=seed), catalogue([ONE]))[0][0]
        for seed in range(8)
    ]
    assert np.std(others, axis=0).max() < 0.5


@pytest.mark.parametrize(
    ("blobs", "kept"),
    [
        ([ONE], 1),
        ([(19.0, 200.0, 5.0, 5.0)], 0),
        ([(20.0, 20.0, 5.0, 5.0)], 1),
        ([(399.0, 379.0, 5.0, 5.0)], 1),
        ([(400.0, 200.0, 5.0, 5.0)], 0),
        ([ONE, (120.3 + 19.0, 200.6, 6.0, 5.0)], 0),
        ([ONE, (120.3 + 21.0, 200.6, 6.0, 5.0)], 2),
        ([(120.0, 200.0, 17.0, 5.0)], 0),
        ([(120.0, 200.0, 3.0, 0.0)], 0),
        ([], 0),
    ],
    ids=[
        "alone",
        "cut",
        "corner",
        "far corner",
        "cut on the right",
        "close",
        "apart",
        "too large",
        "not there",
        "none",
    ],
)
def test_only_whole_clear_lonely_blobs_are_taken(blobs: list, kept: int) -> None:
    inside = [b for b in blobs if b[3] and 20 <= b[0] < 400]
    cube, table = stamps.extract_stamps(stack_with(inside, noise=0.5), catalogue(blobs))
    assert len(cube) == len(table) == kept
    assert cube.shape[1:] == (stamps.SIZE, stamps.SIZE)


def test_profiles_are_bounded_varied_and_reproducible() -> None:
    def draw() -> tuple[np.ndarray, pd.DataFrame]:
        return stamps.profile_stamps(
            np.random.default_rng(4), 60, (1024, 1024), sigma_frac=0.0055, high_sigma=3.0
        )

    cube, table = draw()
    assert cube.shape == (60, stamps.SIZE, stamps.SIZE)
    assert cube.max() <= 3.0
    assert cube.min() > -0.2
    assert (table["peak_sigma"] > 0.5).all()
    assert table["radius_px"].between(2.5, 11).all()
    assert table["radius_px"].std() > 1
    np.testing.assert_array_equal(cube, draw()[0])
    edge = np.concatenate([cube[:, 0], cube[:, -1], cube[:, :, 0], cube[:, :, -1]], axis=1)
    assert np.abs(edge).max() < 0.05
