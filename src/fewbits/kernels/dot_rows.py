"""Compiled products of decoded rows with a few tokens: memory is read once, decoding happens in registers.

y[t, n] = Σ_g s[n, g] (Σ_k a[n, k] x[t, k] − z[n, g] Σ_k x[t, k] − raised Σ_k x[t, k]), where a = raised + code as
decoded (kernels.decoders) and k runs over group g. Both sums of x per group are given. Four short rows go at a time, or
two with four tokens, so that enough independent sums keep the multipliers busy and what is loaded is used more than
once. Scales are kept on the stack, where a block's are spread over lanes as they are loaded.

A row is a number of spans that share their scales: a block of 128 codes with one or more groups, or the blocks of one
group. The last block of a row may reach into the next row: activations there are zero. Where it would reach beyond the
tensor, it is read from a copy.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import carray

from fewbits.kernels.compiling import inlined, inner, merged
from fewbits.kernels.decoders import (
    add_scaled,
    codes_at,
    decoder_of,
    fetch_block,
    following,
    keep_scales,
    less_offsets,
    scales_of,
    span_blocks,
)
from fewbits.kernels.fetching import ASKS_TWICE, fetch_lines
from fewbits.kernels.lanes import (
    LANES,
    X_BYTES,
    add_products,
    add_products_apart,
    both,
    keep_sums,
    kept_sums,
    no_sums,
    store_totals,
)
from fewbits.kernels.memory import FLOAT32, number_at, on_stack, pointer_to, write_all
from fewbits.kernels.team import OWN, ROWS, STREAM_AT, STREAM_BYTES, WORDS, compiled_work

# The fields of a block.
CODES_AT, ROW_BYTES = STREAM_AT, STREAM_BYTES
(
    BLOCK_BYTES, SPANS, SPAN_BLOCKS, GROUPS, SPAN_SCALES, SCALES_AT, SCALE_KIND, ZEROS_AT, X_AT, X_STRIDE,
    PARTS, TOKENS, X_SUMS_AT, X_SCALES_AT, BIAS_AT, OUT_AT, OUT_KIND, AHEAD, X_UNITS_AT,
) = range(OWN, OWN + 19)  # fmt: skip
# Bytes of a copied last block.
COPY = 256
# Bytes of a row from which on rows go one after the other at one token: that is how they lie in memory. Of shorter
# rows, four at a time need fewer instructions; measured on 576 and 2048 inputs of 4 bits.
LONG_ROW = 2**10
# Rows whose totals are kept before outputs are made of them.
SOME_ROWS = 128
# Bytes of what a thread has on its stack: copied blocks of two rows, behind them sums of four rows and eight times the
# scales of 16 groups; and totals.
COPIES, TOTALS = 2 * COPY, 4 * SOME_ROWS
SCALES, VECTOR = COPIES + 256, 64
ROOM = SCALES + 8 * VECTOR


class _Weight(NamedTuple):
    """What a step's block says, read once; `whole` rows can be read to the end of their last block."""

    rows: Any
    codes: Any
    row_bytes: Any
    block_bytes: Any
    spans: Any
    span_blocks: Any
    panels: Any
    panel: Any
    groups: Any
    scales_at: Any
    scale_bytes: Any
    zeros_at: Any
    zeros: Any
    x_at: Any
    x_stride: Any
    parts: Any
    x_sums_at: Any
    units_at: Any
    units: Any
    ahead: Any
    whole: Any


@inlined
def _weight_of(decoder: Any, fields: Any) -> Any:
    rows, row_bytes, spans, span_scales = fields[ROWS], fields[ROW_BYTES], fields[SPANS], fields[SPAN_SCALES]
    read = spans * fields[SPAN_BLOCKS] * fields[BLOCK_BYTES]
    # Spans whose scales fill a vector.
    panel = LANES // span_scales if span_scales != 0 else spans
    zeros_at, zeros = fields[ZEROS_AT], fields[GROUPS]
    if zeros_at == 0:
        # Even to load nothing from an address that is not mapped takes processors hundreds of cycles.
        zeros_at, zeros = fields[X_SUMS_AT], 0
    return _Weight(
        rows, fields[CODES_AT], row_bytes, fields[BLOCK_BYTES], spans, span_blocks(decoder, fields[SPAN_BLOCKS]),
        (spans + panel - 1) // panel, panel, fields[GROUPS], fields[SCALES_AT],
        4 if fields[SCALE_KIND] == FLOAT32 else 2, zeros_at, zeros, fields[X_AT], fields[X_STRIDE], fields[PARTS],
        fields[X_SUMS_AT], fields[X_UNITS_AT], fields[X_UNITS_AT] - (fields[X_AT] >> 6), fields[AHEAD],
        (rows * row_bytes - read) // row_bytes + 1,
    )  # fmt: skip


@inlined
def _scales_of(decoder: Any, weight: Any, row: Any, token: Any, group: Any) -> Any:
    """The scales of up to 16 groups of a row, from `group` on, for a token's part."""
    at = weight.scales_at + weight.scale_bytes * (row * weight.groups + group)
    units_at = weight.units_at + 4 * (token * weight.groups + group)
    return scales_of(decoder, at, units_at, min(LANES, weight.groups - group))


@inlined
def _less_offsets(decoder: Any, weight: Any, row: Any, token: Any, group: Any, scales: Any, sums: Any) -> Any:
    """Sums without what decoded codes are too large by, of up to 16 groups from `group` on."""
    zeros_at = weight.zeros_at + row * weight.zeros + group
    zeros = min(LANES, max(0, weight.zeros - group))
    x_sums = weight.x_sums_at + 4 * (2 * token * weight.groups + group)
    count = min(LANES, weight.groups - group)
    return less_offsets(decoder, sums, scales, zeros_at, zeros, x_sums, x_sums + 4 * weight.groups, count)


@inlined
def _take_scales(decoder: Any, weight: Any, row: Any, token: Any, group: Any, kept: Any, sums: Any) -> Any:
    """Keep the scales of up to 16 groups of a row, from `group` on, for a token's part, at an address.

    Returns the sums without what these groups' decoded codes are too large by.
    """
    scales = _scales_of(decoder, weight, row, token, group)
    keep_scales(decoder, scales, kept)
    if weight.x_sums_at == 0:
        return sums
    return _less_offsets(decoder, weight, row, token, group, scales, sums)


@inner
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


@inner
def _copy_last_block(codes: Any, before: Any, row_bytes: Any, copy: Any) -> Any:
    """Copy what a row has behind so many bytes, and zeros behind it, to an address, which is returned."""
    to = carray(pointer_to(copy), (COPY,), np.uint8)
    to[:] = 0
    row = carray(pointer_to(codes), (row_bytes,), np.uint8)
    for k in range(before, row_bytes):
        to[k - before] = row[k]
    return copy


@inlined
def _last_block(weight: Any, row: Any, copy: Any) -> Any:
    before = (weight.spans * weight.span_blocks - 1) * weight.block_bytes
    return _copy_last_block(weight.codes + row * weight.row_bytes, before, weight.row_bytes, copy)


@inlined
def _add_last_block(decoder: Any, weight: Any, row: Any, copy: Any, x: Any, scales: Any, sums: Any) -> Any:
    """Sums + the products of a row's last block, read from a copy."""
    products = add_products(decoder, no_sums(), codes_at(decoder, _last_block(weight, row, copy)), x, weight.units)
    return add_scaled(decoder, sums, products, scales)


@inlined
def _fetch(decoder: Any, weight: Any, at: Any) -> None:
    """Ask for codes ahead."""
    if ASKS_TWICE:
        fetch_block(decoder, at + weight.ahead)
    fetch_block(decoder, at + (weight.ahead >> 1))


@inlined
def _whole_spans(weight: Any, last: Any) -> Any:
    """Spans, and blocks of each, that are read where they lie; and whether a block is left, as `last` is the last row.

    Only a row of one span ends within a block.
    """
    short = 1 if last >= weight.whole else 0
    if weight.span_blocks == 1:
        return weight.spans - short, weight.span_blocks, short
    return weight.spans, weight.span_blocks - short, short


@inlined
def _row(decoder: Any, weight: Any, row: Any, copy: Any) -> Any:
    """Sums of a row and one token."""
    wide, sums = weight.block_bytes, no_sums()
    spans, blocks, short = _whole_spans(weight, row)
    for part in range(weight.parts):
        x, at = weight.x_at + part * weight.x_stride, weight.codes + row * weight.row_bytes
        for panel in range(weight.panels):
            first, group = panel * weight.panel, panel * LANES
            scales = copy + SCALES
            sums = _take_scales(decoder, weight, row, part, group, scales, sums)
            for _ in range(first, min(first + weight.panel, spans)):
                products = no_sums(), no_sums()
                for _ in range(blocks):
                    _fetch(decoder, weight, at)
                    products = add_products_apart(decoder, products, codes_at(decoder, at), x, weight.units)
                    at, x = at + wide, x + X_BYTES
                sums, scales = add_scaled(decoder, sums, both(products), scales), following(decoder, scales)
            if short and panel == weight.panels - 1:
                sums = _add_last_block(decoder, weight, row, copy, x, scales, sums)
    return sums


@merged
def _long_rows(decoder: Any, weight: Any, r0: Any, copy: Any, totals: Any) -> None:
    """Totals of four rows and one token, row after row, to an address."""
    last, kept = weight.rows - 1, copy + COPIES
    # In a loop, not written out four times: that had taken the compiler four times as long.
    for k in range(4):
        keep_sums(_row(decoder, weight, min(r0 + k, last), copy), kept + 64 * k)
    store_totals(kept_sums(kept), kept_sums(kept + 64), kept_sums(kept + 128), kept_sums(kept + 192), totals)


@merged
def _short_rows(decoder: Any, weight: Any, r0: Any, copy: Any, totals: Any) -> None:
    """Totals of four rows and one token, block after block, to an address."""
    last, width, wide = weight.rows - 1, weight.row_bytes, weight.block_bytes
    r1, r2, r3 = min(r0 + 1, last), min(r0 + 2, last), min(r0 + 3, last)
    y0, y1, y2, y3 = no_sums(), no_sums(), no_sums(), no_sums()
    spans, blocks, short = _whole_spans(weight, r3)
    for part in range(weight.parts):
        x = weight.x_at + part * weight.x_stride
        at0, at1 = weight.codes + r0 * width, weight.codes + r1 * width
        at2, at3 = weight.codes + r2 * width, weight.codes + r3 * width
        for panel in range(weight.panels):
            first, group = panel * weight.panel, panel * LANES
            s0, s1 = _scales_of(decoder, weight, r0, part, group), _scales_of(decoder, weight, r1, part, group)
            s2, s3 = _scales_of(decoder, weight, r2, part, group), _scales_of(decoder, weight, r3, part, group)
            # All before any is kept: what they share is then loaded once.
            if weight.x_sums_at != 0:
                y0 = _less_offsets(decoder, weight, r0, part, group, s0, y0)
                y1 = _less_offsets(decoder, weight, r1, part, group, s1, y1)
                y2 = _less_offsets(decoder, weight, r2, part, group, s2, y2)
                y3 = _less_offsets(decoder, weight, r3, part, group, s3, y3)
            s = copy + SCALES
            keep_scales(decoder, s0, s)
            keep_scales(decoder, s1, s + VECTOR)
            keep_scales(decoder, s2, s + 2 * VECTOR)
            keep_scales(decoder, s3, s + 3 * VECTOR)
            for _ in range(first, min(first + weight.panel, spans)):
                p0, p1, p2, p3 = no_sums(), no_sums(), no_sums(), no_sums()
                for _ in range(blocks):
                    _fetch(decoder, weight, at0)
                    _fetch(decoder, weight, at1)
                    _fetch(decoder, weight, at2)
                    _fetch(decoder, weight, at3)
                    p0 = add_products(decoder, p0, codes_at(decoder, at0), x, weight.units)
                    p1 = add_products(decoder, p1, codes_at(decoder, at1), x, weight.units)
                    p2 = add_products(decoder, p2, codes_at(decoder, at2), x, weight.units)
                    p3 = add_products(decoder, p3, codes_at(decoder, at3), x, weight.units)
                    at0, at1, at2, at3, x = at0 + wide, at1 + wide, at2 + wide, at3 + wide, x + X_BYTES
                y0, y1 = add_scaled(decoder, y0, p0, s), add_scaled(decoder, y1, p1, s + VECTOR)
                y2, y3 = add_scaled(decoder, y2, p2, s + 2 * VECTOR), add_scaled(decoder, y3, p3, s + 3 * VECTOR)
                s = following(decoder, s)
            if short and panel == weight.panels - 1:
                y0 = _add_last_block(decoder, weight, r0, copy, x, s, y0)
                y1 = _add_last_block(decoder, weight, r1, copy, x, s + VECTOR, y1)
                y2 = _add_last_block(decoder, weight, r2, copy, x, s + 2 * VECTOR, y2)
                y3 = _add_last_block(decoder, weight, r3, copy, x, s + 3 * VECTOR, y3)
    store_totals(y0, y1, y2, y3, totals)


@inner
def _two_rows(
    decoder: Any, weight: Any, r0: Any, r1: Any, t0: Any, t1: Any, t2: Any, t3: Any, copy: Any, totals: Any
) -> None:  # fmt: skip
    """Totals of two rows and four tokens, token after token, to an address."""
    wide, width, blocks, spans = weight.block_bytes, weight.row_bytes, weight.span_blocks, weight.spans
    codes, parts, stride = weight.codes, weight.parts, weight.x_stride * weight.parts
    y00, y01, y02, y03 = no_sums(), no_sums(), no_sums(), no_sums()
    y10, y11, y12, y13 = no_sums(), no_sums(), no_sums(), no_sums()
    copied = r1 >= weight.whole
    for part in range(parts):
        x = weight.x_at + part * weight.x_stride
        x0, x1, x2, x3 = x + t0 * stride, x + t1 * stride, x + t2 * stride, x + t3 * stride
        at0, at1 = codes + r0 * width, codes + r1 * width
        for panel in range(weight.panels):
            first, group = panel * weight.panel, panel * LANES
            s = copy + SCALES
            y00 = _take_scales(decoder, weight, r0, t0 * parts + part, group, s, y00)
            y01 = _take_scales(decoder, weight, r0, t1 * parts + part, group, s + VECTOR, y01)
            y02 = _take_scales(decoder, weight, r0, t2 * parts + part, group, s + 2 * VECTOR, y02)
            y03 = _take_scales(decoder, weight, r0, t3 * parts + part, group, s + 3 * VECTOR, y03)
            y10 = _take_scales(decoder, weight, r1, t0 * parts + part, group, s + 4 * VECTOR, y10)
            y11 = _take_scales(decoder, weight, r1, t1 * parts + part, group, s + 5 * VECTOR, y11)
            y12 = _take_scales(decoder, weight, r1, t2 * parts + part, group, s + 6 * VECTOR, y12)
            y13 = _take_scales(decoder, weight, r1, t3 * parts + part, group, s + 7 * VECTOR, y13)
            for span in range(first, min(first + weight.panel, spans)):
                p00, p01, p02, p03 = no_sums(), no_sums(), no_sums(), no_sums()
                p10, p11, p12, p13 = no_sums(), no_sums(), no_sums(), no_sums()
                for block in range(blocks):
                    if copied and span == spans - 1 and block == blocks - 1:
                        at0, at1 = _last_block(weight, r0, copy), _last_block(weight, r1, copy + COPY)
                    _fetch(decoder, weight, at0)
                    _fetch(decoder, weight, at1)
                    row = codes_at(decoder, at0)
                    p00 = add_products(decoder, p00, row, x0, weight.units)
                    p01 = add_products(decoder, p01, row, x1, weight.units)
                    p02 = add_products(decoder, p02, row, x2, weight.units)
                    p03 = add_products(decoder, p03, row, x3, weight.units)
                    row = codes_at(decoder, at1)
                    p10 = add_products(decoder, p10, row, x0, weight.units)
                    p11 = add_products(decoder, p11, row, x1, weight.units)
                    p12 = add_products(decoder, p12, row, x2, weight.units)
                    p13 = add_products(decoder, p13, row, x3, weight.units)
                    at0, at1 = at0 + wide, at1 + wide
                    x0, x1, x2, x3 = x0 + X_BYTES, x1 + X_BYTES, x2 + X_BYTES, x3 + X_BYTES
                y00, y01 = add_scaled(decoder, y00, p00, s), add_scaled(decoder, y01, p01, s + VECTOR)
                y02, y03 = add_scaled(decoder, y02, p02, s + 2 * VECTOR), add_scaled(decoder, y03, p03, s + 3 * VECTOR)
                y10, y11 = add_scaled(decoder, y10, p10, s + 4 * VECTOR), add_scaled(decoder, y11, p11, s + 5 * VECTOR)
                y12, y13 = add_scaled(decoder, y12, p12, s + 6 * VECTOR), add_scaled(decoder, y13, p13, s + 7 * VECTOR)
                s = following(decoder, s)
    store_totals(y00, y10, y01, y11, totals)
    store_totals(y02, y12, y03, y13, totals + 16)


@inlined
def _fetch_scales(weight: Any, first: Any, stop: Any) -> None:
    """Ask for the scales and zero points of some rows: waiting for them had taken a fifth of a small layer's time."""
    width = weight.scale_bytes * weight.groups
    fetch_lines(weight.scales_at + first * width, weight.scales_at + stop * width)
    fetch_lines(weight.zeros_at + first * weight.zeros, weight.zeros_at + stop * weight.zeros)


@merged
def _one_token(decoder: Any, fields: Any, start: Any, stop: Any, copy: Any, totals: Any) -> None:
    weight = _weight_of(decoder, fields)
    grouped, width = weight.groups > 1, weight.row_bytes
    ahead = max(4, weight.ahead // width)
    values = carray(pointer_to(totals), (SOME_ROWS,), np.float32)
    fetch_lines(weight.codes + start * width, weight.codes + min(start * width + weight.ahead, stop * width))
    if grouped:
        _fetch_scales(weight, start, min(start + ahead, stop))
    for first in range(start, stop, SOME_ROWS):
        end = min(first + SOME_ROWS, stop)
        for r in range(first, end, 4):
            if grouped:
                _fetch_scales(weight, r + ahead, r + ahead + 4)
            if width >= LONG_ROW:
                _long_rows(decoder, weight, r, copy, totals + 4 * (r - first))
            else:
                _short_rows(decoder, weight, r, copy, totals + 4 * (r - first))
        _finish(fields, first, 0, values[: end - first])


@merged
def _some_tokens(decoder: Any, fields: Any, start: Any, stop: Any, copy: Any, totals: Any) -> None:
    weight = _weight_of(decoder, fields)
    last, tokens = fields[ROWS] - 1, fields[TOKENS]
    values = carray(pointer_to(totals), (8,), np.float32)
    for r in range(start, stop, 2):
        for t in range(0, tokens, 4):
            others = min(t + 1, tokens - 1), min(t + 2, tokens - 1), min(t + 3, tokens - 1)
            _two_rows(decoder, weight, r, min(r + 1, last), t, others[0], others[1], others[2], copy, totals)
            for token in range(t, min(t + 4, tokens)):
                at = 2 * (token - t)
                _finish(fields, r, token, values[at : at + min(2, last + 1 - r)])


@inner
def _rows(decoder: Any, block: Any, start: Any, stop: Any) -> None:
    fields = carray(pointer_to(block), (WORDS,), np.int64)
    copy, totals = on_stack(ROOM), on_stack(TOTALS)
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
