"""Softmax of a row of bf16 logits in three steps, 32 logits at a time."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fewbits.kernels.lanes import F32, I64, call, repeat, spread
from fewbits.kernels.panel_lanes import (
    bf16_at,
    bf16_panel,
    exponential_of,
    fp32_panel,
    largest_of,
    store_bf16,
    store_fp32,
)

largest_bf16 = largest_of(bf16_panel)


@intrinsic  # type: ignore[untyped-decorator]
def bf16_exponentials(typing_context: Any, numbers: Any, panels: Any, largest: Any, values: Any, sums: Any) -> Any:
    """values = e^(number − largest) of bf16 numbers, fp32; sums = one of each panel."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        numbers, panels, largest, values, sums = arguments
        largest = spread(builder, largest)

        def body(panel: Any, carried: list[Any]) -> list[Any]:
            halves = [
                exponential_of(builder, builder.fsub(number, largest)) for number in bf16_panel(builder, numbers, panel)
            ]
            store_fp32(builder, values, panel, halves)
            both = [ir.Constant(F32, -0.0), builder.fadd(*halves)]
            total = call(builder, "llvm.vector.reduce.fadd.v16f32", F32, both, ("reassoc",))
            place = builder.add(sums, builder.mul(panel, ir.Constant(I64, 4)))
            builder.store(total, builder.inttoptr(place, F32.as_pointer()), align=4)
            return []

        repeat(builder, panels, [], body)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.float32, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def bf16_multiples(typing_context: Any, values: Any, panels: Any, factor: Any, out: Any) -> Any:
    """out = values · factor, from fp32 to bf16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, panels, factor, out = arguments
        factor = spread(builder, factor)

        def body(panel: Any, carried: list[Any]) -> list[Any]:
            halves = [builder.fmul(value, factor) for value in fp32_panel(builder, values, panel)]
            store_bf16(builder, bf16_at(builder, out, panel), halves)
            return []

        repeat(builder, panels, [], body)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.float32, types.int64), generate
