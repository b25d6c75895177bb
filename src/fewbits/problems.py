"""Problems: what a check found that is not as it should be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    where: a file, a tensor or a layer. found, expected: phrases; `expected` is "" where `found` is a whole sentence.
    """

    where: str
    found: str
    expected: str = ""

    def __str__(self) -> str:
        if not self.expected:
            return self.found if self.where in self.found else f"{self.where}: {self.found}"
        return f"{self.where}: found {self.found}; expected {self.expected}"
