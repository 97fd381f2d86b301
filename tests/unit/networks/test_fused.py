"""The fused kernels do what the plain modules do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from numba.core import caching
from torch import Tensor

from blobpipe.core import files
from blobpipe.networks import fused, fused_loops

# channels, filters, side (px): the report's, the first one on a smaller image
LAYERS = [(1, 8, 64), (8, 16, 64)]


def plain(x: Tensor, weight: Tensor, bias: Tensor, pool: int = 4) -> Tensor:
    return F.max_pool2d(F.relu(F.conv2d(x, weight, bias, padding=weight.shape[2] // 2)), pool)


def block(
    n: int,
    channels: int,
    filters: int,
    side: int,
    size: int = 5,
    dtype: torch.dtype = torch.float32,
):
    generator = torch.Generator().manual_seed(n + filters)
    x, weight, bias = (
        torch.randn(shape, generator=generator, dtype=dtype)
        for shape in ((n, channels, side, side), (filters, channels, size, size), (filters,))
    )
    weight /= size * channels**0.5
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def one_pixel(size: int) -> Tensor:
    """The kernel that changes nothing."""
    weight = torch.zeros(1, 1, size, size)
    weight[0, 0, size // 2, size // 2] = 1
    return weight


def gradients(pooled: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return torch.autograd.grad(
        pooled, inputs, torch.randn(pooled.shape, generator=generator, dtype=pooled.dtype)
    )


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Up to rounding: 1e-5 of the largest value."""
    assert ours.shape == theirs.shape
    scale = theirs.detach().abs().max().item() if theirs.numel() else 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize(("channels", "filters", "side"), LAYERS)
@pytest.mark.parametrize("n", [1, 5])
def test_results_and_gradients_are_the_plain_ones(n, channels, filters, side):
    inputs = block(n, channels, filters, side)
    ours = fused.conv_relu_pool(*inputs)
    theirs = plain(*inputs)
    assert_same(ours, theirs)
    for mine, other in zip(gradients(ours, *inputs), gradients(theirs, *inputs), strict=True):
        assert_same(mine, other)


@pytest.mark.parametrize(("size", "pool"), [(5, 4), (3, 2), (7, 3)])
def test_gradients_are_those_of_finite_differences(size, pool):
    inputs = block(3, 2, 3, 9, size, torch.float64)
    assert torch.autograd.gradcheck(lambda *inputs: fused.conv_relu_pool(*inputs, pool), inputs)


def test_gradients_with_dropout_are_those_of_finite_differences():
    inputs = block(2, 1, 2, 8, 5, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *i: fused.conv_relu_pool(*i, dropout=0.4, seed=3), inputs
    )


def test_operator_obeys_pytorchs_rules():
    inputs = block(2, 1, 2, 8)
    torch.library.opcheck(torch.ops.blobpipe.conv_relu_pool.default, (*inputs, 4, 0.0, 0))
    torch.library.opcheck(
        torch.ops.blobpipe.conv_relu_pool.default, (inputs[0].detach(), *inputs[1:], 4, 0.3, 5)
    )


def test_gradient_of_images_is_made_only_when_wanted():
    x, weight, bias = block(2, 1, 8, 64)
    with_x = gradients(fused.conv_relu_pool(x, weight, bias), weight, bias)
    without_x = gradients(fused.conv_relu_pool(x.detach(), weight, bias), weight, bias)
    assert all(torch.equal(a, b) for a, b in zip(with_x, without_x, strict=True))


def test_of_equal_maxima_the_first_wins():
    x = (
        torch.randint(0, 2, (4, 1, 32, 32), generator=torch.Generator().manual_seed(1))
        .float()
        .requires_grad_()
    )
    weight = one_pixel(3)
    bias = torch.zeros(1)
    ours, theirs = (gradients(f(x, weight, bias, 2), x)[0] for f in (fused.conv_relu_pool, plain))
    assert torch.equal(ours, theirs)
    constant = torch.ones(1, 1, 4, 4, requires_grad=True)
    (ours,) = torch.autograd.grad(fused.conv_relu_pool(constant, weight, bias, 2).sum(), constant)
    assert torch.equal(
        ours[0, 0], torch.tensor([1.0, 0.0]).repeat(2).outer(torch.tensor([1.0, 0.0]).repeat(2))
    )


def test_where_nothing_is_above_zero_there_is_no_gradient():
    x = torch.zeros(1, 1, 8, 8, requires_grad=True)
    weight = torch.ones(1, 1, 5, 5, requires_grad=True)
    for bias in (torch.zeros(1, requires_grad=True), torch.tensor([-1.0], requires_grad=True)):
        pooled = fused.conv_relu_pool(x, weight, bias)
        assert torch.equal(pooled, torch.zeros(1, 1, 2, 2))
        assert all(
            not gradient.any() for gradient in torch.autograd.grad(pooled.sum(), (x, weight, bias))
        )


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_go_through(value, sign):
    x, weight, bias = (t.detach() for t in block(2, 1, 8, 64))
    x[1, 0, 10, 20] = x[1, 0, 40, 41] = sign * value
    # the sum of both infinities is NaN, of which x86 makes a negative one
    x[1, 0, 40, 43] = -sign * value
    ours = fused.conv_relu_pool(x, weight, bias)
    theirs = plain(x, weight, bias)
    assert torch.equal(ours.isnan(), theirs.isnan())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert ours.isnan().any()
    assert not ours[0].isnan().any()


def test_of_several_nan_the_last_gets_the_gradient():
    """As in PyTorch."""
    x = torch.ones(1, 1, 16, 16)
    x[0, 0, 3, 9] = torch.nan  # becomes 5x5 of them, in several windows
    x.requires_grad_()
    ours, theirs = (
        torch.autograd.grad(f(x, one_pixel(5), torch.zeros(1)).sum(), x)[0]
        for f in (fused.conv_relu_pool, plain)
    )
    assert torch.equal(ours, theirs)
    assert ours[0, 0, 3, 11] == 1


def test_no_images_give_no_results_and_zero_gradients():
    x, weight, bias = block(0, 1, 8, 64)
    pooled = fused.conv_relu_pool(x, weight, bias)
    assert pooled.shape == (0, 8, 16, 16)
    of_x, of_weight, of_bias = gradients(pooled, x, weight, bias)
    assert of_x.shape == x.shape
    assert not of_weight.any()
    assert not of_bias.any()


def test_tensors_need_not_be_contiguous():
    x, weight, bias = block(3, 8, 16, 64)
    turned = x.transpose(2, 3), weight.flip(3).transpose(2, 3), bias.flip(0)
    expected = fused.conv_relu_pool(*(tensor.contiguous() for tensor in turned))
    assert torch.equal(fused.conv_relu_pool(*turned), expected)
    in_pixels = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    ours, theirs = (fused.conv_relu_pool(i, weight, bias) for i in (in_pixels, x))
    for mine, other in zip(
        gradients(ours, in_pixels, weight), gradients(theirs, x, weight), strict=True
    ):
        assert torch.equal(mine, other)
    one = torch.ones(()).expand(3, 16, 16, 16)  # as the gradient of a sum: all strides are zero
    torch.autograd.grad(fused.conv_relu_pool(x, weight, bias), (x, weight, bias), one)


@pytest.mark.parametrize("sign", [-1, 1])
def test_how_a_library_rounds_does_not_reach_the_transforms(
    sign: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inverse of a small matrix may differ by its last digits with the processor and the threads it has."""
    as_it_is = fused_loops.column_transforms.__wrapped__(5, 4)
    invert = torch.linalg.inv
    monkeypatch.setattr(torch.linalg, "inv", lambda matrix: invert(matrix) * (1 + sign * 2**-50))
    otherwise = fused_loops.column_transforms.__wrapped__(5, 4)
    assert all(torch.equal(one, other) for one, other in zip(as_it_is, otherwise, strict=True))


@pytest.mark.parametrize("n", [1, 7])
def test_any_number_of_threads_gives_the_same_bytes(n):
    inputs = block(n, 8, 16, 64)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            pooled = fused.conv_relu_pool(*inputs, dropout=0.3, seed=4)
            results.append((pooled, *gradients(pooled, *inputs)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_dropout_is_that_of_the_mask():
    inputs = block(3, 1, 8, 64)
    kept = fused.keep_mask((3, 8, 16, 16), 0.3, seed=11)
    ours = fused.conv_relu_pool(*inputs, dropout=0.3, seed=11)
    theirs = plain(*inputs) * kept / 0.7
    assert_same(ours, theirs)
    for mine, other in zip(gradients(ours, *inputs), gradients(theirs, *inputs), strict=True):
        assert_same(mine, other)


def test_mask_keeps_its_share_and_depends_on_the_seed():
    shape = (50, 8, 64, 64)
    share = 0.15
    mask = fused.keep_mask(shape, share, seed=1)
    sigma = (share * (1 - share) / mask.numel()) ** 0.5
    assert abs((~mask).double().mean() - share) < 4 * sigma
    agreement = (mask == fused.keep_mask(shape, share, seed=2)).double().mean()
    assert abs(agreement - (share**2 + (1 - share) ** 2)) < 8 * sigma
    assert torch.equal(mask, fused.keep_mask(shape, share, seed=1))
    assert fused.keep_mask(shape, 0, seed=1).all()
    assert torch.equal(mask[:1], fused.keep_mask((1, *shape[1:]), share, seed=1))


def test_neighbouring_results_and_images_are_dropped_independently():
    dropped = (~fused.keep_mask((64, 1, 64, 64), 0.5, seed=-3)).double() - 0.5
    for neighbour in (dropped.roll(1, 3), dropped.roll(1, 2), dropped.roll(1, 0)):
        assert abs((dropped * neighbour).mean()) < 4 * 0.25 / dropped.numel() ** 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 8, 8)}, "expected"),
        ({"x": torch.zeros(1, 2, 8, 8)}, "expected"),
        ({"bias": torch.zeros(3)}, "expected"),
        ({"weight": torch.zeros(2, 1, 4, 4)}, "odd size"),
        ({"weight": torch.zeros(2, 1, 5, 3)}, "square"),
        ({"x": torch.zeros(1, 1, 8, 8, dtype=torch.float64)}, "float32"),
        ({"pool": 16}, "1 to 15"),
        ({"pool": 9}, "no smaller"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_what_the_kernels_cannot_do_is_said(change, message):
    arguments = {
        "x": torch.zeros(1, 1, 8, 8),
        "weight": torch.zeros(2, 1, 5, 5),
        "bias": torch.zeros(2),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        fused.conv_relu_pool(**arguments)


def test_available_here():
    assert fused.available()


def test_not_available_where_the_kernels_fail(monkeypatch, caplog):
    monkeypatch.setattr(fused, "_run_chunks", None)
    fused.available.cache_clear()
    assert not fused.available()
    assert "plain" in caplog.text
    monkeypatch.undo()
    fused.available.cache_clear()


def test_without_a_place_for_compiled_code_they_compile_all_the_same(monkeypatch):
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    compiled = fused._jit(lambda x: x + 1)
    assert compiled(1) == 2


def test_code_that_was_compiled_from_other_loops_is_not_used():
    """numba keeps compiled code as long as the file of the function is the same, whatever the function calls."""
    assert files.sha256(Path(fused_loops.__file__)) == fused.LOOPS_SHA256


def run(script: str, **environment: str) -> None:
    start = "import os, sys, torch; from blobpipe.networks import fused, fused_loops; torch.set_num_threads(2); "
    subprocess.run(
        [sys.executable, "-c", start + script], env={**os.environ, **environment}, check=True
    )


def test_works_after_a_fork():
    run(
        """
inputs = torch.ones(8, 1, 16, 16), torch.ones(2, 1, 5, 5), torch.ones(2)
expected = fused.conv_relu_pool(*inputs)
child = os.fork()
if child == 0:
    os._exit(not torch.equal(fused.conv_relu_pool(*inputs), expected))
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    )


def test_right_on_a_cpu_with_short_vectors():
    run(
        "sys.exit(fused_loops.VECTOR_BYTES != 16 or not fused.available())",
        NUMBA_CPU_NAME="generic",
    )
