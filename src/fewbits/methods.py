"""The six methods: named choices of scheme, transform and solver. Frozen, compared by value, checked by `validate`."""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from fewbits.errors import QuantizationError
from fewbits.schemes import Activations, Scheme

GroupSize = int | Literal["channel"]


@dataclass(frozen=True)
class QuantMethod(ABC):
    """What every method has in common.

    A method says which numbers are stored (`scheme`), what makes the weights easier beforehand (`transform`), and how
    the codes are chosen (`solver`).
    """

    short_name: ClassVar[str]
    transform: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        # NumPy's numbers become Python's, so that every method prints, compares and writes alike.
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, numbers.Integral) and not isinstance(value, int):
                object.__setattr__(self, field.name, int(value))
            elif isinstance(value, numbers.Real) and not isinstance(value, int | float):
                object.__setattr__(self, field.name, float(value))

    @property
    def bits_per_weight(self) -> int:
        """Bits of one code; scales and zero points come on top (`fewbits.plan` counts them)."""
        return self.scheme.bits

    @property
    def compression_ratio(self) -> float:
        """16 / bits: how much smaller than fp16 the codes are. Raises QuantizationError for an impossible method."""
        self.validate()
        return 16 / self.bits_per_weight

    @property
    @abstractmethod
    def scheme(self) -> Scheme:
        """The numbers that this method stores."""

    @property
    def solver_name(self) -> str:
        """How codes are chosen: "rtn" or "gptq"."""
        return "rtn"

    @property
    def needs_calibration(self) -> bool:
        """Whether the method looks at activations."""
        return self.transform is not None or self.solver_name != "rtn"

    @abstractmethod
    def validate(self) -> None:
        """Raise QuantizationError if a field is impossible."""


def _is_word(value: object, *words: str) -> bool:
    # Type first: an array compares with a word element by element.
    return isinstance(value, str) and value in words


def _check_activations(name: str, activations: object) -> None:
    if activations is not None and not _is_word(activations, "dynamic"):
        raise QuantizationError(f'{name} activations must be "dynamic" or None, got {activations!r}')


def _check_group_size(name: str, group_size: object) -> None:
    if _is_word(group_size, "channel"):
        return
    if not isinstance(group_size, int) or isinstance(group_size, bool):
        raise QuantizationError(f'{name} group_size must be a whole number or "channel", got {group_size!r}')
    if group_size <= 0:
        raise QuantizationError(f"{name} group_size must be > 0, got {group_size}", 'use 32, 64, 128, 256 or "channel"')


def _check_solver(name: str, solver: object) -> None:
    if not _is_word(solver, "rtn", "gptq"):
        raise QuantizationError(f'{name} solver must be "rtn" or "gptq", got {solver!r}')


def _stored_group_size(group_size: GroupSize) -> int:
    return 0 if isinstance(group_size, str) else group_size


@dataclass(frozen=True)
class Int8Symmetric(QuantMethod):
    """8-bit integers, one scale per output channel, round to nearest.

    activations: "dynamic" makes W8A8 (int8 per token); None is weight-only.
    """

    activations: Activations = "dynamic"
    short_name: ClassVar[str] = "int8"

    @property
    def scheme(self) -> Scheme:
        return Scheme("int", 8, symmetric=True, activations=self.activations)

    def validate(self) -> None:
        _check_activations("INT8", self.activations)

    def __str__(self) -> str:
        return "INT8-Symmetric"


@dataclass(frozen=True)
class Int4Asymmetric(QuantMethod):
    """4-bit integers with a scale and an integer zero point per group, both searched; no calibration data."""

    group_size: GroupSize = 128
    short_name: ClassVar[str] = "int4"

    @property
    def scheme(self) -> Scheme:
        return Scheme("int", 4, symmetric=False, group_size=_stored_group_size(self.group_size))

    def validate(self) -> None:
        _check_group_size("INT4", self.group_size)

    def __str__(self) -> str:
        return "INT4-Asymmetric"


@dataclass(frozen=True)
class Fp8E4M3(QuantMethod):
    """8-bit floats (e4m3fn), one scale per output channel; activations likewise per token unless None."""

    activations: Activations = "dynamic"
    short_name: ClassVar[str] = "fp8"

    @property
    def scheme(self) -> Scheme:
        return Scheme("float", 8, symmetric=True, activations=self.activations)

    def validate(self) -> None:
        _check_activations("FP8", self.activations)

    def __str__(self) -> str:
        return "FP8-E4M3"


@dataclass(frozen=True)
class AWQ(QuantMethod):
    """Activation-aware scaling folded into each input's producer, clipping, then int4 asymmetric.

    Source: Lin et al. 2023, arXiv 2306.00978. `solver="gptq"` chooses the codes by GPTQ after the scaling.
    """

    group_size: GroupSize = 128
    solver: Literal["rtn", "gptq"] = "rtn"
    short_name: ClassVar[str] = "awq"
    transform: ClassVar[str | None] = "awq"

    @property
    def scheme(self) -> Scheme:
        return Scheme("int", 4, symmetric=False, group_size=_stored_group_size(self.group_size))

    @property
    def solver_name(self) -> str:
        return self.solver

    def validate(self) -> None:
        _check_group_size("AWQ", self.group_size)
        _check_solver("AWQ", self.solver)

    def __str__(self) -> str:
        return f"AWQ(group={self.group_size})"


@dataclass(frozen=True)
class SmoothQuant(QuantMethod):
    """Difficulty moved from activations to weights, then W8A8.

    Source: Xiao et al. 2022, arXiv 2211.10438. alpha: 0 leaves the weights, 1 flattens the activations; "auto" searches
    per fold.
    """

    alpha: float | Literal["auto"] = 0.5
    short_name: ClassVar[str] = "smoothquant"
    transform: ClassVar[str | None] = "smoothquant"

    @property
    def scheme(self) -> Scheme:
        return Scheme("int", 8, symmetric=True, activations="dynamic")

    def validate(self) -> None:
        if _is_word(self.alpha, "auto"):
            return
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float):
            raise QuantizationError(f'SmoothQuant alpha must be a number in [0.0, 1.0] or "auto", got {self.alpha!r}')
        if math.isnan(self.alpha) or not 0.0 <= self.alpha <= 1.0:
            raise QuantizationError(f"SmoothQuant alpha must be in [0.0, 1.0], got {self.alpha}")

    def __str__(self) -> str:
        alpha = f"{self.alpha:.2f}" if isinstance(self.alpha, int | float) else self.alpha
        return f"SmoothQuant(α={alpha})"


@dataclass(frozen=True)
class GPTQ(QuantMethod):
    """Second-order rounding, column by column, on calibration data.

    Source: Frantar et al. 2022, arXiv 2210.17323. bits: 1 to 8; files store 2, 3, 4 and 8, each format its own choice.
    """

    bits: int = 4
    group_size: GroupSize = 128
    symmetric: bool = True
    short_name: ClassVar[str] = "gptq"

    @property
    def scheme(self) -> Scheme:
        return Scheme("int", self.bits, symmetric=self.symmetric, group_size=_stored_group_size(self.group_size))

    @property
    def solver_name(self) -> str:
        return "gptq"

    def validate(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int):
            raise QuantizationError(f"GPTQ bits must be a whole number, got {self.bits!r}")
        if not 1 <= self.bits <= 8:
            raise QuantizationError(f"GPTQ bits must be in [1, 8], got {self.bits}")
        _check_group_size("GPTQ", self.group_size)
        if not isinstance(self.symmetric, bool):
            raise QuantizationError(f"GPTQ symmetric must be true or false, got {self.symmetric!r}")

    def __str__(self) -> str:
        return f"GPTQ({self.bits}bit, group={self.group_size})"


METHODS: dict[str, type[QuantMethod]] = {
    "int8": Int8Symmetric,
    "int4": Int4Asymmetric,
    "fp8": Fp8E4M3,
    "awq": AWQ,
    "smoothquant": SmoothQuant,
    "gptq": GPTQ,
}


def method_options(method_class: type[QuantMethod]) -> tuple[str, ...]:
    """Names of the fields a method takes, in order."""
    return tuple(field.name for field in fields(method_class))


def method_fields(method: QuantMethod) -> dict[str, Any]:
    """The method as plain data: its short name and its fields."""
    return {"name": method.short_name} | {name: getattr(method, name) for name in method_options(type(method))}
