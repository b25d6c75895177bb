"""What lies between the linears of a decoder block, for one token: residual, norm, rotation, attention, gate.

One call each in place of five to fifty of torch's. bf16 comes and goes as uint16; sums and the residual are fp32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from fewbits.kernels.compiling import SUMS, as_bits, widen

# fp32 keeps eight lanes of partial sums; with one, a dot product would wait for each addition.
FAST = SUMS | {"arcp", "afn"}


@njit(inline="always")  # type: ignore[untyped-decorator]
def _bf16(value: Any) -> Any:
    """The bits of a finite fp32 as bf16, rounded half to even."""
    bits = as_bits(value)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _inverse_rms(values: Any, eps: Any) -> Any:
    total = np.float32(0.0)
    for i in range(values.size):
        value = widen(values[i])
        total += value * value
    return np.float32(1.0) / np.sqrt(total / np.float32(values.size) + eps)


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def add(x: Any, update: Any, norm: Any, eps: Any) -> None:
    """x += update, which is normed first if `norm` (else empty) has weights."""
    if norm.size:
        inverse = _inverse_rms(update, eps)
        for i in range(x.size):
            x[i] += widen(update[i]) * inverse * norm[i]
    else:
        for i in range(x.size):
            x[i] += widen(update[i])


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def normed(x: Any, weight: Any, eps: Any, out: Any) -> None:
    """out = x / rms(x) · weight, in bf16."""
    inverse = _inverse_rms(x, eps)
    for i in range(x.size):
        out[i] = _bf16(x[i] * inverse * weight[i])


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def silu_gate(gate: Any, up: Any, out: Any) -> None:
    """out = silu(gate) · up."""
    for i in range(gate.size):
        value = widen(gate[i])
        out[i] = _bf16(value / (np.float32(1.0) + np.exp(-value)) * widen(up[i]))


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def gelu_gate(gate: Any, up: Any, out: Any) -> None:
    """out = gelu(gate) · up, by the tanh formula."""
    root = np.float32(0.7978845608028654)
    for i in range(gate.size):
        value = widen(gate[i])
        inner = root * (value + np.float32(0.044715) * value * value * value)
        # tanh(u) = 1 − 2 / (e^2u + 1)
        tanh = np.float32(1.0) - np.float32(2.0) / (np.exp(np.float32(2.0) * inner) + np.float32(1.0))
        out[i] = _bf16(np.float32(0.5) * value * (np.float32(1.0) + tanh) * widen(up[i]))


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _rotated(head: Any, norm: Any, eps: Any, cosines: Any, sines: Any, factor: Any, out: Any) -> None:
    """A head's query or key: normed if `norm` has weights, its first channels rotated by halves, times `factor`."""
    scale = factor
    if norm.size:
        scale = factor * _inverse_rms(head, eps)
    half = cosines.size // 2
    for i in range(head.size):
        out[i] = widen(head[i]) * scale * (norm[i] if norm.size else np.float32(1.0))
    for i in range(half):
        first, second = out[i], out[i + half]
        out[i] = first * cosines[i] - second * sines[i]
        out[i + half] = second * cosines[i + half] + first * sines[i + half]


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def remember(
    k: Any, v: Any, norm: Any, eps: Any, cosines: Any, sines: Any, keys: Any, values: Any, position: Any
) -> None:
    """Put the token's keys and values [heads · width] into the cache [heads, capacity, width]."""
    heads, _, width = keys.shape
    for h in range(heads):
        head = k[h * width : (h + 1) * width]
        _rotated(head, norm, eps, cosines, sines, np.float32(1.0), keys[h, position])
        for i in range(width):
            values[h, position, i] = widen(v[h * width + i])


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def attend(
    q: Any,
    norm: Any,
    eps: Any,
    cosines: Any,
    sines: Any,
    scaling: Any,
    keys: Any,
    values: Any,
    first: Any,
    position: Any,
    scores: Any,
    out: Any,
) -> None:
    """Attention of one token's queries over cache positions first to position.

    scores: fp32 scratch [at least position + 1 + 2 · width].
    """  # fmt: skip
    heads, _, width = keys.shape
    shared = q.size // (heads * width)
    query, mixed = scores[-2 * width : -width], scores[-width:]
    for h in range(heads * shared):
        _rotated(q[h * width : (h + 1) * width], norm, eps, cosines, sines, scaling, query)
        largest = np.float32(-np.inf)
        key, value = keys[h // shared], values[h // shared]
        for t in range(first, position + 1):
            score = np.float32(0.0)
            for i in range(width):
                score += query[i] * key[t, i]
            scores[t] = score
            largest = max(largest, score)
        total = np.float32(0.0)
        for t in range(first, position + 1):
            scores[t] = np.exp(scores[t] - largest)
            total += scores[t]
        for i in range(width):
            mixed[i] = np.float32(0.0)
        for t in range(first, position + 1):
            weight = scores[t]
            for i in range(width):
                mixed[i] += weight * value[t, i]
        for i in range(width):
            out[h * width + i] = _bf16(mixed[i] / total)
