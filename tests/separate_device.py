"""A device beside the processor that calls itself "cuda", for machines without one.

Its tensors compute with PyTorch's own kernels, but their memory is out of reach as a GPU's is: operations that mix them
with tensors of the processor fail as they do there, and so does NumPy. So code that runs here forgets no transfer;
what it can't tell is how a GPU rounds, or that the GPU's libraries have every operation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
import torch._dynamo  # looks at the functions that are replaced below, and wants them as they were
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from fewbits.kernels import ops
from fewbits.kernels.spec import machine_of

DEVICE = torch.device("cuda:0")
FREE_BYTES = 1 << 33
# Operations whose operands may lie on different devices: copies, and indices of the processor.
MIXED = {"copy_", "index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
OUT_OF_REACH = {torch.Tensor.numpy, torch.Tensor.__array__}
# Operators of our own, which choose a kernel for the device that their tensors are on.
OPERATORS: dict[str, Callable[..., torch.Tensor]] = {"linear": ops.linear._init_fn}
MAKERS = (
    "arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones", "ones_like", "rand",
    "rand_like", "randint", "randn", "randn_like", "tensor", "zeros", "zeros_like",
)  # fmt: skip


class SeparateTensor(torch.Tensor):
    """A tensor of the device. held: its values, in a tensor of the processor."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> SeparateTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=held.device,
        )  # fmt: skip
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        return f"SeparateTensor({self.held})"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.device.__get__:
            return DEVICE
        if function in OUT_OF_REACH:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        return super().__torch_function__(function, types, args, kwargs or {})

    @property
    def device(self) -> torch.device:
        return DEVICE

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_cpu(self) -> bool:
        return False

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name.partition("::")[2]
        if function.namespace == "fewbits":
            return OPERATORS[name](*args, **kwargs)
        if name not in MIXED:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor) and not isinstance(leaf, SeparateTensor) and leaf.dim() > 0:
                    raise RuntimeError(
                        f"{name}: Expected all tensors to be on the same device, but found at least two devices, "
                        f"cuda:0 and {leaf.device} ({list(leaf.shape)})!"
                    )
        plain_args, plain_kwargs = tree_map_only(SeparateTensor, lambda each: each.held, (args, kwargs))
        out = function(*plain_args, **plain_kwargs)
        if name == "copy_" and not isinstance(args[0], SeparateTensor):
            return args[0]
        out = tree_map_only(torch.Tensor, SeparateTensor, out)
        return return_and_correct_aliasing(function, args, kwargs, out)


class Moved(torch.autograd.Function):
    """A copy on the device, or from it."""

    @staticmethod
    def forward(context: Any, tensor: torch.Tensor, there: bool) -> torch.Tensor:
        return moved(tensor, there)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return moved(gradient, not isinstance(gradient, SeparateTensor)), None


def moved(tensor: torch.Tensor, there: bool) -> torch.Tensor:
    """A copy on the device (`there`) or the processor."""
    copy = (tensor.held if isinstance(tensor, SeparateTensor) else tensor).clone()
    return SeparateTensor(copy) if there else copy


def place(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A function that makes tensors, with `device=` understood."""

    def placed(*args: Any, **kwargs: Any) -> torch.Tensor:
        wanted = kwargs.get("device")
        if wanted is None or torch.device(wanted).type != "cuda":
            return make(*args, **kwargs)
        return moved(make(*args, **kwargs | {"device": "cpu"}), True)

    return placed


def _to(move: Callable[..., torch.Tensor], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`Tensor.to`, in all its forms."""
    wanted = kwargs.pop("device", None)
    if args and isinstance(args[0], torch.Tensor):
        wanted, args = args[0].device, (args[0].dtype, *args[1:])
    elif args and not isinstance(args[0], torch.dtype):
        wanted, args = args[0], args[1:]
    args = tuple(each for each in args if isinstance(each, torch.dtype))  # others say how to wait
    here = isinstance(tensor, SeparateTensor)
    if wanted is not None and torch.device(wanted).type == "meta":
        return move(tensor.held if here else tensor, "meta", *args, **kwargs)
    changed = move(tensor, *args, **kwargs) if args or kwargs else tensor
    there = here if wanted is None else torch.device(wanted).type == "cuda"
    return changed if here == there else cast(torch.Tensor, Moved.apply(changed, there))


@contextmanager
def separate_device() -> Iterator[None]:
    """Within, there is one device "cuda"."""
    _device_constructors()  # `with torch.device(…)` remembers which functions it is for: those that are there now
    move, make_subclass = torch.Tensor.to, torch.Tensor._make_subclass
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (FREE_BYTES, FREE_BYTES))
        patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        patch.setitem(sys.modules, "triton", None)  # its kernels would need a GPU
        patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
        for name in MAKERS:
            patch.setattr(torch, name, place(getattr(torch, name)))
        one_hot = torch.nn.functional.one_hot  # makes a tensor out of Python's reach
        patch.setattr(
            torch.nn.functional, "one_hot", lambda x, *args, **kwargs: one_hot(x.cpu(), *args, **kwargs).to(x)
        )
        patch.setattr(torch.Tensor, "to", lambda tensor, *args, **kwargs: _to(move, tensor, *args, **kwargs))
        patch.setattr(torch.Tensor, "cpu", lambda tensor: tensor.to("cpu"))
        patch.setattr(torch.Tensor, "cuda", lambda tensor: tensor.to("cuda"))
        # Subclasses that are made of a tensor of the device carry it themselves.
        patch.setattr(
            torch.Tensor, "_make_subclass",
            lambda kind, tensor, *rest: make_subclass(kind, getattr(tensor, "held", tensor), *rest),
        )  # fmt: skip
        machine_of.cache_clear()
        yield
    machine_of.cache_clear()
