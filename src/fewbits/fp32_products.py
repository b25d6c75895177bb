"""fp32 matrix products at full speed.

torch hands fp32 products to MKL, which runs at a third of its speed on processors of other makers. Allowing bf16 inside
fp32 products sends them to oneDNN instead, which on processors without AMX computes in fp32 all the same. Whether it
does is measured once on this machine; where bits would really be lost, products stay where they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from fewbits import repeatable  # noqa: F401  (before the first product)

PROBE_WIDTH = 384
# Sums of PROBE_WIDTH fp32 products err by less; a single rounding to bf16 errs by a thousand times more.
PROBE_ERROR = 2e-6


@contextmanager
def fast_fp32() -> Iterator[None]:
    """Within it, fp32 products on the CPU take the faster of the paths that keep fp32's accuracy."""
    if not _onednn_is_exact():
        yield
        return
    settings = _onednn_settings()
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


@cache
def _onednn_is_exact() -> bool:
    settings = _onednn_settings()
    if settings is None or not torch._C._has_mkldnn or not hasattr(settings, "fp32_precision"):
        return False
    generator = torch.Generator().manual_seed(0)
    left, right = torch.rand((2, PROBE_WIDTH, PROBE_WIDTH), generator=generator)
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "bf16"
        product = left @ right
        summed = torch.zeros_like(left).addmm_(left.T, right)
    except RuntimeError:
        return False
    finally:
        settings.fp32_precision = before
    return _close(product, left.double() @ right.double()) and _close(summed, left.double().T @ right.double())


def _onednn_settings() -> Any:
    return getattr(torch.backends.mkldnn, "matmul", None)


def _close(product: torch.Tensor, exact: torch.Tensor) -> bool:
    return float(((product.double() - exact) / exact).abs().max()) < PROBE_ERROR
