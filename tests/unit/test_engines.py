"""What engines make of a plan, and why not."""

from __future__ import annotations

import pytest

from fewbits.engines import EngineSupport, PlannedScheme, engine_support
from fewbits.schemes import Scheme

W8A8 = Scheme("int", 8, True, activations="dynamic")
FP8 = Scheme("float", 8, True, activations="dynamic")


def support(
    *schemes: Scheme, out_features: int = 128, unlike: list[str] | None = None, format: str = "compressed-tensors"
) -> dict[str, EngineSupport]:
    layers = [PlannedScheme(f"layers.{i}.up_proj", out_features, 256, scheme) for i, scheme in enumerate(schemes)]
    return {row.engine: row for row in engine_support(layers, unlike or [], format)}


@pytest.mark.parametrize(
    ("scheme", "gpu", "cpu"),
    [
        (W8A8, "fast", "fast"),
        (FP8, "fast", "loads"),
        (Scheme("int", 4, False, 128), "fast", "fast"),
        (Scheme("int", 4, True, 256), "loads", "fast"),
        (Scheme("int", 2, True, 32), "no", "no"),
        (Scheme("int", 8, True), "fast", "no"),
        (Scheme("int", 8, False, 32), "no", "no"),
        (Scheme("float", 8, True), "fast", "no"),
    ],
    ids=str,
)
def test_verdicts_of_vllm(scheme: Scheme, gpu: str, cpu: str) -> None:
    found = support(scheme)
    assert (found["vLLM (GPU)"].verdict, found["vLLM (CPU)"].verdict) == (gpu, cpu)
    assert found["transformers"].loads


def test_a_reason_names_the_first_layer_and_counts_the_others() -> None:
    reasons = support(*[Scheme("int", 4, True, 128)] * 3, out_features=100)["vLLM (GPU)"].reasons
    assert reasons == ("100 outputs are no multiple of 64 (layers.0.up_proj and 2 more)",)


def test_fused_layers_of_unlike_schemes_stop_engines_that_fuse() -> None:
    found = support(W8A8, FP8, unlike=["q_proj, k_proj, v_proj"])
    assert {name for name, row in found.items() if not row.loads} == {
        "vLLM (GPU)", "vLLM (CPU)", "SGLang (GPU)", "llama.cpp",
    }  # fmt: skip


def test_asymmetric_layers_beside_others_do_not_load_in_transformers() -> None:
    assert not support(Scheme("int", 4, False, 32), W8A8)["transformers"].loads
    assert support(Scheme("int", 4, False, 32))["transformers"].loads
    assert support(Scheme("int", 4, True, 32), W8A8)["transformers"].loads


@pytest.mark.parametrize(
    ("format", "scheme", "gpu", "cpu"),
    [
        ("gptq", Scheme("int", 4, True, 128), "fast", "fast"),
        ("gptq", Scheme("int", 4, True), "fast", "fast"),
        ("gptq", Scheme("int", 4, True, 256), "no", "no"),
        ("gptq", Scheme("int", 8, True, 128), "fast", "no"),
        ("gptq", Scheme("int", 3, True, 128), "no", "no"),
        ("gptq_v2", Scheme("int", 4, False, 128), "no", "no"),
        ("awq", Scheme("int", 4, False, 128), "fast", "fast"),
        ("awq", Scheme("int", 4, False, 256), "loads", "fast"),
    ],
    ids=str,
)
def test_verdicts_of_vllm_on_other_layouts(format: str, scheme: Scheme, gpu: str, cpu: str) -> None:
    found = support(scheme, format=format)
    assert (found["vLLM (GPU)"].verdict, found["vLLM (CPU)"].verdict) == (gpu, cpu)
    assert found["transformers"].reasons == ("needs gptqmodel (layers.0.up_proj)",)
    assert found["llama.cpp"].reasons == (f"reads GGUF, not {format}",)


def test_the_cpu_kernels_of_other_layouts_take_whole_panels() -> None:
    reasons = support(Scheme("int", 4, False, 128), out_features=72, format="awq")["vLLM (CPU)"].reasons
    assert reasons == ("72 outputs are no multiple of 32 (layers.0.up_proj)",)
