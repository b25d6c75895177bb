"""What `few_tokens` makes of one weight: the block of the compiled kernel, and activations as it takes them."""

from __future__ import annotations

import torch

from fewbits.kernels import dot_rows as rows
from fewbits.kernels import tokens as prepared
from fewbits.kernels.lanes import FP8, FP8_AS_HALF, INT8, RAISED
from fewbits.kernels.spec import LinearWeight
from fewbits.kernels.team import Work, team_size
from fewbits.kernels.tokens_run import STORED, fp8_tokens
from fewbits.packing import flip_top_bit


class FewTokensRun:
    """y = x Ŵᵀ + b for a few tokens."""

    def __init__(self, weight: LinearWeight, bias: torch.Tensor | None) -> None:
        scheme = weight.scheme
        self._out, self._in = weight.shape
        self._groups = scheme.groups(self._in)
        self._rounds_tokens = scheme.activations is not None
        codes, scales, zeros = weight.codes.contiguous(), weight.scales.contiguous(), weight.zero_points
        raised = RAISED if scheme.bits < 8 else 0
        if scheme.kind == "float":
            scales = scales.to(torch.float32) * FP8_AS_HALF
        elif zeros is None and scheme.bits < 8:
            raised += scheme.midpoint
        elif zeros is not None:
            # Signed zero points at 8 bits are raised, so that the kernel knows unsigned ones only.
            zeros = zeros.contiguous() if scheme.bits < 8 else flip_top_bit(zeros, torch.uint8)
            raised -= 0 if scheme.bits < 8 else RAISED
        self._needs_sums = raised != 0 or zeros is not None
        wide_bias = None if bias is None else bias.to(torch.float32).contiguous()
        kind = FP8 if scheme.kind == "float" else INT8 if scheme.bits == 8 else scheme.bits
        self._kept = (codes, scales, zeros, wide_bias)
        self._work = Work(
            rows.dot_rows(kind),
            rows.FIELDS,
            {
                rows.CODES_AT: codes.data_ptr(),
                rows.ROW_BYTES: codes.stride(0) * codes.element_size(),
                rows.COLUMNS: self._in,
                rows.GROUPS: self._groups,
                rows.SCALES_AT: scales.data_ptr(),
                rows.SCALE_KIND: STORED[scales.dtype],
                rows.ZEROS_AT: 0 if zeros is None else zeros.data_ptr(),
                rows.RAISED_BY: raised,
                rows.X_STRIDE: 2 * self._in,
                rows.BIAS_AT: 0 if wide_bias is None else wide_bias.data_ptr(),
            },
        )
        fixed = {prepared.COLUMNS: self._in, prepared.GROUPS: self._groups}
        self._sums = Work(prepared.token_work("sums"), prepared.FIELDS, fixed)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[0]
        out = torch.empty((tokens, self._out), dtype=x.dtype)
        if tokens == 0 or self._out == 0:
            return out
        fields = {rows.TOKENS: tokens, rows.OUT_AT: out.data_ptr(), rows.OUT_KIND: STORED[x.dtype], rows.PARTS: 1}
        if self._rounds_tokens:
            values, token_scales = fp8_tokens(x)
            fields[rows.X_SCALES_AT] = token_scales.data_ptr()
        elif x.dtype == torch.bfloat16:
            values = x.contiguous()
        else:
            values = _halves(x)
            fields[rows.PARTS] = 2
        fields[rows.X_AT] = values.data_ptr()
        if self._needs_sums:
            sums = self._group_sums(values)
            fields[rows.X_SUMS_AT] = sums.data_ptr()
        self._work.run(self._out, 4, team_size(tokens * self._out * self._in), fields)
        return out

    def _group_sums(self, values: torch.Tensor) -> torch.Tensor:
        """Sums of what is multiplied over each group of inputs, fp32 [T, G]."""
        sums = torch.empty((*values.shape[:-1], self._groups))
        count = sums.numel() // self._groups
        self._sums.run(count, 1, 1, {prepared.X_AT: values.data_ptr(), prepared.SUMS_AT: sums.data_ptr()})
        return sums if values.dim() == 2 else sums.sum(1)


def _halves(x: torch.Tensor) -> torch.Tensor:
    """x as the sum of two bf16 numbers, bf16 [T, 2, K]: 16 bits of mantissa, for dtypes finer than bf16."""
    wide = x.to(torch.float32)
    high = wide.to(torch.bfloat16)
    return torch.stack([high, (wide - high).to(torch.bfloat16)], 1)
