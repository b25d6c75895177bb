"""What `tiles` makes of one weight: the fields of the compiled kernel, and activations as it takes them."""

from __future__ import annotations

import torch

from fewbits.kernels import tile_rows as rows
from fewbits.kernels import token_tiles as tiles
from fewbits.kernels import token_words as words
from fewbits.kernels.compiled_linear import CompiledLinear
from fewbits.kernels.decode_vectors import vector_bytes
from fewbits.kernels.decoders import FP8, INT8
from fewbits.kernels.lanes import LANES
from fewbits.kernels.matrix_units import HAS_MATRIX_UNITS
from fewbits.kernels.spec import LinearWeight, Steps
from fewbits.kernels.team import Work
from fewbits.kernels.tile_sums import PIECE_ROWS, tile_vectors
from fewbits.kernels.tokens_run import STORED, fp8_step

# Activations that stay in a cache of the third level beside what else it holds.
CACHED_BYTES = 2**23


def token_scales(tokens: int) -> torch.Tensor:
    """Room for a scale a token, of which vectors are read."""
    return torch.empty((-(-tokens // LANES) * LANES, 1))


def tiles_at_once(arranged: torch.Tensor) -> int:
    """Tiles of tokens [tiles, inputs, tokens] that are multiplied with all rows before the next: as many as a cache
    holds, which every block of rows reads anew."""
    turns = -(-arranged.nbytes // CACHED_BYTES)
    return -(-len(arranged) // turns)


class Decoding:
    """How rows of a weight are decoded to bf16: unscaled where a row has one scale, which multiplies its sums.

    kind: of codes, as decoders have it. fields: of kernels.token_tiles; scales: of rows, None where there are groups.
    """

    def __init__(self, weight: LinearWeight) -> None:
        scheme, width = weight.scheme, weight.shape[1]
        codes, scales = weight.codes.contiguous(), weight.scales.contiguous()
        zeros = None if weight.zero_points is None else weight.zero_points.contiguous()
        groups = scheme.groups(width)
        self._kept = codes, scales, zeros
        self.kind = FP8 if scheme.kind == "float" else INT8 if scheme.bits == 8 else str(scheme.bits)
        self.scales = scales if groups == 1 else None
        self.fields = {
            rows.CODES_AT: codes.data_ptr(),
            rows.ROW_BYTES: codes.stride(0) * codes.element_size(),
            rows.WORDS_OF_ROW: width // 2,
            rows.SCALE_KIND: STORED[scales.dtype],
            tiles.VECTOR_BYTES: vector_bytes(self.kind),
            tiles.GROUPS: groups,
            tiles.GROUP_SCALES_AT: 0 if groups == 1 else scales.data_ptr(),
            tiles.ZEROS_AT: 0 if zeros is None else zeros.data_ptr(),
            tiles.SIGNED_ZEROS: int(scheme.bits == 8),
            tiles.MIDPOINT: scheme.midpoint if scheme.bits < 8 else 0,
        }


class TokenTiles(CompiledLinear):
    """y = x Ŵᵀ + b for bf16 activations and outputs."""

    def __init__(self, weight: LinearWeight, bias: torch.Tensor | None) -> None:
        super().__init__(*weight.shape)
        self._decoding = Decoding(weight)
        self._bias = None if bias is None else bias.to(torch.float32).contiguous()
        self._rounds_tokens = weight.scheme.activations is not None
        scales = self._decoding.scales
        self._fields = self._decoding.fields | {
            rows.SCALES_AT: 0 if scales is None else scales.data_ptr(),
            rows.BIAS_AT: 0 if self._bias is None else self._bias.data_ptr(),
        }
        self._works: dict[int, Work] = {}
        self._arrange = Work(words.token_words(), {words.WIDTH: self._in // 2})

    def steps(self, x: torch.Tensor, out: torch.Tensor) -> Steps:
        """Round the activations where the scheme says so, arrange them, multiply."""
        tokens = x.shape[0]
        vectors = tile_vectors(tokens)
        if vectors not in self._works:
            compiled = tiles.token_tiles(f"{self._decoding.kind}:0:f32", vectors, HAS_MATRIX_UNITS)
            self._works[vectors] = Work(compiled, self._fields, multiple=PIECE_ROWS)
        lanes = LANES * vectors
        values, scales, blocks = x, None, []
        if self._rounds_tokens:
            values, scales = torch.empty_like(x), token_scales(tokens)
            blocks.append(fp8_step(x, values, scales))
        arranged = torch.empty((-(-tokens // lanes), self._in, lanes), dtype=torch.bfloat16)
        blocks.append(self._arrange.step(words.runs_of(tokens, lanes, self._in // 2), {
            words.X_AT: values.data_ptr(), words.TOKENS: tokens, words.LANES_OF_TILE: lanes,
            words.OUT_AT: arranged.data_ptr(),
        }))  # fmt: skip
        count = lanes * tiles_at_once(arranged)
        for first in range(0, tokens, count):
            blocks.append(self._works[vectors].step(self._out, {
                rows.X_AT: arranged[first // lanes].data_ptr(), rows.TOKENS: min(count, tokens - first),
                rows.X_SCALES_AT: 0 if scales is None else scales[first].data_ptr(),
                rows.OUT_AT: out[first].data_ptr(), rows.OUT_KIND: STORED[out.dtype],
            }))  # fmt: skip
        return Steps(tuple(blocks), (arranged,) if scales is None else (values, scales, arranged))
