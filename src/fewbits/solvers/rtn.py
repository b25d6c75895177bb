"""Round to nearest: each weight goes to the nearest point of its channel's or group's grid; no calibration data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewbits.kernels.rounding import round_rows
from fewbits.methods import QuantMethod
from fewbits.search import DATA_FREE_SEARCH, Search
from fewbits.tensors import QuantizedWeight, seal_packed


@dataclass(frozen=True)
class QuantizedTile:
    """Rows of a weight, quantized, with what they lost."""

    weight: QuantizedWeight
    squared_error: float
    squared_norm: float
    nonfinite: bool


def quantize_rows(
    weight: torch.Tensor,
    method: QuantMethod,
    *,
    search: Search = DATA_FREE_SEARCH,
    scale_dtype: torch.dtype | None = None,
    importance: torch.Tensor | None = None,
) -> QuantizedTile:
    """Round rows of a weight [R, K] by `method`'s scheme.

    Args:
        scale_dtype: what scales are stored in; the weight's dtype if None.
        importance: fp32 [K], weight of each input's error; all alike if None.
    """
    rounded = round_rows(weight, method.scheme, search, scale_dtype=scale_dtype, importance=importance)
    sealed = seal_packed(rounded.codes, rounded.scales, rounded.zeros, (weight.shape[0], weight.shape[1]), method)
    return QuantizedTile(sealed, rounded.squared_error, rounded.squared_norm, rounded.nonfinite)
