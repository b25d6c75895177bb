"""Compiled: what GPTQ's sweep takes of H, and what rows lose by it, from the Cholesky factor of H alone.

With H = M Mᵀ and M upper triangular, GPTQ's U is M⁻¹, and a row's D = W − Ŵ is E U, E what the sweep missed over U's
diagonal. So the loss is ‖D M‖² = ‖E‖²; D H, which descent begins with, is E Mᵀ; and for a block of columns b, swept
with U_bb = M_bb⁻¹, what all columns f before it push into its weights is D_f M_fb U_bb. No inverse of H is needed, and
half the products of D H.
Source of the form without an inverse: Chee et al. 2023, arXiv 2307.13304 (QuIP's LDLQ, equal to GPTQ's sweep).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import lcm
from typing import Any

import numpy as np
import torch

from fewbits.kernels.compiling import Array, entry, inner
from fewbits.kernels.far_products import (
    APART,
    KEPT,
    NUMBER_BYTES,
    TOGETHER,
    add_far,
    keep_columns,
    padded,
    stored,
)
from fewbits.kernels.lane_products import COLUMN_BYTES, ROWS, add_products
from fewbits.kernels.lanes import LANES
from fewbits.kernels.matrix_sums import begin, end
from fewbits.kernels.memory import copy_numbers
from fewbits.kernels.threads import over_rows, thread_count
from fewbits.kernels.turned import turn_rows

# Columns of a block, about.
BLOCK = 128
# Numbers of 32 rows side by side that a thread works on at a time: all of them use what was read of a block.
PANEL = 1 << 20
# Columns of a row that are laid beside others' before the next row's: 32 rows of so many stay in the first-level cache.
LAID = 128
# Runs of 32 rows that a thread takes at once, where there are enough.
RUNS = 4


@dataclass(frozen=True)
class Feedback:
    """What rows of weights are swept with.

    far: KEPT [K, more than K]. Row j of block b holds (M_fb U_bb)ᵢⱼ for all columns i of the blocks f before, and Mⱼᵢ
    for those from its own block on, zeros before j. own, inverse: fp32 [blocks, block, block], M_bbᵀ and U_bbᵀ of each.
    """

    far: Array
    own: Array
    inverse: Array

    @property
    def block(self) -> int:
        """Columns of a block."""
        return int(self.own.shape[1])


def block_columns(group: int) -> int:
    """Columns of a block of whole groups (0: one group spans a row), a multiple of TOGETHER."""
    whole = lcm(group or TOGETHER, TOGETHER)
    return whole * max(1, BLOCK // whole)


@inner
def lay_columns(rows: Any, order: Any, columns: Any) -> None:
    """Lay up to ROWS rows side by side, [K, ROWS], their columns in `order`, uint64; zeros for missing rows."""
    laid = np.zeros((ROWS, LAID), np.float32)
    for start in range(0, len(order), LAID):
        count = min(LAID, len(order) - start)
        for lane in range(len(rows)):
            given = rows[lane]
            for k in range(count):
                laid[lane, k] = given[order[start + k]]
        whole = count // LANES * LANES
        turn_rows(
            laid.ctypes.data, np.int64(laid.strides[0]), columns[start:].ctypes.data, np.int64(COLUMN_BYTES),
            np.int64(ROWS), whole,
        )  # fmt: skip
        for k in range(whole, count):
            copy_numbers(columns[start + k], laid[:, k])


@inner
def _invert(L: Any, first: Any, count: Any, M: Any, U: Any) -> None:
    """Mᵀ of `count` columns from `first` on, M[a, b] being L[K − 1 − a, K − 1 − b], and its inverse, row by row."""
    last = len(L) - 1
    for c in range(count):
        for d in range(c + 1):
            M[c, d] = L[last - first - d, last - first - c]
        for e in range(c):
            for d in range(e + 1):
                U[c, d] -= M[c, e] * U[e, d]
        U[c, c] = np.float32(1.0)
        for d in range(c + 1):
            U[c, d] /= M[c, c]


@entry
def _arrange(L: Any, own: Any, inverse: Any, far: Any, begin_block: Any, end_block: Any) -> None:
    """Blocks begin_block to end_block, their rows of `far` among them."""
    size, block = len(L), own.shape[1]
    last = size - 1
    right, sums = np.empty((block, ROWS), np.float32), np.empty((block, ROWS), np.float32)
    for number in range(begin_block, end_block):
        first, U = number * block, inverse[number]
        count = min(block, size - first)
        _invert(L, first, count, own[number], U)
        for left in range(0, first, ROWS):
            for lane in range(ROWS):
                for e in range(count):
                    right[e, lane] = L[last - left - lane, last - first - e]
            sums[:] = np.float32(0.0)
            add_products(U.ctypes.data, np.int64(U.strides[0]), right.ctypes.data, count, sums.ctypes.data, count)
            for j in range(count):
                for lane in range(ROWS):
                    far[first + j, left + lane] = stored(sums[j, lane])
        for j in range(first, first + count):
            for i in range(j, size):
                far[j, i] = stored(L[last - j, last - i])


def feedback_of(L: torch.Tensor, group: int) -> Feedback:
    """What rows are swept with.

    Args:
        L: fp32 [K, K], lower triangular, L Lᵀ = H with its rows and columns in reverse order.
        group: columns that share a scale; 0 for all of a row.
    """
    factor, block = L.numpy(), block_columns(group)
    size, blocks = len(factor), -(-len(factor) // block)
    far = np.zeros((size, padded(size) + APART // NUMBER_BYTES), KEPT)
    own, inverse = (np.zeros((blocks, block, block), np.float32) for _ in range(2))
    over_rows(blocks, block * size, lambda begin, end: _arrange(factor, own, inverse, far, begin, end))
    return Feedback(far, own, inverse)


def over_runs(rows: int, columns: int, work: Callable[[int, int], None]) -> None:
    """Call `work(begin, end)` for runs of ROWS rows that make up all rows, on several threads."""
    runs = -(-rows // ROWS)
    over_rows(runs, ROWS * columns**2, work, max(1, min(RUNS, runs // thread_count())))


@entry
def _norms(rows: Any, order: Any, far: Any, own: Any, totals: Any, begin_run: Any, end_run: Any) -> None:
    number, width = rows.shape
    stride, block = np.int64(far.strides[0]), own.shape[1]
    most = min(max(1, PANEL // (ROWS * width)), end_run - begin_run)
    columns, sums = np.zeros((most, width, ROWS), np.float32), np.empty((block, ROWS), np.float32)
    kept, squares = np.zeros((most, far.shape[1], ROWS), KEPT), np.empty(ROWS, np.float64)
    begin()
    for panel in range(begin_run, end_run, most):
        runs = min(most, end_run - panel)
        for run in range(runs):
            first = (panel + run) * ROWS
            lay_columns(rows[first : first + ROWS], order, columns[run])
            keep_columns(columns[run], kept[run].ctypes.data)
        for start in range(0, width, block):
            count = min(block, width - start)
            M = own[start // block]
            for run in range(runs):
                first = (panel + run) * ROWS
                pushed = columns[run, start : start + count]
                matrix = far.ctypes.data + start * stride
                add_far(matrix, stride, kept[run].ctypes.data, start, pushed.ctypes.data, count)
                sums[:] = np.float32(0.0)
                add_products(
                    M.ctypes.data, np.int64(M.strides[0]), pushed.ctypes.data, count, sums.ctypes.data, count
                )  # fmt: skip
                squares[:] = 0.0
                for j in range(count):
                    for lane in range(ROWS):
                        squares[lane] += np.float64(sums[j, lane]) * np.float64(sums[j, lane])
                for lane in range(min(ROWS, number - first)):
                    totals[first + lane] += squares[lane]
    end()


def norms(rows: torch.Tensor, order: torch.Tensor, feedback: Feedback) -> torch.Tensor:
    """The diagonal of rows · H · rowsᵀ, fp64 [n], to within some thousandths where products are of bf16 numbers.

    Args:
        rows: fp32 [n, K]. order: int64 [K], the columns of `rows` as H had them.
    """
    totals = torch.zeros(len(rows), dtype=torch.float64)
    given = rows.contiguous().numpy(), order.numpy().view(np.uint64), feedback.far, feedback.own, totals.numpy()
    over_runs(len(rows), len(order), lambda begin, end: _norms(*given, begin, end))
    return totals
