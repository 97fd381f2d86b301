"""Saliency maps: they point at the blob, and do not depend on the kernels."""

from __future__ import annotations

import numpy as np
import pytest

from blobpipe.networks import fused, report_network, saliency

from ..conftest import opinionated_network


def _subframes(places: list[tuple[int, int]]) -> np.ndarray:
    pixels = np.random.default_rng(1).normal(size=(len(places), 256, 256)).astype(np.float32)
    for image, (x, y) in zip(pixels, places, strict=True):
        rows, columns = np.ogrid[:256, :256]
        image[np.hypot(columns - x, rows - y) <= 6] += 2.5
    return pixels


def test_peak_lies_on_the_blob(blob_finder: report_network.ReportNetwork) -> None:
    places = [(40, 200), (128, 128), (3, 250), (250, 10)]
    maps = saliency.saliency_maps(blob_finder, _subframes(places))
    assert maps.dtype == np.float32
    assert maps.shape == (4, 256, 256)
    assert (maps >= 0).all()
    assert np.hypot(*(saliency.peaks(maps) - places).T).max() < 8


@pytest.mark.skipif(not fused.available(), reason="fused kernels do not run here")
def test_fused_and_plain_kernels_agree() -> None:
    pixels = _subframes([(100, 60), (30, 30), (200, 220)])
    plain, fused_ = (
        saliency.saliency_maps(opinionated_network(3, kernels), pixels)
        for kernels in ("plain", "fused")
    )
    np.testing.assert_allclose(fused_, plain, atol=1e-5 * plain.max())


def test_maps_do_not_depend_on_the_company_and_leave_no_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = opinionated_network(3)
    pixels = _subframes([(100, 60), (30, 30), (200, 220)])
    together = saliency.saliency_maps(network, pixels)
    monkeypatch.setattr(saliency, "BATCH", 2)
    np.testing.assert_allclose(
        saliency.saliency_maps(network, pixels), together, rtol=1e-4, atol=1e-9
    )
    assert all(weight.grad is None for weight in network.parameters())
    assert not network.training


def test_no_subframes() -> None:
    maps = saliency.saliency_maps(
        report_network.new_network(1, "plain"), np.zeros((0, 256, 256), np.float32)
    )
    assert maps.shape == (0, 256, 256)
    assert saliency.peaks(maps).shape == (0, 2)


def test_peaks_are_x_then_y() -> None:
    maps = np.zeros((2, 5, 7), np.float32)
    maps[0, 4, 1] = maps[1, 0, 6] = 1
    assert saliency.peaks(maps).tolist() == [[1, 4], [6, 0]]
