"""What attention's kernels share: rows packed for strips of products, and which keys each query sees.

Rows are padded with zeros to whole strips and panels, heads' widths to whole panels. Matrix units sum up 32 rows of a
panel at once, dot products of pairs eight.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fewbits.kernels import strips
from fewbits.kernels.compiling import inlined, inner
from fewbits.kernels.lanes import LANES
from fewbits.kernels.matrix_sums import add_matrices
from fewbits.kernels.matrix_units import HAS_MATRIX_UNITS
from fewbits.kernels.memory import copy_bytes, copy_numbers
from fewbits.kernels.panel_lanes import PANEL

# Rows of a strip.
STRIP = PANEL if HAS_MATRIX_UNITS else strips.STRIP
# A strip's sums of a panel, two vectors wide, take half the registers; three would reach further past a diagonal.
_add_strip = strips.add_strip(PANEL // LANES)
_write_matrices, _add_matrices = add_matrices(PANEL, PANEL, False), add_matrices(PANEL, PANEL, True)
PANEL_BYTES = 4 * PANEL


@inlined
def padded(count: Any) -> Any:
    """Rounded up to whole panels."""
    return (count + PANEL - 1) // PANEL * PANEL


@inner
def copy_rows(rows: Any, copied: Any) -> Any:
    """Rows as left factors: bf16 [count, width] into [padded, padded]. Returns whether all are finite."""
    count, width = rows.shape
    for t in range(count):
        if rows.strides[1] == 2:
            copy_bytes(copied[t].ctypes.data, rows[t].ctypes.data, np.int64(2 * width))
        else:
            copy_numbers(copied[t, :width], rows[t])
        copied[t, width:] = np.uint16(0)
    copied[count:] = np.uint16(0)
    # Two numbers at once: an exponent of ones, which finite numbers don't have, carries into the sign's place.
    found = np.uint32(0)
    for word in copied[:count].reshape(-1).view(np.uint32):
        found |= np.uint32(np.uint32(word & np.uint32(0x7F807F80)) + np.uint32(0x00800080))
    return found & np.uint32(0x80008000) == 0


@inner
def pack_columns(matrix: Any, panels: Any) -> None:
    """Columns as right factors: bf16 [2 · pairs, PANEL · panels] into 32 bits [panels, pairs, PANEL]."""
    for panel in range(panels.shape[0]):
        for pair in range(panels.shape[1]):
            for lane in range(PANEL):
                column = panel * PANEL + lane
                low, high = np.uint32(matrix[2 * pair, column]), np.uint32(matrix[2 * pair + 1, column])
                panels[panel, pair, lane] = np.uint32(low | np.uint32(high << np.uint32(16)))


# Addresses are worked out by hand below: a slice costs as much as a short product.


@inner
def products(rows: Any, top: Any, panels: Any, first: Any, last: Any, out: Any) -> None:
    """out[:, first : last] = a strip of rows, from `top` on, · columns first to last, which end panels."""
    pairs, row_bytes, stride = panels.shape[1], np.int64(2 * rows.shape[1]), np.int64(4 * out.shape[1])
    at, panels_at, out_at = rows.ctypes.data + top * row_bytes, panels.ctypes.data, out.ctypes.data
    line = np.int64(PANEL_BYTES)
    for panel in range(first // PANEL, last // PANEL):
        right, sums = panels_at + panel * pairs * PANEL_BYTES, out_at + panel * PANEL_BYTES
        if _write_matrices(at, row_bytes, right, line, pairs // LANES, sums, stride) == 0:
            for r in range(STRIP):
                for t in range(panel * PANEL, panel * PANEL + PANEL):
                    out[r, t] = np.float32(0.0)
            _add_strip(at, row_bytes, 4, right, pairs, sums, stride)


@inner
def add_weighted(weights: Any, panels: Any, first: Any, last: Any, out: Any, top: Any) -> None:
    """A strip of out, from `top` on, += weights[:, first : last] (bf16) · the same rows of columns."""
    if first == last:
        return
    pairs, row_bytes, stride = panels.shape[1], np.int64(2 * weights.shape[1]), np.int64(4 * out.shape[1])
    at, panels_at = weights.ctypes.data + 2 * first, panels.ctypes.data + first // 2 * PANEL_BYTES
    out_at, line, some = out.ctypes.data + top * stride, np.int64(PANEL_BYTES), (last - first) // 2
    for panel in range(panels.shape[0]):
        right, sums = panels_at + panel * pairs * PANEL_BYTES, out_at + panel * PANEL_BYTES
        if _add_matrices(at, row_bytes, right, line, some // LANES, sums, stride) == 0:
            _add_strip(at, row_bytes, 4, right, some, sums, stride)


@inner
def hide(scores: Any, row: Any, low: Any, first: Any, stop: Any, high: Any) -> None:
    """No score from low to first and from stop to high: their weights come out as 1e-38, which bf16 sums don't see."""
    for t in range(low, first):
        scores[row, t] = np.float32(-np.inf)
    for t in range(stop, high):
        scores[row, t] = np.float32(-np.inf)
