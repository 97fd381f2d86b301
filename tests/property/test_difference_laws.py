"""What holds for any stack, pattern and shift."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from blobpipe.core.blob_shapes import blob_profile
from blobpipe.images.register import Shift, move_pattern
from blobpipe.images.stack import running_median
from blobpipe.noise.level import clean_noise

shifts = st.builds(Shift, st.floats(-3, 3), st.floats(-3, 3))
images = arrays.arrays(np.float32, (7, 3, 4), elements=st.floats(-1, 1, width=32) | st.just(np.nan))


def pattern() -> np.ndarray:
    image = np.zeros((96, 128), np.float32)
    image[20:61, 30:71] = 0.1 * blob_profile("disc", 6.0)
    image[50:91, 80:121] += 0.05 * blob_profile("diamond", 4.0)
    return image


@given(images, st.integers(1, 7))
def test_running_median_is_the_median(stack: np.ndarray, size: int) -> None:
    medians = running_median(stack, size)
    assert len(medians) == 8 - size
    for i, median in enumerate(medians):
        values = [pixel[np.isfinite(pixel)] for pixel in stack[i : i + size].reshape(size, -1).T]
        expected = [np.median(found) if len(found) else np.nan for found in values]
        np.testing.assert_allclose(median.ravel(), expected, rtol=1e-6, atol=1e-7)


@given(shifts)
def test_moving_there_and_back_changes_nothing(shift: Shift) -> None:
    back = move_pattern(move_pattern(pattern(), shift), Shift(-shift.x_px, -shift.y_px))
    np.testing.assert_allclose(back, pattern(), atol=1e-5)


@given(shifts)
def test_moving_keeps_the_light_and_moves_the_centre(shift: Shift) -> None:
    still = pattern().astype(float)
    moved = move_pattern(pattern(), shift).astype(float)
    assert moved.sum() == pytest.approx(still.sum(), rel=1e-4)
    for axis, by in ((0, shift.x_px), (1, shift.y_px)):
        pixels = np.arange(still.shape[1 - axis])
        centres = [image.sum(axis=axis) @ pixels / still.sum() for image in (still, moved)]
        assert centres[1] - centres[0] == pytest.approx(by, abs=0.01)


@given(st.floats(1e-4, 1.0), st.floats(-1.0, 1.0))
def test_noise_scales_and_knows_no_offset(scale: float, offset: float) -> None:
    image = np.random.default_rng(1).normal(0, 1, (64, 64))
    assert clean_noise(scale * image + offset) == pytest.approx(
        scale * clean_noise(image), rel=1e-6
    )
