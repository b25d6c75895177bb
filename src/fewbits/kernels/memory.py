"""Memory inside compiled C functions: numbers at addresses, in the dtypes that weights and activations come in."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from fewbits.kernels.compiling import as_bits, as_float, inlined, inner

# How numbers are stored.
FLOAT32, BFLOAT16, FLOAT16, FLOAT8 = 0, 1, 2, 3


@intrinsic  # type: ignore[untyped-decorator]
def half_as_float(typing_context: Any, bits: Any) -> Any:
    """The fp32 value of a half by its bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic  # type: ignore[untyped-decorator]
def float_as_half(typing_context: Any, value: Any) -> Any:
    """The bits of an fp32 number rounded to a half."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def pointer_to(typing_context: Any, address: Any) -> Any:
    """An address as a pointer, for carray."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def copy_bytes(typing_context: Any, target: Any, source: Any, count: Any) -> Any:
    """Bytes from one address to another; they don't overlap."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        target, source = (builder.inttoptr(address, pointer) for address in arguments[:2])
        cgutils.raw_memcpy(builder, target, source, arguments[2], 1)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64), generate


@inlined
def copy_numbers(target: Any, source: Any) -> None:
    """Numbers of `source` over those of `target`, [n] both. Assigning slices takes seconds to compile: its errors."""
    for k in range(len(target)):
        target[k] = source[k]


@inlined
def copy_matrix(target: Any, source: Any) -> None:
    """Numbers of `source` over those of `target`, [rows, columns] both."""
    for row in range(len(target)):
        for column in range(target.shape[1]):
            target[row, column] = source[row, column]


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def on_stack(typing_context: Any, size: Any) -> Any:
    """The address of so many bytes, a constant, of the calling function's own; an array takes 50 ns."""
    if not isinstance(size, types.Literal):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bytes_ = cgutils.alloca_once(builder, ir.ArrayType(ir.IntType(8), size.literal_value))
        bytes_.align = 64
        return builder.ptrtoint(bytes_, ir.IntType(64))

    return types.int64(size), generate


@inlined
def as_bf16(value: Any) -> Any:
    """The bits of an fp32 number rounded to bf16, half to even; NaN stays NaN."""
    # Each step is cut to 32 bits: the compiler's integers are 64 bits wide, and half as many fit a vector.
    bits = as_bits(value)
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF)) + odd)
    is_number = np.uint32(bits & np.uint32(0x7FFFFFFF)) <= np.uint32(0x7F800000)
    kept = rounded if is_number else np.uint32(bits | np.uint32(0x400000))
    return np.uint16(np.uint32(kept >> np.uint32(16)))


@inlined
def number_at(address: Any, index: Any, kind: Any) -> Any:
    """One stored number as fp32."""
    if kind == BFLOAT16:
        return as_float(np.uint32(carray(pointer_to(address), (index + 1,), np.uint16)[index]) << np.uint32(16))
    if kind == FLOAT16:
        return half_as_float(carray(pointer_to(address), (index + 1,), np.uint16)[index])
    return carray(pointer_to(address), (index + 1,), np.float32)[index]


@inlined
def write(address: Any, index: Any, kind: Any, value: Any) -> None:
    """One output in the activations' dtype."""
    if kind == BFLOAT16:
        carray(pointer_to(address), (index + 1,), np.uint16)[index] = as_bf16(value)
    elif kind == FLOAT16:
        carray(pointer_to(address), (index + 1,), np.uint16)[index] = float_as_half(value)
    else:
        carray(pointer_to(address), (index + 1,), np.float32)[index] = value


@inner
def write_all(address: Any, first: Any, kind: Any, values: Any) -> None:
    """Outputs in the activations' dtype, from place `first` on."""
    if kind == FLOAT32:
        wide = carray(pointer_to(address + 4 * first), (values.size,), np.float32)
        for k in range(values.size):
            wide[k] = values[k]
        return
    narrow = carray(pointer_to(address + 2 * first), (values.size,), np.uint16)
    if kind == BFLOAT16:
        for k in range(values.size):
            narrow[k] = as_bf16(values[k])
    else:
        for k in range(values.size):
            narrow[k] = float_as_half(values[k])
