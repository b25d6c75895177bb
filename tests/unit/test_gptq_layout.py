"""The GPTQ layout against loops over single fields, files of other writers, and files that lie."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.errors import CheckpointError
from fewbits.formats import FORMATS
from fewbits.methods import GPTQ, Int8Symmetric
from fewbits.schemes import Scheme
from fewbits.tensors import seal

V1, V2 = FORMATS["gptq"], FORMATS["gptq_v2"]
BITS = (2, 3, 4, 8)


def words(fields: list[int], bits: int) -> list[int]:
    """Signed 32-bit words of a little-endian stream."""
    stream = sum(field << (bits * place) for place, field in enumerate(fields))
    found = [(stream >> (32 * place)) & 0xFFFFFFFF for place in range(len(fields) * bits // 32)]
    return [word - 2**32 if word >= 2**31 else word for word in found]


def written(
    codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, bits: int, minus: int, index: list[int]
) -> dict[str, torch.Tensor]:
    """What another writer stores: codes [N, K], zero points and scales [N, G], in loops."""
    columns = [words(row, bits) for row in codes.tolist()]
    rows = [words([zero - minus for zero in column], bits) for column in zeros.t().tolist()]
    return {
        "m.qweight": torch.tensor(columns, dtype=torch.int64).t().to(torch.int32).contiguous(),
        "m.qzeros": torch.tensor(rows, dtype=torch.int64).to(torch.int32),
        "m.scales": scales.t().to(torch.float16).contiguous(),
        "m.g_idx": torch.tensor(index, dtype=torch.int32),
    }


def decoded_in_loops(codes: Any, zeros: Any, scales: Any, index: list[int]) -> torch.Tensor:
    """W[n, k] = scales[g, n] · (q − z)."""
    values = [
        [float(scales[n][index[k]]) * (int(codes[n][k]) - int(zeros[n][index[k]])) for k in range(len(index))]
        for n in range(len(codes))
    ]
    return torch.tensor(values, dtype=torch.float64).float()


@st.composite
def weights(draw: st.DrawFn) -> tuple[int, int, torch.Tensor, torch.Tensor, torch.Tensor]:
    """bits, group size, codes, zero points from 1 on, fp16 scales of either sign."""
    bits = draw(st.sampled_from(BITS))
    size = draw(st.sampled_from([16, 32, 0]))
    rows, columns = 32 * draw(st.integers(1, 2)), 32 * draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    groups = columns // size if size else 1
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(1, 2**bits, (rows, groups), generator=generator, dtype=torch.uint8)
    scales = (torch.randn(rows, groups, generator=generator) * 0.1).half()
    return bits, size, codes, zeros, torch.where(scales == 0, 1, scales)


def scheme_of(bits: int, size: int, symmetric: bool = False) -> Scheme:
    return Scheme("int", bits, symmetric=symmetric, group_size=size)


def plain_index(columns: int, size: int) -> list[int]:
    return [k // size if size else 0 for k in range(columns)]


@settings(deadline=None, max_examples=40)
@given(weights(), st.sampled_from([1, 2]))
def test_zero_points_of_either_version_are_read(case: Any, version: int) -> None:
    bits, size, codes, zeros, scales = case
    index = plain_index(codes.shape[1], size)
    stored = written(codes, zeros, scales, bits, 2 - version, index)
    back = (V1, V2)[version - 1].decode("m", stored, scheme_of(bits, size))
    assert back.input_order is None
    assert torch.equal(back.dequantize(torch.float32), decoded_in_loops(codes, zeros, scales, index))


@settings(deadline=None, max_examples=40)
@given(weights())
def test_what_is_written_is_what_the_loops_write(case: Any) -> None:
    bits, size, codes, zeros, scales = case
    method = GPTQ(bits, size or "channel", symmetric=False)
    stored = V2.encode("m", seal(codes, scales, zeros, method), tuple(codes.shape))
    expected = written(codes, zeros, scales, bits, 0, plain_index(codes.shape[1], size))
    assert {name: tensor.tolist() for name, tensor in stored.items()} == {n: t.tolist() for n, t in expected.items()}


@settings(deadline=None, max_examples=40)
@given(weights(), st.randoms(use_true_random=False))
def test_activation_order_decodes_in_the_order_of_the_model(case: Any, random: Any) -> None:
    bits, size, codes, zeros, scales = case
    index = plain_index(codes.shape[1], size)
    random.shuffle(index)
    back = V2.decode("m", written(codes, zeros, scales, bits, 0, index), scheme_of(bits, size))
    assert torch.equal(back.dequantize(torch.float32), decoded_in_loops(codes, zeros, scales, index))
    if back.input_order is not None:
        assert back.input_order.dtype == torch.int64
        assert sorted(back.input_order.tolist()) == list(range(len(index)))


def symmetric_words(version: int, bits: int) -> torch.Tensor:
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    stored = (V1, V2)[version - 1].encode(
        "m", seal(codes, torch.ones(32, 1).half(), None, GPTQ(bits, "channel")), (32, 32)
    )
    return stored["m.qzeros"].view(torch.uint32)


@pytest.mark.parametrize(
    ("version", "bits", "word"),
    [
        (1, 4, 0x77777777), (2, 4, 0x88888888), (1, 2, 0x55555555), (2, 2, 0xAAAAAAAA),
        (1, 8, 0x7F7F7F7F), (2, 8, 0x80808080),
    ],
)  # fmt: skip
def test_symmetric_zero_points_make_the_words_that_the_format_prescribes(version: int, bits: int, word: int) -> None:
    assert set(symmetric_words(version, bits).flatten().tolist()) == {word}


def test_int8_per_channel_is_stored_as_unsigned_codes() -> None:
    codes = torch.tensor([[-127, 0, 1, 127]] * 4, dtype=torch.int8)
    stored = V1.encode("m", seal(codes, torch.ones(4, 1).half(), None, Int8Symmetric(None)), (4, 4))
    assert stored["m.qweight"].view(torch.uint32).tolist() == [[0xFF818001] * 4]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("written_as", [1, 2])
@pytest.mark.parametrize("claimed", [1, 2])
def test_symmetric_words_are_believed_whatever_the_config_claims(written_as: int, claimed: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (32, 64), generator=generator, dtype=torch.uint8)
    scales = torch.rand(32, 2, generator=generator).half() + 0.01
    zeros = torch.full((32, 2), 2 ** (bits - 1), dtype=torch.uint8)
    stored = written(codes, zeros, scales, bits, 2 - written_as, plain_index(64, 32))
    reader, scheme = (V1, V2)[claimed - 1], scheme_of(bits, 32, symmetric=True)
    back = reader.decode("m", stored, scheme)
    expected = decoded_in_loops(codes, zeros, scales, plain_index(64, 32))
    assert torch.equal(back.dequantize(torch.float32), expected)
    remark = reader.remark("m", stored, scheme, 32)
    assert (remark is None) == (written_as == claimed)
    assert remark is None or f"version {written_as}" in remark


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_zero_point_of_0_that_borrowed_from_its_neighbours_is_read(bits: int) -> None:
    zeros = torch.randint(0, 2**bits, (32, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    zeros[3], zeros[4] = 0, 0
    codes, scales = torch.ones(32, 32, dtype=torch.uint8), torch.ones(32, 1)
    stored = written(codes, zeros, scales, bits, 0, [0] * 32)
    ones = sum(1 << place for place in range(0, 32, bits))
    stored["m.qzeros"] = ((stored["m.qzeros"].to(torch.int64) - ones + 2**31) % 2**32 - 2**31).to(torch.int32)
    back = V1.decode("m", stored, scheme_of(bits, 0))
    assert torch.equal(back.dequantize(torch.float32), decoded_in_loops(codes, zeros, scales, [0] * 32))


def sound(bits: int = 4, **changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """A symmetric weight [32, 64] at group size 32, with tensors replaced or (None) taken out."""
    codes = torch.zeros(32, 64, dtype=torch.uint8)
    zeros = torch.full((32, 2), 2 ** (bits - 1), dtype=torch.uint8)
    stored = written(codes, zeros, torch.ones(32, 2), bits, 1, plain_index(64, 32))
    changed = {**stored, **{f"m.{name}": tensor for name, tensor in changes.items()}}
    return {name: tensor for name, tensor in changed.items() if tensor is not None}


def index_with(position: int, group: int) -> torch.Tensor:
    index = torch.tensor(plain_index(64, 32), dtype=torch.int32)
    index[position] = group
    return index


HOSTILE: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "no codes": ({"qweight": None}, "m.qweight is missing; found g_idx, qzeros, scales"),
    "no zero points": ({"qzeros": None}, "m.qzeros is missing"),
    "no scales": ({"scales": None}, "m.scales is missing"),
    "codes of one dimension": ({"qweight": torch.zeros(8, dtype=torch.int32)}, "m.qweight has the shape [8]"),
    "no codes at all": ({"qweight": torch.zeros(0, 32, dtype=torch.int32)}, "m.qweight has the shape [0, 32]"),
    "codes of another dtype": ({"qweight": torch.zeros(8, 32, dtype=torch.int64)}, "m.qweight is I64 [8, 32]"),
    "too few zero points": ({"qzeros": torch.zeros(2, 3, dtype=torch.int32)}, "m.qzeros is I32 [2, 3]"),
    "too few groups": ({"scales": torch.ones(1, 32).half()}, "m.scales is F16 [1, 32]"),
    "whole numbers for scales": ({"scales": torch.ones(2, 32, dtype=torch.int32)}, "m.scales is I32 [2, 32]"),
    "a short order": ({"g_idx": torch.zeros(63, dtype=torch.int32)}, "m.g_idx is I32 [63]"),
    "a group that is none": ({"g_idx": index_with(5, 2)}, "m.g_idx names group 2; there are 2 groups"),
    "a negative group": ({"g_idx": index_with(5, -1)}, "m.g_idx names group -1"),
    "groups of unlike sizes": ({"g_idx": index_with(5, 1)}, "m.g_idx puts 31 inputs into group 0; groups have 32"),
    "zero points of no symmetric weight": (
        {"qzeros": torch.full((2, 4), 0x33333333, dtype=torch.int32)},
        "m.qzeros holds 3 to 3; int4 group 32 takes 7 everywhere (version 1) or 8 (version 2)",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_damaged_weight_is_refused_by_name(case: str) -> None:
    changes, message = HOSTILE[case]
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        V1.decode("m", sound(**changes), scheme_of(4, 32, symmetric=True))
    assert caught.value.hint


@pytest.mark.parametrize("scheme", [scheme_of(8, 32, True), scheme_of(2, 32, True), scheme_of(4, 16, True)], ids=str)
def test_a_config_that_lies_about_widths_and_groups_is_refused(scheme: Scheme) -> None:
    with pytest.raises(CheckpointError, match=r"^m\.(qzeros|scales) is"):
        V1.decode("m", sound(), scheme)


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(CheckpointError, match="group size 48 does not divide 64 inputs"):
        V1.decode("m", sound(), scheme_of(4, 48, True))


def test_an_order_may_be_left_out() -> None:
    assert V1.decode("m", sound(g_idx=None), scheme_of(4, 32, True)).input_order is None


CONFIG = {
    "quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "lm_head": False,
    "true_sequential": True, "checkpoint_format": "gptq", "pack_dtype": "int32",
}  # fmt: skip
SYM4 = scheme_of(4, 128, True)


def test_the_config_of_one_scheme_has_no_rules() -> None:
    assert V1.quantization_config({"model.layers.0.up": SYM4, "lm_head": None}) == CONFIG


def test_layers_that_differ_have_rules_that_name_fused_layers_too_and_negative_ones_come_first() -> None:
    schemes: dict[str, Scheme | None] = {"lm_head": None}
    for block in range(4):
        prefix = f"model.layers.{block}"
        schemes |= {f"{prefix}.self_attn.{name}_proj": scheme_of(8, 32, True) for name in "qkv"}
        schemes |= {f"{prefix}.self_attn.o_proj": SYM4, f"{prefix}.mlp.gate_proj": SYM4, f"{prefix}.mlp.up_proj": SYM4}
        schemes[f"{prefix}.mlp.down_proj"] = None if block == 2 else SYM4
    config = json.loads(json.dumps(V1.quantization_config(schemes)))
    assert list(config["dynamic"].values()) == [{}, {"bits": 8, "group_size": 32, "sym": True}]
    negative, positive = config["dynamic"]
    assert negative.startswith("-:")
    assert positive.startswith("+:")
    assert re.match(negative[2:], "model.layers.2.mlp.down_proj")
    assert not re.match(negative[2:], "model.layers.22.mlp.down_proj")
    assert re.match(positive[2:], "model.layers.1.self_attn.qkv_proj")
    assert V1.schemes_from_config(config, schemes) == schemes


def test_the_first_rule_that_matches_counts() -> None:
    config = CONFIG | {
        "dynamic": {"-:.*down": {}, r"+:.*\.1\.": {"bits": 8}, ".*": {"group_size": 32}},
        "lm_head": True,
    }
    names = ["m.0.up", "m.1.up", "m.1.down", "lm_head"]
    assert list(V1.schemes_from_config(config, names).values()) == [
        scheme_of(4, 32, True), scheme_of(8, 128, True), None, scheme_of(4, 32, True),
    ]  # fmt: skip


def test_a_list_of_quantized_modules_is_followed() -> None:
    config = CONFIG | {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up"]]}
    found = V1.schemes_from_config(config, ["m.0.self_attn.q_proj", "m.0.mlp.up", "m.0.mlp.down", "lm_head"])
    assert [scheme is not None for scheme in found.values()] == [True, True, False, False]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no width": ({"bits": None}, "bits of quantization_config is nothing; expected 2 or 3 or 4 or 8"),
    "an odd width": ({"bits": 5}, "bits of quantization_config is 5"),
    "a width that is true": ({"bits": True}, "bits of quantization_config is True"),
    "groups of nothing": ({"group_size": 0}, "group_size of quantization_config is 0"),
    "groups in words": ({"group_size": "128"}, "group_size of quantization_config is '128'"),
    "a symmetry that is a number": ({"sym": 1}, "sym of quantization_config is 1"),
    "another layout": ({"checkpoint_format": "marlin"}, "checkpoint_format of quantization_config is 'marlin'"),
    "other words": ({"pack_dtype": "int16"}, "pack_dtype of quantization_config is 'int16'"),
    "rules in a list": ({"dynamic": ["-:.*"]}, "dynamic of quantization_config"),
    "a rule that is no pattern": ({"dynamic": {"+:(": {}}}, "+:( of dynamic is"),
    "a rule that says nothing": ({"dynamic": {"+:.*": None}}, "+:.* of dynamic is nothing"),
    "a rule that asks for too much": ({"dynamic": {"+:.*": {"bits": 16}}}, "bits of dynamic.+:.* is 16"),
    "modules that are none": ({"modules_in_block_to_quantize": [[1]]}, "modules_in_block_to_quantize"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_asks_for_something_unknown_is_refused_by_name(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=re.escape(message)):
        V1.schemes_from_config(CONFIG | changes, ["m.0.up"])
