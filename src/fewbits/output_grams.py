"""Output Grams: which outputs of a linear the loss feels alike.

G = Σ gₜ gₜᵀ / ‖gₜ‖ over tokens, gₜ the loss's gradient at the outputs. As with inputs (`token_weights.py`), the root
tames the few tokens that would make up most of the sum. Outputs far apart are taken as uncoupled: only blocks along
the diagonal are kept (`coupled_runs.py`), so that memory grows with the number of outputs, not with its square.
Of long texts a share of the tokens serves, evenly spread: ENOUGH of them.
Source: Tseng et al. 2025, arXiv 2505.22988 (YAQA); differs by the root and the blocks.
"""

from __future__ import annotations

import torch

from fewbits.coupled_runs import COUPLED, coupled_runs
from fewbits.statistics import StatisticsAccumulator

# Tokens that an output Gram is made of, at least, where there are as many: from 30 for each output on, it needs no more
# damping than its least (docs/methods/gptq.md).
ENOUGH = 32 * COUPLED


def is_taken(micro_batch: int, tokens: int) -> bool:
    """Whether output Grams take up a micro-batch, by its number, of so many tokens in all."""
    return micro_batch % max(1, tokens // ENOUGH) == 0


def split(flat: torch.Tensor, outputs: int) -> list[torch.Tensor]:
    """The blocks of G of a linear, [run, run] each, from what `OutputGram.finish` gave."""
    sizes = [run.stop - run.start for run in coupled_runs(outputs)]
    return [
        part.view(size, size) for part, size in zip(torch.split(flat, [size**2 for size in sizes]), sizes, strict=True)
    ]


class OutputGram:
    """Adds up the G of one linear, some tokens at a time, always in the same order of operations."""

    def __init__(self, outputs: int, device: torch.device | str = "cpu") -> None:
        self._runs = coupled_runs(outputs)
        self._sums = [StatisticsAccumulator(run.stop - run.start, device) for run in self._runs]

    def add(self, gradient: torch.Tensor, norm: torch.Tensor) -> None:
        """Add tokens.

        Args:
            gradient: [tokens, outputs], any float dtype. norm: ‖gₜ‖, fp32 [tokens].
        """
        shares = torch.where(norm > 0, 1 / norm, 0.0)
        for run, total in zip(self._runs, self._sums, strict=True):
            total.add(gradient[:, run], shares)

    def finish(self) -> torch.Tensor:
        """The blocks of G one after the other, fp32 [Σ run²], on the CPU."""
        return torch.cat([total.finish().gram.view(-1) for total in self._sums]).cpu()
