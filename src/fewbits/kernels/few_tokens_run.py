"""What `few_tokens` makes of one weight: the fields of the compiled kernel, and activations as it takes them."""

from __future__ import annotations

import torch

from fewbits.kernels import dot_rows as rows
from fewbits.kernels import tokens as arranged
from fewbits.kernels.compiled_linear import CompiledLinear
from fewbits.kernels.decoders import (
    BF16,
    BLOCK,
    FP8,
    INT8,
    RAISED,
    WHOLE4,
    WHOLE8,
    block_bytes,
    one_scale_a_block,
    order_of,
)
from fewbits.kernels.fetching import AHEAD_BYTES_OF_LONG, bytes_ahead
from fewbits.kernels.lanes import PREFERS_BYTES, X_BYTES
from fewbits.kernels.spec import LinearWeight, Steps
from fewbits.kernels.team import Work
from fewbits.kernels.tokens_run import STORED
from fewbits.packing import flip_top_bit

SCALE_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


class DotRows(CompiledLinear):
    """y = x Ŵᵀ + b for a few tokens, of rows of codes that one kind of decoder reads.

    Args:
        kind: as of decoders.Decoder. codes: contiguous, a row of codes in each row.
        scales: [out, groups], or None for none. zeros: uint8 [out, groups], or None.
        raised: what decoded codes are too large by. rounds_tokens: activations are rounded to float8.
    """

    def __init__(
        self, kind: str, codes: torch.Tensor, in_features: int, scales: torch.Tensor | None,
        zeros: torch.Tensor | None = None, raised: int = 0, bias: torch.Tensor | None = None,
        rounds_tokens: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(codes.shape[0], in_features)
        self._groups = 1 if scales is None else scales.shape[1]
        self._rounds_tokens = rounds_tokens
        self._needs_sums = raised != 0 or zeros is not None
        wide_bias = None if bias is None else bias.to(torch.float32).contiguous()
        self._kept = (codes, scales, zeros, wide_bias)
        blocks, size = -(-in_features // BLOCK), in_features // self._groups
        # Blocks that share their scales, or scales that share a block.
        span_blocks = blocks if self._groups == 1 else max(1, size // BLOCK)
        span_scales = 0 if self._groups == 1 else max(1, BLOCK // size)
        lanes = _lanes(self._groups, in_features)
        self._blocks = blocks
        # Whole numbers have a unit for every block, or for every group of one or more.
        self._units = 0 if kind not in (WHOLE4, WHOLE8) else self._groups if lanes else blocks
        row_bytes = codes.stride(0) * codes.element_size()
        scale_dtype = torch.float32 if scales is None else scales.dtype
        self._work = Work(
            rows.dot_rows(f"{kind}:{lanes}:{SCALE_NAMES[scale_dtype]}"),
            {
                rows.CODES_AT: codes.data_ptr(),
                rows.ROW_BYTES: row_bytes,
                rows.BLOCK_BYTES: block_bytes(kind),
                rows.SPANS: blocks // span_blocks,
                rows.SPAN_BLOCKS: span_blocks,
                rows.GROUPS: self._groups,
                rows.SPAN_SCALES: span_scales,
                rows.SCALES_AT: 0 if scales is None else scales.data_ptr(),
                rows.SCALE_KIND: STORED[scale_dtype],
                rows.ZEROS_AT: 0 if zeros is None else zeros.data_ptr(),
                rows.X_STRIDE: blocks * X_BYTES,
                rows.BIAS_AT: 0 if wide_bias is None else wide_bias.data_ptr(),
                rows.AHEAD: AHEAD_BYTES_OF_LONG if row_bytes >= rows.LONG_ROW else bytes_ahead(row_bytes, 4),
            },
            multiple=4,
        )
        self._arrange = Work(
            arranged.arranged(),
            {
                arranged.COLUMNS: in_features,
                arranged.GROUPS: self._groups,
                arranged.ORDER: order_of(kind, lanes),
                arranged.RAISED_BY: raised,
            },
        )

    def steps(self, x: torch.Tensor, out: torch.Tensor) -> Steps:
        """Arrange the activations, multiply."""
        tokens = x.shape[0]
        # Finer dtypes are the sum of two bf16 numbers, with 16 bits of mantissa, or of two whole ones.
        parts = 1 if x.dtype == torch.bfloat16 or self._rounds_tokens else 2
        values = torch.empty((tokens, parts, self._blocks, X_BYTES), dtype=torch.uint8)
        units = torch.empty((tokens, parts, self._units)) if self._units else None
        sums = torch.empty((tokens, parts, 2, self._groups)) if self._needs_sums else None
        scales = torch.empty(tokens) if self._rounds_tokens else None
        sums_at, scales_at, units_at = (0 if each is None else each.data_ptr() for each in (sums, scales, units))
        arrange = self._arrange.step(tokens, {
            arranged.X_AT: x.data_ptr(), arranged.X_KIND: STORED[x.dtype], arranged.OUT_AT: values.data_ptr(),
            arranged.SCALES_AT: scales_at, arranged.SUMS_AT: sums_at, arranged.PARTS: parts,
            arranged.UNITS_AT: units_at,
        })  # fmt: skip
        multiply = self._work.step(self._out, {
            rows.X_AT: values.data_ptr(), rows.PARTS: parts, rows.TOKENS: tokens, rows.X_SUMS_AT: sums_at,
            rows.X_SCALES_AT: scales_at, rows.OUT_AT: out.data_ptr(), rows.OUT_KIND: STORED[out.dtype],
            rows.X_UNITS_AT: units_at,
        })  # fmt: skip
        return Steps((arrange, multiply), tuple(each for each in (values, units, sums, scales) if each is not None))


def _lanes(groups: int, in_features: int) -> int:
    """Sums that share one scale (decoders.Decoder)."""
    return 0 if groups == 1 else min(16, in_features // groups // 8)


def few_tokens(weight: LinearWeight, bias: torch.Tensor | None, by_bytes: bool = PREFERS_BYTES) -> DotRows:
    """A quantized weight's products. by_bytes: codes of 4 and 8 bits are multiplied as bytes, where scales allow it."""
    scheme, zeros = weight.scheme, weight.zero_points
    kind = FP8 if scheme.kind == "float" else INT8 if scheme.bits == 8 else str(scheme.bits)
    if by_bytes and kind == "4":
        kind = WHOLE4
    elif by_bytes and kind == INT8 and one_scale_a_block(_lanes(weight.scales.shape[1], weight.shape[1])):
        kind = WHOLE8
    # Codes below 8 bits are raised to be bf16 numbers, those of 8 to be unsigned bytes.
    raised = 0 if kind in (WHOLE4, INT8, FP8) else RAISED
    if zeros is None and scheme.bits < 8:
        raised += scheme.midpoint
    elif zeros is not None and scheme.bits == 8:
        # The kernel knows unsigned zero points only.
        zeros, raised = flip_top_bit(zeros, torch.uint8), raised - RAISED
    elif zeros is not None:
        zeros = zeros.contiguous()
    return DotRows(
        kind, weight.codes.contiguous(), weight.shape[1], weight.scales.contiguous(), zeros, raised, bias,
        scheme.activations is not None,
    )  # fmt: skip


def few_tokens_bf16(weight: torch.Tensor, bias: torch.Tensor | None) -> DotRows:
    """The products of a weight that is not quantized."""
    return DotRows(BF16, weight.detach().contiguous(), weight.shape[1], None, bias=bias)
