"""The main job through Python: what comes out, to the bit, and what is told about it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fewbits
from fewbits import Fp8E4M3, Int4Asymmetric, Int8Symmetric, OutputError, PlanError, QuantConfig, QuantizationError
from fewbits.checkpoints.reader import open_checkpoint
from fewbits.decoded import split_quantized
from fewbits.formats import FORMATS
from tiny_models import random_model, write_source

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = write_source(tmp_path / "model", random_model())
    (path / "tokenizer.json").write_text('{"of": "ours"}')
    (path / "chat_template.jinja").write_text("{{ hello }}")
    return path


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    tensors = stored(folder)
    layers, _ = split_quantized(open_checkpoint(folder, allow_quantized=True))
    return {
        module: FORMATS[layer.format].decode(module, {name: tensors[name] for name in layer.tensors}, layer.scheme)
        .dequantize(torch.float32)
        for module, layer in layers.items()
    }  # fmt: skip


def test_what_is_not_quantized_comes_over_bit_for_bit(model: Path, tmp_path: Path) -> None:
    fewbits.quantize(model, tmp_path / "out", QuantConfig(Int4Asymmetric(32), {"*.q_proj": None}))
    found = stored(tmp_path / "out")
    kept = [name for name in random_model() if "up_proj" not in name and "down_proj" not in name]
    assert len(kept) == 8
    for name in kept:
        assert torch.equal(found[name].view(torch.int16), random_model()[name].view(torch.int16))
    for file in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / file).read_bytes() == (model / file).read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"]
    assert config == json.loads((model / "config.json").read_text())


def test_every_weight_is_within_half_a_step_of_int8(model: Path, tmp_path: Path) -> None:
    fewbits.quantize(model, tmp_path / "out", QuantConfig(Int8Symmetric()))
    for module, found in decoded(tmp_path / "out").items():
        original = random_model()[f"{module}.weight"].float()
        step = original.abs().amax(1, keepdim=True) / 127
        # A bf16 scale is off by 2⁻⁹ at most, which 127 steps add up.
        assert bool(((found - original).abs() <= step * (0.5 + 127 * 2**-9)).all())


def test_the_errors_told_are_those_of_the_files(model: Path, tmp_path: Path) -> None:
    report = fewbits.quantize(model, tmp_path / "out", QuantConfig(Fp8E4M3(), {"*.up_proj": Int4Asymmetric(32)}))
    found = decoded(tmp_path / "out")
    assert {layer.name for layer in report.layers} == set(found)
    for layer in report.layers:
        original = random_model()[f"{layer.name}.weight"].double().numpy()
        expected = np.linalg.norm(original - found[layer.name].double().numpy()) / np.linalg.norm(original)
        assert layer.relative_error == pytest.approx(expected, rel=1e-4)
    assert report.worst.relative_error == max(layer.relative_error for layer in report.layers)
    manifest = json.loads((tmp_path / "out" / "fewbits.json").read_text())
    assert {layer["name"]: layer["relative_error"] for layer in manifest["layers"]} == {
        layer.name: layer.relative_error for layer in report.layers
    }


@pytest.mark.parametrize("method", [Int8Symmetric(), Fp8E4M3(), Int4Asymmetric(32)], ids=str)
def test_the_same_input_gives_the_same_bytes(method: fewbits.QuantMethod, model: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        fewbits.quantize(model, tmp_path / name, QuantConfig(method))
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "two").iterdir())
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)


def test_a_constant_and_an_all_zero_layer_come_back(tmp_path: Path) -> None:
    tensors = random_model() | {f"{UP}.weight": torch.zeros(72, 64).bfloat16()}
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.full((72, 64), -0.75).bfloat16()
    model = write_source(tmp_path / "model", tensors)
    for number, method in enumerate((Int8Symmetric(), Fp8E4M3(), Int4Asymmetric(32))):
        fewbits.quantize(model, tmp_path / f"out{number}", QuantConfig(method))
        found = decoded(tmp_path / f"out{number}")
        assert bool((found[UP] == 0).all())
        assert found["model.layers.0.mlp.up_proj"].numpy() == pytest.approx(-0.75, rel=2**-8)


def test_infinite_weights_that_may_be_carried_over_are_told_of(tmp_path: Path) -> None:
    tensors = random_model()
    tensors[f"{UP}.weight"][0, 0] = torch.inf
    model = write_source(tmp_path / "model", tensors)
    with pytest.raises(QuantizationError, match=f"{UP}.weight holds NaN or infinite"):
        fewbits.quantize(model, tmp_path / "out", QuantConfig(Int8Symmetric()))
    report = fewbits.quantize(model, tmp_path / "out", QuantConfig(Int8Symmetric()), allow_nonfinite=True)
    assert [note.layer for note in report.notes] == [UP]
    assert torch.equal(stored(tmp_path / "out")[f"{UP}.weight"], tensors[f"{UP}.weight"])
    with pytest.raises((PlanError, QuantizationError)):
        fewbits.quantize(model, tmp_path / "strict", QuantConfig(Int8Symmetric()), allow_nonfinite=True, strict=True)
    assert not (tmp_path / "strict").exists()


def test_scales_that_fp16_cannot_hold_are_told_of(tmp_path: Path) -> None:
    tensors = {name: tensor.to(torch.float16) for name, tensor in random_model().items()}
    # In 3 rows, one group of 32 has weights of 1e-4 at most: a fifteenth of that is below what fp16 holds.
    tensors[f"{UP}.weight"][:3, :32].clamp_(-1e-4, 1e-4)
    model = write_source(tmp_path / "model", tensors)
    config = QuantConfig(Int4Asymmetric(32))
    report = fewbits.quantize(model, tmp_path / "out", config)
    groups = tensors[f"{UP}.weight"].numel() // 32
    assert [str(note) for note in report.notes] == [
        f"{UP}: 3 of {groups} scales held at 6.1e-05 (fp16) "
        "(its weights are too small for scales of the checkpoint's dtype)"
    ]
    manifest = json.loads((tmp_path / "out" / "fewbits.json").read_text())
    assert [note["layer"] for note in manifest["notes"]] == [UP]
    with pytest.raises(PlanError, match="strict: "):
        fewbits.quantize(model, tmp_path / "strict", config, strict=True)
    assert not (tmp_path / "strict").exists()


def test_a_run_cannot_go_on_with_another_config(tmp_path: Path) -> None:
    tensors = random_model()
    tensors[f"{UP}.weight"][0, 0] = torch.nan
    model = write_source(tmp_path / "model", tensors)
    with pytest.raises(QuantizationError):
        fewbits.quantize(model, tmp_path / "out", QuantConfig(Int8Symmetric()))
    if (tmp_path / "out.partial").exists():
        with pytest.raises((OutputError, PlanError), match="config"):
            fewbits.quantize(model, tmp_path / "out", QuantConfig(Fp8E4M3()))
