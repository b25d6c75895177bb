"""Root mean square norms, and lengths of rows, on fewbits' own kernels: one pass forward and one back for about ten.

No model is known by name. A module that has one vector and nothing else is tried on numbers, and stands for such a norm
if it does what one does, with its weight w or with 1 + w. Results stay within bf16's rounding of what they were.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from fewbits.kernels.lanes import HAS_BF16

# Rows that a module is tried on, the last ones so small that eps decides.
TRIED_ROWS = 6
SMALL = 1e-3


@dataclass(frozen=True)
class Norm:
    """y = x / √(mean x² + eps) · (w + offset)."""

    parameter: str
    eps: float
    offset: float

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """By torch, in the dtype that comes."""
        inverse: torch.Tensor = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x * inverse * (weight + self.offset)


def use_own_norms(model: nn.Module) -> int:
    """Run the model's root mean square norms here where bf16 comes; says how many there are."""
    if not HAS_BF16:
        return 0
    count = 0
    for module in model.modules():
        norm = _norm_of(module)
        if norm is not None:
            module.forward = _Forward(module, norm, module.forward)
            count += 1
    return count


def _norm_of(module: nn.Module) -> Norm | None:
    parameters = list(module.named_parameters())
    if len(parameters) != 1 or parameters[0][1].dim() != 1 or [*module.children(), *module.buffers()]:
        return None
    name, weight = parameters[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, TRIED_ROWS // 2, len(weight), generator=generator)
    x[-1] *= SMALL
    tried = copy.deepcopy(module).to_empty(device="cpu").float()
    with torch.no_grad():
        w = tried.get_parameter(name).copy_(torch.randn(len(weight), generator=generator))
        try:
            y = tried(x)
        except (TypeError, RuntimeError):  # it wants something else than rows
            return None
        numbers = {value for value in vars(module).values() if isinstance(value, float)}
        for norm in (Norm(name, eps, offset) for eps in sorted(numbers) for offset in (0.0, 1.0)):
            if isinstance(y, torch.Tensor) and y.shape == x.shape and torch.allclose(y, norm(x, w), 1e-4, 1e-6):
                return norm
    return None


def row_lengths(rows: torch.Tensor) -> torch.Tensor:
    """Euclidean norms of rows [tokens, width], fp32 [tokens]."""
    if not HAS_BF16 or rows.dtype != torch.bfloat16 or rows.device.type != "cpu" or not rows.is_contiguous():
        found: torch.Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
        return found
    from fewbits.kernels.compiling import as_numpy
    from fewbits.kernels.norm_rows import lengths

    return torch.from_numpy(lengths(as_numpy(rows)))


class _Forward:
    """Stands in for a norm's own forward."""

    def __init__(self, module: nn.Module, norm: Norm, otherwise: Callable[..., Any]) -> None:
        self._module, self._norm, self._otherwise = module, norm, otherwise

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        weight = getattr(self._module, self._norm.parameter)
        known = not args and not kwargs and not weight.requires_grad
        if not known or x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.shape[-1:] != weight.shape:
            return self._otherwise(x, *args, **kwargs)
        return cast(Any, _RootMeanSquare).apply(x, weight.float() + self._norm.offset, self._norm.eps)


class _RootMeanSquare(torch.autograd.Function):
    """(x [..., width], weight fp32 [width], eps) → like x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        from fewbits.kernels.compiling import as_numpy
        from fewbits.kernels.norm_rows import normalize

        rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
        out, inverses = torch.empty_like(rows), torch.empty(len(rows))
        normalize(as_numpy(rows), weight.numpy(), eps, as_numpy(out), inverses.numpy())
        ctx.save_for_backward(x, weight, inverses)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *pulls: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from fewbits.kernels.compiling import as_numpy
        from fewbits.kernels.norm_rows import pull_back

        x, weight, inverses = ctx.saved_tensors
        rows, pulled = (each.detach().reshape(-1, x.shape[-1]).contiguous() for each in (x, pulls[0]))
        out = torch.empty_like(rows)
        pull_back(as_numpy(rows), weight.numpy(), inverses.numpy(), as_numpy(pulled), as_numpy(out))
        return out.view(x.shape), None, None
