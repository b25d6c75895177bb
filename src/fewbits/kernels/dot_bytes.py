"""Compiled W8A8 for a few tokens: int8 weights as files hold them, times activations rounded to int8 per token.

Processors multiply unsigned by signed bytes, so activations come as code + 128, and 128 · Σ w is taken off each sum.
All sums are exact int32. y = sum · scale of the token · scale of the row + bias, in fp32 and in that order.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import carray

from fewbits.kernels.compiling import inlined, inner
from fewbits.kernels.fetching import fetch_lines
from fewbits.kernels.lanes import add_byte_products, bytes_at, fetch, no_int_sums, store_totals
from fewbits.kernels.memory import FLOAT32, number_at, on_stack, pointer_to, write_all
from fewbits.kernels.team import OWN, ROWS, STREAM_AT, STREAM_BYTES, WORDS, compiled_work

# The fields of a block.
CODES_AT, COLUMNS = STREAM_AT, STREAM_BYTES
(
    ROW_SUMS_AT, SCALES_AT, SCALE_KIND, X_AT, X_STRIDE, X_SCALES_AT, TOKENS, BIAS_AT, OUT_AT, OUT_KIND,
) = range(OWN, OWN + 10)  # fmt: skip
STEP = 64
# Bytes ahead of their use that codes are asked for; measured on 576 to 4096 inputs.
AHEAD = 2**12
# Rows whose sums are kept before outputs are made of them.
SOME_ROWS = 128
ROOM = 4 * SOME_ROWS


@inlined
def _tail(block: Any, row: Any, token: Any) -> Any:
    """The products that no whole vector covers."""
    columns = block[COLUMNS]
    first = columns // STEP * STEP
    codes = carray(pointer_to(block[CODES_AT] + row * columns), (columns,), np.int8)
    x = carray(pointer_to(block[X_AT] + token * block[X_STRIDE]), (columns,), np.uint8)
    total = np.int32(0)
    for k in range(first, columns):
        total += np.int32(np.int32(codes[k]) * np.int32(x[k]))
    return total


@inner
def _finish(block: Any, row: Any, token: Any, sums: Any, values: Any) -> None:
    """Make outputs of the sums of some rows, of which `row` is the first; `values` has room for as many fp32."""
    if block[COLUMNS] % STEP != 0:
        for k in range(sums.size):
            sums[k] += _tail(block, row + k, token)
    x_scale = number_at(block[X_SCALES_AT], token, FLOAT32)
    row_sums = carray(pointer_to(block[ROW_SUMS_AT] + 4 * row), (sums.size,), np.int32)
    for k in range(sums.size):
        values[k] = np.float32(np.int32(sums[k] - np.int32(row_sums[k] * np.int32(128)))) * x_scale
    for k in range(sums.size):
        values[k] *= number_at(block[SCALES_AT], row + k, block[SCALE_KIND])
    if block[BIAS_AT] != 0:
        for k in range(sums.size):
            values[k] += number_at(block[BIAS_AT], row + k, FLOAT32)
    write_all(block[OUT_AT], token * block[ROWS] + row, block[OUT_KIND], values)


@inlined
def _row(codes: Any, x: Any, width: Any) -> Any:
    """Sums of a row and one token, both at addresses."""
    sums = no_int_sums()
    for at in range(0, width - STEP + 1, STEP):
        fetch(codes + at + AHEAD)
        sums = add_byte_products(sums, bytes_at(x + at), bytes_at(codes + at))
    return sums


@inlined
def _two_rows(block: Any, row: Any, t0: Any, t1: Any, t2: Any, t3: Any, totals: Any) -> None:
    """Sums of two rows and four tokens, token after token, to an address."""
    width, stride = block[COLUMNS], block[X_STRIDE]
    x0, x1 = block[X_AT] + t0 * stride, block[X_AT] + t1 * stride
    x2, x3 = block[X_AT] + t2 * stride, block[X_AT] + t3 * stride
    at0, at1 = block[CODES_AT] + row * width, block[CODES_AT] + min(row + 1, block[ROWS] - 1) * width
    s00, s01, s02, s03 = no_int_sums(), no_int_sums(), no_int_sums(), no_int_sums()
    s10, s11, s12, s13 = no_int_sums(), no_int_sums(), no_int_sums(), no_int_sums()
    for at in range(0, width - STEP + 1, STEP):
        fetch(at0 + at + AHEAD)
        fetch(at1 + at + AHEAD)
        codes0, codes1 = bytes_at(at0 + at), bytes_at(at1 + at)
        lanes = bytes_at(x0 + at)
        s00, s10 = add_byte_products(s00, lanes, codes0), add_byte_products(s10, lanes, codes1)
        lanes = bytes_at(x1 + at)
        s01, s11 = add_byte_products(s01, lanes, codes0), add_byte_products(s11, lanes, codes1)
        lanes = bytes_at(x2 + at)
        s02, s12 = add_byte_products(s02, lanes, codes0), add_byte_products(s12, lanes, codes1)
        lanes = bytes_at(x3 + at)
        s03, s13 = add_byte_products(s03, lanes, codes0), add_byte_products(s13, lanes, codes1)
    store_totals(s00, s10, s01, s11, totals)
    store_totals(s02, s12, s03, s13, totals + 16)


@inlined
def _one_token(block: Any, start: Any, stop: Any, totals: Any, values: Any) -> None:
    last, codes, width, x = block[ROWS] - 1, block[CODES_AT], block[COLUMNS], block[X_AT]
    sums = carray(pointer_to(totals), (SOME_ROWS,), np.int32)
    scale_bytes = 4 if block[SCALE_KIND] == FLOAT32 else 2
    fetch_lines(codes + start * width, codes + min(start * width + AHEAD, stop * width))
    fetch_lines(block[ROW_SUMS_AT] + 4 * start, block[ROW_SUMS_AT] + 4 * stop)
    fetch_lines(block[SCALES_AT] + scale_bytes * start, block[SCALES_AT] + scale_bytes * stop)
    for first in range(start, stop, SOME_ROWS):
        end = min(first + SOME_ROWS, stop)
        for r in range(first, end, 4):
            s0, s1 = _row(codes + r * width, x, width), _row(codes + min(r + 1, last) * width, x, width)
            s2, s3 = _row(codes + min(r + 2, last) * width, x, width), _row(codes + min(r + 3, last) * width, x, width)
            store_totals(s0, s1, s2, s3, totals + 4 * (r - first))
        _finish(block, first, 0, sums[: end - first], values[: end - first])


@inlined
def _some_tokens(block: Any, start: Any, stop: Any, totals: Any, values: Any) -> None:
    last, tokens = block[ROWS] - 1, block[TOKENS]
    sums = carray(pointer_to(totals), (8,), np.int32)
    for row in range(start, stop, 2):
        for t in range(0, tokens, 4):
            _two_rows(block, row, t, min(t + 1, tokens - 1), min(t + 2, tokens - 1), min(t + 3, tokens - 1), totals)
            some = min(2, last + 1 - row)
            for token in range(t, min(t + 4, tokens)):
                at = 2 * (token - t)
                _finish(block, row, token, sums[at : at + some], values[:some])


def _work(address: Any, start: Any, stop: Any) -> None:
    block = carray(pointer_to(address), (WORDS,), np.int64)
    totals, outputs = on_stack(ROOM), on_stack(ROOM)
    values = carray(pointer_to(outputs), (SOME_ROWS,), np.float32)
    if block[TOKENS] == 1:
        _one_token(block, start, stop, totals, values)
    else:
        _some_tokens(block, start, stop, totals, values)


@cache
def dot_bytes() -> Any:
    """The compiled work."""
    return compiled_work(_work)
