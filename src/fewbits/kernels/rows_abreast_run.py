"""What `rows abreast` makes of one weight: a second copy of it, arranged in panels."""

from __future__ import annotations

import torch

from fewbits.kernels import abreast as work
from fewbits.kernels import tokens as arranged
from fewbits.kernels.compiled_linear import CompiledLinear
from fewbits.kernels.decoders import BLOCK, WHOLE4, WHOLE_SECONDS
from fewbits.kernels.few_tokens_run import SCALE_NAMES
from fewbits.kernels.lanes import X_BYTES
from fewbits.kernels.matrix_rows_run import padded
from fewbits.kernels.spec import LinearWeight, Steps
from fewbits.kernels.team import Work
from fewbits.kernels.tokens_run import STORED


class RowsAbreast(CompiledLinear):
    """y = x Ŵᵀ + b for a few tokens, of 4-bit weights with groups."""

    def __init__(self, weight: LinearWeight, bias: torch.Tensor | None) -> None:
        super().__init__(*weight.shape)
        zeros, self._groups = weight.zero_points, weight.scales.shape[1]
        size = self._in // self._groups
        parts = [by_panels(each) for each in (weight.codes, weight.scales)]
        parts.append(torch.zeros((len(parts[0]), work.PANEL), dtype=torch.uint8) if zeros is None else by_panels(zeros))
        behind = [parts[0].shape[1], parts[0].shape[1] + parts[1].shape[1]]
        panels, wide_bias = lined_up(parts), padded(bias, self._out, torch.float32)
        self._kept, self._panels = (panels, wide_bias), len(panels)
        self._blocks = -(-self._in // BLOCK)
        words = min(size, BLOCK) // work.INPUTS
        self._work = Work(
            work.rows_abreast(f"{WHOLE4}:{words}:{SCALE_NAMES[weight.scales.dtype]}"),
            {
                work.PANELS_AT: panels.data_ptr(),
                work.PANEL_BYTES: panels.shape[1],
                work.HEIGHT: self._out,
                work.GROUPS: self._groups,
                work.GROUP_INPUTS: size,
                work.SCALES_BEHIND: behind[0],
                work.SCALE_BYTES: work.PANEL * weight.scales.element_size(),
                work.ZEROS_BEHIND: behind[1],
                work.ZERO_BYTES: 0 if zeros is None else work.PANEL,
                work.X_STRIDE: self._blocks * X_BYTES,
                work.BIAS_AT: wide_bias.data_ptr(),
            },
        )
        self._arrange = Work(
            arranged.arranged(),
            {
                arranged.COLUMNS: self._in,
                arranged.GROUPS: self._groups,
                arranged.ORDER: WHOLE_SECONDS,
                arranged.RAISED_BY: weight.scheme.midpoint if zeros is None else 0,
            },
        )

    def steps(self, x: torch.Tensor, out: torch.Tensor) -> Steps:
        """Arrange the activations, multiply."""
        tokens = x.shape[0]
        # Finer dtypes are the sum of two whole numbers.
        parts = 1 if x.dtype == torch.bfloat16 else 2
        values = torch.empty((tokens, parts, self._blocks, X_BYTES), dtype=torch.uint8)
        units, sums = torch.empty((tokens, parts, self._groups)), torch.empty((tokens, parts, 2, self._groups))
        arrange = self._arrange.step(tokens, {
            arranged.X_AT: x.data_ptr(), arranged.X_KIND: STORED[x.dtype], arranged.OUT_AT: values.data_ptr(),
            arranged.SUMS_AT: sums.data_ptr(), arranged.PARTS: parts, arranged.UNITS_AT: units.data_ptr(),
        })  # fmt: skip
        multiply = self._work.step(self._panels, {
            work.X_AT: values.data_ptr(), work.PARTS: parts, work.TOKENS: tokens, work.X_SUMS_AT: sums.data_ptr(),
            work.X_UNITS_AT: units.data_ptr(), work.OUT_AT: out.data_ptr(), work.OUT_KIND: STORED[out.dtype],
        })  # fmt: skip
        return Steps((arrange, multiply), (values, units, sums))


def by_panels(rows: torch.Tensor) -> torch.Tensor:
    """Numbers [out, n] by panels, zeros behind the last: bytes [panels, n · rows of a panel · bytes of a number].

    Of a panel, the first number of each row comes first, then the second of each.
    """
    count = -(-len(rows) // work.PANEL)
    panels = torch.zeros((count * work.PANEL, rows.shape[1]), dtype=rows.dtype)
    panels[: len(rows)] = rows
    arranged = panels.view(count, work.PANEL, -1).transpose(1, 2).contiguous()
    return arranged.view(count, -1).view(torch.uint8)


def lined_up(parts: list[torch.Tensor]) -> torch.Tensor:
    """Bytes [n, …] side by side, and zeros, so that each row begins a line of memory."""
    width = sum(part.shape[1] for part in parts)
    zeros = torch.zeros((len(parts[0]), -width % work.VECTOR), dtype=torch.uint8)
    return torch.cat([*parts, zeros], 1)
