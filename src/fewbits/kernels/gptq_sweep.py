"""Compiled sweep of GPTQ over one group of columns: round a column, push its error into the later ones of the group.

Several grids are tried, each by a sweep of its own, and each row keeps the one that ends with the least loss. Works on
the transposed block [columns, rows], a run of rows at a time, so that all of a run's columns stay in the first-level
cache and every inner loop is over neighbouring rows. Rows are independent: the result does not depend on how they are
split.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, prange

from fewbits.kernels.compiling import use_torch_threads

LANES = 64


@njit(parallel=True, fastmath={"contract"}, cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _sweep(
    block: Any, factor: Any, scales: Any, zeros: Any, top_code: Any, codes: Any, errors: Any, chosen: Any, losses: Any
) -> None:
    columns, rows = block.shape
    for run in prange((rows + LANES - 1) // LANES):
        first = run * LANES
        count = min(LANES, rows - first)
        local = np.zeros((columns, LANES), np.float32)
        kept_codes, kept_errors = np.zeros((columns, LANES), np.float32), np.zeros((columns, LANES), np.float32)
        missed, loss = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
        least, best = np.full(LANES, np.float32(np.inf)), np.zeros(LANES, np.int32)
        inverse, scale = np.ones(LANES, np.float32), np.ones(LANES, np.float32)
        low, high = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
        tried_codes, tried_errors = np.zeros((columns, LANES), np.float32), np.zeros((columns, LANES), np.float32)
        for grid in range(len(scales)):
            for lane in range(count):
                scale[lane] = scales[grid, first + lane]
                inverse[lane] = np.float32(1.0) / scale[lane]
                low[lane] = -zeros[grid, first + lane]
                high[lane] = top_code - zeros[grid, first + lane]
            for j in range(columns):
                for lane in range(count):
                    local[j, lane] = block[j, first + lane]
            loss[:] = np.float32(0.0)
            for j in range(columns):
                diagonal = np.float32(1.0) / factor[j, j]
                for lane in range(LANES):
                    w = local[j, lane]
                    code = np.rint(w * inverse[lane])
                    code = low[lane] if code < low[lane] else code
                    code = high[lane] if code > high[lane] else code
                    miss = (w - code * scale[lane]) * diagonal
                    tried_codes[j, lane] = code - low[lane]
                    tried_errors[j, lane] = miss
                    missed[lane] = miss
                    loss[lane] += miss * miss
                for k in range(j + 1, columns):
                    push = factor[j, k]
                    for lane in range(LANES):
                        local[k, lane] -= missed[lane] * push
            for j in range(columns):
                for lane in range(LANES):
                    better = loss[lane] < least[lane] or grid == 0
                    kept_codes[j, lane] = tried_codes[j, lane] if better else kept_codes[j, lane]
                    kept_errors[j, lane] = tried_errors[j, lane] if better else kept_errors[j, lane]
            for lane in range(LANES):
                better = loss[lane] < least[lane] or grid == 0
                best[lane] = grid if better else best[lane]
                least[lane] = loss[lane] if better else least[lane]
        for j in range(columns):
            for lane in range(count):
                codes[j, first + lane] = np.uint8(np.int32(kept_codes[j, lane]))
                errors[j, first + lane] = kept_errors[j, lane]
        for lane in range(count):
            chosen[first + lane] = best[lane]
            losses[first + lane] = least[lane]


def sweep_block(
    block: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, largest_code: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose the codes of one group of columns, and for each row the grid among those offered.

    Args:
        block: fp32 [columns, rows], the weights with earlier columns' errors pushed in.
        factor: fp32 [columns, columns], the block of the upper Cholesky factor U of H⁻¹ on its diagonal.
        scales, zeros: fp32 [grids, rows].

    Returns:
        Codes uint8 [columns, rows], errors fp32 [columns, rows]: (w − ŵ) / U_jj, the number of the grid that was
        chosen int32 [rows], and its loss, the sum of the squared errors, fp32 [rows].
    """
    use_torch_threads()
    rows = block.shape[1]
    codes = torch.empty(block.shape, dtype=torch.uint8)
    errors = torch.empty(block.shape, dtype=torch.float32)
    chosen, losses = torch.empty(rows, dtype=torch.int32), torch.empty(rows)
    _sweep(
        block.numpy(), factor.numpy(), scales.contiguous().numpy(), zeros.contiguous().numpy(),
        np.float32(largest_code), codes.numpy(), errors.numpy(), chosen.numpy(), losses.numpy(),
    )  # fmt: skip
    return codes, errors, chosen, losses
