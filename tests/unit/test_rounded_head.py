"""Logits whose factors are rounded to int8: exact sums of integers, and only where predictions bear it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from fewbits.drawn_head import DrawnHead, _exact
from fewbits.kernels.activations import round_tokens
from fewbits.rounded_head import MOST_KL, RoundedRows, fits, is_close
from fewbits.skeleton import Skeleton
from test_calibrated_pass import skeleton_of
from tiny_transformers import save_tiny

HAS_BYTES = fits(torch.zeros(4, 4, dtype=torch.bfloat16))


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def skeleton(tmp_path: Path) -> Iterator[Skeleton]:
    with skeleton_of(save_tiny(tmp_path, "llama", torch.bfloat16), torch.bfloat16) as (skeleton, _):
        skeleton.materialize_rest(head=True)
        yield skeleton


@pytest.mark.skipif(not HAS_BYTES, reason="needs products of bytes (AVX-512 VNNI)")
@pytest.mark.parametrize(("tokens", "inputs", "rows"), [(1, 4, 1), (5, 36, 49), (130, 640, 100)])
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_those_of_rounded_factors(tokens: int, inputs: int, rows: int, biased: bool) -> None:
    x, weight = (numbers(count, inputs, seed=count).bfloat16() for count in (tokens, rows + 1000))
    weight, bias = weight[:rows], numbers(rows) if biased else None
    found = RoundedRows(weight, bias)(x[None])
    (codes, scales), (row_codes, row_scales) = round_tokens(x, "int"), round_tokens(weight, "int")
    expected = (codes @ row_codes.T) * scales * row_scales.T + (0 if bias is None else bias)
    assert found.shape == (1, tokens, rows) and found.dtype == torch.bfloat16
    assert torch.equal(found[0], expected.bfloat16())


@pytest.mark.skipif(not HAS_BYTES, reason="needs products of bytes (AVX-512 VNNI)")
def test_a_head_is_rounded_where_predictions_bear_it(skeleton: Skeleton) -> None:
    assert skeleton.head_linear is not None
    hidden = numbers(40, skeleton.head_linear.in_features).bfloat16()
    head = DrawnHead(skeleton, 3)
    head.gradient(hidden, 0, BaseModelOutputWithPast)
    assert head._prepare is RoundedRows
    # One channel far beyond all others takes all the levels that there are.
    hidden[:, 0] *= 1000
    skeleton.head_linear.weight.data[:, 0] = 0
    skeleton.head_linear.weight.data *= 20
    head = DrawnHead(skeleton, 3)
    head.gradient(hidden, 0, BaseModelOutputWithPast)
    assert head._in_tiles and head._prepare is _exact


@pytest.mark.skipif(not HAS_BYTES, reason="needs products of bytes (AVX-512 VNNI)")
def test_gradients_keep_the_fisher_information_of_the_exact_predictions(skeleton: Skeleton) -> None:
    assert skeleton.head_linear is not None
    weight = skeleton.head_linear.weight.detach().double()
    hidden = (3 * numbers(1, weight.shape[1])).bfloat16()
    shares = (hidden.double() @ weight.T)[0].softmax(-1)
    exact = weight.T @ (shares.diag() - shares[:, None] * shares) @ weight
    repeated = 20_000
    head = DrawnHead(skeleton, 0)
    found = head.gradient(hidden.expand(repeated, -1), 0, BaseModelOutputWithPast).double()
    assert head._prepare is RoundedRows
    assert float((found.T @ found / repeated - exact).norm() / exact.norm()) < 0.06


def test_closeness_is_by_predictions_not_by_logits() -> None:
    exact = numbers(3, 50)
    assert is_close(exact, exact + 7)
    assert not is_close(exact, exact.flip(-1))
    # What is never predicted may differ as it likes.
    exact[:, 0] = -float("inf")
    rounded = exact.clone()
    rounded[:, 0] = -60
    assert is_close(exact, rounded)
    # Just on either side of what is borne: all of them one way, by so much.
    flat = torch.zeros(1, 2)
    for share, borne in ((0.9, True), (1.1, False)):
        p = torch.linspace(0.5, 0.9, 4001, dtype=torch.float64)
        divergence = -0.5 * (4 * p * (1 - p)).log()
        nearest = p[(divergence - share * MOST_KL).abs().argmin()]
        assert is_close(flat, torch.stack([nearest, 1 - nearest])[None].log()) == borne
