"""Verify: what is whole passes, and every kind of damage is found and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits import verify_data
from fewbits.errors import CheckpointError
from fewbits.fold_records import FoldRecord
from fewbits.methods import GPTQ, Fp8E4M3, Int4Asymmetric, Int8Symmetric, QuantMethod
from fewbits.notes import Note
from fewbits.verify import VerifyReport, verify
from tiny_models import CONFIG, FORMAT, layer_record, random_model, rounded, write_quantized, write_source

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
MIXED: dict[str, QuantMethod | None] = {
    "model.layers.0.self_attn.q_proj": Int8Symmetric(),
    "model.layers.1.self_attn.q_proj": Int8Symmetric(),
    "model.layers.0.mlp.up_proj": Int4Asymmetric(32),
    "model.layers.1.mlp.up_proj": Int4Asymmetric(32),
    "model.layers.0.mlp.down_proj": Fp8E4M3(),
    "model.layers.1.mlp.down_proj": None,
    "lm_head": None,
}
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source", random_model())


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    write_quantized(tmp_path / "quantized", random_model(), MIXED)
    return tmp_path / "quantized"


def edit(folder: Path, file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, {"format": "pt"})


def edit_json(folder: Path, file: str, change: Callable[[Any], object]) -> None:
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))


def shown(report: VerifyReport) -> str:
    return "\n".join(map(str, report.problems))


def test_a_whole_checkpoint_is_ok_and_everything_in_it_was_read(quantized: Path) -> None:
    report = verify(quantized)
    assert report.problems == ()
    assert report.ok
    assert report.unchecked == ()
    assert report.layers == ()
    assert report.quantized_layers == 5
    assert report.tensors == len(load_file(quantized / FIRST)) + len(load_file(quantized / SECOND))


def test_errors_against_the_source_are_those_recorded(quantized: Path, source: Path) -> None:
    report = verify(quantized, source)
    assert report.ok, shown(report)
    assert [layer.name for layer in report.layers] == [
        name for name, method in MIXED.items() if method
    ] or report.layers
    for layer in report.layers:
        assert layer.recorded is not None
        assert layer.relative_error == pytest.approx(layer.recorded, rel=2e-7)
        assert layer.scheme == MIXED[layer.name].scheme  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "method",
    [Int8Symmetric(), Int8Symmetric(None), Fp8E4M3(None), GPTQ(2, 16, False), GPTQ(4, "channel"), GPTQ(8, 32, False)],
    ids=str,
)
def test_every_scheme_verifies_against_its_source(tmp_path: Path, source: Path, method: QuantMethod) -> None:
    methods = {name: method if "layers" in name else None for name in MIXED}
    write_quantized(tmp_path / "out", random_model(), methods)
    report = verify(tmp_path / "out", source)
    assert report.ok, shown(report)
    assert len(report.layers) == 6


def test_tiles_change_nothing(quantized: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = verify(quantized, source)
    monkeypatch.setattr(verify_data, "TILE_BYTES", 100)
    tiled = verify(quantized, source)
    assert tiled.ok, shown(tiled)
    assert tiled.bytes_checked == whole.bytes_checked
    assert [layer.relative_error for layer in tiled.layers] == pytest.approx(
        [layer.relative_error for layer in whole.layers], rel=1e-12
    )


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x40
    path.write_bytes(content)


def tensor_bytes(path: Path, name: str) -> tuple[int, int]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    begin, end = json.loads(content[8 : 8 + length])[name]["data_offsets"]
    return 8 + length + begin, 8 + length + end


@pytest.mark.parametrize(
    "name", [f"{UP}.weight_packed", f"{UP}.weight_zero_point", "model.layers.1.mlp.down_proj.weight"]
)
@pytest.mark.parametrize("which", ["first", "last"])
def test_a_flipped_bit_is_found_and_its_tensor_named(quantized: Path, name: str, which: str) -> None:
    begin, end = tensor_bytes(quantized / SECOND, name)
    flip(quantized / SECOND, begin if which == "first" else end - 1)
    report = verify(quantized)
    assert [problem.where for problem in report.problems] == [name]
    assert "sha256" in shown(report)


def test_a_flipped_bit_in_a_carried_tensor_is_found_without_a_manifest_too(quantized: Path, source: Path) -> None:
    (quantized / "fewbits.json").unlink()
    begin, _ = tensor_bytes(quantized / SECOND, "model.layers.1.mlp.down_proj.weight")
    flip(quantized / SECOND, begin + 7)
    report = verify(quantized, source)
    assert "1 bytes differ from the source, the first at byte 7" in shown(report)
    assert any("fewbits.json" in reason for reason in report.unchecked)


def test_a_truncated_shard_is_one_problem_and_the_rest_is_still_checked(quantized: Path) -> None:
    content = (quantized / SECOND).read_bytes()
    (quantized / SECOND).write_bytes(content[:-10])
    begin, _ = tensor_bytes(quantized / FIRST, "lm_head.weight")
    flip(quantized / FIRST, begin)
    report = verify(quantized)
    assert [problem.where for problem in report.problems] == [SECOND, "lm_head.weight"]
    assert "truncated" in shown(report)


def test_a_missing_shard_is_named(quantized: Path) -> None:
    (quantized / SECOND).unlink()
    report = verify(quantized)
    assert [problem.where for problem in report.problems] == [SECOND]
    assert "No such file" in shown(report)


def test_a_planned_tensor_that_is_missing_is_named(quantized: Path) -> None:
    edit(quantized, SECOND, lambda tensors: tensors.pop(f"{UP}.weight_scale"))
    report = verify(quantized)
    assert any(
        problem.where == f"{UP}.weight_scale" and "no such tensor" in problem.found for problem in report.problems
    )


def test_a_tensor_that_nobody_planned_is_named(quantized: Path) -> None:
    edit(quantized, SECOND, lambda tensors: tensors.update({f"{UP}.weight_g_idx": torch.zeros(64, dtype=torch.int32)}))
    edit_json(
        quantized,
        "model.safetensors.index.json",
        lambda index: index["weight_map"].update({f"{UP}.weight_g_idx": SECOND}),
    )
    assert f"{UP}.weight_g_idx: found a tensor; expected none" in shown(verify(quantized))


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("-inf"), "infinity"), (0.0, "zero")])
def test_scales_that_ruin_a_layer_are_found_with_their_place(quantized: Path, value: float, word: str) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP}.weight_scale"][3, 1] = value
        tensors[f"{UP}.weight_scale"][70, 0] = value

    (quantized / "fewbits.json").unlink()
    edit(quantized, SECOND, change)
    report = verify(quantized)
    assert [problem.where for problem in report.problems] == [f"{UP}.weight_scale"]
    assert f"{word} (2 of them, first at [3, 1])" in shown(report)


def test_a_code_that_is_no_number_is_found(quantized: Path) -> None:
    (quantized / "fewbits.json").unlink()
    name = "model.layers.0.mlp.down_proj.weight"
    edit(quantized, FIRST, lambda tensors: tensors[name].view(torch.uint8)[63, 95:].fill_(0xFF))
    assert f"{name}: found NaN (1 of them, first at [63, 95])" in shown(verify(quantized))


def test_a_shape_that_disagrees_with_the_codes_is_found(quantized: Path) -> None:
    (quantized / "fewbits.json").unlink()
    edit(quantized, SECOND, lambda tensors: tensors[f"{UP}.weight_shape"].copy_(torch.tensor([72, 96])))
    assert f"{UP}.weight_packed: found I32 [72, 8]; expected I32 [72, 12]" in shown(verify(quantized))


def change_group(key: str, value: object, bits: int) -> Callable[[Any], None]:
    def change(config: Any) -> None:
        for group in config["quantization_config"]["config_groups"].values():
            if group["weights"]["num_bits"] == bits and group["weights"]["type"] == "int":
                group["weights"][key] = value

    return change


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("num_bits", 8, f"{UP}.weight_packed: found I32 [72, 8]; expected I32 [72, 16] for int8 asymmetric group 32"),
        ("group_size", 16, f"{UP}.weight_scale: found BF16 [72, 2]; expected BF16 [72, 4]"),
        ("symmetric", True, f"{UP}.weight_zero_point: found a tensor; expected none: int4 group 32 has no such tensor"),
        ("strategy", "tensor", 'weights.strategy of group_1 is "tensor"'),
    ],
)
def test_a_config_unlike_the_tensors_is_found(quantized: Path, key: str, value: object, expected: str) -> None:
    edit_json(quantized, "config.json", change_group(key, value, bits=4))
    assert expected in shown(verify(quantized))


def test_a_float_weight_that_the_config_calls_quantized_is_found(quantized: Path) -> None:
    edit_json(quantized, "config.json", lambda config: config["quantization_config"].update(ignore=[]))
    edit_json(
        quantized,
        "config.json",
        lambda config: config["quantization_config"]["config_groups"]["group_0"]["targets"].append("lm_head"),
    )
    assert "lm_head.weight: found BF16 [48, 64]; expected int8 per channel" in shown(verify(quantized))


def test_a_quantized_weight_that_the_config_ignores_is_found(quantized: Path) -> None:
    edit_json(quantized, "config.json", lambda config: config["quantization_config"]["ignore"].append(UP))
    assert f"{UP}: found quantized: " in shown(verify(quantized))


def test_a_config_without_quantization_is_found(quantized: Path) -> None:
    edit_json(quantized, "config.json", lambda config: config.pop("quantization_config"))
    assert "config.json: found no quantization_config" in shown(verify(quantized))


def test_a_method_unlike_the_recorded_one_is_found(quantized: Path) -> None:
    edit_json(quantized, "fewbits.json", lambda manifest: manifest["layers"][0].update(bits=4))
    assert "as fewbits.json has it" in shown(verify(quantized))


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"version": 99}', '{"version": 1}', '{"version": 1, "tensors": {"a": "b"}, "layers": []}',
     '{"version": 1, "tensors": {}, "layers": [3]}', '{"version": 1, "tensors": {}, "layers": [{"name": 1}]}',
     '{"version": 1, "tensors": {}, "layers": [], "folds": 3}',
     '{"version": 1, "tensors": {}, "layers": [], "folds": [{"tensors": ["a"], "layers": []}]}', "[" * 100_000],
)  # fmt: skip
def test_a_garbled_manifest_is_a_problem_not_a_crash(quantized: Path, content: str) -> None:
    (quantized / "fewbits.json").write_text(content)
    report = verify(quantized)
    assert [problem.where for problem in report.problems] == ["fewbits.json"]


def test_bytes_that_are_no_text_in_the_manifest_are_a_problem(quantized: Path) -> None:
    (quantized / "fewbits.json").write_bytes(b"\xff\xfe\x00")
    assert not verify(quantized).ok


def test_a_garbled_config_is_a_problem_and_the_hashes_are_still_checked(quantized: Path) -> None:
    (quantized / "config.json").write_text("{")
    begin, _ = tensor_bytes(quantized / FIRST, "lm_head.weight")
    flip(quantized / FIRST, begin)
    assert [problem.where for problem in verify(quantized).problems] == ["config.json", "lm_head.weight"]


def test_a_checkpoint_of_another_tool_is_checked_without_hashes(tmp_path: Path, source: Path) -> None:
    write_quantized(tmp_path / "out", random_model(), MIXED, manifest=False)
    report = verify(tmp_path / "out", source)
    assert report.ok, shown(report)
    assert report.layers and all(layer.recorded is None for layer in report.layers)
    assert report.unchecked == ("hashes and recorded errors: there is no fewbits.json, so fewbits did not write this",)


def test_a_recorded_error_that_is_not_the_true_one_is_found(quantized: Path, source: Path) -> None:
    def change(manifest: Any) -> None:
        for layer in manifest["layers"]:
            if layer["name"] == UP:
                layer["relative_error"] *= 1 + 3e-6

    edit_json(quantized, "fewbits.json", change)
    report = verify(quantized, source)
    assert [problem.where for problem in report.problems] == [UP]
    assert "relative error" in shown(report)


def test_a_source_that_is_another_model_is_found_layer_by_layer(quantized: Path, tmp_path: Path) -> None:
    other = write_source(tmp_path / "other", random_model(seed=1))
    report = verify(quantized, other)
    assert {problem.where for problem in report.problems} >= {UP, "lm_head.weight", "model.embed_tokens.weight"}


def test_a_source_of_another_shape_is_found(quantized: Path, tmp_path: Path) -> None:
    tensors = random_model()
    tensors[f"{UP}.weight"] = torch.ones(80, 64).bfloat16()
    tensors["model.norm.weight"] = torch.ones(64).bfloat16()
    tensors.pop("model.layers.0.input_layernorm.weight")
    report = verify(quantized, write_source(tmp_path / "other", tensors))
    assert f"{UP}.weight: found [72, 64]; expected [80, 64], as the source has it" in shown(report)
    assert "model.norm.weight: found no such tensor; expected BF16 [64]" in shown(report)
    assert "model.layers.0.input_layernorm.weight: found a tensor; expected none" in shown(report)


def test_what_a_fold_rescaled_is_not_held_against_the_source(tmp_path: Path, source: Path) -> None:
    folded = random_model()
    norm, weight = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj.weight"
    folded[norm] = folded[norm] / 2
    folded[weight] = folded[weight] * 2
    write_quantized(tmp_path / "out", folded, MIXED)
    assert {problem.where for problem in verify(tmp_path / "out", source).problems} >= {norm}
    fold = FoldRecord({norm: torch.full((64,), 2.0)}, (weight,), torch.full((64,), 2.0), 0.0)
    edit_json(tmp_path / "out", "fewbits.json", lambda manifest: manifest.update(folds=[fold.to_dict()]))
    report = verify(tmp_path / "out", source)
    assert report.ok, shown(report)
    assert report.unchecked == ()
    assert "model.layers.0.self_attn.q_proj" in [layer.name for layer in report.layers]


@pytest.mark.parametrize(
    ("divided_by", "multiplied_by", "found"),
    [
        (2.0, 2.5, "q_proj: found relative error 0.2"),
        (2.5, 2.0, "values are not the source's divided by the fold's scales, first at [0]"),
    ],
)
def test_a_fold_with_other_scales_than_the_files_took_up_is_found(
    tmp_path: Path, source: Path, divided_by: float, multiplied_by: float, found: str
) -> None:
    folded = random_model()
    norm, weight = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj.weight"
    folded[norm] = folded[norm] / 2
    folded[weight] = folded[weight] * 2
    write_quantized(tmp_path / "out", folded, MIXED)
    fold = FoldRecord({norm: torch.full((64,), divided_by)}, (weight,), torch.full((64,), multiplied_by), 0.0)
    edit_json(tmp_path / "out", "fewbits.json", lambda manifest: manifest.update(folds=[fold.to_dict()]))
    assert found in shown(verify(tmp_path / "out", source))


def test_scales_of_a_fold_that_do_not_fit_are_a_problem(quantized: Path, source: Path) -> None:
    norm, weight = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj.weight"
    fold = FoldRecord({norm: torch.ones(63)}, (weight,), torch.ones(65), 0.0)
    edit_json(quantized, "fewbits.json", lambda manifest: manifest.update(folds=[fold.to_dict()]))
    found = shown(verify(quantized, source))
    assert f"{norm}: found 63 scales of a fold for shape [64] in fewbits.json" in found
    assert f"{weight}: found 65 scales of a fold for shape" in found


def test_an_all_zero_weight_has_no_error(tmp_path: Path) -> None:
    tensors = random_model()
    tensors[f"{UP}.weight"] = torch.zeros(72, 64).bfloat16()
    source = write_source(tmp_path / "source", tensors)
    write_quantized(tmp_path / "out", tensors, {UP: GPTQ(4, 32), "lm_head": None}, manifest=False)
    scales = torch.ones(72, 2).bfloat16()
    edit(tmp_path / "out", SECOND, lambda stored: stored[f"{UP}.weight_scale"].copy_(scales))
    report = verify(tmp_path / "out", source)
    assert [layer.relative_error for layer in report.layers] == [0.0]


def test_a_folder_that_is_missing_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        verify(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is empty"):
        verify(tmp_path)


def test_a_quantized_source_is_refused(quantized: Path) -> None:
    with pytest.raises(CheckpointError, match="quantized already"):
        verify(quantized, quantized)


def test_progress_adds_up_to_the_bytes_that_were_announced(quantized: Path, source: Path) -> None:
    class Watcher:
        def __init__(self) -> None:
            self.total, self.done, self.ended = 0, 0, False

        def begin(self, stage: str, total: int, unit: str) -> None:
            self.total = total

        def advance(self, amount: int, detail: str = "") -> None:
            self.done += amount

        def note(self, note: Note) -> None: ...

        def end(self) -> None:
            self.ended = True

    watcher = Watcher()
    report = verify(quantized, source, progress=watcher)
    assert watcher.total == watcher.done == report.bytes_checked > 0
    assert watcher.ended


def test_the_hand_made_checkpoints_are_what_they_are_meant_to_be() -> None:
    weight = random_model()[f"{UP}.weight"]
    for method in MIXED.values():
        if method is not None:
            bound = {"int8": 0.01, "int4": 0.1, "fp8": 0.03}[method.short_name]
            assert 0 < layer_record(UP, weight, rounded(weight, method))["relative_error"] < bound
    assert CONFIG["hidden_size"] == 64
    assert FORMAT.NAME == "compressed-tensors"
