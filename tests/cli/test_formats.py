"""`--format`: what is written in each layout, read back by loops of its own, by verify, and by inspect."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from commands import Cli
from tiny_models import random_model, write_source

Array = np.ndarray[Any, Any]
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)


def stream(words: Array, bits: int) -> list[int]:
    """The fields of a little-endian stream of 32-bit words."""
    number = int.from_bytes(words.astype("<i4").tobytes(), "little")
    return [(number >> (bits * place)) & (2**bits - 1) for place in range(len(words) * 32 // bits)]


def gptq_values(stored: dict[str, Array], bits: int, plus: int) -> Array:
    """W [N, K] in float64: scales[g, n] · (q − z)."""
    codes = np.array([stream(stored["qweight"][:, n], bits) for n in range(stored["qweight"].shape[1])])
    zeros = np.array([stream(row, bits) for row in stored["qzeros"]])
    index = stored["g_idx"]
    return (codes - (zeros[index] + plus).T) * stored["scales"].astype(np.float64)[index].T


def awq_values(stored: dict[str, Array]) -> Array:
    """W [N, K] in float64."""

    def unpacked(words: Array) -> Array:
        fields = np.array([[stream(word[None], 4) for word in row] for row in words])
        codes = np.empty_like(fields)
        codes[:, :, NIBBLES] = fields
        return codes.reshape(len(words), -1)

    codes, zeros, scales = unpacked(stored["qweight"]), unpacked(stored["qzeros"]), stored["scales"].astype(np.float64)
    size = len(codes) // len(scales)
    return ((codes - zeros.repeat(size, 0)) * scales.repeat(size, 0)).T


CASES: dict[str, tuple[str, str, Callable[[dict[str, Array]], Array]]] = {
    "awq": ("-m int4 -g 32 --format awq", "awq", awq_values),
    "awq per channel": ("-m int4 -g channel --format awq", "awq", awq_values),
    "gptq 8 bits": ("-m int8 --weight-only --format gptq", "gptq", lambda stored: gptq_values(stored, 8, 1)),
    "gptq with zero points": ("-m int4 -g 32 --format gptq", "gptq_v2", lambda stored: gptq_values(stored, 4, 0)),
    "gptq version 2": ("-m int8 --weight-only -f gptq_v2", "gptq_v2", lambda stored: gptq_values(stored, 8, 0)),
}


def module_tensors(folder: Path) -> dict[str, dict[str, Array]]:
    """Stored tensors by module, by what follows the module's name."""
    modules: dict[str, dict[str, Array]] = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            module, _, part = name.rpartition(".")
            modules.setdefault(module, {})[part] = tensor
    return {module: parts for module, parts in modules.items() if "qweight" in parts}


def wide_model() -> dict[str, torch.Tensor]:
    """The tiny model in fp16, which NumPy reads."""
    return {name: tensor.half() for name, tensor in random_model().items()}


@pytest.mark.parametrize("case", CASES)
def test_each_layout_holds_the_weights_with_the_error_that_is_recorded(case: str, cli: Cli, tmp_path: Path) -> None:
    options, _, values = CASES[case]
    write_source(tmp_path / "model", wide_model())
    report = json.loads(cli("quantize", "model", "out", *options.split(), "--json").out)
    recorded = {layer["name"]: layer["relative_error"] for layer in report["layers"]}
    modules = module_tensors(Path("out"))
    assert modules.keys() == recorded.keys()
    for module, parts in modules.items():
        exact = wide_model()[f"{module}.weight"].double().numpy()
        error = np.linalg.norm(values(parts) - exact) / np.linalg.norm(exact)
        assert math.isclose(error, recorded[module], rel_tol=1e-5)
        assert error < (0.01 if "int8" in options else 0.12)


@pytest.mark.parametrize("case", CASES)
def test_each_layout_is_planned_to_the_byte_and_verified(case: str, cli: Cli, model: Path) -> None:
    options, written_as, _ = CASES[case]
    planned = json.loads(cli("plan", model, *options.split(), "--json").out)
    assert planned["format"] == written_as
    assert cli("quantize", model, "out", *options.split(), "--quiet").status == 0
    written = sum(file.stat().st_size for file in Path("out").glob("*.safetensors"))
    assert planned["bytes_after"] == written
    outcome = cli("verify", "out", "--against", model)
    assert outcome.status == 0, outcome.out


def test_the_same_model_makes_the_same_bytes_whatever_the_number_of_threads(
    cli: Cli, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for threads, out in (("1", "one"), ("3", "three")):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        assert cli("quantize", model, out, *["-m", "int4", "-g", "32", "-f", "awq", "-q"]).status == 0
    for file in Path("one").glob("*.safetensors"):
        assert file.read_bytes() == (Path("three") / file.name).read_bytes()


def test_the_config_of_a_gptq_checkpoint_is_also_in_the_file_that_readers_look_for(cli: Cli, model: Path) -> None:
    cli("quantize", model, "out", *["-m", "int8", "--weight-only", "-f", "gptq", "-q"])
    config = json.loads(Path("out/config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "gptq"
    assert json.loads(Path("out/quantize_config.json").read_text()) == config


def test_inspect_says_what_is_in_a_gptq_checkpoint(cli: Cli, model: Path) -> None:
    cli("quantize", model, "out", *["-m", "int4", "-g", "32", "-f", "gptq", "-q"])
    out = cli("inspect", "out").out
    assert "gptq, gptq_v2" in out
    assert "int4 asymmetric group 32" in out


def test_symmetric_words_that_contradict_the_config_are_reported(cli: Cli, model: Path) -> None:
    cli("quantize", model, "out", *["-m", "int8", "--weight-only", "-f", "gptq", "-q"])
    config = json.loads(Path("out/config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    Path("out/config.json").write_text(json.dumps(config))
    lie = "zero points of version 1, though config.json says version 2"
    verified = cli("verify", "out", "--against", model)
    assert verified.status == 1
    assert lie in verified.out.replace("\n", " ")
    assert lie in cli("inspect", "out").out.replace("\n", " ")


def test_zero_points_in_the_gptq_layout_are_noted(cli: Cli, model: Path) -> None:
    outcome = cli("plan", model, *["-m", "int4", "-g", "32", "-f", "gptq"])
    assert "written as gptq_v2 (gptq cannot store all of its schemes)" in outcome.out
    assert "no kernel for zero points in this layout; awq has them at 4 bits" in outcome.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("-m int8 -f gptq", "gptq stores ints of 2, 3, 4 or 8 bits with activations left alone, not int8 per channel"),
        ("-m int8 -f awq", "awq stores asymmetric ints of 4 bits with activations left alone, not int8 per channel"),
        ("-m gptq -g 32 --bits 3 -f gptq", "gptq packs whole 32-bit words, which 72 outputs of 3 bits do not fill"),
        ("-m int4 -g 32 -f gguff", "'gguff' is no format."),
        ("-c mixed.toml -f awq", "these layers cannot be stored together: awq stores one scheme for all layers"),
        ("-c head.toml -f awq", "readers of awq leave layers outside of the decoder blocks alone, such as lm_head"),
    ],
)
def test_what_a_layout_cannot_store_is_refused_before_any_work(
    options: str, message: str, cli: Cli, model: Path
) -> None:
    int4 = 'method = { name = "int4", group_size = 32 }\n[per_layer]\n'
    Path("mixed.toml").write_text(int4 + '"*.up_proj" = { name = "int4", group_size = 64 }\n')
    Path("head.toml").write_text(int4 + '"lm_head" = { name = "int4", group_size = 32 }\n')
    for command in (["plan", model], ["quantize", model, "out"]):
        outcome = cli(*command, *options.split())
        assert outcome.status == 2
        assert message in outcome.err.replace("\n", " ")
        assert "hint:" in outcome.err
    assert not Path("out").exists()


def test_weights_whose_scales_overflow_fp16_are_refused(cli: Cli, tmp_path: Path) -> None:
    tensors = random_model()
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e30
    write_source(tmp_path / "model", tensors)
    outcome = cli("quantize", "model", "out", *["-m", "int4", "-g", "32", "-f", "awq", "-q"])
    assert outcome.status == 2
    assert "model.layers.0.mlp.up_proj: weights this large need a scale beyond 65,504" in outcome.err
    assert not Path("out").exists()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_calibrated_symmetric_codes_are_stored_with_fp16_scales_of_either_sign(
    bits: int, cli: Cli, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    tensors = dict(LlamaForCausalLM(config).to(torch.bfloat16).state_dict())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config.to_dict()))
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 64, (16, 64)))
    options = f"-m gptq --bits {bits} -g 32 -f gptq --calibration ids.npy --samples 16 --length 64"
    report = json.loads(cli("quantize", "model", "out", *options.split(), "--json").out)
    recorded = {layer["name"]: layer["relative_error"] for layer in report["layers"]}
    signs: set[bool] = set()
    modules = torch_modules(Path("out"))
    assert len(modules) == 14
    for module, parts in modules.items():
        exact = tensors[f"{module}.weight"].double().numpy()
        error = np.linalg.norm(gptq_values(parts, bits, 1) - exact) / np.linalg.norm(exact)
        assert math.isclose(error, recorded[module], rel_tol=1e-5)
        signs |= {bool(sign) for sign in (parts["scales"] < 0).flatten()}
    assert signs == {True, False}
    assert cli("verify", "out", "--against", "model").status == 0


def torch_modules(folder: Path) -> dict[str, dict[str, Array]]:
    """`module_tensors` of a checkpoint that holds bf16 as well."""
    from safetensors.torch import load_file as load_torch

    modules: dict[str, dict[str, Array]] = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_torch(file).items():
            module, _, part = name.rpartition(".")
            if tensor.dtype != torch.bfloat16:
                modules.setdefault(module, {})[part] = tensor.numpy()
    return {module: parts for module, parts in modules.items() if "qweight" in parts}
