"""Activations rounded per token by compiled code."""

from __future__ import annotations

import torch

from fewbits.kernels import token_rounding as work
from fewbits.kernels.compiling import Array
from fewbits.kernels.memory import BFLOAT16, FLOAT16, FLOAT32
from fewbits.kernels.team import Program, Work, team_size

STORED = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}


def int8_step(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> Array:
    """The step that rounds contiguous activations [T, K] to codes + 128 (uint8 [T, K]) and scales (fp32 [T, 1])."""
    return _rounding("int8", x, codes, scales)


def int8_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes + 128 (uint8 [T, K]) and scales (fp32 [T, 1]) of activations [T, K]."""
    codes, scales = torch.empty(x.shape, dtype=torch.uint8), torch.empty((x.shape[0], 1))
    x = x.contiguous()
    Program([int8_step(x, codes, scales)]).run(team_size(x.numel()))
    return codes, scales


def fp8_step(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> Array:
    """The step that rounds contiguous activations [T, K] to values on the grid of float8 (bf16 [T, K]) and scales."""
    return _rounding("fp8", x, values, scales)


def fp8_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values on the grid of float8 (bf16 [T, K]) and scales (fp32 [T, 1]) of activations [T, K]."""
    values, scales = torch.empty(x.shape, dtype=torch.bfloat16), torch.empty((x.shape[0], 1))
    x = x.contiguous()
    Program([fp8_step(x, values, scales)]).run(team_size(x.numel()))
    return values, scales


def _rounding(name: str, x: torch.Tensor, out: torch.Tensor, scales: torch.Tensor) -> Array:
    tokens, columns = x.shape
    fields = {
        work.X_AT: x.data_ptr(), work.X_KIND: STORED[x.dtype], work.COLUMNS: columns,
        work.OUT_AT: out.data_ptr(), work.SCALES_AT: scales.data_ptr(),
    }  # fmt: skip
    return _WORK[name].step(tokens, fields)


_WORK = {name: Work(work.rounded(), {work.TO_FP8: name == "fp8"}) for name in ("int8", "fp8")}
