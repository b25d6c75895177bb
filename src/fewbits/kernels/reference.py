"""The reference kernel: any scheme on any device, by definition and not by speed.

The weight is decoded in fp32 at every call. Integers are multiplied in fp64, where their sums are exact.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fewbits.kernels.activations import round_tokens
from fewbits.kernels.spec import LinearSpec, LinearWeight, Run


class Reference:
    """Decodes in fp32, multiplies in fp32; W8A8 with exact sums."""

    name = "reference"

    def why_not(self, spec: LinearSpec) -> str | None:
        return None

    def prepare(self, weight: LinearWeight, bias: torch.Tensor | None) -> Run:
        scheme = weight.scheme
        wide_bias = None if bias is None else bias.to(torch.float32)

        def weight_only(x: torch.Tensor) -> torch.Tensor:
            return F.linear(x.to(torch.float32), weight.decoded(), wide_bias).to(x.dtype)

        def int8_dynamic(x: torch.Tensor) -> torch.Tensor:
            codes, scales = round_tokens(x, "int")
            sums = codes.double() @ weight.codes.double().t()
            y = sums.to(torch.float32) * scales * weight.scales.to(torch.float32).view(1, -1)
            return (y if wide_bias is None else y + wide_bias).to(x.dtype)

        def rounded_input(x: torch.Tensor) -> torch.Tensor:
            codes, scales = round_tokens(x, scheme.kind)
            return F.linear(codes * scales, weight.decoded(), wide_bias).to(x.dtype)

        if scheme.activations is None:
            return weight_only
        is_channel_int8 = scheme.kind == "int" and scheme.symmetric and scheme.group_size == 0
        return int8_dynamic if is_channel_int8 else rounded_input
