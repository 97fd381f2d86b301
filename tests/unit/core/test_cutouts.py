"""Windows around positions."""

from __future__ import annotations

import numpy as np
import pytest

from blobpipe.core.cutouts import window_around


@pytest.mark.parametrize(("x", "y"), [(1.2, 2.0), (46.9, 60.7), (-3.0, 30.0), (60.0, -9.0)])
def test_the_square_around_a_place_ends_where_the_image_does(x: float, y: float) -> None:
    image = np.zeros((64, 48))
    window, distance = window_around(image.shape, x, y, 5.0)
    assert image[window].shape == distance.shape
    image[window][distance <= 5] = 1
    rows, columns = np.mgrid[:64, :48]
    assert (image == (np.hypot(columns - x, rows - y) <= 5)).all()
