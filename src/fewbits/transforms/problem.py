"""What a transform is given: the consumers of one input, what was seen of it, and how their weights will be rounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from fewbits.methods import QuantMethod
from fewbits.statistics import Statistics
from fewbits.transforms.ties import Ties

# Rounds scaled rows [R, K], given the weight of each column's error [K]: returns what the codes decode to.
Rounding = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class ScaleProblem:
    """Find s [K], positive, such that rounding W·s and multiplying it by X/s loses little.

    W: fp32 [N, K], all consumers of one input, stacked. ties: channels that share a scale, or have none.
    sample: some tokens of the input, fp32 [n, K].
    quick, final: how candidates may be rounded to be ranked, and how the weight will be rounded in the end.
    """

    W: torch.Tensor
    statistics: Statistics
    ties: Ties
    sample: torch.Tensor
    method: QuantMethod
    quick: Rounding
    final: Rounding

    def some_rows(self, count: int) -> torch.Tensor:
        """About `count` rows of W, evenly chosen."""
        return self.W[:: max(1, len(self.W) // count)]

    def centred(self, s: torch.Tensor, largest_ratio: float) -> torch.Tensor:
        """Scales around 1: within a ratio of it, 1 where nothing was seen or nothing can be scaled."""
        still = self.still
        if bool(still.all()):
            return torch.ones_like(s)
        s = s / s[~still].log().mean().exp()
        return s.clamp(1 / largest_ratio, largest_ratio).masked_fill(still, 1.0)

    @cached_property
    def largest_weights(self) -> torch.Tensor:
        """max |W| of each channel and those tied to it, fp32 [K]."""
        return self.ties.largest(self.W.abs().amax(0))

    @cached_property
    def still(self) -> torch.Tensor:
        """Channels whose scale is 1, bool [K]: never active, no weights, or nothing takes their scale up."""
        seen = self.ties.largest(self.statistics.absmax) > 0
        return ~(seen & (self.largest_weights > 0)) | self.ties.fixed
