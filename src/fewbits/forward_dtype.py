"""The dtype of calibration forwards: bf16 where the processor is fast at it, fp32 elsewhere; measured, not guessed."""

from __future__ import annotations

import time
from functools import cache

import torch

from fewbits.errors import KernelError
from fewbits.repeatable import one_thread  # also before the first product

ROWS, WIDTH = 256, 1024
RUNS = 8
# bf16 also halves the memory of weights and states, and the same command has to give the same bytes: a processor has
# to be well on one side.
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
    """bf16, unless products of it take more than twice as long as in fp32 on this device; measured once a process.

    One thread's own processor time is what counts, and the two dtypes take turns: other programs at work, which stop
    a thread or hold up a team of them, must not decide which bytes come out.
    """
    if torch.device(device).type != "cpu":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _times_slower() < TIMES_SLOWER else torch.float32


def _times_slower() -> float:
    """How many times as long as in fp32 a product takes in bf16: the best of several of each."""
    operands = {
        dtype: (torch.ones(ROWS, WIDTH, dtype=dtype), torch.ones(WIDTH, WIDTH, dtype=dtype))
        for dtype in (torch.bfloat16, torch.float32)
    }
    best = dict.fromkeys(operands, float("inf"))
    with one_thread():
        for _ in range(RUNS + 1):  # the first one also sets up the library's own kernels
            for dtype, (rows, weight) in operands.items():
                began = time.thread_time()
                torch.nn.functional.linear(rows, weight)
                best[dtype] = min(best[dtype], time.thread_time() - began)
    return best[torch.bfloat16] / best[torch.float32]
