"""Token parts: the parts of a model of the usual kind of blocks, found by what they are and do.

A block has norms, q, k, v, o, gate, up and down by the names that Llama gave them. Norms and gates are known by what
they make of some numbers, not by their class.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fewbits.errors import CalibrationError
from fewbits.kernels.compiling import Array
from fewbits.linear import QuantLinear
from fewbits.skeleton import find_blocks

ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "rotary_emb"}
MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
FIXED_ROTARY = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Norm:
    """A root mean square norm by what it does: weights (1 + w counted in) and eps."""

    weight: Array
    eps: float


@dataclass(frozen=True)
class Parts:
    """The parts of one decoder block.

    after_attention, after_mlp: norms of what is added to the residual, which most models lack. gate: "silu" or "gelu".
    kind: of the attention, for rotary embeddings that differ by layer. window: positions seen, None for all.
    """

    before_attention: Norm
    after_attention: Norm | None
    before_mlp: Norm
    after_mlp: Norm | None
    query_norm: Norm | None
    key_norm: Norm | None
    attended: tuple[nn.Module, nn.Module, nn.Module]
    mixing: nn.Module
    gated: tuple[nn.Module, nn.Module]
    down: nn.Module
    gate: str
    head_width: int
    scaling: float
    kind: str | None
    window: int | None


def why_not(model: Any) -> str | None:
    """Why this model's tokens can't take the short way, or None."""
    if model.device.type != "cpu" or model.dtype != torch.bfloat16:
        return f"it is compiled for bf16 on the CPU, not {model.dtype} on {model.device.type}".replace("torch.", "")
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return "modules have hooks"
    try:
        prefix, blocks = find_blocks(model)
    except CalibrationError:
        return "no list of blocks"
    decoder = model.get_submodule(prefix.rpartition(".")[0])
    for part in ("embed_tokens", "norm", "rotary_emb"):
        if not hasattr(decoder, part):
            return f"{type(decoder).__name__} has no {part}"
    if not isinstance(getattr(model, "lm_head", None), nn.Linear | QuantLinear):
        return "the head is no linear"
    rotary = getattr(decoder.rotary_emb, "rope_type", "default")
    if any(kind not in FIXED_ROTARY for kind in (rotary.values() if isinstance(rotary, dict) else [rotary])):
        return f"{rotary} rotary embeddings change with the length"
    return next((reason for block in blocks if (reason := _why_not_block(block, model.config))), None)


def _why_not_block(block: nn.Module, config: Any) -> str | None:
    parts = dict(block.named_children())
    attention, mlp = parts.pop("self_attn", None), parts.pop("mlp", None)
    if attention is None or mlp is None or not {"input_layernorm", "post_attention_layernorm"} <= set(parts):
        return f"{type(block).__name__} is built of other parts"
    strange = [name for name in parts if not name.endswith("layernorm")]
    strange += [name for name, _ in attention.named_children() if name not in ATTENTION_PARTS]
    strange += [name for name, _ in mlp.named_children() if name not in MLP_PARTS]
    if strange:
        return f"{type(block).__name__} has a {strange[0]}"
    needed = [(attention, ("q_proj", "k_proj", "v_proj", "o_proj")), (mlp, ("gate_proj", "up_proj", "down_proj"))]
    for owner, names in needed:
        for name in names:
            if not isinstance(getattr(owner, name, None), nn.Linear | QuantLinear):
                return f"{type(owner).__name__} has no linear {name}"
    if getattr(config, "sliding_window", None) and not hasattr(attention, "sliding_window"):
        return f"{type(attention).__name__} does not say which layers slide"
    return None if _gate_of(mlp) is not None else f"{type(mlp).__name__} has another activation than silu and gelu"


def parts_of(block: Any) -> Parts:
    """The parts of a block that `why_not` has nothing against."""
    attention, mlp = block.self_attn, block.mlp
    gate = _gate_of(mlp)
    assert gate is not None
    gemma = hasattr(block, "pre_feedforward_layernorm")
    return Parts(
        before_attention=norm_of(block.input_layernorm),
        after_attention=norm_of(block.post_attention_layernorm) if gemma else None,
        before_mlp=norm_of(block.pre_feedforward_layernorm if gemma else block.post_attention_layernorm),
        after_mlp=norm_of(block.post_feedforward_layernorm) if gemma else None,
        query_norm=norm_of(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=norm_of(attention.k_norm) if hasattr(attention, "k_norm") else None,
        attended=(attention.q_proj, attention.k_proj, attention.v_proj),
        mixing=attention.o_proj,
        gated=(mlp.gate_proj, mlp.up_proj),
        down=mlp.down_proj,
        gate=gate,
        head_width=attention.head_dim,
        scaling=attention.scaling,
        kind=getattr(attention, "layer_type", None),
        window=getattr(attention, "sliding_window", None),
    )


def norm_of(module: Any) -> Norm:
    """A norm's weights by what it makes of a vector: some multiply by w, some by 1 + w."""
    eps = float(getattr(module, "variance_epsilon", getattr(module, "eps", 0.0)))
    x = torch.linspace(0.5, 2.0, module.weight.numel())
    plain = x * torch.rsqrt(x.square().mean() + eps)
    with torch.no_grad():
        return Norm((module(x[None])[0].float() / plain).contiguous().numpy(), eps)


def _gate_of(mlp: Any) -> str | None:
    """The gate's activation, by its values."""
    x = torch.linspace(-4, 4, 33)
    found = mlp.act_fn(x)
    if torch.allclose(found, F.silu(x), atol=1e-5):
        return "silu"
    return "gelu" if torch.allclose(found, F.gelu(x, approximate="tanh"), atol=1e-5) else None


def rotation(rotary: Any, kind: str | None, capacity: int) -> tuple[Array, Array]:
    """cos and sin [capacity, width] in fp32."""
    options = {"layer_type": kind} if "layer_type" in inspect.signature(rotary.forward).parameters else {}
    with torch.no_grad():
        cosines, sines = rotary(torch.zeros(1, 1), torch.arange(capacity)[None], **options)
    return cosines[0].float().contiguous().numpy(), sines[0].float().contiguous().numpy()
