"""Whether numbers are finite, in one pass and without a copy."""

from __future__ import annotations

from typing import Any

from numba import njit


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def largest_exponent(numbers: Any, mask: Any) -> Any:
    """The largest exponent, in place, of floats given as unsigned integers; `mask` picks it, all ones if not finite."""
    largest = numbers.dtype.type(0)
    for k in range(numbers.size):
        largest = max(largest, numbers.dtype.type(numbers[k] & mask))
    return largest
