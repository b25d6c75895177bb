"""Matrix units (AMX): tiles of 16 rows of 64 bytes in registers, and sums of products of two such tiles.

sums[r, t] += Σ over words k of rows[r, k] · tokens[k, t], a word being a pair of bf16 numbers or four bytes: 16 × 16
sums and 16 words in one instruction. The system lends a process the registers when it asks for them, and every thread
sets up their shapes before it uses them.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils

from fewbits.kernels.lanes import I8, I64, LANES, call, repeat

# Bytes of a row of a tile.
LINE = 64
# What is multiplied: bf16 pairs, or bytes of rows with those of tokens, either of which are signed.
PAIRS, SIGNED_BY_UNSIGNED, UNSIGNED_BY_SIGNED = "tdpbf16ps", "tdpbsud", "tdpbusd"
# Linux' arch_prctl on x86-64, its request for permission, and what is asked for: tiles' data.
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18
_VOID = ir.VoidType()


def _permitted() -> bool:
    """Whether the system lets this process use the registers."""
    if not sys.platform.startswith("linux"):
        return False
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)


_features = llvm.get_host_cpu_features()
HAS_MATRIX_UNITS = all(_features.get(name) for name in ("amx-tile", "amx-bf16", "amx-int8")) and _permitted()


def _shapes() -> bytes:
    """All eight registers as 16 rows of 64 bytes, as the instruction takes it: palette 1, bytes a row, rows."""
    return bytes([1, *[0] * 15, *[LINE, 0] * 8, *[0] * 16, *[LANES] * 8, *[0] * 8])


def begin_tiles(builder: Any) -> None:
    """Set up this thread's registers."""
    shapes = cgutils.global_constant(builder, "tile_shapes", ir.Constant(ir.ArrayType(I8, 64), bytearray(_shapes())))
    call(builder, "llvm.x86.ldtilecfg", _VOID, [builder.bitcast(shapes, I8.as_pointer())])


def end_tiles(builder: Any) -> None:
    """Let go of this thread's registers: the system need not keep them any more."""
    call(builder, "llvm.x86.tilerelease", _VOID, [])


def _move(builder: Any, name: str, tile: int, address: Any, stride: Any) -> None:
    call(builder, name, _VOID, [ir.Constant(I8, tile), builder.inttoptr(address, I8.as_pointer()), stride])


def add_tiles(
    builder: Any, kind: str, height: int, width: int, rows: Any, row_stride: Any, tokens: Any, token_stride: Any,
    turns: Any, sums: Any, sum_stride: Any, begun: Any,
    meanwhile: Callable[[Any], None] = lambda turn: None,
) -> None:  # fmt: skip
    """Sums += `height` by `width` tiles, at most 2 by 2, over 16 words a turn, or begin with nothing if not `begun`.

    meanwhile: adds other instructions to each turn: matrix units are at work for 64 cycles then, and processors look
        ahead no further than a few turns.
    """
    places = [(r, t) for r in range(height) for t in range(width)]
    first_row, first_token = len(places), len(places) + height

    def each_sum(name: str) -> None:
        for number, (r, t) in enumerate(places):
            at = builder.add(sums, builder.mul(sum_stride, ir.Constant(I64, LANES * r)))
            _move(builder, name, number, builder.add(at, ir.Constant(I64, LINE * t)), sum_stride)

    def body(turn: Any, carried: list[Any]) -> list[Any]:
        of_rows = builder.add(rows, builder.mul(turn, ir.Constant(I64, LINE)))
        of_tokens = builder.add(tokens, builder.mul(turn, builder.mul(token_stride, ir.Constant(I64, LANES))))
        for t in range(width):
            at = builder.add(of_tokens, ir.Constant(I64, LINE * t))
            _move(builder, "llvm.x86.tileloadd64", first_token + t, at, token_stride)
        for r in range(height):
            at = builder.add(of_rows, builder.mul(row_stride, ir.Constant(I64, LANES * r)))
            _move(builder, "llvm.x86.tileloadd64", first_row + r, at, row_stride)
        for number, (r, t) in enumerate(places):
            operands = [ir.Constant(I8, place) for place in (number, first_row + r, first_token + t)]
            call(builder, f"llvm.x86.{kind}", _VOID, operands)
        meanwhile(turn)
        return []

    with builder.if_else(begun) as (then, otherwise):
        with then:
            each_sum("llvm.x86.tileloadd64")
        with otherwise:
            for number in range(len(places)):
                call(builder, "llvm.x86.tilezero", _VOID, [ir.Constant(I8, number)])
    repeat(builder, turns, [], body)
    each_sum("llvm.x86.tilestored64")
