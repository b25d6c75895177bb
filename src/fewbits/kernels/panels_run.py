"""What `panels` makes of one weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fewbits.kernels.row_decoder import RowDecoder
from fewbits.kernels.scratch import scratch
from fewbits.kernels.spec import LinearWeight
from fewbits.kernels.tokens_run import fp8_tokens

# Bytes of a decoded panel.
PANEL_BYTES = 8 * 2**20


class PanelsRun:
    """y = x Ŵᵀ + b for many tokens."""

    def __init__(self, weight: LinearWeight, bias: torch.Tensor | None) -> None:
        scheme = weight.scheme
        self._out, self._in = weight.shape
        self._rounds_tokens = scheme.activations is not None
        self._bias = bias
        self._decoder = RowDecoder(weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty((x.shape[0], self._out), dtype=x.dtype)
        scales = None
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        if self._rounds_tokens:
            values, scales = fp8_tokens(x)
            values = values.to(dtype)
        else:
            values = x.to(dtype)
        step = max(16, PANEL_BYTES // (dtype.itemsize * max(1, self._in)))
        for start in range(0, self._out, step):
            count = min(step, self._out - start)
            panel = scratch(count, self._in, dtype)
            self._decoder.decode(start, panel)
            part = F.linear(values, panel)
            if scales is not None:
                part = part * scales
            if self._bias is not None:
                part = part + self._bias[start : start + count]
            out[:, start : start + count] = part
        return out
