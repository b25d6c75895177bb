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
        # By dtype: making the steps of one token anew takes a third as long as a small layer's product.
        self._one_token: dict[torch.dtype, tuple[Program, Steps]] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[0]
        out = torch.empty((tokens, self._out), dtype=x.dtype)
        if tokens == 0:
            return out
        x = x.contiguous()
        # Taken out while it runs: another thread that calls this layer makes its own.
        made = self._one_token.pop(x.dtype, None) if tokens == 1 else None
        if made is None:
            steps = self.steps(x, out)
            program = Program(steps.blocks)
        else:
            program, steps = made
            program.place(0, steps.x_at, x.data_ptr())
            program.place(-1, steps.out_at, out.data_ptr())
        program.run(team_size(tokens * self._out * self._in))
        if tokens == 1:
            self._one_token[x.dtype] = program, steps
        return out

    @abstractmethod
    def steps(self, x: torch.Tensor, out: torch.Tensor) -> Steps:
        """What makes `out` [tokens, out] of contiguous `x` [tokens, in]."""
