"""Write one safetensors file whose size is known beforehand: header first, then each tensor's bytes at their place.

Under a temporary name until it is whole, checked and on the disk.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from fewbits.checkpoints.buffers import bytes_of, contiguous
from fewbits.checkpoints.direct import DirectFile
from fewbits.errors import OutputError
from fewbits.layout import Shard

if TYPE_CHECKING:
    from fewbits.checkpoints.buffers import Content

UNFINISHED_SUFFIX = ".unfinished"
# Bytes that take longer to hash than another thread to wake; and how many writes of a file are under way at most.
WORTH_A_THREAD = 2**18
MOST_WRITES = 4
# What the kernel says where space cannot be set aside; the file is then simply written.
CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)


def output_error(path: Path, error: OSError, needed_bytes: int | None = None) -> OutputError:
    """Say what a failed write means to the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return disk_full(path, needed_bytes, error)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(f"{path} cannot be written: {error.strerror}.", "choose a folder that you may write to")
    return OutputError(f"{path} cannot be written: {error.strerror}.", "check the disk that it is on")


def disk_full(path: Path, needed_bytes: int | None, error: OSError | None = None) -> OutputError:
    """The message for a disk without room; `error` is None where nothing failed yet."""
    needed = "" if needed_bytes is None else f"{needed_bytes:,} bytes needed, "
    reason = "the disk is full" if error is not None else "the disk is too full"
    hint = "free some space"
    if error is not None and error.errno == errno.EDQUOT:
        reason = "your disk quota is used up"
    if error is not None and error.errno == errno.EFBIG:
        reason, hint = "the file would be larger than is allowed here", "raise the limit (ulimit -f)"
    return OutputError(
        f"{path}: {reason}: {needed}{free_bytes(path):,} free.",
        f"{hint} and repeat the command, which goes on where it stopped; or choose another disk",
    )


def free_bytes(path: Path) -> int:
    """Free bytes of the disk that holds `path`, or will hold it."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def sync_folder(folder: Path) -> None:
    """Bring a folder's own entries to the disk, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync folders; their renames are as durable as they get.
        if error.errno not in CANNOT_RESERVE:
            raise
    finally:
        os.close(descriptor)


class ShardWriter:
    """Writes one shard. Different tensors may be written in any order, each from its first byte to its last.

    Bytes are hashed as they come, while another thread writes them. Each tensor may have a thread of its own; the
    interpreter is released meanwhile.
    """

    def __init__(self, folder: Path, shard: Shard) -> None:
        self.shard = shard
        self._final = folder / shard.file
        self._temporary = folder / (shard.file + UNFINISHED_SUFFIX)
        self._sizes = {tensor.name: tensor.nbytes for tensor in shard.tensors}
        self._written = dict.fromkeys(self._sizes, 0)
        self._digests = {name: hashlib.sha256() for name in self._sizes}
        self._writes = ThreadPoolExecutor(MOST_WRITES, thread_name_prefix="fewbits-write")
        self._descriptor = -1
        self._direct: DirectFile | None = None
        try:
            self._descriptor = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            self._reserve()
            self._direct = DirectFile(self._temporary, self._descriptor)
            self._direct.write_at(memoryview(shard.header()), 0)
        except OSError as error:
            self.abort()
            raise output_error(self._final, error, shard.nbytes) from error

    def _reserve(self) -> None:
        """Set the whole file's room aside now, so that a full disk is found before the work and not after it."""
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._descriptor, 0, self.shard.nbytes)
            except OSError as error:
                if error.errno not in CANNOT_RESERVE:
                    raise

    def write(self, name: str, content: Content, byte_offset: int = 0) -> None:
        """Write bytes of a tensor, from `byte_offset` on; all of them in one call, or run by run in order.

        Raises:
            OutputError: the disk is full or fails.
            ValueError: the bytes are not the next ones of a tensor of this shard.
        """
        if name not in self._sizes:
            raise ValueError(f"{self.shard.file} has no tensor {name}")
        view = bytes_of(contiguous(content))
        written, size = self._written[name], self._sizes[name]
        if byte_offset != written:
            raise ValueError(f"{name}: byte {written} of {size} is next, got byte {byte_offset}")
        if written + len(view) > size:
            raise ValueError(f"{name}: {size - written} bytes of {size} are left to write, got {len(view)}")
        assert self._direct is not None
        position = self.shard.offsets[name] + byte_offset
        try:
            if len(view) < WORTH_A_THREAD:
                self._digests[name].update(view)
                self._direct.write_at(view, position)
            else:
                writing = self._writes.submit(self._direct.write_at, view, position)
                self._digests[name].update(view)
                writing.result()
        except OSError as error:
            raise output_error(self._final, error, self.shard.nbytes) from error
        self._written[name] = written + len(view)

    def close(self) -> dict[str, str]:
        """Bring the file to the disk and give it its name; return the SHA-256 of each tensor's bytes.

        Raises:
            OutputError: the disk is full or fails.
            ValueError: some tensor was not written to its end.
        """
        for name, size in self._sizes.items():
            if self._written[name] != size:
                raise ValueError(f"{self.shard.file}: {name} has {self._written[name]} of {size} bytes")
        try:
            os.fsync(self._descriptor)
            self._close_file()
            self._temporary.replace(self._final)
            sync_folder(self._final.parent)
        except OSError as error:
            raise output_error(self._final, error, self.shard.nbytes) from error
        return {name: digest.hexdigest() for name, digest in self._digests.items()}

    def abort(self) -> None:
        """Give the shard up: close and delete the unfinished file. Harmless after `close`."""
        if self._descriptor >= 0:
            self._close_file()
            self._temporary.unlink(missing_ok=True)

    def _close_file(self) -> None:
        self._writes.shutdown()
        if self._direct is not None:
            self._direct.close()
        os.close(self._descriptor)
        self._descriptor = -1
