"""The one statistic: what a calibration pass keeps of a linear's inputs, and the accumulator that gathers it.

H = Σ wₜ xₜ xₜᵀ over all tokens, with wₜ = 1 or the importance of token t; never the inputs themselves.

Rows in bf16 are multiplied as such where the processor has dot products of them: exact products, summed in fp32, in
half the time. √wₜ xₜ is rounded to bf16 for it, so H stays a sum of squares; each is off by at most 2⁻⁹ of itself, and
as these errors are independent they add up to some 1e-6 of the diagonal. All other rows are brought to fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from fewbits.drift import Drift
from fewbits.fp32_products import fast_fp32
from fewbits.kernels.gram_tiles import TILE, GramTiles, fits

# Bytes of rows brought to fp32 at a time, so that they stay in the last-level cache, and the fewest and the most rows:
# sums over 800 and more MKL divides among its threads, over 512 it did not with 2 to 32 of them.
PART_BYTES = 12 << 20
FEWEST_ROWS, MOST_ROWS = 256, 512
# Rows of H computed at a time: more of them compute more that symmetry gives for free, fewer run below full speed.
# At widths 576, 1536 and 4096 (Zen 4, two threads) these were within a tenth of the fastest.
NARROW_PANEL, PANEL = 128, 256
NARROW = 1024
# Rows of weights multiplied at a time.
SOME_ROWS = 512


@dataclass(frozen=True)
class Statistics:
    """What was seen of one distinct input, [in] or [in, in] channels wide.

    gram: H = Σ wₜ xₜ xₜᵀ, fp32 [in, in], symmetric, not divided by anything; the weights' mean is about 1.
    absmax, absmean: of |x| by channel, fp32 [in], over all rows seen; weights play no part in them.
    tokens: rows in the Gram. effective_tokens: (Σ w)² / Σ w², equal to `tokens` without weights.
    drift: of the same tokens (`drift.py`); None if it was not measured.
    """

    gram: torch.Tensor
    absmax: torch.Tensor
    absmean: torch.Tensor
    tokens: int
    effective_tokens: float
    drift: Drift | None = None

    def to(self, device: torch.device | str) -> Statistics:
        """The same on another device."""
        return replace(
            self, gram=self.gram.to(device), absmax=self.absmax.to(device), absmean=self.absmean.to(device),
            drift=None if self.drift is None else self.drift.to(device),
        )  # fmt: skip


class StatisticsAccumulator:
    """Adds up the Statistics of one input, a few rows at a time, always in the same order of operations."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.width = width
        self.tokens = 0
        self._seen = 0
        self._gram = torch.zeros(width, width, device=device)
        self._absmax = torch.zeros(width, device=device)
        self._tiles: GramTiles | None = None
        self._absolute = torch.zeros(width, dtype=torch.float64, device=device)
        self._weight = 0.0
        self._squared_weight = 0.0
        self._panel = NARROW_PANEL if width <= NARROW else PANEL
        self._rows = min(max(FEWEST_ROWS, PART_BYTES // (4 * width)), MOST_ROWS)
        # Kept from call to call: fresh memory of this size costs more than what is done with it.
        self._part = torch.empty(0, width, device=device)
        self._scratch = torch.empty(0, width, device=device)

    def add(self, inputs: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add rows.

        Args:
            inputs: [..., width], any float dtype.
            weights: fp32, one number a row; 1 for every row if None.
        """
        rows = inputs.reshape(-1, self.width)
        if weights is not None and weights.numel() != len(rows):
            raise ValueError(f"{len(rows)} rows of input, but {weights.numel()} weights")
        self.tokens += len(rows)
        self._seen += len(rows)
        if weights is None:
            self._weight += len(rows)
            self._squared_weight += len(rows)
        else:
            wide = weights.double()
            self._weight += float(wide.sum())
            self._squared_weight += float(wide.square().sum())
        roots = None if weights is None else weights.double().sqrt().float()
        if fits(rows):
            self._tiles = self._tiles or GramTiles(self._gram, self._absmax, self._absolute)
            self._tiles.add(rows, roots)
        else:
            self._add_in_fp32(rows, roots)

    def add_magnitudes(self, inputs: torch.Tensor) -> None:
        """Add rows [..., width] to the magnitudes alone: a Gram that only ranks candidates needs no more of them."""
        rows = inputs.reshape(-1, self.width)
        self._seen += len(rows)
        absolute = rows.abs()
        torch.maximum(self._absmax, absolute.amax(0).float(), out=self._absmax)
        self._absolute += absolute.sum(0, dtype=torch.float32)

    def _add_in_fp32(self, rows: torch.Tensor, roots: torch.Tensor | None) -> None:
        if len(self._part) < min(len(rows), self._rows):
            self._part = self._part.new_empty(min(len(rows), self._rows), self.width)
            self._scratch = torch.empty_like(self._part)
        for start in range(0, len(rows), self._rows):
            count = min(self._rows, len(rows) - start)
            part = self._part[:count].copy_(rows[start : start + count])
            self._add_magnitudes(part)
            if roots is not None:
                part.mul_(roots[start : start + count, None])
            self._add_gram(part)

    def _add_magnitudes(self, rows: torch.Tensor) -> None:
        absolute = torch.abs(rows, out=self._scratch[: len(rows)])
        torch.maximum(self._absmax, absolute.amax(0), out=self._absmax)
        self._absolute += absolute.sum(0)

    def _add_gram(self, rows: torch.Tensor) -> None:
        with fast_fp32():
            for top in range(0, self.width, self._panel):
                panel = slice(top, top + self._panel)
                self._gram[panel, top:].addmm_(rows[:, panel].T, rows[:, top:])

    def products(self, W: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Some columns at a time of W · H, fp32 [n, width], of the rows added so far."""
        gram = self._gram
        for start in range(0, self.width, PANEL):
            panel = slice(start, start + PANEL)
            middle, below = gram[panel, panel], gram[panel, start + PANEL :]
            columns = torch.cat([gram[:start, panel], middle.triu() + middle.triu(1).T, below.T])
            with fast_fp32():
                product = torch.cat([part.to(gram.device).float() @ columns for part in torch.split(W, SOME_ROWS)])
            yield panel, product

    def finish(self) -> Statistics:
        """The Statistics of all rows added so far."""
        gram = self._gram
        # Below the diagonal only what lies in the panels or tiles around it is there.
        step = self._panel if self._tiles is None else TILE
        self._tiles = None
        self._part = self._scratch = self._part.new_empty(0, self.width)
        for top in range(0, self.width, step):
            below, panel = slice(top + step, None), slice(top, top + step)
            gram[below, panel] = gram[panel, below].T
        effective = self._weight**2 / self._squared_weight if self._squared_weight else 0.0
        absmean = (self._absolute / max(self._seen, 1)).float()
        return Statistics(gram, self._absmax, absmean, self.tokens, effective)
