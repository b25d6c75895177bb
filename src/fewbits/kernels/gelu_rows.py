"""GELU by tanh, x · σ(v) with v = √(8/π) (x + 0.044715 x³), and its gradient: bf16 as uint16, fp32 in between."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from fewbits.kernels.compiling import entry
from fewbits.kernels.lanes import constant, multiply_add, repeat
from fewbits.kernels.memory import copy_numbers
from fewbits.kernels.panel_lanes import PANEL, bf16_at, bf16_panel, exponential_of, store_bf16
from fewbits.kernels.threads import over_rows

# Panels of a run.
RUN = 1 << 7
# v = LINEAR · x + CUBIC · x³
LINEAR = 1.5957691216057308
CUBIC = LINEAR * 0.044715


def _share(builder: Any, x: Any, square: Any) -> Any:
    """σ(v(x))"""
    power = builder.fmul(multiply_add(builder, constant(CUBIC), square, constant(LINEAR)), builder.fneg(x))
    return builder.fdiv(constant(1.0), builder.fadd(constant(1.0), exponential_of(builder, power)))


@intrinsic  # type: ignore[untyped-decorator]
def _gelu_panels(typing_context: Any, x: Any, panels: Any, out: Any) -> Any:
    """out = x · σ(v(x)), of panels of bf16 at addresses."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, panels, out = arguments

        def body(panel: Any, carried: list[Any]) -> list[Any]:
            halves = [
                builder.fmul(value, _share(builder, value, builder.fmul(value, value)))
                for value in bf16_panel(builder, x, panel)
            ]
            store_bf16(builder, bf16_at(builder, out, panel), halves)
            return []

        repeat(builder, panels, [], body)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _pull_panels(typing_context: Any, x: Any, pulls: Any, panels: Any, out: Any) -> Any:
    """out = pull · σ · (1 + x (1 − σ) v′), of panels of bf16 at addresses."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, pulls, panels, out = arguments

        def body(panel: Any, carried: list[Any]) -> list[Any]:
            halves = []
            sides = bf16_panel(builder, x, panel), bf16_panel(builder, pulls, panel)
            for value, pull in zip(*sides, strict=True):
                square = builder.fmul(value, value)
                share = _share(builder, value, square)
                slope = builder.fmul(multiply_add(builder, constant(3 * CUBIC), square, constant(LINEAR)), value)
                rest = builder.fsub(constant(1.0), share)
                grown = multiply_add(builder, rest, slope, constant(1.0))
                halves.append(builder.fmul(builder.fmul(pull, share), grown))
            store_bf16(builder, bf16_at(builder, out, panel), halves)
            return []

        repeat(builder, panels, [], body)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64, types.int64), generate


@entry
def _gelu(x: Any, out: Any, start: Any, stop: Any) -> None:
    whole = min(stop, x.size // PANEL)
    if whole > start:
        _gelu_panels(
            x.ctypes.data + 2 * PANEL * start, whole - start, out.ctypes.data + 2 * PANEL * start
        )  # fmt: skip
    if whole < stop:
        left = x.size - whole * PANEL
        last, found = np.zeros(PANEL, np.uint16), np.empty(PANEL, np.uint16)
        copy_numbers(last[:left], x[whole * PANEL :])
        _gelu_panels(last.ctypes.data, 1, found.ctypes.data)
        copy_numbers(out[whole * PANEL :], found)


@entry
def _pull_back(x: Any, pulls: Any, out: Any, start: Any, stop: Any) -> None:
    whole = min(stop, x.size // PANEL)
    if whole > start:
        at = 2 * PANEL * start
        _pull_panels(
            x.ctypes.data + at, pulls.ctypes.data + at, whole - start, out.ctypes.data + at
        )  # fmt: skip
    if whole < stop:
        left = x.size - whole * PANEL
        last, pulled, found = np.zeros(PANEL, np.uint16), np.zeros(PANEL, np.uint16), np.empty(PANEL, np.uint16)
        copy_numbers(last[:left], x[whole * PANEL :])
        copy_numbers(pulled[:left], pulls[whole * PANEL :])
        _pull_panels(last.ctypes.data, pulled.ctypes.data, 1, found.ctypes.data)
        copy_numbers(out[whole * PANEL :], found)


def gelu(x: Any, out: Any) -> None:
    """Write GELU of x, bf16 as uint16 [n], over `out`."""
    over_rows(-(-len(x) // PANEL), PANEL, lambda start, stop: _gelu(x, out, start, stop), multiple=RUN)


def pull_back(x: Any, pulls: Any, out: Any) -> None:
    """The gradient by x of what `gelu` made, given that by its output: bf16 as uint16 [n]."""
    over_rows(-(-len(x) // PANEL), PANEL, lambda start, stop: _pull_back(x, pulls, out, start, stop), multiple=RUN)
