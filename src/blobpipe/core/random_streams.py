"""Random numbers that depend on a seed and on what they are for, never on the order of work or the number of cores."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    pass


def stream(seed: int, stage: str, *items: int | str) -> np.random.Generator:
    """An independent random stream for one item of one stage, whatever the order or number of cores."""
    words = [
        zlib.crc32(item.encode()) if isinstance(item, str) else item for item in (stage, *items)
    ]
    # the count, because NumPy takes a short list of words for one with zeros at its end
    return np.random.default_rng([seed, len(words), *words])
