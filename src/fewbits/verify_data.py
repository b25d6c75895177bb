"""The data side of verify: one pass over all bytes in tiles, for hashes, values and the error against the source."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from fewbits.checkpoints.reader import Checkpoint, TensorReader
from fewbits.errors import CheckpointError
from fewbits.fold_records import FoldRecord, differing, misfit, unscaled
from fewbits.formats import Format
from fewbits.layout import WEIGHT_DTYPES, OutputTensor, TensorEntry
from fewbits.manifest import MANIFEST, Manifest
from fewbits.problems import Problem
from fewbits.progress import Progress
from fewbits.schemes import Scheme
from fewbits.tensors import decode

# A decoded tile in fp32 takes this, its source and its error as much again.
TILE_BYTES = 16 * 2**20
# Tiles are multiples of this many rows, so that packed zero points split at whole words.
ROW_MULTIPLE = 32
# Sums in another order differ by less than this, one changed code by more.
RELATIVE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class StoredLayer:
    """A quantized linear whose tensors have the dtypes and shapes that its scheme asks for."""

    name: str
    scheme: Scheme
    shape: tuple[int, int]
    tensors: tuple[OutputTensor, ...]
    format: Format


@dataclass(frozen=True)
class LayerError:
    """‖W − Ŵ‖ / ‖W‖ of one layer against the source, and what the writer recorded (None without a manifest)."""

    name: str
    scheme: Scheme
    relative_error: float
    recorded: float | None


@dataclass
class _Fault:
    """Values of one tensor that must not be: how many, and where the first is."""

    count: int
    first: str


@dataclass
class DataPass:
    """Reads every tensor once."""

    checkpoint: Checkpoint
    source: Checkpoint | None
    manifest: Manifest | None
    problems: list[Problem]
    progress: Progress
    bytes_checked: int = 0
    _open: ExitStack = field(default_factory=ExitStack)

    def run(self, layers: Iterable[StoredLayer]) -> tuple[LayerError, ...]:
        """Check all data; returns the layers' errors if there is a source."""
        layers = list(layers)
        in_layers = {tensor.name for layer in layers for tensor in layer.tensors}
        self.progress.begin("verifying", sum(entry.nbytes for entry in self.checkpoint.tensors.values()), "bytes")
        errors = []
        try:
            with TensorReader(self.checkpoint) as reader, ExitStack() as stack:
                source = None if self.source is None else stack.enter_context(TensorReader(self.source))
                for layer in layers:
                    errors.append(self._layer(layer, reader, source))
                for entry in self.checkpoint.tensors.values():
                    if entry.name not in in_layers:
                        self._carried(entry, reader, source)
        finally:
            self.progress.end()
        return tuple(error for error in errors if error is not None)

    def _problem(self, where: str, found: str, expected: str = "") -> None:
        self.problems.append(Problem(where, found, expected))

    def _folds(self, tensor: str, shape: Sequence[int]) -> tuple[FoldRecord, ...] | None:
        """The folds that rescaled a tensor of the source; None if what is recorded of them does not fit it."""
        folds = () if self.manifest is None else self.manifest.folds.get(tensor, ())
        wrong = misfit(tensor, shape, folds)
        if wrong is not None:
            self._problem(tensor, f"{wrong} in {MANIFEST}", "one for each row or column")
        return folds if wrong is None else None

    def _check_hash(self, name: str, digest: str) -> None:
        expected = None if self.manifest is None else self.manifest.tensors.get(name)
        if expected is not None and digest != expected:
            self._problem(name, f"sha256 {digest[:12]}…", f"{expected[:12]}…, as {MANIFEST} has it: the bytes changed")

    def _layer(self, layer: StoredLayer, reader: TensorReader, source: TensorReader | None) -> LayerError | None:
        weight = f"{layer.name}.weight"
        folds = self._folds(weight, layer.shape)
        if source is not None and (not self._has_source(layer) or folds is None):
            source = None
        check = _LayerCheck(layer)
        remark = None
        try:
            for start, stop in _row_tiles(layer.shape):
                before = check.bytes_read
                stored = check.read(reader, start, stop)
                remark = remark or layer.format.remark(layer.name, stored, layer.scheme, stop - start)
                if source is not None:
                    check.compare(source.read_rows(weight, start, stop), stored, start, folds or ())
                self.bytes_checked += check.bytes_read - before
                self.progress.advance(check.bytes_read - before, layer.name)
        except CheckpointError as error:
            self._problem(layer.name, error.message)
            return None
        if remark is not None:
            self._problem(layer.name, remark)
        for name, digest in check.digests.items():
            self._check_hash(name, digest.hexdigest())
        for (name, kind), fault in check.faults.items():
            self._problem(name, f"{kind} ({fault.count} of them, first at {fault.first})", check.expected(name))
        if source is None:
            return None
        return self._compare_errors(layer, check.relative_error)

    def _has_source(self, layer: StoredLayer) -> bool:
        assert self.source is not None
        entry = self.source.tensors.get(f"{layer.name}.weight")
        if entry is None:
            self._problem(layer.name, "a quantized layer", "none: the source has no such weight")
        return entry is not None and entry.shape == layer.shape and entry.dtype in WEIGHT_DTYPES

    def _compare_errors(self, layer: StoredLayer, relative_error: float) -> LayerError:
        record = None if self.manifest is None else self.manifest.layers.get(layer.name)
        recorded = None if record is None else record.relative_error
        if recorded is not None and not math.isclose(relative_error, recorded, rel_tol=RELATIVE_TOLERANCE):
            self._problem(
                layer.name,
                f"relative error {relative_error:.9g} against {self.source.path if self.source else ''}",
                f"{recorded:.9g}, as {MANIFEST} has it",
            )
        return LayerError(layer.name, layer.scheme, relative_error, recorded)

    def _carried(self, entry: TensorEntry, reader: TensorReader, source: TensorReader | None) -> None:
        """A tensor that is no part of a sound quantized layer: hash it, and compare it with the source's."""
        original = None if self.source is None else self.source.tensors.get(entry.name)
        if original is not None and ((original.dtype, original.shape) != (entry.dtype, entry.shape)):
            original = None
        folds = self._folds(entry.name, entry.shape)
        if original is not None and folds != ():
            if source is not None and folds is not None:
                self._divided(entry.name, reader, source, folds)
            original = None
        buffer = torch.empty(min(TILE_BYTES, entry.nbytes), dtype=torch.uint8)
        other = torch.empty_like(buffer)
        digest, differing, first = hashlib.sha256(), 0, 0
        try:
            for start in range(0, entry.nbytes, TILE_BYTES):
                tile = buffer[: min(TILE_BYTES, entry.nbytes - start)]
                reader.read_bytes(entry.name, start, tile)
                digest.update(tile.numpy().data)
                if original is not None and source is not None:
                    source.read_bytes(entry.name, start, other[: len(tile)])
                    if not torch.equal(tile, other[: len(tile)]):
                        unlike = tile != other[: len(tile)]
                        first = first if differing else start + int(unlike.nonzero()[0])
                        differing += int(unlike.sum())
                self.bytes_checked += len(tile)
                self.progress.advance(len(tile), entry.name)
        except CheckpointError as error:
            self._problem(entry.name, error.message)
            return
        self._check_hash(entry.name, digest.hexdigest())
        if differing:
            self._problem(
                entry.name, f"{differing} bytes differ from the source, the first at byte {first}", "bytes as they were"
            )

    def _divided(self, name: str, reader: TensorReader, source: TensorReader, folds: Iterable[FoldRecord]) -> None:
        """A tensor that took scales up: it must be the source's, divided by those that are recorded."""
        try:
            wrong = differing(source.read(name), reader.read(name), name, folds)
        except CheckpointError:
            return  # said when its bytes are hashed
        if bool(wrong.any()):
            first = wrong.nonzero()[0].tolist()
            self._problem(
                name, f"{int(wrong.sum())} values are not the source's divided by the fold's scales, first at {first}",
                f"those that {MANIFEST} has scales for",
            )  # fmt: skip


def _row_tiles(shape: tuple[int, int]) -> Iterable[tuple[int, int]]:
    height = max(ROW_MULTIPLE, TILE_BYTES // max(4 * shape[1], 1) // ROW_MULTIPLE * ROW_MULTIPLE)
    for start in range(0, shape[0], height):
        yield start, min(start + height, shape[0])


class _LayerCheck:
    """Hashes, faults and error of one layer, gathered tile by tile."""

    def __init__(self, layer: StoredLayer) -> None:
        self.layer = layer
        self.digests = {tensor.name: hashlib.sha256() for tensor in layer.tensors}
        self.faults: dict[tuple[str, str], _Fault] = {}
        self.bytes_read = 0
        self._rows_read = dict.fromkeys(self.digests, 0)
        self._whole: dict[str, torch.Tensor] = {}
        self._squared_error = 0.0
        self._squared_norm = 0.0

    @property
    def relative_error(self) -> float:
        """Over the tiles compared so far."""
        return math.sqrt(self._squared_error / self._squared_norm) if self._squared_norm else 0.0

    def read(self, reader: TensorReader, start: int, stop: int) -> dict[str, torch.Tensor]:
        """The stored part of rows [start, stop) of the weight; what is read is hashed and looked through."""
        if self.layer.format.ROW_AXIS == 1:
            return self._columns(reader, start, stop)
        tile = {}
        for tensor in self.layer.tensors:
            first = self._rows_read[tensor.name]
            _, last = self.layer.format.stored_rows(tensor.name, self.layer.scheme, start, stop)
            tile[tensor.name] = self._take(reader, tensor, first, last)
            self._rows_read[tensor.name] = last
        return tile

    def _columns(self, reader: TensorReader, start: int, stop: int) -> dict[str, torch.Tensor]:
        """Rows that lie across the stored tensors: those are read whole with the first tile."""
        if not self._whole:
            self._whole = {t.name: self._take(reader, t, 0, t.shape[0]) for t in self.layer.tensors}
        layer, tile = self.layer, {}
        for name, tensor in self._whole.items():
            first, last = layer.format.stored_rows(name, layer.scheme, start, stop)
            tile[name] = tensor[:, first:last] if tensor.dim() == 2 else tensor
        return tile

    def _take(self, reader: TensorReader, tensor: OutputTensor, first: int, last: int) -> torch.Tensor:
        rows = reader.read_rows(tensor.name, first, last)
        raw = rows.reshape(-1).view(torch.uint8)
        self.digests[tensor.name].update(raw.numpy().data)
        self.bytes_read += len(raw)
        self._look_through(tensor, rows, first)
        return rows

    def compare(
        self, original: torch.Tensor, stored: dict[str, torch.Tensor], start: int, folds: Iterable[FoldRecord]
    ) -> None:
        """Add the error of a tile of rows from `start` on, what folds did to it undone."""
        layer = self.layer
        shape = (original.shape[0], layer.shape[1])
        restored = decode(layer.format.decode(layer.name, stored, layer.scheme, shape))
        restored = unscaled(restored, f"{layer.name}.weight", folds, start)
        exact = original.to(torch.float32)
        self._squared_error += _sum(restored.sub_(exact).square_())
        self._squared_norm += _sum(exact.square_() if exact is not original else exact.square())

    def expected(self, name: str) -> str:
        """What the values of a tensor must be."""
        return "finite numbers other than zero" if name.endswith(("scale", "scales")) else "codes of finite numbers"

    def _look_through(self, tensor: OutputTensor, rows: torch.Tensor, first: int) -> None:
        if tensor.dtype in WEIGHT_DTYPES:
            self._note(tensor.name, "NaN", rows.isnan(), first)
            self._note(tensor.name, "infinity", rows.isinf(), first)
            self._note(tensor.name, "zero", rows == 0, first)
        elif tensor.dtype == "F8_E4M3":
            self._note(tensor.name, "NaN", rows.view(torch.uint8) & 0x7F == 0x7F, first)

    def _note(self, name: str, kind: str, faulty: torch.Tensor, first: int) -> None:
        if bool(faulty.any()):
            row, column = (int(index) for index in faulty.nonzero()[0])
            self.faults.setdefault((name, kind), _Fault(0, f"[{first + row}, {column}]")).count += int(faulty.sum())


def _sum(squares: torch.Tensor) -> float:
    """Σ over all: rows in fp32, which torch adds pairwise, then their sums in float64."""
    return float(squares.sum(dim=1).sum(dtype=torch.float64))
