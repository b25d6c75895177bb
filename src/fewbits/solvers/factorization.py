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
# Columns factored at a time.
STEP = 128
# Columns or rows that are multiplied by a triangle at a time.
PANEL = 1024
# Numbers turned around at a time.
REVERSED = 1 << 20


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
    added = damping * mean
    double = H.double()
    U = _inverse_upper(double, added)
    if U is not None:
        return Factor(U.float(), added, "factored in fp64")
    values, vectors = torch.linalg.eigh(double)
    floored = (vectors * values.clamp_min(added)) @ vectors.T
    U = _inverse_upper((floored + floored.T) / 2, 0.0)
    return None if U is None else Factor(U.float(), added, "eigenvalues floored")


def _inverse_upper(H: torch.Tensor, added: float, memory: torch.Tensor | None = None) -> torch.Tensor | None:
    # One matrix for everything from here on: those this large set the peak memory of a whole run.
    memory = torch.empty_like(H) if memory is None else memory
    for start in range(0, len(H), SMALL_TRIANGLE):
        rows = H[start : start + SMALL_TRIANGLE]
        memory[len(H) - start - len(rows) : len(H) - start] = rows.flip(0, 1)
    memory.diagonal().add_(added)
    with fast_fp32():
        if not _factor_upper(memory):
            return None
    _reverse(memory.view(-1))
    U = memory.T
    with fast_fp32():
        _invert_upper(U)
    # By its sum: looking at each number on its own would take another matrix.
    return U if bool(torch.isfinite(U.sum())) else None


def _factor_upper(M: torch.Tensor) -> bool:
    """Replace the symmetric M by upper triangular R with Rᵀ R = M; False where it is not positive definite.

    LAPACK's own factor of more than STEP columns differs in its last bits with the number of threads.
    """
    for start in range(0, len(M), STEP):
        step, behind = slice(start, start + STEP), slice(start + STEP, None)
        L, failed = torch.linalg.cholesky_ex(M[step, step].contiguous())
        if failed.item() or not torch.isfinite(L.diagonal()).all():
            return False
        M[step, step] = L.T
        M[step, behind] = torch.linalg.solve_triangular(L, M[step, behind].contiguous(), upper=False)
        for first in range(start + STEP, len(M), PANEL):
            rows = slice(first, first + PANEL)
            M[rows, first:].addmm_(M[step, rows].T, M[step, first:], alpha=-1)
    M.triu_()
    return True


def _reverse(numbers: torch.Tensor) -> None:
    """Reverse their order in place, which turns a matrix by half a turn."""
    count = len(numbers)
    for start in range(0, count // 2, REVERSED):
        front = slice(start, min(start + REVERSED, count // 2))
        back = slice(count - front.stop, count - front.start)
        kept = numbers[front].flip(0)
        numbers[front] = numbers[back].flip(0)
        numbers[back] = kept


def _invert_upper(M: torch.Tensor) -> None:
    """Invert the upper triangular M in place: [[A, B], [0, C]]⁻¹ has −A⁻¹ B C⁻¹ on top."""
    size = len(M)
    if size <= SMALL_TRIANGLE:
        M.copy_(torch.linalg.solve_triangular(M, torch.eye(size, dtype=M.dtype, device=M.device), upper=True))
        return
    half = size // 2
    first, rest = slice(0, half), slice(half, size)
    _invert_upper(M[first, first])
    _invert_upper(M[rest, rest])
    # In place, some columns and then some rows at a time: between the products lies no other matrix of this size.
    for start in range(half, size, PANEL):
        columns = slice(start, min(start + PANEL, size))
        M[first, columns] = M[first, first] @ M[first, columns]
    for start in range(0, half, PANEL):
        rows = slice(start, min(start + PANEL, half))
        M[rows, rest] = (M[rows, rest] @ M[rest, rest]).neg_()
