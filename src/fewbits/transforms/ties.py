"""Ties: input channels that must share a scale, because one row of the producer feeds them all."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Ties:
    """rows: for each input channel the producer's row that it follows, int64 [in]; −1 where none does."""

    rows: torch.Tensor

    @property
    def fixed(self) -> torch.Tensor:
        """Channels that cannot be scaled, bool [in]."""
        return self.rows < 0

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        """The largest value among tied channels, for each channel [in]."""
        return self._reduced(values, "amax")

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over tied channels, for each channel [in]."""
        return self._reduced(values, "mean")

    def _reduced(self, values: torch.Tensor, how: str) -> torch.Tensor:
        place = self.rows.clamp_min(0)
        scaled = ~self.fixed
        reduced = values.new_zeros(int(place.max()) + 1)
        reduced.scatter_reduce_(0, place[scaled], values[scaled], how, include_self=False)
        return torch.where(scaled, reduced[place], values)
