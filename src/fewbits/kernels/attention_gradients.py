"""The gradient of attention_rows' attention, from the same strips of products.

Scores are computed again, once a strip of queries at a time, for the queries' gradient, and once transposed, a strip of
keys at a time, for the keys' and the values': nothing is summed across threads, and each order of sums is fixed.
Source: FlashAttention-2, arXiv 2307.08691, equations of the backward pass.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from fewbits.kernels.attention_parts import (
    STRIP,
    add_weighted,
    copy_rows,
    heads_together,
    pack_columns,
    pack_rows,
    padded,
    products,
    write_row,
)
from fewbits.kernels.compiling import SUMS, entry, merged, widen
from fewbits.kernels.matrix_sums import begin, end
from fewbits.kernels.memory import copy_numbers
from fewbits.kernels.panel_lanes import PANEL
from fewbits.kernels.softmax_lanes import pull_key, pull_query
from fewbits.kernels.threads import over_rows


@partial(merged, fastmath=SUMS)
def _inner(left: Any, right: Any, row: Any) -> Any:
    """The inner product of a row of both, bf16."""
    total = np.float32(0.0)
    for i in range(left.shape[1]):
        total += widen(left[row, i]) * widen(right[row, i])
    return total


@entry
def _pull_queries(
    query: Any, key: Any, value: Any, firsts: Any, stops: Any, scale: Any, logs: Any, out: Any, pull: Any,
    deltas: Any, to_query: Any, start: Any, stop: Any,
) -> None:  # fmt: skip
    """The queries' gradient, and deltas, the inner products of outputs with theirs. Heads `start` to `stop`."""
    heads, length, width = query.shape[1:]
    shared, keys, wide = heads // key.shape[1], key.shape[2], padded(width)
    queries, pulled = np.empty((padded(length), wide), np.uint16), np.empty((padded(length), wide), np.uint16)
    outputs = np.empty((padded(length), wide), np.uint16)
    copied = np.empty((padded(keys), wide), np.uint16)
    key_panels = np.empty((padded(keys) // PANEL, wide // 2, PANEL), np.uint32)
    value_panels = np.empty((padded(keys) // PANEL, wide // 2, PANEL), np.uint32)
    channel_panels = np.empty((wide // PANEL, padded(keys) // 2, PANEL), np.uint32)
    scores, pulls = np.empty((STRIP, padded(keys)), np.float32), np.empty((STRIP, padded(keys)), np.float32)
    weights = np.zeros((STRIP, padded(keys)), np.uint16)
    sums, rounded = np.empty((STRIP, wide), np.float32), np.empty(wide, np.uint16)
    begin()
    for number in range(start, stop):
        sample, head = number // heads, number % heads
        copy_rows(query[sample, head], queries)
        copy_rows(pull[sample, :, head], pulled)
        copy_rows(out[sample, :, head], outputs)
        if number == start or head % shared == 0:
            copy_rows(value[sample, head // shared], copied)
            pack_rows(copied, value_panels)
            copy_rows(key[sample, head // shared], copied)
            pack_rows(copied, key_panels)
            pack_columns(copied, channel_panels)
        for top in range(0, length, STRIP):
            rows = min(STRIP, length - top)
            low, high = firsts[top] // PANEL * PANEL, padded(stops[top + rows - 1])
            products(queries, top, key_panels, low, high, scores)
            products(pulled, top, value_panels, low, high, pulls)
            for r in range(rows):
                t = top + r
                delta = _inner(outputs, pulled, t)
                deltas[sample, head, t] = delta
                place = r * padded(keys) + low
                pull_query(
                    scores.ctypes.data + 4 * place, pulls.ctypes.data + 4 * place, (high - low) // PANEL,
                    firsts[t] - low, stops[t] - firsts[t], scale, logs[sample, head, t], delta,
                    weights.ctypes.data + 2 * place,
                )  # fmt: skip
            sums[:] = np.float32(0.0)
            add_weighted(weights, channel_panels, low, high, sums, 0)
            for r in range(rows):
                write_row(sums.ctypes.data + 4 * r * wide, np.float32(1.0), rounded, to_query[sample, head, top + r])
    end()


@entry
def _pull_keys(
    query: Any, key: Any, value: Any, lows: Any, highs: Any, scale: Any, logs: Any, deltas: Any,
    pull: Any, to_key: Any, to_value: Any, start: Any, stop: Any,
) -> None:  # fmt: skip
    """The keys' and values' gradients, heads of keys `start` to `stop`; lows, highs: which queries see each key."""
    heads, length, width = query.shape[1:]
    owners, keys, wide = key.shape[1], key.shape[2], padded(width)
    shared, many = heads // owners, padded(length)
    key_rows, value_rows = np.empty((padded(keys), wide), np.uint16), np.empty((padded(keys), wide), np.uint16)
    copied = np.empty((many, wide), np.uint16)
    query_panels, pull_panels = np.empty((2, many // PANEL, wide // 2, PANEL), np.uint32)
    query_channels, pull_channels = np.empty((2, wide // PANEL, many // 2, PANEL), np.uint32)
    scores, pulls = np.empty((STRIP, many), np.float32), np.empty((STRIP, many), np.float32)
    weights, gradients = np.zeros((STRIP, many), np.uint16), np.zeros((STRIP, many), np.uint16)
    key_sums, value_sums = np.empty((2, padded(keys), wide), np.float32)
    log, delta = np.zeros(many, np.float32), np.zeros(many, np.float32)
    rounded = np.empty(wide, np.uint16)
    begin()
    for number in range(start, stop):
        sample, owner = number // owners, number % owners
        copy_rows(key[sample, owner], key_rows)
        copy_rows(value[sample, owner], value_rows)
        key_sums[:] = np.float32(0.0)
        value_sums[:] = np.float32(0.0)
        for head in range(owner * shared, (owner + 1) * shared):
            copy_numbers(log[:length], logs[sample, head])
            copy_numbers(delta[:length], deltas[sample, head])
            copy_rows(query[sample, head], copied)
            pack_rows(copied, query_panels)
            pack_columns(copied, query_channels)
            copy_rows(pull[sample, :, head], copied)
            pack_rows(copied, pull_panels)
            pack_columns(copied, pull_channels)
            for top in range(0, keys, STRIP):
                rows = min(STRIP, keys - top)
                low, high = lows[top] // PANEL * PANEL, padded(highs[top + rows - 1])
                products(key_rows, top, query_panels, low, high, scores)
                products(value_rows, top, pull_panels, low, high, pulls)
                for r in range(rows):
                    first, place = lows[top + r], r * many + low
                    pull_key(
                        scores.ctypes.data + 4 * place, pulls.ctypes.data + 4 * place, (high - low) // PANEL,
                        first - low, highs[top + r] - first, scale,
                        log.ctypes.data + 4 * low, delta.ctypes.data + 4 * low, weights.ctypes.data + 2 * place,
                        gradients.ctypes.data + 2 * place,
                    )  # fmt: skip
                add_weighted(weights, pull_channels, low, high, value_sums, top)
                add_weighted(gradients, query_channels, low, high, key_sums, top)
        for t in range(keys):
            write_row(key_sums[t].ctypes.data, np.float32(1.0), rounded, to_key[sample, owner, t])
            write_row(value_sums[t].ctypes.data, np.float32(1.0), rounded, to_value[sample, owner, t])
    end()


def pull_back(
    query: Any, key: Any, value: Any, firsts: Any, stops: Any, scale: float, out: Any, logs: Any, pull: Any,
    to_query: Any, to_key: Any, to_value: Any,
) -> None:  # fmt: skip
    """The gradients of `attention_rows.attend`, whose arguments and results these are.

    Args:
        pull: the gradient of `out`, bf16 as uint16 [samples, length, heads, width].
        to_query, to_key, to_value: like query, key and value, written.
    """
    samples, heads, length, _ = query.shape
    owners, keys = key.shape[1:3]
    number = np.float32(scale)
    deltas = np.empty((samples, heads, length), np.float32)
    # Neither firsts nor stops fall, so the queries that see a key are neighbours.
    places = np.arange(keys)
    lows, highs = np.searchsorted(stops, places, side="right"), np.searchsorted(firsts, places, side="right")
    over_rows(
        samples * heads, length * keys,
        lambda start, stop: _pull_queries(
            query, key, value, firsts, stops, number, logs, out, pull, deltas, to_query, start, stop
        ),
        heads_together(samples, heads, owners),
    )  # fmt: skip
    over_rows(
        samples * owners, length * keys,
        lambda start, stop: _pull_keys(
            query, key, value, lows, highs, number, logs, deltas, pull, to_key, to_value, start, stop
        ),
    )  # fmt: skip
