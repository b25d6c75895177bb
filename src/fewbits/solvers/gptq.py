"""GPTQ: choose the codes column by column, pushing each column's error into the columns not yet chosen.

Source: Frantar et al. 2022, arXiv 2210.17323, algorithm 1.
W [N, K] fp32 · H [K, K] = Σ wₜ xₜ xₜᵀ · U upper Cholesky factor of H⁻¹ · s, z scale and zero point of a group
Differs from the paper: channels are ordered within groups and groups by their largest, so that files need no index;
a group's scale is searched when its turn comes, on the weights as compensated, by sweeping the group with every
candidate; and after the sweep each code is chosen once more, given all others (coordinate descent on the same loss).
Needs: Gram. Cost: O(N · K²).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewbits.fp32_products import fast_fp32
from fewbits.kernels.gptq_descent import descend_block
from fewbits.kernels.gptq_sweep import sweep_block
from fewbits.kernels.rounding import search_grid
from fewbits.numerics import Search, candidate_grids
from fewbits.packing import decode_codes
from fewbits.schemes import Scheme
from fewbits.solvers.factorization import DAMPING, Factor, inverse_factor
from fewbits.solvers.solution import Solution, joined

# Columns swept at a time where a scale spans the whole row, and at least so many in a block of the descent.
BLOCK = 128
# Columns of H multiplied at a time where its symmetry saves half.
PANEL = 512
# Weights of the rows solved at a time: each step of the way has a copy of them in fp32.
ROW_NUMBERS = 1 << 24
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
    the best by rounding. passes: of coordinate descent. damping: share of the mean diagonal.
    """

    ordered: bool = True
    refit: bool = True
    search: Search = DEFAULT_SEARCH
    swept: Search | None = SWEPT_SEARCH
    passes: int = 3
    damping: float = DAMPING


DEFAULTS = GptqOptions()


# Codes uint8 [N, K], scales [N, G], zero points uint8 [N, G] or None.
Grid = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def solve(
    W: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype, H: torch.Tensor, options: GptqOptions = DEFAULTS
) -> Solution:
    """Choose the codes of W [N, K] (all consumers of one input, stacked; rows are independent) given H [K, K].

    Channels that were never active keep their weights and are rounded plainly. Where H cannot be factored, all are.
    """
    K = W.shape[1]
    some = max(BLOCK, ROW_NUMBERS // K)
    parts = [W[start : start + some] for start in range(0, len(W), some)]
    dead = H.diagonal() <= 0
    living = H.clone()
    living.diagonal()[dead] = H.diagonal()[~dead].mean() if bool((~dead).any()) else 1.0
    diagonal = living.diagonal().clone()
    order = _order(diagonal, scheme.group_size or K) if options.ordered else torch.arange(K)
    # Matrices of this size are let go of as soon as they can be: they set the peak memory of a whole run.
    living = living[order]
    turned = living[:, order]
    del living
    factor = inverse_factor(turned, options.damping)
    if factor is None:
        notes = (("rounded plainly", "its statistic cannot be factored"),)
        plain = [
            (part.float(), _rounded(part.float(), scheme, scale_dtype, options.search, diagonal)) for part in parts
        ]
        return joined([_solution(*pair, scheme, H, notes) for pair in plain])
    if factor.trouble is None:
        turned.diagonal().add_(factor.damping)
    return joined(
        [_solved(part.float(), H, turned, factor, order, diagonal, scheme, scale_dtype, options) for part in parts]
    )


def _solved(
    W: torch.Tensor,
    H: torch.Tensor,
    turned: torch.Tensor,
    factor: Factor,
    order: torch.Tensor,
    diagonal: torch.Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    options: GptqOptions,
) -> Solution:
    """Some rows. turned: H with its channels in `order`, damped as the factor is; diagonal: before damping."""
    notes = () if factor.trouble is None else (("solved with a doctored statistic", factor.trouble),)
    solved, loss = _sweep(W, factor.U, order, diagonal, scheme, scale_dtype, options)
    # A doctored factor belongs to another H than this, by which steps could go astray.
    if factor.trouble is None:
        loss -= _descend(W, solved, turned, order, scheme, options.passes)
    if _restore_worse_rows(W, solved, scheme, options.search, H) or factor.trouble is not None:
        return _solution(W, solved, scheme, H, notes)
    # The sweep's own loss is that by the damped H.
    return _solution(W, solved, scheme, H, notes, (loss, diagonal - H.diagonal() + factor.damping))


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
    grids = list(candidate_grids(columns, span, scale_dtype, options.swept))
    return torch.stack([grid[0] for grid in grids]), torch.stack([grid[1] for grid in grids]).to(torch.uint8)


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


def _restore_worse_rows(W: torch.Tensor, solved: Grid, scheme: Scheme, search: Search, H: torch.Tensor) -> bool:
    """Round plainly, in place, the rows that came out worse than that by H: at 2 bits some do. Says whether any did."""
    rows = torch.arange(0, len(W), max(1, len(W) // SAMPLED_ROWS))
    while True:
        codes, scales, zeros = (None if part is None else part[rows] for part in solved)
        assert codes is not None and scales is not None
        rounded = _rounded(W[rows], scheme, scales.dtype, search, H.diagonal())
        error = _quadratic(W[rows] - decode_codes(codes, scales, zeros, scheme), H)
        worse = error > _quadratic(W[rows] - decode_codes(*rounded, scheme), H)
        if not bool(worse.any()):
            return False
        if len(rows) == len(W):
            break
        rows = torch.arange(len(W))
    for part, plain in zip(solved, rounded, strict=True):
        if part is not None and plain is not None:
            part[worse] = plain[worse]
    return True


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


def _solution(
    W: torch.Tensor,
    solved: Grid,
    scheme: Scheme,
    H: torch.Tensor,
    notes: tuple[tuple[str, str], ...],
    damped: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Solution:
    """The solution with what it lost; `damped` is the loss by H plus a diagonal, and that diagonal, if known."""
    missed = W - decode_codes(*solved, scheme)
    if damped is None:
        output_error = _quadratic(missed, H)
    else:
        loss, added = damped
        output_error = (loss - missed.square() @ added).clamp_min(0)
    return Solution(
        scheme, *solved,
        squared_error=missed.square().sum(1, dtype=torch.float64),
        squared_norm=W.square().sum(1, dtype=torch.float64),
        output_error=output_error,
        output_norm=_quadratic(W, H),
        notes=notes,
    )  # fmt: skip
