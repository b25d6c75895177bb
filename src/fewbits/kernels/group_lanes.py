"""A bf16 row rounded to ints by groups in vectors: the ranges of all groups, their grids side by side, then the codes.

A group's range ends in a few steps that wait for each other, and so does its scale, in a division: done for all groups
before the first code, they overlap.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fewbits.kernels.compiling import inlined, inner, stored_scale
from fewbits.kernels.weight_lanes import STEP, magnitude, no_pair, round_to_int, scan, total_of_pair

ZERO = np.float32(0.0)
ONE = np.float32(1.0)


@inlined
def ranges(source: Any, size: Any, lows: Any, highs: Any) -> Any:
    """Least and largest weight of each group, zero included; the bits of the row's largest magnitude, and Σ x²."""
    largest, squares = np.uint16(0), no_pair()
    for g in range(lows.size):
        high, low, squares = scan(source + 2 * size * g, size, squares)
        lows[g], highs[g] = -magnitude(low), magnitude(high)
        largest = max(largest, max(high, low))
    return largest, total_of_pair(squares)


@inner
def grids(
    lows: Any, highs: Any, top_code: Any, scales: Any, zeros: Any, dropped: Any, smallest: Any, largest: Any
) -> None:
    """The scales and zero points that just cover the ranges."""
    for g in range(lows.size):
        scale = stored_scale((highs[g] - lows[g]) / top_code, dropped, smallest, largest)
        zero = np.rint(-lows[g] * (ONE / scale))
        scales[g] = scale
        zeros[g] = np.uint8(np.int32(min(max(zero, ZERO), top_code)))


@inlined
def write_codes(source: Any, size: Any, codes: Any, top_code: Any, scales: Any, zeros: Any) -> Any:
    """Codes of a row, a byte each; returns Σ (x − x̂)²."""
    missed = no_pair()
    for g in range(scales.size):
        inverse, zero = ONE / scales[g], np.float32(zeros[g])
        limits = (-zero, top_code - zero)
        for k in range(g * size, (g + 1) * size, STEP):
            missed = round_to_int(missed, source + 2 * k, codes + k, inverse, scales[g], limits, zeros[g])
    return total_of_pair(missed)
