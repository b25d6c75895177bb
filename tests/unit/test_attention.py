"""Own attention against torch's in fp64, and in whole models against transformers' own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fewbits import attention
from fewbits.attention import attend_or_pass_on, use_own_attention
from fewbits.kernels.lanes import HAS_BF16

pytestmark = pytest.mark.skipif(not HAS_BF16, reason="this processor has no products of bf16 pairs")
# Of a result's norm: rounding to bf16 twice, weights and outputs.
BOUND = 2**-8


class Layer(torch.nn.Module):
    is_causal = True

    def __init__(self, shared: int = 1) -> None:
        super().__init__()
        self.num_key_value_groups = shared


def states(samples: int, heads: int, length: int, width: int, seed: int, requires_grad: bool = True) -> torch.Tensor:
    """[samples, heads, length, width] as models have them: a transposed view."""
    numbers = torch.randn(samples, length, heads, width, generator=torch.Generator().manual_seed(seed))
    return numbers.bfloat16().transpose(1, 2).requires_grad_(requires_grad)


def band(queries: int, window: int) -> torch.Tensor:
    places = torch.arange(queries)
    return ((places[None] <= places[:, None]) & (places[None] > places[:, None] - window))[None, None]


def off(result: torch.Tensor, exact: torch.Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())


CASES = [
    # samples, heads, heads of keys, length, width, window
    (2, 4, 2, 37, 16, None),
    (1, 3, 3, 130, 80, 40),
    (2, 4, 1, 64, 128, None),
    (1, 2, 1, 9, 6, 3),
    (3, 1, 1, 2, 64, None),
    (1, 6, 2, 200, 64, 1),
]


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_attention_in_fp64(case: tuple[Any, ...]) -> None:
    samples, heads, owners, length, width, window = case
    sides = [states(samples, count, length, width, seed) for seed, count in enumerate((heads, owners, owners))]
    mask = None if window is None else band(length, window).expand(samples, 1, length, length)
    out, _ = attend_or_pass_on(Layer(heads // owners), *sides, mask, scaling=0.3)
    assert type(out.grad_fn).__name__.startswith("_Attention")
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).bfloat16()
    exact = [side.detach().double().requires_grad_() for side in sides]
    seen = band(length, length) if mask is None else mask
    expected = scaled_dot_product_attention(*exact, attn_mask=seen, scale=0.3, enable_gqa=True).transpose(1, 2)
    assert off(out.detach(), expected.detach()) < BOUND
    ours = torch.autograd.grad(out, sides, pull)
    theirs = torch.autograd.grad(expected, exact, pull.double())
    for ours_one, theirs_one in zip(ours, theirs, strict=True):
        # With one key in sight no score matters: gradients of queries and keys are zeros, but for rounding.
        if window == 1 and theirs_one.norm() < 1e-6:
            assert ours_one.double().norm() < BOUND * theirs[2].norm()
        else:
            assert off(ours_one, theirs_one) < 2 * BOUND


def test_threads_do_not_change_a_bit() -> None:
    sides = [states(2, count, 300, 64, seed) for seed, count in enumerate((6, 2, 2))]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out, _ = attend_or_pass_on(Layer(3), *sides, None)
            results.append([out, *torch.autograd.grad(out, sides, torch.ones_like(out))])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_not_lost(which: int, number: float) -> None:
    sides = [states(1, 2, 20, 16, seed, requires_grad=False) for seed in range(3)]
    sides[which][0, 1, 7, 3] = number
    out, _ = attend_or_pass_on(Layer(), *sides, None)
    assert not torch.isfinite(out).all()
    assert torch.isfinite(out[0, :, 0]).all()


def test_scores_beyond_fp32_are_not_lost() -> None:
    large = torch.full((1, 1, 4, 16), 3e38).bfloat16()
    out, _ = attend_or_pass_on(Layer(), large, large, torch.ones_like(large), None)
    assert torch.isnan(out).all()


def passed_on(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    calls: list[bool] = []
    real = attention._Attention.apply
    monkeypatch.setattr(attention._Attention, "apply", lambda *given: calls.append(True) or real(*given))
    return calls


def holes(length: int) -> torch.Tensor:
    mask = band(length, length).clone()
    mask[..., 5, 2] = False
    return mask


MASKS = {
    "hole": holes(24),
    "added": holes(24).float().log().bfloat16(),
    "unlike": torch.stack([band(24, 4)[0], band(24, 5)[0]]),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_other_masks_go_to_torch(monkeypatch: pytest.MonkeyPatch, mask: torch.Tensor) -> None:
    calls = passed_on(monkeypatch)
    sides = [states(2, 2, 24, 16, seed) for seed in range(3)]
    out, _ = attend_or_pass_on(Layer(), *sides, mask)
    assert not calls
    assert torch.equal(out, scaled_dot_product_attention(*sides, attn_mask=mask).transpose(1, 2))


def test_a_mask_that_changes_is_looked_at_again() -> None:
    sides = [states(1, 2, 24, 16, seed) for seed in range(3)]
    mask = band(24, 24).clone()
    first, _ = attend_or_pass_on(Layer(), *sides, mask)
    mask.copy_(band(24, 3))
    second, _ = attend_or_pass_on(Layer(), *sides, mask)
    narrow = band(24, 3)
    expected, _ = attend_or_pass_on(Layer(), *sides, narrow)
    assert torch.equal(second, expected) and not torch.equal(first, second)


def models() -> list[Any]:
    from transformers import Gemma3TextConfig, LlamaConfig

    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    return [LlamaConfig(**sizes, **heads), Gemma3TextConfig(**sizes, **heads, sliding_window=16)]


@pytest.mark.parametrize("config", models(), ids=lambda config: config.model_type)
def test_whole_models_compute_the_same(monkeypatch: pytest.MonkeyPatch, config: Any) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 128, (3, 40)))
    expected = model(ids, use_cache=False).logits
    calls = passed_on(monkeypatch)
    assert use_own_attention(model)
    logits = model(ids, use_cache=False).logits
    assert len(calls) == config.num_hidden_layers
    assert off(logits.detach(), expected.detach().double()) < 4 * BOUND


def test_models_that_do_not_let_it_be_chosen_stay_as_they_are() -> None:
    assert not use_own_attention(torch.nn.Linear(2, 2))
