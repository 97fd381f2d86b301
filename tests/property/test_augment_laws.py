"""Laws of augmentation."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from blobpipe.params import Augment
from blobpipe.simulation import augment


@given(st.integers(1, 300), st.integers(1, 6), st.booleans(), st.booleans(), st.integers(0, 99))
def test_every_row_is_a_possible_augmentation(
    n: int, copies: int, rotate: bool, flip: bool, seed: int
) -> None:
    params = Augment(copies=copies, rotate=rotate, flip=flip)
    table = augment.draw_augmentation(np.random.default_rng(seed), n, params)
    assert len(table) == n * copies
    assert not table.duplicated(["copy", "subframe"]).any()
    assert table["noise_seed"].between(0, 2**62 - 1).all()
    assert table["rotation"].between(0, 3 * rotate).all()
    assert table["flip"].between(0, int(flip)).all()
