"""Perplexity, KL and agreement against loops in NumPy, on a tiny random Llama."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import fewbits
from fewbits import CheckpointError, Int4Asymmetric, Int8Symmetric, QuantConfig, QuantizationError
from fewbits.metrics.divergence import token_divergence
from tiny_llama import TEXT, small_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama(tmp_path_factory.mktemp("llama") / "model")


def log_softmax(logits: Any) -> Any:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - math.log(np.exp(shifted).sum())


def test_divergence_is_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 5, 11, generator=generator) * 3
    following = torch.tensor([0, 10, 3, 3, 7])
    found = token_divergence(p, q, following)
    for position in range(5):
        log_p, log_q = log_softmax(p[position].numpy()), log_softmax(q[position].numpy())
        kl = sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))
        assert found.kl[position].item() == pytest.approx(kl, rel=1e-4)
        assert found.nll_reference[position].item() == pytest.approx(-log_p[following[position]], rel=1e-5)
        assert found.nll[position].item() == pytest.approx(-log_q[following[position]], rel=1e-5)
        assert found.agrees[position].item() == float(log_p.argmax() == log_q.argmax())


def test_the_original_against_itself_loses_nothing(llama: Path) -> None:
    found = fewbits.evaluate(llama, llama, TEXT, windows=2, length=32)
    assert (found.kl, found.top1, found.tokens) == (pytest.approx(0, abs=1e-7), 1.0, 2 * 31)
    assert found.perplexity == found.perplexity_reference


def test_weight_only_figures_are_those_of_transformers_with_decoded_weights(llama: Path, tmp_path: Path) -> None:
    fewbits.quantize(llama, tmp_path / "out", QuantConfig(Int4Asymmetric(32)))
    found = fewbits.evaluate(llama, tmp_path / "out", TEXT, windows=2, length=32)
    original = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    other = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.tensor([int(word[1:]) + 2 for word in TEXT.split()])[:64].view(2, 32)
    kl, nll, nll_reference = [], [], []
    for window in ids:
        with torch.no_grad():
            p, q = original(window[None]).logits[0].numpy(), other(window[None]).logits[0].float().numpy()
        for position in range(31):
            log_p, log_q = log_softmax(p[position]), log_softmax(q[position])
            kl.append(float((np.exp(log_p) * (log_p - log_q)).sum()))
            nll_reference.append(-log_p[window[position + 1]])
            nll.append(-log_q[window[position + 1]])
    assert found.kl == pytest.approx(np.mean(kl), rel=2e-3)
    assert found.perplexity == pytest.approx(math.exp(np.mean(nll)), rel=1e-3)
    assert found.perplexity_reference == pytest.approx(math.exp(np.mean(nll_reference)), rel=1e-4)


def test_rounded_activations_cost_something(llama: Path, tmp_path: Path) -> None:
    fewbits.quantize(llama, tmp_path / "w8a8", QuantConfig(Int8Symmetric()))
    fewbits.quantize(llama, tmp_path / "w8a16", QuantConfig(Int8Symmetric(activations=None)))
    with_activations = fewbits.evaluate(llama, tmp_path / "w8a8", TEXT, windows=4, length=64).kl
    weights_only = fewbits.evaluate(llama, tmp_path / "w8a16", TEXT, windows=4, length=64).kl
    assert with_activations > weights_only > 0


def test_too_little_text_says_how_much_there_is(llama: Path) -> None:
    with pytest.raises(QuantizationError) as caught:
        fewbits.evaluate(llama, llama, "w1 w2 w3", windows=1, length=8)
    assert caught.value.message == "the text has 3 tokens; 1 windows of 8 need 8."


def test_another_vocabulary_is_refused(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"vocab_size": 5}')
    with pytest.raises(CheckpointError, match=r"vocabulary of 5 tokens, but .* has 64"):
        fewbits.evaluate(llama, tmp_path / "other", TEXT)
