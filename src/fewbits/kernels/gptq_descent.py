"""Compiled coordinate descent over a block of columns: what a sweep could not know when it chose, put right.

With E = W − Ŵ the loss is E H Eᵀ, so changing one decoded weight by δ changes it by δ²Hⱼⱼ − 2δ(EH)ⱼ, and the best step
on the grid is the nearest to (EH)ⱼ / Hⱼⱼ. No step ever makes the loss larger. Laid out as the sweep is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, prange

from fewbits.kernels.compiling import use_torch_threads

LANES = 64


@njit(parallel=True, fastmath={"contract"}, cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _descend(gradient: Any, gram: Any, scales: Any, top_code: Any, codes: Any, misses: Any, gained: Any) -> None:
    columns, rows = gradient.shape
    span = columns // len(scales)
    for run in prange((rows + LANES - 1) // LANES):
        first = run * LANES
        count = min(LANES, rows - first)
        local, code = np.zeros((columns, LANES), np.float32), np.zeros((columns, LANES), np.float32)
        scale, inverse = np.ones(LANES, np.float32), np.ones(LANES, np.float32)
        step, gain = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
        for j in range(columns):
            for lane in range(count):
                local[j, lane] = gradient[j, first + lane]
                code[j, lane] = np.float32(codes[j, first + lane])
        for j in range(columns):
            curvature = gram[j, j]
            flat = np.float32(1.0) / curvature
            moved = 0
            if j % span == 0:
                for lane in range(count):
                    scale[lane] = scales[j // span, first + lane]
                    inverse[lane] = np.float32(1.0) / scale[lane]
            for lane in range(LANES):
                pull = local[j, lane]
                wanted = code[j, lane] + np.rint(pull * flat * inverse[lane])
                wanted = np.float32(0.0) if wanted < np.float32(0.0) else wanted
                wanted = top_code if wanted > top_code else wanted
                delta = (wanted - code[j, lane]) * scale[lane]
                code[j, lane] = wanted
                step[lane] = delta
                gain[lane] += delta * (np.float32(2.0) * pull - delta * curvature)
                moved += delta != np.float32(0.0)
            if moved > 0:
                for k in range(columns):
                    push = gram[j, k]
                    for lane in range(LANES):
                        local[k, lane] -= step[lane] * push
                for lane in range(count):
                    misses[j, first + lane] -= step[lane]
        for j in range(columns):
            for lane in range(count):
                codes[j, first + lane] = np.uint8(np.int32(code[j, lane]))
        for lane in range(count):
            gained[first + lane] = gain[lane]


def descend_block(
    gradient: torch.Tensor,
    gram: torch.Tensor,
    scales: torch.Tensor,
    largest_code: int,
    codes: torch.Tensor,
    misses: torch.Tensor,
) -> torch.Tensor:
    """Re-round each column of a block in turn, given all others.

    Args:
        gradient: fp32 [columns, rows], the block's part of H Eᵀ. gram: fp32 [columns, columns], H's block.
        scales: fp32 [groups, rows], of either sign; groups are equally wide.
        codes: uint8 [columns, rows]; changed in place. misses: fp32 [columns, rows], Eᵀ = (W − Ŵ)ᵀ; likewise.

    Returns:
        By how much each row's loss fell, fp32 [rows].
    """
    use_torch_threads()
    gained = torch.empty(gradient.shape[1])
    _descend(
        gradient.numpy(), gram.numpy(), scales.contiguous().numpy(), np.float32(largest_code), codes.numpy(),
        misses.numpy(), gained.numpy(),
    )  # fmt: skip
    return gained
