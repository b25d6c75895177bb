"""Finding linear layers: names and shapes alone must lead to the modules that transformers builds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits.checkpoints.reader import Checkpoint, open_checkpoint
from fewbits.layers import LinearLayer, block_index, find_layers, fusion_groups, natural_order

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"head_dim": 16}
OLD_SIZES = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 160, "n_positions": 64, "bos_token_id": 1}
OPT_SIZES = {"ffn_dim": 96, "word_embed_proj_dim": 32}
DEEPSEEK = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
DEEPSEEK |= {"moe_intermediate_size": 48, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8}
DEEPSEEK |= {"v_head_dim": 16, "qk_nope_head_dim": 8, "num_key_value_heads": 4}

# Config class and options; experts per layer that the file stores one by one.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SIZES),
    "mistral": ("MistralConfig", SIZES),
    "qwen2, tied": ("Qwen2Config", SIZES | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", SIZES | HEADS),
    "qwen3 experts": ("Qwen3MoeConfig", SIZES | HEADS | {"num_experts": 4, "moe_intermediate_size": 48}),
    "qwen2 experts": (
        "Qwen2MoeConfig",
        SIZES | {"num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 96},
    ),
    "mixtral": ("MixtralConfig", SIZES | {"num_local_experts": 4}),
    "deepseek": ("DeepseekV3Config", SIZES | DEEPSEEK),
    "gemma2": ("Gemma2Config", SIZES | HEADS),
    "gemma3": ("Gemma3TextConfig", SIZES | HEADS),
    "phi3": ("Phi3Config", SIZES),
    "gpt2": ("GPT2Config", OLD_SIZES | {"eos_token_id": 2}),
    "gpt2, all square": ("GPT2Config", OLD_SIZES | {"eos_token_id": 2, "n_inner": 64}),
    "opt": ("OPTConfig", SIZES | OPT_SIZES),
    "gpt neox": ("GPTNeoXConfig", SIZES),
    "olmo2": ("Olmo2Config", SIZES),
    "mamba": ("MambaConfig", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 160, "state_size": 8}),
    "vocabulary as wide as the MLP": ("LlamaConfig", SIZES | {"intermediate_size": 160}),
    "experts as many as heads are wide": ("Qwen3MoeConfig", SIZES | {"num_experts": 32, "moe_intermediate_size": 48}),
}


def build(name: str) -> torch.nn.Module:
    config_class, options = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**options)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    assert isinstance(model, torch.nn.Module)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[torch.nn.Module, Checkpoint]]:
    """Builds a tiny random model and saves it as transformers does; once a name."""
    made: dict[str, tuple[torch.nn.Module, Checkpoint]] = {}

    def save(name: str) -> tuple[torch.nn.Module, Checkpoint]:
        if name not in made:
            folder = tmp_path_factory.mktemp("model")
            model = build(name)
            model.save_pretrained(folder)  # type: ignore[operator]
            made[name] = (model, open_checkpoint(folder))
        return made[name]

    return save


def modules_of(model: torch.nn.Module) -> dict[str, tuple[int, int, bool]]:
    """What transformers says: (out, in, transposed) of each linear but the head."""
    found = {}
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            found[name] = (module.out_features, module.in_features, False)
        elif isinstance(module, transformers.pytorch_utils.Conv1D):
            found[name] = (module.nf, module.nx, True)
    return found


def experts_of(model: torch.nn.Module) -> int:
    """How many numbers the fused experts of transformers' modules hold."""
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if ".experts." in name and parameter.dim() == 3
    )


def found_in(checkpoint: Checkpoint) -> list[LinearLayer]:
    return find_layers(checkpoint.headers, checkpoint.config)[0]


@pytest.mark.parametrize("name", MODELS)
def test_the_linears_found_are_those_that_transformers_builds(
    name: str, saved: Callable[[str], tuple[torch.nn.Module, Checkpoint]]
) -> None:
    model, checkpoint = saved(name)
    layers = [layer for layer in found_in(checkpoint) if ".experts." not in layer.name]
    found = {layer.name: (layer.out_features, layer.in_features, layer.transposed) for layer in layers}
    routers = {layer.name for layer in layers if layer.default_skip == "expert router"}
    expected = modules_of(model)
    heads = {"lm_head", "embed_out"}
    assert {n: v for n, v in found.items() if n not in routers | heads} == {
        n: v for n, v in expected.items() if n not in routers
    }
    skipped = {layer.name for layer in layers if layer.default_skip is not None}
    assert skipped - routers <= heads


@pytest.mark.parametrize("name", [name for name in MODELS if "expert" in name or name in ("mixtral", "deepseek")])
def test_experts_are_found_one_by_one_and_routers_left_alone(
    name: str, saved: Callable[[str], tuple[torch.nn.Module, Checkpoint]]
) -> None:
    model, checkpoint = saved(name)
    layers = found_in(checkpoint)
    experts = [layer for layer in layers if ".experts." in layer.name]
    assert sum(layer.out_features * layer.in_features for layer in experts) == experts_of(model) > 0
    assert all(layer.default_skip is None for layer in experts)
    gates = {entry for entry in checkpoint.tensors if entry.endswith((".gate.weight", "_expert_gate.weight"))}
    assert {layer.tensor for layer in layers if layer.default_skip == "expert router"} == gates
    assert gates


@pytest.mark.parametrize("name", ["llama", "gpt neox", "deepseek"])
def test_the_head_is_found_but_left_alone_by_default(
    name: str, saved: Callable[[str], tuple[torch.nn.Module, Checkpoint]]
) -> None:
    heads = [layer for layer in found_in(saved(name)[1]) if layer.default_skip == "output head"]
    assert [(head.out_features, head.block) for head in heads] == [(160, None)]


def layers_and_notes(
    shapes: dict[str, tuple[int, ...]], config: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    layers, notes = find_layers({name: (shape, "BF16") for name, shape in shapes.items()}, config)
    return {layer.name: layer.default_skip for layer in layers}, {note.layer: note.why for note in notes}


def test_fused_experts_and_convolutions_are_carried_over_with_a_note() -> None:
    layers, notes = layers_and_notes(
        {
            "model.layers.0.mlp.experts.gate_up_proj": (8, 64, 192),
            "model.layers.0.mlp.experts.gate_up_proj_bias": (8, 192),
            "model.layers.0.mlp.router.weight": (8, 64),
            "model.layers.0.moe.input_linear.weight": (8, 192, 64),
            "model.layers.0.mixer.conv1d.weight": (128, 1, 4),
            "visual.patch_embed.proj.weight": (32, 3, 2, 8, 8),
            "model.layers.0.ffn.experts.mlp.w1": (768, 64),
            "model.layers.0.mixer.A_log": (128, 8),
            "model.layers.0.attn.bias": (1, 1, 256, 256),
        },
        {"num_local_experts": 8},
    )
    assert layers == {"model.layers.0.mlp.router": "expert router"}
    assert notes == {
        "model.layers.0.mlp.experts.gate_up_proj": "8 experts fused into one tensor [8, 64, 192]",
        "model.layers.0.moe.input_linear": "8 experts fused into one tensor [8, 192, 64]",
        "model.layers.0.mixer.conv1d": "convolution [128, 1, 4]",
        "visual.patch_embed.proj": "convolution [32, 3, 2, 8, 8]",
        "model.layers.0.ffn.experts.mlp.w1": "not named like a linear's weight, shape [768, 64]",
    }


def test_embeddings_of_every_name_are_left_out() -> None:
    leaves = ["model.embed_tokens", "transformer.wte", "transformer.wpe", "shared", "model.decoder.embed_positions"]
    leaves += ["bert.embeddings.token_type_embeddings", "tok_embeddings", "gpt_neox.embed_in", "pos_embed"]
    leaves += ["encoder.block.0.layer.0.SelfAttention.relative_attention_bias", "model.embed_tokens_per_layer"]
    layers, notes = layers_and_notes({f"{leaf}.weight": (160, 64) for leaf in leaves}, {"vocab_size": 160})
    assert (layers, notes) == ({}, {})


def test_projections_of_embeddings_are_linears() -> None:
    names = ["model.per_layer_model_projection", "encoder.embedding_hidden_mapping_in", "model.decoder.project_in"]
    layers, _ = layers_and_notes({f"{name}.weight": (96, 64) for name in names}, {"vocab_size": 160})
    assert layers == dict.fromkeys(names)


def test_heads_are_known_by_name_or_by_the_vocabulary_padding_included() -> None:
    shapes = {
        "lm_head.weight": (32000, 64),
        "proj_out.weight": (32064, 64),
        "score.weight": (2, 64),
        "model.layers.61.shared_head.head.weight": (32000, 64),
        "model.layers.0.mlp.up_proj.weight": (32000, 64),
    }
    layers, _ = layers_and_notes(shapes, {"text_config": {"vocab_size": 32000}})
    heads = {name for name, skip in layers.items() if skip == "output head"}
    assert heads == {"lm_head", "proj_out", "score", "model.layers.61.shared_head.head"}
    assert layers["model.layers.0.mlp.up_proj"] is None


def test_other_modalities_are_left_alone_only_where_the_config_has_them() -> None:
    shapes = {
        "vision_tower.encoder.layers.0.mlp.fc1.weight": (96, 64),
        "model.visual.blocks.0.attn.qkv.weight": (96, 32),
        "audio_tower.layers.0.fc1.weight": (96, 64),
        "multi_modal_projector.linear_1.weight": (64, 32),
        "language_model.model.layers.0.mlp.up_proj.weight": (96, 64),
    }
    layers, _ = layers_and_notes(shapes, {"text_config": {}, "vision_config": {}, "audio_config": {}})
    assert list(layers.values()) == [
        "audio tower",
        None,
        "vision tower",
        "connector between modalities",
        "vision tower",
    ]
    assert set(layers_and_notes(shapes, {})[0].values()) == {None}


def test_adapters_are_left_alone_with_a_note() -> None:
    layers, notes = layers_and_notes({"model.layers.0.q_proj.lora_A.default.weight": (8, 64)}, {})
    assert layers == {}
    assert "merge" in notes["model.layers.0.q_proj.lora_A.default"]


def test_only_floats_of_16_and_32_bits_are_linear_weights() -> None:
    layers, notes = find_layers({f"layers.0.{t}.weight": ((8, 8), t) for t in ("I8", "F64", "BF16", "F16", "F32")}, {})
    assert [layer.kind for layer in layers] == ["BF16", "F16", "F32"]
    assert notes == []


def test_fused_groups_are_the_qkv_and_gate_up_of_one_module(
    saved: Callable[[str], tuple[torch.nn.Module, Checkpoint]],
) -> None:
    groups = fusion_groups(found_in(saved("llama")[1]))
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    assert (attention + "q_proj", attention + "k_proj", attention + "v_proj") in groups
    assert (mlp + "gate_proj", mlp + "up_proj") in groups
    assert len(groups) == 4
    experts = fusion_groups(found_in(saved("mixtral")[1]))
    assert ("model.layers.1.block_sparse_moe.experts.3.w1", "model.layers.1.block_sparse_moe.experts.3.w3") in experts
    assert len(experts) == 2 * (4 + 1)
    assert fusion_groups(found_in(saved("gpt2")[1])) == []


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.7.self_attn.q_proj", 7),
        ("model.language_model.layers.12.mlp.experts.3.w1.weight", 12),
        ("transformer.h.0.attn.c_attn.weight", 0),
        ("lm_head.weight", None),
        ("model.layers." + "9" * 5000, None),
        ("model.layers.²", None),
    ],
)
def test_the_block_is_the_first_number_of_a_name(name: str, block: int | None) -> None:
    assert block_index(name) == block


def test_layers_come_in_natural_order(tmp_path: Path) -> None:
    names = [f"model.layers.{number}.up_proj" for number in (10, 2, 1, 11, 0)]
    layers, _ = layers_and_notes({f"{name}.weight": (8, 8) for name in names}, {})
    assert list(layers) == [f"model.layers.{number}.up_proj" for number in (0, 1, 2, 10, 11)]
    assert sorted(["a.b", "a.1", "a.1.b", "b", "a"], key=natural_order)[0] == "a"
