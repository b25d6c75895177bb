"""Compiled coordinate descent: what a sweep could not know when it chose, put right.

With E = W − Ŵ the loss is E H Eᵀ, so changing one decoded weight by δ changes it by δ²Hⱼⱼ − 2δ(EH)ⱼ, and the best step
on the grid is the nearest to (EH)ⱼ / Hⱼⱼ. No step ever makes the loss larger. EH begins as what the sweep's errors make
of it (kernels.feedback); few codes change in a pass (at 4 bits 7, 3 and 2 of a hundred), so from then on it is kept up
to date, a row of H for each change. Laid out as the sweep is, but for EH, whose rows lie as they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit

from fewbits.kernels.compiling import Array
from fewbits.kernels.curvature import BLOCK, Curvature
from fewbits.kernels.far_products import NUMBER_BYTES, add_far, padded
from fewbits.kernels.feedback import PANEL, Feedback, over_runs
from fewbits.kernels.lane_columns import descend_columns
from fewbits.kernels.lane_products import COLUMN_BYTES, COLUMNS, ROWS, subtract_products
from fewbits.kernels.listed_rows import subtract_listed
from fewbits.kernels.matrix_sums import begin, end

_descend_some, _descend_one = descend_columns(COLUMNS), descend_columns(1)
# Columns that changes are pushed into together: as much of the block's rows of H stays in the second-level cache.
PUSHED = 1024


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _descend_block(
    H: Any, start: Any, stop: Any, scales: Any, top_code: Any, codes: Any, misses: Any, local: Any, steps: Any,
    gain: Any,
) -> None:  # fmt: skip
    """Choose the codes of columns start to stop anew, one after the other, by their block of H.

    scales, codes, misses: [columns, ROWS] of all columns.
    """
    stride = np.int64(H.strides[0])
    first = start
    while first < stop:
        at, inside = first * COLUMN_BYTES, (first - start) * COLUMN_BYTES
        pulls, block = local.ctypes.data + inside, H.ctypes.data + (first - start) * (stride + 4)
        own_scales, own_codes, own_misses = scales.ctypes.data + at, codes.ctypes.data + at, misses.ctypes.data + at
        taken, won = steps.ctypes.data + inside, gain.ctypes.data
        some = COLUMNS if first + COLUMNS <= stop else 1
        if some == COLUMNS:
            moved = _descend_some(pulls, block, stride, own_scales, own_codes, own_misses, taken, won, top_code)
        else:
            moved = _descend_one(pulls, block, stride, own_scales, own_codes, own_misses, taken, won, top_code)
        if moved != 0:
            matrix, rest = block + some * stride, pulls + some * COLUMN_BYTES
            subtract_products(matrix, stride, taken, some, rest, stop - first - some)
        first += some


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _list_changes(H: Any, start: Any, count: Any, steps: Any, listed: Any, changes: Any, counts: Any) -> None:
    """Which rows of H the steps [count, ROWS] of columns from `start` on are pushed by, for each of ROWS rows."""
    stride = np.int64(H.strides[0])
    for lane in range(ROWS):
        found = 0
        for j in range(count):
            if steps[j, lane] != np.float32(0.0):
                listed[lane, found] = H.ctypes.data + (start + j) * stride
                changes[lane, found] = steps[j, lane]
                found += 1
        counts[lane] = found


@njit(inline="always")  # type: ignore[untyped-decorator]
def _push(listed: Any, changes: Any, counts: Any, first: Any, stop: Any, pulls: Any) -> None:
    """Take off rows of EH, columns first to stop, what the changes listed for each of them make there."""
    for tile in range(first, stop, PUSHED):
        behind = min(tile + PUSHED, stop)
        for row in range(len(pulls)):
            if counts[row] > 0:
                subtract_listed(listed[row], changes[row], counts[row], tile, behind, pulls[row])


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _side_by_side(W: Any, order: Any, group: Any, scales: Any, zeros: Any, codes: Any, sides: Any) -> None:
    """Lay up to ROWS rows side by side: what they miss of W, their codes and their scales, [3, columns, ROWS]."""
    misses, chosen, wide = sides
    count = len(W)
    if count < ROWS:
        misses[:], chosen[:], wide[:] = np.float32(0.0), np.float32(0.0), np.float32(1.0)
    for k in range(len(order)):
        channel = order[k]
        number = channel // group
        for lane in range(count):
            scale, code = scales[lane, number], np.float32(codes[lane, channel])
            wide[k, lane] = scale
            chosen[k, lane] = code
            misses[k, lane] = W[lane, channel] - (code - np.float32(zeros[lane, number])) * scale


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _begin_pulls(far: Any, block: Any, errors: Any, pulls: Any, sums: Any) -> None:
    """EH of runs of rows from their sweeps' errors, for `pulls` [runs · ROWS, columns]; sums: [block, ROWS]."""
    stride, width = np.int64(far.strides[0]), pulls.shape[1]
    behind = padded(width)
    begin()
    for top in range(0, width, block):
        count = min(block, width - top)
        matrix = far.ctypes.data + top * stride + top * NUMBER_BYTES
        for run in range(len(pulls) // ROWS):
            sums[:count] = np.float32(0.0)
            add_far(matrix, stride, errors[run, top:].ctypes.data, behind - top, sums.ctypes.data, count)
            pulls[run * ROWS : (run + 1) * ROWS, top : top + count] = sums[:count].T
    end()


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _descend(
    W: Any, order: Any, H: Any, near: Any, far: Any, block: Any, errors: Any, group: Any, passes: Any, top_code: Any,
    scales: Any, zeros: Any, codes: Any, missed: Any, gained: Any, begin_run: Any, end_run: Any,
) -> None:  # fmt: skip
    """Descend in runs of ROWS rows, those numbered begin_run to end_run."""
    rows, width = W.shape
    most = min(max(1, PANEL // (ROWS * width)), end_run - begin_run)
    sides, pulls = np.empty((most, 3, width, ROWS), np.float32), np.empty((most * ROWS, width), np.float32)
    listed, changes = np.empty((most * ROWS, BLOCK), np.int64), np.empty((most * ROWS, BLOCK), np.float32)
    counts, gain = np.empty(most * ROWS, np.int64), np.empty(ROWS, np.float32)
    local, steps = np.empty((max(BLOCK, block), ROWS), np.float32), np.empty((BLOCK, ROWS), np.float32)
    for panel in range(begin_run, end_run, most):
        runs = min(most, end_run - panel)
        for run in range(runs):
            own = slice((panel + run) * ROWS, (panel + run + 1) * ROWS)
            _side_by_side(W[own], order, group, scales[own], zeros[own], codes[own], sides[run])
        _begin_pulls(far, block, errors[panel : panel + runs], pulls[: runs * ROWS], local)
        for turn in range(passes):
            for start in range(0, width, BLOCK):
                stop = min(start + BLOCK, width)
                for run in range(runs):
                    first, own = (panel + run) * ROWS, slice(run * ROWS, (run + 1) * ROWS)
                    misses, chosen, wide = sides[run]
                    local[: stop - start] = pulls[own, start:stop].T
                    gain[:] = np.float32(0.0)
                    _descend_block(
                        near[start // BLOCK], start, stop, wide, top_code, chosen, misses, local, steps, gain
                    )
                    for lane in range(min(ROWS, rows - first)):
                        gained[first + lane] += np.float64(gain[lane])
                    _list_changes(H, start, stop - start, steps, listed[own], changes[own], counts[own])
                # After the last pass nobody asks for the columns before.
                behind = stop if turn == passes - 1 else 0
                _push(listed, changes, counts, behind, width, pulls[: runs * ROWS])
        for run in range(runs):
            first = (panel + run) * ROWS
            for lane in range(min(ROWS, rows - first)):
                for k in range(width):
                    codes[first + lane, order[k]] = np.uint8(np.int32(sides[run, 1, k, lane]))
                    missed[first + lane, order[k]] = sides[run, 0, k, lane]


def descend_rows(
    W: torch.Tensor,
    order: torch.Tensor,
    curvature: Curvature,
    feedback: Feedback,
    errors: Array,
    group: int,
    passes: int,
    largest_code: int,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    codes: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Re-round each column in turn, given all others, as often as there are passes.

    Args:
        W: fp32 [N, K]. order: int64 [K], the channels of H's rows. curvature, feedback: of H.
        errors: what the sweep that chose the codes missed, as it left them.
        group: channels that share a scale. scales: fp32 [N, G], of either sign. zeros: uint8 [N, G].
        codes: uint8 [N, K]; changed in place.

    Returns:
        By how much each row's loss fell, fp64 [N], and W − Ŵ, fp32 [N, K].
    """
    gained, missed = torch.zeros(len(W), dtype=torch.float64), torch.empty(W.shape)
    given = (
        W.contiguous().numpy(), order.numpy(), curvature.far, curvature.own, feedback.far, feedback.block, errors,
        group, passes, np.float32(largest_code), scales.numpy(), zeros.numpy(), codes.numpy(), missed.numpy(),
        gained.numpy(),
    )  # fmt: skip
    over_runs(len(W), W.shape[1], lambda begin, end: _descend(*given, begin, end))
    return gained, missed
