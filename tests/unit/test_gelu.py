"""GELU on the own kernel against torch's in fp64, found without its name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

from fewbits.gelu import use_own_gelu
from fewbits.kernels.lanes import HAS_BF16
from tiny_transformers import tiny_model

pytestmark = pytest.mark.skipif(not HAS_BF16, reason="this processor does not round to bf16 itself")


@pytest.mark.parametrize("shape", [(0, 4), (1,), (31,), (3, 33), (64, 1000), (2, 3, 4096)])
@pytest.mark.parametrize("name", ["gelu_pytorch_tanh", "gelu_new"])
def test_values_and_gradients_are_those_in_fp64(name: str, shape: tuple[int, ...]) -> None:
    module = nn.Sequential(ACT2FN[name])
    assert use_own_gelu(module) == 1
    generator = torch.Generator().manual_seed(0)
    x = (4 * torch.randn(shape, generator=generator)).bfloat16()
    pull = torch.randn(shape, generator=generator).bfloat16()
    entered, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    found, expected = module(entered), functional.gelu(exact, approximate="tanh")
    (gradient,) = torch.autograd.grad(found, entered, pull)
    (exact_gradient,) = torch.autograd.grad(expected, exact, pull.double())
    for own, reference in ((found, expected), (gradient, exact_gradient)):
        assert own.shape == shape and own.dtype == torch.bfloat16
        assert bool(((own.double() - reference).abs() <= reference.abs() * 2**-8 + 1e-6).all())


def test_what_lies_apart_in_memory_and_other_dtypes_are_taken_as_well() -> None:
    module, plain = nn.Sequential(nn.GELU(approximate="tanh")), nn.GELU(approximate="tanh")
    use_own_gelu(module)
    x = torch.randn(70, 50).bfloat16()
    assert torch.allclose(module(x.T[3:]).float(), plain(x.T[3:]).float(), rtol=2**-7, atol=1e-6)
    assert torch.equal(module(x.float()), plain(x.float()))


def test_only_gelus_are_taken() -> None:
    others = nn.Sequential(nn.GELU(), nn.SiLU(), nn.ReLU(), nn.Identity(), nn.Dropout(), nn.Linear(3, 3), nn.Softmax(0))
    assert use_own_gelu(others) == 0
    assert use_own_gelu(tiny_model("gemma3")) == 2
    assert use_own_gelu(tiny_model("llama")) == 0
