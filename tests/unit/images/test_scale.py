"""Scale: mean 0 and standard deviation 1, and the numbers to undo it."""

from __future__ import annotations

import numpy as np
import pytest

from blobpipe.errors import FrameError
from blobpipe.images.clip import clip_image
from blobpipe.images.scale import scale_image
from blobpipe.params import Clip, Scale


def test_scaling_says_what_it_did() -> None:
    rng = np.random.default_rng(1)
    image = rng.normal(0.002, 0.0101, (300, 320)).astype(np.float32)
    outliers = rng.random(image.shape) < 0.02
    image[outliers] += rng.choice([-0.2, 0.2], int(outliers.sum()))
    clipped, _ = clip_image(image, Clip())
    scaled, done = scale_image(clipped, Scale())
    assert done.mean_frac == pytest.approx(0.002, abs=0.001)
    assert done.sigma_frac == pytest.approx(0.0101, rel=0.05)
    assert (done.low_sigma, done.high_sigma) == (scaled.min(), scaled.max())
    np.testing.assert_allclose(scaled * done.sigma_frac + done.mean_frac, clipped, atol=1e-6)
    assert scaled.dtype == np.float32


def test_a_constant_image_cannot_be_scaled() -> None:
    with pytest.raises(FrameError, match="standard deviation 0"):
        scale_image(np.full((10, 10), 0.1, np.float32), Scale())
