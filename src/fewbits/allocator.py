"""The C library's allocator, told which blocks to keep for what comes next and which to hand back to the system.

The system takes 1.1 µs to give out a page, longer than a processor needs to multiply what it will hold: 2048 tokens of
2048 channels are 2048 pages. glibc itself maps blocks from a size on that it raises as such blocks are freed, to 32 MB.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# mallopt's numbers.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
# Blocks from this size on are mapped on their own, and so much free memory is kept at the heap's end: what a block's
# forward and backward need again for every micro-batch. With 8 MB and 64 MB importance and the pass took 1.08 times as
# long for Gemma 3 270M, and 1.13 times for a model of width 3072.
MAPPED_BYTES, KEPT_BYTES = 32 << 20, 128 << 20
# The same for steps whose temporaries are few, and would leave holes in the heap when memory is needed most.
FEW_MAPPED_BYTES, FEW_KEPT_BYTES = 8 << 20, 64 << 20


def return_free_memory() -> None:
    """Give the system what this process has freed but not returned; where that is not glibc's, nothing."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def keep_blocks() -> bool:
    """From here on this process keeps blocks below MAPPED_BYTES in its heap; False where it cannot be told."""
    return _map_from(MAPPED_BYTES, KEPT_BYTES)


@contextmanager
def returned_blocks() -> Iterator[None]:
    """Within it blocks of FEW_MAPPED_BYTES and more go back to the system as soon as they are free."""
    _map_from(FEW_MAPPED_BYTES, FEW_KEPT_BYTES)
    try:
        yield
    finally:
        _map_from(MAPPED_BYTES, KEPT_BYTES)


def _map_from(mapped: int, kept: int) -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(MMAP_THRESHOLD, mapped)) and bool(mallopt(TRIM_THRESHOLD, kept))
