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
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (33, 130), (5, 32), (9, 224)])
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


COMMON = [Scheme("int", 8, True), Scheme("float", 8, True), Scheme("int", 4, False, 32)]
SCALE_DTYPES = {"same": torch.bfloat16, "half": torch.float16, "full": torch.float32}


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES.values(), ids=SCALE_DTYPES)
def test_every_number_that_fp8_can_be_made_of(scale_dtype: torch.dtype) -> None:
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    # The largest makes the scale 1, so that numbers, and ties among them, are rounded as they are.
    weight = numbers[numbers.abs() <= 448].view(1, -1)
    weight = weight[:, weight.shape[1] % 32 :]
    rounded = channels.round_channel_fp8(weight, scale_dtype)
    assert rounded.scales.item() == 1
    assert torch.equal(rounded.codes.view(torch.uint8), weight.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES.values(), ids=SCALE_DTYPES)
def test_ties_go_to_even(scale_dtype: torch.dtype) -> None:
    weight = (torch.arange(-254, 255).repeat(32) / 2).bfloat16().view(1, -1)
    assert torch.equal(channels.round_channel_int8(weight, scale_dtype).codes, weight.float().round().to(torch.int8))
    halves = (torch.arange(0, 31).repeat(32) / 2).bfloat16().view(1, -1)
    codes = groups.round_groups(halves, Scheme("int", 4, False), scale_dtype).codes
    assert torch.equal(codes, halves.float().round().to(torch.uint8))


@pytest.mark.parametrize(("scheme", "largest"), list(zip(COMMON, (127, 448, 15), strict=True)), ids=str)
def test_what_lies_on_the_grid_misses_nothing(scheme: Scheme, largest: int) -> None:
    codes = torch.randint(0, 9, (4, 64), generator=torch.Generator().manual_seed(0)).bfloat16()
    # Each group's range, so that the scale is 2^-6.
    codes[:, ::32], codes[:, 1::32] = 0, largest
    assert round_rows(codes / 64, scheme, Search()).squared_error == 0


@pytest.mark.parametrize("scheme", COMMON, ids=str)
@pytest.mark.parametrize("exponent", [-130, -126, -100, -70, -41, -40, 0, 40, 41, 70, 120])
def test_rows_of_any_size(scheme: Scheme, exponent: int) -> None:
    weight = weights(6, 96, torch.float32).mul(2.0**exponent).bfloat16()
    weight[1] = weights(1, 96, torch.bfloat16)[0]
    same(round_rows(weight, scheme, Search()), round_rows(weight, scheme, Search(), compiled=False))


@pytest.mark.parametrize("scheme", COMMON, ids=str)
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 31, 95])
def test_a_weight_that_is_no_number_is_seen(scheme: Scheme, odd: float, place: int) -> None:
    weight = weights(6, 96, torch.bfloat16)
    weight[4, place] = odd
    assert round_rows(weight, scheme, Search()).nonfinite


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
