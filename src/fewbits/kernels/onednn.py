"""oneDNN's int8 products: the call, and whether this processor sums them exactly."""

from __future__ import annotations

from functools import cache

import torch


@cache
def onednn_is_exact() -> bool:
    """Whether oneDNN's int8 products are summed without saturation here: without VNNI, pairs saturate at 16 bits."""
    if not hasattr(torch.ops.onednn, "qlinear_prepack"):
        return False
    x = torch.full((4, 128), 255, dtype=torch.uint8)
    weight = torch.full((32, 128), 127, dtype=torch.int8)
    weight[1::2] = -127
    try:
        sums = onednn_sums(x, torch.ops.onednn.qlinear_prepack(weight, None), torch.ones(32), torch.zeros(32).int())
    except RuntimeError:
        return False
    return torch.equal(sums, 127.0 * weight.float().sum(1).expand(4, 32))


def onednn_sums(x: torch.Tensor, packed: torch.Tensor, ones: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Σ (x − 128) w as fp32, of uint8 activations and a prepacked int8 weight."""
    sums: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 128, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return sums
