"""Rows of one weight decoded into memory that is given, by compiled code."""

from __future__ import annotations

import torch

from fewbits.kernels import decode_rows as work
from fewbits.kernels.memory import FLOAT8
from fewbits.kernels.spec import LinearWeight
from fewbits.kernels.team import Program, Work, team_size
from fewbits.kernels.tokens_run import STORED


class RowDecoder:
    """Ŵ = (codes − zeros) · scales, any rows of it, in bf16 or fp32."""

    def __init__(self, weight: LinearWeight) -> None:
        scheme, columns = weight.scheme, weight.shape[1]
        codes, scales = weight.codes.contiguous(), weight.scales.contiguous()
        zeros = None if weight.zero_points is None else weight.zero_points.contiguous()
        self._kept = (codes, scales, zeros)
        self._work = Work(
            work.decode_rows(),
            {
                work.CODES_AT: codes.data_ptr(),
                work.CODE_KIND: FLOAT8 if scheme.kind == "float" else 0,
                work.BITS: scheme.bits,
                work.ROW_BYTES: codes.stride(0) * codes.element_size(),
                work.COLUMNS: columns,
                work.GROUPS: scheme.groups(columns),
                work.SCALES_AT: scales.data_ptr(),
                work.SCALE_KIND: STORED[scales.dtype],
                work.ZEROS_AT: 0 if zeros is None else zeros.data_ptr(),
                work.MIDPOINT: scheme.midpoint if scheme.bits < 8 else 0,
            },
        )

    def decode(self, first: int, out: torch.Tensor) -> None:
        """Fill contiguous `out` [rows, in], bf16 or fp32, with the rows from `first` on."""
        fields = {work.FIRST: first, work.OUT_AT: out.data_ptr(), work.OUT_KIND: STORED[out.dtype]}
        Program([self._work.step(len(out), fields)]).run(team_size(out.numel()))
