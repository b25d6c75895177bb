"""Compiled Cholesky factor and inverse of a triangle, both in place, the same whatever the number of threads.

32 columns at a time, each from all columns before it (left-looking), so that every number is read, summed up in
registers and written once. Source: Golub and Van Loan, Matrix Computations, 4.2.
Steps of a program (kernels.team): a step begins when the one before has been done by whoever came.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray

from fewbits.kernels.compiling import Array, inlined, inner
from fewbits.kernels.lane_products import COLUMN_BYTES, ROWS, add_products, subtract_products
from fewbits.kernels.memory import copy_matrix, pointer_to
from fewbits.kernels.team import OWN, WORDS, Program, Work, compiled_work, team_size
from fewbits.kernels.turned import turn_rows

# Panels of an inverse that are computed before they are written over what they are computed from.
PANELS = 32
# The fields of a block. FIRST is the column or the panel that a step begins at, SCRATCH what it leaves for the next.
H_AT, PLACES_AT, DIAGONAL_AT, ADDED, M_AT, SIZE, INVERSES_AT, FIRST, SCRATCH_AT, FAILED_AT = range(OWN, OWN + 10)


@inlined
def _matrix(address: Any, rows: Any, columns: Any) -> Any:
    return carray(pointer_to(address), (rows, columns), np.float32)


@inner
def _invert_small(block: Any, width: Any, inverse: Any) -> None:
    """Invert a lower triangle, the inverses of its diagonal being there."""
    for c in range(width):
        for d in range(c):
            total = np.float32(0.0)
            for e in range(d, c):
                total += block[c, e] * inverse[e, d]
            inverse[c, d] = -total * inverse[c, c]


@inner
def _factor_small(block: Any, width: Any, inverse: Any) -> Any:
    """Factor the lower triangle of a block in place, and invert the factor; says whether it was positive definite."""
    for c in range(width):
        for d in range(c):
            total = np.float32(0.0)
            for e in range(d):
                total += block[c, e] * block[d, e]
            block[c, d] = (block[c, d] - total) * inverse[d, d]
        total = np.float32(0.0)
        for e in range(c):
            total += block[c, e] * block[c, e]
        pivot = block[c, c] - total
        # A pivot that is no number fails as well.
        if not (pivot > np.float32(0.0) and pivot < np.float32(np.inf)):
            return False
        block[c, c] = np.sqrt(pivot)
        inverse[c, c] = np.float32(1.0) / block[c, c]
    _invert_small(block, width, inverse)
    return True


def _arrange(address: Any, start: Any, stop: Any) -> None:
    """Rows of M's lower triangle: those of H in another order, with another diagonal."""
    block = carray(pointer_to(address), (WORDS,), np.int64)
    size = block[SIZE]
    H, M = _matrix(block[H_AT], size, size), _matrix(block[M_AT], size, size)
    places, diagonal = carray(pointer_to(block[PLACES_AT]), (size,), np.int64), _matrix(block[DIAGONAL_AT], 1, size)
    added = _matrix(address + 8 * ADDED, 1, 1)[0, 0]
    for row in range(start, stop):
        given = H[places[row]]
        for column in range(row):
            M[row, column] = given[places[column]]
        M[row, row] = diagonal[0, row] + added


def _factor_diagonal(address: Any, start: Any, stop: Any) -> None:
    """The 32 columns' own rows, their inverse, and those rows as columns for the rows below."""
    block = carray(pointer_to(address), (WORDS,), np.int64)
    size, first = block[SIZE], block[FIRST]
    failed = carray(pointer_to(block[FAILED_AT]), (1,), np.int64)
    if failed[0] != 0:
        return
    M, left = _matrix(block[M_AT], size, size), _matrix(block[SCRATCH_AT], size, ROWS)
    inverse = _matrix(block[INVERSES_AT] + first * COLUMN_BYTES, ROWS, ROWS)
    width = min(ROWS, size - first)
    if width == ROWS:
        line = np.int64(COLUMN_BYTES)
        turn_rows(block[M_AT] + 4 * first * size, 4 * size, left.ctypes.data, line, np.int64(ROWS), first)
    else:
        for lane in range(width):
            for j in range(first):
                left[j, lane] = M[first + lane, j]
    own = np.zeros((ROWS, ROWS), np.float32)
    copy_matrix(own[:width, :width], M[first : first + width, first : first + width])
    if first > 0:
        matrix = block[M_AT] + 4 * first * size
        subtract_products(matrix, 4 * size, left.ctypes.data, first, own.ctypes.data, width)
    if not _factor_small(own, width, inverse):
        failed[0] = 1
    for c in range(width):
        for d in range(width):
            M[first + c, first + d] = own[c, d] if d <= c else np.float32(0.0)


def _factor_below(address: Any, start: Any, stop: Any) -> None:
    """The 32 columns in rows below, a tile of 32 rows a row of the step."""
    block = carray(pointer_to(address), (WORDS,), np.int64)
    size, first = block[SIZE], block[FIRST]
    if carray(pointer_to(block[FAILED_AT]), (1,), np.int64)[0] != 0:
        return
    M = _matrix(block[M_AT], size, size)
    turned = _matrix(block[INVERSES_AT] + first * COLUMN_BYTES, ROWS, ROWS).T.copy()
    behind = first + ROWS
    for tile in range(start, stop):
        row = behind + tile * ROWS
        count = min(ROWS, size - row)
        sums, solved = np.zeros((ROWS, ROWS), np.float32), np.zeros((ROWS, ROWS), np.float32)
        copy_matrix(sums[:count], M[row : row + count, first:behind])
        if first > 0:
            subtract_products(
                block[M_AT] + 4 * row * size, 4 * size, block[SCRATCH_AT], first, sums.ctypes.data, count
            )  # fmt: skip
        add_products(sums.ctypes.data, COLUMN_BYTES, turned.ctypes.data, ROWS, solved.ctypes.data, count)
        copy_matrix(M[row : row + count, first:behind], solved)
        M[first:behind, row : row + count] = np.float32(0.0)


def _invert_diagonal(address: Any, start: Any, stop: Any) -> None:
    """The inverses of blocks of 32 columns on the diagonal."""
    block = carray(pointer_to(address), (WORDS,), np.int64)
    size = block[SIZE]
    M = _matrix(block[M_AT], size, size)
    for tile in range(start, stop):
        first = tile * ROWS
        width = min(ROWS, size - first)
        inverse = _matrix(block[INVERSES_AT] + first * COLUMN_BYTES, ROWS, ROWS)
        for c in range(width):
            inverse[c, c] = np.float32(1.0) / M[first + c, first + c]
        _invert_small(M[first : first + width, first : first + width], width, inverse)


def _invert_panel(address: Any, start: Any, stop: Any) -> None:
    """Panels of 32 columns of the inverse, a panel a row of the step, into its scratch."""
    block = carray(pointer_to(address), (WORDS,), np.int64)
    size = block[SIZE]
    sums = np.empty((ROWS, ROWS), np.float32)
    for panel in range(start, stop):
        top = block[FIRST] + panel * ROWS
        found = _matrix(block[SCRATCH_AT] + panel * size * COLUMN_BYTES, size, ROWS)
        rows = min(ROWS, size - top)
        copy_matrix(found[top : top + rows], _matrix(block[INVERSES_AT] + top * COLUMN_BYTES, ROWS, ROWS))
        at = found.ctypes.data + top * COLUMN_BYTES
        for first in range(top + ROWS, size, ROWS):
            rows = min(ROWS, size - first)
            sums[:] = np.float32(0.0)
            matrix = block[M_AT] + 4 * (first * size + top)
            subtract_products(matrix, 4 * size, at, first - top, sums.ctypes.data, rows)
            found[first : first + rows] = np.float32(0.0)
            inverse, behind = block[INVERSES_AT] + first * COLUMN_BYTES, at + (first - top) * COLUMN_BYTES
            add_products(inverse, COLUMN_BYTES, sums.ctypes.data, rows, behind, rows)


def _write_panel(address: Any, start: Any, stop: Any) -> None:
    block = carray(pointer_to(address), (WORDS,), np.int64)
    size = block[SIZE]
    M = _matrix(block[M_AT], size, size)
    for panel in range(start, stop):
        top = block[FIRST] + panel * ROWS
        width = min(ROWS, size - top)
        found = _matrix(block[SCRATCH_AT] + panel * size * COLUMN_BYTES, size, ROWS)
        copy_matrix(M[top:, top : top + width], found[top:])


def _mirror(address: Any, start: Any, stop: Any) -> None:
    """Turn the lower triangle about its other diagonal, tiles of 32 rows."""
    block = carray(pointer_to(address), (WORDS,), np.int64)
    size = block[SIZE]
    M = _matrix(block[M_AT], size, size)
    for tile in range(start, stop):
        for left in range(0, size, ROWS):
            for row in range(tile * ROWS, min(tile * ROWS + ROWS, size)):
                for column in range(left, min(left + ROWS, row + 1, size - 1 - row)):
                    kept = M[row, column]
                    M[row, column] = M[size - 1 - column, size - 1 - row]
                    M[size - 1 - column, size - 1 - row] = kept


_WORK = {
    work.__name__: work
    for work in (
        _arrange, _factor_diagonal, _factor_below, _invert_diagonal, _invert_panel, _write_panel, _mirror,
    )
}  # fmt: skip


@cache
def _compiled(name: str) -> Any:
    return compiled_work(_WORK[name])


def _inverses(size: int) -> Array:
    """Room for the inverses of the blocks on the diagonal."""
    return np.zeros((-(-size // ROWS), ROWS, ROWS), np.float32)


def factor_in(H: torch.Tensor, order: torch.Tensor, diagonal: torch.Tensor, added: float, out: torch.Tensor) -> bool:
    """Write lower triangular L with L Lᵀ = J (H' + added · 1) J, J the reversal of rows; False where there is none.

    Args:
        H: symmetric fp32 [K, K]; H' has its channels in `order`, int64 [K], and `diagonal`, fp32 [K], for its own.
        out: fp32 [K, K], contiguous.
    """
    H = H.contiguous()
    size = len(H)
    places, diagonal = order.flip(0), diagonal.flip(0)
    inverses, failed, scratch = _inverses(size), np.zeros(1, np.int64), np.empty((size, ROWS), np.float32)
    fixed = {
        H_AT: H.data_ptr(), PLACES_AT: places.data_ptr(), DIAGONAL_AT: diagonal.data_ptr(),
        ADDED: int(np.float32(added).view(np.uint32)), M_AT: out.data_ptr(), SIZE: size,
        INVERSES_AT: inverses.ctypes.data, SCRATCH_AT: scratch.ctypes.data, FAILED_AT: failed.ctypes.data,
    }  # fmt: skip
    work = {name: Work(_compiled(name), fixed) for name in ("_arrange", "_factor_diagonal", "_factor_below")}
    steps: list[Array] = [work["_arrange"].step(size, {})]
    for first in range(0, size, ROWS):
        steps.append(work["_factor_diagonal"].step(1, {FIRST: first}))
        if first + ROWS < size:
            steps.append(work["_factor_below"].step(-(-(size - first) // ROWS) - 1, {FIRST: first}))
    Program(steps).run(team_size(size**3))
    return not failed[0]


def invert_in(L: torch.Tensor) -> torch.Tensor:
    """J L⁻ᵀ J of a lower triangular L, over L, itself lower triangular. With L of `factor_in` it is Uᵀ of H⁻¹ = Uᵀ U.

    Args:
        L: fp32 [K, K], contiguous.
    """
    size, tiles = len(L), -(-len(L) // ROWS)
    inverses, scratch = _inverses(size), np.empty((min(PANELS, tiles), size, ROWS), np.float32)
    fixed = {
        M_AT: L.data_ptr(), SIZE: size, INVERSES_AT: inverses.ctypes.data, SCRATCH_AT: scratch.ctypes.data
    }  # fmt: skip
    names = ("_invert_diagonal", "_invert_panel", "_write_panel", "_mirror")
    work = {name: Work(_compiled(name), fixed) for name in names}
    steps: list[Array] = [work["_invert_diagonal"].step(tiles, {})]
    for first in range(0, tiles, PANELS):
        some = min(PANELS, tiles - first)
        steps.append(work["_invert_panel"].step(some, {FIRST: first * ROWS}))
        steps.append(work["_write_panel"].step(some, {FIRST: first * ROWS}))
    steps.append(work["_mirror"].step(tiles, {}))
    Program(steps).run(team_size(size**3))
    return L
