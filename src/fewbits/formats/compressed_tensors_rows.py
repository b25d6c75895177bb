"""Rounded rows as compressed-tensors stores them, without torch. `compressed_tensors.encode` is its oracle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fewbits.formats.compressed_tensors_config import PACKED, format_of
from fewbits.schemes import Scheme

if TYPE_CHECKING:
    import numpy as np

    from fewbits.kernels.rows import RoundedRows

    Array = np.ndarray[Any, Any]


def encode_rows(
    module: str, rows: RoundedRows, scheme: Scheme, shape: tuple[int, int], first_row: int
) -> dict[str, Array]:
    """The stored tensors of a tile of rows, by full name. Tiles come in order, cut as `encode` asks for.

    Args:
        shape: [out, in] of the whole weight.
    """
    import numpy as np

    from fewbits.kernels.rows import is_channel_int8

    if format_of(scheme) != PACKED:
        return {f"{module}.weight": rows.codes, f"{module}.weight_scale": rows.scales}
    codes = _words_of_bytes(rows.codes) if is_channel_int8(scheme) else rows.codes
    encoded = {f"{module}.weight_packed": codes, f"{module}.weight_scale": rows.scales}
    if first_row == 0:
        encoded[f"{module}.weight_shape"] = np.array(shape, np.int64)
    if rows.zeros is not None:
        encoded[f"{module}.weight_zero_point"] = pack_down(rows.zeros, scheme.bits)
    return encoded


def _words_of_bytes(codes: Array) -> Array:
    """Signed codes as unsigned ones, rows padded with zeros to whole words."""
    import numpy as np

    words = np.zeros((codes.shape[0], -(-codes.shape[1] // 4) * 4), np.uint8)
    np.bitwise_xor(codes, np.uint8(0x80), out=words[:, : codes.shape[1]])
    return words


def pack_down(codes: Array, bits: int) -> Array:
    """Pack uint8 codes [R, C] of 1, 2, 4 or 8 bits down each column: uint32 [ceil(R·bits/32), C]."""
    import numpy as np

    fields = 32 // bits
    words, columns = -(-codes.shape[0] // fields), codes.shape[1]
    padded = np.zeros((words * fields, columns), np.uint32)
    padded[: codes.shape[0]] = codes
    shifts = np.arange(fields, dtype=np.uint32)[None, :, None] * np.uint32(bits)
    packed: Array = np.bitwise_or.reduce(padded.reshape(words, fields, columns) << shifts, axis=1)
    return packed
