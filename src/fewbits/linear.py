"""QuantLinear: a linear layer that keeps its weight quantized and multiplies on the kernel that fits each call.

Its buffers are the tensors that files hold. What a kernel prepares from them depends on the machine; it is made when
first needed and never saved or copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fewbits.errors import QuantizationError
from fewbits.kernels.choose import choose, reasons_against
from fewbits.kernels.ops import MANY_TOKENS, Runs, linear, prepare, runs_of
from fewbits.kernels.spec import LinearSpec, LinearWeight, machine_of
from fewbits.methods import QuantMethod
from fewbits.schemes import Scheme
from fewbits.solvers.rtn import quantize_rows
from fewbits.tensors import QuantizedWeight

SHOWN_TOKENS = (1, 16, 512)


class QuantLinear(nn.Module):
    """y = x Ŵᵀ + b with Ŵ kept quantized.

    Args:
        weight: the quantized weight [out, in].
        bias: [out], or None.
        dtype: of activations, for what `repr` and `kernels` show; a call takes what it is given.
        name: the module's name in its model, for messages.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: torch.Tensor | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        name: str = "",
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise QuantizationError(f"{name or 'bias'}: expected {self.out_features} biases, got {tuple(bias.shape)}")
        self.method, self.dtype, self.name = weight.method, dtype, name
        tensors = {
            # float8 as its bits: pickle loses float8 tensors, and a cast of the model would reach them.
            "codes": weight.data.view(torch.uint8) if weight.data.dtype == torch.float8_e4m3fn else weight.data,
            "scales": weight.scales,
            "zero_points": weight.zero_points,
            "input_order": weight.input_order,
            "bias": bias,
        }
        for buffer, tensor in tensors.items():
            self.register_buffer(buffer, None if tensor is None else tensor.detach().to(device))
        self._prepared: Runs | None = None
        # A module looks for its buffers in slow ways.
        self._device, self._reorders = self.codes.device, self.input_order is not None

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None
    input_order: torch.Tensor | None
    bias: torch.Tensor | None

    @classmethod
    def from_linear(cls, linear: nn.Linear, method: QuantMethod) -> QuantLinear:
        """Round a linear's weight to nearest by `method`'s scheme.

        Raises:
            QuantizationError: the method needs calibration data, its group size does not divide the inputs, or a
                weight is not finite.
        """
        method.validate()
        if method.needs_calibration:
            raise QuantizationError(
                f"{method} chooses codes by calibration data, which a single linear does not have.",
                "quantize the model with fewbits.quantize, or use Int8Symmetric, Int4Asymmetric or Fp8E4M3 here",
            )
        if not method.scheme.divides(linear.in_features):
            raise QuantizationError(
                f"group size {method.scheme.group_size} does not divide {linear.in_features} inputs.",
                'use a group size that does, or "channel"',
            )
        tile = quantize_rows(linear.weight.detach(), method)
        if tile.nonfinite:
            raise QuantizationError("a weight is NaN or infinite", "look for where training diverged")
        return cls(tile.weight, linear.bias, dtype=linear.weight.dtype, device=linear.weight.device)

    @property
    def scheme(self) -> Scheme:
        """The numbers that the weight is stored in."""
        return self.method.scheme

    def quantized_weight(self) -> QuantizedWeight:
        """The weight as formats write it; shares this layer's memory."""
        shape = (self.out_features, self.in_features)
        codes = self.codes.view(torch.float8_e4m3fn) if self.scheme.kind == "float" else self.codes
        return QuantizedWeight(
            codes, self.scales, self.zero_points, shape, self.method, self.scheme.group_size, self.input_order
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The decoded weight [out, in]."""
        return self.quantized_weight().dequantize(dtype or self.dtype)

    def prepare(self, tokens: Iterable[int] = SHOWN_TOKENS) -> None:
        """Make ready now, for these numbers of tokens, what would otherwise be at the first call."""
        for count in tokens:
            prepare(self._runs, (min(count, MANY_TOKENS), self.dtype), self._stored(), self.bias)

    def forget_prepared(self) -> None:
        """Let kernels prepare anew, after a buffer was replaced."""
        self._prepared = None

    def kernels(self, tokens: Iterable[int] = SHOWN_TOKENS) -> dict[int, str]:
        """The kernel that each number of tokens runs on."""
        return {count: choose(self.spec(count)).name for count in tokens}

    def reasons(self, tokens: int) -> dict[str, str | None]:
        """Every kernel in order of preference, with what keeps it from this many tokens; None if nothing does."""
        return reasons_against(self.spec(tokens))

    def spec(self, tokens: int, dtype: torch.dtype | None = None) -> LinearSpec:
        """What a kernel is asked for by a call with this many tokens."""
        device = self.codes.device
        return LinearSpec(
            self.scheme, self.in_features, self.out_features, tokens, dtype or self.dtype, device.type,
            machine_of(device),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.in_features or x.device != self._device:
            raise self._misfit(x)
        if self._reorders:
            assert self.input_order is not None
            x = x.index_select(-1, self.input_order)
        if (
            torch.compiler.is_compiling()
            or type(x) is not torch.Tensor
            or (x.requires_grad and torch.is_grad_enabled())
        ):
            return self._operator(x)
        rows = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        key = (min(len(rows), MANY_TOKENS), x.dtype)
        runs = self._prepared or self._runs
        run = runs.get(key) or prepare(runs, key, self._stored(), self.bias)
        y = run(rows)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)

    def _operator(self, x: torch.Tensor) -> torch.Tensor:
        """The same as an operator that compiled graphs hold and gradients flow through."""
        scheme = self.scheme
        y: torch.Tensor = linear(
            x, self.codes, self.scales, self.zero_points, self.bias, self.in_features,
            scheme.kind, scheme.bits, scheme.symmetric, scheme.group_size, scheme.activations is not None,
        )  # fmt: skip
        return y

    def _stored(self) -> LinearWeight:
        shape = (self.out_features, self.in_features)
        return LinearWeight(self.codes, self.scales, self.zero_points, shape, self.scheme)

    def _misfit(self, x: torch.Tensor) -> QuantizationError:
        return QuantizationError(
            f"{self.name or 'QuantLinear'}: expected [..., {self.in_features}] on {self.codes.device}, "
            f"got {list(x.shape)} on {x.device}"
        )

    @property
    def _runs(self) -> Runs:
        if self._prepared is None:
            self._prepared = runs_of(self.codes)
        return self._prepared

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._runs.clear()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantLinear:
        # A cast of the model's dtype reaches the bias, but must not round the scales.
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        self._prepared, self._device = None, self.codes.device
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared": None}

    def extra_repr(self) -> str:
        kernels = ", ".join(f"{count}: {name}" for count, name in self.kernels().items())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.scheme}, kernels by tokens: {kernels}"
        )
