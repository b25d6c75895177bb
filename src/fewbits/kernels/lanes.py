"""Vectors in registers for the multiplying kernels: loads, sums, and sums of products of bf16 numbers and of bytes.

Compilers don't find these instructions in loops, so they are spelled out, as LLVM's portable vectors. Only sums of
products and tables of bytes name instructions, where the processor has them; elsewhere they are written out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

# bf16 numbers of a vector, and sums.
CODES, LANES = 32, 16

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()
_features = llvm.get_host_cpu_features()
HAS_BF16 = bool(_features.get("avx512bf16"))
HAS_VNNI = bool(_features.get("avx512vnni"))
HAS_BYTE_TABLES = bool(_features.get("avx512vbmi"))
HAS_AMX = bool(_features.get("amx-int8"))
# Where bf16 products are a quarter as fast as those of bytes, or missing. Processors with matrix units have them slow:
# Emerald Rapids makes one vector's in 2.2 cycles, those of bytes, and of fp32, in half a one.
PREFERS_BYTES = HAS_VNNI and (HAS_AMX or not HAS_BF16)


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
Bf16Lanes, ByteLanes = Lanes("Bf16Lanes", I16, CODES), Lanes("ByteLanes", I8, 2 * CODES)
Sums, IntSums = Lanes("Sums", F32, LANES), Lanes("IntSums", I32, LANES)


def splat(vector: ir.VectorType, value: int) -> ir.Constant:
    """A vector of one value."""
    return ir.Constant(vector, [value] * vector.count)


def load(builder: Any, address: Any, kind: ir.Type) -> Any:
    """What lies at an address, aligned or not."""
    loaded = builder.load(builder.inttoptr(address, kind.as_pointer()))
    loaded.align = 1
    return loaded


def load_first(builder: Any, address: Any, kind: ir.VectorType, count: Any) -> Any:
    """The first `count` elements of a vector at an address; zeros behind them, and no memory read there."""
    bits = builder.sub(builder.shl(ir.Constant(I64, 1), count), ir.Constant(I64, 1))
    bits = builder.trunc(bits, ir.IntType(kind.count))
    mask = builder.bitcast(bits, ir.VectorType(ir.IntType(1), kind.count))
    pointer = builder.inttoptr(address, kind.as_pointer())
    element = {"float": "f32", "half": "f16"}.get(str(kind.element), str(kind.element))
    name = f"llvm.masked.load.v{kind.count}{element}.p0"
    return call(builder, name, kind, [pointer, ir.Constant(I32, 1), mask, ir.Constant(kind, None)])


def call(builder: Any, name: str, result: ir.Type, arguments: list[Any], flags: tuple[str, ...] = ()) -> Any:
    """Call one of LLVM's own functions."""
    signature = ir.FunctionType(result, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, signature, name)
    return builder.call(function, arguments, fastmath=flags)


def spread(builder: Any, value: Any) -> Any:
    """A number of 32 bits in all 16 lanes."""
    kind = ir.VectorType(value.type, LANES)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, first, splat(ir.VectorType(I32, LANES), 0))


def constant(value: Any) -> ir.Constant:
    """An fp32 number in all 16 lanes."""
    return ir.Constant(Sums.vector, [ir.Constant(F32, float(value))] * LANES)


def repeat(builder: Any, count: Any, carried: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
    """A loop that runs at least once: body(turn, what is carried) returns what is carried on, and in the end."""
    before = builder.block
    loop, behind = builder.append_basic_block("loop"), builder.append_basic_block("behind")
    builder.branch(loop)
    builder.position_at_end(loop)
    turn = builder.phi(I64)
    turn.add_incoming(ir.Constant(I64, 0), before)
    values = [builder.phi(value.type) for value in carried]
    after = body(turn, values)
    following = builder.add(turn, ir.Constant(I64, 1))
    # Where the body ends, which may have branched.
    last = builder.block
    turn.add_incoming(following, last)
    for value, start, end in zip(values, carried, after, strict=True):
        value.add_incoming(start, before)
        value.add_incoming(end, last)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, behind)
    builder.position_at_end(behind)
    return after


def halves_of(builder: Any, vector: Any) -> list[Any]:
    """The first and the last 16 of 32."""
    return [builder.shuffle_vector(vector, vector, indices(range(at, at + LANES))) for at in (0, LANES)]


def rounded(builder: Any, halves: list[Any]) -> Any:
    """Two fp32 vectors as the bits of one of bf16, rounded half to even; where HAS_BF16."""
    packed = call(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", PAIRS_OF_BF16, [halves[1], halves[0]])
    return builder.bitcast(packed, Bf16Lanes.vector)


def to_bf16(builder: Any, wide: Any) -> Any:
    """fp32 <32> that bf16 holds exactly, to its bits."""
    if HAS_BF16:
        return rounded(builder, halves_of(builder, wide))
    bits = builder.bitcast(wide, ir.VectorType(I32, CODES))
    return builder.trunc(builder.lshr(bits, splat(ir.VectorType(I32, CODES), 16)), Bf16Lanes.vector)


def indices(values: Any) -> ir.Constant:
    """Places of a shuffle."""
    places = list(values)
    return ir.Constant(ir.VectorType(I32, len(places)), places)


def widened(builder: Any, bits: Any) -> Any:
    """bf16 numbers by their bits, to fp32."""
    words = ir.VectorType(I32, bits.type.count)
    shifted = builder.shl(builder.zext(bits, words), splat(words, 16))
    return builder.bitcast(shifted, ir.VectorType(F32, bits.type.count))


def multiply_add(builder: Any, left: Any, right: Any, sums: Any) -> Any:
    """left · right + sums."""
    return call(builder, "llvm.fmuladd.v16f32", Sums.vector, [left, right, sums])


def dot_pairs(builder: Any, sums: Any, left: Any, right: Any) -> Any:
    """Sums + left · right: each of 16 sums takes two products of bf16 numbers."""
    if HAS_BF16:
        operands = [sums, builder.bitcast(left, PAIRS_OF_BF16), builder.bitcast(right, PAIRS_OF_BF16)]
        return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", Sums.vector, operands)
    words = ir.VectorType(I32, LANES)
    sides = [builder.bitcast(side, words) for side in (left, right)]
    even = [builder.bitcast(builder.shl(side, splat(words, 16)), Sums.vector) for side in sides]
    odd = [builder.bitcast(builder.and_(side, splat(words, 0xFFFF0000)), Sums.vector) for side in sides]
    sums = multiply_add(builder, even[0], even[1], sums)
    return multiply_add(builder, odd[0], odd[1], sums)


def _add_products(builder: Any, sums: list[Any], codes: Any, x_at: Any) -> list[Any]:
    """Sums + four vectors of bf16 numbers · 128 bf16 numbers at an address, one sum after the other."""
    sums = list(sums)
    for j in range(4):
        x = load(builder, builder.add(x_at, ir.Constant(I64, 2 * CODES * j)), Bf16Lanes.vector)
        turn = j % len(sums)
        sums[turn] = dot_pairs(builder, sums[turn], builder.extract_value(codes, j), x)
    return sums


def dot_bytes(builder: Any, sums: Any, unsigned: Any, signed: Any) -> Any:
    """Sums + unsigned · signed bytes, exact: each of 16 sums takes four products."""
    if HAS_VNNI:
        return call(builder, "llvm.x86.avx512.vpdpbusd.512", IntSums.vector, [sums, unsigned, signed])
    wide = ir.VectorType(I32, 64)
    products = builder.mul(builder.zext(unsigned, wide), builder.sext(signed, wide))
    for quarter in range(4):
        part = builder.shuffle_vector(products, products, indices(range(quarter, 64, 4)))
        sums = builder.add(sums, part)
    return sums


# Bytes of an activation as a whole number, and of 128 bf16 numbers or whole ones.
PLANES, X_BYTES = 2, 256


def _add_whole_products(builder: Any, lanes: int, sums: Any, codes: Any, x_at: Any, units: Any) -> Any:
    """Sums + two vectors of unsigned bytes · 128 whole numbers, and, unless scales have it, · their unit.

    The numbers' lower bytes come first, then their upper ones; both are signed.
    """
    total = ir.Constant(IntSums.vector, None)
    for plane in reversed(range(PLANES)):
        # Eight products of bytes and the plane above them have 27 bits.
        total = builder.shl(total, splat(IntSums.vector, 8)) if plane < PLANES - 1 else total
        for half in range(2):
            x = load(builder, builder.add(x_at, ir.Constant(I64, 64 * (2 * plane + half))), ByteLanes.vector)
            total = dot_bytes(builder, total, builder.extract_value(codes, half), x)
    products = builder.sitofp(total, Sums.vector)
    if lanes:
        return builder.fadd(sums, products)
    # A unit of 4 bytes for every 256 of activations.
    unit = load(builder, builder.add(units, builder.lshr(x_at, ir.Constant(I64, 6))), F32)
    return multiply_add(builder, products, spread(builder, unit), sums)


@intrinsic  # type: ignore[untyped-decorator]
def add_products(typing_context: Any, decoder: Any, sums: Any, codes: Any, x_at: Any, units: Any) -> Any:
    """Sums + a block of 128 codes · 128 activations at an address: bf16, or whole numbers where codes are bytes.

    Whole numbers are multiplied with their unit where a row has one scale; of those at an address it lies at `units`
    and a 64th of it. Elsewhere scales have been.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if codes.dtype == ByteLanes:
            return _add_whole_products(builder, signature.args[0].lanes, *arguments[1:])
        _, sums, codes_of_block, x_at, _ = arguments
        return _add_products(builder, [sums], codes_of_block, x_at)[0]

    return Sums(decoder, Sums, codes, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def add_products_apart(typing_context: Any, decoder: Any, sums: Any, codes: Any, x_at: Any, units: Any) -> Any:
    """Like `add_products`, into two sums that need not wait for each other."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        apart = [builder.extract_value(arguments[1], half) for half in range(2)]
        if codes.dtype == ByteLanes:
            apart[0] = _add_whole_products(builder, signature.args[0].lanes, apart[0], *arguments[2:])
        else:
            apart = _add_products(builder, apart, *arguments[2:4])
        return context.make_tuple(builder, signature.return_type, apart)

    return types.UniTuple(Sums, 2)(decoder, types.UniTuple(Sums, 2), codes, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def keep_sums(typing_context: Any, sums: Any, address: Any) -> Any:
    """Sums to an address, 64 bytes of them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[0], builder.inttoptr(arguments[1], Sums.vector.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(Sums, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def kept_sums(typing_context: Any, address: Any) -> Any:
    """The sums at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return load(builder, arguments[0], Sums.vector)

    return Sums(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def both(typing_context: Any, sums: Any) -> Any:
    """Two sums as one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fadd(*(builder.extract_value(arguments[0], half) for half in range(2)))

    return Sums(types.UniTuple(Sums, 2)), generate


@intrinsic  # type: ignore[untyped-decorator]
def bytes_at(typing_context: Any, address: Any) -> Any:
    """64 bytes at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return load(builder, arguments[0], ByteLanes.vector)

    return ByteLanes(types.int64), generate


def prefetch(builder: Any, address: Any, for_writing: bool = False) -> None:
    """Ask for a line of memory, as data: for reading, into the second-level cache, or for writing, into the first."""
    pointer = builder.inttoptr(address, I8.as_pointer())
    flags = [ir.Constant(I32, flag) for flag in ((1, 3, 1) if for_writing else (0, 2, 1))]
    call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, *flags])


@intrinsic  # type: ignore[untyped-decorator]
def fetch(typing_context: Any, address: Any) -> Any:
    """Ask for a line of memory ahead of its use: processors don't look beyond a page, and a row is about one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        prefetch(builder, arguments[0])
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
        return dot_bytes(builder, *arguments)

    return IntSums(IntSums, ByteLanes, ByteLanes), generate


@intrinsic  # type: ignore[untyped-decorator]
def total_of(typing_context: Any, sums: Any) -> Any:
    """The 16 sums added up."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.args[0] == IntSums:
            return call(builder, "llvm.vector.reduce.add.v16i32", I32, [arguments[0]])
        zero = ir.Constant(F32, -0.0)
        return call(builder, "llvm.vector.reduce.fadd.v16f32", F32, [zero, arguments[0]], ("reassoc",))

    result = types.int32 if sums == IntSums else types.float32
    return result(sums), generate


@intrinsic  # type: ignore[untyped-decorator]
def store_totals(typing_context: Any, first: Any, second: Any, third: Any, fourth: Any, address: Any) -> Any:
    """Four times the 16 sums added up, to an address; all at once, which takes fewer steps."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *sums, address = arguments

        def folded(size: int, left: Any, right: Any | None = None) -> Any:
            """Of runs of so many sums, one half added to the other."""
            starts = range(0, left.type.count * (1 if right is None else 2), size)
            halves = [
                builder.shuffle_vector(
                    left, left if right is None else right, indices(start + k for start in starts for k in half)
                )
                for half in (range(size // 2), range(size // 2, size))
            ]
            return builder.add(*halves) if first == IntSums else builder.fadd(*halves)

        totals = folded(2, folded(4, folded(8, folded(16, *sums[:2]), folded(16, *sums[2:]))))
        builder.store(totals, builder.inttoptr(address, totals.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(*[first] * 4, types.int64), generate
