"""Hidden states between two blocks, in a file: what an interrupted pass goes on from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch

from fewbits.checkpoints.writer import ShardWriter
from fewbits.layout import OutputTensor, Shard, stored_dtype


@dataclass(frozen=True)
class States:
    """Hidden states behind a block: one tensor a micro-batch, and the form in which the block returns them."""

    block: int
    structure: str
    outputs: Sequence[torch.Tensor]


def write_states(
    path: Path, block: int, structure: str, like: Sequence[torch.Tensor], outputs: Iterable[torch.Tensor]
) -> None:
    """Write a safetensors file, one micro-batch after the other.

    Args:
        like: tensors of the outputs' shapes and dtypes. outputs: made one at a time.

    Raises:
        OutputError: the disk is full or fails.
    """
    # What the states are of stands in the tensors' names, in order of the micro-batches.
    names = [f"{index:06d}.block {block}.structure {structure}" for index in range(len(like))]
    _write(path, dict(zip(names, like, strict=True)), outputs)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors to a safetensors file that has its name only once it is whole.

    Raises:
        OutputError: the disk is full or fails.
    """
    _write(path, tensors, tensors.values())


def _write(path: Path, like: Mapping[str, torch.Tensor], contents: Iterable[torch.Tensor]) -> None:
    planned = [OutputTensor(name, stored_dtype(tensor.dtype), tuple(tensor.shape)) for name, tensor in like.items()]
    writer = ShardWriter(path.parent, Shard(path.name, tuple(planned)))
    try:
        for name, content in zip(like, contents, strict=True):
            writer.write(name, content.contiguous().cpu())
        writer.close()
    finally:
        writer.abort()


def load_states(path: Path) -> States:
    """Open what `write_states` wrote; each micro-batch's states are read when they are asked for."""
    from safetensors import safe_open

    file: Any = safe_open(str(path), "pt")
    names = sorted(file.keys())
    _, block, structure = names[0].split(".")
    return States(int(block.removeprefix("block ")), structure.removeprefix("structure "), _InFile(file, names))


class _InFile(Sequence[torch.Tensor]):
    def __init__(self, file: Any, names: Sequence[str]) -> None:
        self._file, self._names = file, names

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[torch.Tensor]: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | Sequence[torch.Tensor]:
        if isinstance(index, slice):
            return _InFile(self._file, self._names[index])
        tensor: torch.Tensor = self._file.get_tensor(self._names[index])
        return tensor
