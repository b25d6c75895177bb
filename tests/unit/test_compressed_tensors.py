"""The compressed-tensors format: its bytes against the reference library's, and its config against its rules."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fewbits.errors import CheckpointError
from fewbits.formats import compressed_tensors as format
from fewbits.formats.targets import matches, targets_by_label
from fewbits.methods import GPTQ, Fp8E4M3, Int4Asymmetric, Int8Symmetric
from fewbits.schemes import Scheme
from fewbits.tensors import seal

GOLDEN = load_file(Path(__file__).parent.parent / "golden" / "compressed_tensors.safetensors")
CASES = sorted({name.rpartition(".")[0] for name in GOLDEN if name.endswith(".codes") and name[0].isdigit()})


def unsigned(codes: torch.Tensor, bits: int) -> torch.Tensor:
    return (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)


@pytest.mark.parametrize("case", CASES)
def test_codes_and_zero_points_pack_as_the_reference_library_packs_them(case: str) -> None:
    bits = int(case.split(".")[0])
    codes = GOLDEN[f"{case}.codes"]
    rows, columns = codes.shape
    method = GPTQ(bits, group_size=1, symmetric=False)
    scales = torch.ones(rows, columns, dtype=torch.bfloat16)
    stored = format.encode("m", seal(unsigned(codes, bits), scales, unsigned(codes, bits), method), (rows, columns))
    assert torch.equal(stored["m.weight_packed"], GOLDEN[f"{case}.along_columns"])
    assert torch.equal(stored["m.weight_zero_point"], GOLDEN[f"{case}.along_rows"])


def test_a_weight_is_stored_as_the_reference_compressor_stores_it() -> None:
    golden = {name.removeprefix("weight.stored."): GOLDEN[name] for name in GOLDEN if ".stored." in name}
    codes, zeros = unsigned(GOLDEN["weight.codes"], 4), unsigned(GOLDEN["weight.zeros"], 4)
    stored = format.encode("m", seal(codes, golden["weight_scale"], zeros, Int4Asymmetric(32)), (40, 96))
    assert {name.removeprefix("m."): tensor.tolist() for name, tensor in stored.items()} == {
        name: tensor.tolist() for name, tensor in golden.items()
    }
    assert {name: tensor.dtype for name, tensor in golden.items()} == {
        name.removeprefix("m."): tensor.dtype for name, tensor in stored.items()
    }


def test_what_the_reference_compressor_stored_decodes_to_the_values_it_was_given() -> None:
    stored = {f"m.{name.removeprefix('weight.stored.')}": GOLDEN[name] for name in GOLDEN if ".stored." in name}
    decoded = format.decode("m", stored, Scheme("int", 4, symmetric=False, group_size=32))
    assert torch.equal(decoded.dequantize(), GOLDEN["weight.values"])


def test_int4_codes_in_order_make_the_words_that_the_format_prescribes() -> None:
    codes = torch.arange(16, dtype=torch.uint8)[None]
    stored = format.encode("m", seal(codes, torch.ones(1, 1), None, GPTQ(4, "channel")), (1, 16))
    words = stored["m.weight_packed"].view(torch.uint32)[0].tolist()
    assert [hex(word) for word in words] == ["0x76543210", "0xfedcba98"]


@pytest.mark.parametrize("bits", [1, 3, 5, 6, 7])
def test_widths_on_whose_layout_readers_disagree_are_refused(bits: int) -> None:
    reason = format.why_not(Scheme("int", bits, symmetric=True, group_size=32), (64, 64))
    assert reason is not None
    assert f"of {bits}" in reason


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme("float", 8, symmetric=True, group_size=128),
        Scheme("float", 4, symmetric=True),
        Scheme("int", 4, symmetric=True, activations="dynamic"),
        Scheme("int", 8, symmetric=False, activations="dynamic"),
        Scheme("int", 8, symmetric=True, group_size=128, activations="dynamic"),
        Scheme("int", 4, symmetric=True, group_size=48),
    ],
)
def test_schemes_without_a_layout_are_refused_with_a_reason(scheme: Scheme) -> None:
    assert format.why_not(scheme, (64, 64))


def test_a_tile_that_would_split_a_word_is_a_mistake_of_the_caller() -> None:
    weight = seal(torch.zeros(20, 8, dtype=torch.uint8), torch.ones(20, 1), None, GPTQ(4, "channel"))
    with pytest.raises(ValueError, match="no tile of whole words"):
        format.encode("m", weight, (40, 8))


W8A8_CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": {
                "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
            },
            "output_activations": None,
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
        }
    },
}  # fmt: skip


def test_the_config_of_one_scheme_targets_all_linears_and_ignores_the_rest_by_name() -> None:
    assert format.quantization_config({"a.0.up": Int8Symmetric().scheme, "lm_head": None}) == W8A8_CONFIG


def test_a_tied_head_without_a_tensor_is_ignored_as_well() -> None:
    assert format.quantization_config({"a.0.up": Int8Symmetric().scheme}) == W8A8_CONFIG


def test_group_size_is_written_for_groups_only() -> None:
    config = format.quantization_config({"a": Int4Asymmetric(64).scheme})
    assert config["config_groups"]["group_0"]["weights"] == {
        "num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 64, "dynamic": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (Int8Symmetric(), "int-quantized"),
        (Int8Symmetric(None), "pack-quantized"),
        (Fp8E4M3(), "float-quantized"),
        (Fp8E4M3(None), "naive-quantized"),
        (GPTQ(2, 32), "pack-quantized"),
    ],
)
def test_every_scheme_has_its_storage_format(method: Any, name: str) -> None:
    assert format.quantization_config({"a": method.scheme})["format"] == name


def mixed_schemes(blocks: int) -> dict[str, Scheme | None]:
    schemes: dict[str, Scheme | None] = {"lm_head": None, "model.extra": Fp8E4M3().scheme}
    for block in range(blocks):
        prefix = f"model.layers.{block}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            schemes[f"{prefix}.self_attn.{name}"] = Int8Symmetric().scheme
        for name in ("gate_proj", "up_proj"):
            schemes[f"{prefix}.mlp.{name}"] = Int4Asymmetric(32 if block < 4 else 128).scheme
        schemes[f"{prefix}.mlp.down_proj"] = None if block == 1 else Fp8E4M3().scheme
    return schemes


def test_a_mixed_config_names_each_layer_of_a_hundred_blocks_in_one_group_and_stays_small() -> None:
    schemes = mixed_schemes(100)
    config = format.quantization_config(schemes)
    assert config["format"] == "mixed-precision"
    assert len(json.dumps(config["config_groups"])) < 3000
    assert [group["format"] for group in config["config_groups"].values()] == [
        "float-quantized", "int-quantized", "pack-quantized", "pack-quantized",
    ]  # fmt: skip
    targets = [(target, name) for name, group in config["config_groups"].items() for target in group["targets"]]
    for module, scheme in schemes.items():
        naming = [target for target, _ in targets if matches(target, module)]
        assert len(naming) == (scheme is not None), module
    assert config["ignore"] == ["lm_head", "model.layers.1.mlp.down_proj"]


def test_targets_survive_a_reader_that_renames_the_outermost_modules() -> None:
    targets = targets_by_label({"model.layers.0.up": 4, "model.layers.0.down": 8})
    assert matches(targets[4][0], "model.language_model.layers.17.up")
    assert not matches(targets[4][0], "model.language_model.layers.17.down")


def test_targets_of_towers_that_look_alike_do_not_reach_into_each_other() -> None:
    labels = {f"{tower}.layers.{block}.up": bits for tower, bits in (("text", 4), ("vision", 8)) for block in (0, 1)}
    targets = targets_by_label(labels)
    assert all(len(listed) == 1 for listed in targets.values())
    assert [bits for bits, listed in targets.items() if matches(listed[0], "vision.layers.1.up")] == [8]


def test_towers_that_stay_unquantized_are_ignored_wherever_a_reader_puts_them() -> None:
    schemes: dict[str, Scheme | None] = {
        "language_model.layers.0.up": Int4Asymmetric(32).scheme,
        "vision_tower.encoder.layers.0.up": None,
        "lm_head": None,
    }
    ignored = format.quantization_config(schemes)["ignore"]
    assert ignored[:2] == ["vision_tower.encoder.layers.0.up", "lm_head"]
    assert any(matches(name, "model.vision_tower.encoder.layers.0.up") for name in ignored)
    assert not any(matches(name, "model.language_model.layers.0.up") for name in ignored)


NAMES = st.lists(
    st.sampled_from(["a", "b_1", "layers", "0", "1", "12", "up", "x-y", "λ", "007"]), min_size=1, max_size=5
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(NAMES.map(".".join), st.sampled_from([None, 2, 4, 8]), max_size=30))
def test_targets_are_disjoint_and_complete_for_any_names(labels: dict[str, int | None]) -> None:
    targets = targets_by_label(labels)
    for name, label in labels.items():
        naming = [found for found, listed in targets.items() for target in listed if matches(target, name)]
        assert naming == ([] if label is None else [label]), name


def test_many_experts_of_unlike_schemes_are_named_in_good_time() -> None:
    labels = {
        f"m.layers.{block}.experts.{expert}.{name}": (block * 7 + expert * 3) % 4 or None
        for block in range(20)
        for expert in range(64)
        for name in ("w1", "w2", "w3")
    }
    targets = targets_by_label(labels)
    assert sum(map(len, targets.values())) == sum(label is not None for label in labels.values())


def test_schemes_come_back_from_their_config() -> None:
    schemes = mixed_schemes(6)
    config = json.loads(json.dumps(format.quantization_config(schemes)))
    assert format.schemes_from_config(config, schemes) == schemes


def foreign(**changes: Any) -> dict[str, Any]:
    """A config as another tool writes it, with more keys than are needed."""
    weights = {
        "num_bits": 4, "type": "int", "symmetric": True, "group_size": 128, "strategy": "group", "dynamic": False,
        "block_structure": None, "actorder": None, "observer": "minmax", "observer_kwargs": {},
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "global_compression_ratio": None, "kv_cache_scheme": None, "ignore": ["re:.*gate$", "lm_head"],
        "config_groups": {"group_0": group}, "sparsity_config": {}, "transform_config": {}, "version": "0.20.0",
    }  # fmt: skip
    for path, value in changes.items():
        *parents, last = path.split("__")
        inner: Any = {"config": config, "group": group, "weights": weights}[parents[0]]
        inner[last] = value
    return copy.deepcopy(config)


def test_a_config_of_another_tool_is_read() -> None:
    assert format.schemes_from_config(foreign(), ["m.up", "m.gate", "lm_head"]) == {
        "m.up": Scheme("int", 4, symmetric=True, group_size=128),
        "m.gate": None,
        "lm_head": None,
    }


def test_an_exact_name_beats_a_pattern_which_beats_the_class() -> None:
    config = foreign()
    group = config["config_groups"]["group_0"]
    wide = copy.deepcopy(group) | {"targets": ["re:.*up$"]}
    wide["weights"] |= {"num_bits": 8}
    exact = copy.deepcopy(group) | {"targets": ["m.1.up"]}
    exact["weights"] |= {"num_bits": 2}
    config["config_groups"] |= {"group_1": wide, "group_2": exact}
    found = format.schemes_from_config(config, ["m.0.up", "m.1.up", "m.1.down"])
    assert [scheme.bits if scheme else None for scheme in found.values()] == [8, 2, 4]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"config__quant_method": "gptq"}, 'quant_method of quantization_config is "gptq"'),
    "no groups": ({"config__config_groups": {}}, "config_groups"),
    "a preset": ({"config__config_groups": {"W4A16": ["Linear"]}}, "W4A16 of config_groups"),
    "a rotation": ({"config__transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
    "no weights": ({"group__weights": None}, "weights of group_0 is nothing"),
    "targets that are none": ({"group__targets": "Linear"}, "targets of group_0"),
    "an unknown number": ({"weights__type": "posit"}, 'weights.type of group_0 is "posit"'),
    "no width": ({"weights__num_bits": "4"}, "weights.num_bits of group_0"),
    "floats of 4 bits": ({"weights__type": "float"}, "weights.num_bits of group_0 is 4"),
    "per tensor": ({"weights__strategy": "tensor"}, "weights.strategy"),
    "groups of nothing": ({"weights__group_size": None}, "weights.group_size of group_0 is nothing"),
    "permuted columns": ({"weights__actorder": "group"}, "weights.actorder"),
    "static activations": (
        {"group__input_activations": {"num_bits": 8, "strategy": "tensor", "dynamic": False}},
        "8-bit int per tensor, static",
    ),
    "another layout": ({"config__format": "marlin-24"}, 'format of group_0 is "marlin-24"'),
    "ignore that is no list": ({"config__ignore": "lm_head"}, "ignore of quantization_config"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_asks_for_something_unknown_is_refused_by_name(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        format.schemes_from_config(foreign(**changes), ["m.up"])
    assert "expected" in caught.value.message
    assert caught.value.hint


def stored_weight() -> dict[str, torch.Tensor]:
    codes = torch.randint(0, 16, (40, 64), dtype=torch.uint8)
    zeros = torch.randint(0, 16, (40, 2), dtype=torch.uint8)
    return format.encode("m", seal(codes, torch.ones(40, 2), zeros, Int4Asymmetric(32)), (40, 64))


@pytest.mark.parametrize("missing", ["weight_packed", "weight_scale", "weight_zero_point", "weight_shape"])
def test_a_missing_tensor_is_named(missing: str) -> None:
    stored = stored_weight()
    del stored[f"m.{missing}"]
    with pytest.raises(CheckpointError, match=f"m.{missing} is missing"):
        format.decode("m", stored, Int4Asymmetric(32).scheme)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("weight_packed", torch.zeros(40, 7, dtype=torch.int32)),
        ("weight_packed", torch.zeros(40, 8, dtype=torch.int64)),
        ("weight_scale", torch.ones(40, 3)),
        ("weight_scale", torch.ones(40, 2, dtype=torch.int32)),
        ("weight_zero_point", torch.zeros(40, 2, dtype=torch.int32)),
        ("weight_shape", torch.tensor([40, 65])),
        ("weight_shape", torch.tensor([40, 64, 1])),
        ("weight_shape", torch.tensor([0, -64])),
    ],
)
def test_a_tensor_unlike_the_scheme_is_refused(name: str, tensor: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"^m\b"):
        format.decode("m", {**stored_weight(), f"m.{name}": tensor}, Int4Asymmetric(32).scheme)


def test_decoding_while_loading_is_asked_for_where_all_layers_are_asymmetric() -> None:
    asymmetric, symmetric = Int4Asymmetric(32).scheme, GPTQ(4, 32).scheme
    assert format.quantization_config({"a": asymmetric})["dequantize"] is True
    assert "dequantize" not in format.quantization_config({"a": symmetric})
    assert "dequantize" not in format.quantization_config({"a": asymmetric, "b": symmetric})
