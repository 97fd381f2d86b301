"""The quick median is NumPy's, whatever the numbers and their order; so are the moments of scaling."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from blobpipe.core import fits_images
from blobpipe.images.scale import _clipped_moments
from blobpipe.params import Scale

SIZES = st.one_of(st.integers(1, 2100), st.sampled_from([3_999, 9_999, 10_000, 100_001]))
KINDS = st.sampled_from(["normal", "clipped", "constant", "sorted", "few values", "outliers"])


def numbers(kind: str, n: int, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).normal(0, 0.01, n).astype(np.float32)
    match kind:
        case "clipped":
            values = values.clip(-0.005, 0.002)
        case "constant":
            values[:] = 0.25
        case "sorted":
            values.sort()
        case "few values":
            values = np.round(values, 2)
        case "outliers":
            values[::7] = 1e30
    return values


@given(kind=KINDS, n=SIZES, seed=st.integers(0, 99))
def test_the_quick_median_is_numpy_s(kind: str, n: int, seed: int) -> None:
    values = numbers(kind, n, seed)
    kept = values.copy()
    found = fits_images.median(values)
    expected = np.median(values)
    assert found == expected
    assert found.dtype == expected.dtype
    assert np.array_equal(values, kept)


@given(
    kind=st.sampled_from(["normal", "clipped", "few values", "outliers"]), seed=st.integers(0, 9)
)
def test_clipped_moments_are_those_of_the_definition(kind: str, seed: int) -> None:
    image = numbers(kind, 10_000, seed).reshape(100, 100)
    params = Scale()
    values = image.ravel().astype(np.float64)
    for _ in range(params.iterations):
        values = values[np.abs(values - values.mean()) <= params.clip_sigma * values.std()]
    assert np.allclose(
        _clipped_moments(image, params), (values.mean(), values.std()), rtol=1e-12, atol=0
    )
