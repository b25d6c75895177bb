"""H += Σ xₜ xₜᵀ from bf16 rows, with the processor's dot products of bf16 pairs: exact products, fp32 sums.

Two rows at a time lie side by side as pairs, [tiles, pairs, TILE], which serves as either factor: 16 neighbouring
channels are one vector, and a single channel is spread over all of another. A tile of STRIP × TILE sums stays in
registers over all pairs. Matrix units take the left factor turned, channels of pairs side by side, and a whole tile of
sums at once. Only tiles on and above the diagonal are computed, each by one thread in one order.
Packing and multiplying take turns in one program (kernels.team): waking threads costs more than a small step.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray

from fewbits.kernels.compiling import Array, as_bits, as_float, inlined, inner
from fewbits.kernels.lanes import HAS_BF16, LANES
from fewbits.kernels.matrix_sums import add_matrices, begin, end
from fewbits.kernels.matrix_units import HAS_MATRIX_UNITS
from fewbits.kernels.memory import pointer_to
from fewbits.kernels.packed_pairs import pack_pairs
from fewbits.kernels.panel_lanes import add_panel
from fewbits.kernels.scratch import shared_buffer
from fewbits.kernels.strips import STRIP, add_strip
from fewbits.kernels.team import OWN, WORDS, Program, Work, compiled_work, team_size
from fewbits.kernels.turned import turn_words

# Channels of a tile: three vectors of 16, or what matrix units sum up at once. And pairs come by so many.
TILE, TOGETHER = (32, 16) if HAS_MATRIX_UNITS else (48, 1)
# Rows packed at a time: both factors of a tile, 48 KB each, stay in the second-level cache. Matrix units sum up so fast
# that sums too wide for a cache, read and written for all of these, would take longer than they: then there are more.
ROWS, ROWS_OF_WIDE, WIDE = 512, 2048, 2048

_add_strip, _multiply_matrices = add_strip(TILE // LANES), add_matrices(32, 32, False)
# The fields of a block. ROOTS_AT is 0 where rows are not weighted, TURNED_AT where matrix units don't ask for them.
ROWS_AT, ROW_BYTES, COUNT, WIDTH, ROOTS_AT, PACKED_AT, TURNED_AT, GRAM_AT, ABSMAX_AT, ABSOLUTE_AT = range(OWN, OWN + 10)


@inlined
def pairs_of(rows: Any) -> Any:
    """Pairs that rows are packed into."""
    return ((rows + 1) // 2 + TOGETHER - 1) // TOGETHER * TOGETHER


def rows_at_once(width: int) -> int:
    """Rows that are packed at a time for sums of so many columns."""
    return ROWS_OF_WIDE if HAS_MATRIX_UNITS and width >= WIDE else ROWS


@inlined
def turned_bytes(pairs: Any) -> Any:
    """Bytes from one channel's pairs to the next one's: not a power of two, for the caches."""
    return 4 * pairs + 64


@inner
def _add_in_matrices(left: Any, right: Any, pairs: Any, sums: Any, row: Any, column: Any, scratch: Any) -> Any:
    """`add_tile` with matrix units; says whether there are any."""
    height, width = sums.shape
    top, begin = row * TILE, column * TILE
    stride, wide, turns = np.int64(turned_bytes(pairs)), np.int64(4 * TILE), pairs // TOGETHER
    # On their own: added one by one to sums over many rows, products would lose more bits.
    if _multiply_matrices(left, stride, right, wide, turns, scratch.ctypes.data, wide) == 0:
        return False
    if begin + TILE <= width:
        for r in range(min(TILE, height - top)):
            add_panel(scratch[r].ctypes.data, sums[top + r, begin:].ctypes.data)
        return True
    for r in range(min(TILE, height - top)):
        for c in range(min(TILE, width - begin)):
            sums[top + r, begin + c] += scratch[r, c]
    return True


@inner
def add_tile(left: Any, right: Any, pairs: Any, sums: Any, row: Any, column: Any, scratch: Any) -> None:
    """Products of packed tiles at two addresses to the sums where these tiles meet, by their numbers.

    left: turned, for matrix units. scratch: [TILE, TILE].
    """
    height, width = sums.shape
    if _add_in_matrices(left, right, pairs, sums, row, column, scratch):
        return
    for strip in range(0, TILE, STRIP):
        top, begin = row * TILE + strip, column * TILE
        if top + STRIP <= height and begin + TILE <= width:
            _add_strip(left + 4 * strip, 4, 4 * TILE, right, pairs, sums[top, begin:].ctypes.data, 4 * width)
        elif top < height:
            scratch[:] = np.float32(0.0)
            _add_strip(left + 4 * strip, 4, 4 * TILE, right, pairs, scratch.ctypes.data, 4 * TILE)
            for r in range(min(STRIP, height - top)):
                for c in range(min(TILE, width - begin)):
                    sums[top + r, begin + c] += scratch[r, c]


@inlined
def left_tile(turned: Any, packed: Any, pairs: Any, tile: Any) -> Any:
    """The address of a tile as the left factor: of turned ones, if there are any, at an address."""
    return turned + tile * TILE * turned_bytes(pairs) if turned != 0 else packed + tile * TILE * 4 * pairs


@inner
def _multiply(packed: Any, turned: Any, gram: Any, first: Any, last: Any) -> None:
    """Tiles `first` to `last` of those on and above the diagonal, counted down the columns of tiles."""
    pairs, at = packed.shape[1], packed.ctypes.data
    scratch = np.empty((TILE, TILE), np.float32)
    column = np.int64(np.sqrt(2.0 * first))
    while column * (column + 1) // 2 > first:
        column -= 1
    while (column + 1) * (column + 2) // 2 <= first:
        column += 1
    row = first - column * (column + 1) // 2
    for _ in range(first, last):
        left, right = left_tile(turned, at, pairs, row), packed[column].ctypes.data
        add_tile(left, right, pairs, gram, row, column, scratch)
        row += 1
        if row > column:
            row, column = 0, column + 1


@inner
def _turn(packed: Any, turned: Any, channel: Any, pairs: Any) -> None:
    """16 channels at an address, from `channel` on, to the rows of those turned, if there are any."""
    if turned != 0:
        stride = turned_bytes(pairs)
        for pair in range(0, pairs, LANES):
            turn_words(packed + pair * 4 * TILE, 4 * TILE, turned + channel * stride + 4 * pair, stride)


@inner
def _pack(
    rows: Any, step: Any, count: Any, width: Any, roots_at: Any, packed: Any, turned: Any, absmax: Any, absolute: Any,
    first: Any, last: Any,
) -> None:  # fmt: skip
    """16 channels at a time, `first` to `last`, with the largest magnitude and the sum of magnitudes of each."""
    pairs = packed.shape[1]
    edge = np.zeros((2 * pairs, LANES), np.uint16)
    largest, total = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for vector in range(first, last):
        begin = vector * LANES
        lanes = min(LANES, width - begin)
        tile = begin // TILE
        out = packed.ctypes.data + 4 * (tile * pairs * TILE + begin % TILE)
        if lanes <= 0:
            for pair in range(pairs):
                for lane in range(LANES):
                    packed[tile, pair, begin % TILE + lane] = np.uint32(0)
            _turn(out, turned, begin, pairs)
            continue
        source, source_step = rows + 2 * begin, step
        if lanes < LANES or count < 2 * pairs:
            # What lies beyond the last channel or row is not read.
            for t in range(count):
                row = carray(pointer_to(source + t * step), (lanes,), np.uint16)
                for lane in range(lanes):
                    edge[t, lane] = row[lane]
            source, source_step = edge.ctypes.data, 2 * LANES
        pack_pairs(source, source_step, roots_at, pairs, out, 4 * TILE, largest.ctypes.data, total.ctypes.data)
        _turn(out, turned, begin, pairs)
        for lane in range(lanes):
            # As bits, so that NaN counts as the largest.
            absmax[begin + lane] = as_float(max(as_bits(absmax[begin + lane]), as_bits(largest[lane])))
            absolute[begin + lane] += total[lane]


@inner
def _packed(block: Any) -> Any:
    tiles, pairs = (block[WIDTH] + TILE - 1) // TILE, pairs_of(block[COUNT])
    return carray(pointer_to(block[PACKED_AT]), (tiles, pairs, TILE), np.uint32)


def _pack_step(address: Any, start: Any, stop: Any) -> None:
    """Vectors of 16 channels; a vector is a row of the step."""
    block = carray(pointer_to(address), (WORDS,), np.int64)
    width = block[WIDTH]
    absmax = carray(pointer_to(block[ABSMAX_AT]), (width,), np.float32)
    absolute = carray(pointer_to(block[ABSOLUTE_AT]), (width,), np.float64)
    _pack(
        block[ROWS_AT], block[ROW_BYTES], block[COUNT], width, block[ROOTS_AT], _packed(block), block[TURNED_AT],
        absmax, absolute, start, stop,
    )  # fmt: skip


def _multiply_step(address: Any, start: Any, stop: Any) -> None:
    """Tiles on and above the diagonal; a tile is a row of the step."""
    block = carray(pointer_to(address), (WORDS,), np.int64)
    gram = carray(pointer_to(block[GRAM_AT]), (block[WIDTH], block[WIDTH]), np.float32)
    begin()
    _multiply(_packed(block), block[TURNED_AT], gram, start, stop)
    end()


@cache
def _compiled() -> tuple[Any, Any]:
    return compiled_work(_pack_step), compiled_work(_multiply_step)


def fits(*inputs: torch.Tensor) -> bool:
    """Whether this processor has the products and these are rows for them."""
    return HAS_BF16 and all(rows.dtype == torch.bfloat16 and rows.device.type == "cpu" for rows in inputs)


def padded_roots(roots: torch.Tensor | None) -> torch.Tensor | None:
    """Roots of rows and some more, of rows that the last ones are packed with."""
    return None if roots is None else torch.cat([roots, roots.new_zeros(2 * TOGETHER)])


class PackedRows:
    """Rows of one width as pairs, some at a time.

    Args:
        most: rows at a time. is_left: whether they are the left factor, or both.
        absmax, absolute: fp32 and fp64 [width], in which the largest and the sum of magnitudes are kept; None for not.
    """

    def __init__(
        self, width: int, most: int, is_left: bool, absmax: torch.Tensor | None = None,
        absolute: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        absmax = torch.zeros(width) if absmax is None else absmax
        absolute = torch.zeros(width, dtype=torch.float64) if absolute is None else absolute
        self._kept, self._most = (absmax, absolute), most
        self.tiles = -(-width // TILE)
        self._is_left = is_left
        fixed = {WIDTH: width, ABSMAX_AT: absmax.data_ptr(), ABSOLUTE_AT: absolute.data_ptr()}
        self._work = Work(_compiled()[0], fixed)

    def step(self, rows: torch.Tensor, roots: torch.Tensor | None, start: int) -> tuple[Array, int, int, int]:
        """The step that packs as many rows as it may, those from `start` on, where they lie then and how many they are.

        They lie at two addresses, packed and turned, 0 where matrix units don't ask for the latter.

        Args:
            rows: bf16 [count, width], neighbours in a row side by side. roots: as `padded_roots` gives them.
        """
        count = min(self._most, len(rows) - start)
        channels, pairs = self.tiles * TILE, pairs_of(min(self._most, len(rows)))
        turned_words = channels * turned_bytes(pairs) // 4 if self._is_left and HAS_MATRIX_UNITS else 0
        self._packed = shared_buffer(("packed", self._is_left), (channels * pairs,), torch.int32)
        self._turned = shared_buffer("turned", (turned_words,), torch.int32)
        packed_at, turned_at = self._packed.data_ptr(), self._turned.data_ptr() if turned_words else 0
        step = self._work.step(self.tiles * (TILE // LANES), {
            ROWS_AT: rows[start:].data_ptr(), ROW_BYTES: 2 * rows.stride(0), COUNT: count,
            ROOTS_AT: 0 if roots is None else roots[start:].data_ptr(), PACKED_AT: packed_at, TURNED_AT: turned_at,
        })  # fmt: skip
        return step, packed_at, turned_at, count


class GramTiles:
    """The tiles of one Gram."""

    def __init__(self, gram: torch.Tensor, absmax: torch.Tensor, absolute: torch.Tensor) -> None:
        """Add to these, in place.

        Args:
            gram: fp32 [width, width], of which tiles on and above the diagonal are added to.
            absmax, absolute: fp32 and fp64 [width], the largest and the sum of the magnitudes by channel.
        """
        self._kept = gram
        self._most = rows_at_once(len(gram))
        self._rows = PackedRows(len(gram), self._most, True, absmax, absolute)
        self._multiply = Work(_compiled()[1], {WIDTH: len(gram), GRAM_AT: gram.data_ptr()})

    def add(self, rows: torch.Tensor, roots: torch.Tensor | None) -> None:
        """Add rows, bf16 [count, width], each times its root and then rounded to bf16 again."""
        rows, roots = rows if rows.stride(-1) == 1 else rows.contiguous(), padded_roots(roots)
        steps, tiles = [], self._rows.tiles
        for start in range(0, len(rows), self._most):
            step, packed, turned, count = self._rows.step(rows, roots, start)
            fields = {PACKED_AT: packed, TURNED_AT: turned, COUNT: count}
            steps += [step, self._multiply.step(tiles * (tiles + 1) // 2, fields)]
        if steps:
            Program(steps).run(team_size(len(rows) * rows.shape[1] ** 2))
