"""What `few_tokens` makes of one weight: the fields of the compiled kernel, and activations as it takes them."""

from __future__ import annotations

import torch

from fewbits.kernels import dot_rows as rows
from fewbits.kernels import tokens as arranged
from fewbits.kernels.lanes import BLOCK, FP8, INT8, RAISED, block_bytes, order_of
from fewbits.kernels.spec import LinearWeight
from fewbits.kernels.team import Work, team_size
from fewbits.kernels.tokens_run import STORED
from fewbits.packing import flip_top_bit

SCALE_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


class FewTokensRun:
    """y = x Ŵᵀ + b for a few tokens."""

    def __init__(self, weight: LinearWeight, bias: torch.Tensor | None) -> None:
        scheme = weight.scheme
        self._out, self._in = weight.shape
        self._groups = scheme.groups(self._in)
        self._rounds_tokens = scheme.activations is not None
        self._padded = -(-self._in // BLOCK) * BLOCK
        codes, scales, zeros = weight.codes.contiguous(), weight.scales.contiguous(), weight.zero_points
        kind = FP8 if scheme.kind == "float" else INT8 if scheme.bits == 8 else str(scheme.bits)
        raised = RAISED if scheme.bits < 8 else 0
        if zeros is None and scheme.bits < 8:
            raised += scheme.midpoint
        elif zeros is not None and scheme.bits == 8:
            # The kernel knows unsigned zero points only.
            zeros, raised = flip_top_bit(zeros, torch.uint8), -RAISED
        elif zeros is not None:
            zeros = zeros.contiguous()
        self._needs_sums = raised != 0 or zeros is not None
        wide_bias = None if bias is None else bias.to(torch.float32).contiguous()
        self._kept = (codes, scales, zeros, wide_bias)
        lanes = 0 if self._groups == 1 else min(16, self._in // self._groups // 8)
        self._work = Work(
            rows.dot_rows(f"{kind}:{lanes}:{SCALE_NAMES[scales.dtype]}"),
            rows.FIELDS,
            {
                rows.CODES_AT: codes.data_ptr(),
                rows.ROW_BYTES: codes.stride(0) * codes.element_size(),
                rows.BLOCK_BYTES: block_bytes(kind),
                rows.BLOCKS: self._padded // BLOCK,
                rows.GROUPS: self._groups,
                rows.GROUP_SIZE: self._in // self._groups,
                rows.SCALES_AT: scales.data_ptr(),
                rows.SCALE_KIND: STORED[scales.dtype],
                rows.ZEROS_AT: 0 if zeros is None else zeros.data_ptr(),
                rows.RAISED_BY: raised,
                rows.X_STRIDE: 2 * self._padded,
                rows.BIAS_AT: 0 if wide_bias is None else wide_bias.data_ptr(),
            },
        )
        self._arrange = Work(
            arranged.token_work("arranged"),
            arranged.FIELDS,
            {arranged.COLUMNS: self._in, arranged.GROUPS: self._groups, arranged.ORDER: order_of(kind)},
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[0]
        out = torch.empty((tokens, self._out), dtype=x.dtype)
        if tokens == 0 or self._out == 0:
            return out
        x = x.contiguous()
        # Finer dtypes are the sum of two bf16 numbers: 16 bits of mantissa.
        parts = 1 if x.dtype == torch.bfloat16 or self._rounds_tokens else 2
        values = torch.empty((tokens, parts, self._padded), dtype=torch.bfloat16)
        sums = torch.empty((tokens, self._groups)) if self._needs_sums else None
        scales = torch.empty(tokens) if self._rounds_tokens else None
        shared = {
            rows.X_SUMS_AT: 0 if sums is None else sums.data_ptr(),
            rows.X_SCALES_AT: 0 if scales is None else scales.data_ptr(),
        }
        self._arrange.run(tokens, 1, team_size(x.numel()), {
            arranged.X_AT: x.data_ptr(), arranged.X_KIND: STORED[x.dtype], arranged.OUT_AT: values.data_ptr(),
            arranged.SCALES_AT: shared[rows.X_SCALES_AT], arranged.SUMS_AT: shared[rows.X_SUMS_AT],
            arranged.PARTS: parts,
        })  # fmt: skip
        self._work.run(self._out, 4, team_size(tokens * self._out * self._in), shared | {
            rows.X_AT: values.data_ptr(), rows.PARTS: parts, rows.TOKENS: tokens,
            rows.OUT_AT: out.data_ptr(), rows.OUT_KIND: STORED[x.dtype],
        })  # fmt: skip
        return out
