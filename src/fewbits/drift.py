"""Drift: how far the inputs of linears have moved from the original model's, by what was quantized before them.

D = Σ wₜ (x°ₜ − xₜ) xₜᵀ, x° the input in the original model and x in the one whose earlier linears are quantized. With
it and H the outputs W x° can be aimed at, in place of W x (`solvers/drifted.py`). All that is asked of D is W D. Where
a linear has fewer outputs than inputs, it is made of the original's outputs y° = W x°, as Σ wₜ y°ₜ xₜᵀ − W H, which is
less work than D itself.
Source: Li et al. 2025, arXiv 2504.02692 (GPTAQ).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fewbits.kernels.cross_tiles import CrossTiles
from fewbits.kernels.gram_tiles import fits

# Rows of sums that are multiplied at a time: temporaries stay small.
PANEL = 512


@dataclass(frozen=True)
class Drift:
    """D [in, in], or with `of_outputs` W D [out, in] of the weights that it was measured for; fp32."""

    matrix: torch.Tensor
    of_outputs: bool = False

    def to(self, device: torch.device | str) -> Drift:
        """The same on another device."""
        return replace(self, matrix=self.matrix.to(device))

    def of_rows(self, rows: torch.Tensor) -> Drift:
        """That of some rows of the weights."""
        return replace(self, matrix=self.matrix[rows]) if self.of_outputs else self


class DriftAccumulator:
    """Adds up Σ wₜ yₜ xₜᵀ, fp32 [height, width], some tokens at a time, always in the same order of operations."""

    def __init__(self, height: int, width: int, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self._sums = torch.zeros(height, width, device=device)
        self._tiles: CrossTiles | None = None

    def add(self, left: torch.Tensor, inputs: torch.Tensor, weights: torch.Tensor | None) -> None:
        """Add tokens.

        Args:
            left, inputs: y and x, [..., height] and [..., width] of one dtype: y is x° − x for D, and y° for W D.
            weights: fp32, one number a row; 1 if None.
        """
        height, width = self._sums.shape
        y, x = left.reshape(-1, height), inputs.reshape(-1, width)
        self.tokens += len(x)
        if fits(y, x):
            self._tiles = self._tiles or CrossTiles(self._sums)
            self._tiles.add(y, x, None if weights is None else weights.double().sqrt().float())
            return
        y, x = y.float(), x.float()
        y = y if weights is None else y * weights[:, None]
        for start in range(0, height, PANEL):
            self._sums[start : start + PANEL] += y[:, start : start + PANEL].T @ x

    def subtract(self, columns: slice, sums: torch.Tensor) -> None:
        """Take columns of sums off that were added up elsewhere."""
        self._sums[:, columns] -= sums

    def finish(self, tokens: int) -> torch.Tensor | None:
        """The sums as `tokens` tokens would have them, from the part that was added; None from nothing."""
        self._tiles = None
        return self._sums.mul_(tokens / self.tokens) if self.tokens else None
