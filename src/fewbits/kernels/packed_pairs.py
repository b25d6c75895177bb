"""Rows of bf16 numbers laid side by side as pairs, weighted on the way: what strips of products take as factors."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fewbits.kernels.lanes import (
    F32,
    I16,
    I32,
    I64,
    LANES,
    Bf16Lanes,
    Sums,
    indices,
    load,
    repeat,
    rounded,
    splat,
    spread,
    widened,
)

_WORDS = ir.VectorType(I32, LANES)
_HALF = ir.VectorType(I16, LANES)
_INTERLEAVED = indices(place for lane in range(LANES) for place in (lane, lane + LANES))


@intrinsic  # type: ignore[untyped-decorator]
def pack_pairs(
    typing_context: Any, rows: Any, step: Any, roots: Any, pairs: Any, out: Any, stride: Any, largest: Any, total: Any
) -> Any:
    """Two neighbouring rows at a time of 16 channels as pairs, each number times its row's root and rounded to bf16.

    rows: the address of bf16 rows, `step` bytes apart. roots: of one fp32 number a row, or 0 for none. out: of 32 bits
    [pairs, 16], `stride` bytes apart. largest, total: of fp32 [16], written: the largest magnitude and the sum of
    magnitudes by channel, unweighted; NaN counts as the largest.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, step, roots, pairs, out, stride, largest, total = arguments
        weighted = builder.icmp_signed("!=", roots, ir.Constant(I64, 0))
        for scaled in (True, False):
            with builder.if_then(weighted if scaled else builder.not_(weighted)):
                _over_pairs(builder, rows, step, roots if scaled else None, pairs, out, stride, largest, total)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 8), generate


def _over_pairs(
    builder: Any, rows: Any, step: Any, roots: Any, pairs: Any, out: Any, stride: Any, largest: Any, total: Any
) -> None:
    def body(pair: Any, carried: list[Any]) -> list[Any]:
        most, sums = carried
        sides = []
        for odd in range(2):
            row = builder.add(builder.mul(pair, ir.Constant(I64, 2)), ir.Constant(I64, odd))
            bits = load(builder, builder.add(rows, builder.mul(row, step)), _HALF)
            number = widened(builder, bits)
            magnitude = builder.and_(builder.bitcast(number, _WORDS), splat(_WORDS, 0x7FFFFFFF))
            most = builder.select(builder.icmp_unsigned(">", magnitude, most), magnitude, most)
            sums = builder.fadd(sums, builder.bitcast(magnitude, Sums.vector))
            if roots is not None:
                root = load(builder, builder.add(roots, builder.mul(row, ir.Constant(I64, 4))), F32)
                number = builder.fmul(number, spread(builder, root))
            sides.append(bits if roots is None else number)
        if roots is None:
            words = builder.shuffle_vector(*sides, _INTERLEAVED)
        else:
            both = rounded(builder, sides)
            words = builder.shuffle_vector(both, both, _INTERLEAVED)
        place = builder.add(out, builder.mul(pair, stride))
        builder.store(words, builder.inttoptr(place, Bf16Lanes.vector.as_pointer()), align=4)
        return [most, sums]

    nothing = [ir.Constant(_WORDS, None), ir.Constant(Sums.vector, None)]
    for address, found in zip((largest, total), repeat(builder, pairs, nothing, body), strict=True):
        builder.store(found, builder.inttoptr(address, found.type.as_pointer()), align=4)
