"""Buffers that are used again: fresh memory costs more in page faults than it takes to fill."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from weakref import WeakValueDictionary

import torch

_kept = threading.local()
_Key = tuple[int, Hashable, tuple[int, ...], torch.dtype]
_shared: WeakValueDictionary[_Key, torch.Tensor] = WeakValueDictionary()


def shared_buffer(purpose: Hashable, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A buffer holding anything: the same one for all who ask for this in this thread, as long as one of them keeps it.

    For what is done with before another of them begins.
    """
    key = threading.get_ident(), purpose, tuple(shape), dtype
    found = _shared.get(key)
    if found is None:
        found = _shared[key] = torch.empty(shape, dtype=dtype)
    return found


def scratch(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """A buffer [rows, columns] of this thread, holding anything; the next call with this dtype takes it back."""
    buffers: dict[torch.dtype, torch.Tensor] = _kept.__dict__.setdefault("buffers", {})
    if dtype not in buffers or buffers[dtype].numel() < rows * columns:
        buffers[dtype] = torch.empty(rows * columns, dtype=dtype)
    return buffers[dtype][: rows * columns].view(rows, columns)
