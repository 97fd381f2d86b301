"""The GPU's rendering, on the CPU as well as on a GPU where there is one; and the GPU's kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blobpipe.core import random_streams
from blobpipe.networks import fused
from blobpipe.simulation import augment, clutter, cutout, render, render_gpu
from blobpipe.simulation.recipes import Recipes, Scene

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")],
)


def opened(project: Path) -> tuple[Scene, Recipes]:
    data = project / "data"
    results = project / "results"
    augmented = augment.read_augmentation(results / "augment")
    return cutout.open_split(
        data / "difference", data / "scale", results / "cutout", "train", augmented, n=60
    )


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_renders_what_the_cpu_renders(device: str, made_project: Path) -> None:
    """Dips, cut stamps, noise, turns and flips among them."""
    scene, recipes = opened(made_project)
    rows = np.random.default_rng(1).permutation(60)[:40]
    assert (recipes.dip[rows] != 0).any()
    renderer = render_gpu.Renderer(scene, recipes, torch.device(device))
    for copy in range(renderer.copies):
        for noise_sigma in (0.0, 0.75):
            expected = render.render_subframes(
                scene, recipes, rows, copy=copy, noise_sigma=noise_sigma
            )
            there = torch.from_numpy(rows).to(device)
            pixels = renderer.render(there, torch.tensor(copy, device=device), noise_sigma)
            np.testing.assert_allclose(pixels[:, 0].cpu(), expected, atol=2e-5)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_varies_as_the_cpu_varies(device: str, made_project: Path) -> None:
    """Clutter with pixels without a value, weaker blobs, and none of that."""
    scene, recipes = opened(made_project)
    rng = np.random.default_rng(1)
    pieces = clutter.draw_pieces(1, 8)
    assert (pieces == clutter.NO_VALUE).any()
    rows = rng.permutation(60)[:40]
    piece = rng.integers(-1, 8, 40)
    strength = rng.uniform(0.2, 1.5, len(recipes.blob)).astype(np.float32)
    noise_sigma = rng.uniform(0, 0.5, 40).astype(np.float32)
    varied = {"strength": strength, "noise_sigma": noise_sigma, "piece": piece}
    expected = render.render_varied(scene, recipes, rows, copy=1, pieces=pieces, **varied)
    renderer = render_gpu.Renderer(scene, recipes, torch.device(device), pieces)
    there = [torch.from_numpy(value).to(device) for value in (rows, *varied.values())]
    there[1] = torch.from_numpy(render_gpu.by_row(recipes, strength)[rows]).to(device)
    pixels = renderer.vary(there[0], torch.tensor(1, device=device), *there[1:])
    np.testing.assert_allclose(pixels[:, 0].cpu(), expected, atol=2e-5)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_random_words_are_those_of_the_cpu(device: str) -> None:
    """The mixing function in PyTorch and in NumPy; that of Triton is compared where the kernels drop what PyTorch drops."""
    words = np.random.default_rng(1).integers(0, 2**64, 1000, np.uint64)
    expected = random_streams.mix(words)
    there = torch.from_numpy(words.view(np.int64)).to(device)
    found = render_gpu.mix(there).cpu().numpy().view(np.uint64)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(("dropout", "seed"), [(0.15, 0), (0.3, 2**31), (0.0, 5)])
def test_drops_what_the_cpu_drops(device: str, dropout: float, seed: int) -> None:
    shape = (3, 8, 16, 17)
    there = render_gpu.keep_mask(shape, dropout, torch.tensor(seed, device=device))
    assert torch.equal(there.cpu(), fused.keep_mask(shape, dropout, seed))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "shape",
    [
        (3, 1, 8, 256, 256),
        (2, 8, 16, 64, 64),
        (1, 2, 4, 30, 43),
        (5, 4, 8, 19, 64),
        (0, 1, 8, 64, 64),
    ],
)
def test_the_kernels_give_what_the_plain_modules_give(
    shape: tuple[int, ...], dropout: float
) -> None:
    from blobpipe.networks import fused_gpu

    n, channels, filters, ny, nx = shape
    draw = torch.Generator("cuda").manual_seed(1)
    inputs = [
        torch.randn(size, device="cuda", generator=draw).requires_grad_()
        for size in ((n, channels, ny, nx), (filters, channels, 5, 5), (filters,))
    ]
    seed = torch.tensor(77, device="cuda")
    result = fused_gpu.conv_relu_pool(*inputs, dropout=dropout, seed=seed)
    x, weight, bias = (value.double() for value in inputs)
    expected = F.max_pool2d(F.relu(F.conv2d(x, weight, bias, padding=2)), 4) / (1 - dropout)
    expected = expected * render_gpu.keep_mask(expected.shape, dropout, seed)
    gradient = torch.randn(result.shape, device="cuda", generator=draw)
    found, right = (
        torch.autograd.grad(value, inputs, gradient.to(value.dtype), retain_graph=True)
        for value in (result, expected)
    )
    for mine, theirs in zip((result, *found), (expected, *right), strict=True):
        assert _distance(mine, theirs) < 1e-6
    again = torch.autograd.grad(result, inputs, gradient)
    assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))


def _distance(found: Tensor, right: Tensor) -> float:
    return ((found - right).norm() / right.norm().clamp(min=1e-12)).item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_recorded_work_sees_its_new_inputs() -> None:
    weight = torch.zeros(3, device="cuda")
    recorded = render_gpu.Recorded(lambda x: weight.add_(x).sum())
    sums = [recorded(torch.full((3,), float(i))).item() for i in range(8)]
    assert sums == [3.0 * i * (i + 1) / 2 for i in range(8)]
