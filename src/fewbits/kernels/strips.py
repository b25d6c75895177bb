"""Strips: a few rows times packed columns, summed in registers over pairs of bf16 numbers, where processors do that.

Two numbers at a time lie side by side as a pair. A pair of a row is spread over all lanes of a vector, and multiplied
with the same pair of 16 neighbouring columns: exact products, fp32 sums.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fewbits.kernels.lanes import LANES, PAIRS_OF_BF16, Sums, call, load

# Rows of a strip.
STRIP = 8

_I32, _I64 = ir.IntType(32), ir.IntType(64)


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
            _loop_over_pairs(builder, vectors, *arguments)
            return context.get_dummy_value()

        return types.none(*[types.int64] * 7), generate

    return added  # type: ignore[no-any-return]


def _loop_over_pairs(
    builder: Any, vectors: int, left: Any, row: Any, pair: Any, right: Any, pairs: Any, sums: Any, stride: Any
) -> None:
    before = builder.block
    loop, behind = builder.append_basic_block("pairs"), builder.append_basic_block("behind")
    builder.branch(loop)
    builder.position_at_end(loop)
    done = builder.phi(_I64)
    done.add_incoming(ir.Constant(_I64, 0), before)
    totals = [[builder.phi(Sums.vector) for _ in range(vectors)] for _ in range(STRIP)]
    at = builder.add(right, builder.mul(done, ir.Constant(_I64, 4 * LANES * vectors)))
    columns = [load(builder, builder.add(at, ir.Constant(_I64, 4 * LANES * v)), PAIRS_OF_BF16) for v in range(vectors)]
    at = builder.add(left, builder.mul(done, pair))
    nobody = ir.Constant(ir.VectorType(_I32, LANES), ir.Undefined)
    everywhere = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    added = []
    for r in range(STRIP):
        one = load(builder, builder.add(at, builder.mul(row, ir.Constant(_I64, r))), _I32)
        first = builder.insert_element(nobody, one, ir.Constant(_I32, 0))
        spread = builder.bitcast(builder.shuffle_vector(first, nobody, everywhere), PAIRS_OF_BF16)
        added.append(
            [
                call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", Sums.vector, [totals[r][v], spread, columns[v]])
                for v in range(vectors)
            ]
        )
    following = builder.add(done, ir.Constant(_I64, 1))
    done.add_incoming(following, loop)
    for r in range(STRIP):
        for v in range(vectors):
            totals[r][v].add_incoming(ir.Constant(Sums.vector, None), before)
            totals[r][v].add_incoming(added[r][v], loop)
    builder.cbranch(builder.icmp_signed("<", following, pairs), loop, behind)
    builder.position_at_end(behind)
    for r in range(STRIP):
        row_at = builder.add(sums, builder.mul(stride, ir.Constant(_I64, r)))
        for v in range(vectors):
            place = builder.add(row_at, ir.Constant(_I64, 4 * LANES * v))
            total = builder.fadd(load(builder, place, Sums.vector), added[r][v])
            builder.store(total, builder.inttoptr(place, Sums.vector.as_pointer()), align=4)
