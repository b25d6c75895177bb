"""Sums minus some rows of a matrix, each times a number: what few changes among many make of a product.

Sums stay in registers, up to 16 vectors of them, while the listed rows stream by. Where numbers are kept in bf16, a
line of a row is 32 columns, a column and the 16th after it in a word: a shift and a mask make fp32 of both.
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
from fewbits.kernels.far_products import NUMBER_BYTES
from fewbits.kernels.lanes import (
    F32,
    HAS_BF16,
    I64,
    LANES,
    Bf16Lanes,
    IntSums,
    Sums,
    indices,
    load,
    multiply_add,
    repeat,
    rounded,
    splat,
    spread,
)  # fmt: skip

# Bytes and columns of a line, and its vectors of sums.
LINE_BYTES = 4 * LANES
LINE = LINE_BYTES // NUMBER_BYTES
_HALVES = LINE // LANES
# Lines whose sums fit the registers: 16 vectors of 64 bytes, or 8 of two of 32 or four of 16.
LINES = (16 if llvm.get_host_cpu_features().get("avx512f") else 4) // _HALVES


@intrinsic  # type: ignore[untyped-decorator]
def keep_line(typing_context: Any, numbers: Any, target: Any) -> Any:
    """LINE fp32 numbers at an address as a line of a row, at another."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        numbers, target = arguments
        halves = [
            load(builder, builder.add(numbers, ir.Constant(I64, 4 * LANES * half)), Sums.vector)
            for half in range(_HALVES)
        ]
        kept = halves[0]
        if HAS_BF16:
            kept = rounded(builder, halves)
            kept = builder.shuffle_vector(kept, kept, indices(i // 2 + i % 2 * LANES for i in range(LINE)))
        kind = Bf16Lanes.vector if HAS_BF16 else Sums.vector
        builder.store(kept, builder.inttoptr(target, kind.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), generate


def _numbers(builder: Any, address: Any) -> list[Any]:
    """A line's numbers, in order."""
    if not HAS_BF16:
        return [load(builder, address, Sums.vector)]
    words = load(builder, address, IntSums.vector)
    low = builder.shl(words, splat(IntSums.vector, 16))
    high = builder.and_(words, splat(IntSums.vector, -1 << 16))
    return [builder.bitcast(half, Sums.vector) for half in (low, high)]


@cache
def subtract_lines(lines: int) -> Callable[..., None]:
    """An intrinsic (rows, shift, numbers, count, sums): sums −= Σ number · lines that lie at a row's address + shift.

    rows, numbers: the addresses of `count` int64 addresses and fp32 numbers, at least one. sums: that of fp32.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def subtracted(typing_context: Any, rows: Any, shift: Any, numbers: Any, count: Any, sums: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _subtract(builder, lines, *arguments)
            return context.get_dummy_value()

        return types.none(*[types.int64] * 5), generate

    return subtracted  # type: ignore[no-any-return]


def _subtract(builder: Any, lines: int, rows: Any, shift: Any, numbers: Any, count: Any, sums: Any) -> None:
    def body(turn: Any, carried: list[Any]) -> list[Any]:
        row = load(builder, builder.add(rows, builder.shl(turn, ir.Constant(I64, 3))), I64)
        number = load(builder, builder.add(numbers, builder.shl(turn, ir.Constant(I64, 2))), F32)
        number, at = spread(builder, builder.fneg(number)), builder.add(row, shift)
        places = [builder.add(at, ir.Constant(I64, LINE_BYTES * line)) for line in range(lines)]
        streamed = [half for place in places for half in _numbers(builder, place)]
        return [multiply_add(builder, number, half, total) for half, total in zip(streamed, carried, strict=True)]

    kept = [builder.add(sums, ir.Constant(I64, 4 * LANES * vector)) for vector in range(lines * _HALVES)]
    before = [load(builder, place, Sums.vector) for place in kept]
    for place, total in zip(kept, repeat(builder, count, before, body), strict=True):
        builder.store(total, builder.inttoptr(place, Sums.vector.as_pointer()), align=4)


_subtract_some, _subtract_single = subtract_lines(LINES), subtract_lines(1)


@inlined
def whole_lines(columns: Any) -> Any:
    """Rounded up to whole lines."""
    return (columns + LINE - 1) // LINE * LINE


@inlined
def subtract_listed(rows: Any, numbers: Any, count: Any, first: Any, stop: Any, sums: Any) -> None:
    """sums[first:stop] −= Σ number · row[first:stop], to the end of a line.

    Args:
        rows: int64 addresses of rows of lines. numbers: fp32. count: how many of both, at least one.
        first: where a line begins. sums: fp32.
    """
    listed, by = rows.ctypes.data, numbers.ctypes.data
    done = first
    while done + LINES * LINE <= stop:
        _subtract_some(listed, NUMBER_BYTES * done, by, count, sums[done:].ctypes.data)
        done += LINES * LINE
    while done < stop:
        _subtract_single(listed, NUMBER_BYTES * done, by, count, sums[done:].ctypes.data)
        done += LINE
