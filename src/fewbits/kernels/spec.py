"""What a kernel is asked to run, and what a kernel is: the words that choosing one is done in."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch

from fewbits.kernels.onednn import onednn_is_exact
from fewbits.packing import decode_codes, flip_top_bit, unpack_rows
from fewbits.schemes import Scheme

# A linear made ready: activations [tokens, in] to [tokens, out] in the activations' dtype, bias included.
Run = Callable[[torch.Tensor], torch.Tensor]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Machine:
    """What a device can do, as far as kernels care.

    features: "numba", "triton", "exact_u8s8" (oneDNN sums int8 products without saturation), "bf16_products",
        "byte_products" (instructions that compiled kernels have), "prefers_bytes" (bytes' are the faster),
        "matrix_units" (AMX).
    capability: compute capability of a CUDA device, None elsewhere.
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


@dataclass(frozen=True, eq=False)
class LinearWeight:
    """A quantized weight as kernels take it: the tensors of a `QuantizedWeight`, float8 codes as their bits (uint8)."""

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None
    shape: tuple[int, int]
    scheme: Scheme

    def decoded(self) -> torch.Tensor:
        """The weight in fp32 [out, in]."""
        codes, zeros = self.codes, self.zero_points
        if self.scheme.kind == "float":
            codes = codes.view(torch.float8_e4m3fn)
        elif self.scheme.bits == 8:
            codes = flip_top_bit(codes, torch.uint8)
            zeros = None if zeros is None else flip_top_bit(zeros, torch.uint8)
        else:
            codes = unpack_rows(codes, self.scheme.bits, self.shape[1])
        return decode_codes(codes, self.scales, zeros, self.scheme)


@dataclass(frozen=True, eq=False)
class Steps:
    """Compiled work that a program may hold (kernels.team).

    buffers: what it writes and reads on the way; they have to stay alive as long, as do the linear, its input and its
    output.
    """

    blocks: tuple[Any, ...]
    buffers: tuple[torch.Tensor, ...] = ()


@runtime_checkable
class Compiled(Protocol):
    """A linear made ready that is compiled from end to end."""

    def steps(self, x: torch.Tensor, out: torch.Tensor) -> Steps:
        """What makes `out` [tokens, out] of contiguous `x` [tokens, in]."""


class Kernel(Protocol):
    """One way to multiply with a quantized weight."""

    @property
    def name(self) -> str:
        """What tables and `repr` call it."""

    def why_not(self, spec: LinearSpec) -> str | None:
        """Why it can't run `spec`, or shouldn't because others are faster; None if it can."""

    def prepare(self, weight: LinearWeight, bias: torch.Tensor | None) -> Run:
        """Make a linear ready. What this allocates depends on the machine: it is never saved or copied."""


def not_compiled(spec: LinearSpec) -> str | None:
    """Why no kernel compiled by Numba can run `spec`, whichever it is."""
    if spec.device != "cpu":
        return "runs on CPUs"
    if "numba" not in spec.machine.features:
        return "needs Numba"
    if spec.dtype not in FLOATS:
        return f"takes fp32, bf16 and fp16 activations, not {spec.dtype}"
    return None


def _instructions() -> set[str]:
    from fewbits.kernels import lanes
    from fewbits.kernels.matrix_units import HAS_MATRIX_UNITS

    found = {
        "bf16_products": lanes.HAS_BF16, "byte_products": lanes.HAS_VNNI, "prefers_bytes": lanes.PREFERS_BYTES,
        "matrix_units": HAS_MATRIX_UNITS,
    }  # fmt: skip
    return {name for name, there in found.items() if there}


@cache
def machine_of(device: torch.device) -> Machine:
    """What this device can do."""
    features = {name for name in ("numba", "triton") if importlib.util.find_spec(name) is not None}
    if device.type == "cuda":
        return Machine(frozenset(features), torch.cuda.get_device_capability(device))
    if device.type == "cpu":
        features |= {"exact_u8s8"} if onednn_is_exact() else set()
        features |= _instructions() if "numba" in features else set()
    return Machine(frozenset(features))
