"""Compiled preparation of activations, token by token: rounding to int8 or float8, and the order that
kernels.decoders decodes in."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from fewbits.kernels.compiling import as_bits, as_float, inlined, inner, merged
from fewbits.kernels.decoders import BLOCK, BY_EIGHTS, BY_FOURS, NATURAL, WHOLE_HALVES, WHOLE_SECONDS
from fewbits.kernels.lanes import (
    CODES,
    F32,
    I8,
    I16,
    I32,
    I64,
    LANES,
    PLANES,
    X_BYTES,
    Bf16Lanes,
    IntSums,
    Sums,
    call,
    indices,
    load,
    repeat,
    splat,
    spread,
    widened,
)
from fewbits.kernels.memory import BFLOAT16, FLOAT16, FLOAT32, as_bf16, half_as_float, pointer_to
from fewbits.kernels.team import OWN, ROWS, WORDS, compiled_work

# The fields of a block; a row is a token.
X_AT, X_KIND, COLUMNS, OUT_AT, SCALES_AT, TO_FP8, GROUPS, SUMS_AT, ORDER, PARTS, UNITS_AT, RAISED_BY = range(
    OWN, OWN + 12
)

SMALLEST = np.finfo(np.float32).tiny
NOT_FINITE = np.uint32(0x7F800000)
TWO_TO_14 = np.float32(16384.0)
# Between these scales fp32 holds what a quotient leaves.
LEAST, MOST = np.float32(2.0**-90), np.float32(2.0**90)
SUMS = {"reassoc", "nsz", "contract"}


@inlined
def _widen_row(block: Any, token: Any, row: Any) -> None:
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
def _scale(row: Any, limit: Any) -> Any:
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
def _fp8_values(row: Any, scale: Any, values: Any) -> None:
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
        _widen_row(block, token, row)
        scale = _scale(row, np.float32(448.0) if to_fp8 else np.float32(127.0))
        scales[token] = scale
        if scale != scale:
            row[:], scale = np.float32(0.0), np.float32(1.0)
        if to_fp8:
            at = block[OUT_AT] + 2 * token * columns
            _fp8_values(row, scale, carray(pointer_to(at), (columns,), np.uint16))
        else:
            _int8_codes(row, scale, carray(pointer_to(block[OUT_AT] + token * columns), (columns,), np.uint8))


@partial(merged, fastmath=SUMS)
def _sum(values: Any) -> Any:
    total = np.float32(0.0)
    for k in range(values.size):
        total += as_float(np.uint32(values[k]) << np.uint32(16))
    return total


@inner
def _split(row: Any, values: Any) -> None:
    """Round to bf16, and leave in `row` what that lost."""
    for k in range(row.size):
        values[k] = as_bf16(row[k])
        row[k] -= as_float(np.uint32(values[k]) << np.uint32(16))


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _reorder(typing_context: Any, source: Any, target: Any, order: Any) -> Any:
    """A block of activations at an address to another, in the order of decoded codes (kernels.decoders)."""
    if not isinstance(order, types.Literal):
        return None
    places: list[int] = list(range(BLOCK))
    if order.literal_value == BY_FOURS:
        places = [4 * i + j for j in range(4) for i in range(32)]
    elif order.literal_value == BY_EIGHTS:
        places = [64 * b + 16 * l + 8 * half + e for b in (0, 1) for half in (0, 1) for l in range(4) for e in range(8)]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        block = load(builder, arguments[0], ir.VectorType(I16, BLOCK))
        ordered = builder.shuffle_vector(block, block, indices(places))
        builder.store(ordered, builder.inttoptr(arguments[1], ordered.type.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, order), generate


@inlined
def _reordered(source: Any, order: Any, target: Any, size: Any) -> None:
    """Blocks of activations, `size` in all, in the order of decoded codes (kernels.decoders)."""
    for at in range(0, 2 * size, 2 * BLOCK):
        if order == NATURAL:
            _reorder(source + at, target + at, NATURAL)
        elif order == BY_FOURS:
            _reorder(source + at, target + at, BY_FOURS)
        else:
            _reorder(source + at, target + at, BY_EIGHTS)


# The largest whole number that two signed bytes hold, and the least unit, whose reciprocal is finite.
LARGEST_WHOLE, LEAST_UNIT = np.float32(127 * 257), np.float32(2.0**-115)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _whole_block(
    typing_context: Any, source: Any, wholes: Any, target: Any, unit: Any, factor: Any, order: Any
) -> Any:  # fmt: skip
    """128 fp32 numbers at an address as whole ones to another (kernels.lanes), in an order of decoded codes.

    They are x · factor, rounded, which go to `wholes` too; what whole · unit leaves of x is put in their place.
    """
    if not isinstance(order, types.Literal):
        return None
    halves = range(64), range(64, BLOCK)
    if order.literal_value == WHOLE_SECONDS:
        halves = range(0, BLOCK, 2), range(1, BLOCK, 2)
    places = [place for half in halves for place in half]
    floats, words, lane = (ir.VectorType(kind, BLOCK) for kind in (F32, I32, I8))

    def spread_wide(builder: Any, value: Any) -> Any:
        first = builder.insert_element(ir.Constant(floats, ir.Undefined), value, I32(0))
        return builder.shuffle_vector(first, first, splat(words, 0))

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, wholes, target, unit, factor, _ = arguments
        x = load(builder, source, floats)
        whole = call(builder, f"llvm.rint.v{BLOCK}f32", floats, [builder.fmul(x, spread_wide(builder, factor))])
        minus = spread_wide(builder, builder.fneg(unit))
        left = call(builder, f"llvm.fma.v{BLOCK}f32", floats, [whole, minus, x])
        for numbers, at in ((left, source), (whole, wholes)):
            builder.store(numbers, builder.inttoptr(at, floats.as_pointer()), align=4)
        rest = builder.fptosi(whole, words)
        for plane in range(PLANES):
            lowest = builder.trunc(rest, lane)
            rest = builder.ashr(builder.sub(rest, builder.sext(lowest, words)), splat(words, 8))
            at = builder.add(target, ir.Constant(I64, BLOCK * plane))
            ordered = builder.shuffle_vector(lowest, lowest, indices(places))
            builder.store(ordered, builder.inttoptr(at, lane.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 3, types.float32, types.float32, order), generate


@intrinsic  # type: ignore[untyped-decorator]
def _largest_bits(typing_context: Any, source: Any) -> Any:
    """The bits of the largest magnitude of 128 fp32 numbers at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words = ir.VectorType(I32, BLOCK)
        magnitudes = builder.and_(load(builder, arguments[0], words), splat(words, 0x7FFFFFFF))
        return call(builder, f"llvm.vector.reduce.umax.v{BLOCK}i32", I32, [magnitudes])

    return types.uint32(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _sum_of_eights(typing_context: Any, source: Any, eights: Any) -> Any:
    """The sum of eights of fp32 numbers at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, eights = arguments
        eight = ir.VectorType(F32, 8)

        def body(turn: Any, carried: list[Any]) -> list[Any]:
            at = builder.add(source, builder.mul(turn, ir.Constant(I64, 32)))
            return [builder.fadd(carried[0], load(builder, at, eight))]

        (sums,) = repeat(builder, eights, [ir.Constant(eight, None)], body)
        return call(builder, "llvm.vector.reduce.fadd.v8f32", F32, [F32(-0.0), sums], ("reassoc",))

    return types.float32(types.int64, types.int64), generate


@inlined
def _whole_span(fields: Any, source: Any, wholes: Any, target: Any, blocks: Any) -> Any:
    """Blocks of fp32 numbers as whole ones of one unit, which is returned: NaN, and zeros, if some are not finite."""
    largest = np.uint32(0)
    for block in range(blocks):
        largest = max(largest, _largest_bits(source + 4 * BLOCK * block))
    unit, factor = np.float32(np.nan), np.float32(0.0)
    if largest < NOT_FINITE:
        unit = max(as_float(largest) / LARGEST_WHOLE, LEAST_UNIT)
        factor = np.float32(1.0) / unit
    else:
        carray(pointer_to(source), (blocks * BLOCK,), np.float32)[:] = np.float32(0.0)
    for block in range(blocks):
        at, behind = 4 * BLOCK * block, X_BYTES * block
        if fields[ORDER] == WHOLE_HALVES:
            _whole_block(source + at, wholes + at, target + behind, unit, factor, WHOLE_HALVES)
        else:
            _whole_block(source + at, wholes + at, target + behind, unit, factor, WHOLE_SECONDS)
    return unit


@merged
def _arrange_whole(fields: Any, token: Any, row: Any, wholes: Any) -> None:
    """A token's activations, zeros behind them, as whole numbers of as many units as there are groups, or blocks.

    The sums are those of the whole numbers: what these have lost then counts as often as what codes stand for. They are
    multiplied with the units where a row has one scale; elsewhere scales will be.
    """
    blocks, parts, groups = row.size // BLOCK, fields[PARTS], fields[GROUPS]
    size = row.size if groups == 1 else fields[COLUMNS] // groups
    span = 1 if groups == 1 or size < BLOCK else size // BLOCK
    # Units of a block.
    share = 1 if groups == 1 or size >= BLOCK else BLOCK // size
    count = blocks if groups == 1 else groups
    units = carray(pointer_to(fields[UNITS_AT] + 4 * token * parts * count), (parts, count), np.float32)
    sums = carray(pointer_to(fields[SUMS_AT] + 8 * token * parts * groups), (parts, 2, groups), np.float32)
    target, source, other = fields[OUT_AT] + token * parts * blocks * X_BYTES, row.ctypes.data, wholes.ctypes.data
    for part in range(parts):
        for block in range(0, blocks, span):
            at = 4 * BLOCK * block
            unit = _whole_span(fields, source + at, other + at, target, span)
            first = block // span * share
            for k in range(first, min(first + share, count)):
                units[part, k] = unit
            target += X_BYTES * span
        if fields[SUMS_AT] != 0:
            if groups == 1:
                for block in range(blocks):
                    for k in range(block * BLOCK, (block + 1) * BLOCK):
                        wholes[k] *= units[part, block]
            for g in range(groups):
                sums[part, 0, g] = _sum_of_eights(other + 4 * g * size, size // 8)
                sums[part, 1, g] = np.float32(fields[RAISED_BY]) * sums[part, 0, g]


@merged
def _arrange_bf16(fields: Any, token: Any, row: Any, values: Any) -> None:
    """A token's activations as one or two bf16 numbers each, in blocks of 128; zeros are behind `values`."""
    groups, parts, columns = fields[GROUPS], fields[PARTS], row.size
    size = columns // groups
    if fields[SCALES_AT] != 0:
        scale = _scale(row, np.float32(448.0))
        carray(pointer_to(fields[SCALES_AT]), (fields[ROWS],), np.float32)[token] = scale
        if scale == scale:
            _fp8_values(row, scale, values[:columns])
            for k in range(columns):
                row[k] = as_float(np.uint32(values[k]) << np.uint32(16))
        else:
            row[:] = np.float32(0.0)
    for part in range(parts):
        _split(row, values[:columns])
        if fields[SUMS_AT] != 0:
            sums = carray(pointer_to(fields[SUMS_AT] + 8 * (token * parts + part) * groups), (2, groups), np.float32)
            for g in range(groups):
                sums[0, g] = _sum(values[g * size : (g + 1) * size])
                sums[1, g] = np.float32(fields[RAISED_BY]) * sums[0, g]
        at = fields[OUT_AT] + 2 * (token * parts + part) * values.size
        _reordered(values.ctypes.data, fields[ORDER], at, values.size)


def _arranged(address: Any, start: Any, stop: Any) -> None:
    """Activations in blocks of 128, as bf16 or whole numbers, one or two each, and their sums over groups of inputs."""
    fields = carray(pointer_to(address), (WORDS,), np.int64)
    columns = fields[COLUMNS]
    padded = (columns + BLOCK - 1) // BLOCK * BLOCK
    row = np.zeros(padded, np.float32)
    if fields[ORDER] >= WHOLE_HALVES:
        wholes = np.empty(padded, np.float32)
        for token in range(start, stop):
            _widen_row(fields, token, row[:columns])
            # What the token before has left behind its activations is zeros.
            _arrange_whole(fields, token, row, wholes)
    else:
        values = np.zeros(padded, np.uint16)
        for token in range(start, stop):
            _widen_row(fields, token, row[:columns])
            _arrange_bf16(fields, token, row[:columns], values)


_WORK = {"rounded": _rounded, "arranged": _arranged}


@cache
def token_work(name: str) -> Any:
    """Compiled work: "rounded" or "arranged"."""
    return compiled_work(_WORK[name])
