"""Compiled products of decoded rows with a few tokens: memory is read once, decoding happens in registers.

y[t, n] = Σ_g s[n, g] (Σ_k a[n, k] x[t, k] − (raised + z[n, g]) Σ_k x[t, k]), where a = raised + code as decoded
(kernels.lanes) and k runs over group g. Sums of x per group are given. Four rows go at a time, or two with four tokens,
so that enough independent sums keep the multipliers busy and what is loaded is used more than once.

The last block of a row may reach into the next row: activations there are zero. Where it would reach beyond the
tensor, it is read from a copy.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types

from fewbits.kernels.lanes import BLOCK, add_block, codes_at, decoder_of, fetch, no_sums, total_of
from fewbits.kernels.memory import FLOAT32, address_of, number_at, pointer_to, write
from fewbits.kernels.team import PIECE, ROWS, fetch_add

# The block of fields that a call passes: int64, after those of kernels.team.
(
    CODES_AT, ROW_BYTES, BLOCK_BYTES, BLOCKS, GROUPS, GROUP_SIZE, SCALES_AT, SCALE_KIND, ZEROS_AT, RAISED_BY, X_AT,
    X_STRIDE, PARTS, TOKENS, X_SUMS_AT, X_SCALES_AT, BIAS_AT, OUT_AT, OUT_KIND, FIELDS,
) = range(3, 23)  # fmt: skip
SUMS = {"reassoc", "nsz", "contract"}
# Bytes of a copied last block: codes, then scales.
COPY = 192


@njit(fastmath=SUMS, error_model="numpy")  # type: ignore[untyped-decorator]
def _offset(fields: Any, row: Any, token: Any) -> Any:
    """Σ_g s (raised + z) Σ_k x: what a row's raised codes and zero points add to a token's sum."""
    groups, raised = fields[GROUPS], np.float32(fields[RAISED_BY])
    first = row * groups
    scales, kind, zeros_at = fields[SCALES_AT], fields[SCALE_KIND], fields[ZEROS_AT]
    sums = carray(pointer_to(fields[X_SUMS_AT] + token * groups * 4), (groups,), np.float32)
    total = np.float32(0.0)
    if zeros_at == 0:
        if raised == np.float32(0.0):
            return total
        for g in range(groups):
            total += number_at(scales, first + g, kind) * sums[g]
        return total * raised
    zeros = carray(pointer_to(zeros_at + first), (groups,), np.uint8)
    for g in range(groups):
        total += number_at(scales, first + g, kind) * (raised + np.float32(zeros[g])) * sums[g]
    return total


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _finish(decoder: Any, fields: Any, row: Any, token: Any, sums: Any) -> None:
    value = total_of(sums)
    if fields[GROUPS] == 1:
        value *= number_at(fields[SCALES_AT], row, fields[SCALE_KIND])
    value -= _offset(fields, row, token)
    if fields[X_SCALES_AT] != 0:
        value *= number_at(fields[X_SCALES_AT], token, FLOAT32)
    if fields[BIAS_AT] != 0:
        value += number_at(fields[BIAS_AT], row, FLOAT32)
    write(fields[OUT_AT], token * fields[ROWS] + row, fields[OUT_KIND], value)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _last_block(fields: Any, row: Any, copy: Any) -> None:
    """Copy the last block of a row, and its scales, with zeros behind them."""
    copy[:] = 0
    before = (fields[BLOCKS] - 1) * fields[BLOCK_BYTES]
    codes = carray(pointer_to(fields[CODES_AT] + row * fields[ROW_BYTES]), (fields[ROW_BYTES],), np.uint8)
    for k in range(before, fields[ROW_BYTES]):
        copy[k - before] = codes[k]
    width = 4 if fields[SCALE_KIND] == FLOAT32 else 2
    first = (fields[BLOCKS] - 1) * BLOCK // fields[GROUP_SIZE]
    scales_at = fields[SCALES_AT] + width * (row * fields[GROUPS] + first)
    scales = carray(pointer_to(scales_at), (width * (fields[GROUPS] - first),), np.uint8)
    for k in range(min(scales.size, COPY - BLOCK)):
        copy[BLOCK + k] = scales[k]


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _reaches_out(fields: Any, row: Any) -> Any:
    """Whether the last block of a row, or its scales, would be read beyond the tensor's end."""
    rows, groups, spans = fields[ROWS], fields[GROUPS], max(1, BLOCK // fields[GROUP_SIZE])
    codes_end = row * fields[ROW_BYTES] + fields[BLOCKS] * fields[BLOCK_BYTES]
    scales_end = row * groups + (fields[BLOCKS] - 1) * BLOCK // fields[GROUP_SIZE] + spans
    return codes_end > rows * fields[ROW_BYTES] or (groups > 1 and scales_end > rows * groups)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _four_rows(decoder: Any, fields: Any, r0: Any, r1: Any, r2: Any, r3: Any, token: Any, copy: Any) -> None:
    wide, width, blocks, size = fields[BLOCK_BYTES], fields[ROW_BYTES], fields[BLOCKS], fields[GROUP_SIZE]
    scale_bytes, codes = 4 if fields[SCALE_KIND] == FLOAT32 else 2, fields[CODES_AT]
    row_scales = scale_bytes * fields[GROUPS]
    y0, y1, y2, y3 = no_sums(), no_sums(), no_sums(), no_sums()
    whole = blocks - 1 if _reaches_out(fields, r3) else blocks
    for part in range(fields[PARTS]):
        x = fields[X_AT] + (token * fields[PARTS] + part) * fields[X_STRIDE]
        for b in range(whole):
            at, s = codes + b * wide, fields[SCALES_AT] + b * BLOCK // size * scale_bytes
            for line in range(0, wide, 64):
                ahead = at + line + 4 * width
                fetch(ahead + r0 * width)
                fetch(ahead + r1 * width)
                fetch(ahead + r2 * width)
                fetch(ahead + r3 * width)
            y0 = add_block(decoder, y0, codes_at(decoder, at + r0 * width), x, s + r0 * row_scales)
            y1 = add_block(decoder, y1, codes_at(decoder, at + r1 * width), x, s + r1 * row_scales)
            y2 = add_block(decoder, y2, codes_at(decoder, at + r2 * width), x, s + r2 * row_scales)
            y3 = add_block(decoder, y3, codes_at(decoder, at + r3 * width), x, s + r3 * row_scales)
            x += 2 * BLOCK
        if whole < blocks:
            at, s = np.int64(copy.ctypes.data), np.int64(copy.ctypes.data) + BLOCK
            _last_block(fields, r0, copy)
            y0 = add_block(decoder, y0, codes_at(decoder, at), x, s)
            _last_block(fields, r1, copy)
            y1 = add_block(decoder, y1, codes_at(decoder, at), x, s)
            _last_block(fields, r2, copy)
            y2 = add_block(decoder, y2, codes_at(decoder, at), x, s)
            _last_block(fields, r3, copy)
            y3 = add_block(decoder, y3, codes_at(decoder, at), x, s)
    _finish(decoder, fields, r0, token, y0)
    _finish(decoder, fields, r1, token, y1)
    _finish(decoder, fields, r2, token, y2)
    _finish(decoder, fields, r3, token, y3)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _two_rows(decoder: Any, fields: Any, r0: Any, r1: Any, t0: Any, t1: Any, t2: Any, t3: Any, copy: Any) -> None:
    wide, width, blocks, size = fields[BLOCK_BYTES], fields[ROW_BYTES], fields[BLOCKS], fields[GROUP_SIZE]
    scale_bytes, codes = 4 if fields[SCALE_KIND] == FLOAT32 else 2, fields[CODES_AT]
    row_scales, stride = scale_bytes * fields[GROUPS], fields[X_STRIDE] * fields[PARTS]
    y00, y01, y02, y03 = no_sums(), no_sums(), no_sums(), no_sums()
    y10, y11, y12, y13 = no_sums(), no_sums(), no_sums(), no_sums()
    copied = _reaches_out(fields, r1)
    for part in range(fields[PARTS]):
        x = fields[X_AT] + part * fields[X_STRIDE]
        x0, x1, x2, x3 = x + t0 * stride, x + t1 * stride, x + t2 * stride, x + t3 * stride
        for b in range(blocks):
            s0 = fields[SCALES_AT] + b * BLOCK // size * scale_bytes + r0 * row_scales
            s1 = fields[SCALES_AT] + b * BLOCK // size * scale_bytes + r1 * row_scales
            at0, at1 = codes + b * wide + r0 * width, codes + b * wide + r1 * width
            if copied and b == blocks - 1:
                _last_block(fields, r0, copy[:COPY])
                _last_block(fields, r1, copy[COPY:])
                at0, at1 = np.int64(copy.ctypes.data), np.int64(copy.ctypes.data) + COPY
                s0, s1 = at0 + BLOCK, at1 + BLOCK
            row = codes_at(decoder, at0)
            y00, y01 = add_block(decoder, y00, row, x0, s0), add_block(decoder, y01, row, x1, s0)
            y02, y03 = add_block(decoder, y02, row, x2, s0), add_block(decoder, y03, row, x3, s0)
            row = codes_at(decoder, at1)
            y10, y11 = add_block(decoder, y10, row, x0, s1), add_block(decoder, y11, row, x1, s1)
            y12, y13 = add_block(decoder, y12, row, x2, s1), add_block(decoder, y13, row, x3, s1)
            x0, x1, x2, x3 = x0 + 2 * BLOCK, x1 + 2 * BLOCK, x2 + 2 * BLOCK, x3 + 2 * BLOCK
    _finish(decoder, fields, r0, t0, y00)
    _finish(decoder, fields, r0, t1, y01)
    _finish(decoder, fields, r0, t2, y02)
    _finish(decoder, fields, r0, t3, y03)
    _finish(decoder, fields, r1, t0, y10)
    _finish(decoder, fields, r1, t1, y11)
    _finish(decoder, fields, r1, t2, y12)
    _finish(decoder, fields, r1, t3, y13)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _rows(decoder: Any, pointer: Any) -> None:
    fields = carray(pointer, (FIELDS,), np.int64)
    rows, piece, tokens = fields[ROWS], fields[PIECE], fields[TOKENS]
    last, last_token = rows - 1, tokens - 1
    copy = np.zeros(2 * COPY, np.uint8)
    while True:
        start = fetch_add(address_of(pointer), piece)
        if start >= rows:
            return
        stop = min(start + piece, rows)
        if tokens == 1:
            for r in range(start, stop, 4):
                _four_rows(decoder, fields, r, min(r + 1, last), min(r + 2, last), min(r + 3, last), 0, copy[:COPY])
        else:
            for r in range(start, stop, 2):
                for t in range(0, tokens, 4):
                    _two_rows(
                        decoder, fields, r, min(r + 1, last),
                        t, min(t + 1, last_token), min(t + 2, last_token), min(t + 3, last_token), copy,
                    )  # fmt: skip


@cache
def dot_rows(decoder: str) -> Any:
    """The compiled C function for one way that codes are stored and scaled (see lanes.Decoder)."""

    def work(pointer: Any) -> None:
        _rows(decoder_of(decoder), pointer)

    return cfunc(types.void(types.voidptr), nopython=True, cache=True, error_model="numpy")(work)
