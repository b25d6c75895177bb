"""Activations rounded per token by compiled code."""

from __future__ import annotations

import torch

from fewbits.kernels import tokens as work
from fewbits.kernels.memory import BFLOAT16, FLOAT16, FLOAT32
from fewbits.kernels.team import Work, team_size

STORED = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}


def int8_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes + 128 (uint8 [T, K]) and scales (fp32 [T, 1]) of activations [T, K]."""
    codes = torch.empty(x.shape, dtype=torch.uint8)
    return codes, _rounded(x, "int8", codes)


def fp8_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values on the grid of float8 (bf16 [T, K]) and scales (fp32 [T, 1]) of activations [T, K]."""
    values = torch.empty(x.shape, dtype=torch.bfloat16)
    return values, _rounded(x, "fp8", values)


def _rounded(x: torch.Tensor, name: str, out: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    tokens, columns = x.shape
    scales = torch.empty((tokens, 1))
    _WORK[name].run(tokens, 1, team_size(x.numel()), {
        work.X_AT: x.data_ptr(), work.X_KIND: STORED[x.dtype], work.COLUMNS: columns,
        work.OUT_AT: out.data_ptr(), work.OUT_STRIDE: columns * out.element_size(), work.SCALES_AT: scales.data_ptr(),
    })  # fmt: skip
    return scales


_WORK = {name: Work(work.token_work(name), work.FIELDS, {}) for name in ("int8", "fp8")}
