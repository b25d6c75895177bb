"""What the compiled kernels of `int8_dynamic` make of one weight."""

from __future__ import annotations

import torch

from fewbits.kernels import dot_bytes, scale_sums
from fewbits.kernels import tile_rows as rows
from fewbits.kernels import token_words as words
from fewbits.kernels.byte_tiles import byte_tiles
from fewbits.kernels.compiled_linear import CompiledLinear
from fewbits.kernels.lanes import LANES
from fewbits.kernels.matrix_units import HAS_MATRIX_UNITS
from fewbits.kernels.onednn import onednn_sums
from fewbits.kernels.row_sums import row_sums
from fewbits.kernels.spec import LinearWeight, Steps
from fewbits.kernels.team import Program, Work, team_size
from fewbits.kernels.tile_sums import PIECE_ROWS, tile_vectors
from fewbits.kernels.token_tiles_run import token_scales
from fewbits.kernels.tokens_run import STORED, int8_step, int8_tokens

# Of oneDNN, at once: what waits to be scaled stays in a cache, and its memory is used again.
SUMS = 2**21


class FewTokensInt8(CompiledLinear):
    """y = x Ŵᵀ + b by compiled dot products."""

    def __init__(self, weight: LinearWeight, bias: torch.Tensor | None) -> None:
        super().__init__(*weight.shape)
        codes, scales = weight.codes.contiguous(), weight.scales.contiguous()
        wide_bias = None if bias is None else bias.to(torch.float32).contiguous()
        sums = row_sums(codes)
        self._kept = (codes, scales, wide_bias, sums)
        self._work = Work(
            dot_bytes.dot_bytes(),
            {
                dot_bytes.CODES_AT: codes.data_ptr(),
                dot_bytes.COLUMNS: self._in,
                dot_bytes.ROW_SUMS_AT: sums.data_ptr(),
                dot_bytes.SCALES_AT: scales.data_ptr(),
                dot_bytes.SCALE_KIND: STORED[scales.dtype],
                dot_bytes.X_STRIDE: self._in,
                dot_bytes.BIAS_AT: 0 if wide_bias is None else wide_bias.data_ptr(),
            },
            multiple=4,
        )

    def steps(self, x: torch.Tensor, out: torch.Tensor) -> Steps:
        """Round the activations, multiply."""
        tokens = x.shape[0]
        codes, scales = torch.empty(x.shape, dtype=torch.uint8), torch.empty((tokens, 1))
        multiply = self._work.step(self._out, {
            dot_bytes.X_AT: codes.data_ptr(), dot_bytes.X_SCALES_AT: scales.data_ptr(), dot_bytes.TOKENS: tokens,
            dot_bytes.OUT_AT: out.data_ptr(), dot_bytes.OUT_KIND: STORED[out.dtype],
        })  # fmt: skip
        return Steps((int8_step(x, codes, scales), multiply), (codes, scales))


class ByteTiles(CompiledLinear):
    """y = x Ŵᵀ + b by tiles of sums in registers; inputs come by fours."""

    def __init__(self, weight: LinearWeight, bias: torch.Tensor | None) -> None:
        super().__init__(*weight.shape)
        codes, scales = weight.codes.contiguous(), weight.scales.contiguous()
        wide_bias = None if bias is None else bias.to(torch.float32).contiguous()
        # What activations as code + 128 make too much.
        begin = row_sums(codes) * -128
        self._kept = (codes, scales, wide_bias, begin)
        self._width = self._in // 4
        self._in_matrices = HAS_MATRIX_UNITS and self._width % LANES == 0
        self._fields = {
            rows.CODES_AT: codes.data_ptr(),
            rows.ROW_BYTES: self._in,
            rows.WORDS_OF_ROW: self._width,
            rows.SCALES_AT: scales.data_ptr(),
            rows.SCALE_KIND: STORED[scales.dtype],
            rows.BIAS_AT: 0 if wide_bias is None else wide_bias.data_ptr(),
            rows.SUMS_BEGIN_AT: begin.data_ptr(),
        }
        self._works: dict[int, Work] = {}
        self._arrange = Work(words.token_words(), {words.WIDTH: self._width})

    def steps(self, x: torch.Tensor, out: torch.Tensor) -> Steps:
        """Round the activations, arrange them, multiply."""
        tokens = x.shape[0]
        vectors = tile_vectors(tokens)
        if vectors not in self._works:
            self._works[vectors] = Work(byte_tiles(vectors, self._in_matrices), self._fields, multiple=PIECE_ROWS)
        lanes = LANES * vectors
        codes, scales = torch.empty(x.shape, dtype=torch.uint8), token_scales(tokens)
        arranged = torch.empty((-(-tokens // lanes), self._width, lanes), dtype=torch.int32)
        arrange = self._arrange.step(words.runs_of(tokens, lanes, self._width), {
            words.X_AT: codes.data_ptr(), words.TOKENS: tokens, words.LANES_OF_TILE: lanes,
            words.OUT_AT: arranged.data_ptr(),
        })  # fmt: skip
        multiply = self._works[vectors].step(self._out, {
            rows.X_AT: arranged.data_ptr(), rows.TOKENS: tokens, rows.X_SCALES_AT: scales.data_ptr(),
            rows.OUT_AT: out.data_ptr(), rows.OUT_KIND: STORED[out.dtype],
        })  # fmt: skip
        blocks = (int8_step(x, codes, scales), arrange, multiply)
        return Steps(blocks, (codes, scales, arranged))


class OneDnnInt8Run:
    """y = x Ŵᵀ + b by oneDNN: sums of some tokens as fp32, then scales and bias in a compiled pass."""

    def __init__(self, weight: LinearWeight, bias: torch.Tensor | None) -> None:
        self._out, self._in = weight.shape
        self._packed = torch.ops.onednn.qlinear_prepack(weight.codes.contiguous(), None)
        self._ones, self._zeros = torch.ones(self._out), torch.zeros(self._out, dtype=torch.int32)
        scales = weight.scales.contiguous()
        wide_bias = None if bias is None else bias.to(torch.float32).contiguous()
        self._kept = (scales, wide_bias)
        self._scale = Work(
            scale_sums.scale_sums(),
            {
                scale_sums.COLUMNS: self._out,
                scale_sums.SCALES_AT: scales.data_ptr(),
                scale_sums.SCALE_KIND: STORED[scales.dtype],
                scale_sums.BIAS_AT: 0 if wide_bias is None else wide_bias.data_ptr(),
            },
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[0]
        out = torch.empty((tokens, self._out), dtype=x.dtype)
        if tokens == 0:
            return out
        codes, scales = int8_tokens(x)
        turns = -(-tokens * self._out // SUMS)
        count = -(-tokens // turns)
        for first in range(0, tokens, count):
            sums = onednn_sums(codes[first : first + count], self._packed, self._ones, self._zeros)
            step = self._scale.step(len(sums), {
                scale_sums.SUMS_AT: sums.data_ptr(), scale_sums.X_SCALES_AT: scales[first].data_ptr(),
                scale_sums.OUT_AT: out[first].data_ptr(), scale_sums.OUT_KIND: STORED[x.dtype],
            })  # fmt: skip
            Program([step]).run(team_size(sums.numel()))
        return out
