"""What products in tiles share: blocks of rows, made ready in the second-level cache and multiplied there.

A thread makes a block of rows and inputs ready, multiplies it with all tokens, and goes on to the next inputs of these
rows; sums of the block's rows and all tokens wait in memory meanwhile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from fewbits.kernels.compiling import inner
from fewbits.kernels.lanes import LANES
from fewbits.kernels.memory import FLOAT32, number_at, pointer_to
from fewbits.kernels.team import OWN, ROWS, WORDS
from fewbits.kernels.tile_outputs import ROOM, write_tile
from fewbits.kernels.tile_sums import (
    BLOCK_BYTES,
    BLOCK_ROWS,
    STRIDE,
    TILE,
    VECTOR_BYTES,
    WORD_BYTES,
    add_tile,
    begin,
    begins_with_sums,
    end,
    fill_vector,
    rows_of,
    vectors_of,
)

# The fields of a block that every kind of product has; a kind's own begin at OWN_OF_KIND. WORDS_OF_ROW: words of 32
# bits that a row of inputs takes as tiles multiply them. SCALES_AT: of rows, or 0 where the rows themselves are scaled.
# SUMS_BEGIN_AT: int32, what the sums of a row begin with, or 0.
(
    CODES_AT, ROW_BYTES, WORDS_OF_ROW, X_AT, TOKENS, X_SCALES_AT, SCALES_AT, SCALE_KIND, BIAS_AT, SUMS_BEGIN_AT, OUT_AT,
    OUT_KIND,
) = range(OWN, OWN + 12)  # fmt: skip
OWN_OF_KIND = OWN + 12
# A block is at most so many words wide, and each but the last a multiple of so many.
BLOCK_WORDS, WORDS_AT_ONCE = BLOCK_BYTES // WORD_BYTES, 16


def make_ready(decoder: Any, fields: Any, row: Any, first: Any, last: Any, out_at: Any) -> None:
    """Write words `first` to `last` of a row to an address: what kinds of products overload, by their decoder."""
    raise NotImplementedError


@inner
def _begin(fields: Any, top: Any, count: Any, scales_at: Any, biases_at: Any) -> None:
    """Scales and biases of a block's rows as fp32."""
    scales = carray(pointer_to(scales_at), (BLOCK_ROWS,), np.float32)
    biases = carray(pointer_to(biases_at), (BLOCK_ROWS,), np.float32)
    for r in range(count):
        if fields[SCALES_AT] != 0:
            scales[r] = number_at(fields[SCALES_AT], top + r, fields[SCALE_KIND])
        if fields[BIAS_AT] != 0:
            biases[r] = number_at(fields[BIAS_AT], top + r, FLOAT32)


@inner
def _begin_sums(fields: Any, top: Any, count: Any, tiles: Any, lanes: Any, sums_at: Any) -> None:
    """What the sums of a block's rows begin with."""
    for r in range(count):
        begin = np.int32(0)
        if fields[SUMS_BEGIN_AT] != 0:
            begin = carray(pointer_to(fields[SUMS_BEGIN_AT] + 4 * (top + r)), (1,), np.int32)[0]
        for t in range(tiles):
            for lane in range(0, lanes, LANES):
                fill_vector(sums_at + 4 * (lanes * (t * BLOCK_ROWS + r) + lane), begin)


@inner
def _blocks(decoder: Any, tile: Any, fields: Any, start: Any, stop: Any, memory: Any) -> None:
    height, vectors, words = rows_of(tile), vectors_of(tile), fields[WORDS_OF_ROW]
    lanes = vectors * LANES
    tiles = (fields[TOKENS] + lanes - 1) // lanes
    # Blocks of about the same width: what begins and ends a tile's sums is paid once for each.
    runs, blocks = (words + WORDS_AT_ONCE - 1) // WORDS_AT_ONCE, (words + BLOCK_WORDS - 1) // BLOCK_WORDS
    width = (runs + blocks - 1) // blocks * WORDS_AT_ONCE
    # Addresses once: making views of an array would cost more than the work on a row.
    ready = (memory.ctypes.data + 63) // 64 * 64
    scales = ready + BLOCK_ROWS * STRIDE
    biases = scales + 4 * BLOCK_ROWS
    ones = biases + 4 * BLOCK_ROWS
    room = ones + 4 * TILE * LANES
    sums = room + ROOM
    carray(pointer_to(scales), (2 * BLOCK_ROWS + lanes,), np.float32)[:] = np.float32(1.0)
    if fields[BIAS_AT] == 0:
        carray(pointer_to(biases), (BLOCK_ROWS,), np.float32)[:] = np.float32(0.0)
    narrow = 4 if fields[OUT_KIND] == FLOAT32 else 2
    out_stride = narrow * fields[ROWS]
    # Blocks of about the same height as well.
    rows = (stop - start + BLOCK_ROWS - 1) // BLOCK_ROWS
    rows = ((stop - start + rows - 1) // rows + height - 1) // height * height
    for top in range(start, stop, rows):
        count = min(rows, stop - top)
        _begin(fields, top, count, scales, biases)
        begins = begins_with_sums(tile, fields[SUMS_BEGIN_AT])
        if begins:
            _begin_sums(fields, top, count, tiles, lanes, sums)
        for first in range(0, words, width):
            last = min(first + width, words)
            for r in range(count):
                make_ready(decoder, fields, top + r, first, last, ready + r * STRIDE)
            for t in range(tiles):
                x = fields[X_AT] + VECTOR_BYTES * vectors * (t * words + first)
                of_tile = sums + 4 * lanes * t * BLOCK_ROWS
                for r in range(0, count, height):
                    place = of_tile + 4 * lanes * r
                    add_tile(tile, ready + r * STRIDE, x, last - first, place, begins or first != 0)
                if last < words:
                    continue
                first_token = t * lanes
                token_scales = fields[X_SCALES_AT] + 4 * first_token if fields[X_SCALES_AT] != 0 else ones
                write_tile(
                    tile, fields[OUT_KIND], of_tile, lanes, scales, biases, token_scales, count,
                    min(lanes, fields[TOKENS] - first_token),
                    fields[OUT_AT] + first_token * out_stride + narrow * top, out_stride, room,
                )  # fmt: skip


@inner
def multiply_rows(decoder: Any, tile: Any, address: Any, start: Any, stop: Any) -> None:
    """Rows `start` to `stop` of a block of fields times all tokens."""
    fields = carray(pointer_to(address), (WORDS,), np.int64)
    lanes = vectors_of(tile) * LANES
    tiles = (fields[TOKENS] + lanes - 1) // lanes
    numbers = 2 * BLOCK_ROWS + TILE * LANES + tiles * BLOCK_ROWS * lanes
    begin(tile)
    # Handed over rather than used here: it lives as long as the call.
    _blocks(decoder, tile, fields, start, stop, np.empty(64 + BLOCK_ROWS * STRIDE + ROOM + 4 * numbers, np.uint8))
    end(tile)
