"""Flat runs of numbers: what the building blocks accept, brought to one form, or refused with what was found."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fewbits.errors import QuantizationError

# NumPy's kinds: text, bytes, truth values, complex numbers, dates.
NO_NUMBERS = "SUbcMm"

Values = torch.Tensor | np.ndarray[Any, Any] | Sequence[float]


def finite_run(values: Values) -> torch.Tensor:
    """Values of any shape as one fp32 run on the CPU.

    Raises:
        QuantizationError: no numbers, no values, or one that is NaN, infinite or too large for fp32.
    """
    flat = number_run(values)
    single = flat.to(torch.float32)
    bad = torch.nonzero(~torch.isfinite(single))
    if bad.numel():
        index = int(bad[0])
        found = flat[index].item()
        why = ", which fp32 cannot hold," if math.isfinite(found) else ""
        raise QuantizationError(f"expected finite values, got {found}{why} at index {index}")
    return single


def number_run(values: Values) -> torch.Tensor:
    """Values of any shape as one run on the CPU: fp32 where that is exact for the dtype, else fp64."""
    flat = _of_tensor(values) if isinstance(values, torch.Tensor) else _of_array(values)
    if flat.numel() == 0:
        raise QuantizationError("empty values: expected at least one number")
    return flat


def whole_number(name: str, value: object, *, at_least: int) -> int:
    """A whole number (Python's or NumPy's) as an int.

    Raises:
        QuantizationError: it is none, or less than `at_least`.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None:
        raise QuantizationError(f"{name} must be a whole number, got {value!r:.80}")
    if number < at_least:
        bound = "> 0" if at_least == 1 else f"{at_least} or more"
        raise QuantizationError(f"{name} must be {bound}, got {number}")
    return number


def _of_tensor(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex() or tensor.dtype == torch.bool or tensor.is_quantized:
        raise QuantizationError(f"expected real numbers, got a tensor of {tensor.dtype}")
    if tensor.layout != torch.strided or tensor.is_meta:
        kind = "tensor without data (meta)" if tensor.is_meta else f"{tensor.layout} tensor"
        raise QuantizationError(f"expected a dense tensor with data, got a {kind}")
    flat = tensor.detach().cpu().reshape(-1)
    # Every float narrower than fp64 is exact in fp32; whole numbers need not be.
    return flat.to(torch.float32 if flat.is_floating_point() and flat.dtype != torch.float64 else torch.float64)


def _of_array(values: object) -> torch.Tensor:
    try:
        array = np.asarray(values)
        if array.dtype.kind in NO_NUMBERS or (array.dtype.kind == "O" and not _all_real(array)):
            raise QuantizationError(f"expected real numbers, got {_found(values, array)}")
        if np.ma.is_masked(values):
            raise QuantizationError("expected numbers, got an array with masked values; fill or drop them first")
        # A copy of its own: torch takes neither read-only arrays nor negative strides.
        with np.errstate(over="ignore"):
            return torch.from_numpy(np.array(array, dtype=np.float64, order="C").reshape(-1))
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise QuantizationError(f"expected numbers, got {type(values).__name__}: {error}") from error


def _all_real(array: np.ndarray[Any, Any]) -> bool:
    return all(_is_real(value) for value in array.reshape(-1))


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _found(values: object, array: np.ndarray[Any, Any]) -> str:
    """Name what is no number: the dtype of an array, or the first such element of a sequence."""
    if isinstance(values, np.ndarray):
        return f"an array of {array.dtype}"
    if array.ndim == 1 and isinstance(values, Sequence) and not isinstance(values, str | bytes):
        for index, value in enumerate(values):
            if not _is_real(value):
                return f"{value!r:.40} at index {index}"
    return f"{values!r:.40}"
