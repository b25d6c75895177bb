"""The dtype of calibration forwards: bf16 where the processor is fast at it, fp32 elsewhere; measured, not guessed."""

from __future__ import annotations

import time
from functools import cache

import torch

from fewbits import repeatable  # noqa: F401  (before the first product)
from fewbits.errors import KernelError

ROWS, WIDTH = 256, 1024
RUNS = 3
# bf16 also halves the memory of weights and states, and the measure must not tip over on a busy machine: the same
# command has to give the same bytes.
TIMES_SLOWER = 2.0


def require_device(device: str) -> None:
    """Refuse a device that torch does not know or that is not there.

    Raises:
        KernelError: calibration cannot run on it.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise KernelError(f"{device!r} is no device.", "use cpu or cuda") from error
    if kind not in ("cpu", "cuda"):
        raise KernelError(f"Calibration does not run on {device!r}.", "use cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise KernelError(
            f"{device} is not available: torch {torch.__version__} finds no CUDA device.", "use --device cpu"
        )


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
