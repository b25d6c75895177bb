"""Softmax of a row of bf16 logits, 32 logits at a time: the largest, then e^x."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fewbits.kernels.lanes import F32, I64, call, repeat, spread
from fewbits.kernels.panel_lanes import (
    bf16_panel,
    exponential_of,
    largest_of,
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
