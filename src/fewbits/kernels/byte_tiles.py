"""Compiled products of rows of int8 weights as they are stored, in tiles (kernels.tile_rows), for W8A8.

Processors multiply unsigned by signed bytes, so int8 activations come as code + 128, and a row's sums begin with
−128 · Σ w. Sums of bytes are exact int32.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import types
from numba.extending import overload

from fewbits.kernels.compiling import inner
from fewbits.kernels.lanes import fetch
from fewbits.kernels.memory import copy_bytes
from fewbits.kernels.team import compiled_work
from fewbits.kernels.tile_rows import CODES_AT, ROW_BYTES, WORDS_OF_ROW, make_ready, multiply_rows
from fewbits.kernels.tile_sums import BLOCK_ROWS, WORD_BYTES, tile_of


@inner
def _copy(fields: Any, row: Any, first: Any, last: Any, out_at: Any) -> None:
    """Words of a row, and ask for those that are copied next."""
    at, count = fields[CODES_AT] + row * fields[ROW_BYTES] + WORD_BYTES * first, WORD_BYTES * (last - first)
    ahead = at + count
    if last == fields[WORDS_OF_ROW]:
        ahead = fields[CODES_AT] + (row + BLOCK_ROWS) * fields[ROW_BYTES]
    for line in range(0, count, 64):
        fetch(ahead + line)
    copy_bytes(out_at, at, count)


@overload(make_ready, strict=False)  # type: ignore[untyped-decorator]
def _make_ready(decoder: Any, fields: Any, row: Any, first: Any, last: Any, out_at: Any) -> Any:
    if isinstance(decoder, types.NoneType):
        return lambda decoder, fields, row, first, last, out_at: _copy(fields, row, first, last, out_at)
    return None


@cache
def byte_tiles(vectors: int, in_matrices: bool) -> Any:
    """The compiled work."""

    def work(block: Any, start: Any, stop: Any) -> None:
        multiply_rows(None, tile_of(vectors, True, in_matrices), block, start, stop)

    return compiled_work(work)
