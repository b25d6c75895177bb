"""How the scales of groups are searched: the candidates, and what they are compared by."""

from __future__ import annotations

from dataclasses import dataclass

# Losses of this many weights are added one by one, then such sums one by one: an order that kernels can keep.
SUMMED = 8


@dataclass(frozen=True)
class Search:
    """How a group's scale is searched: range factors from 1 down to `narrowest`, the least Σ wₖ |error|^power wins.

    `steps` counts the factors; 1 is plain min/max. Min/max itself is always among the candidates.
    """

    steps: int = 1
    narrowest: float = 0.8
    power: int = 2

    def factors(self) -> list[float]:
        """Factors of the min/max range, widest first."""
        if self.steps == 1:
            return [1.0]
        return [1.0 - (1.0 - self.narrowest) * step / (self.steps - 1) for step in range(self.steps)]


@dataclass(frozen=True)
class SweptSearch:
    """How a group's scale is searched where each candidate costs a sweep of the group: coarsely, then near the best.

    First `steps` factors from 1 down to `narrowest`, then those a third of a step above and below the best of them (two
    thirds below where it is 1), with its sign. One step is plain min/max.
    """

    steps: int = 4
    narrowest: float = 0.8

    def factors(self) -> list[float]:
        """Factors of the min/max range that all groups try, widest first."""
        return Search(self.steps, self.narrowest).factors()

    def nearby(self) -> list[float]:
        """What is added to the best of them afterwards."""
        third = (1.0 - self.narrowest) / max(1, self.steps - 1) / 3
        return [third, -third] if self.steps > 1 else []


MINMAX = Search()
# For rounding without calibration data; docs/methods/int4.md has the measurements behind these.
DATA_FREE_SEARCH = Search(steps=21, narrowest=0.8, power=4)
