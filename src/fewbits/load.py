"""Load: a checkpoint as a transformers model whose quantized linears stay packed and run on quantized kernels.

Everything that can be known from headers is checked first: names, shapes, schemes, kernels, memory. Then tensors are
read one by one into their places, so the peak stays near the size of the files.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbits.checkpoints.reader import Checkpoint, TensorReader, open_checkpoint
from fewbits.decoded import StoredLayer, split_quantized
from fewbits.devices import free_bytes, usable_device
from fewbits.errors import CalibrationError, CheckpointError, KernelError
from fewbits.formats import FORMATS
from fewbits.kernels.choose import choose
from fewbits.kernels.spec import LinearSpec, machine_of
from fewbits.linear import QuantLinear
from fewbits.notes import Note
from fewbits.progress import Progress, Silent
from fewbits.saving import keep_packed_when_saved
from fewbits.skeleton import Recipe, build_model, convert, kept_in_fp32, parameter_recipes

# Beyond the weights: what a forward of a few hundred tokens and the kernels' scratch take.
HEADROOM_BYTES = 256 * 2**20
FLOAT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
OTHER_MODEL_HINT = "is config.json that of another model? fetch all files of the checkpoint anew"


def load(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    progress: Progress | None = None,
) -> Any:
    """Load a checkpoint, quantized or not, as a transformers causal language model.

    Args:
        folder: made by fewbits, or by others in one of `fewbits.formats.FORMATS`.
        device: where it runs.
        dtype: of activations and of weights that are not quantized; the checkpoint's own by default.
        progress: who is told of progress, and of linears that had to be decoded.

    Returns:
        The model, with every quantized linear a `QuantLinear`. `model.load_notes` holds what did not go the plain way.

    Raises:
        CheckpointError: the folder holds no whole model that transformers knows, or numbers that fewbits does not.
        KernelError: there is no such device, no kernel for a layer on it, or not enough memory.
        MissingDependencyError: transformers is not installed.
    """
    loading = _Loading(open_checkpoint(folder, allow_quantized=True), usable_device(device), dtype)
    return loading.run(progress or Silent())


@dataclass
class _Loading:
    """One call of `load` under way."""

    checkpoint: Checkpoint
    device: torch.device
    asked_dtype: torch.dtype | None
    notes: list[Note] = field(default_factory=list)

    def run(self, progress: Progress) -> Any:
        self._check_modules()
        self._check_names()
        self._check_shapes()
        self._check_kernels()
        self._check_memory()
        progress.begin("load", sum(entry.nbytes for entry in self.checkpoint.tensors.values()), "bytes")
        for note in self.notes:
            progress.note(note)
        with TensorReader(self.checkpoint) as reader, torch.no_grad():
            for target, recipe in self.recipes.items():
                if target in self.linears:
                    self._place_linear(target, reader)
                else:
                    self._place_values(target, recipe, reader)
                progress.advance(sum(self._source_bytes(name) for name, _ in recipe.sources), target)
        progress.end()
        return self._finished()

    @cached_property
    def model(self) -> Any:
        """The model on the meta device."""
        try:
            return build_model(self.checkpoint.path, self.dtype)
        except CalibrationError as error:
            raise CheckpointError(error.message, "update transformers") from error

    @cached_property
    def dtype(self) -> torch.dtype:
        """What was asked for, or what most of the unquantized numbers are stored in."""
        sizes: Counter[str] = Counter()
        for entry in (self.checkpoint.tensors[name] for name in self.plain):
            if entry.dtype in FLOAT_DTYPES:
                sizes[entry.dtype] += entry.nbytes
        return self.asked_dtype or (FLOAT_DTYPES[sizes.most_common(1)[0][0]] if sizes else torch.bfloat16)

    @cached_property
    def _split(self) -> tuple[dict[str, StoredLayer], list[str]]:
        return split_quantized(self.checkpoint)

    @property
    def quantized(self) -> dict[str, StoredLayer]:
        """Quantized linears by their name in the files."""
        return self._split[0]

    @property
    def plain(self) -> list[str]:
        """The names of all other tensors."""
        return self._split[1]

    @cached_property
    def stored_modules(self) -> dict[str, str]:
        """The module in the files by the name its decoded weight would have."""
        return {f"{module}.weight": module for module in self.quantized}

    @cached_property
    def recipes(self) -> dict[str, Recipe]:
        """Which parameters of the model come of which tensors, decoded weights among them."""
        return parameter_recipes(self.model, [*self.plain, *self.stored_modules])

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """[out, in] of quantized weights by their module in the files."""
        with TensorReader(self.checkpoint) as reader:
            return {
                module: FORMATS[layer.format].shape_of(
                    module, layer.scheme, {name: self.checkpoint.tensors[name] for name in layer.tensors}, reader.read
                )
                for module, layer in self.quantized.items()
            }

    @cached_property
    def linears(self) -> dict[str, str]:
        """Weights of the model that stay packed, with their module in the files."""
        found = {}
        for target, recipe in self.recipes.items():
            module = self.stored_modules.get(recipe.sources[-1][0])
            owner = self.model.get_submodule(target.rpartition(".")[0])
            if module is not None and recipe.converter is None and type(owner) is nn.Linear:
                found[target] = module
        return found

    def _check_modules(self) -> None:
        for module, layer in self.quantized.items():
            if f"{module}.weight" in self.plain:
                raise CheckpointError(f"{module} has a weight beside its {len(layer.tensors)} quantized tensors.")

    def _check_names(self) -> None:
        """Every parameter has a source, and what has none here is said."""
        # Of tied parameters the files need hold only one, whichever.
        made = set(self.recipes)
        for target, source in self.model.all_tied_weights_keys.items():
            made |= {target, source} if made & {target, source} else set()
        given = {name for recipe in self.recipes.values() for name, _ in recipe.sources}
        foreign = [name for name in (*self.stored_modules, *self.plain) if name not in given]
        converted = {target.rpartition(".")[0] for target, recipe in self.recipes.items() if recipe.converter}
        missing = [
            name
            for name, _ in self.model.named_parameters()
            if name not in made and name.rpartition(".")[0] not in converted
        ]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            instead = f"; {foreign[0]} is there, which this model does not have" if foreign else ""
            raise CheckpointError(
                f"{self.checkpoint.path}: no weights for {missing[0]}{more} of {type(self.model).__name__}{instead}.",
                OTHER_MODEL_HINT,
            )
        ignored = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        for name in foreign:
            if not name.endswith("rotary_emb.inv_freq") and not any(part in name for part in ignored):
                self.notes.append(Note(name, "left out", f"{type(self.model).__name__} has nothing of that name"))

    def _check_shapes(self) -> None:
        """Shapes of what is not stacked, and notes for what must be decoded."""
        expected = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        for target, recipe in self.recipes.items():
            source = recipe.sources[-1][0]
            module = self.stored_modules.get(source)
            self._check_numbers(target, recipe)
            if recipe.converter is None:
                found = self.checkpoint.tensors[source].shape if module is None else self.shapes[module]
                if tuple(found) != expected[target]:
                    raise CheckpointError(
                        f"{source} has the shape {list(found)}; the model's config says {list(expected[target])}.",
                        "config.json and the weights belong to different models: fetch both anew",
                    )
            stacked = [name for name, _ in recipe.sources if name in self.stored_modules]
            if stacked and target not in self.linears:
                why = f"{len(recipe.sources)} tensors of the files are one parameter of the model"
                if recipe.converter is None:
                    why = f"{type(self.model.get_submodule(target.rpartition('.')[0])).__name__} is no plain linear"
                self.notes.append(Note(target, f"decoded to {self.dtype}".replace("torch.", ""), why))

    def _check_numbers(self, target: str, recipe: Recipe) -> None:
        """What is read as it is must be floats: codes without their scales would pass for weights."""
        for name in (name for name, _ in recipe.sources if name not in self.stored_modules):
            entry = self.checkpoint.tensors[name]
            if target.endswith(".weight") and entry.dtype not in FLOAT_DTYPES and entry.dtype != "F64":
                raise CheckpointError(
                    f"{name} is {entry.dtype} {list(entry.shape)}, and no scales are stored beside it.",
                    "the checkpoint is damaged, or quantized in a way that its config.json does not say",
                )

    def _check_kernels(self) -> None:
        for target, module in self.linears.items():
            out_features, in_features = self.shapes[module]
            for tokens in (1, 512):
                spec = LinearSpec(
                    self.quantized[module].scheme, in_features, out_features, tokens, self.dtype, self.device.type,
                    machine_of(self.device),
                )  # fmt: skip
                try:
                    choose(spec)
                except KernelError as error:
                    raise KernelError(f"{target.removesuffix('.weight')}: {error.message}", error.hint) from error

    def _check_memory(self) -> None:
        packed = sum(self._source_bytes(f"{module}.weight") for module in self.linears.values())
        state = self.model.state_dict(keep_vars=True)
        rest = {id(tensor): tensor for name, tensor in state.items() if name not in self.linears}
        whole = sum(tensor.numel() * tensor.element_size() for tensor in rest.values())
        free = free_bytes(self.device)
        if free is not None and packed + whole + HEADROOM_BYTES > free:
            raise KernelError(
                f"{self.checkpoint.path} needs {_gib(packed + whole)} on {self.device}: {_gib(packed)} of packed "
                f"weights and {_gib(whole)} of others, and {_gib(HEADROOM_BYTES)} to work with; {_gib(free)} are free.",
                "free some memory, or quantize to fewer bits",
            )

    def _source_bytes(self, name: str) -> int:
        module = self.stored_modules.get(name)
        names = (name,) if module is None else self.quantized[module].tensors
        return sum(self.checkpoint.tensors[part].nbytes for part in names)

    def _decode(self, module: str, reader: TensorReader) -> Any:
        layer = self.quantized[module]
        return FORMATS[layer.format].decode(
            module, {name: reader.read(name) for name in layer.tensors}, layer.scheme, self.shapes[module]
        )

    def _place_linear(self, target: str, reader: TensorReader) -> None:
        path = target.rpartition(".")[0]
        linear = self.model.get_submodule(path)
        bias = self.recipes.get(f"{path}.bias")
        value = None if bias is None else reader.read(bias.sources[-1][0]).to(self.dtype)
        weight = self._decode(self.linears[target], reader)
        packed = QuantLinear(weight, value, dtype=self.dtype, device=self.device, name=path)
        packed.training = linear.training
        parent, _, leaf = path.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, packed)

    def _place_values(self, target: str, recipe: Recipe, reader: TensorReader) -> None:
        def read(name: str) -> torch.Tensor:
            module = self.stored_modules.get(name)
            return reader.read(name) if module is None else self._decode(module, reader).dequantize(self.dtype)

        for name, value in convert(target, recipe, read, self.model).items():
            path, _, key = name.rpartition(".")
            module = self.model.get_submodule(path)
            if isinstance(module, QuantLinear):
                continue  # Its bias came with the weight.
            if key in module._buffers:
                old = module._buffers[key]
                module._buffers[key] = value.to(self.device, None if old is None else old.dtype)
                continue
            parameter = module._parameters[key]
            assert parameter is not None
            if parameter.shape != value.shape:
                raise CheckpointError(
                    f"{name} has the shape {list(value.shape)} when stacked; the config says {list(parameter.shape)}."
                )
            wide = any(part in name for part in kept_in_fp32(self.model))
            dtype = torch.float32 if wide else parameter.dtype
            module._parameters[key] = nn.Parameter(value.to(self.device, dtype), requires_grad=False)

    def _finished(self) -> Any:
        _tie(self.model)
        missing = [name for name, parameter in self.model.named_parameters() if parameter.is_meta]
        if missing:
            raise CheckpointError(f"{self.checkpoint.path}: no weights for {missing[0]}.", OTHER_MODEL_HINT)
        model = self.model.to(self.device)
        model.name_or_path = str(self.checkpoint.path)
        _adopt_generation_config(model, self.checkpoint.path)
        model.load_notes = tuple(self.notes)
        if self.quantized:
            stored_as = next(iter(self.quantized.values())).format
            whole = len(self.linears) == len(self.quantized)
            keep_packed_when_saved(model, self.checkpoint.config["quantization_config"], stored_as, whole)
        return model


def _tie(model: Any) -> None:
    """Give tied parameters one memory, whichever of them the files hold."""
    for target, source in model.all_tied_weights_keys.items():
        owners = [model.get_submodule(name.rpartition(".")[0]) for name in (target, source)]
        if any(isinstance(owner, QuantLinear) for owner in owners):
            continue
        keys = [name.rpartition(".")[2] for name in (target, source)]
        first, second = (owner._parameters[key] for owner, key in zip(owners, keys, strict=True))
        if second.is_meta:
            owners[1]._parameters[keys[1]] = first
        elif first.is_meta or (first.shape == second.shape and torch.equal(first, second)):
            owners[0]._parameters[keys[0]] = second


def _adopt_generation_config(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").exists():
        try:
            model.generation_config = GenerationConfig.from_pretrained(str(folder))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}/generation_config.json cannot be used: {error}") from error


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
