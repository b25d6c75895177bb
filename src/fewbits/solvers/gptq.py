"""GPTQ: choose the codes column by column, pushing each column's error into the columns not yet chosen.

Source: Frantar et al. 2022, arXiv 2210.17323, algorithm 1.
W [N, K] fp32 · H [K, K] = Σ wₜ xₜ xₜᵀ · U upper Cholesky factor of H⁻¹ · s, z scale and zero point of a group
Differs from the paper: channels are ordered within groups and groups by their largest, so that files need no index;
scales are searched on the weights as compensated when their group's turn comes, weighted by diag(H).
Needs: Gram. Cost: O(N · K²).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewbits.kernels.gptq_sweep import sweep_block
from fewbits.kernels.rounding import search_grid
from fewbits.numerics import Search
from fewbits.packing import decode_codes
from fewbits.schemes import Scheme
from fewbits.solvers.factorization import DAMPING, inverse_factor
from fewbits.solvers.solution import Solution

# Columns swept at a time where a scale spans the whole row.
BLOCK = 128


DEFAULT_SEARCH = Search(steps=31, narrowest=0.8, power=2)


@dataclass(frozen=True)
class GptqOptions:
    """What may be varied; docs/methods/gptq.md has each choice measured.

    ordered: channels by diag(H) within a group, groups by their largest. refit: scales from compensated weights.
    search: factors of the range that are tried. damping: share of the mean diagonal.
    """

    ordered: bool = True
    refit: bool = True
    search: Search = DEFAULT_SEARCH
    damping: float = DAMPING


DEFAULTS = GptqOptions()


def solve(
    W: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype, H: torch.Tensor, options: GptqOptions = DEFAULTS
) -> Solution:
    """Choose the codes of W [N, K] (all consumers of one input, stacked; rows are independent) given H [K, K].

    Channels that were never active keep their weights and are rounded plainly. Where H cannot be factored, all are.
    """
    W = W.to(torch.float32)
    K = W.shape[1]
    diagonal = H.diagonal()
    dead = diagonal <= 0
    H = H.clone()
    H.diagonal()[dead] = diagonal[~dead].mean() if bool((~dead).any()) else 1.0
    order = _order(H.diagonal(), scheme.group_size or K) if options.ordered else torch.arange(K)
    factor = inverse_factor(H[order][:, order], options.damping)
    notes: list[tuple[str, str]] = []
    if factor is None:
        notes.append(("rounded plainly", "its statistic cannot be factored"))
        codes, scales, zeros = _rounded(W, scheme, scale_dtype, options.search, H.diagonal())
    else:
        if factor.trouble is not None:
            notes.append(("solved with a doctored statistic", factor.trouble))
        codes, scales, zeros = _sweep(W, factor.U, order, H.diagonal(), scheme, scale_dtype, options)
    return _solution(W, codes, scales, zeros, scheme, H, notes)


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    N, K = W.shape
    group = scheme.group_size or K
    remaining = W.T[order].contiguous()
    codes = torch.empty(K, N, dtype=torch.uint8)
    scales = torch.empty(N, K // group, dtype=scale_dtype)
    zeros = torch.empty(N, K // group, dtype=torch.uint8)
    importance = diagonal[order]
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
            grid = search_grid(columns, span, scale_dtype, options.search, importance[start:stop])
            scale, zero = grid[0][:, 0], grid[1][:, 0]
        else:
            scale, zero = fixed[0][:, number], fixed[1][:, number]
        scales[:, number], zeros[:, number] = scale, zero
        codes[start:stop], errors = sweep_block(
            remaining[start:stop], U[start:stop, start:stop].contiguous(), scale.float(), zero.float(),
            scheme.largest_code,
        )  # fmt: skip
        remaining[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)
    restored = torch.empty_like(codes)
    restored[order] = codes
    return restored.T.contiguous(), scales, None if scheme.symmetric else zeros


def _rounded(
    W: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype, search: Search, importance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    scales, zeros = search_grid(W, scheme, scale_dtype, search, importance)
    grouped = W.view(W.shape[0], scales.shape[1], -1)
    offset = zeros.float()[:, :, None]
    codes = ((grouped * (1 / scales.float())[:, :, None]).round_() + offset).clamp_(0, scheme.largest_code)
    return codes.to(torch.uint8).view(W.shape), scales, None if scheme.symmetric else zeros


def _solution(
    W: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    scheme: Scheme,
    H: torch.Tensor,
    notes: list[tuple[str, str]],
) -> Solution:
    decoded = decode_codes(codes, scales, zeros, scheme)
    missed = W - decoded
    return Solution(
        codes, scales, zeros, decoded,
        squared_error=missed.double().square().sum(1),
        squared_norm=W.double().square().sum(1),
        output_error=((missed @ H) * missed).double().sum(1),
        output_norm=((W @ H) * W).double().sum(1),
        notes=tuple(notes),
    )  # fmt: skip
