"""H as coordinate descent takes it: exact where columns are chosen one after the other, in bf16 where few changes push.

Numbers are kept as far_products keeps them. Descent reads a row of H for each code that changes, and waits for memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fewbits.kernels.compiling import Array, entry
from fewbits.kernels.far_products import APART, KEPT, NUMBER_BYTES
from fewbits.kernels.listed_rows import LINE, keep_line, whole_lines
from fewbits.kernels.memory import copy_numbers
from fewbits.kernels.threads import over_rows

# Columns that are chosen before their changes are pushed into others.
BLOCK = 128


@dataclass(frozen=True)
class Curvature:
    """far: KEPT [K, more than K], all of H, its rows in lines of listed_rows, zeros behind the last column.

    own: fp32 [blocks, BLOCK, BLOCK], its blocks on the diagonal.
    """

    far: Array
    own: Array


@entry
def _lay(H: Any, order: Any, diagonal: Any, far: Any, own: Any, begin: Any, end: Any) -> None:
    """Rows begin to end of both. order: as uint64."""
    width = len(order)
    laid = np.zeros(whole_lines(width), np.float32)
    for row in range(begin, end):
        given = H[order[row]]
        for column in range(width):
            laid[column] = given[order[column]]
        laid[row] = diagonal[row]
        for column in range(0, width, LINE):
            keep_line(laid[column:].ctypes.data, far[row, column:].ctypes.data)
        first = row // BLOCK * BLOCK
        last = min(first + BLOCK, width)
        copy_numbers(own[row // BLOCK, row - first, : last - first], laid[first:last])


def curvature_of(H: torch.Tensor, order: torch.Tensor, diagonal: torch.Tensor) -> Curvature:
    """Of a symmetric fp32 H [K, K], its channels in `order`, int64 [K], with `diagonal`, fp32 [K], for its own."""
    size = len(H)
    far = np.empty((size, int(whole_lines(size)) + APART // NUMBER_BYTES), KEPT)
    own = np.zeros((-(-size // BLOCK), BLOCK, BLOCK), np.float32)
    given = H.contiguous().numpy(), order.numpy().view(np.uint64), diagonal.contiguous().numpy(), far, own
    over_rows(size, size, lambda begin, end: _lay(*given, begin, end))
    return Curvature(far, own)
