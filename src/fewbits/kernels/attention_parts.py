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
from fewbits.kernels.panel_lanes import PANEL, round_panels
from fewbits.kernels.threads import thread_count
from fewbits.kernels.turned import turn_rows

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
def copy_rows(rows: Any, copied: Any) -> None:
    """Rows as left factors: bf16 [count, width] into [padded, padded]."""
    count, width = rows.shape
    source, target, row_bytes = rows.ctypes.data, copied.ctypes.data, np.int64(2 * copied.shape[1])
    for t in range(count):
        if rows.strides[1] == 2:
            copy_bytes(target + t * row_bytes, source + t * rows.strides[0], np.int64(2 * width))
        else:
            copy_numbers(copied[t, :width], rows[t])
        for i in range(width, copied.shape[1]):
            copied[t, i] = np.uint16(0)
    copied[count:] = np.uint16(0)


@inner
def are_finite(copied: Any) -> Any:
    """Whether no number of bf16 [rows, columns] is NaN or infinite."""
    # Two numbers at once: an exponent of ones, which finite numbers don't have, carries into the sign's place.
    found = np.uint32(0)
    for word in copied.reshape(-1).view(np.uint32):
        found |= np.uint32(np.uint32(word & np.uint32(0x7F807F80)) + np.uint32(0x00800080))
    return found & np.uint32(0x80008000) == 0


def heads_together(samples: int, heads: int, owners: int) -> int:
    """Of how many heads a thread takes a multiple: those that share keys, packed once, where all threads find some."""
    return heads // owners if samples * owners >= 2 * thread_count() else 1


@inner
def pack_columns(matrix: Any, panels: Any) -> None:
    """Columns as right factors: bf16 [2 · pairs, PANEL · panels] into 32 bits [panels, pairs, PANEL]."""
    for panel in range(panels.shape[0]):
        for pair in range(panels.shape[1]):
            for lane in range(PANEL):
                column = panel * PANEL + lane
                low, high = np.uint32(matrix[2 * pair, column]), np.uint32(matrix[2 * pair + 1, column])
                panels[panel, pair, lane] = np.uint32(low | np.uint32(high << np.uint32(16)))


@inner
def pack_rows(matrix: Any, panels: Any) -> None:
    """Rows as columns of right factors: bf16 [PANEL · panels, 2 · pairs] into 32 bits [panels, pairs, PANEL]."""
    pairs = panels.shape[1]
    row_bytes, line = np.int64(4 * pairs), np.int64(PANEL_BYTES)
    for panel in range(panels.shape[0]):
        rows, columns = matrix.ctypes.data + panel * PANEL * row_bytes, panels[panel].ctypes.data
        turn_rows(rows, row_bytes, columns, line, PANEL, pairs)


@inner
def write_row(numbers: Any, factor: Any, rounded: Any, out: Any) -> None:
    """A padded row of fp32 sums at an address, times a factor, as bf16 to `out` [width]. rounded: scratch."""
    width = out.shape[0]
    round_panels(numbers, np.int64(len(rounded) // PANEL), factor, rounded.ctypes.data)
    if out.strides[0] == 2:
        copy_bytes(out.ctypes.data, rounded.ctypes.data, np.int64(2 * width))
    else:
        copy_numbers(out, rounded[:width])


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
