"""Sums minus some rows of a matrix, each times a number: what few changes among many make of a product.

Sums stay in registers, up to 16 vectors of them, while the listed rows stream by, kept as far_products keeps numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from fewbits.kernels.far_products import NUMBER_BYTES
from fewbits.kernels.lanes import F32, HAS_BF16, I16, I64, LANES, Sums, load, multiply_add, repeat, spread, widened
from fewbits.kernels.memory import BFLOAT16, FLOAT32, number_at

# Vectors of sums that fit the registers: 16 of 64 bytes, or 8 of two of 32 or four of 16.
VECTORS = 16 if llvm.get_host_cpu_features().get("avx512f") else 4
KIND = BFLOAT16 if HAS_BF16 else FLOAT32


_HALF = ir.VectorType(I16, LANES)


@cache
def subtract_vectors(vectors: int) -> Callable[..., None]:
    """An intrinsic (rows, shift, numbers, count, sums): sums −= Σ number · what lies at a row's address + shift.

    rows, numbers: the addresses of `count` int64 addresses and fp32 numbers, at least one. sums: that of vectors of 16.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def subtracted(typing_context: Any, rows: Any, shift: Any, numbers: Any, count: Any, sums: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _subtract(builder, vectors, *arguments)
            return context.get_dummy_value()

        return types.none(*[types.int64] * 5), generate

    return subtracted  # type: ignore[no-any-return]


def _subtract(builder: Any, vectors: int, rows: Any, shift: Any, numbers: Any, count: Any, sums: Any) -> None:
    def body(turn: Any, carried: list[Any]) -> list[Any]:
        row = load(builder, builder.add(rows, builder.shl(turn, ir.Constant(I64, 3))), I64)
        number = load(builder, builder.add(numbers, builder.shl(turn, ir.Constant(I64, 2))), F32)
        number, at = spread(builder, builder.fneg(number)), builder.add(row, shift)
        places = [builder.add(at, ir.Constant(I64, NUMBER_BYTES * LANES * vector)) for vector in range(vectors)]
        return [
            multiply_add(builder, number, _numbers(builder, place), total)
            for place, total in zip(places, carried, strict=True)
        ]

    kept = [builder.add(sums, ir.Constant(I64, 4 * LANES * vector)) for vector in range(vectors)]
    before = [load(builder, place, Sums.vector) for place in kept]
    for place, total in zip(kept, repeat(builder, count, before, body), strict=True):
        builder.store(total, builder.inttoptr(place, Sums.vector.as_pointer()), align=4)


def _numbers(builder: Any, address: Any) -> Any:
    return widened(builder, load(builder, address, _HALF)) if HAS_BF16 else load(builder, address, Sums.vector)


_subtract_some, _subtract_single = subtract_vectors(VECTORS), subtract_vectors(1)


@njit(inline="always")  # type: ignore[untyped-decorator]
def subtract_listed(rows: Any, numbers: Any, count: Any, first: Any, stop: Any, sums: Any) -> None:
    """sums[first:stop] −= Σ number · row[first:stop].

    Args:
        rows: int64 addresses of rows. numbers: fp32. count: how many of both, at least one. sums: fp32.
    """
    listed, by = rows.ctypes.data, numbers.ctypes.data
    done = first
    while done + VECTORS * LANES <= stop:
        _subtract_some(listed, NUMBER_BYTES * done, by, count, sums[done:].ctypes.data)
        done += VECTORS * LANES
    while done + LANES <= stop:
        _subtract_single(listed, NUMBER_BYTES * done, by, count, sums[done:].ctypes.data)
        done += LANES
    while done < stop:
        for number in range(count):
            sums[done] -= numbers[number] * number_at(rows[number], done, KIND)
        done += 1
