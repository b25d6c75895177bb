"""The sweep: codes column by column, each column's error pushed into the columns not yet chosen.

Source: Frantar et al. 2022, arXiv 2210.17323, algorithm 1. Scales are found on the way, on the weights as compensated.
"""

from __future__ import annotations

import torch

from fewbits.fp32_products import fast_fp32
from fewbits.kernels.gptq_sweep import sweep_block
from fewbits.kernels.rounding import search_grid
from fewbits.numerics import candidate_grids
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
    N, K = W.shape
    group = scheme.group_size or K
    remaining = W.T[order].contiguous()
    codes = torch.empty(K, N, dtype=torch.uint8)
    scales = torch.empty(N, K // group, dtype=scale_dtype)
    zeros = torch.empty(N, K // group, dtype=torch.uint8)
    importance = diagonal[order]
    loss = torch.zeros(N, dtype=torch.float64)
    fixed = (
        None if options.refit and scheme.group_size else search_grid(W, scheme, scale_dtype, options.search, diagonal)
    )
    # A channel-wide scale is known beforehand; its columns are swept in blocks all the same.
    step = group if scheme.group_size else BLOCK
    for start in range(0, K, step):
        stop = min(start + step, K)
        number = int(order[start]) // group
        if fixed is None:
            columns = remaining[start:stop].T.contiguous()
            span = Scheme(scheme.kind, scheme.bits, scheme.symmetric, stop - start)
            tried = _grids(columns, span, scale_dtype, options, importance[start:stop])
        else:
            tried = fixed[0][:, number][None], fixed[1][:, number][None]
        codes[start:stop], errors, chosen, losses = sweep_block(
            remaining[start:stop], U[start:stop, start:stop].contiguous(), tried[0].float(), tried[1].float(),
            scheme.largest_code,
        )  # fmt: skip
        scales[:, number], zeros[:, number] = (part.gather(0, chosen.long()[None])[0] for part in tried)
        loss += losses
        with fast_fp32():
            remaining[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)
    restored = torch.empty_like(codes)
    restored[order] = codes
    return (restored.T.contiguous(), scales, None if scheme.symmetric else zeros), loss


def _grids(
    columns: torch.Tensor, span: Scheme, scale_dtype: torch.dtype, options: GptqOptions, importance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points to sweep one group [N, g] with: [grids, N] each."""
    if options.swept is None:
        grid = search_grid(columns, span, scale_dtype, options.search, importance)
        return grid[0].T, grid[1].T
    scales, zeros = candidate_grids(columns, span, scale_dtype, options.swept)
    return scales, zeros.to(torch.uint8)
