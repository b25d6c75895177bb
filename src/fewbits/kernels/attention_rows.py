"""Attention of many tokens in bf16: softmax(scale · Q Kᵀ) V for every head, a strip of queries at a time.

A strip's scores stay in the cache, so each is computed once and nothing is rescaled. Products are those of the
processor's pairs of bf16 numbers, sums and softmax fp32; weights are rounded to bf16 before they multiply the values,
as torch's own kernel does.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fewbits.kernels.attention_parts import (
    STRIP,
    add_weighted,
    are_finite,
    copy_rows,
    heads_together,
    pack_columns,
    pack_rows,
    padded,
    products,
    write_row,
)
from fewbits.kernels.compiling import entry
from fewbits.kernels.matrix_sums import begin, end
from fewbits.kernels.panel_lanes import PANEL
from fewbits.kernels.softmax_lanes import largest_score, weigh_scores
from fewbits.kernels.threads import over_rows


@entry
def _attend(
    query: Any, key: Any, value: Any, firsts: Any, stops: Any, scale: Any, out: Any, logs: Any, start: Any, stop: Any
) -> None:
    """Heads `start` to `stop`, counted through all samples. Arguments as those of `attend`."""
    heads, length, width = query.shape[1:]
    shared, keys, wide = heads // key.shape[1], key.shape[2], padded(width)
    queries = np.empty((padded(length), wide), np.uint16)
    copied = np.empty((padded(keys), wide), np.uint16)
    key_panels = np.empty((padded(keys) // PANEL, wide // 2, PANEL), np.uint32)
    value_panels = np.empty((wide // PANEL, padded(keys) // 2, PANEL), np.uint32)
    scores = np.empty((STRIP, padded(keys)), np.float32)
    # Of a last, shorter strip, rows without queries weigh whatever: their sums are not looked at.
    weights = np.zeros((STRIP, padded(keys)), np.uint16)
    sums, factors = np.empty((STRIP, wide), np.float32), np.empty(STRIP, np.float32)
    rounded = np.empty(wide, np.uint16)
    stride, keys_are_finite = padded(keys), True
    begin()
    for number in range(start, stop):
        sample, head = number // heads, number % heads
        copy_rows(query[sample, head], queries)
        if number == start or head % shared == 0:
            copy_rows(key[sample, head // shared], copied)
            keys_are_finite = are_finite(copied)
            pack_rows(copied, key_panels)
            copy_rows(value[sample, head // shared], copied)
            pack_columns(copied, value_panels)
        finite = keys_are_finite and are_finite(queries)
        for top in range(0, length, STRIP):
            rows = min(STRIP, length - top)
            low, high = firsts[top] // PANEL * PANEL, padded(stops[top + rows - 1])
            products(queries, top, key_panels, low, high, scores)
            for r in range(rows):
                place, panels = r * stride + low, (high - low) // PANEL
                first, count = firsts[top + r] - low, stops[top + r] - firsts[top + r]
                scores_at, weights_at = scores.ctypes.data + 4 * place, weights.ctypes.data + 2 * place
                largest = largest_score(scores_at, panels, first, count)
                total = weigh_scores(scores_at, panels, first, count, largest, scale, weights_at)
                # A score that is no number would be lost in maxima and in the bounds of e^x.
                if not finite or largest == np.inf:
                    total = np.float32(np.nan)
                logs[sample, head, top + r] = largest * scale + np.float32(math.log(total))
                factors[r] = np.float32(1.0) / total
            sums[:] = np.float32(0.0)
            add_weighted(weights, value_panels, low, high, sums, 0)
            for r in range(rows):
                write_row(sums.ctypes.data + 4 * r * wide, factors[r], rounded, out[sample, top + r, head])
    end()


def attend(query: Any, key: Any, value: Any, firsts: Any, stops: Any, scale: float, out: Any, logs: Any) -> None:
    """Attention of every query to the keys from its first to before its stop, at least one.

    Args:
        query: bf16 as uint16 [samples, heads, length, width]. key, value: the same with heads that several heads of
            queries may share, and a length of their own. Any strides.
        firsts, stops: int64 [length], neither ever falling.
        out: bf16 as uint16 [samples, length, heads, width], written.
        logs: fp32 [samples, heads, length], log Σ e^(scale · score) of each query, written.
    """
    samples, heads, length = query.shape[:3]
    over_rows(
        samples * heads, length * key.shape[2],
        lambda start, stop: _attend(query, key, value, firsts, stops, np.float32(scale), out, logs, start, stop),
        heads_together(samples, heads, key.shape[1]),
    )  # fmt: skip
