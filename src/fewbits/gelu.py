"""GELU (by tanh) on fewbits' own kernel, forward and backward: torch's takes several times as long in bf16.

As with norms, no module is known by name: one that has no parameters is tried on numbers. Results stay within bf16's
rounding of what they were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from fewbits.kernels.lanes import HAS_BF16

# Numbers that a module is tried on.
TRIED = torch.linspace(-9.0, 9.0, 65)


def use_own_gelu(model: nn.Module) -> int:
    """Run the model's GELUs here where bf16 comes; says how many modules that are."""
    if not HAS_BF16:
        return 0
    count = 0
    for module in model.modules():
        if _is_gelu(module):
            module.forward = _Forward(module.forward)
            count += 1
    return count


def _is_gelu(module: nn.Module) -> bool:
    if [*module.parameters(), *module.children(), *module.buffers()]:
        return False
    try:
        with torch.no_grad():
            found = module(TRIED)
    except Exception:  # noqa: BLE001 - whatever it is, it does not take one tensor
        return False
    expected = functional.gelu(TRIED, approximate="tanh")
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        return False
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


class _Forward:
    """Stands in for a GELU's own forward."""

    def __init__(self, otherwise: Callable[..., Any]) -> None:
        self._otherwise = otherwise

    def __call__(self, x: torch.Tensor) -> Any:
        if x.dtype != torch.bfloat16 or x.device.type != "cpu":
            return self._otherwise(x)
        return cast(Any, _Gelu).apply(x)


class _Gelu(torch.autograd.Function):
    """x → like x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        from fewbits.kernels.compiling import as_numpy
        from fewbits.kernels.gelu_rows import gelu

        numbers = x.detach().contiguous()
        out = torch.empty_like(numbers)
        gelu(as_numpy(numbers.view(-1)), as_numpy(out.view(-1)))
        ctx.save_for_backward(x)
        return out

    @staticmethod
    def backward(ctx: Any, *pulls: torch.Tensor) -> torch.Tensor:
        from fewbits.kernels.compiling import as_numpy
        from fewbits.kernels.gelu_rows import pull_back

        (x,) = ctx.saved_tensors
        numbers, pulled = (each.detach().contiguous().view(-1) for each in (x, pulls[0]))
        out = torch.empty(x.shape, dtype=x.dtype)
        pull_back(as_numpy(numbers), as_numpy(pulled), as_numpy(out.view(-1)))
        return out
