"""The fused convolution block of `fused` for CUDA, in Triton, which PyTorch installs with CUDA.

Forward, results of the convolution stay in registers until their maximum is known: only the input, the pooled result
and, as a byte, the winner of each window pass through memory. Backward visits the winners alone. No sum depends on
the order in which blocks run, so the same input gives the same bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32  # pooled results that a program computes at a time
WINNERS = 128  # winners that a program visits at a time, for the gradient of the weights
PIXELS = 128  # pixels that a program computes, for the gradient of the input


def conv_relu_pool(
    x: Tensor, weight: Tensor, bias: Tensor, *, dropout: float = 0.0, seed: Tensor
) -> Tensor:
    """Compute what `fused.conv_relu_pool` computes with a pool of 4, on CUDA tensors.

    Parameters
    ----------
    x : Tensor, shape (n, channels, ny, nx), float32
    weight : Tensor, shape (filters, channels, 5, 5), float32
        Numbers of filters and channels are powers of two.
    bias : Tensor, shape (filters,), float32
    dropout : float
        Share of the results set to zero, in [0, 1).
    seed : Tensor, shape (), int64
        Seed of the dropout.

    Returns
    -------
    Tensor, shape (n, filters, ny // 4, nx // 4)
    """
    pooled: Tensor = _Block.apply(x, weight, bias, dropout, seed)
    return pooled


class _Block(torch.autograd.Function):
    """Forward and backward pass, launched as grids of the programs below."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, dropout: float, seed: Tensor
    ) -> Tensor:
        x = x.contiguous()
        weight = weight.contiguous()
        n, channels, ny, nx = x.shape
        filters = len(weight)
        pooled = x.new_empty(n, filters, ny // 4, nx // 4)
        winner = torch.empty_like(pooled, dtype=torch.uint8)
        ctx.gain = gain = 1 / (1 - dropout)

        # a program for each block of windows of each image; an empty grid cannot be launched
        if pooled.numel():
            grid = (triton.cdiv(pooled[0, 0].numel(), BLOCK), n)
            low = int(dropout * 2**64) - 2**63
            _forward[grid](
                x, weight, bias, pooled, winner, seed, low, gain, ny, nx,
                CHANNELS=channels, FILTERS=filters, BLOCK=BLOCK, DROP=dropout > 0,
            )  # fmt: skip
        ctx.save_for_backward(x, weight, winner)
        return pooled

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, winner = ctx.saved_tensors
        n, channels, ny, nx = x.shape
        filters = len(weight)
        gradient = torch.where(winner == 255, 0.0, gradients[0] * ctx.gain)

        # gradient of the weights, image by image: 25 taps in rows of 32 numbers
        parts = x.new_empty(n, filters, channels, 32)
        if n:
            _backward_weight[(n, filters, channels)](
                x,
                gradient,
                winner,
                parts,
                ny,
                nx,
                CHANNELS=channels,
                FILTERS=filters,
                BLOCK=WINNERS,
            )

        # gradient of the input, where the layer below wants it
        of_input = None
        if ctx.needs_input_grad[0]:
            of_input = torch.empty_like(x)
            if n:
                _backward_input[(triton.cdiv(ny * nx, PIXELS), n)](
                    gradient,
                    winner,
                    weight,
                    of_input,
                    ny,
                    nx,
                    CHANNELS=channels,
                    FILTERS=filters,
                    PIXELS=PIXELS,
                )

        of_weight = parts.sum(0)[..., :25].reshape(weight.shape)
        of_bias = gradient.sum((0, 2, 3))
        return of_input, of_weight, of_bias, None, None


@triton.jit
def _mix(word):  # type: ignore[no-untyped-def]
    """Mix the bits of a counter as `random_streams.mix` does, the same function; Triton takes literals alone."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB
    return word ^ (word >> 31)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    images, weights, biases, pooled, winners, seed, low, gain, ny, nx,
    CHANNELS: tl.constexpr, FILTERS: tl.constexpr, BLOCK: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1)
    n_pooled = (ny // 4) * (nx // 4)
    # the 16 pixels of each window
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.arange(0, 16)
    y = (at // (nx // 4))[:, None] * 4 + (place // 4)[None, :]
    x = (at % (nx // 4))[:, None] * 4 + (place % 4)[None, :]
    f = tl.arange(0, FILTERS)
    # convolve
    total = tl.zeros([FILTERS, BLOCK, 16], tl.float32)
    for channel in range(CHANNELS):
        plane = images + (image * CHANNELS + channel) * ny * nx
        for tap in tl.static_range(25):
            yy = y + tap // 5 - 2
            xx = x + tap % 5 - 2
            inside = (yy >= 0) & (yy < ny) & (xx >= 0) & (xx < nx) & (at < n_pooled)[:, None]
            value = tl.load(plane + yy * nx + xx, mask=inside, other=0.0)
            weight = tl.load(weights + (f * CHANNELS + channel) * 25 + tap)
            total += weight[:, None, None] * value[None, :, :]
    # pool; NaN wins, as in PyTorch
    best, first = tl.max(total, axis=2, return_indices=True)
    undefined = tl.max((total != total).to(tl.int32), axis=2) > 0
    best = tl.where(undefined, float("nan"), best + tl.load(biases + f)[:, None])
    # rectify and drop
    kept = ~(best <= 0)
    if DROP:
        key = _mix(tl.load(seed).to(tl.uint64) + image.to(tl.uint64) * 0xD1B54A32D192ED03)
        number = (f[:, None] * n_pooled + at[None, :]).to(tl.uint64)
        word = _mix(key + number * 0x9E3779B97F4A7C15) ^ 0x8000000000000000
        kept = kept & (word.to(tl.int64, bitcast=True) >= low)
    out = (image * FILTERS + f[:, None]) * n_pooled + at[None, :]
    tl.store(pooled + out, tl.where(kept, best * gain, 0.0), mask=(at < n_pooled)[None, :])
    tl.store(winners + out, tl.where(kept, first, 255).to(tl.uint8), mask=(at < n_pooled)[None, :])


@triton.jit
def _backward_weight(  # type: ignore[no-untyped-def]
    images, gradients, winners, parts, ny, nx,
    CHANNELS: tl.constexpr, FILTERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0)
    f = tl.program_id(1)
    channel = tl.program_id(2)
    n_pooled = (ny // 4) * (nx // 4)
    plane = images + (image * CHANNELS + channel) * ny * nx
    start = (image * FILTERS + f) * n_pooled
    # 25 taps; the rest of the row stays zero
    tap = tl.arange(0, 32)
    total = tl.zeros([BLOCK, 32], tl.float32)
    for first in range(0, n_pooled, BLOCK):
        at = first + tl.arange(0, BLOCK)
        # winners, their gradients, and the pixel of each tap around them
        winner = tl.load(winners + start + at, mask=at < n_pooled, other=255).to(tl.int32)
        gradient = tl.load(gradients + start + at, mask=at < n_pooled, other=0.0)
        y = (at // (nx // 4) * 4 + winner // 4)[:, None] + (tap // 5 - 2)[None, :]
        x = (at % (nx // 4) * 4 + winner % 4)[:, None] + (tap % 5 - 2)[None, :]
        inside = (
            (winner != 255)[:, None]
            & (tap < 25)[None, :]
            & (y >= 0)
            & (y < ny)
            & (x >= 0)
            & (x < nx)
        )
        total += gradient[:, None] * tl.load(plane + y * nx + x, mask=inside, other=0.0)
    tl.store(parts + ((image * FILTERS + f) * CHANNELS + channel) * 32 + tap, tl.sum(total, axis=0))


@triton.jit
def _backward_input(  # type: ignore[no-untyped-def]
    gradients, winners, weights, of_input, ny, nx,
    CHANNELS: tl.constexpr, FILTERS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1)
    n_pooled = (ny // 4) * (nx // 4)
    at = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    y = at // nx
    x = at % nx
    channel = tl.arange(0, CHANNELS)
    total = tl.zeros([CHANNELS, PIXELS], tl.float32)
    for f in range(FILTERS):
        start = (image * FILTERS + f) * n_pooled
        for tap in tl.static_range(25):
            yy = y + 2 - tap // 5
            xx = x + 2 - tap % 5
            inside = (yy >= 0) & (yy < ny // 4 * 4) & (xx >= 0) & (xx < nx // 4 * 4)
            # the gradient of a window passes to this pixel if its winner is where the tap points
            window = start + (yy // 4) * (nx // 4) + xx // 4
            winner = tl.load(winners + window, mask=inside, other=255)
            gradient = tl.load(gradients + window, mask=inside, other=0.0)
            gradient = tl.where(winner == (yy % 4) * 4 + xx % 4, gradient, 0.0)
            weight = tl.load(weights + (f * CHANNELS + channel) * 25 + tap)
            total += weight[:, None] * gradient[None, :]
    out = (image * CHANNELS + channel[:, None]) * ny * nx + at[None, :]
    tl.store(of_input + out, total, mask=(at < ny * nx)[None, :])
