"""Compiled products of decoded weights with 5 to some hundred tokens, in tiles of sums that stay in registers.

16 tokens lie beside each other in a vector, and a pair of neighbouring weights of one row is spread over another, so
rows need only be decoded, not rearranged: y[t, n] += w[n, 2k] x[t, 2k] + w[n, 2k + 1] x[t, 2k + 1] for 16 tokens in one
instruction, with fp32 sums. 24 vectors of sums, of which each is a row and 16 tokens, hide the instruction's latency.

A thread decodes a block of rows and inputs into its second-level cache, multiplies it with all tokens, and goes on to
the next inputs of these rows; sums of the block's rows and all tokens wait in memory meanwhile.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic, models, register_model

from fewbits.kernels.decode_vectors import decode_vector, table_of
from fewbits.kernels.decoders import decoder_of
from fewbits.kernels.lanes import CODES, I32, I64, LANES, PAIRS_OF_BF16, Sums, fetch, load, repeat
from fewbits.kernels.memory import FLOAT32, as_bf16, number_at, pointer_to
from fewbits.kernels.strips import add_products_of_pairs
from fewbits.kernels.team import OWN, ROWS, WORDS, compiled_work

# The fields of a block.
(
    CODES_AT, ROW_BYTES, VECTOR_BYTES, COLUMNS, GROUPS, SCALES_AT, SCALE_KIND, ZEROS_AT, SIGNED_ZEROS, MIDPOINT, X_AT,
    TOKENS, X_SCALES_AT, BIAS_AT, OUT_AT,
) = range(OWN, OWN + 15)  # fmt: skip
# Rows and inputs that are decoded at a time.
BLOCK_ROWS, BLOCK_COLUMNS = 48, 512
# Bytes from one decoded row to the next: a line more than it has, so that rows don't fall on the same lines of a cache.
STRIDE = 2 * BLOCK_COLUMNS + 64
# Vectors of sums of a tile.
TILE = 24


def tile_vectors(tokens: int) -> int:
    """Vectors of 16 tokens in a tile, 1 to 4, so that the last tile wastes few."""
    tiles = -(-tokens // 64)
    return -(-tokens // (LANES * tiles))


class Tile(types.Type):  # type: ignore[misc]
    """Rows and vectors of tokens of a tile: a type of no value, so that each shape is compiled on its own."""

    def __init__(self, vectors: int) -> None:
        self.vectors, self.rows = vectors, TILE // vectors
        super().__init__(f"Tile({vectors})")


@register_model(Tile)
class _TileModel(models.OpaqueModel):  # type: ignore[misc]
    pass


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def tile_of(typing_context: Any, vectors: Any) -> Any:
    """The tile of a constant number of vectors."""
    if not isinstance(vectors, types.Literal):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_dummy_value()

    return Tile(vectors.literal_value)(vectors), generate


@intrinsic  # type: ignore[untyped-decorator]
def rows_of(typing_context: Any, tile: Any) -> Any:
    """Rows of a tile."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(I64, signature.args[0].rows)

    return types.int64(tile), generate


@intrinsic  # type: ignore[untyped-decorator]
def add_tile(typing_context: Any, tile: Any, weights: Any, x: Any, pairs: Any, sums: Any) -> Any:
    """Sums at an address, [rows, tokens of the tile], += decoded rows · pairs of activations of these tokens."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, vectors = signature.args[0].rows, signature.args[0].vectors
        _, weights, x, pairs, sums = arguments
        places = [builder.add(sums, ir.Constant(I64, 4 * LANES * place)) for place in range(rows * vectors)]

        def body(pair: Any, carried: list[Any]) -> list[Any]:
            at = builder.add(x, builder.mul(pair, ir.Constant(I64, 4 * LANES * vectors)))
            tokens = [
                load(builder, builder.add(at, ir.Constant(I64, 4 * LANES * v)), PAIRS_OF_BF16) for v in range(vectors)
            ]
            at = builder.add(weights, builder.mul(pair, ir.Constant(I64, 4)))
            decoded = (load(builder, builder.add(at, ir.Constant(I64, STRIDE * r)), I32) for r in range(rows))
            return add_products_of_pairs(builder, carried, decoded, tokens)

        kept = [load(builder, place, Sums.vector) for place in places]
        for place, total in zip(places, repeat(builder, pairs, kept, body), strict=True):
            builder.store(total, builder.inttoptr(place, Sums.vector.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(tile, types.int64, types.int64, types.int64, types.int64), generate


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _decode(decoder: Any, fields: Any, row: Any, first: Any, last: Any, out_at: Any) -> None:
    """Inputs `first` to `last` of a row to bf16, and ask for the codes that are decoded next."""
    groups, width, columns = fields[GROUPS], fields[VECTOR_BYTES], fields[COLUMNS]
    size = columns // groups
    at = fields[CODES_AT] + row * fields[ROW_BYTES] + first // CODES * width
    ahead = at + (last - first) // CODES * width
    if last == columns:
        ahead = fields[CODES_AT] + (row + BLOCK_ROWS) * fields[ROW_BYTES]
    for line in range(0, (last - first) // CODES * width, 64):
        fetch(ahead + line)
    column = first
    while column < last:
        group = column // size
        stop = min((group + 1) * size, last)
        # A row's only scale multiplies its sums.
        scale, zero = np.float32(1.0), np.float32(fields[MIDPOINT])
        if groups > 1:
            scale = number_at(fields[SCALES_AT], row * groups + group, fields[SCALE_KIND])
        if fields[ZEROS_AT] != 0:
            zero_at = fields[ZEROS_AT] + row * groups + group
            if fields[SIGNED_ZEROS] != 0:
                zero = np.float32(carray(pointer_to(zero_at), (1,), np.int8)[0])
            else:
                zero = np.float32(carray(pointer_to(zero_at), (1,), np.uint8)[0])
        table = table_of(decoder, scale, zero)
        for _ in range(column, stop, CODES):
            decode_vector(decoder, at, table, scale, zero, out_at)
            at, out_at = at + width, out_at + 2 * CODES
        column = stop


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _round(fields: Any, row: Any, sums: Any, token_scales: Any, rounded: Any) -> None:
    """The outputs of one row and a tile's tokens as bf16."""
    scale, bias = np.float32(1.0), np.float32(0.0)
    if fields[GROUPS] == 1:
        scale = number_at(fields[SCALES_AT], row, fields[SCALE_KIND])
    if fields[BIAS_AT] != 0:
        bias = number_at(fields[BIAS_AT], row, FLOAT32)
    for t in range(sums.size):
        rounded[t] = as_bf16(sums[t] * scale * token_scales[t] + bias)


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _write(fields: Any, top: Any, count: Any, first_token: Any, sums: Any, token_scales: Any, rounded: Any) -> None:
    """Sums [rows of a block, tokens of a tile] to their places in the output, a token a row there."""
    tokens = min(sums.shape[1], fields[TOKENS] - first_token)
    if fields[X_SCALES_AT] != 0:
        token_scales[:tokens] = carray(pointer_to(fields[X_SCALES_AT] + 4 * first_token), (tokens,), np.float32)
    for r in range(count):
        _round(fields, top + r, sums[r], token_scales, rounded[r])
    for t in range(tokens):
        out_at = fields[OUT_AT] + 2 * ((first_token + t) * fields[ROWS] + top)
        out = carray(pointer_to(out_at), (count,), np.uint16)
        for r in range(count):
            out[r] = rounded[r, t]


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _rows(decoder: Any, tile: Any, address: Any, start: Any, stop: Any) -> None:
    fields = carray(pointer_to(address), (WORDS,), np.int64)
    columns, height = fields[COLUMNS], rows_of(tile)
    lanes = TILE // height * LANES
    tiles = (fields[TOKENS] + lanes - 1) // lanes
    # Blocks of inputs of about the same size: what begins and ends a tile's sums is paid once for each.
    vectors, blocks = columns // CODES, (columns + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    width = (vectors + blocks - 1) // blocks * CODES
    decoded = np.empty(BLOCK_ROWS * STRIDE // 2, np.uint16)
    sums = np.empty((tiles, BLOCK_ROWS, lanes), np.float32)
    token_scales, rounded = np.ones(lanes, np.float32), np.empty((BLOCK_ROWS, lanes), np.uint16)
    for top in range(start, stop, BLOCK_ROWS):
        count = min(BLOCK_ROWS, stop - top)
        sums[:] = np.float32(0.0)
        for first in range(0, columns, width):
            last = min(first + width, columns)
            for r in range(count):
                _decode(decoder, fields, top + r, first, last, decoded.ctypes.data + r * STRIDE)
            for t in range(tiles):
                x = fields[X_AT] + 2 * lanes * (t * columns + first)
                for r in range(0, count, height):
                    add_tile(
                        tile, decoded.ctypes.data + r * STRIDE, x, (last - first) // 2, sums[t, r].ctypes.data
                    )  # fmt: skip
        for t in range(tiles):
            _write(fields, top, count, t * lanes, sums[t], token_scales, rounded)


@cache
def token_tiles(decoder: str, vectors: int) -> Any:
    """The compiled work for one way that codes are stored (see decoders.Decoder) and one shape of tiles."""

    def work(block: Any, start: Any, stop: Any) -> None:
        _rows(decoder_of(decoder), tile_of(vectors), block, start, stop)

    return compiled_work(work)
