"""The template: its bad pixels."""

from __future__ import annotations

import numpy as np
from tests.unit.detection.blobs import SIDE, noise

from blobpipe.images.template import find_bad_pixels
from blobpipe.noise.level import clean_noise


def test_bad_pixels_lie_five_sigma_and_three_tenths_of_a_known_blob_off() -> None:
    stack = noise()
    pattern = np.zeros((SIDE, SIDE), np.float32)
    pattern[40:80, 40:80] = 0.5
    stack += pattern
    sigma = clean_noise(stack)
    for k, off in enumerate((4.8, 5.2, -4.8, -5.2)):
        stack[20, 100 + k] = off * sigma
        stack[50, 50 + k] = 0.5 + np.sign(off) * (0.15 + (abs(off) - 0.1) * sigma)
    bad = find_bad_pixels(stack, pattern)
    assert bad[20, 100:104].tolist() == [False, True, False, True]
    assert bad[50, 50:54].tolist() == [False, True, False, True]
