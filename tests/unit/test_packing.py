"""Packing against a loop over single bits, and weights that come out of a seal as they went in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.methods import GPTQ, Fp8E4M3, Int4Asymmetric, Int8Symmetric, QuantMethod
from fewbits.packing import pack_columns, pack_rows, unpack_columns, unpack_rows, words_for
from fewbits.tensors import decode, open_codes, seal


def packed_bit_by_bit(codes: list[int], bits: int) -> list[int]:
    """Signed 32-bit words of a little-endian stream."""
    stream = [(code >> bit) & 1 for code in codes for bit in range(bits)]
    stream += [0] * (-len(stream) % 32)
    words = [sum(stream[start + bit] << bit for bit in range(32)) for start in range(0, len(stream), 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@st.composite
def code_rows(draw: st.DrawFn) -> tuple[int, torch.Tensor]:
    bits = draw(st.integers(1, 8))
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 70))
    code = st.integers(0, 2**bits - 1)
    content = draw(st.lists(st.lists(code, min_size=columns, max_size=columns), min_size=rows, max_size=rows))
    return bits, torch.tensor(content, dtype=torch.uint8)


@settings(deadline=None)
@given(code_rows())
def test_rows_are_little_endian_streams_of_fields(case: tuple[int, torch.Tensor]) -> None:
    bits, codes = case
    words = pack_rows(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (codes.shape[0], words_for(codes.shape[1], bits))
    assert words.tolist() == [packed_bit_by_bit(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack_rows(words, bits, codes.shape[1]), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_come_in_any_layout_and_width(bits: int) -> None:
    codes = torch.randint(2**bits, (5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    words = pack_rows(codes, bits)
    unsigned = words.to(torch.int64) & 0xFFFFFFFF
    assert torch.equal(unpack_rows(unsigned, bits, 7), codes)
    for row in range(5):
        # One row of a column-major matrix passes for contiguous, whatever its numbers' distance.
        apart = torch.stack([words[row], words[row]], -1)[:, 0][None]
        assert torch.equal(unpack_rows(apart, bits, 7), codes[row : row + 1])
        assert torch.equal(unpack_rows(words[row].as_strided((1, 1), (1, 2)), bits, 1), codes[row : row + 1, :1])
    assert unpack_rows(words[:, :0], bits, 0).shape == (5, 0)


@settings(deadline=None)
@given(code_rows())
def test_columns_are_the_rows_of_the_transpose(case: tuple[int, torch.Tensor]) -> None:
    bits, codes = case
    words = pack_columns(codes, bits)
    assert words.t().tolist() == [packed_bit_by_bit(column, bits) for column in codes.t().tolist()]
    assert torch.equal(unpack_columns(words, bits, codes.shape[0]), codes)


METHODS = [
    Int8Symmetric(), Int4Asymmetric(32), Int4Asymmetric("channel"),
    *(GPTQ(bits, 32, symmetric) for bits in range(2, 9) for symmetric in (True, False)),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_sealed_weight_opens_and_decodes_to_what_went_in(method: QuantMethod) -> None:
    generator = torch.Generator().manual_seed(0)
    scheme = method.scheme
    groups = scheme.groups(96)
    codes = torch.randint(0, 2**scheme.bits, (5, 96), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(5, groups, generator=generator) + 0.5).bfloat16()
    zeros = None
    if not scheme.symmetric:
        zeros = torch.randint(0, 2**scheme.bits, (5, groups), generator=generator, dtype=torch.uint8)
    weight = seal(codes, scales, zeros, method)
    found = open_codes(weight)
    assert torch.equal(found[0], codes)
    assert torch.equal(found[1], scales)
    assert (found[2] is None) if zeros is None else torch.equal(found[2], zeros)
    decoded = decode(weight)
    for row in range(5):
        for column in (0, 31, 32, 95):
            group = column // (scheme.group_size or 96)
            zero = 2 ** (scheme.bits - 1) if zeros is None else int(zeros[row, group])
            expected = (int(codes[row, column]) - zero) * float(scales[row, group])
            assert float(decoded[row, column]) == pytest.approx(expected, rel=1e-6)


def test_fp8_is_sealed_as_it_is() -> None:
    codes = torch.tensor([[1.0, -448.0, 0.0]]).to(torch.float8_e4m3fn)
    weight = seal(codes, torch.tensor([[0.5]]), None, Fp8E4M3())
    assert decode(weight).tolist() == [[0.5, -224.0, 0.0]]
    assert weight.dequantize(torch.float16).dtype == torch.float16
