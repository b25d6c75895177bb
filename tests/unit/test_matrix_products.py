"""Products of the calibrated passes: PyTorch's within bf16's rounding, and the same bits on one thread and on two."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from fewbits.kernels.matrix_units import HAS_MATRIX_UNITS
from fewbits.matrix_products import KeptWeight, fits, linear, product


def factors(tokens: int, out: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(tokens, width, generator=generator), torch.randn(out, width, generator=generator)
    return x.bfloat16(), weight.bfloat16()


def on_one_thread_and_two(run: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(run())
    finally:
        torch.set_num_threads(before)
    return found


@pytest.mark.skipif(not HAS_MATRIX_UNITS, reason="products are PyTorch's own")
@pytest.mark.parametrize(
    ("tokens", "out", "width"), [(1, 1, 32), (5, 33, 64), (70, 97, 1056), (130, 200, 2080), (300, 288, 1024)]
)
def test_products_are_off_by_no_more_than_rounding(tokens: int, out: int, width: int) -> None:
    x, weight = factors(tokens, out, width)
    bias = torch.arange(out).bfloat16()
    wide, rows = x.double(), weight.double()
    exact, sums = wide @ rows.T, 2.0**-18 * (wide.abs() @ rows.abs().T + bias.double())
    for found, expected in (
        (linear(x, weight), exact),
        (linear(x, weight, bias), exact + bias.double()),
        (product(x, weight.T.contiguous()), exact),
    ):
        assert bool(((found.double() - expected).abs() <= 2.0**-8 * expected.abs() + sums).all())
    assert linear(x.view(tokens, 1, width), weight).shape == (tokens, 1, out)
    assert linear(x[:0], weight).shape == (0, out)


def test_weights_may_begin_anywhere_in_their_memory() -> None:
    x, weight = factors(40, 70, 96)
    odd = torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view(70, 96)
    assert odd.storage_offset() == 1 and torch.equal(linear(x, odd), linear(x, weight))


def test_a_kept_weight_is_multiplied_again() -> None:
    x, weight = factors(40, 70, 96)
    bias, kept = torch.arange(70).bfloat16(), KeptWeight(weight, torch.arange(70).bfloat16())
    for some in (x, x[:3]):
        assert torch.equal(linear(some, weight, bias, kept), linear(some, weight, bias))


@pytest.mark.parametrize(("tokens", "out", "width"), [(512, 576, 576), (2048, 1536, 576), (512, 576, 1536)])
def test_one_thread_and_two_give_the_same_bits(tokens: int, out: int, width: int) -> None:
    """PyTorch's own differ at these sizes on processors with matrix units."""
    x, weight = factors(tokens, out, width)
    assert torch.equal(*on_one_thread_and_two(lambda: linear(x, weight)))

    def gradient() -> torch.Tensor:
        inputs = x.clone().requires_grad_()
        linear(inputs, weight).sum().backward()
        assert inputs.grad is not None
        return inputs.grad

    assert torch.equal(*on_one_thread_and_two(gradient))


@pytest.mark.parametrize("keeps", [False, True])
def test_gradients_are_those_of_pytorch(keeps: bool) -> None:
    x, weight = factors(40, 96, 64)
    pull = torch.randn(40, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    linear(ours, weight, None, KeptWeight(weight, None) if keeps else None).backward(pull)
    functional.linear(theirs, weight).backward(pull)
    assert ours.grad is not None and theirs.grad is not None
    assert torch.allclose(ours.grad.float(), theirs.grad.float(), rtol=2**-7, atol=2**-7)


def test_whatever_does_not_fit_is_left_to_pytorch() -> None:
    x, weight = factors(3, 5, 31)
    assert not fits(x, weight) and not fits(x.float(), weight.float())
    assert torch.equal(linear(x, weight), functional.linear(x, weight))
