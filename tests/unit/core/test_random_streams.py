"""Random numbers depend on their seed and purpose alone."""

from __future__ import annotations

import numpy as np

from blobpipe.core.random_streams import GOLDEN_GAMMA, compiled_mix, mix, stream


def test_words_are_those_of_splitmix64() -> None:
    """The first three of seed 0, as published with the generator."""
    counters = np.array([GOLDEN_GAMMA * k % 2**64 for k in (1, 2, 3)], np.uint64)
    words = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert mix(counters).tolist() == words
    assert [int(compiled_mix()(counter)) for counter in counters] == words


def test_a_stream_depends_on_seed_stage_and_every_item() -> None:
    streams = [
        stream(1, "cutout"),
        stream(2, "cutout"),
        stream(1, "augment"),
        stream(1, "cutout", 0),
        stream(1, "cutout", 0, 0),
        stream(1, "cutout", "train"),
    ]
    first = [rng.integers(2**62) for rng in streams]
    assert len(set(first)) == len(first)
    assert stream(1, "cutout", "train").integers(2**62) == first[-1]
