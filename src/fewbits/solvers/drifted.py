"""Targets for drifted inputs: weights whose outputs on what the quantized model passes on are the original's.

With H = Σ wₜ xₜ xₜᵀ and D = Σ wₜ (x°ₜ − xₜ) xₜᵀ, Σ wₜ ‖W x°ₜ − Ŵ xₜ‖² is tr((V − Ŵ) H (V − Ŵ)ᵀ) and a constant, about
V = W (I + D H⁻¹). D is an estimate from some of the tokens, and following it to the end fits its noise: V goes SHARE of
the way.
Source: Li et al. 2025, arXiv 2504.02692 (GPTAQ), which corrects column by column, inside the sweep.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fewbits.drift import Drift
from fewbits.fp32_products import fast_fp32
from fewbits.kernels.lanes import HAS_BF16
from fewbits.matrix_products import linear, product
from fewbits.solvers.factorization import inverse_factor

# Of the way to where the outputs would be the original's.
SHARE = 0.5
# Share of the mean diagonal of H: an estimate from some of the tokens is not to be magnified where H is small.
DAMPING = 0.1


def drifted_targets(
    W: torch.Tensor, H: torch.Tensor, drift: Drift, parts: Sequence[slice], *, keep: bool
) -> torch.Tensor:
    """W + SHARE · W D H⁻¹ [N, K] in W's dtype, some rows at a time; W itself where H cannot be factored.

    Args:
        keep: False lets the drift be written over.
    """
    steps = torch.empty_like(W)
    # Steps are small, and rounded to W's dtype in the end.
    dtype = torch.bfloat16 if HAS_BF16 and W.dtype == torch.bfloat16 else torch.float32
    with fast_fp32():
        matrix = drift.matrix.to(dtype)
        for rows in parts:
            steps[rows] = matrix[rows] if drift.of_outputs else product(W[rows].to(dtype), matrix)
        del matrix
        if drift.of_outputs and not keep:
            drift.matrix.untyped_storage().resize_(0)
        inverse = inverse_factor(H, DAMPING, None if keep or drift.of_outputs else drift.matrix)
        if inverse is None:
            return W
        U = inverse.to(dtype)
        del inverse
        for rows in parts:
            step = product(linear(steps[rows].to(dtype), U), U).float()
            steps[rows] = step.mul_(SHARE).add_(W[rows])
    return steps
