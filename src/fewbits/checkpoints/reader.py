"""Open a Hugging Face checkpoint by its headers, and read its tensors into buffers that the caller reuses.

Nothing is mapped into memory: mapped pages count as resident, and a truncated file would end in SIGBUS.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbits.checkpoints.buffers import bytes_of
from fewbits.checkpoints.folder import find_companions, read_config, require_folder, weight_files
from fewbits.checkpoints.headers import DAMAGED, WeightFile, shown
from fewbits.errors import CheckpointError
from fewbits.layout import WEIGHT_DTYPES, TensorEntry
from fewbits.notes import Note

if TYPE_CHECKING:
    import torch

    from fewbits.checkpoints.buffers import Content

QUANTIZED_SUFFIXES = (
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".qweight",
    ".qzeros",
    ".SCB",
    ".weight.absmax",
)
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
ORIGINAL_HINT = "fewbits starts from bf16, fp16 or fp32 weights: fetch the original checkpoint"
# macOS refuses to read 2 GiB or more at once, and Linux stops short of it.
LARGEST_READ = 2**30


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose headers were read and checked. No tensor data is held.

    tensors: every tensor, file by file, in the order of their data.
    companions: small files beside the weights (tokenizer, templates, …), config.json and the index not among them.
    notes: files that will not come along, and why.
    """

    path: Path
    config: dict[str, Any]
    weight_files: tuple[WeightFile, ...] = field(repr=False)
    companions: tuple[Path, ...] = field(repr=False)
    notes: tuple[Note, ...] = ()

    @cached_property
    def tensors(self) -> dict[str, TensorEntry]:
        """Every tensor by name."""
        return {entry.name: entry for file in self.weight_files for entry in file.tensors}

    @cached_property
    def headers(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """(shape, dtype) of every tensor, as `fewbits.layers.find_layers` takes them."""
        return {name: (entry.shape, entry.dtype) for name, entry in self.tensors.items()}

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files."""
        return tuple(file.path for file in self.weight_files)

    @property
    def nbytes(self) -> int:
        """Bytes of the safetensors files."""
        return sum(file.size for file in self.weight_files)

    def fingerprint(self) -> str:
        """A digest that changes when the config, a header, or a file's size or time of change does."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in self.weight_files:
            digest.update(f"\n{file.path.name} {file.header_sha256} {file.size} {file.mtime_ns}".encode())
        return digest.hexdigest()


def open_checkpoint(path: str | Path, *, allow_quantized: bool = False) -> Checkpoint:
    """Read and check all headers of the checkpoint in `path`.

    Raises:
        CheckpointError: the folder holds no checkpoint, a damaged one, or (unless allowed) a quantized one.
    """
    folder = Path(path).expanduser()
    require_folder(folder)
    files = weight_files(folder)
    config = read_config(folder)
    companions, notes = find_companions(folder)
    checkpoint = Checkpoint(folder, config, files, companions, notes)
    if not checkpoint.tensors:
        raise CheckpointError(f"{folder}: its safetensors files hold no tensors.", DAMAGED)
    if not allow_quantized:
        _refuse_quantized(checkpoint)
    return checkpoint


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    path = checkpoint.path
    for key, value in _quantization_entries(checkpoint.config):
        method = value.get("quant_method", "unknown") if isinstance(value, dict) else "unknown"
        raise CheckpointError(
            f"{path} is quantized already: config.json has {key} ({shown(str(method))}).", ORIGINAL_HINT
        )
    for name in QUANTIZATION_FILES:
        if (path / name).exists():
            raise CheckpointError(f"{path} is quantized already: it has {name}.", ORIGINAL_HINT)
    for name, entry in checkpoint.tensors.items():
        if name.endswith(QUANTIZED_SUFFIXES):
            raise CheckpointError(f"{entry.file} is quantized already: it has the tensor {shown(name)}.", ORIGINAL_HINT)
    _refuse_odd_weights(checkpoint.tensors.values())


def _quantization_entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every entry that says how weights were quantized, in nested configs as well."""
    for key, value in config.items():
        if key in QUANTIZATION_KEYS and value:
            yield key, value
        elif isinstance(value, dict):
            yield from _quantization_entries(value)


def _refuse_odd_weights(entries: Iterable[TensorEntry]) -> None:
    for entry in entries:
        if entry.name.endswith(".weight") and len(entry.shape) == 2 and entry.dtype not in WEIGHT_DTYPES:
            quantized = entry.dtype.startswith("F8") or entry.dtype in ("I8", "U8", "F4")
            raise CheckpointError(
                f"{entry.file}: tensor {shown(entry.name)} {list(entry.shape)} has the dtype {entry.dtype}; "
                f"a weight is expected to be {', '.join(WEIGHT_DTYPES)}.",
                ORIGINAL_HINT if quantized else "convert it to BF16, F16 or F32",
            )


class TensorReader:
    """Reads tensors of a checkpoint, from any thread. Files stay open until `close`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._stamps = {file.path: file for file in checkpoint.weight_files}
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, in fresh memory."""
        import torch

        entry = self._entry(name)
        out = torch.empty(entry.shape, dtype=entry.torch_dtype)
        self._fill(entry, 0, out)
        return out

    def read_rows(self, name: str, start: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows [start, stop) of a tensor.

        Args:
            out: contiguous memory to read into, of the tensor's dtype (or uint8) and at least as many bytes; fresh
                memory if None. The result is a view of its beginning.
        """
        import torch

        entry = self._entry(name)
        rows = entry.shape[0] if entry.shape else 0
        if not 0 <= start <= stop <= rows:
            raise ValueError(f"tensor {name} has {rows} rows; rows {start} to {stop} were asked for")
        shape = (stop - start, *entry.shape[1:])
        row_bytes = entry.nbytes // rows if rows else 0
        if out is None:
            out = torch.empty(shape, dtype=entry.torch_dtype)
        raw = out.reshape(-1).view(torch.uint8)[: (stop - start) * row_bytes]
        self._fill(entry, start * row_bytes, raw)
        return raw.view(entry.torch_dtype).view(shape)

    def read_bytes(self, name: str, start: int, out: Content) -> None:
        """Fill contiguous `out` with the tensor's bytes from byte `start` on."""
        entry = self._entry(name)
        if not 0 <= start <= start + out.nbytes <= entry.nbytes:
            raise ValueError(f"tensor {name} has {entry.nbytes} bytes; {out.nbytes} from {start} on were asked for")
        self._fill(entry, start, out)

    def forget(self, name: str) -> None:
        """Let the system drop the tensor's pages from its cache, where it can."""
        entry = self._entry(name)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor(entry.file), entry.offset, entry.nbytes, os.POSIX_FADV_DONTNEED)

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self._checkpoint.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self._checkpoint.path} has no tensor {shown(name)}.") from None

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = self._open(path)
            return self._descriptors[path]

    def _open(self, path: Path) -> int:
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.", "was it moved or deleted?") from error
        status, stamp = os.fstat(descriptor), self._stamps[path]
        if (status.st_size, status.st_mtime_ns) != (stamp.size, stamp.mtime_ns):
            os.close(descriptor)
            raise CheckpointError(
                f"{path} changed after its header was read.", "let nothing write to it, and try again"
            )
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return descriptor

    def _fill(self, entry: TensorEntry, start: int, out: Content) -> None:
        if out.nbytes == 0:
            return
        view = bytes_of(out)
        descriptor, done = self._descriptor(entry.file), 0
        while done < len(view):
            part = view[done : done + LARGEST_READ]
            try:
                count = _read_at(descriptor, part, entry.offset + start + done)
            except OSError as error:
                raise CheckpointError(
                    f"{entry.file}: reading tensor {shown(entry.name)} failed: {error.strerror}.", "check the disk"
                ) from error
            if count == 0:
                raise CheckpointError(
                    f"{entry.file}: tensor {shown(entry.name)} ends after {start + done:,} of {entry.nbytes:,} bytes.",
                    "the file was cut short while it was read: fetch it again",
                )
            done += count


def _read_at(descriptor: int, view: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], offset)
    content = os.pread(descriptor, len(view), offset)
    view[: len(content)] = content
    return len(content)
