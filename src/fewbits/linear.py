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
from fewbits.kernels.spec import LinearSpec, Run, machine_of
from fewbits.methods import QuantMethod
from fewbits.schemes import Scheme
from fewbits.solvers.rtn import quantize_rows
from fewbits.tensors import QuantizedWeight

# Kernels change at certain numbers of tokens, the last of them below this.
MANY_TOKENS = 1024
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
            "codes": weight.data,
            "scales": weight.scales,
            "zero_points": weight.zero_points,
            "input_order": weight.input_order,
            "bias": bias,
        }
        for buffer, tensor in tensors.items():
            self.register_buffer(buffer, None if tensor is None else tensor.detach().to(device))
        self._runs: dict[tuple[int, torch.dtype], Run] = {}

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
        return QuantizedWeight(
            self.codes, self.scales, self.zero_points, shape, self.method, self.scheme.group_size, self.input_order
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The decoded weight [out, in]."""
        return self.quantized_weight().dequantize(dtype or self.dtype)

    def prepare(self, tokens: Iterable[int] = SHOWN_TOKENS) -> None:
        """Make ready now, for these numbers of tokens, what would otherwise be at the first call."""
        for count in tokens:
            self._run(count, self.dtype)

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
        if x.shape[-1] != self.in_features:
            raise QuantizationError(f"{self.name or 'QuantLinear'}: expected {self.in_features} inputs, got {x.shape}")
        rows = x.reshape(-1, self.in_features)
        if self.input_order is not None:
            rows = rows.index_select(1, self.input_order)
        return self._run(rows.shape[0], x.dtype)(rows).view(*x.shape[:-1], self.out_features)

    def _run(self, tokens: int, dtype: torch.dtype) -> Run:
        key = (min(tokens, MANY_TOKENS), dtype)
        if key not in self._runs:
            weight = self.quantized_weight()
            ordered = QuantizedWeight(
                weight.data, weight.scales, weight.zero_points, weight.shape, weight.method, weight.group_size
            )
            self._runs[key] = choose(self.spec(key[0], dtype)).prepare(ordered, self.bias)
        return self._runs[key]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantLinear:
        # A cast of the model's dtype must reach the bias, but neither scales nor float8 codes.
        stored = {name: getattr(self, name).dtype for name in ("codes", "scales")}
        before = {name: getattr(self, name) for name in stored}
        super()._apply(fn, recurse)
        for name, dtype in stored.items():
            moved = getattr(self, name)
            if moved.dtype != dtype:
                setattr(self, name, before[name].to(moved.device))
        self._runs.clear()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_runs": {}}

    def extra_repr(self) -> str:
        kernels = ", ".join(f"{count}: {name}" for count, name in self.kernels().items())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.scheme}, kernels by tokens: {kernels}"
        )
