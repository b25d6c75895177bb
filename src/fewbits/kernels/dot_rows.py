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

from fewbits.kernels.decoders import (
    BLOCK,
    add_scaled,
    codes_at,
    decoder_of,
    fetch_block,
    following,
    less_offsets,
    scales_of,
)
from fewbits.kernels.fetching import fetch_lines
from fewbits.kernels.lanes import LANES, add_products, no_sums, store_totals
from fewbits.kernels.memory import FLOAT32, number_at, on_stack, pointer_to, write_all
from fewbits.kernels.team import OWN, ROWS, WORDS, compiled_work

# The fields of a block.
(
    CODES_AT, ROW_BYTES, BLOCK_BYTES, SPANS, SPAN_BLOCKS, GROUPS, SPAN_SCALES, SCALES_AT, SCALE_KIND, ZEROS_AT,
    RAISED_BY, X_AT, X_STRIDE, PARTS, TOKENS, X_SUMS_AT, X_SCALES_AT, BIAS_AT, OUT_AT, OUT_KIND,
    AHEAD,
) = range(OWN, OWN + 21)  # fmt: skip
# Bytes of a copied last block.
COPY = 256
# Rows whose totals are kept before outputs are made of them.
SOME_ROWS = 128
# Bytes of what a thread has on its stack: copied blocks of two rows, and totals.
COPIES, TOTALS = 2 * COPY, 4 * SOME_ROWS


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _scale_bytes(fields: Any) -> Any:
    return 4 if fields[SCALE_KIND] == FLOAT32 else 2


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _scales_of(decoder: Any, fields: Any, row: Any, group: Any) -> Any:
    """The scales of up to 16 groups of a row, from `group` on."""
    groups = fields[GROUPS]
    at = fields[SCALES_AT] + _scale_bytes(fields) * (row * groups + group)
    return scales_of(decoder, at, min(LANES, groups - group))


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _less_offsets(decoder: Any, fields: Any, row: Any, token: Any, group: Any, scales: Any, sums: Any) -> Any:
    """Sums without what decoded codes are too large by, of up to 16 groups from `group` on."""
    groups, zeros_at = fields[GROUPS], fields[ZEROS_AT]
    if fields[X_SUMS_AT] == 0:
        return sums
    zeros = zeros_at + row * groups + group if zeros_at != 0 else 0
    x_sums = fields[X_SUMS_AT] + 4 * (token * groups + group)
    count = min(LANES, groups - group)
    return less_offsets(decoder, sums, np.float32(fields[RAISED_BY]), scales, zeros, x_sums, count)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _finish(fields: Any, row: Any, token: Any, totals: Any) -> None:
    """Make outputs of the totals of some rows, of which `row` is the first."""
    if fields[GROUPS] == 1 and fields[SCALES_AT] != 0:
        for k in range(totals.size):
            totals[k] *= number_at(fields[SCALES_AT], row + k, fields[SCALE_KIND])
    if fields[X_SCALES_AT] != 0:
        scale = number_at(fields[X_SCALES_AT], token, FLOAT32)
        for k in range(totals.size):
            totals[k] *= scale
    if fields[BIAS_AT] != 0:
        bias = carray(pointer_to(fields[BIAS_AT] + 4 * row), (totals.size,), np.float32)
        for k in range(totals.size):
            totals[k] += bias[k]
    write_all(fields[OUT_AT], token * fields[ROWS] + row, fields[OUT_KIND], totals)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _last_block(fields: Any, row: Any, copy: Any) -> Any:
    """Copy the last block of a row, with zeros behind it, to an address, which is returned."""
    to = carray(pointer_to(copy), (COPY,), np.uint8)
    to[:] = 0
    before = (fields[SPANS] * fields[SPAN_BLOCKS] - 1) * fields[BLOCK_BYTES]
    codes = carray(pointer_to(fields[CODES_AT] + row * fields[ROW_BYTES]), (fields[ROW_BYTES],), np.uint8)
    for k in range(before, fields[ROW_BYTES]):
        to[k - before] = codes[k]
    return copy


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _add_last_block(decoder: Any, fields: Any, row: Any, copy: Any, x: Any, scales: Any, sums: Any) -> Any:
    """Sums + the products of a row's last block, read from a copy."""
    products = add_products(no_sums(), codes_at(decoder, _last_block(fields, row, copy)), x)
    return add_scaled(decoder, sums, products, scales)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _reaches_out(fields: Any, row: Any) -> Any:
    """Whether the last block of a row would be read beyond the tensor's end."""
    end = row * fields[ROW_BYTES] + fields[SPANS] * fields[SPAN_BLOCKS] * fields[BLOCK_BYTES]
    return end > fields[ROWS] * fields[ROW_BYTES]


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _four_rows(decoder: Any, fields: Any, r0: Any, r1: Any, r2: Any, r3: Any, copy: Any, totals: Any) -> None:
    """Totals of four rows and one token, to an address."""
    wide, width, blocks, spans = fields[BLOCK_BYTES], fields[ROW_BYTES], fields[SPAN_BLOCKS], fields[SPANS]
    codes, ahead, span_scales = fields[CODES_AT], fields[AHEAD], fields[SPAN_SCALES]
    # Spans whose scales fill a vector.
    panel = LANES // span_scales if span_scales != 0 else spans
    y0, y1, y2, y3 = no_sums(), no_sums(), no_sums(), no_sums()
    last = 1 if _reaches_out(fields, r3) else 0
    if blocks == 1:
        spans -= last
    else:
        # Only a row of one span ends within a block.
        blocks -= last
    for part in range(fields[PARTS]):
        x = fields[X_AT] + part * fields[X_STRIDE]
        at0, at1, at2, at3 = codes + r0 * width, codes + r1 * width, codes + r2 * width, codes + r3 * width
        for first in range(0, fields[SPANS], panel):
            group = first * span_scales
            s0, s1 = _scales_of(decoder, fields, r0, group), _scales_of(decoder, fields, r1, group)
            s2, s3 = _scales_of(decoder, fields, r2, group), _scales_of(decoder, fields, r3, group)
            if part == 0:
                y0 = _less_offsets(decoder, fields, r0, 0, group, s0, y0)
                y1 = _less_offsets(decoder, fields, r1, 0, group, s1, y1)
                y2 = _less_offsets(decoder, fields, r2, 0, group, s2, y2)
                y3 = _less_offsets(decoder, fields, r3, 0, group, s3, y3)
            for _ in range(first, min(first + panel, spans)):
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
                s0, s1 = following(decoder, s0), following(decoder, s1)
                s2, s3 = following(decoder, s2), following(decoder, s3)
            if last and first + panel >= fields[SPANS]:
                y0 = _add_last_block(decoder, fields, r0, copy, x, s0, y0)
                y1 = _add_last_block(decoder, fields, r1, copy, x, s1, y1)
                y2 = _add_last_block(decoder, fields, r2, copy, x, s2, y2)
                y3 = _add_last_block(decoder, fields, r3, copy, x, s3, y3)
    store_totals(y0, y1, y2, y3, totals)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _two_rows(
    decoder: Any, fields: Any, r0: Any, r1: Any, t0: Any, t1: Any, t2: Any, t3: Any, copy: Any, totals: Any
) -> None:  # fmt: skip
    """Totals of two rows and four tokens, token after token, to an address."""
    wide, width, blocks, spans = fields[BLOCK_BYTES], fields[ROW_BYTES], fields[SPAN_BLOCKS], fields[SPANS]
    codes, stride, span_scales = fields[CODES_AT], fields[X_STRIDE] * fields[PARTS], fields[SPAN_SCALES]
    panel = LANES // span_scales if span_scales != 0 else spans
    y00, y01, y02, y03 = no_sums(), no_sums(), no_sums(), no_sums()
    y10, y11, y12, y13 = no_sums(), no_sums(), no_sums(), no_sums()
    copied = _reaches_out(fields, r1)
    for part in range(fields[PARTS]):
        x = fields[X_AT] + part * fields[X_STRIDE]
        x0, x1, x2, x3 = x + t0 * stride, x + t1 * stride, x + t2 * stride, x + t3 * stride
        at0, at1 = codes + r0 * width, codes + r1 * width
        for first in range(0, spans, panel):
            group = first * span_scales
            s0, s1 = _scales_of(decoder, fields, r0, group), _scales_of(decoder, fields, r1, group)
            if part == 0:
                y00 = _less_offsets(decoder, fields, r0, t0, group, s0, y00)
                y01 = _less_offsets(decoder, fields, r0, t1, group, s0, y01)
                y02 = _less_offsets(decoder, fields, r0, t2, group, s0, y02)
                y03 = _less_offsets(decoder, fields, r0, t3, group, s0, y03)
                y10 = _less_offsets(decoder, fields, r1, t0, group, s1, y10)
                y11 = _less_offsets(decoder, fields, r1, t1, group, s1, y11)
                y12 = _less_offsets(decoder, fields, r1, t2, group, s1, y12)
                y13 = _less_offsets(decoder, fields, r1, t3, group, s1, y13)
            for span in range(first, min(first + panel, spans)):
                p00, p01, p02, p03 = no_sums(), no_sums(), no_sums(), no_sums()
                p10, p11, p12, p13 = no_sums(), no_sums(), no_sums(), no_sums()
                for block in range(blocks):
                    if copied and span == spans - 1 and block == blocks - 1:
                        at0, at1 = _last_block(fields, r0, copy), _last_block(fields, r1, copy + COPY)
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
                s0, s1 = following(decoder, s0), following(decoder, s1)
    store_totals(y00, y10, y01, y11, totals)
    store_totals(y02, y12, y03, y13, totals + 16)


@njit(inline="always")  # type: ignore[untyped-decorator]
def _fetch_scales(fields: Any, first: Any, stop: Any) -> None:
    """Ask for the scales and zero points of some rows: waiting for them had taken a fifth of a small layer's time."""
    groups, zeros_at = fields[GROUPS], fields[ZEROS_AT]
    width = _scale_bytes(fields) * groups
    fetch_lines(fields[SCALES_AT] + first * width, fields[SCALES_AT] + stop * width)
    if zeros_at != 0:
        fetch_lines(zeros_at + first * groups, zeros_at + stop * groups)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _one_token(decoder: Any, fields: Any, start: Any, stop: Any, copy: Any, totals: Any) -> None:
    last, codes, width, grouped = fields[ROWS] - 1, fields[CODES_AT], fields[ROW_BYTES], fields[GROUPS] > 1
    ahead = fields[AHEAD] // width
    values = carray(pointer_to(totals), (SOME_ROWS,), np.float32)
    fetch_lines(codes + start * width, codes + min(start + ahead, stop) * width)
    if grouped:
        _fetch_scales(fields, start, min(start + ahead, stop))
    for first in range(start, stop, SOME_ROWS):
        end = min(first + SOME_ROWS, stop)
        for r in range(first, end, 4):
            if grouped:
                _fetch_scales(fields, r + ahead, r + ahead + 4)
            rows = min(r + 1, last), min(r + 2, last), min(r + 3, last)
            _four_rows(decoder, fields, r, rows[0], rows[1], rows[2], copy, totals + 4 * (r - first))
        _finish(fields, first, 0, values[: end - first])


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _some_tokens(decoder: Any, fields: Any, start: Any, stop: Any, copy: Any, totals: Any) -> None:
    last, tokens = fields[ROWS] - 1, fields[TOKENS]
    values = carray(pointer_to(totals), (8,), np.float32)
    for r in range(start, stop, 2):
        for t in range(0, tokens, 4):
            others = min(t + 1, tokens - 1), min(t + 2, tokens - 1), min(t + 3, tokens - 1)
            _two_rows(decoder, fields, r, min(r + 1, last), t, others[0], others[1], others[2], copy, totals)
            for token in range(t, min(t + 4, tokens)):
                at = 2 * (token - t)
                _finish(fields, r, token, values[at : at + min(2, last + 1 - r)])


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _rows(decoder: Any, block: Any, start: Any, stop: Any) -> None:
    fields = carray(pointer_to(block), (WORDS,), np.int64)
    copy, totals = on_stack(COPIES), on_stack(TOTALS)
    if fields[TOKENS] == 1:
        _one_token(decoder, fields, start, stop, copy, totals)
    else:
        _some_tokens(decoder, fields, start, stop, copy, totals)


@cache
def dot_rows(decoder: str) -> Any:
    """The compiled work for one way that codes are stored and scaled (see decoders.Decoder)."""

    def work(block: Any, start: Any, stop: Any) -> None:
        _rows(decoder_of(decoder), block, start, stop)

    return compiled_work(work)
