"""The outputs of tiles: sums [rows, tokens] scaled, rounded to the activations' dtype and turned, a token a row.

y = sum · scale of the token · scale of the row + bias, in fp32 and in that order.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fewbits.kernels.compiling import inner
from fewbits.kernels.lanes import F32, HAS_BF16, I16, I64, LANES, IntSums, Sums, indices, load, rounded, splat, spread
from fewbits.kernels.memory import BFLOAT16, FLOAT16, FLOAT32, copy_bytes
from fewbits.kernels.turned import turned

# Bytes that 16 rows and tokens of outputs take.
ROOM = 4 * LANES * LANES
HALF_LANES = ir.VectorType(I16, LANES)
_INTERLEAVED = indices(place for lane in range(LANES) for place in (lane, lane + LANES))


def _as_bf16(builder: Any, values: Any) -> Any:
    """The bits of 16 fp32 numbers rounded to bf16, half to even; NaN stays NaN: `memory.as_bf16` of a vector."""
    words = IntSums.vector
    bits = builder.bitcast(values, words)
    odd = builder.and_(builder.lshr(bits, splat(words, 16)), splat(words, 1))
    raised = builder.add(builder.add(bits, splat(words, 0x7FFF)), odd)
    is_number = builder.fcmp_ordered("ord", values, values)
    kept = builder.select(is_number, raised, builder.or_(bits, splat(words, 0x400000)))
    return builder.trunc(builder.lshr(kept, splat(words, 16)), HALF_LANES)


def _as_half(builder: Any, values: Any) -> Any:
    return builder.bitcast(builder.fptrunc(values, ir.VectorType(ir.HalfType(), LANES)), HALF_LANES)


def _as_float(builder: Any, values: Any) -> Any:
    return values


# 16 fp32 numbers as those of a dtype.
ROUNDED = {BFLOAT16: _as_bf16, FLOAT16: _as_half, FLOAT32: _as_float}


def _turned_as_pairs(builder: Any, rows: list[Any]) -> list[Any]:
    """The columns of 16 rows as bf16: two rows are rounded at once, and turned as words of both."""
    pairs = []
    for r in range(0, LANES, 2):
        both = rounded(builder, rows[r : r + 2])
        pairs.append(builder.bitcast(builder.shuffle_vector(both, both, _INTERLEAVED), IntSums.vector))
    # Column t and t + 8 of pairs lie behind each other.
    columns = turned(builder, pairs)
    halves = [indices(range(at, at + LANES // 2)) for at in (0, LANES // 2)]
    return [builder.shuffle_vector(column, column, half) for half in halves for column in columns]


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _finish(
    typing_context: Any, tile: Any, kind: Any, sums: Any, stride: Any, scales: Any, biases: Any, token_scales: Any,
    out: Any, out_stride: Any,
) -> Any:  # fmt: skip
    """16 rows and 16 tokens of sums at an address to 16 outputs of each token at another."""
    if not isinstance(kind, types.Literal):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        of_bytes, kind = signature.args[0].of_bytes, signature.args[1].literal_value
        sums, stride, scales, biases, token_scales, out, out_stride = arguments[2:]
        of_tokens = load(builder, token_scales, Sums.vector)
        rows: list[Any] = []
        for r in range(LANES):
            number = ir.Constant(I64, 4 * r)
            at = builder.add(sums, builder.mul(stride, ir.Constant(I64, r)))
            values = load(builder, at, IntSums.vector if of_bytes else Sums.vector)
            if of_bytes:
                values = builder.sitofp(values, Sums.vector)
            of_row = spread(builder, load(builder, builder.add(scales, number), F32))
            bias = spread(builder, load(builder, builder.add(biases, number), F32))
            scaled = builder.fmul(builder.fmul(values, of_tokens), of_row)
            rows.append(builder.fadd(scaled, bias))
        if kind == BFLOAT16 and HAS_BF16:
            columns = _turned_as_pairs(builder, rows)
        else:
            columns = turned(builder, [ROUNDED[kind](builder, row) for row in rows])
        for t, outputs in enumerate(columns):
            at = builder.add(out, builder.mul(out_stride, ir.Constant(I64, t)))
            builder.store(outputs, builder.inttoptr(at, outputs.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.none(tile, kind, *[types.int64] * 7), generate


@inner
def _finish_as(
    tile: Any, kind: Any, sums: Any, stride: Any, scales: Any, biases: Any, token_scales: Any, out: Any, out_stride: Any
) -> None:
    if kind == BFLOAT16:
        _finish(tile, BFLOAT16, sums, stride, scales, biases, token_scales, out, out_stride)
    elif kind == FLOAT16:
        _finish(tile, FLOAT16, sums, stride, scales, biases, token_scales, out, out_stride)
    else:
        _finish(tile, FLOAT32, sums, stride, scales, biases, token_scales, out, out_stride)


@inner
def write_tile(
    tile: Any, kind: Any, sums: Any, lanes: Any, scales: Any, biases: Any, token_scales: Any, rows: Any, tokens: Any,
    out: Any, out_stride: Any, room: Any,
) -> None:  # fmt: skip
    """Sums [rows of a block, lanes] at an address to outputs [tokens, …] at another.

    scales, biases: addresses of fp32 numbers of rows; token_scales: of tokens. rows, tokens: how many there are;
    numbers are read up to the next multiple of 16 of both. room: address of ROOM bytes to work in.
    """
    width = 4 if kind == FLOAT32 else 2
    for r in range(0, rows, LANES):
        for t in range(0, tokens, LANES):
            place, number = sums + 4 * (r * lanes + t), 4 * r
            at = out + t * out_stride + width * r
            height, there = min(rows - r, LANES), min(tokens - t, LANES)
            if height == LANES and there == LANES:
                _finish_as(
                    tile, kind, place, 4 * lanes, scales + number, biases + number, token_scales + 4 * t, at, out_stride
                )  # fmt: skip
                continue
            _finish_as(
                tile, kind, place, 4 * lanes, scales + number, biases + number, token_scales + 4 * t, room,
                width * LANES,
            )  # fmt: skip
            for token in range(there):
                copy_bytes(at + token * out_stride, room + token * width * LANES, height * width)
