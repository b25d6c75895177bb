"""Numerics: scales, zero points and codes of a weight's rows in portable torch. The oracle of the compiled kernels.

Scales are rounded to the dtype they are stored in first, and codes computed with the rounded scale, in fp32. Rows are
independent; large weights are worked on in runs of rows that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fewbits.schemes import Scheme
from fewbits.search import MINMAX as MINMAX
from fewbits.search import SUMMED
from fewbits.search import Search as Search

CHUNK_BYTES = 4 * 2**20
FP8_MAX = 448.0


@dataclass(frozen=True)
class Rounded:
    """Rows of a weight after rounding.

    codes: int8 (per-channel int8, signed), float8_e4m3fn, or uint8 (groups, unsigned) [R, K]. scales: [R, G].
    zeros: uint8 [R, G], None if symmetric. squared_error: Σ (W − Ŵ)². squared_norm: Σ W². nonfinite: some W is.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    squared_error: float
    squared_norm: float
    nonfinite: bool


def stored_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round positive fp32 scales to `dtype`, never below its smallest normal nor above its largest finite number.

    A scale of zero (an all-zero row or group) becomes 1.
    """
    limits = torch.finfo(dtype)
    rounded = scale.clamp(limits.tiny, limits.max).to(dtype)
    return torch.where(scale == 0, torch.ones((), dtype=dtype), rounded)


def _chunks(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    rows = max(1, CHUNK_BYTES // (4 * weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        yield weight[start : start + rows].to(torch.float32)


RoundChunk = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]]


def _by_chunks(weight: torch.Tensor, round_chunk: RoundChunk) -> Rounded:
    parts = []
    squared_error = squared_norm = 0.0
    nonfinite = False
    for chunk in _chunks(weight):
        nonfinite = nonfinite or not bool(torch.isfinite(chunk).all())
        codes, scales, zeros, decoded = round_chunk(chunk)
        parts.append((codes, scales, zeros))
        squared_error += (chunk - decoded).double().square().sum(1).sum().item()
        squared_norm += chunk.double().square().sum(1).sum().item()
    codes = torch.cat([part[0] for part in parts])
    scales = torch.cat([part[1] for part in parts])
    all_zeros = [zeros for _, _, zeros in parts if zeros is not None]
    return Rounded(codes, scales, torch.cat(all_zeros) if all_zeros else None, squared_error, squared_norm, nonfinite)


def round_channel_int8(weight: torch.Tensor, scale_dtype: torch.dtype) -> Rounded:
    """Symmetric int8 with one scale per row: scale = max|w| / 127, codes half to even within ±127."""

    def chunk_codes(chunk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, torch.Tensor]:
        scales = stored_scale(chunk.abs().amax(1, keepdim=True) / 127, scale_dtype)
        wide = scales.float()
        codes = (chunk * (1 / wide)).round_().clamp_(-127, 127)
        return codes.to(torch.int8), scales, None, codes * wide

    return _by_chunks(weight, chunk_codes)


def round_channel_fp8(weight: torch.Tensor, scale_dtype: torch.dtype) -> Rounded:
    """float8 e4m3fn with one scale per row: scale = max|w| / 448, nearest even, saturating."""

    def chunk_codes(chunk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, torch.Tensor]:
        scales = stored_scale(chunk.abs().amax(1, keepdim=True) / FP8_MAX, scale_dtype)
        wide = scales.float()
        codes = (chunk * (1 / wide)).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        return codes, scales, None, codes.float() * wide

    return _by_chunks(weight, chunk_codes)


def round_groups(
    weight: torch.Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    search: Search = MINMAX,
    importance: torch.Tensor | None = None,
) -> Rounded:
    """Ints with a scale (and zero point) per group of inputs, searched for the least weighted error.

    Args:
        weight: [R, K]. scheme: an int scheme; group_size 0 is one group a row.
        importance: fp32 [K], weight of each input's error; all ones if None.
    """
    columns = weight.shape[1]
    groups = scheme.groups(columns)

    def chunk_codes(
        chunk: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
        scales, zeros = best_grid(chunk, scheme, scale_dtype, search, importance)
        wide, offset = scales.float()[:, :, None], zeros.float()[:, :, None]
        grouped = chunk.view(chunk.shape[0], groups, -1)
        codes = ((grouped * (1 / wide)).round_() + offset).clamp_(0, scheme.largest_code)
        decoded = ((codes - offset) * wide).view(chunk.shape)
        return codes.to(torch.uint8).view(chunk.shape), scales, None if scheme.symmetric else zeros, decoded

    return _by_chunks(weight, chunk_codes)


def best_grid(
    weight: torch.Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    search: Search = MINMAX,
    importance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The candidate grid of least weighted error for each group of fp32 rows [R, K].

    Losses are summed in one order (see SUMMED), so that the compiled search chooses the same grids.

    Args:
        importance: fp32 [K]; all ones if None.

    Returns:
        Scales [R, G] in `scale_dtype`, and zero points uint8 [R, G] (the middle code if symmetric).
    """
    rows, columns = weight.shape
    groups = scheme.groups(columns)
    grouped = _steps(weight.to(torch.float32).reshape(rows * groups, -1))
    shares = None
    if importance is not None:
        shares = _steps(importance.to(torch.float32).view(groups, -1)).repeat(1, 1, rows)
    flat = grouped.view(-1, rows * groups)
    low, high = flat.amin(0).clamp_max(0), flat.amax(0).clamp_min(0)
    best_loss: torch.Tensor | None = None
    back = 1 / stored_scale(_covering(low, high, scheme)[0], scale_dtype).float()
    for factor in search.factors():
        for scales, zeros in _candidates(low, high, torch.tensor(factor), scheme, scale_dtype):
            wide = scales.float()
            u = grouped * (1 / wide)
            miss = (u - u.round().clamp_(-zeros, scheme.largest_code - zeros)).square_()
            miss = miss.square_() if search.power == 4 else miss
            relative = (wide * back).square()
            relative = relative.square() if search.power == 4 else relative
            loss = _summed(miss if shares is None else miss.mul_(shares)) * relative
            if best_loss is None:
                best_loss, best_scales, best_zeros = loss, scales, zeros
                continue
            better = loss < best_loss
            best_loss = torch.where(better, loss, best_loss)
            best_scales = torch.where(better, scales, best_scales)
            best_zeros = torch.where(better, zeros, best_zeros)
    return best_scales.view(rows, groups), best_zeros.to(torch.uint8).view(rows, groups)


def candidate_grids(
    rows: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype, factors: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The grids by each factor of the range of fp32 rows [R, g] of one group each: scales and fp32 zero points.

    Returns:
        Both [grids, R]; of symmetric grids two for each factor, the one with all levels first.
    """
    low, high = rows.amin(1).clamp_max(0), rows.amax(1).clamp_min(0)
    found = _candidates(low, high, torch.tensor(factors, dtype=torch.float32)[:, None], scheme, scale_dtype)
    scales, zeros = (torch.stack(parts, dim=1).flatten(0, 1) for parts in zip(*found, strict=True))
    return scales, zeros


def _steps(grouped: torch.Tensor) -> torch.Tensor:
    """Groups [n, g] as columns in steps of SUMMED weights: [ceil(g / SUMMED), SUMMED, n], padded with zeros."""
    count, size = grouped.shape
    steps = torch.zeros((-(-size // SUMMED) * SUMMED, count))
    steps[:size] = grouped.T
    return steps.view(-1, SUMMED, count)


def _summed(steps: torch.Tensor) -> torch.Tensor:
    """Sum of each column: the weights of a step one by one, then the steps one by one."""
    within = steps[:, 0].clone()
    for index in range(1, SUMMED):
        within += steps[:, index]
    total = within[0].clone()
    for step in within[1:]:
        total += step
    return total


def _covering(low: torch.Tensor, high: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 scales whose grids just cover the range: with all levels, and symmetric with a positive scale."""
    if not scheme.symmetric:
        return (high - low) / scheme.largest_code, high
    extreme = torch.maximum(high, -low)
    return extreme / scheme.midpoint, extreme / max(scheme.midpoint - 1, 1)


def _candidates(
    low: torch.Tensor, high: torch.Tensor, shrink: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Grids for `shrink` (fp32, [] or [factors, 1]) times the range: asymmetric one, symmetric one for each sign."""
    wide, narrow = _covering(low, high, scheme)
    scales = stored_scale(wide * shrink, scale_dtype)
    if not scheme.symmetric:
        yield scales, (-(low * shrink) * (1 / scales.float())).round_().clamp_(0, scheme.largest_code)
        return
    middle = torch.full(scales.shape, float(scheme.midpoint))
    # The group's extreme goes to code 0, on whichever side it lies: all 2^bits levels serve.
    yield torch.where(high > -low, -scales, scales), middle
    if scheme.bits > 1:
        yield stored_scale(narrow * shrink, scale_dtype), middle
