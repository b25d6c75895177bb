"""Compiled rearrangement of bf16 activations for kernels.token_tiles: pairs of inputs, tokens beside each other."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import carray

from fewbits.kernels.memory import pointer_to
from fewbits.kernels.team import OWN, WORDS, compiled_work

# The fields of a block; a row is a run of PAIRS pairs of a tile.
X_AT, COLUMNS, TOKENS, LANES, OUT_AT = range(OWN, OWN + 5)
PAIRS = 32


def _work(address: Any, start: Any, stop: Any) -> None:
    """[tokens, pairs] to [tiles, pairs, lanes], with zeros for tokens that are not there."""
    fields = carray(pointer_to(address), (WORDS,), np.int64)
    tokens, lanes, pairs = fields[TOKENS], fields[LANES], fields[COLUMNS] // 2
    tiles, runs = (tokens + lanes - 1) // lanes, (pairs + PAIRS - 1) // PAIRS
    x = carray(pointer_to(fields[X_AT]), (tokens, pairs), np.uint32)
    out = carray(pointer_to(fields[OUT_AT]), (tiles, pairs, lanes), np.uint32)
    for run in range(start, stop):
        tile, first = run // runs, run % runs * PAIRS
        last = min(first + PAIRS, pairs)
        present = min(lanes, tokens - tile * lanes)
        for lane in range(present):
            for pair in range(first, last):
                out[tile, pair, lane] = x[tile * lanes + lane, pair]
        for pair in range(first, last):
            for lane in range(present, lanes):
                out[tile, pair, lane] = np.uint32(0)


def runs_of(tokens: int, lanes: int, columns: int) -> int:
    """Rows of the step."""
    return -(-tokens // lanes) * -(-columns // (2 * PAIRS))


@cache
def token_pairs() -> Any:
    """The compiled work."""
    return compiled_work(_work)
