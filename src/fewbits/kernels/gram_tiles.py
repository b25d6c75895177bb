"""H += Σ xₜ xₜᵀ from bf16 rows, with the processor's dot products of bf16 pairs: exact products, fp32 sums.

Two rows at a time lie side by side as pairs, [tiles, pairs, TILE], which serves as either factor: 16 neighbouring
channels are one vector, and a single channel is spread over all of another. A tile of STRIP × TILE sums stays in
registers over all pairs. Only tiles on and above the diagonal are computed, each by one thread in one order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit

from fewbits.kernels.compiling import as_bits, as_float, as_numpy
from fewbits.kernels.lanes import HAS_BF16, LANES
from fewbits.kernels.memory import as_bf16
from fewbits.kernels.strips import STRIP, add_strip
from fewbits.kernels.threads import over_rows

# Channels of a tile, three vectors of 16.
TILE = 48
# Rows packed at a time: both factors of a tile, 48 KB each, stay in the second-level cache.
ROWS = 512

_add_strip = add_strip(TILE // LANES)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _multiply(packed: Any, gram: Any, first: Any, last: Any) -> None:
    """Tiles `first` to `last` of those on and above the diagonal, counted down the columns of tiles."""
    pairs, width = packed.shape[1], gram.shape[0]
    scratch = np.empty((STRIP, TILE), np.float32)
    column = np.int64(np.sqrt(2.0 * first))
    while column * (column + 1) // 2 > first:
        column -= 1
    while (column + 1) * (column + 2) // 2 <= first:
        column += 1
    row = first - column * (column + 1) // 2
    for _ in range(first, last):
        left, right = packed[row].ctypes.data, packed[column].ctypes.data
        for strip in range(0, TILE, STRIP):
            top, begin = row * TILE + strip, column * TILE
            if top + STRIP <= width and begin + TILE <= width:
                place = gram[top, begin:].ctypes.data
                _add_strip(left + 4 * strip, 4, 4 * TILE, right, pairs, place, 4 * width)
            elif top < width:
                scratch[:] = np.float32(0.0)
                _add_strip(left + 4 * strip, 4, 4 * TILE, right, pairs, scratch.ctypes.data, 4 * TILE)
                for r in range(min(STRIP, width - top)):
                    for c in range(min(TILE, width - begin)):
                        gram[top + r, begin + c] += scratch[r, c]
        row += 1
        if row > column:
            row, column = 0, column + 1


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _pack(rows: Any, roots: Any, packed: Any, absmax: Any, absolute: Any, first: Any, last: Any) -> None:
    """Tiles `first` to `last` of rows, with the largest magnitude and the sum of magnitudes by channel."""
    count, width = rows.shape
    weighted = len(roots) > 0
    for tile in range(first, last):
        begin = tile * TILE
        lanes = min(TILE, width - begin)
        largest, total = np.zeros(TILE, np.uint16), np.zeros(TILE, np.float32)
        if lanes < TILE:
            packed[tile] = np.uint32(0)
        for pair in range(packed.shape[1]):
            even, odd = 2 * pair, 2 * pair + 1
            for lane in range(lanes):
                low = rows[even, begin + lane]
                high = rows[odd, begin + lane] if odd < count else np.uint16(0)
                low_size, high_size = np.uint16(low & np.uint16(0x7FFF)), np.uint16(high & np.uint16(0x7FFF))
                larger = low_size if low_size > high_size else high_size
                largest[lane] = larger if larger > largest[lane] else largest[lane]
                total[lane] += as_float(np.uint32(low_size) << np.uint32(16))
                total[lane] += as_float(np.uint32(high_size) << np.uint32(16))
                packed[tile, pair, lane] = np.uint32(low) | np.uint32(np.uint32(high) << np.uint32(16))
            if weighted:
                first_root = roots[even]
                second_root = roots[odd] if odd < count else np.float32(0.0)
                for lane in range(lanes):
                    both = packed[tile, pair, lane]
                    low = as_bf16(as_float(np.uint32(both << np.uint32(16))) * first_root)
                    high = as_bf16(as_float(np.uint32(both & np.uint32(0xFFFF0000))) * second_root)
                    packed[tile, pair, lane] = np.uint32(low) | np.uint32(np.uint32(high) << np.uint32(16))
        for lane in range(lanes):
            # As bits, so that NaN counts as the largest.
            magnitude = np.uint32(np.uint32(largest[lane]) << np.uint32(16))
            absmax[begin + lane] = as_float(max(as_bits(absmax[begin + lane]), magnitude))
            absolute[begin + lane] += total[lane]


def fits(inputs: torch.Tensor) -> bool:
    """Whether this processor has the products and these are rows for them."""
    return HAS_BF16 and inputs.dtype == torch.bfloat16 and inputs.device.type == "cpu"


class GramTiles:
    """The tiles of one Gram, and the memory that rows are packed into."""

    def __init__(self, gram: torch.Tensor, absmax: torch.Tensor, absolute: torch.Tensor) -> None:
        """Add to these, in place.

        Args:
            gram: fp32 [width, width], of which tiles on and above the diagonal are added to.
            absmax, absolute: fp32 and fp64 [width], the largest and the sum of the magnitudes by channel.
        """
        self._gram, self._absmax, self._absolute = gram.numpy(), absmax.numpy(), absolute.numpy()
        self._tiles = -(-len(gram) // TILE)
        self._packed = np.empty(0, np.uint32)

    def add(self, rows: torch.Tensor, roots: torch.Tensor | None) -> None:
        """Add rows, bf16 [count, width], each times its root and then rounded to bf16 again."""
        bits = as_numpy(rows.contiguous())
        scales = np.empty(0, np.float32) if roots is None else roots.numpy()
        for start in range(0, len(bits), ROWS):
            part = bits[start : start + ROWS]
            self._add(part, scales[start : start + ROWS])

    def _add(self, part: Any, roots: Any) -> None:
        pairs = -(-len(part) // 2)
        size = self._tiles * pairs * TILE
        if len(self._packed) < size:
            self._packed = np.empty(size, np.uint32)
        packed = self._packed[:size].reshape(self._tiles, pairs, TILE)
        over_rows(
            self._tiles, len(part) * TILE,
            lambda first, last: _pack(part, roots, packed, self._absmax, self._absolute, first, last),
        )  # fmt: skip
        over_rows(
            self._tiles * (self._tiles + 1) // 2, len(part) * TILE,
            lambda first, last: _multiply(packed, self._gram, first, last),
        )  # fmt: skip
