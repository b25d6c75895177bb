"""The factor that GPTQ sweeps with, after as much damping as it takes: H = M Mᵀ, M upper triangular.

It is the Cholesky factor L of H turned by half a turn. Where H⁻¹ = Uᵀ U is asked for, U = M⁻¹: one triangular inverse
in place of an inverse and another Cholesky.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewbits.kernels.triangles import factor_in, invert_in
from fewbits.repeatable import one_thread

DAMPING = 0.01
# Each step damps ten times more than the one before.
DAMPING_STEPS = 5


@dataclass(frozen=True)
class Factor:
    """L fp32 [K, K], lower triangular, L Lᵀ = H damped, its rows and columns in reverse order.

    damping: what was added to H's diagonal. trouble: what it took beyond the usual.
    """

    L: torch.Tensor
    damping: float
    trouble: str | None


def factor_of(
    H: torch.Tensor,
    damping: float = DAMPING,
    memory: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    diagonal: torch.Tensor | None = None,
) -> Factor | None:
    """Factor a symmetric, nearly positive semidefinite H [K, K]; None if nothing helps.

    Damps by the mean of the diagonal, ten times more on each failure; then in fp64; then with floored eigenvalues.

    Args:
        memory: fp32 [K, K] that is written over and that L lies in, in place of new memory.
        order: int64 [K], H's channels as they are to be factored. diagonal: fp32 [K], in that order, for H's own.
    """
    order = torch.arange(len(H)) if order is None else order
    diagonal = H.diagonal()[order] if diagonal is None else diagonal
    mean = diagonal.mean().item()
    if not mean > 0:
        return None
    for step in range(DAMPING_STEPS):
        added = damping * 10**step * mean
        L = torch.empty_like(H, memory_format=torch.contiguous_format) if memory is None else memory
        if factor_in(H, order, diagonal, added, L) and _all_finite(L):
            return Factor(L, added, None if step == 0 else f"damping {damping * 10**step:g} of the mean diagonal")
    wide = H[order][:, order].double()
    wide.diagonal().copy_(diagonal)
    with one_thread():
        return _factor_fp64(wide, damping * mean)


def inverse_factor(
    H: torch.Tensor,
    damping: float = DAMPING,
    memory: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """U fp32 [K, K], upper triangular, with H⁻¹ = Uᵀ U of the damped H; as `factor_of` orders and damps it."""
    factor = factor_of(H, damping, memory, order)
    if factor is None:
        return None
    U = invert_in(factor.L).T
    return U if _all_finite(U) else None


def _all_finite(matrix: torch.Tensor) -> bool:
    """By its sum: looking at each number on its own would take another matrix."""
    return bool(torch.isfinite(matrix.sum()))


def _factor_fp64(H: torch.Tensor, added: float) -> Factor | None:
    L = _lower_fp64(H, added)
    if L is not None:
        return Factor(L, added, "factored in fp64")
    values, vectors = torch.linalg.eigh(H)
    floored = (vectors * values.clamp_min(added)) @ vectors.T
    L = _lower_fp64((floored + floored.T) / 2, 0.0)
    return None if L is None else Factor(L, added, "eigenvalues floored")


def _lower_fp64(H: torch.Tensor, added: float) -> torch.Tensor | None:
    reversed_H = H.flip(0, 1)
    reversed_H.diagonal().add_(added)
    L, failed = torch.linalg.cholesky_ex(reversed_H)
    # LAPACK leaves it column by column.
    return None if failed.item() or not _all_finite(L) else L.float().contiguous()
