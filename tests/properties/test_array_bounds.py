"""The building blocks keep their bounds for any numbers at all; exact arithmetic is the judge."""

from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import fewbits

# fp32 rounding of the scale and of the decoded number.
SLACK = 1 + Fraction(1, 2**20)
numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
alike = st.builds(
    lambda centre, spread: [float(np.float32(centre + part * spread)) for part in (0, 1, 0.5, 0.9)],
    st.floats(-1e6, 1e6),
    st.floats(0, 1),
)
# Ends that both lie at half a step of the zero point, where clipping costs most.
awkward = st.builds(
    lambda up, down, step: [float(np.float32(up * step)), float(np.float32(-down * step))],
    st.sampled_from([7.5, 0.5, 14.5, 7.4999995, 7.5000005]),
    st.sampled_from([7.5, 14.5, 0.5, 7.5000005]),
    st.floats(1e-30, 1e30),
)
runs = st.lists(numbers, min_size=1, max_size=40) | alike | awkward


@given(runs, st.integers(1, 50))
def test_int4_brings_every_value_back_within_half_a_step_of_its_group(values: list[float], group_size: int) -> None:
    quantized = fewbits.quantize_int4_asymmetric(values, group_size)
    decoded = fewbits.dequantize_int4_asymmetric(quantized).tolist()
    for index, (value, found) in enumerate(zip(values, decoded, strict=True)):
        scale = Fraction(quantized.scale[index // group_size].item())
        assert abs(Fraction(value) - Fraction(found)) <= scale / 2 + (SLACK - 1) * max(scale, abs(Fraction(value)))


@given(runs)
def test_int8_brings_every_value_back_within_half_a_step(values: list[float]) -> None:
    quantized = fewbits.quantize_int8_symmetric(values)
    scale = Fraction(quantized.scale.item())
    assert scale > 0
    decoded = fewbits.dequantize_int8_symmetric(quantized).tolist()
    for value, found in zip(values, decoded, strict=True):
        assert abs(Fraction(value) - Fraction(found)) <= scale / 2 + (SLACK - 1) * abs(Fraction(value))


@given(runs)
def test_fp8_brings_every_value_back_within_a_sixteenth_or_half_a_subnormal_step(values: list[float]) -> None:
    quantized = fewbits.quantize_fp8_e4m3(values)
    smallest = Fraction(quantized.scale.item()) / 2**9
    decoded = fewbits.dequantize_fp8_e4m3(quantized).tolist()
    for value, found in zip(values, decoded, strict=True):
        bound = max(abs(Fraction(value)) / 16, smallest / 2) * SLACK
        # Below the smallest normal fp32 the decoded number itself is rounded.
        assert abs(Fraction(value) - Fraction(found)) <= bound + Fraction(2) ** -149


@given(runs)
def test_int8_is_symmetric_about_zero(values: list[float]) -> None:
    negated = fewbits.quantize_int8_symmetric([-value for value in values])
    assert negated.data.tolist() == [-code for code in fewbits.quantize_int8_symmetric(values).data.tolist()]


@given(runs, st.integers(1, 50))
def test_int4_groups_do_not_touch_each_other(values: list[float], group_size: int) -> None:
    together = fewbits.dequantize_int4_asymmetric(fewbits.quantize_int4_asymmetric(values, group_size)).tolist()
    alone = [
        number
        for start in range(0, len(values), group_size)
        for number in fewbits.dequantize_int4_asymmetric(
            fewbits.quantize_int4_asymmetric(values[start : start + group_size], group_size)
        ).tolist()
    ]
    assert together == alone


@given(st.lists(st.integers(-8, 7), min_size=1, max_size=99))
def test_codes_unpack_to_what_was_packed(codes: list[int]) -> None:
    packed = fewbits.pack_int4(codes)
    assert packed.numel() == (len(codes) + 1) // 2
    assert fewbits.unpack_int4(packed, len(codes)).tolist() == codes


@given(
    st.lists(st.tuples(numbers.map(abs), numbers.map(abs)), min_size=1, max_size=20),
    st.floats(0, 1),
)
def test_smooth_quant_scales_are_positive_and_finite(pairs: list[tuple[float, float]], alpha: float) -> None:
    weight, activation = zip(*pairs, strict=True)
    scales = fewbits.smooth_quant_scales(weight, activation, alpha).tolist()
    assert all(0 < scale < float("inf") for scale in scales)
    assert all(scale == 1 for scale, pair in zip(scales, pairs, strict=True) if 0 in pair)
