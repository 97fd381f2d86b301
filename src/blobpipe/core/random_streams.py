"""Random numbers that depend on a seed and a purpose alone, not on the order of work or the number of cores."""

from __future__ import annotations

import functools
import zlib
from typing import Any

import numpy as np

# SplitMix64 (Steele, Lea & Flood 2014): the increment of its counter, and the factors of its mixing function.
# `simulation.render_gpu` uses them with PyTorch; `networks.fused_gpu` repeats them for Triton.
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
MIX_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)

# Increment of the key from image to image of a batch; odd, so that no two images share a key
IMAGE_GAMMA = 0xD1B54A32D192ED03


def stream(seed: int, stage: str, *items: int | str) -> np.random.Generator:
    """Return an independent random stream for one item of one stage, whatever the order of work.

    Parameters
    ----------
    seed : int
        Seed of the stage, from its settings.
    stage : str
        Name of the stage.
    items : int or str
        Which part of the stage, such as the index of an image.
    """
    words = [
        zlib.crc32(item.encode()) if isinstance(item, str) else item for item in (stage, *items)
    ]
    # The count, because NumPy does not tell a list of words from the same list with zeros behind it
    return np.random.default_rng([seed, len(words), *words])


def log_uniform(rng: np.random.Generator, low: float, high: float) -> np.float64:
    """Draw a number from ``low`` to ``high`` whose logarithm is evenly distributed."""
    return np.float64(np.exp(rng.uniform(np.log(low), np.log(high))))


def mix(word: Any) -> Any:
    """Mix the bits of a counter by the last step of SplitMix64, a one-to-one function.

    `compiled_mix` is this function compiled, `render_gpu.mix` the same one in PyTorch, and `fused_gpu._mix` in Triton.

    Parameters
    ----------
    word : ndarray, uint64
        Compiled: a number.

    Returns
    -------
    ndarray, uint64
    """
    word = (word ^ (word >> np.uint64(30))) * np.uint64(MIX_FACTORS[0])
    word = (word ^ (word >> np.uint64(27))) * np.uint64(MIX_FACTORS[1])
    return word ^ (word >> np.uint64(31))


@functools.cache
def compiled_mix() -> Any:
    """Return `mix` compiled by Numba, for compiled functions; Numba is not imported before."""
    import numba as nb

    return nb.njit(mix, cache=True, nogil=True)
