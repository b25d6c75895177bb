"""The sweep: codes column by column, each column's error pushed into the columns not yet chosen.

Source: Frantar et al. 2022, arXiv 2210.17323, algorithm 1. Scales are found on the way, on the weights as compensated.
"""

from __future__ import annotations

import torch

from fewbits.kernels.gptq_sweep import sweep_rows
from fewbits.kernels.rounding import search_grid
from fewbits.schemes import Scheme
from fewbits.solvers.gptq_options import GptqOptions
from fewbits.solvers.solution import Grid

# Columns swept at a time where a scale spans the whole row.
BLOCK = 128


def sweep(
    W: torch.Tensor,
    U: torch.Tensor,
    order: torch.Tensor,
    diagonal: torch.Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    options: GptqOptions,
) -> tuple[Grid, torch.Tensor]:
    """Codes, scales and zero points, and each row's loss by the H that U was made from, fp64 [N]."""
    # A channel-wide scale is known beforehand; its columns are swept in blocks all the same.
    swept = options.swept if scheme.group_size else None
    if swept is None:
        scales, zeros = search_grid(W, scheme, scale_dtype, options.search, diagonal)
    else:
        shape = len(W), scheme.groups(W.shape[1])
        scales, zeros = torch.empty(shape, dtype=scale_dtype), torch.empty(shape, dtype=torch.uint8)
    wide = scales.float()
    codes, loss = sweep_rows(
        W, order, U, scheme, scale_dtype, swept, wide, zeros, scheme.group_size or BLOCK
    )  # fmt: skip
    return (codes, wide.to(scale_dtype), None if scheme.symmetric else zeros), loss
