"""A few columns of 32 rows chosen one after the other, in registers: the innermost steps of GPTQ's sweep and descent.

Each column's numbers, two vectors of 16 rows, stay in registers from the first push into them until they are chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fewbits.kernels.lane_products import COLUMN_BYTES, ROWS
from fewbits.kernels.lanes import F32, I8, I32, I64, LANES, Sums, call, constant, load, multiply_add, spread

# What is known of each row's grid, ROWS numbers each, one after the other.
SCALE, INVERSE, LOW, HIGH, LOSS = range(5)
GRID_ROWS = 5
WORDS = ir.VectorType(I32, LANES)
BYTES = ir.VectorType(I8, LANES)
HALVES = range(2)


def _at(builder: Any, address: Any, column: int, half: int = 0) -> Any:
    return builder.add(address, ir.Constant(I64, column * COLUMN_BYTES + half * 4 * LANES))


def _column(builder: Any, address: Any, column: int) -> list[Any]:
    return [load(builder, _at(builder, address, column, half), Sums.vector) for half in HALVES]


def _store(builder: Any, address: Any, column: int, halves: list[Any]) -> None:
    for half, value in enumerate(halves):
        place = builder.inttoptr(_at(builder, address, column, half), Sums.vector.as_pointer())
        builder.store(value, place, align=4)


def _number(builder: Any, matrix: Any, stride: Any, row: int, column: int) -> Any:
    at = builder.add(builder.add(matrix, builder.mul(stride, ir.Constant(I64, row))), ir.Constant(I64, 4 * column))
    return load(builder, at, F32)


def _clamped(builder: Any, value: Any, low: Any, high: Any) -> Any:
    value = builder.select(builder.fcmp_ordered("<", value, low), low, value)
    return builder.select(builder.fcmp_ordered(">", value, high), high, value)


def _nearest(builder: Any, value: Any) -> Any:
    return call(builder, "llvm.rint.v16f32", Sums.vector, [value])


def _push(builder: Any, matrix: Any, stride: Any, column: int, steps: list[Any], columns: list[list[Any]]) -> None:
    """Take off the columns behind what one column's steps push into them."""
    steps = [builder.fneg(step) for step in steps]
    for behind in range(column + 1, len(columns)):
        share = spread(builder, _number(builder, matrix, stride, behind, column))
        columns[behind] = [
            multiply_add(builder, step, share, value) for step, value in zip(steps, columns[behind], strict=True)
        ]


@cache
def sweep_columns(count: int) -> Callable[..., None]:
    """An intrinsic (weights, factor, stride, grid, codes, errors): round columns; errors go into those behind.

    weights: the address of columns [count, ROWS]. factor: that of their block of Uᵀ, rows `stride` bytes apart. grid:
    what is known of each row's; its loss is added to. codes, errors: columns, written.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def swept(typing_context: Any, weights: Any, factor: Any, stride: Any, grid: Any, codes: Any, errors: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _sweep(builder, count, *arguments)
            return context.get_dummy_value()

        return types.none(*[types.int64] * 6), generate

    return swept  # type: ignore[no-any-return]


def _sweep(
    builder: Any, count: int, weights: Any, factor: Any, stride: Any, grid: Any, codes: Any, errors: Any
) -> None:
    scale, inverse, low, high, loss = (_column(builder, grid, row) for row in range(GRID_ROWS))
    columns = [_column(builder, weights, column) for column in range(count)]
    for column in range(count):
        diagonal = builder.fdiv(ir.Constant(F32, 1.0), _number(builder, factor, stride, column, column))
        diagonal = spread(builder, diagonal)
        chosen, missed = [], []
        for half in HALVES:
            w = columns[column][half]
            code = _nearest(builder, builder.fmul(w, inverse[half]))
            code = _clamped(builder, code, low[half], high[half])
            miss = builder.fmul(multiply_add(builder, builder.fneg(code), scale[half], w), diagonal)
            loss[half] = multiply_add(builder, miss, miss, loss[half])
            chosen.append(builder.fsub(code, low[half]))
            missed.append(miss)
        _store(builder, codes, column, chosen)
        _store(builder, errors, column, missed)
        _push(builder, factor, stride, column, missed, columns)
    _store(builder, grid, LOSS, loss)


@cache
def descend_columns(count: int) -> Callable[..., Any]:
    """An intrinsic (gradients, H, stride, scales, codes, misses, steps, gain, top): choose columns' codes anew.

    gradients, misses: the addresses of columns [count, ROWS]; codes: that of bytes, changed as misses are. scales: that
    of a column, the rows' scales. H: that of their block, rows `stride` bytes apart. steps: columns, written: by how
    much decoded weights grew. gain: a column, added to: by how much each row's loss fell. top: the largest code.
    Returns 0 if no code changed.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def descended(
        typing_context: Any, gradients: Any, H: Any, stride: Any, scales: Any, codes: Any, misses: Any, steps: Any,
        gain: Any, top: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return _descend(builder, count, *arguments)

        return types.int32(*[types.int64] * 8, types.float32), generate

    return descended  # type: ignore[no-any-return]


def _code_places(builder: Any, codes: Any, column: int) -> list[Any]:
    return [builder.add(codes, ir.Constant(I64, column * ROWS + half * LANES)) for half in HALVES]


def _descend(
    builder: Any, count: int, gradients: Any, H: Any, stride: Any, scales: Any, codes: Any, misses: Any, steps: Any,
    gain: Any, top: Any,
) -> Any:  # fmt: skip
    top, nothing, one = spread(builder, top), constant(0.0), constant(1.0)
    columns = [_column(builder, gradients, column) for column in range(count)]
    gained, scale = _column(builder, gain, 0), _column(builder, scales, 0)
    inverse = [builder.fdiv(one, each) for each in scale]
    moved = [ir.Constant(WORDS, None)] * 2
    for column in range(count):
        curvature = _number(builder, H, stride, column, column)
        flat = spread(builder, builder.fdiv(ir.Constant(F32, 1.0), curvature))
        curvature = spread(builder, curvature)
        miss = _column(builder, misses, column)
        taken = []
        for half, place in enumerate(_code_places(builder, codes, column)):
            pull, code = columns[column][half], builder.uitofp(load(builder, place, BYTES), Sums.vector)
            steps_away = _nearest(builder, builder.fmul(builder.fmul(pull, flat), inverse[half]))
            wanted = _clamped(builder, builder.fadd(code, steps_away), nothing, top)
            builder.store(builder.fptoui(wanted, BYTES), builder.inttoptr(place, BYTES.as_pointer()), align=1)
            change = builder.fsub(wanted, code)
            moved[half] = builder.or_(moved[half], builder.bitcast(change, WORDS))
            step = builder.fmul(change, scale[half])
            taken.append(step)
            miss[half] = builder.fsub(miss[half], step)
            slope = multiply_add(builder, builder.fneg(step), curvature, builder.fadd(pull, pull))
            gained[half] = multiply_add(builder, step, slope, gained[half])
        _store(builder, misses, column, miss)
        _store(builder, steps, column, taken)
        _push(builder, H, stride, column, taken, columns)
    _store(builder, gain, 0, gained)
    return call(builder, "llvm.vector.reduce.or.v16i32", I32, [builder.or_(*moved)])
