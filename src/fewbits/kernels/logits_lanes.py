"""Softmax of a row of bf16 logits, some at a time: the largest, then e^x."""

from __future__ import annotations

from functools import reduce
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fewbits.kernels.lanes import F32, I64, call, repeat, spread
from fewbits.kernels.panel_lanes import PANEL, bf16_panel, largest_of, rough_exponential_of, store_fp32

largest_bf16 = largest_of(bf16_panel)
# Numbers that are summed up at once.
GROUP = 4 * PANEL


@intrinsic  # type: ignore[untyped-decorator]
def bf16_exponentials(typing_context: Any, numbers: Any, groups: Any, largest: Any, values: Any, sums: Any) -> Any:
    """values = e^(number − largest) of bf16 numbers, fp32; sums = one of each group."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        numbers, groups, largest, values, sums = arguments
        largest = spread(builder, largest)

        def body(group: Any, carried: list[Any]) -> list[Any]:
            parts = []
            first = builder.mul(group, ir.Constant(I64, GROUP // PANEL))
            for place in range(GROUP // PANEL):
                panel = builder.add(first, ir.Constant(I64, place))
                halves = [
                    rough_exponential_of(builder, builder.fsub(half, largest))
                    for half in bf16_panel(builder, numbers, panel)
                ]
                store_fp32(builder, values, panel, halves)
                parts.append(builder.fadd(*halves))
            both = [ir.Constant(F32, -0.0), reduce(builder.fadd, parts)]
            total = call(builder, "llvm.vector.reduce.fadd.v16f32", F32, both, ("reassoc",))
            place = builder.add(sums, builder.mul(group, ir.Constant(I64, 4)))
            builder.store(total, builder.inttoptr(place, F32.as_pointer()), align=4)
            return []

        repeat(builder, groups, [], body)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.float32, types.int64, types.int64), generate
