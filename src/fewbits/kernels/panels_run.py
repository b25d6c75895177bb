"""What `panels` makes of one weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fewbits.kernels import decode_rows as decoding
from fewbits.kernels.memory import FLOAT8
from fewbits.kernels.scratch import scratch
from fewbits.kernels.spec import LinearWeight
from fewbits.kernels.team import Program, Work, team_size
from fewbits.kernels.tokens_run import STORED, fp8_tokens

# Bytes of a decoded panel.
PANEL_BYTES = 8 * 2**20


class PanelsRun:
    """y = x Ŵᵀ + b for many tokens."""

    def __init__(self, weight: LinearWeight, bias: torch.Tensor | None) -> None:
        scheme = weight.scheme
        self._out, self._in = weight.shape
        self._rounds_tokens = scheme.activations is not None
        codes, scales = weight.codes.contiguous(), weight.scales.contiguous()
        zeros = None if weight.zero_points is None else weight.zero_points.contiguous()
        self._bias = bias
        self._kept = (codes, scales, zeros)
        midpoint = scheme.midpoint if scheme.bits < 8 else 0
        self._decode = Work(
            decoding.decode_rows(),
            {
                decoding.CODES_AT: codes.data_ptr(),
                decoding.CODE_KIND: FLOAT8 if scheme.kind == "float" else 0,
                decoding.BITS: scheme.bits,
                decoding.ROW_BYTES: codes.stride(0) * codes.element_size(),
                decoding.COLUMNS: self._in,
                decoding.GROUPS: scheme.groups(self._in),
                decoding.SCALES_AT: scales.data_ptr(),
                decoding.SCALE_KIND: STORED[scales.dtype],
                decoding.ZEROS_AT: 0 if zeros is None else zeros.data_ptr(),
                decoding.MIDPOINT: midpoint,
            },
        )

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
            decode = self._decode.step(count, {
                decoding.FIRST: start, decoding.OUT_AT: panel.data_ptr(), decoding.OUT_KIND: STORED[dtype],
            })  # fmt: skip
            Program([decode]).run(team_size(count * self._in))
            part = F.linear(values, panel)
            if scales is not None:
                part = part * scales
            if self._bias is not None:
                part = part + self._bias[start : start + count]
            out[:, start : start + count] = part
        return out
