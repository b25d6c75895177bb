"""Block inputs: the hidden states in front of every block, kept in memory or in a file, or only in front of some."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

from fewbits.errors import OutputError


class BlockInputs:
    """Hidden states by block and micro-batch.

    Those of every `stride`-th block and of blocks kept since are there; the others have to be computed again.

    Args:
        blocks, nbytes: how many blocks there are, and how many bytes are in front of one of them.
        memory_limit: bytes that may be held in memory; past them a file is used.
        file_limit: bytes that may be held in the file; past them only every `stride`-th block is kept.
        folder: where the file goes; it has no name there, and is gone when the process ends.
    """

    def __init__(self, blocks: int, nbytes: int, memory_limit: int, file_limit: int, folder: Path | None) -> None:
        self.in_file = blocks * nbytes > memory_limit
        room = file_limit if self.in_file else memory_limit
        # A kept block in every `stride`, and the blocks between two of those while their turn lasts.
        self.stride = 1 if blocks * nbytes <= room else max(2, math.ceil(math.sqrt(blocks)))
        self._tensors: dict[tuple[int, int], torch.Tensor] = {}
        self._places: dict[tuple[int, int], tuple[int, torch.Size, torch.dtype]] = {}
        self._file: BinaryIO | None = None
        self._folder = folder
        self._end = 0
        self._free: dict[int, list[int]] = {}  # offsets by size: the last micro-batch may be smaller

    def __enter__(self) -> BlockInputs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tensors.clear()
        if self._file is not None:
            self._file.close()

    def wants(self, block: int) -> bool:
        """Whether the inputs of this block are kept on the way forward."""
        return block % self.stride == 0

    def has(self, block: int) -> bool:
        """Whether the inputs of this block are there."""
        return (block, 0) in self._tensors or (block, 0) in self._places

    def keep(self, block: int, micro_batch: int, hidden: torch.Tensor) -> None:
        """Keep what enters `block`."""
        hidden = hidden.detach().contiguous()
        if not self.in_file:
            self._tensors[block, micro_batch] = hidden
            return
        nbytes = hidden.numel() * hidden.element_size()
        free = self._free.get(nbytes)
        offset = free.pop() if free else self._end
        self._end = max(self._end, offset + nbytes)
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
            self._file.seek(offset)
            self._file.write(memoryview(hidden.cpu().view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
            self._file.flush()
        except OSError as failure:
            raise OutputError(
                f"Hidden states cannot be written to {self._folder or tempfile.gettempdir()}: {failure.strerror}.",
                "free some space, or use fewer calibration samples",
            ) from failure
        self._places[block, micro_batch] = offset, hidden.shape, hidden.dtype

    def take(self, block: int, micro_batch: int) -> torch.Tensor:
        """What enters `block`, which is then no longer kept."""
        key = block, micro_batch
        if not self.in_file:
            return self._tensors.pop(key)
        tensor = self.look(block, micro_batch)
        self.drop(block, micro_batch)
        return tensor

    def drop(self, block: int, micro_batch: int) -> None:
        """Keep what enters `block` no longer."""
        if not self.in_file:
            del self._tensors[block, micro_batch]
        else:
            offset, shape, dtype = self._places.pop((block, micro_batch))
            self._free.setdefault(shape.numel() * dtype.itemsize, []).append(offset)

    def look(self, block: int, micro_batch: int) -> torch.Tensor:
        """What enters `block`, which stays kept."""
        if not self.in_file:
            return self._tensors[block, micro_batch]
        offset, shape, dtype = self._places[block, micro_batch]
        hidden = torch.empty(shape, dtype=dtype)
        assert self._file is not None
        self._file.seek(offset)
        view = memoryview(hidden.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        if self._file.readinto(view) != len(view):  # type: ignore[attr-defined]
            raise OutputError("Hidden states that were written a moment ago cannot be read back.")
        return hidden
