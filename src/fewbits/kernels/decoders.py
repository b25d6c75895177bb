"""How codes are stored, and a block of 128 of them decoded at once to bf16.

A block becomes four vectors of 32. In vector j, code 4i + j lies at i: then a shift by j fields serves all 32, and each
of the 16 sums of products covers 8 neighbouring codes, so that groups of 8 to 64 codes are scaled by one vector.
Activations are put in the same order beforehand (kernels.tokens).

bf16 numbers 128 to 255 have a step of 1: `0x4300 | q` is 128 + q, so a code needs no conversion, and 128 · Σx is taken
off the sum of its group.
"""

from __future__ import annotations

import math
import struct
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from fewbits.kernels.lanes import (
    CODES,
    F32,
    HAS_BYTE_TABLES,
    I8,
    I16,
    I32,
    I64,
    LANES,
    Bf16Lanes,
    ByteLanes,
    Sums,
    call,
    indices,
    load,
    load_first,
    multiply_add,
    prefetch,
    splat,
    spread,
    to_bf16,
    widened,
)

# Codes of a block.
BLOCK = 128
# What codes narrower than 8 bits are raised by, and the bf16 bits of it.
RAISED = 128
RAISED_BITS = 0x4300
BF16, FP8, INT8 = "bf16", "fp8", "int8"
# 4 and 8 bits that stay bytes, those of 8 raised by 128, to be multiplied with whole numbers (kernels.lanes).
WHOLE4, WHOLE8 = "whole4", "whole8"
SCALES = {"f32": F32, "bf16": I16, "f16": ir.HalfType()}
# How activations are ordered within a block: as they are; code 4i + j at 32j + i; or as bytes come out of the
# processor's interleaving, eights of each sixteen apart.
NATURAL, BY_FOURS, BY_EIGHTS = 0, 1, 2
# As whole numbers (kernels.lanes), one half of a block after the other, or every second of them, then those between.
WHOLE_HALVES, WHOLE_SECONDS = 3, 4


class Decoder(types.Type):  # type: ignore[misc]
    """How codes are stored and scaled: a type of no value, so that each way is compiled on its own.

    kind: "fp8", "int8", "whole4", "whole8", or a width below 8 bits. lanes: sums that share one scale, 0 if the whole
    row does. scales: "f32", "bf16" or "f16".
    """

    def __init__(self, text: str) -> None:
        self.kind, lanes, self.scales = text.split(":")
        self.lanes = int(lanes)
        super().__init__(f"Decoder({text})")


@register_model(Decoder)
class _DecoderModel(models.OpaqueModel):  # type: ignore[misc]
    pass


def order_of(kind: str, lanes: int) -> int:
    """The order of activations within a block that a kind of codes needs."""
    if kind in (WHOLE4, WHOLE8):
        return WHOLE_SECONDS if kind == WHOLE4 else WHOLE_HALVES
    if _by_table(kind, lanes):
        return BY_EIGHTS
    return NATURAL if kind in (FP8, BF16) else BY_FOURS


def one_scale_a_block(lanes: int) -> bool:
    """Whether all sums of a block share a scale, so that they may be of whichever of its codes."""
    return lanes in (0, LANES)


def _by_table(kind: str, lanes: int) -> bool:
    """Whether bytes are looked up: their sums are spread over the block."""
    return HAS_BYTE_TABLES and kind in (FP8, INT8) and one_scale_a_block(lanes)


def block_bytes(kind: str) -> int:
    """Bytes of 128 codes."""
    sizes = {BF16: 2 * BLOCK, FP8: BLOCK, INT8: BLOCK, WHOLE8: BLOCK, WHOLE4: BLOCK // 2}
    return sizes.get(kind) or BLOCK // 8 * int(kind)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def decoder_of(typing_context: Any, text: Any) -> Any:
    """The decoder that a constant "kind:lanes:scales" names."""
    if not isinstance(text, types.Literal):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_dummy_value()

    return Decoder(text.literal_value)(text), generate


def byte_values(kind: str) -> list[int]:
    """The bf16 bits of every byte; float8's NaN counts as 480, so that 0 · it is 0."""
    numbers = [float(code - 256 * (code > 127)) for code in range(256)]
    if kind == FP8:
        for code in range(256):
            exponent, mantissa = divmod(code & 127, 8)
            magnitude = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
            numbers[code] = math.copysign(magnitude, -1.0 if code > 127 else 1.0)
    return [struct.unpack(">H", struct.pack(">f", number)[:2])[0] for number in numbers]


def _decode_by_table(builder: Any, address: Any, kind: str) -> list[Any]:
    lane, values, vectors = ByteLanes.vector, byte_values(kind), []
    for offset in (0, 64):
        stored = load(builder, builder.add(address, ir.Constant(I64, offset)), lane)
        negative = builder.icmp_signed("<", stored, splat(lane, 0))
        halves = []
        for shift in (0, 8):
            found = [
                call(builder, "llvm.x86.avx512.vpermi2var.qi.512", lane, [first, stored, second])
                for first, second in _tables([value >> shift & 255 for value in values])
            ]
            halves.append(builder.select(negative, found[1], found[0]) if kind == INT8 else found[0])
        if kind == FP8:
            # Of the negative half, only the sign differs.
            halves[1] = builder.or_(halves[1], builder.and_(stored, splat(lane, 0x80)))
        for eight in (0, 8):
            pairs = [at for l in range(4) for e in range(8) for at in (16 * l + eight + e, 64 + 16 * l + eight + e)]
            vectors.append(builder.bitcast(builder.shuffle_vector(*halves, indices(pairs)), Bf16Lanes.vector))
    return vectors


def _tables(entries: list[int]) -> list[list[ir.Constant]]:
    """256 bytes as two tables of two vectors: of codes without, and with the top bit."""
    quarters = [ir.Constant(ByteLanes.vector, entries[at : at + 64]) for at in range(0, 256, 64)]
    return [quarters[:2], quarters[2:]]


def _decode_fp8(builder: Any, address: Any) -> list[Any]:
    word, vectors = Bf16Lanes.vector, []
    for offset in range(0, BLOCK, CODES):
        at = builder.add(address, ir.Constant(I64, offset))
        wide = builder.zext(load(builder, at, ir.VectorType(I8, CODES)), word)
        magnitude = builder.and_(builder.shl(wide, splat(word, 7)), splat(word, 0x3F80))
        sign = builder.and_(builder.shl(wide, splat(word, 8)), splat(word, 0x8000))
        # In a half's bits, the value is 2^-8 of what it should be.
        half = builder.bitcast(builder.or_(magnitude, sign), ir.VectorType(ir.HalfType(), CODES))
        full = builder.fpext(half, ir.VectorType(F32, CODES))
        scaled = builder.fmul(full, ir.Constant(full.type, [256.0] * CODES))
        vectors.append(to_bf16(builder, scaled))
    return vectors


def _decode_int8(builder: Any, address: Any) -> list[Any]:
    four = ir.VectorType(I32, CODES)
    stored = load(builder, address, four)
    vectors = []
    for j in range(4):
        code = builder.ashr(builder.shl(stored, splat(four, 24 - 8 * j)), splat(four, 24))
        vectors.append(to_bf16(builder, builder.sitofp(code, ir.VectorType(F32, CODES))))
    return vectors


def _decode_bytes(builder: Any, address: Any, kind: str) -> list[Any]:
    """Codes as they are, those of 8 bits raised by 128: one half after the other, or every second, then the others."""
    lane = ByteLanes.vector
    if kind == WHOLE8:
        places = [builder.add(address, ir.Constant(I64, offset)) for offset in (0, 64)]
        return [builder.xor(load(builder, place, lane), splat(lane, 0x80)) for place in places]
    stored = load(builder, address, lane)
    return [builder.and_(field, splat(lane, 15)) for field in (stored, builder.lshr(stored, splat(lane, 4)))]


def _decode_fields(builder: Any, address: Any, bits: int) -> list[Any]:
    word = Bf16Lanes.vector
    stored = load(builder, address, ir.VectorType(I8, BLOCK // 8 * bits))
    vectors = []
    shared = None
    for j in range(4):
        # Up to 4 bits, one window of 16 bits holds all four codes of a lane.
        firsts = [4 * i * bits + (0 if bits <= 4 else j * bits) for i in range(CODES)]
        if bits > 4 or shared is None:
            last = stored.type.count - 1
            windows = [byte for first in firsts for byte in (first // 8, min(first // 8 + 1, last))]
            shared = builder.bitcast(builder.shuffle_vector(stored, stored, indices(windows)), word)
        shifts = [first % 8 + (j * bits if bits <= 4 else 0) for first in firsts]
        field = builder.lshr(shared, ir.Constant(word, shifts))
        masked = builder.and_(field, splat(word, 2**bits - 1))
        vectors.append(builder.or_(masked, splat(word, RAISED_BITS)))
    return vectors


@intrinsic  # type: ignore[untyped-decorator]
def codes_at(typing_context: Any, decoder: Any, address: Any) -> Any:
    """A block of 128 codes as four vectors of bf16, codes below 8 bits as 128 + code; or as two of bytes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        decoder = signature.args[0]
        kind = decoder.kind
        if kind in (WHOLE4, WHOLE8):
            vectors = _decode_bytes(builder, arguments[1], kind)
        elif kind == BF16:
            places = [builder.add(arguments[1], ir.Constant(I64, 2 * CODES * j)) for j in range(4)]
            vectors = [load(builder, place, Bf16Lanes.vector) for place in places]
        elif _by_table(kind, decoder.lanes):
            vectors = _decode_by_table(builder, arguments[1], kind)
        elif kind in (FP8, INT8):
            vectors = (_decode_fp8 if kind == FP8 else _decode_int8)(builder, arguments[1])
        else:
            vectors = _decode_fields(builder, arguments[1], int(kind))
        return context.make_tuple(builder, signature.return_type, vectors)

    vectors = (ByteLanes, 2) if decoder.kind in (WHOLE4, WHOLE8) else (Bf16Lanes, 4)
    return types.UniTuple(*vectors)(decoder, types.int64), generate


def stored_as_float(builder: Any, name: str, stored: Any) -> Any:
    """Scales that are stored as "f32", "bf16" or "f16", as fp32."""
    if name == "bf16":
        return widened(builder, stored)
    return builder.fpext(stored, ir.VectorType(F32, stored.type.count)) if name == "f16" else stored


@intrinsic  # type: ignore[untyped-decorator]
def fetch_block(typing_context: Any, decoder: Any, address: Any) -> Any:
    """Ask for a block ahead of its use: processors don't look beyond a page, and a row is about one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        for line in range(0, block_bytes(signature.args[0].kind), 64):
            prefetch(builder, builder.add(arguments[1], ir.Constant(I64, line)))
        return context.get_dummy_value()

    return types.none(decoder, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def scales_of(typing_context: Any, decoder: Any, scales_at: Any, units_at: Any, count: Any) -> Any:
    """The scales of up to 16 groups as fp32, zeros behind them; nothing if the row has but one scale.

    Where codes are multiplied with whole numbers, scales are, with the units of these.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        decoder = signature.args[0]
        _, scales_at, units_at, count = arguments
        if not decoder.lanes:
            return ir.Constant(Sums.vector, None)
        kind = ir.VectorType(SCALES[decoder.scales], LANES)
        scales = stored_as_float(builder, decoder.scales, load_first(builder, scales_at, kind, count))
        if decoder.kind in (WHOLE4, WHOLE8):
            return builder.fmul(scales, load_first(builder, units_at, Sums.vector, count))
        return scales

    return Sums(decoder, types.int64, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def keep_scales(typing_context: Any, decoder: Any, scales: Any, address: Any) -> Any:
    """Scales to an address, 64 bytes of them, unless the row has but one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.args[0].lanes:
            pointer = builder.inttoptr(arguments[2], Sums.vector.as_pointer())
            builder.store(arguments[1], pointer, align=4)
        return context.get_dummy_value()

    return types.none(decoder, Sums, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def add_scaled(typing_context: Any, decoder: Any, sums: Any, products: Any, scales_at: Any) -> Any:
    """Sums + products of one or more blocks · their scales at an address, which are left out if the row has but one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes = signature.args[0].lanes
        _, sums, products, scales_at = arguments
        if not lanes:
            return builder.fadd(sums, products)
        if lanes == LANES:
            shared = spread(builder, load(builder, scales_at, F32))
        else:
            scales = load(builder, scales_at, ir.VectorType(F32, LANES // lanes))
            shared = builder.shuffle_vector(scales, scales, indices(lane // lanes for lane in range(LANES)))
        return multiply_add(builder, products, shared, sums)

    return Sums(decoder, Sums, Sums, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def following(typing_context: Any, decoder: Any, scales_at: Any) -> Any:
    """Where the scales of the next blocks are."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes = signature.args[0].lanes
        return builder.add(arguments[1], ir.Constant(I64, 4 * LANES // lanes if lanes else 0))

    return types.int64(decoder, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def span_blocks(typing_context: Any, decoder: Any, blocks: Any) -> Any:
    """How many blocks share their scales: one, for all the compiler knows, where a block has several of them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(I64, 1) if 0 < signature.args[0].lanes < LANES else arguments[1]

    return types.int64(decoder, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def less_offsets(
    context: Any, decoder: Any, sums: Any, scales: Any, zeros_at: Any, zeros: Any, x_sums_at: Any, raised_at: Any,
    count: Any,
) -> Any:  # fmt: skip
    """Sums − s · (z · Σx + raised) for up to 16 groups; z of `zeros` of them, 0 of others; no s if a row has one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        decoder, wide = signature.args[0], Sums.vector
        _, sums, scales, zeros_at, zeros, x_sums_at, raised_at, count = arguments
        stored = load_first(builder, zeros_at, ir.VectorType(I8, LANES), zeros)
        x_sums, raised = (load_first(builder, at, wide, count) for at in (x_sums_at, raised_at))
        offsets = multiply_add(builder, builder.uitofp(stored, wide), x_sums, raised)
        if not decoder.lanes:
            return builder.fsub(sums, offsets)
        return multiply_add(builder, builder.fneg(offsets), scales, sums)

    return Sums(decoder, Sums, Sums, *[types.int64] * 5), generate
