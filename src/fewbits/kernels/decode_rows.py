"""Compiled decoding of rows into a buffer of the activations' dtype, for products with many tokens."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import carray

from fewbits.kernels.compiling import inner
from fewbits.kernels.memory import (
    BFLOAT16,
    FLOAT8,
    as_bf16,
    half_as_float,
    number_at,
    pointer_to,
)
from fewbits.kernels.team import OWN, WORDS, compiled_work

# The fields of a block.
(
    CODES_AT, CODE_KIND, BITS, ROW_BYTES, COLUMNS, GROUPS, SCALES_AT, SCALE_KIND, ZEROS_AT, MIDPOINT, FIRST, OUT_AT,
    OUT_KIND,
) = range(OWN, OWN + 13)  # fmt: skip
SIGNED, UNSIGNED = 0, 1


@inner
def _unpack(packed: Any, bits: Any, codes: Any) -> None:
    """Little-endian fields to a code a byte; codes are padded to a multiple of 8."""
    if bits == 4:
        pairs = codes.view(np.uint16)
        for byte in range(pairs.size):
            both = np.uint16(packed[byte])
            pairs[byte] = np.uint16(both | np.uint16(both << np.uint16(4))) & np.uint16(0x0F0F)
        return
    mask = np.uint64(2**bits - 1)
    for eight in range(codes.size // 8):
        stream = np.uint64(0)
        for byte in range(bits):
            if eight * bits + byte < packed.size:
                stream |= np.uint64(packed[eight * bits + byte]) << np.uint64(8 * byte)
        for k in range(8):
            codes[8 * eight + k] = np.uint8(stream & mask)
            stream >>= np.uint64(bits)


@inner
def _fp8_row(codes: Any, scale: Any, values: Any) -> None:
    raised = np.float32(256.0) * scale
    for k in range(codes.size):
        code = np.uint32(codes[k])
        sign = np.uint32(np.uint32(code & np.uint32(0x80)) << np.uint32(8))
        magnitude = np.uint32(np.uint32(code & np.uint32(0x7F)) << np.uint32(7))
        values[k] = half_as_float(np.uint16(np.uint32(sign | magnitude))) * raised


@inner
def _group(codes: Any, scale: Any, zero: Any, values: Any) -> None:
    for k in range(codes.size):
        values[k] = np.float32(np.int32(np.int32(codes[k]) - zero)) * scale


@inner
def _narrow(values: Any, out: Any) -> None:
    for k in range(values.size):
        out[k] = as_bf16(values[k])


@inner
def _row(block: Any, row: Any, codes: Any, values: Any) -> None:
    columns, groups, kind = block[COLUMNS], block[GROUPS], block[SCALE_KIND]
    size, at = columns // groups, block[CODES_AT] + row * block[ROW_BYTES]
    if block[CODE_KIND] == FLOAT8:
        scale = np.float32(1.0) if block[SCALES_AT] == 0 else number_at(block[SCALES_AT], row, kind)
        _fp8_row(carray(pointer_to(at), (columns,), np.uint8), scale, values)
        return
    if block[BITS] < 8:
        _unpack(carray(pointer_to(at), (block[ROW_BYTES],), np.uint8), block[BITS], codes)
    signed = carray(pointer_to(at), (columns,), np.int8)
    for g in range(groups):
        scale = number_at(block[SCALES_AT], row * groups + g, kind)
        zero = np.int32(block[MIDPOINT])
        if block[ZEROS_AT] != 0:
            zeros_at = block[ZEROS_AT] + row * groups
            if block[BITS] == 8:
                zero = np.int32(carray(pointer_to(zeros_at), (groups,), np.int8)[g])
            else:
                zero = np.int32(carray(pointer_to(zeros_at), (groups,), np.uint8)[g])
        run = slice(g * size, (g + 1) * size)
        if block[BITS] == 8:
            _group(signed[run], scale, zero, values[run])
        else:
            _group(codes[run], scale, zero, values[run])


def _work(address: Any, start: Any, stop: Any) -> None:
    block = carray(pointer_to(address), (WORDS,), np.int64)
    columns = block[COLUMNS]
    codes, own = np.zeros((columns + 7) // 8 * 8, np.uint8), np.empty(columns, np.float32)
    for row in range(start, stop):
        if block[OUT_KIND] == BFLOAT16:
            _row(block, block[FIRST] + row, codes, own)
            _narrow(own, carray(pointer_to(block[OUT_AT] + 2 * row * columns), (columns,), np.uint16))
        else:
            values = carray(pointer_to(block[OUT_AT] + 4 * row * columns), (columns,), np.float32)
            _row(block, block[FIRST] + row, codes, values)


@cache
def decode_rows() -> Any:
    """The compiled work: rows FIRST to FIRST + ROWS, in bf16 or fp32."""
    return compiled_work(_work)
