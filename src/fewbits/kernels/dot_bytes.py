"""Compiled W8A8 for a few tokens: int8 weights as files hold them, times activations rounded to int8 per token.

Processors multiply unsigned by signed bytes, so activations come as code + 128, and 128 · Σ w is taken off each sum.
All sums are exact int32. y = sum · scale of the token · scale of the row + bias, in fp32 and in that order.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import carray, njit

from fewbits.kernels.lanes import add_byte_products, bytes_at, fetch, no_int_sums, total_of
from fewbits.kernels.memory import FLOAT32, number_at, pointer_to, write
from fewbits.kernels.team import OWN, ROWS, WORDS, compiled_work

# The fields of a block.
(
    CODES_AT, COLUMNS, ROW_SUMS_AT, SCALES_AT, SCALE_KIND, X_AT, X_STRIDE, X_SCALES_AT, TOKENS, BIAS_AT, OUT_AT,
    OUT_KIND,
) = range(OWN, OWN + 12)  # fmt: skip
STEP = 64


@njit(inline="always")  # type: ignore[untyped-decorator]
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


@njit(inline="always")  # type: ignore[untyped-decorator]
def _finish(block: Any, row: Any, token: Any, sums: Any) -> None:
    raised = np.int32(carray(pointer_to(block[ROW_SUMS_AT]), (row + 1,), np.int32)[row] * np.int32(128))
    total = np.int32(np.int32(total_of(sums) + _tail(block, row, token)) - raised)
    scaled = np.float32(total) * number_at(block[X_SCALES_AT], token, FLOAT32)
    value = scaled * number_at(block[SCALES_AT], row, block[SCALE_KIND])
    if block[BIAS_AT] != 0:
        value += number_at(block[BIAS_AT], row, FLOAT32)
    write(block[OUT_AT], token * block[ROWS] + row, block[OUT_KIND], value)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _four_rows(block: Any, r0: Any, r1: Any, r2: Any, r3: Any, token: Any) -> None:
    width, x = block[COLUMNS], block[X_AT] + token * block[X_STRIDE]
    at0, at1 = block[CODES_AT] + r0 * width, block[CODES_AT] + r1 * width
    at2, at3 = block[CODES_AT] + r2 * width, block[CODES_AT] + r3 * width
    s0, s1, s2, s3 = no_int_sums(), no_int_sums(), no_int_sums(), no_int_sums()
    for step in range(width // STEP):
        at = step * STEP
        ahead = at + 4 * width
        fetch(at0 + ahead)
        fetch(at1 + ahead)
        fetch(at2 + ahead)
        fetch(at3 + ahead)
        lanes = bytes_at(x + at)
        s0 = add_byte_products(s0, lanes, bytes_at(at0 + at))
        s1 = add_byte_products(s1, lanes, bytes_at(at1 + at))
        s2 = add_byte_products(s2, lanes, bytes_at(at2 + at))
        s3 = add_byte_products(s3, lanes, bytes_at(at3 + at))
    _finish(block, r0, token, s0)
    _finish(block, r1, token, s1)
    _finish(block, r2, token, s2)
    _finish(block, r3, token, s3)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _two_rows(block: Any, r0: Any, r1: Any, t0: Any, t1: Any, t2: Any, t3: Any) -> None:
    width, stride = block[COLUMNS], block[X_STRIDE]
    x0, x1 = block[X_AT] + t0 * stride, block[X_AT] + t1 * stride
    x2, x3 = block[X_AT] + t2 * stride, block[X_AT] + t3 * stride
    at0, at1 = block[CODES_AT] + r0 * width, block[CODES_AT] + r1 * width
    s00, s01, s02, s03 = no_int_sums(), no_int_sums(), no_int_sums(), no_int_sums()
    s10, s11, s12, s13 = no_int_sums(), no_int_sums(), no_int_sums(), no_int_sums()
    for step in range(width // STEP):
        at = step * STEP
        codes0, codes1 = bytes_at(at0 + at), bytes_at(at1 + at)
        lanes = bytes_at(x0 + at)
        s00, s10 = add_byte_products(s00, lanes, codes0), add_byte_products(s10, lanes, codes1)
        lanes = bytes_at(x1 + at)
        s01, s11 = add_byte_products(s01, lanes, codes0), add_byte_products(s11, lanes, codes1)
        lanes = bytes_at(x2 + at)
        s02, s12 = add_byte_products(s02, lanes, codes0), add_byte_products(s12, lanes, codes1)
        lanes = bytes_at(x3 + at)
        s03, s13 = add_byte_products(s03, lanes, codes0), add_byte_products(s13, lanes, codes1)
    _finish(block, r0, t0, s00)
    _finish(block, r0, t1, s01)
    _finish(block, r0, t2, s02)
    _finish(block, r0, t3, s03)
    _finish(block, r1, t0, s10)
    _finish(block, r1, t1, s11)
    _finish(block, r1, t2, s12)
    _finish(block, r1, t3, s13)


def _work(address: Any, start: Any, stop: Any) -> None:
    block = carray(pointer_to(address), (WORDS,), np.int64)
    last, tokens = block[ROWS] - 1, block[TOKENS]
    if tokens == 1:
        for row in range(start, stop, 4):
            _four_rows(block, row, min(row + 1, last), min(row + 2, last), min(row + 3, last), 0)
        return
    for row in range(start, stop, 2):
        for t in range(0, tokens, 4):
            _two_rows(
                block, row, min(row + 1, last),
                t, min(t + 1, tokens - 1), min(t + 2, tokens - 1), min(t + 3, tokens - 1),
            )  # fmt: skip


@cache
def dot_bytes() -> Any:
    """The compiled work."""
    return compiled_work(_work)
