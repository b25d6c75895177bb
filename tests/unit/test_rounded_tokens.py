"""Compiled rounding of activations to int8, against division by the scale and rounding half to even."""

from __future__ import annotations

import pytest
import torch

from fewbits.kernels.activations import round_tokens
from fewbits.kernels.tokens_run import int8_tokens

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_same(x: torch.Tensor) -> None:
    codes, scales = int8_tokens(x)
    expected, expected_scales = round_tokens(x, "int")
    assert torch.equal(codes.float() - 128, expected)
    assert torch.equal(scales, expected_scales)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 576])
def test_ordinary_numbers(dtype: torch.dtype, columns: int) -> None:
    assert_same(torch.randn(300, columns, generator=torch.Generator().manual_seed(columns)).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_quotients_halfway_between_codes(dtype: torch.dtype) -> None:
    halves = torch.arange(-254, 255).to(dtype) / 2
    rows = torch.stack([halves, halves * 2, halves / 4, -halves])
    assert_same(rows)
    # By 32, bf16 is rounded where it lies.
    assert_same(rows[:, :480].contiguous())
    # Halfway but for a rounding of the scale, of every row another.
    largest = 1 + torch.rand(500, 1, generator=torch.Generator().manual_seed(1))
    assert_same((largest * torch.arange(-127, 128) / 254).to(dtype))
    assert_same((largest * torch.arange(-128, 128).clamp(min=-127) / 254).to(dtype))


@pytest.mark.parametrize("columns", [40, 64])
@pytest.mark.parametrize("exponent", [-149, -130, -126, -91, -83, 89, 97, 120])
def test_numbers_of_any_size(exponent: int, columns: int) -> None:
    x = torch.randn(50, columns, generator=torch.Generator().manual_seed(2)).double() * 2.0**exponent
    assert_same(x.float())
    assert_same(x.bfloat16())
    assert_same(torch.zeros(2, columns))
