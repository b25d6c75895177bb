"""Paging: hidden states that wait for long lie in mapped files, whose pages the process gives back while it solves.

The forward of a whole model holds states that it does not read while a block's linears are solved: what entered the
block, and what its embeddings gave. Their memory is a file's, without a name, so that it can be let go at any time: who
reads it again has it back from the system's cache, or from the disk.
"""

from __future__ import annotations

import ctypes
import sys
import tempfile
import weakref
from pathlib import Path

import torch

from fewbits.errors import OutputError

# Linux's number for pages that may go; the contents of a file that is mapped as shared stay.
MADV_DONTNEED = 4


class Pager:
    """Copies tensors into mapped files, and lets go of their pages.

    Args:
        folder: where the files lie; they have no name there, and are gone with their tensors.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: list[weakref.ref[torch.Tensor]] = []

    @staticmethod
    def is_possible(device: str) -> bool:
        """Whether memory is the processor's, and pages can be let go here."""
        return device == "cpu" and sys.platform == "linux"

    def paged(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same numbers, in a file of their own.

        Raises:
            OutputError: the disk is full or fails.
        """
        flat = tensor.detach().contiguous().view(-1)
        try:
            with tempfile.NamedTemporaryFile(dir=self._folder) as file:
                # Written before it is mapped: a full disk is an error here, and a crash in mapped memory.
                file.write(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
                file.flush()
                mapped = torch.from_file(file.name, shared=True, size=flat.numel(), dtype=flat.dtype)
        except OSError as error:
            raise OutputError(
                f"Hidden states cannot be written to {self._folder}: {error.strerror}.",
                "free some space, or use fewer calibration samples",
            ) from error
        mapped = mapped.view(tensor.shape)
        self._tensors.append(weakref.ref(mapped))
        return mapped

    def let_go(self) -> None:
        """Give back the pages of all tensors that are still there."""
        madvise = ctypes.CDLL(None).madvise
        alive = []
        for reference in self._tensors:
            tensor = reference()
            if tensor is not None:
                alive.append(reference)
                storage = tensor.untyped_storage()
                madvise(ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()), MADV_DONTNEED)
        self._tensors = alive
