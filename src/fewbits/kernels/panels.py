"""Weights decoded panel by panel, for many tokens: some rows into a buffer that stays in the cache, then a plain GEMM.

For processors without bf16 products, for finer activations, and for groups of any size.

The whole weight is never decoded at once. bf16 activations multiply with bf16 panels; finer ones with fp32 panels.
"""

from __future__ import annotations

import torch

from fewbits.kernels.spec import LinearSpec, LinearWeight, Run, not_compiled


class Panels:
    """Any scheme but W8A8, decoded by compiled code."""

    name = "panels"

    def why_not(self, spec: LinearSpec) -> str | None:
        if (reason := not_compiled(spec)) is not None:
            return reason
        if spec.scheme.kind == "int" and spec.scheme.activations is not None:
            return "leaves activations unrounded"
        return None

    def prepare(self, weight: LinearWeight, bias: torch.Tensor | None) -> Run:
        from fewbits.kernels.panels_run import PanelsRun

        return PanelsRun(weight, bias)
