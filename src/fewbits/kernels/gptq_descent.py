"""Compiled coordinate descent: what a sweep could not know when it chose, put right.

With E = W − Ŵ the loss is E H Eᵀ, so changing one decoded weight by δ changes it by δ²Hⱼⱼ − 2δ(EH)ⱼ, and the best step
on the grid is the nearest to (EH)ⱼ / Hⱼⱼ. No step ever makes the loss larger. Laid out as the sweep is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit

from fewbits.kernels.lane_columns import descend_columns
from fewbits.kernels.lane_products import COLUMN_BYTES, COLUMNS, ROWS, add_products, subtract_products
from fewbits.kernels.threads import over_rows

_descend_some, _descend_one = descend_columns(COLUMNS), descend_columns(1)
# Columns whose gradients are computed together, and then kept up to date.
BLOCK = 128


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _descend_block(
    H: Any, start: Any, stop: Any, scales: Any, top_code: Any, codes: Any, misses: Any, local: Any, steps: Any,
    gain: Any,
) -> None:  # fmt: skip
    """Choose the codes of columns start to stop anew, one after the other. scales: [columns, ROWS] of all columns."""
    stride = np.int64(H.strides[0])
    first = start
    while first < stop:
        at = first * COLUMN_BYTES
        pulls, block = local.ctypes.data + (first - start) * COLUMN_BYTES, H.ctypes.data + first * (stride + 4)
        own_scales, own_codes, own_misses = scales.ctypes.data + at, codes.ctypes.data + at, misses.ctypes.data + at
        taken, won = steps.ctypes.data, gain.ctypes.data
        some = COLUMNS if first + COLUMNS <= stop else 1
        if some == COLUMNS:
            moved = _descend_some(pulls, block, stride, own_scales, own_codes, own_misses, taken, won, top_code)
        else:
            moved = _descend_one(pulls, block, stride, own_scales, own_codes, own_misses, taken, won, top_code)
        if moved != 0:
            matrix, rest = block + some * stride, pulls + some * COLUMN_BYTES
            subtract_products(matrix, stride, taken, some, rest, stop - first - some)
        first += some


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _descend(
    W: Any, order: Any, H: Any, group: Any, block: Any, passes: Any, top_code: Any, scales: Any, zeros: Any, codes: Any,
    missed: Any, gained: Any, begin: Any, end: Any,
) -> None:  # fmt: skip
    """Descend in runs of ROWS rows, those numbered begin to end."""
    rows, width = W.shape
    stride = np.int64(H.strides[0])
    for run in range(begin, end):
        first = run * ROWS
        count = min(ROWS, rows - first)
        misses, chosen = np.zeros((width, ROWS), np.float32), np.zeros((width, ROWS), np.float32)
        wide = np.ones((width, ROWS), np.float32)
        for k in range(width):
            channel = order[k]
            number = channel // group
            for lane in range(count):
                scale, code = scales[first + lane, number], np.float32(codes[first + lane, channel])
                wide[k, lane] = scale
                chosen[k, lane] = code
                misses[k, lane] = W[first + lane, channel] - (code - np.float32(zeros[first + lane, number])) * scale
        local, steps = np.empty((block, ROWS), np.float32), np.empty((COLUMNS, ROWS), np.float32)
        for _ in range(passes):
            for start in range(0, width, block):
                stop = min(start + block, width)
                gain = np.zeros(ROWS, np.float32)
                local[:] = np.float32(0.0)
                matrix = H.ctypes.data + start * stride
                add_products(matrix, stride, misses.ctypes.data, width, local.ctypes.data, stop - start)
                _descend_block(H, start, stop, wide, top_code, chosen, misses, local, steps, gain)
                for lane in range(count):
                    gained[first + lane] += np.float64(gain[lane])
        for lane in range(count):
            for k in range(width):
                codes[first + lane, order[k]] = np.uint8(np.int32(chosen[k, lane]))
                missed[first + lane, order[k]] = misses[k, lane]


def descend_rows(
    W: torch.Tensor,
    order: torch.Tensor,
    H: torch.Tensor,
    group: int,
    passes: int,
    largest_code: int,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    codes: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Re-round each column in turn, given all others, as often as there are passes.

    Args:
        W: fp32 [N, K]. order: int64 [K], the channels of H's rows. H: fp32 [K, K].
        group: channels that share a scale. scales: fp32 [N, G], of either sign. zeros: uint8 [N, G].
        codes: uint8 [N, K]; changed in place.

    Returns:
        By how much each row's loss fell, fp64 [N], and W − Ŵ, fp32 [N, K].
    """
    gained, missed = torch.zeros(len(W), dtype=torch.float64), torch.empty(W.shape)
    given = (
        W.contiguous().numpy(), order.numpy(), H.contiguous().numpy(), group, BLOCK, passes, np.float32(largest_code),
        scales.numpy(), zeros.numpy(), codes.numpy(), missed.numpy(), gained.numpy(),
    )  # fmt: skip
    over_rows(-(-len(W) // ROWS), ROWS * W.shape[1] ** 2, lambda begin, end: _descend(*given, begin, end))
    return gained, missed
