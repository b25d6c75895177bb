"""What runs with `--device cuda`, on a device whose memory is apart, where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch

import fewbits
from fewbits import (
    AWQ,
    GPTQ,
    Fp8E4M3,
    Int4Asymmetric,
    Int8Symmetric,
    QuantConfig,
    QuantLinear,
    QuantMethod,
    SmoothQuant,
)  # fmt: skip
from fewbits.generate import Generator, Sampling
from fewbits.progress import Silent
from fewbits.report import Report
from separate_device import SeparateTensor, separate_device
from test_generate import PROMPT
from tiny_llms import write_model
from tiny_transformers import ARCHITECTURES, save_tiny, token_ids

SAMPLES, LENGTH = 96, 64  # more tokens than two micro-batches have
WORDS = " ".join(f"w{(7 * i + i * i % 5) % 60}" for i in range(400))


@pytest.fixture
def device() -> Iterator[str]:
    with separate_device():
        yield "cuda"


def test_nothing_reaches_tensors_of_the_device_by_accident(device: str) -> None:
    here, there = torch.ones(2, 2), torch.zeros(2, 2, device=device)
    assert there.device == torch.device("cuda:0") and there.to(torch.float64).device.type == device
    with pytest.raises(RuntimeError, match="mm: Expected all tensors to be on the same device"):
        here @ there
    with pytest.raises(RuntimeError, match="add_: "):
        here += there
    with pytest.raises(TypeError):
        there.numpy()
    with pytest.raises(TypeError):
        np.asarray(there)
    back = there.cpu()
    back += 1
    assert type(back) is torch.Tensor and torch.equal(back, here) and not bool(there.any())
    leaf = torch.ones(2, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad((leaf.to(device) * 3).cpu().sum(), leaf)
    assert type(gradient) is torch.Tensor and torch.equal(gradient, 3 * here)


def quantized(source: Path, out: Path, method: QuantMethod, device: str, **options: Any) -> Report:
    calibration = {"calibration": source.parent / "ids.npy", "samples": SAMPLES, "length": LENGTH} | options
    return fewbits.quantize(source, out, QuantConfig(method), device=device, **calibration)


def saved(folder: Path, architecture: str) -> Path:
    """A tiny model, beside tokens."""
    save_tiny(folder / "model", architecture)
    np.save(folder / "ids.npy", token_ids(SAMPLES, LENGTH).numpy())
    return folder / "model"


def errors(report: Report) -> list[float]:
    found = [layer.output_error for layer in report.layers if layer.output_error is not None]
    assert len(found) == len(report.layers)
    return found


def assert_like(there: Report, here: Report) -> None:
    """The order of sums in bf16 explains how far errors of layers are apart."""
    assert there.calibration is not None and there.calibration["device"] == "cuda"
    assert errors(there) == pytest.approx(errors(here), rel=0.15)
    assert fmean(errors(there)) == pytest.approx(fmean(errors(here)), rel=0.04)


@pytest.mark.parametrize("architecture", [each for each in ARCHITECTURES if each != "gpt2"])
def test_gptq_of_every_architecture(architecture: str, tmp_path: Path) -> None:
    source = saved(tmp_path, architecture)
    here = quantized(source, tmp_path / "here", GPTQ(4, 16), "cpu")
    with separate_device():
        there = quantized(source, tmp_path / "there", GPTQ(4, 16), "cuda")
    assert_like(there, here)


@pytest.mark.parametrize(
    ("architecture", "method", "options"),
    [
        ("llama", GPTQ(2, 16, symmetric=False), {"importance": "none", "format": "gptq"}),
        ("gemma3", GPTQ(4, 16), {"memory_limit": 1}),
        ("mixtral", GPTQ(4, 16), {"memory_limit": 1}),
        ("qwen3", AWQ(group_size=16), {}),
        ("mixtral", AWQ(group_size=16), {}),
        ("llama", SmoothQuant(), {}),
        ("opt", SmoothQuant(), {}),
    ],
)
def test_other_methods_and_ways(
    architecture: str, method: QuantMethod, options: dict[str, Any], tmp_path: Path
) -> None:
    source = saved(tmp_path, architecture)
    here = quantized(source, tmp_path / "here", method, "cpu", **options)
    with separate_device():
        there = quantized(source, tmp_path / "there", method, "cuda", **options)
    assert_like(there, here)


def test_weights_of_another_dtype_than_the_forwards(device: str, tmp_path: Path) -> None:
    """They are read again where they are solved, and are not on the device then."""
    source = write_model(tmp_path / "model", "llama", torch.float32)
    (tmp_path / "text").write_text(WORDS)
    report = quantized(source, tmp_path / "out", GPTQ(4, 32), device, calibration=tmp_path / "text", samples=4)
    assert max(errors(report)) < 0.05


class StopsAt(Silent):
    """Interrupts calibration once so many linears are done."""

    def __init__(self, linears: int) -> None:
        self.stage, self.left = "", linears

    def begin(self, stage: str, total: int, unit: str) -> None:
        self.stage = stage

    def advance(self, amount: int, detail: str = "") -> None:
        self.left -= amount if self.stage == "calibrating" else 0
        if self.left < 0:
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_to_the_same_bytes(device: str, tmp_path: Path) -> None:
    source = saved(tmp_path, "llama")
    quantized(source, tmp_path / "whole", GPTQ(4, 16), device)
    with pytest.raises(KeyboardInterrupt):
        quantized(source, tmp_path / "out", GPTQ(4, 16), device, progress=StopsAt(10))
    assert quantized(source, tmp_path / "out", GPTQ(4, 16), device).resumed_shards > 0
    weights = [sorted((tmp_path / name).glob("*.safetensors")) for name in ("whole", "out")]
    assert [file.read_bytes() for file in weights[0]] == [file.read_bytes() for file in weights[1]]


def test_a_models_own_text(device: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", "llama", torch.bfloat16)
    report = quantized(source, tmp_path / "out", GPTQ(4, 32), device, calibration="self", samples=8)
    assert report.calibration is not None and report.calibration["tokens"] == 8 * LENGTH and errors(report)


@pytest.mark.parametrize(
    ("method", "kernel"),
    [
        (Int8Symmetric(), "CUDA int8"),
        (Fp8E4M3(), "CUDA fp8"),
        (Int4Asymmetric(32), "reference"),
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_checkpoints_are_loaded_run_and_compared(
    architecture: str, method: QuantMethod, kernel: str, tmp_path: Path
) -> None:
    source = write_model(tmp_path / "model", architecture, torch.bfloat16)
    fewbits.quantize(source, tmp_path / "out", QuantConfig(method))
    with torch.no_grad():
        expected = fewbits.load(tmp_path / "out")(torch.tensor([PROMPT])).logits.float()
    evaluation = fewbits.evaluate(source, tmp_path / "out", WORDS, windows=2, length=64)
    with separate_device():
        model = fewbits.load(tmp_path / "out", device="cuda")
        layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
        assert {name for layer in layers for name in layer.kernels().values()} == {kernel}
        with torch.no_grad():
            logits = model(torch.tensor([PROMPT], device="cuda")).logits
        assert isinstance(logits, SeparateTensor)
        assert float((logits.cpu().float() - expected).norm() / expected.norm()) < 0.02
        for sampling in (Sampling(), Sampling(1.0, 0.9, 3)):
            generation, tokens = Generator(model).stream(PROMPT, 6, sampling, stop=())
            assert len(list(tokens)) == 6 and "on the CPU, not bfloat16 on cuda" in str(generation.short_way)
        compared = fewbits.evaluate(source, tmp_path / "out", WORDS, windows=2, length=64, device="cuda")
    assert (compared.kl, compared.perplexity) == pytest.approx((evaluation.kl, evaluation.perplexity), rel=1e-3)
