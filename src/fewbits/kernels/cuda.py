"""Products on CUDA's own matrix units: fp8 by rows and columns, and int8.

Not run on a GPU by the tests: where PyTorch offers the same call on CPUs, they run it there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fewbits.kernels.activations import round_tokens
from fewbits.kernels.int8_dynamic import other_scheme
from fewbits.kernels.spec import LinearSpec, LinearWeight, Run

# torch._int_mm wants more than 16 rows, and sides that are multiples of 8.
LEAST_ROWS, SIDE = 32, 8


class CudaFp8:
    """float8 weights and activations on the matrix units, a scale a token and a scale a channel."""

    name = "CUDA fp8"

    def why_not(self, spec: LinearSpec) -> str | None:
        if spec.scheme.kind != "float" or spec.scheme.activations is None:
            return "multiplies float8 with float8 only"
        if spec.device != "cuda":
            return "runs on CUDA devices"
        if spec.machine.capability is None or spec.machine.capability < (8, 9):
            return f"needs compute capability 8.9, this device has {spec.machine.capability}"
        if spec.dtype != torch.bfloat16:
            return f"returns bf16, not {spec.dtype}"
        if spec.in_features % 16 or spec.out_features % 16:
            return f"{spec.in_features} inputs and {spec.out_features} outputs must be multiples of 16"
        return None

    def prepare(self, weight: LinearWeight, bias: torch.Tensor | None) -> Run:
        columns = weight.codes.contiguous().view(torch.float8_e4m3fn).t()
        column_scales = weight.scales.to(torch.float32).view(1, -1).contiguous()

        def run(x: torch.Tensor) -> torch.Tensor:
            codes, scales = round_tokens(x, "float")
            product: torch.Tensor = torch._scaled_mm(
                codes.to(torch.float8_e4m3fn), columns, scales, column_scales, out_dtype=torch.bfloat16
            )
            return product if bias is None else product + bias.to(torch.bfloat16)

        return run


class CudaInt8:
    """int8 weights and activations on the matrix units, with exact int32 sums."""

    name = "CUDA int8"

    def why_not(self, spec: LinearSpec) -> str | None:
        if (reason := other_scheme(spec)) is not None:
            return reason
        if spec.device != "cuda":
            return "runs on CUDA devices"
        if spec.in_features % SIDE or spec.out_features % SIDE:
            return f"{spec.in_features} inputs and {spec.out_features} outputs must be multiples of {SIDE}"
        return None

    def prepare(self, weight: LinearWeight, bias: torch.Tensor | None) -> Run:
        columns = weight.codes.contiguous().t()
        column_scales = weight.scales.to(torch.float32).view(1, -1)
        wide_bias = None if bias is None else bias.to(torch.float32)

        def run(x: torch.Tensor) -> torch.Tensor:
            codes, scales = round_tokens(x, "int")
            missing = max(0, LEAST_ROWS - x.shape[0])
            sums = torch._int_mm(F.pad(codes.to(torch.int8), (0, 0, 0, missing)), columns)[: x.shape[0]]
            y = sums.to(torch.float32) * scales * column_scales
            return (y if wide_bias is None else y + wide_bias).to(x.dtype)

        return run
