"""Compiled coordinate descent: what a sweep could not know when it chose, put right.

With E = W − Ŵ the loss is E H Eᵀ, so changing one decoded weight by δ changes it by δ²Hⱼⱼ − 2δ(EH)ⱼ, and the best step
on the grid is the nearest to (EH)ⱼ / Hⱼⱼ. No step ever makes the loss larger. EH begins as what the sweep's errors make
of it (kernels.feedback); few codes change in a pass (at 4 bits 7, 3 and 2 of a hundred), so from then on it is kept up
to date, a row of H for each change. Laid out as the sweep is, but for EH, whose rows lie as they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fewbits.kernels.compiling import inlined, inner
from fewbits.kernels.curvature import BLOCK
from fewbits.kernels.far_products import NUMBER_BYTES, add_far, padded
from fewbits.kernels.lane_columns import descend_columns
from fewbits.kernels.lane_products import COLUMN_BYTES, COLUMNS, ROWS, subtract_products
from fewbits.kernels.lanes import LANES
from fewbits.kernels.listed_rows import subtract_listed, whole_lines
from fewbits.kernels.matrix_sums import begin, end
from fewbits.kernels.memory import copy_numbers
from fewbits.kernels.turned import turn_rows

_descend_some, _descend_one = descend_columns(COLUMNS), descend_columns(1)
# Columns that changes are pushed into together: as much of the block's rows of H stays in the second-level cache.
PUSHED = 1024
# Columns whose changes are listed before they are pushed into all others: sums of these are read and written once.
LISTED = 512


@inlined
def whole_lanes(count: Any) -> Any:
    """Rounded up to whole vectors."""
    return (count + LANES - 1) // LANES * LANES


@inner
def _descend_block(
    H: Any, start: Any, stop: Any, group: Any, grids: Any, top_code: Any, codes: Any, misses: Any, local: Any,
    steps: Any, gain: Any,
) -> None:  # fmt: skip
    """Choose the codes of columns start to stop anew, one after the other, by their block of H.

    grids: [groups, 2, ROWS]. codes, misses: [columns, ROWS] of all columns.
    """
    stride = np.int64(H.strides[0])
    first = start
    while first < stop:
        number = first // group
        inside = (first - start) * COLUMN_BYTES
        pulls, block = local.ctypes.data + inside, H.ctypes.data + (first - start) * (stride + 4)
        scales, own_codes = grids[number].ctypes.data, codes.ctypes.data + first * ROWS
        own_misses = misses.ctypes.data + first * COLUMN_BYTES
        taken, won = steps.ctypes.data + inside, gain.ctypes.data
        some = COLUMNS if first + COLUMNS <= min(stop, (number + 1) * group) else 1
        if some == COLUMNS:
            moved = _descend_some(pulls, block, stride, scales, own_codes, own_misses, taken, won, top_code)
        else:
            moved = _descend_one(pulls, block, stride, scales, own_codes, own_misses, taken, won, top_code)
        if moved != 0:
            matrix, rest = block + some * stride, pulls + some * COLUMN_BYTES
            subtract_products(matrix, stride, taken, some, rest, stop - first - some)
        first += some


@inner
def _list_changes(H: Any, start: Any, count: Any, steps: Any, listed: Any, changes: Any, counts: Any) -> None:
    """Add to the lists of ROWS rows which rows of H they are pushed by: steps [count, ROWS] of columns from `start`."""
    stride = np.int64(H.strides[0])
    for lane in range(ROWS):
        found = counts[lane]
        for j in range(count):
            if steps[j, lane] != np.float32(0.0):
                listed[lane, found] = H.ctypes.data + (start + j) * stride
                changes[lane, found] = steps[j, lane]
                found += 1
        counts[lane] = found


@inlined
def _push(listed: Any, changes: Any, begun: Any, counts: Any, first: Any, stop: Any, pulls: Any) -> None:
    """Take off rows of EH, columns first to stop, what the changes listed for each from `begun` on make there."""
    for tile in range(first, stop, PUSHED):
        behind = min(tile + PUSHED, stop)
        for row in range(len(pulls)):
            some = counts[row] - begun[row]
            if some > 0:
                subtract_listed(listed[row, begun[row] :], changes[row, begun[row] :], some, tile, behind, pulls[row])


@inner
def _begin_pulls(far: Any, block: Any, errors: Any, pulls: Any, sums: Any) -> None:
    """EH of runs of rows from their sweeps' errors, for `pulls` [runs · ROWS, columns]; sums: [block, ROWS]."""
    stride, width, line = np.int64(far.strides[0]), len(far), np.int64(COLUMN_BYTES)
    behind = padded(width)
    begin()
    for top in range(0, width, block):
        count = min(block, width - top)
        matrix = far.ctypes.data + top * stride + top * NUMBER_BYTES
        for run in range(len(pulls) // ROWS):
            sums[:] = np.float32(0.0)
            add_far(matrix, stride, errors[run, top:].ctypes.data, behind - top, sums.ctypes.data, count)
            rows = pulls[run * ROWS, top:].ctypes.data
            turn_rows(sums.ctypes.data, line, rows, np.int64(pulls.strides[0]), whole_lanes(count), np.int64(ROWS))
    end()


@inner
def descend_panel(
    curvature: Any, far: Any, block: Any, group: Any, passes: Any, top_code: Any, misses: Any, grids: Any, codes: Any,
    errors: Any, losses: Any,
) -> None:  # fmt: skip
    """Choose the codes of runs of 32 rows anew, as often as there are passes.

    Args:
        curvature: the arrays `far` and `own` of one. far, block: of the feedback that they were swept with.
        group: columns that share a scale. grids: fp32 [runs, groups, 2, ROWS], scales and zero points.
        misses: W − Ŵ, fp32 [runs, K, ROWS], and codes: uint8 [runs, K, ROWS], changed.
        errors: what the sweep missed, as it left it. losses: fp64 [runs, ROWS], what they lose; lessened.
    """
    H, near = curvature
    runs, width, _ = misses.shape
    # Rows begin on lines of a cache of their own.
    pulls = np.empty((runs * ROWS, whole_lines(width) + LANES), np.float32)
    stride, line = np.int64(pulls.strides[0]), np.int64(COLUMN_BYTES)
    listed, changes = np.empty((runs * ROWS, LISTED), np.int64), np.empty((runs * ROWS, LISTED), np.float32)
    counts, begun = np.zeros(runs * ROWS, np.int64), np.zeros(runs * ROWS, np.int64)
    local, steps = np.empty((whole_lanes(max(BLOCK, block)), ROWS), np.float32), np.empty((BLOCK, ROWS), np.float32)
    gain = np.empty(ROWS, np.float32)
    _begin_pulls(far, block, errors, pulls, local)
    for turn in range(passes):
        # After the last pass nobody asks for the columns before.
        is_last = turn == passes - 1
        for first in range(0, width, LISTED):
            last = min(first + LISTED, width)
            counts[:] = 0
            for start in range(first, last, BLOCK):
                stop = min(start + BLOCK, width)
                count = stop - start
                copy_numbers(begun, counts)
                for run in range(runs):
                    own = slice(run * ROWS, (run + 1) * ROWS)
                    rows = pulls[run * ROWS, start:].ctypes.data
                    turn_rows(rows, stride, local.ctypes.data, line, np.int64(ROWS), whole_lanes(count))
                    gain[:] = np.float32(0.0)
                    _descend_block(
                        near[start // BLOCK], start, stop, group, grids[run], top_code, codes[run], misses[run], local,
                        steps, gain,
                    )  # fmt: skip
                    for lane in range(ROWS):
                        losses[run, lane] -= gain[lane]
                    _list_changes(H, start, count, steps, listed[own], changes[own], counts[own])
                _push(listed, changes, begun, counts, stop if is_last else first, last, pulls)
            begun[:] = 0
            _push(listed, changes, begun, counts, last, width, pulls)
            if not is_last:
                _push(listed, changes, begun, counts, 0, first, pulls)
