"""Rows of a stored weight to the bytes that files hold, in the calling thread, without torch where Numba is.

Numba takes long to import. It comes with the first weight that is rounded, so that other threads can carry tensors over
meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from fewbits.layout import torch_dtype
from fewbits.schemes import Scheme
from fewbits.search import Search

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]
# Bits of floats as integers, without and with a sign, and those of infinity; a NaN's are larger.
BITS = {
    "BF16": (np.uint16, np.int16, 0x7F80), "F16": (np.uint16, np.int16, 0x7C00),
    "F32": (np.uint32, np.int32, 0x7F800000),
}  # fmt: skip


@dataclass(frozen=True)
class RoundedRows:
    """Rows of a weight after rounding, as bytes.

    codes: uint8 [R, bytes of a row]: int8 codes, bits of float8 e4m3fn, or little-endian words of unsigned codes.
    scales: [R, G] in the stored dtype; bf16 as its bits, uint16. zeros: uint8 [R, G], unsigned; None if symmetric.
    squared_error: Σ (W − Ŵ)². squared_norm: Σ W²; NaN if some W is not finite.
    """

    codes: Array
    scales: Array
    zeros: Array | None
    squared_error: float
    squared_norm: float

    @property
    def nonfinite(self) -> bool:
        return self.squared_norm != self.squared_norm


def is_channel_int8(scheme: Scheme) -> bool:
    """Whether codes are signed bytes, as the channel kernel leaves them, and not words."""
    return scheme.kind == "int" and scheme.bits == 8 and scheme.symmetric and scheme.group_size == 0


def code_bytes(scheme: Scheme, columns: int) -> int:
    """Bytes of the codes of one row."""
    if scheme.kind == "float" or is_channel_int8(scheme):
        return columns
    return -(-columns * scheme.bits // 32) * 4


def round_tile(
    content: Array, dtype: str, columns: int, scheme: Scheme, search: Search, scale_dtype: str, out: Array
) -> RoundedRows:
    """Round whole rows to a scheme's grid.

    Args:
        content: their bytes, uint8, as stored in `dtype` (BF16, F16 or F32). scale_dtype: what scales are stored in.
        out: uint8, where codes go.
    """
    rows = content.size // (np.dtype(BITS[dtype][0]).itemsize * columns)
    width = code_bytes(scheme, columns)
    codes = out[: rows * width].reshape(rows, width)
    if not _is_compiled():
        return _portable(content, dtype, columns, scheme, search, scale_dtype, codes)
    from fewbits.kernels import channels, groups
    from fewbits.kernels.compiling import stored_bits, weights_of

    weight = weights_of(content, dtype, columns)
    zeros = None
    if scheme.kind == "float":
        scales, error, norm = channels.round_rows_fp8(weight, scale_dtype, codes)
    elif is_channel_int8(scheme):
        scales, error, norm = channels.round_rows_int8(weight, scale_dtype, codes.view(np.int8))
    else:
        scales, zeros, error, norm = groups.round_rows_groups(weight, scale_dtype, scheme, search, codes)
    return RoundedRows(codes, stored_bits(scales, scale_dtype), None if scheme.symmetric else zeros, error, norm)


@cache
def _is_compiled() -> bool:
    """Whether Numba can be imported."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


def holds_nonfinite(content: Array, dtype: str) -> bool:
    """Whether raw bytes of the given dtype hold a NaN or an infinity.

    In the order of integers with a sign, positive ones come last; without, negative ones do.
    """
    if dtype not in BITS or content.size == 0:
        return False
    unsigned, signed, infinity = BITS[dtype]
    sign = 1 << (8 * np.dtype(unsigned).itemsize - 1)
    return bool(content.view(signed).max() >= infinity or content.view(unsigned).max() >= sign | infinity)


def _portable(
    content: Array, dtype: str, columns: int, scheme: Scheme, search: Search, scale_dtype: str, codes: Array
) -> RoundedRows:
    import torch

    from fewbits.kernels.rounding import round_rows

    weight = torch.from_numpy(content).view(torch_dtype(dtype)).view(-1, columns)
    rounded = round_rows(weight, scheme, search, scale_dtype=torch_dtype(scale_dtype), compiled=False)
    found = _bytes(rounded.codes)
    codes[:, : found.shape[1]] = found
    codes[:, found.shape[1] :] = 0
    stored = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}[scale_dtype]
    scales = _bytes(rounded.scales).view(stored)
    zeros = None if rounded.zeros is None else rounded.zeros.numpy()
    norm = float("nan") if rounded.nonfinite else rounded.squared_norm
    return RoundedRows(codes, scales, zeros, rounded.squared_error, norm)


def _bytes(tensor: torch.Tensor) -> Array:
    import torch

    found: Array = tensor.contiguous().view(torch.uint8).numpy()
    return found
