"""Inspect: what is in a checkpoint, whoever wrote it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fewbits.errors import CheckpointError
from fewbits.inspect import LayerGroup, inspect
from fewbits.methods import Int4Asymmetric, Int8Symmetric, QuantMethod
from tiny_models import CONFIG, random_model, write_quantized, write_source

METHODS: dict[str, QuantMethod | None] = {
    "model.layers.0.self_attn.q_proj": Int8Symmetric(),
    "model.layers.1.self_attn.q_proj": Int8Symmetric(),
    "model.layers.0.mlp.up_proj": Int4Asymmetric(32),
    "model.layers.1.mlp.up_proj": None,
}


def group_of(groups: tuple[LayerGroup, ...], name: str) -> LayerGroup:
    (found,) = [group for group in groups if group.name == name]
    return found


def foreign(path: Path, layer: dict[str, torch.Tensor], quantization: dict[str, Any]) -> LayerGroup:
    """The group of two layers that hold `layer` in a checkpoint of another tool."""
    tensors = {
        f"model.layers.{block}.up.{name}": tensor.clone() for block in range(2) for name, tensor in layer.items()
    }
    write_source(
        path, {**tensors, "model.norm.weight": torch.ones(64)}, {**CONFIG, "quantization_config": quantization}
    )
    (quantized,) = inspect(path).quantized
    assert quantized.count == 2
    return quantized


def test_layers_alike_are_one_group_with_its_bits_and_scales(tmp_path: Path) -> None:
    weights = write_quantized(tmp_path, random_model(), METHODS)
    group = group_of(inspect(tmp_path).groups, "model.layers.*.self_attn.q_proj")
    scales = torch.cat([weights[f"model.layers.{block}.self_attn.q_proj"].scales for block in range(2)]).abs()
    assert group == LayerGroup(
        name="model.layers.*.self_attn.q_proj",
        count=2,
        numbers="int8 per channel, dynamic activations",
        shape=(64, 64),
        parameters=2 * 64 * 64,
        nbytes=2 * (64 * 64 + 64 * 2),
        quantized=True,
        scales=(float(scales.min()), float(scales.max())),
    )
    assert group.bits == 8.25


def test_a_layer_that_differs_from_its_siblings_stands_alone_under_its_own_name(tmp_path: Path) -> None:
    write_quantized(tmp_path, random_model(), METHODS)
    groups = inspect(tmp_path).groups
    assert group_of(groups, "model.layers.0.mlp.up_proj").numbers == "int4 asymmetric group 32"
    assert group_of(groups, "model.layers.1.mlp.up_proj.weight").numbers == "BF16"


def test_totals_are_those_of_the_files(tmp_path: Path) -> None:
    write_quantized(tmp_path, random_model(), METHODS)
    found = inspect(tmp_path)
    stored = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert found.tensors == len(stored)
    assert found.files == 2
    assert found.nbytes == sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert sum(group.nbytes for group in found.groups) == sum(t.numel() * t.element_size() for t in stored.values())
    assert found.parameters == sum(tensor.numel() for tensor in random_model().values())
    assert found.quantization == "compressed-tensors, mixed-precision"
    assert found.quantized_bits == pytest.approx(
        8 * sum(group.nbytes for group in found.quantized) / (2 * 64 * 64 + 72 * 64)
    )


def test_a_plain_checkpoint_is_described_too(tmp_path: Path) -> None:
    write_source(tmp_path, random_model(), CONFIG | {"architectures": ["LlamaForCausalLM"]})
    found = inspect(tmp_path)
    assert (found.architecture, found.quantization) == ("LlamaForCausalLM", "none")
    assert found.quantized == ()
    assert found.quantized_bits is None
    assert found.bits == 16
    assert group_of(found.groups, "model.layers.*.mlp.down_proj.weight").shape == (64, 96)


def test_groups_come_in_the_order_of_the_model(tmp_path: Path) -> None:
    tensors = {f"model.layers.{block}.w.weight": torch.ones(2 + block % 2, 2) for block in range(12)}
    write_source(tmp_path, tensors)
    assert [group.count for group in inspect(tmp_path).groups] == [6, 6]


def test_without_scales_only_headers_are_read(tmp_path: Path) -> None:
    write_quantized(tmp_path, random_model(), METHODS)
    assert all(group.scales is None for group in inspect(tmp_path, scales=False).groups)


def test_a_scale_that_is_no_number_shows(tmp_path: Path) -> None:
    layer = {
        "weight": torch.zeros(64, 64, dtype=torch.int8),
        "weight_scale": torch.tensor([1.0, math.nan, 2.0] * 64)[:64, None],
    }
    quantized = foreign(tmp_path, layer, {})
    assert quantized.scales is not None
    assert all(math.isnan(bound) for bound in quantized.scales)


def test_a_gptq_layout_is_described_from_its_config_and_tensors(tmp_path: Path) -> None:
    layer = {
        "qweight": torch.zeros(64 * 3 // 32, 96, dtype=torch.int32),
        "qzeros": torch.zeros(2, 96 * 3 // 32, dtype=torch.int32),
        "scales": torch.ones(2, 96).half(),
        "g_idx": torch.zeros(64, dtype=torch.int32),
    }
    config = {"quant_method": "gptq", "bits": 3, "group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"}
    quantized = foreign(tmp_path, layer, config)
    assert quantized.name == "model.layers.*.up"
    assert (quantized.numbers, quantized.shape) == ("int3 asymmetric group 32", (96, 64))
    assert inspect(tmp_path).quantization == "gptq, gptq_v2"


def test_an_awq_layout_is_described_from_its_config_and_tensors(tmp_path: Path) -> None:
    layer = {
        "qweight": torch.zeros(64, 96 // 8, dtype=torch.int32),
        "qzeros": torch.zeros(2, 96 // 8, dtype=torch.int32),
        "scales": torch.ones(2, 96).half(),
    }
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    quantized = foreign(tmp_path, layer, config)
    assert (quantized.numbers, quantized.shape) == ("int4 asymmetric group 32", (96, 64))
    assert quantized.scales == (1.0, 1.0)


def test_fp8_in_blocks_is_recognized(tmp_path: Path) -> None:
    layer = {"weight": torch.zeros(64, 64).to(torch.float8_e4m3fn), "weight_scale_inv": torch.full((1, 1), 0.5)}
    quantized = foreign(tmp_path, layer, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert (quantized.numbers, quantized.shape, quantized.scales) == ("fp8 in blocks", (64, 64), (0.5, 0.5))


def test_numbers_that_no_config_explains_are_told_by_their_tensors(tmp_path: Path) -> None:
    layer = {"weight": torch.zeros(64, 64, dtype=torch.int8), "weight_scale": torch.ones(64, 1)}
    quantized = foreign(tmp_path, layer, {})
    assert quantized.numbers == "F32 weight_scale+I8 weight"
    assert inspect(tmp_path).quantization == "none named in config.json"


def test_a_config_that_cannot_be_understood_is_a_note(tmp_path: Path) -> None:
    write_quantized(tmp_path, random_model(), METHODS)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["strategy"] = "block"
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = inspect(tmp_path)
    assert "weights.strategy" in found.notes[0]
    assert group_of(found.groups, "model.layers.*.self_attn.q_proj").numbers == "BF16 weight_scale+I8 weight"


def test_a_shape_that_lies_is_not_believed(tmp_path: Path) -> None:
    layer = {
        "weight_packed": torch.zeros(64, 8, dtype=torch.int32),
        "weight_scale": torch.ones(64, 2),
        "weight_shape": torch.tensor([-64, 64]),
    }
    assert foreign(tmp_path, layer, {}).shape == (64, 8)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is empty"):
        inspect(tmp_path)


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"qzeros": torch.full((2, 8), -0x77777778, dtype=torch.int32)}, "zero points of version 2"),
        ({"qzeros": torch.zeros(2, 8, dtype=torch.int32)}, "model.layers.0.up.qzeros holds 0 to 0"),
        ({"qzeros": torch.zeros(4, dtype=torch.int32)}, None),
        ({"qzeros": torch.zeros(2, 0, dtype=torch.int32)}, None),
        ({"qzeros": torch.zeros(2, 8)}, None),
        ({"g_idx": torch.full((64,), 7, dtype=torch.int32)}, "model.layers.0.up.g_idx names group 7"),
        ({"g_idx": torch.zeros(0, dtype=torch.int32)}, None),
        ({"g_idx": torch.zeros(7, dtype=torch.int32)}, "group size 32 does not divide 7 inputs"),
        ({"g_idx": torch.zeros(2, 2, dtype=torch.int32)}, None),
    ],
)
def test_what_a_gptq_layer_says_against_its_config_is_noted(
    tmp_path: Path, changes: dict[str, torch.Tensor], note: str | None
) -> None:
    layer = {
        "qweight": torch.zeros(8, 64, dtype=torch.int32),
        "qzeros": torch.full((2, 8), 0x77777777, dtype=torch.int32),
        "scales": torch.ones(2, 64).half(),
        "g_idx": torch.arange(64, dtype=torch.int32) // 32,
    } | changes
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "checkpoint_format": "gptq"}
    foreign(tmp_path, layer, config)
    notes = inspect(tmp_path).notes
    assert (note is None) == (notes == ())
    assert note is None or note in notes[0]
