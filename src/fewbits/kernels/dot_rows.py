"""Compiled products of decoded rows with a few tokens: memory is read once, decoding happens in registers.

y[t, n] = Σ_g s[n, g] (Σ_k a[n, k] x[t, k] − (raised + z[n, g]) Σ_k x[t, k]), where a = raised + code as decoded
(kernels.lanes) and k runs over group g. Sums of x per group are given. Four rows go at a time, or two with four tokens,
so that enough independent sums keep the multipliers busy and what is loaded is used more than once.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types

from fewbits.kernels.lanes import CODES, FP8, INT8, add_products, add_scaled, bf16_at, decoder, no_sums, total_of
from fewbits.kernels.memory import FLOAT32, address_of, number_at, pointer_to, write
from fewbits.kernels.team import PIECE, ROWS, fetch_add

# The block that a call passes: int64 fields after those of kernels.team.
(
    CODES_AT, ROW_BYTES, COLUMNS, GROUPS, SCALES_AT, SCALE_KIND, ZEROS_AT, RAISED_BY, X_AT, X_STRIDE, PARTS, TOKENS,
    X_SUMS_AT, X_SCALES_AT, BIAS_AT, OUT_AT, OUT_KIND, FIELDS,
) = range(3, 21)  # fmt: skip
REORDER = {"reassoc", "nsz", "contract"}


@njit(fastmath=REORDER, error_model="numpy")  # type: ignore[untyped-decorator]
def _offset(block: Any, row: Any, token: Any) -> Any:
    """Σ_g s (raised + z) Σ_k x: what a row's raised codes and zero points add to a token's sum."""
    groups, raised = block[GROUPS], np.float32(block[RAISED_BY])
    first = row * groups
    scales, kind, zeros_at = block[SCALES_AT], block[SCALE_KIND], block[ZEROS_AT]
    sums = carray(pointer_to(block[X_SUMS_AT] + token * groups * 4), (groups,), np.float32)
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


@cache
def dot_rows(kind: str | int) -> Any:
    """The compiled C function for one kind of codes (see lanes.decoder)."""
    codes_at = decoder(kind)
    step_bytes = CODES if kind in (FP8, INT8) else CODES * int(kind) // 8

    @njit(inline="always")  # type: ignore[untyped-decorator]
    def finish(block: Any, row: Any, token: Any, sums: Any) -> None:
        value = total_of(sums) - _offset(block, row, token)
        if block[X_SCALES_AT] != 0:
            value *= number_at(block[X_SCALES_AT], token, FLOAT32)
        if block[BIAS_AT] != 0:
            value += number_at(block[BIAS_AT], row, FLOAT32)
        write(block[OUT_AT], token * block[ROWS] + row, block[OUT_KIND], value)

    @njit(error_model="numpy")  # type: ignore[untyped-decorator]
    def four_rows(block: Any, r0: Any, r1: Any, r2: Any, r3: Any, token: Any) -> None:
        width, groups, scales, scale_kind = block[ROW_BYTES], block[GROUPS], block[SCALES_AT], block[SCALE_KIND]
        steps = block[COLUMNS] // (CODES * groups)
        y0, y1, y2, y3 = no_sums(), no_sums(), no_sums(), no_sums()
        for part in range(block[PARTS]):
            x = block[X_AT] + (token * block[PARTS] + part) * block[X_STRIDE]
            at0, at1 = block[CODES_AT] + r0 * width, block[CODES_AT] + r1 * width
            at2, at3 = block[CODES_AT] + r2 * width, block[CODES_AT] + r3 * width
            for g in range(groups):
                s0, s1, s2, s3 = no_sums(), no_sums(), no_sums(), no_sums()
                for _ in range(steps):
                    lanes = bf16_at(x)
                    s0 = add_products(s0, codes_at(at0), lanes)
                    s1 = add_products(s1, codes_at(at1), lanes)
                    s2 = add_products(s2, codes_at(at2), lanes)
                    s3 = add_products(s3, codes_at(at3), lanes)
                    at0 += step_bytes
                    at1 += step_bytes
                    at2 += step_bytes
                    at3 += step_bytes
                    x += 2 * CODES
                y0 = add_scaled(y0, s0, number_at(scales, r0 * groups + g, scale_kind))
                y1 = add_scaled(y1, s1, number_at(scales, r1 * groups + g, scale_kind))
                y2 = add_scaled(y2, s2, number_at(scales, r2 * groups + g, scale_kind))
                y3 = add_scaled(y3, s3, number_at(scales, r3 * groups + g, scale_kind))
        finish(block, r0, token, y0)
        finish(block, r1, token, y1)
        finish(block, r2, token, y2)
        finish(block, r3, token, y3)

    @njit(error_model="numpy")  # type: ignore[untyped-decorator]
    def two_rows(block: Any, r0: Any, r1: Any, t0: Any, t1: Any, t2: Any, t3: Any) -> None:
        width, groups, scales, scale_kind = block[ROW_BYTES], block[GROUPS], block[SCALES_AT], block[SCALE_KIND]
        steps, stride = block[COLUMNS] // (CODES * groups), block[X_STRIDE] * block[PARTS]
        y00, y01, y02, y03 = no_sums(), no_sums(), no_sums(), no_sums()
        y10, y11, y12, y13 = no_sums(), no_sums(), no_sums(), no_sums()
        for part in range(block[PARTS]):
            x = block[X_AT] + part * block[X_STRIDE]
            x0, x1, x2, x3 = x + t0 * stride, x + t1 * stride, x + t2 * stride, x + t3 * stride
            at0, at1 = block[CODES_AT] + r0 * width, block[CODES_AT] + r1 * width
            for g in range(groups):
                s00, s01, s02, s03 = no_sums(), no_sums(), no_sums(), no_sums()
                s10, s11, s12, s13 = no_sums(), no_sums(), no_sums(), no_sums()
                for step in range(steps):
                    codes0, codes1, at = codes_at(at0), codes_at(at1), 2 * CODES * step
                    lanes = bf16_at(x0 + at)
                    s00, s10 = add_products(s00, codes0, lanes), add_products(s10, codes1, lanes)
                    lanes = bf16_at(x1 + at)
                    s01, s11 = add_products(s01, codes0, lanes), add_products(s11, codes1, lanes)
                    lanes = bf16_at(x2 + at)
                    s02, s12 = add_products(s02, codes0, lanes), add_products(s12, codes1, lanes)
                    lanes = bf16_at(x3 + at)
                    s03, s13 = add_products(s03, codes0, lanes), add_products(s13, codes1, lanes)
                    at0 += step_bytes
                    at1 += step_bytes
                moved = 2 * CODES * steps
                x0, x1, x2, x3 = x0 + moved, x1 + moved, x2 + moved, x3 + moved
                scale = number_at(scales, r0 * groups + g, scale_kind)
                y00, y01 = add_scaled(y00, s00, scale), add_scaled(y01, s01, scale)
                y02, y03 = add_scaled(y02, s02, scale), add_scaled(y03, s03, scale)
                scale = number_at(scales, r1 * groups + g, scale_kind)
                y10, y11 = add_scaled(y10, s10, scale), add_scaled(y11, s11, scale)
                y12, y13 = add_scaled(y12, s12, scale), add_scaled(y13, s13, scale)
        finish(block, r0, t0, y00)
        finish(block, r0, t1, y01)
        finish(block, r0, t2, y02)
        finish(block, r0, t3, y03)
        finish(block, r1, t0, y10)
        finish(block, r1, t1, y11)
        finish(block, r1, t2, y12)
        finish(block, r1, t3, y13)

    def work(pointer: Any) -> None:
        block = carray(pointer, (FIELDS,), np.int64)
        taken, rows, piece, tokens = address_of(pointer), block[ROWS], block[PIECE], block[TOKENS]
        last, last_token = rows - 1, tokens - 1
        while True:
            start = fetch_add(taken, piece)
            if start >= rows:
                return
            stop = min(start + piece, rows)
            if tokens == 1:
                for row in range(start, stop, 4):
                    four_rows(block, row, min(row + 1, last), min(row + 2, last), min(row + 3, last), 0)
            else:
                for row in range(start, stop, 2):
                    for t in range(0, tokens, 4):
                        two_rows(
                            block, row, min(row + 1, last),
                            t, min(t + 1, last_token), min(t + 2, last_token), min(t + 3, last_token),
                        )  # fmt: skip

    return cfunc(types.void(types.voidptr), nopython=True, cache=True, error_model="numpy")(work)
