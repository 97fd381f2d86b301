"""Laws of the fused kernels, on images of any shape."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blobpipe.networks import fused

# size and pool where the results of a window's column take fewer products
COLUMNS = [(5, 4), (3, 6)]
KERNELS = st.sampled_from([*COLUMNS, (3, 2)])  # each pair is compiled anew


@st.composite
def blocks(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int]:
    """Images, weights, biases and pool.

    All values are multiples of 1/64 so small that float32 holds every sum exactly: then no rounding of the plain modules
    decides which of two nearly equal maxima wins. The smallest range gives many maxima that are equal.
    """
    size, pool = draw(KERNELS)
    n = draw(st.integers(0, 5))
    channels = draw(st.integers(1, 9))
    filters = draw(st.integers(1, 9))
    ny = draw(st.integers(pool, 40))
    nx = draw(st.integers(pool, 90))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shapes = (n, channels, ny, nx), (filters, channels, size, size), (filters,)
    limit = draw(st.sampled_from([1, 128]))
    x, weight, bias = (
        torch.randint(-limit, limit + 1, shape, generator=generator) / 64 for shape in shapes
    )
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), pool


def plain(x: Tensor, weight: Tensor, bias: Tensor, pool: int) -> Tensor:
    return F.max_pool2d(F.relu(F.conv2d(x, weight, bias, padding=weight.shape[2] // 2)), pool)


@settings(deadline=None, max_examples=60)
@given(blocks())
def test_equal_to_the_plain_modules(block):
    *inputs, pool = block
    ours = fused.conv_relu_pool(*inputs, pool)
    theirs = plain(*inputs, pool)
    assert (inputs[1].shape[2], pool) in COLUMNS or torch.equal(ours, theirs)
    gradient = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    gradients = (torch.autograd.grad(pooled, inputs, gradient) for pooled in (ours, theirs))
    for mine, other in [(ours, theirs), *zip(*gradients, strict=True)]:
        scale = other.abs().max().item() if other.numel() else 1
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5 * scale)


@settings(deadline=None, max_examples=30)
@given(blocks())
def test_of_equal_maxima_the_first_wins(block):
    """The operator's own list of winners, against the places that PyTorch finds; several of them hold in any window."""
    x, weight, bias, pool = (item.detach() if isinstance(item, Tensor) else item for item in block)
    rectified = F.relu(F.conv2d(x, weight, bias, padding=weight.shape[2] // 2))
    maxima, places = F.max_pool2d(rectified, pool, return_indices=True)
    y = places // x.shape[3] % pool
    x_px = places % x.shape[3] % pool
    expected = torch.where(maxima > 0, y * pool + x_px, fused.NO_WINNER)
    assert torch.equal(
        torch.ops.blobpipe.conv_relu_pool(x, weight, bias, pool, 0.0, 0)[1],
        expected.to(torch.uint8),
    )


@settings(deadline=None, max_examples=30)
@given(blocks(), st.integers(0, 5))
def test_an_image_does_not_depend_on_its_batch(block, where):
    x, weight, bias, pool = (item.detach() if isinstance(item, Tensor) else item for item in block)
    together = fused.conv_relu_pool(x, weight, bias, pool)
    apart = [
        fused.conv_relu_pool(part.contiguous(), weight, bias, pool)
        for part in (x[:where], x[where:])
    ]
    assert torch.equal(together, torch.cat(apart))


@settings(deadline=None, max_examples=30)
@given(blocks(), st.integers(-3, 3))
def test_doubling_all_weights_doubles_all_results_exactly(block, power):
    x, weight, bias, pool = block
    results = fused.conv_relu_pool(x, weight, bias, pool)
    assert torch.equal(
        fused.conv_relu_pool(x, weight * 2**power, bias * 2**power, pool), results * 2**power
    )


@settings(deadline=None, max_examples=30)
@given(blocks(), st.floats(0, 0.9), st.integers(-(2**63), 2**63 - 1))
def test_dropout_keeps_what_the_mask_keeps(block, dropout, seed):
    x, weight, bias, pool = block
    results = fused.conv_relu_pool(x, weight, bias, pool)
    kept = fused.keep_mask(results.shape, dropout, seed)
    torch.testing.assert_close(
        fused.conv_relu_pool(x, weight, bias, pool, dropout=dropout, seed=seed),
        results * kept / (1 - dropout),
    )
