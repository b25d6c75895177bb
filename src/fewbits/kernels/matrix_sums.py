"""What kernels of 32-bit sums ask matrix units for, and what they ask instead where there are none."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fewbits.kernels.lanes import I64, LANES
from fewbits.kernels.matrix_units import HAS_MATRIX_UNITS, PAIRS, add_tiles, begin_tiles, end_tiles


def _where_there_are_matrix_units(emit: Callable[[Any], None]) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def done(typing_context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            if HAS_MATRIX_UNITS:
                emit(builder)
            return context.get_dummy_value()

        return types.none(), generate

    return done


# What a thread does before it multiplies, and afterwards.
begin, end = _where_there_are_matrix_units(begin_tiles), _where_there_are_matrix_units(end_tiles)


@cache
def add_matrices(rows: int, columns: int, begun: bool) -> Callable[..., Any]:
    """An intrinsic (left, left stride, right, right stride, turns, sums, sums' stride): sums += left · right of bf16.

    Addresses, and bytes from one row to the next. left: [rows, 32 turns]. right: pairs [16 turns, columns]. sums: fp32
    [rows, columns], of 16 or 32 rows and columns, written anew if not `begun`. Returns how many rows were added to:
    none without matrix units.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def added(
        typing_context: Any, left: Any, left_stride: Any, right: Any, right_stride: Any, turns: Any, sums: Any,
        stride: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            if not HAS_MATRIX_UNITS:
                return ir.Constant(I64, 0)
            left, left_stride, right, right_stride, turns, sums, stride = arguments
            add_tiles(
                builder, PAIRS, rows // LANES, columns // LANES, left, left_stride, right, right_stride, turns, sums,
                stride, ir.Constant(ir.IntType(1), begun),
            )  # fmt: skip
            return ir.Constant(I64, rows)

        return types.int64(*[types.int64] * 7), generate

    return added  # type: ignore[no-any-return]
