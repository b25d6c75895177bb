"""What lies between the linears of a decoder block, for one token: residual, norm, rotation, attention, gate.

One call each in place of five to fifty of torch's. bf16 comes and goes as uint16; sums and the residual are fp32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from fewbits.kernels.compiling import SUMS, as_float, widen
from fewbits.kernels.memory import as_bf16

# fp32 keeps eight lanes of partial sums; with one, a dot product would wait for each addition.
FAST = SUMS | {"arcp", "afn"}
# The series of e^x on half a power of two around 0; source: Cephes' expf.
COEFFICIENTS = tuple(
    np.float32(value) for value in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)


@njit(inline="always")  # type: ignore[untyped-decorator]
def exponential(x: Any) -> Any:
    """e^x in fp32 within 2 ulp, by arithmetic alone, so that loops over it vectorize; x is kept within ±87."""
    bounded = min(max(x, np.float32(-87.0)), np.float32(87.0))
    power = np.floor(bounded * np.float32(1.4426950408889634) + np.float32(0.5))
    # ln 2 in two parts, the first of few bits: power times it is exact.
    rest = bounded - power * np.float32(0.693359375) + power * np.float32(2.12194440e-4)
    series = np.float32(1.9875691500e-4)
    for coefficient in COEFFICIENTS:
        series = series * rest + coefficient
    value = series * rest * rest + rest + np.float32(1.0)
    return value * as_float(np.uint32(np.int32(power) + np.int32(127)) << np.uint32(23))


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
        out[i] = as_bf16(x[i] * inverse * weight[i])


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def silu_gate(gate: Any, up: Any, out: Any) -> None:
    """out = silu(gate) · up."""
    for i in range(gate.size):
        value = widen(gate[i])
        out[i] = as_bf16(value / (np.float32(1.0) + exponential(-value)) * widen(up[i]))


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def gelu_gate(gate: Any, up: Any, out: Any) -> None:
    """out = gelu(gate) · up, by the tanh formula."""
    root = np.float32(0.7978845608028654)
    for i in range(gate.size):
        value = widen(gate[i])
        inner = root * (value + np.float32(0.044715) * value * value * value)
        # tanh(u) = 1 − 2 / (e^2u + 1)
        tanh = np.float32(1.0) - np.float32(2.0) / (exponential(np.float32(2.0) * inner) + np.float32(1.0))
        out[i] = as_bf16(np.float32(0.5) * value * (np.float32(1.0) + tanh) * widen(up[i]))


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def rotated(head: Any, norm: Any, eps: Any, cosines: Any, sines: Any, factor: Any, out: Any) -> None:
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
        rotated(head, norm, eps, cosines, sines, np.float32(1.0), keys[h, position])
        for i in range(width):
            values[h, position, i] = widen(v[h * width + i])
