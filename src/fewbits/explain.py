"""Explain: which kernel each kind of layer would run on here, and why the better ones can't. Reads headers only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from fewbits.checkpoints.reader import TensorReader, open_checkpoint
from fewbits.decoded import split_quantized
from fewbits.devices import usable_device
from fewbits.errors import CheckpointError
from fewbits.formats import FORMATS
from fewbits.kernels.choose import reasons_against
from fewbits.kernels.spec import LinearSpec, machine_of
from fewbits.methods import METHODS
from fewbits.schemes import Scheme

TOKENS = (1, 16, 512)
# A layer of a model of seven billion parameters.
SAMPLE_SHAPE = (4096, 4096)


@dataclass(frozen=True)
class Choice:
    """What a number of tokens runs on. kernel: None if nothing can. reasons: what keeps the better ones away."""

    tokens: int
    kernel: str | None
    reasons: dict[str, str]


@dataclass(frozen=True)
class LayerKind:
    """Layers that are alike: the last part of their names, numbers and shape [out, in]."""

    name: str
    count: int
    scheme: Scheme
    shape: tuple[int, int]
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Explanation:
    """What runs on what. features: what kernels ask of the machine and find."""

    device: str
    dtype: str
    features: tuple[str, ...]
    kinds: tuple[LayerKind, ...]


def explain(
    folder: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    tokens: Iterable[int] = TOKENS,
) -> Explanation:
    """Which kernels the layers of a checkpoint, or of the six methods, run on.

    Args:
        folder: a quantized checkpoint; the methods' defaults on one shape if None.

    Raises:
        CheckpointError: the folder holds no quantized checkpoint. KernelError: there is no such device.
    """
    target = usable_device(device)
    layers = _methods() if folder is None else _stored(folder)
    kinds = tuple(
        LayerKind(name, count, scheme, shape, tuple(_choice(scheme, shape, n, dtype, target) for n in tokens))
        for (name, scheme, shape), count in layers.items()
    )
    machine = machine_of(target)
    capability = () if machine.capability is None else ("capability " + ".".join(map(str, machine.capability)),)
    return Explanation(str(target), str(dtype).removeprefix("torch."), (*sorted(machine.features), *capability), kinds)


_Kinds = dict[tuple[str, Scheme, tuple[int, int]], int]


def _methods() -> _Kinds:
    return {(name, method().scheme, SAMPLE_SHAPE): 1 for name, method in METHODS.items()}


def _stored(folder: str | Path) -> _Kinds:
    checkpoint = open_checkpoint(folder, allow_quantized=True)
    quantized, _ = split_quantized(checkpoint)
    if not quantized:
        raise CheckpointError(f"{folder} is not quantized; its linears run on torch's own product.")
    found: _Kinds = {}
    with TensorReader(checkpoint) as reader:
        for module, layer in quantized.items():
            headers = {name: checkpoint.tensors[name] for name in layer.tensors}
            shape = FORMATS[layer.format].shape_of(module, layer.scheme, headers, reader.read)
            key = (module.rpartition(".")[2], layer.scheme, shape)
            found[key] = found.get(key, 0) + 1
    return found


def _choice(scheme: Scheme, shape: tuple[int, int], tokens: int, dtype: torch.dtype, device: torch.device) -> Choice:
    spec = LinearSpec(scheme, shape[1], shape[0], tokens, dtype, device.type, machine_of(device))
    against: dict[str, str] = {}
    for kernel, reason in reasons_against(spec).items():
        if reason is None:
            return Choice(tokens, kernel, against)
        against[kernel] = reason
    return Choice(tokens, None, against)
