"""Vectors for the multiplying kernels: 32 codes decoded at once to bf16, and their products with activations summed.

Compilers don't find these instructions in loops over packed bits, so they are spelled out, as LLVM's portable vectors:
bytes are shuffled so that each code lies in 16 bits of its own, shifted and masked. Only the sum of bf16 products names
an instruction, where the processor has one; elsewhere it is written with fp32 multiply-adds.

bf16 numbers 128 to 255 have a step of 1: `0x4300 | q` is 128 + q, so a code needs no conversion, and 128 · Σx is taken
off the sum of its group.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

CODES = 32
# What codes narrower than 8 bits are raised by, and the bf16 bits of it.
RAISED = 128
RAISED_BITS = 0x4300
# float8 e4m3fn shifted into a half's bits is 2^-8 of its value.
FP8_AS_HALF = 256.0
FP8 = "fp8"
INT8 = "int8"

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()
_features = llvm.get_host_cpu_features()
HAS_BF16 = bool(_features.get("avx512bf16"))
HAS_VNNI = bool(_features.get("avx512vnni"))


class _BFloat(ir.types._BaseFloatType):  # type: ignore[misc]
    """bf16, which llvmlite does not have."""

    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"

    def format_constant(self, value: float) -> str:
        return str(value)


_BFloat._create_instance()


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


def _load(builder: Any, address: Any, kind: ir.Type) -> Any:
    loaded = builder.load(builder.inttoptr(address, kind.as_pointer()))
    loaded.align = 1
    return loaded


def _call(builder: Any, name: str, result: ir.Type, arguments: list[Any], flags: tuple[str, ...] = ()) -> Any:
    signature = ir.FunctionType(result, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, signature, name)
    return builder.call(function, arguments, fastmath=flags)


def _to_bf16(builder: Any, wide: Any) -> Any:
    """fp32 <32> that bf16 holds exactly, to its bits."""
    if HAS_BF16:
        halves = [builder.shuffle_vector(wide, wide, _indices(range(at, at + 16))) for at in (0, 16)]
        packed = _call(
            builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", ir.VectorType(_BFloat(), 32), [halves[1], halves[0]]
        )
        return builder.bitcast(packed, Bf16Lanes.vector)
    bits = builder.bitcast(wide, ir.VectorType(_I32, CODES))
    return builder.trunc(builder.lshr(bits, _splat(ir.VectorType(_I32, CODES), 16)), Bf16Lanes.vector)


def _indices(values: Any) -> ir.Constant:
    indices = list(values)
    return ir.Constant(ir.VectorType(_I32, len(indices)), indices)


def _decode_fp8(builder: Any, address: Any) -> Any:
    word = Bf16Lanes.vector
    wide = builder.zext(_load(builder, address, ir.VectorType(_I8, CODES)), word)
    magnitude = builder.and_(builder.shl(wide, _splat(word, 7)), _splat(word, 0x3F80))
    sign = builder.and_(builder.shl(wide, _splat(word, 8)), _splat(word, 0x8000))
    half = builder.bitcast(builder.or_(magnitude, sign), ir.VectorType(ir.HalfType(), CODES))
    return _to_bf16(builder, builder.fpext(half, ir.VectorType(_F32, CODES)))


def _decode_int8(builder: Any, address: Any) -> Any:
    wide = builder.sext(_load(builder, address, ir.VectorType(_I8, CODES)), ir.VectorType(_I32, CODES))
    return _to_bf16(builder, builder.sitofp(wide, ir.VectorType(_F32, CODES)))


def _decode_field(builder: Any, address: Any, bits: int) -> Any:
    count = CODES * bits // 8
    stored = _load(builder, address, ir.VectorType(_I8, count))
    windows, shifts = [], []
    for code in range(CODES):
        byte, shift = divmod(code * bits, 8)
        windows += [byte, byte + 1 if shift + bits > 8 else byte]
        shifts.append(shift)
    spread = builder.shuffle_vector(stored, stored, _indices(windows))
    words = builder.bitcast(spread, Bf16Lanes.vector)
    fields = builder.lshr(words, ir.Constant(Bf16Lanes.vector, shifts))
    masked = builder.and_(fields, _splat(Bf16Lanes.vector, 2**bits - 1))
    return builder.or_(masked, _splat(Bf16Lanes.vector, RAISED_BITS))


def decoder(kind: str | int) -> Any:
    """The intrinsic that decodes the 32 codes at an address to bf16.

    Args:
        kind: "fp8" (values · 2^-8), "int8" (values), or a width below 8 bits (128 + code).
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def codes_at(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            if kind == FP8:
                return _decode_fp8(builder, arguments[0])
            if kind == INT8:
                return _decode_int8(builder, arguments[0])
            return _decode_field(builder, arguments[0], int(kind))

        return Bf16Lanes(types.int64), generate

    return codes_at


@intrinsic  # type: ignore[untyped-decorator]
def bf16_at(typing_context: Any, address: Any) -> Any:
    """32 bf16 numbers at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _load(builder, arguments[0], Bf16Lanes.vector)

    return Bf16Lanes(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def bytes_at(typing_context: Any, address: Any) -> Any:
    """64 bytes at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _load(builder, arguments[0], ByteLanes.vector)

    return ByteLanes(types.int64), generate


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
def add_products(typing_context: Any, sums: Any, codes: Any, x: Any) -> Any:
    """Sums + codes · x: each of 16 sums takes two products of bf16 numbers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, codes, x = arguments
        if HAS_BF16:
            pair = ir.VectorType(_BFloat(), CODES)
            operands = [sums, builder.bitcast(codes, pair), builder.bitcast(x, pair)]
            return _call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", Sums.vector, operands)
        words = ir.VectorType(_I32, 16)
        left, right = builder.bitcast(codes, words), builder.bitcast(x, words)
        even = [builder.bitcast(builder.shl(side, _splat(words, 16)), Sums.vector) for side in (left, right)]
        mask = _splat(words, 0xFFFF0000)
        odd = [builder.bitcast(builder.and_(side, mask), Sums.vector) for side in (left, right)]
        sums = _call(builder, "llvm.fmuladd.v16f32", Sums.vector, [*even, sums])
        return _call(builder, "llvm.fmuladd.v16f32", Sums.vector, [*odd, sums])

    return Sums(Sums, Bf16Lanes, Bf16Lanes), generate


@intrinsic  # type: ignore[untyped-decorator]
def add_byte_products(typing_context: Any, sums: Any, unsigned: Any, signed: Any) -> Any:
    """Sums + unsigned · signed bytes, exact: each of 16 sums takes four products."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, unsigned, signed = arguments
        if HAS_VNNI:
            operands = [sums, unsigned, signed]
            return _call(builder, "llvm.x86.avx512.vpdpbusd.512", IntSums.vector, operands)
        wide = ir.VectorType(_I32, 64)
        products = builder.mul(builder.zext(unsigned, wide), builder.sext(signed, wide))
        for quarter in range(4):
            part = builder.shuffle_vector(products, products, _indices(range(quarter, 64, 4)))
            sums = builder.add(sums, part)
        return sums

    return IntSums(IntSums, ByteLanes, ByteLanes), generate


@intrinsic  # type: ignore[untyped-decorator]
def add_scaled(typing_context: Any, sums: Any, addend: Any, scale: Any) -> Any:
    """Sums + addend · scale."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, addend, scale = arguments
        one = builder.insert_element(ir.Constant(Sums.vector, ir.Undefined), scale, ir.Constant(_I32, 0))
        splat = builder.shuffle_vector(one, one, _indices([0] * 16))
        return _call(builder, "llvm.fmuladd.v16f32", Sums.vector, [addend, splat, sums])

    return Sums(Sums, Sums, types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def total_of(typing_context: Any, sums: Any) -> Any:
    """The 16 sums added up."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.args[0] == IntSums:
            return _call(builder, "llvm.vector.reduce.add.v16i32", _I32, [arguments[0]])
        zero = ir.Constant(_F32, -0.0)
        return _call(builder, "llvm.vector.reduce.fadd.v16f32", _F32, [zero, arguments[0]], ("reassoc",))

    result = types.int32 if sums == IntSums else types.float32
    return result(sums), generate
