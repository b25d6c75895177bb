"""Products with weights in the calibrated passes: the same bits whatever the number of threads.

PyTorch's are so on most processors. On those with matrix units, where they are not, our own kernel multiplies.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, cast

import torch
from torch.nn import functional

from fewbits.kernels.matrix_rows_run import PairRows, fits

__all__ = ["KeptWeight", "fits", "linear", "product"]


class KeptWeight:
    """A weight [out, in] and a bias [out], arranged for products with them when the first is made."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    @cached_property
    def forth(self) -> PairRows:
        """What multiplies inputs."""
        return PairRows(self.weight, self.bias)

    @cached_property
    def back(self) -> PairRows:
        """What multiplies gradients by outputs."""
        return PairRows(self.weight.T, None)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, kept: KeptWeight | None = None
) -> torch.Tensor:
    """x · weightᵀ + bias [..., out], differentiable by x.

    Args:
        x: [..., in]. weight: [out, in]. bias: [out].
        kept: both, of those who call this with them again.
    """
    if not fits(x, weight):
        return functional.linear(x, weight, bias)
    kept = KeptWeight(weight, bias) if kept is None else kept
    if torch.is_grad_enabled() and x.requires_grad:
        return cast(torch.Tensor, cast(Any, _Linear).apply(x, kept))
    return _multiply(x, kept.forth)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left · right [rows, columns] of matrices."""
    return linear(left, right.T) if fits(left, right.T) else left @ right


def _multiply(x: torch.Tensor, by: PairRows) -> torch.Tensor:
    products = by(x.reshape(-1, x.shape[-1]))
    return products.view(*x.shape[:-1], products.shape[1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: torch.Tensor, kept: KeptWeight) -> torch.Tensor:
        context.kept = kept
        return _multiply(x, kept.forth)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,), kept = gradients, context.kept
        by_x = _multiply(gradient, kept.back) if fits(gradient, kept.weight.T) else gradient @ kept.weight
        return by_x, None
