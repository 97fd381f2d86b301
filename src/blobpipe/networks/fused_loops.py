"""Baseline for the report's network only: the inner loops of `fused`, emitted as LLVM's vector instructions.

The dense network, which searches whole images, does not use them. They are kept as they are, since the comparison
with the report rests on them. The functions run while numba compiles those of `fused`, and emit the instructions of a
loop: ``v`` emits those on vectors, ``b`` all others. Arrays come as pointers to their first element; positions and
steps are counted in elements.
"""

# numba finds the types of what it compiles by itself:
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from torch import Tensor


def _vector_bytes() -> int:
    """Return the size of the registers that numba compiles for, by the features under which it keeps compiled code.

    Longer ones would be right too: LLVM splits what does not fit.
    """
    features = cpu_target.target_context.codegen().magic_tuple()[2]
    return 64 if "+avx512f" in features else 32 if "+avx2" in features else 16


VECTOR_BYTES = _vector_bytes()
PATCH_BYTES = min(VECTOR_BYTES, 32)  # size of the vectors that read patches, whose rows are short
ACCUMULATORS = (
    16 if VECTOR_BYTES == 64 else 8
)  # half of the registers; pixels and weights take the others


def block_size(pool: int) -> int:
    """Return the number of filters that are computed together: each needs ``pool`` accumulators."""
    return max(1, ACCUMULATORS // pool)


# points at which the polynomials behind `column_transforms` are evaluated, besides infinity
POINTS = (0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5)


def has_columns(size: int, pool: int) -> bool:
    """Tell whether a column of a window is convolved with as many products as there are points."""
    return min(size, pool) > 1 and size + pool == len(POINTS) + 2


@functools.cache
def column_transforms(size: int, pool: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``k, p, r``, so that ``r.T @ ((k @ taps) * (p @ pixels))`` are the ``pool`` results of a column of ``pixels``.

    Toom and Cook's product of polynomials, transposed: the least number of products. Exact, since all numbers are ratios
    of small ones.
    """

    def powers(degrees: int) -> Tensor:
        rows = [[point**k for k in range(degrees)] for point in POINTS] + [
            [0.0] * (degrees - 1) + [1.0]
        ]
        return torch.tensor(rows, dtype=torch.float64)

    inverse = torch.linalg.inv(powers(len(POINTS) + 1)).T
    # by which rows become quarters and halves, besides the first and last: multiples of 1/90, so that the rounding
    # of the inverse, which is left to a library and to the threads it has, does not reach the results
    scale = inverse[:, [-2]].clone()
    scale[0], scale[-1] = inverse[0, 0], inverse[-1, -1]
    scale = (scale * 90).round() / 90
    return powers(size) * scale, (inverse / scale * 32).round() / 32, powers(pool)


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
        """Add vectors times constant numbers; ones and zeros cost nothing."""
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
def deal(v, pixels, start, planes, at, plane_step, window):
    """Deal as many pixels as fill a vector of each plane."""
    b = v.builder
    pool = len(window)
    stretch = _Vectors(b, v.element, v.lanes * pool).load(pixels, start)
    for s in window:
        v.store(
            v.pick(stretch, range(s, v.lanes * pool, pool)), planes, _offset(b, at, (s, plane_step))
        )


@_inner_loop
def transpose_square(v, source, at, step, target, to, to_step):
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
def convolve_windows(
    v, planes, start, channels, channel_step, row_step, plane_step, packed, first_weight, biases, first_filter,
    maxima, codes, at, width, tame, taps, window,
):  # fmt: skip
    """Convolve, ReLU, pool: for as many windows, side by side, as a vector has lanes, and for a block of filters.

    ``maxima`` receives the maximum of each window, and ``codes`` its place (row * pool + column) plus one, or 0.
    """
    b = v.builder
    size = len(taps)
    pool = len(window)
    block = block_size(pool)
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
def transform_columns(v, planes, start, products, at, row_step, taps, window):
    """A vector of columns, each of as many pixels as there are products. Opposite points share their sums."""
    if not has_columns(len(taps), len(window)):
        return
    b = v.builder
    n = len(taps) + len(window) - 1
    pixels = [v.load(planes, _offset(b, start, (y, row_step))) for y in range(n)]
    rows = column_transforms(len(taps), len(window))[1].tolist()
    factors = [v.weighted_sum(rows[0], pixels)]
    for row in rows[1:-1:2]:
        even, odd = (v.weighted_sum(row[parity::2], pixels[parity::2]) for parity in (0, 1))
        factors += [b.fadd(even, odd), b.fsub(even, odd)]
    for u, factor in enumerate([*factors, v.weighted_sum(rows[-1], pixels)]):
        v.store(factor, products, _offset(b, at, (u, row_step)))


@functools.partial(_inner_loop, result=types.boolean)
def convolve_columns(
    v, products, start, channels, row_step, plane_step, packed, first_weight, biases, doubts, first_filter, largest,
    maxima, codes, at, width, taps, window,
):  # fmt: skip
    """As `convolve_windows`, with fewer products; returns whether it is sure of all winners.

    It is where just one, of the results and zero, is no lower than the highest less its doubt.
    """
    b = v.builder
    size = len(taps)
    pool = len(window)
    if not has_columns(size, pool):
        return ir.Constant(ir.IntType(1), False)
    n = size + pool - 1
    block = block_size(pool)
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
    """Emit the results of a column of a window, one after another."""
    b = v.builder
    first = products[0]
    last = products[-1]
    pairs = list(zip(products[1:-1:2], products[2:-1:2], strict=True))
    halves = [[b.fadd(*pair) for pair in pairs], [b.fsub(*pair) for pair in pairs]]
    powers = column_transforms(size, pool)[2].T.tolist()
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
def gather(v, pixels, first, row_step, positions, gains, begin, end, sums, at, length, taps):
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
def scatter(v, pixels, at, row_step, kernels, kernel, length, gain, taps):
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
