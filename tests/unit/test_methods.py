"""Methods: their names, their limits, and that every impossible value is refused in words."""

import dataclasses

import numpy as np
import pytest

import fewbits
from fewbits import AWQ, GPTQ, Fp8E4M3, Int4Asymmetric, Int8Symmetric, QuantizationError, QuantMethod, SmoothQuant
from fewbits.methods import METHODS

ALL = (Int8Symmetric(), Int4Asymmetric(), Fp8E4M3(), AWQ(), SmoothQuant(), GPTQ())


@pytest.mark.parametrize(
    ("method", "text", "bits"),
    [
        (Int8Symmetric(), "INT8-Symmetric", 8),
        (Int4Asymmetric(), "INT4-Asymmetric", 4),
        (Fp8E4M3(), "FP8-E4M3", 8),
        (AWQ(), "AWQ(group=128)", 4),
        (AWQ(group_size=32), "AWQ(group=32)", 4),
        (SmoothQuant(), "SmoothQuant(α=0.50)", 8),
        (SmoothQuant(1), "SmoothQuant(α=1.00)", 8),
        (SmoothQuant("auto"), "SmoothQuant(α=auto)", 8),
        (GPTQ(), "GPTQ(4bit, group=128)", 4),
        (GPTQ(bits=3, group_size=64), "GPTQ(3bit, group=64)", 3),
    ],
)
def test_a_method_says_its_name_and_its_bits(method: QuantMethod, text: str, bits: int) -> None:
    method.validate()
    assert str(method) == text
    assert method.bits_per_weight == bits
    assert method.compression_ratio == 16 / bits


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (AWQ(group_size=0), "AWQ group_size must be > 0"),
        (AWQ(group_size=-128), "AWQ group_size must be > 0"),
        (GPTQ(group_size=0), "GPTQ group_size must be > 0"),
        (Int4Asymmetric(group_size=-1), "INT4 group_size must be > 0"),
        (SmoothQuant(alpha=1.01), "SmoothQuant alpha must be in [0.0, 1.0]"),
        (SmoothQuant(alpha=-0.01), "SmoothQuant alpha must be in [0.0, 1.0]"),
        (SmoothQuant(alpha=float("nan")), "SmoothQuant alpha must be in [0.0, 1.0]"),
        (SmoothQuant(alpha=float("inf")), "SmoothQuant alpha must be in [0.0, 1.0]"),
        (GPTQ(bits=0), "GPTQ bits must be in [1, 8]"),
        (GPTQ(bits=9), "GPTQ bits must be in [1, 8]"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_range(method: QuantMethod, message: str) -> None:
    with pytest.raises(QuantizationError) as caught:
        method.validate()
    assert str(caught.value).startswith(message)


WRONG = (None, True, "4", 4.0, float("nan"), [4], np.array([4, 4]), object)


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize(
    "make",
    [
        lambda value: AWQ(group_size=value),
        lambda value: Int4Asymmetric(group_size=value),
        lambda value: GPTQ(group_size=value),
        lambda value: GPTQ(bits=value),
    ],
)
def test_a_value_that_is_no_whole_number_is_refused(make: type[QuantMethod], value: object) -> None:
    with pytest.raises(QuantizationError, match="must be a whole number"):
        make(value).validate()


@pytest.mark.parametrize("value", [None, True, "0.5", "AUTO", [0.5], np.array(["auto", "auto"]), 0.5j], ids=repr)
def test_an_alpha_that_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(QuantizationError, match="SmoothQuant alpha must be a number"):
        SmoothQuant(alpha=value).validate()  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [False, "static", "none", 8, np.array(["dynamic"] * 2)], ids=repr)
@pytest.mark.parametrize("method_class", [Int8Symmetric, Fp8E4M3])
def test_activations_are_dynamic_or_none(method_class: type[QuantMethod], value: object) -> None:
    method_class(activations=None).validate()  # type: ignore[call-arg]
    with pytest.raises(QuantizationError, match="activations must be"):
        method_class(activations=value).validate()  # type: ignore[call-arg]


@pytest.mark.parametrize("method", [AWQ(solver="obq"), GPTQ(symmetric=1), GPTQ(symmetric=None)], ids=repr)  # type: ignore[arg-type]
def test_other_options_are_checked_too(method: QuantMethod) -> None:
    with pytest.raises(QuantizationError):
        method.validate()


@pytest.mark.parametrize("method", ALL, ids=str)
def test_methods_are_frozen_and_compare_by_value(method: QuantMethod) -> None:
    assert method == type(method)() and hash(method) == hash(type(method)())
    assert sum(method == other for other in ALL) == 1
    name = next(iter(field.name for field in dataclasses.fields(method)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(method, name, 1)


def test_methods_differ_by_their_options() -> None:
    assert GPTQ(bits=4) != GPTQ(bits=3)
    assert len({GPTQ(bits=bits) for bits in (3, 4, 4)}) == 2


def test_numbers_of_numpy_become_numbers_of_python() -> None:
    method = GPTQ(bits=np.int64(3), group_size=np.uint8(64))
    method.validate()
    assert repr(method) == repr(GPTQ(bits=3, group_size=64))
    assert repr(SmoothQuant(np.float32(0.25))) == repr(SmoothQuant(0.25))


def test_an_impossible_method_can_still_be_printed() -> None:
    assert str(SmoothQuant(alpha=None)) == "SmoothQuant(α=None)"  # type: ignore[arg-type]
    assert "GPTQ(None" in str(GPTQ(bits=None))  # type: ignore[arg-type]


def test_no_ratio_is_computed_for_an_impossible_method() -> None:
    with pytest.raises(QuantizationError, match="bits must be in"):
        _ = GPTQ(bits=0).compression_ratio


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_from_1_to_8_is_valid(bits: int) -> None:
    GPTQ(bits=bits, group_size="channel").validate()
    assert GPTQ(bits=bits).scheme.largest_code == 2**bits - 1


def test_a_whole_row_can_share_one_scale() -> None:
    assert Int4Asymmetric(group_size="channel").scheme.group_size == 0
    assert Int4Asymmetric(group_size=64).scheme.group_size == 64


def test_short_names_stand_for_the_six_methods() -> None:
    assert list(METHODS) == ["int8", "int4", "fp8", "awq", "smoothquant", "gptq"]
    assert [method_class() for method_class in METHODS.values()] == list(ALL)
    assert [method.needs_calibration for method in ALL] == [False, False, False, True, True, True]


def test_the_base_of_methods_is_no_method() -> None:
    with pytest.raises(TypeError):
        QuantMethod()  # type: ignore[abstract]


def test_all_errors_have_one_base() -> None:
    errors = [getattr(fewbits, name) for name in fewbits.__all__ if name.endswith("Error")]
    assert len(errors) == 10 and all(issubclass(error, fewbits.FewbitsError) for error in errors)
