"""What `decoded rows` makes of one weight: decoded anew for each call, and multiplied in matrix units."""

from __future__ import annotations

import torch

from fewbits.kernels import decoded_columns as columns
from fewbits.kernels import matrix_rows as rows
from fewbits.kernels import tile_rows as fields
from fewbits.kernels.compiled_linear import CompiledLinear
from fewbits.kernels.matrix_rows_run import Products, padded
from fewbits.kernels.row_outputs import OUTPUTS
from fewbits.kernels.spec import LinearWeight, Steps
from fewbits.kernels.team import Work
from fewbits.kernels.token_tiles_run import Decoding, token_scales
from fewbits.kernels.tokens_run import fp8_step


class DecodedRows(CompiledLinear):
    """y = x Ŵᵀ + b for bf16 activations and outputs."""

    def __init__(self, weight: LinearWeight, bias: torch.Tensor | None) -> None:
        super().__init__(*weight.shape)
        self._rounds_tokens = weight.scheme.activations is not None
        self._decoding = Decoding(weight)
        self._tiles, words = -(-self._out // OUTPUTS), self._in // 2
        compiled = columns.decoded_columns(f"{self._decoding.kind}:0:f32")
        self._decode = Work(compiled, self._decoding.fields | {columns.HEIGHT: self._out})
        wide_bias, scales = padded(bias, self._out, torch.float32), self._decoding.scales
        by_output = None if scales is None else padded(scales, self._out, torch.float32)
        self._kept = wide_bias, by_output
        self._products = Products(False, words, self._out, {
            rows.BIAS_AT: wide_bias.data_ptr(), rows.SCALES_AT: 0 if by_output is None else by_output.data_ptr(),
        })  # fmt: skip

    def steps(self, x: torch.Tensor, out: torch.Tensor) -> Steps:
        """Round the activations where the scheme says so, decode, multiply."""
        decoded = torch.empty((self._tiles, self._in // 2, OUTPUTS), dtype=torch.int32)
        decode = self._decode.step(self._tiles, {fields.OUT_AT: decoded.data_ptr()})
        if not self._rounds_tokens:
            return Steps((decode, self._products.step(x.data_ptr(), 0, decoded, out)), (decoded,))
        values, scales = torch.empty_like(x), token_scales(len(x))
        multiply = self._products.step(values.data_ptr(), scales.data_ptr(), decoded, out)
        return Steps((fp8_step(x, values, scales), decode, multiply), (values, scales, decoded))
