"""What every format must do: refuse or store each scheme, the same whole or in tiles, and give it back bit for bit."""

from __future__ import annotations

import json

import pytest
import torch

from fewbits.formats import FORMATS, format_of_config
from fewbits.layout import stored_dtype, torch_dtype
from fewbits.methods import GPTQ, Fp8E4M3, Int4Asymmetric, Int8Symmetric, QuantMethod
from fewbits.schemes import Scheme
from fewbits.tensors import QuantizedWeight, open_codes, seal

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
# Every group size above divides all widths; whole words are filled in this shape at every width.
ROUND = (160, 160)
CASES = [
    (name, method) for name in FORMATS for method in METHODS if FORMATS[name].why_not(method.scheme, ROUND) is None
]
SHAPED_CASES = [
    (name, method, shape)
    for name, method in CASES
    for shape in SHAPES
    if FORMATS[name].why_not(method.scheme, shape) is None
]
# The last tile is a short one.
TALL = {name: (160, 64) if name.startswith("gptq") else (136, 64) if name == "awq" else (137, 64) for name in FORMATS}
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


def weight_for(name: str, method: QuantMethod, shape: tuple[int, int], dtype: str = "BF16") -> QuantizedWeight:
    """A random weight with scales in the dtype that the format stores those of a `dtype` checkpoint in."""
    return random_weight(method, shape, torch_dtype(FORMATS[name].scale_dtype(dtype)))


def rows_of(weight: QuantizedWeight, start: int, stop: int) -> QuantizedWeight:
    codes, scales, zeros = open_codes(weight)
    return seal(codes[start:stop], scales[start:stop], None if zeros is None else zeros[start:stop], weight.method)


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    bytes_of = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bytes_of)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_goes_by_its_name_and_reads_its_own_config(name: str) -> None:
    assert name == FORMATS[name].NAME
    scheme = next(method.scheme for found, method in CASES if found == name)
    assert format_of_config(FORMATS[name].quantization_config({"model.layers.0.up": scheme})) is FORMATS[name]


@pytest.mark.parametrize(("name", "method"), REFUSED, ids=str)
def test_a_refusal_is_a_sentence_that_names_the_format(name: str, method: QuantMethod) -> None:
    reason = FORMATS[name].why_not(method.scheme, ROUND)
    assert reason is not None
    assert reason.startswith(FORMATS[name].NAME)


@pytest.mark.parametrize(("name", "method", "shape"), SHAPED_CASES, ids=str)
def test_a_weight_comes_back_bit_for_bit(name: str, method: QuantMethod, shape: tuple[int, int]) -> None:
    chosen = FORMATS[name]
    weight = weight_for(name, method, shape)
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
    shape = (33, 96) if name == "compressed-tensors" else (32, 96)
    chosen = FORMATS[name]
    stored = chosen.encode("m", weight_for(name, method, shape, scale_dtype), shape)
    planned = {
        tensor.name: (tensor.dtype, tensor.shape)
        for tensor in chosen.tensors_for("m", method.scheme, shape, chosen.scale_dtype(scale_dtype))
    }
    assert planned == {key: (stored_dtype(tensor.dtype), tuple(tensor.shape)) for key, tensor in stored.items()}
    assert chosen.quantized_modules(stored) == ["m"]
    assert chosen.shape_of("m", method.scheme, stored, stored.__getitem__) == shape


@pytest.mark.parametrize("height", [32, 64])
@pytest.mark.parametrize(("name", "method"), CASES, ids=str)
def test_tiles_of_rows_make_the_same_bytes_as_the_whole(name: str, method: QuantMethod, height: int) -> None:
    shape = TALL[name]
    chosen = FORMATS[name]
    weight = weight_for(name, method, shape)
    parts: dict[str, list[torch.Tensor]] = {}
    for start in range(0, shape[0], height):
        tile = rows_of(weight, start, min(start + height, shape[0]))
        for key, tensor in chosen.encode("m", tile, shape, start).items():
            parts.setdefault(key, []).append(tensor)
    whole = chosen.encode("m", weight, shape)
    for key, tensor in whole.items():
        assert same(torch.cat(parts.pop(key), chosen.ROW_AXIS if tensor.dim() == 2 else 0), tensor), key
    assert not parts


@pytest.mark.parametrize(("name", "method"), CASES, ids=str)
def test_stored_rows_of_a_tile_decode_to_the_rows_of_the_whole(name: str, method: QuantMethod) -> None:
    shape = TALL[name]
    chosen = FORMATS[name]
    weight = weight_for(name, method, shape)
    stored = chosen.encode("m", weight, shape)
    for start, stop in ((0, 32), (32, 96), (96, shape[0])):
        tile = {}
        for key, tensor in stored.items():
            first, last = chosen.stored_rows(key, method.scheme, start, stop)
            across = chosen.ROW_AXIS == 1
            tile[key] = tensor if tensor.dim() == 1 and across else tensor.narrow(chosen.ROW_AXIS, first, last - first)
        decoded = chosen.decode("m", tile, method.scheme, (stop - start, shape[1]))
        assert same(decoded.dequantize(), weight.dequantize()[start:stop])


@pytest.mark.parametrize("name", FORMATS)
def test_a_config_of_all_schemes_that_go_together_gives_them_back(name: str) -> None:
    chosen = FORMATS[name]
    named: dict[str, Scheme | None] = {"model.router": None, "model.layers.2.mlp.gate": None, "lm_head": None}
    for block in range(3):
        for number, method in enumerate(METHODS):
            more = {**named, f"model.layers.{block}.mlp.proj_{number}": method.scheme}
            if chosen.why_not(method.scheme, (64, 96)) is None and chosen.why_not_together(more) is None:
                named = more
    assert sum(scheme is not None for scheme in named.values()) > 2
    assert chosen.schemes_from_config(json.loads(json.dumps(chosen.quantization_config(named))), named) == named
