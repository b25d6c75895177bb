"""What a solver returns: the codes of a weight, their scales and zero points, and what was lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fewbits.packing import decode_codes
from fewbits.schemes import Scheme

# Codes uint8 [N, K], scales [N, G], zero points uint8 [N, G] or None.
Grid = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Solution:
    """Codes of a weight [N, K] by a scheme.

    codes: uint8 [N, K] unsigned. scales: [N, G] in the stored dtype. zeros: uint8 [N, G] unsigned; None if symmetric.
    squared_error, squared_norm: Σ (W − Ŵ)² and Σ W² of each row, fp64 [N].
    output_error, output_norm: diagonals of (W−Ŵ)H(W−Ŵ)ᵀ and WHWᵀ, fp64 [N]; None without a statistic.
    notes: what did not go the plain way, as (what, why).
    """

    scheme: Scheme
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    squared_error: torch.Tensor
    squared_norm: torch.Tensor
    output_error: torch.Tensor | None = None
    output_norm: torch.Tensor | None = None
    notes: tuple[tuple[str, str], ...] = ()

    @property
    def decoded(self) -> torch.Tensor:
        """Ŵ fp32 [N, K]."""
        return decode_codes(self.codes, self.scales, self.zeros, self.scheme)


def joined(solutions: Sequence[Solution]) -> Solution:
    """One solution of the rows of several; each note once."""
    if len(solutions) == 1:
        return solutions[0]
    return Solution(
        solutions[0].scheme,
        torch.cat([each.codes for each in solutions]),
        torch.cat([each.scales for each in solutions]),
        _joined([each.zeros for each in solutions]),
        torch.cat([each.squared_error for each in solutions]),
        torch.cat([each.squared_norm for each in solutions]),
        _joined([each.output_error for each in solutions]),
        _joined([each.output_norm for each in solutions]),
        tuple(dict.fromkeys(note for each in solutions for note in each.notes)),
    )


def _joined(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
    tensors = [part for part in parts if part is not None]
    return torch.cat(tensors) if len(tensors) == len(parts) else None


def part_of(grid: Grid, rows: slice) -> Grid:
    """Some rows of a grid."""
    codes, scales, zeros = grid
    return codes[rows], scales[rows], None if zeros is None else zeros[rows]
