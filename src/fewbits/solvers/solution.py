"""What a solver returns: the codes of a weight, their scales and zero points, and what was lost."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Solution:
    """Codes of a weight [N, K].

    codes: uint8 [N, K] unsigned. scales: [N, G] in the stored dtype. zeros: uint8 [N, G] unsigned; None if symmetric.
    decoded: Ŵ fp32 [N, K]. squared_error, squared_norm: Σ (W − Ŵ)² and Σ W² of each row, fp64 [N].
    output_error, output_norm: diagonals of (W−Ŵ)H(W−Ŵ)ᵀ and WHWᵀ, fp64 [N]; None without a statistic.
    notes: what did not go the plain way, as (what, why).
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    decoded: torch.Tensor
    squared_error: torch.Tensor
    squared_norm: torch.Tensor
    output_error: torch.Tensor | None = None
    output_norm: torch.Tensor | None = None
    notes: tuple[tuple[str, str], ...] = ()
