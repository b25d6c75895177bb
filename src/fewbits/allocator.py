"""The C library's allocator, told to hand large blocks back to the system as soon as they are free.

glibc raises the size from which it maps a block on its own up to 32 MB as such blocks come and go. Hidden states of a
wide model then lie in its heap, which has holes wherever something lives longer than its neighbours.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# mallopt's numbers.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
# Temporaries of small models stay below: mapping one afresh costs more than what is done with it. Above, products take
# so much longer than the system needs for fresh pages that it does not matter.
MAPPED_BYTES = 8 << 20
# Free memory at the heap's end is kept for the next temporaries.
KEPT_BYTES = 64 << 20
# glibc's own number of blocks that may be mapped at a time.
MAPPED_BLOCKS = 65536


def return_free_memory() -> None:
    """Give the system what this process has freed but not returned; where that is not glibc's, nothing."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def map_large_blocks() -> bool:
    """From here on this process maps blocks of MAPPED_BYTES and more on their own; False where it cannot be told."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(MMAP_THRESHOLD, MAPPED_BYTES)) and bool(mallopt(TRIM_THRESHOLD, KEPT_BYTES))


@contextmanager
def kept_memory() -> Iterator[None]:
    """Within it freed memory of any size is kept for what comes next; behind it the system has it back.

    For loops over the same few large temporaries: the system takes a fifth of the time of a product to give out the
    memory for its result.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    library = ctypes.CDLL(None)
    library.mallopt(MMAP_MAX, 0)
    library.mallopt(TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        library.mallopt(MMAP_MAX, MAPPED_BLOCKS)
        library.mallopt(TRIM_THRESHOLD, KEPT_BYTES)
        library.malloc_trim(0)
