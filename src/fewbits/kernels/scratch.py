"""Buffers that are used again: fresh memory costs more in page faults than it takes to fill."""

from __future__ import annotations

import threading

import torch

_kept = threading.local()


def scratch(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """A buffer [rows, columns] of this thread, holding anything; the next call with this dtype takes it back."""
    buffers: dict[torch.dtype, torch.Tensor] = _kept.__dict__.setdefault("buffers", {})
    if dtype not in buffers or buffers[dtype].numel() < rows * columns:
        buffers[dtype] = torch.empty(rows * columns, dtype=dtype)
    return buffers[dtype][: rows * columns].view(rows, columns)
