"""A linear that is compiled from end to end, called on its own: its steps as a program of their own."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from fewbits.kernels.spec import Steps
from fewbits.kernels.team import Program, team_size

# Programs of calls with so many tokens are kept for the next: making the steps anew takes longer than a small layer's
# product, and their buffers are small.
KEPT_TOKENS = 16


class CompiledLinear(ABC):
    """y = x Ŵᵀ + b for activations [tokens, in]."""

    def __init__(self, out_features: int, in_features: int) -> None:
        self._out, self._in = out_features, in_features
        # Of the last call, by dtype.
        self._kept_programs: dict[torch.dtype, tuple[int, Program, Steps]] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[0]
        out = torch.empty((tokens, self._out), dtype=x.dtype)
        if tokens == 0:
            return out
        x = x.contiguous()
        # Taken out while it runs: another thread that calls this layer makes its own.
        kept = self._kept_programs.pop(x.dtype, None) if tokens <= KEPT_TOKENS else None
        if kept is not None and kept[0] == tokens:
            _, program, steps = kept
            program.place(0, steps.x_at, x.data_ptr())
            program.place(-1, steps.out_at, out.data_ptr())
        else:
            steps = self.steps(x, out)
            program = Program(steps.blocks)
        program.run(team_size(tokens * self._out * self._in))
        if tokens <= KEPT_TOKENS:
            self._kept_programs[x.dtype] = tokens, program, steps
        return out

    @abstractmethod
    def steps(self, x: torch.Tensor, out: torch.Tensor) -> Steps:
        """What makes `out` [tokens, out] of contiguous `x` [tokens, in]."""
