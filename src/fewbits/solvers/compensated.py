"""Rows with their errors made up for: codes column by column, each column's error pushed into those not yet chosen.

Source: Frantar et al. 2022, arXiv 2210.17323, algorithm 1. Scales are found on the way, on the weights as compensated;
then each code is chosen once more given all others, which the sweep could not know.
"""

from __future__ import annotations

import torch

from fewbits.kernels.curvature import Curvature
from fewbits.kernels.feedback import Feedback
from fewbits.kernels.gptq_rows import choose_rows
from fewbits.kernels.rounding import search_grid
from fewbits.schemes import Scheme
from fewbits.solvers.gptq_options import GptqOptions
from fewbits.solvers.solution import Grid


def compensated(
    W: torch.Tensor,
    feedback: Feedback,
    curvature: Curvature | None,
    order: torch.Tensor,
    diagonal: torch.Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    options: GptqOptions,
) -> tuple[Grid, torch.Tensor, torch.Tensor]:
    """Codes, scales and zero points; each row's loss by the H that was factored, fp64 [N]; and W − Ŵ, fp32 [N, K].

    Args:
        feedback, curvature: of that H, its channels in `order`; without curvature there is no descent.
        diagonal: H's, [K], by which scales that span a row are searched.
    """
    # A channel-wide scale is known beforehand; its columns are swept in blocks all the same.
    swept = options.swept if scheme.group_size else None
    if swept is None:
        scales, zeros = search_grid(W, scheme, scale_dtype, options.search, diagonal)
    else:
        shape = len(W), scheme.groups(W.shape[1])
        scales, zeros = torch.empty(shape, dtype=scale_dtype), torch.empty(shape, dtype=torch.uint8)
    chosen = choose_rows(
        W, order, feedback, curvature, scheme, scale_dtype, swept, options.passes, scales.float(), zeros
    )  # fmt: skip
    grid = chosen.codes, chosen.scales.to(scale_dtype), None if scheme.symmetric else chosen.zeros
    return grid, chosen.losses, chosen.missed
