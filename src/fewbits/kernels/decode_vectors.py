"""A vector of 32 codes decoded to bf16, in the order that files hold them, scaled on the way.

Codes of up to 5 bits are looked up: a table holds the 32 bf16 numbers that they can stand for in one group, and bits
above a code's own pick a repetition of it. float8 is looked up byte by byte where the processor can.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fewbits.kernels.decoders import FP8, INT8, byte_values
from fewbits.kernels.lanes import (
    CODES,
    F32,
    HAS_BYTE_TABLES,
    I8,
    LANES,
    Bf16Lanes,
    ByteLanes,
    call,
    halves_of,
    indices,
    load,
    rounded,
    splat,
    spread,
)

# Codes up to so many bits are looked up in one register.
TABLE_BITS = 5


def vector_bytes(kind: str) -> int:
    """Bytes of 32 codes."""
    return CODES if kind in (FP8, INT8) else CODES // 8 * int(kind)


def _scaled(builder: Any, codes: list[Any], scale: Any, zero: Any) -> Any:
    """(code − zero) · scale of two vectors of codes as fp32."""
    scales, zeros = spread(builder, scale), spread(builder, zero)
    halves = [builder.fmul(builder.fsub(half, zeros), scales) for half in codes]
    return rounded(builder, halves)


@intrinsic  # type: ignore[untyped-decorator]
def table_of(typing_context: Any, decoder: Any, scale: Any, zero: Any) -> Any:
    """What the codes of a group stand for; nothing for kinds that are not looked up so."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0].kind
        if kind in (FP8, INT8) or int(kind) > TABLE_BITS:
            return ir.Constant(Bf16Lanes.vector, None)
        codes = [float(entry % 2 ** int(kind)) for entry in range(CODES)]
        halves = [ir.Constant(ir.VectorType(F32, LANES), codes[at : at + LANES]) for at in (0, LANES)]
        return _scaled(builder, halves, arguments[1], arguments[2])

    return Bf16Lanes(decoder, types.float32, types.float32), generate


def _fields(builder: Any, address: Any, bits: int) -> Any:
    """32 codes in the low bits of words, with bits of their neighbours above."""
    stored = load(builder, address, ir.VectorType(I8, CODES // 8 * bits))
    last = stored.type.count - 1
    windows = [byte for k in range(CODES) for byte in (k * bits // 8, min(k * bits // 8 + 1, last))]
    words = builder.bitcast(builder.shuffle_vector(stored, stored, indices(windows)), Bf16Lanes.vector)
    return builder.lshr(words, ir.Constant(Bf16Lanes.vector, [k * bits % 8 for k in range(CODES)]))


def _fp8(builder: Any, address: Any) -> Any:
    """float8 as bf16, exactly."""
    stored = load(builder, address, ir.VectorType(I8, CODES))
    if HAS_BYTE_TABLES:
        lane = ByteLanes.vector
        twice = builder.shuffle_vector(stored, stored, indices(k // 2 for k in range(2 * CODES)))
        values, found = byte_values(FP8), []
        for shift in (0, 8):
            entries = [value >> shift & 255 for value in values[:128]]
            tables = [ir.Constant(lane, entries[at : at + 64]) for at in (0, 64)]
            found.append(call(builder, "llvm.x86.avx512.vpermi2var.qi.512", lane, [tables[0], twice, tables[1]]))
        both = builder.shuffle_vector(*found, indices(k + 64 * (k % 2) for k in range(64)))
        sign = builder.and_(twice, ir.Constant(lane, [0, 0x80] * CODES))
        return builder.bitcast(builder.or_(both, sign), Bf16Lanes.vector)
    wide = builder.zext(stored, Bf16Lanes.vector)
    magnitude = builder.and_(builder.shl(wide, splat(wide.type, 7)), splat(wide.type, 0x3F80))
    sign = builder.and_(builder.shl(wide, splat(wide.type, 8)), splat(wide.type, 0x8000))
    # In a half's bits, the value is 2^-8 of what it should be.
    half = builder.bitcast(builder.or_(magnitude, sign), ir.VectorType(ir.HalfType(), CODES))
    full = builder.fpext(half, ir.VectorType(F32, CODES))
    return rounded(builder, halves_of(builder, builder.fmul(full, ir.Constant(full.type, [256.0] * CODES))))


@intrinsic  # type: ignore[untyped-decorator]
def decode_vector(
    typing_context: Any, decoder: Any, address: Any, table: Any, scale: Any, zero: Any, out_at: Any
) -> Any:
    """32 codes at an address to bf16 at another: (code − zero) · scale, or by the table; float8 as it is."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0].kind
        _, address, table, scale, zero, out_at = arguments
        if kind == FP8:
            found = _fp8(builder, address)
        elif kind == INT8:
            stored = load(builder, address, ir.VectorType(I8, CODES))
            found = _scaled(builder, halves_of(builder, builder.sitofp(stored, ir.VectorType(F32, CODES))), scale, zero)
        elif int(kind) <= TABLE_BITS:
            found = call(
                builder, "llvm.x86.avx512.permvar.hi.512", Bf16Lanes.vector,
                [table, _fields(builder, address, int(kind))],
            )  # fmt: skip
        else:
            codes = builder.and_(_fields(builder, address, int(kind)), splat(Bf16Lanes.vector, 2 ** int(kind) - 1))
            found = _scaled(builder, halves_of(builder, builder.uitofp(codes, ir.VectorType(F32, CODES))), scale, zero)
        builder.store(found, builder.inttoptr(out_at, Bf16Lanes.vector.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.none(decoder, types.int64, Bf16Lanes, types.float32, types.float32, types.int64), generate
