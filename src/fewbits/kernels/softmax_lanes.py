"""Softmax and its gradient on rows of scores. Scores and sums are fp32, weights and gradients bf16.

Of a row `count` scores from place `first` on are seen; all others weigh nothing.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fewbits.kernels.lanes import F32, call, constant, repeat, spread
from fewbits.kernels.panel_lanes import bf16_at, fp32_panel, larger, rough_exponential_of, store_bf16, within

# A power of two that no weight is below: sums of bf16 don't see it, and products with it are no denormal numbers, which
# processors are slow at.
LEAST = -64


@intrinsic  # type: ignore[untyped-decorator]
def largest_score(typing_context: Any, scores: Any, panels: Any, first: Any, count: Any) -> Any:
    """The largest score that is seen."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, panels, first, count = arguments
        lowest = constant(float("-inf"))

        def body(panel: Any, carried: list[Any]) -> list[Any]:
            sides = fp32_panel(builder, scores, panel), within(builder, panel, first, count), carried
            return [
                larger(builder, builder.select(seen, score, lowest), value)
                for score, seen, value in zip(*sides, strict=True)
            ]

        left, right = repeat(builder, panels, [lowest, lowest], body)
        return call(builder, "llvm.vector.reduce.fmax.v16f32", F32, [larger(builder, left, right)])

    return types.float32(*[types.int64] * 4), generate


@intrinsic  # type: ignore[untyped-decorator]
def weigh_scores(
    typing_context: Any, scores: Any, panels: Any, first: Any, count: Any, largest: Any, scale: Any, weights: Any
) -> Any:
    """weights = e^(scale · (score − largest)), bf16 at an address; their sum before they are rounded."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, panels, first, count, largest, scale, weights = arguments
        largest, scale = spread(builder, largest), spread(builder, scale)

        def body(panel: Any, carried: list[Any]) -> list[Any]:
            halves = []
            sides = fp32_panel(builder, scores, panel), within(builder, panel, first, count)
            for score, seen in zip(*sides, strict=True):
                weight = rough_exponential_of(builder, builder.fmul(builder.fsub(score, largest), scale), LEAST)
                halves.append(builder.select(seen, weight, constant(0.0)))
            store_bf16(builder, bf16_at(builder, weights, panel), halves)
            return [builder.fadd(total, half) for total, half in zip(carried, halves, strict=True)]

        nothing = constant(0.0)
        left, right = repeat(builder, panels, [nothing, nothing], body)
        totals = [ir.Constant(F32, -0.0), builder.fadd(left, right)]
        return call(builder, "llvm.vector.reduce.fadd.v16f32", F32, totals, ("reassoc",))

    return types.float32(*[types.int64] * 4, types.float32, types.float32, types.int64), generate


def _weight(builder: Any, seen: Any, score: Any, scale: Any, log: Any) -> Any:
    """e^(scale · score − log) of scores that are seen, 0 of others."""
    weight = rough_exponential_of(builder, builder.fsub(builder.fmul(score, scale), log), LEAST)
    return builder.select(seen, weight, constant(0.0))


@intrinsic  # type: ignore[untyped-decorator]
def pull_query(
    typing_context: Any, scores: Any, pulls: Any, panels: Any, first: Any, count: Any, scale: Any, log: Any,
    delta: Any, gradients: Any,
) -> Any:  # fmt: skip
    """The gradients of one query's scores: scale · weight · (pull − delta), weight = e^(scale · score − log)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, pulls, panels, first, count, scale, log, delta, gradients = arguments
        scale, log, delta = (spread(builder, number) for number in (scale, log, delta))

        def body(panel: Any, carried: list[Any]) -> list[Any]:
            halves = []
            sides = (fp32_panel(builder, address, panel) for address in (scores, pulls))
            for score, pull, seen in zip(*sides, within(builder, panel, first, count), strict=True):
                weight = _weight(builder, seen, score, scale, log)
                halves.append(builder.fmul(builder.fmul(weight, builder.fsub(pull, delta)), scale))
            store_bf16(builder, bf16_at(builder, gradients, panel), halves)
            return []

        repeat(builder, panels, [], body)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 5, *[types.float32] * 3, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def pull_key(
    typing_context: Any, scores: Any, pulls: Any, panels: Any, first: Any, count: Any, scale: Any, logs: Any,
    deltas: Any, weights: Any, gradients: Any,
) -> Any:  # fmt: skip
    """One key's weights for the queries, and the gradients of their scores; logs and deltas at addresses."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, pulls, panels, first, count, scale, logs, deltas, weights, gradients = arguments
        scale = spread(builder, scale)

        def body(panel: Any, carried: list[Any]) -> list[Any]:
            weighed, halves = [], []
            sides = (fp32_panel(builder, address, panel) for address in (scores, pulls, logs, deltas))
            for score, pull, log, delta, seen in zip(*sides, within(builder, panel, first, count), strict=True):
                weight = _weight(builder, seen, score, scale, log)
                weighed.append(weight)
                halves.append(builder.fmul(builder.fmul(weight, builder.fsub(pull, delta)), scale))
            store_bf16(builder, bf16_at(builder, weights, panel), weighed)
            store_bf16(builder, bf16_at(builder, gradients, panel), halves)
            return []

        repeat(builder, panels, [], body)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 5, types.float32, *[types.int64] * 4), generate
