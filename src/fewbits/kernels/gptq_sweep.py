"""Compiled sweep of GPTQ: round a column, push its error into the later ones, group by group over all columns.

A group is swept once for each candidate grid, and each row keeps the one that ends with the least loss. 32 rows at a
time lie side by side, all of their columns in the cache, so that every step is the same for 32 rows. Within a block
errors are pushed in fp32 as soon as they are known; a block begins with what all earlier ones push into it, by
numbers of bf16 where the processor multiplies those (kernels.feedback), which moves a weight by some hundredths of a
step. Rows are independent: the result does not depend on how they are split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import njit

from fewbits.kernels.compiling import ROUNDING, Array
from fewbits.kernels.far_products import KEPT, add_far, keep_columns
from fewbits.kernels.feedback import PANEL, Feedback, lay_columns, over_runs
from fewbits.kernels.lane_columns import GRID_ROWS, HIGH, INVERSE, LOSS, LOW, SCALE, sweep_columns
from fewbits.kernels.lane_products import COLUMN_BYTES, COLUMNS, ROWS, subtract_products
from fewbits.kernels.matrix_sums import begin, end
from fewbits.kernels.search import asymmetric_grid, covering, symmetric_grid
from fewbits.schemes import Scheme
from fewbits.search import Search

STORED = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
# What is known of each row's group beyond its grid (lane_columns): the range, and the best grid so far.
LOWEST, HIGHEST, WIDE, NARROW, LEAST, BEST, BEST_ZERO = range(GRID_ROWS, GRID_ROWS + 7)
LANE_ROWS = GRID_ROWS + 7
_sweep_some, _sweep_one = sweep_columns(COLUMNS), sweep_columns(1)


@njit(inline="always")  # type: ignore[untyped-decorator]
def _push(factor: Any, first: Any, stop: Any, column: Any, count: Any, errors: Any, sums: Any) -> None:
    """Take off columns first to stop, at an address, what the errors of `count` columns from `column` on push there."""
    stride = np.int64(factor.strides[0])
    matrix = factor.ctypes.data + first * stride + 4 * column
    subtract_products(matrix, stride, errors, count, sums, stop - first)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _sweep_group(local: Any, factor: Any, start: Any, lanes: Any, codes: Any, errors: Any) -> None:
    """Sweep columns [count, ROWS] that begin at column `start` with each row's grid; writes codes, errors and loss."""
    stride, count = np.int64(factor.strides[0]), len(local)
    for lane in range(ROWS):
        lanes[LOSS, lane] = np.float32(0.0)
        lanes[INVERSE, lane] = np.float32(1.0) / lanes[SCALE, lane]
    first = 0
    while first < count:
        # Uᵀ lies there.
        block = factor.ctypes.data + (start + first) * (stride + 4)
        own, coded = local.ctypes.data + first * COLUMN_BYTES, codes.ctypes.data + first * COLUMN_BYTES
        missed = errors.ctypes.data + first * COLUMN_BYTES
        some = COLUMNS if first + COLUMNS <= count else 1
        if some == COLUMNS:
            _sweep_some(own, block, stride, lanes.ctypes.data, coded, missed)
        else:
            _sweep_one(own, block, stride, lanes.ctypes.data, coded, missed)
        rest = own + some * COLUMN_BYTES
        _push(factor, start + first + some, start + count, start + first, some, missed, rest)
        first += some


@njit(error_model="numpy", fastmath={"contract"})  # type: ignore[untyped-decorator]
def _ranges(columns: Any, lanes: Any, symmetric: Any, top_code: Any) -> None:
    for lane in range(ROWS):
        lanes[LOWEST, lane] = np.float32(0.0)
        lanes[HIGHEST, lane] = np.float32(0.0)
    for j in range(len(columns)):
        for lane in range(ROWS):
            w = columns[j, lane]
            lanes[LOWEST, lane] = w if w < lanes[LOWEST, lane] else lanes[LOWEST, lane]
            lanes[HIGHEST, lane] = w if w > lanes[HIGHEST, lane] else lanes[HIGHEST, lane]
    for lane in range(ROWS):
        wide, narrow = covering(lanes[LOWEST, lane], lanes[HIGHEST, lane], symmetric, top_code)
        lanes[WIDE, lane] = wide
        lanes[NARROW, lane] = narrow


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _take_candidate(
    lanes: Any, symmetric: Any, extreme_first: Any, factor: Any, top_code: Any, dropped: Any, smallest: Any, most: Any
) -> None:
    for lane in range(ROWS):
        lowest, highest, wide = lanes[LOWEST, lane], lanes[HIGHEST, lane], lanes[WIDE, lane]
        if symmetric:
            span = wide if extreme_first else lanes[NARROW, lane]
            scale = symmetric_grid(lowest, highest, span * factor, extreme_first, dropped, smallest, most)
            zero = (top_code + np.float32(1.0)) / np.float32(2.0)
        else:
            scale, zero = asymmetric_grid(lowest * factor, wide * factor, top_code, dropped, smallest, most)
        lanes[SCALE, lane] = scale
        lanes[LOW, lane] = -zero
        lanes[HIGH, lane] = top_code - zero


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _keep_better(lanes: Any, is_first: Any) -> None:
    for lane in range(ROWS):
        better = is_first or lanes[LOSS, lane] < lanes[LEAST, lane]
        lanes[LEAST, lane] = lanes[LOSS, lane] if better else lanes[LEAST, lane]
        lanes[BEST, lane] = lanes[SCALE, lane] if better else lanes[BEST, lane]
        lanes[BEST_ZERO, lane] = -lanes[LOW, lane] if better else lanes[BEST_ZERO, lane]


@njit(error_model="numpy", fastmath={"contract"})  # type: ignore[untyped-decorator]
def _find_grid(
    columns: Any, local: Any, factor: Any, start: Any, factors: Any, symmetric: Any, top_code: Any, dropped: Any,
    smallest: Any, most: Any, lanes: Any, codes: Any, errors: Any,
) -> None:  # fmt: skip
    """Sweep the columns of a group with every candidate grid, and leave the best one in `lanes`."""
    _ranges(columns, lanes, symmetric, top_code)
    kinds = 2 if symmetric and top_code > np.float32(1.0) else 1
    for candidate in range(len(factors) * kinds):
        factor_of_range = factors[candidate // kinds]
        _take_candidate(
            lanes, symmetric, candidate % kinds == 0, factor_of_range, top_code, dropped, smallest, most
        )  # fmt: skip
        local[:] = columns
        _sweep_group(local, factor, start, lanes, codes, errors)
        _keep_better(lanes, candidate == 0)
    for lane in range(ROWS):
        lanes[SCALE, lane] = lanes[BEST, lane]
        lanes[LOW, lane] = -lanes[BEST_ZERO, lane]
        lanes[HIGH, lane] = top_code - lanes[BEST_ZERO, lane]


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _take_grid(lanes: Any, top_code: Any, scales: Any, zeros: Any) -> None:
    """The grids of a group that are given, those of up to ROWS rows."""
    for lane in range(len(scales)):
        lanes[SCALE, lane] = scales[lane]
        lanes[LOW, lane] = -np.float32(zeros[lane])
        lanes[HIGH, lane] = top_code + lanes[LOW, lane]


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _missed(columns: Any, chosen: Any, lanes: Any) -> None:
    """Take off columns [n, ROWS] what their codes stand for."""
    for j in range(len(columns)):
        for lane in range(ROWS):
            columns[j, lane] -= (chosen[j, lane] + lanes[LOW, lane]) * lanes[SCALE, lane]


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _sweep(
    W: Any, order: Any, far: Any, inverse: Any, group: Any, step: Any, factors: Any, symmetric: Any, top_code: Any,
    dropped: Any, smallest: Any, most: Any, scales: Any, zeros: Any, codes: Any, losses: Any, missed: Any,
    begin_run: Any, end_run: Any,
) -> None:  # fmt: skip
    """Sweep runs of ROWS rows, those numbered begin_run to end_run."""
    rows, width = W.shape
    stride, block = np.int64(far.strides[0]), inverse.shape[1]
    together = min(max(1, PANEL // (ROWS * width)), end_run - begin_run)
    panels, kept = np.empty((together, width, ROWS), np.float32), np.empty((together, far.shape[1], ROWS), KEPT)
    columns, errors = np.empty((block, ROWS), np.float32), np.empty((block, ROWS), np.float32)
    local, chosen = np.empty((step, ROWS), np.float32), np.empty((step, ROWS), np.float32)
    lanes = np.ones((LANE_ROWS, ROWS), np.float32)
    begin()
    for panel in range(begin_run, end_run, together):
        runs = min(together, end_run - panel)
        kept[:] = 0
        for run in range(runs):
            lay_columns(W[(panel + run) * ROWS : (panel + run + 1) * ROWS], order, panels[run])
        for top in range(0, width, block):
            count, factor = min(block, width - top), inverse[top // block]
            for run in range(runs):
                first = (panel + run) * ROWS
                number_of_rows = min(ROWS, rows - first)
                own = panels[run, top : top + count]
                columns[:count] = own
                matrix = far.ctypes.data + top * stride
                add_far(matrix, stride, kept[run].ctypes.data, top, columns.ctypes.data, count)
                for start in range(0, count, step):
                    stop = min(start + step, count)
                    number = order[top + start] // group
                    if len(factors) > 0:
                        _find_grid(
                            columns[start:stop], local[: stop - start], factor, start, factors, symmetric, top_code,
                            dropped, smallest, most, lanes, chosen, errors[start:stop],
                        )  # fmt: skip
                        for lane in range(number_of_rows):
                            scales[first + lane, number] = lanes[SCALE, lane]
                            zeros[first + lane, number] = np.uint8(np.int32(-lanes[LOW, lane]))
                    else:
                        grids = slice(first, first + number_of_rows)
                        _take_grid(lanes, top_code, scales[grids, number], zeros[grids, number])
                    _sweep_group(columns[start:stop], factor, start, lanes, chosen, errors[start:stop])
                    rest = columns.ctypes.data + stop * COLUMN_BYTES
                    _push(factor, stop, count, start, stop - start, errors[start:].ctypes.data, rest)
                    _missed(own[start:stop], chosen, lanes)
                    for lane in range(number_of_rows):
                        losses[first + lane] += np.float64(lanes[LOSS, lane])
                        for j in range(stop - start):
                            codes[first + lane, order[top + start + j]] = np.uint8(np.int32(chosen[j, lane]))
                keep_columns(own, kept[run, top:].ctypes.data)
                keep_columns(errors[:count], missed[panel + run, top:].ctypes.data)
    end()


def sweep_rows(
    W: torch.Tensor,
    order: torch.Tensor,
    feedback: Feedback,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    candidates: Search | None,
    scales: torch.Tensor,
    zeros: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, Array]:
    """Choose the codes of rows, and for each group of each row the grid among the candidates.

    Args:
        W: fp32 [N, K]. order: int64 [K], channels as they are swept; those of a group come together.
        feedback: of H, its channels in `order`, for the scheme's groups.
        candidates: grids that are tried; None takes `scales` and `zeros` as they come.
        scales, zeros: fp32 and uint8 [N, G], written where there are candidates.

    Returns:
        Codes uint8 [N, K]; each row's loss, the sum of its squared errors (w − ŵ) / U_jj, fp64 [N]; and these errors,
        32 rows side by side, as `far_products` multiplies them.
    """
    codes, losses = torch.empty(W.shape, dtype=torch.uint8), torch.zeros(len(W), dtype=torch.float64)
    errors = np.zeros((-(-len(W) // ROWS), feedback.far.shape[1], ROWS), KEPT)
    factors: Sequence[float] = () if candidates is None else candidates.factors()
    given = (
        W.contiguous().numpy(), order.numpy(), feedback.far, feedback.inverse, scheme.group_size or W.shape[1],
        scheme.group_size or feedback.block, np.array(factors, np.float32), scheme.symmetric,
        np.float32(scheme.largest_code), *ROUNDING[STORED[scale_dtype]], scales.numpy(), zeros.numpy(), codes.numpy(),
        losses.numpy(), errors,
    )  # fmt: skip
    over_runs(len(W), W.shape[1], lambda begin, end: _sweep(*given, begin, end))
    return codes, losses, errors
