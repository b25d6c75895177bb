"""Token step: one token through a model of the usual kind of blocks with a call for each linear and little else.

transformers spends most of a small model's time between the linears. Here a block is found by its parts (norms, q, k,
v, o, gate, up, down), and what lies between them is compiled. Nothing is taken on trust: on every prompt, each block,
the embedding and the head must give what the model itself just gave for the prompt's last token; else the model runs.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fewbits.errors import CalibrationError
from fewbits.kernels import one_token
from fewbits.kernels.compiling import Array, as_numpy
from fewbits.kernels.one_token_attention import Attention
from fewbits.linear import QuantLinear
from fewbits.skeleton import find_blocks
from fewbits.stacked import stacked

ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "rotary_emb"}
MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
FIXED_ROTARY = ("default", "linear", "llama3", "yarn")
# bf16 keeps 8 bits, and a block rounds some ten times on the way; a wrong structure is off by tens of percent.
TOLERANCE = 0.06
ULP = 2.0**-7
NONE = np.empty(0, np.float32)


@dataclass(frozen=True)
class Norm:
    """A root mean square norm by what it does: weights (1 + w counted in) and eps."""

    weight: Array
    eps: np.float32


# Outputs of linears that share an input, one array each.
Products = Callable[[torch.Tensor], list[Array]]


@dataclass
class Block:
    """The parts of one decoder block."""

    before_attention: Norm
    after_attention: Norm | None
    before_mlp: Norm
    after_mlp: Norm | None
    key_norm: Norm | None
    attended: Products
    gated: Products
    mixing: nn.Module
    down: nn.Module
    gate: Any
    attention: Attention
    window: int | None
    cosines: Array
    sines: Array
    keys: Array
    values: Array


@dataclass
class Seen:
    """What the model itself computed for a prompt's last token: each block's input and output, and the logits."""

    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]


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


class TokenStep:
    """One token at a time through a model whose cache it holds.

    capacity: how many positions the cache has.
    """

    def __init__(self, model: Any, capacity: int) -> None:
        self._model = model
        prefix, found = find_blocks(model)
        blocks: list[Any] = list(found)
        self._decoder = model.get_submodule(prefix.rpartition(".")[0])
        self._final = _norm_of(self._decoder.norm)
        rotations: dict[Any, tuple[Array, Array]] = {}
        scratch = np.zeros(
            (max(_heads(block) for block in blocks), capacity + blocks[0].self_attn.head_dim), np.float32
        )
        self._blocks = [self._block(block, capacity, rotations, scratch) for block in blocks]
        width = self._blocks[0].before_attention.weight.size
        heads = max(block.self_attn.q_proj.out_features for block in blocks)
        inner = max(block.mlp.gate_proj.out_features for block in blocks)
        self._x = np.zeros(width, np.float32)
        self._hidden = torch.zeros(1, width, dtype=torch.bfloat16)
        self._mixed = torch.zeros(1, heads, dtype=torch.bfloat16)
        self._gated = torch.zeros(1, inner, dtype=torch.bfloat16)
        self.position = 0

    def _block(self, block: Any, capacity: int, rotations: dict[Any, tuple[Array, Array]], scratch: Array) -> Block:
        attention, mlp = block.self_attn, block.mlp
        gemma = hasattr(block, "pre_feedforward_layernorm")
        kind = getattr(attention, "layer_type", None)
        if kind not in rotations:
            rotations[kind] = _rotation(self._decoder.rotary_emb, kind, capacity)
        kv_heads = attention.k_proj.out_features // attention.head_dim
        keys, values = np.zeros((2, kv_heads, capacity, attention.head_dim), np.float32)
        weight, eps = _or_none(_norm_of(attention.q_norm) if hasattr(attention, "q_norm") else None)
        shared = _heads(block) // kv_heads
        return Block(
            before_attention=_norm_of(block.input_layernorm),
            after_attention=_norm_of(block.post_attention_layernorm) if gemma else None,
            before_mlp=_norm_of(block.pre_feedforward_layernorm if gemma else block.post_attention_layernorm),
            after_mlp=_norm_of(block.post_feedforward_layernorm) if gemma else None,
            key_norm=_norm_of(attention.k_norm) if hasattr(attention, "k_norm") else None,
            attended=_joined([attention.q_proj, attention.k_proj, attention.v_proj]),
            gated=_joined([mlp.gate_proj, mlp.up_proj]),
            mixing=attention.o_proj,
            down=mlp.down_proj,
            gate=_gate_of(mlp),
            attention=Attention(keys, values, weight, float(eps), attention.scaling, shared, scratch),
            window=getattr(attention, "sliding_window", None),
            cosines=rotations[kind][0],
            sines=rotations[kind][1],
            keys=keys,
            values=values,
        )

    def adopt(self, cache: Any, length: int) -> None:
        """Take over the first `length` positions of the cache that the model filled."""
        for block, layer in zip(self._blocks, cache.layers, strict=True):
            torch.from_numpy(block.keys)[:, :length].copy_(layer.keys[0, :, :length])
            torch.from_numpy(block.values)[:, :length].copy_(layer.values[0, :, :length])
        self.position = length

    def differs(self, token: int, seen: Seen, logits: torch.Tensor) -> str | None:
        """Where the token at the current position comes out unlike the model's own computation; None if nowhere."""
        embedded = self._embedded(token)
        if not _alike(embedded, seen.inputs[0][0], embedded * 0):
            return "the embedding"
        for index, block in enumerate(self._blocks):
            given = seen.inputs[index].float().numpy().reshape(-1)
            self._x[:] = given
            update = self._through(block, self._x, None, None)
            _add(self._x, update, block.after_mlp)
            if not _alike(self._x, seen.outputs[index], given):
                return f"block {index}"
        self._x[:] = seen.outputs[-1].float().numpy().reshape(-1)
        found = self._head().float()
        scale = (logits - logits.mean()).norm()
        return None if float((found - logits).norm()) <= TOLERANCE * float(scale) else "the head"

    def __call__(self, token: int) -> torch.Tensor:
        """Logits [vocabulary] after one more token."""
        self._x[:] = self._embedded(token)
        update, norm = None, None
        with _own_products():
            for block in self._blocks:
                update = self._through(block, self._x, update, norm)
                norm = block.after_mlp
            _add(self._x, update, norm)
            logits = self._head()
        self.position += 1
        return logits

    def _embedded(self, token: int) -> Array:
        values: Array = self._decoder.embed_tokens(torch.tensor([token])).float().numpy()[0]
        return values

    def _head(self) -> torch.Tensor:
        one_token.normed(self._x, self._final.weight, self._final.eps, as_numpy(self._hidden)[0])
        logits: torch.Tensor = self._model.lm_head(self._hidden)[0]
        return logits

    def _through(self, block: Block, x: Array, update: Array | None, norm: Norm | None) -> Array:
        """One block, but for adding its last update, which is left to what comes next."""
        _add(x, update, norm)
        hidden, position = as_numpy(self._hidden)[0], self.position
        one_token.normed(x, block.before_attention.weight, block.before_attention.eps, hidden)
        q, k, v = block.attended(self._hidden)
        cosines, sines = block.cosines[position], block.sines[position]
        weight, eps = _or_none(block.key_norm)
        one_token.remember(k, v, weight, eps, cosines, sines, block.keys, block.values, position)
        first = 0 if block.window is None else max(0, position + 1 - block.window)
        block.attention(q.ctypes.data, cosines, sines, first, position, self._mixed.data_ptr())
        _add(x, _product(block.mixing, self._mixed[:, : q.size]), block.after_attention)
        one_token.normed(x, block.before_mlp.weight, block.before_mlp.eps, hidden)
        gate, up = block.gated(self._hidden)
        gated = self._gated[:, : gate.size]
        block.gate(gate, up, as_numpy(gated)[0])
        return _product(block.down, gated)


@contextmanager
def _own_products() -> Iterator[None]:
    """ATen's own products in place of oneDNN's: at one row of bf16 they take half the time."""
    enabled = torch._C._get_mkldnn_enabled()
    # `torch.backends.mkldnn.flags` also sets what makes torch warn of GPUs that nobody asked for.
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def _product(linear: nn.Module, x: torch.Tensor) -> Array:
    row: Array = as_numpy(linear.forward(x))[0]
    return row


def _joined(linears: list[Any]) -> Products:
    """One product where they are alike, else one each."""
    one = stacked(linears, torch.bfloat16)
    if one is None:
        return lambda x: [_product(linear, x) for linear in linears]
    edges = list(accumulate((linear.out_features for linear in linears), initial=0))
    spans = [slice(start, stop) for start, stop in pairwise(edges)]

    def split(x: torch.Tensor) -> list[Array]:
        row = as_numpy(one(x))[0]
        return [row[span] for span in spans]

    return split


def _add(x: Array, update: Array | None, norm: Norm | None) -> None:
    if update is not None:
        one_token.add(x, update, *_or_none(norm))


def _or_none(norm: Norm | None) -> tuple[Array, np.float32]:
    return (NONE, np.float32(0)) if norm is None else (norm.weight, norm.eps)


def _heads(block: Any) -> int:
    return int(block.self_attn.q_proj.out_features) // int(block.self_attn.head_dim)


def _norm_of(module: Any) -> Norm:
    """A norm's weights by what it makes of a vector: some multiply by w, some by 1 + w."""
    eps = np.float32(getattr(module, "variance_epsilon", getattr(module, "eps", 0.0)))
    x = torch.linspace(0.5, 2.0, module.weight.numel())
    plain = x * torch.rsqrt(x.square().mean() + float(eps))
    with torch.no_grad():
        return Norm((module(x[None])[0].float() / plain).contiguous().numpy(), eps)


def _gate_of(mlp: Any) -> Any:
    """The compiled form of the gate's activation, by its values."""
    x = torch.linspace(-4, 4, 33)
    found = mlp.act_fn(x)
    if torch.allclose(found, F.silu(x), atol=1e-5):
        return one_token.silu_gate
    return one_token.gelu_gate if torch.allclose(found, F.gelu(x, approximate="tanh"), atol=1e-5) else None


def _rotation(rotary: Any, kind: str | None, capacity: int) -> tuple[Array, Array]:
    """cos and sin [capacity, width] in fp32."""
    options = {"layer_type": kind} if "layer_type" in inspect.signature(rotary.forward).parameters else {}
    with torch.no_grad():
        cosines, sines = rotary(torch.zeros(1, 1), torch.arange(capacity)[None], **options)
    return cosines[0].float().contiguous().numpy(), sines[0].float().contiguous().numpy()


def _alike(found: Array, expected: torch.Tensor, given: Array) -> bool:
    """Whether a block added the same, apart from the rounding of sums to bf16."""
    wanted = expected.float().numpy().reshape(-1)
    beyond = np.maximum(np.abs(found - wanted) - ULP * np.abs(wanted), 0)
    return math.sqrt(float((beyond**2).sum())) <= TOLERANCE * max(float(np.linalg.norm(wanted - given)), 1e-6)
