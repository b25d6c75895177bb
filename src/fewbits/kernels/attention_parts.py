"""What attention's kernels share: rows packed for strips of products, and which keys each query sees.

Rows are padded with zeros to whole strips and panels, heads' widths to whole panels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from fewbits.kernels.lanes import LANES
from fewbits.kernels.panel_lanes import PANEL
from fewbits.kernels.strips import STRIP, add_strip

# A strip's sums of a panel, two vectors wide, take half the registers; three would reach further past a diagonal.
multiply = add_strip(PANEL // LANES)


@njit(inline="always")  # type: ignore[untyped-decorator]
def padded(count: Any) -> Any:
    """Rounded up to whole panels."""
    return (count + PANEL - 1) // PANEL * PANEL


@njit(nogil=True)  # type: ignore[untyped-decorator]
def copy_rows(rows: Any, copied: Any) -> Any:
    """Rows as left factors: bf16 [count, width] into [padded, padded]. Returns whether all are finite."""
    count, width = rows.shape
    largest = np.uint16(0)
    for t in range(count):
        for i in range(width):
            bits = rows[t, i]
            copied[t, i] = bits
            largest = max(largest, np.uint16(bits & np.uint16(0x7FFF)))
        copied[t, width:] = np.uint16(0)
    copied[count:] = np.uint16(0)
    return largest < np.uint16(0x7F80)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def pack_columns(matrix: Any, panels: Any) -> None:
    """Columns as right factors: bf16 [2 · pairs, PANEL · panels] into 32 bits [panels, pairs, PANEL]."""
    for panel in range(panels.shape[0]):
        for pair in range(panels.shape[1]):
            for lane in range(PANEL):
                column = panel * PANEL + lane
                low, high = np.uint32(matrix[2 * pair, column]), np.uint32(matrix[2 * pair + 1, column])
                panels[panel, pair, lane] = np.uint32(low | np.uint32(high << np.uint32(16)))


# Addresses are worked out by hand below: a slice costs as much as a short product.


@njit(nogil=True)  # type: ignore[untyped-decorator]
def products(rows: Any, top: Any, panels: Any, first: Any, last: Any, out: Any) -> None:
    """out[:, first : last] = a strip of rows, from `top` on, · columns first to last, which end panels."""
    pairs, row_bytes, stride = panels.shape[1], 2 * rows.shape[1], 4 * out.shape[1]
    at, panels_at, out_at = rows.ctypes.data + top * row_bytes, panels.ctypes.data, out.ctypes.data
    for r in range(STRIP):
        for t in range(first, last):
            out[r, t] = np.float32(0.0)
    for panel in range(first // PANEL, last // PANEL):
        right = panels_at + panel * pairs * PANEL * 4
        multiply(at, row_bytes, 4, right, pairs, out_at + panel * PANEL * 4, stride)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def add_weighted(weights: Any, panels: Any, first: Any, last: Any, out: Any, top: Any) -> None:
    """A strip of out, from `top` on, += weights[:, first : last] (bf16) · the same rows of columns."""
    pairs, row_bytes, stride = panels.shape[1], 2 * weights.shape[1], 4 * out.shape[1]
    at, panels_at = weights.ctypes.data + 2 * first, panels.ctypes.data + first // 2 * PANEL * 4
    out_at = out.ctypes.data + top * stride
    for panel in range(panels.shape[0]):
        right = panels_at + panel * pairs * PANEL * 4
        multiply(at, row_bytes, 4, right, (last - first) // 2, out_at + panel * PANEL * 4, stride)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def hide(scores: Any, row: Any, low: Any, first: Any, stop: Any, high: Any) -> None:
    """No score from low to first and from stop to high: their weights come out as 1e-38, which bf16 sums don't see."""
    for t in range(low, first):
        scores[row, t] = np.float32(-np.inf)
    for t in range(stop, high):
        scores[row, t] = np.float32(-np.inf)
