"""Softmax and its gradient on rows of scores. Scores and sums are fp32, weights and gradients bf16.

A score of −∞ weighs 1e-38.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fewbits.kernels.lanes import F32, call, constant, repeat, spread
from fewbits.kernels.panel_lanes import bf16_at, exponential_of, fp32_panel, largest_of, store_bf16

largest_score = largest_of(fp32_panel)


@intrinsic  # type: ignore[untyped-decorator]
def weigh_scores(typing_context: Any, scores: Any, panels: Any, largest: Any, scale: Any, weights: Any) -> Any:
    """weights = e^(scale · (score − largest)), bf16 at an address; their sum before they are rounded."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, panels, largest, scale, weights = arguments
        largest, scale = spread(builder, largest), spread(builder, scale)

        def body(panel: Any, carried: list[Any]) -> list[Any]:
            halves = [
                exponential_of(builder, builder.fmul(builder.fsub(score, largest), scale))
                for score in fp32_panel(builder, scores, panel)
            ]
            store_bf16(builder, bf16_at(builder, weights, panel), halves)
            return [builder.fadd(total, half) for total, half in zip(carried, halves, strict=True)]

        nothing = constant(0.0)
        left, right = repeat(builder, panels, [nothing, nothing], body)
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
        scale, log, delta = (spread(builder, number) for number in (scale, log, delta))

        def body(panel: Any, carried: list[Any]) -> list[Any]:
            halves = []
            sides = fp32_panel(builder, scores, panel), fp32_panel(builder, pulls, panel)
            for score, pull in zip(*sides, strict=True):
                weight = exponential_of(builder, builder.fsub(builder.fmul(score, scale), log))
                halves.append(builder.fmul(builder.fmul(weight, builder.fsub(pull, delta)), scale))
            store_bf16(builder, bf16_at(builder, gradients, panel), halves)
            return []

        repeat(builder, panels, [], body)
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
        scale = spread(builder, scale)

        def body(panel: Any, carried: list[Any]) -> list[Any]:
            weighed, halves = [], []
            sides = (fp32_panel(builder, address, panel) for address in (scores, pulls, logs, deltas))
            for score, pull, log, delta in zip(*sides, strict=True):
                weight = exponential_of(builder, builder.fsub(builder.fmul(score, scale), log))
                weighed.append(weight)
                halves.append(builder.fmul(builder.fmul(weight, builder.fsub(pull, delta)), scale))
            store_bf16(builder, bf16_at(builder, weights, panel), weighed)
            store_bf16(builder, bf16_at(builder, gradients, panel), halves)
            return []

        repeat(builder, panels, [], body)
        return context.get_dummy_value()

    addresses = [types.int64] * 4
    return types.none(types.int64, types.int64, types.int64, types.float32, *addresses), generate
