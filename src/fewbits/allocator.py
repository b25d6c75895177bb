"""The C library's allocator, told to hand large blocks back to the system as soon as they are free.

glibc raises the size from which it maps a block on its own up to 32 MB as such blocks come and go. Hidden states of a
wide model then lie in its heap, which has holes wherever something lives longer than its neighbours.
"""

from __future__ import annotations

import ctypes
import platform

# mallopt's numbers for the two.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
# Temporaries of small models stay below: mapping one afresh costs more than what is done with it. Above, products take
# so much longer than the system needs for fresh pages that it does not matter.
MAPPED_BYTES = 8 << 20
# Free memory at the heap's end is kept for the next temporaries.
KEPT_BYTES = 64 << 20


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
