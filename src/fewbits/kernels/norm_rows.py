"""Root mean square norms of rows and their gradients, and lengths of rows: bf16 as uint16, in between all is fp32."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from fewbits.kernels.compiling import SUMS, widen
from fewbits.kernels.memory import as_bf16
from fewbits.kernels.threads import over_rows

FAST = SUMS | {"arcp"}


@njit(fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _squares(values: Any) -> Any:
    total = np.float32(0.0)
    for i in range(values.size):
        value = widen(values[i])
        total += value * value
    return total


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _normalize(x: Any, weight: Any, eps: Any, out: Any, inverses: Any, start: Any, stop: Any) -> None:
    width = x.shape[1]
    for t in range(start, stop):
        inverse = np.float32(1.0) / np.sqrt(_squares(x[t]) / np.float32(width) + eps)
        inverses[t] = inverse
        for i in range(width):
            out[t, i] = as_bf16(widen(x[t, i]) * inverse * weight[i])


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _pull_back(x: Any, weight: Any, inverses: Any, pulls: Any, out: Any, start: Any, stop: Any) -> None:
    width = x.shape[1]
    for t in range(start, stop):
        inverse = inverses[t]
        along = np.float32(0.0)
        for i in range(width):
            along += widen(pulls[t, i]) * weight[i] * widen(x[t, i])
        share = along * inverse * inverse / np.float32(width)
        for i in range(width):
            out[t, i] = as_bf16(inverse * (widen(pulls[t, i]) * weight[i] - share * widen(x[t, i])))


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _lengths(x: Any, out: Any, start: Any, stop: Any) -> None:
    for t in range(start, stop):
        out[t] = np.sqrt(_squares(x[t]))


def normalize(x: Any, weight: Any, eps: float, out: Any, inverses: Any) -> None:
    """out = x · inverse · weight, inverse = 1 / √(mean x² + eps) of each row.

    Args:
        x: bf16 as uint16 [rows, width]; out: likewise, written. weight: fp32 [width]. inverses: fp32 [rows], written.
    """
    added = np.float32(eps)
    over_rows(len(x), x.shape[1], lambda start, stop: _normalize(x, weight, added, out, inverses, start, stop))


def pull_back(x: Any, weight: Any, inverses: Any, pulls: Any, out: Any) -> None:
    """The gradient by x of what `normalize` made, given that by its outputs: bf16 as uint16 [rows, width]."""
    over_rows(len(x), x.shape[1], lambda start, stop: _pull_back(x, weight, inverses, pulls, out, start, stop))


def lengths(x: Any) -> Any:
    """Euclidean norms of rows of bf16 as uint16 [rows, width], fp32 [rows]."""
    out = np.empty(len(x), np.float32)
    over_rows(len(x), x.shape[1], lambda start, stop: _lengths(x, out, start, stop))
    return out
