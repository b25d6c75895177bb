"""Tiny random models of many architectures, saved as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY, WIDTH, INNER, BLOCKS, HEADS = 96, 32, 64, 2, 4
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GATED: dict[str, Any] = COMMON | {"intermediate_size": INNER, "num_key_value_heads": 2}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}

# Class of the config, and what it is made from. Weights have a wide spread, so that no activation is near zero.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GATED),
    "qwen2": ("Qwen2Config", GATED | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", GATED | {"head_dim": 16}),
    "mistral": ("MistralConfig", GATED | {"sliding_window": 6}),
    "gemma2": ("Gemma2Config", GATED | {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "gemma3": (
        "Gemma3TextConfig",
        GATED | {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8,
                 "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": ("Phi3Config", GATED),
    "gpt2": ("GPT2Config", {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": BLOCKS, "n_head": HEADS,
                            "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}),
    "opt": ("OPTConfig", COMMON | {"ffn_dim": INNER, "word_embed_proj_dim": WIDTH}),
    "gpt_neox": ("GPTNeoXConfig", COMMON | {"intermediate_size": INNER}),
    "olmo2": ("Olmo2Config", GATED),
    "mixtral": ("MixtralConfig", GATED | EXPERTS | {"num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        GATED | EXPERTS | {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 8, "norm_topk_prob": True,
                           "mlp_only_layers": [1]},
    ),
}  # fmt: skip


def config_of(architecture: str, **changes: Any) -> PreTrainedConfig:
    """The config of a tiny model."""
    class_name, options = ARCHITECTURES[architecture]
    config: PreTrainedConfig = getattr(transformers, class_name)(**(options | changes), initializer_range=0.2)
    return config


def tiny_model(
    architecture: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A tiny model with random weights; norms and biases are random as well."""
    torch.manual_seed(seed)
    config = config_of(architecture, **changes)
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()


def save_tiny(
    path: Path, architecture: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **changes: Any
) -> Path:
    """A checkpoint of a tiny model, as transformers writes it."""
    tiny_model(architecture, dtype, seed, **changes).save_pretrained(path)
    return path


def whole_model(path: Path, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The checkpoint as transformers itself loads it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    if any(parameter.dim() == 3 for parameter in model.parameters()):
        model.set_experts_implementation("eager")
    return model.eval()


def token_ids(samples: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(3, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))
