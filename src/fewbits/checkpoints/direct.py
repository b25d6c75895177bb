"""Writes past the page cache: a cached write costs more processor time than reading, rounding and hashing together.

Files opened for that take whole blocks of the disk from memory that begins at a block, so bytes go through a buffer
that lies in the file's own alignment. Beginnings and ends that are no whole block are written the usual way; where a
file system knows no such writes, all are.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

# Every disk's blocks divide this, and so do pages of memory.
BLOCK = 4096
# Large enough for the disk's full speed, small enough that what was just hashed is still in the second-level cache.
PIECE_BYTES = 2**20
# macOS refuses to write 2 GiB or more at once, and Linux stops short of it.
LARGEST_WRITE = 2**30

_own = threading.local()


class DirectFile:
    """A second way to write into an open file, whole blocks at a time.

    Args:
        path, descriptor: the file, open for writing, of its full size already.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self._descriptor = descriptor
        self._direct = -1
        if hasattr(os, "O_DIRECT"):
            try:
                self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise

    def close(self) -> None:
        """Close the second way; the file itself stays open."""
        if self._direct >= 0:
            os.close(self._direct)
            self._direct = -1

    def write_at(self, view: memoryview, position: int) -> None:
        """Write all of `view` at `position`, from any thread."""
        end = position + len(view)
        # The first and last whole block.
        start, stop = -(-position // BLOCK) * BLOCK, end // BLOCK * BLOCK
        if self._direct < 0 or start >= stop or not self._write_blocks(view[start - position : stop - position], start):
            return self._write_cached(view, position)
        self._write_cached(view[: start - position], position)
        self._write_cached(view[stop - position :], stop)

    def _write_blocks(self, view: memoryview, position: int) -> bool:
        """Write whole blocks; False if the file system refuses such writes."""
        import numpy as np

        buffer = _aligned_buffer()
        content = np.frombuffer(view, np.uint8)
        for begin in range(0, len(view), PIECE_BYTES):
            piece = content[begin : begin + PIECE_BYTES]
            buffer[: piece.size] = piece
            done = 0
            while done < piece.size:
                try:
                    done += os.pwrite(self._direct, buffer.data[done : piece.size], position + begin + done)
                except OSError as error:
                    # Its blocks are larger than ours, or it only learns at the first write that it cannot.
                    if error.errno != errno.EINVAL:
                        raise
                    return False
        return True

    def _write_cached(self, view: memoryview, position: int) -> None:
        done = 0
        while done < len(view):
            done += os.pwrite(self._descriptor, view[done : done + LARGEST_WRITE], position + done)


def _aligned_buffer() -> np.ndarray[Any, Any]:
    """This thread's buffer, which begins at a page."""
    import numpy as np

    if not hasattr(_own, "buffer"):
        _own.buffer = np.frombuffer(mmap.mmap(-1, PIECE_BYTES), np.uint8)
    buffer: np.ndarray[Any, Any] = _own.buffer
    return buffer
