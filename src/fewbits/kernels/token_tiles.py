"""Compiled products of decoded weights with 5 to some hundred tokens, in tiles of sums that stay in registers.

Rows are decoded to bf16, scaled by groups, and multiplied as pairs of inputs (kernels.tile_rows).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import carray
from numba.extending import overload

from fewbits.kernels.compiling import inner
from fewbits.kernels.decode_vectors import decode_vector, table_of
from fewbits.kernels.decoders import Decoder, decoder_of
from fewbits.kernels.lanes import CODES, fetch
from fewbits.kernels.memory import number_at, pointer_to
from fewbits.kernels.team import compiled_work
from fewbits.kernels.tile_rows import (
    CODES_AT,
    OWN_OF_KIND,
    ROW_BYTES,
    SCALE_KIND,
    WORDS_OF_ROW,
    make_ready,
    multiply_rows,
)
from fewbits.kernels.tile_sums import BLOCK_ROWS, tile_of

# The further fields of a block. GROUP_SCALES_AT: 0 where a row has one scale, which multiplies its sums.
VECTOR_BYTES, GROUPS, GROUP_SCALES_AT, ZEROS_AT, SIGNED_ZEROS, MIDPOINT = range(OWN_OF_KIND, OWN_OF_KIND + 6)


@inner
def decode_row(decoder: Any, fields: Any, row: Any, first_word: Any, last_word: Any, out_at: Any) -> None:
    """Pairs of inputs of a row to bf16, and ask for the codes that are decoded next."""
    first, last, columns = 2 * first_word, 2 * last_word, 2 * fields[WORDS_OF_ROW]
    groups, width = fields[GROUPS], fields[VECTOR_BYTES]
    size = columns // groups
    at = fields[CODES_AT] + row * fields[ROW_BYTES] + first // CODES * width
    count = (last - first) // CODES * width
    ahead = at + count
    if last == columns:
        ahead = fields[CODES_AT] + (row + BLOCK_ROWS) * fields[ROW_BYTES]
    for line in range(0, count, 64):
        fetch(ahead + line)
    group = first // size
    column, stop = first, (group + 1) * size
    while column < last:
        scale, zero = np.float32(1.0), np.float32(fields[MIDPOINT])
        if fields[GROUP_SCALES_AT] != 0:
            scale = number_at(fields[GROUP_SCALES_AT], row * groups + group, fields[SCALE_KIND])
        if fields[ZEROS_AT] != 0:
            zero_at = fields[ZEROS_AT] + row * groups + group
            if fields[SIGNED_ZEROS] != 0:
                zero = np.float32(carray(pointer_to(zero_at), (1,), np.int8)[0])
            else:
                zero = np.float32(carray(pointer_to(zero_at), (1,), np.uint8)[0])
        table = table_of(decoder, scale, zero)
        stop = min(stop, last)
        for _ in range(column, stop, CODES):
            decode_vector(decoder, at, table, scale, zero, out_at)
            at, out_at = at + width, out_at + 2 * CODES
        column, group, stop = stop, group + 1, stop + size


@overload(make_ready, strict=False)  # type: ignore[untyped-decorator]
def _make_ready(decoder: Any, fields: Any, row: Any, first: Any, last: Any, out_at: Any) -> Any:
    if isinstance(decoder, Decoder):
        return lambda decoder, fields, row, first, last, out_at: decode_row(decoder, fields, row, first, last, out_at)
    return None


@cache
def token_tiles(decoder: str, vectors: int, in_matrices: bool) -> Any:
    """The compiled work for one way that codes are stored (see decoders.Decoder) and one shape of tiles."""

    def work(block: Any, start: Any, stop: Any) -> None:
        multiply_rows(decoder_of(decoder), tile_of(vectors, False, in_matrices), block, start, stop)

    return compiled_work(work)
