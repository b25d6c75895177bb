"""Compiled rounding to ints with a scale (and zero point) per group of inputs, packed on the way out.

Range, codes, error and packing of a row's groups are done while it is in first-level cache: in vectors (kernels.
group_lanes) where the processor has them and the row allows, or else widened to fp32 once. A searched grid comes from
kernels.search first.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fewbits.kernels import group_lanes as lanes
from fewbits.kernels import search as grids
from fewbits.kernels.compiling import (
    ROUNDING,
    SUMS,
    Array,
    as_float,
    as_numpy,
    entry,
    inlined,
    inner,
    kernel_input,
    magnitude_bits,
    merged,
    miss,
    stored_scale,
    total,
    widen,
)
from fewbits.kernels.memory import copy_numbers
from fewbits.kernels.threads import over_rows
from fewbits.kernels.weight_lanes import fits, is_ordinary
from fewbits.layout import stored_dtype
from fewbits.schemes import Scheme
from fewbits.search import MINMAX, Search

if TYPE_CHECKING:
    import torch

    from fewbits.numerics import Rounded

INFINITY_BITS = np.uint32(0x7F800000)
ZERO = np.float32(0.0)
ONE = np.float32(1.0)


@inlined
def _ordered(bits: Any) -> Any:
    """Bits of a float as an integer of the same order, and back: integer maxima vectorize, those of floats don't."""
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@inner
def _range(group: Any) -> Any:
    """Least and largest value, zero included; all are known to be numbers."""
    low, high = np.int32(0), np.int32(0)
    bits = group.view(np.int32)
    for k in range(bits.size):
        low = min(low, _ordered(bits[k]))
        high = max(high, _ordered(bits[k]))
    return as_float(np.uint32(_ordered(low))), as_float(np.uint32(high))


@partial(merged, fastmath=SUMS)
def _write_codes(group: Any, codes: Any, scale: Any, zero: Any, top_code: Any) -> Any:
    """Codes of one group; returns Σ (x − x̂)² and Σ x²."""
    inverse = ONE / scale
    low, high = -zero, top_code - zero
    error, norm = ZERO, ZERO
    for k in range(group.size):
        u = group[k] * inverse
        code = np.rint(u)
        code = low if code < low else code
        code = high if code > high else code
        codes[k] = np.uint8(np.int32(code + zero))
        missed = miss(group[k], code * scale, inverse)
        error += missed * missed
        norm += u * u
    back = np.float64(1.0) / (np.float64(inverse) * np.float64(inverse))
    return np.float64(error) * back, np.float64(norm) * back


@inner
def _pack(codes: Any, packed: Any, bits: Any) -> None:
    """Little-endian fields into bytes; what is left of the last word is zero. Codes are padded to a multiple of 8."""
    packed[codes.size // 8 * bits :] = 0
    if bits == 8:
        copy_numbers(packed[: codes.size], codes)
    elif bits == 4:
        pairs = codes.view(np.uint16)
        for byte in range(min(packed.size, pairs.size)):
            packed[byte] = np.uint8(pairs[byte] | np.uint16(pairs[byte] >> np.uint16(4)))
    else:
        for eight in range(codes.size // 8):
            stream = np.uint64(0)
            for k in range(8):
                stream |= np.uint64(codes[8 * eight + k]) << np.uint64(k * bits)
            for byte in range(eight * bits, min(eight * bits + bits, packed.size)):
                packed[byte] = np.uint8(stream)
                stream >>= np.uint64(8)


@merged
def _row(
    weight: Any, size: Any, top_code: Any, row: Any, codes: Any, scales: Any, zeros: Any, grids_given: Any,
    dropped: Any, smallest: Any, largest: Any,
) -> Any:  # fmt: skip
    """Codes of one row, a byte each; returns Σ (x − x̂)² and Σ x², NaN if some x is not finite."""
    most = np.uint32(0)
    for k in range(row.size):
        row[k] = widen(weight[k])
        most = max(most, magnitude_bits(weight[k]))
    error, norm = np.float64(0.0), np.float64(0.0)
    if most >= INFINITY_BITS:
        return error, np.float64(np.nan)
    for g in range(row.size // size):
        group = row[g * size : (g + 1) * size]
        if not grids_given:
            low, high = _range(group)
            scale = stored_scale((high - low) / top_code, dropped, smallest, largest)
            zero = np.rint(-low * (ONE / scale))
            zeros[g] = np.uint8(np.int32(min(max(zero, ZERO), top_code)))
            scales[g] = scale
        zero = np.float32(zeros[g])
        missed, squares = _write_codes(group, codes[g * size : (g + 1) * size], scales[g], zero, top_code)
        error += missed
        norm += squares
    return error, norm


@entry
def _rows(
    weight: Any, size: Any, bits: Any, codes: Any, words: Any, scales: Any, zeros: Any, grids_given: Any, fits: Any,
    errors: Any, norms: Any, dropped: Any, smallest: Any, largest: Any,
) -> None:  # fmt: skip
    """Codes and packed codes of rows, where asked for; `fits` if the vectors of kernels.group_lanes serve."""
    columns = weight.shape[1]
    top_code = np.float32(2**bits - 1)
    row, own = np.empty(columns, np.float32), np.zeros((columns + 7) // 8 * 8, np.uint8)
    lows, highs = np.empty(columns // size, np.float32), np.empty(columns // size, np.float32)
    for r in range(weight.shape[0]):
        source, in_lanes = weight[r].ctypes.data, False
        if fits:
            most, norms[r] = lanes.ranges(source, size, lows, highs)
            in_lanes = is_ordinary(most)
        if in_lanes:
            if not grids_given:
                lanes.grids(lows, highs, top_code, scales[r], zeros[r], dropped, smallest, largest)
            errors[r] = lanes.write_codes(source, size, own.ctypes.data, top_code, scales[r], zeros[r])
        else:
            errors[r], norms[r] = _row(
                weight[r], size, top_code, row, own, scales[r], zeros[r], grids_given, dropped, smallest, largest
            )
            if norms[r] != norms[r]:
                continue
        if codes.size > 0:
            copy_numbers(codes[r], own)
        if words.size > 0:
            _pack(own, words[r], bits)


NOTHING = np.empty((0, 0), np.uint8)
ALIKE = np.empty(0, np.float32)


def round_rows_groups(
    weight: Array, dtype: str, scheme: Scheme, search: Search, words: Array
) -> tuple[Array, Array, float, float]:
    """Round rows (as the kernels take them) to packed codes with one thread.

    Args:
        dtype: safetensors name of what scales are stored in.
        words: bytes of the words, where packed codes go (uint8 [R, 4·ceil(K·bits/32)]).

    Returns:
        fp32 scales [R, G] that `dtype` holds exactly, zero points uint8 [R, G], Σ (W − Ŵ)², and Σ W² (NaN if some W is
        not finite).
    """
    job = _Job(weight, dtype, scheme, search, ALIKE, NOTHING, words)
    job.work(0, weight.shape[0])
    return job.scales, job.zeros, total(job.errors), total(job.norms)


class _Job:
    """Rows to round, and where their results go."""

    def __init__(
        self, weight: Array, dtype: str, scheme: Scheme, search: Search, importance: Array, codes: Array, words: Array
    ) -> None:
        rows, columns = weight.shape
        groups = scheme.groups(columns)
        self.scales, self.zeros = np.ones((rows, groups), np.float32), np.zeros((rows, groups), np.uint8)
        self.errors, self.norms = np.zeros(rows), np.zeros(rows)
        self._weight, self._dtype, self._scheme, self._search = weight, dtype, scheme, search
        self._importance, self._codes, self._words = importance, codes, words
        self._size = columns // groups
        self._searched = scheme.symmetric or search.steps > 1

    def work(self, start: int, stop: int) -> None:
        """Round rows [start, stop)."""
        run = slice(start, stop)
        weight, scales, zeros = self._weight[run], self.scales[run], self.zeros[run]
        if self._searched:
            grids.best_grid_of_rows(weight, self._dtype, self._scheme, self._search, scales, zeros, self._importance)
        _rows(
            weight, self._size, self._scheme.bits, self._codes[run], self._words[run], scales, zeros, self._searched,
            fits(weight, self._dtype, self._size), self.errors[run], self.norms[run], *ROUNDING[self._dtype],
        )  # fmt: skip


def round_groups(
    weight: torch.Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    search: Search = MINMAX,
    importance: torch.Tensor | None = None,
    *,
    packed: bool = False,
    out: torch.Tensor | None = None,
) -> Rounded:
    """`numerics.round_groups`, compiled: the same codes, scales and zero points.

    Args:
        packed: return words (int32 [R, ceil(K·bits/32)], as `packing.pack_rows`) in place of codes.
        out: where codes or words go; fresh memory if None, which costs more than the rounding.
    """
    import torch

    from fewbits.numerics import Rounded
    from fewbits.packing import words_for

    rows, columns = weight.shape
    shape = (rows, words_for(columns, scheme.bits)) if packed else (rows, columns)
    stored = torch.empty(shape, dtype=torch.int32 if packed else torch.uint8) if out is None else out
    streams = as_numpy(stored).view(np.uint8)
    shares = ALIKE if importance is None else importance.to(torch.float32).contiguous().numpy()
    job = _Job(
        kernel_input(weight), stored_dtype(scale_dtype), scheme, search, shares,
        NOTHING if packed else streams, streams if packed else NOTHING,
    )  # fmt: skip
    over_rows(rows, columns * search.steps, job.work, grids.rows_of_lanes(scheme.groups(columns)))
    squared_norm = total(job.norms)
    return Rounded(
        stored,
        torch.from_numpy(job.scales).to(scale_dtype),
        None if scheme.symmetric else torch.from_numpy(job.zeros),
        total(job.errors),
        squared_norm,
        squared_norm != squared_norm,
    )
