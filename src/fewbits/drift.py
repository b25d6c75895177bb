"""Drift: how far the inputs of linears have moved from the original model's, by what was quantized before them.

D = Σ wₜ (x°ₜ − xₜ) xₜᵀ, x° the input in the original model and x in the one whose earlier linears are quantized. With
it and H the outputs W x° can be aimed at, in place of W x (`solvers/drifted.py`).
Source: Li et al. 2025, arXiv 2504.02692 (GPTAQ).
"""

from __future__ import annotations

import torch

# Rows of D that are multiplied at a time: temporaries stay small.
PANEL = 512


class DriftAccumulator:
    """Adds up the D of one input, some tokens at a time, always in the same order of operations."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self._tokens = 0
        self._sum = torch.zeros(width, width, device=device)

    def add(self, original: torch.Tensor, inputs: torch.Tensor, weights: torch.Tensor | None) -> None:
        """Add tokens.

        Args:
            original, inputs: x° and x, [..., width] of one dtype. weights: fp32, one number a row; 1 if None.
        """
        width = len(self._sum)
        x = inputs.reshape(-1, width)
        moved = original.reshape(-1, width) - x
        if weights is not None:
            moved *= weights.to(x.dtype)[:, None]
        self._tokens += len(x)
        for start in range(0, width, PANEL):
            self._sum[start : start + PANEL] += moved[:, start : start + PANEL].T @ x

    def finish(self, tokens: int) -> torch.Tensor | None:
        """D as `tokens` tokens would have it, fp32 [width, width], from the part that was added; None from nothing."""
        return self._sum.mul_(tokens / self._tokens) if self._tokens else None
