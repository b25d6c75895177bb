"""Rows of numbers 32 at a time in registers: e^x, and bf16 as it comes and goes.

Written as LLVM's vectors: its own search for them in loops leaves e^x half undone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fewbits.kernels.lanes import (
    F32,
    I32,
    I64,
    LANES,
    Bf16Lanes,
    Sums,
    call,
    constant,
    halves_of,
    load,
    multiply_add,
    repeat,
    rounded,
    splat,
    spread,
    widened,
)
from fewbits.kernels.one_token import COEFFICIENTS

# Numbers of a panel: what one vector of bf16 holds.
PANEL = 2 * LANES
WORDS = ir.VectorType(I32, LANES)


def larger(builder: Any, left: Any, right: Any) -> Any:
    """The larger of each two; the right one where one is NaN."""
    return builder.select(builder.fcmp_ordered(">", left, right), left, right)


def exponential_of(builder: Any, x: Any) -> Any:
    """e^x of a vector, as `one_token.exponential` computes it; at most e^87, at least e^−87."""
    bounded = larger(builder, x, constant(-87.0))
    bounded = builder.select(builder.fcmp_ordered("<", bounded, constant(87.0)), bounded, constant(87.0))
    nearest = multiply_add(builder, bounded, constant(1.4426950408889634), constant(0.5))
    power = call(builder, "llvm.floor.v16f32", Sums.vector, [nearest])
    rest = multiply_add(builder, power, constant(-0.693359375), bounded)
    rest = multiply_add(builder, power, constant(2.12194440e-4), rest)
    series = constant(1.9875691500e-4)
    for coefficient in COEFFICIENTS:
        series = multiply_add(builder, series, rest, constant(coefficient))
    square = builder.fmul(rest, rest)
    value = builder.fadd(multiply_add(builder, series, square, rest), constant(1.0))
    raised = builder.add(builder.fptosi(power, WORDS), splat(WORDS, 127))
    return builder.fmul(value, builder.bitcast(builder.shl(raised, splat(WORDS, 23)), Sums.vector))


# 2^x on half a power of two around 0, within 3e-6 of itself: rounding to bf16 moves numbers a thousand times as far.
_SERIES = (9.5700975e-3, 5.5917859e-2, 0.24024744, 0.69312179, 0.99999928)


def rough_exponential_of(builder: Any, x: Any, least: int = -126) -> Any:
    """e^x of a vector, within 3e-6 of itself, but no less than 2^least; x is at most 0, or not far above."""
    bounded = larger(builder, builder.fmul(x, constant(1.4426950408889634)), constant(least))
    power = call(builder, "llvm.rint.v16f32", Sums.vector, [bounded])
    rest, value = builder.fsub(bounded, power), constant(_SERIES[0])
    for coefficient in _SERIES[1:]:
        value = multiply_add(builder, value, rest, constant(coefficient))
    exponent = builder.shl(builder.fptosi(power, WORDS), splat(WORDS, 23))
    return builder.bitcast(builder.add(builder.bitcast(value, WORDS), exponent), Sums.vector)


def store_bf16(builder: Any, address: Any, halves: list[Any]) -> None:
    """Two vectors rounded to bf16, half to even, as one."""
    place = builder.inttoptr(address, Bf16Lanes.vector.as_pointer())
    builder.store(rounded(builder, halves), place, align=2)


def fp32_panel(builder: Any, address: Any, panel: Any) -> list[Any]:
    """The fp32 vectors of a panel."""
    at = builder.add(address, builder.mul(panel, ir.Constant(I64, 4 * PANEL)))
    return [load(builder, builder.add(at, ir.Constant(I64, 4 * LANES * half)), Sums.vector) for half in range(2)]


def bf16_at(builder: Any, address: Any, panel: Any) -> Any:
    """Where a panel of bf16 numbers lies."""
    return builder.add(address, builder.mul(panel, ir.Constant(I64, 2 * PANEL)))


def store_fp32(builder: Any, address: Any, panel: Any, halves: list[Any]) -> None:
    """A panel's two vectors as they are."""
    at = builder.add(address, builder.mul(panel, ir.Constant(I64, 4 * PANEL)))
    for half, value in enumerate(halves):
        place = builder.add(at, ir.Constant(I64, 4 * LANES * half))
        builder.store(value, builder.inttoptr(place, Sums.vector.as_pointer()), align=4)


def bf16_panel(builder: Any, address: Any, panel: Any) -> list[Any]:
    """The bf16 numbers of a panel as fp32 vectors."""
    both = load(builder, bf16_at(builder, address, panel), Bf16Lanes.vector)
    return [widened(builder, half) for half in halves_of(builder, both)]


def within(builder: Any, panel: Any, first: Any, count: Any) -> list[Any]:
    """Which numbers of a panel are among `count` from place `first` on, one mask a vector."""
    begin = builder.sub(builder.mul(panel, ir.Constant(I64, PANEL)), first)
    limit = spread(builder, builder.trunc(count, I32))
    masks = []
    for half in range(PANEL // LANES):
        place = spread(builder, builder.trunc(builder.add(begin, ir.Constant(I64, half * LANES)), I32))
        # Below `first`, as an unsigned number it is far beyond all.
        masks.append(builder.icmp_unsigned("<", builder.add(place, ir.Constant(WORDS, list(range(LANES)))), limit))
    return masks


def largest_of(panel_of: Callable[[Any, Any, Any], list[Any]]) -> Callable[..., Any]:
    """An intrinsic (address, panels): the largest number there, as `panel_of` reads them."""

    @intrinsic  # type: ignore[untyped-decorator]
    def largest(typing_context: Any, numbers: Any, panels: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            numbers, panels = arguments

            def body(panel: Any, carried: list[Any]) -> list[Any]:
                halves = panel_of(builder, numbers, panel)
                return [larger(builder, number, value) for number, value in zip(halves, carried, strict=True)]

            lowest = constant(float("-inf"))
            left, right = repeat(builder, panels, [lowest, lowest], body)
            return call(builder, "llvm.vector.reduce.fmax.v16f32", F32, [larger(builder, left, right)])

        return types.float32(types.int64, types.int64), generate

    return largest  # type: ignore[no-any-return]


@intrinsic  # type: ignore[untyped-decorator]
def round_panels(typing_context: Any, numbers: Any, panels: Any, factor: Any, out: Any) -> Any:
    """Panels of fp32 numbers at an address, times a factor, rounded to bf16 at another."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        numbers, panels, factor, out = arguments
        factor = spread(builder, factor)

        def body(panel: Any, carried: list[Any]) -> list[Any]:
            halves = [builder.fmul(number, factor) for number in fp32_panel(builder, numbers, panel)]
            store_bf16(builder, bf16_at(builder, out, panel), halves)
            return []

        repeat(builder, panels, [], body)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.float32, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def add_panel(typing_context: Any, numbers: Any, sums: Any) -> Any:
    """PANEL fp32 numbers at an address added to those at another."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        both = []
        for half in range(PANEL // LANES):
            numbers, sums = (builder.add(address, ir.Constant(I64, 4 * LANES * half)) for address in arguments)
            both.append((builder.fadd(load(builder, sums, Sums.vector), load(builder, numbers, Sums.vector)), sums))
        for total, place in both:
            builder.store(total, builder.inttoptr(place, Sums.vector.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), generate
