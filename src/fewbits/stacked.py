"""Stacked: linears that share their input (q, k, v; gate, up) as one product, for one call in place of three.

Their tensors are laid under one another in one piece of memory, of which the layers then hold their rows: nothing is
there twice, and the layers work as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fewbits.kernels.choose import choose
from fewbits.kernels.spec import LinearSpec, LinearWeight, machine_of
from fewbits.linear import QuantLinear

Product = Callable[[torch.Tensor], torch.Tensor]
BUFFERS = ("codes", "scales", "zero_points", "bias")


def stacked(linears: Sequence[nn.Module], dtype: torch.dtype) -> Product | None:
    """One product for all their outputs in order, for one token at a time; None if they are not alike."""
    alike = [linear for linear in linears if isinstance(linear, QuantLinear)]
    first = alike[0] if alike else None
    if first is None or len(alike) < len(linears) or not all(_alike(first, other) for other in alike):
        return None
    whole: dict[str, torch.Tensor | None] = {name: _one_piece(alike, name) for name in BUFFERS}
    codes, scales = whole["codes"], whole["scales"]
    assert codes is not None and scales is not None
    shape = (sum(linear.out_features for linear in alike), first.in_features)
    weight = LinearWeight(codes, scales, whole["zero_points"], shape, first.scheme)
    spec = LinearSpec(first.scheme, shape[1], shape[0], 1, dtype, codes.device.type, machine_of(codes.device))
    return choose(spec).prepare(weight, whole["bias"])


def _alike(first: QuantLinear, other: QuantLinear) -> bool:
    same = (first.scheme, first.in_features) == (other.scheme, other.in_features)
    kinds = [[None if t is None else (t.dtype, t.shape[1:]) for t in _buffers(linear)] for linear in (first, other)]
    return same and other.input_order is None and kinds[0] == kinds[1]


def _buffers(linear: QuantLinear) -> tuple[torch.Tensor | None, ...]:
    return tuple(getattr(linear, name) for name in BUFFERS)


def _one_piece(linears: Sequence[Any], name: str) -> torch.Tensor | None:
    """The buffers under one another; each layer's becomes its rows of that."""
    parts = [getattr(linear, name) for linear in linears]
    if parts[0] is None:
        return None
    base = parts[0]._base
    if base is not None and all(part._base is base for part in parts):
        found: torch.Tensor = base
        return found
    # In inference mode, views don't know what they are views of, and every call would copy the weights anew.
    with torch.inference_mode(False):
        whole = torch.cat(parts)
        for linear, part in zip(linears, torch.split(whole, [len(part) for part in parts]), strict=True):
            setattr(linear, name, part)
            linear.forget_prepared()
    return whole
