"""GPTQ: choose the codes column by column, pushing each column's error into the columns not yet chosen.

Source: Frantar et al. 2022, arXiv 2210.17323, algorithm 1.
W [N, K] fp32 · H [K, K] = Σ wₜ xₜ xₜᵀ · U upper Cholesky factor of H⁻¹ · s, z scale and zero point of a group
Differs from the paper: channels are ordered within groups and groups by their largest, so that files need no index;
a group's scale is searched when its turn comes, on the weights as compensated, by sweeping the group with every
candidate; and after the sweep each code is chosen once more, given all others (coordinate descent on the same loss).
Needs: Gram. Cost: O(N · K²).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fewbits.fp32_products import fast_fp32
from fewbits.kernels.gptq_descent import descend_block
from fewbits.kernels.gptq_sweep import sweep_block
from fewbits.kernels.rounding import search_grid
from fewbits.numerics import Search, candidate_grids
from fewbits.packing import decode_codes
from fewbits.schemes import Scheme
from fewbits.solvers import coupled
from fewbits.solvers.coupled import solve_in_turn
from fewbits.solvers.factorization import DAMPING, Factor, inverse_factor
from fewbits.solvers.solution import Solution, joined

# Columns swept at a time where a scale spans the whole row, and at least so many in a block of the descent.
BLOCK = 128
# Columns of H multiplied at a time where its symmetry saves half.
PANEL = 512
# Weights of the rows solved at a time: each step of the way has a copy of them in fp32.
ROW_NUMBERS = 1 << 22
# Rows compared with plain rounding; only if one of them came out worse, all are.
SAMPLED_ROWS = 64

# Of scales that are fixed beforehand, by rounding errors weighted with diag(H).
DEFAULT_SEARCH = Search(steps=31, narrowest=0.8, power=2)
# Of scales that are tried by sweeping: each candidate costs a sweep of its group.
SWEPT_SEARCH = Search(steps=11, narrowest=0.8)


@dataclass(frozen=True)
class GptqOptions:
    """What may be varied; docs/methods/gptq.md has each choice measured.

    ordered: channels by diag(H) within a group, groups by their largest. refit: scales from compensated weights.
    search: factors of the range that are tried by rounding. swept: those tried by sweeping the group; None to take
    the best by rounding. passes: of coordinate descent. damping: share of the mean diagonal. coupling_damping: the same
    for output Grams.
    """

    ordered: bool = True
    refit: bool = True
    search: Search = DEFAULT_SEARCH
    swept: Search | None = SWEPT_SEARCH
    passes: int = 3
    damping: float = DAMPING
    coupling_damping: float = coupled.DAMPING


DEFAULTS = GptqOptions()


# Codes uint8 [N, K], scales [N, G], zero points uint8 [N, G] or None.
Grid = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def solve(
    W: torch.Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    H: torch.Tensor,
    options: GptqOptions = DEFAULTS,
    couplings: Sequence[torch.Tensor] = (),
    *,
    keep_gram: bool = True,
) -> Solution:
    """Choose the codes of W [N, K] (all consumers of one input, stacked) given H [K, K].

    Channels that were never active keep their weights and are rounded plainly. Where H cannot be factored, all are.

    Args:
        couplings: output Grams of runs of rows, in order (`coupled.py`); without them rows are independent.
        keep_gram: False lets the solver write over H, which saves the memory of one more matrix of its size.
    """
    K = W.shape[1]
    some = max(BLOCK, ROW_NUMBERS // K)
    parts = [slice(start, start + some) for start in range(0, len(W), some)]
    seen = H.diagonal().clone()
    living = torch.where(seen > 0, seen, seen[seen > 0].mean() if bool((seen > 0).any()) else 1.0)
    order = _order(living, scheme.group_size or K) if options.ordered else torch.arange(K)
    turned = _turned(H, order)
    turned.diagonal().copy_(living[order])
    factor = inverse_factor(turned, options.damping, None if keep_gram else H)
    rows_solver = _Rows(turned, factor, order, seen, living, scheme, scale_dtype, options)
    if factor is None or not couplings:
        return joined([rows_solver.solution(W[part].float()) for part in parts])
    grid = solve_in_turn(W, couplings, options.coupling_damping, scheme, rows_solver.choose_few)
    return joined([rows_solver.judged(W[part].float(), _part(grid, part)) for part in parts])


def _turned(H: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """H with its channels in `order`, a panel at a time: matrices this large set the peak memory of a whole run."""
    turned = torch.empty_like(H)
    for start in range(0, len(H), PANEL):
        turned[start : start + PANEL] = H[order[start : start + PANEL]][:, order]
    return turned


class _Rows:
    """Solves rows of weights, each on its own, all by one H."""

    def __init__(
        self,
        turned: torch.Tensor,
        factor: Factor | None,
        order: torch.Tensor,
        seen: torch.Tensor,
        living: torch.Tensor,
        scheme: Scheme,
        scale_dtype: torch.dtype,
        options: GptqOptions,
    ) -> None:
        """Take what one H says.

        Args:
            turned: H, its channels in `order`, as it was factored. seen: its diagonal. living: that which was factored.
        """
        self._turned, self._factor, self._order, self._seen, self._living = turned, factor, order, seen, living
        self._scheme, self._scale_dtype, self._options = scheme, scale_dtype, options
        # A doctored factor belongs to another H than this, by which steps could go astray.
        self._can_descend = factor is not None and factor.trouble is None
        self._notes: tuple[tuple[str, str], ...] = ()
        # What `turned` has on its diagonal beyond H.
        self._added = living - seen
        if factor is None:
            self._notes = (("rounded plainly", "its statistic cannot be factored"),)
        elif factor.trouble is not None:
            self._notes = (("solved with a doctored statistic", factor.trouble),)
        else:
            turned.diagonal().add_(factor.damping)
            self._added = self._added + factor.damping

    def solution(self, W: torch.Tensor) -> Solution:
        """The solution of rows fp32 [n, K]."""
        if self._factor is None:
            return self.judged(W, self._rounded(W))
        solved, loss = self._compensated(W, self._factor)
        restored = self._restore_worse_rows(W, solved)
        return self.judged(W, solved, None if restored or not self._can_descend else loss)

    def choose_few(self, W: torch.Tensor) -> Grid:
        """Codes of so few rows that looking at some of them costs; from 4 bits on none came out worse than rounded."""
        assert self._factor is not None
        solved, _ = self._compensated(W, self._factor)
        if self._scheme.bits < 4:
            self._restore_worse_rows(W, solved)
        return solved

    def judged(self, W: torch.Tensor, solved: Grid, loss: torch.Tensor | None = None) -> Solution:
        """The solution with what it lost. loss: of each row by the damped H, fp64 [n], if it is known."""
        missed = W - decode_codes(*solved, self._scheme)
        error = self._losses(missed) if loss is None else (loss - missed.square() @ self._added).clamp_min(0)
        return Solution(
            self._scheme, *solved,
            squared_error=missed.square().sum(1, dtype=torch.float64),
            squared_norm=W.square().sum(1, dtype=torch.float64),
            output_error=error,
            output_norm=self._losses(W),
            notes=self._notes,
        )  # fmt: skip

    def _compensated(self, W: torch.Tensor, factor: Factor) -> tuple[Grid, torch.Tensor]:
        scheme, options = self._scheme, self._options
        solved, loss = _sweep(W, factor.U, self._order, self._living, scheme, self._scale_dtype, options)
        if self._can_descend:
            loss -= _descend(W, solved, self._turned, self._order, scheme, options.passes)
        return solved, loss

    def _losses(self, rows: torch.Tensor) -> torch.Tensor:
        """The diagonal of rows · H · rowsᵀ, fp64 [n]."""
        return (_quadratic(rows[:, self._order], self._turned) - rows.square() @ self._added).clamp_min(0)

    def _rounded(self, W: torch.Tensor) -> Grid:
        return _rounded(W, self._scheme, self._scale_dtype, self._options.search, self._living)

    def _restore_worse_rows(self, W: torch.Tensor, solved: Grid) -> bool:
        """Round plainly, in place, the rows that came out worse than that by H: at 2 bits some do. Says whether any."""
        rows = torch.arange(0, len(W), max(1, len(W) // SAMPLED_ROWS))
        while True:
            codes, scales, zeros = (None if part is None else part[rows] for part in solved)
            assert codes is not None and scales is not None
            rounded = self._rounded(W[rows])
            error = self._losses(W[rows] - decode_codes(codes, scales, zeros, self._scheme))
            worse = error > self._losses(W[rows] - decode_codes(*rounded, self._scheme))
            if not bool(worse.any()):
                return False
            if len(rows) == len(W):
                break
            rows = torch.arange(len(W))
        for part, plain in zip(solved, rounded, strict=True):
            if part is not None and plain is not None:
                part[worse] = plain[worse]
        return True


def _part(grid: Grid, rows: slice) -> Grid:
    codes, scales, zeros = grid
    return codes[rows], scales[rows], None if zeros is None else zeros[rows]


def _order(diagonal: torch.Tensor, group: int) -> torch.Tensor:
    """Channels by their diagonal within each group, groups by their largest."""
    grouped = diagonal.view(-1, group)
    within = grouped.argsort(dim=1, descending=True, stable=True)
    groups = grouped.amax(1).argsort(descending=True, stable=True)
    starts = torch.arange(len(grouped))[:, None] * group
    return (within + starts)[groups].reshape(-1)


def _sweep(
    W: torch.Tensor,
    U: torch.Tensor,
    order: torch.Tensor,
    diagonal: torch.Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    options: GptqOptions,
) -> tuple[Grid, torch.Tensor]:
    """Codes, scales and zero points, and each row's loss by the H that U was made from, fp64 [N]."""
    N, K = W.shape
    group = scheme.group_size or K
    remaining = W.T[order].contiguous()
    codes = torch.empty(K, N, dtype=torch.uint8)
    scales = torch.empty(N, K // group, dtype=scale_dtype)
    zeros = torch.empty(N, K // group, dtype=torch.uint8)
    importance = diagonal[order]
    loss = torch.zeros(N, dtype=torch.float64)
    fixed = (
        None if options.refit and scheme.group_size else search_grid(W, scheme, scale_dtype, options.search, diagonal)
    )
    # A channel-wide scale is known beforehand; its columns are swept in blocks all the same.
    step = group if scheme.group_size else BLOCK
    for start in range(0, K, step):
        stop = min(start + step, K)
        number = int(order[start]) // group
        if fixed is None:
            columns = remaining[start:stop].T.contiguous()
            span = Scheme(scheme.kind, scheme.bits, scheme.symmetric, stop - start)
            tried = _grids(columns, span, scale_dtype, options, importance[start:stop])
        else:
            tried = fixed[0][:, number][None], fixed[1][:, number][None]
        codes[start:stop], errors, chosen, losses = sweep_block(
            remaining[start:stop], U[start:stop, start:stop].contiguous(), tried[0].float(), tried[1].float(),
            scheme.largest_code,
        )  # fmt: skip
        scales[:, number], zeros[:, number] = (part.gather(0, chosen.long()[None])[0] for part in tried)
        loss += losses
        with fast_fp32():
            remaining[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)
    restored = torch.empty_like(codes)
    restored[order] = codes
    return (restored.T.contiguous(), scales, None if scheme.symmetric else zeros), loss


def _grids(
    columns: torch.Tensor, span: Scheme, scale_dtype: torch.dtype, options: GptqOptions, importance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points to sweep one group [N, g] with: [grids, N] each."""
    if options.swept is None:
        grid = search_grid(columns, span, scale_dtype, options.search, importance)
        return grid[0].T, grid[1].T
    scales, zeros = candidate_grids(columns, span, scale_dtype, options.swept)
    return scales, zeros.to(torch.uint8)


def _descend(
    W: torch.Tensor, solved: Grid, H: torch.Tensor, order: torch.Tensor, scheme: Scheme, passes: int
) -> torch.Tensor:
    """Choose each code anew, in place, given all others; says by how much each row's loss by H fell, fp64 [N].

    Args:
        H: damped, its channels in `order`.
    """
    N, K = W.shape
    gained = torch.zeros(N, dtype=torch.float64)
    if passes == 0:
        return gained
    codes = solved[0].T[order].contiguous()
    misses = (W - decode_codes(*solved, scheme)).T[order].contiguous()
    group = scheme.group_size or K
    numbers = order[::group] // group
    scales = solved[1].float().T[numbers].contiguous()
    step = max(1, BLOCK // group) * group if scheme.group_size else BLOCK
    for _ in range(passes):
        for start in range(0, K, step):
            block = slice(start, start + step)
            with fast_fp32():
                gradient = H[block] @ misses
            spans = slice(start // group, max(start // group + 1, (start + step) // group))
            gained += descend_block(
                gradient, H[block, block].contiguous(), scales[spans], scheme.largest_code, codes[block], misses[block]
            )
    solved[0].T[order] = codes
    return gained


def _rounded(
    W: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype, search: Search, importance: torch.Tensor
) -> Grid:
    scales, zeros = search_grid(W, scheme, scale_dtype, search, importance)
    grouped = W.view(W.shape[0], scales.shape[1], -1)
    offset = zeros.float()[:, :, None]
    codes = ((grouped * (1 / scales.float())[:, :, None]).round_() + offset).clamp_(0, scheme.largest_code)
    return codes.to(torch.uint8).view(W.shape), scales, None if scheme.symmetric else zeros


def _quadratic(rows: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """The diagonal of rows · H · rowsᵀ, fp64 [N], from the upper triangle of H."""
    total = torch.zeros(len(rows), dtype=torch.float64)
    with fast_fp32():
        for start in range(0, len(H), PANEL):
            panel, behind = slice(start, start + PANEL), slice(start + PANEL, None)
            left = rows[:, panel].contiguous()
            total += ((left @ H[panel, panel]) * left).sum(1)
            total += 2 * ((left @ H[panel, behind]) * rows[:, behind]).sum(1)
    return total
