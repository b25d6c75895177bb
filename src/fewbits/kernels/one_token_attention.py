"""Attention of one token over the keys and values before it: a step of a program (kernels.team), head by head."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
from numba import carray

from fewbits.kernels.compiling import merged, widen
from fewbits.kernels.memory import as_bf16, pointer_to
from fewbits.kernels.one_token import (
    CAPACITY,
    FAST,
    HEAD_WIDTH,
    HEADS_AT,
    KEYS_AT,
    NEW_VALUES_AT,
    POSITION_AT,
    VALUES_AT,
    exponential,
    number_of,
    rotated,
)
from fewbits.kernels.team import WORDS, compiled_work

# The fields of a block after those of "remember"; a row is a query's head. SCRATCH_AT: fp32 [heads, capacity + width].
# SHARED: query heads to a head of keys. WINDOW: positions seen, 0 for all.
SCALING, SHARED, WINDOW, SCRATCH_AT, OUT_AT = range(NEW_VALUES_AT + 1, NEW_VALUES_AT + 6)


@partial(merged, fastmath=FAST)
def _head(query: Any, keys: Any, values: Any, scores: Any, out: Any) -> None:
    """out = softmax(keys · query) · values, in bf16; scores is scratch."""
    count, width = keys.shape
    largest = np.float32(-np.inf)
    for t in range(count):
        score = np.float32(0.0)
        for i in range(width):
            score += query[i] * widen(keys[t, i])
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
            first = a * widen(values[t, i]) + b * widen(values[t + 1, i])
            query[i] += first + c * widen(values[t + 2, i]) + d * widen(values[t + 3, i])
    for t in range(whole, count):
        for i in range(width):
            query[i] += scores[t] * widen(values[t, i])
    for i in range(width):
        out[i] = as_bf16(query[i] / total)


def _attend(address: Any, start: Any, stop: Any) -> None:
    block = carray(pointer_to(address), (WORDS,), np.int64)
    width, capacity = block[HEAD_WIDTH], block[CAPACITY]
    position = carray(pointer_to(block[POSITION_AT]), (1,), np.int64)[0]
    first = max(0, position + 1 - block[WINDOW]) if block[WINDOW] != 0 else 0
    count = position + 1 - first
    for h in range(start, stop):
        scratch = carray(pointer_to(block[SCRATCH_AT] + 4 * h * (capacity + width)), (capacity + width,), np.float32)
        query, scores = scratch[capacity:], scratch[:count]
        head = carray(pointer_to(block[HEADS_AT] + 2 * h * width), (width,), np.uint16)
        rotated(block, head, position, number_of(block[SCALING]), query)
        place = 2 * (h // block[SHARED] * capacity + first) * width
        keys = carray(pointer_to(block[KEYS_AT] + place), (count, width), np.uint16)
        values = carray(pointer_to(block[VALUES_AT] + place), (count, width), np.uint16)
        _head(query, keys, values, scores, carray(pointer_to(block[OUT_AT] + 2 * h * width), (width,), np.uint16))


@cache
def attention() -> Any:
    """The compiled work."""
    return compiled_work(_attend)
