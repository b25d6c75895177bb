"""The two containers of quantized numbers: a flat tensor (building blocks) and a linear's weight (models).

They compare by identity: comparing tensors has no single answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewbits.methods import QuantMethod
from fewbits.packing import decode_codes, flip_top_bit, pack_rows, unpack_rows


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Numbers quantized as one flat run.

    data: int8 [n] at 8-bit int, float8_e4m3fn [n] at fp8, uint8 [ceil(n / 2)] at 4 bits (first code in the low nibble).
    scale: float32, [] for one scale over all, [groups] per group.
    zero_point: int32 of the same shape; 0 where the scheme is symmetric.
    num_elements: how many numbers `data` stands for. bits: width of a code. group_size: 0 is one scale over all.
    """

    data: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    num_elements: int
    bits: int
    group_size: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the codes."""
        return self.data.numel() * self.data.element_size()

    @property
    def fp16_size_bytes(self) -> int:
        """Bytes the same numbers take in fp16."""
        return 2 * self.num_elements

    @property
    def compression_ratio(self) -> float:
        """fp16 bytes / code bytes; 0.0 for empty data."""
        return self.fp16_size_bytes / self.size_bytes if self.size_bytes else 0.0


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A linear's weight [out, in] in the form that kernels run on and formats write.

    data: int8 [out, in] signed codes at 8-bit int; float8_e4m3fn [out, in]; below 8 bits int32 [out, ceil(in·bits/32)],
        each row a little-endian stream of unsigned codes.
    scales: [out, groups], in the dtype that is stored on disk.
    zero_points: None if symmetric; else [out, groups]: int8 signed at 8 bits, uint8 unsigned below.
    W = (code − zero) · scale, where a symmetric code below 8 bits has zero 2^(bits−1), and at 8 bits 0.
    group_size: input channels per scale; 0 is per channel.
    input_order: int64 [in]: column j of the codes (and of the groups) is input channel input_order[j] of the model, as
        activation order leaves it; None where the columns are in the model's order.
    """

    data: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None
    shape: tuple[int, int]
    method: QuantMethod
    group_size: int
    input_order: torch.Tensor | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        parts = (self.data, self.scales, *(() if self.zero_points is None else (self.zero_points,)))
        return sum(part.numel() * part.element_size() for part in parts)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Decode to [out, in], inputs in the model's order: fp32, rounded once to `dtype` (the scales' by default)."""
        return decode(self).to(dtype or self.scales.dtype)


def seal(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, method: QuantMethod) -> QuantizedWeight:
    """Put a solver's codes into the form that kernels run on and formats write.

    Args:
        codes: uint8 [N, K], unsigned; float8_e4m3fn for fp8; int8 signed codes are taken as they are at 8 bits.
        scales: [N, G] in the stored dtype. zeros: uint8 [N, G], unsigned; None if symmetric.
    """
    shape = (codes.shape[0], codes.shape[1])
    if method.scheme.bits < 8:
        codes = pack_rows(codes, method.scheme.bits)
    return seal_packed(codes, scales, zeros, shape, method)


def seal_packed(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    shape: tuple[int, int],
    method: QuantMethod,
) -> QuantizedWeight:
    """`seal` for codes that are packed already where they are narrower than 8 bits."""
    if codes.dtype == torch.uint8:
        codes = flip_top_bit(codes, torch.int8)
        zeros = None if zeros is None else flip_top_bit(zeros, torch.int8)
    return QuantizedWeight(codes, scales, zeros, shape, method, method.scheme.group_size)


def open_codes(weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Inverse of `seal`: codes (uint8 unsigned, or float8), scales, zeros (uint8 unsigned, or None)."""
    scheme = weight.method.scheme
    if scheme.kind == "float":
        return weight.data, weight.scales, None
    if scheme.bits == 8:
        zeros = None if weight.zero_points is None else flip_top_bit(weight.zero_points, torch.uint8)
        return flip_top_bit(weight.data, torch.uint8), weight.scales, zeros
    return unpack_rows(weight.data, scheme.bits, weight.shape[1]), weight.scales, weight.zero_points


def decode(weight: QuantizedWeight) -> torch.Tensor:
    """W = (code − zero) · scale in fp32, [N, K], inputs in the model's order."""
    codes, scales, zeros = open_codes(weight)
    values = decode_codes(codes, scales, zeros, weight.method.scheme)
    if weight.input_order is None:
        return values
    restored = torch.empty_like(values)
    restored[:, weight.input_order] = values
    return restored
