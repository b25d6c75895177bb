"""Compiled decoding of a weight for matrix units: 32 outputs beside each other, word by word of their inputs, as
kernels.matrix_rows takes them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import carray

from fewbits.kernels.compiling import inner
from fewbits.kernels.decoders import decoder_of
from fewbits.kernels.lanes import LANES
from fewbits.kernels.memory import pointer_to
from fewbits.kernels.row_outputs import OUTPUTS
from fewbits.kernels.team import WORDS, compiled_work
from fewbits.kernels.tile_rows import OUT_AT, WORDS_OF_ROW
from fewbits.kernels.token_tiles import MIDPOINT, decode_row
from fewbits.kernels.turned import turn_words

# The field beyond those of kernels.token_tiles; a row of a block is a tile of 32 outputs.
HEIGHT = MIDPOINT + 1


@inner
def _decode(decoder: Any, fields: Any, start: Any, stop: Any, memory: Any) -> None:
    words = fields[WORDS_OF_ROW]
    ready = (memory.ctypes.data + 63) // 64 * 64
    # A line more than it has, so that rows don't fall on the same lines of a cache.
    stride = 4 * words + 64
    for tile in range(start, stop):
        for lane in range(0, OUTPUTS, LANES):
            top = tile * OUTPUTS + lane
            for row in range(LANES):
                at = ready + row * stride
                if top + row < fields[HEIGHT]:
                    decode_row(decoder, fields, top + row, 0, words, at)
                else:
                    carray(pointer_to(at), (words,), np.uint32)[:] = np.uint32(0)
            for word in range(0, words, LANES):
                target = fields[OUT_AT] + 4 * ((tile * words + word) * OUTPUTS + lane)
                turn_words(ready + 4 * word, stride, target, np.int64(4 * OUTPUTS))


@cache
def decoded_columns(decoder: str) -> Any:
    """The compiled work for one way that codes are stored (see decoders.Decoder): to [tiles, words, 32 outputs]."""

    def work(block: Any, start: Any, stop: Any) -> None:
        fields = carray(pointer_to(block), (WORDS,), np.int64)
        # Handed over rather than used here: it lives as long as the call.
        memory = np.empty(64 + LANES * (4 * fields[WORDS_OF_ROW] + 64), np.uint8)
        _decode(decoder_of(decoder), fields, start, stop, memory)

    return compiled_work(work)
