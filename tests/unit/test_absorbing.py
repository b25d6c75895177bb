"""Scales taken up by stored numbers: the pair of what is stored and the scales that came of it is exact."""

from __future__ import annotations

import pytest
import torch

from fewbits.absorbing import FileEdits, FoldPlace, absorb
from fewbits.folds import Fold
from fewbits.methods import AWQ, Int8Symmetric
from fewbits.skeleton import Part
from fewbits.tensors import decode
from fewbits.watching import Slot
from tiny_models import rounded

WIDTH = 32
EVERY = torch.arange(WIDTH)


def place(
    norm_offset: float | None, rows: torch.Tensor = EVERY, bias: str | None = None, count: int = WIDTH
) -> FoldPlace:
    fold = Fold(Slot("p.weight"), norm_offset, bias, rows, (Slot("c.weight"),))
    return FoldPlace(fold, (Part("p.weight", None, 0, count),), bias)


def edits(**tensors: torch.Tensor) -> FileEdits:
    return FileEdits({name.replace("_", "."): tensor for name, tensor in tensors.items()}.__getitem__, {}, {})


def scales(count: int = WIDTH) -> torch.Tensor:
    return torch.exp(torch.randn(count, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_what_a_norm_stores_times_the_scales_is_what_it_was(dtype: torch.dtype, offset: float) -> None:
    weight = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    files = edits(p_weight=weight)
    became = absorb(place(offset), scales(), files).inputs
    stored = files.tensors["p.weight"]
    assert stored.dtype == dtype
    torch.testing.assert_close((stored.float() + offset) * became, weight.float() + offset, rtol=1e-6, atol=1e-6)
    if offset == 0:
        torch.testing.assert_close(became, scales(), rtol=2**-7, atol=0)


def test_weights_of_a_norm_that_are_zero_or_vanish_keep_a_scale_of_one() -> None:
    weight = torch.ones(WIDTH, dtype=torch.bfloat16)
    weight[0], weight[1], weight[2] = 0.0, -0.0, -1.5
    zero_plus_one = edits(p_weight=weight)
    became = absorb(place(0.0), scales(), zero_plus_one).inputs
    assert became[:2].tolist() == [1.0, 1.0]
    assert zero_plus_one.tensors["p.weight"][:2].tolist() == [0.0, 0.0]
    assert float(became[2] * zero_plus_one.tensors["p.weight"][2]) == -1.5
    # 1 + w = 2⁻⁸, divided by 100, is nothing that bf16 has beside 1.
    vanishing = edits(p_weight=torch.full((WIDTH,), -1 + 2.0**-8).bfloat16())
    became = absorb(place(1.0), torch.full((WIDTH,), 100.0), vanishing).inputs
    assert became.tolist() == [1.0] * WIDTH
    assert torch.equal(vanishing.tensors["p.weight"], vanishing.read("p.weight"))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_no_scale_makes_anything_infinite(scale: float) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        files = edits(p_weight=torch.ones(WIDTH, dtype=dtype))
        became = absorb(place(0.0), torch.full((WIDTH,), scale), files).inputs
        assert bool(torch.isfinite(became).all()) and bool((became > 0).all())
        assert bool(torch.isfinite(files.tensors["p.weight"]).all())


def test_codes_stay_and_their_scales_are_divided() -> None:
    weight = torch.randn(WIDTH, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    files = edits()
    files.quantized["p.weight"] = before = rounded(weight, Int8Symmetric())
    became = absorb(place(None), scales(), files).inputs
    after = files.quantized["p.weight"]
    assert torch.equal(after.data, before.data)
    torch.testing.assert_close(decode(after) * became[:, None], decode(before), rtol=1e-6, atol=1e-7)


def test_groups_of_a_row_are_off_by_no_more_than_their_scales_are_rounded_by() -> None:
    weight = torch.randn(WIDTH, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    files = edits()
    files.quantized["p.weight"] = before = rounded(weight, AWQ(16))
    became = absorb(place(None), scales(), files).inputs
    after = files.quantized["p.weight"]
    assert torch.equal(after.data, before.data) and torch.equal(after.zero_points, before.zero_points)
    torch.testing.assert_close(decode(after) * became[:, None], decode(before), rtol=2**-7, atol=0)


def test_an_unquantized_producer_is_divided_by_powers_of_two_and_so_not_rounded() -> None:
    weight = torch.randn(WIDTH, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    bias = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3)).bfloat16()
    files = edits(p_weight=weight, p_bias=bias)
    became = absorb(place(None, bias="p.bias"), scales(), files).inputs
    assert bool(((became / scales()).log2().abs() <= 0.5 + 1e-6).all())
    assert torch.equal(files.tensors["p.weight"].float() * became[:, None], weight.float())
    assert torch.equal(files.tensors["p.bias"].float() * became, bias.float())


def test_a_bias_is_divided_with_its_norm() -> None:
    weight, bias = torch.rand(WIDTH) + 0.5, torch.randn(WIDTH)
    files = edits(p_weight=weight, p_bias=bias)
    became = absorb(place(0.0, bias="p.bias"), scales(), files).inputs
    torch.testing.assert_close(files.tensors["p.bias"] * became, bias)


def test_rows_that_feed_several_channels_are_divided_once_and_others_not_at_all() -> None:
    rows = torch.tensor([0, 1, 0, 1, -1, 5])
    weight = torch.randn(8, 4).bfloat16()
    files = edits(p_weight=weight)
    became = absorb(place(None, rows, count=8), torch.tensor([4.0, 2.0, 4.0, 2.0, 7.0, 0.5]), files).inputs
    assert became.tolist() == [4.0, 2.0, 4.0, 2.0, 1.0, 0.5]
    expected = weight.float() / torch.tensor([4.0, 2, 1, 1, 1, 0.5, 1, 1])[:, None]
    assert torch.equal(files.tensors["p.weight"].float(), expected)


def test_a_scale_of_one_leaves_every_bit() -> None:
    weight = torch.full((WIDTH,), 1e-10)  # lost in 1 + w
    files = edits(p_weight=weight)
    s = torch.ones(WIDTH)
    s[0] = 2.0
    assert absorb(place(1.0), s, files).inputs[1:].tolist() == [1.0] * (WIDTH - 1)
    assert torch.equal(files.tensors["p.weight"][1:], weight[1:])
