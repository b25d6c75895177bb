"""How tensors lie in safetensors files: dtypes by name, where each tensor's bytes are, and the header of a new file.

A file is an 8-byte little-endian length, that many bytes of JSON (padded with spaces to a multiple of 8), then the
tensors without a gap. This module imports no torch until a torch dtype is asked for: plans are made without it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StoredType:
    """A dtype as safetensors knows it: bits of one element, torch's name (None where torch has no such elements)."""

    bits: int
    torch_name: str | None


# In the order in which the safetensors library ranks them; a file holds the highest rank first, so all are aligned.
STORED_TYPES: dict[str, StoredType] = {
    "BOOL": StoredType(8, "bool"),
    "F4": StoredType(4, None),
    "F6_E2M3": StoredType(6, None),
    "F6_E3M2": StoredType(6, None),
    "U8": StoredType(8, "uint8"),
    "I8": StoredType(8, "int8"),
    "F8_E5M2": StoredType(8, "float8_e5m2"),
    "F8_E4M3": StoredType(8, "float8_e4m3fn"),
    "F8_E8M0": StoredType(8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": StoredType(8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": StoredType(8, "float8_e5m2fnuz"),
    "I16": StoredType(16, "int16"),
    "U16": StoredType(16, "uint16"),
    "F16": StoredType(16, "float16"),
    "BF16": StoredType(16, "bfloat16"),
    "I32": StoredType(32, "int32"),
    "U32": StoredType(32, "uint32"),
    "F32": StoredType(32, "float32"),
    "C64": StoredType(64, "complex64"),
    "F64": StoredType(64, "float64"),
    "I64": StoredType(64, "int64"),
    "U64": StoredType(64, "uint64"),
}
_RANKS = {name: rank for rank, name in enumerate(STORED_TYPES)}
_NAMES = {stored.torch_name: name for name, stored in STORED_TYPES.items() if stored.torch_name is not None}

# What linear weights come in; everything else is refused or carried over.
WEIGHT_DTYPES = ("BF16", "F16", "F32")


def stored_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor on disk.

    >>> stored_bytes("BF16", (3, 5))
    30
    """
    bits = STORED_TYPES[dtype].bits * math.prod(shape)
    return -(-bits // 8)


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch dtype for a safetensors name; KeyError for an unknown one, ValueError for one torch cannot hold."""
    import torch

    name = STORED_TYPES[dtype].torch_name
    if name is None:
        raise ValueError(f"torch has no dtype for {dtype}")
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def stored_dtype(dtype: torch.dtype) -> str:
    """The safetensors name for a torch dtype: "BF16" for torch.bfloat16."""
    return _NAMES[str(dtype).removeprefix("torch.")]


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint: its header entry, with `offset` counted from the start of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch has it."""
        return torch_dtype(self.dtype)


@dataclass(frozen=True)
class OutputTensor:
    """One tensor that will be written: name, safetensors dtype, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data in the file."""
        return stored_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Shard:
    """One safetensors file that will be written: exact to the byte before any data is there.

    The same tensors, in whatever order they are given, make the same file, and the one the safetensors library makes.
    """

    file: str
    tensors: tuple[OutputTensor, ...]

    def __post_init__(self) -> None:
        twice = [name for name, count in Counter(tensor.name for tensor in self.tensors).items() if count > 1]
        if twice:
            raise ValueError(f"{self.file}: tensor {twice[0]} is planned more than once")

    @cached_property
    def ordered(self) -> tuple[OutputTensor, ...]:
        """The tensors in the order of their data: wide dtypes first, then by name."""
        return tuple(sorted(self.tensors, key=lambda tensor: (-_RANKS[tensor.dtype], tensor.name.encode())))

    def header(self) -> bytes:
        """The bytes before the data: length, JSON, padding."""
        return self._header

    @cached_property
    def _header(self) -> bytes:
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for tensor in self.ordered:
            end = begin + tensor.nbytes
            entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (begin, end)}
            begin = end
        content = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        content += b" " * (-len(content) % 8)
        return len(content).to_bytes(8, "little") + content

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Where each tensor's data begins, counted from the start of the file; in file order."""
        position = len(self._header)
        offsets = {}
        for tensor in self.ordered:
            offsets[tensor.name] = position
            position += tensor.nbytes
        return offsets

    @property
    def nbytes(self) -> int:
        """Size of the whole file, header included."""
        return len(self._header) + sum(tensor.nbytes for tensor in self.tensors)
