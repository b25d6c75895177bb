"""Probing: a block run in fp32 on a few tokens, with some of its parameters scaled, to see what that does to the rest.

The block's parameters are replaced by fp32 copies for as long as the probe lasts, and every input of a matrix is kept.
Which tensor a norm's output is, and which linears multiply that very tensor, is seen by identity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from fewbits.suspended import hidden_of
from fewbits.watching import Product, Slot, WatchedWeight, watch

# Enough that every channel shows itself and most experts are reached; few enough to cost next to nothing.
PROBE_TOKENS = 64

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
# The identity of a tensor: another view of the same memory counts as the same.
Identity = tuple[Any, ...]
# A matrix of the block: a parameter, and for a stack the index of the slice.
Place = tuple[str, int | None]


@dataclass(frozen=True)
class Seen:
    """What entered one matrix: the slot, the input [tokens, in] and its identity."""

    slot: Slot
    inputs: torch.Tensor
    identity: Identity

    @property
    def place(self) -> Place:
        """The matrix."""
        return self.slot.parameter, self.slot.expert


class ProbedBlock:
    """A materialized block in fp32. `run` executes it; `scale_rows` and `scale_inputs` last until `reset`.

    Args:
        block: with its weights. run: calls the block's own forward with the given arguments.
        arguments: what the block is called with; only the first tokens of the first sample are used.

    inputs: what entered each matrix in the last run. norm_outputs: norms by the identity of what they returned;
    norm_rows: what they returned [tokens, width].
    """

    def __init__(self, block: nn.Module, run: Callable[[Arguments], Any], arguments: Arguments) -> None:
        self._block, self._call = block, run
        self._arguments = first_tokens(arguments, PROBE_TOKENS)
        self._originals: dict[str, tuple[nn.Module, str, torch.Tensor]] = {}
        self._copies: dict[str, torch.Tensor] = {}
        self._hooks: list[Any] = []
        self._touched: set[str] = set()
        self._alive: list[torch.Tensor] = []
        self.inputs: dict[Place, Seen] = {}
        self.norm_outputs: dict[Identity, str] = {}
        self.norm_rows: dict[str, torch.Tensor] = {}

    def __enter__(self) -> ProbedBlock:
        for name, child in self._block.named_modules():
            for key, parameter in child._parameters.items():
                if parameter is None:
                    continue
                full_name = f"{name}.{key}" if name else key
                self._originals[full_name] = child, key, parameter
                copy = _plain(parameter).to(torch.float32, copy=True)
                self._copies[full_name] = copy
                child._parameters[key] = copy
            weight = child._parameters.get("weight")
            if weight is not None and weight.dim() == 1:
                self._hooks.append(child.register_forward_hook(self._norm_hook(f"{name}.weight" if name else "weight")))
        watch(self._block, self._record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        for child, key, parameter in self._originals.values():
            child._parameters[key] = parameter  # type: ignore[assignment]
        self._alive.clear()

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        """The fp32 copies by name within the block."""
        return self._copies

    @property
    def hidden(self) -> torch.Tensor:
        """What enters the block [1, tokens, width]."""
        args, kwargs = self._arguments
        return next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))

    def run(self) -> torch.Tensor:
        """Run the block as its parameters stand; returns its hidden states, and leaves what entered each matrix."""
        self.inputs, self.norm_outputs, self.norm_rows = {}, {}, {}
        self._alive.clear()
        return hidden_of(self._call(self._arguments))

    def bias_of(self, parameter: str) -> str | None:
        """The bias beside a weight, as long as the weight has rows."""
        path, _, key = parameter.rpartition(".")
        bias = f"{path}.bias" if path else "bias"
        return bias if key == "weight" and bias in self._copies else None

    def rows_of(self, slot: Slot) -> torch.Tensor:
        """A matrix as [out, in], or a vector; what is written into it counts until `reset`."""
        self._touched.add(slot.parameter)
        matrix = self._copies[slot.parameter]
        matrix = matrix if slot.expert is None else matrix[slot.expert]
        return matrix.T if slot.transposed else matrix

    def scale_rows(self, slot: Slot, factors: torch.Tensor, offset: float = 0.0) -> None:
        """Multiply each row of a matrix (or (w + offset) of a vector), and its bias, by a factor [rows]."""
        rows = self.rows_of(slot)
        factors = factors.to(rows.device)
        if rows.dim() == 1:
            rows.add_(offset).mul_(factors).sub_(offset)
        else:
            rows.mul_(factors[:, None])
        bias = self.bias_of(slot.parameter)
        if bias is not None:
            self._touched.add(bias)
            self._copies[bias].mul_(factors)

    def scale_inputs(self, slot: Slot, factors: torch.Tensor) -> None:
        """Multiply what each input channel is multiplied with by a factor [in]."""
        rows = self.rows_of(slot)
        rows.mul_(factors.to(rows.device))

    def reset(self) -> None:
        """Undo all scaling."""
        for name in self._touched:
            self._copies[name].copy_(_plain(self._originals[name][2]))
        self._touched.clear()

    def _record(self, slot: Slot, inputs: torch.Tensor, product: Product) -> torch.Tensor:
        self._alive.append(inputs)  # so that no memory is used twice
        seen = Seen(slot, inputs.reshape(-1, inputs.shape[-1]), identity(inputs))
        self.inputs.setdefault(seen.place, seen)
        return product()

    def _norm_hook(self, parameter: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                self._alive.append(output)
                self.norm_outputs[identity(output)] = parameter
                self.norm_rows[parameter] = output.reshape(-1, output.shape[-1])

        return hook


def identity(tensor: torch.Tensor) -> Identity:
    """What two views of the same numbers share, as long as both are alive."""
    return tensor.data_ptr(), tensor.numel(), tensor.shape[-1], tensor._version, tensor.dtype


def first_tokens(arguments: Arguments, tokens: int, dtype: torch.dtype | None = torch.float32) -> Arguments:
    """A block's arguments cut to the first tokens of the first sample, floats in a dtype (None: as they are)."""
    args, kwargs = arguments
    hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    batch, length = hidden.shape[:2]

    def cut(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(cut(item) for item in value)
        if isinstance(value, dict):
            return {key: cut(item) for key, item in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        dims = value.dim()
        if dims > 1 and batch > 1 and value.shape[0] == batch:
            value = value[:1]
        # Tokens lie in the last dimension of ids, in the last two of masks, in the second of everything else.
        for dim in {1: (0,), 2: (1,), 3: (1,), 4: (2, 3)}.get(dims, ()):
            if value.shape[dim] == length:
                value = value.narrow(dim, 0, min(tokens, length))
        return value.to(dtype) if dtype is not None and value.is_floating_point() else value

    return tuple(cut(value) for value in args), {name: cut(value) for name, value in kwargs.items()}


def _plain(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.plain if isinstance(parameter, WatchedWeight) else parameter.detach()
