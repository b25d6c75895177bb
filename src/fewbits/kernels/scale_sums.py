"""Compiled last step of W8A8: y = sum · scale of the token · scale of the row + bias, in the activations' dtype."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import carray

from fewbits.kernels.compiling import inner
from fewbits.kernels.memory import BFLOAT16, FLOAT16, FLOAT32, as_bf16, float_as_half, number_at, pointer_to
from fewbits.kernels.team import OWN, WORDS, compiled_work

# The fields of a block; a row is a token.
SUMS_AT, COLUMNS, X_SCALES_AT, SCALES_AT, SCALE_KIND, BIAS_AT, OUT_AT, OUT_KIND = range(OWN, OWN + 8)


@inner
def _token(sums: Any, token_scale: Any, scales: Any, biases: Any, out_at: Any, kind: Any) -> None:
    columns = sums.size
    for n in range(columns):
        sums[n] = sums[n] * token_scale * scales[n] + biases[n]
    if kind == BFLOAT16:
        out = carray(pointer_to(out_at), (columns,), np.uint16)
        for n in range(columns):
            out[n] = as_bf16(sums[n])
    elif kind == FLOAT16:
        out = carray(pointer_to(out_at), (columns,), np.uint16)
        for n in range(columns):
            out[n] = float_as_half(sums[n])
    else:
        wide = carray(pointer_to(out_at), (columns,), np.float32)
        for n in range(columns):
            wide[n] = sums[n]


def _work(address: Any, start: Any, stop: Any) -> None:
    block = carray(pointer_to(address), (WORDS,), np.int64)
    columns = block[COLUMNS]
    scales, biases = np.empty(columns, np.float32), np.zeros(columns, np.float32)
    for n in range(columns):
        scales[n] = number_at(block[SCALES_AT], n, block[SCALE_KIND])
        if block[BIAS_AT] != 0:
            biases[n] = number_at(block[BIAS_AT], n, FLOAT32)
    width = 4 if block[OUT_KIND] == FLOAT32 else 2
    for token in range(start, stop):
        sums = carray(pointer_to(block[SUMS_AT] + 4 * token * columns), (columns,), np.float32)
        token_scale = number_at(block[X_SCALES_AT], token, FLOAT32)
        _token(sums, token_scale, scales, biases, block[OUT_AT] + width * token * columns, block[OUT_KIND])


@cache
def scale_sums() -> Any:
    """The compiled work."""
    return compiled_work(_work)
