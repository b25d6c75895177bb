"""AWQ and SmoothQuant end to end on tiny models: what the files hold, and what is told about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fewbits
from fewbits import AWQ, GPTQ, CalibrationError, Int8Symmetric, PlanError, QuantConfig, SmoothQuant
from fewbits.decoded import decoded_model
from fewbits.methods import QuantMethod
from fewbits.progress import Silent
from tiny_transformers import BLOCKS, save_tiny, token_ids, whole_model

# Every method on one architecture, the two that do most on the others.
CASES = [("llama", AWQ(16)), ("llama", SmoothQuant(0.5))] + [
    (architecture, method)
    for architecture in ("llama", "gemma3", "mixtral", "opt", "phi3", "qwen2")
    for method in (AWQ(16, "gptq"), SmoothQuant("auto"))
    # What is compared with cannot round the inputs of experts that transformers stacks.
    if (architecture, method.short_name) != ("mixtral", "smoothquant")
]
UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"


def quantized(model: Path, out: Path, config: QuantMethod | QuantConfig, **options: Any) -> fewbits.Report:
    ids = model.parent / "ids.npy"
    np.save(ids, token_ids(8, 32).numpy())
    if isinstance(config, QuantMethod):
        config = QuantConfig(config)
    return fewbits.quantize(model, out, config, ids, **({"samples": 8, "length": 32} | options))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(("architecture", "method"), CASES, ids=str)
def test_the_files_compute_what_the_model_did_but_for_rounding(
    tmp_path: Path, architecture: str, method: QuantMethod
) -> None:
    model = save_tiny(tmp_path / "model", architecture)
    report = quantized(model, tmp_path / "out", method)
    assert report.folds
    assert fewbits.verify(tmp_path / "out", model).ok
    ids = token_ids(4, 32, seed=5)
    with torch.no_grad():
        exact = whole_model(model, torch.float32)(ids).logits
        found = decoded_model(tmp_path / "out")(ids).logits
    error = float((found - exact).norm() / exact.norm())
    # Weights alone: 4 bits lose some percent of each output, 8 bits some tenths; experts may be chosen otherwise.
    assert error < (0.6 if method.bits_per_weight == 4 else 0.15)


def test_norms_and_linears_that_took_scales_up_are_recorded(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "llama")
    report = quantized(model, tmp_path / "out", AWQ(16))
    manifest = json.loads((tmp_path / "out" / "fewbits.json").read_text())
    before, after = stored(model), stored(tmp_path / "out")
    changed = {name for name in before if name in after and not torch.equal(before[name], after[name])}
    assert changed and changed < {name for fold in manifest["folds"] for name in fold["tensors"]}
    assert all(name.endswith("layernorm.weight") for name in changed)
    assert manifest["folds"] == list(report.folds)


@pytest.mark.parametrize(
    ("architecture", "method"),
    [("llama", AWQ(16)), ("llama", AWQ(16, "gptq")), ("qwen2", SmoothQuant(0.5)), ("gemma3", AWQ(16)), ("opt", AWQ(16)),
     ("phi3", SmoothQuant("auto")), ("mixtral", AWQ(16))],
    ids=str,
)  # fmt: skip
def test_every_layer_is_held_against_the_source_whatever_was_rescaled(
    tmp_path: Path, architecture: str, method: QuantMethod
) -> None:
    model = save_tiny(tmp_path / "model", architecture)
    report = quantized(model, tmp_path / "out", method)
    checked = fewbits.verify(tmp_path / "out", model)
    assert checked.problems == () and checked.unchecked == ()
    assert {layer.name for layer in checked.layers} == {layer.name for layer in report.layers}
    assert report.folds
    # Another model of the same shapes: every layer and every rescaled tensor is found to be another's.
    weights = {name: (tensor.float() * 1.25).to(tensor.dtype) for name, tensor in stored(model).items()}
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    found = {problem.where.removesuffix(".weight") for problem in fewbits.verify(tmp_path / "out", model).problems}
    assert {layer.name for layer in report.layers} < found
    assert {name.removesuffix(".weight") for fold in report.folds for name in fold["tensors"]} <= found


def test_errors_are_those_of_the_weights_that_count(tmp_path: Path) -> None:
    """The relative error of a layer compares what multiplies its unscaled input, so it is near plain rounding's."""
    model = save_tiny(tmp_path / "model", "llama")
    report = quantized(model, tmp_path / "awq", AWQ(16), importance="none")
    plain = fewbits.quantize(model, tmp_path / "int4", QuantConfig(fewbits.Int4Asymmetric(16)))
    errors = {layer.name: layer.relative_error for layer in plain.layers}
    for layer in report.layers:
        assert 0.8 * errors[layer.name] < layer.relative_error < 2 * errors[layer.name]
        assert layer.output_error is not None and layer.output_error < 0.1


@pytest.mark.parametrize("method", [AWQ(16), SmoothQuant("auto")], ids=str)
def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path: Path, method: QuantMethod) -> None:
    class Killed(BaseException):
        pass

    class Killer(Silent):
        left = 2
        stage = ""

        def begin(self, stage: str, total: int, unit: str) -> None:
            self.stage = stage

        def advance(self, amount: int, name: str) -> None:
            self.left -= self.stage == "calibrating"
            if self.left == 0:
                raise Killed

    model = save_tiny(tmp_path / "model", "llama")
    quantized(model, tmp_path / "whole", method)
    with pytest.raises(Killed):
        quantized(model, tmp_path / "out", method, progress=Killer())
    assert not (tmp_path / "out").exists()
    report = quantized(model, tmp_path / "out", method)
    assert report.resumed_shards > 0
    for file in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_layers_of_unlike_methods_that_share_an_input_are_not_scaled(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "llama")
    config = QuantConfig(AWQ(16), {UP: Int8Symmetric(None)})
    report = quantized(model, tmp_path / "out", config)
    notes = [note for note in report.notes if "not scaled" in note.what]
    assert [note.layer for note in notes] == ["model.layers.1.mlp.gate_proj"]
    assert "unlike methods" in notes[0].why
    # down is AWQ's alone, and up takes its scales up whatever its method.
    assert any(fold["layers"] == [f"{DOWN}.weight"] and fold["tensors"] == [f"{UP}.weight"] for fold in report.folds)
    assert fewbits.verify(tmp_path / "out", model).ok


def test_an_input_shared_with_a_layer_that_stays_as_it_is_is_not_scaled(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "llama")
    report = quantized(model, tmp_path / "out", QuantConfig(AWQ(16), {UP: None}))
    norm = "model.layers.1.post_attention_layernorm.weight"
    assert [note.why for note in report.notes if note.layer == "model.layers.1.mlp.gate_proj"] == [
        "scaling post_attention_layernorm.weight changes the block's output: something else uses it as well"
    ]
    assert torch.equal(stored(model)[norm], stored(tmp_path / "out")[norm])
    # An unquantized producer is divided by powers of two: exact in any dtype.
    before, after = stored(model)[f"{UP}.weight"].float(), stored(tmp_path / "out")[f"{UP}.weight"].float()
    powers = (before / after)[:, 0]
    assert torch.equal(powers.log2(), powers.log2().round()) and len(powers.unique()) > 1
    assert torch.equal(after * powers[:, None], before)


@pytest.mark.parametrize("method", [AWQ(16), SmoothQuant()], ids=str)
def test_a_model_without_folds_is_quantized_all_the_same_and_says_so(tmp_path: Path, method: QuantMethod) -> None:
    model = save_tiny(tmp_path / "model", "olmo2")
    config = QuantConfig(method, {"*.o_proj": None, "*.down_proj": None})
    report = quantized(model, tmp_path / "out", config)
    assert report.folds == ()
    assert len([note for note in report.notes if note.what == "its input channels are not scaled"]) == 2 * BLOCKS
    assert fewbits.verify(tmp_path / "out", model).ok


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (
            float("nan"),
            "model.layers.1.input_layernorm.weight holds NaN or infinite values: fetch the checkpoint again",
        ),
        (3e38, "the block's weights are finite, so its numbers overflow: int8, int4 and fp8 run no forward"),
    ],
)
def test_inputs_that_are_not_finite_are_traced_to_a_weight_if_one_is_to_blame(
    tmp_path: Path, value: float, hint: str
) -> None:
    model = save_tiny(tmp_path / "model", "llama")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.input_layernorm.weight"][3] = value
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CalibrationError) as caught:
        quantized(model, tmp_path / "out", SmoothQuant(), importance="none")
    assert caught.value.message == (
        "The input of model.layers.1.self_attn.q_proj has NaN or infinite values in 1 of its 32 channels, "
        "the first is 3; the last good block is model.layers.0."
    )
    assert caught.value.hint == hint
    assert not (tmp_path / "out").exists()


def test_experts_say_that_their_norm_has_other_readers(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "qwen3_moe")
    report = quantized(model, tmp_path / "out", AWQ(16), importance="none")
    assert [(note.layer, note.why) for note in report.notes if "not scaled" in note.what] == [
        (
            "model.layers.0.mlp.experts.0.gate_proj",
            "it sees a choice of the tokens of post_attention_layernorm.weight, which others read as well",
        )
    ]


@pytest.mark.parametrize(
    ("method", "chosen"),
    [(AWQ(16), "none"), (SmoothQuant(), "none"), (AWQ(16, "gptq"), "loss"), (GPTQ(4, 16), "loss")],
    ids=str,
)
def test_tokens_are_weighed_where_gptq_solves_unless_it_is_said_otherwise(
    tmp_path: Path, method: QuantMethod, chosen: str
) -> None:
    model = save_tiny(tmp_path / "model", "llama")
    report = quantized(model, tmp_path / "out", method)
    assert report.calibration is not None and report.calibration["importance"] == chosen
    assert (report.stages["importance_s"] > 0) == (chosen == "loss")
    other = {"none": "loss", "loss": "none"}[chosen]
    report = quantized(model, tmp_path / "other", method, importance=other)
    assert report.calibration is not None and report.calibration["importance"] == other


def test_scales_searched_on_too_few_tokens_are_noted(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "llama")
    report = quantized(model, tmp_path / "out", AWQ(16), samples=1, length=32)
    down = [note for note in report.notes if note.layer == DOWN]
    assert [note.what for note in down] == ["scales searched on 32 tokens for 64 inputs"]
    assert len(report.notes) == BLOCKS


def test_strict_makes_a_missing_fold_an_error(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "olmo2")
    with pytest.raises(PlanError, match=r"strict: model.layers.0.self_attn.q_proj: its input channels are not scaled"):
        quantized(model, tmp_path / "out", AWQ(16), strict=True)
    assert not (tmp_path / "out").exists()


def test_gptq_beside_awq_takes_scales_up(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "llama")
    config = QuantConfig(AWQ(16), {"*.v_proj": GPTQ(4, 16), "*.q_proj": GPTQ(4, 16), "*.k_proj": GPTQ(4, 16)})
    report = quantized(model, tmp_path / "out", config)
    assert any(fold["tensors"] == ["model.layers.0.self_attn.v_proj.weight"] for fold in report.folds)
    assert fewbits.verify(tmp_path / "out", model).ok


def test_experts_that_no_token_reached_are_rounded(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "mixtral")
    weights = load_file(model / "model.safetensors")
    for name in weights:
        if name.endswith("gate.weight"):
            weights[name][1:3] = weights[name][0]  # ties go to the first
            weights[name][3] = 2 * weights[name][0]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    report = quantized(model, tmp_path / "out", AWQ(16))
    assert fewbits.verify(tmp_path / "out", model).ok
    assert any("no calibration token" in note.why or "no token" in note.why for note in report.notes)
