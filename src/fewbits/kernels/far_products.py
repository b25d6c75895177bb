"""Sums of 32 rows side by side plus products with many columns: in bf16 pairs where the processor multiplies those.

What is multiplied is kept so that two columns' numbers of a row are a pair of bf16 numbers, elsewhere as fp32 columns.
Sums are fp32. Matrix units take 32 or 16 columns of sums at once, dot products of pairs eight.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fewbits.kernels.compiling import inlined, inner
from fewbits.kernels.lane_products import COLUMN_BYTES, COLUMNS, ROWS, add_lanes
from fewbits.kernels.lanes import (
    HAS_BF16,
    I64,
    LANES,
    Bf16Lanes,
    Sums,
    indices,
    load,
    rounded,
)  # fmt: skip
from fewbits.kernels.matrix_sums import add_matrices
from fewbits.kernels.memory import as_bf16

# How a number is kept, its bytes, and bytes from one kept column's numbers to the next's.
KEPT = np.uint16 if HAS_BF16 else np.float32
NUMBER_BYTES = np.dtype(KEPT).itemsize
KEPT_BYTES = ROWS * NUMBER_BYTES
# Columns are multiplied by so many: zeros stand for those that are not there.
TOGETHER = 32
# Rows of a matrix are so many bytes longer than they need be, so that they don't fall on the same lines of a cache.
APART = 64
# Kept columns whose pairs are multiplied with every row of a matrix before the next ones: they stay in the first-level
# cache. Matrix units wait less for the second than they take to put sums away.
CACHED = 768 // NUMBER_BYTES


@inlined
def padded(columns: Any) -> Any:
    """Columns with those that fill up the last TOGETHER."""
    return (columns + TOGETHER - 1) // TOGETHER * TOGETHER


@inlined
def _as_it_is(value: Any) -> Any:
    return value


# An fp32 number as it is kept.
stored = as_bf16 if HAS_BF16 else _as_it_is


@intrinsic  # type: ignore[untyped-decorator]
def _keep_two(typing_context: Any, first: Any, second: Any, target: Any) -> Any:
    """Two fp32 columns at addresses, to be multiplied."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *columns, target = arguments
        for half in range(2):
            shift = ir.Constant(I64, 4 * LANES * half)
            both = [load(builder, builder.add(column, shift), Sums.vector) for column in columns]
            at = builder.add(target, shift)
            if HAS_BF16:
                numbers = rounded(builder, both)
                pairs = builder.shuffle_vector(numbers, numbers, indices(i // 2 + i % 2 * LANES for i in range(32)))
                builder.store(pairs, builder.inttoptr(at, Bf16Lanes.vector.as_pointer()), align=2)
                continue
            for column, value in enumerate(both):
                place = builder.add(at, ir.Constant(I64, column * COLUMN_BYTES))
                builder.store(value, builder.inttoptr(place, Sums.vector.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 3), generate


# Of lines of 32 words: pairs of two kept columns, or numbers of one.
_some, _one = add_lanes(COLUMNS, False, HAS_BF16), add_lanes(1, False, HAS_BF16)
_tall, _low = add_matrices(2 * LANES, ROWS, True), add_matrices(LANES, ROWS, True)


@inner
def keep_columns(columns: Any, kept: Any) -> None:
    """Keep fp32 columns [n, ROWS], to be multiplied, at an address; with an odd n zeros behind them."""
    count = len(columns)
    nothing = np.zeros(ROWS, np.float32)
    for first in range(0, count, 2):
        second = columns[first + 1] if first + 1 < count else nothing
        _keep_two(columns[first].ctypes.data, second.ctypes.data, kept + first * KEPT_BYTES)


# Inlined by Numba, as lane_products are.
@inlined
def add_far(matrix: Any, stride: Any, kept: Any, count: Any, sums: Any, columns: Any) -> None:
    """sums += matrix · kept, of addresses, between `begin` and `end`.

    Args:
        matrix: [columns, count] as KEPT, rows `stride` bytes apart. kept: [count, ROWS], as `keep_columns` left it.
        count: a multiple of TOGETHER. sums: fp32 [columns, ROWS].
    """
    line, done = np.int64(COLUMN_BYTES), 0 if count > 0 else columns
    while done + 2 * LANES <= columns:
        added = _tall(matrix + done * stride, stride, kept, line, count // TOGETHER, sums + done * COLUMN_BYTES, line)
        if added == 0:
            break
        done += added
    if done + LANES <= columns:
        done += _low(matrix + done * stride, stride, kept, line, count // TOGETHER, sums + done * COLUMN_BYTES, line)
    for first in range(0, count if done < columns else 0, CACHED):
        some, column = min(CACHED, count - first), done
        at, of = matrix + NUMBER_BYTES * first, kept + first * KEPT_BYTES
        lines = some * NUMBER_BYTES // 4
        while column + COLUMNS <= columns:
            _some(at + column * stride, stride, of, lines, sums + column * COLUMN_BYTES)
            column += COLUMNS
        while column < columns:
            _one(at + column * stride, stride, of, lines, sums + column * COLUMN_BYTES)
            column += 1
