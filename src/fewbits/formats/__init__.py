"""Formats: how quantized linears lie in files. Add one file with the functions of `Format`, and one line here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from fewbits.formats import awq, compressed_tensors
from fewbits.formats.gptq import GptqFormat
from fewbits.formats.stored import Shaped
from fewbits.layout import OutputTensor
from fewbits.schemes import Scheme

if TYPE_CHECKING:
    import torch

    from fewbits.kernels.rows import Array, RoundedRows
    from fewbits.tensors import QuantizedWeight


class Format(Protocol):
    """What every format answers; a module with these functions is one."""

    @property
    def NAME(self) -> str:
        """What the format is called here."""

    @property
    def PARTS(self) -> tuple[str, ...]:
        """Behind a module's name: beginnings of the names of its stored tensors."""

    @property
    def CONFIG_FILES(self) -> tuple[str, ...]:
        """Files beside config.json in which readers look for the quantization_config as well."""

    @property
    def ROW_AXIS(self) -> int:
        """The axis of stored matrices along which the rows of a weight lie: 0 or 1."""

    def reads(self, config: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with this quantization_config is in this format."""

    def quantized_modules(self, tensors: Iterable[str]) -> list[str]:
        """The modules that the names of stored tensors show to be quantized."""

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Why a weight [out, in] of this scheme cannot be stored, or None."""

    def why_not_together(self, schemes: Mapping[str, Scheme | None]) -> str | None:
        """Why modules of these schemes (None: not quantized) cannot be in one checkpoint, or None."""

    def settled(self, schemes: Iterable[Scheme]) -> str:
        """The name of the variation of this format that stores all these schemes."""

    def tensors_for(
        self, module: str, scheme: Scheme, shape: tuple[int, int], scale_dtype: str
    ) -> tuple[OutputTensor, ...]:
        """The tensors that hold a weight [out, in]."""

    def scale_dtype(self, weight_dtype: str) -> str:
        """What the scales of a weight are stored in."""

    def stored_rows(self, tensor: str, scheme: Scheme, start: int, stop: int) -> tuple[int, int]:
        """Which part of a stored tensor, along ROW_AXIS, holds rows [start, stop) of the weight."""

    def shape_of(
        self, module: str, scheme: Scheme, tensors: Mapping[str, Shaped], read: Callable[[str], torch.Tensor]
    ) -> tuple[int, int]:
        """[out, in] of a stored weight, from tensors or their headers; `read` fetches a small tensor."""

    def encode(
        self, module: str, weight: QuantizedWeight, shape: tuple[int, int], first_row: int = 0
    ) -> dict[str, torch.Tensor]:
        """The stored tensors of a tile of rows, by full name."""

    def encode_rows(
        self, module: str, rows: RoundedRows, scheme: Scheme, shape: tuple[int, int], first_row: int
    ) -> dict[str, Array]:
        """`encode` without torch, for rows as the rounding kernels leave them."""

    def decode(
        self, module: str, tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int] | None = None
    ) -> QuantizedWeight:
        """The weight that stored tensors hold."""

    def remark(self, module: str, tensors: Mapping[str, torch.Tensor], scheme: Scheme, rows: int) -> str | None:
        """What stored tensors (whole, or those of a tile of rows) say against the config where they are believed."""

    def quantization_config(self, schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
        """What goes into config.json."""

    def schemes_from_config(self, config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Scheme | None]:
        """What config.json says of each linear module."""


FORMATS: dict[str, Format] = {
    compressed_tensors.NAME: compressed_tensors,
    "gptq": GptqFormat(version=1),
    "gptq_v2": GptqFormat(version=2),
    awq.NAME: awq,
}


DEFAULT_FORMAT = compressed_tensors.NAME


def format_of_config(config: Mapping[str, Any]) -> Format | None:
    """The format of a checkpoint with this quantization_config; None if it is none of these."""
    return next((found for found in FORMATS.values() if found.reads(config)), None)
