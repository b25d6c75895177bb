"""What `tiles` makes of one weight: the fields of the compiled kernel, and activations as it takes them."""

from __future__ import annotations

import torch

from fewbits.kernels import token_pairs as pairs
from fewbits.kernels import token_tiles as tiles
from fewbits.kernels import tokens as rounding
from fewbits.kernels.compiled_linear import CompiledLinear
from fewbits.kernels.decode_vectors import vector_bytes
from fewbits.kernels.decoders import FP8, INT8
from fewbits.kernels.lanes import LANES
from fewbits.kernels.spec import LinearWeight, Steps
from fewbits.kernels.team import Work
from fewbits.kernels.tokens_run import STORED, fp8_step


class TokenTiles(CompiledLinear):
    """y = x Ŵᵀ + b for bf16 activations and outputs."""

    def __init__(self, weight: LinearWeight, bias: torch.Tensor | None) -> None:
        super().__init__(*weight.shape)
        scheme = weight.scheme
        codes, scales = weight.codes.contiguous(), weight.scales.contiguous()
        zeros = None if weight.zero_points is None else weight.zero_points.contiguous()
        wide_bias = None if bias is None else bias.to(torch.float32).contiguous()
        self._rounds_tokens = scheme.activations is not None
        self._kept = (codes, scales, zeros, wide_bias)
        self._kind = FP8 if scheme.kind == "float" else INT8 if scheme.bits == 8 else str(scheme.bits)
        self._fields = {
            tiles.CODES_AT: codes.data_ptr(),
            tiles.ROW_BYTES: codes.stride(0) * codes.element_size(),
            tiles.VECTOR_BYTES: vector_bytes(self._kind),
            tiles.COLUMNS: self._in,
            tiles.GROUPS: scheme.groups(self._in),
            tiles.SCALES_AT: scales.data_ptr(),
            tiles.SCALE_KIND: STORED[scales.dtype],
            tiles.ZEROS_AT: 0 if zeros is None else zeros.data_ptr(),
            tiles.SIGNED_ZEROS: int(scheme.bits == 8),
            tiles.MIDPOINT: scheme.midpoint if scheme.bits < 8 else 0,
            tiles.BIAS_AT: 0 if wide_bias is None else wide_bias.data_ptr(),
        }
        self._works: dict[int, Work] = {}
        self._arrange = Work(pairs.token_pairs(), {pairs.COLUMNS: self._in})

    def steps(self, x: torch.Tensor, out: torch.Tensor) -> Steps:
        """Round the activations where the scheme says so, arrange them, multiply."""
        tokens = x.shape[0]
        vectors = tiles.tile_vectors(tokens)
        if vectors not in self._works:
            compiled = tiles.token_tiles(f"{self._kind}:0:f32", vectors)
            self._works[vectors] = Work(compiled, self._fields, multiple=tiles.TILE // vectors)
        lanes = LANES * vectors
        values, scales, blocks = x, None, []
        if self._rounds_tokens:
            values, scales = torch.empty_like(x), torch.empty((tokens, 1))
            blocks.append(fp8_step(x, values, scales))
        arranged = torch.empty((-(-tokens // lanes), self._in, lanes), dtype=torch.bfloat16)
        blocks.append(self._arrange.step(pairs.runs_of(tokens, lanes, self._in), {
            pairs.X_AT: values.data_ptr(), pairs.TOKENS: tokens, pairs.LANES: lanes,
            pairs.OUT_AT: arranged.data_ptr(),
        }))  # fmt: skip
        blocks.append(self._works[vectors].step(self._out, {
            tiles.X_AT: arranged.data_ptr(), tiles.TOKENS: tokens,
            tiles.X_SCALES_AT: 0 if scales is None else scales.data_ptr(),
            tiles.OUT_AT: out.data_ptr(),
        }))  # fmt: skip
        x_at = rounding.X_AT if self._rounds_tokens else pairs.X_AT
        return Steps(tuple(blocks), (values, scales, arranged), x_at, tiles.OUT_AT)
