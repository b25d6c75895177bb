"""The sweep and the descent against loops written from the formulas, in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewbits.kernels.gptq_descent import descend_block
from fewbits.kernels.gptq_sweep import sweep_block
from fewbits.packing import decode_codes
from fewbits.schemes import Scheme
from fewbits.solvers import gptq
from fewbits.solvers.gptq_options import GptqOptions


def problem(columns: int, rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [rows, columns] and a Gram of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixing
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs


def loss_of(W: torch.Tensor, decoded: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    missed = (W - decoded).double()
    return ((missed @ H.double()) * missed).sum(1)


@pytest.mark.parametrize("rows", [1, 63, 64, 130])
def test_each_row_keeps_the_grid_whose_sweep_loses_least(rows: int) -> None:
    W, H = problem(16, rows)
    factor = torch.linalg.cholesky(torch.linalg.inv(H.double()), upper=True)
    scales = torch.stack([torch.full((rows,), scale) for scale in (0.5, -0.3, 0.4)])
    zeros = torch.stack([torch.full((rows,), zero) for zero in (8.0, 8.0, 3.0)])
    codes, errors, chosen, losses = sweep_block(W.T.contiguous(), factor.float(), scales, zeros, 15)
    for row in range(rows):
        expected = []
        for scale, zero in zip(scales[:, row].double(), zeros[:, row].double(), strict=True):
            w, missed, code = W[row].double().clone(), np.zeros(16), np.zeros(16)
            for j in range(16):
                code[j] = float((w[j] / scale).round().clamp(-zero, 15 - zero) + zero)
                missed[j] = float((w[j] - (code[j] - zero) * scale) / factor[j, j])
                w[j + 1 :] -= missed[j] * factor[j, j + 1 :]
            expected.append((float((missed**2).sum()), code, missed))
        least = min(range(3), key=lambda grid: expected[grid][0])
        assert int(chosen[row]) == least
        assert codes[:, row].tolist() == expected[least][1].tolist()
        np.testing.assert_allclose(errors[:, row].numpy(), expected[least][2], rtol=1e-3, atol=1e-4)
        assert float(losses[row]) == pytest.approx(expected[least][0], rel=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_descent_tells_exactly_what_it_gained_and_ends_where_no_single_change_helps(groups: int) -> None:
    rows, columns = 70, 32
    W, H = problem(columns, rows)
    scales = torch.linspace(-0.6, 0.7, rows).add(0.01).repeat(groups, 1)
    zeros, span = 8, columns // groups
    wide = scales.repeat_interleave(span, 0)
    codes = (W.T / wide).round().add(zeros).clamp(0, 15).to(torch.uint8)

    def loss() -> torch.Tensor:
        return loss_of(W, ((codes.float() - zeros) * wide).T, H)

    before, gained = loss(), torch.zeros(rows, dtype=torch.float64)
    misses = W.T - (codes.float() - zeros) * wide
    for _ in range(50):
        gained += descend_block(H @ misses, H, scales, 15, codes, misses)
    after = loss()
    torch.testing.assert_close(before - after, gained, rtol=1e-3, atol=1e-2)
    for j in range(columns):
        for change in (-1, 1):
            allowed = (codes[j].int() + change >= 0) & (codes[j].int() + change <= 15)
            codes[j] = (codes[j].int() + change).to(torch.uint8)
            assert bool((loss() >= after * (1 - 1e-4))[allowed].all())
            codes[j] = (codes[j].int() - change).to(torch.uint8)


@pytest.mark.parametrize("group_size", [0, 32, 64, 192])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_pass_of_descent_lowers_the_loss_of_every_row(group_size: int, symmetric: bool) -> None:
    W, H = problem(192, 40)
    scheme = Scheme("int", 4, symmetric, group_size)
    losses = []
    for passes in (0, 1, 3):
        solution = gptq.solve(W, scheme, torch.bfloat16, H, GptqOptions(passes=passes))
        losses.append(loss_of(W, decode_codes(solution.codes, solution.scales, solution.zeros, scheme), H))
        assert solution.output_error is not None
        torch.testing.assert_close(solution.output_error, losses[-1], rtol=1e-2, atol=1e-3 * float(losses[-1].max()))
    # By the damped H exactly, by H itself nearly.
    assert bool((losses[1] <= losses[0] * 1.02).all()) and bool((losses[2] <= losses[1] * 1.02).all())
    assert losses[2].sum() < 0.95 * losses[0].sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_chosen_by_sweeping_lose_less_than_those_chosen_by_rounding(symmetric: bool) -> None:
    W, H = problem(256, 64)
    scheme = Scheme("int", 4, symmetric, 64)
    rounded = gptq.solve(W, scheme, torch.bfloat16, H, GptqOptions(swept=None, passes=0))
    swept = gptq.solve(W, scheme, torch.bfloat16, H, GptqOptions(passes=0))
    assert loss_of(W, swept.decoded, H).sum() < loss_of(W, rounded.decoded, H).sum()
