"""Compiled products of decoded rows with a few tokens: memory is read once, decoding happens in registers.

y[t, n] = Σ_g s[n, g] (Σ_k a[n, k] x[t, k] − (raised + z[n, g]) Σ_k x[t, k]), where a = raised + code as decoded
(kernels.decoders) and k runs over group g. Sums of x per group are given. Four rows go at a time, or two with four
tokens, so that enough independent sums keep the multipliers busy and what is loaded is used more than once.

A row is a number of spans that share their scales: a block of 128 codes with one or more groups, or the blocks of one
group. The last block of a row may reach into the next row: activations there are zero. Where it would reach beyond the
tensor, it is read from a copy.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import carray, njit

from fewbits.kernels.decoders import BLOCK, add_scaled, codes_at, decoder_of, fetch_block, less_offsets
from fewbits.kernels.fetching import begin_fetching
from fewbits.kernels.lanes import LANES, add_products, no_sums, total_of
from fewbits.kernels.memory import FLOAT32, number_at, pointer_to, write
from fewbits.kernels.team import OWN, ROWS, WORDS, compiled_work

# The fields of a block.
(
    CODES_AT, ROW_BYTES, BLOCK_BYTES, SPANS, SPAN_BLOCKS, GROUPS, SPAN_SCALES, SCALES_AT, SCALE_KIND, ZEROS_AT,
    RAISED_BY, X_AT, X_STRIDE, PARTS, TOKENS, X_SUMS_AT, X_SCALES_AT, BIAS_AT, OUT_AT, OUT_KIND,
    AHEAD,
) = range(OWN, OWN + 21)  # fmt: skip
# Bytes of a copied last block: codes, then scales.
COPY = 256 + 64


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _scale_bytes(fields: Any) -> Any:
    return 4 if fields[SCALE_KIND] == FLOAT32 else 2


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _finish(decoder: Any, fields: Any, row: Any, token: Any, sums: Any) -> None:
    groups, scales_at = fields[GROUPS], fields[SCALES_AT]
    if fields[X_SUMS_AT] != 0:
        raised, width = np.float32(fields[RAISED_BY]), _scale_bytes(fields)
        zeros_at, x_sums_at = fields[ZEROS_AT], fields[X_SUMS_AT] + 4 * token * groups
        for g in range(0, groups, LANES):
            zeros = zeros_at + row * groups + g if zeros_at != 0 else 0
            scales = scales_at + width * (row * groups + g)
            sums = less_offsets(decoder, sums, raised, scales, zeros, x_sums_at + 4 * g, min(LANES, groups - g))
    value = total_of(sums)
    if groups == 1 and scales_at != 0:
        value *= number_at(scales_at, row, fields[SCALE_KIND])
    if fields[X_SCALES_AT] != 0:
        value *= number_at(fields[X_SCALES_AT], token, FLOAT32)
    if fields[BIAS_AT] != 0:
        value += number_at(fields[BIAS_AT], row, FLOAT32)
    write(fields[OUT_AT], token * fields[ROWS] + row, fields[OUT_KIND], value)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _last_block(fields: Any, row: Any, copy: Any) -> Any:
    """Copy the last block of a row, and its scales, with zeros behind them, to an address, which is returned."""
    to = carray(pointer_to(copy), (COPY,), np.uint8)
    to[:] = 0
    blocks, width = fields[SPANS] * fields[SPAN_BLOCKS], _scale_bytes(fields)
    before = (blocks - 1) * fields[BLOCK_BYTES]
    codes = carray(pointer_to(fields[CODES_AT] + row * fields[ROW_BYTES]), (fields[ROW_BYTES],), np.uint8)
    for k in range(before, fields[ROW_BYTES]):
        to[k - before] = codes[k]
    if fields[SPAN_SCALES] != 0:
        first = (fields[SPANS] - 1) * fields[SPAN_SCALES]
        scales_at = fields[SCALES_AT] + width * (row * fields[GROUPS] + first)
        scales = carray(pointer_to(scales_at), (width * (fields[GROUPS] - first),), np.uint8)
        for k in range(scales.size):
            to[COPY - 64 + k] = scales[k]
    return copy


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _reaches_out(fields: Any, row: Any) -> Any:
    """Whether the last block of a row, or its scales, would be read beyond the tensor's end."""
    rows, groups, spans = fields[ROWS], fields[GROUPS], fields[SPANS]
    codes_end = row * fields[ROW_BYTES] + spans * fields[SPAN_BLOCKS] * fields[BLOCK_BYTES]
    return codes_end > rows * fields[ROW_BYTES] or row * groups + spans * fields[SPAN_SCALES] > rows * groups


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _four_rows(decoder: Any, fields: Any, r0: Any, r1: Any, r2: Any, r3: Any, token: Any, copy: Any) -> None:
    wide, width, blocks, spans = fields[BLOCK_BYTES], fields[ROW_BYTES], fields[SPAN_BLOCKS], fields[SPANS]
    codes, scales, step = fields[CODES_AT], fields[SCALES_AT], fields[SPAN_SCALES] * _scale_bytes(fields)
    row_scales, ahead = _scale_bytes(fields) * fields[GROUPS], fields[AHEAD]
    y0, y1, y2, y3 = no_sums(), no_sums(), no_sums(), no_sums()
    last = 1 if _reaches_out(fields, r3) else 0
    if blocks == 1:
        spans -= last
    else:
        # Only a row of one span ends within a block.
        blocks -= last
    for part in range(fields[PARTS]):
        x = fields[X_AT] + (token * fields[PARTS] + part) * fields[X_STRIDE]
        at0, at1, at2, at3 = codes + r0 * width, codes + r1 * width, codes + r2 * width, codes + r3 * width
        s0, s1, s2, s3 = (
            scales + r0 * row_scales,
            scales + r1 * row_scales,
            scales + r2 * row_scales,
            scales + r3 * row_scales,
        )
        for _ in range(spans):
            p0, p1, p2, p3 = no_sums(), no_sums(), no_sums(), no_sums()
            for _ in range(blocks):
                fetch_block(decoder, at0 + ahead)
                fetch_block(decoder, at1 + ahead)
                fetch_block(decoder, at2 + ahead)
                fetch_block(decoder, at3 + ahead)
                p0 = add_products(p0, codes_at(decoder, at0), x)
                p1 = add_products(p1, codes_at(decoder, at1), x)
                p2 = add_products(p2, codes_at(decoder, at2), x)
                p3 = add_products(p3, codes_at(decoder, at3), x)
                at0, at1, at2, at3, x = at0 + wide, at1 + wide, at2 + wide, at3 + wide, x + 2 * BLOCK
            y0, y1 = add_scaled(decoder, y0, p0, s0), add_scaled(decoder, y1, p1, s1)
            y2, y3 = add_scaled(decoder, y2, p2, s2), add_scaled(decoder, y3, p3, s3)
            s0, s1, s2, s3 = s0 + step, s1 + step, s2 + step, s3 + step
        if last:
            at = _last_block(fields, r0, copy)
            y0 = add_scaled(decoder, y0, add_products(no_sums(), codes_at(decoder, at), x), at + COPY - 64)
            at = _last_block(fields, r1, copy)
            y1 = add_scaled(decoder, y1, add_products(no_sums(), codes_at(decoder, at), x), at + COPY - 64)
            at = _last_block(fields, r2, copy)
            y2 = add_scaled(decoder, y2, add_products(no_sums(), codes_at(decoder, at), x), at + COPY - 64)
            at = _last_block(fields, r3, copy)
            y3 = add_scaled(decoder, y3, add_products(no_sums(), codes_at(decoder, at), x), at + COPY - 64)
    _finish(decoder, fields, r0, token, y0)
    _finish(decoder, fields, r1, token, y1)
    _finish(decoder, fields, r2, token, y2)
    _finish(decoder, fields, r3, token, y3)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _two_rows(decoder: Any, fields: Any, r0: Any, r1: Any, t0: Any, t1: Any, t2: Any, t3: Any, copy: Any) -> None:
    wide, width, blocks, spans = fields[BLOCK_BYTES], fields[ROW_BYTES], fields[SPAN_BLOCKS], fields[SPANS]
    codes, scales, step = fields[CODES_AT], fields[SCALES_AT], fields[SPAN_SCALES] * _scale_bytes(fields)
    row_scales, stride = _scale_bytes(fields) * fields[GROUPS], fields[X_STRIDE] * fields[PARTS]
    y00, y01, y02, y03 = no_sums(), no_sums(), no_sums(), no_sums()
    y10, y11, y12, y13 = no_sums(), no_sums(), no_sums(), no_sums()
    copied = _reaches_out(fields, r1)
    for part in range(fields[PARTS]):
        x = fields[X_AT] + part * fields[X_STRIDE]
        x0, x1, x2, x3 = x + t0 * stride, x + t1 * stride, x + t2 * stride, x + t3 * stride
        at0, at1 = codes + r0 * width, codes + r1 * width
        s0, s1 = scales + r0 * row_scales, scales + r1 * row_scales
        for span in range(spans):
            p00, p01, p02, p03 = no_sums(), no_sums(), no_sums(), no_sums()
            p10, p11, p12, p13 = no_sums(), no_sums(), no_sums(), no_sums()
            for block in range(blocks):
                if copied and span == spans - 1 and block == blocks - 1:
                    at0, at1 = _last_block(fields, r0, copy), _last_block(fields, r1, copy + COPY)
                    s0, s1 = at0 + COPY - 64, at1 + COPY - 64
                row = codes_at(decoder, at0)
                p00, p01 = add_products(p00, row, x0), add_products(p01, row, x1)
                p02, p03 = add_products(p02, row, x2), add_products(p03, row, x3)
                row = codes_at(decoder, at1)
                p10, p11 = add_products(p10, row, x0), add_products(p11, row, x1)
                p12, p13 = add_products(p12, row, x2), add_products(p13, row, x3)
                at0, at1 = at0 + wide, at1 + wide
                x0, x1, x2, x3 = x0 + 2 * BLOCK, x1 + 2 * BLOCK, x2 + 2 * BLOCK, x3 + 2 * BLOCK
            y00, y01 = add_scaled(decoder, y00, p00, s0), add_scaled(decoder, y01, p01, s0)
            y02, y03 = add_scaled(decoder, y02, p02, s0), add_scaled(decoder, y03, p03, s0)
            y10, y11 = add_scaled(decoder, y10, p10, s1), add_scaled(decoder, y11, p11, s1)
            y12, y13 = add_scaled(decoder, y12, p12, s1), add_scaled(decoder, y13, p13, s1)
            s0, s1 = s0 + step, s1 + step
    _finish(decoder, fields, r0, t0, y00)
    _finish(decoder, fields, r0, t1, y01)
    _finish(decoder, fields, r0, t2, y02)
    _finish(decoder, fields, r0, t3, y03)
    _finish(decoder, fields, r1, t0, y10)
    _finish(decoder, fields, r1, t1, y11)
    _finish(decoder, fields, r1, t2, y12)
    _finish(decoder, fields, r1, t3, y13)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _rows(decoder: Any, block: Any, start: Any, stop: Any) -> None:
    fields = carray(pointer_to(block), (WORDS,), np.int64)
    last, tokens = fields[ROWS] - 1, fields[TOKENS]
    kept = np.empty(2 * COPY, np.uint8)
    copy = np.int64(kept.ctypes.data)
    if tokens == 1:
        codes, width = fields[CODES_AT], fields[ROW_BYTES]
        begin_fetching(codes + start * width, codes + stop * width, fields[AHEAD])
        for r in range(start, stop, 4):
            _four_rows(decoder, fields, r, min(r + 1, last), min(r + 2, last), min(r + 3, last), 0, copy)
    else:
        for r in range(start, stop, 2):
            for t in range(0, tokens, 4):
                _two_rows(
                    decoder, fields, r, min(r + 1, last),
                    t, min(t + 1, tokens - 1), min(t + 2, tokens - 1), min(t + 3, tokens - 1), copy,
                )  # fmt: skip
    # Compiled code frees an array after its last use.
    kept[0] = 0


@cache
def dot_rows(decoder: str) -> Any:
    """The compiled work for one way that codes are stored and scaled (see decoders.Decoder)."""

    def work(block: Any, start: Any, stop: Any) -> None:
        _rows(decoder_of(decoder), block, start, stop)

    return compiled_work(work)
