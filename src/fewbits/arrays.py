"""Building blocks on plain arrays: quantize and dequantize a run of numbers, pack nibbles, estimate sizes.

All take torch tensors, NumPy arrays or sequences of numbers, of any shape, and work on them as one flat run in fp32.
What comes back is on the CPU.
"""

from __future__ import annotations

import numbers

import torch

from fewbits.errors import QuantizationError
from fewbits.flat import Values, finite_run, number_run, whole_number
from fewbits.methods import QuantMethod
from fewbits.tensors import QuantizedTensor

INT8_LIMIT = 127
INT4_LEVELS = 15
FP8_LIMIT = 448.0
# Below the smallest normal number a scale has too few bits to divide by.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def quantize_int8_symmetric(values: Values) -> QuantizedTensor:
    """Quantize to int8 with one scale: max|v| / 127, codes rounded half to even within ±127.

    Raises:
        QuantizationError: no values, or one that is NaN or infinite.

    >>> quantize_int8_symmetric([-1.0, 0.5, 0.25]).data.tolist()
    [-127, 64, 32]
    """
    flat = finite_run(values)
    scale = _symmetric_scale(flat, INT8_LIMIT)
    codes = (flat / scale).round().clamp(-INT8_LIMIT, INT8_LIMIT).to(torch.int8)
    return QuantizedTensor(codes, scale, torch.zeros((), dtype=torch.int32), flat.numel(), 8, 0)


def dequantize_int8_symmetric(t: QuantizedTensor) -> torch.Tensor:
    """Codes × scale, fp32 [n]. Raises QuantizationError for a tensor of another width."""
    _expect(t, 8, torch.int8)
    return _decoded(t.data, t.scale)


def quantize_int4_asymmetric(values: Values, group_size: int) -> QuantizedTensor:
    """Quantize to 4 bits with a scale and an integer zero point for each run of `group_size` values.

    scale = (max − min) / 15 over the group and zero; the last group may be shorter. Two codes to a byte, the first in
    the low nibble. Every value comes back within half a step of its group.

    Raises:
        QuantizationError: no values, a value that is NaN or infinite, or a group size of 0 or less.

    >>> quantize_int4_asymmetric([0.0, 1.0, 15.0], 3).data.tolist()
    [16, 15]
    """
    group_size = whole_number("group_size", group_size, at_least=1)
    flat = finite_run(values)
    count = flat.numel()
    size = min(group_size, count)
    groups = -(-count // size)
    # Zeros lie inside every range, so padding changes no group's grid.
    padded = torch.zeros(groups * size, dtype=torch.float64)
    padded[:count] = flat
    grouped = padded.view(groups, size)
    low, high = grouped.amin(1).clamp_max(0), grouped.amax(1).clamp_min(0)
    scale, zero = _covering_grid(low, high)
    codes = (grouped / scale.double()[:, None]).round() + zero[:, None]
    nibbles = codes.clamp(0, INT4_LEVELS).to(torch.uint8).view(-1)[:count]
    return QuantizedTensor(_pack_nibbles(nibbles), scale, zero.to(torch.int32), count, 4, group_size)


def _covering_grid(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale (fp32) and zero point of each group, such that both ends lie within half a step of a code."""
    spread = high - low
    ideal = (spread / INT4_LEVELS).clamp_min(SMALLEST_SCALE)
    scale = torch.where(spread == 0, torch.ones_like(spread), ideal).to(torch.float32)
    # Rounding to fp32 may leave the grid a hair too short.
    short = scale.double() * INT4_LEVELS < spread
    scale = torch.where(short, torch.nextafter(scale, torch.tensor(torch.inf)), scale)
    zero = (-low / scale.double()).round().clamp(0, INT4_LEVELS)
    return scale, zero


def dequantize_int4_asymmetric(t: QuantizedTensor) -> torch.Tensor:
    """(code − zero point) × scale, fp32 [n]. Raises QuantizationError for a tensor of another width."""
    _expect(t, 4, torch.uint8)
    size = min(t.group_size, t.num_elements) or t.num_elements
    groups = -(-t.num_elements // size) if size else 0
    scale, zero = torch.as_tensor(t.scale).reshape(-1), torch.as_tensor(t.zero_point).reshape(-1)
    if t.group_size < 0 or scale.numel() != groups or zero.numel() != groups:
        raise QuantizationError(
            f"{t.num_elements} codes in groups of {t.group_size} need {groups} scales and zero points, "
            f"got {scale.numel()} and {zero.numel()}"
        )
    codes = _unpack_nibbles(t.data, t.num_elements).to(torch.int32)
    group = torch.arange(t.num_elements) // max(size, 1)
    return _decoded(codes - zero[group], scale[group])


def quantize_fp8_e4m3(values: Values) -> QuantizedTensor:
    """Quantize to float8 e4m3fn with one scale: max|v| / 448, nearest even, saturating.

    Raises:
        QuantizationError: no values, or one that is NaN or infinite.
    """
    flat = finite_run(values)
    scale = _symmetric_scale(flat, FP8_LIMIT)
    codes = (flat / scale).clamp(-FP8_LIMIT, FP8_LIMIT).to(torch.float8_e4m3fn)
    return QuantizedTensor(codes, scale, torch.zeros((), dtype=torch.int32), flat.numel(), 8, 0)


def dequantize_fp8_e4m3(t: QuantizedTensor) -> torch.Tensor:
    """Codes × scale, fp32 [n]. Raises QuantizationError for a tensor of another kind."""
    _expect(t, 8, torch.float8_e4m3fn)
    return _decoded(t.data, t.scale)


def smooth_quant_scales(weight_abs_max: Values, activation_abs_max: Values, alpha: float) -> torch.Tensor:
    """SmoothQuant's scale of each channel: max|X|^α / max|W|^(1−α), fp32, positive and finite.

    1 where the weight or the activation of a channel is all zero. Source: Xiao et al. 2022, arXiv 2211.10438, eq. 4.

    Raises:
        QuantizationError: lengths differ, values are negative or not finite, or alpha is outside [0, 1].
    """
    if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real) or not 0.0 <= alpha <= 1.0:
        raise QuantizationError(f"SmoothQuant alpha must be in [0.0, 1.0], got {alpha!r}")
    alpha = float(alpha)
    weight, activation = finite_run(weight_abs_max).double(), finite_run(activation_abs_max).double()
    if weight.numel() != activation.numel():
        raise QuantizationError(
            f"weight and activation dimensions must match: {weight.numel()} weight channels, "
            f"{activation.numel()} activation channels"
        )
    for name, maxima in (("weight", weight), ("activation", activation)):
        if bool((maxima < 0).any()):
            raise QuantizationError(f"{name} maxima must not be negative, got {maxima.min().item()}")
    limits = torch.finfo(torch.float32)
    scales = (activation**alpha / weight ** (1 - alpha)).clamp(limits.tiny, limits.max)
    silent = (weight == 0) | (activation == 0)
    return torch.where(silent, torch.ones_like(scales), scales).to(torch.float32)


def pack_int4(codes: Values) -> torch.Tensor:
    """Pack signed codes −8 to 7, two to a byte, low nibble first: uint8 [ceil(n / 2)], padded with zero.

    >>> pack_int4([1, -1, 7]).tolist()
    [241, 7]
    """
    given = number_run(codes)
    outside = torch.nonzero((given < -8) | (given > 7) | (given != given.round()))
    if outside.numel():
        index = int(outside[0])
        raise QuantizationError(f"codes must be whole numbers from -8 to 7, got {given[index].item():g} at {index}")
    return _pack_nibbles(given.to(torch.int8).view(torch.uint8) & 0xF)


def unpack_int4(packed: Values, num_elements: int) -> torch.Tensor:
    """Unpack signed codes: int8 [num_elements], sign-extended.

    >>> unpack_int4([241, 7], 3).tolist()
    [1, -1, 7]
    """
    given = number_run(packed)
    num_elements = whole_number("num_elements", num_elements, at_least=1)
    if given.numel() != -(-num_elements // 2):
        raise QuantizationError(
            f"{num_elements} codes take {-(-num_elements // 2)} bytes, got {given.numel()}", "check num_elements"
        )
    outside = torch.nonzero((given < 0) | (given > 255) | (given != given.round()))
    if outside.numel():
        index = int(outside[0])
        raise QuantizationError(f"packed codes must be bytes, 0 to 255, got {given[index].item():g} at {index}")
    nibbles = _unpack_nibbles(given.to(torch.uint8), num_elements).to(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


def estimate_memory_savings(num_params: int, method: QuantMethod) -> tuple[int, int]:
    """(fp16 bytes, bytes of the codes alone) of `num_params` weights; `fewbits.plan` has the exact figure of a model.

    >>> from fewbits.methods import Int4Asymmetric
    >>> estimate_memory_savings(1_000_000, Int4Asymmetric())
    (2000000, 500000)
    """
    num_params = whole_number("num_params", num_params, at_least=0)
    if not isinstance(method, QuantMethod):
        raise QuantizationError(f"expected a method, got {method!r}", "for example fewbits.Int4Asymmetric()")
    method.validate()
    return 2 * num_params, -(-num_params * method.bits_per_weight // 8)


def _symmetric_scale(flat: torch.Tensor, limit: float) -> torch.Tensor:
    """max|v| / limit in fp32, 1 if all are zero, never below the smallest normal number."""
    largest = flat.abs().max()
    if largest == 0:
        return torch.ones((), dtype=torch.float32)
    return (largest / limit).clamp_min(SMALLEST_SCALE)


def _expect(t: QuantizedTensor, bits: int, dtype: torch.dtype) -> None:
    """Raise QuantizationError unless `t` holds whole data of this width."""
    if not isinstance(t, QuantizedTensor):
        raise QuantizationError(f"expected a QuantizedTensor, got {type(t).__name__}")
    if t.bits != bits:
        raise QuantizationError(f"expected {bits}-bit tensor, got {t.bits}-bit")
    if t.data.dtype != dtype:
        raise QuantizationError(f"expected codes in {dtype}, got {t.data.dtype}")
    stored = -(-t.num_elements * bits // 8)
    if t.num_elements < 0 or t.data.numel() != stored:
        raise QuantizationError(f"{t.num_elements} codes of {bits} bits take {stored} bytes, got {t.data.numel()}")


def _decoded(codes: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Codes × scale in fp32, kept finite: the half step that rounding may add must not leave the range of fp32."""
    limit = torch.finfo(torch.float32).max
    return (codes.to(torch.float64) * scale).clamp_(-limit, limit).to(torch.float32)


def _pack_nibbles(nibbles: torch.Tensor) -> torch.Tensor:
    if nibbles.numel() % 2:
        nibbles = torch.cat([nibbles, nibbles.new_zeros(1)])
    return nibbles[0::2] | (nibbles[1::2] << 4)


def _unpack_nibbles(packed: torch.Tensor, count: int) -> torch.Tensor:
    return torch.stack([packed & 0xF, packed >> 4], dim=1).reshape(-1)[:count]
