"""4-bit weights on GPUs, by a Triton kernel that decodes tiles of the weight on their way to the matrix units."""

from __future__ import annotations

import torch

from fewbits.kernels.spec import FLOATS, LinearSpec, LinearWeight, Run


class TritonInt4:
    """Weight-only int4, symmetric or not, any group size that 16 divides."""

    name = "Triton int4"

    def why_not(self, spec: LinearSpec) -> str | None:
        if spec.scheme.kind != "int" or spec.scheme.bits != 4 or spec.scheme.activations is not None:
            return "multiplies 4-bit weights with unrounded activations only"
        if spec.device != "cuda":
            return "runs on CUDA devices"
        if "triton" not in spec.machine.features:
            return "needs Triton"
        if spec.dtype not in FLOATS:
            return f"takes fp32, bf16 and fp16 activations, not {spec.dtype}"
        return None

    def prepare(self, weight: LinearWeight, bias: torch.Tensor | None) -> Run:
        from fewbits.kernels.triton_int4_run import TritonInt4Run

        return TritonInt4Run(weight, bias)
