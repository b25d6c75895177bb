"""Verify: a quantized checkpoint is whole, holds what its writer recorded, and decodes to what its source was.

First all headers, the config and the manifest; then all data once, in tiles of rows. Every problem is collected.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewbits.checkpoints.folder import INDEX_FILE, listing, read_config, read_json, require_folder
from fewbits.checkpoints.headers import WeightFile, read_weight_file
from fewbits.checkpoints.reader import Checkpoint, TensorReader, open_checkpoint
from fewbits.errors import CheckpointError
from fewbits.formats import FORMATS, Format, format_of_config
from fewbits.layers import find_layers
from fewbits.layout import WEIGHT_DTYPES, OutputTensor, TensorEntry
from fewbits.manifest import MANIFEST, Manifest, read_manifest
from fewbits.problems import Problem
from fewbits.progress import Progress, Silent
from fewbits.schemes import Scheme
from fewbits.verify_data import DataPass, LayerError, StoredLayer

__all__ = ["LayerError", "Problem", "VerifyReport", "verify"]


@dataclass(frozen=True)
class VerifyReport:
    """What was checked, and what was wrong.

    layers: errors against the source, where one was given. unchecked: what could not be checked, and why.
    """

    path: Path
    against: Path | None
    problems: tuple[Problem, ...]
    layers: tuple[LayerError, ...]
    unchecked: tuple[str, ...]
    tensors: int
    quantized_layers: int
    bytes_checked: int

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.problems


def verify(
    quantized_dir: str | Path, against: str | Path | None = None, *, progress: Progress | None = None
) -> VerifyReport:
    """Check the quantized checkpoint in `quantized_dir`.

    Args:
        quantized_dir: made by fewbits, or any checkpoint in one of its formats (then with fewer checks).
        against: the checkpoint it was made from; errors are computed anew, and what was carried over is compared.
        progress: who is told of progress.

    Raises:
        CheckpointError: a folder is missing or holds no safetensors, or `against` is no whole unquantized checkpoint.
    """
    folder = Path(quantized_dir).expanduser()
    require_folder(folder)
    source = None if against is None else open_checkpoint(against)
    return _Verification(folder, source, progress or Silent()).run()


@dataclass
class _Verification:
    """One call of `verify` under way."""

    folder: Path
    source: Checkpoint | None
    progress: Progress
    problems: list[Problem] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    lost: set[str] = field(default_factory=set)

    def run(self) -> VerifyReport:
        """Check everything there is."""
        checkpoint = self._open()
        manifest = self._manifest()
        self._compare_names(checkpoint, manifest)
        with TensorReader(checkpoint) as reader:
            layers = self._layers(checkpoint, reader)
        self._compare_records(layers, manifest)
        if self.source is not None:
            self._compare_headers(checkpoint, self.source, layers)
        data = DataPass(checkpoint, self.source, manifest, self.problems, self.progress)
        errors = data.run(layers)
        return VerifyReport(
            path=self.folder,
            against=None if self.source is None else self.source.path,
            problems=tuple(self.problems),
            layers=errors,
            unchecked=tuple(self.unchecked),
            tensors=len(checkpoint.tensors),
            quantized_layers=len(layers),
            bytes_checked=data.bytes_checked,
        )

    def _problem(self, where: str, found: str, expected: str = "") -> None:
        self.problems.append(Problem(where, found, expected))

    def _open(self) -> Checkpoint:
        """The checkpoint, or what is readable of it."""
        try:
            return open_checkpoint(self.folder, allow_quantized=True)
        except CheckpointError as error:
            if not any(entry.suffix == ".safetensors" for entry in listing(self.folder)):
                raise
            return self._salvage(error)

    def _salvage(self, first: CheckpointError) -> Checkpoint:
        config: dict[str, Any] = {}
        try:
            config = read_config(self.folder)
        except CheckpointError as error:
            self._problem("config.json", error.message)
        weight_map = self._weight_map()
        names = sorted({*weight_map.values()} or {e.name for e in listing(self.folder) if e.suffix == ".safetensors"})
        files: list[WeightFile] = []
        for name in names:
            try:
                files.append(read_weight_file(self.folder / name))
            except CheckpointError as error:
                self._problem(name, error.message)
                self.lost.update(tensor for tensor, file in weight_map.items() if file == name)
        if not self.problems:
            self._problem(str(self.folder), first.message)
        return Checkpoint(self.folder, config, tuple(files), ())

    def _weight_map(self) -> dict[str, str]:
        if not (self.folder / INDEX_FILE).exists():
            return {}
        try:
            weight_map = read_json(self.folder / INDEX_FILE, "").get("weight_map")
        except CheckpointError as error:
            self._problem(INDEX_FILE, error.message)
            return {}
        if not isinstance(weight_map, dict):
            return {}
        plain = {
            tensor: file for tensor, file in weight_map.items() if isinstance(file, str) and Path(file).name == file
        }
        return plain

    def _manifest(self) -> Manifest | None:
        try:
            manifest = read_manifest(self.folder)
        except CheckpointError as error:
            self._problem(MANIFEST, error.message)
            return None
        if manifest is None:
            self.unchecked.append(f"hashes and recorded errors: there is no {MANIFEST}, so fewbits did not write this")
        return manifest

    def _compare_names(self, checkpoint: Checkpoint, manifest: Manifest | None) -> None:
        if manifest is None:
            return
        for name in manifest.tensors:
            if name not in checkpoint.tensors and name not in self.lost:
                self._problem(name, "no such tensor", f"one, as {MANIFEST} has it")
        for name in checkpoint.tensors:
            if name not in manifest.tensors:
                self._problem(name, "a tensor", f"none: {MANIFEST} does not know it")

    def _layers(self, checkpoint: Checkpoint, reader: TensorReader) -> list[StoredLayer]:
        """The quantized layers whose headers are as the config says."""
        config = checkpoint.config.get("quantization_config") or checkpoint.config.get("compression_config")
        if not isinstance(config, dict):
            if checkpoint.config:
                self._problem("config.json", "no quantization_config", "that of a quantized checkpoint")
            return []
        chosen = format_of_config(config)
        if chosen is None:
            method = config.get("quant_method")
            self.unchecked.append(f"quantized layers: verify knows {', '.join(FORMATS)}, not {method!r}")
            return []
        modules = chosen.quantized_modules(checkpoint.tensors)
        plain = _unquantized_linears(checkpoint, modules)
        try:
            schemes = chosen.schemes_from_config(config, [*modules, *plain])
        except CheckpointError as error:
            self._problem("config.json", error.message)
            return []
        for name, entry in plain.items():
            if schemes[name] is not None:
                self._problem(entry.name, f"{entry.dtype} {list(entry.shape)}", f"{schemes[name]}, as config.json says")
        members: dict[str, dict[str, TensorEntry]] = {module: {} for module in modules}
        for name, entry in checkpoint.tensors.items():
            module, _, part = name.rpartition(".")
            if module in members and part.startswith(chosen.PARTS):
                members[module][name] = entry
        layers = (self._layer(chosen, module, schemes[module], stored, reader) for module, stored in members.items())
        return [layer for layer in layers if layer is not None]

    def _layer(
        self,
        chosen: Format,
        module: str,
        scheme: Scheme | None,
        stored: Mapping[str, TensorEntry],
        reader: TensorReader,
    ) -> StoredLayer | None:
        if scheme is None:
            self._problem(module, f"quantized: {', '.join(stored)}", "unquantized, as config.json says")
            return None
        try:
            shape = chosen.shape_of(module, scheme, stored, reader.read)
        except CheckpointError as error:
            if not any(name.startswith(f"{module}.") for name in self.lost):
                self._problem(module, error.message)
            return None
        scales = (entry.dtype for name, entry in stored.items() if name.endswith(("scale", "scales")))
        scale_dtype = next((dtype for dtype in scales if dtype in WEIGHT_DTYPES), "BF16")
        expected = chosen.tensors_for(module, scheme, shape, scale_dtype)
        consistent = [self._as_expected(tensor, stored.get(tensor.name), scheme) for tensor in expected]
        for name in stored.keys() - {tensor.name for tensor in expected}:
            self._problem(name, "a tensor", f"none: {scheme} has no such tensor")
            consistent.append(False)
        return StoredLayer(module, scheme, shape, expected, chosen) if all(consistent) else None

    def _as_expected(self, expected: OutputTensor, found: TensorEntry | None, scheme: Scheme) -> bool:
        if found is not None and (found.dtype, found.shape) == (expected.dtype, expected.shape):
            return True
        if expected.name not in self.lost:
            actual = "no such tensor" if found is None else f"{found.dtype} {list(found.shape)}"
            self._problem(expected.name, actual, f"{expected.dtype} {list(expected.shape)} for {scheme}")
        return False

    def _compare_records(self, layers: Iterable[StoredLayer], manifest: Manifest | None) -> None:
        recorded = {} if manifest is None else manifest.layers
        for layer in layers:
            record = recorded.get(layer.name)
            if record is None:
                if manifest is not None:
                    self._problem(layer.name, "a quantized layer", f"none: {MANIFEST} does not know it")
            elif (record.bits, record.group_size) != (layer.scheme.bits, layer.scheme.group_size):
                self._problem(layer.name, str(layer.scheme), f"{record.method}, as {MANIFEST} has it")

    def _compare_headers(self, checkpoint: Checkpoint, source: Checkpoint, layers: list[StoredLayer]) -> None:
        """What the source has must be here, quantized or as it was, and nothing else."""
        shapes = {f"{layer.name}.weight": layer.shape for layer in layers}
        for name, entry in source.tensors.items():
            found = checkpoint.tensors.get(name)
            if name in shapes:
                if entry.shape != shapes[name]:
                    self._problem(name, str(list(shapes[name])), f"{list(entry.shape)}, as the source has it")
                continue
            if self._is_quantized(name, checkpoint) or name in self.lost:
                continue
            if found is None or (found.dtype, found.shape) != (entry.dtype, entry.shape):
                actual = "no such tensor" if found is None else f"{found.dtype} {list(found.shape)}"
                self._problem(name, actual, f"{entry.dtype} {list(entry.shape)}, as the source has it")
        stored = {tensor.name for layer in layers for tensor in layer.tensors}
        for name in checkpoint.tensors.keys() - source.tensors.keys() - stored:
            if f"{name.rpartition('.')[0]}.weight" not in source.tensors:
                self._problem(name, "a tensor", "none: the source has nothing of that name")

    def _is_quantized(self, weight: str, checkpoint: Checkpoint) -> bool:
        module = weight.removesuffix(".weight")
        return any(
            f"{module}{suffix}" in checkpoint.tensors for suffix in (".weight_packed", ".weight_scale", ".qweight")
        )


def _unquantized_linears(checkpoint: Checkpoint, quantized: Iterable[str]) -> dict[str, TensorEntry]:
    """Linears whose weight is stored as floats; what readers may hold for something else is left out."""
    taken = set(quantized)
    layers, _ = find_layers(checkpoint.headers, checkpoint.config)
    return {
        layer.name: checkpoint.tensors[layer.tensor]
        for layer in layers
        if layer.name not in taken
        and not layer.transposed
        and (layer.default_skip is None or "head" in layer.default_skip)
    }
