"""Products in matrix units of many tokens: rows of activations as they lie, times weights arranged by their outputs.

Tiles (kernels.tile_rows) take rows of weights and arrange tokens, and have to turn what comes out. Here 32 outputs lie
side by side, word by word of their inputs (kernels.token_words and kernels.column_pairs arrange them), and a token's
outputs are written as they come. That pays where a weight is arranged once for many tokens.

A thread takes up to ROWS tokens and a panel of outputs that its second-level cache holds; the next tokens meet the
same panel. Sums are made in one order, whatever the number of threads.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from fewbits.kernels.compiling import inner
from fewbits.kernels.lanes import I64, prefetch
from fewbits.kernels.matrix_units import HAS_MATRIX_UNITS, PAIRS, UNSIGNED_BY_SIGNED, add_tiles
from fewbits.kernels.memory import BFLOAT16, FLOAT32, copy_bytes, pointer_to
from fewbits.kernels.row_outputs import OUTPUTS, RowWriter, finish_rows
from fewbits.kernels.team import OWN, WORDS, compiled_work
from fewbits.kernels.tile_sums import begin, end, tile_of

# The fields of a block; a row of it is some tokens and a panel. X_AT: rows of X_WORDS words, a token each. SOME: tokens
# taken at once. WEIGHT_AT: [panels of PANEL or fewer, X_WORDS, OUTPUTS] words. SCALES_AT, BIAS_AT: fp32, SUMS_BEGIN_AT:
# int32, by output up to the end of its panel; X_SCALES_AT: fp32 by token, or 0. OUT_AT: rows of WIDTH outputs.
(
    X_AT, X_WORDS, TOKENS, SOME, WEIGHT_AT, PANEL, WIDTH, SCALES_AT, BIAS_AT, SUMS_BEGIN_AT, X_SCALES_AT, OUT_AT,
    OUT_KIND,
) = range(OWN, OWN + 13)  # fmt: skip
# Tokens at once at most, and those of a tile.
ROWS, TILE = 128, 32
# Turns in which the sums of a tile before are written, if there are as many.
WOVEN = 8
# What the words of a row are a multiple of, and how many are multiplied with all outputs of a panel before the next.
TURN, CHUNK = 16, 512
# Bytes of a row of sums, of 32 outputs, and from one copied row of activations to the next: a line more than it has, so
# that rows don't fall on the same lines of a cache.
LINE, STRIDE = 4 * OUTPUTS, 4 * CHUNK + 64


@inner
def _copy_rows(fields: Any, token: Any, count: Any, first: Any, last: Any, ready: Any) -> None:
    """Words of some tokens, close together."""
    at = fields[X_AT] + 4 * (token * fields[X_WORDS] + first)
    for row in range(count):
        copy_bytes(ready + row * STRIDE, at + 4 * row * fields[X_WORDS], 4 * (last - first))


@inner
def _lie_well(fields: Any, count: Any) -> Any:
    """Whether tokens' words are multiplied where they are: whole tiles of whole lines, spread over a cache."""
    return count % TILE == 0 and fields[X_AT] % 64 == 0 and fields[X_WORDS] // TURN % 16 != 0


@inner
def _write(tile: Any, fields: Any, token: Any, count: Any, column: Any, sums: Any, room: Any, ones: Any) -> None:
    """Sums of some tokens and 32 outputs, to where they belong."""
    width = 4 if fields[OUT_KIND] == FLOAT32 else 2
    first, stride = column * OUTPUTS, width * fields[WIDTH]
    out = fields[OUT_AT] + token * stride + width * first
    there = min(OUTPUTS, fields[WIDTH] - first)
    place, apart = (out, stride) if there == OUTPUTS else (room, np.int64(LINE))
    by_output = 4 * first
    by_token = fields[X_SCALES_AT] + 4 * token if fields[X_SCALES_AT] != 0 else ones
    finish_rows(
        tile, fields[OUT_KIND], fields[SCALES_AT] != 0, sums, fields[SCALES_AT] + by_output,
        fields[BIAS_AT] + by_output, fields[SUMS_BEGIN_AT] + by_output, by_token, place, apart, np.int64(count),
    )  # fmt: skip
    if there < OUTPUTS:
        for row in range(count):
            copy_bytes(out + row * stride, room + row * LINE, width * there)


@intrinsic  # type: ignore[untyped-decorator]
def _add(
    typing_context: Any, tile: Any, rows: Any, stride: Any, weight: Any, turns: Any, sums: Any, begun: Any, out: Any,
    apart: Any, writes: Any, made: Any, scales: Any, biases: Any, begins: Any, token_scales: Any, place: Any,
) -> Any:  # fmt: skip
    """Sums += 32 rows, `stride` bytes apart, · a panel's 32 outputs over 16 words a turn; anew if not `begun`.

    Meanwhile lines at `out` are asked for, `apart` bytes from each other, and, if it `writes`, sums `made` before are
    written at `place`, 32 tokens and outputs of bf16; WOVEN turns do that.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if not HAS_MATRIX_UNITS:
            return context.get_dummy_value()
        _, rows, stride, weight, turns, sums, begun, out, apart, writes, made, *of_outputs = arguments
        scales, biases, begins, token_scales, place = of_outputs
        of_bytes, line = signature.args[0].of_bytes, ir.Constant(I64, LINE)
        writer = RowWriter(builder, BFLOAT16, of_bytes, scales, biases, begins)

        def behind(address: Any, row: Any, stride: Any) -> Any:
            return builder.add(address, builder.mul(row, stride))

        def meanwhile(turn: Any) -> None:
            with builder.if_then(builder.icmp_signed("<", turn, ir.Constant(I64, WOVEN))):
                first = builder.mul(turn, ir.Constant(I64, TILE // WOVEN))
                some = [builder.add(first, ir.Constant(I64, row)) for row in range(TILE // WOVEN)]
                for row in some:
                    prefetch(builder, behind(out, row, apart), for_writing=True)
                with builder.if_then(writes):
                    for row in some:
                        of_token = behind(token_scales, row, ir.Constant(I64, 4))
                        writer.write(behind(made, row, line), of_token, behind(place, row, apart))

        kind = UNSIGNED_BY_SIGNED if of_bytes else PAIRS
        add_tiles(builder, kind, 2, 2, rows, stride, weight, line, turns, sums, line, begun, meanwhile)
        return context.get_dummy_value()

    numbers = [types.int64] * 5
    return types.none(
        tile, *numbers, types.boolean, types.int64, types.int64, types.boolean, types.int64, *numbers
    ), generate  # fmt: skip


@inner
def _multiply(tile: Any, fields: Any, start: Any, stop: Any, memory: Any) -> None:
    words, tiles = fields[X_WORDS], (fields[WIDTH] + OUTPUTS - 1) // OUTPUTS
    runs = (fields[TOKENS] + fields[SOME] - 1) // fields[SOME]
    chunks = (words + CHUNK - 1) // CHUNK
    some = (words // TURN + chunks - 1) // chunks * TURN
    ready = (memory.ctypes.data + 63) // 64 * 64
    room = ready + ROWS * STRIDE
    ones = room + ROWS * LINE
    first_sums = ones + LINE
    carray(pointer_to(ones), (TILE,), np.float32)[:] = np.float32(1.0)
    # Sums wait for the next words of a row; if there are none, only until the next ones are made.
    waiting = fields[PANEL] if chunks > 1 else 2
    width = 4 if fields[OUT_KIND] == FLOAT32 else 2
    apart = width * fields[WIDTH]
    for number in range(start, stop):
        top, token = number // runs * fields[PANEL], number % runs * fields[SOME]
        behind, count = min(top + fields[PANEL], tiles), min(fields[SOME], fields[TOKENS] - token)
        for first in range(0, words, some):
            last = min(first + some, words)
            rows, stride = fields[X_AT] + 4 * (token * words + first), 4 * words
            if not _lie_well(fields, count):
                _copy_rows(fields, token, count, first, last, ready)
                rows, stride = ready, np.int64(STRIDE)
            made_column, made_row, made_at = -1, 0, first_sums
            for column in range(top, behind):
                weight = fields[WEIGHT_AT] + LINE * (column * words + first)
                for row in range(0, count, TILE):
                    sums = first_sums + ((column - top) % waiting * ROWS + row) * LINE
                    turns, begun, at = (last - first) // TURN, first != 0, rows + row * stride
                    if last < words:
                        _add(
                            tile, at, stride, weight, turns, sums, begun, sums, np.int64(LINE), False, sums, ones, ones,
                            ones, ones, sums,
                        )  # fmt: skip
                        continue
                    # The ones made before are written while matrix units are at work.
                    there, before = made_column >= 0, max(made_column, 0)
                    whole = min(TILE, count - made_row) == TILE and (before + 1) * OUTPUTS <= fields[WIDTH]
                    woven = there and whole and turns >= WOVEN and fields[OUT_KIND] == BFLOAT16
                    of_output = 4 * before * OUTPUTS
                    _add(
                        tile, at, stride, weight, turns, sums, begun,
                        fields[OUT_AT] + (token + row) * apart + width * column * OUTPUTS, apart, woven, made_at,
                        fields[SCALES_AT] + of_output if fields[SCALES_AT] != 0 else ones,
                        fields[BIAS_AT] + of_output,
                        fields[SUMS_BEGIN_AT] + of_output if fields[SUMS_BEGIN_AT] != 0 else ones,
                        fields[X_SCALES_AT] + 4 * (token + made_row) if fields[X_SCALES_AT] != 0 else ones,
                        fields[OUT_AT] + (token + made_row) * apart + width * before * OUTPUTS,
                    )  # fmt: skip
                    if there and not woven:
                        left = min(TILE, count - made_row)
                        _write(tile, fields, token + made_row, left, made_column, made_at, room, ones)
                    made_column, made_row, made_at = column, row, sums
            if made_column >= 0:
                left = min(TILE, count - made_row)
                _write(tile, fields, token + made_row, left, made_column, made_at, room, ones)


@cache
def matrix_rows(of_bytes: bool) -> Any:
    """The compiled work, of bf16 numbers, or of unsigned bytes of tokens and signed ones of weights."""

    def work(address: Any, start: Any, stop: Any) -> None:
        tile, fields = tile_of(2, of_bytes, True), carray(pointer_to(address), (WORDS,), np.int64)
        waiting = fields[PANEL] if fields[X_WORDS] > CHUNK else 2
        begin(tile)
        # Handed over rather than used here: it lives as long as the call.
        _multiply(tile, fields, start, stop, np.empty(64 + LINE + ROWS * (STRIDE + LINE * (1 + waiting)), np.uint8))
        end(tile)

    return compiled_work(work)
