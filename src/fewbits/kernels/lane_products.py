"""Sums of rows, 32 of them side by side, minus or plus products: what the solvers' loops over columns are made of.

A column holds one number of each of 32 rows, two vectors of 16. Some columns' sums stay in registers while others
stream by, each number of a matrix spread over the vectors that it is multiplied with.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fewbits.kernels.compiling import inlined
from fewbits.kernels.lanes import F32, I64, LANES, Sums, dot_pairs, load, multiply_add, prefetch, repeat, spread

# Rows that lie side by side, and bytes of a column of theirs.
ROWS = 2 * LANES
COLUMN_BYTES = 4 * ROWS
# Columns whose sums fit the registers: 32 of 64 bytes, or 16 of 32 or 32 of 16 bytes.
COLUMNS = 8 if llvm.get_host_cpu_features().get("avx512f") else 2
# Of `right`, columns that are multiplied with every row before the next ones: they stay in the first-level cache.
CACHED = 192


@cache
def add_lanes(columns: int, negative: bool, of_pairs: bool = False) -> Callable[..., None]:
    """An intrinsic (matrix, stride, right, count, sums): sums += matrix · right, or −=.

    matrix: the address of fp32 [columns, count], rows `stride` bytes apart. right, sums: the addresses of columns, fp32
    [count, ROWS] and [columns, ROWS]. of_pairs: pairs of bf16 numbers stand in place of what is multiplied, and added.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def added(typing_context: Any, matrix: Any, stride: Any, right: Any, count: Any, sums: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _add(builder, columns, negative, of_pairs, *arguments)
            return context.get_dummy_value()

        return types.none(*[types.int64] * 5), generate

    return added  # type: ignore[no-any-return]


def _add(
    builder: Any,
    columns: int,
    negative: bool,
    of_pairs: bool,
    matrix: Any,
    stride: Any,
    right: Any,
    count: Any,
    sums: Any,
) -> None:
    rows = [builder.add(matrix, builder.mul(stride, ir.Constant(I64, column))) for column in range(columns)]

    def body(turn: Any, carried: list[Any]) -> list[Any]:
        at = builder.add(right, builder.mul(turn, ir.Constant(I64, COLUMN_BYTES)))
        both = [load(builder, builder.add(at, ir.Constant(I64, 4 * LANES * half)), Sums.vector) for half in range(2)]
        both = [builder.fneg(half) for half in both] if negative else both
        shift = builder.mul(turn, ir.Constant(I64, 4))
        # Lines of the rows that come next: a row begins on another page than the one before.
        behind = builder.add(builder.and_(turn, ir.Constant(I64, columns - 1)), ir.Constant(I64, columns))
        line = builder.add(builder.mul(stride, behind), builder.and_(shift, ir.Constant(I64, -64)))
        prefetch(builder, builder.add(matrix, line))
        added: list[Any] = []
        for row in rows:
            number = spread(builder, load(builder, builder.add(row, shift), F32))
            for half in both:
                total = carried[len(added)]
                if of_pairs:
                    added.append(dot_pairs(builder, total, number, half))
                else:
                    added.append(multiply_add(builder, number, half, total))
        return added

    places = [builder.add(sums, ir.Constant(I64, 4 * LANES * place)) for place in range(2 * columns)]
    kept = [load(builder, place, Sums.vector) for place in places]
    for place, total in zip(places, repeat(builder, count, kept, body), strict=True):
        builder.store(total, builder.inttoptr(place, Sums.vector.as_pointer()), align=4)


# Written out for both signs, and inlined by Numba. As a function of its own, each is optimized once alone and once more
# in every caller's cached code, and LLVM 22 then lost half a column's sums where fewer than four numbers were left.
_add_some, _add_single = add_lanes(COLUMNS, False), add_lanes(1, False)
_subtract_some, _subtract_single = add_lanes(COLUMNS, True), add_lanes(1, True)


@inlined
def add_products(matrix: Any, stride: Any, right: Any, count: Any, sums: Any, columns: Any) -> None:
    """sums += matrix · right, of addresses: fp32 [columns, count], rows `stride` bytes apart; columns [count, ROWS]."""
    for first in range(0, count, CACHED):
        some, at, of = min(CACHED, count - first), matrix + 4 * first, right + first * COLUMN_BYTES
        done = 0
        while done + COLUMNS <= columns:
            _add_some(at + done * stride, stride, of, some, sums + done * COLUMN_BYTES)
            done += COLUMNS
        while done < columns:
            _add_single(at + done * stride, stride, of, some, sums + done * COLUMN_BYTES)
            done += 1


@inlined
def subtract_products(matrix: Any, stride: Any, right: Any, count: Any, sums: Any, columns: Any) -> None:
    """sums −= matrix · right, like `add_products`."""
    for first in range(0, count, CACHED):
        some, at, of = min(CACHED, count - first), matrix + 4 * first, right + first * COLUMN_BYTES
        done = 0
        while done + COLUMNS <= columns:
            _subtract_some(at + done * stride, stride, of, some, sums + done * COLUMN_BYTES)
            done += COLUMNS
        while done < columns:
            _subtract_single(at + done * stride, stride, of, some, sums + done * COLUMN_BYTES)
            done += 1
