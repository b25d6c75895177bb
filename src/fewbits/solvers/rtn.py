"""Round to nearest: each weight goes to the nearest point of its channel's or group's grid; no calibration data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewbits.methods import QuantMethod
from fewbits.numerics import Rounded, Search, round_channel_fp8, round_channel_int8, round_groups
from fewbits.packing import seal
from fewbits.tensors import QuantizedWeight

# docs/methods/int4.md has the measurements behind these.
DATA_FREE_SEARCH = Search(steps=21, narrowest=0.8, power=4)


@dataclass(frozen=True)
class QuantizedTile:
    """Rows of a weight, quantized, with what they lost."""

    weight: QuantizedWeight
    squared_error: float
    squared_norm: float
    nonfinite: bool


def quantize_rows(weight: torch.Tensor, method: QuantMethod) -> QuantizedTile:
    """Round rows of a weight [R, K] by `method`'s scheme; scales are kept in the weight's dtype."""
    rounded = _round(weight, method)
    sealed = seal(rounded.codes, rounded.scales, rounded.zeros, method)
    return QuantizedTile(sealed, rounded.squared_error, rounded.squared_norm, rounded.nonfinite)


def _round(weight: torch.Tensor, method: QuantMethod) -> Rounded:
    scheme = method.scheme
    if scheme.kind == "float":
        return round_channel_fp8(weight, weight.dtype)
    if scheme.bits == 8 and scheme.symmetric and scheme.group_size == 0:
        return round_channel_int8(weight, weight.dtype)
    return round_groups(weight, scheme, weight.dtype, DATA_FREE_SEARCH)
