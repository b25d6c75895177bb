"""Labels drawn from a model's predictions while its logits come in tiles: bf16 as uint16, one row's e^x in the cache.

Each label stays in place with the probability of what came before, or is drawn anew from the tile; so at the end each
is a draw from the whole row's softmax, of which no more than a tile is ever there. Source: Chao 1982, sampling with
weights from a stream.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fewbits.kernels.compiling import entry, inner
from fewbits.kernels.logits_lanes import GROUP, bf16_exponentials, largest_bf16
from fewbits.kernels.panel_lanes import PANEL
from fewbits.kernels.threads import over_rows

# A larger logit by 69 makes a label impossible.
LEAST = np.float32(1e-30)


@inner
def _drawn(values: Any, sums: Any, target: Any) -> Any:
    """The first place where the values add up to more than `target`, of those with any weight."""
    before = np.float64(0.0)
    group = 0
    while group < len(sums) - 1 and (sums[group] < LEAST or before + sums[group] <= target):
        before += sums[group]
        group += 1
    place = group * GROUP
    last = min(place + GROUP, len(values)) - 1
    while place < last and (values[place] < LEAST or before + values[place] <= target):
        before += values[place]
        place += 1
    # Rounding may leave a target beyond the sum of all.
    while place > 0 and values[place] < LEAST:
        place -= 1
    return place


@entry
def _draw(
    logits: Any, uniforms: Any, first: Any, largest: Any, totals: Any, labels: Any, numbers: Any, start: Any, stop: Any
) -> None:
    columns = logits.shape[1]
    groups = (columns + GROUP - 1) // GROUP
    row = np.full(groups * GROUP, 0xFF80, np.uint16)  # −∞ behind the last logit
    values, sums = np.empty(groups * GROUP, np.float32), np.empty(groups, np.float32)
    for t in range(start, stop):
        magnitude = np.uint16(0)
        for i in range(columns):
            row[i] = logits[t, i]
            magnitude = max(magnitude, np.uint16(logits[t, i] & np.uint16(0x7FFF)))
        highest = max(largest_bf16(row.ctypes.data, groups * GROUP // PANEL), largest[t])
        if magnitude > np.uint16(0x7F80) or highest == np.inf:
            # No distribution; e^x would hide it.
            totals[t] = np.nan
            continue
        if highest == -np.inf:
            continue
        bf16_exponentials(row.ctypes.data, groups, highest, values.ctypes.data, sums.ctypes.data)
        added = np.float64(0.0)
        for group in range(groups):
            added += np.float64(sums[group])
        totals[t] = totals[t] * math.exp(np.float64(largest[t]) - np.float64(highest)) + added
        largest[t] = highest
        for k in range(labels.shape[1]):
            target = uniforms[t, k] * totals[t]
            if target < added and added >= LEAST:
                place = _drawn(values[:columns], sums, target)
                labels[t, k] = first + place
                numbers[t, k] = highest + math.log(values[place])


def draw_labels(logits: Any, uniforms: Any, first: int, largest: Any, totals: Any, labels: Any, numbers: Any) -> None:
    """Let one tile of logits take part in the draw of every row's labels.

    Args:
        logits: bf16 as uint16 [rows, columns], the columns from `first` on.
        uniforms: fp64 [rows, labels], in [0, 1), for this tile alone.
        largest, totals: fp32 and fp64 [rows]: the largest logit so far and the sum of e^(logit − largest), −∞ and 0 in
            the beginning; written. A total is NaN once a logit is no number.
        labels, numbers: int64 and fp32 [rows, labels]: columns drawn so far, and their logits; written.
    """
    over_rows(
        len(logits), logits.shape[1],
        lambda start, stop: _draw(logits, uniforms, first, largest, totals, labels, numbers, start, stop),
    )  # fmt: skip
