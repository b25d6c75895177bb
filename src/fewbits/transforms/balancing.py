"""Balancing: from scales that a formula gives, step towards those at which no channel wants to go either way.

Rounding errs by the square of its step, and a step is as wide as the largest number it covers. So for a run of numbers
that share a step (a row's group of weights, a token's channels) the loss is max_k(a_k)² · Σ_k b_k², where a is what is
rounded and b what the error is multiplied by: a = |w|·s and b² = H_kk / s² for weights, a = |x| / s and b² = ‖w_k‖² s²
for activations. In log s its gradient is the difference of two shares: how often (by weight) channel k is the largest,
and what part of Σ b² is its own. Where both are equal everywhere, the loss is least.
"""

from __future__ import annotations

import torch

STEPS = 24
RATE = 0.25
# No channel moves by more than this factor in one step, in logarithms.
LARGEST_MOVE = 0.35
TINY = torch.finfo(torch.float32).tiny


def balance_groups(rows: torch.Tensor, importance: torch.Tensor, s: torch.Tensor, groups: int) -> torch.Tensor:
    """One step for weights whose groups each have a grid.

    Args:
        rows: some rows of W, fp32 [n, K]. importance: diag(H) [K]. s: scales so far [K]. groups: of one row.

    Returns:
        By what to multiply the scales, as logarithms [K].
    """
    largest, energy = largest_shares((rows * s).view(len(rows), groups, -1)), importance / s.square()
    own = energy.view(groups, -1) / energy.view(groups, -1).sum(1, keepdim=True).clamp_min(TINY)
    return _move(own.reshape(-1), largest.sum(0).view(groups, -1) / _total(largest))


def _total(largest: torch.Tensor) -> torch.Tensor:
    return largest.sum((0, 2))[:, None].clamp_min(TINY)


def largest_shares(numbers: torch.Tensor) -> torch.Tensor:
    """Squares of each run's largest number [runs, …, k], divided among its channels by how near they come to it."""
    sizes = numbers.abs()
    largest = sizes.amax(-1, keepdim=True)
    near = sizes.div_(largest.clamp_min(TINY)).square_().square_().square_()
    return near.mul_(largest.square() / near.sum(-1, keepdim=True).clamp_min(TINY))


def _move(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    ratio = (up.clamp_min(TINY) / down.reshape(-1).clamp_min(TINY)).log()
    return (RATE * ratio).clamp_(-LARGEST_MOVE, LARGEST_MOVE)


def balance_both(
    rows: torch.Tensor, sample: torch.Tensor, importance: torch.Tensor, norms: torch.Tensor, s: torch.Tensor
) -> torch.Tensor:
    """One step for weights with a grid a row, and activations with a grid a token.

    Args:
        rows: some rows of W, fp32 [n, K]. sample: some tokens [t, K]. importance: diag(H), mean over tokens [K].
        norms: Σ of the squares of those rows by channel [K].
    """
    by_row, by_token = largest_shares(rows * s).sum(0), largest_shares(sample / s).mean(0)
    weight_energy, input_energy = norms * s.square(), importance / s.square()
    weights = by_row.sum() * input_energy.sum()
    inputs = by_token.sum() * weight_energy.sum()
    up = weights * _share(input_energy) + inputs * _share(by_token)
    down = weights * _share(by_row) + inputs * _share(weight_energy)
    return _move(up, down)


def _share(values: torch.Tensor) -> torch.Tensor:
    return values / values.sum().clamp_min(TINY)
