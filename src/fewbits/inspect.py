"""Inspect: what is in a checkpoint, quantized or not, by fewbits or by others, as far as names and headers tell.

Reads headers, the config, and the scales (a hundredth of the data or so) for their range.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewbits.checkpoints.reader import Checkpoint, TensorReader, open_checkpoint
from fewbits.errors import CheckpointError
from fewbits.formats import Format, format_of_config
from fewbits.layers import natural_order
from fewbits.layout import WEIGHT_DTYPES, TensorEntry
from fewbits.schemes import Scheme

# Tensors that belong to a quantized weight, by what follows the module's name.
QUANTIZED_PARTS = (
    "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale",
    "weight_scale_inv", "input_scale", "input_zero_point", "qweight", "qzeros", "scales", "g_idx", "SCB",
    "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
)  # fmt: skip
SCALE_PARTS = ("weight_scale", "weight_scale_inv", "scales")
# What makes a module quantized; the other parts only come along.
SIGNS = ("weight_packed", "weight_scale", "weight_scale_inv", "qweight", "SCB", "weight.absmax")
# What tells whether a layer is as the config says.
SMALL_PARTS = ("qzeros", "g_idx")
SCALE_TILE = 4 * 2**20


@dataclass(frozen=True)
class LayerGroup:
    """Layers or tensors alike in name (numbers aside), shape and numbers.

    name: "model.layers.*.mlp.up_proj". numbers: "int4 group 128", "BF16". shape: of the weight [out, in], or of the
    tensor. nbytes: of all of them. scales: least and largest absolute scale; None without scales.
    """

    name: str
    count: int
    numbers: str
    shape: tuple[int, ...]
    parameters: int
    nbytes: int
    quantized: bool
    scales: tuple[float, float] | None

    @property
    def bits(self) -> float:
        """Bits per weight, scales and zero points included."""
        return 8 * self.nbytes / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class Inspection:
    """What is in a checkpoint. groups: in the order of the model. notes: what could not be told."""

    path: Path
    architecture: str
    quantization: str
    files: int
    nbytes: int
    tensors: int
    groups: tuple[LayerGroup, ...]
    notes: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Weights of the model, whatever they are stored as."""
        return sum(group.parameters for group in self.groups)

    @property
    def quantized(self) -> tuple[LayerGroup, ...]:
        """The quantized groups."""
        return tuple(group for group in self.groups if group.quantized)

    @property
    def bits(self) -> float:
        """Bits per weight over the whole model."""
        return 8 * sum(group.nbytes for group in self.groups) / self.parameters if self.parameters else 0.0

    @property
    def quantized_bits(self) -> float | None:
        """Bits per weight over the quantized layers; None if there are none."""
        parameters = sum(group.parameters for group in self.quantized)
        return 8 * sum(group.nbytes for group in self.quantized) / parameters if parameters else None


def inspect(path: str | Path, *, scales: bool = True) -> Inspection:
    """Say what is in the checkpoint in `path`.

    Args:
        path: a folder with config.json and safetensors files.
        scales: read the scales for their range; without, only headers are read.

    Raises:
        CheckpointError: the folder holds no checkpoint, or a damaged one.
    """
    checkpoint = open_checkpoint(path, allow_quantized=True)
    config = _quantization_config(checkpoint.config)
    notes: list[str] = []
    with TensorReader(checkpoint) as reader:
        weights = _weights(checkpoint, config, reader, notes)
        groups = tuple(_group(alike, reader if scales else None) for alike in _alike(weights))
    return Inspection(
        path=checkpoint.path,
        architecture=_architecture(checkpoint.config),
        quantization=_describe(config, groups),
        files=len(checkpoint.files),
        nbytes=checkpoint.nbytes,
        tensors=len(checkpoint.tensors),
        groups=groups,
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Weight:
    """One weight: a plain tensor, or a quantized layer with all that belongs to it."""

    name: str
    numbers: str
    shape: tuple[int, ...]
    parts: tuple[TensorEntry, ...]
    quantized: bool


def _quantization_config(config: Mapping[str, Any]) -> dict[str, Any]:
    for holder in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("quantization_config", "compression_config"):
            found = holder.get(key)
            if isinstance(found, dict):
                return found
    return {}


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if isinstance(names, list) and names:
        return str(names[0])
    return str(config.get("model_type", "unknown"))


def _describe(config: Mapping[str, Any], groups: Iterable[LayerGroup]) -> str:
    method = config.get("quant_method")
    if method is None:
        return "none named in config.json" if any(group.quantized for group in groups) else "none"
    detail = config.get("format") or config.get("checkpoint_format") or config.get("version")
    return f"{method}, {detail}" if isinstance(detail, str) else str(method)


def _weights(
    checkpoint: Checkpoint, config: Mapping[str, Any], reader: TensorReader, notes: list[str]
) -> list[_Weight]:
    modules: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in checkpoint.tensors.items():
        for part in QUANTIZED_PARTS:
            if name.endswith(f".{part}"):
                modules.setdefault(name.removesuffix(f".{part}"), {})[part] = entry
                break
    modules = {name: parts for name, parts in modules.items() if any(sign in parts for sign in SIGNS)}
    taken: set[str] = set()
    for name, parts in modules.items():
        if "qweight" not in parts and "weight_packed" not in parts and f"{name}.weight" in checkpoint.tensors:
            parts["weight"] = checkpoint.tensors[f"{name}.weight"]
        taken.update(entry.name for entry in parts.values())
    told = _told_by_config(config, modules, reader, notes)
    weights = [_quantized(name, parts, config, told.get(name), reader) for name, parts in modules.items()]
    weights += [
        _Weight(name, entry.dtype, entry.shape, (entry,), False)
        for name, entry in checkpoint.tensors.items()
        if name not in taken
    ]
    return sorted(weights, key=lambda weight: natural_order(weight.name))


def _told_by_config(
    config: Mapping[str, Any], modules: Mapping[str, Mapping[str, TensorEntry]], reader: TensorReader, notes: list[str]
) -> dict[str, str]:
    """What the config says of each layer's numbers, in words; a note where the layer says otherwise."""
    chosen = format_of_config(config)
    if chosen is None:
        return {}
    try:
        schemes = chosen.schemes_from_config(config, modules)
    except CheckpointError as error:
        notes.append(error.message)
        return {}
    remarks: dict[str, list[str]] = {}
    for name, scheme in schemes.items():
        small = [modules[name][part] for part in SMALL_PARTS if part in modules[name]]
        if scheme is not None and any(entry.name.endswith(".qzeros") for entry in small):
            remark = _remark(chosen, name, scheme, {entry.name: reader.read(entry.name) for entry in small})
            if remark is not None:
                remarks.setdefault(remark, []).append(name)
    notes += [f"{names[0]} and {len(names) - 1} more: {remark}" for remark, names in remarks.items()]
    return {name: str(scheme) for name, scheme in schemes.items() if scheme is not None}


def _remark(chosen: Format, name: str, scheme: Scheme, small: Mapping[str, torch.Tensor]) -> str | None:
    zeros = small[f"{name}.qzeros"]
    try:
        return chosen.remark(name, small, scheme, zeros.shape[-1] * 32 // scheme.bits)
    except CheckpointError as error:
        return error.message


def _quantized(
    name: str, parts: Mapping[str, TensorEntry], config: Mapping[str, Any], told: str | None, reader: TensorReader
) -> _Weight:
    numbers = told or "+".join(sorted({f"{entry.dtype} {part}" for part, entry in parts.items()}))
    if told is None and "weight_scale_inv" in parts:
        numbers = "fp8 in blocks"
    return _Weight(name, numbers, _shape(parts, config, reader), tuple(parts.values()), True)


def _shape(parts: Mapping[str, TensorEntry], config: Mapping[str, Any], reader: TensorReader) -> tuple[int, ...]:
    """[out, in] of a quantized weight as far as it can be told, else the shape of what is stored."""
    if "weight_shape" in parts and (parts["weight_shape"].dtype, parts["weight_shape"].shape) == ("I64", (2,)):
        sizes = tuple(int(size) for size in reader.read(parts["weight_shape"].name).tolist())
        if min(sizes) > 0:
            return sizes
    if "qweight" in parts:
        stored = parts["qweight"].shape
        bits = config.get("bits", config.get("w_bit", 4))
        if len(stored) != 2 or type(bits) is not int or not 1 <= bits <= 8:
            return stored
        if config.get("quant_method") == "awq":
            return (stored[1] * 32 // bits, stored[0])
        return (stored[1], stored[0] * 32 // bits)
    return next((parts[part].shape for part in ("weight_packed", "weight") if part in parts), ())


def _alike(weights: Iterable[_Weight]) -> list[list[_Weight]]:
    """Weights that differ only in the numbers of their names."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[_Weight]] = {}
    for weight in weights:
        groups.setdefault((_pattern(weight.name), weight.numbers, weight.shape), []).append(weight)
    return list(groups.values())


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _group(members: list[_Weight], reader: TensorReader | None) -> LayerGroup:
    first = members[0]
    parts = [entry for weight in members for entry in weight.parts]
    return LayerGroup(
        name=first.name if len(members) == 1 else _pattern(first.name),
        count=len(members),
        numbers=first.numbers,
        shape=first.shape,
        parameters=len(members) * (math.prod(first.shape) if first.shape or not first.quantized else 0),
        nbytes=sum(entry.nbytes for entry in parts),
        quantized=first.quantized,
        scales=None if reader is None else _scale_range(reader, parts),
    )


def _scale_range(reader: TensorReader, parts: Iterable[TensorEntry]) -> tuple[float, float] | None:
    least, largest = math.inf, 0.0
    found = False
    for entry in parts:
        if entry.dtype not in WEIGHT_DTYPES or not entry.name.endswith(SCALE_PARTS) or entry.nbytes == 0:
            continue
        for start in range(0, entry.nbytes, SCALE_TILE):
            tile = torch.empty(min(SCALE_TILE, entry.nbytes - start), dtype=torch.uint8)
            reader.read_bytes(entry.name, start, tile)
            sizes = tile.view(entry.torch_dtype).to(torch.float32).abs()
            # NaN stays visible: a range with NaN in it says that something is wrong.
            low, high = float(sizes.min()), float(sizes.max())
            least = low if math.isnan(low) or math.isnan(least) else min(least, low)
            largest = high if math.isnan(high) or math.isnan(largest) else max(largest, high)
            found = True
    return (least, largest) if found else None
