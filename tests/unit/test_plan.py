"""The plan: who is quantized and who is not, in totals that add up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fewbits
from fewbits import AWQ, GPTQ, ConfigError, Fp8E4M3, Int4Asymmetric, Int8Symmetric, PlanError, QuantConfig
from fewbits.layout import Shard
from fewbits.methods import QuantMethod
from fewbits.pass_memory import PROCESS_BYTES
from tiny_models import CONFIG, random_model, write_source


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_source(tmp_path / "model", random_model())


def test_head_and_embeddings_are_left_alone_unless_named(model: Path) -> None:
    planned = fewbits.plan(model, QuantConfig(Int8Symmetric(), {"*": Fp8E4M3()}))
    assert {layer.name.rpartition(".")[2] for layer in planned.quantized} == {"q_proj", "up_proj", "down_proj"}
    named = fewbits.plan(model, QuantConfig(None, {"lm_head": Int8Symmetric()}))
    assert [layer.name for layer in named.quantized] == ["lm_head"]


def test_totals_are_those_of_the_parts(model: Path) -> None:
    planned = fewbits.plan(model, QuantConfig(Int4Asymmetric(32)))
    # Per group of 32: 16 bytes of codes, 2 of scale, half of zero point.
    assert planned.effective_bits == pytest.approx(8 * (16 + 2 + 0.5 + 0.0) / 32, rel=0.02)
    assert planned.bytes_after == sum(shard.nbytes for shard in planned.shards)
    assert all(isinstance(shard, Shard) for shard in planned.shards)
    assert planned.bytes_before == (model / "model.safetensors").stat().st_size


def test_nothing_but_headers_is_read(model: Path) -> None:
    file = model / "model.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    before = fewbits.plan(model, QuantConfig(Int8Symmetric()))
    file.write_bytes(content[:header] + b"\xff" * (len(content) - header))
    assert fewbits.plan(model, QuantConfig(Int8Symmetric())).shards == before.shards


def test_peak_memory_is_that_of_the_calibrated_pass_where_there_is_one(tmp_path: Path) -> None:
    width, inner, experts = 64, 256, 64
    tensors = {
        f"model.layers.0.mlp.experts.{number}.{name}.weight": torch.ones(shape).bfloat16()
        for number in range(experts)
        for name, shape in {"w1": (inner, width), "w2": (width, inner), "w3": (inner, width)}.items()
    }
    model = write_source(tmp_path / "model", tensors, {**CONFIG, "hidden_size": width})

    def peak(method: QuantMethod, samples: int = 1, length: int = 2) -> int:
        planned = fewbits.plan(model, QuantConfig(method), samples=samples, length=length, importance="none")
        return planned.peak_memory_bytes

    assert peak(Int4Asymmetric(32)) < peak(GPTQ(4, 32))
    # A probe holds the block in fp32 beside its bf16 weights; solving holds it in bf16.
    block = 3 * experts * width * inner
    assert peak(AWQ(32)) - PROCESS_BYTES == pytest.approx(1.4 * 6 * block, rel=0.01)
    assert peak(GPTQ(4, 32)) < peak(AWQ(32))
    # States of all tokens: the stream twice and the widest input once, in bf16.
    more = peak(GPTQ(4, 32), 64, 2048) - peak(GPTQ(4, 32), 32, 2048)
    assert more == pytest.approx(1.4 * 32 * 2048 * 2 * (2 * width + inner), rel=0.01)


def test_a_head_tied_to_the_embeddings_cannot_be_named(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in random_model().items() if name != "lm_head.weight"}
    model = write_source(tmp_path / "tied", tensors, {**CONFIG, "tie_word_embeddings": True})
    with pytest.raises(PlanError, match="tied to the embeddings"):
        fewbits.plan(model, QuantConfig(Int8Symmetric(), {"lm_head": Int8Symmetric()}))


def test_a_tensor_that_is_no_linear_cannot_be_named(model: Path) -> None:
    with pytest.raises(PlanError, match="is no linear layer"):
        fewbits.plan(model, QuantConfig(None, {"model.layers.0.input_layernorm": Int8Symmetric()}))


def test_a_plan_in_which_all_is_skipped_is_refused(model: Path) -> None:
    with pytest.raises(PlanError, match="nothing is left to quantize"):
        fewbits.plan(model, QuantConfig(None))


def test_a_method_in_place_of_a_config_is_refused_with_what_to_give(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)must be a QuantConfig.*QuantConfig\(method\)"):
        fewbits.plan(model, Int8Symmetric())  # type: ignore[arg-type]


def test_layers_that_no_group_divides_are_named_by_width_with_the_sizes_that_fit(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.up_proj.weight": torch.ones(8, width) for i, width in enumerate((64, 96, 64))}
    model = write_source(tmp_path / "model", tensors)
    with pytest.raises(PlanError) as caught:
        fewbits.plan(model, QuantConfig(Int4Asymmetric(64)))
    assert caught.value.message == "layers.1.up_proj has in_features 96, which group size 64 does not divide."
    assert caught.value.hint is not None and caught.value.hint.startswith('group sizes that fit: 32, "channel"')


@pytest.mark.parametrize("bits", [1, 3, 5, 6, 7])
def test_widths_that_readers_disagree_on_are_refused_before_any_work(model: Path, bits: int) -> None:
    with pytest.raises(PlanError, match="cannot be stored"):
        fewbits.plan(model, QuantConfig(GPTQ(bits, 32)))


def test_layers_that_need_calibration_are_known(model: Path) -> None:
    planned = fewbits.plan(model, QuantConfig(Int8Symmetric(), {"*.up_proj": GPTQ(4, 32)}))
    assert [layer.layer.kind for layer in planned.needs_calibration] == ["up_proj", "up_proj"]
