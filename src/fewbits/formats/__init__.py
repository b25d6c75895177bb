"""Formats: how quantized linears lie in files. Add one file with the functions of `Format`, and one line here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from fewbits.formats import compressed_tensors
from fewbits.formats.compressed_tensors import Shaped
from fewbits.layout import OutputTensor
from fewbits.schemes import Scheme

if TYPE_CHECKING:
    import torch

    from fewbits.tensors import QuantizedWeight


class Format(Protocol):
    """What every format answers; a module with these functions is one."""

    @property
    def NAME(self) -> str:
        """The format's `quant_method`."""

    def quantized_modules(self, tensors: Iterable[str]) -> list[str]:
        """The modules that the names of stored tensors show to be quantized."""

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Why a weight [out, in] of this scheme cannot be stored, or None."""

    def tensors_for(
        self, module: str, scheme: Scheme, shape: tuple[int, int], scale_dtype: str
    ) -> tuple[OutputTensor, ...]:
        """The tensors that hold a weight [out, in]."""

    def stored_rows(self, tensor: str, scheme: Scheme, start: int, stop: int) -> tuple[int, int]:
        """Which rows of a stored tensor hold rows [start, stop) of the weight."""

    def shape_of(
        self, module: str, scheme: Scheme, tensors: Mapping[str, Shaped], read: Callable[[str], torch.Tensor]
    ) -> tuple[int, int]:
        """[out, in] of a stored weight, from tensors or their headers; `read` fetches a small tensor."""

    def encode(
        self, module: str, weight: QuantizedWeight, shape: tuple[int, int], first_row: int = 0
    ) -> dict[str, torch.Tensor]:
        """The stored tensors of a tile of rows, by full name."""

    def decode(
        self, module: str, tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int] | None = None
    ) -> QuantizedWeight:
        """The weight that stored tensors hold."""

    def quantization_config(self, schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
        """What goes into config.json."""

    def schemes_from_config(self, config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Scheme | None]:
        """What config.json says of each linear module."""


FORMATS: dict[str, Format] = {
    compressed_tensors.NAME: compressed_tensors,
}
