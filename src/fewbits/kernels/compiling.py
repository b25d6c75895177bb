"""What the compiled kernels share: how they are compiled, bits as floats and back, and rounding to a stored dtype.

bf16 comes in as uint16: NumPy has no such type, its order-preserving bits make maxima vectorize, and widening is a
shift. Half precision and fp32 weights come in as fp32. Kernels take NumPy arrays, and torch is not loaded here: a
checkpoint is quantized without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]

# Sums may be reordered into lanes and fused with products. Codes must not change by it: each is a product, rounded.
SUMS = {"reassoc", "nsz", "contract"}

Function = TypeVar("Function", bound=Callable[..., Any])


def entry(function: Function, fastmath: set[str] | bool = False) -> Function:
    """Compile what Python calls, on several threads at once; what was compiled is kept on disk."""
    return cast(Function, njit(cache=True, nogil=True, error_model="numpy", fastmath=fastmath)(function))


# What only compiled functions call needs no wrappers for Python, which take a sixth of all compiling.
_UNWRAPPED = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def inner(function: Function) -> Function:
    """Compile what only compiled functions call."""
    return cast(Function, njit(**_UNWRAPPED)(function))


def merged(function: Function, fastmath: set[str] | bool = False) -> Function:
    """Compile as `inner` does, but as a part of each function that calls it.

    What has fastmath has to be, and so has all between that and an entry: else there would be two of it, optimized once
    and twice, and a first run would take the one, runs that read from the disk the other, whose last bits differ.
    """
    return cast(Function, njit(fastmath=fastmath, forceinline=True, **_UNWRAPPED)(function))


def inlined(function: Function) -> Function:
    """Compile as if it were written out where it is called: for a few lines; numba takes long over more."""
    return cast(Function, njit(inline="always")(function))


@intrinsic  # type: ignore[untyped-decorator]
def as_float(typing_context: Any, bits: Any) -> Any:
    """The float32 whose bits these are."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic  # type: ignore[untyped-decorator]
def as_bits(typing_context: Any, value: Any) -> Any:
    """The bits of a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


def widen(value: Any) -> Any:
    """A weight as fp32, inside kernels: bf16 arrives as its uint16 bits, all else as fp32."""
    raise NotImplementedError


def magnitude_bits(value: Any) -> Any:
    """The bits of a weight's magnitude as fp32, inside kernels."""
    raise NotImplementedError


@overload(widen, inline="always", strict=False)  # type: ignore[untyped-decorator]
def _widen(value: Any) -> Any:
    if isinstance(value, types.Integer):
        return lambda value: as_float(np.uint32(value) << np.uint32(16))
    return lambda value: value


@overload(magnitude_bits, inline="always", strict=False)  # type: ignore[untyped-decorator]
def _magnitude_bits(value: Any) -> Any:
    if isinstance(value, types.Integer):
        return lambda value: np.uint32(np.uint32(value & np.uint16(0x7FFF)) << np.uint32(16))
    return lambda value: np.uint32(as_bits(value) & np.uint32(0x7FFFFFFF))


# How fp32 is rounded to a stored dtype by its bits: mantissa bits to drop, smallest normal, largest finite number.
ROUNDING = {
    "BF16": (16, np.float32(2.0**-126), np.float32(2.0**128 - 2.0**120)),
    "F16": (13, np.float32(2.0**-14), np.float32(65504.0)),
    "F32": (0, np.finfo(np.float32).tiny, np.finfo(np.float32).max),
}


@inlined
def stored_scale(scale: Any, dropped: Any, smallest: Any, largest: Any) -> Any:
    """`numerics.stored_scale` of a positive fp32 scale, without a branch: clamped, rounded half to even, 1 for 0."""
    shift = np.uint32(dropped)
    clamped = smallest if scale < smallest else scale
    clamped = largest if clamped > largest else clamped
    bits = as_bits(clamped)
    odd = np.uint32(np.uint32(bits >> shift) & np.uint32(1))
    half = np.uint32(np.uint32(np.uint32(1) << shift) >> np.uint32(1))
    rounded = np.uint32(bits + np.uint32(half - np.uint32(1)) + odd) if shift > 0 else bits
    stored = as_float(np.uint32(np.uint32(rounded >> shift) << shift))
    return np.float32(1.0) if scale == np.float32(0.0) else stored


@inner
def miss(x: Any, decoded: Any, inverse: Any) -> Any:
    """x − x̂ in units of the scale. Without fastmath: fused with the product, x̂ would not be rounded as decoders do."""
    return (x - decoded) * inverse


def weights_of(content: Array, dtype: str, columns: int) -> Array:
    """Raw bytes of rows as the kernels take them: bf16 as uint16, all else as fp32."""
    stored = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}[dtype]
    return content.view(stored).reshape(-1, columns).astype(np.uint16 if dtype == "BF16" else np.float32, copy=False)


def stored_bits(scales: Array, dtype: str) -> Array:
    """fp32 scales that `dtype` holds exactly, as they are stored; bf16 as uint16."""
    if dtype == "BF16":
        return (scales.view(np.uint32) >> 16).astype(np.uint16)
    return scales.astype(np.float16) if dtype == "F16" else scales


def as_numpy(tensor: torch.Tensor) -> Array:
    """A tensor's memory as NumPy sees it; bf16 as uint16, float8 as uint8."""
    import torch

    views = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}
    return tensor.view(views.get(tensor.dtype, tensor.dtype)).numpy()


def kernel_input(weight: torch.Tensor) -> Array:
    """Contiguous weights as the kernels take them: bf16 as uint16, all else as fp32."""
    import torch

    weight = weight.contiguous()
    return as_numpy(weight if weight.dtype == torch.bfloat16 else weight.to(torch.float32))


def total(per_row: Array) -> float:
    """Sum over rows in fp64, in one order whatever the number of threads."""
    return math.fsum(per_row.tolist())
