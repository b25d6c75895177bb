"""A linear that is compiled from end to end, called on its own: its steps as a program of their own."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from fewbits.kernels.spec import Steps
from fewbits.kernels.team import Program, team_size


class CompiledLinear(ABC):
    """y = x Ŵᵀ + b for activations [tokens, in]."""

    def __init__(self, out_features: int, in_features: int) -> None:
        self._out, self._in = out_features, in_features

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty((x.shape[0], self._out), dtype=x.dtype)
        if out.numel():
            steps = self.steps(x.contiguous(), out)
            Program(steps.blocks).run(team_size(out.numel() * self._in))
        return out

    @abstractmethod
    def steps(self, x: torch.Tensor, out: torch.Tensor) -> Steps:
        """What makes `out` [tokens, out] of contiguous `x` [tokens, in]."""
