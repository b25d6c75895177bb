"""Compiled rows · H · rowsᵀ, its diagonal alone, from the lower triangle of H; and where H is diagonal."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from fewbits.kernels.compiling import SUMS, entry
from fewbits.kernels.lane_products import COLUMN_BYTES, ROWS, add_products
from fewbits.kernels.threads import over_rows

# Columns of H that are multiplied together.
BLOCK = 64


@entry
def _quadratic(rows: Any, order: Any, H: Any, totals: Any, begin: Any, end: Any) -> None:
    number, width = rows.shape
    stride = np.int64(H.strides[0])
    for run in range(begin, end):
        first = run * ROWS
        count = min(ROWS, number - first)
        panel, sums = np.zeros((width, ROWS), np.float32), np.empty((BLOCK, ROWS), np.float32)
        for lane in range(count):
            for k in range(width):
                panel[k, lane] = rows[first + lane, order[k]]
        for start in range(0, width, BLOCK):
            some = min(BLOCK, width - start)
            matrix = H.ctypes.data + start * stride
            sums[:] = np.float32(0.0)
            if start > 0:
                add_products(matrix, stride, panel.ctypes.data, start, sums.ctypes.data, some)
            sums *= np.float32(2.0)
            own = panel.ctypes.data + start * COLUMN_BYTES
            add_products(matrix + 4 * start, stride, own, some, sums.ctypes.data, some)
            for lane in range(count):
                total = np.float32(0.0)
                for k in range(some):
                    total += sums[k, lane] * panel[start + k, lane]
                totals[first + lane] += np.float64(total)


def quadratic(rows: torch.Tensor, order: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """The diagonal of rows · H · rowsᵀ, fp64 [n].

    Args:
        rows: fp32 [n, K]. order: int64 [K], the columns of `rows` as H has them. H: symmetric fp32 [K, K].
    """
    totals = torch.zeros(len(rows), dtype=torch.float64)
    given = rows.contiguous().numpy(), order.numpy(), H.contiguous().numpy(), totals.numpy()
    over_rows(-(-len(rows) // ROWS), ROWS * len(H) ** 2, lambda begin, end: _quadratic(*given, begin, end))
    return totals


@partial(entry, fastmath=SUMS)
def _squares(rows: Any, weights: Any, totals: Any, weighted: Any, begin: Any, end: Any) -> None:
    for row in range(begin, end):
        numbers = rows[row]
        total, by_weight = np.float64(0.0), np.float64(0.0)
        for k in range(numbers.size):
            square = np.float64(numbers[k]) * np.float64(numbers[k])
            total += square
            by_weight += square * np.float64(weights[k])
        totals[row], weighted[row] = total, by_weight


def squares(rows: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ r² and Σ wₖ rₖ² of each row, fp64 [n]. rows: fp32 [n, K]. weights: fp32 [K]."""
    totals, weighted = (torch.empty(len(rows), dtype=torch.float64) for _ in range(2))
    given = rows.contiguous().numpy(), weights.contiguous().numpy(), totals.numpy(), weighted.numpy()
    over_rows(len(rows), rows.shape[1], lambda begin, end: _squares(*given, begin, end))
    return totals, weighted
