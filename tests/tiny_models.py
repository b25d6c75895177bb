"""Small quantized checkpoints put together by hand: rounded here, in a few plain lines, not by the code under test."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fewbits.formats import FORMATS
from fewbits.methods import QuantMethod
from fewbits.tensors import QuantizedWeight, seal

FORMAT = FORMATS["compressed-tensors"]
CONFIG: dict[str, Any] = {"model_type": "llama", "vocab_size": 48, "hidden_size": 64, "tie_word_embeddings": False}


def random_model(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two blocks with unlike linears, an embedding, norms and a head, in bf16."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.05).bfloat16()

    tensors = {"model.embed_tokens.weight": normal(48, 64), "lm_head.weight": normal(48, 64)}
    for block in range(2):
        prefix = f"model.layers.{block}"
        tensors[f"{prefix}.self_attn.q_proj.weight"] = normal(64, 64)
        tensors[f"{prefix}.self_attn.q_proj.bias"] = normal(64)
        tensors[f"{prefix}.mlp.up_proj.weight"] = normal(72, 64)
        tensors[f"{prefix}.mlp.down_proj.weight"] = normal(64, 96)
        tensors[f"{prefix}.input_layernorm.weight"] = normal(64)
    return tensors


def rounded(weight: torch.Tensor, method: QuantMethod) -> QuantizedWeight:
    """Round to nearest on the range of each group."""
    scheme = method.scheme
    rows, columns = weight.shape
    groups = weight.float().view(rows, scheme.groups(columns), -1)
    if scheme.kind == "float":
        scales = (groups.abs().amax(-1) / 448).clamp_min(1e-20).to(weight.dtype)
        codes = (groups / scales.float()[..., None]).clamp(-448, 448).view(rows, columns)
        return seal(codes.to(torch.float8_e4m3fn), scales, None, method)
    if scheme.symmetric:
        scales = (groups.abs().amax(-1) / (scheme.midpoint - 1)).clamp_min(1e-20).to(weight.dtype)
        zeros = torch.full_like(scales, scheme.midpoint, dtype=torch.float32)
    else:
        low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
        scales = ((high - low) / scheme.largest_code).clamp_min(1e-20).to(weight.dtype)
        zeros = (-low / scales.float()).round().clamp(0, scheme.largest_code)
    codes = (groups / scales.float()[..., None] + zeros[..., None]).round()
    codes = codes.clamp(1 if scheme.symmetric else 0, scheme.largest_code).view(rows, columns).to(torch.uint8)
    return seal(codes, scales, None if scheme.symmetric else zeros.to(torch.uint8), method)


def write_source(path: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] = CONFIG) -> Path:
    """An unquantized checkpoint."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors), path / "model.safetensors", {"format": "pt"})
    return path


def write_quantized(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    methods: Mapping[str, QuantMethod | None],
    config: Mapping[str, Any] = CONFIG,
    *,
    manifest: bool = True,
) -> dict[str, QuantizedWeight]:
    """A quantized checkpoint in two shards, with index and manifest; returns the quantized weights by module."""
    path.mkdir(parents=True, exist_ok=True)
    stored: dict[str, torch.Tensor] = {}
    weights: dict[str, QuantizedWeight] = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        method = methods.get(module)
        if method is None:
            stored[name] = tensor
        else:
            weights[module] = rounded(tensor, method)
            stored |= FORMAT.encode(module, weights[module], (tensor.shape[0], tensor.shape[1]))
    shards = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    for name, tensor in stored.items():
        shards["model-00002-of-00002.safetensors" if ".layers.1." in name else "model-00001-of-00002.safetensors"][
            name
        ] = tensor.contiguous()
    for file, content in shards.items():
        save_file(content, path / file, {"format": "pt"})
    weight_map = {name: file for file, content in shards.items() for name in content}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    schemes = {module: None if method is None else method.scheme for module, method in methods.items()}
    quantized = {**config, "quantization_config": FORMAT.quantization_config(schemes)}
    (path / "config.json").write_text(json.dumps(quantized))
    if manifest:
        layers = [layer_record(module, tensors[f"{module}.weight"], weight) for module, weight in weights.items()]
        digests = {name: digest(tensor) for name, tensor in stored.items()}
        (path / "fewbits.json").write_text(json.dumps({"version": 1, "tensors": digests, "layers": layers}))
    return weights


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def layer_record(module: str, original: torch.Tensor, weight: QuantizedWeight) -> dict[str, Any]:
    """A layer as the manifest has it, its error computed in float64 from the bf16 scales and the codes."""
    exact = original.double()
    error = float((exact - weight.dequantize(torch.float32).double()).norm() / exact.norm())
    scheme = weight.method.scheme
    return {
        "name": module,
        "method": str(weight.method),
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "relative_error": error,
    }
