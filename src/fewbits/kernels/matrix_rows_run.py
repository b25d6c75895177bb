"""What the compiled kernels of `matrix_rows` make of one weight, arranged once for many tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fewbits.kernels import column_pairs as columns
from fewbits.kernels import matrix_rows as rows
from fewbits.kernels import token_words as words
from fewbits.kernels.compiled_linear import CompiledLinear
from fewbits.kernels.compiling import Array
from fewbits.kernels.matrix_units import HAS_MATRIX_UNITS
from fewbits.kernels.row_outputs import OUTPUTS
from fewbits.kernels.row_sums import row_sums
from fewbits.kernels.spec import LinearWeight, Steps
from fewbits.kernels.team import Program, Work, team_size
from fewbits.kernels.tokens_run import STORED, int8_step

# Inputs that matrix units take at once.
INPUTS = 32
# Bytes of a panel of outputs, which stays in the second-level cache while tokens go by; but so many tiles of outputs at
# least, as activations are copied for each panel.
PANEL_BYTES, LEAST_TILES = 2**20, 8
# Panels and runs of tokens are no fewer than this, so that threads end at about the same time.
LEAST_PIECES = 32


def fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether this processor has matrix units, and these are x [..., in] and weight [out, in] for them."""
    is_bf16 = x.dtype == weight.dtype == torch.bfloat16 and x.device.type == weight.device.type == "cpu"
    return HAS_MATRIX_UNITS and is_bf16 and weight.dim() == 2 and weight.shape[1] % INPUTS == 0


def arranged(matrix: torch.Tensor) -> torch.Tensor:
    """Contiguous rows of words, bf16 pairs or four bytes, as [tiles, words, 32 outputs]; zeros for missing outputs.

    They may begin anywhere in memory, within a word of another tensor's, say.
    """
    out, width = matrix.shape[0], matrix.shape[1] * matrix.element_size() // 4
    made = torch.empty((-(-out // OUTPUTS), width, OUTPUTS), dtype=torch.int32)
    step = Work(words.token_words(), {words.WIDTH: width}).step(words.runs_of(out, OUTPUTS, width), {
        words.X_AT: matrix.data_ptr(), words.TOKENS: out, words.LANES_OF_TILE: OUTPUTS,
        words.OUT_AT: made.data_ptr(),
    })  # fmt: skip
    Program([step]).run(team_size(out * width))
    return made


def arranged_columns(matrix: torch.Tensor) -> torch.Tensor:
    """A bf16 matrix [in, out] as [tiles, pairs of inputs, 32 outputs]; zeros for outputs that are not there."""
    width, out = matrix.shape
    pairs = width // 2
    made = torch.empty((-(-out // OUTPUTS), pairs, OUTPUTS), dtype=torch.int32)
    step = Work(columns.column_pairs(), {}).step(columns.runs_of(out, pairs), {
        columns.X_AT: matrix.data_ptr(), columns.COLUMNS: out, columns.PAIRS: pairs, columns.OUT_AT: made.data_ptr(),
    })  # fmt: skip
    Program([step]).run(team_size(out * width))
    return made


def padded(numbers: torch.Tensor | None, out: int, dtype: torch.dtype) -> torch.Tensor:
    """A number for each output up to the end of its panel, zeros where there are none."""
    made = torch.zeros(-(-out // OUTPUTS) * OUTPUTS, dtype=dtype)
    if numbers is not None:
        made[:out] = numbers.flatten()
    return made


class Products:
    """Steps of products with an arranged weight of so many words a row, for `out` outputs."""

    def __init__(self, of_bytes: bool, words: int, out: int, fields: Mapping[int, int]) -> None:
        self._tiles, self._words = -(-out // OUTPUTS), words
        self._work = Work(rows.matrix_rows(of_bytes), {rows.X_WORDS: words, rows.WIDTH: out, **fields})

    def step(self, x_at: int, x_scales_at: int, weight: torch.Tensor, out: torch.Tensor) -> Array:
        tokens = len(out)
        most = max(LEAST_TILES, PANEL_BYTES // (4 * OUTPUTS * self._words))
        runs = -(-tokens // rows.ROWS)
        most = max(1, min(most, self._tiles * runs // LEAST_PIECES))
        panels = -(-self._tiles // most)
        panel, some = -(-self._tiles // panels), -(-tokens // (runs * rows.TILE)) * rows.TILE
        return self._work.step(-(-self._tiles // panel) * -(-tokens // some), {
            rows.X_AT: x_at, rows.TOKENS: tokens, rows.SOME: some, rows.PANEL: panel, rows.X_SCALES_AT: x_scales_at,
            rows.WEIGHT_AT: weight.data_ptr(), rows.OUT_AT: out.data_ptr(), rows.OUT_KIND: STORED[out.dtype],
        })  # fmt: skip


class PairRows(CompiledLinear):
    """y = x Wᵀ + b of bf16 activations and weights [out, in], whose rows or columns are contiguous."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(*weight.shape)
        made = arranged_columns(weight.T) if weight.T.is_contiguous() else arranged(weight.contiguous())
        wide_bias = padded(bias, self._out, torch.float32)
        self._kept = made, wide_bias
        self._products = Products(False, made.shape[1], self._out, {rows.BIAS_AT: wide_bias.data_ptr()})

    def steps(self, x: torch.Tensor, out: torch.Tensor) -> Steps:
        """Multiply."""
        return Steps((self._products.step(x.data_ptr(), 0, self._kept[0], out),))


class ByteRows(CompiledLinear):
    """y = x Ŵᵀ + b of int8 weights and activations that are rounded to int8 token by token, with exact int32 sums."""

    def __init__(self, weight: LinearWeight, bias: torch.Tensor | None) -> None:
        super().__init__(*weight.shape)
        made = arranged(weight.codes.contiguous())
        # What activations as code + 128 make too much.
        begin = padded(row_sums(weight.codes) * -128, self._out, torch.int32)
        scales, wide_bias = (padded(numbers, self._out, torch.float32) for numbers in (weight.scales, bias))
        self._kept = made, begin, scales, wide_bias
        self._products = Products(True, made.shape[1], self._out, {
            rows.SUMS_BEGIN_AT: begin.data_ptr(), rows.SCALES_AT: scales.data_ptr(), rows.BIAS_AT: wide_bias.data_ptr(),
        })  # fmt: skip

    def steps(self, x: torch.Tensor, out: torch.Tensor) -> Steps:
        """Round the activations, multiply."""
        codes, scales = torch.empty(x.shape, dtype=torch.uint8), torch.empty((len(x), 1))
        multiply = self._products.step(codes.data_ptr(), scales.data_ptr(), self._kept[0], out)
        return Steps((int8_step(x, codes, scales), multiply), (codes, scales))
