"""C += Σ yₜ xₜᵀ from bf16 rows, as `gram_tiles` adds up Grams: pairs of rows packed, tiles of sums in registers."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray

from fewbits.kernels.compiling import inner
from fewbits.kernels.gram_tiles import (
    TILE,
    PackedRows,
    add_tile,
    left_tile,
    padded_roots,
    pairs_of,
    rows_at_once,
)
from fewbits.kernels.matrix_sums import begin, end
from fewbits.kernels.memory import pointer_to
from fewbits.kernels.team import OWN, WORDS, Program, Work, compiled_work, team_size

# The fields of a block.
LEFT_AT, TURNED_AT, RIGHT_AT, PAIRS, HEIGHT, WIDTH, SUMS_AT = range(OWN, OWN + 7)


@inner
def _multiply(left: Any, turned: Any, right: Any, pairs: Any, sums: Any, first: Any, last: Any) -> None:
    """Tiles `first` to `last`, counted down the columns of tiles."""
    tile_bytes, rows = 4 * pairs * TILE, (sums.shape[0] + TILE - 1) // TILE
    scratch = np.empty((TILE, TILE), np.float32)
    for tile in range(first, last):
        column, row = tile // rows, tile % rows
        tile_of_left = left_tile(turned, left, pairs, row)
        add_tile(tile_of_left, right + column * tile_bytes, pairs, sums, row, column, scratch)


def _multiply_step(address: Any, start: Any, stop: Any) -> None:
    """A tile is a row of the step."""
    block = carray(pointer_to(address), (WORDS,), np.int64)
    sums = carray(pointer_to(block[SUMS_AT]), (block[HEIGHT], block[WIDTH]), np.float32)
    begin()
    _multiply(block[LEFT_AT], block[TURNED_AT], block[RIGHT_AT], block[PAIRS], sums, start, stop)
    end()


@cache
def _compiled() -> Any:
    return compiled_work(_multiply_step)


class CrossTiles:
    """The tiles of sums fp32 [height, width], which are added to in place."""

    def __init__(self, sums: torch.Tensor) -> None:
        self._kept = sums
        height, width = sums.shape
        self._most = rows_at_once(min(height, width))
        self._left, self._right = PackedRows(height, self._most, True), PackedRows(width, self._most, False)
        fixed = {HEIGHT: height, WIDTH: width, SUMS_AT: sums.data_ptr()}
        self._multiply = Work(_compiled(), fixed)

    def add(self, left: torch.Tensor, right: torch.Tensor, roots: torch.Tensor | None) -> None:
        """Add rows, bf16 [count, height] and [count, width], each times its root and then rounded to bf16 again."""
        left, right = (rows if rows.stride(-1) == 1 else rows.contiguous() for rows in (left, right))
        roots, steps = padded_roots(roots), []
        for start in range(0, len(left), self._most):
            pack_left, left_at, turned_at, count = self._left.step(left, roots, start)
            pack_right, right_at, _, _ = self._right.step(right, roots, start)
            fields = {LEFT_AT: left_at, TURNED_AT: turned_at, RIGHT_AT: right_at, PAIRS: pairs_of(count)}
            multiply = self._multiply.step(self._left.tiles * self._right.tiles, fields)
            steps += [pack_left, pack_right, multiply]
        if steps:
            Program(steps).run(team_size(left.numel() * right.shape[1]))
