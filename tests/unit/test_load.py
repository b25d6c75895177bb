"""Loaded checkpoints against the same models decoded, and every way in which a checkpoint can be no good."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fewbits
import fewbits.load
from fewbits import CheckpointError, Fp8E4M3, Int4Asymmetric, Int8Symmetric, KernelError, QuantConfig, QuantLinear
from fewbits.decoded import decoded_model
from fewbits.formats import FORMATS
from fewbits.methods import GPTQ, QuantMethod
from tiny_llms import write_model
from tiny_models import rounded, write_quantized

METHODS: dict[str, QuantMethod] = {
    "int8": Int8Symmetric(),
    "int8-weights": Int8Symmetric(activations=None),
    "int4": Int4Asymmetric(32),
    "int4-channel": Int4Asymmetric("channel"),
    "fp8": Fp8E4M3(),
    "fp8-weights": Fp8E4M3(activations=None),
}
IDS = torch.tensor([[3, 9, 27, 17, 51, 25, 11, 33, 35, 41, 59, 49]])


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits.float()
    return found


def assert_close(found: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    assert float((found - expected).norm()) <= relative * float(expected.norm())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Unquantized checkpoints, made once."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def write(architecture: str, dtype: torch.dtype = torch.float32) -> Path:
        if (architecture, dtype) not in made:
            made[architecture, dtype] = write_model(tmp_path_factory.mktemp("model"), architecture, dtype)
        return made[architecture, dtype]

    return write


@pytest.fixture(scope="module")
def int4_llama(source: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int4") / "out"
    fewbits.quantize(source("llama"), out, QuantConfig(Int4Asymmetric(32)))
    return out


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3"])
def test_logits_are_those_of_the_decoded_model(
    architecture: str, name: str, source: Callable[..., Path], tmp_path: Path
) -> None:
    fewbits.quantize(source(architecture), tmp_path / "out", QuantConfig(METHODS[name]))
    model = fewbits.load(tmp_path / "out")
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(linears) == 2 * 7
    assert model.load_notes == ()
    # fp32 scales: weights are the same to the bit, sums differ in their order. Rounded activations may flip by a step
    # of 1/127 of the token's largest (fp8: by 1/16 of the number) in a few places.
    bound = {"int8": 1e-2, "fp8": 6e-2}.get(name, 1e-4)
    assert_close(logits(model), logits(decoded_model(tmp_path / "out")), bound)


@pytest.mark.parametrize("architecture", ["llama-tied", "qwen2", "gemma3", "mixtral", "gpt2"])
def test_an_unquantized_checkpoint_is_the_model_of_transformers(architecture: str, source: Callable[..., Path]) -> None:
    model = fewbits.load(source(architecture))
    expected = AutoModelForCausalLM.from_pretrained(source(architecture)).eval()
    assert_close(logits(model), logits(expected), 1e-5)
    assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr() or (
        not model.config.tie_word_embeddings
    )


def test_bf16_stays_bf16_and_close(source: Callable[..., Path], tmp_path: Path) -> None:
    fewbits.quantize(source("llama", torch.bfloat16), tmp_path / "out", QuantConfig(Int4Asymmetric(32)))
    model = fewbits.load(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    # Two blocks of some ten roundings to 8 bits each.
    assert_close(logits(model), logits(decoded_model(tmp_path / "out")), 20 * 2.0**-8)


def test_weights_stay_packed_in_memory(int4_llama: Path) -> None:
    model = fewbits.load(int4_llama)
    layer = model.model.layers[0].mlp.up_proj
    packed = sum(buffer.numel() * buffer.element_size() for buffer in layer.buffers())
    # 128 × 64 weights: half a byte each, and for each 32 a fp32 scale and a zero point of a byte.
    assert packed == 128 * 64 // 2 + 128 * 2 * (4 + 1)
    assert "model.layers.0.mlp.up_proj.weight" not in dict(model.named_parameters())


def test_generate_hooks_and_repr_work_as_on_any_model(int4_llama: Path) -> None:
    model = fewbits.load(int4_llama)
    seen = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *call: seen.append(call[2].shape))
    written = model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    handle.remove()
    assert written.shape == (1, IDS.shape[1] + 3)
    assert len(seen) == 3 and seen[0] == (1, IDS.shape[1], 64)
    assert "int4 asymmetric group 32" in repr(model) and "kernels by tokens" in repr(model)
    assert model.generation_config.eos_token_id == 1


def test_a_state_dict_and_a_copy_bring_everything_along(int4_llama: Path) -> None:
    model, other = fewbits.load(int4_llama), fewbits.load(int4_llama)
    expected = logits(model)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), expected)
    assert torch.equal(logits(copy.deepcopy(model)), expected)


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_what_is_saved_is_the_packed_checkpoint(architecture: str, source: Callable[..., Path], tmp_path: Path) -> None:
    fewbits.quantize(source(architecture), tmp_path / "out", QuantConfig(Int4Asymmetric(32)))
    model = fewbits.load(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    first = {}
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        first |= load_file(file)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(logits(fewbits.load(tmp_path / "again")), logits(model))


def test_stacked_experts_are_decoded_and_said(source: Callable[..., Path], tmp_path: Path) -> None:
    fewbits.quantize(source("mixtral"), tmp_path / "out", QuantConfig(Int4Asymmetric(32)))
    model = fewbits.load(tmp_path / "out")
    assert_close(logits(model), logits(decoded_model(tmp_path / "out")), 1e-4)
    assert isinstance(model.model.layers[0].self_attn.q_proj, QuantLinear)
    assert any("experts" in note.layer and note.what == "decoded to float32" for note in model.load_notes)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "again")


def other_layout(folder: Path, out: Path, name: str) -> dict[str, torch.Tensor]:
    """A checkpoint in another layout, from a Llama's weights; returns the weights that it holds."""
    tensors = load_file(folder / "model.safetensors")
    chosen = FORMATS[name]
    stored, decoded, schemes = {}, {}, {}
    for key, tensor in tensors.items():
        module = key.removesuffix(".weight")
        if "_proj" not in key:
            stored[key] = tensor
            continue
        weight = rounded(tensor.half(), GPTQ(4, 32, symmetric=False))
        stored |= chosen.encode(module, weight, weight.shape)
        decoded[key], schemes[module] = weight.dequantize(torch.float32), weight.method.scheme
    out.mkdir()
    save_file({key: value.contiguous() for key, value in stored.items()}, out / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": chosen.quantization_config(schemes)}))
    return decoded


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "awq"])
def test_layouts_of_others_load_packed(name: str, source: Callable[..., Path], tmp_path: Path) -> None:
    decoded = other_layout(source("llama"), tmp_path / "out", name)
    model = fewbits.load(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(source("llama")).eval()
    with torch.no_grad():
        for key, value in decoded.items():
            plain.get_parameter(key).copy_(value)
    assert isinstance(model.model.layers[0].self_attn.q_proj, QuantLinear)
    assert_close(logits(model), logits(plain), 1e-4)


def test_activation_order_loads(source: Callable[..., Path], tmp_path: Path) -> None:
    decoded = other_layout(source("llama"), tmp_path / "out", "gptq")
    file = tmp_path / "out" / "model.safetensors"
    stored = load_file(file)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    name = "model.layers.0.self_attn.q_proj"
    # Column j of the file is now what column order[j] was: groups follow their columns.
    words = stored[f"{name}.qweight"]
    codes = torch.stack([(words >> shift) & 15 for shift in range(0, 32, 4)], 1).reshape(64, -1)[order]
    packed = sum(codes.view(8, 8, -1)[:, i].long() << (4 * i) for i in range(8))
    stored[f"{name}.qweight"] = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    stored[f"{name}.g_idx"] = stored[f"{name}.g_idx"][order]
    save_file(stored, file, {"format": "pt"})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    layer = fewbits.load(tmp_path / "out").model.layers[0].self_attn.q_proj
    torch.testing.assert_close(layer.dequantize(torch.float32), decoded[f"{name}.weight"][:, order])
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), x @ decoded[f"{name}.weight"][:, order].t(), rtol=1e-4, atol=1e-5)


def test_a_head_of_another_scheme_and_a_skipped_layer(source: Callable[..., Path], tmp_path: Path) -> None:
    tensors = load_file(source("llama", torch.bfloat16) / "model.safetensors")
    config = json.loads((source("llama", torch.bfloat16) / "config.json").read_text())
    linears = [name.removesuffix(".weight") for name in tensors if "_proj" in name]
    methods: dict[str, QuantMethod | None] = dict.fromkeys(linears, GPTQ(2, 16))
    methods |= {linears[0]: None, linears[1]: GPTQ(8, 32, symmetric=False), "lm_head": Int8Symmetric(activations=None)}
    write_quantized(tmp_path, tensors, methods, config)
    model = fewbits.load(tmp_path, dtype=torch.float32)
    assert type(model.get_submodule(linears[0])) is torch.nn.Linear
    assert isinstance(model.lm_head, QuantLinear)
    # The decoded model's weights are rounded to bf16 once more.
    assert_close(logits(model), logits(decoded_model(tmp_path)), 2.0**-6)


def test_a_config_as_llm_compressor_writes_it_is_read(int4_llama: Path, tmp_path: Path) -> None:
    for file in int4_llama.iterdir():
        if file.name != "fewbits.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = {
        "actorder": None, "block_structure": None, "dynamic": False, "group_size": 32, "num_bits": 4,
        "observer": "minmax", "observer_kwargs": {}, "scale_dtype": None, "strategy": "group", "symmetric": False,
        "type": "int", "zp_dtype": "torch.int8",
    }  # fmt: skip
    group = {
        "format": "pack-quantized", "input_activations": None, "output_activations": None, "targets": ["Linear"],
        "weights": weights,
    }  # fmt: skip
    config_says(
        quantization_config={
            "config_groups": {"group_0": group}, "format": "pack-quantized", "global_compression_ratio": None,
            "ignore": ["lm_head"], "kv_cache_scheme": None, "quant_method": "compressed-tensors",
            "quantization_status": "compressed", "sparsity_config": {}, "transform_config": {}, "version": "0.13.0",
        }
    )(tmp_path)  # fmt: skip
    model = fewbits.load(tmp_path)
    assert isinstance(model.model.layers[1].mlp.down_proj, QuantLinear)
    assert torch.equal(logits(model), logits(fewbits.load(int4_llama)))


def config_says(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def without(part: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for file in folder.glob("*.safetensors"):
            tensors = load_file(file)
            if any(part in name for name in tensors):
                save_file({n: t for n, t in tensors.items() if part not in n}, file, {"format": "pt"})
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"] = {n: f for n, f in index["weight_map"].items() if part not in n}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def foreign_scheme(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 5
    (folder / "config.json").write_text(json.dumps(config))


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "unknown format": (config_says(quantization_config={"quant_method": "exl3"}), "quantization method 'exl3'"),
    "unknown scheme": (foreign_scheme, "5"),
    "missing scales": (without("layers.1.mlp.up_proj.weight_scale"), "layers.1.mlp.up_proj"),
    "missing norm": (without("layers.1.input_layernorm"), "no weights for model.layers.1.input_layernorm.weight of"),
    "another width": (config_says(hidden_size=32), "the model's config says"),
    "another depth": (config_says(num_hidden_layers=3), "no weights for model.layers.2."),
    "another architecture": (config_says(model_type="gpt2"), "GPT2LMHeadModel; .* is there"),
    "unknown architecture": (config_says(model_type="nonesuch"), "transformers cannot build this model"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_is_refused_by_name(case: str, int4_llama: Path, tmp_path: Path) -> None:
    for file in int4_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change, message = BAD[case]
    change(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        fewbits.load(tmp_path)


def test_codes_without_scales_do_not_pass_for_weights(source: Callable[..., Path], tmp_path: Path) -> None:
    fewbits.quantize(source("llama"), tmp_path / "out", QuantConfig(Int8Symmetric()))
    without("layers.1.mlp.up_proj.weight_scale")(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is I8 \[128, 64\], and no scales are stored beside it"):
        fewbits.load(tmp_path / "out")


def test_fewer_layers_than_the_files_hold_is_said(int4_llama: Path, tmp_path: Path) -> None:
    for file in int4_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config_says(num_hidden_layers=1)(tmp_path)
    assert {note.what for note in fewbits.load(tmp_path).load_notes} == {"left out"}


@pytest.mark.parametrize("device", ["cdua", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device: str, int4_llama: Path) -> None:
    with pytest.raises(KernelError, match=device):
        fewbits.load(int4_llama, device)


def test_no_kernel_names_the_layer_and_every_reason(int4_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    def none(spec: Any) -> Any:
        raise KernelError("no kernel multiplies these: a: too old; b: too new")

    monkeypatch.setattr(importlib.import_module("fewbits.load"), "choose", none)
    with pytest.raises(KernelError, match=r"model\.layers\.0\.\S+: no kernel .* a: too old; b: too new"):
        fewbits.load(int4_llama)


def test_too_little_memory_is_found_before_anything_is_read(int4_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    monkeypatch.setattr(importlib.import_module("fewbits.load"), "free_bytes", lambda device: 10 * 2**20)
    read = os.preadv

    def only_shapes(descriptor: int, views: list[memoryview], offset: int) -> int:
        assert len(views[0]) <= 16, "data was read"
        return read(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", only_shapes)
    with pytest.raises(KernelError, match=r"of packed weights and .* of others, .*; 0\.01 GiB are free"):
        fewbits.load(int4_llama)
