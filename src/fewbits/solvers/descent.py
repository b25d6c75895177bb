"""The descent: each code chosen once more given all others, which the sweep could not know."""

from __future__ import annotations

import torch

from fewbits.kernels.compiling import Array
from fewbits.kernels.curvature import Curvature
from fewbits.kernels.feedback import Feedback
from fewbits.kernels.gptq_descent import descend_rows
from fewbits.schemes import Scheme
from fewbits.solvers.solution import Grid


def descend(
    W: torch.Tensor,
    solved: Grid,
    errors: Array,
    curvature: Curvature,
    feedback: Feedback,
    order: torch.Tensor,
    scheme: Scheme,
    passes: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose each code anew, in place, given all others; how much each row's loss by H fell, fp64 [N], and W − Ŵ.

    Args:
        errors: what the sweep left. curvature, feedback: of the damped H, its channels in `order`.
    """
    codes, scales, zeros = solved
    zeros = torch.full(scales.shape, scheme.midpoint, dtype=torch.uint8) if zeros is None else zeros
    group = scheme.group_size or W.shape[1]
    return descend_rows(
        W, order, curvature, feedback, errors, group, passes, scheme.largest_code, scales.float(), zeros, codes
    )  # fmt: skip
