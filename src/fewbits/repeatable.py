"""The same bits on any number of threads, where libraries would add up in another order on each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import llvmlite.binding as llvm
import torch

# Where matrix units round fp32 products to bf16, MKL makes them, and splits sums among its threads unless it is told
# not to before its first product. Whoever wants another mode sets the variable before.
if llvm.get_host_cpu_features().get("amx-bf16"):
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it, torch runs on one thread: LAPACK's factorizations depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
