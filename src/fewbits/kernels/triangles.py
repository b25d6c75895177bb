"""Compiled Cholesky factor and inverse of a triangle, both in place, the same whatever the number of threads.

32 columns at a time, each from all columns before it (left-looking), so that every number is read, summed up in
registers and written once. Source: Golub and Van Loan, Matrix Computations, 4.2.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, prange

from fewbits.kernels.compiling import use_torch_threads
from fewbits.kernels.lane_products import COLUMN_BYTES, ROWS, add_products, subtract_products

# Panels of an inverse that are computed before they are written over what they are computed from.
PANELS = 32
# Numbers of a tile that is turned around.
TILE = 32


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _factor_small(block: Any, width: Any, inverse: Any) -> Any:
    """Factor the lower triangle of a block in place, and invert the factor; says whether it was positive definite."""
    for c in range(width):
        for d in range(c):
            total = np.float32(0.0)
            for e in range(d):
                total += block[c, e] * block[d, e]
            block[c, d] = (block[c, d] - total) * inverse[d, d]
        total = np.float32(0.0)
        for e in range(c):
            total += block[c, e] * block[c, e]
        pivot = block[c, c] - total
        # A pivot that is no number fails as well.
        if not (pivot > np.float32(0.0) and pivot < np.float32(np.inf)):
            return False
        block[c, c] = np.sqrt(pivot)
        inverse[c, c] = np.float32(1.0) / block[c, c]
    for c in range(width):
        for d in range(c):
            total = np.float32(0.0)
            for e in range(d, c):
                total += block[c, e] * inverse[e, d]
            inverse[c, d] = -total * inverse[c, c]
    return True


@njit(parallel=True, cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _factor(M: Any, inverses: Any) -> Any:
    size = len(M)
    stride = np.int64(M.strides[0])
    for first in range(0, size, ROWS):
        width = min(ROWS, size - first)
        left = np.zeros((first, ROWS), np.float32)
        for lane in range(width):
            for j in range(first):
                left[j, lane] = M[first + lane, j]
        block = np.zeros((ROWS, ROWS), np.float32)
        block[:width, :width] = M[first : first + width, first : first + width]
        if first > 0:
            subtract_products(
                M.ctypes.data + first * stride, stride, left.ctypes.data, first, block.ctypes.data, width
            )  # fmt: skip
        inverse = inverses[first // ROWS]
        if not _factor_small(block, width, inverse):
            return False
        for c in range(width):
            for d in range(width):
                M[first + c, first + d] = block[c, d] if d <= c else np.float32(0.0)
        turned = inverse.T.copy()
        behind = first + width
        for tile in prange((size - behind + ROWS - 1) // ROWS):
            start = behind + tile * ROWS
            count = min(ROWS, size - start)
            sums, solved = np.zeros((ROWS, ROWS), np.float32), np.zeros((ROWS, ROWS), np.float32)
            sums[:count, :width] = M[start : start + count, first:behind]
            if first > 0:
                subtract_products(
                    M.ctypes.data + start * stride, stride, left.ctypes.data, first, sums.ctypes.data, count
                )  # fmt: skip
            add_products(sums.ctypes.data, COLUMN_BYTES, turned.ctypes.data, width, solved.ctypes.data, count)
            M[start : start + count, first:behind] = solved[:count, :width]
            M[first:behind, start : start + count] = np.float32(0.0)
    return True


@njit(parallel=True, cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _invert(L: Any, inverses: Any) -> None:
    size, count = len(L), len(inverses)
    stride = np.int64(L.strides[0])
    for begin in range(0, count, PANELS):
        some = min(PANELS, count - begin)
        found = np.zeros((some, size - begin * ROWS, ROWS), np.float32)
        half = (some + 1) // 2
        for turn in prange(some):
            # Panels become shorter: threads take every other one.
            panel = turn * 2 if turn < half else (turn - half) * 2 + 1
            top = (begin + panel) * ROWS
            columns = found[panel]
            at = columns.ctypes.data + panel * ROWS * COLUMN_BYTES
            width = min(ROWS, size - top)
            columns[panel * ROWS : panel * ROWS + width] = inverses[begin + panel][:width]
            for number in range(begin + panel + 1, count):
                first = number * ROWS
                rows = min(ROWS, size - first)
                sums = np.zeros((ROWS, ROWS), np.float32)
                matrix = L.ctypes.data + first * stride + 4 * top
                subtract_products(matrix, stride, at, first - top, sums.ctypes.data, rows)
                inverse, block = inverses[number].ctypes.data, at + (first - top) * COLUMN_BYTES
                add_products(inverse, COLUMN_BYTES, sums.ctypes.data, rows, block, rows)
        for panel in prange(some):
            top = (begin + panel) * ROWS
            width = min(ROWS, size - top)
            for row in range(top, size):
                for lane in range(width):
                    L[row, top + lane] = found[panel, row - begin * ROWS, lane]


@njit(parallel=True, cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _reverse(H: Any, added: Any, out: Any) -> None:
    size = len(H)
    for row in prange(size):
        for column in range(size):
            out[row, column] = H[size - 1 - row, size - 1 - column]
        out[row, row] += added


@njit(parallel=True, cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _turn(M: Any) -> None:
    """Mirror a lower triangle about its other diagonal, in place."""
    size = len(M)
    for tile in prange((size + TILE - 1) // TILE):
        for left in range(0, size, TILE):
            for row in range(tile * TILE, min(tile * TILE + TILE, size)):
                for column in range(left, min(left + TILE, row + 1, size - 1 - row)):
                    kept = M[row, column]
                    M[row, column] = M[size - 1 - column, size - 1 - row]
                    M[size - 1 - column, size - 1 - row] = kept


def inverse_factor_of(H: torch.Tensor, added: float, out: torch.Tensor) -> bool:
    """Write lower triangular V with V Vᵀ = (H + added · 1)⁻¹ over `out`; False where that is not positive definite.

    With J the reversal of rows, J (H + added) J = L Lᵀ, and V = J L⁻ᵀ J.

    Args:
        H: symmetric fp32 [K, K]. out: fp32 [K, K], contiguous.
    """
    use_torch_threads()
    M = out.numpy()
    _reverse(H.numpy(), np.float32(added), M)
    inverses = np.zeros((-(-len(M) // ROWS), ROWS, ROWS), np.float32)
    if not _factor(M, inverses):
        return False
    _invert(M, inverses)
    _turn(M)
    return True
