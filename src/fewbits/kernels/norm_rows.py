"""Root mean square norms of rows and their gradients, and lengths of rows: bf16 as uint16, in between all is fp32."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
from numba import carray

from fewbits.kernels.compiling import SUMS, as_float, inlined, merged, widen
from fewbits.kernels.memory import as_bf16, pointer_to
from fewbits.kernels.team import OWN, ROWS, WORDS, Program, Work, compiled_work, team_size

FAST = SUMS | {"arcp"}
# The fields of a block; a row is a row. EPS: by its bits.
X_AT, WIDTH, WEIGHT_AT, EPS, OUT_AT, INVERSES_AT, PULLS_AT = range(OWN, OWN + 7)


@partial(merged, fastmath=FAST)
def _squares(values: Any) -> Any:
    total = np.float32(0.0)
    for i in range(values.size):
        value = widen(values[i])
        total += value * value
    return total


@partial(merged, fastmath=FAST)
def _normalize(x: Any, weight: Any, eps: Any, out: Any, inverses: Any, start: Any, stop: Any) -> None:
    width = x.shape[1]
    for t in range(start, stop):
        inverse = np.float32(1.0) / np.sqrt(_squares(x[t]) / np.float32(width) + eps)
        inverses[t] = inverse
        for i in range(width):
            out[t, i] = as_bf16(widen(x[t, i]) * inverse * weight[i])


@partial(merged, fastmath=FAST)
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


@partial(merged, fastmath=FAST)
def _lengths(x: Any, out: Any, start: Any, stop: Any) -> None:
    for t in range(start, stop):
        out[t] = np.sqrt(_squares(x[t]))


@inlined
def _rows(block: Any, field: Any) -> Any:
    return carray(pointer_to(block[field]), (block[ROWS], block[WIDTH]), np.uint16)


@inlined
def _numbers(block: Any, field: Any, count: Any) -> Any:
    return carray(pointer_to(block[field]), (count,), np.float32)


def _normalized(address: Any, start: Any, stop: Any) -> None:
    block = carray(pointer_to(address), (WORDS,), np.int64)
    weight, inverses = _numbers(block, WEIGHT_AT, block[WIDTH]), _numbers(block, INVERSES_AT, block[ROWS])
    eps = as_float(np.uint32(block[EPS]))
    _normalize(_rows(block, X_AT), weight, eps, _rows(block, OUT_AT), inverses, start, stop)


def _pulled_back(address: Any, start: Any, stop: Any) -> None:
    block = carray(pointer_to(address), (WORDS,), np.int64)
    weight, inverses = _numbers(block, WEIGHT_AT, block[WIDTH]), _numbers(block, INVERSES_AT, block[ROWS])
    _pull_back(_rows(block, X_AT), weight, inverses, _rows(block, PULLS_AT), _rows(block, OUT_AT), start, stop)


def _measured(address: Any, start: Any, stop: Any) -> None:
    block = carray(pointer_to(address), (WORDS,), np.int64)
    _lengths(_rows(block, X_AT), _numbers(block, OUT_AT, block[ROWS]), start, stop)


_WORK = {work.__name__: work for work in (_normalized, _pulled_back, _measured)}


@cache
def _compiled(name: str) -> Work:
    return Work(compiled_work(_WORK[name]), {})


def _run(name: str, x: Any, fields: dict[int, int]) -> None:
    rows, width = x.shape
    step = _compiled(name).step(rows, {X_AT: x.ctypes.data, WIDTH: width, **fields})
    Program([step]).run(team_size(x.size))


def normalize(x: Any, weight: Any, eps: float, out: Any, inverses: Any) -> None:
    """out = x · inverse · weight, inverse = 1 / √(mean x² + eps) of each row.

    Args:
        x: bf16 as uint16 [rows, width]; out: likewise, written. weight: fp32 [width]. inverses: fp32 [rows], written.
    """
    _run("_normalized", x, {
        WEIGHT_AT: weight.ctypes.data, EPS: int(np.float32(eps).view(np.uint32)), OUT_AT: out.ctypes.data,
        INVERSES_AT: inverses.ctypes.data,
    })  # fmt: skip


def pull_back(x: Any, weight: Any, inverses: Any, pulls: Any, out: Any) -> None:
    """The gradient by x of what `normalize` made, given that by its outputs: bf16 as uint16 [rows, width]."""
    _run("_pulled_back", x, {
        WEIGHT_AT: weight.ctypes.data, INVERSES_AT: inverses.ctypes.data, PULLS_AT: pulls.ctypes.data,
        OUT_AT: out.ctypes.data,
    })  # fmt: skip


def lengths(x: Any) -> Any:
    """Euclidean norms of rows of bf16 as uint16 [rows, width], fp32 [rows]."""
    out = np.empty(len(x), np.float32)
    _run("_measured", x, {OUT_AT: out.ctypes.data})
    return out
