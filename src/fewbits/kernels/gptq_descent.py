"""Compiled coordinate descent: what a sweep could not know when it chose, put right.

With E = W − Ŵ the loss is E H Eᵀ, so changing one decoded weight by δ changes it by δ²Hⱼⱼ − 2δ(EH)ⱼ, and the best step
on the grid is the nearest to (EH)ⱼ / Hⱼⱼ. No step ever makes the loss larger. Laid out as the sweep is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit

from fewbits.kernels.lane_products import COLUMN_BYTES, COLUMNS, ROWS, add_products, subtract_products
from fewbits.kernels.threads import over_rows

# Columns whose gradients are computed together, and then kept up to date.
BLOCK = 128


@njit(error_model="numpy", fastmath={"contract"})  # type: ignore[untyped-decorator]
def _descend_block(
    H: Any, start: Any, stop: Any, scales: Any, top_code: Any, codes: Any, misses: Any, local: Any, steps: Any,
    gain: Any,
) -> None:  # fmt: skip
    """Choose the codes of columns start to stop anew, one after the other. scales: [columns, ROWS] of all columns."""
    for first in range(start, stop, COLUMNS):
        last = min(first + COLUMNS, stop)
        moved = 0
        for j in range(first, last):
            curvature = H[j, j]
            flat = np.float32(1.0) / curvature
            step = steps[j - first]
            for lane in range(ROWS):
                pull, code, scale = local[j - start, lane], codes[j, lane], scales[j, lane]
                wanted = code + np.rint(pull * flat * (np.float32(1.0) / scale))
                wanted = np.float32(0.0) if wanted < np.float32(0.0) else wanted
                wanted = top_code if wanted > top_code else wanted
                delta = (wanted - code) * scale
                codes[j, lane] = wanted
                step[lane] = delta
                gain[lane] += delta * (np.float32(2.0) * pull - delta * curvature)
                misses[j, lane] -= delta
                moved += delta != np.float32(0.0)
            for k in range(j + 1, last):
                push = H[j, k]
                for lane in range(ROWS):
                    local[k - start, lane] -= step[lane] * push
        if moved > 0:
            stride = np.int64(H.strides[0])
            matrix, rest = H.ctypes.data + last * stride + 4 * first, local.ctypes.data + (last - start) * COLUMN_BYTES
            subtract_products(matrix, stride, steps.ctypes.data, last - first, rest, stop - last)


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _descend(
    W: Any, order: Any, H: Any, group: Any, block: Any, passes: Any, top_code: Any, scales: Any, zeros: Any, codes: Any,
    gained: Any, begin: Any, end: Any,
) -> None:  # fmt: skip
    """Descend in runs of ROWS rows, those numbered begin to end."""
    rows, width = W.shape
    stride = np.int64(H.strides[0])
    for run in range(begin, end):
        first = run * ROWS
        count = min(ROWS, rows - first)
        misses, chosen = np.zeros((width, ROWS), np.float32), np.zeros((width, ROWS), np.float32)
        wide = np.ones((width, ROWS), np.float32)
        for lane in range(count):
            for k in range(width):
                channel = order[k]
                scale = scales[first + lane, channel // group]
                code = np.float32(codes[first + lane, channel])
                wide[k, lane] = scale
                chosen[k, lane] = code
                misses[k, lane] = (
                    W[first + lane, channel] - (code - np.float32(zeros[first + lane, channel // group])) * scale
                )
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
) -> torch.Tensor:
    """Re-round each column in turn, given all others, as often as there are passes.

    Args:
        W: fp32 [N, K]. order: int64 [K], the channels of H's rows. H: fp32 [K, K].
        group: channels that share a scale. scales: fp32 [N, G], of either sign. zeros: uint8 [N, G].
        codes: uint8 [N, K]; changed in place.

    Returns:
        By how much each row's loss fell, fp64 [N].
    """
    gained = torch.zeros(len(W), dtype=torch.float64)
    given = (
        W.contiguous().numpy(), order.numpy(), H.contiguous().numpy(), group, BLOCK, passes, np.float32(largest_code),
        scales.numpy(), zeros.numpy(), codes.numpy(), gained.numpy(),
    )  # fmt: skip
    over_rows(-(-len(W) // ROWS), ROWS * W.shape[1] ** 2, lambda begin, end: _descend(*given, begin, end))
    return gained
