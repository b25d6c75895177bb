"""Checkpoints in the compressed-tensors format load in transformers with exactly the weights that fewbits decodes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

from fewbits.methods import GPTQ, Fp8E4M3, Int4Asymmetric, Int8Symmetric, QuantMethod
from fewbits.tensors import QuantizedWeight
from tiny_models import write_quantized

METHODS: tuple[QuantMethod, ...] = (
    Int8Symmetric(),
    Int8Symmetric(activations=None),
    Fp8E4M3(),
    Fp8E4M3(activations=None),
    Int4Asymmetric(32),
    Int4Asymmetric("channel"),
    GPTQ(2, 16),
    GPTQ(4, 32),
    GPTQ(8, 32),
    GPTQ(4, "channel"),
    GPTQ(2, 16, symmetric=False),
    GPTQ(8, 32, symmetric=False),
)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def llama(request: pytest.FixtureRequest) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and weights of a random Llama whose outputs of 72 fill no whole words at 2 and 4 bits of 32 rows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=18,
        vocab_size=100,
        tie_word_embeddings=request.param,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    tensors = dict(LlamaForCausalLM(config).to(torch.bfloat16).state_dict())
    if request.param:
        del tensors["lm_head.weight"]
    return config.to_dict(), tensors


def linears(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    return [name.removesuffix(".weight") for name in tensors if "proj" in name and "o_proj" not in name]


def methods_for(tensors: Mapping[str, torch.Tensor], method: QuantMethod) -> dict[str, QuantMethod | None]:
    skipped = dict.fromkeys([name.removesuffix(".weight") for name in tensors if "o_proj" in name])
    head = {"lm_head": None} if "lm_head.weight" in tensors else {}
    return {**dict.fromkeys(linears(tensors), method), **skipped, **head}


def assert_loads_equal(
    folder: Path, tensors: Mapping[str, torch.Tensor], weights: Mapping[str, QuantizedWeight], **options: Any
) -> None:
    """Load, run once (which decodes), and compare every parameter bit for bit."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    logits = model(torch.tensor([[1, 2, 3]])).logits
    assert bool(logits.isfinite().all())
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        expected = weights[module].dequantize() if module in weights else tensor
        assert parameters[name].dtype == torch.bfloat16
        assert torch.equal(parameters[name], expected), name


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_model_of_one_scheme_loads_equal(
    tmp_path: Path, llama: tuple[dict[str, Any], dict[str, torch.Tensor]], method: QuantMethod
) -> None:
    config, tensors = llama
    weights = write_quantized(tmp_path, tensors, methods_for(tensors, method), config)
    assert_loads_equal(tmp_path, tensors, weights)


@pytest.mark.parametrize("method", [method for method in METHODS if not method.scheme.symmetric], ids=str)
def test_an_asymmetric_model_loads_equal_with_decoding_asked_for(
    tmp_path: Path, llama: tuple[dict[str, Any], dict[str, torch.Tensor]], method: QuantMethod
) -> None:
    config, tensors = llama
    weights = write_quantized(tmp_path, tensors, methods_for(tensors, method), config)
    assert_loads_equal(tmp_path, tensors, weights, quantization_config=CompressedTensorsConfig(dequantize=True))


def test_a_model_of_all_symmetric_schemes_at_once_loads_equal(
    tmp_path: Path, llama: tuple[dict[str, Any], dict[str, torch.Tensor]]
) -> None:
    config, tensors = llama
    symmetric = [method for method in METHODS if method.scheme.symmetric]
    methods = methods_for(tensors, symmetric[0])
    methods |= {name: symmetric[number % len(symmetric)] for number, name in enumerate(linears(tensors))}
    if "lm_head.weight" in tensors:
        methods["lm_head"] = Int8Symmetric(activations=None)
    weights = write_quantized(tmp_path, tensors, methods, config)
    assert_loads_equal(tmp_path, tensors, weights)
