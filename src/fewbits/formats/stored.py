"""What readers of every format share: stored tensors looked up and held against what their scheme asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, TypeVar

from fewbits.errors import CheckpointError
from fewbits.layout import OutputTensor, stored_dtype
from fewbits.methods import GPTQ, Fp8E4M3, GroupSize, Int4Asymmetric, Int8Symmetric, QuantMethod
from fewbits.schemes import Scheme

if TYPE_CHECKING:
    import torch

DAMAGED = "the checkpoint is damaged, or its config.json belongs to another: fetch it again"

Stored = TypeVar("Stored")


class Shaped(Protocol):
    """A tensor, or the header of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def required(module: str, tensors: Mapping[str, Stored], name: str) -> Stored:
    """A tensor of a module by its full name. Raises CheckpointError if there is none."""
    if name not in tensors:
        found = ", ".join(sorted(key.removeprefix(f"{module}.") for key in tensors)) or "nothing"
        raise CheckpointError(f"{module}: {name} is missing; found {found}.", DAMAGED)
    return tensors[name]


def check(tensor: torch.Tensor, expected: OutputTensor, scheme: Scheme) -> None:
    """Raise CheckpointError unless a tensor has the dtype and shape that its scheme asks for."""
    found = OutputTensor(expected.name, stored_dtype(tensor.dtype), tuple(tensor.shape))
    if found != expected:
        raise CheckpointError(
            f"{expected.name} is {found.dtype} {list(found.shape)}; {scheme} takes "
            f"{expected.dtype} {list(expected.shape)}.",
            DAMAGED,
        )


def check_groups(module: str, scheme: Scheme, columns: int) -> None:
    """Raise CheckpointError unless rows of so many inputs split into whole groups."""
    if not scheme.divides(columns):
        raise CheckpointError(f"{module}: group size {scheme.group_size} does not divide {columns} inputs.", DAMAGED)


def method_of(scheme: Scheme) -> QuantMethod:
    """A method that stores this scheme; a file does not say how its codes were chosen."""
    group_size: GroupSize = scheme.group_size or "channel"
    candidates: tuple[QuantMethod, ...] = (
        Int8Symmetric(scheme.activations),
        Fp8E4M3(scheme.activations),
        Int4Asymmetric(group_size),
        GPTQ(scheme.bits, group_size, scheme.symmetric),
    )
    for method in candidates:
        if method.scheme == scheme:
            return method
    raise CheckpointError(
        f"no method of fewbits stores {scheme}.", "see `fewbits inspect` for what the checkpoint holds"
    )
