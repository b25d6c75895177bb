"""Compiled arrangement of activations, token by token: as bf16 or whole numbers in the order that kernels.decoders
decodes in, and their sums over groups."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from fewbits.kernels.compiling import as_float, inlined, inner, merged
from fewbits.kernels.decoders import BLOCK, BY_EIGHTS, BY_FOURS, NATURAL, WHOLE_HALVES, WHOLE_SECONDS
from fewbits.kernels.lanes import (
    F32,
    I8,
    I16,
    I32,
    I64,
    PLANES,
    X_BYTES,
    call,
    indices,
    load,
    repeat,
    splat,
)
from fewbits.kernels.memory import as_bf16, pointer_to
from fewbits.kernels.team import OWN, ROWS, WORDS, compiled_work
from fewbits.kernels.token_rounding import NOT_FINITE, fp8_values, scale_of, widen_row

# The fields of a block; a row is a token. The first five are those of kernels.token_rounding.
X_AT, X_KIND, COLUMNS, OUT_AT, SCALES_AT, GROUPS, SUMS_AT, ORDER, PARTS, UNITS_AT, RAISED_BY = range(OWN, OWN + 11)

SUMS = {"reassoc", "nsz", "contract"}


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
        scale = scale_of(row, np.float32(448.0))
        carray(pointer_to(fields[SCALES_AT]), (fields[ROWS],), np.float32)[token] = scale
        if scale == scale:
            fp8_values(row, scale, values[:columns])
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
            widen_row(fields, token, row[:columns])
            # What the token before has left behind its activations is zeros.
            _arrange_whole(fields, token, row, wholes)
    else:
        values = np.zeros(padded, np.uint16)
        for token in range(start, stop):
            widen_row(fields, token, row[:columns])
            _arrange_bf16(fields, token, row[:columns], values)


@cache
def arranged() -> Any:
    """The compiled work."""
    return compiled_work(_arranged)
