"""QuantLinear: a module like any other, with its weight kept quantized."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from fewbits import AWQ, GPTQ, Fp8E4M3, Int4Asymmetric, Int8Symmetric, QuantizationError, QuantLinear, QuantMethod
from fewbits.kernels.ops import linear as operator
from fewbits.tensors import QuantizedWeight

METHODS = [Int8Symmetric(), Int8Symmetric(None), Int4Asymmetric(32), Fp8E4M3(), Fp8E4M3(None)]


def layer(method: QuantMethod, inputs: int = 96, outputs: int = 10) -> QuantLinear:
    torch.manual_seed(0)
    return QuantLinear.from_linear(nn.Linear(inputs, outputs), method)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_it_multiplies_with_the_rounded_weight(method: QuantMethod) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 10)
    quantized = QuantLinear.from_linear(linear, method)
    x = torch.randn(2, 3, 96)
    expected = x @ quantized.dequantize(torch.float32).T + quantized.bias
    # Rounding activations moves each by half a step at most: 1/254 of the largest, or 1/16 of itself.
    steps = {None: 1e-4, "int": 1 / 254, "float": 1 / 16}[method.scheme.kind if method.scheme.activations else None]
    slack = steps * x.abs().amax(-1, keepdim=True) * quantized.dequantize(torch.float32).abs().sum(1) + 1e-5
    assert ((quantized(x) - expected).abs() <= slack).all()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_leading_dimensions_strides_and_no_tokens(method: QuantMethod) -> None:
    quantized = layer(method)
    x = torch.randn(4, 96, 3).transpose(1, 2)
    assert torch.equal(quantized(x), quantized(x.contiguous()))
    assert torch.equal(quantized(x)[1, 2], quantized(x.contiguous().view(-1, 96))[5])
    assert quantized(x[0, 0]).shape == (10,)
    assert quantized(torch.empty(2, 0, 96)).shape == (2, 0, 10)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_it_can_be_copied_pickled_saved_and_loaded(method: QuantMethod) -> None:
    quantized = layer(method)
    x = torch.randn(5, 96)
    expected = quantized(x)
    saved = io.BytesIO()
    torch.save(quantized.state_dict(), saved)
    saved.seek(0)
    other = layer(method)
    other(x)
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(torch.load(saved, weights_only=True))
    for same in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized)), other):
        assert torch.equal(same(x), expected)
        assert same.method == method


def test_what_kernels_prepared_is_neither_saved_nor_copied() -> None:
    quantized = layer(Int8Symmetric())
    before = len(pickle.dumps(quantized))
    quantized.prepare((1, 64))
    assert len(pickle.dumps(quantized)) == before
    assert set(quantized.state_dict()) == {"codes", "scales", "bias"}


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_casting_the_model_changes_neither_codes_nor_scales(method: QuantMethod) -> None:
    quantized = layer(method)
    cast = copy.deepcopy(quantized).to(torch.bfloat16)
    assert torch.equal(cast.codes, quantized.codes) and torch.equal(cast.scales, quantized.scales)
    assert cast.scales.dtype == torch.float32 and cast.bias is not None and cast.bias.dtype == torch.bfloat16
    assert cast(torch.randn(3, 96).bfloat16()).dtype == torch.bfloat16


def test_inputs_in_the_order_of_the_codes() -> None:
    quantized = layer(Int4Asymmetric(32))
    stored = quantized.quantized_weight()
    order = torch.randperm(96)
    parts = (stored.data, stored.scales, stored.zero_points, stored.shape, stored.method, stored.group_size)
    ordered = QuantLinear(QuantizedWeight(*parts, input_order=order), quantized.bias)
    x = torch.randn(4, 96)
    assert torch.equal(ordered(x), quantized(x[:, order]))
    assert torch.equal(ordered.dequantize()[:, order], quantized.dequantize(torch.bfloat16))
    assert torch.equal(copy.deepcopy(ordered)(x), ordered(x))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_gradients_reach_the_input(method: QuantMethod) -> None:
    quantized = layer(method)
    x = torch.randn(2, 5, 96, requires_grad=True)
    y = quantized(x)
    assert torch.equal(y, quantized(x.detach()))
    y.sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, quantized.dequantize(torch.float32).sum(0).expand_as(x), atol=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_operator_keeps_its_promises(method: QuantMethod) -> None:
    quantized = layer(method)
    scheme = method.scheme
    numbers: tuple[Any, ...] = (96, scheme.kind, scheme.bits, scheme.symmetric, scheme.group_size)
    tensors = (quantized.codes, quantized.scales, quantized.zero_points, quantized.bias)
    activations = scheme.activations is not None
    torch.library.opcheck(operator, (torch.randn(3, 96, requires_grad=True), *tensors, *numbers, activations))


@pytest.mark.parametrize("tokens", [1, 16, 512])
@pytest.mark.parametrize("method", [Int4Asymmetric(32), Int8Symmetric(), Fp8E4M3()], ids=str)
def test_what_was_prepared_goes_with_the_layer(method: QuantMethod, tokens: int) -> None:
    quantized = layer(method)
    quantized(torch.randn(tokens, 96).bfloat16())
    codes = weakref.ref(quantized.codes)
    del quantized
    gc.collect()
    assert codes() is None


def test_exported_and_compiled_graphs_hold_it() -> None:
    quantized = layer(Int4Asymmetric(32))
    x = torch.randn(3, 96)
    exported = torch.export.export(nn.Sequential(quantized), (x,)).module()
    compiled = torch.compile(nn.Sequential(quantized), backend="aot_eager", fullgraph=True)
    assert torch.equal(exported(x), quantized(x)) and torch.equal(compiled(x), quantized(x))


def test_repr_shows_shape_scheme_and_kernels() -> None:
    linear = layer(Int4Asymmetric(32))
    text = repr(linear)
    assert "in_features=96, out_features=10" in text and "int4 asymmetric group 32" in text
    assert f"1: {linear.kernels([1])[1]}," in text and "512: panels" in text


@pytest.mark.parametrize("method", [AWQ(32), GPTQ()], ids=str)
def test_methods_that_need_calibration_are_refused(method: QuantMethod) -> None:
    with pytest.raises(QuantizationError, match="chooses codes by calibration data"):
        layer(method)


def test_bad_layers_and_inputs_are_refused() -> None:
    with pytest.raises(QuantizationError, match="group size 64 does not divide 96 inputs"):
        layer(Int4Asymmetric(64))
    broken = nn.Linear(96, 2)
    with torch.no_grad():
        broken.weight[1, 5] = float("nan")
    with pytest.raises(QuantizationError, match="NaN or infinite"):
        QuantLinear.from_linear(broken, Int8Symmetric())
    quantized = layer(Int8Symmetric())
    with pytest.raises(QuantizationError, match=r"expected \[..., 96\] on cpu, got \[2, 95\]"):
        quantized(torch.randn(2, 95))
    with pytest.raises(QuantizationError, match="expected 10 biases"):
        QuantLinear(quantized.quantized_weight(), torch.zeros(9))
