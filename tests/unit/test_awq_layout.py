"""The AWQ layout against loops over single nibbles, and files that lie."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.errors import CheckpointError
from fewbits.formats import awq as format
from fewbits.methods import Int4Asymmetric
from fewbits.schemes import Scheme
from fewbits.tensors import seal

NIBBLE_TO_COLUMN = {0: 0, 1: 2, 2: 4, 3: 6, 4: 1, 5: 3, 6: 5, 7: 7}
G32 = Scheme("int", 4, symmetric=False, group_size=32)


def words(codes: torch.Tensor) -> torch.Tensor:
    """int32 [R, C/8] of codes [R, C], nibble by nibble."""
    packed = [
        [
            sum(int(row[8 * word + column]) << (4 * nibble) for nibble, column in NIBBLE_TO_COLUMN.items())
            for word in range(len(row) // 8)
        ]
        for row in codes.tolist()
    ]
    signed = [[word - 2**32 if word >= 2**31 else word for word in row] for row in packed]
    return torch.tensor(signed, dtype=torch.int64).to(torch.int32)


def written(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """What another writer stores: codes [N, K], zero points and scales [N, G]."""
    return {
        "m.qweight": words(codes.t()),
        "m.qzeros": words(zeros.t()),
        "m.scales": scales.t().half().contiguous(),
    }


@st.composite
def weights(draw: st.DrawFn) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
    size = draw(st.sampled_from([12, 32, 0]))
    rows, groups = 8 * draw(st.integers(1, 5)), draw(st.integers(1, 3)) if size else 1
    columns = groups * size if size else draw(st.integers(1, 50))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (rows, groups), generator=generator, dtype=torch.uint8)
    return size, codes, zeros, (torch.rand(rows, groups, generator=generator) + 0.01).half()


@settings(deadline=None, max_examples=40)
@given(weights())
def test_words_are_those_of_the_loops_and_decode_to_the_weight(case: Any) -> None:
    size, codes, zeros, scales = case
    stored = format.encode("m", seal(codes, scales, zeros, Int4Asymmetric(size or "channel")), tuple(codes.shape))
    expected = written(codes, zeros, scales)
    assert {name: tensor.tolist() for name, tensor in stored.items()} == {n: t.tolist() for n, t in expected.items()}
    back = format.decode("m", expected, Scheme("int", 4, symmetric=False, group_size=size))
    width = size or codes.shape[1]
    values = [
        [float(scales[n, k // width]) * (int(codes[n, k]) - int(zeros[n, k // width])) for k in range(codes.shape[1])]
        for n in range(codes.shape[0])
    ]
    assert torch.equal(back.dequantize(torch.float32), torch.tensor(values, dtype=torch.float64).float())


def test_codes_in_order_make_the_word_that_the_format_prescribes() -> None:
    codes = torch.arange(8, dtype=torch.uint8)[:, None]
    stored = format.encode("m", seal(codes, torch.ones(8, 1).half(), codes, Int4Asymmetric("channel")), (8, 1))
    assert stored["m.qweight"].tolist() == [[0x75316420]]
    assert stored["m.qzeros"].tolist() == [[0x75316420]]


def sound(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """A weight [16, 64] at group size 32, with tensors replaced or (None) taken out."""
    codes = torch.zeros(16, 64, dtype=torch.uint8)
    stored = written(codes, torch.full((16, 2), 8, dtype=torch.uint8), torch.ones(16, 2))
    changed = {**stored, **{f"m.{name}": tensor for name, tensor in changes.items()}}
    return {name: tensor for name, tensor in changed.items() if tensor is not None}


HOSTILE: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "no codes": ({"qweight": None}, "m.qweight is missing"),
    "no zero points": ({"qzeros": None}, "m.qzeros is missing"),
    "no scales": ({"scales": None}, "m.scales is missing"),
    "codes of three dimensions": ({"qweight": torch.zeros(64, 1, 2, dtype=torch.int32)}, "m.qweight has the shape"),
    "codes of another dtype": ({"qweight": torch.zeros(64, 2)}, "m.qweight is F32 [64, 2]"),
    "too few zero points": ({"qzeros": torch.zeros(2, 1, dtype=torch.int32)}, "m.qzeros is I32 [2, 1]"),
    "too many groups": ({"scales": torch.ones(4, 16).half()}, "m.scales is F16 [4, 16]"),
    "no whole groups": ({"qweight": torch.zeros(63, 2, dtype=torch.int32)}, "group size 32 does not divide 63"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_damaged_weight_is_refused_by_name(case: str) -> None:
    changes, message = HOSTILE[case]
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        format.decode("m", sound(**changes), G32)
    assert caught.value.hint


CONFIG = {
    "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
    "modules_to_not_convert": None,
}  # fmt: skip


def test_the_config_of_a_model_whose_head_alone_is_not_quantized() -> None:
    assert format.quantization_config({"m.0.up": G32, "lm_head": None}) == CONFIG


def test_unquantized_layers_of_blocks_are_listed() -> None:
    schemes = {"m.0.up": G32, "m.1.up": None, "m.11.up": G32, "lm_head": None}
    config = format.quantization_config(schemes)
    assert config["modules_to_not_convert"] == ["m.1.up", "lm_head"]
    assert format.schemes_from_config(config, schemes) == schemes


def test_names_written_as_older_tools_write_them_are_read() -> None:
    config = {"quant_method": "awq", "w_bit": 4, "q_group_size": -1, "zero_point": True, "version": "GEMM"}
    assert format.schemes_from_config(config, ["m.0.up"])["m.0.up"] == Scheme("int", 4, symmetric=False)


@pytest.mark.parametrize(
    ("schemes", "message"),
    [
        ({"m.0.up": G32, "m.1.up": Scheme("int", 4, False, 64)}, "m.0.up is int4 asymmetric group 32, but m.1.up int4"),
        ({"m.0.up": G32, "lm_head": G32}, "outside of the decoder blocks alone, such as lm_head"),
        ({"m.0.up": G32, "m.0.up_proj": None, "n.m.0.up_proj.lora.1": G32}, "m.0.up_proj"),
    ],
)
def test_what_one_config_cannot_say_is_refused(schemes: dict[str, Scheme | None], message: str) -> None:
    reason = format.why_not_together(schemes)
    assert reason is not None
    assert message in reason


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, "bits of quantization_config is 8; expected 4"),
        ({"bits": "4"}, "bits of quantization_config is '4'"),
        ({"zero_point": False}, "zero_point of quantization_config is False"),
        ({"version": "gemv"}, "version of quantization_config is 'gemv'; expected 'gemm'"),
        ({"version": 1}, "version of quantization_config is 1"),
        ({"group_size": 0}, "group_size of quantization_config is 0"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
    ],
)
def test_a_config_that_asks_for_something_unknown_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        format.schemes_from_config(CONFIG | changes, ["m.0.up"])
