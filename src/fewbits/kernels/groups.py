"""Compiled rounding to ints with a scale (and zero point) per group of inputs, searched, and packed on the way out.

A group is widened to fp32 once, every candidate grid is tried on it in registers and first-level cache, and the codes
of the best are packed while the row is still there. Bound by arithmetic: about eight operations a weight and candidate.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, prange

from fewbits.kernels.compiling import (
    SUMS,
    as_bits,
    as_float,
    kernel_input,
    magnitude_bits,
    rounding_of,
    stored_scale,
    total,
    use_torch_threads,
    widen,
)
from fewbits.numerics import MINMAX, Rounded, Search
from fewbits.packing import pack_rows, words_for
from fewbits.schemes import Scheme

INFINITY_BITS = np.uint32(0x7F800000)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _range(group: Any) -> Any:
    """Least and largest value, zero included.

    The bits of positive floats are ordered as signed integers are, and those of negative ones are negative: maxima of
    integers vectorize where those of floats do not.
    """
    low, high = np.int32(0), np.int32(0)
    for k in range(group.size):
        bits = as_bits(group[k])
        high = max(high, np.int32(bits))
        low = max(low, np.int32(bits ^ np.uint32(0x80000000)))
    return -as_float(np.uint32(low)), as_float(np.uint32(high))


@njit(fastmath=SUMS, nogil=True)  # type: ignore[untyped-decorator]
def _loss(group: Any, weights: Any, weighted: Any, power: Any, scale: Any, zero: Any, largest_code: Any) -> Any:
    """Σ weightₖ |x − x̂|^power of one candidate grid."""
    inverse = np.float32(1.0) / scale
    low, high = -zero, largest_code - zero
    loss = np.float32(0.0)
    if power == 4:
        for k in range(group.size):
            u = group[k] * inverse
            code = np.rint(u)
            code = low if code < low else code
            code = high if code > high else code
            squared = (u - code) * (u - code)
            loss += squared * squared * weights[k] if weighted else squared * squared
        scale_back = np.float64(1.0) / (np.float64(inverse) * np.float64(inverse))
        return np.float64(loss) * scale_back * scale_back
    for k in range(group.size):
        u = group[k] * inverse
        code = np.rint(u)
        code = low if code < low else code
        code = high if code > high else code
        loss += (u - code) * (u - code) * weights[k] if weighted else (u - code) * (u - code)
    return np.float64(loss) / (np.float64(inverse) * np.float64(inverse))


@njit(fastmath=SUMS, nogil=True)  # type: ignore[untyped-decorator]
def _asymmetric(group: Any, weights: Any, weighted: Any, power: Any, factors: Any, top_code: Any, rounding: Any) -> Any:
    low, high = _range(group)
    best, best_scale, best_zero = np.inf, np.float32(1.0), np.float32(0.0)
    for factor in factors:
        scale = stored_scale((high - low) * factor / top_code, rounding[0], rounding[1], rounding[2])
        zero = min(max(np.rint(-(low * factor) / scale), np.float32(0.0)), top_code)
        if factors.size == 1:
            return scale, zero
        loss = _loss(group, weights, weighted, power, scale, zero, top_code)
        if loss < best:
            best, best_scale, best_zero = loss, scale, zero
    return best_scale, best_zero


@njit(fastmath=SUMS, nogil=True)  # type: ignore[untyped-decorator]
def _symmetric(group: Any, weights: Any, weighted: Any, power: Any, factors: Any, top_code: Any, rounding: Any) -> Any:
    low, high = _range(group)
    extreme = high if high > -low else low
    size = abs(extreme)
    middle = (top_code + np.float32(1.0)) / np.float32(2.0)
    best, best_scale = np.inf, np.float32(1.0)
    for factor in factors:
        scale = stored_scale(size * factor / middle, rounding[0], rounding[1], rounding[2])
        scale = -scale if extreme > 0 else scale
        loss = _loss(group, weights, weighted, power, scale, middle, top_code)
        if loss < best:
            best, best_scale = loss, scale
        if middle > 1:
            scale = stored_scale(size * factor / (middle - np.float32(1.0)), rounding[0], rounding[1], rounding[2])
            loss = _loss(group, weights, weighted, power, scale, middle, top_code)
            if loss < best:
                best, best_scale = loss, scale
    return best_scale, middle


@njit(fastmath=SUMS, nogil=True)  # type: ignore[untyped-decorator]
def _write_codes(group: Any, codes: Any, scale: Any, zero: Any, top_code: Any) -> Any:
    """Codes of one group; returns Σ (x − x̂)² and Σ x²."""
    inverse = np.float32(1.0) / scale
    low, high = -zero, top_code - zero
    error, norm = np.float32(0.0), np.float32(0.0)
    for k in range(group.size):
        u = group[k] * inverse
        code = np.rint(u)
        code = low if code < low else code
        code = high if code > high else code
        codes[k] = np.uint8(np.int32(code + zero))
        error += (u - code) * (u - code)
        norm += u * u
    back = np.float64(1.0) / (np.float64(inverse) * np.float64(inverse))
    return np.float64(error) * back, np.float64(norm) * back


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _pack(codes: Any, packed: Any, bits: Any) -> None:
    """Little-endian fields of 2, 4 or 8 bits into bytes; what is left of the last word is zero."""
    if bits == 4:
        for byte in range(codes.size // 2):
            packed[byte] = np.uint8(codes[2 * byte] | np.uint8(codes[2 * byte + 1] << np.uint8(4)))
    elif bits == 2:
        for byte in range(codes.size // 4):
            low = np.uint8(codes[4 * byte] | np.uint8(codes[4 * byte + 1] << np.uint8(2)))
            high = np.uint8(codes[4 * byte + 2] | np.uint8(codes[4 * byte + 3] << np.uint8(2)))
            packed[byte] = np.uint8(low | np.uint8(high << np.uint8(4)))
    elif bits == 8:
        packed[: codes.size] = codes
    fields = 8 // bits
    for k in range(0 if bits == 1 else codes.size // fields * fields, codes.size):
        packed[k // fields] = np.uint8(packed[k // fields] | np.uint8(codes[k] << np.uint8(k % fields * bits)))


@njit(parallel=True, cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _rows(
    weight: Any, size: Any, symmetric: Any, bits: Any, factors: Any, power: Any, weights: Any, weighted: Any,
    codes: Any, words: Any, keep_codes: Any, scales: Any, zeros: Any, errors: Any, norms: Any,
    dropped: Any, smallest: Any, top: Any,
) -> None:  # fmt: skip
    columns = weight.shape[1]
    top_code = np.float32(2**bits - 1)
    rounding = (dropped, smallest, top)
    for r in prange(weight.shape[0]):
        row = np.empty(columns, np.float32)
        largest = np.uint32(0)
        for k in range(columns):
            row[k] = widen(weight[r, k])
            largest = max(largest, magnitude_bits(weight[r, k]))
        if largest >= INFINITY_BITS:
            norms[r] = np.nan
            continue
        own = codes[r] if keep_codes else np.empty(columns, np.uint8)
        for g in range(columns // size):
            start = g * size
            group, part = row[start : start + size], weights[start : start + size]
            if symmetric:
                scale, zero = _symmetric(group, part, weighted, power, factors, top_code, rounding)
            else:
                scale, zero = _asymmetric(group, part, weighted, power, factors, top_code, rounding)
            scales[r, g] = scale
            zeros[r, g] = np.uint8(np.int32(zero))
            error, norm = _write_codes(group, own[start : start + size], scale, zero, top_code)
            errors[r] += error
            norms[r] += norm
        if words.shape[0] > 0:
            _pack(own, words[r], bits)


def round_groups(
    weight: torch.Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    search: Search = MINMAX,
    importance: torch.Tensor | None = None,
    *,
    packed: bool = False,
) -> Rounded:
    """`numerics.round_groups`, compiled.

    Where two candidates are level to the last bit of fp32, another one may win than in the portable form.

    Args:
        packed: return words (int32 [R, ceil(K·bits/32)], as `packing.pack_rows`) in place of codes.
    """
    use_torch_threads()
    rows, columns = weight.shape
    size = scheme.group_size or columns
    # Fields of these widths don't cross bytes; others are packed afterwards.
    pack_here = packed and scheme.bits in (1, 2, 4, 8)
    codes = np.empty((0 if pack_here else rows, columns), np.uint8)
    words = np.zeros((rows if pack_here else 0, 4 * words_for(columns, scheme.bits)), np.uint8)
    scales = np.ones((rows, columns // size), np.float32)
    zeros = np.zeros((rows, columns // size), np.uint8)
    errors, norms = np.zeros(rows), np.zeros(rows)
    weights = np.zeros(columns, np.float32) if importance is None else importance.to(torch.float32).numpy()
    _rows(
        kernel_input(weight), size, scheme.symmetric, scheme.bits, np.array(search.factors(), np.float32),
        search.power, weights, importance is not None, codes, words, not pack_here, scales, zeros, errors, norms,
        *rounding_of(scale_dtype),
    )  # fmt: skip
    if pack_here:
        stored = torch.from_numpy(words.view(np.int32))
    else:
        stored = torch.from_numpy(codes)
        stored = pack_rows(stored, scheme.bits) if packed else stored
    squared_norm = total(norms)
    return Rounded(
        stored,
        torch.from_numpy(scales).to(scale_dtype),
        None if scheme.symmetric else torch.from_numpy(zeros),
        total(errors),
        squared_norm,
        squared_norm != squared_norm,
    )


