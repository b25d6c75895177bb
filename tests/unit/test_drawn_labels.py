"""Labels drawn by the compiled kernel, and their gradients, against softmax and distribution functions in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewbits.kernels.compiling import as_numpy
from fewbits.kernels.drawn_labels import draw_labels
from fewbits.kernels.lanes import HAS_BF16

pytestmark = pytest.mark.skipif(not HAS_BF16, reason="this processor does not round to bf16 itself")


def drawn(logits: torch.Tensor, draws: torch.Tensor) -> tuple[float, torch.Tensor]:
    gradients = torch.full_like(logits, 7.0)
    loss = draw_labels(as_numpy(logits), draws.numpy(), as_numpy(gradients))
    return loss, gradients


@pytest.mark.parametrize("vocabulary", [1, 31, 32, 33, 1000, 4096])
def test_labels_and_gradients_equal_those_in_fp64(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (4 * torch.randn(300, vocabulary, generator=generator)).bfloat16()
    draws = torch.rand(300, generator=generator, dtype=torch.float64)
    loss, gradients = drawn(logits, draws)
    shares = logits.double().softmax(-1)
    labels = torch.searchsorted(shares.cumsum(-1), draws[:, None]).clamp_max_(vocabulary - 1)
    exact = shares.scatter_add(-1, labels, torch.full((300, 1), -1.0, dtype=torch.float64))
    # A draw at the very border of two labels may fall to either.
    like = (gradients.double() - exact).abs().amax(-1) < 1e-2
    assert like.float().mean() > 0.99
    assert bool(((gradients.double() - exact).abs()[like] <= exact.abs()[like] * 2**-8 + 1e-6).all())
    if bool(like.all()):
        assert loss == pytest.approx(float(-shares.gather(-1, labels).log().sum()), rel=1e-5, abs=1e-4)


def test_labels_come_as_often_as_they_are_likely() -> None:
    shares = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    logits = shares.log().bfloat16().expand(4000, 5).contiguous()
    draws = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    _, gradients = drawn(logits, draws)
    counts = (gradients < 0).double().mean(0)
    assert torch.allclose(counts, logits[0].double().softmax(-1), atol=1e-3)


def test_what_cannot_be_is_never_drawn() -> None:
    logits = torch.full((64, 100), float("-inf")).bfloat16()
    logits[:, 57] = 3.0
    draws = torch.linspace(0, 1 - 1e-12, 64, dtype=torch.float64)
    loss, gradients = drawn(logits, draws)
    assert loss == pytest.approx(0.0, abs=1e-6)
    assert bool((gradients.abs() < 1e-6).all())


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_show(number: float) -> None:
    logits = torch.zeros(3, 50).bfloat16()
    logits[1, 20] = number
    loss, gradients = drawn(logits, torch.full((3,), 0.5, dtype=torch.float64))
    assert np.isnan(loss)
    assert bool(torch.isnan(gradients[1]).all()) and bool(torch.isfinite(gradients[[0, 2]]).all())


def test_threads_do_not_change_a_bit() -> None:
    logits = torch.randn(200, 3000, generator=torch.Generator().manual_seed(0)).bfloat16()
    draws = torch.rand(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(drawn(logits, draws))
    finally:
        torch.set_num_threads(before)
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])
