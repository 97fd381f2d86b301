"""Laws of cutting: windows stay inside their regions, regions apart, and cut then stitch is the identity."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blobpipe.errors import TableError
from blobpipe.images import tiles
from blobpipe.params import Cutout
from blobpipe.simulation import cutout

SIDE = tiles.SIDE


@given(
    n=st.integers(2, 300),
    nx=st.integers(SIDE, 2048),
    left=st.floats(0, 1),
    aside=st.floats(0, 1),
    most=st.integers(2, 300),
)
def test_training_and_validation_are_apart(
    n: int, nx: int, left: float, aside: float, most: int
) -> None:
    names = [f"f{i}" for i in range(n)]
    params = Cutout(left_frac=left, whole_frames_frac=aside, max_frames=most)
    if int(left * nx) < SIDE:
        with pytest.raises(TableError):
            cutout.split_regions(names, nx, params)
        return
    regions = cutout.split_regions(names, nx, params)
    covered = {
        split: [(name, region.x_range) for region in regions[split] for name in region.names]
        for split in cutout.SPLITS
    }
    assert covered["train"]
    assert covered["validation"]
    for name, (start, end) in covered["train"]:
        assert end - start >= SIDE
        assert all(other != name or begin >= end for other, (begin, _) in covered["validation"])
    for _, (start, end) in covered["validation"]:
        assert 0 <= start <= end - SIDE <= nx - SIDE
    assert len({name for rows in covered.values() for name, _ in rows}) <= min(n, most)


@settings(max_examples=40)
@given(
    st.integers(1, 200),
    st.floats(0, 1),
    st.integers(0, 99),
    st.integers(SIDE, 1024),
    st.integers(SIDE, 1024),
)
def test_windows_lie_inside_their_regions(
    n: int, blob_frac: float, seed: int, nx: int, ny: int
) -> None:
    regions = [cutout.Region(["a", "b"], (0, nx)), cutout.Region(["c"], (nx - SIDE, nx))]
    params = Cutout(blob_frac=blob_frac)
    table = cutout.draw_subframes(np.random.default_rng(seed), n, regions, (ny, nx), params)
    assert len(table) == n
    assert table["label"].sum() == round(blob_frac * n)
    assert table["y0_px"].between(0, ny - SIDE).all()
    assert table["x0_px"].between(0, nx - SIDE).all()
    assert (table.query("frame == 'c'")["x0_px"] == nx - SIDE).all()
    assert (table["frame"] == "c").sum() == n // 2


@settings(max_examples=25)
@given(st.integers(1, 700), st.integers(1, 700))
def test_cut_then_stitch_is_the_identity(ny: int, nx: int) -> None:
    image = np.random.default_rng(ny * 1000 + nx).normal(size=(ny, nx)).astype(np.float32)
    subframes, origins = tiles.tile(image)
    stitched = np.full((ny + SIDE, nx + SIDE), np.nan, np.float32)
    for subframe, (row, column, x0, y0) in zip(subframes, origins, strict=True):
        assert (x0, y0) == (column * SIDE, row * SIDE)
        assert np.isnan(stitched[y0 : y0 + SIDE, x0 : x0 + SIDE]).all(), "two subframes overlap"
        stitched[y0 : y0 + SIDE, x0 : x0 + SIDE] = subframe
    np.testing.assert_array_equal(stitched[:ny, :nx], image)
    assert (subframes.min() >= image.min()) & (subframes.max() <= image.max())


def test_a_full_frame_makes_sixteen_subframes_from_the_bottom() -> None:
    image = np.arange(1024 * 1024, dtype=np.float32).reshape(1024, 1024)
    subframes, origins = tiles.tile(image)
    assert subframes.shape == (16, SIDE, SIDE)
    assert subframes.dtype == np.float32
    assert [tuple(origin) for origin in origins[:5]] == [
        (0, 0, 0, 0),
        (0, 1, 256, 0),
        (0, 2, 512, 0),
        (0, 3, 768, 0),
        (1, 0, 0, 256),
    ]
    assert subframes[0, 0, 0] == 0
    assert subframes[4, 0, 0] == 256 * 1024
