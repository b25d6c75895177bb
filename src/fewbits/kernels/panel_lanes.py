"""Rows of numbers 32 at a time in registers: loops over them, e^x, and bf16 as it comes and goes.

Written as LLVM's vectors: its own search for them in loops leaves e^x half undone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from fewbits.kernels.lanes import (
    F32,
    I32,
    I64,
    LANES,
    PAIRS_OF_BF16,
    Bf16Lanes,
    Sums,
    call,
    indices,
    load,
    multiply_add,
    splat,
    widened,
)
from fewbits.kernels.one_token import COEFFICIENTS

# Numbers of a panel: what one vector of bf16 holds.
PANEL = 2 * LANES
WORDS = ir.VectorType(I32, LANES)


def constant(value: Any) -> ir.Constant:
    return ir.Constant(Sums.vector, [ir.Constant(F32, float(value))] * LANES)


def spread(builder: Any, number: Any) -> Any:
    first = builder.insert_element(ir.Constant(Sums.vector, ir.Undefined), number, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, first, splat(WORDS, 0))


def larger(builder: Any, left: Any, right: Any) -> Any:
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


def store_bf16(builder: Any, address: Any, halves: list[Any]) -> None:
    """Two vectors rounded to bf16, half to even, as one."""
    packed = call(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", PAIRS_OF_BF16, [halves[1], halves[0]])
    place = builder.inttoptr(address, Bf16Lanes.vector.as_pointer())
    builder.store(builder.bitcast(packed, Bf16Lanes.vector), place, align=2)


def over_panels(
    builder: Any, panels: Any, carried: list[Any], body: Callable[[Any, list[Any]], list[Any]]
) -> list[Any]:
    """A loop over at least one panel: body(panel's number, what is carried) returns what is carried on."""
    before = builder.block
    loop, behind = builder.append_basic_block("panels"), builder.append_basic_block("behind")
    builder.branch(loop)
    builder.position_at_end(loop)
    done = builder.phi(I64)
    done.add_incoming(ir.Constant(I64, 0), before)
    values = [builder.phi(value.type) for value in carried]
    after = body(done, values)
    following = builder.add(done, ir.Constant(I64, 1))
    done.add_incoming(following, loop)
    for value, start, end in zip(values, carried, after, strict=True):
        value.add_incoming(start, before)
        value.add_incoming(end, loop)
    builder.cbranch(builder.icmp_signed("<", following, panels), loop, behind)
    builder.position_at_end(behind)
    return after


def halves_of(builder: Any, address: Any, panel: Any) -> list[Any]:
    """The fp32 vectors of a panel."""
    at = builder.add(address, builder.mul(panel, ir.Constant(I64, 4 * PANEL)))
    return [load(builder, builder.add(at, ir.Constant(I64, 4 * LANES * half)), Sums.vector) for half in range(2)]


def bf16_at(builder: Any, address: Any, panel: Any) -> Any:
    return builder.add(address, builder.mul(panel, ir.Constant(I64, 2 * PANEL)))


def store_fp32(builder: Any, address: Any, panel: Any, halves: list[Any]) -> None:
    at = builder.add(address, builder.mul(panel, ir.Constant(I64, 4 * PANEL)))
    for half, value in enumerate(halves):
        place = builder.add(at, ir.Constant(I64, 4 * LANES * half))
        builder.store(value, builder.inttoptr(place, Sums.vector.as_pointer()), align=4)


def bf16_halves(builder: Any, address: Any, panel: Any) -> list[Any]:
    """A panel of bf16 numbers as fp32 vectors."""
    both = load(builder, bf16_at(builder, address, panel), Bf16Lanes.vector)
    return [
        widened(builder, builder.shuffle_vector(both, both, indices(range(half * LANES, half * LANES + LANES))))
        for half in range(2)
    ]
