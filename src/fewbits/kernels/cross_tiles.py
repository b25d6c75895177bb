"""C += Σ yₜ xₜᵀ from bf16 rows, as `gram_tiles` adds up Grams: pairs of rows packed, tiles of sums in registers."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, njit

from fewbits.kernels.gram_tiles import ROWS, TILE, PackedRows, add_tile, padded_roots
from fewbits.kernels.memory import pointer_to
from fewbits.kernels.strips import STRIP
from fewbits.kernels.team import OWN, WORDS, Program, Work, compiled_work, team_size

# The fields of a block.
LEFT_AT, RIGHT_AT, PAIRS, HEIGHT, WIDTH, SUMS_AT = range(OWN, OWN + 6)


@njit  # type: ignore[untyped-decorator]
def _multiply(left: Any, right: Any, pairs: Any, sums: Any, first: Any, last: Any) -> None:
    """Tiles `first` to `last`, counted down the columns of tiles."""
    tile_bytes, rows = 4 * pairs * TILE, (sums.shape[0] + TILE - 1) // TILE
    scratch = np.empty((STRIP, TILE), np.float32)
    for tile in range(first, last):
        column, row = tile // rows, tile % rows
        add_tile(left + row * tile_bytes, right + column * tile_bytes, pairs, sums, row, column, scratch)


def _multiply_step(address: Any, start: Any, stop: Any) -> None:
    """A tile is a row of the step."""
    block = carray(pointer_to(address), (WORDS,), np.int64)
    sums = carray(pointer_to(block[SUMS_AT]), (block[HEIGHT], block[WIDTH]), np.float32)
    _multiply(block[LEFT_AT], block[RIGHT_AT], block[PAIRS], sums, start, stop)


@cache
def _compiled() -> Any:
    return compiled_work(_multiply_step)


class CrossTiles:
    """The tiles of sums fp32 [height, width], which are added to in place."""

    def __init__(self, sums: torch.Tensor) -> None:
        self._kept = sums
        self._left, self._right = (PackedRows(width) for width in sums.shape)
        fixed = {HEIGHT: sums.shape[0], WIDTH: sums.shape[1], SUMS_AT: sums.data_ptr()}
        self._multiply = Work(_compiled(), fixed)

    def add(self, left: torch.Tensor, right: torch.Tensor, roots: torch.Tensor | None) -> None:
        """Add rows, bf16 [count, height] and [count, width], each times its root and then rounded to bf16 again."""
        left, right = (rows if rows.stride(-1) == 1 else rows.contiguous() for rows in (left, right))
        roots, steps = padded_roots(roots), []
        for start in range(0, len(left), ROWS):
            pack_left, left_at, count = self._left.step(left, roots, start)
            pack_right, right_at, _ = self._right.step(right, roots, start)
            fields = {LEFT_AT: left_at, RIGHT_AT: right_at, PAIRS: (count + 1) // 2}
            multiply = self._multiply.step(self._left.tiles * self._right.tiles, fields)
            steps += [pack_left, pack_right, multiply]
        if steps:
            Program(steps).run(team_size(left.numel() * right.shape[1]))
