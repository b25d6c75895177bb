"""Products with weights in the calibrated passes: the same bits whatever the number of threads.

PyTorch's are so on most processors. On those with matrix units, where they are not, our own kernel multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch.nn import functional

from fewbits.kernels.pair_tiles import PairTiles, fits

__all__ = ["fits", "linear", "product"]


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    turned: Callable[[], torch.Tensor] | None = None,
) -> torch.Tensor:
    """x · weightᵀ + bias [..., out], differentiable by x.

    Args:
        x: [..., in]. weight: [out, in]. bias: [out].
        turned: weightᵀ [in, out], rows side by side, for those who keep it: gradients are multiplied by it.
    """
    if not fits(x, weight):
        return functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        return cast(torch.Tensor, cast(Any, _Linear).apply(x, weight, bias, turned))
    return _multiply(x, weight, bias)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left · right [rows, columns] of matrices."""
    return linear(left, right.T) if fits(left, right.T) else left @ right


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return PairTiles(weight, bias)(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        turned: Callable[[], torch.Tensor] | None,
    ) -> torch.Tensor:
        context.weight, context.turned = weight, turned
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,), weight = gradients, context.weight
        turned = weight.T if context.turned is None else context.turned()
        by_x = _multiply(gradient, turned, None) if fits(gradient, turned) else gradient @ weight
        return by_x, None, None, None
