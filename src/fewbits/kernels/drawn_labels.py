"""Labels drawn from a model's predictions, and the gradient of their loss: softmax(logits) − one-hot, row by row.

bf16 logits come and gradients go as uint16; in between one row's e^x lie in the cache, in fp32.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from fewbits.kernels.logits_lanes import bf16_exponentials, bf16_multiples, largest_bf16
from fewbits.kernels.memory import as_bf16
from fewbits.kernels.panel_lanes import PANEL
from fewbits.kernels.threads import over_rows

# A larger logit by 69 makes a label impossible.
LEAST = np.float32(1e-30)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _drawn(values: Any, sums: Any, target: Any) -> Any:
    """The first place where the values add up to more than `target`, of those with any weight."""
    before = np.float64(0.0)
    panel = 0
    while panel < len(sums) - 1 and (sums[panel] < LEAST or before + sums[panel] <= target):
        before += sums[panel]
        panel += 1
    place = panel * PANEL
    last = min(place + PANEL, len(values)) - 1
    while place < last and (values[place] < LEAST or before + values[place] <= target):
        before += values[place]
        place += 1
    # Rounding may leave a target beyond the sum of all.
    while place > 0 and values[place] < LEAST:
        place -= 1
    return place


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _draw(logits: Any, draws: Any, gradients: Any, losses: Any, start: Any, stop: Any) -> None:
    vocabulary = logits.shape[1]
    panels = (vocabulary + PANEL - 1) // PANEL
    row = np.full(panels * PANEL, 0xFF80, np.uint16)  # −∞ behind the last logit
    values, sums = np.empty(panels * PANEL, np.float32), np.empty(panels, np.float32)
    pulled = np.empty(panels * PANEL, np.uint16)
    for t in range(start, stop):
        magnitude = np.uint16(0)
        for i in range(vocabulary):
            row[i] = logits[t, i]
            magnitude = max(magnitude, np.uint16(logits[t, i] & np.uint16(0x7FFF)))
        largest = largest_bf16(row.ctypes.data, panels)
        if magnitude > np.uint16(0x7F80) or not np.isfinite(largest):
            # No distribution; e^x would hide it.
            gradients[t] = np.uint16(0x7FC0)
            losses[t] = np.nan
            continue
        bf16_exponentials(row.ctypes.data, panels, largest, values.ctypes.data, sums.ctypes.data)
        total = np.float64(0.0)
        for panel in range(panels):
            total += np.float64(sums[panel])
        label = _drawn(values[:vocabulary], sums, draws[t] * total)
        share = values[label] / total
        losses[t] = -math.log(share)
        bf16_multiples(values.ctypes.data, panels, np.float32(1.0 / total), pulled.ctypes.data)
        for i in range(vocabulary):
            gradients[t, i] = pulled[i]
        gradients[t, label] = as_bf16(np.float32(share - 1.0))


def draw_labels(logits: Any, draws: Any, gradients: Any) -> float:
    """Draw a label for every row.

    Args:
        logits: bf16 as uint16 [rows, vocabulary].
        draws: fp64 [rows], in [0, 1): where in the distribution function of its row each label lies.
        gradients: like logits, written: the gradient of each label's negative log-probability by the logits.

    Returns:
        The sum of the negative log-probabilities; NaN if a logit is no number.
    """
    losses = np.empty(len(logits), np.float64)
    over_rows(
        len(logits), logits.shape[1],
        lambda start, stop: _draw(logits, draws, gradients, losses, start, stop),
    )  # fmt: skip
    return math.fsum(losses.tolist())
