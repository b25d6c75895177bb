"""GPTQ: choose the codes column by column, pushing each column's error into the columns not yet chosen.

Source: Frantar et al. 2022, arXiv 2210.17323, algorithm 1.
W [N, K] fp32 · H [K, K] = Σ wₜ xₜ xₜᵀ = M Mᵀ, M upper triangular · s, z scale and zero point of a group
Differs from the paper: H⁻¹ is never formed, columns push by M (kernels.feedback); channels are ordered within groups
and groups by their largest, so that files need no index; a group's scale is searched when its turn comes, on the
weights as compensated, by sweeping the group with every candidate; and after the sweep each code is chosen once more,
given all others (coordinate descent on the same loss).
Needs: Gram. Cost: O(N · K²).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fewbits.drift import Drift
from fewbits.kernels.curvature import curvature_of
from fewbits.kernels.feedback import feedback_of
from fewbits.schemes import Scheme
from fewbits.solvers.coupled import solve_in_turn
from fewbits.solvers.drifted import drifted_targets
from fewbits.solvers.factorization import factor_of
from fewbits.solvers.gptq_options import DEFAULTS, GptqOptions
from fewbits.solvers.row_solver import RowSolver
from fewbits.solvers.solution import Solution, joined, part_of

# Rows solved at a time, at least.
SOME_ROWS = 128
# Weights of the rows solved at a time: each step of the way has a copy of them in fp32.
ROW_NUMBERS = 1 << 22


def solve(
    W: torch.Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    H: torch.Tensor,
    options: GptqOptions = DEFAULTS,
    couplings: Sequence[torch.Tensor] = (),
    drift: Drift | None = None,
    *,
    keep_gram: bool = True,
) -> Solution:
    """Choose the codes of W [N, K] (all consumers of one input, stacked) given H [K, K].

    Channels that were never active keep their weights and are rounded plainly. Where H cannot be factored, all are.

    Args:
        couplings: output Grams of runs of rows, in order (`coupled.py`); without them rows are independent.
        drift: of the same tokens as H: outputs are to be those of the inputs that W had before (`drifted.py`).
        keep_gram: False lets the solver write over H and the drift, and let go of them: it saves memory of their size.
    """
    K = W.shape[1]
    some = max(SOME_ROWS, ROW_NUMBERS // K)
    parts = [slice(start, start + some) for start in range(0, len(W), some)]
    seen = H.diagonal().clone()
    living = torch.where(seen > 0, seen, seen[seen > 0].mean() if bool((seen > 0).any()) else 1.0)
    order = _order(living, scheme.group_size or K) if options.ordered else torch.arange(K)
    target = None if drift is None else drifted_targets(W, H, drift, parts, keep=keep_gram)
    spare = None if keep_gram or drift is None or drift.of_outputs else drift.matrix
    diagonal = living[order]
    factor = factor_of(H, options.damping, spare, order, diagonal)
    damping, trouble = (0.0, None) if factor is None else (factor.damping, factor.trouble)
    feedback = None if factor is None else feedback_of(factor.L, scheme.group_size)
    del factor
    if spare is not None:
        _let_go(spare)
    # A doctored factor belongs to another H than this, by which steps could go astray.
    is_of_H = feedback is not None and trouble is None
    curvature = curvature_of(H, order, diagonal + damping) if is_of_H else None
    if not keep_gram and is_of_H:
        _let_go(H)
    solver = RowSolver(H, feedback, curvature, damping, trouble, order, seen, living, scheme, scale_dtype, options)
    if feedback is None or not couplings:
        return joined(
            [solver.solution(W[part].float(), None if target is None else target[part].float()) for part in parts]
        )
    aim = W if target is None else target
    grid = solve_in_turn(aim, couplings, options.coupling_damping, solver.choose_few)
    return joined([solver.judged(W[part].float(), part_of(grid, part)) for part in parts])


def _let_go(spent: torch.Tensor) -> None:
    """Free the memory of a tensor that its owner has no more use for."""
    spent.data = spent.new_empty(0)


def _order(diagonal: torch.Tensor, group: int) -> torch.Tensor:
    """Channels by their diagonal within each group, groups by their largest."""
    grouped = diagonal.view(-1, group)
    within = grouped.argsort(dim=1, descending=True, stable=True)
    groups = grouped.amax(1).argsort(descending=True, stable=True)
    starts = torch.arange(len(grouped))[:, None] * group
    return (within + starts)[groups].reshape(-1)
