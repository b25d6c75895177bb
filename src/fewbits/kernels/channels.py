"""Compiled rounding with one scale per output channel: int8 and float8 e4m3fn.

Two passes over a row that stays in the cache: the largest magnitude, then codes and error. Rows of bf16 go through
vectors (kernels.weight_lanes) where the processor has them. docs/performance.md says what bounds them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fewbits.kernels.compiling import (
    ROUNDING,
    SUMS,
    Array,
    as_bits,
    as_float,
    as_numpy,
    entry,
    inlined,
    kernel_input,
    magnitude_bits,
    miss,
    stored_scale,
    total,
    widen,
)
from fewbits.kernels.threads import over_rows
from fewbits.kernels.weight_lanes import (
    STEP,
    fits,
    is_ordinary,
    magnitude,
    no_pair,
    round_to_fp8,
    round_to_int,
    scan,
    total_of_pair,
)
from fewbits.layout import stored_dtype

if TYPE_CHECKING:
    import torch

    from fewbits.numerics import Rounded

INFINITY_BITS = np.uint32(0x7F800000)
TWO_TO_14 = np.float32(16384.0)
TWO_TO_14_BITS = np.uint32(0x46800000)
# e4m3fn: 2^-6 is its smallest normal number; fp32's exponent is biased by 127, its own by 7.
SMALLEST_NORMAL = np.float32(2.0**-6)
EXPONENT_SHIFT = np.uint32((127 - 7) << 3)


@inlined
def _largest_bits(row: Any) -> Any:
    """Bits of the largest magnitude; integers keep the order of floats and vectorize."""
    largest = np.uint32(0)
    for k in range(row.size):
        largest = max(largest, magnitude_bits(row[k]))
    return largest


@partial(entry, fastmath=SUMS)
def _int8(weight: Any, codes: Any, scales: Any, errors: Any, norms: Any, dropped: Any, smallest: Any, top: Any) -> None:
    for r in range(weight.shape[0]):
        bits = _largest_bits(weight[r])
        if bits >= INFINITY_BITS:
            norms[r] = np.nan
            continue
        scale = stored_scale(as_float(bits) / np.float32(127.0), dropped, smallest, top)
        scales[r] = scale
        inverse = np.float32(1.0) / scale
        error, norm = np.float32(0.0), np.float32(0.0)
        for k in range(weight.shape[1]):
            x = widen(weight[r, k])
            u = x * inverse
            code = np.rint(u)
            codes[r, k] = np.int8(np.int32(code))
            missed = miss(x, code * scale, inverse)
            error += missed * missed
            norm += u * u
        # A second use of `inverse`: with only one, the compiler turns the product above back into a division.
        errors[r] = np.float64(error) / (np.float64(inverse) * np.float64(inverse))
        norms[r] = np.float64(norm) / (np.float64(inverse) * np.float64(inverse))


@partial(entry, fastmath=SUMS)
def _fp8(weight: Any, codes: Any, scales: Any, errors: Any, norms: Any, dropped: Any, smallest: Any, top: Any) -> None:
    for r in range(weight.shape[0]):
        bits = _largest_bits(weight[r])
        if bits >= INFINITY_BITS:
            norms[r] = np.nan
            continue
        scale = stored_scale(as_float(bits) / np.float32(448.0), dropped, smallest, top)
        scales[r] = scale
        inverse = np.float32(1.0) / scale
        error, norm = np.float32(0.0), np.float32(0.0)
        for k in range(weight.shape[1]):
            x = widen(weight[r, k])
            u = x * inverse
            # Each step is cut to 32 bits: the compiler's integers are 64 bits wide, and half as many fit a vector.
            bits = as_bits(u)
            magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
            # Nearest even at the third bit of the mantissa.
            odd = np.uint32(np.uint32(magnitude >> np.uint32(20)) & np.uint32(1))
            rounded = np.uint32(np.uint32(magnitude + np.uint32(0x7FFFF)) + odd)
            # Below 2^-6 the grid is uniform, 2^-9 wide: adding 2^14 leaves just those bits of the mantissa.
            shifted = as_float(magnitude) + TWO_TO_14
            is_small = as_float(magnitude) < SMALLEST_NORMAL
            small_code = np.uint32(as_bits(shifted) - TWO_TO_14_BITS)
            code = small_code if is_small else np.uint32(np.uint32(rounded >> np.uint32(20)) - EXPONENT_SHIFT)
            value = shifted - TWO_TO_14 if is_small else as_float(np.uint32(rounded & np.uint32(0xFFF00000)))
            sign = np.uint32(np.uint32(bits >> np.uint32(24)) & np.uint32(0x80))
            codes[r, k] = np.uint8(np.uint32(code | sign))
            missed = miss(abs(x), value * scale, inverse)
            error += missed * missed
            norm += u * u
        # A second use of `inverse`: with only one, the compiler turns the product above back into a division.
        errors[r] = np.float64(error) / (np.float64(inverse) * np.float64(inverse))
        norms[r] = np.float64(norm) / (np.float64(inverse) * np.float64(inverse))


@entry
def _in_lanes(
    weight: Any, codes: Any, scales: Any, errors: Any, norms: Any, dropped: Any, smallest: Any, top: Any, to_fp8: Any
) -> None:
    """`_fp8` or `_int8`, which take the rows that vectors cannot."""
    columns = weight.shape[1]
    for r in range(weight.shape[0]):
        source, target = weight[r].ctypes.data, codes[r].ctypes.data
        high, low, squares = scan(source, columns, no_pair())
        largest = max(high, low)
        if not is_ordinary(largest):
            run = slice(r, r + 1)
            if to_fp8:
                _fp8(weight[run], codes[run], scales[run], errors[run], norms[run], dropped, smallest, top)
            else:
                _int8(weight[run], codes[run], scales[run], errors[run], norms[run], dropped, smallest, top)
            continue
        limit = np.float32(448.0) if to_fp8 else np.float32(127.0)
        scale = stored_scale(magnitude(largest) / limit, dropped, smallest, top)
        inverse, missed = np.float32(1.0) / scale, no_pair()
        if to_fp8:
            for k in range(0, columns, STEP):
                missed = round_to_fp8(missed, source + 2 * k, target + k, inverse, scale)
        else:
            for k in range(0, columns, STEP):
                missed = round_to_int(missed, source + 2 * k, target + k, inverse, scale, None, None)
        scales[r], errors[r], norms[r] = scale, total_of_pair(missed), total_of_pair(squares)


def _round_rows(kernel: Any, weight: Array, dtype: str, codes: Array, results: tuple[Array, Array, Array]) -> None:
    """Round with one thread, the fastest way there is; scales, errors and norms go into `results`."""
    if fits(weight, dtype, weight.shape[1]):
        _in_lanes(weight, codes, *results, *ROUNDING[dtype], kernel is _fp8)
    else:
        kernel(weight, codes, *results, *ROUNDING[dtype])


def round_rows_int8(weight: Array, dtype: str, codes: Array) -> tuple[Array, float, float]:
    """Round rows (as the kernels take them) to int8 with one thread; codes go into `codes` (int8 [R, K]).

    Returns:
        fp32 scales [R, 1] that `dtype` holds exactly, Σ (W − Ŵ)², and Σ W² (NaN if some W is not finite).
    """
    return _one_thread(_int8, weight, dtype, codes)


def round_rows_fp8(weight: Array, dtype: str, codes: Array) -> tuple[Array, float, float]:
    """`round_rows_int8` for float8 e4m3fn; codes are its bits (uint8 [R, K])."""
    return _one_thread(_fp8, weight, dtype, codes)


def _one_thread(kernel: Any, weight: Array, dtype: str, codes: Array) -> tuple[Array, float, float]:
    rows = weight.shape[0]
    scales, errors, norms = np.ones(rows, np.float32), np.zeros(rows), np.zeros(rows)
    _round_rows(kernel, weight, dtype, codes, (scales, errors, norms))
    return scales[:, None], total(errors), total(norms)


def round_channel_int8(weight: torch.Tensor, scale_dtype: torch.dtype, out: torch.Tensor | None = None) -> Rounded:
    """`numerics.round_channel_int8`, compiled; codes go into `out` if given (int8 [R, K])."""
    import torch

    codes = torch.empty(weight.shape, dtype=torch.int8) if out is None else out
    return _round(_int8, weight, scale_dtype, codes)


def round_channel_fp8(weight: torch.Tensor, scale_dtype: torch.dtype, out: torch.Tensor | None = None) -> Rounded:
    """`numerics.round_channel_fp8`, compiled; codes go into `out` if given (float8_e4m3fn [R, K])."""
    import torch

    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn) if out is None else out
    return _round(_fp8, weight, scale_dtype, codes)


def _round(kernel: Any, weight: torch.Tensor, scale_dtype: torch.dtype, codes: torch.Tensor) -> Rounded:
    import torch

    from fewbits.numerics import Rounded

    rows, columns = weight.shape
    source, target = kernel_input(weight), as_numpy(codes)
    scales, errors, norms = np.ones(rows, np.float32), np.zeros(rows), np.zeros(rows)
    dtype = stored_dtype(scale_dtype)

    def work(start: int, stop: int) -> None:
        run = slice(start, stop)
        _round_rows(kernel, source[run], dtype, target[run], (scales[run], errors[run], norms[run]))

    over_rows(rows, columns, work)
    squared_norm = total(norms)
    stored = torch.from_numpy(scales)[:, None].to(scale_dtype)
    return Rounded(codes, stored, None, total(errors), squared_norm, squared_norm != squared_norm)
