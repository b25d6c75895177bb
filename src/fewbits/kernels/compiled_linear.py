"""A linear that is compiled from end to end, called on its own: its steps as a program of their own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from threading import get_ident

import torch

from fewbits.kernels.scratch import shared_buffer
from fewbits.kernels.spec import Steps
from fewbits.kernels.team import Places, Program, team_size


class _Call:
    """The program of one call, and of the next ones of as many tokens, whose numbers lie elsewhere.

    Making the steps anew takes longer than a small layer's product.
    """

    def __init__(self, steps: Steps, x: torch.Tensor, out: torch.Tensor) -> None:
        self.tokens, self.program = len(x), Program(steps.blocks)
        self._buffers = steps.buffers
        # A call's buffers may be alike: each has a purpose of its own.
        self._kinds = [(("call", n), buffer.shape, buffer.dtype) for n, buffer in enumerate(steps.buffers)]
        self._spans = [(memory.data_ptr(), memory.nbytes) for memory in (x, out, *steps.buffers)]
        self._places: list[Places] = []
        self._thread = 0

    def move(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Have it multiply other numbers, in buffers of the thread that asks for it."""
        moved: tuple[torch.Tensor, ...] = (x, out)
        thread = get_ident()
        if not self._places:
            self._places = [self.program.places(*span) for span in self._spans]
        if self._thread != thread:
            self._thread, self._buffers = thread, tuple(shared_buffer(*kind) for kind in self._kinds)
            moved += self._buffers
        for memory, places in zip(moved, self._places, strict=False):
            self.program.put(places, memory.data_ptr())

    def end(self) -> None:
        """Let go of buffers of its own."""
        if self._thread == 0:
            self._buffers = ()


class CompiledLinear(ABC):
    """y = x Ŵᵀ + b for activations [tokens, in]."""

    def __init__(self, out_features: int, in_features: int) -> None:
        self._out, self._in = out_features, in_features
        # The last call, by dtype.
        self._calls: dict[torch.dtype, _Call] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[0]
        out = torch.empty((tokens, self._out), dtype=x.dtype)
        if tokens == 0:
            return out
        x = x.contiguous()
        # Taken out while it runs: another thread that calls this layer makes its own.
        call = self._calls.pop(x.dtype, None)
        if call is not None and call.tokens == tokens:
            call.move(x, out)
        else:
            call = _Call(self.steps(x, out), x, out)
        call.program.run(team_size(tokens * self._out * self._in))
        call.end()
        self._calls[x.dtype] = call
        return out

    @abstractmethod
    def steps(self, x: torch.Tensor, out: torch.Tensor) -> Steps:
        """What makes `out` [tokens, out] of contiguous `x` [tokens, in]."""
