"""Plan: what would be done to every layer, what it would take, and who could load the result. Reads headers only.

Everything that can be refused is refused here, before any tensor data is read. The byte counts are those of the files
that `quantize` then writes, headers included.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fewbits.checkpoints.reader import Checkpoint, open_checkpoint
from fewbits.config import QuantConfig
from fewbits.engines import EngineSupport, PlannedScheme, engine_support
from fewbits.errors import ConfigError, PlanError
from fewbits.formats import DEFAULT_FORMAT, FORMATS, Format
from fewbits.kernels.threads import thread_count
from fewbits.layers import LinearLayer, block_index, find_layers, fusion_groups
from fewbits.layout import OutputTensor, Shard
from fewbits.methods import QuantMethod
from fewbits.notes import Note
from fewbits.pass_memory import CalibrationSize, pass_bytes
from fewbits.patterns import Overrides, nearest_layer
from fewbits.schemes import Scheme

COMMON_GROUP_SIZES = (32, 64, 128, 256)
# Small enough to stay in the cache between reading, rounding and hashing.
TILE_BYTES = 4 * 2**20
# Interpreter, torch and compiled kernels; measured on Linux with torch 2.13 (bench/streaming.py).
PROCESS_BYTES = 320 * 2**20


@dataclass(frozen=True)
class PlannedLayer:
    """One linear layer: what becomes of it, and its bytes before and after (codes, scales and zero points).

    scale_dtype: safetensors name of what its scales are stored in.
    """

    layer: LinearLayer
    method: QuantMethod | None
    reason: str | None
    outputs: tuple[OutputTensor, ...]
    bytes_before: int
    bytes_after: int
    scale_dtype: str

    @property
    def name(self) -> str:
        return self.layer.name

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        return (self.layer.out_features, self.layer.in_features)

    @property
    def parameters(self) -> int:
        return self.layer.out_features * self.layer.in_features

    @property
    def is_calibrated(self) -> bool:
        """Whether its method looks at activations."""
        return self.method is not None and self.method.needs_calibration

    @property
    def is_compensated(self) -> bool:
        """Whether its codes make up for each other's errors, which is where weighing tokens pays."""
        return self.method is not None and self.method.solver_name == "gptq"

    @property
    def bits(self) -> float:
        """Bits per weight on disk, scales and zero points included."""
        return 8 * self.bytes_after / self.parameters


@dataclass(frozen=True)
class Plan:
    """The whole plan for one checkpoint."""

    source: Checkpoint
    config: QuantConfig
    format: str
    layers: tuple[PlannedLayer, ...]
    shards: tuple[Shard, ...]
    engines: tuple[EngineSupport, ...]
    notes: tuple[Note, ...]
    calibration: CalibrationSize
    peak_memory_bytes: int

    @property
    def quantized(self) -> tuple[PlannedLayer, ...]:
        """The layers that will be quantized."""
        return tuple(layer for layer in self.layers if layer.method is not None)

    @property
    def schemes(self) -> dict[str, Scheme | None]:
        """The scheme of every linear layer by name; None where it stays unquantized."""
        return _schemes(self.layers)

    @property
    def bytes_before(self) -> int:
        """Bytes of the source's weight files."""
        return self.source.nbytes

    @property
    def bytes_after(self) -> int:
        """Bytes of the weight files that will be written."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def effective_bits(self) -> float:
        """Bits per weight over the quantized layers, scales and zero points included."""
        parameters = sum(layer.parameters for layer in self.quantized)
        return 8 * sum(layer.bytes_after for layer in self.quantized) / parameters

    @property
    def needs_calibration(self) -> tuple[PlannedLayer, ...]:
        """The layers whose method looks at activations."""
        return tuple(layer for layer in self.layers if layer.is_calibrated)


def plan(
    model_dir: str | Path,
    config: QuantConfig,
    *,
    format: str = DEFAULT_FORMAT,
    carry: Sequence[str] = (),
    samples: int = 128,
    length: int = 2048,
    importance: str = "auto",
) -> Plan:
    """Say what `quantize` would do to the checkpoint in `model_dir`, from headers alone.

    Args:
        model_dir: a Hugging Face checkpoint folder (safetensors).
        config: methods by layer.
        format: how the result lies on disk.
        samples, length, importance: of calibration, as `quantize` takes them: for the estimate of memory.
        carry: layers to leave unquantized whatever the config says (found to hold non-finite weights).

    Raises:
        CheckpointError: the folder is no readable, unquantized checkpoint.
        QuantizationError: the config is invalid.
        PlanError: config and model do not go together: a pattern that matches nothing, a group size that does not
            divide, a width that the format cannot store; or there is no such format.
    """
    if not isinstance(config, QuantConfig):
        raise ConfigError(f"config must be a QuantConfig, got {config!r}.", "give QuantConfig(method)")
    config.validate()
    if format not in FORMATS:
        raise PlanError(f"'{format}' is no format.", f"known are {', '.join(FORMATS)}")
    checkpoint = open_checkpoint(model_dir)
    linears, notes = find_layers(checkpoint.headers, checkpoint.config)
    _refuse_unmatched(config, checkpoint, linears)
    overrides = config.overrides()
    chosen = [_choose(layer, config, overrides, carry) for layer in linears]
    chosen_format = _settled(format, chosen, notes)
    _refuse_impossible(chosen, chosen_format)
    layers = tuple(_with_outputs(layer, method, reason, checkpoint, chosen_format) for layer, method, reason in chosen)
    if not any(layer.method is not None for layer in layers):
        raise PlanError(
            f"{checkpoint.path}: nothing is left to quantize: {len(layers)} linear layers found, all of them skipped.",
            "name a method for at least one layer; `fewbits inspect` lists the layers",
        )
    reason = chosen_format.why_not_together(_schemes(layers))
    if reason is not None:
        raise PlanError(
            f"{checkpoint.path}: these layers cannot be stored together: {reason}.",
            f"--format {DEFAULT_FORMAT} stores any mix of schemes",
        )
    unlike = _unlike_fusions(layers)
    notes += [Note(fusion, "engines that fuse these layers will refuse them", "unlike schemes") for fusion in unlike]
    by_loss = importance == "loss" or (importance == "auto" and any(layer.is_compensated for layer in layers))
    calibration = CalibrationSize(samples, length, by_loss)
    planned_schemes = [
        PlannedScheme(layer.name, *layer.shape, layer.method.scheme) for layer in layers if layer.method is not None
    ]
    return Plan(
        source=checkpoint,
        config=config,
        format=chosen_format.NAME,
        layers=layers,
        shards=_shards(checkpoint, layers),
        engines=engine_support(planned_schemes, unlike, chosen_format.NAME),
        notes=tuple(notes),
        calibration=calibration,
        peak_memory_bytes=max(
            PROCESS_BYTES + 8 * TILE_BYTES + _collected_bytes(chosen_format, layers),
            _calibrated_bytes(checkpoint, layers, calibration),
        ),
    )


def _calibrated_bytes(checkpoint: Checkpoint, layers: Iterable[PlannedLayer], calibration: CalibrationSize) -> int:
    solved = [(layer.layer, layer.method) for layer in layers if layer.method is not None and layer.is_calibrated]
    return pass_bytes(checkpoint.tensors, checkpoint.config, solved, calibration) if solved else 0


def _schemes(layers: Iterable[PlannedLayer]) -> dict[str, Scheme | None]:
    return {layer.name: None if layer.method is None else layer.method.scheme for layer in layers}


def _collected_bytes(chosen_format: Format, layers: Iterable[PlannedLayer]) -> int:
    """What whole weights take in memory, one a thread, where tiles of rows do not follow each other in the file."""
    if chosen_format.ROW_AXIS == 0:
        return 0
    return thread_count() * max(layer.bytes_after for layer in layers if layer.method is not None)


def _settled(format: str, chosen: Iterable[Choice], notes: list[Note]) -> Format:
    """The variation of the format that stores all that was chosen."""
    name = FORMATS[format].settled(method.scheme for _, method, _ in chosen if method is not None)
    if name != format:
        notes.append(Note("the checkpoint", f"written as {name}", f"{format} cannot store all of its schemes"))
    return FORMATS[name]


Choice = tuple[LinearLayer, QuantMethod | None, str | None]


def _choose(
    layer: LinearLayer, config: QuantConfig, overrides: Overrides[QuantMethod | None], carry: Sequence[str]
) -> Choice:
    named, method = overrides.find(layer.name, left_alone=layer.default_skip is not None)
    if layer.name in carry:
        return layer, None, "non-finite weights"
    if named:
        return layer, method, None if method is not None else "skipped by the config"
    if layer.default_skip is not None:
        return layer, None, layer.default_skip
    return layer, config.method, None


def _refuse_unmatched(config: QuantConfig, checkpoint: Checkpoint, linears: list[LinearLayer]) -> None:
    names = [layer.name for layer in linears]
    unmatched = config.unmatched_patterns(names)
    if not unmatched:
        return
    pattern = unmatched[0]
    if f"{pattern}.weight" in checkpoint.tensors:
        shape = list(checkpoint.tensors[f"{pattern}.weight"].shape)
        raise PlanError(
            f"{checkpoint.path}: {pattern} ({shape}) is no linear layer that can be quantized.",
            "remove it from per_layer; embeddings, norms, convolutions and fused experts are carried over unchanged",
        )
    if pattern == "lm_head" and checkpoint.config.get("tie_word_embeddings", True):
        raise PlanError(
            f"{checkpoint.path}: lm_head has no weight of its own: it is tied to the embeddings.",
            "remove it from per_layer; tied weights stay tied",
        )
    raise PlanError(
        f"{checkpoint.path}: '{pattern}' in per_layer matches no linear layer.", nearest_layer(pattern, names)
    )


def _refuse_impossible(chosen: list[Choice], chosen_format: Format) -> None:
    ragged: dict[tuple[int, int], list[str]] = {}
    for layer, method, _ in chosen:
        if method is None:
            continue
        scheme = method.scheme
        if layer.transposed:
            raise PlanError(
                f"{layer.name} is a Conv1D (its weight is stored [in, out]), which no reader of this format accepts.",
                f'leave it alone: "{layer.name}" = "skip" under per_layer',
            )
        if not scheme.divides(layer.in_features):
            ragged.setdefault((layer.in_features, scheme.group_size), []).append(layer.name)
            continue
        refusal = chosen_format.why_not(scheme, (layer.out_features, layer.in_features))
        if refusal is not None:
            raise PlanError(f"{layer.name}: {method} cannot be stored: {refusal}.", _elsewhere(layer, scheme))
    if ragged:
        raise PlanError("\n".join(_ragged_line(*key, names) for key, names in ragged.items()), _ragged_hint(ragged))


def _elsewhere(layer: LinearLayer, scheme: Scheme) -> str:
    """A hint at a format that does store this scheme, if there is one."""
    for name, other in FORMATS.items():
        settled = FORMATS[other.settled([scheme])]
        if settled.why_not(scheme, (layer.out_features, layer.in_features)) is None:
            return f"--format {name} stores it"
    return "give this layer another method in a recipe (--config)"


def _ragged_line(in_features: int, group_size: int, names: list[str]) -> str:
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    verb = "have" if others else "has"
    return f"{names[0]}{others} {verb} in_features {in_features}, which group size {group_size} does not divide."


def _ragged_hint(ragged: dict[tuple[int, int], list[str]]) -> str:
    fitting = [str(size) for size in COMMON_GROUP_SIZES if all(width % size == 0 for width, _ in ragged)]
    sizes = ", ".join([*fitting, '"channel"'])
    return f"group sizes that fit: {sizes}; or give these layers their own method in a recipe (--config)"


def _with_outputs(
    layer: LinearLayer, method: QuantMethod | None, reason: str | None, checkpoint: Checkpoint, chosen_format: Format
) -> PlannedLayer:
    entry = checkpoint.tensors[layer.tensor]
    scale_dtype = chosen_format.scale_dtype(entry.dtype)
    if method is None:
        outputs: tuple[OutputTensor, ...] = (OutputTensor(entry.name, entry.dtype, entry.shape),)
    else:
        shape = (layer.out_features, layer.in_features)
        outputs = chosen_format.tensors_for(layer.name, method.scheme, shape, scale_dtype)
    after = sum(tensor.nbytes for tensor in outputs)
    return PlannedLayer(layer, method, reason, outputs, entry.nbytes, after, scale_dtype)


def _unlike_fusions(layers: Iterable[PlannedLayer]) -> list[str]:
    by_name = {layer.name: layer for layer in layers}
    unlike = []
    for names in fusion_groups([layer.layer for layer in by_name.values()]):
        schemes = {None if method is None else method.scheme for method in (by_name[name].method for name in names)}
        if len(schemes) > 1:
            unlike.append(", ".join(names))
    return unlike


def _shards(checkpoint: Checkpoint, layers: Iterable[PlannedLayer]) -> tuple[Shard, ...]:
    """One shard a block, so that a block is the unit that is finished, recorded and resumed from."""
    outputs = {layer.layer.tensor: layer.outputs for layer in layers}
    by_block: dict[int | None, list[OutputTensor]] = {}
    for name, entry in checkpoint.tensors.items():
        tensors = outputs.get(name, (OutputTensor(name, entry.dtype, entry.shape),))
        by_block.setdefault(block_index(name), []).extend(tensors)
    order = sorted(by_block, key=lambda block: -1 if block is None else block)
    if len(order) == 1:
        return (Shard("model.safetensors", tuple(by_block[order[0]])),)
    count = len(order)
    return tuple(
        Shard(f"model-{number:05d}-of-{count:05d}.safetensors", tuple(by_block[block]))
        for number, block in enumerate(order, start=1)
    )


def without(planned: Plan, nonfinite: Sequence[str]) -> Plan:
    """The same plan with the named layers carried over unquantized."""
    again = plan(planned.source.path, planned.config, format=planned.format, carry=nonfinite)
    notes = tuple(Note(name, "carried over unquantized", "holds NaN or infinite weights") for name in nonfinite)
    return replace(
        again,
        notes=again.notes + notes,
        calibration=planned.calibration,
        peak_memory_bytes=planned.peak_memory_bytes,
    )
