"""Compiled sweep of GPTQ over one block of columns: round a column, push its error into the later ones of the block.

Works on the transposed block [columns, rows], a run of rows at a time, so that all of a run's columns stay in the
first-level cache and every inner loop is over neighbouring rows. Rows are independent: the result does not depend on
how they are split.
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
    block: Any, factor: Any, inverses: Any, scales: Any, zeros: Any, top_code: Any, codes: Any, errors: Any
) -> None:
    columns, rows = block.shape
    runs = (rows + LANES - 1) // LANES
    for run in prange(runs):
        first = run * LANES
        count = min(LANES, rows - first)
        local = np.zeros((columns, LANES), np.float32)
        missed = np.zeros(LANES, np.float32)
        inverse, scale = np.ones(LANES, np.float32), np.ones(LANES, np.float32)
        low, high = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
        for lane in range(count):
            scale[lane] = scales[first + lane]
            inverse[lane] = inverses[first + lane]
            low[lane] = -zeros[first + lane]
            high[lane] = top_code - zeros[first + lane]
        for j in range(columns):
            for lane in range(count):
                local[j, lane] = block[j, first + lane]
        for j in range(columns):
            diagonal = np.float32(1.0) / factor[j, j]
            for lane in range(LANES):
                w = local[j, lane]
                code = np.rint(w * inverse[lane])
                code = low[lane] if code < low[lane] else code
                code = high[lane] if code > high[lane] else code
                local[j, lane] = code - low[lane]
                missed[lane] = (w - code * scale[lane]) * diagonal
            for lane in range(count):
                errors[j, first + lane] = missed[lane]
                codes[j, first + lane] = np.uint8(np.int32(local[j, lane]))
            for k in range(j + 1, columns):
                push = factor[j, k]
                for lane in range(LANES):
                    local[k, lane] -= missed[lane] * push


def sweep_block(
    block: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, largest_code: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the codes of one group of columns.

    Args:
        block: fp32 [columns, rows], the weights with earlier columns' errors pushed in.
        factor: fp32 [columns, columns], the block of the upper Cholesky factor U of H⁻¹ on its diagonal.
        scales, zeros: fp32 [rows].

    Returns:
        Codes uint8 [columns, rows], and errors fp32 [columns, rows]: (w − ŵ) / U_jj.
    """
    use_torch_threads()
    codes = torch.empty(block.shape, dtype=torch.uint8)
    errors = torch.empty(block.shape, dtype=torch.float32)
    _sweep(
        block.numpy(), factor.numpy(), (1 / scales).numpy(), scales.numpy(), zeros.numpy(), np.float32(largest_code),
        codes.numpy(), errors.numpy(),
    )  # fmt: skip
    return codes, errors
