"""Compiled sweep of GPTQ: round a column, push its error into the later ones, group by group over all columns.

A group is swept once for each candidate grid, and each row keeps the one that ends with the least loss. 32 rows at a
time lie side by side, all of their columns in the cache, so that every step is the same for 32 rows. Within a block
errors are pushed in fp32 as soon as they are known; a block begins with what all earlier ones push into it, by
numbers of bf16 where the processor multiplies those (kernels.feedback), which moves a weight by some hundredths of a
step. Rows are independent: the result does not depend on how they are split.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fewbits.kernels.compiling import inlined, inner
from fewbits.kernels.far_products import KEPT, add_far, keep_columns
from fewbits.kernels.lane_columns import GRID_ROWS, HIGH, INVERSE, LOSS, LOW, SCALE, sweep_columns
from fewbits.kernels.lane_products import COLUMN_BYTES, COLUMNS, ROWS, subtract_products
from fewbits.kernels.matrix_sums import begin, end
from fewbits.kernels.memory import copy_matrix
from fewbits.kernels.search import asymmetric_grid, covering, symmetric_grid

# What is known of each row's group beyond its grid (lane_columns): the range and the scales that cover it, the
# candidate that is tried, a factor of the range and a sign (1: that which lets all levels serve), and the best so far.
LOWEST, HIGHEST, WIDE, NARROW, FACTOR, SIGN, CENTER, LEAST, BEST_FACTOR, BEST_SIGN = range(GRID_ROWS, GRID_ROWS + 10)
LANE_ROWS = GRID_ROWS + 10
_sweep_some, _sweep_one = sweep_columns(COLUMNS), sweep_columns(1)


@inlined
def _push(factor: Any, first: Any, stop: Any, column: Any, count: Any, errors: Any, sums: Any) -> None:
    """Take off columns first to stop, at an address, what the errors of `count` columns from `column` on push there."""
    stride = np.int64(factor.strides[0])
    matrix = factor.ctypes.data + first * stride + 4 * column
    subtract_products(matrix, stride, errors, count, sums, stop - first)


@inner
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


@inner
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


@inner
def _take_candidate(lanes: Any, kind: Any) -> None:
    """The grid of each row's factor and sign."""
    symmetric, top_code, dropped, smallest, most = kind
    for lane in range(ROWS):
        lowest, highest = lanes[LOWEST, lane], lanes[HIGHEST, lane]
        wide, factor = lanes[WIDE, lane], lanes[FACTOR, lane]
        if symmetric:
            extreme_first = lanes[SIGN, lane] > np.float32(0.0)
            span = wide if extreme_first else lanes[NARROW, lane]
            scale = symmetric_grid(lowest, highest, span * factor, extreme_first, dropped, smallest, most)
            zero = (top_code + np.float32(1.0)) / np.float32(2.0)
        else:
            scale, zero = asymmetric_grid(lowest * factor, wide * factor, top_code, dropped, smallest, most)
        lanes[SCALE, lane] = scale
        lanes[LOW, lane] = -zero
        lanes[HIGH, lane] = top_code - zero


@inner
def _try_candidate(
    columns: Any, local: Any, factor: Any, start: Any, kind: Any, lanes: Any, codes: Any, errors: Any, is_first: Any
) -> None:
    """Sweep a copy of a group's columns with each row's factor and sign, and keep these where they are the best."""
    _take_candidate(lanes, kind)
    copy_matrix(local, columns)
    _sweep_group(local, factor, start, lanes, codes, errors)
    for lane in range(ROWS):
        better = is_first or lanes[LOSS, lane] < lanes[LEAST, lane]
        lanes[LEAST, lane] = lanes[LOSS, lane] if better else lanes[LEAST, lane]
        lanes[BEST_FACTOR, lane] = lanes[FACTOR, lane] if better else lanes[BEST_FACTOR, lane]
        lanes[BEST_SIGN, lane] = lanes[SIGN, lane] if better else lanes[BEST_SIGN, lane]


@inner
def _find_grid(
    columns: Any, local: Any, factor: Any, start: Any, factors: Any, nearby: Any, kind: Any, lanes: Any, codes: Any,
    errors: Any,
) -> None:  # fmt: skip
    """Sweep the columns of a group with every candidate grid, and leave the best one in `lanes`."""
    symmetric, top_code = kind[0], kind[1]
    _ranges(columns, lanes, symmetric, top_code)
    signs = 2 if symmetric and top_code > np.float32(1.0) else 1
    for candidate in range(len(factors) * signs):
        for lane in range(ROWS):
            lanes[FACTOR, lane] = factors[candidate // signs]
            lanes[SIGN, lane] = np.float32(1 - candidate % signs)
        _try_candidate(columns, local, factor, start, kind, lanes, codes, errors, candidate == 0)
    for lane in range(ROWS):
        lanes[CENTER, lane] = lanes[BEST_FACTOR, lane]
        lanes[SIGN, lane] = lanes[BEST_SIGN, lane]
    for step in nearby:
        for lane in range(ROWS):
            wanted, other = lanes[CENTER, lane] + step, lanes[CENTER, lane] - np.float32(2.0) * step
            lanes[FACTOR, lane] = wanted if wanted <= np.float32(1.0) else other
        _try_candidate(columns, local, factor, start, kind, lanes, codes, errors, False)
    for lane in range(ROWS):
        lanes[FACTOR, lane] = lanes[BEST_FACTOR, lane]
        lanes[SIGN, lane] = lanes[BEST_SIGN, lane]
    _take_candidate(lanes, kind)


@inner
def _take_grid(lanes: Any, top_code: Any, grid: Any) -> None:
    """A grid that is given: each row's scale and zero point, [2, ROWS]."""
    for lane in range(ROWS):
        lanes[SCALE, lane] = grid[0, lane]
        lanes[LOW, lane] = -grid[1, lane]
        lanes[HIGH, lane] = top_code - grid[1, lane]


@inner
def _keep_grid(lanes: Any, grid: Any) -> None:
    for lane in range(ROWS):
        grid[0, lane] = lanes[SCALE, lane]
        grid[1, lane] = -lanes[LOW, lane]


@inner
def _take_off(columns: Any, coded: Any, lanes: Any, codes: Any) -> None:
    """Take off columns [n, ROWS] what their codes stand for, and keep these as bytes."""
    for j in range(len(columns)):
        for lane in range(ROWS):
            columns[j, lane] -= (coded[j, lane] + lanes[LOW, lane]) * lanes[SCALE, lane]
            codes[j, lane] = np.uint8(np.int32(coded[j, lane]))


@inner
def sweep_panel(
    feedback: Any, group: Any, step: Any, candidates: Any, top_code: Any, panels: Any, grids: Any, codes: Any,
    missed: Any, losses: Any,
) -> None:  # fmt: skip
    """Sweep runs of 32 rows, panels [runs, K, ROWS], to W − Ŵ in their place.

    Args:
        feedback: the arrays `far` and `inverse` of one. group: columns that share a scale. step: those that are swept
            with each candidate before the next ones.
        candidates: (factors of the range, what is added to the best one of them, (symmetric, top code, *what
            `stored_scale` takes)); without factors `grids` are given.
        grids: fp32 [runs, groups, 2, ROWS], scales and zero points, written where there are candidates.
        codes: uint8 [runs, K, ROWS], written. missed: KEPT [runs, more than K, ROWS], zeros: errors over U's diagonal,
            written. losses: fp64 [runs, ROWS], added to.
    """
    far, inverse = feedback
    factors, nearby, kind = candidates
    runs, width, _ = panels.shape
    stride, block = np.int64(far.strides[0]), inverse.shape[1]
    kept = np.zeros((runs, far.shape[1], ROWS), KEPT)
    columns, errors = np.empty((block, ROWS), np.float32), np.empty((block, ROWS), np.float32)
    local, coded = np.empty((step, ROWS), np.float32), np.empty((step, ROWS), np.float32)
    lanes = np.ones((LANE_ROWS, ROWS), np.float32)
    begin()
    for top in range(0, width, block):
        count, factor = min(block, width - top), inverse[top // block]
        for run in range(runs):
            own = panels[run, top : top + count]
            copy_matrix(columns[:count], own)
            matrix = far.ctypes.data + top * stride
            add_far(matrix, stride, kept[run].ctypes.data, top, columns.ctypes.data, count)
            for start in range(0, count, step):
                stop = min(start + step, count)
                grid = grids[run, (top + start) // group]
                if len(factors) > 0:
                    _find_grid(
                        columns[start:stop], local[: stop - start], factor, start, factors, nearby, kind, lanes, coded,
                        errors[start:stop],
                    )  # fmt: skip
                    _keep_grid(lanes, grid)
                else:
                    _take_grid(lanes, top_code, grid)
                _sweep_group(columns[start:stop], factor, start, lanes, coded, errors[start:stop])
                rest = columns.ctypes.data + stop * COLUMN_BYTES
                _push(factor, stop, count, start, stop - start, errors[start:].ctypes.data, rest)
                _take_off(own[start:stop], coded, lanes, codes[run, top + start : top + stop])
                for lane in range(ROWS):
                    losses[run, lane] += lanes[LOSS, lane]
            keep_columns(own, kept[run, top:].ctypes.data)
            keep_columns(errors[:count], missed[run, top:].ctypes.data)
    end()
