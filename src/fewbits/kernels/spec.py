"""What a kernel is asked to run, and what a kernel is: the words that choosing one is done in."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

import torch

from fewbits.schemes import Scheme
from fewbits.tensors import QuantizedWeight

# A linear made ready: activations [tokens, in] to [tokens, out] in the activations' dtype, bias included.
Run = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Machine:
    """What a device can do, as far as kernels care.

    features: "numba", "triton", "exact_u8s8" (int8 products are summed without saturation), "bf16" (bf16 products in
    hardware). capability: compute capability of a CUDA device, None elsewhere.
    """

    features: frozenset[str] = frozenset()
    capability: tuple[int, int] | None = None


@dataclass(frozen=True)
class LinearSpec:
    """One call of a quantized linear: everything that the choice of a kernel may depend on.

    device: "cpu", "cuda", … dtype: of the activations. tokens: rows of the activations.
    """

    scheme: Scheme
    in_features: int
    out_features: int
    tokens: int
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    machine: Machine = field(default_factory=Machine)


class Kernel(Protocol):
    """One way to multiply with a quantized weight."""

    @property
    def name(self) -> str:
        """What tables and `repr` call it."""

    def why_not(self, spec: LinearSpec) -> str | None:
        """Why it can't run `spec`, or shouldn't because others are faster; None if it can."""

    def prepare(self, weight: QuantizedWeight, bias: torch.Tensor | None) -> Run:
        """Make a linear ready. What this allocates depends on the machine: it is never saved or copied."""


@cache
def machine_of(device: torch.device) -> Machine:
    """What this device can do."""
    features = {name for name in ("numba", "triton") if importlib.util.find_spec(name) is not None}
    if device.type == "cuda":
        return Machine(frozenset(features), torch.cuda.get_device_capability(device))
    return Machine(frozenset(features))
