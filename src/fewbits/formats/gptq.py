"""GPTQ: the layout of AutoGPTQ and GPTQModel, which vLLM, SGLang and transformers (with gptqmodel) load.

| tensor    | dtype, shape           | what                                                       |
|-----------|------------------------|------------------------------------------------------------|
| `qweight` | int32 [K·b/32, N]      | each column a little-endian stream of an output's codes     |
| `qzeros`  | int32 [G, N·b/32]      | each row a stream of zero points: z (version 2) or z − 1 (1) |
| `scales`  | fp16 [G, N]            | W = (code − z) · scale, codes unsigned                     |
| `g_idx`   | int32 [K]              | the group of each input: k // g, or any in activation order |

Symmetric weights have z = 2^(b−1), and their words are believed whatever version the config claims. Version 1 cannot
hold a zero point of 0, so asymmetric weights are written as version 2 (docs/decisions/0004).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fewbits.errors import CheckpointError
from fewbits.formats import gptq_config
from fewbits.formats.rounded_rows import as_tensors, check_scales, pack_along, rows_of, words_of
from fewbits.formats.stored import DAMAGED, Shaped, check, check_groups, method_of, required
from fewbits.layout import WEIGHT_DTYPES, OutputTensor, stored_dtype
from fewbits.schemes import Scheme

if TYPE_CHECKING:
    import torch

    from fewbits.kernels.rows import Array, RoundedRows
    from fewbits.tensors import QuantizedWeight


@dataclass(frozen=True)
class GptqFormat:
    """One version of the layout."""

    version: int

    PARTS = ("qweight", "qzeros", "scales", "g_idx", "weight")
    ROW_AXIS = 1
    CONFIG_FILES = ("quantize_config.json",)

    @property
    def NAME(self) -> str:
        return gptq_config.V1 if self.version == 1 else gptq_config.V2

    def reads(self, config: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with this quantization_config is in this format."""
        is_v2 = config.get("checkpoint_format") == gptq_config.V2
        return config.get("quant_method") == gptq_config.METHOD and is_v2 == (self.version == 2)

    def quantized_modules(self, tensors: Iterable[str]) -> list[str]:
        """The modules that stored tensors show to be quantized, in order."""
        return [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """The reason why a weight [out, in] of this scheme cannot be stored, or None."""
        if scheme.kind != "int" or scheme.activations is not None or scheme.bits not in gptq_config.BITS:
            return f"{self.NAME} stores ints of 2, 3, 4 or 8 bits with activations left alone, not {scheme}"
        if self.version == 1 and not scheme.symmetric:
            return f"{self.NAME} stores z − 1, which a zero point of 0 does not fit; {gptq_config.V2} stores z"
        if not scheme.divides(shape[1]):
            return f"group size {scheme.group_size} does not divide {shape[1]} inputs"
        for count, what in zip(shape, ("outputs", "inputs"), strict=True):
            if count * scheme.bits % 32:
                return f"{self.NAME} packs whole 32-bit words, which {count} {what} of {scheme.bits} bits do not fill"
        return None

    def why_not_together(self, schemes: Mapping[str, Scheme | None]) -> str | None:
        """Nothing: every layer may have a scheme of its own."""
        return None

    def settled(self, schemes: Iterable[Scheme]) -> str:
        """Version 2 as soon as some layer has zero points."""
        return self.NAME if all(scheme.symmetric for scheme in schemes) else gptq_config.V2

    def tensors_for(
        self, module: str, scheme: Scheme, shape: tuple[int, int], scale_dtype: str
    ) -> tuple[OutputTensor, ...]:
        """The tensors that hold a weight [out, in], or a tile of its rows."""
        rows, columns = shape
        groups = scheme.groups(columns)
        return (
            OutputTensor(f"{module}.qweight", "I32", (columns * scheme.bits // 32, rows)),
            OutputTensor(f"{module}.qzeros", "I32", (groups, -(-rows * scheme.bits // 32))),
            OutputTensor(f"{module}.scales", scale_dtype, (groups, rows)),
            OutputTensor(f"{module}.g_idx", "I32", (columns,)),
        )

    def stored_rows(self, tensor: str, scheme: Scheme, start: int, stop: int) -> tuple[int, int]:
        """The columns of a stored matrix that hold rows [start, stop) of the weight; `start` is a multiple of 32."""
        if tensor.endswith(".qzeros"):
            return start * scheme.bits // 32, -(-stop * scheme.bits // 32)
        return start, stop

    def shape_of(
        self, module: str, scheme: Scheme, tensors: Mapping[str, Shaped], read: Callable[[str], torch.Tensor]
    ) -> tuple[int, int]:
        """[out, in] of a stored weight. Raises CheckpointError if its words are missing or hold no whole codes."""
        sizes = tuple(required(module, tensors, f"{module}.qweight").shape)
        if len(sizes) != 2 or 0 in sizes or sizes[0] * 32 % scheme.bits:
            raise CheckpointError(
                f"{module}.qweight has the shape {list(sizes)}; expected [in · {scheme.bits} / 32, out].", DAMAGED
            )
        rows, columns = sizes[1], sizes[0] * 32 // scheme.bits
        check_groups(module, scheme, columns)
        return rows, columns

    def scale_dtype(self, weight_dtype: str) -> str:
        """What the scales of a weight are stored in."""
        return "F16"

    def encode_rows(
        self, module: str, rows: RoundedRows, scheme: Scheme, shape: tuple[int, int], first_row: int
    ) -> dict[str, Array]:
        """The stored columns of a tile of rows, by full name; `g_idx` comes with the first.

        Args:
            shape: [out, in] of the whole weight.
        """
        import numpy as np

        check_scales(module, rows.scales)
        zeros = np.full(rows.scales.shape, scheme.midpoint, np.uint8) if rows.zeros is None else rows.zeros
        encoded = {
            f"{module}.qweight": words_of(rows, scheme).T,
            f"{module}.qzeros": pack_along(zeros.T - np.uint8(self.version == 1), scheme.bits),
            f"{module}.scales": rows.scales.T,
        }
        if first_row == 0:
            groups = scheme.groups(shape[1])
            encoded[f"{module}.g_idx"] = np.arange(groups, dtype=np.int32).repeat(shape[1] // groups)
        return encoded

    def encode(
        self, module: str, weight: QuantizedWeight, shape: tuple[int, int], first_row: int = 0
    ) -> dict[str, torch.Tensor]:
        """`encode_rows` for a weight, or a tile of its rows, with fp16 scales."""
        return as_tensors(self.encode_rows(module, rows_of(weight), weight.method.scheme, shape, first_row))

    def decode(
        self, module: str, tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int] | None = None
    ) -> QuantizedWeight:
        """The weight that stored tensors hold; inputs in activation order are sorted by group.

        Args:
            tensors: by full name, whole or the columns that `stored_rows` names for a tile. `g_idx` may be missing.
            shape: [rows, in] of what is given; read from the tensors by default.

        Raises:
            CheckpointError: a tensor is missing, has another dtype or shape than the scheme asks for, or contradicts
                it.
        """
        import torch

        from fewbits.packing import flip_top_bit
        from fewbits.tensors import QuantizedWeight

        shape = shape or self.shape_of(module, scheme, tensors, lambda name: tensors[name])
        scales = required(module, tensors, f"{module}.scales")
        scale_dtype = stored_dtype(scales.dtype)
        for expected in self.tensors_for(module, scheme, shape, scale_dtype if scale_dtype in WEIGHT_DTYPES else "F16"):
            if expected.name in tensors or not expected.name.endswith(".g_idx"):
                check(required(module, tensors, expected.name), expected, scheme)
        data = tensors[f"{module}.qweight"].t().contiguous()
        if scheme.bits == 8:
            data = flip_top_bit(data.view(torch.uint8), torch.int8)
        zeros = self._zeros(module, tensors, scheme, shape)
        if zeros is not None and scheme.bits == 8:
            zeros = flip_top_bit(zeros, torch.int8)
        order = _input_order(module, tensors.get(f"{module}.g_idx"), scheme, shape)
        if order is not None:
            data = _reordered(data, scheme, order)
        scales = scales.t().contiguous()
        return QuantizedWeight(data, scales, zeros, shape, method_of(scheme), scheme.group_size, order)

    def _zeros(
        self, module: str, tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]
    ) -> torch.Tensor | None:
        """Zero points uint8 [out, groups]; None if symmetric."""
        words = tensors[f"{module}.qzeros"]
        if scheme.symmetric:
            _symmetric_version(module, words, scheme, shape[0])
            return None
        return _unpacked_zeros(words, scheme.bits, shape[0], self.version).t().contiguous()

    def remark(self, module: str, tensors: Mapping[str, torch.Tensor], scheme: Scheme, rows: int) -> str | None:
        """What the zero points of a symmetric weight say against the config; the zero points are believed.

        Raises:
            CheckpointError: they are no symmetric weight's, or the order of the inputs is impossible.
        """
        index = tensors.get(f"{module}.g_idx")
        _input_order(module, index, scheme, (rows, 0 if index is None else len(index)))
        if not scheme.symmetric:
            return None
        found = _symmetric_version(module, tensors[f"{module}.qzeros"], scheme, rows)
        if found == self.version:
            return None
        return f"zero points of version {found}, though config.json says version {self.version}"

    def schemes_from_config(self, config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Scheme | None]:
        """What config.json says of each linear module."""
        return gptq_config.schemes_from_config(config, modules)

    def quantization_config(self, schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
        """What goes into config.json."""
        return gptq_config.quantization_config(schemes, self.NAME)


def _symmetric_version(module: str, words: torch.Tensor, scheme: Scheme, rows: int) -> int:
    """The version that the zero points of a symmetric weight show."""
    from fewbits.packing import unpack_rows

    zeros = unpack_rows(words, scheme.bits, rows)
    for version, zero in ((1, scheme.midpoint - 1), (2, scheme.midpoint)):
        if bool((zeros == zero).all()):
            return version
    raise CheckpointError(
        f"{module}.qzeros holds {int(zeros.min())} to {int(zeros.max())}; {scheme} takes {scheme.midpoint - 1} "
        f"everywhere (version 1) or {scheme.midpoint} (version 2).",
        'set "sym" to false in config.json if the weights were quantized with zero points',
    )


def _unpacked_zeros(words: torch.Tensor, bits: int, rows: int, version: int) -> torch.Tensor:
    """Zero points uint8 [groups, rows] of packed rows."""
    import torch

    from fewbits.packing import unpack_rows

    if version == 2:
        return unpack_rows(words, bits, rows)
    if 32 % bits == 0:
        # One is added to whole words: a zero point of 0 borrowed from its neighbours when they were written.
        ones = sum(1 << shift for shift in range(0, 32, bits))
        return unpack_rows((words.to(torch.int64) + ones) & 0xFFFFFFFF, bits, rows)
    return torch.bitwise_and(unpack_rows(words, bits, rows) + 1, 2**bits - 1)


def _input_order(
    module: str, index: torch.Tensor | None, scheme: Scheme, shape: tuple[int, int]
) -> torch.Tensor | None:
    """Inputs sorted by their group, from the group of each; None where that is their order anyway."""
    import torch

    if index is None:
        return None
    columns, groups = shape[1], scheme.groups(shape[1])
    size = columns // groups
    if torch.equal(index.to(torch.int64), torch.arange(columns) // size):
        return None
    outside = index[(index < 0) | (index >= groups)]
    if len(outside):
        raise CheckpointError(
            f"{module}.g_idx names group {int(outside[0])}; there are {groups} groups, counted from 0.", DAMAGED
        )
    counts = torch.bincount(index, minlength=groups)
    wrong = (counts != size).nonzero().flatten()
    if len(wrong):
        raise CheckpointError(
            f"{module}.g_idx puts {int(counts[wrong[0]])} inputs into group {int(wrong[0])}; groups have {size}.",
            DAMAGED,
        )
    return index.argsort(stable=True)


def _reordered(data: torch.Tensor, scheme: Scheme, order: torch.Tensor) -> torch.Tensor:
    """Codes as weights hold them, their columns taken in this order."""
    from fewbits.packing import pack_rows, unpack_rows

    if scheme.bits == 8:
        return data[:, order].contiguous()
    return pack_rows(unpack_rows(data, scheme.bits, len(order))[:, order], scheme.bits)
