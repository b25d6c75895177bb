"""Tiles: sums of a few rows and 16 to 64 tokens that stay in registers while rows and activations stream by.

16 tokens lie beside each other in a vector of words, each a pair of bf16 activations or four bytes, and the same word
of one row is spread over another, so rows need not be rearranged: y[t, n] += w[n, k] · x[t, k] for the inputs k of a
word and 16 tokens in one instruction, with fp32 or int32 sums. 24 vectors of sums, of which each is a row and 16
tokens, hide the instruction's latency.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from fewbits.kernels.lanes import I32, I64, LANES, PAIRS_OF_BF16, ByteLanes, IntSums, Sums, call, load, repeat, spread
from fewbits.kernels.strips import add_products_of_pairs

# Rows of a block that a thread works on, and the bytes of inputs that it holds of each.
BLOCK_ROWS, BLOCK_BYTES = 48, 1024
# Bytes from one row of a block to the next: a line more than it has, so that rows don't fall on the same lines of a
# cache.
STRIDE = BLOCK_BYTES + 64
# Vectors of sums of a tile.
TILE = 24
# Bytes of a vector of sums or of activations, and of a word of inputs.
VECTOR_BYTES, WORD_BYTES = 64, 4


def tile_vectors(tokens: int) -> int:
    """Vectors of 16 tokens in a tile, 1 to 4, so that the last tile wastes few."""
    tiles = -(-tokens // 64)
    return -(-tokens // (LANES * tiles))


class Tile(types.Type):  # type: ignore[misc]
    """Rows and vectors of tokens of a tile, and what it multiplies, bf16 or bytes: a type of no value, so that each
    is compiled on its own."""

    def __init__(self, vectors: int, of_bytes: bool) -> None:
        self.vectors, self.rows, self.of_bytes = vectors, TILE // vectors, of_bytes
        super().__init__(f"Tile({vectors}, {of_bytes})")


@register_model(Tile)
class _TileModel(models.OpaqueModel):  # type: ignore[misc]
    pass


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def tile_of(typing_context: Any, vectors: Any, of_bytes: Any) -> Any:
    """The tile of a constant number of vectors."""
    if not isinstance(vectors, types.Literal) or not isinstance(of_bytes, types.Literal):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_dummy_value()

    return Tile(vectors.literal_value, bool(of_bytes.literal_value))(vectors, of_bytes), generate


@intrinsic  # type: ignore[untyped-decorator]
def rows_of(typing_context: Any, tile: Any) -> Any:
    """Rows of a tile."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(I64, signature.args[0].rows)

    return types.int64(tile), generate


def _add_products_of_bytes(builder: Any, sums: list[Any], rows: Any, tokens: list[Any]) -> list[Any]:
    """Sums, row by row, + four signed bytes of each row (a word) · four unsigned ones of each of 16 tokens."""
    added: list[Any] = []
    for bits in rows:
        weights = builder.bitcast(spread(builder, bits), ByteLanes.vector)
        for token in tokens:
            operands = [sums[len(added)], token, weights]
            added.append(call(builder, "llvm.x86.avx512.vpdpbusd.512", IntSums.vector, operands))
    return added


@intrinsic  # type: ignore[untyped-decorator]
def add_tile(typing_context: Any, tile: Any, weights: Any, x: Any, words: Any, sums: Any) -> Any:
    """Sums at an address, [rows, tokens of the tile], += rows at an address · words of activations of these tokens."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile = signature.args[0]
        _, weights, x, words, sums = arguments
        kind = IntSums.vector if tile.of_bytes else Sums.vector
        word_kind = ByteLanes.vector if tile.of_bytes else PAIRS_OF_BF16
        add = _add_products_of_bytes if tile.of_bytes else add_products_of_pairs
        count = tile.rows * tile.vectors
        places = [builder.add(sums, ir.Constant(I64, VECTOR_BYTES * place)) for place in range(count)]

        def body(word: Any, carried: list[Any]) -> list[Any]:
            at = builder.add(x, builder.mul(word, ir.Constant(I64, VECTOR_BYTES * tile.vectors)))
            tokens = [
                load(builder, builder.add(at, ir.Constant(I64, VECTOR_BYTES * v)), word_kind)
                for v in range(tile.vectors)
            ]
            at = builder.add(weights, builder.mul(word, ir.Constant(I64, WORD_BYTES)))
            rows = (load(builder, builder.add(at, ir.Constant(I64, STRIDE * r)), I32) for r in range(tile.rows))
            return add(builder, carried, rows, tokens)

        kept = [load(builder, place, kind) for place in places]
        for place, total in zip(places, repeat(builder, words, kept, body), strict=True):
            builder.store(total, builder.inttoptr(place, kind.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(tile, types.int64, types.int64, types.int64, types.int64), generate
