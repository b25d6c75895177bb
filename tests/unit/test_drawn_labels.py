"""Labels drawn from logits that come in tiles, by the compiled kernel and by torch, against the whole row's softmax."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fewbits.drawn import LABELS, Drawn, uniforms
from fewbits.kernels.lanes import HAS_BF16

COMPILED = pytest.param(
    torch.bfloat16, marks=pytest.mark.skipif(not HAS_BF16, reason="this processor does not round to bf16 itself")
)
BOTH = pytest.mark.parametrize("dtype", [COMPILED, torch.float32])


def drawn(logits: torch.Tensor, tile: int, seed: int = 0) -> Drawn:
    state = Drawn.of(len(logits), logits.device)
    for first in range(0, logits.shape[1], tile):
        state.see(logits[:, first : first + tile].contiguous(), first, uniforms(seed, 0, len(logits), first))
    return state


@BOTH
@pytest.mark.parametrize(("vocabulary", "tile"), [(1, 4), (31, 31), (33, 32), (1000, 300), (4096, 4096)])
def test_labels_are_those_of_the_distribution_function_and_come_with_their_logits(
    vocabulary: int, tile: int, dtype: torch.dtype
) -> None:
    logits = (4 * torch.randn(300, vocabulary, generator=torch.Generator().manual_seed(vocabulary))).to(dtype)
    state = drawn(logits, tile)
    shares = logits.double().softmax(-1)
    if tile >= vocabulary:
        exact = torch.searchsorted(shares.cumsum(-1), uniforms(0, 0, 300, 0)).clamp_max_(vocabulary - 1)
        # A draw at the very border of two labels may fall to either.
        assert (state.labels == exact).double().mean() > 0.99
    assert torch.allclose(state.numbers, logits.float().gather(-1, state.labels), atol=1e-4)
    entropies = -shares.gather(-1, state.labels).log().mean(-1)
    assert state.loss == pytest.approx(float(entropies.sum()), rel=1e-5, abs=1e-4)


@BOTH
@pytest.mark.parametrize("tile", [2, 3, 5])
def test_labels_come_as_often_as_they_are_likely_however_logits_are_cut(tile: int, dtype: torch.dtype) -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625]).log().to(dtype).expand(4000, 5).contiguous()
    state = drawn(logits, tile)
    shares = logits[0].double().softmax(-1)
    counts = torch.bincount(state.labels.view(-1), minlength=5) / state.labels.numel()
    deviation = (shares * (1 - shares) / state.labels.numel()).sqrt()
    assert bool(((counts - shares).abs() < 5 * deviation).all())
    # Labels of a token are drawn independently.
    both = float((state.labels[:, :1] == state.labels[:, 1:]).double().mean())
    assert both == pytest.approx(float(shares.square().sum()), abs=0.02)


@BOTH
def test_what_cannot_be_is_never_drawn(dtype: torch.dtype) -> None:
    logits = torch.full((64, 100), float("-inf")).to(dtype)
    logits[:, 57] = 3.0
    state = drawn(logits, 40)
    assert bool((state.labels == 57).all())
    assert state.loss == pytest.approx(0.0, abs=1e-6)


@BOTH
def test_a_later_tile_far_above_takes_all(dtype: torch.dtype) -> None:
    logits = torch.cat([torch.full((8, 50), -300.0), torch.zeros(8, 50), torch.full((8, 50), 200.0)], 1).to(dtype)
    state = drawn(logits, 50)
    assert bool((state.labels >= 100).all())
    assert state.loss == pytest.approx(8 * math.log(50), rel=1e-5)


@BOTH
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("tile", [25, 50])
def test_logits_that_are_no_numbers_show(number: float, tile: int, dtype: torch.dtype) -> None:
    logits = torch.zeros(3, 50).to(dtype)
    logits[1, 20] = number
    state = drawn(logits, tile)
    assert np.isnan(state.loss)
    assert state.totals.isnan().tolist() == [False, True, False]


@pytest.mark.skipif(not HAS_BF16, reason="this processor does not round to bf16 itself")
def test_threads_do_not_change_a_bit() -> None:
    logits = torch.randn(200, 3000, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(drawn(logits, 1000))
    finally:
        torch.set_num_threads(before)
    assert results[0].loss == results[1].loss and torch.equal(results[0].labels, results[1].labels)


def test_draws_depend_on_token_and_column_alone() -> None:
    whole = uniforms(3, 0, 10, 8)
    assert torch.equal(whole[4:7], uniforms(3, 4, 3, 8))
    assert whole.shape == (10, LABELS) and float(whole.min()) >= 0 and float(whole.max()) < 1
    for other in (uniforms(4, 0, 10, 8), uniforms(3, 0, 10, 9), uniforms(3, 1, 10, 8)):
        assert not torch.equal(whole, other)
