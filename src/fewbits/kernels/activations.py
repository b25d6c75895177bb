"""Activations rounded per token, as "dynamic" schemes do: the portable form, and the oracle of the compiled one."""

from __future__ import annotations

import torch

SMALLEST = torch.finfo(torch.float32).tiny
LIMITS = {"int": 127.0, "float": 448.0}


def round_tokens(x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (fp32 [T, K], on the grid of int8 or float8 e4m3fn) and scales (fp32 [T, 1]) of activations [T, K].

    scale = max|x| / 127 (448), code = x / scale to the nearest, ties to even.
    """
    wide = x.to(torch.float32)
    limit = LIMITS[kind]
    if wide.shape[1] == 0:
        return wide, wide.new_ones(wide.shape[0], 1)
    scales = wide.abs().amax(1, keepdim=True).clamp_min(SMALLEST) / limit
    codes = (wide / scales).clamp(-limit, limit)
    return codes.round() if kind == "int" else codes.to(torch.float8_e4m3fn).to(torch.float32), scales
