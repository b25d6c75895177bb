"""Watched weights: tensors that report every matrix product they take part in as a linear's weight.

A model multiplies by its weights through `F.linear`, or, where they lie as [in, out], through `addmm` and `matmul`; as
modules or as slices of a stack of experts. All of these end here, so nothing needs to be known about modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fewbits.matrix_products import KeptWeight, fits, linear

# How a product is told: (slot, input, the product itself) → its result.
Watcher = Callable[["Slot", torch.Tensor, "Product"], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Product:
    """A product that is still to be made.

    compute: what the model called. inputs: [..., in]. rows: the weight as [out, in]. bias: what is added to the
    product; None for nothing. is_plain: whether that is all, without factors.
    """

    compute: Callable[[], torch.Tensor]
    inputs: torch.Tensor
    rows: torch.Tensor
    bias: torch.Tensor | None
    is_plain: bool

    def __call__(self, kept: KeptWeight | None = None) -> torch.Tensor:
        """Its result. kept: rows and bias, of those who make this product again."""
        fits_bias = self.bias is None or self.bias.shape == self.rows.shape[:1]
        if self.is_plain and fits_bias and fits(self.inputs, self.rows):
            return linear(self.inputs, self.rows, self.bias, kept)
        return self.compute()


@dataclass(frozen=True)
class Slot:
    """One matrix of a block: a whole parameter, or one expert's slice of it.

    parameter: its name within the block. expert: index of the slice, None for the whole. transposed: lies as [in, out].
    """

    parameter: str
    expert: int | None = None
    transposed: bool = False


class WatchedWeight(torch.Tensor):
    """A weight [out, in] (or a stack of them) that calls a watcher whenever it multiplies something."""

    plain: torch.Tensor
    slot: Slot
    watcher: Watcher

    @classmethod
    def around(cls, plain: torch.Tensor, slot: Slot, watcher: Watcher) -> WatchedWeight:
        """Watch `plain`; both share their memory, so what is written into `plain` is multiplied by from then on."""
        watched = torch.Tensor._make_subclass(cls, plain)
        watched.plain, watched.slot, watched.watcher = plain, slot, watcher
        return watched

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        product = _product(func, args, kwargs)
        plain_args = tuple(_plain(argument) for argument in args)
        plain_kwargs = {name: _plain(argument) for name, argument in kwargs.items()}
        if product is not None:
            inputs, weight, transposed, bias = product
            slot = Slot(weight.slot.parameter, weight.slot.expert, transposed)
            rows = weight.plain.T if transposed else weight.plain
            is_plain = not kwargs.keys() & {"alpha", "beta", "out"}
            made = Product(lambda: func(*plain_args, **plain_kwargs), inputs, rows, bias, is_plain)
            return weight.watcher(slot, inputs, made)
        result = func(*plain_args, **plain_kwargs)
        if func is torch.Tensor.__getitem__ and isinstance(args[0], WatchedWeight) and args[0].plain.dim() == 3:
            expert = _index(args[1])
            if expert is not None:
                return cls.around(result, Slot(args[0].slot.parameter, expert), args[0].watcher)
        return result


def _product(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, WatchedWeight, bool, torch.Tensor | None] | None:
    """(input, weight, whether it lies as [in, out], bias) if the call multiplies an input by a watched matrix."""
    bias = None
    if func is nn.functional.linear:
        inputs, weight, transposed = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight"), False
        bias = _argument(args, kwargs, 2, "bias")
    elif func is torch.addmm:
        inputs, weight, transposed = _argument(args, kwargs, 1, "mat1"), _argument(args, kwargs, 2, "mat2"), True
        bias = _argument(args, kwargs, 0, "input")
    elif func in (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__):
        inputs, weight, transposed = args[0], args[1] if len(args) > 1 else None, True
    else:
        return None
    if isinstance(weight, WatchedWeight) and not isinstance(inputs, WatchedWeight) and weight.plain.dim() == 2:
        return inputs, weight, transposed, bias
    return None


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs.get(name)


def _plain(argument: Any) -> Any:
    if isinstance(argument, WatchedWeight):
        return argument.plain
    if isinstance(argument, list | tuple) and any(isinstance(item, WatchedWeight) for item in argument):
        return type(argument)(_plain(item) for item in argument)
    return argument


def _index(index: Any) -> int | None:
    if isinstance(index, int):
        return index
    if isinstance(index, torch.Tensor) and index.dim() == 0 and index.dtype in (torch.int32, torch.int64):
        return int(index)
    return None


def watch(module: nn.Module, watcher: Watcher) -> None:
    """Watch every matrix and stack of matrices among the module's materialized parameters."""
    for name, child in module.named_modules():
        for key, parameter in list(child._parameters.items()):
            if parameter is not None and parameter.dim() in (2, 3) and not isinstance(child, nn.Embedding):
                full_name = f"{name}.{key}" if name else key
                plain = parameter.detach()
                # Set past `nn.Module`'s check for Parameter: a Parameter would copy the class, not the attributes.
                child._parameters[key] = WatchedWeight.around(plain, Slot(full_name), watcher)
