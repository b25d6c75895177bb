"""A checkpoint as a plain transformers model in fp32: quantized layers decoded, their inputs rounded as engines do."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewbits.checkpoints.reader import Checkpoint, TensorReader, open_checkpoint
from fewbits.errors import CheckpointError, MissingDependencyError
from fewbits.formats import FORMATS, Format, format_of_config
from fewbits.schemes import Scheme
from fewbits.unusable import reason_of, unusable


def decoded_model(folder: str | Path, *, device: str = "cpu") -> Any:
    """Load any checkpoint that fewbits reads as a transformers causal language model in fp32.

    Quantized weights are decoded in fp32 and rounded to the checkpoint's dtype, as engines do. Where a scheme rounds
    activations, a hook rounds each linear's input per token.

    Raises:
        CheckpointError: the folder holds no model, or one that transformers does not know.
        MissingDependencyError: transformers is not installed.
    """
    transformers = _transformers()
    checkpoint = open_checkpoint(folder, allow_quantized=True)
    state, schemes = _decoded_state(checkpoint)
    config_dict = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    try:
        config = transformers.AutoConfig.for_model(**config_dict)
        with torch.device("meta"):
            model_class = type(transformers.AutoModelForCausalLM.from_config(config))
    except unusable() as error:
        raise CheckpointError(f"{folder}: transformers cannot build this model: {reason_of(error)}") from error
    model = model_class.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    modules = dict(model.named_modules())
    for name, scheme in schemes.items():
        if scheme.activations is None:
            continue
        if name not in modules:
            raise CheckpointError(
                f"{folder}: {name} rounds its input, but {type(model).__name__} holds it in a stack of experts, where "
                "inputs cannot be rounded one by one.",
                "evaluate it in an engine that runs such checkpoints, or quantize the experts' weights only",
            )
        modules[name].register_forward_pre_hook(_RoundedInput(scheme))
    return model.to(device).eval()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "this needs transformers, which is not installed.", "pip install 'fewbits[transformers]'"
        ) from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _decoded_state(checkpoint: Checkpoint) -> tuple[dict[str, torch.Tensor], dict[str, Scheme]]:
    state: dict[str, torch.Tensor] = {}
    quantized, plain = split_quantized(checkpoint)
    with TensorReader(checkpoint) as reader:
        for module, layer in quantized.items():
            tensors = {name: reader.read(name) for name in layer.tensors}
            weight = FORMATS[layer.format].decode(module, tensors, layer.scheme)
            state[f"{module}.weight"] = weight.dequantize().float()
        for name in plain:
            state[name] = reader.read(name).float()
    return state, {module: layer.scheme for module, layer in quantized.items()}


@dataclass(frozen=True)
class StoredLayer:
    """A quantized linear as it lies in a checkpoint."""

    format: str
    scheme: Scheme
    tensors: tuple[str, ...]


def split_quantized(checkpoint: Checkpoint) -> tuple[dict[str, StoredLayer], list[str]]:
    """The quantized linears of a checkpoint by module, and the names of all other tensors."""
    config = checkpoint.config.get("quantization_config")
    if not config:
        return {}, list(checkpoint.tensors)
    chosen = format_of_config(config)
    if chosen is None:
        raise CheckpointError(
            f"{checkpoint.path}: quantization method {config.get('quant_method')!r} is not one that can be decoded "
            "here.",
            f"known are {', '.join(FORMATS)}",
        )
    modules = chosen.quantized_modules(checkpoint.tensors)
    members: dict[str, list[str]] = {module: [] for module in modules}
    plain: list[str] = []
    for name in checkpoint.tensors:
        module = _module_of(name, members, chosen)
        (plain if module is None else members[module]).append(name)
    schemes = chosen.schemes_from_config(config, modules)
    layers = {}
    for module, scheme in schemes.items():
        if scheme is None:
            raise CheckpointError(f"{checkpoint.path}: {module} has scales, but config.json says it is not quantized.")
        layers[module] = StoredLayer(chosen.NAME, scheme, tuple(members[module]))
    return layers, plain


def _module_of(tensor: str, modules: Container[str], chosen: Format) -> str | None:
    """The quantized module that a tensor belongs to; None if it is a tensor of its own."""
    module, _, part = tensor.rpartition(".")
    return module if module in modules and part.startswith(chosen.PARTS) else None


class _RoundedInput:
    """Rounds a linear's input to the scheme's numbers, one scale per token, as dynamic activation kernels do."""

    def __init__(self, scheme: Scheme) -> None:
        self._scheme = scheme

    def __call__(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = inputs[0]
        limit = 127.0 if self._scheme.kind == "int" else 448.0
        scale = x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / limit
        codes = (x / scale).clamp(-limit, limit)
        codes = codes.round() if self._scheme.kind == "int" else codes.to(torch.float8_e4m3fn).to(x.dtype)
        return (codes * scale, *inputs[1:])
