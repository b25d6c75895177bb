"""Transforms: scales of input channels that make weights easier to round. Add one file, and one line here."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fewbits.transforms import awq, smoothquant
from fewbits.transforms.problem import ScaleProblem

TRANSFORMS: dict[str, Callable[[ScaleProblem], torch.Tensor]] = {
    "awq": awq.find_scales,
    "smoothquant": smoothquant.find_scales,
}
