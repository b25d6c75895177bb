"""Rounding, portable and compiled, against a few plain lines of NumPy and ml_dtypes: equal scales, equal codes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits import numerics
from fewbits.kernels import channels, groups
from fewbits.numerics import Rounded, Search
from fewbits.schemes import Scheme

FORMS = {"portable": (numerics, numerics), "compiled": (channels, groups)}
NUMPY_DTYPES = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16, torch.float32: np.float32}
f32 = np.float32


def weights(dtype: torch.dtype, rows: int = 9, columns: int = 96) -> torch.Tensor:
    """Rows of unlike size and sign: tiny, huge, all zero, one value, all negative, all positive."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    scales = torch.logspace(-6, 3, rows)[:, None]
    weight = values * scales
    weight[1] = 0
    weight[2] = -0.0
    weight[2, 7] = 3.5
    weight[3] = -weight[3].abs()
    weight[4] = weight[4].abs()
    return weight.to(dtype)


def rounded_scale(scale: Any, dtype: torch.dtype) -> Any:
    """NumPy: to the stored dtype and back, no smaller than its smallest normal number; 1 for 0."""
    kept = NUMPY_DTYPES[dtype]
    limits = ml_dtypes.finfo(kept)
    clamped = np.clip(scale, f32(limits.tiny), f32(limits.max)).astype(kept).astype(f32)
    return np.where(scale == 0, f32(1), clamped)


def as_codes(codes: torch.Tensor) -> Any:
    return (codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn else codes).numpy()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", NUMPY_DTYPES, ids=str)
def test_int8_is_the_nearest_multiple_of_the_rounded_scale(form: str, dtype: torch.dtype) -> None:
    weight = weights(dtype)
    found = FORMS[form][0].round_channel_int8(weight, dtype)
    w = weight.float().numpy()
    scale = rounded_scale(np.abs(w).max(1, keepdims=True) / f32(127), dtype)
    assert np.array_equal(found.scales.float().numpy(), scale)
    assert np.array_equal(as_codes(found.codes), np.clip(np.rint(w * (f32(1) / scale)), -127, 127).astype(np.int8))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", NUMPY_DTYPES, ids=str)
def test_fp8_is_the_cast_of_ml_dtypes(form: str, dtype: torch.dtype) -> None:
    weight = weights(dtype)
    found = FORMS[form][0].round_channel_fp8(weight, dtype)
    w = weight.float().numpy()
    scale = rounded_scale(np.abs(w).max(1, keepdims=True) / f32(448), dtype)
    codes = np.clip(w * (f32(1) / scale), -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert np.array_equal(found.scales.float().numpy(), scale)
    assert np.array_equal(as_codes(found.codes), codes)


@pytest.mark.parametrize("form", FORMS)
def test_fp8_rounds_every_bf16_number_as_ml_dtypes_does(form: str) -> None:
    bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    numbers = bits.view(torch.bfloat16)
    # Rows of one number beside 448: the scale is 1, so that the code is that of the number itself.
    small = numbers[numbers.float().abs() <= 448].view(-1, 1)
    rows = torch.cat([small, torch.full_like(small, 448.0)], 1)
    found = FORMS[form][0].round_channel_fp8(rows, torch.bfloat16)
    assert bool((found.scales == 1).all())
    expected = small[:, 0].float().numpy().astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert np.array_equal(as_codes(found.codes)[:, 0], expected)


def plain_group(group: Any, bits: int, symmetric: bool, dtype: torch.dtype) -> tuple[Any, float, int]:
    """Codes, scale and zero point of one group on its min/max range, by the definition."""
    low, high = min(group.min(), f32(0)), max(group.max(), f32(0))
    top = 2**bits - 1
    if not symmetric:
        scale = rounded_scale((high - low) / f32(top), dtype)[()]
        zero = int(np.clip(np.rint(-low / scale), 0, top))
        grids = [(scale, zero)]
    else:
        middle = 2 ** (bits - 1)
        extreme = high if high > -low else low
        wide = rounded_scale(np.abs(extreme) / f32(middle), dtype)[()]
        grids = [(-wide if extreme > 0 else wide, middle)]
        if bits > 1:
            grids.append((rounded_scale(np.abs(extreme) / f32(middle - 1), dtype)[()], middle))
    best = None
    for scale, zero in grids:
        codes = np.clip(np.rint(group * (f32(1) / scale)) + zero, 0, top)
        loss = float((((codes - zero) * scale - group).astype(np.float64) ** 2).sum())
        if best is None or loss < best[0]:
            best = (loss, codes.astype(np.uint8), scale, zero)
    assert best is not None
    return best[1:]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("bits", "size"), [(4, 32), (4, 0), (2, 32), (3, 48), (8, 32), (1, 32)])
def test_groups_are_rounded_on_the_range_that_holds_zero(form: str, symmetric: bool, bits: int, size: int) -> None:
    weight = weights(torch.bfloat16)
    found = FORMS[form][1].round_groups(weight, Scheme("int", bits, symmetric, size), torch.bfloat16)
    w = weight.float().numpy()
    width = size or 96
    for row in range(w.shape[0]):
        for number, start in enumerate(range(0, 96, width)):
            codes, scale, zero = plain_group(w[row, start : start + width], bits, symmetric, torch.bfloat16)
            assert float(found.scales[row, number]) == scale
            assert (found.zeros is None) == symmetric
            assert found.zeros is None or int(found.zeros[row, number]) == zero
            assert np.array_equal(as_codes(found.codes)[row, start : start + width], codes)


def decoded(found: Rounded, scheme: Scheme) -> torch.Tensor:
    values = found.codes.float().view(found.codes.shape[0], found.scales.shape[1], -1)
    offset = 2.0 ** (scheme.bits - 1) if found.zeros is None else found.zeros.float()[:, :, None]
    return ((values - offset) * found.scales.float()[:, :, None]).view(found.codes.shape)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("power", [2, 4])
def test_a_search_loses_no_more_than_min_max_in_any_group(form: str, symmetric: bool, power: int) -> None:
    scheme = Scheme("int", 4, symmetric, 32)
    weight = weights(torch.float32, rows=40)
    rounding = FORMS[form][1].round_groups
    losses = []
    for search in (Search(power=power), Search(steps=21, narrowest=0.8, power=power)):
        error = decoded(rounding(weight, scheme, torch.float32, search), scheme) - weight
        losses.append((error.double().abs() ** power).view(40, 3, 32).sum(2))
    assert bool((losses[1] <= losses[0] * (1 + 1e-5)).all())
    assert float((losses[1] < losses[0] * 0.999).float().mean()) > 0.3


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-60000, 60000, width=16), min_size=64, max_size=64), st.sampled_from(list(FORMS)))
def test_every_weight_comes_back_within_half_a_step(values: list[float], form: str) -> None:
    weight = torch.tensor([values], dtype=torch.float32)
    scheme = Scheme("int", 4, symmetric=False, group_size=32)
    found = FORMS[form][1].round_groups(weight, scheme, torch.float32)
    step = found.scales.repeat_interleave(32, 1).double()
    bound = step * 0.5001
    assert bool(((decoded(found, scheme).double() - weight.double()).abs() <= bound).all())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", NUMPY_DTYPES, ids=str)
def test_what_is_not_finite_is_told(form: str, bad: float, dtype: torch.dtype) -> None:
    weight = weights(dtype)
    weight[5, 17] = bad
    by_channel, by_group = FORMS[form]
    assert by_channel.round_channel_int8(weight, dtype).nonfinite
    assert by_channel.round_channel_fp8(weight, dtype).nonfinite
    assert by_group.round_groups(weight, Scheme("int", 4, False, 32), dtype).nonfinite
    assert not by_channel.round_channel_int8(weights(dtype), dtype).nonfinite


@pytest.mark.parametrize("form", FORMS)
def test_the_errors_told_are_those_of_the_decoded_weights(form: str) -> None:
    weight = weights(torch.bfloat16)
    scheme = Scheme("int", 4, False, 32)
    found = FORMS[form][1].round_groups(weight, scheme, torch.bfloat16)
    error = (decoded(found, scheme).double() - weight.double()).square().sum()
    assert found.squared_error == pytest.approx(float(error), rel=1e-4)
    assert found.squared_norm == pytest.approx(float(weight.double().square().sum()), rel=1e-5)
