"""Compiled and portable rounding give the same bytes, whatever the shape, dtype, search and number of threads."""

from __future__ import annotations

import pytest
import torch

from fewbits import numerics
from fewbits.kernels import channels, groups
from fewbits.kernels.rounding import round_rows
from fewbits.numerics import Rounded, Search
from fewbits.packing import pack_rows
from fewbits.schemes import Scheme

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SEARCH = Search(steps=11, narrowest=0.8, power=4)


def weights(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    values = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    values[rows // 2] = 0
    return values.to(dtype)


def same(one: Rounded, other: Rounded) -> None:
    assert torch.equal(one.codes.view(torch.uint8), other.codes.view(torch.uint8))
    assert torch.equal(one.scales, other.scales)
    assert (one.zeros is None) == (other.zeros is None)
    assert one.zeros is None or other.zeros is None or torch.equal(one.zeros, other.zeros)
    assert one.squared_error == pytest.approx(other.squared_error, rel=1e-4)
    assert one.squared_norm == pytest.approx(other.squared_norm, rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (33, 130)])
def test_channels(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = weights(*shape, dtype)
    same(channels.round_channel_int8(weight, dtype), numerics.round_channel_int8(weight, dtype))
    same(channels.round_channel_fp8(weight, dtype), numerics.round_channel_fp8(weight, dtype))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("size", [32, 0])
def test_groups(bits: int, size: int, symmetric: bool) -> None:
    weight = weights(7, 96, torch.bfloat16)
    scheme = Scheme("int", bits, symmetric, size)
    for search in (Search(), SEARCH):
        expected = numerics.round_groups(weight, scheme, torch.bfloat16, search)
        same(groups.round_groups(weight, scheme, torch.bfloat16, search), expected)
        packed = groups.round_groups(weight, scheme, torch.bfloat16, search, packed=True)
        assert torch.equal(packed.codes, pack_rows(expected.codes, bits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_weighted_by_importance(dtype: torch.dtype) -> None:
    weight = weights(9, 128, dtype)
    importance = torch.rand(128, generator=torch.Generator().manual_seed(3))
    scheme = Scheme("int", 4, False, 64)
    expected = numerics.round_groups(weight, scheme, dtype, SEARCH, importance)
    same(groups.round_groups(weight, scheme, dtype, SEARCH, importance), expected)


SCHEMES = [
    Scheme("int", 8, True), Scheme("float", 8, True), Scheme("int", 4, False, 32), Scheme("int", 4, True, 32),
    Scheme("int", 2, True, 32), Scheme("int", 8, True, 32), Scheme("int", 3, False, 32),
]  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_either_form_serves_in_the_same_place(scheme: Scheme) -> None:
    weight = weights(6, 96, torch.bfloat16)
    same(round_rows(weight, scheme, SEARCH), round_rows(weight, scheme, SEARCH, compiled=False))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rows_don_t_depend_on_their_neighbours_or_on_threads(scheme: Scheme) -> None:
    weight = weights(6, 96, torch.bfloat16)
    together = round_rows(weight, scheme, SEARCH)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        apart = [round_rows(weight[row : row + 1], scheme, SEARCH) for row in range(6)]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat([row.codes for row in apart]).view(torch.uint8), together.codes.view(torch.uint8))
    assert torch.equal(torch.cat([row.scales for row in apart]), together.scales)
