"""Every kernel against products in fp64 of the numbers that codes stand for; W8A8 equal to integer arithmetic."""

from __future__ import annotations

import timeit
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from fewbits.errors import KernelError
from fewbits.kernels import choose as choosing
from fewbits.kernels import int8_run, token_tiles_run
from fewbits.kernels.choose import KERNELS, choose, reasons_against
from fewbits.kernels.decoded_rows import DecodedRows
from fewbits.kernels.few_tokens import FewTokens
from fewbits.kernels.few_tokens_run import few_tokens
from fewbits.kernels.int8_dynamic import Int8Rows, Int8Tiles, OneDnnInt8
from fewbits.kernels.rows_abreast_run import RowsAbreast
from fewbits.kernels.spec import Kernel, LinearSpec, LinearWeight, Machine, machine_of
from fewbits.kernels.tiles import Tiles
from fewbits.schemes import Scheme
from linear_cases import activations, int8_product, make, rounded_to_fp8

CPU = machine_of(torch.device("cpu"))
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HALF_ULP = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-25}
W8A8 = Scheme("int", 8, True, 0, "dynamic")
WEIGHT_ONLY = [
    *(Scheme("int", bits, symmetric, group) for bits in range(1, 9) for symmetric, group in ((True, 32), (False, 0))),
    *(Scheme("int", 4, False, group) for group in (8, 16, 48, 64, 96, 192)),
    Scheme("int", 3, False, 64), Scheme("int", 8, False, 64),
    Scheme("float", 8, True), Scheme("float", 8, True, 0, "dynamic"),
]  # fmt: skip


def able(scheme: Scheme, columns: int, rows: int, tokens: int, dtype: torch.dtype) -> list[Kernel]:
    spec = LinearSpec(scheme, columns, rows, tokens, dtype, "cpu", CPU)
    return [kernel for kernel in KERNELS if kernel.why_not(spec) is None]


@pytest.mark.parametrize("scheme", WEIGHT_ONLY, ids=str)
@pytest.mark.parametrize("rows", [1, 9])
def test_weight_only_and_fp8_products(scheme: Scheme, rows: int) -> None:
    columns = 576 if scheme.group_size else 300
    case = make(scheme, rows, columns)
    for tokens in (1, 2, 5, 17):
        for dtype in DTYPES:
            x = activations(tokens, columns, dtype)
            wide = x.double().numpy() if scheme.activations is None else rounded_to_fp8(x)
            expected = wide @ case.decoded.T + case.bias.numpy()
            # Products as summed, codes raised by 128 included.
            lifted = np.abs(case.decoded) + 192 * np.repeat(
                np.abs(case.weight.scales.double().numpy()), columns // case.weight.scales.shape[1], 1
            )
            sizes = np.abs(wide) @ np.abs(case.decoded).T
            for kernel in able(scheme, columns, rows, tokens, dtype):
                y = kernel.prepare(case.weight, case.bias)(x)
                assert y.dtype == dtype
                bound = 2 * HALF_ULP[dtype] * np.abs(expected) + 2.0**-19 * (np.abs(wide) @ lifted.T) + 2.0**-17 * sizes
                if kernel.name == "tiles" and scheme.group_size:
                    # Scaled weights are rounded to bf16.
                    bound += 2.0**-8 * sizes
                if kernel.name == "panels" and dtype == torch.bfloat16:
                    # So are those of panels, and products before token scale and bias are added.
                    bound += 2.0**-9 * sizes + 2.0**-7 * (np.abs(expected) + np.abs(case.bias.numpy()))
                assert (np.abs(y.double().numpy() - expected) <= bound + 1e-6).all(), (kernel.name, tokens, dtype)


@pytest.mark.skipif("matrix_units" not in CPU.features, reason="decoded rows are multiplied in matrix units")
@pytest.mark.parametrize("scheme", WEIGHT_ONLY, ids=str)
def test_decoded_rows(scheme: Scheme) -> None:
    columns = 576
    if Tiles().why_not(LinearSpec(scheme, columns, 1, 256, torch.bfloat16, "cpu", CPU)) is not None:
        pytest.skip("not decoded to bf16 by 32")
    for rows, tokens in ((1, 1), (32, 32), (45, 33), (130, 300)):
        case, x = make(scheme, rows, columns), activations(tokens, columns, torch.bfloat16)
        wide = x.double().numpy() if scheme.activations is None else rounded_to_fp8(x)
        expected = wide @ case.decoded.T + case.bias.numpy()
        sizes = np.abs(wide) @ np.abs(case.decoded).T
        # Weights of groups are rounded to bf16, others are not.
        bound = 2.0**-8 * np.abs(expected) + (2.0**-8 if scheme.group_size else 2.0**-17) * sizes + 1e-6
        y = DecodedRows().prepare(case.weight, case.bias)(x)
        assert (np.abs(y.double().numpy() - expected) <= bound).all(), (rows, tokens)


def abreast(weight: LinearWeight, bias: torch.Tensor | None) -> RowsAbreast:
    if weight.scheme.bits != 4 or not weight.scheme.group_size:
        pytest.skip("has no groups of 4 bits")
    return RowsAbreast(weight, bias)


FEW_TOKENS = {
    "bytes": partial(few_tokens, by_bytes=True), "bf16": partial(few_tokens, by_bytes=False), "abreast": abreast
}  # fmt: skip


@pytest.mark.parametrize("way", FEW_TOKENS)
@pytest.mark.parametrize(
    "scheme, columns",
    [
        (Scheme("int", 4, False), 300), (Scheme("int", 4, True, 32), 384), (Scheme("int", 4, False, 64), 576),
        (Scheme("int", 4, False, 16), 272), (Scheme("int", 4, True, 8), 136), (Scheme("int", 4, False, 256), 2304),
        (Scheme("int", 4, False, 4096), 8192), (Scheme("int", 8, True), 300), (Scheme("int", 8, False, 128), 384),
    ],
    ids=str,
)  # fmt: skip
def test_few_tokens_whichever_products_the_processor_prefers(scheme: Scheme, columns: int, way: str) -> None:
    """As bytes, activations are whole numbers that 127 · 257 of make the largest of a block of 128, or of a group of
    more; or two of these."""
    case = make(scheme, 45 if way == "abreast" else 11, columns)
    run = FEW_TOKENS[way](case.weight, case.bias)
    scales = np.repeat(np.abs(case.weight.scales.double().numpy()), columns // case.weight.scales.shape[1], 1)
    for tokens in (1, 3, 4):
        for dtype in DTYPES:
            x = activations(tokens, columns, dtype)
            x[0, 7] *= 100
            wide = x.double().numpy()
            expected = wide @ case.decoded.T + case.bias.numpy()
            bound = (
                2 * HALF_ULP[dtype] * np.abs(expected)
                + 2.0**-20 * np.abs(wide) @ (np.abs(case.decoded) + 300 * scales).T
            )
            if way != "bf16" and dtype == torch.bfloat16:
                span = max(128, scheme.group_size or 0)
                padded = np.pad(np.abs(wide), ((0, 0), (0, -columns % span))).reshape(tokens, -1, span)
                units = np.repeat(padded.max(-1) / (127 * 257), span, 1)[:, :columns]
                bound += units / 2 @ np.abs(case.decoded).T
            y = run(x).double().numpy()
            assert (np.abs(y - expected) <= bound).all(), (tokens, dtype)
            broken = x.clone()
            broken[0, 9] = float("inf")
            y = run(broken)
            assert not y[0].isfinite().any() and y[1:].isfinite().all()


def test_weights_without_zero_points_are_as_fast() -> None:
    """Loading nothing from an address that is not mapped made them seven times as slow."""
    x = activations(1, 576, torch.bfloat16)
    schemes = [Scheme("int", 4, symmetric, 64) for symmetric in (False, True)]
    runs = [FewTokens().prepare(make(scheme, 576, 576).weight, None) for scheme in schemes]
    fastest = [min(timeit.repeat(lambda run=run: run(x), number=20, repeat=50)) for run in runs]
    assert fastest[1] < 2.5 * fastest[0]


@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", [Scheme("int", 4, False, 32), Scheme("float", 8, True)], ids=str)
def test_scales_of_any_stored_dtype(scheme: Scheme, scale_dtype: torch.dtype) -> None:
    case = make(scheme, 6, 160, scale_dtype)
    x = activations(3, 160, torch.float32)
    expected = x.double().numpy() @ case.decoded.T
    for kernel in able(scheme, 160, 6, 3, torch.float32):
        y = kernel.prepare(case.weight, None)(x).double().numpy()
        assert np.abs(y - expected).max() <= 2e-5 * np.abs(x.double().numpy() @ np.abs(case.decoded).T).max() + 1e-4


@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 63), (5, 64), (9, 300), (66, 2100)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_w8a8_equals_integer_arithmetic(rows: int, columns: int, dtype: torch.dtype) -> None:
    case = make(W8A8, rows, columns)
    for tokens in (1, 2, 4, 5, 33):
        x = activations(tokens, columns, dtype)
        expected = int8_product(case, x)
        for kernel in able(W8A8, columns, rows, tokens, dtype):
            assert torch.equal(kernel.prepare(case.weight, case.bias)(x), expected), (kernel.name, tokens)


@pytest.mark.skipif("exact_u8s8" not in CPU.features, reason="oneDNN saturates on this processor")
@pytest.mark.parametrize("at_once", [1, 40, 9 * 33])
def test_w8a8_by_onednn_some_tokens_at_a_time(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_run, "SUMS", at_once)
    case, x = make(W8A8, 9, 300), activations(33, 300, torch.bfloat16)
    assert torch.equal(OneDnnInt8().prepare(case.weight, case.bias)(x), int8_product(case, x))


@pytest.mark.skipif("byte_products" not in CPU.features, reason="no products of bytes on this processor")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_tiles_of_every_shape(dtype: torch.dtype) -> None:
    """All numbers of tokens a tile has, several tiles, rows that fill no block, inputs that fill none or several."""
    for rows, columns in ((50, 96), (7, 2308), (1, 4), (97, 68), (35, 128), (130, 4160)):
        case = make(W8A8, rows, columns)
        for tokens in (1, 16, 17, 40, 64, 130):
            x = activations(tokens, columns, dtype)
            assert torch.equal(Int8Tiles().prepare(case.weight, case.bias)(x), int8_product(case, x)), (rows, tokens)


@pytest.mark.skipif("matrix_units" not in CPU.features, reason="no matrix units in this processor")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_rows_of_every_shape(dtype: torch.dtype) -> None:
    """Tiles and panels that tokens and outputs fill and don't, inputs that are copied at once and in several turns."""
    for rows, columns in ((50, 64), (1, 128), (97, 192), (288, 2048), (67, 4160)):
        case = make(W8A8, rows, columns)
        for tokens in (1, 31, 32, 33, 130, 300):
            x = activations(tokens, columns, dtype)
            assert torch.equal(Int8Rows().prepare(case.weight, case.bias)(x), int8_product(case, x)), (rows, tokens)


@pytest.mark.skipif("bf16_products" not in CPU.features, reason="no bf16 products on this processor")
@pytest.mark.parametrize("group", [0, 32, 96, 1152])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_tiles_of_every_shape(bits: int, group: int) -> None:
    """All numbers of tokens a tile has, several tiles, rows that fill no block, inputs that fill none or several."""
    scheme = Scheme("int", bits, False, group)
    for rows, columns in ((50, 96), (7, 1152), (227, 1152)):
        if group and columns % group:
            continue
        case = make(scheme, rows, columns)
        for tokens in (1, 16, 17, 40, 64, 130):
            x = activations(tokens, columns, torch.bfloat16)
            wide = x.double().numpy()
            expected = wide @ case.decoded.T + case.bias.numpy()
            bound = (2.0**-8 + 2.0**-16) * (np.abs(wide) @ np.abs(case.decoded).T) + 2.0**-8 * np.abs(expected) + 1e-6
            y = Tiles().prepare(case.weight, case.bias)(x).double().numpy()
            assert (np.abs(y - expected) <= bound).all(), (rows, columns, tokens)


@pytest.mark.skipif("bf16_products" not in CPU.features, reason="no bf16 products on this processor")
@pytest.mark.parametrize("scheme", [Scheme("int", 4, False, 32), Scheme("float", 8, True, 0, "dynamic")], ids=str)
def test_tokens_in_several_turns_come_out_as_in_one(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 tokens are several tiles, of which the last is not full."""
    case, x = make(scheme, 50, 96), activations(200, 96, torch.bfloat16)
    run = Tiles().prepare(case.weight, case.bias)
    at_once = run(x)
    for turns in (2, 3, 4):
        monkeypatch.setattr(token_tiles_run, "CACHED_BYTES", -(-4 * 64 * 96 * 2 // turns))
        assert torch.equal(run(x), at_once)


def test_w8a8_of_largest_operands_does_not_saturate() -> None:
    case = make(W8A8, 4, 256)
    case.weight.codes.fill_(127)
    x = torch.full((2, 256), -1.0)
    for kernel in able(W8A8, 256, 4, 2, torch.float32):
        assert torch.equal(kernel.prepare(case.weight, case.bias)(x), int8_product(case, x)), kernel.name


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scheme", [W8A8, Scheme("float", 8, True, 0, "dynamic"), Scheme("int", 4, False, 32)], ids=str)
def test_a_token_that_is_no_number_spoils_itself_only(scheme: Scheme, bad: float) -> None:
    case = make(scheme, 8, 128)
    x = activations(3, 128, torch.float32)
    x[2, 7] = bad
    for kernel in able(scheme, 128, 8, 3, torch.float32):
        y = kernel.prepare(case.weight, case.bias)(x)
        assert torch.isfinite(y[:2]).all() and not torch.isfinite(y[2, 1:]).any(), kernel.name


@pytest.mark.parametrize("scheme", [W8A8, Scheme("float", 8, True, 0, "dynamic"), Scheme("int", 4, False, 32)], ids=str)
@pytest.mark.parametrize("tokens", [1, 20, 130])
def test_later_calls_multiply_their_own_numbers(scheme: Scheme, tokens: int) -> None:
    """Programs are kept, and buffers shared by layers: numbers lie elsewhere at each call."""
    cases = [make(scheme, rows, 576) for rows in (40, 576)]
    inputs = [activations(tokens, 576, torch.bfloat16) * factor for factor in (1, -2, 0.5, 3)]
    for kernels in zip(*(able(scheme, 576, 576, tokens, torch.bfloat16) for _ in cases), strict=True):
        kept = [kernel.prepare(case.weight, case.bias) for kernel, case in zip(kernels, cases, strict=True)]
        found = [[linear(x) for linear in kept] for x in inputs]
        for x, outputs in zip(inputs, found, strict=True):
            for kernel, case, output in zip(kernels, cases, outputs, strict=True):
                assert torch.equal(output, kernel.prepare(case.weight, case.bias)(x)), kernel.name


def test_threads_that_call_one_layer_do_not_meet() -> None:
    scheme = Scheme("int", 4, False, 32)
    case = make(scheme, 320, 576)
    inputs = [activations(33, 576, torch.bfloat16) * factor for factor in range(1, 9)]
    (kernel, *_) = able(scheme, 576, 320, 33, torch.bfloat16)
    expected = [kernel.prepare(case.weight, case.bias)(x) for x in inputs]
    linear = kernel.prepare(case.weight, case.bias)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            assert all(map(torch.equal, pool.map(linear, inputs), expected))


def test_no_tokens() -> None:
    for scheme in (W8A8, Scheme("int", 4, False, 32), Scheme("float", 8, True, 0, "dynamic")):
        case = make(scheme, 8, 64)
        for kernel in able(scheme, 64, 8, 0, torch.bfloat16):
            assert kernel.prepare(case.weight, case.bias)(torch.empty(0, 64, dtype=torch.bfloat16)).shape == (0, 8)


def spec(scheme: Scheme, tokens: int, **changes: object) -> LinearSpec:
    known = {"machine": Machine(frozenset({"numba", "exact_u8s8"}))} | changes
    return LinearSpec(scheme, 4096, 4096, tokens, **known)  # type: ignore[arg-type]


def test_the_choice_by_tokens_and_processor() -> None:
    int4 = Scheme("int", 4, False, 128)
    assert choose(spec(int4, 1)).name == "decode in registers"
    assert choose(spec(int4, 1024)).name == "panels"
    products = frozenset({"numba", "bf16_products"})
    assert choose(spec(int4, 4, machine=Machine(products))).name == "decode in registers"
    assert choose(spec(int4, 5, machine=Machine(products))).name == "tiles"
    assert choose(spec(int4, 1024, machine=Machine(products))).name == "tiles"
    assert choose(spec(int4, 1024, machine=Machine(products), dtype=torch.float16)).name == "panels"
    assert choose(spec(W8A8, 1)).name == "int8 dot products"
    assert choose(spec(W8A8, 1024)).name == "oneDNN int8"
    assert choose(spec(W8A8, 1024, machine=Machine(frozenset({"numba"})))).name == "int8 as fp32"
    bytes_too = Machine(frozenset({"numba", "exact_u8s8", "byte_products"}))
    small = LinearSpec(W8A8, 576, 576, 16, machine=bytes_too)
    assert choose(replace(small, tokens=8)).name == "int8 dot products"
    assert choose(small).name == "int8 tiles"
    assert choose(replace(small, in_features=574)).name == "oneDNN int8"
    assert choose(spec(W8A8, 1024, machine=bytes_too)).name == "oneDNN int8"
    assert choose(spec(W8A8, 1024, machine=Machine(frozenset({"numba", "byte_products"})))).name == "int8 tiles"
    matrices = Machine(bytes_too.features | {"matrix_units"})
    assert choose(spec(W8A8, 1024, machine=matrices)).name == "int8 tiles"
    assert choose(replace(spec(W8A8, 1024, machine=matrices), in_features=4100)).name == "oneDNN int8"
    assert choose(replace(small, machine=matrices)).name == "int8 rows"
    assert choose(replace(small, machine=matrices, in_features=580)).name == "int8 tiles"
    small = replace(small, scheme=int4, in_features=640, tokens=256, machine=Machine(products | {"matrix_units"}))
    assert choose(small).name == "decoded rows"
    assert choose(replace(small, tokens=255)).name == "tiles"
    assert choose(replace(small, tokens=1024, in_features=1536)).name == "decoded rows"
    assert choose(replace(small, tokens=1023, in_features=1536)).name == "tiles"
    assert choose(replace(small, in_features=4096)).name == "tiles"
    narrow = LinearSpec(int4, 640, 1024, 8, machine=Machine(products | {"prefers_bytes"}))
    assert choose(narrow).name == "rows abreast"
    assert choose(replace(narrow, tokens=9)).name == "tiles"
    assert choose(replace(narrow, out_features=2**16)).name == "rows abreast"
    assert choose(replace(narrow, tokens=1, in_features=1152)).name == "decode in registers"
    assert choose(replace(narrow, tokens=1, scheme=Scheme("int", 4, False))).name == "decode in registers"
    assert choose(replace(narrow, tokens=1, machine=Machine(products))).name == "decode in registers"
    assert choose(spec(int4, 1, machine=Machine())).name == "reference"
    assert choose(spec(int4, 1, dtype=torch.float64)).name == "reference"


def test_reasons_name_what_is_in_the_way() -> None:
    reasons = reasons_against(spec(Scheme("int", 4, False, 48), 1))
    assert reasons["decode in registers"] is not None and "groups of 48" in reasons["decode in registers"]
    assert reasons["panels"] is None
    saturating = reasons_against(spec(W8A8, 64, machine=Machine(frozenset({"numba"}))))
    assert saturating["oneDNN int8"] is not None and "saturate" in saturating["oneDNN int8"]


def test_no_kernel_at_all_is_an_error_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "KERNELS", KERNELS[3:5])
    with pytest.raises(KernelError, match="int8 dot products: multiplies int8 per channel"):
        choosing.choose.__wrapped__(spec(Scheme("int", 4, False, 128), 1))
