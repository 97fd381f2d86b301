"""The noise of an image, without what stands out."""

from __future__ import annotations

import numpy as np
import pytest

from blobpipe.noise.level import clean_noise


def test_clean_noise_ignores_outliers_edges_and_missing_values() -> None:
    image = np.random.default_rng(1).normal(0, 0.01, (512, 512)).astype(np.float32)
    image[100:110, 100:110], image[:30], image[200, 200:210] = 5, 5, np.nan
    assert clean_noise(image) == pytest.approx(0.01, rel=0.02)
