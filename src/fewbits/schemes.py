"""Schemes: the numbers a weight is stored in. Nothing here says how the codes are chosen or how they lie on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["int", "float"]
Activations = Literal["dynamic"] | None


@dataclass(frozen=True)
class Scheme:
    """What a quantized linear stores and what its input is rounded to.

    kind: "int" codes on a uniform grid, or "float" (float8 e4m3fn).
    bits: width of one code.
    symmetric: no zero point; the grid is centred on zero.
    group_size: input channels that share one scale; 0 is one scale per output channel.
    activations: "dynamic" rounds the input to the same kind and width, one scale per token; None leaves it alone.
    """

    kind: Kind
    bits: int
    symmetric: bool
    group_size: int = 0
    activations: Activations = None

    @property
    def largest_code(self) -> int:
        """The largest unsigned code: 15 at 4 bits."""
        return (1 << self.bits) - 1

    @property
    def midpoint(self) -> int:
        """The unsigned code that stands for zero in a symmetric scheme: 8 at 4 bits."""
        return 1 << (self.bits - 1)

    def groups(self, in_features: int) -> int:
        """Scales in one row of a weight with `in_features` inputs."""
        return 1 if self.group_size == 0 else in_features // self.group_size

    def divides(self, in_features: int) -> bool:
        """Whether rows of `in_features` split into whole groups."""
        return self.group_size == 0 or in_features % self.group_size == 0

    def __str__(self) -> str:
        name = "fp8" if self.kind == "float" else f"int{self.bits}" + ("" if self.symmetric else " asymmetric")
        span = "per channel" if self.group_size == 0 else f"group {self.group_size}"
        return f"{name} {span}" + (", dynamic activations" if self.activations else "")
