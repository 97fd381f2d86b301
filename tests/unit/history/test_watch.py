"""Known blobs that fade, grow or move."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from tests.unit.detection.blobs import blob

from blobpipe.history.deep import DeepDifference
from blobpipe.history.watch import measure_changes, summarise_changes

SIDE = 320
NOISE = 0.002


def blobs() -> pd.DataFrame:
    grid = np.arange(50, 300, 55)
    x, y = (axis.ravel().astype(float) for axis in np.meshgrid(grid, grid))
    return pd.DataFrame({"x_px": x, "y_px": y, "radius_px": 5.5, "depth_frac": 0.05})


def layer(table: pd.DataFrame) -> np.ndarray:
    return sum(
        blob(b.x_px, b.y_px, b.radius_px, b.depth_frac, side=SIDE) for b in table.itertuples()
    )


def observed(before: pd.DataFrame, after: pd.DataFrame, seed: int = 1) -> DeepDifference:
    noise = np.random.default_rng(seed).normal(0, NOISE, (2, SIDE, SIDE)).astype(np.float32)
    baseline = layer(before) + noise[0] / 2
    return DeepDifference(16, layer(after) - layer(before) + noise[1], baseline)


def test_blobs_that_stay_have_not_changed() -> None:
    changes = measure_changes(observed(blobs(), blobs()), blobs())
    health = summarise_changes(changes)
    assert health is not None
    assert (health.n_watched, health.n_changed) == (25, 0)
    assert abs(health.deeper_frac) < 0.01
    pulls = changes["x_px"] / changes["x_px_err"]
    assert 0.6 < pulls.std() < 1.5


@pytest.mark.parametrize(
    ("column", "change", "reading", "expected"),
    [
        ("depth_frac", 0.9, "deeper_frac", -0.1),
        ("x_px", 1.003, "x_px", None),
        ("radius_px", 1.05, "radius_px", 0.275),
    ],
)
def test_one_blob_that_changes_is_told_from_the_others(
    column: str, change: float, reading: str, expected: float | None
) -> None:
    after = blobs()
    after.loc[7, column] *= change
    expected = after.loc[7, "x_px"] - blobs().loc[7, "x_px"] if expected is None else expected
    changes = measure_changes(observed(blobs(), after), blobs())
    error = changes.loc[7, f"{reading}_err"]
    assert changes.loc[7, reading] == pytest.approx(expected, abs=4 * error)
    health = summarise_changes(changes)
    assert health is not None
    assert health.n_changed == 1
    assert abs(health.deeper_frac) < 0.01


def test_all_together_say_that_mirror_or_focus_has_changed() -> None:
    after = blobs().assign(radius_px=5.5 * 1.04)
    health = summarise_changes(measure_changes(observed(blobs(), after), blobs()))
    assert health is not None
    assert health.n_changed == 0
    assert health.radius_px == pytest.approx(0.22, abs=0.05)
    after = blobs()
    after["x_px"] += 0.2
    health = summarise_changes(measure_changes(observed(blobs(), after), blobs()))
    assert health is not None
    assert health.x_px == pytest.approx(0.2, abs=0.03)


def test_faint_blobs_are_not_watched() -> None:
    faint = blobs().assign(depth_frac=0.002)
    assert summarise_changes(measure_changes(observed(faint, faint), faint)) is None
