"""Attention of whole samples on fewbits' own kernels, for transformers models that let theirs be chosen.

It stands in for `scaled_dot_product_attention` where the processor multiplies bf16 pairs: twice as fast forward and
backward, and closer to exact gradients of keys and values. Whatever else comes goes on to transformers' own function.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from fewbits.kernels.lanes import HAS_BF16

NAME = "fewbits"


@dataclass(frozen=True)
class Spans:
    """Query i sees keys firsts[i] to before stops[i]; neither ever falls. int64 [queries]."""

    firsts: Any
    stops: Any


def use_own_attention(model: nn.Module) -> bool:
    """Let the model run its attention here, if it would have run it in `scaled_dot_product_attention`.

    Returns whether it does. Its results stay within bf16's rounding of what they were.
    """
    chosen = getattr(getattr(model, "config", None), "_attn_implementation", None)
    can_choose = getattr(type(model), "_can_set_attn_implementation", None)
    if not HAS_BF16 or chosen != "sdpa" or can_choose is None or not can_choose():
        return False
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend_or_pass_on)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    return True


@contextmanager
def own_attention(model: nn.Module) -> Iterator[None]:
    """`use_own_attention` for a while."""
    chosen = use_own_attention(model)
    try:
        yield
    finally:
        if chosen:
            model.set_attn_implementation("sdpa")  # type: ignore[operator]


def attend_or_pass_on(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it.

    Args:
        query: [samples, heads, queries, width]. key, value: [samples, heads of keys, keys, width].

    Returns:
        [samples, queries, heads, width], and no weights.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    special = any(others.get(name) is not None for name in ("softcap", "position_bias", "cache", "s_aux"))
    if not dropout and not special and _fits(query, key, value):
        spans = _spans(attention_mask, query.shape[2], key.shape[2], bool(causal))
        if spans is not None:
            scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
            return cast(Any, _Attention).apply(query, key, value, spans, scale), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    passed_on: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
    )
    return passed_on


def _fits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    return (
        HAS_BF16
        and all(each.dtype == torch.bfloat16 and each.device.type == "cpu" for each in (query, key, value))
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
        and query.shape[1] % key.shape[1] == 0
        and query.shape[2] > 1
    )


# What a mask says, as long as it lives: one serves all blocks.
_known_masks: Any = WeakIdKeyDictionary()


def _spans(mask: torch.Tensor | None, queries: int, keys: int, causal: bool) -> Spans | None:
    """Which keys each query sees; None if it is not one run of them, or not the same in all samples."""
    if mask is None:
        if not causal:
            return Spans(np.zeros(queries, np.int64), np.full(queries, keys, np.int64))
        # As `scaled_dot_product_attention` has it: the first query sees the first key.
        return Spans(np.zeros(queries, np.int64), np.minimum(np.arange(1, queries + 1), keys))
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[2:] != (queries, keys):
        return None
    if mask.is_inference():
        # Whether it has changed can't be seen.
        return _spans_of(mask)
    version = mask._version
    if mask not in _known_masks or _known_masks[mask][0] != version:
        _known_masks[mask] = version, _spans_of(mask)
    spans: Spans | None = _known_masks[mask][1]
    return spans


def _spans_of(mask: torch.Tensor) -> Spans | None:
    seen = mask[0, 0].numpy()
    if not bool((mask == mask[:1, :1]).all()):
        return None
    counts = seen.sum(-1)
    firsts = seen.argmax(-1)
    stops = seen.shape[1] - seen[:, ::-1].argmax(-1)
    whole = bool((counts > 0).all()) and bool((stops - firsts == counts).all())
    if not whole or bool((np.diff(firsts) < 0).any()) or bool((np.diff(stops) < 0).any()):
        return None
    return Spans(firsts.astype(np.int64), stops.astype(np.int64))


class _Attention(torch.autograd.Function):
    """(query, key, value, spans, scale) → [samples, queries, heads, width]."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, scale: float
    ) -> torch.Tensor:
        from fewbits.kernels.attention_rows import attend
        from fewbits.kernels.compiling import as_numpy

        samples, heads, length, width = query.shape
        out = query.new_empty(samples, length, heads, width)
        logs = torch.empty(samples, heads, length)
        q, k, v = (as_numpy(each.detach()) for each in (query, key, value))
        attend(q, k, v, spans.firsts, spans.stops, scale, as_numpy(out), logs.numpy())
        ctx.save_for_backward(query, key, value, out, logs)
        ctx.spans, ctx.scale = spans, scale
        return out

    @staticmethod
    def backward(ctx: Any, *pulls: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from fewbits.kernels.attention_gradients import pull_back
        from fewbits.kernels.compiling import as_numpy

        query, key, value, out, logs = ctx.saved_tensors
        gradients = tuple(torch.empty_like(each) for each in (query, key, value))
        q, k, v = (as_numpy(each.detach()) for each in (query, key, value))
        to_q, to_k, to_v = map(as_numpy, gradients)
        pull_back(
            q, k, v, ctx.spans.firsts, ctx.spans.stops, ctx.scale, as_numpy(out), logs.numpy(), as_numpy(pulls[0]),
            to_q, to_k, to_v,
        )  # fmt: skip
        return *gradients, None, None
