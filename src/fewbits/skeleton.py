"""Skeleton: a transformers model without its weights, and where in the files each of them comes from.

Parameters are on the meta device until asked for; buffers (rotary frequencies and the like) are real from the start.
Names and layouts in the files may differ from the model's (a prefix, experts stacked on load): transformers' own
conversion rules are applied to a block's tensors at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fewbits.checkpoints.reader import Checkpoint, TensorReader
from fewbits.errors import CalibrationError, CheckpointError, MissingDependencyError
from fewbits.unusable import reason_of, unusable

EXTRA_HINT = "pip install 'fewbits[transformers]'"


@dataclass(frozen=True)
class Part:
    """Where one tensor of the files lies within a parameter: these rows of this slice of it."""

    tensor: str
    expert: int | None
    start: int
    stop: int


@dataclass
class Recipe:
    """How one or more parameters are made of tensors of the files."""

    converter: Any | None
    sources: list[tuple[str, str]] = field(default_factory=list)  # (tensor in the files, the converter's pattern)


class Skeleton:
    """A causal language model on the meta device.

    model: the transformers model. blocks: its decoder blocks in order. block_names: their full names. device: where
    weights go as they are materialized.

    Raises:
        CheckpointError: the files lack weights of some block.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        reader: TensorReader,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model = model
        self.device = torch.device(device)
        self._checkpoint = checkpoint
        self._reader = reader
        prefix, self.blocks = find_blocks(model)
        self.block_names = [f"{prefix}.{index}" for index in range(len(self.blocks))]
        self._decoder_name = _model_around(model, prefix)
        self._recipes = parameter_recipes(model, checkpoint.tensors)
        self._keep_fp32 = kept_in_fp32(model)
        self._owners: dict[int | None, dict[str, Recipe]] = {}
        numbers = {name: index for index, name in enumerate(self.block_names)}
        for target, recipe in self._recipes.items():
            owner = numbers.get(".".join(target.split(".")[: prefix.count(".") + 2]))
            self._owners.setdefault(owner, {})[target] = recipe
        self._require_weights()
        for module in model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[key] = buffer.to(self.device)

    def _require_weights(self) -> None:
        """Find out before any work whether the files have something for every parameter of every block."""
        missing = [
            f"{prefix}.{name}"
            for prefix, block in zip(self.block_names, self.blocks, strict=True)
            for name, _ in block.named_parameters()
            if f"{prefix}.{name}" not in self._recipes
        ]
        if missing:
            raise _missing(missing)

    @property
    def decoder(self) -> nn.Module:
        """The model without its head: the innermost model around the blocks."""
        return self.model.get_submodule(self._decoder_name)

    def read(self, tensor: str) -> torch.Tensor:
        """A tensor as it lies in the files."""
        return self._reader.read(tensor)

    def materialize_rest(self, head: bool = False) -> None:
        """Give the parameters outside the blocks their values, those of the head only if asked for."""
        if head:
            module, prefix = self.model, ""
        else:
            module = self.decoder
            prefix = self._decoder_name + "." if self._decoder_name else ""
        self._install({name: recipe for name, recipe in self._owners.get(None, {}).items() if name.startswith(prefix)})
        if head:
            cast(Any, self.model).tie_weights()
        inside = {id(parameter) for block in self.blocks for parameter in block.parameters()}
        missing = [
            prefix + name
            for name, parameter in module.named_parameters()
            if parameter.is_meta and id(parameter) not in inside
        ]
        if missing:
            raise _missing(missing)

    @property
    def hidden_bytes(self) -> int:
        """Bytes of one token's hidden states."""
        config = cast(Any, self.model).config.get_text_config()
        return int(config.hidden_size) * self.element_size

    @property
    def element_size(self) -> int:
        """Bytes of one number in the forward."""
        return next(self.model.parameters()).element_size()

    @property
    def vocabulary(self) -> int:
        """How many logits a token has."""
        return int(cast(Any, self.model).config.get_text_config().vocab_size)

    def head(
        self, hidden: torch.Tensor, output_type: type, product: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Logits of last hidden states [batch, length, width], by the model's own way of making them.

        Args:
            output_type: what the decoder returns them in.
            product: takes the place of the product of `head_linear`, to make some of the logits alone.
        """
        # The model runs with a decoder that has its answer ready; so what it does to logits (soft caps) is done.
        decoder, linear = self.decoder, self.head_linear
        decoder.forward = lambda *args, **kwargs: output_type(last_hidden_state=hidden)
        try:
            if product is not None and linear is not None:
                cast(Any, linear).forward = product
            ids = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=self.device)
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
            return logits
        finally:
            del decoder.forward
            if product is not None and linear is not None:
                del cast(Any, linear).forward

    @property
    def head_linear(self) -> nn.Linear | None:
        """The linear that makes logits, if it is one."""
        linear = cast(Any, self.model).get_output_embeddings()
        return linear if isinstance(linear, nn.Linear) else None

    def release_rest(self) -> None:
        """Drop everything outside the blocks."""
        inside = {id(module) for block in self.blocks for module in block.modules()}
        for module in self.model.modules():
            if id(module) not in inside:
                _drop(module)

    def release_embeddings(self) -> None:
        """Drop the tables of embeddings, which nothing needs again once the first block was reached."""
        inside = {id(module) for block in self.blocks for module in block.modules()}
        for module in self.model.modules():
            if isinstance(module, nn.Embedding) and id(module) not in inside:
                _drop(module)

    @contextmanager
    def materialized(self, index: int) -> Iterator[nn.Module]:
        """The block with its weights, for as long as the context lasts."""
        block = self.blocks[index]
        try:
            self._install(self._owners.get(index, {}))
            missing = [name for name, parameter in block.named_parameters() if parameter.is_meta]
            if missing:
                raise _missing([f"{self.block_names[index]}.{name}" for name in missing])
            yield block
        finally:
            for module in block.modules():
                _drop(module)

    def parts(self, index: int) -> dict[str, list[Part]]:
        """By parameter (its name within the block): the tensors of the files that it is made of, and where they lie."""
        prefix = self.block_names[index] + "."
        shapes = {name: tuple(parameter.shape) for name, parameter in self.blocks[index].named_parameters()}
        found: dict[str, list[Part]] = {}
        for target, recipe in self._owners.get(index, {}).items():
            name = target.removeprefix(prefix)
            if recipe.converter is None:
                shape = shapes.get(name)
                if shape is not None and len(shape) == 2:
                    found[name] = [Part(recipe.sources[0][0], None, 0, shape[0])]
            else:
                for converted, parts in self._traced(target, recipe).items():
                    found[converted.removeprefix(prefix)] = parts
        return found

    def tensor_of(self, index: int, parameter: str) -> str | None:
        """The tensor of the files that a block's parameter is, unchanged; None if it is made of others."""
        recipe = self._owners.get(index, {}).get(f"{self.block_names[index]}.{parameter}")
        return None if recipe is None or recipe.converter is not None else recipe.sources[-1][0]

    def _traced(self, target: str, recipe: Recipe) -> dict[str, list[Part]]:
        """Find where tensors end up by converting stand-ins of one column that hold their tensor's number."""
        names = [name for name, _ in recipe.sources]
        stand_ins = {}
        for number, name in enumerate(names):
            shape = self._checkpoint.tensors[name].shape
            if len(shape) != 2:
                return {}
            stand_ins[name] = torch.full((shape[0], 1), number, dtype=torch.int32)
        found = {}
        for converted, value in convert(target, recipe, stand_ins.__getitem__, self.model).items():
            parameter = self.model.get_parameter(converted)
            if value.shape[:-1] == parameter.shape[:-1] and value.shape[-1] == 1 and value.dim() in (2, 3):
                found[converted] = list(_runs(value.squeeze(-1), names))
        return found

    def _install(self, recipes: dict[str, Recipe]) -> None:
        for target, recipe in recipes.items():
            for name, value in convert(target, recipe, self._reader.read, self.model).items():
                self._put(name, value)

    def _put(self, name: str, value: torch.Tensor) -> None:
        path, _, key = name.rpartition(".")
        module = self.model.get_submodule(path)
        if key in module._parameters:
            old = module._parameters[key]
            assert old is not None
            if old.shape != value.shape:
                raise CheckpointError(
                    f"{name} has shape {list(value.shape)} in the files; the model's config says {list(old.shape)}."
                )
            dtype = torch.float32 if any(part in name for part in self._keep_fp32) else old.dtype
            module._parameters[key] = nn.Parameter(value.to(self.device, dtype), requires_grad=False)
        elif key in module._buffers:
            buffer = module._buffers[key]
            module._buffers[key] = value.to(self.device, None if buffer is None else buffer.dtype)


def _missing(names: list[str]) -> CheckpointError:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return CheckpointError(
        f"The checkpoint has no weights for {names[0]}{more}.", "fetch all of its files, or check config.json"
    )


def _drop(module: nn.Module) -> None:
    for key, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[key] = nn.Parameter(
                torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), requires_grad=False
            )


def _runs(numbers: torch.Tensor, names: list[str]) -> Iterator[Part]:
    """Runs of equal numbers along rows, for each expert of a stack."""
    stack = numbers if numbers.dim() == 2 else numbers[None]
    for expert, column in enumerate(stack.tolist()):
        start = 0
        for stop in range(1, len(column) + 1):
            if stop == len(column) or column[stop] != column[start]:
                yield Part(names[column[start]], expert if numbers.dim() == 2 else None, start, stop)
                start = stop


def find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The decoder blocks: items of the outermost list of modules that holds most of the parameters.

    Returns:
        The list's full name, and its items.
    """
    best, best_size = "", 0
    lists: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(outer + ".") for outer in lists):
            continue
        lists.append(name)
        size = sum(parameter.numel() for parameter in module.parameters())
        if size > best_size:
            best, best_size = name, size
    if not best:
        raise CalibrationError(
            f"{type(model).__name__} has no list of blocks to stream.", "use a method without calibration, such as int4"
        )
    return best, list(model.get_submodule(best).children())


def _model_around(model: nn.Module, name: str) -> str:
    """Name of the innermost model (it has a config and can be called with token ids) that holds the named module."""
    while name:
        name = name.rpartition(".")[0]
        if hasattr(model.get_submodule(name), "config"):
            return name
    return ""


def build_model(folder: str | Path, dtype: torch.dtype) -> nn.Module:
    """The checkpoint's causal language model from its config: parameters on the meta device, buffers real.

    Raises:
        MissingDependencyError: transformers is not installed.
        CalibrationError: transformers doesn't know the model.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise MissingDependencyError(f"Running a model needs transformers ({error}).", EXTRA_HINT) from error
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        with _parameters_on_meta():
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except unusable() as error:
        raise CalibrationError(
            f"{folder}: transformers cannot build this model: {reason_of(error)}",
            "update transformers, or use a method without calibration, such as int4",
        ) from error
    # One matrix product an expert, as the statistics need it; fused experts compute the same.
    if hasattr(model, "set_experts_implementation") and _has_stacked_experts(model):
        cast(Any, model).set_experts_implementation("eager")
    return model.eval().requires_grad_(False)


def _has_stacked_experts(model: nn.Module) -> bool:
    return any(parameter.dim() == 3 for parameter in model.parameters())


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built within register their parameters on the meta device; memory behind them is never touched."""

    def on_meta(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook = nn.modules.module.register_module_parameter_registration_hook(cast(Any, on_meta))
    try:
        yield
    finally:
        hook.remove()


def kept_in_fp32(model: nn.Module) -> tuple[str, ...]:
    """Parts of names whose parameters the model wants in fp32 whatever its dtype."""
    return tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())


def parameter_recipes(model: nn.Module, tensor_names: Iterable[str]) -> dict[str, Recipe]:
    """Which parameters come of which tensors, by the conversion rules that transformers has for this model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known = model.state_dict()
    prefix = getattr(model, "base_model_prefix", None)
    recipes: dict[str, Recipe] = {}
    for name in sorted(tensor_names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:
            target, pattern = name, None
        if target in known:
            converter = None if pattern is None else by_pattern[pattern]
            recipe = recipes.setdefault(target, Recipe(converter))
            recipe.sources.append((name, pattern or name))
    return recipes


def convert(target: str, recipe: Recipe, read: Any, model: Any) -> dict[str, torch.Tensor]:
    """The parameters, by name, that a recipe makes of the tensors that `read` fetches."""
    if recipe.converter is None:
        return {target: read(recipe.sources[-1][0])}
    converter = copy.deepcopy(recipe.converter)
    for name, pattern in recipe.sources:
        converter.add_tensor(target, name, pattern, read(name))
    converted = converter.convert(target, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}
