"""What every format must do: refuse or store each scheme, the same whole or in tiles, and give it back bit for bit."""

from __future__ import annotations

import pytest
import torch

from fewbits.formats import FORMATS
from fewbits.layout import stored_dtype, torch_dtype
from fewbits.methods import GPTQ, Fp8E4M3, Int4Asymmetric, Int8Symmetric, QuantMethod
from fewbits.packing import open_codes, seal
from fewbits.tensors import QuantizedWeight

METHODS: tuple[QuantMethod, ...] = (
    Int8Symmetric(),
    Int8Symmetric(activations=None),
    Fp8E4M3(),
    Fp8E4M3(activations=None),
    Int4Asymmetric(32),
    Int4Asymmetric("channel"),
    *(GPTQ(bits, 16, symmetric) for bits in range(1, 9) for symmetric in (True, False)),
    *(GPTQ(bits, "channel", symmetric) for bits in (2, 4, 8) for symmetric in (True, False)),
)
SHAPES = ((64, 96), (33, 32), (7, 160), (130, 64))
LARGEST = (137, 160)
# Whether a format can store a scheme depends on no shape here: every group size above divides all widths.
CASES = [
    (name, method) for name in FORMATS for method in METHODS if FORMATS[name].why_not(method.scheme, LARGEST) is None
]
REFUSED = [(name, method) for name in FORMATS for method in METHODS if (name, method) not in CASES]


def random_weight(method: QuantMethod, shape: tuple[int, int], scale_dtype: torch.dtype) -> QuantizedWeight:
    """Codes, scales and zero points over their whole ranges."""
    generator = torch.Generator().manual_seed(sum(shape))
    scheme = method.scheme
    groups = scheme.groups(shape[1])
    codes = torch.randint(0, scheme.largest_code + 1, shape, generator=generator, dtype=torch.uint8)
    if scheme.kind == "float":
        # Every byte but the two NaNs.
        codes = torch.where(codes & 0x7F == 0x7F, 0, codes).view(torch.float8_e4m3fn)
    scales = torch.rand(shape[0], groups, generator=generator) + 0.01
    if scheme.kind == "int" and scheme.symmetric and scheme.bits < 8:
        scales *= torch.randint(0, 2, scales.shape, generator=generator) * 2 - 1
    zeros = torch.randint(0, scheme.largest_code + 1, (shape[0], groups), generator=generator, dtype=torch.uint8)
    return seal(codes, scales.to(scale_dtype), None if scheme.symmetric else zeros, method)


def rows_of(weight: QuantizedWeight, start: int, stop: int) -> QuantizedWeight:
    codes, scales, zeros = open_codes(weight)
    return seal(codes[start:stop], scales[start:stop], None if zeros is None else zeros[start:stop], weight.method)


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    bytes_of = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bytes_of)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_goes_by_its_quant_method(name: str) -> None:
    assert name == FORMATS[name].NAME


@pytest.mark.parametrize(("name", "method"), REFUSED, ids=str)
def test_a_refusal_is_a_sentence_that_names_the_format(name: str, method: QuantMethod) -> None:
    reason = FORMATS[name].why_not(method.scheme, LARGEST)
    assert reason is not None
    assert reason.startswith(name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "method"), CASES, ids=str)
def test_a_weight_comes_back_bit_for_bit(name: str, method: QuantMethod, shape: tuple[int, int]) -> None:
    chosen = FORMATS[name]
    weight = random_weight(method, shape, torch.bfloat16)
    back = chosen.decode("m.up", chosen.encode("m.up", weight, shape), method.scheme)
    assert back.shape == shape
    assert back.method.scheme == method.scheme
    assert back.group_size == weight.group_size
    assert same(back.data, weight.data)
    assert same(back.scales, weight.scales)
    assert same(back.zero_points, weight.zero_points)
    assert same(back.dequantize(), weight.dequantize())


@pytest.mark.parametrize("scale_dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize(("name", "method"), CASES, ids=str)
def test_the_planned_tensors_are_the_stored_ones(name: str, method: QuantMethod, scale_dtype: str) -> None:
    shape = (33, 96)
    chosen = FORMATS[name]
    stored = chosen.encode("m", random_weight(method, shape, torch_dtype(scale_dtype)), shape)
    planned = {
        tensor.name: (tensor.dtype, tensor.shape)
        for tensor in chosen.tensors_for("m", method.scheme, shape, scale_dtype)
    }
    assert planned == {key: (stored_dtype(tensor.dtype), tuple(tensor.shape)) for key, tensor in stored.items()}
    assert chosen.quantized_modules(stored) == ["m"]
    assert chosen.shape_of("m", method.scheme, stored, stored.__getitem__) == shape


@pytest.mark.parametrize("height", [32, 64])
@pytest.mark.parametrize(("name", "method"), CASES, ids=str)
def test_tiles_of_rows_make_the_same_bytes_as_the_whole(name: str, method: QuantMethod, height: int) -> None:
    shape = (137, 64)
    chosen = FORMATS[name]
    weight = random_weight(method, shape, torch.bfloat16)
    parts: dict[str, list[torch.Tensor]] = {}
    for start in range(0, shape[0], height):
        tile = rows_of(weight, start, min(start + height, shape[0]))
        for key, tensor in chosen.encode("m", tile, shape, start).items():
            parts.setdefault(key, []).append(tensor)
    whole = chosen.encode("m", weight, shape)
    assert all(same(torch.cat(parts.pop(key)), tensor) for key, tensor in whole.items())
    assert not parts


@pytest.mark.parametrize(("name", "method"), CASES, ids=str)
def test_stored_rows_of_a_tile_decode_to_the_rows_of_the_whole(name: str, method: QuantMethod) -> None:
    shape = (137, 64)
    chosen = FORMATS[name]
    weight = random_weight(method, shape, torch.bfloat16)
    stored = chosen.encode("m", weight, shape)
    for start, stop in ((0, 32), (32, 96), (96, 137)):
        tile = {}
        for key, tensor in stored.items():
            first, last = chosen.stored_rows(key, method.scheme, start, stop)
            tile[key] = tensor[first:last]
        decoded = chosen.decode("m", tile, method.scheme, (stop - start, shape[1]))
        assert same(decoded.dequantize(), weight.dequantize()[start:stop])


@pytest.mark.parametrize("name", FORMATS)
def test_a_config_of_all_schemes_at_once_gives_them_back(name: str) -> None:
    chosen = FORMATS[name]
    schemes = {
        f"model.layers.{block}.mlp.proj_{number}": method.scheme
        for block in range(3)
        for number, method in enumerate(METHODS)
        if chosen.why_not(method.scheme, (64, 96)) is None
    }
    named = {**schemes, "model.router": None, "lm_head": None}
    assert chosen.schemes_from_config(chosen.quantization_config(named), named) == named
