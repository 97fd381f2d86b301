"""Convolution, ReLU and max pooling in one pass over the image, forward and backward, on the CPU.

Five things make it fast:

1. Nothing is written between convolution and pooling. With a window of 4x4, 15 of 16 convolved pixels are thrown
   away while they are still in registers.
2. The image is dealt like cards into ``pool`` planes: plane ``s`` holds every ``pool``-th column, from column ``s``
   on. The pixels of one window then lie in the same lane of different vectors, so that pooling moves no lanes,
   and a vector of pixels once loaded serves all taps of a row and all columns of a window.
3. A window's column of results takes 8 products for 20 (Toom and Cook's way). Where rounding could then decide who wins a
   window, it is convolved again as defined, so that of equal maxima the first wins as in PyTorch.
4. Forward notes which pixel of each window won. Backward visits only those: one position in ``pool**2``.
5. Threads take small chunks of images, which do not depend on how many threads there are, and the chunks' sums are
   added in order. So any number of threads gives the same bytes.

The inner loops at the end of this file are written as LLVM's vector instructions, since no compiler finds this
use of the registers by itself. ``docs/fused.md`` counts the operations.
"""

# numba finds the types of what it compiles by itself:
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numba as nb
import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from torch import Tensor

from blobpipe.core import threads as lasting
from blobpipe.core.random_streams import GOLDEN_GAMMA, IMAGE_GAMMA, compiled_mix

log = logging.getLogger(__name__)

CHUNK = 2  # images; fixed, so that sums do not depend on the number of threads
NO_WINNER = 255  # of a window whose maximum is not above zero, or was dropped: its gradient is zero


def _vector_bytes() -> int:
    """Of the registers that numba compiles for, by the features under which it keeps compiled code.

    Longer ones would be right too: LLVM splits what does not fit.
    """
    features = cpu_target.target_context.codegen().magic_tuple()[2]
    return 64 if "+avx512f" in features else 32 if "+avx2" in features else 16


VECTOR_BYTES = _vector_bytes()
PATCH_BYTES = min(VECTOR_BYTES, 32)  # of the vectors that read patches, whose rows are short
# of an image, whose patches are read for all filters before the next: what the nearest cache holds
BAND_BYTES = 2**15
# half of the registers; pixels and weights take the others
ACCUMULATORS = 16 if VECTOR_BYTES == 64 else 8


def conv_relu_pool(
    x: Tensor, weight: Tensor, bias: Tensor, pool: int = 4, *, dropout: float = 0.0, seed: int = 0
) -> Tensor:
    """``F.max_pool2d(F.relu(F.conv2d(x, weight, bias, padding=size // 2)), pool)``, then dropout.

    Equal to the plain modules up to rounding; of equal maxima the first wins, and NaN goes through, as in PyTorch.
    Any number of threads gives the same bytes. Differentiable once.

    Parameters
    ----------
    x : Tensor, shape (n, channels, ny, nx), float32 or float64, on the CPU
    weight : Tensor, shape (filters, channels, size, size)
        ``size`` is odd.
    bias : Tensor, shape (filters,)
    pool : int
        Side and step of the pooling window (px), from 1 to 15.
    dropout : float
        Share of the results set to zero, in [0, 1); the others are divided by ``1 - dropout``.
    seed : int
        Of the dropout. `keep_mask` tells what it keeps.

    Returns
    -------
    Tensor, shape (n, filters, ny // pool, nx // pool)

    Raises
    ------
    ValueError
        If a shape, type or value is not one of these.

    Notes
    -----
    Source: ours; the network is that of ISR section 4.
    """
    _check(x, weight, bias, pool, dropout)
    pooled: Tensor = torch.ops.blobpipe.conv_relu_pool(x, weight, bias, pool, dropout, seed)[0]
    return pooled


def keep_mask(shape: Sequence[int], dropout: float, seed: int) -> Tensor:
    """What the dropout of `conv_relu_pool` keeps.

    Parameters
    ----------
    shape : (n, filters, ny, nx)
        Of its result.
    dropout, seed
        As there.

    Returns
    -------
    Tensor, shape as given, bool
    """
    kept = np.empty((shape[0], int(np.prod(shape[1:]))), np.bool_)
    _fill_keep_mask(kept, *_dropout_key(dropout, seed))
    return torch.from_numpy(kept).reshape(tuple(shape))


def set_threads(threads: int | None) -> None:
    """Run the kernels on so many threads; None, as at the start: on as many as PyTorch uses.

    A training step is fastest with PyTorch itself on one thread: it has little left to do, and its threads keep a
    core busy while they wait for more.
    """
    global _threads
    _threads = threads


_threads: int | None = None


@functools.cache
def available() -> bool:
    """Whether the kernels compile on this machine and give there what the plain modules give."""
    try:
        return _agree_with_plain()
    except Exception as error:  # whatever a compiler may raise on an unknown machine
        log.warning(
            "the fused kernels do not run on this machine (%s); the plain ones are used", error
        )
        return False


def _agree_with_plain() -> bool:
    x = torch.linspace(-9, 9, 16 * 16).sin().reshape(1, 1, 16, 16)
    weight = torch.linspace(-9, 9, 2 * 25).cos().reshape(2, 1, 5, 5)
    bias = torch.zeros(2)
    plain = F.max_pool2d(F.relu(F.conv2d(x, weight, bias, padding=2)), 4)
    return torch.allclose(conv_relu_pool(x, weight, bias), plain, atol=1e-4)


def _check(x: Tensor, weight: Tensor, bias: Tensor, pool: int, dropout: float) -> None:
    if (
        x.ndim != 4
        or weight.ndim != 4
        or x.shape[1] != weight.shape[1]
        or bias.shape != weight.shape[:1]
    ):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, weight, bias))
        raise ValueError(f"expected (n, c, ny, nx), (f, c, size, size) and (f,), found {shapes}")
    if weight.shape[2] != weight.shape[3] or weight.shape[2] % 2 == 0:
        raise ValueError(f"expected a square kernel of odd size, found {tuple(weight.shape[2:])}")
    if {x.dtype, weight.dtype, bias.dtype} not in ({torch.float32}, {torch.float64}):
        raise ValueError(
            f"expected float32 or float64 for all, found {x.dtype}, {weight.dtype}, {bias.dtype}"
        )
    if not 1 <= pool <= 15 or min(x.shape[2:]) < pool:
        raise ValueError(
            f"expected a pool from 1 to 15 and images no smaller, found {pool} and {tuple(x.shape[2:])}"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"expected a dropout in [0, 1), found {dropout}")


# ------------------------------------------------------------------------------------------ operators of PyTorch


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, pool: int, dropout: float, seed: int
) -> tuple[Tensor, Tensor]:
    """The pooled images, and the winner of each window: its row times pool plus its column, or NO_WINNER."""
    images = _array(x)
    packing = (_pack(weight, pool), *_pack_columns(weight, pool), _pad_filters(bias, pool))
    bits = images.reshape(-1).view(f"i{images.itemsize}")
    weights = tuple(map(_array, packing))
    pooled, winner = _new_results(x, weight, pool)
    results = pooled.numpy()
    winners = winner.numpy()
    drop = (*_dropout_key(dropout, seed), results.dtype.type(1 / (1 - dropout)))
    sizes = _sizes(weight, pool)
    tame_px = results.dtype.type(_tame_px(weight, bias))

    def work(_: int, first: int, last: int) -> None:
        _convolve_chunk(
            *weights, images, bits, results, winners, *sizes, tame_px, drop, first, last
        )

    _run_chunks(len(x), work)
    return pooled, winner


def _imagine_forward(
    x: Tensor, weight: Tensor, bias: Tensor, pool: int, dropout: float, seed: int
) -> tuple[Tensor, Tensor]:
    return _new_results(x, weight, pool)


def _new_results(x: Tensor, weight: Tensor, pool: int) -> tuple[Tensor, Tensor]:
    pooled = x.new_empty(x.shape[0], weight.shape[0], x.shape[2] // pool, x.shape[3] // pool)
    return pooled, torch.empty_like(pooled, dtype=torch.uint8)


def _backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    winner: Tensor,
    pool: int,
    dropout: float,
    want_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (empty unless wanted), weight and bias."""
    filters, channels, size, _ = weight.shape
    gain = 1 / (1 - dropout)
    images = _array(x)
    gradients = _array(gradient)
    winners = _array(winner)
    x_gradient, weight_gradient, _ = _new_gradients(x, weight, want_x)
    kernels = _array(_shifted_kernels(weight * gain))
    x_results = x_gradient.numpy()
    sizes = _sizes(weight, pool)
    length = _round_up(size * channels, _lanes(x, PATCH_BYTES))
    patches = np.zeros((_n_chunks(len(x)), filters, size, length), images.dtype)
    biases = np.zeros((len(patches), filters), images.dtype)

    def work(chunk: int, *span: int) -> None:
        _differentiate_chunk(
            images, gradients, winners, kernels, x_results, patches, biases, chunk, *sizes, *span
        )

    _run_chunks(len(x), work)
    rows = torch.from_numpy(_sum_in_order(patches, gain))[:, :, : size * channels]
    weight_gradient.copy_(rows.reshape(filters, size, size, channels).permute(0, 3, 1, 2))
    return x_gradient, weight_gradient, torch.from_numpy(_sum_in_order(biases, gain))


def _imagine_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    winner: Tensor,
    pool: int,
    dropout: float,
    want_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_gradients(x, weight, want_x)


def _new_gradients(x: Tensor, weight: Tensor, want_x: bool) -> tuple[Tensor, Tensor, Tensor]:
    x_gradient = x.new_empty(x.shape if want_x else (0,) * 4)
    return x_gradient, weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.pool, ctx.dropout, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    want_x = ctx.needs_input_grad[0]
    x_gradient, *others = torch.ops.blobpipe.conv_relu_pool_backward(
        gradient, *ctx.saved_tensors, ctx.pool, ctx.dropout, want_x
    )
    return (x_gradient if want_x else None), *others, None, None, None


# Defined step by step, since torch.library.custom_op would import PyTorch's compiler: a second at every start.
FORWARD = "blobpipe::conv_relu_pool"
BACKWARD = "blobpipe::conv_relu_pool_backward"
torch.library.define(
    FORWARD,
    "(Tensor x, Tensor weight, Tensor bias, int pool, float dropout, int seed) -> (Tensor, Tensor)",
)
torch.library.define(
    BACKWARD,
    "(Tensor gradient, Tensor x, Tensor weight, Tensor winner, int pool, float dropout, bool want_x)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.impl(FORWARD, "cpu", _forward)
torch.library.impl(BACKWARD, "cpu", _backward)
torch.library.register_fake(FORWARD, _imagine_forward)
torch.library.register_fake(BACKWARD, _imagine_backward)
torch.library.register_autograd(FORWARD, _differentiate, setup_context=_save_for_backward)


def _array(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().numpy()


def _sum_in_order(parts: Any, gain: float) -> Any:
    """``gain`` times the sum over chunks."""
    return (parts.sum(axis=0, dtype=np.float64) * gain).astype(parts.dtype)


# -------------------------------------------------------------------------------- weights in the kernels' layouts


def _pack(weight: Tensor, pool: int) -> Tensor:
    """(blocks, channels, size, size, filters of a block): the weights of a block in the order of their use."""
    _, *rest = weight.shape
    return _pad_filters(weight, pool).reshape(-1, _block_size(pool), *rest).permute(0, 2, 3, 4, 1)


def _pad_filters(tensor: Tensor, pool: int) -> Tensor:
    missing = -len(tensor) % _block_size(pool)
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])


def _pack_columns(weight: Tensor, pool: int) -> tuple[Tensor, Tensor]:
    """The weights for products of whole columns, as `_pack`, and by filter what the results may be wrong by.

    The latter in units of the largest pixel, and as if all were as large: some hundred times what errors really are. Both
    are empty where no columns of this size are convolved at once.
    """
    _, channels, size, _ = weight.shape
    if not _has_columns(size, pool):
        return weight.new_empty(0), weight.new_empty(0)
    kernel, pixels, products = _column_transforms(size, pool)
    factors = torch.einsum("uy,fcyx->fcux", kernel, weight.detach().double())
    amount = factors.abs().sum((1, 3)) * pixels.abs().sum(1)
    terms = channels * size + len(pixels)
    doubt = (
        2
        * torch.finfo(weight.dtype).eps
        * math.sqrt(terms)
        * (amount.square() @ products.square()).sqrt().amax(1)
    )
    return _pack(factors.to(weight.dtype), pool), _pad_filters(doubt.to(weight.dtype), pool)


# Where the polynomials behind `_column_transforms` are evaluated, besides at infinity.
POINTS = (0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5)


def _has_columns(size: int, pool: int) -> bool:
    """Whether a column of a window is convolved with so many products as there are points."""
    return min(size, pool) > 1 and size + pool == len(POINTS) + 2


@functools.cache
def _column_transforms(size: int, pool: int) -> tuple[Tensor, Tensor, Tensor]:
    """``k, p, r``, so that ``r.T @ ((k @ taps) * (p @ pixels))`` are the ``pool`` results of a column of ``pixels``.

    Toom and Cook's product of polynomials, transposed: the least number of products. Exact, since all numbers are ratios
    of small ones.
    """

    def powers(degrees: int) -> Tensor:
        rows = [[point**k for k in range(degrees)] for point in POINTS] + [
            [0.0] * (degrees - 1) + [1.0]
        ]
        return torch.tensor(rows, dtype=torch.float64)

    inverse = torch.linalg.inv(powers(len(POINTS) + 1)).T
    # by which rows become quarters and halves, besides the first and last
    scale = inverse[:, [-2]].clone()
    scale[0], scale[-1] = inverse[0, 0], inverse[-1, -1]
    return powers(size) * scale, (inverse / scale * 32).round() / 32, powers(pool)


def _tame_px(weight: Tensor, bias: Tensor) -> float:
    """Pixels, none of which is so large (or NaN), can convolve to nothing but finite numbers."""
    gain = weight.double().abs().flatten(1).sum(1)
    offset = bias.double().abs()
    highest = torch.finfo(weight.dtype).max / 2**16
    return (
        float(((highest - offset) / gain.clamp(min=1.0)).nan_to_num(0.0).amin())
        if len(weight)
        else 0.0
    )


def _block_size(pool: int) -> int:
    """Filters that are computed together: each needs ``pool`` accumulators."""
    return max(1, ACCUMULATORS // pool)


def _shifted_kernels(weight: Tensor) -> Tensor:
    """(filters, lanes, size, length): the rows of each kernel, moved right to where in a vector a pixel may begin."""
    filters, channels, size, _ = weight.shape
    lanes = _lanes(weight, VECTOR_BYTES)
    step = math.gcd(channels, lanes)
    table = weight.new_zeros(filters, lanes, size, _round_up(lanes - step + size * channels, lanes))
    for shift in range(0, lanes, step):
        table[:, shift, :, shift : shift + size * channels] = weight.permute(0, 2, 3, 1).flatten(2)
    return table


def _sizes(weight: Tensor, pool: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of kernel and window, as tuples so long: the length of a tuple is part of its type, so the compiler knows it."""
    return (0,) * weight.shape[2], (0,) * pool


def _lanes(tensor: Tensor, vector_bytes: int) -> int:
    return vector_bytes // tensor.element_size()


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


# ------------------------------------------------------------------------------------------------------- threads


def _run_chunks(n: int, work: Callable[[int, int, int], None]) -> None:
    """``work(chunk, first, last)`` for all chunks of n images, on the threads of `set_threads`.

    Whichever thread is free takes the next chunk, which suits a core that others use as well. numba's own threads
    would share the work out beforehand, and wait for each other in a loop that keeps the cores busy.
    """
    chunks = iter(range(_n_chunks(n)))
    threads = min(_threads or torch.get_num_threads(), _n_chunks(n))

    def take() -> None:
        for chunk in chunks:
            work(chunk, chunk * CHUNK, min(n, (chunk + 1) * CHUNK))

    others = [lasting.pool("fused", threads).submit(take) for _ in range(threads - 1)]
    take()
    for other in others:
        other.result()


def _n_chunks(n: int) -> int:
    return -(-n // CHUNK)


# ---------------------------------------------------------------------------------------------- chunks of images


def _jit(function: Callable[..., Any], **options: Any) -> Any:
    """Compile when first called, and keep the code on disk where there is a place for it."""
    try:
        return nb.njit(function, cache=True, nogil=True, error_model="numpy", **options)
    except RuntimeError:  # neither beside this file nor in the home folder
        return nb.njit(function, nogil=True, error_model="numpy", **options)


@_jit
def _convolve_chunk(
    packed,
    columns,
    doubts,
    biases,
    images,
    bits,
    pooled,
    winners,
    taps,
    window,
    tame_px,
    drop,
    first,
    last,
):
    threshold, key, gain = drop
    channels = images.shape[1]
    pool = len(window)
    margin = len(taps) // 2
    lanes = VECTOR_BYTES // images.itemsize
    block = packed.shape[4]
    block_weights = packed[0].size
    ny, nx = pooled.shape[2:]
    width = -(-nx // lanes) * lanes
    # zeros on either side of a plane's row, in whole vectors
    pad = -(-margin // (pool * lanes)) * lanes
    plane_step = pad + width + pad + lanes
    row_step = pool * plane_step
    channel_step = (ny * pool + 2 * margin) * row_step
    planes = _aligned_zeros(channels * channel_step, images.dtype)
    weights = packed.ravel()
    products_step = (pool + len(taps) - 1) * row_step
    products = _aligned_zeros(channels * products_step if columns.size else 0, images.dtype)
    column_weights = columns.ravel()
    column_block = columns.size // packed.shape[0]
    maxima = np.empty((packed.shape[0] * block, width), images.dtype)
    codes = np.empty(maxima.shape, np.int32)
    flat_maxima = maxima.ravel()
    flat_codes = codes.ravel()
    for i in range(first, last):
        largest = _deal_image(
            images, bits, i, planes, channel_step, row_step, plane_step, pad, margin, window
        )
        tame = largest < tame_px
        for y in range(ny):
            start = y * pool * row_step
            if tame and columns.size:
                _transform_row(
                    planes,
                    start,
                    channel_step,
                    row_step,
                    plane_step,
                    pad,
                    products,
                    images,
                    taps,
                    window,
                )
            for x in range(0, width, lanes):
                for k in range(packed.shape[0]):
                    if tame and columns.size and _convolve_columns(
                        products, pad + x, channels, row_step, plane_step,
                        column_weights, k * column_block, biases, doubts, k * block, largest,
                        flat_maxima, flat_codes, k * block * width + x, width, taps, window,
                    ):  # fmt: skip
                        continue
                    _convolve_windows(
                        planes, start + pad + x, channels, channel_step, row_step, plane_step,
                        weights, k * block_weights, biases, k * block,
                        flat_maxima, flat_codes, k * block * width + x, width, tame, taps, window,
                    )  # fmt: skip
            _write_row(maxima, codes, pooled, winners, i, y, _image_key(key, i), threshold, gain)


@_jit
def _aligned_zeros(size, dtype):
    """Zeros that begin at a whole vector, so that fewer vectors lie across two lines of the cache."""
    buffer = np.zeros(size + VECTOR_BYTES, dtype)
    first = (-buffer.ctypes.data) % VECTOR_BYTES // buffer.itemsize
    return buffer[first : first + size]


@_jit
def _deal_image(images, bits, i, planes, channel_step, row_step, plane_step, pad, margin, window):
    """Returns the largest pixel, signs apart; NaN or infinity if there is one."""
    channels, ny, nx = images.shape[1:]
    pool = len(window)
    stretch = len(window) * VECTOR_BYTES // images.itemsize
    rest = nx % stretch
    flat = images.ravel()
    end = np.zeros(stretch, images.dtype)
    largest = np.zeros(1, bits.dtype)
    for c in range(channels):
        for y in range(min(ny, channel_step // row_step - margin)):
            start = ((i * channels + c) * ny + y) * nx
            at = c * channel_step + (y + margin) * row_step + pad
            for x in range(0, nx - rest, stretch):
                _deal(flat, start + x, planes, at + x // pool, plane_step, window)
            if rest:
                for x in range(rest):
                    end[x] = images[i, c, y, nx - rest + x]
                _deal(end, 0, planes, at + (nx - rest) // pool, plane_step, window)
            largest[0] = _largest_magnitude(bits[start : start + nx], largest[0])
    return largest.view(images.dtype)[0]


@_jit
def _largest_magnitude(pixels, largest):
    """Of pixels given by their bits, whose order is that of magnitudes once the sign is off: infinity, NaN above all."""
    magnitude = np.iinfo(pixels.dtype).max
    for x in range(pixels.size):
        largest = max(largest, pixels[x] & magnitude)
    return largest


@_jit
def _transform_row(
    planes, start, channel_step, row_step, plane_step, pad, products, images, taps, window
):
    """What kernels are multiplied with for a row of windows, from the pixels of their columns."""
    lanes = VECTOR_BYTES // images.itemsize
    pool = len(window)
    stretch = pool * lanes
    for c in range(images.shape[1]):
        for s in range(pool):
            at = s * plane_step + pad
            to = c * (pool + len(taps) - 1) * row_step + at
            for x in range(0, -(-images.shape[3] // stretch) * lanes, lanes):
                _transform_columns(
                    planes,
                    start + c * channel_step + at + x,
                    products,
                    to + x,
                    row_step,
                    taps,
                    window,
                )


@_jit
def _write_row(maxima, codes, pooled, winners, i, y, key, threshold, gain):
    """One row of all filters; what is dropped is multiplied by zero, as in PyTorch, so that NaN goes through."""
    filters, ny, nx = pooled.shape[1:]
    for f in range(filters):
        for x in range(nx):
            kept = threshold == 0 or _is_kept(key, (f * ny + y) * nx + x, threshold)
            pooled[i, f, y, x] = maxima[f, x] * (gain if kept else maxima.dtype.type(0))
            winners[i, f, y, x] = np.uint8(codes[f, x] - 1 if kept else NO_WINNER)


@_jit
def _differentiate_chunk(
    images,
    gradients,
    winners,
    kernels,
    x_gradient,
    patches,
    biases,
    chunk,
    taps,
    window,
    first,
    last,
):
    """Gradients of weights and biases, summed over a chunk, and of its images unless ``x_gradient`` is empty.

    Each winner adds the patch of image it came from to the weights' gradient, and its kernel to the image's, there.
    """
    filters, ny = winners.shape[1:3]
    pool = len(window)
    margin = len(taps) // 2
    channels = images.shape[1]
    lanes = PATCH_BYTES // images.itemsize
    length = patches.shape[3]
    row_step = _row_step(images, margin)
    size = (images.shape[2] + 2 * margin) * row_step + max(length, kernels.shape[3])
    pixels = _aligned_zeros(size, images.dtype)
    band = max(1, BAND_BYTES // (pool * row_step * images.itemsize))
    positions = np.empty(winners[0].size, np.uint32)
    gains = np.empty(winners[0].size, images.dtype)
    ends = np.empty((filters, ny + 1), np.int64)
    corners = _corners(row_step, channels, window)
    sums = patches[chunk].ravel()
    table = kernels.ravel()
    shape = kernels.shape
    for i in range(first, last):
        _interleave(images, i, pixels, margin)
        spread = _aligned_zeros(size if x_gradient.size else 0, images.dtype)
        for f in range(filters):
            biases[chunk, f] += _sum_of_winners(gradients, winners, i, f)
            _locate(
                gradients,
                winners,
                i,
                f,
                corners,
                pool * row_step,
                pool * channels,
                positions,
                gains,
                ends,
            )
        for y in range(0, ny, band):
            for f in range(filters):
                begin = ends[f, y]
                end = ends[f, min(y + band, ny)]
                for x in range(0, length, lanes):
                    _gather(
                        pixels, x, row_step, positions, gains, begin, end,
                        sums, f * len(taps) * length + x, length, taps,
                    )  # fmt: skip
                if x_gradient.size:
                    _scatter_all(
                        spread, row_step, positions, gains, begin, end, table, shape, f, taps
                    )
        if x_gradient.size:
            _separate(spread, x_gradient, i, margin)


@_jit
def _row_step(images, margin):
    """Numbers from row to row where channels are interleaved: whole vectors."""
    lanes = VECTOR_BYTES // images.itemsize
    return -(-(images.shape[3] + 2 * margin) * images.shape[1] // lanes) * lanes


@_jit
def _interleave(images, i, pixels, margin):
    """Pixel after pixel, each with all its channels, inside a margin of zeros."""
    channels, ny, nx = images.shape[1:]
    flat = images.ravel()
    row_step = _row_step(images, margin)
    for y in range(ny):
        start = (y + margin) * row_step + margin * channels
        _transpose(
            flat, (i * channels * ny + y) * nx, ny * nx, pixels, start, channels, channels, nx
        )


@_jit
def _separate(pixels, images, i, margin):
    """The inverse of `_interleave`."""
    channels, ny, nx = images.shape[1:]
    flat = images.ravel()
    row_step = _row_step(images, margin)
    for y in range(ny):
        start = (y + margin) * row_step + margin * channels
        _transpose(
            pixels, start, channels, flat, (i * channels * ny + y) * nx, ny * nx, nx, channels
        )


@_jit
def _transpose(source, at, step, target, to, to_step, rows, columns):
    """Rows, ``step`` apart from ``at`` on, become columns of what begins at ``to`` and has rows ``to_step`` apart."""
    lanes = PATCH_BYTES // source.itemsize
    whole_rows = rows - rows % lanes
    whole_columns = columns - columns % lanes
    for y in range(0, whole_rows, lanes):
        for x in range(0, whole_columns, lanes):
            _transpose_square(
                source, at + y * step + x, step, target, to + x * to_step + y, to_step
            )
    for y in range(whole_rows, rows):
        for x in range(columns):
            target[np.uint64(to + x * to_step + y)] = source[np.uint64(at + y * step + x)]
    for x in range(whole_columns, columns):
        for y in range(whole_rows):
            target[to + x * to_step + y] = source[at + y * step + x]


@functools.partial(_jit, fastmath={"reassoc"})
def _sum_of_winners(gradients, winners, i, f):
    total = gradients.dtype.type(0)
    for y in range(winners.shape[2]):
        for x in range(winners.shape[3]):
            total += (
                gradients[i, f, y, x]
                if winners[i, f, y, x] != NO_WINNER
                else gradients.dtype.type(0)
            )
    return total


@_jit
def _corners(row_step, pixel_step, window):
    """Where the patch of each pixel of a window begins."""
    pool = len(window)
    corners = np.empty(pool * pool, np.uint32)
    for code in range(pool * pool):
        corners[code] = code // pool * row_step + code % pool * pixel_step
    return corners


@_jit
def _locate(gradients, winners, i, f, corners, row_step, window_step, positions, gains, ends):
    """List where each winner's patch begins, its gradient, and for each row of windows where its part of the list ends."""
    ny, nx = winners.shape[2:]
    end = np.uint64(f * ny * nx)
    ends[f, 0] = end
    for y in range(ny):
        begin = end
        row = np.uint32(y * row_step)
        for x in range(nx):  # what did not win gets overwritten: no jump that a CPU must foresee
            positions[end] = x
            end += np.uint64(winners[i, f, y, x] != NO_WINNER)
        for k in range(begin, end):
            x = positions[k]
            positions[k] = row + x * np.uint32(window_step) + corners[winners[i, f, y, x]]
            gains[k] = gradients[i, f, y, x]
        ends[f, y + 1] = end


@_jit
def _scatter_all(pixels, row_step, positions, gains, begin, end, table, shape, f, taps):
    """Each winner adds its kernel at its place.

    That begins anywhere, but what is added begins at a whole vector: the table holds the kernel moved right to its
    place. So patches overlap by whole vectors, which a CPU hands from one addition to the next without waiting.
    """
    lanes = shape[1]
    length = shape[3]
    for k in range(begin, end):
        at = np.int64(positions[k])
        moved = at & (lanes - 1)
        kernel = (f * lanes + moved) * len(taps) * length
        _scatter(pixels, at - moved, row_step, table, kernel, length, gains[k], taps)


# ------------------------------------------------------------------------------------------------------- dropout


def _dropout_key(dropout: float, seed: int) -> tuple[np.uint64, np.uint64]:
    """The random 64-bit number below which a result is dropped, and the seed."""
    return np.uint64(int(dropout * 2**64)), np.uint64(seed % 2**64)


@_jit
def _fill_keep_mask(kept, threshold, key):
    for i in range(kept.shape[0]):
        image_key = _image_key(key, i)
        for at in range(kept.shape[1]):
            kept[i, at] = _is_kept(image_key, at, threshold)


_mix = compiled_mix()


@_jit
def _image_key(key, i):
    return _mix(key + np.uint64(i) * np.uint64(IMAGE_GAMMA))


@_jit
def _is_kept(image_key, at, threshold):
    return _mix(image_key + np.uint64(at) * np.uint64(GOLDEN_GAMMA)) >= threshold


# --------------------------------------------------------------------------------------------------- inner loops
# These functions run while numba compiles, and emit the instructions of a loop. ``v`` emits those on vectors, ``b``
# all others. Arrays come as pointers to their first element; positions and steps are counted in elements.


def _inner_loop(emit: Callable[..., Any], result: types.Type = types.void) -> Any:
    """Make of ``emit(v, *arguments)`` a function that compiled functions can call with these arguments."""

    def generate(context, builder, signature, values):
        kind = signature.args[0].dtype
        v = _Vectors(builder, context.get_data_type(kind), VECTOR_BYTES * 8 // kind.bitwidth)
        value = emit(
            v,
            *(
                _unwrap(context, builder, *pair)
                for pair in zip(signature.args, values, strict=True)
            ),
        )
        return context.get_dummy_value() if value is None else value

    @functools.wraps(emit)
    def declare(_, *arguments):
        return result(*arguments), generate

    return intrinsic(declare)


def _unwrap(context, builder, kind, value):
    match kind:
        case types.Array():
            return context.make_array(kind)(context, builder, value).data
        case types.BaseTuple():
            return range(len(kind))
        case _:
            return value


@dataclass(frozen=True)
class _Vectors:
    """Emits instructions on vectors of so many lanes."""

    builder: ir.IRBuilder
    element: ir.Type
    lanes: int

    def of_patches(self):
        """As this, on the vectors that read patches."""
        return _Vectors(self.builder, self.element, self.lanes * PATCH_BYTES // VECTOR_BYTES)

    @property
    def type(self) -> ir.VectorType:
        return ir.VectorType(self.element, self.lanes)

    def load(self, pointer, index):
        return self.builder.load(self._at(pointer, index), align=4)

    def store(self, vector, pointer, index):
        self.builder.store(vector, self._at(pointer, index), align=4)

    def _at(self, pointer, index):
        return self.builder.bitcast(self.builder.gep(pointer, [index]), self.type.as_pointer())

    def constant(self, number):
        return ir.Constant(self.type, [number] * self.lanes)

    def spread(self, scalar):
        """The scalar in every lane."""
        first = self.builder.insert_element(
            ir.Constant(self.type, ir.Undefined), scalar, ir.IntType(32)(0)
        )
        return self.pick(first, [0] * self.lanes)

    def spread_at(self, pointer, index):
        return self.spread(self.builder.load(self.builder.gep(pointer, [index])))

    def pick(self, vector, lanes, second=None):
        """These lanes of the vector, or of two, counted on."""
        order = list(lanes)
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(order)), order)
        return self.builder.shuffle_vector(
            vector, second or ir.Constant(vector.type, ir.Undefined), mask
        )

    def multiply_add(self, a, b, c):
        """``a * b + c``, rounded once where the CPU can do that."""
        name = f"llvm.fmuladd.v{self.lanes}{self.element.intrinsic_name}"
        kind = ir.FunctionType(self.type, [self.type] * 3)
        return self.builder.call(
            cgutils.get_or_insert_function(self.builder.module, kind, name), [a, b, c]
        )

    def weighted_sum(self, numbers, vectors):
        """Of vectors by constant numbers; ones and zeros cost nothing."""
        terms = sorted(
            ((n, vector) for n, vector in zip(numbers, vectors, strict=True) if n),
            key=lambda term: term[0] != 1,
        )
        (number, total), *rest = terms
        total = total if number == 1 else self.builder.fmul(self.constant(number), total)
        for number, vector in rest:
            total = (
                self.builder.fadd(total, vector)
                if number == 1
                else self.multiply_add(self.constant(number), vector, total)
            )
        return total

    def variables(self, initial, *shape):
        """A nested list of variables of this shape; LLVM keeps them in registers."""
        if shape:
            return [self.variables(initial, *shape[1:]) for _ in range(shape[0])]
        return cgutils.alloca_once_value(self.builder, initial)


def _offset(b, base, *terms):
    """``base`` plus the products of all (number, step)."""
    for number, step in terms:
        number = ir.IntType(64)(number) if isinstance(number, int) else number
        step = ir.IntType(64)(step) if isinstance(step, int) else step
        base = b.add(base, b.mul(number, step))
    return base


def _loop(b, n):
    return cgutils.for_range(b, ir.IntType(64)(n) if isinstance(n, int) else n)


@_inner_loop
def _deal(v, pixels, start, planes, at, plane_step, window):
    """Deal as many pixels as fill a vector of each plane."""
    b = v.builder
    pool = len(window)
    stretch = _Vectors(b, v.element, v.lanes * pool).load(pixels, start)
    for s in window:
        v.store(
            v.pick(stretch, range(s, v.lanes * pool, pool)), planes, _offset(b, at, (s, plane_step))
        )


@_inner_loop
def _transpose_square(v, source, at, step, target, to, to_step):
    """As many numbers of as many rows as a vector of patches has lanes: in each pass neighbours exchange halves."""
    b = v.builder
    v = v.of_patches()
    rows = [v.load(source, _offset(b, at, (y, step))) for y in range(v.lanes)]
    half = v.lanes // 2
    while half:
        # lanes of the second row come last
        kept = [x if not x & half else x - half + v.lanes for x in range(v.lanes)]
        for y in range(v.lanes):
            if not y & half:
                above = rows[y]
                below = rows[y + half]
                rows[y], rows[y + half] = (
                    v.pick(above, kept, below),
                    v.pick(above, [x + half for x in kept], below),
                )
        half //= 2
    for x, column in enumerate(rows):
        v.store(column, target, _offset(b, to, (x, to_step)))


@_inner_loop
def _convolve_windows(
    v, planes, start, channels, channel_step, row_step, plane_step, packed, first_weight, biases, first_filter,
    maxima, codes, at, width, tame, taps, window,
):  # fmt: skip
    """Convolve, ReLU, pool: for as many windows, side by side, as a vector has lanes, and for a block of filters.

    ``maxima`` receives the maximum of each window, and ``codes`` its place (row * pool + column) plus one, or 0.
    """
    b = v.builder
    size = len(taps)
    pool = len(window)
    block = _block_size(pool)
    integers = _Vectors(b, ir.IntType(32), v.lanes)
    best = v.variables(v.constant(0.0), block)
    winner = integers.variables(integers.constant(0), block)
    sums = v.variables(v.constant(0.0), block, pool)
    with _loop(b, pool) as window_row:
        _emit_biases(v, sums, biases, first_filter)
        with _loop(b, channels) as channel, _loop(b, size) as tap_row:
            rows = b.add(window_row.index, tap_row.index)
            pixels = _offset(b, start, (rows, row_step), (channel.index, channel_step))
            weights = _offset(
                b, first_weight, (channel.index, size * size * block), (tap_row.index, size * block)
            )
            _emit_row_of_taps(v, sums, planes, pixels, plane_step, packed, weights, size)
        _emit_contest(
            v,
            integers,
            sums,
            best,
            winner,
            _offset(b, ir.IntType(64)(1), (window_row.index, pool)),
            tame,
        )
    for f in range(block):
        v.store(b.load(best[f]), maxima, _offset(b, at, (f, width)))
        integers.store(b.load(winner[f]), codes, _offset(b, at, (f, width)))


@_inner_loop
def _transform_columns(v, planes, start, products, at, row_step, taps, window):
    """A vector of columns, each of as many pixels as there are products. Opposite points share their sums."""
    if not _has_columns(len(taps), len(window)):
        return
    b = v.builder
    n = len(taps) + len(window) - 1
    pixels = [v.load(planes, _offset(b, start, (y, row_step))) for y in range(n)]
    rows = _column_transforms(len(taps), len(window))[1].tolist()
    factors = [v.weighted_sum(rows[0], pixels)]
    for row in rows[1:-1:2]:
        even, odd = (v.weighted_sum(row[parity::2], pixels[parity::2]) for parity in (0, 1))
        factors += [b.fadd(even, odd), b.fsub(even, odd)]
    for u, factor in enumerate([*factors, v.weighted_sum(rows[-1], pixels)]):
        v.store(factor, products, _offset(b, at, (u, row_step)))


@functools.partial(_inner_loop, result=types.boolean)
def _convolve_columns(
    v, products, start, channels, row_step, plane_step, packed, first_weight, biases, doubts, first_filter, largest,
    maxima, codes, at, width, taps, window,
):  # fmt: skip
    """As `_convolve_windows`, with fewer products; returns whether it is sure of all winners.

    It is where just one, of the results and zero, is no lower than the highest less its doubt.
    """
    b = v.builder
    size = len(taps)
    pool = len(window)
    if not _has_columns(size, pool):
        return ir.Constant(ir.IntType(1), False)
    n = size + pool - 1
    block = _block_size(pool)
    sums = v.variables(v.constant(0.0), block, pool)
    place = cgutils.alloca_once(b, v.type, size=ir.IntType(32)(n * block * pool))
    kept = b.bitcast(place, v.element.as_pointer())
    with _loop(b, n) as product:
        for variable in itertools.chain(*sums):
            b.store(v.constant(0.0), variable)
        with _loop(b, channels) as channel:
            row = b.add(b.mul(channel.index, ir.IntType(64)(n)), product.index)
            pixels = _offset(b, start, (row, row_step))
            weights = _offset(b, first_weight, (row, size * block))
            _emit_row_of_taps(v, sums, products, pixels, plane_step, packed, weights, size)
        for column, variable in enumerate(itertools.chain(*sums)):
            row = b.mul(product.index, ir.IntType(64)(block * pool * v.lanes))
            v.store(b.load(variable), kept, _offset(b, row, (column, v.lanes)))
    integers = _Vectors(b, ir.IntType(32), v.lanes)
    unsure = ir.Constant(ir.IntType(v.lanes), 0)
    for f in range(block):
        columns = []
        for q in range(pool):
            index = (ir.IntType(64)(((u * block + f) * pool + q) * v.lanes) for u in range(n))
            columns.append(_emit_results(v, [v.load(kept, each) for each in index], size, pool))
        bias, doubt = (
            v.spread_at(array, _offset(b, first_filter, (f, 1))) for array in (biases, doubts)
        )
        best, code = _emit_sure_contest(
            v, integers, columns, b.fneg(bias), b.fmul(doubt, v.spread(largest))
        )
        v.store(b.fadd(best, bias), maxima, _offset(b, at, (f, width)))
        integers.store(code, codes, _offset(b, at, (f, width)))
        several = b.icmp_unsigned(">=", code, integers.constant(ONE_CLAIM))
        unsure = b.or_(unsure, b.bitcast(several, unsure.type))
    return b.icmp_unsigned("==", unsure, unsure.type(0))


def _emit_results(v, products, size, pool):
    """Of a column of a window, one after another."""
    b = v.builder
    first = products[0]
    last = products[-1]
    pairs = list(zip(products[1:-1:2], products[2:-1:2], strict=True))
    halves = [[b.fadd(*pair) for pair in pairs], [b.fsub(*pair) for pair in pairs]]
    powers = _column_transforms(size, pool)[2].T.tolist()
    results = [v.weighted_sum(powers[y][1:-1:2], halves[y % 2]) for y in range(pool)]
    return [b.fadd(results[0], first), *results[1:-1], b.fadd(results[-1], last)]


ONE_CLAIM = 256  # more than any code: claims are added, and two are told from one


def _emit_sure_contest(v, integers, columns, zero, doubt):
    """The highest of the results and zero, and the code of the only one that may be it; ONE_CLAIM or more if several may."""
    b = v.builder
    pool = len(columns)
    best = zero
    for result in itertools.chain(*columns):
        best = b.select(b.fcmp_ordered(">", result, best), result, best)
    least = b.fsub(best, doubt)
    claims = integers.constant(-ONE_CLAIM)
    for y in range(pool):
        for q in range(pool):
            claim = integers.constant(ONE_CLAIM + y * pool + q + 1)
            holds = b.fcmp_ordered(">=", columns[q][y], least)
            claims = b.add(claims, b.select(holds, claim, integers.constant(0)))
    claim = b.select(
        b.fcmp_ordered(">=", zero, least), integers.constant(ONE_CLAIM), integers.constant(0)
    )
    return best, b.add(claims, claim)


def _emit_biases(v, sums, biases, first_filter):
    for f, variables in enumerate(sums):
        bias = v.spread_at(biases, _offset(v.builder, first_filter, (f, 1)))
        for variable in variables:
            v.builder.store(bias, variable)


def _emit_row_of_taps(v, sums, planes, pixels, plane_step, packed, weights, size):
    """``pool + size - 1`` vectors of pixels and ``size * block`` weights serve ``size * block * pool`` products."""
    b = v.builder
    block = len(sums)
    pool = len(sums[0])
    columns = range(-(size // 2), pool + size // 2)
    row = [
        v.load(planes, _offset(b, pixels, (x % pool, plane_step), (x // pool, 1))) for x in columns
    ]
    running = [[b.load(variable) for variable in variables] for variables in sums]
    for tap in range(size):
        for f in range(block):
            weight = v.spread_at(packed, _offset(b, weights, (tap * block + f, 1)))
            running[f] = [v.multiply_add(weight, row[q + tap], running[f][q]) for q in range(pool)]
    for f in range(block):
        for q in range(pool):
            b.store(running[f][q], sums[f][q])


def _emit_contest(v, integers, sums, best, winner, first_code, tame):
    """PyTorch's rule: only what is greater displaces the first, but NaN displaces anything.

    Where there can be no NaN, numbers are compared by their bits: those of what is above zero have the same order, and for
    integers a CPU has units that would else be idle. Codes grow, so that of two the greater is that of the later winner.
    """
    b = v.builder
    with b.if_else(tame) as (then, otherwise):
        with then:
            _emit_rounds(v, integers, sums, best, winner, first_code, _by_bits)
        with otherwise:
            _emit_rounds(v, integers, sums, best, winner, first_code, _by_value)


def _emit_rounds(v, integers, sums, best, winner, first_code, compare):
    b = v.builder
    for q in range(len(sums[0])):
        code = integers.spread(b.trunc(_offset(b, first_code, (q, 1)), integers.element))
        for f in range(len(sums)):
            outcome = compare(
                v, integers, b.load(sums[f][q]), b.load(best[f]), code, b.load(winner[f])
            )
            for result, variable in zip(outcome, (best[f], winner[f]), strict=True):
                b.store(result, variable)


def _by_value(v, _, pixel, leader, code, holder):
    b = v.builder
    wins = b.or_(b.fcmp_ordered(">", pixel, leader), b.fcmp_unordered("uno", pixel, pixel))
    return b.select(wins, pixel, leader), b.select(wins, code, holder)


def _by_bits(v, integers, pixel, leader, code, holder):
    b = v.builder
    bits = ir.VectorType(ir.IntType(VECTOR_BYTES * 8 // v.lanes), v.lanes)
    ours = b.bitcast(pixel, bits)
    theirs = b.bitcast(leader, bits)
    wins = b.icmp_signed(">", ours, theirs)
    claim = b.select(wins, code, integers.constant(0))
    higher = b.icmp_signed(">", claim, holder)
    return b.bitcast(b.select(wins, ours, theirs), v.type), b.select(higher, claim, holder)


@_inner_loop
def _gather(v, pixels, first, row_step, positions, gains, begin, end, sums, at, length, taps):
    """Add ``gains[k]`` times a vector of each row of the patch at ``first + positions[k]``, k from begin to end.

    Of what is read beyond the end of a row nothing is used.
    """
    b = v.builder
    v = v.of_patches()
    rows = [_offset(b, at, (tap, length)) for tap in taps]
    running = [v.variables(v.load(sums, row)) for row in rows]
    with cgutils.for_range(b, end, begin) as winner:
        gain = v.spread_at(gains, winner.index)
        corner = b.add(b.zext(b.load(b.gep(positions, [winner.index])), first.type), first)
        for tap, variable in enumerate(running):
            pixel = v.load(pixels, _offset(b, corner, (tap, row_step)))
            b.store(v.multiply_add(gain, pixel, b.load(variable)), variable)
    for row, variable in zip(rows, running, strict=True):
        v.store(b.load(variable), sums, row)


@_inner_loop
def _scatter(v, pixels, at, row_step, kernels, kernel, length, gain, taps):
    """Add ``gain`` times a kernel, whose rows have this length, to the patch at ``at``."""
    b = v.builder
    gains = v.spread(gain)
    with cgutils.for_range_slice(
        b, ir.IntType(64)(0), length, ir.IntType(64)(v.lanes), inc=True
    ) as (x, _):
        for tap in taps:
            target = _offset(b, at, (x, 1), (tap, row_step))
            weight = v.load(kernels, _offset(b, kernel, (x, 1), (tap, length)))
            v.store(v.multiply_add(gains, weight, v.load(pixels, target)), pixels, target)
