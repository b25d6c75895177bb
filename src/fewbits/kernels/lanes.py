"""Vectors for the multiplying kernels: 128 codes decoded at once to bf16, and their products with activations summed.

Compilers don't find these instructions in loops over packed bits, so they are spelled out, as LLVM's portable vectors.
Only sums of products and one table of bytes name instructions, where the processor has them; elsewhere they are
written out.

A block of 128 codes becomes four vectors of 32. In vector j, code 4i + j lies at i: then a shift by j fields serves all
32, and each of the 16 sums of products covers 8 neighbouring codes, so that groups of 8 to 64 codes are scaled by one
vector. Activations are put in the same order beforehand (kernels.tokens).

bf16 numbers 128 to 255 have a step of 1: `0x4300 | q` is 128 + q, so a code needs no conversion, and 128 · Σx is taken
off the sum of its group.
"""

from __future__ import annotations

import struct
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

# Codes of a block, and of each of its vectors.
BLOCK, CODES = 128, 32
# What codes narrower than 8 bits are raised by, and the bf16 bits of it.
RAISED = 128
RAISED_BITS = 0x4300
FP8, INT8 = "fp8", "int8"
# How activations are ordered within a block: as they are; code 4i + j at 32j + i; or as bytes come out of the
# processor's interleaving, eights of each sixteen apart.
NATURAL, BY_FOURS, BY_EIGHTS = 0, 1, 2

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()
_features = llvm.get_host_cpu_features()
HAS_BF16 = bool(_features.get("avx512bf16"))
HAS_VNNI = bool(_features.get("avx512vnni"))
HAS_BYTE_TABLES = bool(_features.get("avx512vbmi"))


class _BFloat(ir.types._BaseFloatType):  # type: ignore[misc]
    """bf16, which llvmlite does not have."""

    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"

    def format_constant(self, value: float) -> str:
        return str(value)


_BFloat._create_instance()
# As dot products take them: 16 pairs, the two of a pair multiplied with the two of another.
PAIRS_OF_BF16 = ir.VectorType(_BFloat(), CODES)


class Lanes(types.Type):  # type: ignore[misc]
    """A vector in a register."""

    def __init__(self, name: str, element: ir.Type, count: int) -> None:
        self.vector = ir.VectorType(element, count)
        super().__init__(name)


class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        super().__init__(manager, lanes, lanes.vector)


register_model(Lanes)(_LanesModel)
# bf16 numbers as their bits; bytes; and sums of products in fp32 and int32.
Bf16Lanes, ByteLanes = Lanes("Bf16Lanes", _I16, CODES), Lanes("ByteLanes", _I8, 2 * CODES)
Sums, IntSums = Lanes("Sums", _F32, 16), Lanes("IntSums", _I32, 16)


def _splat(vector: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def load(builder: Any, address: Any, kind: ir.Type) -> Any:
    """What lies at an address, wherever that is."""
    loaded = builder.load(builder.inttoptr(address, kind.as_pointer()))
    loaded.align = 1
    return loaded


def call(builder: Any, name: str, result: ir.Type, arguments: list[Any], flags: tuple[str, ...] = ()) -> Any:
    """A call of one of the compiler's own functions."""
    signature = ir.FunctionType(result, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, signature, name)
    return builder.call(function, arguments, fastmath=flags)


def _to_bf16(builder: Any, wide: Any) -> Any:
    """fp32 <32> that bf16 holds exactly, to its bits."""
    if HAS_BF16:
        halves = [builder.shuffle_vector(wide, wide, _indices(range(at, at + 16))) for at in (0, 16)]
        packed = call(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", PAIRS_OF_BF16, [halves[1], halves[0]])
        return builder.bitcast(packed, Bf16Lanes.vector)
    bits = builder.bitcast(wide, ir.VectorType(_I32, CODES))
    return builder.trunc(builder.lshr(bits, _splat(ir.VectorType(_I32, CODES), 16)), Bf16Lanes.vector)


def _indices(values: Any) -> ir.Constant:
    indices = list(values)
    return ir.Constant(ir.VectorType(_I32, len(indices)), indices)


class Decoder(types.Type):  # type: ignore[misc]
    """How codes are stored and scaled: a type of no value, so that each way is compiled on its own.

    kind: "fp8", "int8", or a width below 8 bits. lanes: sums that share one scale, 0 if the whole row does.
    scales: "f32", "bf16" or "f16".
    """

    def __init__(self, text: str) -> None:
        self.kind, lanes, self.scales = text.split(":")
        self.lanes = int(lanes)
        super().__init__(f"Decoder({text})")


@register_model(Decoder)
class _DecoderModel(models.OpaqueModel):  # type: ignore[misc]
    pass


def order_of(kind: str) -> int:
    """The order of activations within a block that a kind of codes needs."""
    if kind != FP8:
        return BY_FOURS
    return BY_EIGHTS if HAS_BYTE_TABLES else NATURAL


def block_bytes(kind: str) -> int:
    """Bytes of 128 codes."""
    return BLOCK if kind in (FP8, INT8) else BLOCK // 8 * int(kind)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def decoder_of(typing_context: Any, text: Any) -> Any:
    """The decoder that a constant "kind:lanes:scales" names."""
    if not isinstance(text, types.Literal):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_dummy_value()

    return Decoder(text.literal_value)(text), generate


def _fp8_table() -> tuple[list[int], list[int]]:
    """Low and high bytes of the bf16 value of each magnitude; the code of NaN counts as 480, so that 0 · it is 0."""
    low, high = [], []
    for code in range(128):
        exponent, mantissa = divmod(code, 8)
        value = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
        bits = struct.pack(">f", value)
        high.append(bits[0])
        low.append(bits[1])
    return low, high


def _decode_fp8_by_table(builder: Any, address: Any) -> list[Any]:
    vectors = []
    lane = ByteLanes.vector
    tables = [[ir.Constant(lane, half[:64]), ir.Constant(lane, half[64:])] for half in _fp8_table()]
    for offset in (0, 64):
        stored = load(builder, builder.add(address, ir.Constant(_I64, offset)), lane)
        low, high = (
            call(builder, "llvm.x86.avx512.vpermi2var.qi.512", lane, [first, stored, second])
            for first, second in tables
        )
        high = builder.or_(high, builder.and_(stored, _splat(lane, 0x80)))
        for eight in (0, 8):
            pairs = [at for l in range(4) for e in range(8) for at in (16 * l + eight + e, 64 + 16 * l + eight + e)]
            vectors.append(builder.bitcast(builder.shuffle_vector(low, high, _indices(pairs)), Bf16Lanes.vector))
    return vectors


def _decode_fp8(builder: Any, address: Any) -> list[Any]:
    word, vectors = Bf16Lanes.vector, []
    for offset in range(0, BLOCK, CODES):
        at = builder.add(address, ir.Constant(_I64, offset))
        wide = builder.zext(load(builder, at, ir.VectorType(_I8, CODES)), word)
        magnitude = builder.and_(builder.shl(wide, _splat(word, 7)), _splat(word, 0x3F80))
        sign = builder.and_(builder.shl(wide, _splat(word, 8)), _splat(word, 0x8000))
        # In a half's bits, the value is 2^-8 of what it should be.
        half = builder.bitcast(builder.or_(magnitude, sign), ir.VectorType(ir.HalfType(), CODES))
        full = builder.fpext(half, ir.VectorType(_F32, CODES))
        scaled = builder.fmul(full, ir.Constant(full.type, [256.0] * CODES))
        vectors.append(_to_bf16(builder, scaled))
    return vectors


def _decode_int8(builder: Any, address: Any) -> list[Any]:
    four = ir.VectorType(_I32, CODES)
    stored = load(builder, address, four)
    vectors = []
    for j in range(4):
        code = builder.ashr(builder.shl(stored, _splat(four, 24 - 8 * j)), _splat(four, 24))
        vectors.append(_to_bf16(builder, builder.sitofp(code, ir.VectorType(_F32, CODES))))
    return vectors


def _decode_fields(builder: Any, address: Any, bits: int) -> list[Any]:
    word = Bf16Lanes.vector
    stored = load(builder, address, ir.VectorType(_I8, BLOCK // 8 * bits))
    vectors = []
    shared = None
    for j in range(4):
        # Up to 4 bits, one window of 16 bits holds all four codes of a lane.
        firsts = [4 * i * bits + (0 if bits <= 4 else j * bits) for i in range(CODES)]
        if bits > 4 or shared is None:
            last = stored.type.count - 1
            windows = [byte for first in firsts for byte in (first // 8, min(first // 8 + 1, last))]
            shared = builder.bitcast(builder.shuffle_vector(stored, stored, _indices(windows)), word)
        shifts = [first % 8 + (j * bits if bits <= 4 else 0) for first in firsts]
        field = builder.lshr(shared, ir.Constant(word, shifts))
        masked = builder.and_(field, _splat(word, 2**bits - 1))
        vectors.append(builder.or_(masked, _splat(word, RAISED_BITS)))
    return vectors


@intrinsic  # type: ignore[untyped-decorator]
def codes_at(typing_context: Any, decoder: Any, address: Any) -> Any:
    """A block of 128 codes as four vectors of bf16; codes below 8 bits as 128 + code."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0].kind
        if kind == FP8:
            vectors = (_decode_fp8_by_table if HAS_BYTE_TABLES else _decode_fp8)(builder, arguments[1])
        elif kind == INT8:
            vectors = _decode_int8(builder, arguments[1])
        else:
            vectors = _decode_fields(builder, arguments[1], int(kind))
        return context.make_tuple(builder, signature.return_type, vectors)

    return types.UniTuple(Bf16Lanes, 4)(decoder, types.int64), generate


def _scales(builder: Any, decoder: Decoder, address: Any) -> Any:
    """One scale for each of 16 sums, from neighbours in memory."""
    count = 16 // decoder.lanes
    stored = {"f32": _F32, "bf16": _I16, "f16": ir.HalfType()}[decoder.scales]
    loaded = load(builder, address, ir.VectorType(stored, count))
    wide = ir.VectorType(_F32, count)
    if decoder.scales == "bf16":
        words = ir.VectorType(_I32, count)
        loaded = builder.bitcast(builder.shl(builder.zext(loaded, words), _splat(words, 16)), wide)
    elif decoder.scales == "f16":
        loaded = builder.fpext(loaded, wide)
    return builder.shuffle_vector(loaded, loaded, _indices(lane // decoder.lanes for lane in range(16)))


@intrinsic  # type: ignore[untyped-decorator]
def add_block(typing_context: Any, decoder: Any, sums: Any, codes: Any, x_at: Any, scales_at: Any) -> Any:
    """Sums + (codes of a block · 128 activations at an address) · the scales at an address.

    Where the whole row shares one scale, it is left out.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        decoder = signature.args[0]
        _, sums, codes, x_at, scales_at = arguments
        products = ir.Constant(Sums.vector, None) if decoder.lanes else sums
        for j in range(4):
            x = load(builder, builder.add(x_at, ir.Constant(_I64, 2 * CODES * j)), Bf16Lanes.vector)
            products = _add_products(builder, products, builder.extract_value(codes, j), x)
        if not decoder.lanes:
            return products
        scales = _scales(builder, decoder, scales_at)
        return call(builder, "llvm.fmuladd.v16f32", Sums.vector, [products, scales, sums])

    return Sums(decoder, Sums, codes, types.int64, types.int64), generate


def _add_products(builder: Any, sums: Any, codes: Any, x: Any) -> Any:
    """Sums + codes · x: each of 16 sums takes two products of bf16 numbers."""
    if HAS_BF16:
        operands = [sums, builder.bitcast(codes, PAIRS_OF_BF16), builder.bitcast(x, PAIRS_OF_BF16)]
        return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", Sums.vector, operands)
    words = ir.VectorType(_I32, 16)
    left, right = builder.bitcast(codes, words), builder.bitcast(x, words)
    even = [builder.bitcast(builder.shl(side, _splat(words, 16)), Sums.vector) for side in (left, right)]
    mask = _splat(words, 0xFFFF0000)
    odd = [builder.bitcast(builder.and_(side, mask), Sums.vector) for side in (left, right)]
    sums = call(builder, "llvm.fmuladd.v16f32", Sums.vector, [*even, sums])
    return call(builder, "llvm.fmuladd.v16f32", Sums.vector, [*odd, sums])


@intrinsic  # type: ignore[untyped-decorator]
def bytes_at(typing_context: Any, address: Any) -> Any:
    """64 bytes at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return load(builder, arguments[0], ByteLanes.vector)

    return ByteLanes(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def fetch(typing_context: Any, address: Any) -> Any:
    """Ask for a line of memory ahead of its use: processors don't look beyond a page, and a row is about one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _I8.as_pointer())
        # For reading, into the second-level cache, as data.
        flags = [ir.Constant(_I32, flag) for flag in (0, 2, 1)]
        call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, *flags])
        return context.get_dummy_value()

    return types.none(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def no_sums(typing_context: Any) -> Any:
    """Sums of nothing."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(Sums.vector, None)

    return Sums(), generate


@intrinsic  # type: ignore[untyped-decorator]
def no_int_sums(typing_context: Any) -> Any:
    """Integer sums of nothing."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(IntSums.vector, None)

    return IntSums(), generate


@intrinsic  # type: ignore[untyped-decorator]
def add_byte_products(typing_context: Any, sums: Any, unsigned: Any, signed: Any) -> Any:
    """Sums + unsigned · signed bytes, exact: each of 16 sums takes four products."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, unsigned, signed = arguments
        if HAS_VNNI:
            operands = [sums, unsigned, signed]
            return call(builder, "llvm.x86.avx512.vpdpbusd.512", IntSums.vector, operands)
        wide = ir.VectorType(_I32, 64)
        products = builder.mul(builder.zext(unsigned, wide), builder.sext(signed, wide))
        for quarter in range(4):
            part = builder.shuffle_vector(products, products, _indices(range(quarter, 64, 4)))
            sums = builder.add(sums, part)
        return sums

    return IntSums(IntSums, ByteLanes, ByteLanes), generate


@intrinsic  # type: ignore[untyped-decorator]
def total_of(typing_context: Any, sums: Any) -> Any:
    """The 16 sums added up."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.args[0] == IntSums:
            return call(builder, "llvm.vector.reduce.add.v16i32", _I32, [arguments[0]])
        zero = ir.Constant(_F32, -0.0)
        return call(builder, "llvm.vector.reduce.fadd.v16f32", _F32, [zero, arguments[0]], ("reassoc",))

    result = types.int32 if sums == IntSums else types.float32
    return result(sums), generate
