"""Read the header of a safetensors file and believe none of it before it is checked.

Works on bytes alone, so that each lie gets its own message: which file, which tensor, what was found and expected.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbits.errors import CheckpointError
from fewbits.layout import STORED_TYPES, TensorEntry, stored_bytes

# The safetensors library's own limit.
LARGEST_HEADER = 100_000_000
LENGTH_BYTES = 8
DAMAGED = "the file is damaged or was not downloaded completely: fetch it again"


@dataclass(frozen=True)
class WeightFile:
    """One safetensors file: its tensors in the order of their data, and what tells whether it changed since."""

    path: Path
    tensors: tuple[TensorEntry, ...]
    size: int
    mtime_ns: int
    header_sha256: str


def shown(name: str) -> str:
    """A name from a file, safe to print: no control characters, not longer than a line."""
    printable = name if name.isprintable() else ascii(name)[1:-1]
    return printable if len(printable) <= 200 else f"{printable[:200]}…"


def read_weight_file(path: Path) -> WeightFile:
    """Read and check one file's header.

    Raises:
        CheckpointError: the file cannot be read, is truncated, or its header contradicts itself or the file.
    """
    try:
        # Before opening: a pipe would keep us waiting.
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path} is no regular file.", "give a folder with safetensors files")
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            header = _header_bytes(path, file.read(LENGTH_BYTES), file.read, status.st_size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.", _read_hint(path)) from error
    entries = _parse(path, header)
    first_byte = LENGTH_BYTES + len(header)
    tensors = tuple(_entry(path, name, entries[name], first_byte) for name in entries)
    ordered = tuple(sorted(tensors, key=lambda entry: (entry.offset, entry.nbytes)))
    _check_coverage(path, ordered, first_byte, status.st_size)
    return WeightFile(path, ordered, status.st_size, status.st_mtime_ns, hashlib.sha256(header).hexdigest())


def _read_hint(path: Path) -> str:
    if path.is_symlink() and not path.exists():
        return f"it is a symbolic link to {path.readlink()}, which does not exist: fetch the checkpoint again"
    return "check that the file exists and that you may read it"


def _header_bytes(path: Path, prefix: bytes, read: Any, size: int) -> bytes:
    if len(prefix) < LENGTH_BYTES:
        raise CheckpointError(
            f"{path} has {size} bytes; a safetensors file begins with an 8-byte header length.", DAMAGED
        )
    if prefix.startswith(b"version "):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself.", "run git lfs pull in its folder")
    length = int.from_bytes(prefix, "little")
    if length > LARGEST_HEADER:
        raise CheckpointError(
            f"{path}: the header claims {length:,} bytes; at most {LARGEST_HEADER:,} are allowed.",
            f"this is no safetensors file, or {DAMAGED}",
        )
    if length > size - LENGTH_BYTES:
        raise CheckpointError(
            f"{path} is truncated: its header is {length:,} bytes long, but only {size - LENGTH_BYTES:,} follow.",
            DAMAGED,
        )
    header = read(length)
    assert isinstance(header, bytes)
    if len(header) != length:
        raise CheckpointError(f"{path}: read {len(header):,} of the header's {length:,} bytes.", DAMAGED)
    return header


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON object hook: a key that appears twice has no one meaning."""
    entries: dict[str, Any] = {}
    for key, value in pairs:
        if key in entries:
            raise ValueError(f"the key {shown(key)} appears twice")
        entries[key] = value
    return entries


def parse_object(path: Path, content: bytes, what: str, hint: str, *, keys_once: bool = True) -> dict[str, Any]:
    """Parse a JSON object; CheckpointError if it is anything else, or (with `keys_once`) names a key twice."""
    try:
        parsed = json.loads(content.decode(), object_pairs_hook=refuse_duplicates if keys_once else None)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise CheckpointError(f"{path}: {what} is not valid JSON: {reason}.", hint) from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: {what} is {_kind(parsed)}; expected a JSON object.", hint)
    return parsed


def _kind(value: object) -> str:
    names = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "an object")


def _parse(path: Path, header: bytes) -> dict[str, Any]:
    if not header.startswith(b"{"):
        raise CheckpointError(
            f"{path}: the header begins with {header[:8]!r}; expected a JSON object.",
            f"this is no safetensors file, or {DAMAGED}",
        )
    entries = parse_object(path, header, "the header", DAMAGED)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ in the header is not an object of strings.", DAMAGED)
    return entries


def _entry(path: Path, name: str, entry: object, first_byte: int) -> TensorEntry:
    where = f"{path}: tensor {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        found = ", ".join(sorted(shown(key) for key in entry)) if isinstance(entry, dict) else _kind(entry)
        raise CheckpointError(f"{where}: found {found or 'nothing'}; expected dtype, shape, data_offsets.", DAMAGED)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in STORED_TYPES:
        raise CheckpointError(
            f"{where} has the unknown dtype {shown(str(dtype))}; known are {', '.join(STORED_TYPES)}.",
            "convert the tensor to BF16, F16 or F32",
        )
    if not _whole_numbers(shape):
        raise CheckpointError(
            f"{where} has the shape {shown(str(shape))}; expected whole numbers, none negative.", DAMAGED
        )
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has the offsets {shown(str(offsets))}; expected [begin, end].", DAMAGED)
    expected = stored_bytes(dtype, tuple(shape))
    if offsets[1] - offsets[0] != expected:
        raise CheckpointError(
            f"{where}: {dtype} {shape} takes {expected:,} bytes, but its offsets {offsets} span "
            f"{offsets[1] - offsets[0]:,}.",
            DAMAGED,
        )
    return TensorEntry(name, path, dtype, tuple(shape), first_byte + offsets[0], expected)


def _whole_numbers(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_coverage(path: Path, ordered: tuple[TensorEntry, ...], first_byte: int, size: int) -> None:
    """Tensors must follow each other from the header to the end of the file, without a gap or an overlap."""
    expected_size = max((entry.offset + entry.nbytes for entry in ordered), default=first_byte)
    if expected_size > size:
        last = max(ordered, key=lambda entry: entry.offset + entry.nbytes)
        raise CheckpointError(
            f"{path} is truncated: expected {expected_size:,} bytes (tensor {shown(last.name)} ends there), "
            f"found {size:,}.",
            DAMAGED,
        )
    position, before = first_byte, "the header"
    for entry in ordered:
        if entry.offset != position:
            relation = "overlaps" if entry.offset < position else "leaves a gap after"
            raise CheckpointError(
                f"{path}: tensor {shown(entry.name)} begins at byte {entry.offset:,}, which {relation} {before}; "
                f"expected {position:,}.",
                DAMAGED,
            )
        position, before = entry.offset + entry.nbytes, f"tensor {shown(entry.name)}"
    if position != size:
        raise CheckpointError(
            f"{path} has {size:,} bytes; its tensors end at {position:,}, so {size - position:,} belong to none.",
            DAMAGED,
        )
