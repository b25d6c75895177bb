"""H as coordinate descent takes it: exact where columns are chosen one after the other, in bf16 where few changes push.

Numbers are kept as far_products keeps them. Descent reads a row of H for each code that changes, and waits for memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fewbits.kernels.compiling import Array
from fewbits.kernels.far_products import APART, KEPT, NUMBER_BYTES
from fewbits.kernels.lanes import HAS_BF16

# Columns that are chosen before their changes are pushed into others.
BLOCK = 128


@dataclass(frozen=True)
class Curvature:
    """far: KEPT [K, more than K], all of H. own: fp32 [blocks, BLOCK, BLOCK], its blocks on the diagonal."""

    far: Array
    own: Array


def curvature_of(H: torch.Tensor) -> Curvature:
    """Of a symmetric fp32 H [K, K]."""
    size = len(H)
    far = np.zeros((size, size + APART // NUMBER_BYTES), KEPT)
    numbers = torch.from_numpy(far.view(np.int16)).view(torch.bfloat16) if HAS_BF16 else torch.from_numpy(far)
    numbers[:, :size] = H
    own = np.zeros((-(-size // BLOCK), BLOCK, BLOCK), np.float32)
    for number, block in enumerate(own):
        columns = slice(number * BLOCK, min(number * BLOCK + BLOCK, size))
        count = columns.stop - columns.start
        block[:count, :count] = H[columns, columns].numpy()
    return Curvature(far, own)
