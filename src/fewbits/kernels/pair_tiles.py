"""What matrix units make of a weight in bf16: products in tiles (kernels.tile_rows), summed in one order.

oneDNN orders its sums there by the number of threads, so the last bits of its products depend on it; of these they
don't. They take as long on wide layers, and up to 1.6 times as long on narrow ones.
"""

from __future__ import annotations

import torch

from fewbits.kernels import tile_rows as rows
from fewbits.kernels import token_words as words
from fewbits.kernels.byte_tiles import word_tiles
from fewbits.kernels.compiled_linear import CompiledLinear
from fewbits.kernels.lanes import LANES
from fewbits.kernels.matrix_units import HAS_MATRIX_UNITS
from fewbits.kernels.memory import BFLOAT16
from fewbits.kernels.spec import Steps
from fewbits.kernels.team import Work
from fewbits.kernels.tile_sums import PIECE_ROWS, tile_vectors
from fewbits.kernels.token_tiles_run import tiles_at_once

# Inputs that matrix units take at once.
INPUTS = 32


def fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether this processor has matrix units, and these are x [..., in] and weight [out, in] for them."""
    is_bf16 = x.dtype == weight.dtype == torch.bfloat16 and x.device.type == weight.device.type == "cpu"
    return HAS_MATRIX_UNITS and is_bf16 and weight.dim() == 2 and weight.shape[1] % INPUTS == 0


class PairTiles(CompiledLinear):
    """y = x Wᵀ + b of bf16 activations and rows of weights, which are read where they lie."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(*weight.shape)
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        wide_bias = None if bias is None else bias.to(torch.float32).contiguous()
        self._kept = weight, wide_bias
        self._fields = {
            rows.CODES_AT: weight.data_ptr(),
            rows.ROW_BYTES: 2 * weight.stride(0),
            rows.WORDS_OF_ROW: self._in // 2,
            rows.BIAS_AT: 0 if wide_bias is None else wide_bias.data_ptr(),
            rows.OUT_KIND: BFLOAT16,
        }
        self._arrange = Work(words.token_words(), {words.WIDTH: self._in // 2})

    def steps(self, x: torch.Tensor, out: torch.Tensor) -> Steps:
        """Arrange the activations, multiply."""
        tokens = x.shape[0]
        vectors = tile_vectors(tokens)
        work, lanes = Work(word_tiles(vectors, False, True), self._fields, multiple=PIECE_ROWS), LANES * vectors
        arranged = torch.empty((-(-tokens // lanes), self._in, lanes), dtype=torch.bfloat16)
        blocks = [self._arrange.step(words.runs_of(tokens, lanes, self._in // 2), {
            words.X_AT: x.data_ptr(), words.TOKENS: tokens, words.LANES_OF_TILE: lanes,
            words.OUT_AT: arranged.data_ptr(),
        })]  # fmt: skip
        count = lanes * tiles_at_once(arranged)
        for first in range(0, tokens, count):
            blocks.append(work.step(self._out, {
                rows.X_AT: arranged[first // lanes].data_ptr(), rows.TOKENS: min(count, tokens - first),
                rows.OUT_AT: out[first].data_ptr(),
            }))  # fmt: skip
        return Steps(tuple(blocks), (arranged,), words.X_AT, rows.OUT_AT)
