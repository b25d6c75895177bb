"""What lies between the linears of a decoder block, for one token: residual, norm, rotation, gate.

Steps of a program (kernels.team). bf16 comes and goes as uint16; sums and the residual are fp32.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
from numba import carray

from fewbits.kernels.compiling import SUMS, as_float, inlined, inner, merged, widen
from fewbits.kernels.memory import as_bf16, copy_bytes, pointer_to
from fewbits.kernels.team import OWN, WORDS, compiled_work

# fp32 keeps eight lanes of partial sums; with one, a dot product would wait for each addition.
FAST = SUMS | {"arcp", "afn"}
# The series of e^x on half a power of two around 0; source: Cephes' expf.
COEFFICIENTS = tuple(
    np.float32(value) for value in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)


@inlined
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


# The fields of a block of "add_norm" (one row), which come first in the others' too where they have the same name.
X_AT, WIDTH, WEIGHT_AT, EPS, OUT_AT, UPDATE_AT, UPDATE_WEIGHT_AT, UPDATE_EPS = range(OWN, OWN + 8)
# The fields of "remember" and of kernels.one_token_attention; a row is a head.
(
    HEADS_AT, HEAD_WIDTH, NORM_AT, NORM_EPS, COSINES_AT, SINES_AT, ROTATED, KEYS_AT, VALUES_AT, CAPACITY, POSITION_AT,
    NEW_VALUES_AT,
) = range(OWN, OWN + 12)  # fmt: skip
# The fields of the gates; a row is a channel.
GATE_AT, UP_AT, GATED_AT = range(OWN, OWN + 3)


def bits_of(value: float) -> int:
    """An fp32 number as a field."""
    return int(np.float32(value).view(np.uint32))


@inlined
def number_of(field: Any) -> Any:
    """The fp32 number that a field holds."""
    return as_float(np.uint32(field))


@partial(merged, fastmath=FAST)
def _inverse_rms(values: Any, eps: Any) -> Any:
    total = np.float32(0.0)
    for i in range(values.size):
        value = widen(values[i])
        total += value * value
    return np.float32(1.0) / np.sqrt(total / np.float32(values.size) + eps)


@partial(merged, fastmath=FAST)
def _add(x: Any, update: Any) -> None:
    for i in range(x.size):
        x[i] += widen(update[i])


@partial(merged, fastmath=FAST)
def _add_normed(x: Any, update: Any, weight: Any, eps: Any) -> None:
    inverse = _inverse_rms(update, eps)
    for i in range(x.size):
        x[i] += widen(update[i]) * inverse * weight[i]


@partial(merged, fastmath=FAST)
def _normed(x: Any, weight: Any, eps: Any, out: Any) -> None:
    inverse = _inverse_rms(x, eps)
    for i in range(x.size):
        out[i] = as_bf16(x[i] * inverse * weight[i])


def _add_norm(address: Any, start: Any, stop: Any) -> None:
    """x += update, normed if that has weights; then out = x / rms(x) · weight, in bf16, if there is an out."""
    block = carray(pointer_to(address), (WORDS,), np.int64)
    width = block[WIDTH]
    x = carray(pointer_to(block[X_AT]), (width,), np.float32)
    if block[UPDATE_AT] != 0:
        update = carray(pointer_to(block[UPDATE_AT]), (width,), np.uint16)
        if block[UPDATE_WEIGHT_AT] != 0:
            weight = carray(pointer_to(block[UPDATE_WEIGHT_AT]), (width,), np.float32)
            _add_normed(x, update, weight, number_of(block[UPDATE_EPS]))
        else:
            _add(x, update)
    if block[OUT_AT] != 0:
        weight = carray(pointer_to(block[WEIGHT_AT]), (width,), np.float32)
        _normed(x, weight, number_of(block[EPS]), carray(pointer_to(block[OUT_AT]), (width,), np.uint16))


@partial(merged, fastmath=FAST)
def _gate_silu(gate: Any, up: Any, out: Any) -> None:
    for i in range(gate.size):
        value = widen(gate[i])
        out[i] = as_bf16(value / (np.float32(1.0) + exponential(-value)) * widen(up[i]))


@partial(merged, fastmath=FAST)
def _gate_gelu(gate: Any, up: Any, out: Any) -> None:
    root = np.float32(0.7978845608028654)
    for i in range(gate.size):
        value = widen(gate[i])
        inner = root * (value + np.float32(0.044715) * value * value * value)
        # tanh(u) = 1 − 2 / (e^2u + 1)
        tanh = np.float32(1.0) - np.float32(2.0) / (exponential(np.float32(2.0) * inner) + np.float32(1.0))
        out[i] = as_bf16(np.float32(0.5) * value * (np.float32(1.0) + tanh) * widen(up[i]))


@inner
def _channels(address: Any, start: Any, stop: Any) -> Any:
    """Gate, up and out of some channels."""
    block = carray(pointer_to(address), (WORDS,), np.int64)
    count = stop - start
    return (
        carray(pointer_to(block[GATE_AT] + 2 * start), (count,), np.uint16),
        carray(pointer_to(block[UP_AT] + 2 * start), (count,), np.uint16),
        carray(pointer_to(block[GATED_AT] + 2 * start), (count,), np.uint16),
    )


def _silu(address: Any, start: Any, stop: Any) -> None:
    """out = silu(gate) · up."""
    gate, up, out = _channels(address, start, stop)
    _gate_silu(gate, up, out)


def _gelu(address: Any, start: Any, stop: Any) -> None:
    """out = gelu(gate) · up, by the tanh formula."""
    gate, up, out = _channels(address, start, stop)
    _gate_gelu(gate, up, out)


@partial(merged, fastmath=FAST)
def rotated(block: Any, head: Any, position: Any, factor: Any, out: Any) -> None:
    """A head's query or key: normed if the norm has weights, its first channels rotated by halves, times `factor`."""
    width, both = block[HEAD_WIDTH], block[ROTATED]
    half = both // 2
    cosines = carray(pointer_to(block[COSINES_AT] + 4 * position * both), (both,), np.float32)
    sines = carray(pointer_to(block[SINES_AT] + 4 * position * both), (both,), np.float32)
    if block[NORM_AT] != 0:
        weight = carray(pointer_to(block[NORM_AT]), (width,), np.float32)
        scale = factor * _inverse_rms(head, number_of(block[NORM_EPS]))
        for i in range(width):
            out[i] = widen(head[i]) * scale * weight[i]
    else:
        for i in range(width):
            out[i] = widen(head[i]) * factor
    for i in range(half):
        first, second = out[i], out[i + half]
        out[i] = first * cosines[i] - second * sines[i]
        out[i + half] = second * cosines[i + half] + first * sines[i + half]


def _remember(address: Any, start: Any, stop: Any) -> None:
    """Put the token's keys and values [heads · width] into the cache [heads, capacity, width], all bf16."""
    block = carray(pointer_to(address), (WORDS,), np.int64)
    width, capacity = block[HEAD_WIDTH], block[CAPACITY]
    position = carray(pointer_to(block[POSITION_AT]), (1,), np.int64)[0]
    own = np.empty(width, np.float32)
    for h in range(start, stop):
        place = 2 * (h * capacity + position) * width
        rotated(
            block, carray(pointer_to(block[HEADS_AT] + 2 * h * width), (width,), np.uint16), position,
            np.float32(1.0), own,
        )  # fmt: skip
        keys = carray(pointer_to(block[KEYS_AT] + place), (width,), np.uint16)
        for i in range(width):
            keys[i] = as_bf16(own[i])
        copy_bytes(block[VALUES_AT] + place, block[NEW_VALUES_AT] + 2 * h * width, 2 * width)


_WORK = {"add_norm": _add_norm, "silu": _silu, "gelu": _gelu, "remember": _remember}


@cache
def between(name: str) -> Any:
    """Compiled work: "add_norm", "remember", or a gate, "silu" or "gelu"."""
    return compiled_work(_WORK[name])
