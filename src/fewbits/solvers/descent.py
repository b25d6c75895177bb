"""The descent: each code chosen once more given all others, which the sweep could not know."""

from __future__ import annotations

import torch

from fewbits.fp32_products import fast_fp32
from fewbits.kernels.gptq_descent import descend_block
from fewbits.packing import decode_codes
from fewbits.schemes import Scheme
from fewbits.solvers.solution import Grid

# At least so many columns in a block, whose gradient is one product.
BLOCK = 128


def descend(
    W: torch.Tensor, solved: Grid, H: torch.Tensor, order: torch.Tensor, scheme: Scheme, passes: int
) -> torch.Tensor:
    """Choose each code anew, in place, given all others; says by how much each row's loss by H fell, fp64 [N].

    Args:
        H: damped, its channels in `order`.
    """
    N, K = W.shape
    gained = torch.zeros(N, dtype=torch.float64)
    if passes == 0:
        return gained
    codes = solved[0].T[order].contiguous()
    misses = (W - decode_codes(*solved, scheme)).T[order].contiguous()
    group = scheme.group_size or K
    numbers = order[::group] // group
    scales = solved[1].float().T[numbers].contiguous()
    step = max(1, BLOCK // group) * group if scheme.group_size else BLOCK
    for _ in range(passes):
        for start in range(0, K, step):
            block = slice(start, start + step)
            with fast_fp32():
                gradient = H[block] @ misses
            spans = slice(start // group, max(start // group + 1, (start + step) // group))
            gained += descend_block(
                gradient, H[block, block].contiguous(), scales[spans], scheme.largest_code, codes[block], misses[block]
            )
    solved[0].T[order] = codes
    return gained
