"""Root mean square norms on own kernels against the models' own modules in fp32, found without their names."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fewbits.kernels.lanes import HAS_BF16
from fewbits.norms import row_lengths, use_own_norms
from tiny_transformers import ARCHITECTURES, tiny_model

pytestmark = pytest.mark.skipif(not HAS_BF16, reason="this processor does not round to bf16 itself")

# Of two blocks and the last norm; some models have norms of queries and keys, and of what a block's parts return.
NORMS = {
    "llama": 5, "qwen2": 5, "qwen3": 9, "mistral": 5, "gemma2": 9, "gemma3": 13, "phi3": 5, "gpt2": 0, "opt": 0,
    "gpt_neox": 0, "olmo2": 9, "mixtral": 5, "qwen3_moe": 9,
}  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_norm_is_found_and_returns_what_it_did(architecture: str) -> None:
    model = tiny_model(architecture).requires_grad_(False)
    exact = copy.deepcopy(model).float()
    assert use_own_norms(model) == NORMS[architecture]
    compared = 0
    for (name, module), reference in zip(model.named_modules(), exact.modules(), strict=True):
        if not hasattr(module, "forward") or "forward" not in vars(module):
            continue
        width = next(module.parameters()).numel()
        x = torch.randn(3, 5, 4, width, generator=torch.Generator().manual_seed(0)).bfloat16()
        pull = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        results = []
        for norm, dtype in ((module, torch.bfloat16), (reference, torch.float32)):
            entered = x.to(dtype).requires_grad_()
            left = norm(entered)
            (gradient,) = torch.autograd.grad(left, entered, pull.to(dtype))
            assert left.dtype == gradient.dtype == dtype, name
            results.append((left.detach().float(), gradient.float()))
        for found, expected in zip(*results, strict=True):
            # Half a unit in the last place of bf16, and what fp32 sums leave.
            assert bool(((found - expected).abs() <= expected.abs() * 2**-8 + 1e-5).all()), name
        compared += 1
    assert compared == NORMS[architecture]


def test_other_dtypes_and_shapes_go_to_the_modules_own_forward() -> None:
    model = tiny_model("llama").requires_grad_(False)
    norm, plain = model.model.norm, copy.deepcopy(model.model.norm)
    use_own_norms(model)
    x = torch.randn(4, norm.weight.numel())
    assert torch.equal(norm(x), plain(x))
    turned = torch.randn(norm.weight.numel(), 4).bfloat16().T
    assert torch.allclose(norm(turned).float(), plain(turned).float(), rtol=2**-7)
    assert norm(x[:0].bfloat16()).shape == (0, norm.weight.numel())


class Scaled(nn.Module):
    """One vector, but no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = 1e-6
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Centred(Scaled):
    """A norm, but of what is left without the mean."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


@pytest.mark.parametrize("module", [Scaled(), Centred(), nn.LayerNorm(8, bias=False), nn.PReLU(8)])
def test_what_is_no_such_norm_is_left_alone(module: nn.Module) -> None:
    assert use_own_norms(nn.Sequential(module)) == 0
    assert "forward" not in vars(module)


def test_lengths_of_rows_are_those_in_fp64() -> None:
    rows = torch.randn(70, 600).bfloat16()
    exact = rows.double().norm(dim=1)
    for given in (rows, rows[:, 5:400], rows.float()):
        expected = exact if given.shape == rows.shape else given.double().norm(dim=1)
        assert torch.allclose(row_lengths(given).double(), expected, rtol=1e-5)
