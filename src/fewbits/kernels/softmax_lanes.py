"""Softmax and its gradient on rows of scores, 32 at a time in registers.

Written as LLVM's vectors: its own search for them in loops leaves e^x half undone. Scores and sums are fp32, weights
and gradients bf16. A score of −∞ weighs 1e-38.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fewbits.kernels.lanes import F32, I32, I64, LANES, PAIRS_OF_BF16, Bf16Lanes, Sums, call, load, multiply_add, splat
from fewbits.kernels.one_token import COEFFICIENTS

# Scores of a panel: what one vector of bf16 holds.
PANEL = 2 * LANES
_WORDS = ir.VectorType(I32, LANES)


def _constant(value: Any) -> ir.Constant:
    return ir.Constant(Sums.vector, [ir.Constant(F32, float(value))] * LANES)


def _spread(builder: Any, number: Any) -> Any:
    first = builder.insert_element(ir.Constant(Sums.vector, ir.Undefined), number, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, first, splat(_WORDS, 0))


def _larger(builder: Any, left: Any, right: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", left, right), left, right)


def exponential_of(builder: Any, x: Any) -> Any:
    """e^x of a vector, as `one_token.exponential` computes it; at most e^87, at least e^−87."""
    bounded = _larger(builder, x, _constant(-87.0))
    bounded = builder.select(builder.fcmp_ordered("<", bounded, _constant(87.0)), bounded, _constant(87.0))
    nearest = multiply_add(builder, bounded, _constant(1.4426950408889634), _constant(0.5))
    power = call(builder, "llvm.floor.v16f32", Sums.vector, [nearest])
    rest = multiply_add(builder, power, _constant(-0.693359375), bounded)
    rest = multiply_add(builder, power, _constant(2.12194440e-4), rest)
    series = _constant(1.9875691500e-4)
    for coefficient in COEFFICIENTS:
        series = multiply_add(builder, series, rest, _constant(coefficient))
    square = builder.fmul(rest, rest)
    value = builder.fadd(multiply_add(builder, series, square, rest), _constant(1.0))
    raised = builder.add(builder.fptosi(power, _WORDS), splat(_WORDS, 127))
    return builder.fmul(value, builder.bitcast(builder.shl(raised, splat(_WORDS, 23)), Sums.vector))


def _store_bf16(builder: Any, address: Any, halves: list[Any]) -> None:
    """Two vectors rounded to bf16, half to even, as one."""
    packed = call(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", PAIRS_OF_BF16, [halves[1], halves[0]])
    place = builder.inttoptr(address, Bf16Lanes.vector.as_pointer())
    builder.store(builder.bitcast(packed, Bf16Lanes.vector), place, align=2)


def _over_panels(
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


def _halves(builder: Any, address: Any, panel: Any) -> list[Any]:
    """The fp32 vectors of a panel."""
    at = builder.add(address, builder.mul(panel, ir.Constant(I64, 4 * PANEL)))
    return [load(builder, builder.add(at, ir.Constant(I64, 4 * LANES * half)), Sums.vector) for half in range(2)]


def _bf16_at(builder: Any, address: Any, panel: Any) -> Any:
    return builder.add(address, builder.mul(panel, ir.Constant(I64, 2 * PANEL)))


@intrinsic  # type: ignore[untyped-decorator]
def largest_score(typing_context: Any, scores: Any, panels: Any) -> Any:
    """The largest of the scores at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, panels = arguments

        def body(panel: Any, carried: list[Any]) -> list[Any]:
            halves = _halves(builder, scores, panel)
            return [_larger(builder, score, value) for score, value in zip(halves, carried, strict=True)]

        lowest = _constant(float("-inf"))
        left, right = _over_panels(builder, panels, [lowest, lowest], body)
        return call(builder, "llvm.vector.reduce.fmax.v16f32", F32, [_larger(builder, left, right)])

    return types.float32(types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def weigh_scores(typing_context: Any, scores: Any, panels: Any, largest: Any, scale: Any, weights: Any) -> Any:
    """weights = e^(scale · (score − largest)), bf16 at an address; their sum before they are rounded."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, panels, largest, scale, weights = arguments
        largest, scale = _spread(builder, largest), _spread(builder, scale)

        def body(panel: Any, carried: list[Any]) -> list[Any]:
            halves = [
                exponential_of(builder, builder.fmul(builder.fsub(score, largest), scale))
                for score in _halves(builder, scores, panel)
            ]
            _store_bf16(builder, _bf16_at(builder, weights, panel), halves)
            return [builder.fadd(total, half) for total, half in zip(carried, halves, strict=True)]

        nothing = _constant(0.0)
        left, right = _over_panels(builder, panels, [nothing, nothing], body)
        totals = [ir.Constant(F32, -0.0), builder.fadd(left, right)]
        return call(builder, "llvm.vector.reduce.fadd.v16f32", F32, totals, ("reassoc",))

    return types.float32(types.int64, types.int64, types.float32, types.float32, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def pull_query(
    typing_context: Any, scores: Any, pulls: Any, panels: Any, scale: Any, log: Any, delta: Any, gradients: Any
) -> Any:
    """The gradients of one query's scores: scale · weight · (pull − delta), weight = e^(scale · score − log)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, pulls, panels, scale, log, delta, gradients = arguments
        scale, log, delta = (_spread(builder, number) for number in (scale, log, delta))

        def body(panel: Any, carried: list[Any]) -> list[Any]:
            halves = []
            sides = _halves(builder, scores, panel), _halves(builder, pulls, panel)
            for score, pull in zip(*sides, strict=True):
                weight = exponential_of(builder, builder.fsub(builder.fmul(score, scale), log))
                halves.append(builder.fmul(builder.fmul(weight, builder.fsub(pull, delta)), scale))
            _store_bf16(builder, _bf16_at(builder, gradients, panel), halves)
            return []

        _over_panels(builder, panels, [], body)
        return context.get_dummy_value()

    numbers = [types.float32] * 3
    return types.none(types.int64, types.int64, types.int64, *numbers, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def pull_key(
    typing_context: Any, scores: Any, pulls: Any, panels: Any, scale: Any, logs: Any, deltas: Any, weights: Any,
    gradients: Any,
) -> Any:  # fmt: skip
    """One key's weights for the queries, and the gradients of their scores; logs and deltas at addresses."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, pulls, panels, scale, logs, deltas, weights, gradients = arguments
        scale = _spread(builder, scale)

        def body(panel: Any, carried: list[Any]) -> list[Any]:
            weighed, halves = [], []
            sides = (_halves(builder, address, panel) for address in (scores, pulls, logs, deltas))
            for score, pull, log, delta in zip(*sides, strict=True):
                weight = exponential_of(builder, builder.fsub(builder.fmul(score, scale), log))
                weighed.append(weight)
                halves.append(builder.fmul(builder.fmul(weight, builder.fsub(pull, delta)), scale))
            _store_bf16(builder, _bf16_at(builder, weights, panel), weighed)
            _store_bf16(builder, _bf16_at(builder, gradients, panel), halves)
            return []

        _over_panels(builder, panels, [], body)
        return context.get_dummy_value()

    addresses = [types.int64] * 4
    return types.none(types.int64, types.int64, types.int64, types.float32, *addresses), generate
