"""Rounding on whatever is there: the compiled kernels, or the portable form where Numba cannot be imported."""

from __future__ import annotations

import torch

from fewbits import numerics
from fewbits.numerics import Rounded
from fewbits.packing import decode_codes, pack_rows
from fewbits.schemes import Scheme
from fewbits.search import Search

try:
    from fewbits.kernels import channels, groups

    WHY_NOT_COMPILED: str | None = None
except ImportError as error:
    WHY_NOT_COMPILED = f"Numba is not usable: {error}"


def round_rows(
    weight: torch.Tensor,
    scheme: Scheme,
    search: Search,
    *,
    scale_dtype: torch.dtype | None = None,
    importance: torch.Tensor | None = None,
    compiled: bool = True,
) -> Rounded:
    """Round rows of a weight [R, K] to a scheme's grid.

    Codes come as files and kernels hold them: int8, float8_e4m3fn, or below 8 bits packed int32 words.

    Args:
        scale_dtype: what scales are stored in; the weight's dtype if None.
        importance: fp32 [K], weight of each input's error where scales are searched; all alike if None.
        compiled: False forces the portable form.
    """
    scale_dtype = scale_dtype or weight.dtype
    compiled = compiled and WHY_NOT_COMPILED is None and weight.device.type == "cpu"
    scale_dtype = scale_dtype or weight.dtype
    by_channel = channels if compiled else numerics
    if scheme.kind == "float":
        rounded: Rounded = by_channel.round_channel_fp8(weight, scale_dtype)
        return rounded
    if scheme.bits == 8 and scheme.symmetric and scheme.group_size == 0:
        rounded = by_channel.round_channel_int8(weight, scale_dtype)
        return rounded
    if compiled:
        return groups.round_groups(weight, scheme, scale_dtype, search, importance, packed=scheme.bits < 8)
    rounded = numerics.round_groups(weight, scheme, scale_dtype, search, importance)
    if scheme.bits == 8:
        return rounded
    return Rounded(
        pack_rows(rounded.codes, scheme.bits), rounded.scales, rounded.zeros,
        rounded.squared_error, rounded.squared_norm, rounded.nonfinite,
    )  # fmt: skip


def rounded_values(
    weight: torch.Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    search: Search,
    importance: torch.Tensor | None,
) -> torch.Tensor:
    """What the codes of fp32 rows [R, K] would decode to, fp32: `round_rows` without packing."""
    if scheme.kind == "int" and not (scheme.bits == 8 and scheme.symmetric and scheme.group_size == 0):
        compiled = WHY_NOT_COMPILED is None and weight.device.type == "cpu"
        rounded = (groups if compiled else numerics).round_groups(weight, scheme, scale_dtype, search, importance)
        return decode_codes(rounded.codes, rounded.scales, rounded.zeros, scheme)
    rounded = round_rows(weight, scheme, search, scale_dtype=scale_dtype)
    return rounded.codes.to(torch.float32).mul_(rounded.scales.to(torch.float32))


def search_grid(
    weight: torch.Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    search: Search,
    importance: torch.Tensor | None,
    *,
    compiled: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The grid of least weighted error for each group of fp32 rows [R, K]: scales [R, G], zero points uint8 [R, G]."""
    compiled = compiled and WHY_NOT_COMPILED is None and weight.device.type == "cpu"
    rounded = (groups if compiled else numerics).round_groups(weight, scheme, scale_dtype, search, importance)
    if rounded.zeros is None:
        return rounded.scales, torch.full(rounded.scales.shape, scheme.midpoint, dtype=torch.uint8)
    return rounded.scales, rounded.zeros
