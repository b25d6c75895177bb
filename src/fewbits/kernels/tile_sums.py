"""Tiles: sums of a few rows and 16 to 64 tokens that stay in registers while rows and activations stream by.

16 tokens lie beside each other in a vector of words, each a pair of bf16 activations or four bytes, and the same word
of one row is spread over another, so rows need not be rearranged: y[t, n] += w[n, k] · x[t, k] for the inputs k of a
word and 16 tokens in one instruction, with fp32 or int32 sums. 24 vectors of sums, of which each is a row and 16
tokens, hide the instruction's latency.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from fewbits.kernels.lanes import I32, I64, LANES, PAIRS_OF_BF16, ByteLanes, IntSums, Sums, call, load, repeat, spread
from fewbits.kernels.matrix_units import (
    HAS_MATRIX_UNITS,
    LINE,
    PAIRS,
    SIGNED_BY_UNSIGNED,
    add_tiles,
    begin_tiles,
    end_tiles,
)
from fewbits.kernels.strips import add_products_of_pairs

# Rows of a block that a thread works on, the bytes of inputs that it holds of each, and what the pieces of rows that
# threads take are multiples of. Matrix units sum up faster than the next cache delivers: larger blocks ask less of it.
BLOCK_ROWS, BLOCK_BYTES, PIECE_ROWS = (128, 2048, 32) if HAS_MATRIX_UNITS else (48, 1024, 48)
# Bytes from one row of a block to the next: a line more than it has, so that rows don't fall on the same lines of a
# cache.
STRIDE = BLOCK_BYTES + 64
# Vectors of sums of a tile, and of 16 tokens in one at most; and rows of one that matrix units sum up.
TILE, MOST_VECTORS = 24, 2 if HAS_MATRIX_UNITS else 4
MATRIX_ROWS = 32
# Bytes of a vector of sums or of activations, and of a word of inputs.
VECTOR_BYTES, WORD_BYTES = 64, 4


def tile_vectors(tokens: int) -> int:
    """Vectors of 16 tokens in a tile, 1 to MOST_VECTORS, so that the last tile wastes few."""
    tiles = -(-tokens // (LANES * MOST_VECTORS))
    return -(-tokens // (LANES * tiles))


class Tile(types.Type):  # type: ignore[misc]
    """Rows and vectors of tokens of a tile, and what it multiplies, bf16 or bytes, with matrix units or without: a
    type of no value, so that each is compiled on its own."""

    def __init__(self, vectors: int, of_bytes: bool, in_matrices: bool) -> None:
        self.vectors, self.of_bytes, self.in_matrices = vectors, of_bytes, in_matrices
        self.rows = MATRIX_ROWS if in_matrices else TILE // vectors
        super().__init__(f"Tile({vectors}, {of_bytes}, {in_matrices})")


@register_model(Tile)
class _TileModel(models.OpaqueModel):  # type: ignore[misc]
    pass


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def tile_of(typing_context: Any, vectors: Any, of_bytes: Any, in_matrices: Any) -> Any:
    """The tile of a constant number of vectors."""
    if not all(isinstance(constant, types.Literal) for constant in (vectors, of_bytes, in_matrices)):
        return None
    tile = Tile(vectors.literal_value, bool(of_bytes.literal_value), bool(in_matrices.literal_value))

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_dummy_value()

    return tile(vectors, of_bytes, in_matrices), generate


def _number_of(field: str) -> Any:
    """A compiled function of a tile: one of its numbers, as a constant."""

    @intrinsic  # type: ignore[untyped-decorator]
    def number(typing_context: Any, tile: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return ir.Constant(I64, getattr(signature.args[0], field))

        return types.int64(tile), generate

    return number


def _where_in_matrices(emit: Callable[[Any], None]) -> Any:
    """A compiled function of a tile that does something if matrix units sum it up."""

    @intrinsic  # type: ignore[untyped-decorator]
    def done(typing_context: Any, tile: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            if signature.args[0].in_matrices:
                emit(builder)
            return context.get_dummy_value()

        return types.none(tile), generate

    return done


# Rows of a tile, and vectors of tokens; what a thread does before it sums up tiles, and afterwards.
rows_of, vectors_of = _number_of("rows"), _number_of("vectors")
begin, end = _where_in_matrices(begin_tiles), _where_in_matrices(end_tiles)


@intrinsic  # type: ignore[untyped-decorator]
def begins_with_sums(typing_context: Any, tile: Any, sums: Any) -> Any:
    """Whether sums in memory are what a tile's first words are added to: matrix units can begin with nothing."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.args[0].in_matrices:
            return builder.icmp_signed("!=", arguments[1], ir.Constant(I64, 0))
        return ir.Constant(ir.IntType(1), 1)

    return types.boolean(tile, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def fill_vector(typing_context: Any, address: Any, word: Any) -> Any:
    """A word to all lanes of a vector at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, word = arguments
        builder.store(spread(builder, word), builder.inttoptr(address, IntSums.vector.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(types.int64, types.int32), generate


def _add_in_matrices(builder: Any, tile: Tile, weights: Any, x: Any, words: Any, sums: Any, begun: Any) -> None:
    """`add_tile` with matrix units; words come by 16."""
    kind = SIGNED_BY_UNSIGNED if tile.of_bytes else PAIRS
    turns, stride = builder.sdiv(words, ir.Constant(I64, LANES)), ir.Constant(I64, LINE * tile.vectors)
    for v in range(0, tile.vectors, 2):
        across = ir.Constant(I64, LINE * v)
        add_tiles(
            builder, kind, MATRIX_ROWS // LANES, min(2, tile.vectors - v), weights, ir.Constant(I64, STRIDE),
            builder.add(x, across), stride, turns, builder.add(sums, across), stride, begun,
        )  # fmt: skip


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
def add_tile(typing_context: Any, tile: Any, weights: Any, x: Any, words: Any, sums: Any, begun: Any) -> Any:
    """Sums at an address, [rows, tokens of the tile], += rows at an address · words of activations of these tokens.

    begun: whether there are sums already; without matrix units, there have to be.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile = signature.args[0]
        _, weights, x, words, sums, _ = arguments
        if tile.in_matrices:
            _add_in_matrices(builder, *signature.args[:1], *arguments[1:])
            return context.get_dummy_value()
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

    return types.none(tile, types.int64, types.int64, types.int64, types.int64, types.boolean), generate
