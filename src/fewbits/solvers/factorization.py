"""The factor that GPTQ sweeps with: upper triangular U with H⁻¹ = Uᵀ U, after as much damping as it takes.

With H = M Mᵀ and M upper triangular, U = M⁻¹: one Cholesky of H turned by half a turn and one triangular inverse, in
place of a Cholesky, an inverse and another Cholesky.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewbits.kernels.triangles import inverse_factor_of
from fewbits.repeatable import one_thread

DAMPING = 0.01
# Each step damps ten times more than the one before.
DAMPING_STEPS = 5


@dataclass(frozen=True)
class Factor:
    """U fp32 [K, K], the damping that was added to H's diagonal, and what it took beyond the usual."""

    U: torch.Tensor
    damping: float
    trouble: str | None


def inverse_factor(H: torch.Tensor, damping: float = DAMPING, memory: torch.Tensor | None = None) -> Factor | None:
    """Factor H⁻¹ of a symmetric, nearly positive semidefinite H [K, K]; None if nothing helps.

    Damps by the mean of the diagonal, ten times more on each failure; then in fp64; then with floored eigenvalues.

    Args:
        memory: fp32 [K, K] that is written over and that U lies in, in place of new memory.
    """
    mean = H.diagonal().mean().item()
    if not mean > 0:
        return None
    for step in range(DAMPING_STEPS):
        added = damping * 10**step * mean
        U = _inverse_upper(H, added, memory)
        if U is not None:
            return Factor(U, added, None if step == 0 else f"damping {damping * 10**step:g} of the mean diagonal")
    with one_thread():
        return _factor_fp64(H.double(), damping * mean)


def _factor_fp64(H: torch.Tensor, added: float) -> Factor | None:
    U = _inverse_upper_fp64(H, added)
    if U is not None:
        return Factor(U, added, "factored in fp64")
    values, vectors = torch.linalg.eigh(H)
    floored = (vectors * values.clamp_min(added)) @ vectors.T
    U = _inverse_upper_fp64((floored + floored.T) / 2, 0.0)
    return None if U is None else Factor(U, added, "eigenvalues floored")


def _inverse_upper(H: torch.Tensor, added: float, memory: torch.Tensor | None = None) -> torch.Tensor | None:
    memory = torch.empty_like(H) if memory is None else memory
    # By its sum: looking at each number on its own would take another matrix.
    return memory.T if inverse_factor_of(H, added, memory) and bool(torch.isfinite(memory.sum())) else None


def _inverse_upper_fp64(H: torch.Tensor, added: float) -> torch.Tensor | None:
    reversed_H = H.flip(0, 1)
    reversed_H.diagonal().add_(added)
    L, failed = torch.linalg.cholesky_ex(reversed_H)
    if failed.item() or not bool(torch.isfinite(L).all()):
        return None
    inverse = torch.linalg.solve_triangular(L, torch.eye(len(L), dtype=L.dtype), upper=False)
    U: torch.Tensor = inverse.flip(0, 1).float()
    return U
