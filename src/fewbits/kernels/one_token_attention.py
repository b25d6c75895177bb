"""Attention of one token over the keys and values before it, head by head on torch's threads."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types

from fewbits.kernels.compiling import Array
from fewbits.kernels.memory import address_of, as_bf16, pointer_to
from fewbits.kernels.one_token import FAST, exponential, rotated
from fewbits.kernels.team import PIECE, ROWS, Work, fetch_add, team_size

# The block that a call passes: int64 fields after those of kernels.team. A row is a head. NUMBERS: eps and the scaling.
(
    QUERIES_AT, NORM_AT, NORM_SIZE, NUMBERS_AT, COSINES_AT, SINES_AT, ROTATED, KEYS_AT, VALUES_AT, CAPACITY, WIDTH,
    SHARED, FIRST, POSITION, SCRATCH_AT, OUT_AT, FIELDS,
) = range(3, 20)  # fmt: skip


@njit(fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _head(query: Any, keys: Any, values: Any, scores: Any, out: Any) -> None:
    """out = softmax(keys · query) · values, in bf16; scores is scratch."""
    count, width = keys.shape
    largest = np.float32(-np.inf)
    for t in range(count):
        score = np.float32(0.0)
        for i in range(width):
            score += query[i] * keys[t, i]
        scores[t] = score
        largest = max(largest, score)
    total = np.float32(0.0)
    for t in range(count):
        weight = exponential(scores[t] - largest)
        scores[t] = weight
        total += weight
    query[:] = np.float32(0.0)
    whole = count - count % 4
    # Four at a time: the sum is loaded and stored a quarter as often.
    for t in range(0, whole, 4):
        a, b, c, d = scores[t], scores[t + 1], scores[t + 2], scores[t + 3]
        for i in range(width):
            query[i] += a * values[t, i] + b * values[t + 1, i] + c * values[t + 2, i] + d * values[t + 3, i]
    for t in range(whole, count):
        for i in range(width):
            query[i] += scores[t] * values[t, i]
    for i in range(width):
        out[i] = as_bf16(query[i] / total)


def _work(pointer: Any) -> None:
    block = carray(pointer, (FIELDS,), np.int64)
    width, capacity, shared, half = block[WIDTH], block[CAPACITY], block[SHARED], block[ROTATED]
    first, stop = block[FIRST], block[POSITION] + 1
    heads = block[ROWS]
    queries = carray(pointer_to(block[QUERIES_AT]), (heads, width), np.uint16)
    out = carray(pointer_to(block[OUT_AT]), (heads, width), np.uint16)
    norm = carray(pointer_to(block[NORM_AT]), (block[NORM_SIZE],), np.float32)
    numbers = carray(pointer_to(block[NUMBERS_AT]), (2,), np.float32)
    cosines = carray(pointer_to(block[COSINES_AT]), (half,), np.float32)
    sines = carray(pointer_to(block[SINES_AT]), (half,), np.float32)
    keys = carray(pointer_to(block[KEYS_AT]), (heads // shared, capacity, width), np.float32)
    values = carray(pointer_to(block[VALUES_AT]), (heads // shared, capacity, width), np.float32)
    scratch = carray(pointer_to(block[SCRATCH_AT]), (heads, capacity + width), np.float32)
    while True:
        start = fetch_add(address_of(pointer), block[PIECE])
        if start >= heads:
            return
        for h in range(start, min(start + block[PIECE], heads)):
            query, scores = scratch[h, capacity:], scratch[h, : stop - first]
            rotated(queries[h], norm, numbers[0], cosines, sines, numbers[1], query)
            _head(query, keys[h // shared, first:stop], values[h // shared, first:stop], scores, out[h])


@cache
def _compiled() -> Any:
    return cfunc(types.void(types.voidptr), nopython=True, cache=True, error_model="numpy")(_work)


class Attention:
    """One layer's attention for one token at a time.

    Args:
        keys, values: fp32 [heads, capacity, width]. norm: fp32 [width] weights of the queries' norm, or empty.
        shared: query heads to a head of keys. scratch: fp32 [query heads, capacity + width], for all layers.
    """

    def __init__(
        self, keys: Array, values: Array, norm: Array, eps: float, scaling: float, shared: int, scratch: Array
    ) -> None:
        heads, capacity, width = keys.shape
        numbers = np.array([eps, scaling], np.float32)
        self._kept = (keys, values, norm, numbers, scratch)
        self._heads, self._width = heads * shared, width
        self._work = Work(
            _compiled(),
            FIELDS,
            {
                NORM_AT: norm.ctypes.data, NORM_SIZE: norm.size, NUMBERS_AT: numbers.ctypes.data,
                KEYS_AT: keys.ctypes.data, VALUES_AT: values.ctypes.data, CAPACITY: capacity, WIDTH: width,
                SHARED: shared, SCRATCH_AT: scratch.ctypes.data,
            },
        )  # fmt: skip

    def __call__(self, queries: int, cosines: Array, sines: Array, first: int, position: int, out: int) -> None:
        """Attend over positions first to position.

        Args:
            queries, out: addresses of bf16 [query heads · width].
        """
        products = 2 * self._heads * self._width * (position + 1 - first)
        self._work.run(
            self._heads, 1, team_size(products),
            {
                QUERIES_AT: queries, COSINES_AT: cosines.ctypes.data, SINES_AT: sines.ctypes.data,
                ROTATED: cosines.size, FIRST: first, POSITION: position, OUT_AT: out,
            },
        )  # fmt: skip
