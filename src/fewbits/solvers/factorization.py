"""The factor that GPTQ sweeps with: upper triangular U with H⁻¹ = Uᵀ U, after as much damping as it takes.

With H = M Mᵀ and M upper triangular, U = M⁻¹: one Cholesky of H turned by half a turn and one triangular inverse, in
place of a Cholesky, an inverse and another Cholesky.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewbits.fp32_products import fast_fp32

DAMPING = 0.01
# Each step damps ten times more than the one before.
DAMPING_STEPS = 5
# Triangles this wide are inverted by substitution, wider ones by halves.
SMALL_TRIANGLE = 256


@dataclass(frozen=True)
class Factor:
    """U fp32 [K, K], the damping that was added to H's diagonal, and what it took beyond the usual."""

    U: torch.Tensor
    damping: float
    trouble: str | None


def inverse_factor(H: torch.Tensor, damping: float = DAMPING) -> Factor | None:
    """Factor H⁻¹ of a symmetric, nearly positive semidefinite H [K, K]; None if nothing helps.

    Damps by the mean of the diagonal, ten times more on each failure; then in fp64; then with floored eigenvalues.
    """
    mean = H.diagonal().mean().item()
    if not mean > 0:
        return None
    for step in range(DAMPING_STEPS):
        added = damping * 10**step * mean
        U = _inverse_upper(H, added)
        if U is not None:
            return Factor(U, added, None if step == 0 else f"damping {damping * 10**step:g} of the mean diagonal")
    added = damping * mean
    double = H.double()
    U = _inverse_upper(double, added)
    if U is not None:
        return Factor(U.float(), added, "factored in fp64")
    values, vectors = torch.linalg.eigh(double)
    floored = (vectors * values.clamp_min(added)) @ vectors.T
    U = _inverse_upper((floored + floored.T) / 2, 0.0)
    return None if U is None else Factor(U.float(), added, "eigenvalues floored")


def _inverse_upper(H: torch.Tensor, added: float) -> torch.Tensor | None:
    damped = H.flip(0, 1)
    damped.diagonal().add_(added)
    L, failed = torch.linalg.cholesky_ex(damped)
    # Let go of as they come: matrices this large set the peak memory of a whole run.
    del damped
    if failed.item() or not torch.isfinite(L.diagonal()).all():
        return None
    M = L.flip(0, 1)
    del L
    U = torch.zeros_like(M, memory_format=torch.contiguous_format)
    with fast_fp32():
        _invert_upper(M, U)
    return U if bool(torch.isfinite(U).all()) else None


def _invert_upper(M: torch.Tensor, U: torch.Tensor) -> None:
    """Write the inverse of the upper triangular M into U, zeros so far: [[A, B], [0, C]]⁻¹ has −A⁻¹ B C⁻¹ on top."""
    size = len(M)
    if size <= SMALL_TRIANGLE:
        torch.linalg.solve_triangular(M, torch.eye(size, dtype=M.dtype, device=M.device), upper=True, out=U)
        return
    half = size // 2
    first, rest = slice(0, half), slice(half, size)
    _invert_upper(M[first, first], U[first, first])
    _invert_upper(M[rest, rest], U[rest, rest])
    torch.mm(U[first, first] @ M[first, rest], U[rest, rest], out=U[first, rest])
    U[first, rest].neg_()
