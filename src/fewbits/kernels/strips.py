"""Strips: a few rows times packed columns, summed in registers over pairs of bf16 numbers, where processors do that.

Two numbers at a time lie side by side as a pair. A pair of a row is spread over all lanes of a vector, and multiplied
with the same pair of 16 neighbouring columns: exact products, fp32 sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fewbits.kernels.lanes import I32, I64, LANES, PAIRS_OF_BF16, Sums, call, load, repeat, spread

# Rows of a strip.
STRIP = 8


@cache
def add_strip(vectors: int) -> Callable[..., None]:
    """An intrinsic (left, row, pair, right, pairs, sums, stride): sums += rows · columns.

    sums: the address of fp32 [STRIP, 16 vectors], rows `stride` bytes apart. left: the address of the first row's first
    pair; `row` and `pair` bytes further lie the next row's and its own next pair. right: the address of packed columns,
    32 bits [pairs, 16 vectors]. Up to three vectors' sums fit the 32 registers with what is multiplied.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def added(
        typing_context: Any, left: Any, row: Any, pair: Any, right: Any, pairs: Any, sums: Any, stride: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _add_rows(builder, vectors, *arguments)
            return context.get_dummy_value()

        return types.none(*[types.int64] * 7), generate

    return added  # type: ignore[no-any-return]


def _add_rows(
    builder: Any, vectors: int, left: Any, row: Any, pair: Any, right: Any, pairs: Any, sums: Any, stride: Any
) -> None:
    def body(done: Any, carried: list[Any]) -> list[Any]:
        at = builder.add(right, builder.mul(done, ir.Constant(I64, 4 * LANES * vectors)))
        columns = [
            load(builder, builder.add(at, ir.Constant(I64, 4 * LANES * v)), PAIRS_OF_BF16) for v in range(vectors)
        ]
        at = builder.add(left, builder.mul(done, pair))
        pairs_of_rows = (
            load(builder, builder.add(at, builder.mul(row, ir.Constant(I64, r))), I32) for r in range(STRIP)
        )
        return add_products_of_pairs(builder, carried, pairs_of_rows, columns)

    nothing = [ir.Constant(Sums.vector, None)] * (STRIP * vectors)
    for place, added in enumerate(repeat(builder, pairs, nothing, body)):
        r, v = divmod(place, vectors)
        at = builder.add(builder.add(sums, builder.mul(stride, ir.Constant(I64, r))), ir.Constant(I64, 4 * LANES * v))
        total = builder.fadd(load(builder, at, Sums.vector), added)
        builder.store(total, builder.inttoptr(at, Sums.vector.as_pointer()), align=4)


def add_products_of_pairs(builder: Any, sums: list[Any], rows: Iterable[Any], columns: list[Any]) -> list[Any]:
    """Sums, row by row, + a pair of each row (its bits) · the pairs of 16 neighbouring columns, vector by vector."""
    added: list[Any] = []
    for bits in rows:
        pair = builder.bitcast(spread(builder, bits), PAIRS_OF_BF16)
        for column in columns:
            operands = [sums[len(added)], pair, column]
            added.append(call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", Sums.vector, operands))
    return added
