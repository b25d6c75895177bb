"""Compiled rounding of activations, token by token, to int8 or float8 by the largest of each."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from fewbits.kernels.compiling import as_bits, as_float, inlined, inner
from fewbits.kernels.lanes import (
    CODES,
    I8,
    I16,
    I32,
    I64,
    LANES,
    Bf16Lanes,
    IntSums,
    Sums,
    call,
    load,
    repeat,
    splat,
    spread,
    widened,
)
from fewbits.kernels.memory import BFLOAT16, FLOAT16, FLOAT32, half_as_float, pointer_to
from fewbits.kernels.team import OWN, ROWS, WORDS, compiled_work

# The fields of a block; a row is a token. The first five come first in kernels.tokens too.
X_AT, X_KIND, COLUMNS, OUT_AT, SCALES_AT, TO_FP8 = range(OWN, OWN + 6)

SMALLEST = np.finfo(np.float32).tiny
NOT_FINITE = np.uint32(0x7F800000)
TWO_TO_14 = np.float32(16384.0)
# Between these scales fp32 holds what a quotient leaves.
LEAST, MOST = np.float32(2.0**-90), np.float32(2.0**90)


@inlined
def widen_row(block: Any, token: Any, row: Any) -> None:
    columns = row.size
    if block[X_KIND] == BFLOAT16:
        narrow = carray(pointer_to(block[X_AT] + 2 * token * columns), (columns,), np.uint16)
        for k in range(columns):
            row[k] = as_float(np.uint32(narrow[k]) << np.uint32(16))
    elif block[X_KIND] == FLOAT16:
        narrow = carray(pointer_to(block[X_AT] + 2 * token * columns), (columns,), np.uint16)
        for k in range(columns):
            row[k] = half_as_float(narrow[k])
    else:
        wide = carray(pointer_to(block[X_AT] + 4 * token * columns), (columns,), np.float32)
        for k in range(columns):
            row[k] = wide[k]


@inlined
def scale_of(row: Any, limit: Any) -> Any:
    """max|x| / limit; NaN if some x is not finite, so that the outputs are not either."""
    largest = np.uint32(0)
    bits = row.view(np.uint32)
    for k in range(bits.size):
        largest = max(largest, np.uint32(bits[k] & np.uint32(0x7FFFFFFF)))
    if largest >= NOT_FINITE:
        return np.float32(np.nan)
    return max(as_float(largest), SMALLEST) / limit


@intrinsic  # type: ignore[untyped-decorator]
def _largest_of_bf16(typing_context: Any, row: Any, vectors: Any) -> Any:
    """The bits of the largest magnitude of vectors of 32 bf16 numbers at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, vectors = arguments
        kind = Bf16Lanes.vector

        def body(turn: Any, carried: list[Any]) -> list[Any]:
            bits = load(builder, builder.add(row, builder.mul(turn, ir.Constant(I64, 2 * CODES))), kind)
            magnitudes = builder.and_(bits, splat(kind, 0x7FFF))
            return [call(builder, f"llvm.umax.v{CODES}i16", kind, [carried[0], magnitudes])]

        (largest,) = repeat(builder, vectors, [ir.Constant(kind, None)], body)
        return builder.zext(call(builder, f"llvm.vector.reduce.umax.v{CODES}i16", I16, [largest]), I32)

    return types.uint32(types.int64, types.int64), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _vectors_of_codes(
    typing_context: Any, kind: Any, row: Any, codes: Any, vectors: Any, scale: Any, inverse: Any
) -> Any:  # fmt: skip
    """Codes + 128 of vectors of 16 numbers at an address, fp32 or bf16, none beyond 127 scales, to bytes at another.

    A product with the reciprocal, corrected by what it leaves, is the quotient, rounded as a division rounds it, in
    a fraction of the time (Markstein 1990, theorem 7).
    """
    if not isinstance(kind, types.Literal):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, row, codes, vectors, scale, inverse = arguments
        divisor, factor = spread(builder, builder.fneg(scale)), spread(builder, inverse)
        is_bf16 = signature.args[0].literal_value == BFLOAT16

        def fused(*factors: Any) -> Any:
            return call(builder, "llvm.fma.v16f32", Sums.vector, list(factors))

        def body(turn: Any, carried: list[Any]) -> list[Any]:
            at = builder.add(row, builder.mul(turn, ir.Constant(I64, (2 if is_bf16 else 4) * LANES)))
            x = load(builder, at, ir.VectorType(I16, LANES) if is_bf16 else Sums.vector)
            x = widened(builder, x) if is_bf16 else x
            near = builder.fmul(x, factor)
            quotient = fused(fused(near, divisor, x), factor, near)
            nearest = builder.fptosi(call(builder, "llvm.rint.v16f32", Sums.vector, [quotient]), IntSums.vector)
            raised = builder.trunc(builder.add(nearest, splat(IntSums.vector, 128)), ir.VectorType(I8, LANES))
            place = builder.add(codes, builder.mul(turn, ir.Constant(I64, LANES)))
            builder.store(raised, builder.inttoptr(place, raised.type.as_pointer()), align=1)
            return []

        repeat(builder, vectors, [], body)
        return context.get_dummy_value()

    return types.none(kind, types.int64, types.int64, types.int64, types.float32, types.float32), generate


@inner
def _int8_codes(row: Any, scale: Any, codes: Any) -> None:
    vectors = row.size // LANES if LEAST < scale < MOST else 0
    if vectors:
        at, to = row.ctypes.data, codes.ctypes.data
        _vectors_of_codes(FLOAT32, at, to, vectors, scale, np.float32(1.0) / scale)
    for k in range(vectors * LANES, row.size):
        code = np.rint(row[k] / scale)
        code = np.float32(-127.0) if code < np.float32(-127.0) else code
        code = np.float32(127.0) if code > np.float32(127.0) else code
        codes[k] = np.uint8(np.int32(code) + np.int32(128))


@inner
def _bf16_to_int8(x_at: Any, columns: Any, codes_at: Any) -> Any:
    """Codes + 128 of a token in bf16, inputs by 32, and the scale, which is returned: 0, and no codes, where products
    with its reciprocal don't serve."""
    largest = as_float(np.uint32(_largest_of_bf16(x_at, columns // CODES)) << np.uint32(16))
    scale = max(largest, SMALLEST) / np.float32(127.0)
    # Not so if some x is not finite.
    if not LEAST < scale < MOST:
        return np.float32(0.0)
    _vectors_of_codes(BFLOAT16, x_at, codes_at, columns // LANES, scale, np.float32(1.0) / scale)
    return scale


@inner
def fp8_values(row: Any, scale: Any, values: Any) -> None:
    """Each x / scale at the nearest float8 e4m3fn, as bf16 bits."""
    for k in range(row.size):
        u = row[k] / scale
        bits = as_bits(u)
        magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
        odd = np.uint32(np.uint32(magnitude >> np.uint32(20)) & np.uint32(1))
        rounded = np.uint32(np.uint32(magnitude + np.uint32(0x7FFFF)) + odd)
        # Below 2^-6 the grid is uniform, 2^-9 wide: adding 2^14 leaves just those bits of the mantissa.
        small = (as_float(magnitude) + TWO_TO_14) - TWO_TO_14
        value = small if magnitude < np.uint32(0x3C800000) else as_float(np.uint32(rounded & np.uint32(0xFFF00000)))
        value = min(value, np.float32(448.0))
        sign = np.uint32(bits & np.uint32(0x80000000))
        values[k] = np.uint16(np.uint32(as_bits(value) | sign) >> np.uint32(16))


def _rounded(address: Any, start: Any, stop: Any) -> None:
    """Codes + 128, or values on the grid of float8 in bf16; those of zero beside a scale that is not finite."""
    block = carray(pointer_to(address), (WORDS,), np.int64)
    columns, to_fp8 = block[COLUMNS], block[TO_FP8] != 0
    row = np.empty(columns, np.float32)
    scales = carray(pointer_to(block[SCALES_AT]), (block[ROWS],), np.float32)
    direct = not to_fp8 and block[X_KIND] == BFLOAT16 and columns % CODES == 0 and columns != 0
    for token in range(start, stop):
        if direct:
            x_at = block[X_AT] + 2 * token * columns
            scales[token] = _bf16_to_int8(x_at, columns, block[OUT_AT] + token * columns)
            if scales[token] != np.float32(0.0):
                continue
        widen_row(block, token, row)
        scale = scale_of(row, np.float32(448.0) if to_fp8 else np.float32(127.0))
        scales[token] = scale
        if scale != scale:
            row[:], scale = np.float32(0.0), np.float32(1.0)
        if to_fp8:
            at = block[OUT_AT] + 2 * token * columns
            fp8_values(row, scale, carray(pointer_to(at), (columns,), np.uint16))
        else:
            _int8_codes(row, scale, carray(pointer_to(block[OUT_AT] + token * columns), (columns,), np.uint8))


@cache
def rounded() -> Any:
    """The compiled work."""
    return compiled_work(_rounded)
