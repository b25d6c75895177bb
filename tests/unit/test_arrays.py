"""The building blocks against naive loops, NumPy and ml_dtypes, and everything that they refuse."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch

import fewbits
from fewbits import AWQ, GPTQ, Int4Asymmetric, Int8Symmetric, QuantizationError, QuantizedTensor, SmoothQuant

VALUES = [0.0, -1.5, 3.25, 0.1, -2.75, 7.0, -0.0, 1e-3]
SMALLEST_NORMAL, LARGEST = np.finfo(np.float32).tiny, float(np.finfo(np.float32).max)


def int4(values: object) -> QuantizedTensor:
    return fewbits.quantize_int4_asymmetric(values, 128)  # type: ignore[arg-type]


QUANTIZERS = [fewbits.quantize_int8_symmetric, int4, fewbits.quantize_fp8_e4m3]
PAIRS = [
    (fewbits.quantize_int8_symmetric, fewbits.dequantize_int8_symmetric),
    (int4, fewbits.dequantize_int4_asymmetric),
    (fewbits.quantize_fp8_e4m3, fewbits.dequantize_fp8_e4m3),
]


# Input in every form


@pytest.mark.parametrize("quantize", QUANTIZERS)
@pytest.mark.parametrize(
    "values",
    [
        tuple(VALUES),
        np.array(VALUES),
        np.array(VALUES, dtype=np.float32).reshape(2, 2, 2),
        np.array(VALUES, dtype=">f8"),
        np.array(VALUES[::-1])[::-1],
        np.array([VALUES, VALUES]).T[:, 0],
        torch.tensor(VALUES),
        torch.tensor(VALUES, dtype=torch.float64).reshape(4, 2),
        torch.tensor(VALUES, requires_grad=True),
        torch.tensor([VALUES, VALUES]).T[:, 0],
    ],
)
def test_the_form_of_the_input_does_not_matter(quantize: object, values: object) -> None:
    expected, found = quantize(VALUES), quantize(values)  # type: ignore[operator]
    assert found.data.view(torch.uint8).tolist() == expected.data.view(torch.uint8).tolist()
    assert found.scale.tolist() == expected.scale.tolist() and found.num_elements == 8


@pytest.mark.parametrize("quantize", QUANTIZERS)
@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int64, np.float16, ml_dtypes.bfloat16])
def test_any_dtype_of_numbers_will_do(quantize: object, dtype: type) -> None:
    found = quantize(np.array([0, 3, 100], dtype=dtype))  # type: ignore[operator]
    assert found.scale.tolist() == quantize([0, 3, 100]).scale.tolist()  # type: ignore[operator]
    assert quantize(torch.tensor([0, 3, 100], dtype=torch.bfloat16)).scale.tolist() == found.scale.tolist()  # type: ignore[operator]


def test_a_read_only_array_is_left_as_it_is() -> None:
    array = np.array(VALUES)
    array.flags.writeable = False
    fewbits.quantize_int8_symmetric(array)
    assert array.tolist() == VALUES


# What is refused


@pytest.mark.parametrize("quantize", QUANTIZERS)
@pytest.mark.parametrize("values", [[], [[]], np.zeros((0, 4)), torch.zeros(0)], ids=repr)
def test_no_values_are_refused(quantize: object, values: object) -> None:
    with pytest.raises(QuantizationError, match="empty values"):
        quantize(values)  # type: ignore[operator]


@pytest.mark.parametrize("quantize", QUANTIZERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_the_first_value_that_is_not_finite_is_named(quantize: object, bad: float) -> None:
    for values in ([1.0, bad, math.nan], np.array([1.0, bad, 0.0]), torch.tensor([1.0, bad, 0.0], dtype=torch.float64)):
        with pytest.raises(
            QuantizationError, match=f"expected finite values, got {bad!r:.4}.* at index 1".replace("+", ".")
        ):
            quantize(values)  # type: ignore[operator]


@pytest.mark.parametrize(
    "values",
    [
        None,
        "123",
        b"123",
        {1: 2},
        {1, 2},
        (value for value in VALUES),
        [1, "2"],
        [1, None],
        [True],
        [1j],
        [[1, 2], [3]],
        [10**400],
        np.array([True]),
        np.array(["1"]),
        np.array([1j]),
        np.ma.masked_array([1.0, 2.0], [False, True]),
        torch.tensor([True]),
        torch.tensor([1j]),
        torch.zeros(2, device="meta"),
        torch.eye(2).to_sparse(),
    ],
    ids=lambda values: f"{values!r:.20}",
)
def test_what_is_no_number_is_refused(values: object) -> None:
    for quantize in QUANTIZERS:
        with pytest.raises(QuantizationError, match=r"expected .* got"):
            quantize(values)  # type: ignore[operator]


@pytest.mark.parametrize("group_size", [0, -1, True, 1.0, "8", None, math.nan])
def test_an_impossible_group_size_is_refused(group_size: object) -> None:
    with pytest.raises(QuantizationError, match="group_size must be"):
        fewbits.quantize_int4_asymmetric(VALUES, group_size)  # type: ignore[arg-type]


def test_a_tensor_of_another_width_is_refused() -> None:
    with pytest.raises(QuantizationError) as caught:
        fewbits.dequantize_int8_symmetric(int4(VALUES))
    assert str(caught.value) == "expected 8-bit tensor, got 4-bit"
    with pytest.raises(QuantizationError) as caught:
        fewbits.dequantize_int4_asymmetric(fewbits.quantize_int8_symmetric(VALUES))
    assert str(caught.value) == "expected 4-bit tensor, got 8-bit"
    with pytest.raises(QuantizationError, match="expected 8-bit tensor, got 4-bit"):
        fewbits.dequantize_fp8_e4m3(int4(VALUES))


def test_int8_and_fp8_are_not_taken_for_each_other() -> None:
    with pytest.raises(QuantizationError, match=r"expected codes in torch\.int8, got torch\.float8_e4m3fn"):
        fewbits.dequantize_int8_symmetric(fewbits.quantize_fp8_e4m3(VALUES))
    with pytest.raises(QuantizationError, match=r"expected codes in torch\.float8_e4m3fn, got torch\.int8"):
        fewbits.dequantize_fp8_e4m3(fewbits.quantize_int8_symmetric(VALUES))
    with pytest.raises(QuantizationError, match="expected a QuantizedTensor, got list"):
        fewbits.dequantize_fp8_e4m3([1])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("codes", "scales", "count", "size"), [(1, 1, 3, 4), (2, 2, 3, 4), (2, 1, 3, 2), (2, 1, 3, -1)]
)
def test_a_tensor_that_does_not_fit_together_is_refused(codes: int, scales: int, count: int, size: int) -> None:
    data, scale, zero = torch.zeros(codes, dtype=torch.uint8), torch.ones(scales), torch.zeros(scales)
    with pytest.raises(QuantizationError, match=f"{count} codes"):
        fewbits.dequantize_int4_asymmetric(QuantizedTensor(data, scale, zero, count, 4, size))


# int8


def test_int8_is_the_naive_loop() -> None:
    values = np.random.default_rng(0).standard_normal(4001).astype(np.float32)
    quantized = fewbits.quantize_int8_symmetric(values)
    scale = np.float32(max(abs(value) for value in values)) / np.float32(127)
    assert quantized.scale.item() == scale
    assert quantized.data.tolist() == [round(float(np.float32(value / scale))) for value in values]
    decoded = fewbits.dequantize_int8_symmetric(quantized)
    assert decoded.dtype == torch.float32 and decoded.shape == (4001,)
    assert decoded.tolist() == [float(np.float32(code) * scale) for code in quantized.data.tolist()]


def test_int8_rounds_half_to_even() -> None:
    assert fewbits.quantize_int8_symmetric([127, 0.5, 1.5, 2.5, -0.5, -1.5, -127]).data.tolist() == [
        127, 0, 2, 2, 0, -2, -127,
    ]  # fmt: skip


@pytest.mark.parametrize("value", [1.0, -1.0, 0.3, 1e-30, LARGEST, -LARGEST])
def test_int8_codes_stay_within_127_on_both_sides(value: float) -> None:
    quantized = fewbits.quantize_int8_symmetric([value, 0.0])
    assert quantized.data.tolist() == [math.copysign(127, value), 0]
    assert fewbits.dequantize_int8_symmetric(quantized)[0].item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("quantize", [fewbits.quantize_int8_symmetric, fewbits.quantize_fp8_e4m3, int4])
def test_zeros_come_back_as_zeros_with_scale_one(quantize: object) -> None:
    quantized = quantize([0.0, -0.0, 0.0])  # type: ignore[operator]
    assert quantized.scale.reshape(-1).tolist() == [1.0]
    decode = next(decode for encode, decode in PAIRS if encode is quantize)
    assert decode(quantized).tolist() == [0.0, 0.0, 0.0]


# int4


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 64, 65])
@pytest.mark.parametrize("group_size", [1, 3, 8, 64, 2**70])
def test_int4_groups_follow_each_other_and_the_last_may_be_shorter(count: int, group_size: int) -> None:
    values = np.random.default_rng(count).standard_normal(count).astype(np.float32) + 0.4
    quantized = fewbits.quantize_int4_asymmetric(values, group_size)
    decoded = fewbits.dequantize_int4_asymmetric(quantized).tolist()
    assert quantized.num_elements == len(decoded) == count and quantized.group_size == group_size
    assert quantized.data.dtype == torch.uint8 and quantized.data.numel() == math.ceil(count / 2)
    groups = [values[start : start + group_size] for start in range(0, count, min(group_size, count))]
    assert quantized.scale.shape == quantized.zero_point.shape == (len(groups),)
    for index, group in enumerate(groups):
        low, high = min(0.0, float(group.min())), max(0.0, float(group.max()))
        scale, zero = quantized.scale[index].item(), quantized.zero_point[index].item()
        assert scale == pytest.approx((high - low) / 15, rel=3e-7)
        assert 0 <= zero <= 15 and zero == int(zero)
        for value, found in zip(group, decoded[index * group_size :], strict=False):
            assert abs(Fraction(float(value)) - Fraction(found)) <= Fraction(scale) / 2 * (1 + Fraction(1, 10**5))


@pytest.mark.parametrize(
    "values",
    [
        [-3.7] * 5,
        [250.0, 250.5, 251.0],
        [0.5],
        [-0.5],
        [7.5, -7.5],
        [7.5, -7.49],
        [250.0],
        [1e30, 1e-30],
        [-1e-30, 1e30],
    ],
)
def test_int4_brings_every_value_back_within_half_a_step(values: list[float]) -> None:
    quantized = int4(values)
    decoded = fewbits.dequantize_int4_asymmetric(quantized)
    for value, found in zip(values, decoded.tolist(), strict=True):
        assert abs(value - found) <= quantized.scale.item() * 0.500001


def test_int4_puts_the_first_code_into_the_low_nibble() -> None:
    assert fewbits.quantize_int4_asymmetric([0.0, 1.0, 15.0], 3).data.tolist() == [0x10, 0x0F]
    assert fewbits.quantize_int4_asymmetric([-15.0, 0.0], 2).zero_point.tolist() == [15]


# fp8


def every_bf16() -> np.ndarray:
    return np.arange(65536, dtype=np.uint16).view(ml_dtypes.bfloat16)


def test_fp8_is_ml_dtypes_for_every_bf16_number_that_needs_no_scale() -> None:
    values = every_bf16()
    values = values[np.abs(values.astype(np.float32)) <= 448]
    quantized = fewbits.quantize_fp8_e4m3(torch.from_numpy(values.view(np.int16)).view(torch.bfloat16))
    assert quantized.scale.item() == 1.0 and quantized.num_elements > 34000
    assert np.array_equal(
        quantized.data.view(torch.uint8).numpy(), values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    )


def test_fp8_is_ml_dtypes_for_every_finite_bf16_number_at_once() -> None:
    values = every_bf16()
    values = values.astype(np.float32)
    values = values[np.isfinite(values)]
    quantized = fewbits.quantize_fp8_e4m3(values)
    scaled = values / np.float32(quantized.scale.item())
    expected = np.clip(scaled, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(quantized.data.view(torch.uint8).numpy(), expected.view(np.uint8))
    decoded = fewbits.dequantize_fp8_e4m3(quantized).numpy()
    assert np.isfinite(decoded).all()
    oracle = expected.astype(np.float64) * quantized.scale.item()
    assert np.array_equal(decoded, np.clip(oracle, -LARGEST, LARGEST).astype(np.float32))


@pytest.mark.parametrize("exponent", [-100, -20, 0, 3, 60, 100])
def test_fp8_is_ml_dtypes_at_every_size_of_scale(exponent: int) -> None:
    values = np.random.default_rng(1).standard_normal(5000).astype(np.float32) * np.float32(2.0**exponent)
    quantized = fewbits.quantize_fp8_e4m3(values)
    scale = np.abs(values).max() / np.float32(448)
    assert quantized.scale.item() == scale
    expected = np.clip(values / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(quantized.data.view(torch.uint8).numpy(), expected.view(np.uint8))


# Extremes


@pytest.mark.parametrize(("quantize", "dequantize"), PAIRS)
@pytest.mark.parametrize(
    "values",
    [[1e-45], [-1e-45, 1e-45], [1e-38, -1e-40], [LARGEST], [-LARGEST], [LARGEST, -LARGEST], [LARGEST, -0.03 * LARGEST]],
)
def test_extremes_give_a_finite_scale_and_finite_numbers(
    quantize: object, dequantize: object, values: list[float]
) -> None:
    quantized = quantize(values)  # type: ignore[operator]
    assert SMALLEST_NORMAL <= quantized.scale.item() < math.inf
    decoded = dequantize(quantized)  # type: ignore[operator]
    assert torch.isfinite(decoded).all()
    half_a_step = quantized.scale.item() * (16 if quantized.data.dtype == torch.float8_e4m3fn else 0.5)
    assert all(abs(v - w) <= half_a_step * 1.00001 for v, w in zip(values, decoded.tolist(), strict=True))


# smooth_quant_scales


def test_smooth_quant_scales_are_the_formula() -> None:
    weight, activation = [0.5, 2.0, 0.0, 3.0, 0.25], [8.0, 0.0, 5.0, 3.0, 100.0]
    for alpha in (0, 0.25, np.float32(0.5), 1.0):
        a = float(alpha)
        expected = [1.0 if 0 in (w, x) else x**a / w ** (1 - a) for w, x in zip(weight, activation, strict=True)]
        found = fewbits.smooth_quant_scales(weight, activation, alpha)
        assert found.dtype == torch.float32
        assert found.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.5, 0.99, 1.0])
def test_smooth_quant_scales_are_positive_and_finite_at_every_extreme(alpha: float) -> None:
    extremes = [0.0, 1e-45, 1e-38, 1.0, LARGEST]
    weight, activation = zip(*((w, x) for w in extremes for x in extremes), strict=True)
    scales = fewbits.smooth_quant_scales(weight, activation, alpha)
    assert bool((scales > 0).all()) and bool(torch.isfinite(scales).all()) and bool(torch.isfinite(1 / scales).all())


@pytest.mark.parametrize(
    ("weight", "activation", "alpha", "said"),
    [
        ([1.0], [1.0, 2.0], 0.5, "weight and activation dimensions must match"),
        ([], [], 0.5, "empty values"),
        ([-1.0], [1.0], 0.5, "must not be negative"),
        ([1.0], [-1.0], 0.5, "must not be negative"),
        ([math.nan], [1.0], 0.5, "expected finite values"),
        ([1.0], [1.0], math.nan, "alpha must be in"),
        ([1.0], [1.0], 1.5, "alpha must be in"),
        ([1.0], [1.0], True, "alpha must be in"),
        ([1.0], [1.0], "auto", "alpha must be in"),
    ],
)
def test_impossible_maxima_are_refused(weight: list[float], activation: list[float], alpha: float, said: str) -> None:
    with pytest.raises(QuantizationError, match=said):
        fewbits.smooth_quant_scales(weight, activation, alpha)


# Nibbles


def test_every_pair_of_codes_packs_and_unpacks() -> None:
    for low in range(-8, 8):
        for high in range(-8, 8):
            packed = fewbits.pack_int4([low, high])
            assert packed.dtype == torch.uint8 and packed.tolist() == [(low % 16) + 16 * (high % 16)]
            assert fewbits.unpack_int4(packed, 2).tolist() == [low, high]


def test_an_odd_count_is_padded_with_zero() -> None:
    packed = fewbits.pack_int4(np.array([[-1, 2, -8]], dtype=np.int8))
    assert packed.tolist() == [0x2F, 0x08]
    assert fewbits.unpack_int4(packed.numpy(), np.int64(3)).tolist() == [-1, 2, -8]
    assert fewbits.unpack_int4(packed.tolist(), 3).dtype == torch.int8


@pytest.mark.parametrize("code", [8, -9, 0.5, math.nan, math.inf, 1e30])
def test_a_code_outside_is_refused_by_its_place(code: float) -> None:
    with pytest.raises(QuantizationError, match=r"from -8 to 7, got .* at 1"):
        fewbits.pack_int4([0, code, 99])


@pytest.mark.parametrize(
    ("packed", "count", "said"),
    [
        ([1], 3, "3 codes take 2 bytes, got 1"),
        ([1, 2], 2, "2 codes take 1 bytes, got 2"),
        ([256], 1, "must be bytes, 0 to 255, got 256 at 0"),
        ([-1], 1, "must be bytes"),
        ([0.5], 1, "must be bytes"),
        ([], 0, "empty values"),
        ([1], 0, "num_elements must be > 0"),
        ([1], -1, "num_elements must be > 0"),
        ([1], True, "num_elements must be a whole number"),
        ([1], 1.0, "num_elements must be a whole number"),
    ],
)
def test_bytes_that_hold_no_such_codes_are_refused(packed: list[float], count: int, said: str) -> None:
    with pytest.raises(QuantizationError, match=said):
        fewbits.unpack_int4(packed, count)


def test_no_codes_are_refused() -> None:
    with pytest.raises(QuantizationError, match="empty values"):
        fewbits.pack_int4([])


# Sizes


def test_savings_count_the_codes_alone_and_round_up() -> None:
    assert fewbits.estimate_memory_savings(1_000_000, Int4Asymmetric()) == (2_000_000, 500_000)
    assert fewbits.estimate_memory_savings(3, AWQ()) == (6, 2)
    assert fewbits.estimate_memory_savings(3, GPTQ(bits=3)) == (6, 2)
    assert fewbits.estimate_memory_savings(10**15 + 1, SmoothQuant()) == (2 * 10**15 + 2, 10**15 + 1)
    assert fewbits.estimate_memory_savings(0, GPTQ()) == (0, 0)


@pytest.mark.parametrize(
    ("count", "method", "said"),
    [
        (-1, GPTQ(), "num_params must be 0 or more, got -1"),
        (1.5, GPTQ(), "num_params must be a whole number"),
        (True, GPTQ(), "num_params must be a whole number"),
        (math.nan, GPTQ(), "num_params must be a whole number"),
        (1, "gptq", "expected a method"),
        (1, GPTQ, "expected a method"),
        (1, GPTQ(bits=0), "GPTQ bits must be in"),
    ],
)
def test_impossible_savings_are_refused(count: int, method: GPTQ, said: str) -> None:
    with pytest.raises(QuantizationError, match=said):
        fewbits.estimate_memory_savings(count, method)


@pytest.mark.parametrize(
    ("quantize", "ratio"), [(fewbits.quantize_int8_symmetric, 2.0), (int4, 4.0), (fewbits.quantize_fp8_e4m3, 2.0)]
)
def test_a_quantized_tensor_knows_its_size(quantize: object, ratio: float) -> None:
    quantized = quantize(VALUES)  # type: ignore[operator]
    assert quantized.fp16_size_bytes == 16
    assert quantized.size_bytes == 16 / ratio and quantized.compression_ratio == ratio


def test_empty_data_has_ratio_zero() -> None:
    nothing = torch.empty(0, dtype=torch.uint8)
    assert QuantizedTensor(nothing, torch.ones(0), torch.zeros(0), 0, 4, 0).compression_ratio == 0.0


def test_tensors_can_be_compared_and_kept_in_sets() -> None:
    first, second = int4(VALUES), int4(VALUES)
    assert first == first and first != second and len({first, second}) == 2
    assert Int8Symmetric() != first
