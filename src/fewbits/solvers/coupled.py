"""Rows in turn: what some rows missed is made up for by rows whose outputs the loss feels alike.

To second order the loss is tr(G E H Eᵀ), E = W − Ŵ, with H of the inputs and G = Σ vₜ gₜ gₜᵀ of the loss's gradients at
the outputs. Once the errors E_b of some rows are known, the other rows r do best to miss by −G_rr⁻¹ G_rb E_b, whatever
H is: so that much is taken off before they are solved. With G⁻¹ = Uᵀ U, U upper triangular, −G_rr⁻¹ G_rb is
U_brᵀ U_bb⁻ᵀ, G restricted to b and the rows after it. It is GPTQ's own step, over rows in place of columns.
Source: Tseng et al. 2025, arXiv 2505.22988 (YAQA), whose rounding corrects for both factors at once, one weight at a
time; here rows are solved ROWS at a time, by any solver that takes rows as independent.
Needs: Gram, output Grams. Cost: that of solving the rows, O(N · K · coupled rows) and O(N · coupled rows²).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fewbits.fp32_products import fast_fp32
from fewbits.repeatable import one_thread
from fewbits.solvers.factorization import inverse_factor
from fewbits.solvers.solution import Grid

# Share of the mean diagonal of G that is added to it, at least.
DAMPING = 0.1
# Coupled rows solved at a time, as if they were not coupled to each other.
ROWS = 64


class _Coupled:
    """Rows coupled to each other, those that matter most first, while others can still make up for them."""

    def __init__(self, rows: torch.Tensor, G: torch.Tensor, first: int, damping: float) -> None:
        order = G.diagonal().argsort(descending=True, stable=True)
        self.places = order + first
        self._U = inverse_factor(G, damping, order=order)
        self._targets = rows[order].float()

    def targets(self, begin: int) -> torch.Tensor:
        """What a step's rows are to be, fp32 [up to ROWS, K]."""
        return self._targets[begin : begin + ROWS]

    def missed(self, begin: int, missed: torch.Tensor) -> None:
        """Have the rows that are still to come make up for what those of a step missed."""
        end = begin + len(missed)
        if self._U is None or end == len(self.places):
            return
        with one_thread():
            shares = torch.linalg.solve_triangular(self._U[begin:end, begin:end], self._U[begin:end, end:], upper=True)
        with fast_fp32():
            self._targets[end:].addmm_(shares.T, missed, alpha=-1)


def solve_in_turn(
    W: torch.Tensor,
    couplings: Sequence[torch.Tensor],
    damping: float,
    solve_rows: Callable[[torch.Tensor], tuple[Grid, torch.Tensor]],
) -> Grid:
    """Solve the rows of W [N, K].

    Args:
        couplings: G of runs of neighbouring rows that make up all rows, fp32 [rows, rows] each.
        damping: share of G's mean diagonal that is added to it.
        solve_rows: the codes of some rows fp32 [n, K], each solved on its own, and what they miss of them.
    """
    coupled: list[_Coupled] = []
    first = 0
    for G in couplings:
        coupled.append(_Coupled(W[first : first + len(G)], G, first, damping))
        first += len(G)
    grid: Grid | None = None
    for begin in range(0, max(len(each.places) for each in coupled), ROWS):
        present = [each for each in coupled if len(each.places) > begin]
        targets = torch.cat([each.targets(begin) for each in present])
        solved, missed = solve_rows(targets)
        places = torch.cat([each.places[begin : begin + ROWS] for each in present])
        grid = _room(solved, len(W)) if grid is None else grid
        for part, some in zip(grid, solved, strict=True):
            if part is not None and some is not None:
                part[places] = some
        for each, rows in zip(
            present, torch.split(missed, [len(each.targets(begin)) for each in present]), strict=True
        ):
            each.missed(begin, rows)
    assert grid is not None
    return grid


def _room(like: Grid, rows: int) -> Grid:
    """A grid of so many rows, to be filled."""
    codes, scales, zeros = like
    return (
        codes.new_empty(rows, codes.shape[1]), scales.new_empty(rows, scales.shape[1]),
        None if zeros is None else zeros.new_empty(rows, zeros.shape[1]),
    )  # fmt: skip
