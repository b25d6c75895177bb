"""The sweep and the descent against loops written from the formulas, in fp64."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import pytest
import torch

from fewbits.kernels.curvature import curvature_of
from fewbits.kernels.feedback import Feedback, feedback_of, norms
from fewbits.kernels.gptq_rows import ChosenRows, choose_rows
from fewbits.kernels.lanes import HAS_BF16
from fewbits.kernels.quadratic import quadratic, squares
from fewbits.numerics import candidate_grids
from fewbits.packing import decode_codes
from fewbits.schemes import Scheme
from fewbits.search import SweptSearch
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


# What products of numbers that are rounded to bf16, or else of fp32 numbers, may be off by, relatively.
ROUNDING = 2**-8 if HAS_BF16 else 2**-20


def upper_factor(H: torch.Tensor) -> torch.Tensor:
    """M in fp64, upper triangular, M Mᵀ = H."""
    return torch.linalg.cholesky(H.double().flip(0, 1)).flip(0, 1)


def feedback_by(H: torch.Tensor, group: int) -> Feedback:
    return feedback_of(upper_factor(H).flip(0, 1).float().contiguous(), group)


def swept_in_fp64(
    w: torch.Tensor, U: torch.Tensor, group: int, scheme: Scheme, search: SweptSearch
) -> tuple[list[int], list[float], list[float], float]:
    """Codes, scales, zero points and loss of one row, its columns in order: every candidate of every group is swept."""
    w, codes, scales, zeros, loss = w.double().clone(), [], [], [], 0.0
    span = Scheme("int", scheme.bits, scheme.symmetric, group)
    signs = 2 if scheme.symmetric else 1
    for start in range(0, len(w), group):

        def swept(factor: float, sign: int, start: int = start, w: torch.Tensor = w) -> tuple[Any, ...]:
            grids = candidate_grids(w[None, start : start + group].float(), span, torch.bfloat16, [factor])
            scale, zero = grids[0][sign, 0].double(), grids[1][sign, 0].double()
            left, chosen, total = w.clone(), [], 0.0
            for j in range(start, start + group):
                code = (left[j] / scale).round().clamp(-zero, scheme.largest_code - zero)
                missed = (left[j] - code * scale) / U[j, j]
                left[j + 1 :] -= missed * U[j, j + 1 :]
                chosen.append(int(code + zero))
                total += float(missed**2)
            return total, factor, sign, chosen, float(scale), float(zero), left

        best = min((swept(factor, sign) for factor in search.factors() for sign in range(signs)), key=itemgetter(0))
        third = (search.factors()[0] - search.factors()[1]) / 3
        near = [-third, -2 * third] if best[1] == 1 else [third, -third]
        best = min(best, *(swept(best[1] + step, best[2]) for step in near), key=itemgetter(0))
        total, _, _, chosen, scale, zero, w = best
        loss += total
        codes += chosen
        scales.append(scale)
        zeros.append(zero)
    return codes, scales, zeros, loss


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "group", "bits"), [(1, 16, 4), (33, 32, 4), (70, 12, 3), (32, 7, 2)])
def test_each_group_of_each_row_keeps_the_grid_whose_sweep_loses_least(
    rows: int, group: int, bits: int, symmetric: bool
) -> None:
    width, scheme = 4 * group, Scheme("int", bits, symmetric, group)
    W, H = problem(width, rows)
    U = torch.linalg.cholesky(torch.linalg.inv(H.double()), upper=True)
    order = torch.arange(width).view(4, group).flip(0).reshape(-1)
    scales, zeros = torch.empty(rows, 4), torch.empty(rows, 4, dtype=torch.uint8)
    search = SweptSearch(steps=3, narrowest=0.7)
    # So few columns are one block.
    chosen = choose_rows(
        W, order, feedback_by(H, group), None, scheme, torch.bfloat16, search, 3, scales, zeros
    )  # fmt: skip
    codes, losses = chosen.codes, chosen.losses
    assert chosen.scales is scales and chosen.zeros is zeros
    same = 0
    for row in range(rows):
        exact = swept_in_fp64(W[row, order], U, group, scheme, search)
        # A weight within fp32's error of a half may fall on the other side, after which its row goes its own way.
        if codes[row, order].tolist() == exact[0]:
            same += 1
            assert scales[row].flip(0).tolist() == exact[1] and zeros[row].flip(0).tolist() == exact[2]
            assert float(losses[row]) == pytest.approx(exact[3], rel=1e-3)
    assert same >= 0.9 * rows


@pytest.mark.parametrize("width", [1, 64, 128])
def test_given_grids_are_swept_as_they_come(width: int) -> None:
    rows, scheme = 40, Scheme("int", 4, False, 0)
    W, H = problem(width, rows)
    U = torch.linalg.cholesky(torch.linalg.inv(H.double()), upper=True)
    scales = torch.linspace(0.2, 0.5, rows)[:, None].clone()
    zeros = torch.full((rows, 1), 7, dtype=torch.uint8)
    order = torch.randperm(width, generator=torch.Generator().manual_seed(1))
    given = scales.clone()
    chosen = choose_rows(W, order, feedback_by(H, 0), None, scheme, torch.bfloat16, None, 0, scales, zeros)
    codes = chosen.codes
    assert torch.equal(scales, given)
    left, expected = W[:, order].double().clone(), torch.empty(rows, width)
    for j in range(width):
        code = (left[:, j] / given[:, 0].double()).round().clamp(-7, 8)
        missed = (left[:, j] - code * given[:, 0].double()) / U[j, j]
        left[:, j + 1 :] -= missed[:, None] * U[j, j + 1 :]
        expected[:, order[j]] = (code + 7).float()
    assert (codes.float() == expected).all(1).float().mean() > 0.9


@pytest.mark.parametrize(("width", "group"), [(129, 43), (400, 0), (400, 40), (384, 96), (513, 27), (640, 160)])
def test_blocks_take_up_what_all_columns_before_them_push(width: int, group: int) -> None:
    rows, scheme = 70, Scheme("int", 4, False, group)
    W, H = problem(width, rows)
    H.diagonal().add_(0.01 * H.diagonal().mean())
    M = upper_factor(H)
    U = torch.linalg.inv(M)
    groups = width // (group or width)
    # A step of every row and group, in fp64 and as it is swept; codes are free enough that none is clamped.
    scales = torch.linspace(0.3, 0.6, rows)[:, None].repeat(1, groups)
    zeros = torch.full((rows, groups), 8, dtype=torch.uint8)
    order = torch.arange(width)
    feedback = feedback_by(H, group)
    chosen = choose_rows(W, order, feedback, None, scheme, torch.bfloat16, None, 0, scales, zeros)
    codes, losses = chosen.codes, chosen.losses
    left, exact = W.double().clone(), torch.zeros(rows, dtype=torch.float64)
    step = scales[:, :1].double()
    for j in range(width):
        missed = (left[:, j] - (left[:, j] / step[:, 0]).round().clamp(-8, 7) * step[:, 0]) / U[j, j]
        left[:, j + 1 :] -= missed[:, None] * U[j, j + 1 :]
        exact += missed.square()
    decoded = (codes.double() - 8) * step
    # Of the codes that were chosen: what they lose is what is told, and each row loses about as much as in fp64.
    told = ((W.double() - decoded) @ M).square().sum(1)
    torch.testing.assert_close(losses, told, rtol=8 * ROUNDING, atol=0)
    assert float(losses.sum()) == pytest.approx(float(exact.sum()), rel=0.02)
    norm = (W.double() @ M).square().sum(1)
    torch.testing.assert_close(norms(W, order, feedback), norm, rtol=ROUNDING, atol=0)
    torch.testing.assert_close(chosen.missed, (W - decoded).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("rows", "columns", "groups"), [(70, 32, 1), (70, 32, 2), (5, 150, 3), (33, 129, 1)])
def test_descent_tells_exactly_what_it_gained_and_ends_where_no_single_change_helps(
    rows: int, columns: int, groups: int
) -> None:
    W, H = problem(columns, rows)
    span, scheme = columns // groups, Scheme("int", 4, False, columns // groups)
    order = torch.arange(columns).view(groups, span).flip(0, 1).reshape(-1)
    scales = torch.linspace(-0.6, 0.7, rows).add(0.01)[:, None].repeat(1, groups)
    zeros = torch.full((rows, groups), 8, dtype=torch.uint8)
    wide = scales.repeat_interleave(span, 1)
    feedback = feedback_by(H[order][:, order], span)
    curvature = curvature_of(H, order, H.diagonal()[order])

    def chosen(passes: int) -> ChosenRows:
        return choose_rows(W, order, feedback, curvature, scheme, torch.float32, None, passes, scales, zeros)

    swept, descended = chosen(0), chosen(50)
    codes = descended.codes

    def loss(codes: torch.Tensor = codes) -> torch.Tensor:
        return loss_of(W, (codes.float() - 8) * wide, H)

    before, after, gained = loss(swept.codes), loss(), swept.losses - descended.losses
    assert bool((gained > 0).any())
    # What a column pulls is known to within ROUNDING of what was missed in all.
    assert bool(((before - after - gained).abs() <= 1e-3 * gained + max(1e-4, 2 * ROUNDING) * before).all())
    torch.testing.assert_close(descended.missed, W - (codes.float() - 8) * wide, rtol=0, atol=1e-5)
    for j in range(columns):
        for change in (-1, 1):
            allowed = (codes[:, j].int() + change >= 0) & (codes[:, j].int() + change <= 15)
            codes[:, j] = (codes[:, j].int() + change).to(torch.uint8)
            assert bool((loss() >= after * (1 - max(1e-4, 4 * ROUNDING)))[allowed].all())
            codes[:, j] = (codes[:, j].int() - change).to(torch.uint8)


def test_rows_come_out_the_same_however_they_are_split() -> None:
    # So many that one thread takes them in two portions, and so wide that changes are pushed in two.
    rows, width, scheme = 1000, 1111, Scheme("int", 4, False, 11)
    W, H = problem(width, rows)
    H.diagonal().add_(0.1 * H.diagonal().mean())
    order = torch.arange(width)
    feedback, curvature = feedback_by(H, 11), curvature_of(H, order, H.diagonal())

    def solved(part: torch.Tensor) -> list[torch.Tensor]:
        scales, zeros = torch.empty(len(part), 101), torch.empty(len(part), 101, dtype=torch.uint8)
        chosen = choose_rows(
            part, order, feedback, curvature, scheme, torch.bfloat16, SweptSearch(2, 0.9), 3, scales, zeros
        )  # fmt: skip
        told = [chosen.codes, chosen.losses, scales, zeros, chosen.missed]
        return [*told, quadratic(chosen.missed, order, H), norms(chosen.missed, order, feedback)]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = solved(W)
    finally:
        torch.set_num_threads(threads)
    parts = [torch.cat(each) for each in zip(*(solved(part) for part in W.split([37, 513, 450])), strict=True)]
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))
    torch.testing.assert_close(whole[-2], whole[1], rtol=1e-3, atol=0)
    torch.testing.assert_close(whole[-1], whole[-2], rtol=ROUNDING, atol=0)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (40, 63), (33, 64), (70, 200)])
def test_quadratic_forms_are_those_in_fp64(rows: int, width: int) -> None:
    W, H = problem(width, rows)
    order = torch.randperm(width, generator=torch.Generator().manual_seed(2))
    found = quadratic(W, order, H[order][:, order].contiguous())
    torch.testing.assert_close(found, ((W.double() @ H.double()) * W.double()).sum(1), rtol=1e-4, atol=0)


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


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 63), (700, 200)])
def test_squares_are_those_in_fp64(rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    W, weights = torch.randn(rows, width, generator=generator), torch.rand(width, generator=generator)
    totals, weighted = squares(W, weights)
    torch.testing.assert_close(totals, W.double().square().sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(weighted, W.double().square() @ weights.double(), rtol=1e-12, atol=0)
