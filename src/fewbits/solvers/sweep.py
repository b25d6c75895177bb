"""The sweep: codes column by column, each column's error pushed into the columns not yet chosen.

Source: Frantar et al. 2022, arXiv 2210.17323, algorithm 1. Scales are found on the way, on the weights as compensated.
"""

from __future__ import annotations

import torch

from fewbits.kernels.compiling import Array
from fewbits.kernels.feedback import Feedback
from fewbits.kernels.gptq_sweep import sweep_rows
from fewbits.kernels.rounding import search_grid
from fewbits.schemes import Scheme
from fewbits.solvers.gptq_options import GptqOptions
from fewbits.solvers.solution import Grid


def sweep(
    W: torch.Tensor,
    feedback: Feedback,
    order: torch.Tensor,
    diagonal: torch.Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    options: GptqOptions,
) -> tuple[Grid, torch.Tensor, Array]:
    """Codes, scales and zero points; each row's loss by the H that was factored, fp64 [N]; what descent begins with."""
    # A channel-wide scale is known beforehand; its columns are swept in blocks all the same.
    swept = options.swept if scheme.group_size else None
    if swept is None:
        scales, zeros = search_grid(W, scheme, scale_dtype, options.search, diagonal)
    else:
        shape = len(W), scheme.groups(W.shape[1])
        scales, zeros = torch.empty(shape, dtype=scale_dtype), torch.empty(shape, dtype=torch.uint8)
    wide = scales.float()
    codes, loss, errors = sweep_rows(W, order, feedback, scheme, scale_dtype, swept, wide, zeros)
    return (codes, wide.to(scale_dtype), None if scheme.symmetric else zeros), loss, errors
