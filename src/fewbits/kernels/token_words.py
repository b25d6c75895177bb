"""Compiled rearrangement of activations for tiles (kernels.tile_sums): words of inputs, tokens beside each other."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import carray

from fewbits.kernels.compiling import inner
from fewbits.kernels.lanes import LANES
from fewbits.kernels.memory import pointer_to
from fewbits.kernels.team import OWN, WORDS, compiled_work
from fewbits.kernels.turned import turn_words

# The fields of a block; a row is a run of RUN words of a tile. X_AT: rows of WIDTH words, a token each.
X_AT, WIDTH, TOKENS, LANES_OF_TILE, OUT_AT = range(OWN, OWN + 5)
RUN = 32


@inner
def _turn_some(source: Any, stride: Any, tokens: Any, words: Any, target: Any, target_stride: Any) -> None:
    """Fewer than 16 tokens or words of them; zeros for tokens that are not there."""
    for word in range(words):
        turned = carray(pointer_to(target + word * target_stride), (LANES,), np.uint32)
        for token in range(LANES):
            found = np.uint32(0)
            if token < tokens:
                found = carray(pointer_to(source + token * stride), (words,), np.uint32)[word]
            turned[token] = found


def _work(address: Any, start: Any, stop: Any) -> None:
    """[tokens, words] to [tiles, words, lanes]."""
    fields = carray(pointer_to(address), (WORDS,), np.int64)
    tokens, lanes, width = fields[TOKENS], fields[LANES_OF_TILE], fields[WIDTH]
    runs = (width + RUN - 1) // RUN
    for run in range(start, stop):
        tile, first = run // runs, run % runs * RUN
        last = min(first + RUN, width)
        for lane in range(0, lanes, LANES):
            token = tile * lanes + lane
            there = min(LANES, tokens - token)
            for word in range(first, last, LANES):
                source = fields[X_AT] + 4 * (token * width + word)
                target = fields[OUT_AT] + 4 * ((tile * width + word) * lanes + lane)
                if there == LANES and last - word >= LANES:
                    turn_words(source, 4 * width, target, 4 * lanes)
                else:
                    _turn_some(source, 4 * width, there, min(LANES, last - word), target, 4 * lanes)


def runs_of(tokens: int, lanes: int, width: int) -> int:
    """Rows of the step."""
    return -(-tokens // lanes) * -(-width // RUN)


@cache
def token_words() -> Any:
    """The compiled work."""
    return compiled_work(_work)
