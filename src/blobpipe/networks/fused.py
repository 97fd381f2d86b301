"""Convolution, ReLU and max pooling in one pass over the image, forward and backward, on the CPU.

Five things make it fast:

1. Nothing is written between convolution and pooling. With a window of 4x4, 15 of 16 convolved pixels are discarded
   while they are still in registers.
2. The image is dealt like cards into ``pool`` planes: plane ``s`` holds every ``pool``-th column, from column ``s``
   on. The pixels of one window then lie in the same lane of different vectors, so that pooling moves no lanes,
   and a vector of pixels once loaded serves all taps of a row and all columns of a window.
3. A column of results of a window takes 8 products instead of 20 (Toom-Cook). Where rounding could then decide which
   pixel wins, the window is convolved again as defined, so that of equal maxima the first wins as in PyTorch.
4. Forward records which pixel of each window won. Backward visits only those: one position in ``pool**2``.
5. Threads take small chunks of images, whose size does not depend on the number of threads, and the sums of the
   chunks are added in order. So any number of threads gives the same bytes.

The inner loops, in `fused_loops`, are written as LLVM's vector instructions, since no compiler finds this use of the
registers by itself. ``docs/fused.md`` counts the operations.
"""

# numba finds the types of what it compiles by itself:
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numba as nb
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from blobpipe.core import threads as lasting
from blobpipe.core.random_streams import GOLDEN_GAMMA, IMAGE_GAMMA, compiled_mix
from blobpipe.networks.fused_loops import (
    PATCH_BYTES,
    VECTOR_BYTES,
    block_size,
    column_transforms,
    convolve_columns,
    convolve_windows,
    deal,
    gather,
    has_columns,
    scatter,
    transform_columns,
    transpose_square,
)

log = logging.getLogger(__name__)

# SHA-256 of fused_loops.py: numba compiles anew when this file changes, so it has to change whenever the loops do
LOOPS_SHA256 = "d929e2f8143e3cbb14a5b27742fc26deb5a7c98665ce37eda43b2ba683727677"
CHUNK = 2  # images that a thread takes at a time; fixed, so that sums do not depend on the number of threads
NO_WINNER = (
    255  # winner of a window whose maximum is not above zero, or was dropped: its gradient is zero
)


BAND_BYTES = (
    2**15
)  # part of an image whose patches are read for all filters at a time: what the L1 cache holds


def conv_relu_pool(
    x: Tensor, weight: Tensor, bias: Tensor, pool: int = 4, *, dropout: float = 0.0, seed: int = 0
) -> Tensor:
    """Compute ``F.max_pool2d(F.relu(F.conv2d(x, weight, bias, padding=size // 2)), pool)``, then dropout.

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
        Seed of the dropout; `keep_mask` gives what it keeps.

    Returns
    -------
    Tensor, shape (n, filters, ny // pool, nx // pool)

    Raises
    ------
    ValueError
        If a shape, type or value is not one of these.
    """
    _check(x, weight, bias, pool, dropout)
    pooled: Tensor = torch.ops.blobpipe.conv_relu_pool(x, weight, bias, pool, dropout, seed)[0]
    return pooled


def keep_mask(shape: Sequence[int], dropout: float, seed: int) -> Tensor:
    """Return which results the dropout of `conv_relu_pool` keeps.

    Parameters
    ----------
    shape : (n, filters, ny, nx)
        Shape of the results.
    dropout, seed
        As in `conv_relu_pool`.

    Returns
    -------
    Tensor, shape as given, bool
    """
    kept = np.empty((shape[0], int(np.prod(shape[1:]))), np.bool_)
    _fill_keep_mask(kept, *_dropout_key(dropout, seed))
    return torch.from_numpy(kept).reshape(tuple(shape))


def set_threads(threads: int | None) -> None:
    """Set the number of threads of the kernels; None, the default, is the number that PyTorch uses.

    A training step is fastest with PyTorch itself on one thread: it has little left to do, and its threads keep a
    core busy while they wait for more.
    """
    global _threads
    _threads = threads


_threads: int | None = None


@functools.cache
def available() -> bool:
    """Compile the kernels and compare them with PyTorch's modules; return whether they can be used on this machine."""
    try:
        return _agree_with_plain()
    except Exception as error:  # a compiler may raise anything on an unknown machine
        log.warning("fused kernels do not run on this machine (%s); using plain kernels", error)
        return False


def _agree_with_plain() -> bool:
    """Compare both on one small image."""
    x = torch.linspace(-9, 9, 16 * 16).sin().reshape(1, 1, 16, 16)
    weight = torch.linspace(-9, 9, 2 * 25).cos().reshape(2, 1, 5, 5)
    bias = torch.zeros(2)
    plain = F.max_pool2d(F.relu(F.conv2d(x, weight, bias, padding=2)), 4)
    return torch.allclose(conv_relu_pool(x, weight, bias), plain, atol=1e-4)


def _check(x: Tensor, weight: Tensor, bias: Tensor, pool: int, dropout: float) -> None:
    """Raise ValueError where the arguments of `conv_relu_pool` do not fit."""
    # shapes that belong together
    has_axes = x.ndim == 4 and weight.ndim == 4
    if not has_axes or x.shape[1] != weight.shape[1] or bias.shape != weight.shape[:1]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, weight, bias))
        raise ValueError(f"expected (n, c, ny, nx), (f, c, size, size) and (f,), found {shapes}")

    # the kernel has a centre
    ny, nx = weight.shape[2:]
    if ny != nx or ny % 2 == 0:
        raise ValueError(f"expected a square kernel of odd size, found {(ny, nx)}")

    # one type for all
    if {x.dtype, weight.dtype, bias.dtype} not in ({torch.float32}, {torch.float64}):
        found = f"{x.dtype}, {weight.dtype}, {bias.dtype}"
        raise ValueError(f"expected float32 or float64 for all, found {found}")

    # places in a window fit in a byte, and there is at least one window
    if not 1 <= pool <= 15 or min(x.shape[2:]) < pool:
        found = f"{pool} and {tuple(x.shape[2:])}"
        raise ValueError(f"expected a pool from 1 to 15 and images no smaller, found {found}")
    if not 0 <= dropout < 1:
        raise ValueError(f"expected a dropout in [0, 1), found {dropout}")


# ------------------------------------------------------------------------------------------ operators of PyTorch


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, pool: int, dropout: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Return the pooled images, and the winner of each window: its row times pool plus its column, or NO_WINNER."""
    # inputs: pixels, the same as integers, and the weights as they are read
    images = _array(x)
    bits = images.reshape(-1).view(f"i{images.itemsize}")
    packing = (_pack(weight, pool), *_pack_columns(weight, pool), _pad_filters(bias, pool))
    weights = tuple(map(_array, packing))
    sizes = _sizes(weight, pool)

    # outputs
    pooled, winner = _new_results(x, weight, pool)
    results = pooled.numpy()
    winners = winner.numpy()

    # dropout, and the largest pixel for which no result can be NaN or infinite
    drop = (*_dropout_key(dropout, seed), results.dtype.type(1 / (1 - dropout)))
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
    """Return the gradients of x (empty unless wanted), weight and bias."""
    filters, channels, size, _ = weight.shape
    gain = 1 / (1 - dropout)
    images = _array(x)
    gradients = _array(gradient)
    winners = _array(winner)
    x_gradient, weight_gradient, _ = _new_gradients(x, weight, want_x)
    kernels = _array(_shifted_kernels(weight * gain))
    x_results = x_gradient.numpy()
    sizes = _sizes(weight, pool)

    # each chunk of images has sums of its own
    length = _round_up(size * channels, _lanes(x, PATCH_BYTES))
    patches = np.zeros((_n_chunks(len(x)), filters, size, length), images.dtype)
    biases = np.zeros((len(patches), filters), images.dtype)

    def work(chunk: int, *span: int) -> None:
        _differentiate_chunk(
            images, gradients, winners, kernels, x_results, patches, biases, chunk, *sizes, *span
        )

    _run_chunks(len(x), work)

    # the rows of a patch hold all channels of each pixel, and what is read beyond them
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
    """Return ``gain`` times the sum over chunks."""
    return (parts.sum(axis=0, dtype=np.float64) * gain).astype(parts.dtype)


# -------------------------------------------------------------------------------- weights in the kernels' layouts


def _pack(weight: Tensor, pool: int) -> Tensor:
    """Order weights as they are used, to shape (blocks, channels, size, size, filters of a block)."""
    _, *rest = weight.shape
    blocks = _pad_filters(weight, pool).reshape(-1, block_size(pool), *rest)
    return blocks.permute(0, 2, 3, 4, 1)


def _pad_filters(tensor: Tensor, pool: int) -> Tensor:
    """Append filters of zeros up to whole blocks."""
    missing = -len(tensor) % block_size(pool)
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])


def _pack_columns(weight: Tensor, pool: int) -> tuple[Tensor, Tensor]:
    """Return the weights for products of whole columns, as `_pack`, and a bound of the error of each filter's results.

    The bound is in units of the largest pixel, as if all pixels were as large: some hundred times the real error. Both
    are empty where no columns of this size are convolved at once.
    """
    _, channels, size, _ = weight.shape
    if not has_columns(size, pool):
        return weight.new_empty(0), weight.new_empty(0)
    kernel, pixels, products = column_transforms(size, pool)
    factors = torch.einsum("uy,fcyx->fcux", kernel, weight.detach().double())
    amount = factors.abs().sum((1, 3)) * pixels.abs().sum(1)
    terms = channels * size + len(pixels)
    largest = (amount.square() @ products.square()).sqrt().amax(1)
    doubt = 2 * torch.finfo(weight.dtype).eps * math.sqrt(terms) * largest
    return _pack(factors.to(weight.dtype), pool), _pad_filters(doubt.to(weight.dtype), pool)


def _tame_px(weight: Tensor, bias: Tensor) -> float:
    """Return a limit: if no pixel is as large, or NaN, all results of the convolution are finite."""
    if len(weight) == 0:
        return 0.0
    gain = weight.double().abs().flatten(1).sum(1)
    offset = bias.double().abs()
    highest = torch.finfo(weight.dtype).max / 2**16
    limits = (highest - offset) / gain.clamp(min=1.0)
    return float(limits.nan_to_num(0.0).amin())


def _shifted_kernels(weight: Tensor) -> Tensor:
    """Shift the rows of each kernel to every place in a vector where a pixel may begin: (filters, lanes, size, length)."""
    filters, channels, size, _ = weight.shape
    lanes = _lanes(weight, VECTOR_BYTES)
    step = math.gcd(channels, lanes)
    table = weight.new_zeros(filters, lanes, size, _round_up(lanes - step + size * channels, lanes))
    for shift in range(0, lanes, step):
        table[:, shift, :, shift : shift + size * channels] = weight.permute(0, 2, 3, 1).flatten(2)
    return table


def _sizes(weight: Tensor, pool: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return tuples as long as kernel and window: their lengths are part of their types, which the compiler knows."""
    return (0,) * weight.shape[2], (0,) * pool


def _lanes(tensor: Tensor, vector_bytes: int) -> int:
    return vector_bytes // tensor.element_size()


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


# ------------------------------------------------------------------------------------------------------- threads


def _run_chunks(n: int, work: Callable[[int, int, int], None]) -> None:
    """Call ``work(chunk, first, last)`` for all chunks of n images, on the threads of `set_threads`.

    A thread that is free takes the next chunk, which suits a core that others use as well. numba's own threads would
    divide the work beforehand, and wait for each other in a loop that keeps the cores busy.
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
    """Compile when first called, and keep the code on disk if a cache folder can be written."""
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
    """Convolve, rectify and pool the images from ``first`` to ``last``, and record the winners."""
    threshold, key, gain = drop
    channels = images.shape[1]
    pool = len(window)
    margin = len(taps) // 2
    lanes = VECTOR_BYTES // images.itemsize
    block = packed.shape[4]
    block_weights = packed[0].size
    ny, nx = pooled.shape[2:]

    # the planes that an image is dealt into; rows in whole vectors
    width = -(-nx // lanes) * lanes
    # zeros on either side of a plane's row, in whole vectors
    pad = -(-margin // (pool * lanes)) * lanes
    plane_step = pad + width + pad + lanes
    row_step = pool * plane_step
    channel_step = (ny * pool + 2 * margin) * row_step
    planes = _aligned_zeros(channels * channel_step, images.dtype)
    weights = packed.ravel()

    # the transformed columns of one row of windows
    products_step = (pool + len(taps) - 1) * row_step
    products = _aligned_zeros(channels * products_step if columns.size else 0, images.dtype)
    column_weights = columns.ravel()
    column_block = columns.size // packed.shape[0]

    # maximum and winner of one row of windows, all filters
    maxima = np.empty((packed.shape[0] * block, width), images.dtype)
    codes = np.empty(maxima.shape, np.int32)
    flat_maxima = maxima.ravel()
    flat_codes = codes.ravel()

    for i in range(first, last):
        # where all pixels are tame, no result is NaN, and comparisons are faster
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
                    # with few products if the winners are certain, as defined otherwise
                    if tame and columns.size and convolve_columns(
                        products, pad + x, channels, row_step, plane_step,
                        column_weights, k * column_block, biases, doubts, k * block, largest,
                        flat_maxima, flat_codes, k * block * width + x, width, taps, window,
                    ):  # fmt: skip
                        continue
                    convolve_windows(
                        planes, start + pad + x, channels, channel_step, row_step, plane_step,
                        weights, k * block_weights, biases, k * block,
                        flat_maxima, flat_codes, k * block * width + x, width, tame, taps, window,
                    )  # fmt: skip
            _write_row(maxima, codes, pooled, winners, i, y, _image_key(key, i), threshold, gain)


@_jit
def _aligned_zeros(size, dtype):
    """Return zeros that begin at a whole vector, so that fewer vectors lie across two lines of the cache."""
    buffer = np.zeros(size + VECTOR_BYTES, dtype)
    first = (-buffer.ctypes.data) % VECTOR_BYTES // buffer.itemsize
    return buffer[first : first + size]


@_jit
def _deal_image(images, bits, i, planes, channel_step, row_step, plane_step, pad, margin, window):
    """Deal an image into planes; return its largest absolute pixel, or NaN or infinity if there is one."""
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
                deal(flat, start + x, planes, at + x // pool, plane_step, window)
            # what does not fill a stretch is dealt from a copy with zeros at its end
            if rest:
                for x in range(rest):
                    end[x] = images[i, c, y, nx - rest + x]
                deal(end, 0, planes, at + (nx - rest) // pool, plane_step, window)
            largest[0] = _largest_magnitude(bits[start : start + nx], largest[0])
    return largest.view(images.dtype)[0]


@_jit
def _largest_magnitude(pixels, largest):
    """Return the largest magnitude of pixels given as integers: without the sign they order as magnitudes, NaN highest."""
    magnitude = np.iinfo(pixels.dtype).max
    for x in range(pixels.size):
        largest = max(largest, pixels[x] & magnitude)
    return largest


@_jit
def _transform_row(
    planes, start, channel_step, row_step, plane_step, pad, products, images, taps, window
):
    """Transform the columns of a row of windows into the factors that kernels are multiplied with."""
    lanes = VECTOR_BYTES // images.itemsize
    pool = len(window)
    stretch = pool * lanes
    for c in range(images.shape[1]):
        for s in range(pool):
            at = s * plane_step + pad
            to = c * (pool + len(taps) - 1) * row_step + at
            for x in range(0, -(-images.shape[3] // stretch) * lanes, lanes):
                transform_columns(
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
    """Write one row of all filters; what is dropped is multiplied by zero, as in PyTorch, so that NaN passes."""
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
    """Compute gradients of weights and biases, summed over a chunk, and of its images unless ``x_gradient`` is empty.

    Each winner adds its patch of the image to the gradient of the weights, and its kernel to that of the image.
    """
    filters, ny = winners.shape[1:3]
    pool = len(window)
    margin = len(taps) // 2
    channels = images.shape[1]
    lanes = PATCH_BYTES // images.itemsize
    length = patches.shape[3]

    # one image with interleaved channels, and room to read beyond its end
    row_step = _row_step(images, margin)
    size = (images.shape[2] + 2 * margin) * row_step + max(length, kernels.shape[3])
    pixels = _aligned_zeros(size, images.dtype)

    # the winners of one image: where their patches begin, their gradients, and the end of each row
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

        # band by band, so that the patches of all filters are read from the cache
        for y in range(0, ny, band):
            for f in range(filters):
                begin = ends[f, y]
                end = ends[f, min(y + band, ny)]
                for x in range(0, length, lanes):
                    gather(
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
    """Return the step from row to row where channels are interleaved, in numbers: whole vectors."""
    lanes = VECTOR_BYTES // images.itemsize
    return -(-(images.shape[3] + 2 * margin) * images.shape[1] // lanes) * lanes


@_jit
def _interleave(images, i, pixels, margin):
    """Write pixel after pixel, each with all its channels, inside a margin of zeros."""
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
    """Write channel after channel: the inverse of `_interleave`."""
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
    """Transpose rows that are ``step`` apart from ``at`` on to columns of rows that are ``to_step`` apart from ``to`` on."""
    lanes = PATCH_BYTES // source.itemsize
    whole_rows = rows - rows % lanes
    whole_columns = columns - columns % lanes
    for y in range(0, whole_rows, lanes):
        for x in range(0, whole_columns, lanes):
            transpose_square(source, at + y * step + x, step, target, to + x * to_step + y, to_step)
    for y in range(whole_rows, rows):
        for x in range(columns):
            target[np.uint64(to + x * to_step + y)] = source[np.uint64(at + y * step + x)]
    for x in range(whole_columns, columns):
        for y in range(whole_rows):
            target[to + x * to_step + y] = source[at + y * step + x]


@_jit
def _sum_of_winners(gradients, winners, i, f):
    """Sum up the gradients of the winners; each column by itself, in the same order on every machine."""
    of_column = np.zeros(winners.shape[3], gradients.dtype)
    for y in range(winners.shape[2]):
        for x in range(winners.shape[3]):
            of_column[x] += (
                gradients[i, f, y, x]
                if winners[i, f, y, x] != NO_WINNER
                else gradients.dtype.type(0)
            )
    total = gradients.dtype.type(0)
    for gradient in of_column:
        total += gradient
    return total


@_jit
def _corners(row_step, pixel_step, window):
    """Return the position at which the patch of each pixel of a window begins."""
    pool = len(window)
    corners = np.empty(pool * pool, np.uint32)
    for code in range(pool * pool):
        corners[code] = code // pool * row_step + code % pool * pixel_step
    return corners


@_jit
def _locate(gradients, winners, i, f, corners, row_step, window_step, positions, gains, ends):
    """List the position of each winner's patch, its gradient, and the end of each row of windows in these lists."""
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
    """Add the kernel of each winner at its position.

    Positions begin anywhere, but what is added begins at a whole vector: the table holds the kernel shifted by the
    difference. So patches overlap by whole vectors, which a CPU passes from one addition to the next without waiting.
    """
    lanes = shape[1]
    length = shape[3]
    for k in range(begin, end):
        at = np.int64(positions[k])
        moved = at & (lanes - 1)
        kernel = (f * lanes + moved) * len(taps) * length
        scatter(pixels, at - moved, row_step, table, kernel, length, gains[k], taps)


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
