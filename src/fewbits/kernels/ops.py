"""The quantized linear as a PyTorch operator, so that compiled and exported graphs can hold it.

Eager calls of a layer need none of an operator's machinery and go to `runs_of` straight.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from fewbits.kernels.choose import choose
from fewbits.kernels.spec import LinearSpec, LinearWeight, Run, machine_of
from fewbits.schemes import Scheme

# Above this, no kernel changes with the number of tokens.
MANY_TOKENS = 1024

# By number of tokens and dtype of the activations, and by name of the kernel.
Runs = dict[tuple[int, torch.dtype] | str, Run]
# What kernels prepared from a tensor of codes: gone with the tensor, never saved or copied.
_prepared: Any = WeakIdKeyDictionary()


def runs_of(codes: torch.Tensor) -> Runs:
    """What was prepared from these codes."""
    runs: Runs = _prepared.setdefault(codes, {})
    return runs


def prepare(runs: Runs, key: tuple[int, torch.dtype], weight: LinearWeight, bias: torch.Tensor | None) -> Run:
    """Choose a kernel for a number of tokens (MANY_TOKENS stands for all above) and make the linear ready."""
    tokens, dtype = key
    device = weight.codes.device
    spec = LinearSpec(
        weight.scheme, weight.shape[1], weight.shape[0], tokens, dtype, device.type, machine_of(device)
    )  # fmt: skip
    kernel = choose(spec)
    # Several numbers of tokens share what one kernel prepared.
    if kernel.name not in runs:
        # A tensor of their own on the same memory: runs that held the key of `_prepared` would keep it for ever.
        runs[kernel.name] = kernel.prepare(replace(weight, codes=weight.codes.detach()), bias)
    runs[key] = runs[kernel.name]
    return runs[key]


@torch.library.custom_op("fewbits::linear", mutates_args=())
def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    bias: torch.Tensor | None,
    in_features: int,
    kind: str,
    bits: int,
    symmetric: bool,
    group_size: int,
    activations: bool,
) -> torch.Tensor:
    """x Ŵᵀ + b of activations [..., in]; what a scheme says comes in parts, as operators take no objects."""
    weight = _weight(codes, scales, zero_points, in_features, kind, bits, symmetric, group_size, activations)
    rows = x.reshape(-1, in_features)
    key = (min(rows.shape[0], MANY_TOKENS), x.dtype)
    runs = runs_of(codes)
    run = runs.get(key) or prepare(runs, key, weight, bias)
    return run(rows).view(*x.shape[:-1], weight.shape[0])


def _weight(
    codes: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None,
    in_features: int, kind: Any, bits: int, symmetric: bool, group_size: int, activations: bool,
) -> LinearWeight:  # fmt: skip
    scheme = Scheme(kind, bits, symmetric, group_size, "dynamic" if activations else None)
    return LinearWeight(codes, scales, zero_points, (codes.shape[0], in_features), scheme)


@linear.register_fake
def _(x: torch.Tensor, codes: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, codes, scales, zero_points, _, *ctx.numbers = inputs
    ctx.save_for_backward(codes, scales, zero_points)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The activations' gradient, as if they were not rounded. The quantized weight has none."""
    weight = _weight(*ctx.saved_tensors, *ctx.numbers)
    return ((gradient.to(torch.float32) @ weight.decoded()).to(gradient.dtype), *[None] * 10)


linear.register_autograd(_backward, setup_context=_save)
