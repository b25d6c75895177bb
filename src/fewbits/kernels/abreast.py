"""Compiled products of 4-bit rows with a few tokens, a row in each lane: no row's sums are added up in the end.

y[t, n] = Σ_g s[n, g] u[t, g] (Σ_k q[n, k] w[t, k] − z[n, g] Σ_k w[t, k] − raised Σ_k w[t, k]) with codes q and
activations as whole numbers w of unit u (kernels.tokens); k runs over group g, and both sums of w are given.

Rows lie in panels of 32: 8 codes of each row, the next 8 of each, and so on, then their scales, group after group,
then their zero points, or 32 zeros where there are none. In a byte, the code of an even input is below that of the
next. Each half of a panel has four vectors of sums, so that none waits for another.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from fewbits.kernels.compiling import inlined, inner
from fewbits.kernels.decoders import BLOCK, SCALES, decoder_of, stored_as_float
from fewbits.kernels.fetching import fetch_lines
from fewbits.kernels.lanes import (
    F32,
    I8,
    I32,
    I64,
    LANES,
    X_BYTES,
    ByteLanes,
    IntSums,
    Sums,
    dot_bytes,
    halves_of,
    keep_sums,
    kept_sums,
    load,
    multiply_add,
    prefetch,
    splat,
    spread,
)
from fewbits.kernels.memory import on_stack, pointer_to, write_all
from fewbits.kernels.team import OWN, PART_ROWS, ROWS, STREAM_AT, STREAM_BYTES, WORDS, compiled_work

# The fields of a block; a row of it is a panel.
PANELS_AT, PANEL_BYTES = STREAM_AT, STREAM_BYTES
(
    HEIGHT, GROUPS, GROUP_INPUTS, SCALES_BEHIND, SCALE_BYTES, ZEROS_BEHIND, ZERO_BYTES, X_AT, X_STRIDE, PARTS, TOKENS,
    X_SUMS_AT, X_UNITS_AT, BIAS_AT, OUT_AT, OUT_KIND,
) = range(OWN, OWN + 16)  # fmt: skip
# Rows of a panel, and halves, whose rows fill a vector.
PANEL, HALVES = 2 * LANES, 2
# Inputs whose codes lie side by side for each row, and bytes of those of half a panel.
INPUTS, VECTOR = 8, 4 * LANES
# Vectors of sums of half a panel: of the lower and the upper bytes of whole numbers, of even and of odd inputs.
CHAINS = 4
# Bytes ahead of their use that panels are asked for.
AHEAD = 2**14
# Bytes that a thread has on its stack: outputs of a panel.
ROOM = 4 * PANEL

Products = types.UniTuple(IntSums, HALVES * CHAINS)


@intrinsic  # type: ignore[untyped-decorator]
def _no_products(typing_context: Any) -> Any:
    """Sums of nothing."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.make_tuple(builder, Products, [ir.Constant(IntSums.vector, None)] * Products.count)

    return Products(), generate


@intrinsic  # type: ignore[untyped-decorator]
def _add_products(typing_context: Any, decoder: Any, products: Any, codes_at: Any, ahead_at: Any, x_at: Any) -> Any:
    """Products + those of a group's codes, or of a block of them, with whole numbers at an address.

    As many bytes are asked for ahead as are read.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, products, codes_at, ahead_at, x_at = arguments
        sums = [builder.extract_value(products, place) for place in range(Products.count)]
        eight = ir.VectorType(I32, LANES)
        for word in range(signature.args[0].lanes):
            # Lower bytes of even inputs, of odd ones, then their upper bytes.
            places = [builder.add(x_at, ir.Constant(I64, 64 * chain + 4 * word)) for chain in range(CHAINS)]
            whole = [builder.bitcast(spread(builder, load(builder, at, I32)), ByteLanes.vector) for at in places]
            for half in range(HALVES):
                behind = ir.Constant(I64, VECTOR * (HALVES * word + half))
                prefetch(builder, builder.add(ahead_at, behind))
                stored = load(builder, builder.add(codes_at, behind), eight)
                fields = [
                    builder.bitcast(builder.and_(field, splat(eight, 0x0F0F0F0F)), ByteLanes.vector)
                    for field in (stored, builder.lshr(stored, splat(eight, 4)))
                ]
                for chain in range(CHAINS):
                    own = CHAINS * half + chain
                    sums[own] = dot_bytes(builder, sums[own], fields[chain % 2], whole[chain])
        return context.make_tuple(builder, Products, sums)

    return Products(decoder, Products, types.int64, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _add_scaled(
    typing_context: Any, decoder: Any, sums: Any, products: Any, scales_at: Any, zeros_at: Any, x_sum: Any, raised: Any,
    unit: Any,
) -> Any:  # fmt: skip
    """Sums + s · u · (products − z · Σw − raised), with a panel's scales and zero points at addresses."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, sums, products, scales_at, zeros_at, *numbers = arguments
        x_sum, raised, unit = (spread(builder, number) for number in numbers)
        name, wide = signature.args[0].scales, Sums.vector
        scales = stored_as_float(builder, name, load(builder, scales_at, ir.VectorType(SCALES[name], PANEL)))
        zeros = builder.uitofp(load(builder, zeros_at, ir.VectorType(I8, PANEL)), ir.VectorType(F32, PANEL))
        totals = []
        for half, (scale, zero) in enumerate(zip(halves_of(builder, scales), halves_of(builder, zeros), strict=True)):
            chains = [builder.extract_value(products, CHAINS * half + chain) for chain in range(CHAINS)]
            lower, upper = builder.add(*chains[:2]), builder.add(*chains[2:])
            total = builder.sitofp(builder.add(lower, builder.shl(upper, splat(IntSums.vector, 8))), wide)
            centred = multiply_add(builder, builder.fneg(zero), x_sum, builder.fsub(total, raised))
            before = builder.extract_value(sums, half)
            totals.append(multiply_add(builder, builder.fmul(centred, unit), scale, before))
        return context.make_tuple(builder, signature.return_type, totals)

    result = types.UniTuple(Sums, HALVES)
    return result(decoder, result, Products, types.int64, types.int64, *[types.float32] * 3), generate


@inlined
def _x_behind(first: Any) -> Any:
    """How far behind the first activation's bytes those of input `first` lie, which begins a vector of codes."""
    return (first // BLOCK) * X_BYTES + first % BLOCK // INPUTS * 4


@inlined
def _panel(decoder: Any, fields: Any, panel: Any, token: Any, end: Any, totals: Any) -> None:
    """Outputs of a panel and one token, to an address. No memory is asked for behind `end`."""
    at, bias_at = fields[PANELS_AT] + panel * fields[PANEL_BYTES], fields[BIAS_AT] + 4 * PANEL * panel
    sums = kept_sums(bias_at), kept_sums(bias_at + VECTOR)
    groups, size = fields[GROUPS], fields[GROUP_INPUTS]
    read = min(size, BLOCK) // INPUTS * HALVES * VECTOR
    for part in range(token * fields[PARTS], (token + 1) * fields[PARTS]):
        x_at = fields[X_AT] + part * fields[X_STRIDE]
        units = carray(pointer_to(fields[X_UNITS_AT] + 4 * part * groups), (groups,), np.float32)
        x_sums = carray(pointer_to(fields[X_SUMS_AT] + 8 * part * groups), (2, groups), np.float32)
        codes, scales, zeros = at, at + fields[SCALES_BEHIND], at + fields[ZEROS_BEHIND]
        for g in range(groups):
            products = _no_products()
            for first in range(g * size, (g + 1) * size, BLOCK):
                ahead = min(codes + AHEAD, end - read)
                products = _add_products(decoder, products, codes, ahead, x_at + _x_behind(first))
                codes += read
            sums = _add_scaled(decoder, sums, products, scales, zeros, x_sums[0, g], x_sums[1, g], units[g])
            scales, zeros = scales + fields[SCALE_BYTES], zeros + fields[ZERO_BYTES]
    keep_sums(sums[0], totals)
    keep_sums(sums[1], totals + VECTOR)


@inner
def _panels(decoder: Any, block: Any, start: Any, stop: Any) -> None:
    fields = carray(pointer_to(block), (WORDS,), np.int64)
    totals = on_stack(ROOM)
    values = carray(pointer_to(totals), (PANEL,), np.float32)
    # Of a part of the panels: the next ones are another thread's.
    part = fields[PART_ROWS]
    end = fields[PANELS_AT] + min((start // part + 1) * part, fields[ROWS]) * fields[PANEL_BYTES]
    for panel in range(start, stop):
        row, at = panel * PANEL, fields[PANELS_AT] + panel * fields[PANEL_BYTES]
        count = min(fields[HEIGHT] - row, PANEL)
        fetch_lines(min(at + fields[SCALES_BEHIND] + AHEAD, end), min(at + fields[PANEL_BYTES] + AHEAD, end))
        for token in range(fields[TOKENS]):
            _panel(decoder, fields, panel, token, end, totals)
            write_all(fields[OUT_AT], token * fields[HEIGHT] + row, fields[OUT_KIND], values[:count])


@cache
def rows_abreast(decoder: str) -> Any:
    """The compiled work for groups of a length and scales of a dtype (decoders.Decoder)."""

    def work(block: Any, start: Any, stop: Any) -> None:
        _panels(decoder_of(decoder), block, start, stop)

    return compiled_work(work)
