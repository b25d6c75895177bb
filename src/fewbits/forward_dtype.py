"""The dtype of calibration forwards: bf16 where the processor is fast at it, fp32 elsewhere; measured, not guessed."""

from __future__ import annotations

import time
from functools import cache

import torch

ROWS, WIDTH = 256, 1024
RUNS = 3
# bf16 also halves the memory of weights and states, and the measure must not tip over on a busy machine: the same
# command has to give the same bytes.
TIMES_SLOWER = 2.0


@cache
def forward_dtype(device: str = "cpu") -> torch.dtype:
    """bf16, unless products of it take more than twice as long as in fp32 on this device; measured once a process."""
    if torch.device(device).type != "cpu":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _seconds(torch.bfloat16) < TIMES_SLOWER * _seconds(torch.float32) else torch.float32


def _seconds(dtype: torch.dtype) -> float:
    rows, weight = torch.ones(ROWS, WIDTH, dtype=dtype), torch.ones(WIDTH, WIDTH, dtype=dtype)
    best = float("inf")
    for _ in range(RUNS + 1):  # the first one also sets up the library's own kernels
        began = time.perf_counter()
        torch.nn.functional.linear(rows, weight)
        best = min(best, time.perf_counter() - began)
    return best
