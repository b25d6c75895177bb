"""Thirty-two bf16 weights at once: their range, their squares, and their codes with what those miss.

A vector of 16 words holds 32 weights, and one operation a half makes fp32 of them: those at even places by a shift,
those at odd places by a mask. Codes are interleaved again on the way out. Rows of ordinary size only: squares are taken
of the weights themselves, and must neither overflow nor vanish. Scales must leave products with codes exact, as bf16
and fp16 do: then a fused multiply-add misses just what a decoder will.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fewbits.kernels.compiling import Array, as_float, inlined
from fewbits.kernels.lanes import (
    I8,
    I16,
    I32,
    LANES,
    Bf16Lanes,
    Sums,
    call,
    constant,
    dot_pairs,
    load,
    no_sums,
    splat,
    spread,
    total_of,
)

# Weights of a step, and their bytes.
STEP, STEP_BYTES = 32, 64
HAS_WIDE_VECTORS = bool(llvm.get_host_cpu_features().get("avx512bw"))
# The largest magnitude of an ordinary row lies in 2^-40 … 2^40, here by its bf16 bits.
LEAST_BITS, MOST_BITS = (127 - 40) << 7, (127 + 40) << 7
_WORDS = ir.VectorType(I32, LANES)
# Added to a number below 2^22, leaves it rounded half to even, as an integer, in the lowest bits.
TO_INTEGER = 1.5 * 2.0**23
# e4m3fn has three bits of mantissa: this many times a number's power of two leaves just those. Below 2^-6 its grid is
# that of 2^-6; the first code there is 8.
POWERS, SMALLEST_POWER = 0x7F800000, (127 - 6) << 23
TO_THREE_BITS = (20 << 23) + (1 << 22)


def fits(weight: Array, dtype: str, run: int) -> bool:
    """Whether these kernels serve for rows whose scales are stored in `dtype`, one for each `run` of weights."""
    return HAS_WIDE_VECTORS and weight.dtype == np.uint16 and dtype != "F32" and run % STEP == 0


def _halves(builder: Any, words: Any) -> list[Any]:
    """Weights at even and at odd places, as fp32."""
    halves = [builder.shl(words, splat(_WORDS, 16)), builder.and_(words, splat(_WORDS, 0xFFFF0000))]
    return [builder.bitcast(half, Sums.vector) for half in halves]


def _add_misses(builder: Any, sums: Any, x: Any, value: Any, scale: Any) -> Any:
    """Sums + (x − value · scale)²."""
    missed = call(builder, "llvm.fma.v16f32", Sums.vector, [value, builder.fneg(scale), x])
    return call(builder, "llvm.fma.v16f32", Sums.vector, [missed, missed, sums])


def _store_bytes(builder: Any, address: Any, codes: list[Any], offset: Any) -> None:
    """Store the lowest bytes of codes from even and odd places, each plus an offset."""
    even = builder.and_(codes[0], splat(_WORDS, 0xFF))
    both = builder.or_(even, builder.shl(codes[1], splat(_WORDS, 8)))
    kind = ir.VectorType(I8, STEP)
    packed = builder.bitcast(builder.trunc(both, ir.VectorType(I16, LANES)), kind)
    if offset is not None:
        first = builder.insert_element(ir.Constant(kind, ir.Undefined), offset, ir.Constant(I32, 0))
        packed = builder.add(packed, builder.shuffle_vector(first, first, splat(ir.VectorType(I32, STEP), 0)))
    builder.store(packed, builder.inttoptr(address, kind.as_pointer()), align=1)


@intrinsic  # type: ignore[untyped-decorator]
def weights_at(typing_context: Any, address: Any) -> Any:
    """The 32 weights at an address, by their bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return load(builder, arguments[0], Bf16Lanes.vector)

    return Bf16Lanes(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def no_weights(typing_context: Any) -> Any:
    """Zeros."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(Bf16Lanes.vector, None)

    return Bf16Lanes(), generate


@intrinsic  # type: ignore[untyped-decorator]
def higher(typing_context: Any, most: Any, weights: Any) -> Any:
    """The larger of each two, if one is positive: as signed integers, bits are in the order of positive numbers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return call(builder, "llvm.smax.v32i16", Bf16Lanes.vector, list(arguments))

    return Bf16Lanes(Bf16Lanes, Bf16Lanes), generate


@intrinsic  # type: ignore[untyped-decorator]
def lower(typing_context: Any, least: Any, weights: Any) -> Any:
    """The smaller of each two, if one is negative: as unsigned integers, bits grow with a negative number's size."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return call(builder, "llvm.umax.v32i16", Bf16Lanes.vector, list(arguments))

    return Bf16Lanes(Bf16Lanes, Bf16Lanes), generate


@intrinsic  # type: ignore[untyped-decorator]
def range_of(typing_context: Any, most: Any, least: Any) -> Any:
    """The bits of the magnitudes of the largest positive and of the least negative number; 0 if there is none."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        high = call(builder, "llvm.vector.reduce.smax.v32i16", I16, [arguments[0]])
        low = call(builder, "llvm.vector.reduce.umax.v32i16", I16, [arguments[1]])
        is_negative = builder.icmp_signed("<", low, ir.Constant(I16, 0))
        low = builder.select(is_negative, builder.and_(low, ir.Constant(I16, 0x7FFF)), ir.Constant(I16, 0))
        return context.make_tuple(builder, signature.return_type, [high, low])

    return types.UniTuple(types.uint16, 2)(Bf16Lanes, Bf16Lanes), generate


@intrinsic  # type: ignore[untyped-decorator]
def add_squares(typing_context: Any, sums: Any, weights: Any) -> Any:
    """Sums + squares of 32 weights."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, weights = arguments
        return dot_pairs(builder, sums, weights, weights)

    return Sums(Sums, Bf16Lanes), generate


@intrinsic  # type: ignore[untyped-decorator]
def round_to_int(
    typing_context: Any, sums: Any, source: Any, target: Any, inverse: Any, scale: Any, limits: Any, zero: Any
) -> Any:
    """Codes of the 32 weights at `source` go to `target`, a byte each.

    Args:
        sums: what was missed so far, at even and odd places: a pair.
        limits: the least and the largest code before the zero point is added; None if no code can be beyond.
        zero: the zero point, uint8; None without.
    """
    bounded, raised = limits != types.none, zero != types.none

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, source, target, inverse, scale, limits, zero = arguments
        inverse, scale, found, codes = spread(builder, inverse), spread(builder, scale), [], []
        for place, x in enumerate(_halves(builder, load(builder, source, _WORDS))):
            u = builder.fmul(x, inverse)
            if bounded:
                low, high = (spread(builder, limit) for limit in cgutils.unpack_tuple(builder, limits))
                u = builder.select(builder.fcmp_ordered("<", u, low), low, u)
                u = builder.select(builder.fcmp_ordered(">", u, high), high, u)
            shifted = builder.fadd(u, constant(TO_INTEGER))
            value = builder.fsub(shifted, constant(TO_INTEGER))
            found.append(_add_misses(builder, builder.extract_value(sums, place), x, value, scale))
            codes.append(builder.bitcast(shifted, _WORDS))
        _store_bytes(builder, target, codes, zero if raised else None)
        return context.make_tuple(builder, signature.return_type, found)

    pair = types.UniTuple(Sums, 2)
    return pair(pair, types.int64, types.int64, types.float32, types.float32, limits, zero), generate


@intrinsic  # type: ignore[untyped-decorator]
def round_to_fp8(typing_context: Any, sums: Any, source: Any, target: Any, inverse: Any, scale: Any) -> Any:
    """`round_to_int` for float8 e4m3fn, without limits: bits of the nearest numbers go to `target`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, source, target, inverse, scale = arguments
        inverse, scale, found, codes = spread(builder, inverse), spread(builder, scale), [], []
        words = load(builder, source, _WORDS)
        magnitudes = builder.and_(words, splat(_WORDS, 0x7FFF7FFF))
        for place, x in enumerate(_halves(builder, magnitudes)):
            u = builder.bitcast(builder.fmul(x, inverse), _WORDS)
            power = builder.and_(u, splat(_WORDS, POWERS))
            power = call(builder, "llvm.umax.v16i32", _WORDS, [power, splat(_WORDS, SMALLEST_POWER)])
            step_bits = builder.add(power, splat(_WORDS, TO_THREE_BITS))
            step = builder.bitcast(step_bits, Sums.vector)
            shifted = builder.fadd(builder.bitcast(u, Sums.vector), step)
            found.append(
                _add_misses(builder, builder.extract_value(sums, place), x, builder.fsub(shifted, step), scale)
            )
            # In units of the last bit of mantissa, 8 to 16 or below 2^-6 less; and eight codes a power of two.
            units = builder.sub(builder.bitcast(shifted, _WORDS), step_bits)
            eights = builder.lshr(power, splat(_WORDS, 20))
            codes.append(builder.sub(builder.add(units, eights), splat(_WORDS, SMALLEST_POWER >> 20)))
        signs = builder.and_(builder.lshr(words, splat(_WORDS, 8)), splat(_WORDS, 0x00800080))
        codes = [builder.or_(codes[0], signs), builder.or_(codes[1], builder.lshr(signs, splat(_WORDS, 16)))]
        _store_bytes(builder, target, codes, None)
        return context.make_tuple(builder, signature.return_type, found)

    pair = types.UniTuple(Sums, 2)
    return pair(pair, types.int64, types.int64, types.float32, types.float32), generate


@inlined
def scan(source: Any, count: Any, squares: Any) -> Any:
    """Range of the weights at an address (`range_of`), and `squares` and theirs: a pair, which take turns."""
    most, least = no_weights(), no_weights()
    for at in range(source, source + STEP_BYTES // STEP * count, STEP_BYTES):
        weights = weights_at(at)
        most, least = higher(most, weights), lower(least, weights)
        squares = (squares[1], add_squares(squares[0], weights))
    high, low = range_of(most, least)
    return high, low, squares


@inlined
def no_pair() -> Any:
    """Two sums of nothing. One alone would be waited for: an addition takes longer than all else of a step."""
    return no_sums(), no_sums()


@inlined
def total_of_pair(sums: Any) -> Any:
    """All that both sums hold."""
    return total_of(sums[0]) + total_of(sums[1])


@inlined
def magnitude(bits: Any) -> Any:
    """The positive number with these bf16 bits."""
    return as_float(np.uint32(bits) << np.uint32(16))


@inlined
def is_ordinary(largest_bits: Any) -> Any:
    """Whether a row whose largest magnitude has these bf16 bits may be rounded here."""
    return LEAST_BITS <= largest_bits <= MOST_BITS
