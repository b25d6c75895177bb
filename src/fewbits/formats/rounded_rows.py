"""Rows as the rounding kernels leave them: what formats pack without torch, made from weights that torch holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fewbits.errors import QuantizationError
from fewbits.schemes import Scheme

if TYPE_CHECKING:
    import torch

    from fewbits.kernels.rows import Array, RoundedRows
    from fewbits.tensors import QuantizedWeight


LARGEST_SCALE = 65504


def rows_of(weight: QuantizedWeight) -> RoundedRows:
    """The rows of an int weight with fp16 or fp32 scales; what they lost is not known here."""
    import numpy as np
    import torch

    from fewbits.kernels.rows import RoundedRows, is_channel_int8
    from fewbits.packing import flip_top_bit

    if weight.input_order is not None:
        raise ValueError("a weight in activation order is stored in no format")
    scheme, zeros = weight.method.scheme, weight.zero_points
    codes = weight.data.contiguous().view(torch.uint8)
    if scheme.bits == 8:
        zeros = None if zeros is None else flip_top_bit(zeros, torch.uint8)
        codes = codes if is_channel_int8(scheme) else flip_top_bit(codes, torch.uint8)
    scales: Array = weight.scales.numpy()
    if scales.dtype not in (np.float16, np.float32):
        raise ValueError(f"scales are {scales.dtype}")
    return RoundedRows(codes.numpy(), scales, None if zeros is None else zeros.numpy(), float("nan"), float("nan"))


def check_scales(module: str, scales: Array) -> None:
    """Refuse fp16 scales that were cut down to the largest number there is."""
    import numpy as np

    if scales.dtype == np.float16 and bool((np.abs(scales) >= LARGEST_SCALE).any()):
        raise QuantizationError(
            f"{module}: weights this large need a scale beyond {LARGEST_SCALE:,}, the largest of fp16, "
            "in which this format stores scales.",
            "--format compressed-tensors stores scales in the checkpoint's own dtype",
        )


def words_of(rows: RoundedRows, scheme: Scheme) -> Array:
    """Unsigned codes as little-endian words, uint32 [R, K·bits/32]; rows fill whole words."""
    import numpy as np

    from fewbits.kernels.rows import is_channel_int8

    codes = rows.codes.view(np.uint8)
    codes = codes ^ np.uint8(0x80) if is_channel_int8(scheme) else codes
    return np.ascontiguousarray(codes).view(np.uint32)


def pack_along(codes: Array, bits: int) -> Array:
    """`packing.pack_rows` without torch: uint8 codes [R, C] to uint32 [R, ceil(C·bits/32)]."""
    import numpy as np

    rows, columns = codes.shape
    # Eight codes fill `bits` bytes, whatever the width.
    eights = -(-columns // 32) * 4
    padded = np.zeros((rows, eights * 8), np.uint8)
    padded[:, :columns] = codes
    fields = padded.reshape(rows, eights, 8)
    streams = np.zeros((rows, eights), np.uint64)
    for index in range(8):
        streams |= fields[:, :, index].astype(np.uint64) << np.uint64(index * bits)
    packed = streams.view(np.uint8).reshape(rows, eights, 8)[:, :, :bits].reshape(rows, -1)
    words: Array = np.ascontiguousarray(packed).view(np.uint32)[:, : -(-columns * bits // 32)]
    return words


def as_tensors(arrays: dict[str, Array]) -> dict[str, torch.Tensor]:
    """Stored arrays as the tensors that files hold: words as int32."""
    import numpy as np
    import torch

    signed = {name: array.view(np.int32) if array.dtype == np.uint32 else array for name, array in arrays.items()}
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in signed.items()}
