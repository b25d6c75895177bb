"""Experts that transformers stacks: weights decode as ever, rounded inputs are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fewbits
from fewbits import CheckpointError, Int8Symmetric, QuantConfig
from fewbits.decoded import decoded_model
from tiny_transformers import save_tiny


def test_rounded_inputs_of_stacked_experts_are_refused(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", "mixtral", torch.bfloat16)
    fewbits.quantize(source, tmp_path / "out", QuantConfig(Int8Symmetric()))
    with pytest.raises(CheckpointError, match=r"experts\.0\.w1 rounds its input, but MixtralForCausalLM holds it in"):
        decoded_model(tmp_path / "out")


def test_weights_of_stacked_experts_are_decoded(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", "mixtral", torch.bfloat16)
    fewbits.quantize(source, tmp_path / "out", QuantConfig(Int8Symmetric(activations=None)))
    assert torch.isfinite(decoded_model(tmp_path / "out")(torch.tensor([[1, 2, 3]])).logits).all()
